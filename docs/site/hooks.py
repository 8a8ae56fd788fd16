"""What the documentation site is built with beside mkdocs: see `mkdocs.yml`.

Formulas become MathML, the page of commands is written from the command's own help, and a link from a page to
a file of the repository leads to a page with that file's text.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

COMMANDS = "<!-- commands -->"
WIDTH = "84"  # of the help, in characters: what a column of the site has room for
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)(#[^)\s]*)?\)")
SOURCES = "source"  # where files of the repository lie in the site
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".md": "markdown", ".toml": "toml"}


# --- formulas -----------------------------------------------------------------------------------------------


def formula(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **_: Any) -> str:
    """A fence of language `math` as MathML, which browsers draw without a script: a formula a paragraph."""
    formulas = [convert(each, display="block") for each in source.strip().split("\n\n")]
    return f'<div class="{css_class}">{"".join(formulas)}</div>'


def on_config(config: MkDocsConfig) -> None:
    fence = {"name": "math", "class": "formula", "format": formula}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]


# --- commands -----------------------------------------------------------------------------------------------


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, "\n".join(_sections()))
    return LINK.sub(lambda match: _link(match, page.file.src_uri, config, files), markdown)


def _sections() -> Iterator[str]:
    """A heading for each verb of the command, and its help; verbs of a verb below it."""
    from attention_transfer.cli.parsing import VERBS

    for verb, summary in VERBS.items():
        yield from _section("##", [verb], summary)
        module = importlib.import_module(f"attention_transfer.cli.{verb}")
        inner = getattr(module, "VERBS", {}) if verb == "caffe" else getattr(module, "SUMMARIES", {})
        for name, what in inner.items():
            yield from _section("###", [verb, name], what)


def _section(heading: str, words: list[str], summary: str) -> list[str]:
    return [f"{heading} {' '.join(words)}", "", f"{summary}.", "", "```text", help_of(words), "```", ""]


def help_of(words: list[str]) -> str:
    """What `attention-transfer WORDS --help` prints."""
    from attention_transfer.cli import main

    former, printed = os.environ.get("COLUMNS"), io.StringIO()
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(printed):
            status = main([*words, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if former is not None:
            os.environ["COLUMNS"] = former
    if status != 0:
        raise PluginError(f"commands: {' '.join(words)} --help ended with status {status}.")
    return printed.getvalue().strip()


# --- links to files of the repository -----------------------------------------------------------------------


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file of the repository that a page links to."""
    root = Path(config.docs_dir).parent
    for page in list(files.documentation_pages()):
        for _, target, _ in LINK.findall(page.content_string):
            path = _outside(target, page.src_uri)
            if path and (root / path).is_file() and f"{SOURCES}/{path}.md" not in files.src_uris:
                files.append(File.generated(config, f"{SOURCES}/{path}.md", content=_listing(root, path)))
    return files


def _outside(target: str, page: str) -> str | None:
    """The path in the repository that a link leads to, if it leads out of the folder of the documentation."""
    if "://" in target:
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") or path == "docs" else path


def _listing(root: Path, path: str) -> str:
    text, language = (root / path).read_text(encoding="utf-8"), LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{text.rstrip()}\n````\n"


def _link(match: re.Match[str], page: str, config: MkDocsConfig, files: Files) -> str:
    before, target, _ = match.groups()
    path = _outside(target, page)
    if path is None or page.startswith(f"{SOURCES}/") or f"{SOURCES}/{path}.md" not in files.src_uris:
        return match[0]  # mkdocs itself finds what does not resolve
    return f"{before}{posixpath.relpath(f'{SOURCES}/{path}.md', posixpath.dirname(page) or '.')})"
