"""Rooms import downwards only; importing the package loads nothing heavy, using it torch and no more."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import attention_transfer

PACKAGE = Path(attention_transfer.__file__).parent

# Each room with the rooms that it may know; every room may know itself and the helpers.
ALLOWED = {
    "kernels": set(),
    "functional": {"kernels"},
    "tokens": set(),
    "taps": {"tokens"},
    "locality": {"taps"},
    "pairs": {"functional", "taps"},
    "schedules": set(),
    "terms": {"functional", "pairs", "schedules"},
    "losses": {"terms"},
    "runs": {"schedules", "terms"},
    "plan": {"pairs"},
    "preflight": {"functional", "kernels", "locality", "pairs", "plan", "taps", "terms"},
    "distiller": {"functional", "kernels", "locality", "pairs", "plan", "preflight", "taps", "terms"},
    "models": set(),
    "data": set(),
    "visualize": {"functional", "runs", "taps", "terms"},
    "cache": {"data", "pairs"},
    "caffe": {"functional"},
    "export": {"cache", "data", "models", "runs", "training", "visualize"},
    "reproduction": {"cache", "models", "runs", "training"},
    "training": {
        *(
            "cache",
            "data",
            "distiller",
            "functional",
            "locality",
            "models",
            "pairs",
            "plan",
            "preflight",
            "runs",
            "schedules",
            "taps",
            "terms",
            "visualize",
        )
    },
}
HELPERS = {
    "_channels",
    "_choices",
    "_colours",
    "_errors",
    "_extras",
    "_files",
    "_hints",
    "_locks",
    "_machine",
    "_memory",
    "_onnx",
    "_outputs",
    "_patterns",
    "_quiet",
    "_pictures",
    "_ranks",
    "_reading",
    "_tables",
    "_trust",
    "_untouched",
    "_weights_path",
}
COMPOSERS = {"cli", "__main__", "__init__"}
HEAVY = [
    "torchvision",
    "timm",
    "lightning",
    "matplotlib",
    "jinja2",
    "pyarrow",
    "PIL",
    "jsonargparse",
    "yaml",
    "google.protobuf",
    "lmdb",
    "h5py",
]


def rooms_imported_by(file: Path) -> set[str]:
    package = ["attention_transfer", *file.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    inside = {name.split(".")[1] for name in found if name.startswith("attention_transfer.")}
    return {name for name in inside if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


def test_rooms_import_downwards_only() -> None:
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in COMPOSERS or room.startswith("_"):
            continue
        upwards = rooms_imported_by(file) - ALLOWED[room] - {room, *HELPERS}
        assert not upwards, f"{file.relative_to(PACKAGE)} imports {sorted(upwards)}"


LAZY_FACE = f"""
import pickle, sys
import attention_transfer as at

assert not {{"torch", "numpy", *{HEAVY}}} & sys.modules.keys()
assert at.functional.attention_map is at.attention_map
from attention_transfer import *

assert Distiller is at.Distiller
assert pickle.loads(pickle.dumps(at.Pair)) is at.Pair
assert "torch" in sys.modules
assert not set({HEAVY}) & sys.modules.keys()
"""


def test_import_loads_nothing_and_use_loads_torch_and_nothing_heavier() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", LAZY_FACE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WITHOUT_EXTRAS = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if {{name, name.split(".")[0]}} & set({HEAVY}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import torch
import attention_transfer as at
from attention_transfer.cli import main

student, teacher = (at.build_model(name) for name in ("wrn-10-1", "wrn-10-2"))
images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
at.Distiller(student, teacher, terms=[at.AttentionTransfer(1.0)], example_input=images)(images, labels)
try:
    at.caffe.read_net
except ImportError as error:
    assert "package protobuf, which is not installed" in str(error) and "transfer[caffe]" in str(error)
else:
    raise AssertionError("protobuf is there after all")
assert main(["--help"]) == 0
sys.exit(main(["train"]))
"""


def test_the_library_works_without_extras_and_the_command_names_the_one_it_needs() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        "attention-transfer: train: needs the package jsonargparse, which is not installed. "
        'Run: pip install "attention-transfer[train]"\n'
    )


def test_public_names_are_those_of_the_design() -> None:
    names = {
        "AttentionTransfer", "Distiller", "InputTransform", "KnowledgeDistillation", "Pair", "Taps",
        "attention_map", "attention_transfer_loss", "build_model", "convert_beta", "distillation_loss",
        "load_weights", "save_weights", "suggest_pairs",
    }  # fmt: skip
    assert names <= set(dir(attention_transfer))
    assert all(callable(getattr(attention_transfer, name)) for name in names)
    with pytest.raises(AttributeError, match="Distlier"):
        _ = attention_transfer.Distlier


WRITERS = {
    *("write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "rename", "mkdtemp", "mkstemp"),
    *("NamedTemporaryFile", "save_file", "save_model", "savetxt", "savez", "dump"),
    *("unlink", "rmdir", "removedirs"),
}
INTO_MEMORY = {"savefig", "save_image", "torch.save", "torch.export.save", "np.save"}
HARMLESS = {"shutil.disk_usage", "shutil.get_terminal_size", "shutil.which"}


def fault_of(call: ast.Call) -> str | None:
    """What a call writes or deletes past `_files`; a library may write into the `file` that it is given."""
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    texts = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    if last == "open" and any(set(text) & set("wax+") and set(text) <= set("rwabtx+") for text in texts):
        return f"{name} to write"
    is_renaming = last == "replace" and "." in name and len(call.args) == 1 and not call.keywords
    if last in WRITERS or is_renaming or (name.startswith("shutil.") and name not in HARMLESS):
        return name
    into_memory = last in INTO_MEMORY or name in INTO_MEMORY
    if into_memory and not any(isinstance(each, ast.Name) and each.id == "file" for each in call.args):
        return f"{name} past write_atomically"
    return None


def test_one_place_writes_and_deletes_and_one_prints() -> None:
    """So that no link is followed, no half of a file is left, nothing of others is deleted or printed raw."""
    own = {PACKAGE / "_files.py", PACKAGE / "_locks.py", PACKAGE / "_colours.py"}
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "benchmarks").glob("*.py")]
    for file in [file for file in files if file not in own and "pycaffe" not in file.parts]:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        faults = [f"line {call.lineno}: {fault}" for call in calls if (fault := fault_of(call))]
        if file.is_relative_to(PACKAGE):
            faults += [f"line {call.lineno}: print" for call in calls if ast.unparse(call.func) == "print"]
        assert not faults, f"{file.name}: {faults}"


@pytest.mark.parametrize(
    "code",
    [
        *('open(path, "w")', 'path.open(mode="ab")', "path.write_text(text)", "shutil.rmtree(folder)"),
        *("path.unlink()", "old.replace(new)", "torch.save(state, path)", 'figure.savefig("a.png")'),
    ],
)
def test_a_writer_of_its_own_is_found(code: str) -> None:
    (call,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert fault_of(call)
