"""What the documentation says is so: code runs, commands parse, links resolve, messages exist."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attention_transfer as at
from attention_transfer.cli import main
from attention_transfer.cli.caffe import VERBS as CAFFE_VERBS
from attention_transfer.cli.parsing import PROGRAM, VERBS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
QUICKSTART = DOCS / "quickstart.md"
LANGUAGES = {"", "python", "sh", "text", "math", "yaml"}

pytestmark = [
    pytest.mark.filterwarnings("ignore::attention_transfer.preflight.PreflightWarning"),
    pytest.mark.usefixtures("one_thread"),
]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each fenced block, in order."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        yield match[1], match[2]


def python_of(page: Path) -> list[str]:
    return [text for language, text in fences(page) if language == "python"]


def command_lines(page: Path) -> list[str]:
    """Each command of a page, continuation lines joined, prompt taken off: those of shell blocks, those among
    output in blocks without language, and those with flags in running text.
    """
    found = []
    for language, text in fences(page):
        if language in ("", "sh"):
            lines = re.sub(r"\\\n\s*", "", text).splitlines()
            found += [line.strip().removeprefix("$ ") for line in lines]
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    found += [code for code in inline if " -" in code and not re.search(r"\.\.\.|VERB", code)]
    return [line for line in found if re.match(rf"({PROGRAM}|make|pip|python3?) ", line)]


def words_of(line: str) -> list[str]:
    return [word for word in shlex.split(line, comments=True) if word != "..."]


def test_fences_have_known_languages() -> None:
    """A block of another language would be run by nobody."""
    for page in PAGES:
        assert {language for language, _ in fences(page)} <= LANGUAGES, page
        assert page.read_text(encoding="utf-8").count("\n```") == 2 * len(list(fences(page))), page


# --- the README ---------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_shows_python_early() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 110
    start = lines.index("```python")
    assert lines.index("```", start) <= 45


def test_the_readme_names_every_room() -> None:
    """A reader finds each part of the package in its table, and no part that is gone."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    package = ROOT / "attention_transfer"
    rooms = {path.name + "/" for path in package.iterdir() if (path / "__init__.py").is_file()}
    rooms |= {path.name for path in package.glob("*.py")}
    former = {"losses.py"}  # goes with the next release
    named = set(re.findall(r"`([^`]+)`", "".join(rows)))
    assert named == {room for room in rooms if room[0] != "_"} - former


