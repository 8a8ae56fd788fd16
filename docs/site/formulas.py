"""Formulas as MathML, which browsers draw without a script."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def formula(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **_: Any) -> str:
    """A fence of language `math`: a formula a paragraph."""
    formulas = [convert(each, display="block") for each in source.strip().split("\n\n")]
    return f'<div class="{css_class}">{"".join(formulas)}</div>'
