"""The command `attention-transfer`: one verb a job, one file a verb, each composed of the package's rooms.

Exit status: 0; 1 where `caffe check` found something; 2 for bad input, with one line on stderr; 130 on
Ctrl-C, with the work saved.

What takes long to import, torch above all, a verb imports where it is needed, after its flags are read: help
and the answer to a bad flag come at once.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from attention_transfer._colours import coloured, print_safely
from attention_transfer._errors import InputError
from attention_transfer._ranks import is_first_process, process_name
from attention_transfer._reading import one_line
from attention_transfer._tables import printable
from attention_transfer._trust import trusted, trusting
from attention_transfer.cli.parsing import PROGRAM, VERBS, UsageError, split_trust, suggest
from attention_transfer.cli.wording import in_flags, spoken
from attention_transfer.runs.run import Interrupted


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get("ATTENTION_TRANSFER_DEBUG"))
    arguments = [argument for argument in arguments if argument != "--debug"]
    warnings.formatwarning, sys.excepthook = _format_warning, _show_traceback
    try:
        arguments, factories = split_trust(arguments)
        _open_current_folder(factories)
        with trusting(*factories):
            return _dispatch(arguments)
    except Interrupted as stop:
        return _status(stop.exit_status)
    except KeyboardInterrupt:
        return _status(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug or not _is_bad_input(error):
            raise
        place = f"{printable(name)}: " if (name := process_name()) else ""
        print_safely(f"{PROGRAM}: {place}{printable(_describe(error))}", stream=sys.stderr)
        return 2


def _format_warning(message: Warning | str, *_: object, **__: object) -> str:
    text = in_flags(one_line(str(message)), spoken.get())
    return coloured(f"warning: {printable(text)}\n", sys.stderr)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print_safely("".join(traceback.format_exception(kind, error, trace)), end="", stream=sys.stderr)


def _status(stopped: int) -> int:
    """The exit status after a stop: of several processes the first speaks for all.

    Lightning kills the first as soon as one that it started leaves with another status than 0, be it that
    the first still has something to say.
    """
    return stopped if is_first_process() else 0


def _open_current_folder(factories: Sequence[str]) -> None:
    """Let modules be imported from where the user is, as with `python -m`, if he names one of his own.

    At the end of the path, and only then: a file that lies there by chance stands in for no package that is
    not installed.
    """
    # guard: import-from-here
    if (factories or trusted()) and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print_safely(_overview())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print_safely(version("attention-transfer"))
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}. {suggest(verb, VERBS)}")
    try:
        return importlib.import_module(f"{__name__}.{verb}").run(rest) or 0
    except SystemExit as done:  # argparse leaves this way after --help
        return int(done.code or 0)


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name.ljust(width)}  {summary}" for name, summary in VERBS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB [flags]",
            "",
            "Train a small network (the student) to look where a large one (the teacher) looks.",
            "",
            *lines,
            "",
            "examples:",
            f"  {PROGRAM} demo",
            f"  {PROGRAM} train --data cifar10 --teacher wrn-16-2 --student wrn-16-1 --epochs 100",
            "",
            f"`{PROGRAM} VERB --help` lists a verb's flags; --debug shows the traceback of an error.",
            "--trust MODULE:NAME lets runs, recipes and weights files name that factory: docs/security.md.",
        ]
    )


def _is_bad_input(error: Exception) -> bool:
    """Whether an error answers the input, comes of the system, or is of a training that went astray."""
    return isinstance(error, InputError | OSError | FloatingPointError) or _is_about_a_name(error)


def _is_about_a_name(error: Exception) -> bool:
    """Whether the system was asked for a file that cannot be there, whatever file said so."""
    unknown = isinstance(error, UnicodeEncodeError) and "surrogates not allowed" in str(error)
    return unknown or (isinstance(error, ValueError) and str(error).startswith("embedded null"))


def _describe(error: Exception) -> str:
    if _is_about_a_name(error):
        return (
            "expected the name of a file, got one with a NUL or half a character in it. Give it another name."
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return in_flags(one_line(str(error)), spoken.get())
