"""Freed memory is kept where it is glibc's to keep, and left alone elsewhere; counted in page faults."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import resource, sys
from attention_transfer._memory import freed_memory, keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    bytearray(40_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, freed_memory(), sep=";")
"""
PAGES = 40_000_000 // os.sysconf("SC_PAGE_SIZE")  # that one of the blocks takes


def measure(act: str, **environment: str) -> tuple[int, str]:
    """Page faults of taking and freeing a block 20 times, and what is said of freed memory."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, act],
        capture_output=True,
        text=True,
        check=True,
        env=clean | environment,
    )
    faults, said = done.stdout.strip().split(";")
    return int(faults), said


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc"
)


def test_kept_memory_is_taken_from_the_system_once() -> None:
    faults, said = measure("keep")
    assert said == "freed memory kept"
    assert faults < 3 * PAGES
    faults, said = measure("leave")
    assert said == "freed memory given back"
    assert faults > 10 * PAGES


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"MALLOC_TRIM_THRESHOLD_": "100000"}, "freed memory as MALLOC_TRIM_THRESHOLD_ says"),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=100000"}, "freed memory as GLIBC_TUNABLES says"),
    ],
)
def test_the_users_settings_come_first(environment: dict[str, str], said: str) -> None:
    faults, text = measure("keep", **environment)
    assert text == said
    assert faults > 10 * PAGES


def test_settings_of_other_things_do_not_count() -> None:
    environment = {"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}
    assert measure("keep", **environment)[1] == "freed memory kept"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_another_allocator_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text(
        "#include <stddef.h>\nextern void *__libc_malloc(size_t);\n"
        "void *malloc(size_t size) { return __libc_malloc(size); }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "other.so", "other.c"], cwd=tmp_path, check=True)
    faults, said = measure("keep", LD_PRELOAD=str(tmp_path / "other.so"))
    assert said == "freed memory left to this system's allocator"
    assert faults > 10 * PAGES
