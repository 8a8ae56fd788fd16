"""The distiller: what it computes, that its teacher stays a teacher, and the plan it prints."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_net import Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention_transfer import (
    ActivationTransfer,
    AttentionTransfer,
    Distiller,
    GradientTransfer,
    InputTransform,
    KnowledgeDistillation,
    Pair,
    Taps,
    attention_transfer_loss,
    build_model,
    distillation_loss,
    suggest_pairs,
)
from attention_transfer._outputs import find_logits
from attention_transfer.terms import Energy, Observation, Term

PAIRS = [Pair("first", "first"), Pair("second", "second", weight=0.5)]
LARGE_TERMS = pytest.mark.filterwarnings("ignore:preflight. at/.* make up")  # not what these tests are about


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
    with pytest.raises(ValueError, match="expected images of 3 channels"):
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


class Returns(Net):
    """What `what` makes of the features, their mean over space and the logits."""

    def __init__(self, width: int, what: Callable[[Tensor, Tensor, Tensor], object]) -> None:
        super().__init__(width)
        self.what = what

    def forward(self, x: Tensor) -> object:
        features = self.features(x)
        return self.what(features, features.mean((2, 3)).repeat(1, 10), self.head(features.mean((2, 3))))


RETURNED = {
    "after features": lambda features, mean, logits: (features, logits),
    "after a list": lambda features, mean, logits: ([features, features], logits),
    "after a loss": lambda features, mean, logits: (logits.logsumexp(1).mean(), logits),
    "after numbers": lambda features, mean, logits: (torch.ones(len(mean), 7, dtype=torch.long), logits),
    "before features": lambda features, mean, logits: [logits, mean],
    "dict": lambda features, mean, logits: {"features": mean, "logits": logits},
    "object": lambda features, mean, logits: SimpleNamespace(features=mean, logits=logits),
}


@LARGE_TERMS
@pytest.mark.parametrize("what", RETURNED)
def test_logits_are_found_on_both_sides(what: str, batch) -> None:
    student, teacher = Returns(4, RETURNED[what]), Returns(6, RETURNED[what])
    built = Distiller(student, teacher, pairs=PAIRS, terms=[AttentionTransfer(0.1), KnowledgeDistillation()])
    seen = built.observe(*batch)
    for model, reading in ((student, seen.student), (teacher, seen.teacher)):
        assert torch.equal(reading.logits, model.head(model.features(batch[0]).mean((2, 3))))
    assert not [warning for warning in built.preflight(*batch).warnings if "logits" in warning]


@LARGE_TERMS
@pytest.mark.parametrize(
    ("what", "place"),
    [
        (lambda features, mean, logits: (mean, logits), 1),
        (lambda features, mean, logits: (mean, logits), lambda output: output[-1]),
        (lambda features, mean, logits: {"features": mean, "answers": logits}, "answers"),
        (lambda features, mean, logits: SimpleNamespace(features=mean, answers=logits), "answers"),
    ],
)
def test_logits_are_where_they_are_said_to_be(what: object, place: object, batch) -> None:
    student, teacher = Returns(4, what), Returns(6, what)
    terms = [AttentionTransfer(0.1), KnowledgeDistillation()]
    built = Distiller(student, teacher, pairs=PAIRS, terms=terms, logits=place, teacher_logits=place)
    out = built(*batch)
    assert torch.equal(out.logits, student.head(student.features(batch[0]).mean((2, 3))))
    assert not [warning for warning in built.preflight(*batch).warnings if "logits" in warning]


def test_logits_that_are_not_there_are_said_with_what_is(batch) -> None:
    student = Returns(4, lambda features, mean, logits: {"mean": mean, "answers": logits})
    with pytest.raises(
        ValueError, match=r"Distiller \(student\): .* got dict of 'mean' \(4, 40\), 'answers' \("
    ):
        Distiller(student, None)(*batch)
    with pytest.raises(ValueError, match=r"logits \(b, k\) at 'answer', got .*logits=\"pred\""):
        Distiller(student, None, logits="answer")(*batch)


# --- types and shapes ---------------------------------------------------------------------------------------


@LARGE_TERMS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_labels_are_whole_numbers_of_any_type(dtype: torch.dtype, distiller, batch) -> None:
    x, y = batch
    want = distiller(x, y).loss
    for labels in (y.to(dtype), y.to(dtype)[:, None]):
        assert torch.equal(distiller.eval()(x, labels).loss, want)
        distiller.preflight(x, labels)
    gradient = Distiller(distiller.student, distiller.teacher, pairs=PAIRS, terms=[GradientTransfer(1.0)])
    assert torch.equal(gradient(x, y.to(dtype)).loss, gradient(x, y).loss)


@LARGE_TERMS
def test_labels_may_be_probabilities(distiller, batch) -> None:
    """As mixup, CutMix and label smoothing make them; of any floating type."""
    x, _ = batch
    y = torch.rand(4, 5, dtype=torch.float64).softmax(1)
    out = distiller(x, y)
    want = -(y * distiller.student(x).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(out.terms["ce"], 0.75 * want.float())
    assert out.loss.dtype == torch.float32
    assert distiller.preflight(x, y).plan.shares["ce"] > 0
    gradient = Distiller(distiller.student, distiller.teacher, pairs=PAIRS, terms=[GradientTransfer(1.0)])
    one_hot = torch.eye(5)[batch[1]]
    torch.testing.assert_close(gradient(x, one_hot).loss, gradient(*batch).loss)
    with pytest.raises(ValueError, match="which sum to 1, got numbers from 0 on with sums from 2 to 2"):
        distiller.preflight(x, one_hot + one_hot.roll(1, 1))


@LARGE_TERMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_teacher_of_another_type_is_fed_in_its_own(dtype: torch.dtype, batch) -> None:
    teacher = Net(6)
    terms = [AttentionTransfer(2.0), KnowledgeDistillation(), ActivationTransfer(1.0), GradientTransfer(50)]
    built = [
        Distiller(Net(6).eval(), copy.deepcopy(teacher).to(kind), terms=terms, example_input=batch[0])
        for kind in (torch.float32, dtype)
    ]
    built[1].student.load_state_dict(built[0].student.state_dict())
    want, out = (each(*batch) for each in built)
    assert out.loss.dtype == torch.float32 or dtype == torch.float64
    torch.testing.assert_close(
        out.loss.float(), want.loss, rtol=3e-2 if dtype == torch.bfloat16 else 3e-3, atol=0
    )
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in built[1].student.parameters())
    built[1].preflight(*batch)


def test_a_student_in_bfloat16_has_its_loss_in_float32(batch) -> None:
    x, y = batch
    student = Net(4).to(torch.bfloat16).eval()
    built = Distiller(student, Net(6), pairs=PAIRS, terms=[AttentionTransfer(0.5), KnowledgeDistillation()])
    out = built(x.to(torch.bfloat16), y)
    assert out.loss.dtype == torch.float32
    want = F.cross_entropy(student(x.to(torch.bfloat16)).float(), y)
    torch.testing.assert_close(out.terms["ce"], 0.1 * want)
    with pytest.raises(ValueError, match=r"images of torch\.bfloat16, as the student is, got torch\.float32"):
        built(x, y)


class Dense(Net):
    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.features(x).movedim(1, -1)).movedim(-1, 1)
        return F.interpolate(logits, x.shape[2:])


@LARGE_TERMS
def test_distillation_of_each_pixel(batch) -> None:
    x, _ = batch
    y = torch.randint(0, 5, (4, 8, 8), dtype=torch.int32)
    student, teacher = Dense(4).eval(), Dense(6)
    built = Distiller(student, teacher, pairs=PAIRS, terms=[KnowledgeDistillation(0.25, 3.0)])
    out = built(x, y[:, None])
    s, t = ((model(x) / 3).movedim(1, -1).reshape(-1, 5).log_softmax(1) for model in (student, teacher))
    torch.testing.assert_close(out.terms["kd"], 0.25 * 9 * (t.exp() * (t - s)).sum(1).mean())
    assert built.preflight(x, y).plan.shares["kd"] > 0


@LARGE_TERMS
def test_a_dense_teacher_of_a_classifier_and_the_other_way_round(batch) -> None:
    x, y = batch
    terms = [AttentionTransfer(0.1)]
    assert Distiller(Net(4), Dense(6), pairs=PAIRS, terms=terms).preflight(x, y).plan.shares["at/first"] > 0
    pixels = torch.randint(0, 5, (4, 8, 8))
    built = Distiller(Dense(4), Net(6), pairs=PAIRS, terms=terms)
    assert built.preflight(x, pixels).plan.shares["at/first"] > 0


class Counts(nn.Module):
    """As an observer of quantisation: its buffer takes the shape of what it sees, in place or anew."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("largest", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        largest = x.detach().abs().amax((0, 2, 3))
        if self.in_place:
            self.largest.resize_(largest.shape).copy_(largest)
        else:
            self.largest = largest
        return x


