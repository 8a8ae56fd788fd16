"""The benchmarks at work on tiny shapes. Nothing here looks at a clock."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attention_transfer.cli import bench as verb
from attention_transfer.cli import main

pytest.importorskip("torchdistill", reason='needs pip install -e ".[dev]"')
bench = verb._benchmarks(Path(verb.__file__).parents[2])

from benchmarks import contenders, kernels, measuring, rows, step, tables, targets, terms  # noqa: E402
from benchmarks.contenders import Floor, Inputs, make_inputs  # noqa: E402
from benchmarks.names import (  # noqa: E402
    AUTHORS,
    CACHED,
    COMPILED,
    FLOOR,
    LIVE,
    PROJECT,
    STUDENT,
    TORCHDISTILL,
)
from benchmarks.rows import Results, Row  # noqa: E402
from benchmarks.session import Session  # noqa: E402

CPU = torch.device("cpu")
SHAPES, TEACHER_SHAPES = [(3, 4, 6, 5), (3, 8, 3, 2)], [(3, 2, 6, 5), (3, 8, 3, 2)]


@pytest.fixture
def session() -> Session:
    return Session(CPU, quick=True)


# --- contenders ---------------------------------------------------------------------------------------------


def outcome(name: str, form: str, inputs: Inputs) -> list[Tensor]:
    passed, loss = kernels.TERMS[name](form)(inputs.students, inputs.teachers)
    return [loss.detach(), *contenders.gradients(inputs, passed, loss)]


@pytest.mark.parametrize("layout", measuring.LAYOUTS)
@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("name", [PROJECT, TORCHDISTILL])
def test_contenders_give_the_loss_and_gradient_of_the_authors_formula(
    name: str, form: str, layout: str
) -> None:
    inputs = make_inputs(SHAPES, torch.float32, layout, CPU, teacher=TEACHER_SHAPES)
    for got, expected in zip(outcome(name, form, inputs), outcome(AUTHORS, form, inputs), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_so_does_torch_compile() -> None:
    inputs = make_inputs(SHAPES, torch.float32, "nchw", CPU)
    for got, expected in zip(
        outcome(COMPILED, "code", inputs), outcome(AUTHORS, "code", inputs), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_the_gradient_from_above_is_in_the_result() -> None:
    inputs = make_inputs(SHAPES, torch.float32, "nchw", CPU)
    without = replace(inputs, above=[torch.zeros_like(x) for x in inputs.above])
    with_, alone = outcome(PROJECT, "code", inputs), outcome(PROJECT, "code", without)
    for total, term, above in zip(with_[1:], alone[1:], inputs.above, strict=True):
        torch.testing.assert_close(total, term + above)
    assert all(x.abs().max() > 0 for x in inputs.above)


def test_whole_steps_train_the_same_student() -> None:
    benchmark = step.Bench(step.QUICK["tiny"], torch.float32, CPU)
    before = benchmark.student.conv0.weight.clone()
    weights = {}
    for name in (LIVE, CACHED, TORCHDISTILL, STUDENT):
        benchmark.step(name)()
        weights[name] = benchmark.students[name].state_dict()
    for key, value in weights[LIVE].items():
        torch.testing.assert_close(weights[TORCHDISTILL][key], value, rtol=1e-4, atol=1e-6)
    changes = {name: found["conv0.weight"] - before for name, found in weights.items()}
    size = changes[LIVE].norm()
    assert (changes[CACHED] - changes[LIVE]).norm() < 0.01 * size  # its maps are in float16
    assert (changes[STUDENT] - changes[LIVE]).norm() > 0.1 * size


# --- the floor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_floor_moves_five_activations(dtype: torch.dtype, size: int) -> None:
    inputs = make_inputs([(2, 4, 6, 6), (2, 8, 3, 3)], dtype, "channels-last", CPU)
    floor = Floor(inputs, CPU, evict_bytes=0)
    elements = 2 * 4 * 36 + 2 * 8 * 9
    assert floor.bytes == 5 * elements * size
    read = [*floor.students, *floor.teachers, *floor.above, *floor.students]
    assert sum(x.nbytes for x in (*read, *floor.kept)) == floor.bytes


def test_the_floor_reads_and_writes_what_it_says() -> None:
    inputs = make_inputs([(2, 4, 6, 6)], torch.float32, "channels-last", CPU)
    floor = Floor(inputs, CPU, evict_bytes=0)
    watch = measuring.Stopwatch(CPU, lambda: None)
    floor(watch)
    kept = floor.kept[0].view(2, 6, 6, 4).permute(0, 3, 1, 2)
    torch.testing.assert_close(kept, inputs.students[0].detach() + inputs.above[0])
    assert set(watch.laps()) == {"forward", "backward", "both"}


@pytest.mark.parametrize("layout", measuring.LAYOUTS)
def test_flat_is_the_same_memory(layout: str) -> None:
    x = measuring.activation((2, 3, 4, 5), torch.float32, layout, CPU)
    assert measuring.flat(x).data_ptr() == x.data_ptr()
    assert measuring.flat(x).sort().values.equal(x.flatten().sort().values)


# --- figures ------------------------------------------------------------------------------------------------


def test_ratios_are_taken_round_by_round() -> None:
    samples = measuring.Samples()
    for slowdown in (1, 10, 2, 5, 100):
        samples.add("a", {"step": 1.0 * slowdown})
        samples.add("b", {"step": 2.0 * slowdown})
        samples.add("both", {"step": 6.0 * slowdown})
    assert samples.ratio("step", "both", "a", "b") == {
        "against": "a + b",
        "ratio": 2.0,
        "ratio_p20": 2.0,
        "ratio_p80": 2.0,
    }
    figures = samples.figures("step", "a")
    assert (figures["p50"], figures["rounds"]) == (5.0, 5)
    assert figures["p20"] < 5 < figures["p80"]


def test_contenders_take_turns_after_a_warm_up() -> None:
    seen = []
    runs = {name: lambda watch, name=name: seen.append(name) for name in "abc"}
    measuring.interleave(runs, CPU, seconds=0, rounds=(4, 9), warm_up=1, evict_bytes=0)
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert len(rounds) == 1 + 4
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1


@torch.library.custom_op("benchmarks_test::with_a_temporary", mutates_args=())
def with_a_temporary(x: Tensor) -> Tensor:
    temporary = torch.empty(3 * x.numel())
    return x + temporary[0]


def test_bytes_inside_a_custom_operator_count() -> None:
    x = torch.zeros(1000)
    peak, kept = measuring.allocated_by(CPU, lambda: with_a_temporary(x))
    assert kept == x.nbytes
    assert 4 * x.nbytes <= peak < 4.1 * x.nbytes


def test_saved_counts_the_teacher_that_a_term_keeps_and_not_the_student() -> None:
    inputs = make_inputs([(4, 16, 8, 8)], torch.float32, "nchw", CPU)

    def keeping(students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        return students, (students[0] * teachers[0]).sum()

    assert kernels.memory_of(keeping, inputs, CPU)["saved"] == pytest.approx(inputs.bytes, rel=0.01)
    project = kernels.memory_of(contenders.project("code"), inputs, CPU)
    maps = inputs.bytes / 16
    assert project["saved"] <= 4 * maps
    assert inputs.bytes <= project["bytes"]


# --- rows ---------------------------------------------------------------------------------------------------

ROW = Row("kernels", "both", PROJECT, "1x2x3x4", "float32", "nchw", "code", "kept", FLOOR, p50=0.5, rounds=3)


def test_rows_are_appended_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cpu.csv"
    written = Results(path).append([ROW], CPU) + Results(path).append([replace(ROW, p50=0.25)], CPU)
    assert Results(path).rows == written
    assert [row.p50 for row in rows.latest(written)] == [0.25]
    row = written[0]
    assert row.device.startswith("CPU: ")
    assert (row.threads, row.torch) == (torch.get_num_threads(), torch.__version__)


def test_a_torn_last_line_is_left_out_and_later_rows_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "cpu.csv"
    Results(path).append([ROW, ROW], CPU)
    path.write_bytes(path.read_bytes()[:-30])
    assert len(Results(path).rows) == 1
    Results(path).append([ROW], CPU)
    assert len(Results(path).rows) == 2


def test_a_case_is_passed_by_if_the_same_commit_has_measured_it(tmp_path: Path) -> None:
    results = Results(tmp_path / "cpu.csv")
    results.commit = "abc1234"
    results.append([ROW], CPU)
    assert results.has(CPU, benchmark="kernels", shape="1x2x3x4")
    assert not results.has(CPU, benchmark="kernels", shape="1x2x3x5")
    results.commit = "abc1235"
    assert not results.has(CPU, benchmark="kernels", shape="1x2x3x4")
    for uncertain in ("abc1234+", "unknown"):  # whose sources may have changed in between
        results.commit = uncertain
        results.append([ROW], CPU)
        assert not results.has(CPU, benchmark="kernels", shape="1x2x3x4")


class Impatient(Session):
    """A user who presses Ctrl-C as soon as the second case begins."""

    def status(self, text: str) -> None:
        if "bfloat16" in text:
            raise KeyboardInterrupt


def test_ctrl_c_keeps_the_rows_of_complete_cases(tmp_path: Path) -> None:
    results = Results(tmp_path / "cpu.csv")
    with pytest.raises(KeyboardInterrupt):
        kernels.run(results, Impatient(CPU, quick=True))
    kept = Results(results.path).rows
    assert {row.dtype for row in kept} == {"float32"}
    assert {row.backend for row in kept} == {FLOOR, *kernels.TERMS}


def test_a_contender_that_is_missing_is_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    monkeypatch.setitem(sys.modules, "torchdistill.losses.mid_level", None)
    case = kernels.cases(quick=True)[0]
    found = [row for row in kernels.measure(case, session) if row.backend == TORCHDISTILL]
    assert len(found) == 1
    assert found[0].p50 is None
    assert found[0].note.startswith(
        "not measured: MissingPackageError: bench: needs the package torchdistill"
    )


# --- from the command to the page ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("results") / "cpu.csv"
    assert main(["bench", "--quick", "--device", "cpu", "--output", str(path)]) == 0
    yield path


def test_the_quick_run_measures_every_contender(quick_rows: Path) -> None:
    found = rows.read(quick_rows)
    assert {row.benchmark for row in found} == {
        *("kernels", "scaling", "step", "defaults", "terms", "caffe", "startup")
    }
    assert {row.backend for row in found if row.benchmark == "terms"} == set(terms.TERMS)
    assert {row.backend for row in found if row.benchmark == "kernels"} == {FLOOR, *kernels.TERMS}
    unmeasured = {row.backend for row in found if row.note.startswith("not measured")}
    assert unmeasured == {COMPILED}
    times = [row for row in found if row.p50 is not None and row.rounds and row.rounds > 1]
    assert all(0 < row.p20 <= row.p50 <= row.p80 for row in times)


@pytest.mark.slow
def test_first_calls_are_those_of_fresh_processes(session: Session, tmp_path: Path) -> None:
    results = Results(tmp_path / "cpu.csv")
    kernels.first_calls(results, session)
    seconds = {(row.backend, row.op): row.p50 for row in results.rows}
    assert len(seconds) == 4
    assert all(seconds.values())


def test_the_page_is_written_from_the_rows(quick_rows: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(rows.ROOT / "docs" / "speed.md", docs)
    page = tables.write_docs(quick_rows.parent, docs).read_text(encoding="utf-8")
    assert "not measured yet" not in page
    assert page.count("| met |") + page.count("| **missed** |") >= 5
    assert f"| {LIVE} |" in page
    for name in ("kernels", "scaling", "steps"):
        plot = docs / f"speed-cpu-{name}.png"
        assert f"({plot.name})" in page
        assert 1_000 < plot.stat().st_size < 100_000
    assert tables.write_docs(quick_rows.parent, docs).read_text(encoding="utf-8") == page


def test_the_page_without_rows_says_so(tmp_path: Path) -> None:
    shutil.copy(rows.ROOT / "docs" / "speed.md", tmp_path)
    page = tables.write_docs(tmp_path, tmp_path).read_text(encoding="utf-8")
    assert page.count("(not measured yet)") == len(
        tables.BLOCKS
    )  # the table of targets is there, plots are not


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="tables: expected <!-- bench:steps --> and <!-- /bench:steps -->"):
        tables.fill("nothing", "steps", "a table")


def rated(ratio: float, **columns: str) -> Row:
    common = {"shape": "128x64x32x32", "dtype": "float32", "device": "CPU: some (AVX2)", "against": FLOOR}
    return replace(ROW, ratio=ratio, **{**common, **columns})


def test_targets_say_hit_or_miss() -> None:
    near_floor = targets.near_floor(1.3, 8, "CPU")
    assert near_floor([]) == ("not measured", None)
    layouts = [rated(1.1), rated(1.2, layout="channels-last"), rated(1.25, layout="channels-last")]
    assert near_floor(layouts) == ("nchw: 1.10, channels-last: 1.20 to 1.25", True)
    assert near_floor([*layouts, rated(1.4)]) == ("nchw: 1.10 to 1.40, channels-last: 1.20 to 1.25", False)
    elsewhere = [
        rated(9, shape="1x2x3x4"),
        rated(9, device="GPU: some"),
        rated(9, dtype="bfloat16"),
        rated(9, allocator="given back"),
    ]
    assert near_floor([*layouts, *elsewhere])[1] is True


def test_tenfold_is_asked_for_where_the_floor_allows_it() -> None:
    def contender(over_floor: float, over_project: float, layout: str) -> list[Row]:
        return [
            rated(over_floor, backend=AUTHORS, layout=layout),
            rated(over_project, backend=AUTHORS, layout=layout, against=PROJECT),
        ]

    fast, slow = contender(8, 7, "nchw"), contender(20, 18, "channels-last")
    assert targets.tenfold([*fast, *slow])[1] is True
    assert targets.tenfold([*contender(20, 9, "nchw"), *slow])[1] is False
    assert targets.tenfold([*contender(8, 4.9, "nchw"), *slow])[1] is False


def test_slope_of_a_linear_cost_is_one() -> None:
    assert targets.slope([(1, 3), (2, 6), (4, 12)]) == pytest.approx(1)
    assert targets.slope([(1, 3), (2, 12), (4, 48)]) == pytest.approx(2)


# --- the verb -----------------------------------------------------------------------------------------------


def test_the_verb_knows_the_benchmarks() -> None:
    assert tuple(bench.WHAT) == verb.WHAT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "bench: unknown benchmark speed. Known: kernels, step, terms, caffe, startup."),
        (["--device", "tpu"], "bench: expected --device cpu"),
        (["--output", "FOREIGN"], "bench: expected the columns benchmark,op,backend,"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("a,b\n1,2\n")
    assert main(["bench", *(word.replace("FOREIGN", str(foreign)) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"attention-transfer: {message}")
    assert error.count("\n") == 1
    assert foreign.read_text() == "a,b\n1,2\n"


def test_a_package_without_its_repository_says_where_the_benchmarks_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bench: the benchmarks are not installed with the package"):
        verb._benchmarks(tmp_path)
