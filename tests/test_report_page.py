"""The report in a real browser: what it asks for, how wide it is, its colours, its keys."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from test_visualize import HOSTILE, TAUGHT, make_examples, make_run, make_runs

from attention_transfer.visualize import write_report
from attention_transfer.visualize.groups import METHOD_STYLES
from attention_transfer.visualize.snapshots import Snapshots

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

FRAMES = (
    "[...document.querySelectorAll('.strip')].map((s) => getComputedStyle(s).getPropertyValue('--f').trim())"
)

# Every visible text with its colour, and the colours behind it, its own element's first.
TEXTS = """
[...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
  const style = getComputedStyle(e), behind = [];
  for (let at = e; at; at = at.parentElement) behind.push(getComputedStyle(at).backgroundColor);
  return [e.textContent.trim().slice(0, 40), e instanceof SVGElement ? style.fill : style.color, behind];
})"""
TO_RGBA = """
(() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  return (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
})()"""


def keep_maps(folder: Path, epochs: list[int], *, name: str = "cat", taught: bool = False) -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=draw)
    snapshots = Snapshots.start(images, torch.tensor([0, 1]), [name, "dog"], ["layer1"])
    if taught:
        snapshots = snapshots.with_teacher([torch.rand(2, 8, 8, generator=draw)])
    for epoch in epochs:
        snapshots = snapshots.add(epoch, [torch.rand(2, 8, 8, generator=draw)])
    snapshots.save(folder / "maps.safetensors")


def write_page(root: Path, name: str = "cat", **settings: object) -> Path:
    """Two seeds alone, two taught, of distillation one, with maps over the epochs."""
    folders = [*make_runs(root, "none", [32, 33]), *make_runs(root, "at", [30, 30.5], **settings)]
    folders.append(make_run(root / f"kd-{'long' * 12}", "kd", error=31.0))
    make_run(root / "at-0" / "teacher", "none", student="large", teacher=None, error=20.0)
    keep_maps(folders[0], [0, 3], name=name)
    keep_maps(folders[2], [0, 1, 2, 3], name=name, taught=True)
    return write_report(folders, root / "report.html", examples=make_examples(name))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def test_it_asks_for_nothing_and_logs_nothing(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert browser.messages == [f"request {page.as_uri()}"]
    browser.evaluate("fetch('https://example.invalid/').catch(() => 0)")
    assert len(browser.messages) > 1  # what a request would look like
    assert "Content Security Policy" in " ".join(browser.messages)


@pytest.mark.parametrize("width", [390, 1100])
def test_the_page_does_not_scroll_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width, height=800)
    browser.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert browser.evaluate("document.documentElement.clientWidth") == width
    wide = """[...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll *, pre *") &&
        e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 90))"""
    assert browser.evaluate(wide) == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    inside = "[...document.querySelectorAll('.scroll')].some((e) => e.scrollWidth > e.clientWidth)"
    assert browser.evaluate(inside) == (width == 390)  # the wide tables do, in themselves


def test_the_slider_moves_the_maps_by_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    alone, taught = ["1", "1"], ["3", "3"]
    shown = lambda: sorted(browser.evaluate(FRAMES))  # noqa: E731
    assert shown() == sorted(alone + taught)
    background = (
        "getComputedStyle(document.querySelector('tr[data-epochs]:last-child .strip')).backgroundPosition"
    )
    before = browser.evaluate(background)
    browser.evaluate("document.getElementById('epoch').focus()")
    browser.press("ArrowLeft")
    assert shown() == sorted(["0", "0", "2", "2"])
    assert browser.evaluate(background) != before
    assert browser.evaluate("document.getElementById('at-epoch').textContent") == "2 of 3"
    assert browser.evaluate("document.getElementById('epoch').ariaValueText") == "epoch 2 of 3"
    browser.press("Home")
    assert shown() == ["0"] * 4
    browser.press("End")
    assert browser.evaluate(background) == before


def test_a_frame_of_a_strip_fills_its_tile(browser: Browser, tmp_path: Path) -> None:
    """A frame is drawn alone, edge to edge: nothing of its neighbours, all of its own."""
    folder = make_run(tmp_path / "at", "at")
    snapshots = Snapshots.start(
        torch.zeros(1, 1, 16, 16, dtype=torch.uint8), torch.tensor([0]), ["a"], ["layer1"]
    )
    for epoch in range(3):
        corner = torch.zeros(1, 4, 4)
        corner[0, 0, 0] = corner[0, 3, 3] = float(epoch == 1)
        corner[0, 1, 1] = float(epoch != 1)
        snapshots = snapshots.add(epoch, [corner])
    snapshots.save(folder / "maps.safetensors")
    browser.open(write_report([folder], tmp_path / "r.html"))
    browser.evaluate("document.documentElement.style.setProperty('--strength', 1)")
    browser.evaluate("document.getElementById('epoch').focus()")
    browser.press("ArrowLeft")
    box = browser.evaluate(
        "(() => { const e = document.querySelector('.strip'); scrollTo(0, 0);"
        "const b = e.getBoundingClientRect(); return [b.x + scrollX, b.y + scrollY, b.width, b.height]; })()"
    )
    pixels = shot(browser, box)
    corners = [pixels[4, 10], pixels[10, 4], pixels[-5, -11], pixels[-11, -5]]
    assert all(corner.sum() > 500 for corner in corners)  # the colour of the largest value
    assert pixels[4, -10].sum() < 30 and pixels[-10, 4].sum() < 30
    assert abs(int(pixels[12, 12].sum()) - int(pixels[-13, -13].sum())) < 20


# At the place that is pointed at, once the maps are decoded.
VALUES = """
new Promise((done) => {
  const look = () => {
    const values = [...document.querySelectorAll(".pointed .tile")].map((e) => e.dataset.value);
    if (values.every((value) => value)) done(values);
    else requestAnimationFrame(look);
  };
  look();
})"""


def test_values_of_the_maps_under_the_pointer_and_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    """Of teacher and student at one place of the image, each in its own resolution and scale."""
    folder = make_run(tmp_path / "at", "at")
    snapshots = Snapshots.start(
        torch.zeros(1, 1, 16, 32, dtype=torch.uint8), torch.tensor([0]), ["a"], ["layer1"]
    )
    snapshots = snapshots.with_teacher([torch.tensor([[[0.0, 0.0], [0.0, 3.0]]])])
    first, last = torch.rand(2, 1, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    snapshots.add(0, [first]).add(1, [last]).save(folder / "maps.safetensors")
    browser.open(write_report([folder], tmp_path / "r.html"), width=500)

    def cell(values: torch.Tensor, row: int, column: int) -> str:
        return f"{values[0, row, column] / values.max():.2f}"

    browser.evaluate("document.querySelector('.strip').scrollIntoView({ block: 'center' })")
    box = "(() => { const b = document.querySelector('.strip').getBoundingClientRect();"
    x, y, width, height = browser.evaluate(f"{box} return [b.x, b.y, b.width, b.height]; }})()")
    assert width == pytest.approx(2 * height, rel=0.02)
    move = {"type": "mouseMoved", "button": "none"}
    for row, column in [(0, 0), (3, 7), (2, 5), (0, 6)]:
        at = {"x": x + (column + 0.5) * width / 8, "y": y + (row + 0.5) * height / 4}
        browser.call("Input.dispatchMouseEvent", **move, **at)
        of_teacher, of_student = browser.evaluate(VALUES)
        assert float(of_student) == pytest.approx(float(cell(last, row, column)), abs=0.011)
        assert (of_teacher == "1.00") == ((row, column) == (3, 7))
    browser.call("Input.dispatchMouseEvent", **move, x=1, y=1)
    assert browser.evaluate(VALUES) == []

    browser.evaluate("document.querySelector('.maps').focus()")
    browser.press("ArrowRight")
    assert float(browser.evaluate(VALUES)[1]) == pytest.approx(float(cell(last, 2, 4)), abs=0.011)
    for _ in range(9):
        browser.press("ArrowDown")
        browser.press("ArrowRight")
    assert float(browser.evaluate(VALUES)[1]) == pytest.approx(float(cell(last, 3, 7)), abs=0.011)
    said = browser.evaluate("document.querySelector('output.unseen').textContent")
    assert said.startswith("100 % from the left, 100 % from the top; Attention of the teacher at layer1")
    assert "1.00; Attention of" in said
    slide = "(s) => { s.value = 0; s.dispatchEvent(new Event('input')); }"
    browser.evaluate(f"({slide})(document.getElementById('epoch'))")
    assert float(browser.evaluate(VALUES)[1]) == pytest.approx(float(cell(first, 3, 7)), abs=0.011)


def shot(browser: Browser, box: list[float]):
    import base64
    import io

    import numpy as np
    from PIL import Image

    clip = {**dict(zip(("x", "y", "width", "height"), box, strict=True)), "scale": 1}
    data = browser.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_charts_are_read_by_keyboard_and_as_tables(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.evaluate("document.querySelector('svg[data-hover]').focus()")
    tip = "document.querySelector('.plot:focus-within .tip').textContent"
    browser.press("Home")  # a key, so that the focus is one of the keyboard
    browser.press("ArrowLeft")
    assert browser.evaluate(tip).startswith("epoch 2\n")
    browser.press("ArrowRight")
    assert browser.evaluate(tip).startswith("epoch 3\n")
    browser.evaluate("document.querySelector('details.tables').open = true")
    browser.evaluate("new Promise((done) => setTimeout(done, 50))")
    tables = browser.evaluate(
        "[...document.querySelector('details.tables').querySelectorAll('table')].map((t) => "
        "[t.caption.textContent, [...t.tBodies[0].rows].map((r) => [...r.cells].map((c) => c.textContent))])"
    )
    assert len(tables) == 4
    title, rows = tables[0]
    assert title == "Validation error %"
    assert rows[0][:3] == ["1", "60.0", "60.5  (60.0 to 61.0)"]
    scopes = "[...document.querySelectorAll('.chart-table th')].every((th) => th.scope)"
    assert browser.evaluate(scopes)


def test_likeness_is_one_line_though_few_epochs_were_kept(browser: Browser, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "at", "at", epochs=30)
    keep_maps(folder, [0, 1, *range(2, 31, 2)], taught=True)
    browser.open(write_report([folder], tmp_path / "report.html"))
    chart = "[...document.querySelectorAll('.chart')].find((c) => c.textContent.includes('Likeness'))"
    lines = f"[...{chart}.querySelectorAll('polyline')].map((line) => line.points.length)"
    assert browser.evaluate(lines) == [17]
    assert browser.evaluate(f"{chart}.querySelectorAll('circle').length") == 0


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_of_every_text(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    browser.evaluate("new Promise((done) => setTimeout(done, 50))")
    browser.evaluate("document.querySelector('svg[data-hover]').focus()")
    browser.press("ArrowLeft")
    texts = browser.evaluate(TEXTS)
    assert len(texts) > 300
    colours = sorted({c for _, colour, behind in texts for c in (colour, *behind)})
    rgba = dict(zip(colours, browser.evaluate(f"{json.dumps(colours)}.map({TO_RGBA})"), strict=True))
    poor = {
        (text, colour): round(ratio, 2)
        for text, colour, behind in texts
        if (ratio := contrast(rgba[colour], over([rgba[c] for c in behind]))) < 4.5
    }
    assert not poor
    paper = over([rgba[behind[-2]] for _, _, behind in texts[:1]])
    assert (luminance(paper) < 0.05) is dark


def over(layers: list[list[int]]) -> list[float]:
    """The colour of layers, the uppermost first, over white."""
    colour = [255.0] * 3
    for *channels, alpha in reversed(layers):
        colour = [
            c * alpha / 255 + below * (1 - alpha / 255) for c, below in zip(channels, colour, strict=True)
        ]
    return colour


def channel_luminance(value: float) -> float:
    """Linear light of a channel of 0 to 255."""
    value /= 255
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def luminance(rgb: list[float]) -> float:
    """Relative luminance, WCAG 2."""
    red, green, blue = (channel_luminance(value) for value in rgb[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


# Machado, Oliveira & Fernandes (IEEE TVCG 2009), severity 1, on linear RGB
EYES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],  # noqa: E501
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],  # noqa: E501
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],  # noqa: E501
}  # fmt: skip
STYLES = ["teacher", "alone", *(f"method{number}" for number in range(METHOD_STYLES))]


@pytest.mark.parametrize("dark", [False, True])
def test_curves_are_told_apart_by_any_eyes(browser: Browser, page: Path, dark: bool) -> None:
    """By their dashes, or by colours whose CIE76 distance is 20 or more for every kind of eyes."""
    browser.open(page, dark=dark)
    look = """((style) => {
      const g = document.createElementNS("http://www.w3.org/2000/svg", "g");
      g.setAttribute("class", `s-${style} mean`);
      g.append(document.createElementNS(g.namespaceURI, "polyline"));
      document.querySelector("svg").append(g);
      const { stroke, strokeDasharray } = getComputedStyle(g.firstChild);
      return [stroke, strokeDasharray];
    })"""
    looks = browser.evaluate(f"{json.dumps(STYLES)}.map({look})")
    paper = browser.evaluate(f"{TO_RGBA}(getComputedStyle(document.body).backgroundColor)")
    rgb = browser.evaluate(f"{json.dumps([colour for colour, _ in looks])}.map({TO_RGBA})")
    assert all(contrast(colour, paper) >= 3 for colour in rgb)
    for i, j in combinations(range(len(STYLES)), 2):
        if looks[i][1] == looks[j][1]:
            for name, matrix in EYES.items():
                assert math.dist(lab(rgb[i], matrix), lab(rgb[j], matrix)) >= 20, (STYLES[i], STYLES[j], name)


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def lab(rgb: list[float], matrix: list[list[float]]) -> list[float]:
    """CIE Lab of a colour as such eyes see it."""
    linear = [channel_luminance(value) for value in rgb[:3]]
    seen = [min(1.0, max(0.0, dot(row, linear))) for row in matrix]
    rows = ([0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728])
    x, y, z = (dot(row, seen) for row in rows)
    f = [v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z)]
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


def test_names_are_shown_and_never_run(browser: Browser, tmp_path: Path) -> None:
    browser.open(write_page(tmp_path, HOSTILE, note=HOSTILE))
    assert [each for each in browser.messages if not each.startswith("request file:")] == []
    assert browser.evaluate("document.scripts.length") == 1
    assert browser.evaluate(
        f"document.querySelector('.heat th[scope=row]').textContent === {json.dumps(HOSTILE)}"
    )


def test_names_roles_and_headings_that_a_screen_reader_says(browser: Browser, page: Path) -> None:
    browser.open(page)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    said = [
        (node["role"]["value"], node.get("name", {}).get("value", ""), node)
        for node in nodes
        if not node["ignored"]
    ]
    roles = [role for role, _, _ in said]
    assert roles.count("main") == 1 and roles.count("banner") == 1 and roles.count("navigation") == 1
    needs_name = {"image", "slider", "region", "navigation", "button", "link", "article"}
    assert not [(role, name) for role, name, _ in said if role in needs_name and not name]
    levels = [
        next(p["value"]["value"] for p in node["properties"] if p["name"] == "level")
        for role, _, node in said
        if role == "heading"
    ]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert any(TAUGHT in name for role, name, _ in said if role == "columnheader")
    nameless = """[...document.querySelectorAll("[role=region], svg, section")].filter((e) => !e.ariaLabel &&
        !document.getElementById(e.getAttribute("aria-labelledby"))).map((e) => e.outerHTML.slice(0, 80))"""
    assert browser.evaluate(nameless) == []
    broken = "[...document.querySelectorAll('nav a')].filter((a) => !document.querySelector(a.hash))"
    assert browser.evaluate(broken) == []


def test_the_focus_is_seen_wherever_it_goes(browser: Browser, page: Path) -> None:
    browser.open(page)
    seen = []
    for _ in range(25):
        browser.press("Tab")
        seen.append(
            browser.evaluate(
                "(() => { const s = getComputedStyle(document.activeElement);"
                "return [document.activeElement.tagName, s.outlineStyle, parseFloat(s.outlineWidth)]; })()"
            )
        )
    assert {"BUTTON", "A", "DIV", "svg", "SUMMARY"} <= {tag for tag, _, _ in seen}
    assert all(style == "solid" and width >= 2 for _, style, width in seen)
