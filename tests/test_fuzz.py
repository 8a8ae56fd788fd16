# ruff: noqa: E501 (odd text, each on its line)
"""Damaged files and random text: every reader succeeds, or says in one clear line what is wrong."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fuzzers import IN_C, NO_FILES, READERS, Unclear, try_path, try_read

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st

from attention_transfer.caffe.files.prototxt import parse_net
from attention_transfer.caffe.schema import text_format
from attention_transfer.runs.recipe import Recipe, parse_pairs
from attention_transfer.schedules import parse_schedules
from attention_transfer.terms.declaration import built_in

configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "attention-transfer-hypothesis")

TERMS = tuple(built_in())
ROOM = 3 << 30  # bytes of address space that reading a file of a few kB may take
SECONDS = 10
EXAMPLES = 40

quick = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD = (
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x80",
    b"\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"[" * 64,
    b"nan",
    b"\n",
    b"-1e999",
)
STEPS = st.tuples(
    st.sampled_from(["cut", "flip", "splice", "put", "drop", "repeat"]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(ODD) | st.binary(max_size=6),
)


def mutate(seeds: list[bytes], which: int, steps: list[tuple[str, float, float, bytes]]) -> bytes:
    """One of the seeds, cut, with flipped bits, spliced with another, with odd bytes put in, ..."""
    data = bytearray(seeds[which % len(seeds)])
    for kind, first, second, extra in steps:
        at, other = int(first * len(data)), seeds[int(second * 1000) % len(seeds)]
        to = min(len(data), at + 1 + int(second * 40))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << int(second * 7)
        elif kind == "splice":
            data[at:] = other[int(second * len(other)) :]
        elif kind == "put":
            data[at : at + len(extra)] = extra
        elif kind == "drop":
            del data[at:to]
        else:
            data[at:at] = data[at:to] * (1 + int(first * 50))
    return bytes(data)


@contextmanager
def within_bounds() -> Iterator[None]:
    """Neither more memory nor more time than a small file is worth."""

    def late(*_: Any) -> None:
        raise Unclear(f"no answer within {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    former = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


SEEDS: dict[str, list[bytes]] = {}


@pytest.fixture(params=[kind for kind in READERS if kind not in IN_C])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param not in SEEDS:
        SEEDS[request.param] = READERS[request.param].seeds(tmp_path)
    return request.param


def test_the_files_to_begin_from_are_read(kind: str, tmp_path: Path) -> None:
    accepted = [try_read(kind, tmp_path, seed) for seed in SEEDS[kind]]
    if kind not in (
        "weights",
        "table",
        "image list",
        "reproduction",
    ):  # of these one, or one that lacks others
        assert all(accepted)


@quick
@given(data=st.binary(max_size=200))
def test_random_bytes(kind: str, tmp_path: Path, data: bytes) -> None:
    with within_bounds():
        try_read(kind, tmp_path, data)


@quick
@given(which=st.integers(0, 9), steps=st.lists(STEPS, min_size=1, max_size=5))
def test_damaged_files(kind: str, tmp_path: Path, which: int, steps: Any) -> None:
    with within_bounds():
        try_read(kind, tmp_path, mutate(SEEDS[kind], which, steps))


IGNORED = ("index of tars", "file of another ending")  # made anew elsewhere, and counted as left out


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
@pytest.mark.parametrize("thing", NO_FILES)
@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_file_is_refused(
    kind: str, thing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "warm").mkdir()
    try_read(kind, tmp_path / "warm", b"")  # imports take their time
    NO_FILES[thing](tmp_path / READERS[kind].name)
    with within_bounds():
        accepted = try_path(kind, tmp_path / READERS[kind].name)
    assert accepted == (kind in IGNORED)


IN_A_PROCESS = """
import random, sys
from pathlib import Path

from fuzzers import READERS, try_read
from test_fuzz import ODD, mutate, within_bounds

