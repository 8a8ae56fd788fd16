"""The terms beside attention maps in a distiller: values, gradients, schedules, weights that are found."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from small_net import Net
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from attention_transfer import (
    ActivationTransfer,
    AttentionTransfer,
    Distiller,
    FlipSymmetry,
    GradientTransfer,
    InputGradientNorm,
    InputTransform,
    KnowledgeDistillation,
    activation_transfer_loss,
    flip_symmetry_loss,
    gradient_transfer_loss,
    input_gradient,
    input_gradient_norm,
)
from attention_transfer.distiller import AUTO_SHARE
from attention_transfer.preflight import PreflightWarning, gradient_norms_at_pairs
from attention_transfer.terms import Reading, Term

PAIRS = [("first", "first"), ("second", "second")]


def student(width: int = 4) -> nn.Module:
    """Without dropout, so that two passes agree."""
    net = Net(width).double()
    net.drop = nn.Identity()
    return net


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, 0])


def distiller(
    *terms: Term, own: nn.Module | None = None, teacher: nn.Module | None = None, **more
) -> Distiller:
    own = own or student()
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    return Distiller(own, teacher or student(6), pairs=PAIRS, terms=terms, example_input=x, **more)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


# --- input gradients ----------------------------------------------------------------------------------------


def by_hand(term: Term, own: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The term from the pure functions, with forward passes of its own."""
    if isinstance(term, FlipSymmetry):
        twice = input_gradient(own, torch.cat([x, x.flip(-1)]), torch.cat([y, y]), create_graph=True)
        return flip_symmetry_loss(twice[: len(x)], twice[len(x) :], beta=term.weight)
    gradient = input_gradient(own, x, y, create_graph=True)
    if isinstance(term, InputGradientNorm):
        return input_gradient_norm(gradient, beta=term.weight)
    return gradient_transfer_loss(gradient, input_gradient(teacher.eval(), x, y), beta=term.weight)


OVER_GRADIENTS = [GradientTransfer(2.0), FlipSymmetry(3.0), InputGradientNorm(0.5)]


@pytest.mark.parametrize("term", OVER_GRADIENTS, ids=lambda term: term.name)
def test_terms_over_input_gradients_are_the_functions(term: Term, batch) -> None:
    """Values, and gradients of the student's parameters, with BatchNorm in training mode."""
    x, y = batch
    built = distiller(term)
    plain, teacher = copy.deepcopy(built.student), built.teacher
    out = built(x, y)
    out.loss.backward()
    want = by_hand(term, plain, teacher, x, y)
    torch.testing.assert_close(out.terms[term.name], want)
    seen = torch.cat([x, x.flip(-1)]) if isinstance(term, FlipSymmetry) else x
    fresh = copy.deepcopy(plain)
    loss = F.cross_entropy(fresh(seen)[: len(x)], y) + by_hand(term, fresh, teacher, x, y)
    for mine, theirs in zip(built.student.parameters(), gradients(fresh, loss), strict=True):
        torch.testing.assert_close(mine.grad, theirs)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("term", OVER_GRADIENTS, ids=lambda term: term.name)
def test_the_whole_loss_matches_finite_differences(term: Term, batch) -> None:
    """Smooth activations, in float64: central differences along a random direction of the parameters."""
    own = student()
    own.first[2], own.second[1] = nn.Softplus(), nn.Softplus()
    built = distiller(term, own=own)
    parameters = list(own.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]
    built(*batch).loss.backward()
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))

    def at(step: float) -> Tensor:
        moved = copy.deepcopy(built)
        with torch.no_grad():
            for parameter, direction in zip(moved.student.parameters(), directions, strict=True):
                parameter += step * direction
        return moved(*batch).loss.detach()

    step = 1e-5
    torch.testing.assert_close(slope, (at(step) - at(-step)) / (2 * step), rtol=1e-6, atol=1e-8)


def test_mirror_images_pass_batchnorm_in_the_same_batch(batch) -> None:
    x, y = batch
    built = distiller(FlipSymmetry(1.0))
    plain = copy.deepcopy(built.student)
    built(x, y)
    plain(torch.cat([x, x.flip(-1)]))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(built.student.get_buffer(name), buffer)
    assert built.student.first[1].num_batches_tracked == 1


def test_a_mirrored_student_of_mirrored_images_is_symmetric(batch) -> None:
    """Filters that are their own mirror images: the term is 0, up to rounding."""
    x, y = batch
    own = student()
    own.second[0].stride = (1, 1)
    with torch.no_grad():
        for convolution in (own.first[0], own.second[0]):
            convolution.weight.copy_((convolution.weight + convolution.weight.flip(-1)) / 2)
    terms = distiller(FlipSymmetry(1.0), own=own)(x, y).terms
    assert terms["symmetry"] < 1e-12
    assert distiller(FlipSymmetry(1.0))(x, y).terms["symmetry"] > 1e-4


