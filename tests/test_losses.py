"""The terms as modules: the functions they stand over, what they contribute, what they refuse."""

from __future__ import annotations

import pytest
import torch

from attention_transfer.functional import attention_map, attention_transfer_loss, distillation_loss
from attention_transfer.pairs import Pair
from attention_transfer.terms import AttentionTransfer, Energy, KnowledgeDistillation, Observation, Reading


def reading(channels: int, size: int, pairs: list[Pair]) -> Reading:
    features = [torch.randn(2, channels, size, size) for _ in pairs]
    energies = [attention_map(layer, norm=None) for layer in features]
    return Reading(torch.randn(2, 7), {Energy(): energies}, features, [(channels, size, size)] * len(pairs))


def observation(pairs: list[Pair], *, teacher_size: int = 4) -> Observation:
    return Observation(
        pairs, reading(3, 4, pairs), reading(5, teacher_size, pairs), labels=torch.tensor([0, 6])
    )


def test_attention_transfer_is_the_function_with_its_options() -> None:
    options = {"beta": 3.0, "p": 4.0, "mapping": "max", "form": "code", "resize": "student"}
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 6, 6)
    assert AttentionTransfer(**options)(student, teacher) == attention_transfer_loss(
        student, teacher, **options
    )
    assert repr(AttentionTransfer(**options)) == (
        "AttentionTransfer(beta=3.0, p=4.0, mapping='max', form='code', resize='student')"
    )


def test_attention_transfer_contributes_each_pair_by_its_weight() -> None:
    seen = observation([Pair("a", "x", weight=0.5), Pair("b", "y")])
    contributions = AttentionTransfer(beta=2.0).contributions(seen)
    want = attention_transfer_loss(seen.student.features[0], seen.teacher.features[0], beta=1.0)
    assert list(contributions) == ["at/a", "at/b"]
    torch.testing.assert_close(contributions["at/a"], want)


def test_a_student_layer_in_two_pairs_has_two_names() -> None:
    seen = observation([Pair("a", "x"), Pair("a", "y")])
    assert list(AttentionTransfer(beta=1.0).contributions(seen)) == ["at/a<-x", "at/a<-y"]


def test_knowledge_distillation_leaves_the_rest_to_the_labels() -> None:
    term, seen = KnowledgeDistillation(alpha=0.3, temperature=2.0), observation([])
    want = 0.3 * distillation_loss(seen.student.logits, seen.teacher.logits, temperature=2.0)
    assert term.contributions(seen) == {"kd": want}
    assert term.cross_entropy_weight == pytest.approx(0.7)


@pytest.mark.unchecked
def test_terms_refuse_bad_options_when_they_are_built() -> None:
    with pytest.raises(ValueError, match="AttentionTransfer: expected form as one of"):
        AttentionTransfer(beta=1.0, form="papr")
    with pytest.raises(ValueError, match="AttentionTransfer: expected a finite beta >= 0, got -1"):
        AttentionTransfer(beta=-1)
    with pytest.raises(ValueError, match=r"KnowledgeDistillation: expected 0 <= alpha <= 1, got 1\.5"):
        KnowledgeDistillation(alpha=1.5)
    with pytest.raises(ValueError, match="KnowledgeDistillation: expected temperature > 0, got 0"):
        KnowledgeDistillation(temperature=0)


def test_an_error_at_a_pair_names_the_pair() -> None:
    seen = observation([Pair("a", "x")], teacher_size=8)
    with pytest.raises(ValueError, match=r"got student \(4, 4\) and teacher \(8, 8\).*At the pair a <- x"):
        AttentionTransfer(beta=1.0).contributions(seen)
