"""Proof that the tests of failures, hostile files and several processes can fail.

A guard is the statement below a comment `# guard: NAME`, wherever that stands. Each line takes one out of a
copy of the package, and names a test that must then fail, be killed, or not come to its end.
"""

from __future__ import annotations

import ast
import os
import re
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


SKIP = "pass"
"""In place of the statement nothing is done."""
NEVER = "False"
"""In place of the condition; what is done if it holds is not."""


class Guard(NamedTuple):
    """A guard's name, what stands in its place without it, and which test of which file finds out.

    What stands in its place is `SKIP`, `NEVER`, or a line; for a guard of several lines one for each of them.
    Without the guards that say `endless` that test has no end; a slow machine proves nothing of the others.
    """

    name: str
    without: str | tuple[str, ...]
    test: str
    endless: bool = False

    def __str__(self) -> str:
        return self.name

    def place(self) -> Path:
        """The file that it stands in."""
        (file,) = (file for file, names in MARKED.items() if self.name in names)
        return file

    def taken_out_of(self, text: str) -> str:
        """The source of a file without it."""
        lines = text.split("\n")
        marked = [number for number, line in enumerate(lines) if self.name in _names(line)]
        instead = [self.without] if isinstance(self.without, str) else self.without
        for number, code in zip(reversed(marked), reversed(instead), strict=True):
            first = next(n for n in range(number, len(lines)) if not lines[n].lstrip().startswith("#"))
            indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
            last = first
            if code == SKIP:
                ends = [
                    s.end_lineno
                    for s in ast.walk(ast.parse(text))
                    if isinstance(s, ast.stmt) and s.lineno == first + 1
                ]
                last = max(ends) - 1
            elif code == NEVER:
                code = re.match(r"\s*(\w+)", lines[first])[1] + " False:"
            lines[first : last + 1] = [indent + code]
        return "\n".join(lines)


def _names(line: str) -> list[str]:
    """The guards that a comment marks."""
    found = re.fullmatch(r" *# guard: (.+)", line)
    return found[1].split(", ") if found else []


MARKED = {
    file: names
    for file in sorted((ROOT / PACKAGE).rglob("*.py"))
    if (names := [name for line in file.read_text().split("\n") for name in _names(line)])
}


KILLED = [
    Guard(
        "whole-files",
        "temporary.unlink(path.write_bytes(temporary.read_bytes()) < 0)",
        "survival whoever_reads",
    ),
    Guard("resume-position", "self._position = self._resume_at = 0", "survival killed_at"),
    Guard(
        "previous-checkpoint-read",
        "for path in (run.last_checkpoint, run.best_checkpoint):",
        "survival damaged_checkpoint",
    ),
    Guard("previous-checkpoint-kept", "keep = None", "survival damaged_checkpoint"),
    Guard("checkpoint-checksums", "if (part := None) is not None:", "survival flip_a_byte"),
    Guard("momentum-shapes", NEVER, "survival a_momentum"),
    Guard("save-on-failure", NEVER, "survival vanishes"),
    Guard("save-often", "due = self._saved < 0", "survival often"),
    Guard("skip-without-trace", SKIP, "survival skipped_without"),
    Guard("too-many-skipped", NEVER, "survival broken"),
    Guard(
        "first-bad-step",
        "self._step = torch.where(~torch.isfinite(loss), step, before)",
        "survival first_bad",
    ),
    Guard("sweep-before-start", SKIP, "survival before_its_first"),
    Guard(
        "dead-worker",
        "for (images, error), chosen in zip(loader, rows, strict=True):",
        "survival worker_that_dies",
    ),
    Guard("little-shared-memory", "return images", "batches little_shared_memory"),
    Guard("same-teacher-on-resume", NEVER, "training other_teacher_on_resume"),
]

