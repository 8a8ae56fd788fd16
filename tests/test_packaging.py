"""What is installed: an extra brings what its messages promise, a wheel all that the command needs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "attention_transfer"
OWN = "attention-transfer"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def requirements_of(name: str, extra: str) -> list[Requirement]:
    """What a distribution needs on this machine, or one of its extras does."""
    if name == OWN:
        return [Requirement(each) for each in (EXTRAS[extra] if extra else PROJECT["dependencies"])]
    found = [Requirement(each) for each in metadata.requires(name) or []]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": extra})]


@cache
def brought_by(extra: str) -> frozenset[str]:
    """The distributions that `pip install "attention-transfer[extra]"` installs beside this one."""
    seen, todo = set(), [(OWN, ""), (OWN, extra)]
    while todo:
        if (asked := todo.pop()) not in seen:
            seen.add(asked)
            for each in requirements_of(*asked):
                todo += [(canonicalize_name(each.name), wanted) for wanted in ("", *each.extras)]
    return frozenset(name for name, _ in seen) - {OWN}


def promises() -> list[tuple[str, str, str]]:
    """(place, package, extra) of each call that names an extra for a package which may be missing."""
    found = []
    for file in [*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("require", "check_installed"):
                texts = [each.value for each in call.args if isinstance(each, ast.Constant)]
                extra = next(each.value for each in call.keywords if each.arg == "extra")
                if isinstance(extra, ast.Constant):
                    found += [(f"{file.name}:{call.lineno}", text, str(extra.value)) for text in texts]
    return found


def test_every_message_names_an_extra_that_brings_the_package() -> None:
    assert len(promises()) > 30
    distributions = metadata.packages_distributions()
    for place, package, extra in promises():
        names = distributions[package.split(".")[0]]
        assert brought_by(extra) & {canonicalize_name(name) for name in names}, f"{place}: {package}"


def test_every_extra_of_the_documentation_is_there() -> None:
    folders = ((ROOT, "*.md"), (ROOT / "docs", "*.md"), (ROOT / "examples", "*.*"), (PACKAGE, "**/*.py"))
    pages = [page for folder, pattern in folders for page in folder.glob(pattern)]
    asked = "".join(page.read_text(encoding="utf-8") for page in pages)
    named = {extra for each in re.findall(rf"(?:\.|{OWN})\[([a-z,]+)\]", asked) for extra in each.split(",")}
    assert {"train", "onnx", "caffe", "loggers", "examples"} <= named <= set(EXTRAS)


def test_the_workflow_runs_the_tests_and_the_checks() -> None:
    """Those that people run, and no others."""
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["command"] == [".ci/run", "make check"]
    assert job["steps"][-1] == {"run": "${{ matrix.command }}"}
    assert re.search(r"^make test$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M)


def link_what_is_needed(extra: str, site: Path) -> None:
    """Put the distributions of an extra, taken from this environment, into another one."""
    for name in brought_by(extra):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m build` makes of a copy of the source, so that nothing is left in the checkout."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, folder / "source" / PACKAGE.name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, "source"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    there = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(f"{PACKAGE.name}/")}
    assert there == {path.relative_to(ROOT).as_posix() for path in files}


@pytest.mark.slow
def test_the_wheel_runs_the_demo_with_what_its_extra_brings(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has nothing else, far from the checkout."""
    place = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    (site,) = place.glob("lib/python*/site-packages")
    link_what_is_needed("demo", site)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"  # several, beside other tests, wait for each other

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    imported = run(python, "-c", "import attention_transfer; print(attention_transfer.__file__)")
    assert Path(imported.strip()) == site / "attention_transfer" / "__init__.py"
    with pytest.raises(AssertionError, match="No module named 'timm'"):
        run(python, "-c", "import timm")
    printed = run(place / "bin" / OWN, "demo")
    for row in ("teacher wrn-10-2", "student alone, wrn-10-1", "student with attention transfer, wrn-10-1"):
        assert re.search(rf"^{row} +[\d,]+ ", printed, re.M), printed
    assert (tmp_path / "runs" / "demo" / "maps.png").is_file()
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