@LARGE_TERMS
@pytest.mark.parametrize("in_place", [True, False])
def test_buffers_that_change_their_shape_are_left_as_they_were(in_place: bool, batch) -> None:
    student, teacher = Net(4), Net(6)
    student.first.append(Counts(in_place))
    terms = [AttentionTransfer(0.1)]
    built = Distiller(student, teacher, pairs="auto", terms=terms, example_input=batch[0])
    built.preflight(*batch)
    assert student.first[-1].largest.shape == (0,)
    built(*batch).loss.backward()
    assert student.first[-1].largest.shape == (4,)
    teacher.first.append(Counts(in_place).eval())
    with pytest.raises(ValueError, match=r"got changed buffers first\.3\.largest\. Give it layers that heed"):
        built.preflight(*batch)
    assert teacher.first[-1].largest.shape == (0,)


def test_a_term_and_a_pair_need_no_list(batch) -> None:
    built = Distiller(Net(4), Net(6), pairs=PAIRS[0], terms=AttentionTransfer(1.0))
    assert list(built(*batch).terms) == ["ce", "at/first"]
    built = Distiller(Net(4), Net(6), pairs=(pair for pair in PAIRS), terms=iter([AttentionTransfer(1.0)]))
    assert list(built(*batch).terms) == ["ce", "at/first", "at/second"]


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


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"student": "resnet18"},
            "expected the student as a torch.nn.Module, got 'resnet18'. Build it, such as by",
        ),
        ({"student": None}, "expected the student as a torch.nn.Module, got None"),
        ({"teacher": Net}, "expected the teacher as a torch.nn.Module, got the class Net. Call it."),
        (
            {"student": nn.LazyLinear(5)},
            "expected a student whose parameters have their shapes, got lazy ones",
        ),
        ({"terms": [AttentionTransfer]}, "got the class AttentionTransfer. Call it: AttentionTransfer(...)."),
        ({"terms": "at"}, "expected terms as instances of Term, got 'at'. Pass one such as Attention"),
        ({"terms": {"at": AttentionTransfer(1.0)}}, "expected terms as instances of Term, got 'at'"),
        ({"terms": [nn.CrossEntropyLoss()]}, "expected terms as instances of Term, got CrossEntropyLoss()"),
        ({"pairs": ["s3:layer1"]}, "got 's3:layer1'. Pass pairs=[('s3', 'layer1')], or \"auto\"."),
        ({"pairs": ["s3 <- layer1"]}, "Pass pairs=[('s3', 'layer1')], or \"auto\"."),
        ({"pairs": ("first", "second")}, "got 'first'. Pass pairs=[('student.layer', 'teacher.layer')]"),
        ({"pairs": {"first": "second"}}, "(student layer, teacher layer), got 'first'."),
        ({"pairs": None}, "(student layer, teacher layer), got None."),
        ({"pairs": [("first",)]}, "(student layer, teacher layer), got ('first',)."),
        ({"pairs": [("first", "first", "2")]}, "Pair: expected a weight >= 0, got '2'."),
        (
            {"teacher_dtype": "bf16"},
            "torch.float16 or None, got 'bf16'. For another type, convert the teacher",
        ),
        ({"teacher_dtype": torch.float64}, "torch.float16 or None, got torch.float64."),
        ({"teacher_transform": 5}, "expected teacher_transform as a function of images, got 5."),
        ({"example_input": (3, 8, 8)}, "expected example_input as a tensor (b, c, h, w), got tuple."),
        (
            {"example_input": torch.zeros(0, 3, 8, 8)},
            "expected example_input with one image or more, got (0,",
        ),
    ],
)
def test_refuses_what_is_no_part_of_it(given: dict, message: str) -> None:
    parts = {"student": Net(4), "teacher": Net(6), "pairs": PAIRS, "terms": [AttentionTransfer(1.0)], **given}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Distiller(parts.pop("student"), parts.pop("teacher"), **parts)