def test_contributing_names_what_is_there() -> None:
    """Paths by their place, other names by standing in one of these files."""
    quoted = re.findall(r"`([^`\s]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    paths = [name for name in quoted if "/" in name and (ROOT / name.split("/")[0]).exists()]
    assert len(paths) > 12
    assert [path for path in paths if not (ROOT / path).exists()] == []
    files = (ROOT / "attention_transfer").rglob("*.py")
    sources = "".join(path.read_text(encoding="utf-8") for path in files)
    for name in ("stage_ends", "Source", "Encoded", "find_source", "VERBS", "print_safely"):
        assert name in quoted
        assert re.search(rf"\b(?:class|def) {name}\b|^{name}\b.* = ", sources, re.M), name


# --- Python -------------------------------------------------------------------------------------------------

CAFFE_NET = """
layer {{ name: "data" type: "Input" top: "data" input_param {{ shape {{ dim: 2 dim: 3 dim: 8 dim: 8 }} }} }}
layer {{ name: "label" type: "Input" top: "label" input_param {{ shape {{ dim: 2 }} }} }}
layer {{ name: "conv1" type: "Convolution" bottom: "data" top: "conv1"
  convolution_param {{ num_output: {width} kernel_size: 3 weight_filler {{ type: "msra" }} }} }}
layer {{ name: "relu1" type: "ReLU" bottom: "conv1" top: "relu1" }}
layer {{ name: "fc" type: "InnerProduct" bottom: "relu1" top: "fc"
  inner_product_param {{ num_output: 5 weight_filler {{ type: "msra" }} }} }}
layer {{ name: "loss" type: "SoftmaxWithLoss" bottom: "fc" bottom: "label" top: "loss" }}
"""


def stand_ins(page: Path, folder: Path) -> dict[str, Any]:
    """The names that a page says its reader has."""
    if page.name == "caffe.md":
        return _caffe_stand_ins(folder)
    student, teacher = (at.build_model(name, num_classes=5) for name in ("wrn-10-1", "wrn-10-2"))
    images, labels = torch.randn(6, 3, 16, 16), torch.randint(5, (6,))
    loader = [(images, labels)] * 2
    names = {"student": student, "teacher": teacher, "images": images, "labels": labels, "loader": loader}
    if page.name == "troubleshooting.md":
        terms = [at.AttentionTransfer(1.0)]
        names["distiller"] = at.Distiller(student, teacher, terms=terms, example_input=images)
    return names | {"steps": len(loader)}


def _caffe_stand_ins(folder: Path) -> dict[str, Any]:
    """Nets small enough to train a hundred steps, and batches for them, in the files that the page names."""
    from attention_transfer.caffe.files.caffemodel import write_binary

    for name, width in (("s", 3), ("t", 5), ("net", 3)):
        (folder / f"{name}.prototxt").write_text(CAFFE_NET.format(width=width))
    deploy = "\n".join(line for line in CAFFE_NET.format(width=3).splitlines() if "label" not in line)
    (folder / "deploy.prototxt").write_text(deploy)
    write_binary(at.caffe.Net(folder / "deploy.prototxt").to_caffemodel(), folder / "net.caffemodel")
    solver = f'net: "{folder}/net.prototxt"\nbase_lr: 0.01\nlr_policy: "fixed"\nmax_iter: 100\n'
    (folder / "solver.prototxt").write_text(solver + f'snapshot_prefix: "{folder}/net"\n')
    images = torch.randn(2, 3, 8, 8)
    return {"images": images, "loader": [{"data": images, "label": torch.tensor([0.0, 1.0])}]}


pages_with_python = [page for page in PAGES if python_of(page) and page != QUICKSTART]


@pytest.mark.parametrize("page", pages_with_python, ids=lambda page: page.name)
def test_python_blocks_run(
    page: Path, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, with one namespace a page; a script's arguments are a folder of images and one to write."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [page.name, str(image_folder), "written"])
    names = stand_ins(page, tmp_path)
    for text in python_of(page):
        exec(compile(text, page.name, "exec"), names)


# --- commands -----------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """The arguments were read, and the work was to begin."""


@pytest.fixture
def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    import jsonargparse

    real = jsonargparse.ArgumentParser.parse_args

    def parse_and_stop(parser: Any, arguments: list[str]) -> Any:
        real(parser, arguments)
        raise Parsed

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_and_stop)


def ours(page: Path) -> list[list[str]]:
    """The arguments of each call of this package's command on a page."""
    calls = [words_of(line)[1:] for line in command_lines(page) if line.startswith(PROGRAM)]
    return [_without_own_recipe(call) for call in calls]


def _without_own_recipe(call: list[str]) -> list[str]:
    """The call without a recipe that only a reader who has followed the page has."""
    if "--config" not in call or Path(call[(place := call.index("--config")) + 1]).exists():
        return call
    assert call[place + 1].startswith("runs/") or call[place + 1] == "recipe.yaml", call
    return call[:place] + call[place + 2 :]


@every_page
def test_command_lines_parse(page: Path, stop_after_parsing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the verb's own parser."""
    monkeypatch.chdir(ROOT)
    for call in ours(page):
        if "--help" not in call:
            with pytest.raises(Parsed):
                pytest.fail(f"{call} ended with status {main(call)}")


@every_page
def test_cheap_commands_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them each `train`, as far as its recipe, which may hold no contradiction."""
    monkeypatch.chdir(ROOT)
    for call in ours(page):
        if call[0] == "train" and "--print-config" not in call:
            call = [*call, "--print-config"]
        if call[0] == "pairs" or call[-1] in ("--help", "--print-config"):
            with contextlib.redirect_stdout(io.StringIO()):
                assert main(call) == 0, call


@every_page
def test_other_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    extras = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))
    for line in command_lines(page):
        program, *words = words_of(line)
        if program == "make":
            assert words[0] in targets, line
        elif program == "pip":
            asked = re.search(r"\[([\w,]+)\]", line)
            assert asked is None or set(asked[1].split(",")) <= extras, line
        elif program.startswith("python"):
            assert "-m" in words[:2] or (ROOT / words[0]).is_file(), line


@pytest.mark.slow
def test_quickstart_from_beginning_to_end(image_folder: Path, tmp_path: Path) -> None:
    """The page's shell blocks as a shell runs them, with a generated folder of images and one epoch."""
    (tmp_path / "photos").symlink_to(image_folder)
    script = "\n".join(text for language, text in fences(QUICKSTART) if language == "sh")
    script, shortened = re.subn(r"--epochs \d+", "--epochs 1", script)
    assert shortened == 2
    script = re.sub(r"^pip .*$", "", script, flags=re.M)
    command = f'{PROGRAM}() {{ "{sys.executable}" -W ignore -m attention_transfer "$@"; }}\n'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command + script],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = next(text for language, text in fences(QUICKSTART) if text.startswith("pair: "))
    assert shown in done.stdout
    assert re.search(r"student alone \d+\.\d\d % \(alone\): [+-]\d+\.\d\d points", done.stdout)
    assert (tmp_path / "report.html").is_file() and (tmp_path / "confusion.png").is_file()
    for name in re.findall(r"^\| `([\w./]+)` \|", QUICKSTART.read_text(), re.M):
        assert (tmp_path / "runs" / "taught" / name).exists(), name
    assert list(tmp_path.rglob("*.onnx"))


# --- messages -----------------------------------------------------------------------------------------------

# Where every message has an entry; some of other rooms have one too.
EXPLAINED = ("preflight.py", "distiller.py", "taps.py", "pairs.py", "training/module.py", "training/build.py")


def text_of(node: ast.AST | None) -> str:
    """A string of the source with … for what is filled in; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


def messages_in(path: Path) -> set[str]:
    """The messages of errors and warnings that a module raises, yields or returns."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            found.add(text_of(node.exc.args[0]))
        elif isinstance(node, ast.Yield | ast.Return):
            text = text_of(node.value)
            found |= {text} if isinstance(node, ast.Yield) or ": expected" in text else set()
    return {" ".join(text.split()) for text in found if text}


def entries() -> list[str]:
    """The messages that the page on troubleshooting quotes, each from its beginning."""
    quoted = re.findall(r"(?:^> .*\n)+", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    return [" ".join(re.sub(r"^> ", "", block, flags=re.M).split()) for block in quoted]


@pytest.mark.parametrize("module", EXPLAINED)
def test_every_message_has_an_entry(module: str) -> None:
    messages = messages_in(ROOT / "attention_transfer" / module)
    assert messages
    for message in messages:
        assert any(message.startswith(entry) for entry in entries()), message


def test_every_entry_is_a_message() -> None:
    package = ROOT / "attention_transfer"
    messages = {message for path in package.rglob("*.py") for message in messages_in(path)}
    assert len(entries()) > 40
    for entry in entries():
        assert any(message.startswith(entry) for message in messages), entry


def test_a_message_is_as_quoted() -> None:
    """That the quotations are taken from the source would say little if they were not what is printed."""
    distiller = at.Distiller(at.build_model("wrn-10-1"), at.build_model("wrn-10-2"))
    distiller.student.requires_grad_(False)
    with pytest.raises(ValueError) as raised:
        distiller.preflight(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))
    assert str(raised.value).startswith(entries()[0])


# --- the site -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: strictly."""
    pytest.importorskip("zensical")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, DOCS / "site" / "build.py", folder]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_menu_once() -> None:
    (menu,) = re.findall(r"^nav:\n(.*?)\n\n", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M | re.S)
    assert sorted(re.findall(r"[\w-]+\.md", menu)) == [page.name for page in sorted(DOCS.glob("*.md"))]


