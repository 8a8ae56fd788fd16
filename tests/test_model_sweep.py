"""The tables of docs/models.md over all families: each row is what the sweep finds now."""

from __future__ import annotations

import pytest
import timm
from model_sweep import LEFT_OUT, LIBRARIES, PAGE, REASONS, TIMM, Member, look, members, vision_types


def on_the_page(library: str) -> dict[str, str]:
    """The rows of a table by family."""
    begin, end = f"<!-- {library} -->\n", f"\n<!-- /{library} -->"
    table = PAGE.read_text(encoding="utf-8").split(begin)[1].split(end)[0]
    return {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()[2:]}


def test_every_family_is_on_the_page() -> None:
    assert set(timm.list_modules()) == set(TIMM)
    assert set(LEFT_OUT) < set(vision_types())
    looked_at = {
        library: [each.family for each in members() if each.library == library] for library in LIBRARIES
    }
    assert list(on_the_page("timm")) == looked_at["timm"]
    assert list(on_the_page("transformers")) == looked_at["transformers"] + list(LEFT_OUT)


def test_what_is_not_timms_has_its_reason() -> None:
    rows = on_the_page("timm")
    assert set(REASONS) == {family for family in rows if REASONS.get(family, "not timm's:") in rows[family]}
    assert not [
        row for row in [*rows.values(), *on_the_page("transformers").values()] if "no longer so" in row
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("member", members(), ids=str)
def test_a_family(member: Member) -> None:
    assert str(look(member)) == on_the_page(member.library)[member.family]
