"""The distiller: what it computes, that its teacher stays a teacher, and the plan it prints."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_net import Net
from torch import Tensor, nn

from attention_transfer import (
    AttentionTransfer,
    Distiller,
    InputTransform,
    KnowledgeDistillation,
    Pair,
    Taps,
    attention_transfer_loss,
    distillation_loss,
)

PAIRS = [Pair("first", "first"), Pair("second", "second", weight=0.5)]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


@pytest.fixture
def distiller() -> Distiller:
    terms = [AttentionTransfer(beta=2.0), KnowledgeDistillation(alpha=0.25, temperature=3.0)]
    return Distiller(Net(4).eval(), Net(6), pairs=PAIRS, terms=terms)


def test_loss_is_the_sum_of_its_named_terms(distiller, batch) -> None:
    x, y = batch
    out = distiller(x, y)
    with Taps(distiller.student, ["first", "second"]) as student, torch.no_grad():
        logits = distiller.student(x)
        features = list(student.pop().values())
    with Taps(distiller.teacher, ["first", "second"]) as teacher, torch.no_grad():
        teacher_logits = distiller.teacher(x)
        teacher_features = list(teacher.pop().values())
    want = {
        "ce": 0.75 * F.cross_entropy(logits, y),
        "at/first": attention_transfer_loss(features[0], teacher_features[0], beta=2.0),
        "at/second": attention_transfer_loss(features[1], teacher_features[1], beta=1.0),
        "kd": 0.25 * distillation_loss(logits, teacher_logits, temperature=3.0),
    }
    assert list(out.terms) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(out.terms[name], value)
    torch.testing.assert_close(out.loss, sum(want.values()))
    torch.testing.assert_close(out.logits, logits)


def test_gradient_reaches_the_student_alone(distiller, batch) -> None:
    before = copy.deepcopy(distiller.teacher.state_dict())
    distiller.train()(*batch).loss.backward()
    assert all(parameter.grad is not None for parameter in distiller.student.parameters())
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    for name, value in distiller.teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_teacher_stays_in_evaluation_mode(distiller) -> None:
    distiller.train()
    assert distiller.student.training and not any(module.training for module in distiller.teacher.modules())


def test_teacher_that_somebody_put_in_training_mode_is_put_back(distiller) -> None:
    distiller.teacher.train()
    distiller.train()
    assert not any(module.training for module in distiller.teacher.modules())


def test_teacher_keeps_no_graph_even_where_the_images_need_a_gradient(distiller, batch) -> None:
    seen = distiller.observe(batch[0].requires_grad_(), batch[1])
    assert not any(tensor.requires_grad for tensor in (seen.teacher_logits, *seen.teacher_features))


def test_teacher_is_outside_of_parameters_and_state(distiller) -> None:
    own = {f"student.{name}" for name in distiller.student.state_dict()}
    assert set(distiller.state_dict()) == own
    assert {name for name, _ in distiller.named_parameters()} <= own


def test_teacher_and_its_transform_follow_to(batch) -> None:
    statistics = ([0.5] * 3, [0.25] * 3)
    transform = InputTransform(statistics, statistics)
    distiller = Distiller(
        Net(4), Net(6), pairs=PAIRS, terms=[AttentionTransfer(1.0)], teacher_transform=transform
    )
    distiller.double()
    assert {parameter.dtype for parameter in distiller.teacher.parameters()} == {torch.float64}
    assert transform.factor.dtype == torch.float64
    assert distiller(batch[0].double(), batch[1]).loss.dtype == torch.float64


def test_hooks_are_gone_after_a_step_and_after_an_error(distiller, batch) -> None:
    distiller(*batch)
    with pytest.raises(RuntimeError):
        distiller(batch[0][:, :2], batch[1])
    for model in (distiller.student, distiller.teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_student_alone_needs_no_teacher(batch) -> None:
    out = Distiller(Net(4), None)(*batch)
    assert list(out.terms) == ["ce"]
    assert str(Distiller(Net(4), None).plan()) == "no layer pairs"


@pytest.mark.unchecked
def test_attention_transfer_across_other_classes(batch) -> None:
    out = Distiller(Net(4), Net(6, classes=9), pairs=PAIRS, terms=[AttentionTransfer(1.0)])(*batch)
    assert out.loss.isfinite()
    distiller = Distiller(Net(4), Net(6, classes=9), terms=[KnowledgeDistillation()])
    with pytest.raises(
        ValueError, match=r"student \(4, 5\) and teacher \(4, 9\).*attention transfer does not"
    ):
        distiller(*batch)


def test_teacher_takes_its_own_normalisation_and_size(batch) -> None:
    """A student that sees (x - m_s)/s_s must show its teacher (x - m_t)/s_t, resized."""
    raw = torch.rand(4, 3, 8, 8)
    (m_s, s_s), (m_t, s_t) = ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]), ([0.1, 0.2, 0.3], [0.9, 0.8, 0.7])
    as_student = (raw - torch.tensor(m_s).view(3, 1, 1)) / torch.tensor(s_s).view(3, 1, 1)
    as_teacher = (raw - torch.tensor(m_t).view(3, 1, 1)) / torch.tensor(s_t).view(3, 1, 1)
    torch.testing.assert_close(InputTransform((m_s, s_s), (m_t, s_t))(as_student), as_teacher)
    transform = InputTransform((m_s, s_s), (m_t, s_t), size=(16, 16))
    assert transform(as_student).shape == (4, 3, 16, 16)
    terms = [AttentionTransfer(1.0, resize="teacher")]
    distiller = Distiller(Net(4), Net(6), terms=terms, teacher_transform=transform, example_input=raw)
    assert [row.teacher_shape for row in distiller.plan().rows] == [(6, 16, 16), (6, 8, 8)]
    assert distiller(as_student, batch[1]).loss.isfinite()


def test_plan_is_a_table(batch) -> None:
    terms = [AttentionTransfer(beta=2.0)]
    plan = Distiller(Net(4), Net(6), pairs=PAIRS, terms=terms, example_input=batch[0]).plan()
    assert str(plan) == (
        "pair: student <- teacher  student    teacher    resizing  weight\n"
        "------------------------  ---------  ---------  --------  ------\n"
        "first <- first            4 x 8 x 8  6 x 8 x 8  -         2\n"
        "second <- second          4 x 4 x 4  6 x 4 x 4  -         1\n"
        "AttentionTransfer(beta=2.0, p=2.0, mapping='sum', form='paper', resize=None)"
    )


def test_plan_says_how_unequal_maps_are_resized(batch) -> None:
    terms = [AttentionTransfer(1.0, resize="teacher")]
    distiller = Distiller(Net(4), Net(6), pairs=[("second", "first")], terms=terms, example_input=batch[0])
    assert distiller.plan().rows[0].resizing == "teacher 8x8 -> 4x4"


def test_pairs_are_chosen_when_not_given(batch) -> None:
    distiller = Distiller(Net(4), Net(6), terms=[AttentionTransfer(1.0)], example_input=batch[0])
    assert [(pair.student, pair.teacher) for pair in distiller.pairs] == [
        ("first", "first"),
        ("second", "second"),
    ]


def test_building_leaves_no_trace_in_the_student(batch) -> None:
    student = Net(4)
    before, state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    Distiller(student, Net(6).eval(), terms=[AttentionTransfer(1.0)], example_input=batch[0])
    after = torch.get_rng_state()
    assert student.training
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.set_rng_state(state)
    Net(6)  # the only thing above that draws
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_student_and_teacher_give_the_same_step(batch, backend) -> None:
    x, y = batch
    student, teacher = Net(4).eval(), Net(6).eval()
    plain = Distiller(student, teacher, pairs=PAIRS, terms=[AttentionTransfer(1.0)])
    want = plain(x, y)
    want.loss.backward()
    gradients = [parameter.grad.clone() for parameter in student.parameters()]
    compiled = Distiller(
        torch.compile(student, backend=backend),
        torch.compile(teacher, backend=backend),
        pairs=PAIRS,
        terms=[AttentionTransfer(1.0)],
    )
    for _ in range(3):
        student.zero_grad()
        out = compiled(x, y)
        out.loss.backward()
        torch.testing.assert_close(out.loss, want.loss)
        torch.testing.assert_close([parameter.grad for parameter in student.parameters()], gradients)


def test_models_may_return_more_than_logits(batch) -> None:
    class Verbose(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return super().forward(x), "and more"

    assert Distiller(Verbose(4), None)(*batch).logits.shape == (4, 5)


# --- bad input ----------------------------------------------------------------------------------------------


def test_refuses_what_cannot_work(batch) -> None:
    with pytest.raises(ValueError, match='Distiller: expected example_input with pairs="auto", got None'):
        Distiller(Net(4), Net(6), terms=[AttentionTransfer(1.0)])
    with pytest.raises(
        ValueError, match=r"Distiller: expected a teacher for .*AttentionTransfer.*, got None"
    ):
        Distiller(Net(4), None, terms=[AttentionTransfer(1.0)])
    student = Net(4)
    with pytest.raises(ValueError, match="Distiller: expected a teacher apart from the student"):
        Distiller(student, student, pairs=PAIRS, terms=[AttentionTransfer(1.0)])
    with pytest.raises(
        ValueError, match=r"two terms contribute \['at/first', 'at/second'\]. Give one another name"
    ):
        Distiller(Net(4), Net(6), pairs=PAIRS, terms=[AttentionTransfer(1.0), AttentionTransfer(2.0)])(*batch)
    with pytest.raises(ValueError, match=r"expected a model that gives logits \(b, k\), got \(4, 3, 8, 8\)"):
        Distiller(nn.Identity(), None)(*batch)


def test_two_attention_terms_under_two_names(batch) -> None:
    terms = [AttentionTransfer(1.0), AttentionTransfer(1.0, mapping="max", name="at-max")]
    out = Distiller(Net(4), Net(6), pairs=PAIRS, terms=terms)(*batch)
    assert list(out.terms) == ["ce", "at/first", "at/second", "at-max/first", "at-max/second"]