IMAGES, LABELS = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (list(IMAGES), LABELS, "expected images as a tensor (b, c, h, w), got list. Stack images"),
        ({"pixel_values": IMAGES}, LABELS, "expected images as a tensor (b, c, h, w), got dict"),
        (IMAGES[0], LABELS, "expected images (b, c, h, w) for terms at layer pairs, got (3, 8, 8). Add the"),
        (IMAGES[:, :, None], LABELS, "for terms at layer pairs, got (4, 3, 1, 8, 8)."),
        (IMAGES[..., 0], LABELS, "for terms at layer pairs, got (4, 3, 8)."),
        (IMAGES[:0], LABELS[:0], "expected images with one image or more, got (0, 3, 8, 8). Leave out empty"),
        (
            (IMAGES * 255).byte(),
            LABELS,
            "expected images of torch.float32, as the teacher is, got torch.uint8",
        ),
        (IMAGES > 0.5, LABELS, "got torch.bool, with which it fails: "),
        (IMAGES.double(), LABELS, "as the student is, got torch.float64, with which it fails: "),
        (IMAGES.to(torch.complex64), LABELS, "got torch.complex64, with which it fails: "),
        (
            IMAGES.to("meta"),
            LABELS,
            "expected images on cpu, as the teacher is, got meta, with which it fails: ",
        ),
        (IMAGES, None, "expected labels as a tensor, got NoneType. Pass torch.tensor(labels)."),
        (IMAGES, [0, 1, 2, 3], "expected labels as a tensor, got list."),
        (IMAGES, LABELS[:2], "label for each of 4 rows of logits, got torch.int64 of shape (2,). Give the"),
        (IMAGES, LABELS.float(), "got torch.float32 of shape (4,). Give the class numbers of the batch, or"),
        (IMAGES, LABELS > 1, "got torch.bool of shape (4,)."),
        (IMAGES, torch.eye(5)[LABELS].long(), "got torch.int64 of shape (4, 5)."),
        (
            IMAGES,
            LABELS.to("meta"),
            "expected labels on cpu, where the logits are, got meta. Pass labels.to(",
        ),
    ],
)
def test_refuses_what_is_no_batch(x: object, y: object, message: str) -> None:
    built = Distiller(Net(4), Net(6), pairs=PAIRS, terms=[AttentionTransfer("auto")])
    for call in (built, built.preflight, built.balance):
        with pytest.raises((TypeError, ValueError), match=rf"^Distiller: .*{re.escape(message)}"):
            call(x, y)