def test_the_teachers_gradient_is_by_the_students_input(batch) -> None:
    """Through the transform: half the contrast makes half the gradient."""
    x, y = batch
    transform = InputTransform(([0.0] * 3, [1.0] * 3), ([0.1] * 3, [2.0] * 3)).double()
    built = distiller(GradientTransfer(1.0), teacher_transform=transform)
    seen = built.observe(x, y)
    inner = input_gradient(built.teacher, transform(x), y)
    torch.testing.assert_close(seen.teacher.input_gradient, inner / 2)
    assert not seen.teacher.input_gradient.requires_grad and seen.teacher.logits.grad_fn is None


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated", "ignore:There is a performance drop")
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_forward_mode_through_a_whole_distiller(batch, grad_mode) -> None:
    x, y = batch
    terms = (AttentionTransfer(2.0), KnowledgeDistillation(), GradientTransfer(2.0), FlipSymmetry(3.0))
    built = distiller(*terms)
    parameters = {name: parameter.detach() for name, parameter in built.named_parameters()}
    steps = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    images = torch.randn_like(x)

    def loss(size: float) -> Tensor:
        moved = {name: value + size * steps[name] for name, value in parameters.items()}
        return functional_call(built, moved, (x + size * images, y)).loss

    with grad_mode(), forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(value, steps[name]) for name, value in parameters.items()}
        output = functional_call(built, dual, (forward_ad.make_dual(x, images), y))
        tangent = forward_ad.unpack_dual(output.loss).tangent
    torch.testing.assert_close(tangent, (loss(1e-6) - loss(-1e-6)) / 2e-6, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_image_by_torch_func(batch) -> None:
    x, y = batch
    built = distiller(AttentionTransfer(2.0), KnowledgeDistillation()).eval()
    parameters = {name: parameter.detach() for name, parameter in built.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional_call(built, parameters, (image[None], label[None])).loss

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    built(x, y).loss.backward()
    for name, parameter in built.named_parameters():
        torch.testing.assert_close(each[name].mean(0), parameter.grad)
    gradient = distiller(GradientTransfer(2.0))
    with pytest.raises(ValueError, match=r"Distiller: expected to be outside of torch\.func's"):
        torch.func.grad(lambda values: functional_call(gradient, values, (x, y)).loss)(parameters)


def test_all_terms_combine(batch) -> None:
    x, y = batch
    terms = [
        *(AttentionTransfer(0.2), KnowledgeDistillation(0.5), ActivationTransfer(0.2)),
        *(GradientTransfer(1.0), FlipSymmetry(1.0), InputGradientNorm(1.0)),
    ]
    built = distiller(*terms)
    out = built(x, y)
    assert list(out.terms) == [
        *("ce", "at/first", "at/second", "kd", "f-actt/first", "f-actt/second"),
        *("gradient", "symmetry", "min-l2"),
    ]
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in built.parameters())
    with torch.no_grad():
        assert not built(x, y).loss.requires_grad and not built(x, y).logits.requires_grad
    report = built.preflight(x, y)
    assert sum(report.plan.shares.values()) == pytest.approx(1) and set(report.plan.shares) == set(out.terms)
    assert "share of the parameters' gradient: ce " in str(report)


def test_bfloat16_autocast(batch) -> None:
    x, y = batch[0].float(), batch[1]
    built = distiller(*OVER_GRADIENTS).float()
    want = built(x, y).terms
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = built(x.contiguous(memory_format=torch.channels_last), y)
    out.loss.backward()
    for name, value in out.terms.items():
        assert value.item() == pytest.approx(want[name].item(), rel=0.1, abs=0.02), name


@pytest.mark.unchecked
def test_a_compiled_student_is_refused(batch) -> None:
    own = student()
    own.compile(backend="eager")
    with pytest.raises(ValueError, match=r"Distiller: expected an eager model.*Pass the model as it was"):
        distiller(InputGradientNorm(1.0), own=own)(*batch)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class OnceOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_an_operation_without_second_derivative_is_refused(batch) -> None:
    own = student()
    own.drop = OnceOnly()
    with pytest.raises(ValueError, match="once_differentiable"):
        Distiller(own, None, terms=[InputGradientNorm(1.0)]).preflight(*batch)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_checkpointing(batch) -> None:
    own = student()
    want = distiller(InputGradientNorm(1.0), own=own)(*batch).loss
    own.second = Checkpointed(own.second, reentrant=False)
    teacher = student(6)
    built = Distiller(own, teacher, terms=[InputGradientNorm(1.0)])
    torch.testing.assert_close(built(*batch).loss, want)
    own.second.reentrant = True
    with pytest.raises(ValueError, match=r"got reentrant checkpointing\. Pass use_reentrant=False"):
        built(*batch)


def test_a_gradient_term_of_weight_zero_is_dead(batch) -> None:
    with pytest.raises(ValueError, match=r"got no gradient from gradient .*: the term is dead"):
        distiller(GradientTransfer(0.0)).preflight(*batch)


# --- full activations ---------------------------------------------------------------------------------------


def test_full_activations_are_regressed_where_widths_differ(batch) -> None:
    x, y = batch
    term = ActivationTransfer(2.0)
    built = distiller(term)
    assert [type(regressor) for regressor in term.regressors] == [nn.Conv2d, nn.Conv2d]
    assert {id(p) for p in term.parameters()} < {id(p) for p in built.parameters()}
    assert next(term.parameters()).dtype == torch.float64  # as the student's
    out = built(x, y)
    seen = built.observe(x, y)
    regressed = [r(a) for r, a in zip(term.regressors, seen.student.features, strict=True)]
    want = activation_transfer_loss(regressed, seen.teacher.features, beta=2.0)
    torch.testing.assert_close(out.terms["f-actt/first"] + out.terms["f-actt/second"], want)
    out.loss.backward()
    assert all(parameter.grad.count_nonzero() for parameter in term.parameters())
    assert not any("regressors" in name for name in built.student.state_dict())


def test_equal_widths_need_no_regression() -> None:
    term = ActivationTransfer(1.0)
    distiller(term, teacher=student(4))
    assert not list(term.parameters())
    distiller(term, teacher=student(6))
    assert [regressor.weight.shape[:2] for regressor in term.regressors] == [(6, 4), (6, 4)]


def test_full_activations_alone_and_without_an_example(batch) -> None:
    term = ActivationTransfer(1.0, channels=[(2, 3)])
    loss = term(torch.randn(2, 2, 4, 4), torch.randn(2, 3, 4, 4))
    loss.backward()
    assert term.regressors[0].weight.grad is not None
    with pytest.raises(ValueError, match="ActivationTransfer: expected activations of 1 pairs, got 2"):
        term([torch.randn(2, 2, 4, 4)] * 2, [torch.randn(2, 3, 4, 4)] * 2)
    assert Distiller(
        student(), student(6), pairs=PAIRS, terms=[ActivationTransfer(1.0, channels=[(4, 6)] * 2)]
    )(torch.randn(2, 3, 8, 6, dtype=torch.float64), torch.tensor([0, 1])).loss.requires_grad
    with pytest.raises(ValueError, match=r"ActivationTransfer: expected layer pairs of known shape.*example"):
        Distiller(student(), student(6), pairs=PAIRS, terms=[ActivationTransfer(1.0)])


# --- weights ------------------------------------------------------------------------------------------------


def test_schedules_move_the_weights(batch) -> None:
    kd, at = KnowledgeDistillation(0.8, schedule="linear"), AttentionTransfer(4.0, schedule="cosine")
    built = distiller(kd, at)
    start = built(*batch).terms
    built.advance(0.5)
    assert built.weights() == pytest.approx({"kd": 0.4, "at": 2.0})
    half = built(*batch).terms
    assert half["at/first"].item() == pytest.approx(start["at/first"].item() / 2)
    assert half["ce"].item() == pytest.approx(start["ce"].item() * 0.6 / 0.2)
    built.advance(1.0)
    assert built.weights() == pytest.approx({"kd": 0.0, "at": 0.0}, abs=1e-12)


@pytest.mark.parametrize(
    "term", [AttentionTransfer("auto"), ActivationTransfer("auto")], ids=["at", "f-actt"]
)
def test_a_weight_that_is_found_pulls_as_the_rule_says(term: Term, batch) -> None:
    x, y = batch
    built = distiller(term)
    before = copy.deepcopy(built.student.state_dict())
    state = torch.random.get_rng_state()
    found = built.balance(x, y)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in built.student.state_dict().items())
    assert all(parameter.grad is None for parameter in built.parameters())
    built.settle(found)
    seen = built.observe(x, y, keep_features=True)
    pull = gradient_norms_at_pairs(torch.stack(list(term.contributions(seen).values())).sum(), seen)
    labels = gradient_norms_at_pairs(F.cross_entropy(seen.student.logits, y), seen)
    assert pull == pytest.approx(AUTO_SHARE * labels, rel=1e-4)
    assert f"beta={found[term.name]:.3g} (auto)" in str(term)
    assert distiller(AttentionTransfer(1.0)).balance(x, y) == {}


