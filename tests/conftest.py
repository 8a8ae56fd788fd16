"""Fixtures shared by all tests, and the run-time check of array shapes (`pytest --shapes`)."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from attention_transfer.runs import Recipe

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", action="store_true", help="check every jaxtyping annotation at run time")
    parser.addoption("--slow", action="store_true", help="run the slow tier too")


def pytest_configure(config: pytest.Config) -> None:
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # else they get in each other's way
        threads = max(1, (os.cpu_count() or 1) // int(workers))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start
    if config.getoption("--shapes"):
        from jaxtyping import install_import_hook

        install_import_hook("attention_transfer", "shape_checker.check")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {} if config.getoption("--slow") else {"slow": "slow tier: run with --slow"}
    if config.getoption("--shapes"):
        skipped["unchecked"] = (
            "the checks of the annotations refuse what it does, get in its way, or have no new shape to see"
        )
    for item in items:
        for marker, reason in skipped.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _shared_folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no shared/{name} beside the checkout")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real CIFAR-10 as parquet files, where the folder is there."""
    return _shared_folder("data")


@pytest.fixture(scope="session")
def shared_reference() -> Path:
    """What a real Caffe computes, where the folder is there."""
    return _shared_folder("reference")


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 20 small colour images each, told apart by their colour."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for label, name in enumerate(["blue", "green", "red"]):
        (root / name).mkdir()
        for i in range(20):
            pixels = draw.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., label] += 120
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def tiny(image_folder: Path) -> Recipe:
    """A student alone, in seconds, the same on every machine; tests change what they are about."""
    from attention_transfer.runs import Recipe

    return Recipe(
        student="wrn-10-1",
        teacher=None,
        method="none",
        data=str(image_folder),
        validation=0.2,
        epochs=1,
        batch_size=10,
        pad=2,
        accelerator="cpu",
        precision="32-true",
    )


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT as Python has it, also where the tests run in a background job, which ignores it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For trainings so small that threads only get in each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"no disk of its own: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)