def test_logits_that_are_called_a_state() -> None:
    """PP-LCNet of Hugging Face; what else is called so has more axes, and is no logits."""
    transformers = pytest.importorskip("transformers")
    model = transformers.PPLCNetForImageClassification(transformers.PPLCNetConfig(scale=0.25, num_labels=7))
    model, x = model.eval(), torch.randn(2, 3, 64, 64)
    expected = model(x).last_hidden_state
    assert expected.shape == (2, 7)
    assert torch.equal(Distiller(model, None).eval()(x, torch.tensor([0, 6])).logits, expected)
    for state in (torch.zeros(2, 9, 7), torch.zeros(2, 7, 4, 4)):
        for dense in (False, True, None):
            assert find_logits({"last_hidden_state": state}, dense=dense) is None
    both = {"last_hidden_state": torch.zeros(2, 9), "logits": torch.ones(2, 7)}
    assert find_logits(both) is both["logits"]


@pytest.mark.parametrize(
    ("channels", "how"),
    [(1, r"x\.expand\(-1, 3, -1, -1\)"), (2, "others"), (4, r"x\[:, :3\]")],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_images_of_other_channels(role: str, channels: int, how: str) -> None:
    """Whatever is asked; what is advised is right."""
    x, y = torch.randn(2, channels, 16, 16), torch.tensor([0, 1])
    sides = {name: build_model("wrn-10-1", in_channels=channels) for name in ("student", "teacher")}
    sides[role] = build_model("wrn-10-1")
    message = (
        f": expected images of 3 channels, as the {role} takes, got {channels}. Pass {how}, or build the "
        f"{role} with in_channels={channels}."
    )
    term = AttentionTransfer(1.0)
    built = Distiller(**sides, pairs=[("group1", "group1")], terms=term)
    for call in (
        lambda: built(x, y),
        lambda: built.preflight(x, y),
        lambda: Distiller(**sides, pairs=[("group1", "group1")], terms=term, example_input=x),
        lambda: Distiller(**sides, terms=term, example_input=x),
        lambda: suggest_pairs(**sides, example_input=x),
    ):
        with pytest.raises(ValueError, match=f"^(Distiller|suggest_pairs){message}"):
            call()
    if channels != 2:
        shown = x.expand(-1, 3, -1, -1) if channels == 1 else x[:, :3]
        assert Distiller(sides[role], None)(shown, y).loss.isfinite()
    sides[role] = build_model("wrn-10-1", in_channels=channels)
    assert Distiller(**sides, terms=term, example_input=x)(x, y).loss.isfinite()


def test_two_attention_terms_under_two_names(batch) -> None:
    terms = [AttentionTransfer(1.0), AttentionTransfer(1.0, mapping="max", name="at-max")]
    out = Distiller(Net(4), Net(6), pairs=PAIRS, terms=terms)(*batch)
    assert list(out.terms) == ["ce", "at/first", "at/second", "at-max/first", "at-max/second"]
