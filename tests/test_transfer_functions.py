"""Full-activation transfer, input gradients and their losses: formulas, finite differences, numerics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.function import once_differentiable

from attention_transfer.functional import (
    activation_transfer_loss,
    check_double_backward,
    flip_symmetry_loss,
    gradient_transfer_loss,
    input_gradient,
    input_gradient_norm,
    input_gradient_of,
)

FORMS = ["paper", "code", "caffe"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EPSILON = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-6, torch.float64: 1e-14}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}


def result_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain_activation_loss(student: Tensor, teacher: Tensor, beta: float, form: str) -> Tensor:
    rows = [(x / x.pow(2).sum((1, 2, 3), keepdim=True).sqrt()).flatten(1) for x in (student, teacher)]
    difference = rows[0] - rows[1]
    b, entries = difference.shape
    if form == "paper":
        return beta / 2 * sum(row.pow(2).sum().sqrt() for row in difference) / b
    return difference.pow(2).sum() * (beta / (b * entries) if form == "code" else beta / (2 * b))


def plain_norm(difference: Tensor, beta: float) -> Tensor:
    return beta / 2 * sum(sample.pow(2).sum().sqrt() for sample in difference) / len(difference)


def plain_flip(gradient: Tensor) -> Tensor:
    return torch.stack([gradient[..., i] for i in reversed(range(gradient.shape[-1]))], dim=-1)


# Each loss of input gradients with its plain formula; both of two gradients, of which the last reads one.
GRADIENT_LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "transfer": (gradient_transfer_loss, lambda a, b, beta: plain_norm(a - b, beta)),
    "symmetry": (flip_symmetry_loss, lambda a, b, beta: plain_norm(a - plain_flip(b), beta)),
    "min-l2": (
        lambda a, b, *, beta: input_gradient_norm(a, beta=beta),
        lambda a, b, beta: plain_norm(a, beta),
    ),
}
EQUAL_OF: dict[str, Callable[[Tensor], Tensor]] = {"transfer": Tensor.clone, "symmetry": lambda x: x.flip(-1)}


@pytest.fixture
def activations() -> tuple[Tensor, Tensor]:
    student = torch.randn(3, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(3, 4, 5, 3, dtype=torch.float64, requires_grad=True)


# --- full activations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_activation_loss_and_both_gradients_are_the_plain_ones(activations, form) -> None:
    mine = activation_transfer_loss(*activations, beta=3.0, form=form)
    theirs = plain_activation_loss(*activations, 3.0, form)
    torch.testing.assert_close(mine, theirs)
    upstream = torch.tensor(-0.7, dtype=torch.float64)
    got, want = (torch.autograd.grad(loss, activations, upstream) for loss in (mine, theirs))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sizes", [((4, 6), (4, 6)), ((3, 5), (7, 4)), ((1, 4), (3, 3))])
@pytest.mark.parametrize("resize", ["student", "teacher"])
@pytest.mark.parametrize("form", FORMS)
def test_activation_loss_gradcheck_and_gradgradcheck(form, resize, sizes) -> None:
    student, teacher = (torch.randn(2, 2, *size).double().requires_grad_() for size in sizes)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return activation_transfer_loss(student, teacher, beta=3.0, form=form, resize=resize)

    assert gradcheck(loss, (student, teacher))
    assert gradgradcheck(loss, (student, teacher))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_activation_loss_in_every_dtype_and_layout(form, dtype, layout) -> None:
    exact_s = torch.randn(2, 8, 5, 3).to(dtype).double().requires_grad_()
    exact_t = torch.randn(2, 8, 5, 3).to(dtype).double()
    student = LAYOUTS[layout](exact_s.detach().to(dtype)).requires_grad_()
    loss = activation_transfer_loss(student, LAYOUTS[layout](exact_t.to(dtype)), beta=2.0, form=form)
    want = plain_activation_loss(exact_s, exact_t, 2.0, form)
    loss.backward()
    want.backward()
    assert loss.dtype == result_type(dtype)
    assert student.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=0)
    error = (student.grad.double() - exact_s.grad).norm() / exact_s.grad.norm()
    assert error < EPSILON[dtype]


@pytest.mark.parametrize("resize", [None, "teacher"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1e-300, 1e-38, 1e-20, 1e-4, 300.0, 1e20, 1e38, 1e300])
def test_activation_loss_does_not_change_with_the_scale(dtype, factor, resize) -> None:
    """For any factor under which the activations stay normal numbers of their type, on either side."""
    values = (0.5 + torch.rand(2, 2, 6, 4, 3, dtype=torch.float64)) * torch.randn(2, 2, 6, 4, 3).sign()
    student, teacher = values
    if resize:
        teacher = torch.cat([teacher, teacher.flip(3)], 2)
    limits = torch.finfo(dtype)
    factor = min(max(factor, 4 * limits.tiny), limits.max / 2)
    scaled = (student * factor).to(dtype), (teacher * factor).to(dtype)
    assert all(x.isfinite().all() and (x != 0).all() for x in scaled)
    unscaled = [x.double() / factor for x in scaled]
    want = activation_transfer_loss(*unscaled, beta=1.0, resize=resize)
    got = activation_transfer_loss(*scaled, beta=1.0, resize=resize)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    one_sided = activation_transfer_loss(scaled[0], unscaled[1].to(dtype), beta=1.0, resize=resize)
    torch.testing.assert_close(one_sided.double(), want, rtol=EPSILON[dtype], atol=0)


@pytest.mark.parametrize("resize", [None, "student"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_zero_activation_gives_a_finite_loss_and_a_zero_gradient(form, dtype, resize) -> None:
    student = torch.randn(3, 4, 5, 5).to(dtype)
    student[1] = 0
    student.requires_grad_()
    teacher = torch.randn(3, 4, 7 if resize else 5, 5).to(dtype)
    loss = activation_transfer_loss(student, teacher, beta=1.0, form=form, resize=resize)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert (student.grad[1] == 0).all() and (student.grad[0] != 0).any()
    nothing = torch.zeros(2, 3, 4, 4, dtype=dtype, requires_grad=True)
    loss = activation_transfer_loss(nothing, torch.zeros_like(nothing), beta=1.0, form=form)
    loss.backward()
    assert loss == 0 and (nothing.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_equal_activations_give_zero_loss_and_zero_gradients(form, dtype) -> None:
    student = torch.randn(2, 4, 5, 3).to(dtype).requires_grad_()
    loss = activation_transfer_loss(student, student.detach().clone(), beta=1.0, form=form)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    assert loss == 0 and (gradient == 0).all()
    (second,) = torch.autograd.grad(gradient.sum(), student)
    assert second.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("resize", [None, "student"])
@pytest.mark.parametrize("form", FORMS)
def test_non_finite_activations_are_never_turned_into_a_number(form, resize, bad) -> None:
    student = torch.randn(2, 4, 5, 5)
    student[0, 1, 2, 3] = bad
    loss = activation_transfer_loss(student, torch.randn(2, 4, 4, 4) if resize else torch.randn(2, 4, 5, 5),
                                    beta=1.0, form=form, resize=resize)  # fmt: skip
    assert loss.isnan()


def test_activation_loss_knows_signs_and_attention_maps_do_not() -> None:
    features = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(activation_transfer_loss(features, -features, beta=1.0), torch.tensor(1.0))


@pytest.mark.parametrize(("small", "large"), [((4, 6), (8, 12)), ((3, 5), (7, 4)), ((1, 4), (5, 5))])
def test_resize_acts_on_signed_activations_and_to_the_other_side(small, large) -> None:
    student, teacher = torch.randn(2, 3, *small), torch.randn(2, 3, *large)
    shrunk = F.adaptive_avg_pool2d(teacher, tuple(map(min, small, large)))
    want = plain_activation_loss(student, F.interpolate(shrunk, small, mode="bilinear"), 1.0, "paper")
    got = activation_transfer_loss(student, teacher, beta=1.0, resize="teacher")
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(activation_transfer_loss(teacher, student, beta=1.0, resize="student"), want)


def test_a_sequence_of_pairs_is_the_weighted_sum_and_parts_of_a_batch_the_mean(activations) -> None:
    student, teacher = activations
    other = torch.randn(3, 2, 8, 8).double(), torch.randn(3, 2, 8, 8).double()
    got = activation_transfer_loss(
        [student, other[0]], [teacher, other[1]], beta=2.0, form="code", weights=[1.0, 0.25]
    )
    parts = [activation_transfer_loss(*pair, beta=2.0, form="code") for pair in ((student, teacher), other)]
    torch.testing.assert_close(got, parts[0] + 0.25 * parts[1])
    split = [
        activation_transfer_loss(student[i : i + 1], teacher[i : i + 1], beta=2.0, form="code")
        for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(split).mean(), parts[0])


@pytest.mark.unchecked
@pytest.mark.parametrize("form", FORMS)
def test_activation_loss_compiles_without_a_graph_break(form) -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return activation_transfer_loss(student, teacher, beta=2.0, form=form)

    student, teacher = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher)
    torch.testing.assert_close(compiled, loss(student, teacher))
    torch.testing.assert_close(
        torch.autograd.grad(compiled, student), torch.autograd.grad(loss(student, teacher), student)
    )


def test_activation_loss_under_autocast_and_inference_mode() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)
    plain = activation_transfer_loss(student, teacher, beta=1.0, resize="student")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert activation_transfer_loss(student, teacher, beta=1.0, resize="student") == plain
    with torch.inference_mode():
        assert activation_transfer_loss(student, teacher, beta=1.0, resize="student") == plain


# --- losses of input gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GRADIENT_LOSSES)
def test_gradient_losses_are_the_plain_ones(name) -> None:
    mine, theirs = GRADIENT_LOSSES[name]
    pair = [torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    got, want = mine(*pair, beta=3.0), theirs(*pair, 3.0)
    torch.testing.assert_close(got, want)
    upstream = torch.tensor(-0.7, dtype=torch.float64)
    got, want = (torch.autograd.grad(loss, pair, upstream, allow_unused=True) for loss in (got, want))
    torch.testing.assert_close([x for x in got if x is not None], [x for x in want if x is not None])


@pytest.mark.parametrize("name", GRADIENT_LOSSES)
def test_gradient_losses_gradcheck_and_gradgradcheck(name) -> None:
    mine, _ = GRADIENT_LOSSES[name]
    pair = [torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    if name == "min-l2":
        pair[1].requires_grad_(False)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        return mine(first, second, beta=3.0)

    assert gradcheck(loss, pair)
    assert gradgradcheck(loss, pair)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRADIENT_LOSSES)
def test_gradient_losses_in_every_dtype_and_layout(name, dtype, layout) -> None:
    mine, theirs = GRADIENT_LOSSES[name]
    exact = [torch.randn(2, 3, 5, 4).to(dtype).double().requires_grad_() for _ in range(2)]
    pair = [LAYOUTS[layout](x.detach().to(dtype)).requires_grad_() for x in exact]
    loss, want = mine(*pair, beta=2.0), theirs(*exact, 2.0)
    loss.backward()
    want.backward()
    assert loss.dtype == result_type(dtype)
    assert pair[0].grad.dtype == dtype
    torch.testing.assert_close(loss.double(), want.detach(), rtol=1e-5, atol=0)
    error = (pair[0].grad.double() - exact[0].grad).norm() / exact[0].grad.norm()
    assert error < EPSILON[dtype]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 6e4),
        (torch.float16, 6e-8),
        (torch.bfloat16, 1e37),
        (torch.bfloat16, 1e-38),
        (torch.float32, 1e30),
        (torch.float32, 1e-30),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
    ],
)
@pytest.mark.parametrize("name", GRADIENT_LOSSES)
def test_no_gradient_is_too_large_or_too_small_for_its_norm(name, dtype, size) -> None:
    """Neither the difference of two large ones nor the squares overflow or vanish."""
    first = torch.full((1, 1, 2, 2), size, dtype=dtype, requires_grad=True)
    exact = first.detach().double()
    mine, _ = GRADIENT_LOSSES[name]
    loss = mine(first, -first.detach(), beta=2.0)
    torch.testing.assert_close(loss.double(), exact[0, 0, 0, 0] * (2 if name == "min-l2" else 4))
    loss.backward()
    torch.testing.assert_close(first.grad, torch.full_like(first, 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRADIENT_LOSSES)
def test_equal_or_no_gradients_give_zero_loss_and_zero_gradient(name, dtype) -> None:
    """Also of the second order: no NaN comes of a norm at zero."""
    mine, _ = GRADIENT_LOSSES[name]
    cases = [torch.zeros(2, 3, 4, 5, dtype=dtype)]
    if name != "min-l2":
        cases.append(torch.randn(2, 3, 4, 5).to(dtype))
    for values in cases:
        first = values.clone().requires_grad_()
        loss = mine(first, EQUAL_OF.get(name, Tensor.clone)(values), beta=2.0)
        (gradient,) = torch.autograd.grad(loss, first, create_graph=True)
        assert loss == 0 and (gradient == 0).all()
        (second,) = torch.autograd.grad(gradient.sum(), first)
        assert (second == 0).all()


@pytest.mark.parametrize("name", GRADIENT_LOSSES)
def test_one_equal_sample_does_not_disturb_the_others(name) -> None:
    mine, theirs = GRADIENT_LOSSES[name]
    first, second = torch.randn(2, 3, 2, 4, 5, dtype=torch.float64)
    first[1] = second[1] = 0
    first.requires_grad_()
    loss = mine(first, second, beta=2.0)
    want = theirs(first[::2], second[::2], 2.0) * 2 / 3
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, first), torch.autograd.grad(want, first))


# --- the input gradient -------------------------------------------------------------------------------------


def smooth_net(norm: bool = False) -> nn.Sequential:
    """Smooth, so that finite differences hold to many digits; in train mode."""
    layers = [nn.Conv2d(2, 3, 3, padding=1), *([nn.BatchNorm2d(3)] if norm else []), nn.Tanh()]
    layers += [nn.Conv2d(3, 2, 3, stride=2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)]
    net = nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) / 2)
    return net


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 2, 5, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 2])


@torch.no_grad()
def differences(function: Callable[[], Tensor], at: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a number by each entry of a tensor that it depends on."""
    result, entries = torch.empty_like(at), at.view(-1)
    for i in range(entries.numel()):
        middle, values = entries[i].item(), []
        for sign in (1, -1):
            entries[i] = middle + sign * step
            values.append(function())
        entries[i] = middle
        result.view(-1)[i] = (values[0] - values[1]) / (2 * step)
    return result


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_input_gradient_is_that_of_finite_differences(batch, norm, create_graph, grad_mode) -> None:
    """Of the cross-entropy summed over the batch, whose samples BatchNorm couples."""
    net, (x, y) = smooth_net(norm), batch
    before = x.clone()
    with grad_mode():
        got = input_gradient(net, x, y, create_graph=create_graph)
    assert got.requires_grad == create_graph
    assert x.grad is None and not x.requires_grad and torch.equal(x, before)
    assert all(parameter.grad is None for parameter in net.parameters())
    want = differences(lambda: F.cross_entropy(net(x), y, reduction="sum"), x)
    torch.testing.assert_close(got.detach(), want, rtol=1e-6, atol=1e-9)