FILES = [
    Guard("written-file-follows-no-link", SKIP, "files nothing_is_written_through"),
    Guard(
        "temporary-name-is-new",
        "descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666)",
        "files temporary_name",
    ),
    Guard(
        "mode-by-umask",
        "descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o600)",
        "files umask",
    ),
    Guard("abandoned-files-removed", SKIP, "files killed_one_left"),
    Guard("one-training-a-folder", "with nullcontext():", "files a_second_training"),
    Guard("run-folder-links", SKIP, "files leads_out_of_it"),
    Guard("numba-cache-may-fail", "if True:", "full cache"),
    Guard("lmdb-write-fails", "except KeyError as error:", "full each_verb"),
    Guard("output-name", SKIP, "files output_that_cannot"),
    Guard("folder-that-went", "path.parent.mkdir(parents=True, exist_ok=True)", "files goes_away"),
    Guard("result-facts", "elif False:", "files lacks_something"),
    Guard("measurable-numbers", "return math.isfinite(value)", "files draws_whatever"),
    Guard("nested-facts", "facts = json.loads((file.metadata() or {})[_KEY])", "files nested_deeply"),
    Guard("foreign-files-kept", "if others := []:", "files files_beside"),
    Guard("foreign-recipe-kept", "return place == self.folder.absolute()", "files no_run_wrote"),
    Guard("one-build-a-cache", "with nullcontext():", "files cache_is_built"),
    Guard("one-training-a-prefix", 'with _alone(path, "the log", "--log"):', "caffe_solver one_prefix"),
    Guard(
        "one-training-a-log",
        'with _alone(prefix, "the snapshots", "snapshot_prefix"):',
        "caffe_solver one_prefix",
    ),
    Guard("logger-links", SKIP, "loggers through_no_link"),
    Guard("demo-of-other-settings", "if differences := []:", "files the_demo"),
]

HOSTILE = [
    Guard(
        "weights-only",
        (SKIP, 'return torch.load(path, map_location="cpu", weights_only=False)'),
        "security a_pickle_that_runs",
    ),
    Guard(
        "weights-only",
        (SKIP, 'return torch.load(path, map_location="cpu", weights_only=False)'),
        "security a_small_checkpoint",
        endless=True,
    ),
    Guard("archive-or-pickle", "if zipfile.is_zipfile(path):", "security an_archive_at"),
    Guard("storages-share-no-bytes", "if (stored := 0) > path.stat().st_size:", "security lie_in_each_other"),
    Guard("pickle-work", NEVER, "security a_small_checkpoint", endless=True),
    Guard("pickle-odd-keys", NEVER, "security a_small_checkpoint", endless=True),
    Guard("pickle-depth", NEVER, "security a_small_checkpoint"),
    Guard("pickle-codecs", NEVER, "security a_small_checkpoint"),
    Guard("tensor-in-its-storage", NEVER, "security a_small_checkpoint"),
    Guard("pickle-globals", "return Made()", "security a_small_ch"),
    Guard("compressed-checkpoint", NEVER, "security a_compressed"),
    Guard("state-dict-depth", "while True:", "security contains_itself", endless=True),
    Guard("plain-tensors", NEVER, "security tensors_that_are_none"),
    Guard("factory-of-a-card", SKIP, "security a_weights_file_names"),
    Guard("card-facts", NEVER, "security a_card_of_nonsense"),
    Guard("factory-of-a-recipe", SKIP, "security a_recipe_and_a_run"),
    Guard("factory-of-a-cache", SKIP, "security a_cache_names"),
    Guard(
        "import-from-here",
        "if (here := str(Path.cwd())) not in sys.path:",
        "security a_module_in_the_current",
    ),
    Guard("printable-names", 'text = coloured("\\n".join(lines), stream)', "security whatever_a_name_holds"),
    Guard("markdown-of-names", "return text", "security markdown"),
    Guard("regular-files", "if True:", "fuzz no_file_is_refused"),
    Guard("yaml-aliases", NEVER, "security yaml_makes_no"),
    Guard("yaml-deceives", NEVER, "security yaml_says_what"),
    Guard("yaml-twins", "if again := 0:", "security yaml_says_what"),
    Guard("json-recursion", "except ZeroDivisionError:", "security deep_json"),
    Guard("json-depth", NEVER, "security deep_json"),
    Guard("deep-pixels", SKIP, "pictures more_than_8_bits"),
    Guard("image-formats", 'for name in (*FORMATS, "EPS"):', "security postscript"),
    Guard("image-bomb", NEVER, "security an_image_bomb"),
    Guard("parquet-bomb", NEVER, "security parquet_that_unfolds"),
    Guard(
        "parquet-bytes",
        "return self._metadata.column(0).total_uncompressed_size",
        "security statistics_are_of_another",
    ),
    Guard("gzip-bomb", "data = file.read()", "security a_gzip_bomb"),
    Guard("hdf5-elsewhere", "if not isinstance(found, h5py.Dataset):", "security hdf5_reads_nothing"),
    Guard("hdf5-bomb", NEVER, "security huge"),
    Guard("lmdb-loops", "if start + self._size > self._length:", "security damaged_lmdb"),
    Guard("shard-in-its-folder", "return True", "security nothing_outside"),
    Guard("shard-checksums", "fault = shard.fault(self.folder, deep=False)", "cached flipped_bit"),
    Guard("manifest-counts", NEVER, "security manifest"),
    Guard("kept-maps", SKIP, "security kept_maps"),
    Guard("report-escapes", "autoescape=False,", "security the_report_escapes"),
    Guard("damaged-run-beside", "except KeyError as error:", "security damaged_run_beside"),
]

