"""Build the documentation site, strictly and without a network: `python docs/site/build.py FOLDER`.

Zensical builds it from a copy of the pages, in which the page of commands holds the command's own help, and a
link to a file of the repository leads to a page with that file's text. `formulas.py` writes the formulas.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = "<!-- commands -->"
WIDTH = "84"  # of the help, in characters: what a column of the site has room for
OUTWARD = re.compile(r"(\[[^\]]*\]\()\.\./([^)#\s]+)(?:#[^)\s]*)?\)")  # a link out of docs/, from any page
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".md": "markdown", ".toml": "toml"}


def build(folder: Path) -> int:
    """Write the site into `folder`; the exit status, which is not 0 after a warning."""
    with TemporaryDirectory() as work:
        stage(Path(work))
        paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
        status = subprocess.run(command, cwd=work, env=environment).returncode
        if status == 0:
            shutil.copytree(Path(work) / "site", folder, dirs_exist_ok=True)
        return status


def stage(work: Path) -> None:
    """Put the configuration and the pages where they are built from."""
    shutil.copy(ROOT / "mkdocs.yml", work)
    shutil.copytree(ROOT / "docs", work / "docs", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for page in (work / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for _, path in OUTWARD.findall(text):
            if (ROOT / path).is_file():
                listing = page.parent / "source" / f"{path}.md"
                listing.parent.mkdir(parents=True, exist_ok=True)
                listing.write_text(listing_of(path), encoding="utf-8")
        if COMMANDS in text:
            text = text.replace(COMMANDS, "\n".join(commands()))
        page.write_text(OUTWARD.sub(r"\1source/\2.md)", text), encoding="utf-8")


def listing_of(path: str) -> str:
    """A page with the text of a file of the repository."""
    text, language = (ROOT / path).read_text(encoding="utf-8"), LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{text.rstrip()}\n````\n"


def commands() -> Iterator[str]:
    """A heading for each verb of the command, and its help; verbs of a verb below it."""
    from attention_transfer.cli.parsing import VERBS

    for verb, summary in VERBS.items():
        yield from section("##", [verb], summary)
        module = importlib.import_module(f"attention_transfer.cli.{verb}")
        inner = getattr(module, "VERBS", {}) if verb == "caffe" else getattr(module, "SUMMARIES", {})
        for name, what in inner.items():
            yield from section("###", [verb, name], what)


def section(heading: str, words: list[str], summary: str) -> list[str]:
    return [f"{heading} {' '.join(words)}", "", f"{summary}.", "", "```text", help_of(words), "```", ""]


def help_of(words: list[str]) -> str:
    """What `attention-transfer WORDS --help` prints."""
    from attention_transfer.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main([*words, "--help"])
    if status != 0:
        raise RuntimeError(f"commands: {' '.join(words)} --help ended with status {status}.")
    return printed.getvalue().strip()


if __name__ == "__main__":
    os.environ["COLUMNS"] = WIDTH
    sys.path.insert(0, str(ROOT))
    sys.exit(build(Path(sys.argv[1])))