def test_no_weight_is_found_for_a_dead_term(batch) -> None:
    own = student()
    built = distiller(AttentionTransfer("auto"), own=own, teacher=copy.deepcopy(own).train(False))
    built.student.eval()
    with pytest.raises(ValueError, match=r'balance: expected a gradient of the term "at" at the layer pairs'):
        built.balance(*batch)


@pytest.mark.unchecked
def test_a_misspelt_schedule_is_said() -> None:
    with pytest.raises(
        ValueError, match=r"schedule_factor: expected schedule as one of .*Did you mean linear"
    ):
        AttentionTransfer(1.0, schedule="linaer")  # type: ignore[arg-type]


@pytest.mark.unchecked
@pytest.mark.parametrize("kind", [AttentionTransfer, ActivationTransfer, GradientTransfer])
def test_weights_are_checked(kind: type[Term]) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: expected a finite beta >= 0, got -1"):
        kind(-1.0)
    if kind is not GradientTransfer:
        with pytest.raises(ValueError, match=f'{kind.__name__}: expected a number or "auto" as beta, got'):
            kind("autoo")
    built = distiller(KnowledgeDistillation())
    with pytest.raises(ValueError, match=r"settle: expected names among \['kd'\], got 'ta'"):
        built.settle({"ta": 1.0})