def test_each_sample_has_the_gradient_of_its_own_loss_whatever_the_batch(batch) -> None:
    net, (x, y) = smooth_net(), batch
    alone = [input_gradient(net, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    torch.testing.assert_close(input_gradient(net, x, y), torch.cat(alone))


def transfer(net: nn.Module, x: Tensor, y: Tensor, create_graph: bool) -> Tensor:
    target = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
    return gradient_transfer_loss(input_gradient(net, x, y, create_graph=create_graph), target, beta=3.0)


def symmetry(net: nn.Module, x: Tensor, y: Tensor, create_graph: bool) -> Tensor:
    """As the term has it: one forward pass of the images and their flips."""
    both = input_gradient(net, torch.cat([x, x.flip(-1)]), torch.cat([y, y]), create_graph=create_graph)
    return flip_symmetry_loss(*both.chunk(2), beta=3.0)


def min_l2(net: nn.Module, x: Tensor, y: Tensor, create_graph: bool) -> Tensor:
    return input_gradient_norm(input_gradient(net, x, y, create_graph=create_graph), beta=3.0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("loss", [transfer, symmetry, min_l2])
def test_double_backward_is_that_of_finite_differences(batch, loss, norm) -> None:
    net = smooth_net(norm)
    upstream = 0.7
    (upstream * loss(net, *batch, create_graph=True)).backward()
    for name, parameter in net.named_parameters():
        want = upstream * differences(lambda: loss(net, *batch, create_graph=False), parameter.data)
        # a bias before BatchNorm, or the last one where flips cancel, has no gradient at all
        torch.testing.assert_close(
            parameter.grad, want, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert sum(parameter.grad.norm() > 1e-3 for parameter in net.parameters()) >= 4


def test_symmetry_of_a_symmetric_net_and_image_is_zero(batch) -> None:
    """Mirrored kernels and a mean over space answer an image and its flip alike."""
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    assert symmetry(net, *batch, create_graph=False) > 1e-3
    with torch.no_grad():
        net[0].weight.add_(net[0].weight.flip(-1))
    assert symmetry(net, *batch, create_graph=False) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_gradient_in_every_dtype(batch, dtype) -> None:
    x, y = batch
    net = smooth_net().to(dtype)
    got = input_gradient(net, x.to(dtype), y, create_graph=True)
    want = input_gradient(net.double(), x.to(dtype).double(), y)
    assert got.dtype == dtype
    assert (got.double() - want).norm() / want.norm() < 10 * EPSILON[dtype]


def test_input_gradient_reads_what_models_give(batch) -> None:
    class Tupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = smooth_net()

        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return self.net(x), "more"

    model = Tupled()
    torch.testing.assert_close(input_gradient(model, *batch), input_gradient(model.net, *batch))


def test_input_gradient_of_a_frozen_model_and_of_one_run_before(batch) -> None:
    net, (x, y) = smooth_net(), batch
    want = input_gradient(net, x, y)
    images = x.clone().requires_grad_()
    logits = net(images)
    with torch.no_grad():
        torch.testing.assert_close(input_gradient_of(logits, y, images, create_graph=True).detach(), want)
    F.cross_entropy(logits, y).backward()  # the graph is still there
    net.requires_grad_(False)
    torch.testing.assert_close(input_gradient(net, x, y), want)


# --- what cannot be done ------------------------------------------------------------------------------------


class Numbed(torch.autograd.Function):
    """Its backward pass is that of exp, without a graph."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (grad * x.exp()).detach()


class Once(Numbed):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.exp()


class Applies(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def attends(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


IMPOSSIBLE = {
    "once_differentiable": (Once.apply, r"got a custom autograd function that is once_differentiable\."),
    "detached": (Numbed.apply, r"got a gradient cut off from its graph\."),
    "attention": (attends, r"got an operation without a second derivative, such as fused attention\."),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_operations_without_double_backward_are_named(batch, case) -> None:
    function, message = IMPOSSIBLE[case]
    net, (x, y) = nn.Sequential(Applies(function), smooth_net()), batch
    assert input_gradient(net, x, y).isfinite().all()  # once is well
    with pytest.raises(
        ValueError, match=rf"^input_gradient: expected a model that .* twice, {message} Use plain"
    ):
        input_gradient(net, x, y, create_graph=True)


def test_the_remedy_for_attention_is_one(batch) -> None:
    net = nn.Sequential(Applies(attends), smooth_net())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        min_l2(net, *batch, create_graph=True).backward()
    assert all(parameter.grad is not None for parameter in net[1][0].parameters())


@pytest.mark.unchecked
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_is_refused_and_its_eager_one_is_not(batch, backend, fresh_dynamo) -> None:
    eager, (x, y) = smooth_net(), batch
    compiled = torch.compile(eager, backend=backend)
    torch.testing.assert_close(input_gradient(compiled, x, y), input_gradient(eager, x, y))
    message = r"expected an eager model, .* twice, got {}\. Pass the model as it was before torch\.compile\.$"
    with pytest.raises(ValueError, match="^input_gradient: " + message.format("a compiled model")):
        input_gradient(compiled, x, y, create_graph=True)
    with pytest.raises(ValueError, match="^FlipSymmetry: " + message.format("the compiled module '1'")):
        check_double_backward(nn.Sequential(nn.Identity(), compiled), "FlipSymmetry")
    check_double_backward(eager, "FlipSymmetry")
    eager[3].compile(backend=backend)
    with pytest.raises(ValueError, match="^input_gradient: " + message.format("the compiled module '3'")):
        input_gradient(eager, x, y, create_graph=True)


@pytest.mark.unchecked
def test_a_compiled_function_inside_a_model_is_named(batch, fresh_dynamo) -> None:
    function = torch.compile(lambda x: x.sin() * 2, backend="aot_eager")
    with pytest.raises(ValueError, match=r"^input_gradient: .* twice, got a compiled function\."):
        input_gradient(nn.Sequential(Applies(function), smooth_net()), *batch, create_graph=True)


@pytest.mark.unchecked
@pytest.mark.parametrize("create_graph", [False, True])
def test_input_gradient_refuses_bad_input(batch, create_graph) -> None:
    net, (x, y) = smooth_net(), batch
    cases = [
        (net, (x * 99).to(torch.uint8), y, r"expected floating images, got torch\.uint8\. Normalise them"),
        (
            net,
            x,
            y[:2],
            r"integer label for each of 4 rows of logits, got torch\.int64 of shape \(2,\)\. Give the",
        ),
        (net, x, F.one_hot(y), r"for each of 4 rows of logits, got torch\.int64 of shape \(4, 3\)\."),
        (net, x, y.double(), r"expected an integer label .*, got torch\.float64 of shape \(4,\)\."),
        (net[:2], x, y, r"expected a model that gives logits \(b, k\), got \(4, 3, 5, 6\)"),
        (
            nn.Sequential(Applies(Tensor.detach), net),
            x,
            y,
            "expected logits that depend on x, got none that do",
        ),
        (nn.Sequential(net, Applies(Tensor.detach)), x, y, "requires grad, got logits without a graph. Run"),
    ]
    for model, images, labels, message in cases:
        with pytest.raises(ValueError, match=rf"^input_gradient: .*{message}"):
            input_gradient(model, images, labels, create_graph=create_graph)


@pytest.mark.unchecked
def test_input_gradient_of_refuses_in_its_users_name(batch) -> None:
    net, (x, y) = smooth_net(), batch
    with pytest.raises(
        ValueError, match=r"^GradientTransfer: .* got an x that does not require grad\. Run the"
    ):
        input_gradient_of(net(x), y, x, create_graph=True, user="GradientTransfer")
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"outside no_grad\(\) and inference_mode\(\)"),
    ):
        input_gradient(net, x, y)


FOUR = torch.randn(2, 3, 4, 4)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"student": FOUR, "teacher": torch.randn(2, 5, 4, 4)},
            r"expected equal channels, got student 3 and teacher 5\. Bring .* as ActivationTransfer does\.",
        ),
        (
            {"student": FOUR, "teacher": torch.randn(2, 3, 8, 8)},
            r'expected equal \(h, w\), got student \(4, 4\) and teacher \(8, 8\)\. .* resize="student"',
        ),
        ({"student": FOUR, "teacher": FOUR[:1]}, "expected equal batch sizes, got student 2 and teacher 1"),
        ({"student": [FOUR, FOUR], "teacher": [FOUR]}, "at least one, got 2 and 1"),
        ({"student": FOUR[0], "teacher": FOUR}, r"expected student activations of shape \(b, c, h, w\)"),
        ({"student": FOUR, "teacher": FOUR, "form": "papr"}, r"form as one of .* got 'papr'"),
        ({"student": FOUR, "teacher": FOUR, "resize": "both"}, r"resize as one of .* got 'both'"),
        ({"student": FOUR, "teacher": FOUR, "beta": float("nan")}, "expected a finite beta >= 0, got nan"),
        ({"student": FOUR, "teacher": FOUR, "weights": [1.0, 2.0]}, "a weight for each of 1 pairs, got 2"),
    ],
)
def test_activation_loss_refuses_bad_input(arguments, message) -> None:
    with pytest.raises(ValueError, match=rf"^activation_transfer_loss: .*{message}"):
        activation_transfer_loss(**{"beta": 1.0, **arguments})


@pytest.mark.unchecked
def test_gradient_losses_refuse_bad_input() -> None:
    with pytest.raises(
        ValueError,
        match=r"^gradient_transfer_loss: expected gradients of equal shape, got student \(2, 3, 4, 4\) and "
        r"teacher \(2, 3, 8, 8\)\. Take both by the same images",
    ):
        gradient_transfer_loss(FOUR, torch.randn(2, 3, 8, 8), beta=1.0)
    with pytest.raises(
        ValueError, match=r"^flip_symmetry_loss: .* got gradient \(2, .*flipped \(1, 3, 4, 4\)"
    ):
        flip_symmetry_loss(FOUR, FOUR[:1], beta=1.0)
    with pytest.raises(ValueError, match=r"^input_gradient_norm: .* no empty axis, got \(0, 3, 4, 4\)"):
        input_gradient_norm(FOUR[:0], beta=1.0)
    with pytest.raises(ValueError, match=r"^input_gradient_norm: expected a finite beta >= 0, got -1"):
        input_gradient_norm(FOUR, beta=-1)
    with pytest.raises(
        TypeError, match=r"^gradient_transfer_loss: expected teacher as a floating tensor, got tor"
    ):
        gradient_transfer_loss(FOUR, FOUR.long(), beta=1.0)
    with pytest.raises(
        TypeError, match=r"^activation_transfer_loss: expected student act.* got torch\.int64"
    ):
        activation_transfer_loss(FOUR.long(), FOUR, beta=1.0)
