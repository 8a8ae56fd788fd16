"""What is compared with what: the plan of a distillation as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ._tables import format_table
from .pairs import Pair

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class PlanRow:
    """One layer pair: shapes (c, h, w) where known, weights by term, shares of the gradient by term."""

    pair: Pair
    student_shape: Shape | None = None
    teacher_shape: Shape | None = None
    resize: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def resizing(self) -> str:
        """How unequal maps are brought together: "", "teacher 16x16 -> 8x8", or that they are not."""
        if self.student_shape is None or self.teacher_shape is None:
            return "?"
        sizes = {"student": self.student_shape[1:], "teacher": self.teacher_shape[1:]}
        if sizes["student"] == sizes["teacher"]:
            return "-"
        if self.resize is None:
            return 'unequal: pass resize="student" or "teacher"'
        other = "teacher" if self.resize == "student" else "student"
        return f"{self.resize} {_size(sizes[self.resize])} -> {_size(sizes[other])}"


@dataclass(frozen=True)
class Plan:
    """The layer pairs of a distillation, printed as a table."""

    rows: Sequence[PlanRow]
    terms: Sequence[str]
    shares: dict[str, float] = field(default_factory=dict)
    """By term, of the gradient of the student's parameters, where a preflight has measured it."""

    def __str__(self) -> str:
        return "\n".join([self._table(), *self.terms, *self._overall()])

    def _overall(self) -> list[str]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items())
        return [f"share of the parameters' gradient: {shares}"] if self.shares else []

    def _table(self) -> str:
        if not self.rows:
            return "no layer pairs"
        columns = 5 + any(row.shares for row in self.rows)
        cells = []
        for row in self.rows:
            shares = [f"{name} {share:.0%}" for name, share in row.shares.items()]
            cells.append(
                [
                    f"{row.pair.student} <- {row.pair.teacher}",
                    _shape(row.student_shape),
                    _shape(row.teacher_shape),
                    row.resizing,
                    ", ".join(f"{weight:g}" for weight in row.weights.values()) or "-",
                    ", ".join(shares),
                ][:columns]
            )
        return format_table(_HEADER[:columns], cells)

    def as_dicts(self) -> list[dict[str, object]]:
        """The rows as plain values, for JSON."""
        return [
            {
                "student": row.pair.student,
                "teacher": row.pair.teacher,
                "weight": row.pair.weight,
                "student_shape": row.student_shape,
                "teacher_shape": row.teacher_shape,
                "resizing": row.resizing,
                "shares": row.shares,
            }
            for row in self.rows
        ]


_HEADER = ["pair: student <- teacher", "student", "teacher", "resizing", "weight", "share of the gradient"]


def _shape(shape: Shape | None) -> str:
    return "?" if shape is None else " x ".join(map(str, shape))


def _size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
