"""Building teacher caches, by the command and by the library: interrupted, killed, on full disks."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import Registers
from torch import nn

from attention_transfer.cache import Cache
from attention_transfer.cli import main
from attention_transfer.data import Views
from attention_transfer.functional import attention_map
from attention_transfer.models import build_model, load_weights, save_weights
from attention_transfer.runs import Recipe, Run
from attention_transfer.taps import Taps
from attention_transfer.training import build_cache, caching, train
from attention_transfer.training.build import build_augment, build_teacher, load_splits
from attention_transfer.training.onlooker import Onlooker

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def teacher(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained teacher of three classes."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    return train(replace(tiny, output=str(folder)), say=silent)


@pytest.fixture(scope="module")
def base(tiny: Recipe, teacher: Run) -> Recipe:
    return replace(tiny, method="at", teacher=str(teacher.folder), views=2)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caching, "SHARD_BYTES", 10_000)  # 14 images


def live(recipe: Recipe, rows: torch.Tensor, view: int, layers: list[str]) -> tuple[torch.Tensor, list]:
    """What the recipe's teacher itself makes of a view of some images."""
    splits = load_splits(recipe)
    found = build_teacher(recipe, splits, lambda: None)
    views = Views(recipe.views, recipe.view_seed or 0)
    x = build_augment(recipe, splits).view(splits.train.images[rows], rows, views, view)
    x = found.transform(x) if found.transform else x
    model = found.model.eval()
    with torch.no_grad(), Taps(model, layers) as taps:
        logits = model(x)
        return logits, [
            attention_map(features, p=recipe.p, mapping=recipe.mapping) for features in taps.pop().values()
        ]


def unit(maps: torch.Tensor) -> torch.Tensor:
    return maps / maps.flatten(1).norm(dim=1).view(-1, 1, 1)


def assert_serves_what_the_teacher_sees(cache: Cache, recipe: Recipe) -> None:
    rows, layers = torch.tensor([17, 3, 30, 0, 14]), [stage.name for stage in cache.manifest.layers]
    for view in range(2):
        logits, maps = cache.read_maps(rows, view, layers)
        expected, expected_maps = live(recipe, rows, view, layers)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
        for found, wanted in zip(maps, expected_maps, strict=True):
            torch.testing.assert_close(unit(found), wanted, rtol=1e-3, atol=1e-5)


def test_holds_what_the_teacher_sees(base: Recipe) -> None:
    said: list[str] = []
    cache = build_cache(base, "cache", say=said.append)
    assert [stage.name for stage in cache.manifest.layers] == ["group0", "group1", "group2"]
    assert_serves_what_the_teacher_sees(cache, base)
    assert re.fullmatch(r"76 of 76 records to go: 0\.1 MB, about \d+ s at [\d,]+ images/s", said[-1])
    assert cache.manifest.source == {
        "validation": 0.2, "max_train": None, "split_seed": 0, "image_size": None,
    }  # fmt: skip


def test_other_energies_layers_and_input(base: Recipe, tmp_path: Path) -> None:
    """A teacher of its own normalisation, five classes, and layers by name; the maximum of |A|^4."""
    save_weights(build_model("wrn-10-1", num_classes=5), tmp_path / "w.safetensors", {})
    recipe = replace(
        base,
        teacher="wrn-10-1",
        teacher_weights=str(tmp_path / "w.safetensors"),
        teacher_classes=5,
        p=4.0,
        mapping="max",
        view_seed=9,
        split_seed=2,
        max_train=31,
    )
    cache = build_cache(recipe, "cache", layers=["group2", "group0.block0"], say=silent)
    facts = cache.manifest
    assert [(stage.name, stage.shape, stage.stride) for stage in facts.layers] == [
        ("group2", (64, 4, 4), 4.0),
        ("group0.block0", (16, 16, 16), 1.0),
    ]
    assert (facts.classes, facts.teacher, facts.teacher_input) == (5, "wrn-10-1", None)
    assert_serves_what_the_teacher_sees(cache, recipe)


def test_a_teacher_of_another_normalisation_gets_its_own(base: Recipe, teacher: Run, tmp_path: Path) -> None:
    from attention_transfer.training.card import ModelCard

    card = replace(ModelCard.read(teacher.folder), mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5])
    model = build_model("wrn-10-1", num_classes=3)
    load_weights(model, teacher.folder)
    save_weights(model, tmp_path / "w.safetensors", card.as_metadata())
    recipe = replace(base, teacher=str(tmp_path / "w.safetensors"))
    cache = build_cache(recipe, "cache", say=silent)
    factor, _, size = cache.manifest.teacher_input
    assert (len(factor), size) == (3, None)
    assert_serves_what_the_teacher_sees(cache, recipe)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_the_teacher_runs_in_the_precision_asked_for(base: Recipe, precision: str) -> None:
    seen: list[tuple[torch.dtype, bool, bool, bool]] = []

    def note(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        seen.append((output.dtype, output.requires_grad, module.training, output.is_contiguous()))

    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: note(module, args, output) if isinstance(module, nn.Conv2d) else None
    )
    try:
        cache = build_cache(replace(base, precision=precision, views=1), "cache", say=silent)
    finally:
        hook.remove()
    dtype = {"bf16-mixed": torch.bfloat16, "64-true": torch.float64}[precision]
    assert seen[-1] == (dtype, False, False, False)
    assert cache.manifest.precision == precision
    wide = build_cache(replace(base, views=1), "wide", say=silent)
    ours, theirs = (each.read_maps(torch.arange(38), 0, ["group1"])[1][0] for each in (cache, wide))
    assert (unit(ours) - unit(theirs)).abs().max() < (0.02 if dtype == torch.bfloat16 else 1e-3)
    assert cache.manifest.teacher_fingerprint == wide.manifest.teacher_fingerprint