DAMAGED = [
    Guard(
        "parquet-damaged", "except (UnicodeDecodeError, OverflowError, MemoryError) as error:", "fuzz parquet"
    ),
    Guard("yaml-errors", "except ValueError as error:", "fuzz recipe"),
    Guard("tar-damaged", "except (EOFError, ValueError, OverflowError) as error:", "fuzz tar"),
    Guard("tar-index-contradicts", "if min(offsets.min(), sizes.min()) < 0:", "tars contradicts"),
]

SHARED = [
    Guard("share-of-the-loss", "return out.loss", "several as_one"),
    Guard("totals-of-all", "if True:", "several train_as_one"),
    Guard(
        "draws-of-the-whole-batch",
        "return self.augment(images, whole=self.batches.whole(batch_idx))",
        "several train_as_one",
    ),
    Guard("mean-over-processes", "return ours", "several train_as_one"),
    Guard(
        "totals-counted-once",
        'self.training_totals.load_state_dict(checkpoint["training_totals"], first=True)',
        "several a_stop_of_two",
    ),
    Guard("rows-of-each-process", '"rank": 0,', "several train_as_one"),
    Guard("batchnorm-forward", SKIP, "several train_as_one"),
    Guard("batchnorm-backward", "return gradient", "several train_as_one"),
    Guard("same-settings", SKIP, "several other_settings"),
    Guard("silent-process", "elif False:", "several who_lives", endless=True),
    Guard("process-left-alone", SKIP, "several left_alone"),
    Guard("one-process-speaks", "return say", "several train_as_one"),
    Guard("cache-shared-out", "missing[:1],", "several cache_of_one"),
]

GUARDS = KILLED + FILES + HOSTILE + DAMAGED + SHARED


def test_every_guard_is_marked_and_every_mark_has_its_test() -> None:
    marked = [name for names in MARKED.values() for name in names]
    assert set(marked) == {guard.name for guard in GUARDS}
    assert len(marked) == sum(1 if isinstance(guard.without, str) else len(guard.without) for guard in GUARDS)


def test_what_stands_in_their_place_uses_no_name_that_is_gone(tmp_path: Path) -> None:
    """Otherwise the test would fail of that, and prove nothing."""
    for guard in GUARDS:
        text = guard.place().read_text()
        without = guard.taken_out_of(text)
        assert without != text
        (tmp_path / f"{guard.name}.py").write_text(without)
    rules = ["--isolated", "--select", "F821,E9", "--ignore", "F722", "--target-version", "py310"]
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", *rules, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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
    file = copy / guard.place().relative_to(ROOT)
    whole = file.read_text()
    file.write_text(guard.taken_out_of(whole))
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