kind, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
(folder / "seeds").mkdir()
seeds = READERS[kind].seeds(folder / "seeds")
assert try_read(kind, folder, seeds[0])
draw = random.Random(0)
kinds = ["cut", "flip", "flip", "put", "put", "drop", "splice"]
for number in range(count):
    steps = [(draw.choice(kinds), draw.random(), draw.random(), draw.choice(ODD)) for _ in range(draw.randint(1, 4))]
    with within_bounds():
        try_read(kind, folder, mutate(seeds, 0, steps))
print("all answered")
"""


@pytest.mark.parametrize("kind", IN_C)
@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_damaged_files_whose_libraries_are_in_c(kind: str, count: int, tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)])}
    command = [sys.executable, "-c", IN_A_PROCESS, kind, str(count), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "all answered" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in READERS if kind not in IN_C])
def test_input_that_reaches_new_code(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: it has wheels for Linux only")
    script = Path(__file__).with_name("fuzzers.py")
    command = [sys.executable, str(script), kind, "3000", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    print(done.stdout)
    assert done.returncode == 0 and f"{kind}: 3000 inputs" in done.stdout, (done.stdout + done.stderr)[-3000:]


# Text that people write

WORDS = st.text(st.sampled_from("ab.:,+- 019eE*ü\x00\n"), max_size=12) | st.text(max_size=8)


@quick
@given(text=WORDS | st.sampled_from(["auto", "a:b:nan", "a:b:inf", "a:b:-1", "a:b:1e400"]))
def test_parse_pairs(text: str) -> None:
    try:
        pairs = parse_pairs(text)
    except ValueError as error:
        assert str(error).startswith("Recipe: expected pairs")
        return
    assert (pairs is None) == (text == "auto")
    for student, teacher, weight in pairs or ():
        assert student and teacher and 0 < weight < float("inf")
    if pairs:
        assert parse_pairs(",".join(f"{a}:{b}:{w!r}" for a, b, w in pairs)) == pairs


@quick
@given(parts=st.lists(st.sampled_from(TERMS), unique=True), junk=WORDS)
def test_method(parts: list[str], junk: str) -> None:
    assert set(Recipe(method="+".join(parts) or "none").method_terms) == set(parts)
    try:
        assert set(Recipe(method=junk).method_terms) <= set(TERMS)
    except ValueError as error:
        assert str(error).startswith("Recipe: expected")


@quick
@given(
    text=WORDS, named=st.dictionaries(st.sampled_from(TERMS), st.sampled_from(["linear", "cosine", "step"]))
)
def test_parse_schedules(text: str, named: dict[str, Any]) -> None:
    for each in (text, ",".join(f"{term}:{schedule}" for term, schedule in named.items()) or "constant"):
        try:
            found = parse_schedules(each, TERMS)
        except ValueError as error:
            assert each == text and str(error).startswith("Recipe: expected")
        else:
            assert list(found) == list(TERMS)
            if each != text:
                assert {term: found[term] for term in named} == named


@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(1e-9, 1e9),
    student=st.text(max_size=20),
    milestones=st.lists(st.floats(0.01, 0.99), max_size=4).map(sorted),
    terms=st.lists(st.sampled_from(["at", "kd"]), unique=True),
    pad=st.none() | st.integers(0, 9),
    beta=st.just("auto") | st.floats(0, 1e6),
)
def test_a_recipe_comes_back_from_yaml(
    tmp_path: Path, terms: list[str], milestones: list[float], **values: Any
) -> None:
    recipe = Recipe(method="+".join(terms) or "none", milestones=tuple(milestones), **values)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    try:
        assert Recipe.load(tmp_path / "recipe.yaml") == recipe
    except ValueError as error:
        assert str(error).startswith("trust: ")


@quick
@given(
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=10), min_size=1, max_size=4),
    number=st.floats(width=32, allow_nan=False),
    count=st.integers(0, 2**32 - 1),
)
def test_a_prototxt_comes_back_from_text(names: list[str], number: float, count: int) -> None:
    net = parse_net("")
    net.name = names[0]
    for name in names:
        layer = net.layer.add(name=name, type="Power", bottom=[name], top=names)
        layer.power_param.shift = number
        layer.convolution_param.num_output = count
    assert parse_net(text_format.MessageToString(net)) == net
