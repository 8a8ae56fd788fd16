"""What a term says of itself, to be read without the term: `--help` takes no time to import PyTorch.

A term's class body begins with its declaration, such as `name = "at"`. `read_declaration` takes it from the
source of the file; `Declaration.of` takes it from a class that is there.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from attention_transfer._choices import Form, Mapping, Side
from attention_transfer._errors import InputError, InputTypeError
from attention_transfer._trust import load_factory

AUTO: Final = "auto"
Weight = float | Literal["auto"]


@dataclass(frozen=True)
class Range:
    """The values that a setting may have: `holds` decides, `text` is what an error says is expected."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Range("> 0", lambda value: value > 0)
NOT_NEGATIVE = Range(">= 0", lambda value: value >= 0)
NOT_NEGATIVE_OR_AUTO = Range('>= 0 or "auto"', lambda value: value == AUTO or value >= 0)
SHARE = Range("from 0 to 1", lambda value: 0 <= value <= 1)


@functools.cache
def at_least(least: int) -> Range:
    return Range(f">= {least}", lambda value: value >= least)


@dataclass(frozen=True)
class Energy:
    """What an attention map is made of: sum (or max) over the channels of |A|^p, as `attention_map` says."""

    p: float = 2.0
    mapping: Mapping = "sum"


@dataclass(frozen=True)
class Setting:
    """A setting of a term: a field of the recipe, a flag of the command, an argument of the term's class.

    Attributes:
        name: of the field; the flag is `--name`.
        type: of the value.
        default: of the field.
        help: what the flag's help says.
        range: the values that are allowed; all of the type if None.
        argument: what the class calls it, `name` if empty.
        is_argument: whether the class takes it at all; the layer pairs are the distiller's.
        shapes_energy: whether the maps themselves follow it, which a cache holds ready-made.
    """

    name: str
    type: Any
    default: Any
    help: str
    range: Range | None = None
    argument: str = ""
    is_argument: bool = True
    shapes_energy: bool = False


# What several terms have in common is one setting of the recipe.

PAIRS = Setting(
    "pairs",
    str,
    "auto",
    'Student and teacher layers to compare, "layer1:layer1,layer2:block2"; "auto" finds the stage ends.',
    is_argument=False,
)
FORM = Setting(
    "form",
    Form,
    "paper",
    "Form of the terms at layer pairs: the paper's, the authors' code's (beta about 1000), or Caffe's.",
)
RESIZE = Setting(
    "resize",
    Side | None,
    None,
    "Whose maps are resized to the other's where sizes differ. An error there if not given.",
)


@dataclass(frozen=True)
class Declaration:
    """The facts about a term that the rest of the package derives everything from.

    Attributes:
        name: what `--method` calls it, and its contributions in the log.
        label: what figures and reports call it; the name if empty.
        formula: what it adds to the loss, in the words of docs/methods.md.
        symbol: what its weight is called.
        settings: its fields of the recipe.
        energy: the kind of energy that it reads at each layer pair, None for none.
        needs_features: whether it reads features there, which a cache of maps does not hold.
        needs_teacher: whether it compares with a teacher at all.
        needs_input_gradient: whether it reads dCE/dx, which differentiates the student twice.
        needs_flip: whether it reads that of the mirrored images as well.
        compares_classes: whether student and teacher must answer in the same classes.
        path: where its class is, "package.module:Class".
    """

    name: str
    label: str = ""
    formula: str = ""
    symbol: str = "beta"
    settings: tuple[Setting, ...] = ()
    energy: Energy | None = None
    needs_features: bool = False
    needs_teacher: bool = True
    needs_input_gradient: bool = False
    needs_flip: bool = False
    compares_classes: bool = False
    path: str = ""

    @classmethod
    def of(cls, term: type, path: str = "") -> Declaration:
        """The declaration of a term's class."""
        facts = {fact: getattr(term, fact) for fact in FACTS if hasattr(term, fact)}
        return cls(**facts, path=path or f"{term.__module__}:{term.__qualname__}")

    @property
    def at_pairs(self) -> bool:
        """Whether it compares student and teacher at layer pairs."""
        return self.energy is not None or self.needs_features

    @property
    def reads_cache(self) -> bool:
        """Whether the logits and maps of a teacher are enough, which is what a cache holds."""
        return self.needs_teacher and not (self.needs_features or self.needs_input_gradient)

    @property
    def title(self) -> str:
        return self.label or self.name

    @property
    def weight(self) -> Setting | None:
        """The setting that is its weight."""
        return next((each for each in self.settings if (each.argument or each.name) == self.symbol), None)

    def build(self, values: Callable[[str], Any]) -> Any:
        """The term, with the recipe's `values` of its settings."""
        term = load_factory(self.path, self.name)
        arguments = [setting for setting in self.settings if setting.is_argument]
        return term(**{setting.argument or setting.name: values(setting.name) for setting in arguments})


FACTS = tuple(field.name for field in fields(Declaration) if field.name != "path")


def read_declaration(file: Path, module: str) -> Declaration:
    """The declaration in the source of a file with one term, which is not imported.

    What the class says there is written in the names of this module alone.
    """
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            facts = {
                statement.targets[0].id: _value(statement.value)
                for statement in node.body
                if isinstance(statement, ast.Assign)
                and isinstance(statement.targets[0], ast.Name)
                and statement.targets[0].id in FACTS
            }
            if "name" in facts:
                return Declaration(**facts, path=f"{module}:{node.name}")
    raise InputTypeError(f"read_declaration: expected a class with a name in {file}, got none.")


def _value(expression: ast.expr) -> Any:
    return eval(compile(ast.Expression(expression), "<declaration>", "eval"), dict(globals()))


@functools.cache
def built_in() -> dict[str, Declaration]:
    """The declarations of this package's terms by name, in the order in which a method names them."""
    from attention_transfer.terms import FILES

    folder = Path(__file__).parent
    read = [read_declaration(folder / f"{file}.py", f"{__package__}.{file}") for file in FILES]
    return {declaration.name: declaration for declaration in read}


def declare(path: str) -> Declaration:
    """The declaration of a term of the user's own, "package.module:Class", which is imported.

    Raises:
        ValueError: if there is no such class, or it is no term with a name.
    """
    term = load_factory(path, "terms")
    from attention_transfer.terms.term import Term

    if not (isinstance(term, type) and issubclass(term, Term)):
        raise InputError(f"terms: expected a class derived from attention_transfer.Term, got {path}.")
    name = getattr(term, "name", None)
    if not (isinstance(name, str) and re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) and name != "none"):
        raise InputError(
            f"terms: expected {path} to have a name of small letters, digits and hyphens, got {name!r}. "
            'Give the class one, such as name = "my-term".'
        )
    return Declaration.of(term, path)