def test_distillation_may_leave_the_labels_out(batch) -> None:
    report = distiller(KnowledgeDistillation(alpha=1.0)).preflight(*batch)
    assert report.plan.shares == {"ce": 0.0, "kd": 1.0}


@pytest.mark.parametrize(
    ("term", "lacks"),
    [
        (AttentionTransfer(1.0), r"Energy\(p=2.0, mapping='sum'\)"),
        (ActivationTransfer(1.0), "features"),
        (GradientTransfer(1.0), "input_gradient"),
    ],
    ids=["at", "f-actt", "gradient"],
)
def test_readings_that_lack_something_are_refused(term: Term, lacks: str, batch) -> None:
    built = distiller(term)
    reading = Reading(torch.zeros(6, 5))
    with pytest.raises(ValueError, match=f'what the term "{term.name}" reads, got one without {lacks}'):
        built(*batch, teacher=reading)


def test_an_idle_term_is_warned_of(batch) -> None:
    with pytest.warns(PreflightWarning, match=r"min-l2 makes up 0\.00% of the gradient .* next to nothing"):
        distiller(AttentionTransfer(1.0), InputGradientNorm(1e-6)).preflight(*batch)


# --- several processes --------------------------------------------------------------------------------------

PROCESS = """
import os, sys
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[1])
from test_terms import whole_distiller, whole_batch

rank = int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=2)

class Step(torch.nn.Module):
    def __init__(self, distiller):
        super().__init__()
        self.distiller = distiller
    def forward(self, x, y):
        return self.distiller(x, y).loss

step = DistributedDataParallel(Step(whole_distiller()))
x, y = whole_batch()
step(x[rank::2], y[rank::2]).backward()
if rank == 0:
    torch.save([p.grad for p in step.module.distiller.parameters()], sys.argv[4])
dist.barrier()  # a process that leaves while the other still speaks with it may be ended by gloo's threads
dist.destroy_process_group()
"""


def whole_distiller() -> Distiller:
    """Without BatchNorm, which sees half a batch on each of two processes."""
    torch.manual_seed(1)
    own = student()
    own.first[1] = nn.Identity()
    return distiller(*OVER_GRADIENTS, ActivationTransfer(1.0), AttentionTransfer(1.0), own=own)


def whole_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randn(4, 3, 8, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3])


def test_two_processes_have_the_gradient_of_one(tmp_path) -> None:
    """The mean over two halves of a batch is the mean over the whole; to 1e-12, in float64."""
    from pathlib import Path

    words = [str(Path(__file__).parent), "0", str(tmp_path / "meet"), str(tmp_path / "grads.pt")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, words[0], rank, *words[2:]], stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    built = whole_distiller()
    built(*whole_batch()).loss.backward()
    for mine, theirs in zip(built.parameters(), torch.load(words[3]), strict=True):
        torch.testing.assert_close(mine.grad, theirs, rtol=1e-10, atol=1e-12)
