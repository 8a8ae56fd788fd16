"""Proof that the tests of failures, hostile files and several processes can fail.

Each line takes one guard out of a copy of the package, and names a test that must then fail, be killed, or
not come to its end.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "attention_transfer"
PATIENCE = 100  # seconds; each test takes less than 40
MEMORY = 24 << 30  # bytes of addresses: what unfolds without its guard must not take the machine with it


class Guard(NamedTuple):
    """Code, what stands in its place without the guard, and which test of which file finds out.

    Without the guards that say `endless` that test has no end; a slow machine proves nothing of the others.
    """

    file: str
    code: str
    without: str
    test: str
    endless: bool = False

    def __str__(self) -> str:
        return f"{self.file}: {self.code.strip()}"


KILLED = [
    Guard(
        "_files.py",
        "temporary.replace(path)",
        "temporary.unlink(path.write_bytes(temporary.read_bytes()) < 0)",
        "survival whoever_reads",
    ),
    Guard("data/batches.py", '_resume_at = state["position"]', "_resume_at = 0", "survival killed_at"),
    Guard(
        "training/checkpoints.py", "former(run.last_checkpoint), run", "run", "survival damaged_checkpoint"
    ),
    Guard(
        "training/checkpoints.py",
        "former(path) if path == self._keeps else None",
        "None",
        "survival damaged_checkpoint",
    ),
    Guard("training/checkpoints.py", "(part := archive.testzip())", "(part := None)", "survival flip_a_byte"),
    Guard(
        "training/checkpoints.py",
        'getattr(momentum, "shape", None) != parameter.shape',
        "False",
        "survival a_momentum",
    ),
    Guard("training/callbacks.py", "trainer.world_size == 1 and not has_saved", "False", "survival vanishes"),
    Guard("training/callbacks.py", "self._saved >= 60 * self.minutes", "self._saved < 0", "survival often"),
    Guard("training/module.py", "        before.restore()\n", "", "survival skipped_without"),
    Guard("training/module.py", "self._skipped_in_a_row > MOST_IN_A_ROW", "False", "survival broken"),
    Guard("training/finite.py", "(before < 0) & ~torch", "~torch", "survival first_bad"),
    Guard("training/fit.py", "        run.sweep()\n", "        pass\n", "survival before_its_first"),
    Guard("data/batches.py", "_or_the_reason(loader), rows", "loader, rows", "survival worker_that_dies"),
    Guard("data/batches.py", "images.share_memory_()", "images", "batches little_shared_memory"),
    Guard(
        "training/module.py",
        "before != self.teacher_fingerprint",
        "False",
        "training other_teacher_on_resume",
    ),
]

FILES = [
    Guard(
        "_files.py", "    check_writable(path)\n    data =", "    data =", "files nothing_is_written_through"
    ),
    Guard("_files.py", " | os.O_EXCL | _NO_LINK, 0o666)", ", 0o666)", "files temporary_name"),
    Guard("_files.py", "| _NO_LINK, 0o666)\n        with", "| _NO_LINK, 0o600)\n        with", "files umask"),
    Guard("_files.py", "    _remove_abandoned(path.parent)\n", "", "files killed_one_left"),
    Guard(
        "training/fit.py", "    with _alone(run):\n", "    with nullcontext():\n", "files a_second_training"
    ),
    Guard("training/fit.py", "run.check_links()", "pass", "files leads_out_of_it"),
    Guard("kernels/cpu.py", "            if place is None:\n", "            if True:\n", "full cache"),
    Guard("cli/caffe/lmdb.py", "except lmdb.Error as", "except KeyError as", "full each_verb"),
    Guard("training/fit.py", "    run.check_name()\n", "", "files output_that_cannot"),
    Guard(
        "training/checkpoints.py",
        ".mkdir(exist_ok=True)",
        ".mkdir(parents=True, exist_ok=True)",
        "files goes_away",
    ),
    Guard("runs/run.py", "elif not holds(result[name]):", "elif False:", "files lacks_something"),
    Guard(
        "runs/statistics.py",
        "return abs(value) <= MAX_MEASURABLE",
        "return math.isfinite(value)",
        "files draws_whatever",
    ),
    Guard("visualize/snapshots.py", "facts = parse_json(", "facts = json.loads(", "files nested_deeply"),
    Guard("runs/run.py", "if path.name not in known", "if False", "files files_beside"),
    Guard("runs/run.py", "text == recipe.to_yaml() and ", "", "files no_run_wrote"),
    Guard(
        "training/caching.py",
        "    with _alone(Path(folder)):\n",
        "    with nullcontext():\n",
        "files cache_is_built",
    ),
    Guard(
        "cli/caffe/train.py",
        'with _alone(prefix, "the snapshots", "snapshot_prefix"), ',
        "with ",
        "caffe_solver one_prefix",
    ),
    Guard("cli/caffe/train.py", ', _alone(path, "the log", "--log"):', ":", "caffe_solver one_prefix"),
    Guard("training/loggers.py", "        _check_links()\n", "        pass\n", "loggers through_no_link"),
    Guard("training/demo.py", "run.recipe.differences(recipe.resolved())", "False", "files the_demo"),
]

HOSTILE = [
    Guard(
        "models/checkpoint.py",
        """        _check_proportion(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickle protocols before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
""",
        '        return torch.load(path, map_location="cpu", weights_only=False)\n',
        "security a_pickle_that_runs",
    ),
    Guard(
        "models/checkpoint.py", "        _check_proportion(path)\n", "", "security a_small_checkpoint", True
    ),
    Guard(
        "models/checkpoint.py",
        'file.read(4) == b"PK',
        'zipfile.is_zipfile(path) or b"" == b"PK',
        "security an_archive_at",
    ),
    Guard(
        "models/checkpoint.py",
        "(stored := sum(storages.values()))",
        "(stored := 0)",
        "security lie_in_each_other",
    ),
    Guard("models/pickles.py", "self._work > self._allowed", "False", "security a_small_checkpoint", True),
    Guard(
        "models/pickles.py", "self._odd_keys > MOST_ODD_KEYS", "False", "security a_small_checkpoint", True
    ),
    Guard(
        "models/pickles.py",
        "default=0)\n        if depth > DEEPEST:",
        "default=0)\n        if False:",
        "security a_small_checkpoint",
    ),
    Guard("models/pickles.py", "each in _CODECS", "True", "security a_small_checkpoint"),
    Guard("models/pickles.py", "and needed * item >", "and 0 >", "security a_small_checkpoint"),
    Guard(
        "models/pickles.py",
        'raise pickle.UnpicklingError(f"GLOBAL {name}")',
        "return Made()",
        "security a_small_ch",
    ),
    Guard(
        "models/checkpoint.py", "entry.compress_type != zipfile.ZIP_STORED", "False", "security a_compressed"
    ),
    Guard("models/parts.py", "for _ in range(DEEPEST):", "while True:", "security contains_itself", True),
    Guard("models/weights.py", "if not is_plain(tensor):", "if False:", "security tensors_that_are_none"),
    Guard("training/card.py", "check_trusted(self.model, weights)", "pass", "security a_weights_file_names"),
    Guard(
        "training/card.py", "if not holds(getattr(self, name)):", "if False:", "security a_card_of_nonsense"
    ),
    Guard("runs/recipe.py", "check_models(values, path)", "pass", "security a_recipe_and_a_run"),
    Guard("training/cached.py", 'check_models(named, recipe.cache or "")', "pass", "security a_cache_names"),
    Guard("cli/__init__.py", "(factories or trusted()) and ", "", "security a_module_in_the_current"),
    Guard("_colours.py", "map(printable, lines)", "lines", "security whatever_a_name_holds"),
    Guard(
        "export/readme.py", "return _MARKS.sub(_without_meaning, text)", "return text", "security markdown"
    ),
    Guard("_reading.py", "if stat.S_ISREG(mode):", "if True:", "fuzz no_file_is_refused"),
    Guard("_reading.py", "isinstance(event, yaml.AliasEvent)", "False", "security yaml_makes_no"),
    Guard("_reading.py", "if is_deceptive(node.value):", "if False:", "security yaml_says_what"),
    Guard(
        "_reading.py",
        "if again := _first_twin([key.value for key in keys]):",
        "if again := 0:",
        "security yaml_says_what",
    ),
    Guard("_reading.py", "except RecursionError:", "except ZeroDivisionError:", "security deep_json"),
    Guard("_reading.py", "if _depth_exceeds(value, DEEPEST):", "if False:", "security deep_json"),
    Guard("_pictures.py", "        _refuse_deep(image)\n", "", "pictures more_than_8_bits"),
    Guard("_pictures.py", "for name in FORMATS:", 'for name in (*FORMATS, "EPS"):', "security postscript"),
    Guard("_pictures.py", "limit is not None and pixels > limit", "False", "security an_image_bomb"),
    Guard("data/parquet.py", "if held > limit:", "if False:", "security parquet_that_unfolds"),
    Guard(
        "data/parquet.py",
        "self._metadata.total_byte_size",
        "self._metadata.column(0).total_uncompressed_size",
        "security statistics_are_of_another",
    ),
    Guard("data/named.py", "file.read(promised + 1)", "file.read()", "security a_gzip_bomb"),
    Guard(
        "caffe/layers/data.py", " or found.external or found.is_virtual", "", "security hdf5_reads_nothing"
    ),
    Guard("caffe/layers/data.py", "found.nbytes > HDF5_UNFOLDED", "0 > HDF5_UNFOLDED", "security huge"),
    Guard("caffe/files/lmdb.py", "page in self._seen or depth > DEEPEST or ", "", "security damaged_lmdb"),
    Guard(
        "cache/shards.py",
        "path.resolve().is_relative_to(folder.resolve())",
        "True",
        "security nothing_outside",
    ),
    Guard("cache/store.py", "deep=self._compared.get(shard) != stamp", "deep=False", "cached flipped_bit"),
    Guard(
        "cache/manifest.py",
        "not all(_is_count(count) for count in (*counts, len(layers)))",
        "False",
        "security manifest",
    ),
    Guard("visualize/snapshots.py", "            kept._check()\n", "", "security kept_maps"),
    Guard("visualize/report.py", "autoescape=True", "autoescape=False", "security the_report_escapes"),
    Guard(
        "cli/train.py",
        "except (OSError, ValueError) as error:\n        say",
        "except KeyError as error:\n        say",
        "security damaged_run_beside",
    ),
]

DAMAGED = [
    Guard("data/parquet.py", "pa.ArrowException, OSError, ", "", "fuzz parquet"),
    Guard("_reading.py", "except Exception as error:", "except ValueError as error:", "fuzz recipe"),
    Guard("data/tar_index.py", "except (tarfile.TarError, ", "except (", "fuzz tar"),
    Guard("data/tar_index.py", " or (sizes > size - offsets).any()", "", "tars contradicts"),
]

SHARED = [
    Guard("training/module.py", "out.loss if share == 1 else out.loss * share", "out.loss", "several as_one"),
    Guard("training/module.py", "if reduce is None or not self.sums:", "if True:", "several train_as_one"),
    Guard("training/module.py", ", share=ours)\n", ")\n", "several train_as_one"),
    Guard(
        "training/module.py",
        'self.trainer.strategy.reduce(ours, reduce_op="mean")',
        "ours",
        "several train_as_one",
    ),
    Guard("training/module.py", "first=self.global_rank == 0", "first=True", "several a_stop_of_two"),
    Guard("training/fit.py", '"rank": processes.rank,', '"rank": 0,', "several train_as_one"),
    Guard("training/batchnorm.py", "        dist.all_reduce(tensor)\n", "", "several train_as_one"),
    Guard(
        "training/batchnorm.py",
        "return _Sum.apply(gradient.contiguous())",
        "return gradient",
        "several train_as_one",
    ),
    Guard("training/processes.py", "        _compare(", "        len(", "several other_settings"),
    Guard("training/processes.py", "> self.patience:", "> 1e9:", "several who_lives", True),
    Guard(
        "training/processes.py", "launch_process_observer = _watch", "watch = _watch", "several left_alone"
    ),
    Guard(
        "training/processes.py",
        "return say if is_first_process() else lambda line: None",
        "return say",
        "several train_as_one",
    ),
    Guard(
        "training/caching.py",
        "missing[processes.rank :: processes.size]",
        "missing[:1]",
        "several cache_of_one",
    ),
]
GUARDS = KILLED + FILES + HOSTILE + DAMAGED + SHARED


@pytest.mark.parametrize("guard", GUARDS, ids=str)
def test_each_guard_is_in_its_place(guard: Guard) -> None:
    assert (ROOT / PACKAGE / guard.file).read_text().count(guard.code) == 1


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its tests where they may be changed, in which every named test passes as it is."""
    folder = tmp_path_factory.mktemp("copy") / "main"
    for name in (PACKAGE, "tests", "reproductions", "examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for module in {guard.test.split()[0] for guard in GUARDS}:
        names = [guard.test.split()[1] for guard in GUARDS if guard.test.startswith(f"{module} ")]
        done = run(folder, module, " or ".join(names), patience=10 * PATIENCE)
        assert done.returncode == 0, done.stdout[-3000:]
    return folder


def run(
    folder: Path, module: str, names: str, *, patience: int = PATIENCE
) -> subprocess.CompletedProcess[str]:
    (file,) = (folder / "tests").glob(f"test_{module}*.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file), "-k", names]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=patience,
        preexec_fn=_within_memory,
    )


def _within_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


@pytest.mark.slow
@pytest.mark.parametrize("guard", GUARDS, ids=str)
def test_without_it_a_test_fails(guard: Guard, copy: Path) -> None:
    file = copy / PACKAGE / guard.file
    whole = file.read_text()
    file.write_text(whole.replace(guard.code, guard.without))
    try:
        done = run(copy, *guard.test.split())
    except subprocess.TimeoutExpired:
        if guard.endless:
            return
        # rare: a worker of PyTorch's DataLoader, killed while it holds a lock, leaves the loader waiting
        done = run(copy, *guard.test.split())
    finally:
        file.write_text(whole)
    failed = done.returncode == 1 and "failed" in done.stdout.splitlines()[-1]
    assert failed or done.returncode < 0, done.stdout[-3000:]