def test_the_site_has_every_verb_with_its_help(site: Path) -> None:
    page = (site / "commands.html").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f'<h2 id="{verb}">' in page
    for words in ("cache build", *(f"caffe {verb}" for verb in CAFFE_VERBS)):
        assert f'<h3 id="{words.replace(" ", "-")}">' in page
    assert "--term-schedule" in page


def test_the_site_has_every_public_name(site: Path) -> None:
    """Those of the package's face, and of Caffe's."""
    page = (site / "api.html").read_text(encoding="utf-8")
    for room, prefix in (("", ""), ("caffe", "caffe.")):
        stub = (ROOT / "attention_transfer" / room / "__init__.pyi").read_text()
        for name in re.findall(r"^from \.\w\S* import \w+ as (\w+)$", stub, re.M):
            assert f'id="attention_transfer.{prefix}{name}"' in page, name
    assert "a sample with a non-finite activation gives NaN" in page  # a docstring


def test_the_site_draws_formulas_without_a_script(site: Path) -> None:
    page = (site / "method.html").read_text(encoding="utf-8")
    written = [text for language, text in fences(DOCS / "method.md") if language == "math"]
    assert page.count("<math ") == sum(len(text.strip().split("\n\n")) for text in written)
    assert "<mfrac>" in page and "\\frac" not in page


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//', text), page
        assert not re.findall(r'<link[^>]+href="(?:https?:)?//', text), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


def test_a_link_to_a_file_of_the_repository_leads_to_its_text(site: Path) -> None:
    assert 'href="source/examples/caffe_resnet.py.html"' in (site / "caffe.html").read_text(encoding="utf-8")
    assert (site / "source" / "examples" / "caffe_resnet.py.html").is_file()


# --- links --------------------------------------------------------------------------------------------------


@every_page
def test_links_within_the_repository_resolve(page: Path) -> None:
    """On the pages as they stand; the build checks those of the site, and its anchors, once more."""
    from markdown.extensions.toc import slugify

    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor and path.name not in ("api.md", "commands.md"):  # whose headings are made by the build
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in {slugify(each, "-") for each in headings}, f"{page.name}: {target}#{anchor}"


# --- other libraries ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not importlib.util.find_spec("torchdistill"), reason="torchdistill is not installed")
@pytest.mark.parametrize("mode", ["code", "paper"])
def test_what_is_said_of_torchdistill_in_float16(mode: str) -> None:
    from torchdistill.losses.mid_level import ATLoss

    side = {"io": "output", "path": "layer"}
    term = ATLoss({"pair": {"student": side, "teacher": side}}, mode=mode)

    def loss_and_gradient(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        student = (scale * torch.randn(2, 4, 3, 3)).half().requires_grad_()
        teacher = torch.randn(2, 4, 3, 3).half()
        loss = term({"layer": {"output": student}}, {"layer": {"output": teacher}})
        ours = at.attention_transfer_loss(student, teacher, beta=1.0)
        in_float32 = at.attention_transfer_loss(student.float(), teacher.float(), beta=1.0)
        torch.testing.assert_close(ours, in_float32)
        return loss, torch.autograd.grad(loss, student)[0]

    assert loss_and_gradient(300.0)[0].isnan()
    assert loss_and_gradient(1e-4)[1].isnan().any()