def test_streamed_images(base: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each view has its own random resized crop, which students of any seed see again."""
    monkeypatch.setattr("attention_transfer.data.loading.IN_MEMORY_BYTES", 0)
    recipe = replace(base, image_size=16, num_workers=1, pad=0)
    cache = build_cache(recipe, "cache", say=silent)
    splits = load_splits(recipe)
    teacher, augment = build_teacher(recipe, splits, lambda: None), build_augment(recipe, splits)
    rows = torch.tensor([30, 2])
    for view in range(2):
        images = torch.stack([splits.train.decode(int(row), seed=0, epoch=view) for row in rows])
        with torch.no_grad():
            expected = teacher.model(teacher.transform(augment.view(images, rows, Views(2), view)))
        torch.testing.assert_close(cache.read_maps(rows, view)[0], expected, rtol=1e-3, atol=1e-4)


# The command


def flags(base: Recipe) -> list[str]:
    return [
        *("cache", "build", "--data", base.data, "--teacher", str(base.teacher), "--validation", "0.2"),
        *("--pad", "2", "--batch-size", "10", "--accelerator", "cpu", "--precision", "32-true"),
    ]


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err.removeprefix("attention-transfer: ").strip()


def contents(folder: str | Path) -> dict[str, bytes]:
    """The records in each file that is there; headers may order their entries differently."""
    found = {path: path.read_bytes() for path in Path(folder).glob("view-*/0*.safetensors")}
    starts = {path: 8 + int.from_bytes(data[:8], "little") for path, data in found.items()}
    return {f"{path.parent.name}/{path.name}": data[starts[path] :] for path, data in found.items()}


def test_build_info_and_verify(base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, *flags(base), "--views", 2, "-o", "cache")
    assert f"cache: {Path('cache').absolute()}, 2 views of 38 images, 0.1 MB" in text
    assert "train from it: attention-transfer train --cache cache --student NAME" in text
    text = output(capsys, "cache", "info", "cache")
    for words in (
        r"^state +2 views of 38 images, 0\.1 MB$",
        r"^teacher +wrn-10-1, fingerprint \w{16}, in 32-true$",
        r"^layers +group0: 16x16x16, stride 1, group1: 32x8x8, stride 2, group2: 64x4x4, stride 4$",
        r"^maps +sum of \|A\|\^2, as float16$",
        r"^record +678 bytes an image and view, with 3 logits$",
        r"^images +38 of 3x16x16, fingerprint \w{16}$",
        r"^from +data .*, validation 0\.2, max_train None, image_size None, split_seed 0$",
        r"^views +2 of seed 0, pad 2, flip True$",
    ):
        assert re.search(words, text, re.MULTILINE), words
    assert output(capsys, "cache", "verify", "cache") == "cache: 6 files, every checksum fits\n"
    built = build_cache(base, "other", say=silent)
    assert contents("cache") == contents(built.folder)


def test_verify_and_info_of_a_damaged_cache(base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    build_cache(base, "cache", say=silent)
    first, second = sorted(Path("cache/view-0").iterdir())[:2]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.unlink()
    assert main(["cache", "verify", "cache"]) == 2
    out, err = capsys.readouterr()
    assert out == (
        "cache/view-0/000000000.safetensors is damaged: its checksum does not fit its content\n"
        "cache/view-0/000000014.safetensors is missing\n"
    )
    assert "2 of 6 files are not as they should be. Delete what is damaged, and build it anew" in err
    state = r"^state +unfinished, 5 of 6 files, .* finish it: attention-transfer cache build --resume cache$"
    assert re.search(state, output(capsys, "cache", "info", "cache"), re.MULTILINE)
    first.unlink()
    output(capsys, "cache", "build", "--resume", "cache")
    assert "every checksum fits" in output(capsys, "cache", "verify", "cache")


def test_more_views_by_resume(base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    output(capsys, *flags(base), "--views", 1, "--dtype", "uint8", "--layers", "group1,group2", "-o", "cache")
    before = contents("cache")
    text = output(capsys, "cache", "build", "--resume", "cache", "--views", 3)
    assert "76 of 114 records to go" in text
    after = contents("cache")
    assert before.items() < after.items()
    assert Cache.read("cache").manifest.dtype == "uint8"
    assert "records to go" not in output(capsys, "cache", "build", "--resume", "cache")
    whole = build_cache(
        replace(base, views=3), "whole", layers=["group1", "group2"], dtype="uint8", say=silent
    )
    assert contents(whole.folder) == after


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_says_how_to_go_on(
    base: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from attention_transfer.cli.output import StatusLine

    lines: list[str] = []

    def show(self: StatusLine, text: str) -> None:
        lines.append(text)
        if text.startswith("38 of 76"):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StatusLine, "show", show)
        assert main([*flags(base), "--views", "2", "-o", "cache"]) == 130
    assert capsys.readouterr().err == (
        "\nStopped; nothing is lost. Go on with: attention-transfer cache build --resume cache\n"
    )
    shown = [line for line in lines if line]
    assert re.fullmatch(r"38 of 76 records, [\d,]+ images/s, \d+ s left", shown[-1])
    assert len(contents("cache")) == 2
    assert "48 of 76 records to go" in output(capsys, "cache", "build", "--resume", "cache")
    assert contents(build_cache(base, "whole", say=silent).folder) == contents("cache")


def test_killed_at_any_moment_nothing_is_lost(base: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL while files are written, again and again; what is there is whole, and the rest is added."""
    code = (
        "import sys; from attention_transfer.training import caching; caching.SHARD_BYTES = 1400;"
        "from attention_transfer.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *flags(base), "--views", "12", "-o", "cache"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(contents("cache")) < 20:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    cache = Cache.read("cache")
    faults = {fault for _, fault in cache.faults(deep=True)}
    assert faults == {None, "is missing"}
    before = contents("cache")
    output(capsys, "cache", "build", "--resume", "cache")
    assert before.items() < contents("cache").items()
    assert "every checksum fits" in output(capsys, "cache", "verify", "cache")


def test_a_full_disk_midway_is_one_line_and_loses_nothing(
    base: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that may not write files as large as a shard, where smaller ones went well before."""
    build_cache(replace(base, views=1), "cache", say=silent)
    before = contents("cache")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        message = refused(capsys, "cache", "build", "--resume", "cache", "--views", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith("cache: could not write cache/view-1/000000000.safetensors: File too large.")
    assert message.endswith("Make room, and go on with attention-transfer cache build --resume cache")
    assert contents("cache") == before
    Cache.read("cache").require(1)
    output(capsys, "cache", "build", "--resume", "cache")
    Cache.read("cache").require(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["buidl"], "cache: unknown action 'buidl'. Did you mean build?"),
        (["build", "--teacher", "x"], "cache build: expected --teacher and -o."),
        (["build", "--lr", "1"], "cache build: unknown argument --lr."),
        (["build", "--dtype", "int4", "-o", "c"], "cache build: "),
        (["build", "--resume", "nowhere"], "cache: expected a cache folder with a cache.json, got nowhere"),
        (["build", "--resume", "c", "--p", "4"], "cache build: --resume goes on with the cache's own"),
        (["info", "nowhere"], "cache: expected a cache folder with a cache.json, got nowhere"),
        (["verify"], "cache verify: "),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "cache", *arguments).startswith(message)


def test_teachers_that_will_not_do(
    base: Recipe, teacher: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_weights(build_model("wrn-10-1", num_classes=3), tmp_path / "bare.safetensors")
    arguments = ["cache", "build", "--data", base.data, "-o", "cache", "--teacher"]
    for name, words in (
        ("wrn-10-1", "cache: expected a trained teacher, got wrn-10-1 without weights. Pass a run folder"),
        ("bare.safetensors", "bare.safetensors does not say which model it belongs to. Pass --teacher NAME"),
    ):
        assert words in refused(capsys, *arguments, name)
    layers = [*flags(base), "-o", "cache", "--layers", "group0,gruop1"]
    assert "group1" in refused(capsys, *layers)
    assert not Path("cache").exists()
    build_cache(base, "cache", say=silent)
    other = build_model("wrn-10-1", num_classes=3)
    from attention_transfer.training.card import ModelCard

    save_weights(other, tmp_path / "other.safetensors", ModelCard.read(teacher.folder).as_metadata())
    again = [
        str(tmp_path / "other.safetensors") if word == str(base.teacher) else word for word in flags(base)
    ]
    message = refused(capsys, *again, "-o", "cache")
    assert re.match(r"cache: cache holds another cache \(teacher_fingerprint: \w+, not \w+\)\. Go", message)


def test_a_teacher_whose_tokens_are_not_in_order(base: Recipe) -> None:
    splits = load_splits(base)
    found = replace(build_teacher(base, splits, lambda: None), model=Registers(patch=4).eval())
    with pytest.raises(
        ValueError, match=r"from token 4 on at the teacher's blocks.1, .*\"blocks.1@4x4\+0\+4\""
    ):
        Onlooker.of(base, splits, found, ["blocks.1"], torch.device("cpu"))
    named = Onlooker.of(base, splits, found, ["blocks.1@4x4+0+4"], torch.device("cpu"))
    assert named.layers[0].shape == (24, 4, 4)


@pytest.mark.parametrize("action", [[], ["build"], ["info"], ["verify"]])
def test_help(action: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(output(capsys, "cache", *action, "--help").split())
    assert f"usage: attention-transfer cache {' '.join(action)}".strip() in text
    assert "Example: attention-" in text
