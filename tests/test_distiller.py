"""The distiller: what it computes, that its teacher stays a teacher, and the plan it prints."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from small_net import Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from attention_transfer.losses import Energy, Observation, Term

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
    teacher = distiller.observe(batch[0].requires_grad_(), batch[1], keep_features=True).teacher
    kept = (teacher.logits, *teacher.features, *teacher.energies[Energy()])
    assert len(kept) == 5 and not any(tensor.requires_grad for tensor in kept)


def test_activations_of_the_teacher_are_freed_at_once_and_the_students_are_not_copied(
    distiller, batch
) -> None:
    outputs = {}
    for side in ("student", "teacher"):
        first = getattr(distiller, side).get_submodule("first")
        first.register_forward_hook(
            lambda module, args, output, side=side: outputs.update({side: weakref.ref(output)})
        )
    seen = distiller.observe(*batch)
    assert outputs["teacher"]() is None and not seen.teacher.features and not seen.student.features
    loss = sum(distiller.addends(seen).values())
    assert outputs["student"]() is not None
    stored = {tensor.untyped_storage().data_ptr() for tensor in saved_for_backward(loss)}
    assert outputs["student"]().untyped_storage().data_ptr() in stored
    size = outputs["student"]().numel()
    at_least = sum(tensor.numel() for tensor in saved_for_backward(distiller.student(batch[0]).sum()))
    assert sum(tensor.numel() for tensor in saved_for_backward(loss)) < at_least + size


def saved_for_backward(loss: Tensor) -> list[Tensor]:
    """The tensors that the graph of a loss keeps, each storage once."""
    found, seen, nodes = {}, set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names = [name for name in dir(node) if name.startswith("_saved_")]
        values = [getattr(node, name) for name in names] + list(getattr(node, "saved_tensors", ()))
        for value in values:
            for tensor in value if isinstance(value, tuple | list) else [value]:
                if isinstance(tensor, Tensor):
                    found[tensor.untyped_storage().data_ptr()] = tensor
        nodes += [next_node for next_node, _ in node.next_functions]
    return list(found.values())


def test_a_reading_from_elsewhere_gives_the_loss_of_the_teacher_it_came_from(distiller, batch) -> None:
    teacher = distiller.observe(*batch).teacher
    terms = [AttentionTransfer(2.0), KnowledgeDistillation(0.25, 3.0)]
    without = Distiller(distiller.student, None, pairs=PAIRS, terms=terms)
    want, got = distiller(*batch), without(*batch, teacher=teacher)
    assert want.terms.keys() == got.terms.keys()
    assert got.loss == want.loss
    report = without.preflight(*batch, teacher=teacher)
    assert report.plan.rows[0].teacher_shape == (6, 8, 8)


def test_the_precision_of_the_teacher_is_its_own(batch) -> None:
    built = Distiller(
        Net(4), Net(6), pairs=PAIRS, terms=[KnowledgeDistillation()], teacher_dtype=torch.bfloat16
    )
    seen = built.observe(*batch)
    assert seen.teacher.logits.dtype == torch.bfloat16 and seen.student.logits.dtype == torch.float32
    built.teacher_dtype = torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = built.observe(*batch)
    assert seen.teacher.logits.dtype == torch.float32 and seen.student.logits.dtype == torch.bfloat16


class Distance(Term):
    """A term of somebody's own, over activations."""

    name, needs_features = "distance", True

    def contributions(self, seen: Observation) -> dict[str, Tensor]:
        sides = zip(seen.student.features, seen.teacher.features, strict=True)
        return {self.name: sum((own.mean() - other.mean()).square() for own, other in sides)}


def test_a_term_over_activations_is_given_them(batch) -> None:
    built = Distiller(Net(4), Net(6), pairs=PAIRS, terms=[Distance(), AttentionTransfer(1.0)])
    built.preflight(*batch)
    out = built(*batch)
    assert {"distance", "ce"} < set(out.terms)
    out.loss.backward()


@pytest.mark.parametrize("kind", ["nchw", "nhwc", "tokens", "prefixed", "tuple", "checkpointed", "compiled"])
def test_gradients_are_the_same_however_the_map_lies_in_the_output(kind: str) -> None:
    """With the tap's activation passed on, or read late, against the plain function on its activation."""
    torch.manual_seed(0)
    student, teacher = Odd(kind), Odd(kind)
    x, y = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 1])
    built = Distiller(student, teacher, pairs=[("body", "body")], terms=[AttentionTransfer(5.0)])
    called = built.student
    if kind == "compiled":
        called.compile(backend="eager")
    with Taps(teacher, ["body"]) as taps, torch.no_grad():
        teacher(x)
        target = taps.pop()["body"]
    built(x, y).loss.backward()
    got = [parameter.grad for parameter in student.parameters()]
    plain = Odd(kind)
    plain.load_state_dict(student.state_dict())
    with Taps(plain, ["body"]) as taps:
        logits = plain(x)
        features = taps.pop()["body"]
    loss = F.cross_entropy(logits, y) + attention_transfer_loss(features, target, beta=5.0)
    want = torch.autograd.grad(loss, list(plain.parameters()))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


class Body(nn.Module):
    """A convolution whose map comes in some layout."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(3, 5, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> object:
        x = self.conv(x)
        match self.kind:
            case "nhwc":
                return x.permute(0, 2, 3, 1)
            case "tokens":
                return x.flatten(2).transpose(1, 2)
            case "prefixed":
                tokens = x.flatten(2).transpose(1, 2)
                return torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
            case "tuple":
                return x, x.mean()
        return x


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body, self.head = kind, Body(kind), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "checkpointed":
            x = checkpoint(lambda x: self.body(x).sin(), x, use_reentrant=False)
        else:
            x = self.body(x)
        x = (x[0] if isinstance(x, tuple) else x).sin()
        channels_last = self.kind in ("nhwc", "tokens", "prefixed")
        return self.head(x.flatten(1, -2).mean(1) if channels_last else x.flatten(2).mean(2))


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
    with pytest.raises(ValueError, match=r"Distiller: expected a teacher for .*, got None\. Pass one to the"):
        Distiller(Net(4), None, pairs=PAIRS, terms=[AttentionTransfer(1.0)])(*batch)
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
