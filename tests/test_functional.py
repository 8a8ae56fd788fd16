"""The formulas, against the plain ones, against autograd, and against what they promise of numerics."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from attention_transfer import kernels
from attention_transfer.functional import (
    activation_transfer_loss,
    attention_map,
    attention_transfer_loss,
    convert_beta,
    distillation_loss,
    flip_symmetry_loss,
    gradient_transfer_loss,
    input_gradient_norm,
)

FORMS = ["paper", "code", "caffe"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EPSILON = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 5e-7, torch.float64: 1e-14}


def plain_map(features: Tensor, p: float = 2.0, mapping: str = "sum") -> Tensor:
    powers = features.abs() ** p
    energy = powers.amax(1) if mapping == "max" else powers.sum(1)
    return energy / energy.flatten(1).norm(dim=1).view(-1, 1, 1)


def plain_loss(student: Tensor, teacher: Tensor, beta: float, form: str, p: float, mapping: str) -> Tensor:
    difference = (plain_map(student, p, mapping) - plain_map(teacher, p, mapping)).flatten(1)
    if form == "paper":
        return beta / 2 * difference.norm(dim=1).mean()
    if form == "code":
        return beta * difference.pow(2).mean()
    return beta / (2 * len(student)) * difference.pow(2).sum()


def authors_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The authors' released code, as its formula: normalise(mean_c x^2), mean squared difference."""
    maps = [F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher)]
    return (maps[0] - maps[1]).pow(2).mean()


@pytest.fixture
def activations() -> tuple[Tensor, Tensor]:
    student = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(3, 7, 5, 6, dtype=torch.float64)


# --- oracles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 4.0])
def test_map_is_the_plain_formula(activations, p, mapping) -> None:
    features, _ = activations
    torch.testing.assert_close(attention_map(features, p=p, mapping=mapping), plain_map(features, p, mapping))


def test_energy_without_norm() -> None:
    features = torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1, 1)
    assert attention_map(features, norm=None) == 14
    assert attention_map(features, norm=None, mapping="max") == 9
    assert attention_map(features, norm=None, p=1) == 6


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_its_closed_form_gradient_are_the_plain_ones(activations, form, p, mapping) -> None:
    student, teacher = activations
    mine = attention_transfer_loss(student, teacher, beta=3.0, form=form, p=p, mapping=mapping)
    theirs = plain_loss(student, teacher, 3.0, form, p, mapping)
    torch.testing.assert_close(mine, theirs)
    upstream = torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(mine, student, upstream), torch.autograd.grad(theirs, student, upstream)
    )


@pytest.mark.unchecked
@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_and_gradgradcheck(activations, form, p, mapping) -> None:
    student, teacher = activations

    def loss(features: Tensor, other: Tensor) -> Tensor:
        return attention_transfer_loss(features, other, beta=3.0, form=form, p=p, mapping=mapping)

    assert gradcheck(loss, (student, teacher))
    assert gradgradcheck(loss, (student, teacher))
    assert gradcheck(loss, (student.detach(), teacher.clone().requires_grad_()))


def test_code_form_is_the_authors_formula(activations) -> None:
    student, teacher = activations
    mine = attention_transfer_loss(student, teacher, beta=1000, form="code")
    torch.testing.assert_close(mine, 1000 * authors_loss(student, teacher))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_dtype_and_layout(form, dtype, memory_format) -> None:
    exact_s = torch.randn(2, 8, 5, 3).to(dtype).double().requires_grad_()
    exact_t = torch.randn(2, 6, 5, 3).to(dtype).double()
    student = exact_s.detach().to(dtype).to(memory_format=memory_format).requires_grad_()
    teacher = exact_t.to(dtype)[:, :, :, :]
    loss = attention_transfer_loss(student, teacher, beta=2.0, form=form)
    want = plain_loss(exact_s, exact_t, 2.0, form, 2.0, "sum")
    loss.backward()
    want.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert student.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    error = (student.grad.double() - exact_s.grad).norm() / exact_s.grad.norm()
    assert error < EPSILON[dtype]


def test_non_contiguous_activations(activations) -> None:
    student, teacher = activations
    strided = student.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    loss, want = (attention_transfer_loss(x, teacher, beta=1.0) for x in (strided, student))
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, strided), torch.autograd.grad(want, student))


# --- raw energies -------------------------------------------------------------------------------------------


RAW_BACKENDS = ["reference", *(["cpu"] if importlib.util.find_spec("numba") else [])]


def across_all_magnitudes(dtype: torch.dtype, per_sample: int) -> Tensor:
    """Samples (b, 2, 1, per_sample) that go through all sizes of a type; the last has all of them."""
    low, high = (-25, 15) if dtype == torch.float16 else (-150, 127)
    exponents = torch.linspace(low, high, 40 * per_sample)
    sizes = torch.cat([exponents, exponents[:: len(exponents) // per_sample][:per_sample]]).exp2()
    features = torch.stack([sizes, -0.75 * sizes], 0).view(2, -1, per_sample).transpose(0, 1)
    return features.unsqueeze(2).to(dtype)


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, 4.0, 7.3, 64.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", RAW_BACKENDS)
def test_raw_energy_and_its_gradient_are_those_of_float64_rounded(backend, dtype, p, mapping) -> None:
    features = across_all_magnitudes(dtype, 6).requires_grad_()
    exact = features.detach().double().requires_grad_()
    want = (exact.abs() ** p).sum(1) if mapping == "sum" else (exact.abs() ** p).amax(1)
    with kernels.use_backend(backend):
        energy = attention_map(features, p=p, mapping=mapping, norm=None)
        energy.backward(torch.ones_like(energy))
    want.backward(torch.ones_like(want))
    assert energy.dtype == torch.float32
    torch.testing.assert_close(energy, want.float(), rtol=2e-7, atol=0)
    held = want.isfinite().unsqueeze(1)  # by float64
    grads = [grad.where(held, 0) for grad in (features.grad, exact.grad.to(dtype))]
    torch.testing.assert_close(*grads, rtol=torch.finfo(dtype).eps, atol=0)


def test_raw_energy_that_float32_can_hold_is_held() -> None:
    """Relative to the largest, the small ones vanish; and the scale of the large ones has no float32."""
    large = torch.tensor([3.0, 0.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(attention_map(large, p=64, norm=None).flatten(), torch.tensor([3.0**64, 0]))
    apart = torch.tensor([3.75, 0.5, 1e30]).view(1, 1, 1, 3)
    want = torch.tensor([3.75**64, 0.5**64, float("inf")])
    torch.testing.assert_close(attention_map(apart, p=64, norm=None).flatten(), want)


# --- other ways to differentiate ----------------------------------------------------------------------------

# What PyTorch says of its own parts: the rules of forward mode are scripted, and kl_div has none for vmap.
TRANSFORMS = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated", "ignore:There is a performance drop"
)
TARGET = torch.linspace(-2, 3, 96, dtype=torch.float64).sin().view(2, 3, 4, 4)
DIFFERENTIABLE = {
    "map": lambda x: attention_map(x),
    "map of maxima": lambda x: attention_map(x, mapping="max", p=3),
    "energy": lambda x: attention_map(x, norm=None),
    "energy, p 1.5": lambda x: attention_map(x, norm=None, p=1.5),
    "energy, p 1": lambda x: attention_map(x, norm=None, p=1),
    **{
        f"loss, {form}": lambda x, form=form: attention_transfer_loss(x, TARGET[:, :2], beta=2.0, form=form)
        for form in FORMS
    },
    "loss of teacher": lambda x: attention_transfer_loss(TARGET, x, beta=2.0),
    "resized": lambda x: attention_transfer_loss(x, TARGET[..., :2, :3], beta=2.0, resize="student"),
    "activations": lambda x: activation_transfer_loss(x, TARGET, beta=2.0),
    "activations, code": lambda x: activation_transfer_loss(x, TARGET, beta=2.0, form="code"),
    "gradients": lambda x: gradient_transfer_loss(x, TARGET, beta=2.0),
    "flips": lambda x: flip_symmetry_loss(x, TARGET, beta=2.0),
    "gradient norm": lambda x: input_gradient_norm(x, beta=2.0),
    "logits": lambda x: distillation_loss(x.flatten(1), TARGET.flatten(1)),
}


@pytest.mark.unchecked
@TRANSFORMS
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_and_the_transforms_of_torch_func(name) -> None:
    function = DIFFERENTIABLE[name]
    x, direction = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    step = 1e-6 * direction
    want = (function(x + step) - function(x - step)) / 2e-6

    def along(jacobian: Tensor) -> Tensor:
        return (jacobian * direction).flatten(want.dim()).sum(-1)

    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
    assert want.abs().max() > 1e-3
    tolerance = {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(dual, want, **tolerance)
    torch.testing.assert_close(torch.func.jvp(function, (x,), (direction,))[1], want, **tolerance)
    torch.testing.assert_close(along(torch.func.jacfwd(function)(x)), want, **tolerance)
    torch.testing.assert_close(along(torch.func.jacrev(function)(x)), want, **tolerance)

    def slope(x: Tensor) -> Tensor:
        return torch.func.jvp(function, (x,), (direction,))[1]

    twice = (slope(x + step) - slope(x - step)) / 2e-6
    torch.testing.assert_close(torch.func.jvp(slope, (x,), (direction,))[1], twice, rtol=1e-5, atol=1e-7)
    several = torch.stack([x, direction])
    torch.testing.assert_close(
        torch.func.vmap(function)(several), torch.stack([function(each) for each in several])
    )


@pytest.mark.unchecked
@TRANSFORMS
@pytest.mark.parametrize("name", [name for name in DIFFERENTIABLE if not name.startswith(("map", "energy"))])
def test_hessians_and_the_gradient_of_each_of_several(name) -> None:
    function = DIFFERENTIABLE[name]
    x, direction = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    step = 1e-6 * direction

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]

    want = (gradient(x + step) - gradient(x - step)) / 2e-6
    hessian = torch.func.hessian(function)(x)
    torch.testing.assert_close((hessian * direction).flatten(4).sum(-1), want, rtol=1e-5, atol=1e-7)
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():  # forwards over backwards, without create_graph
        (found,) = torch.autograd.grad(function(forward_ad.make_dual(leaf, direction)), leaf)
        tangent = forward_ad.unpack_dual(found).tangent
    torch.testing.assert_close(tangent, want, rtol=1e-5, atol=1e-7)
    several = torch.stack([x, direction])
    each = torch.func.vmap(torch.func.grad(function))(several)
    torch.testing.assert_close(each, torch.stack([gradient(one) for one in several]))


@TRANSFORMS
def test_forward_mode_at_zeros_ties_and_equal_maps() -> None:
    """As backwards: no derivative where there is none, and half of it for each of two equal channels."""
    direction, zeros, ones = torch.randn(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    for function, at in [
        (attention_map, zeros),
        (lambda x: attention_transfer_loss(x, ones, beta=1.0), zeros),
        (lambda x: attention_transfer_loss(x, ones, beta=1.0), ones),
    ]:
        assert torch.func.jvp(function, (at,), (direction,))[1].count_nonzero() == 0
    tied = torch.func.jvp(lambda x: attention_map(x, norm=None, mapping="max", p=1), (ones,), (direction,))[1]
    torch.testing.assert_close(tied, direction.mean(1))


@TRANSFORMS
@pytest.mark.unchecked
def test_a_second_derivative_of_activations_that_are_zero() -> None:
    """Half of all activations behind a ReLU are: p = 2 has the second derivative 2 there."""
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for p, want in [(1.0, 0.0), (1.5, 0.0), (2.0, 2.0), (3.0, 0.0)]:
        energy = lambda x, p=p: attention_map(x, norm=None, p=p).sum()  # noqa: E731
        assert torch.func.hessian(energy)(x).item() == want
        assert torch.autograd.functional.hessian(energy, x).item() == want


def test_tensors_without_memory_of_their_own(activations) -> None:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    student, teacher = activations
    want = attention_transfer_loss(student, teacher, beta=1.0)
    with FakeTensorMode() as fake:
        known = [fake.from_tensor(each) for each in (student, teacher)]
        loss = attention_transfer_loss(*known, beta=1.0)
        loss.backward()
        assert loss.shape == () and known[0].grad.shape == student.shape
        assert attention_map(known[1], norm=None).shape == (3, 5, 6)
    graph = make_fx(lambda x: attention_transfer_loss(x, teacher, beta=1.0))(torch.randn_like(student))
    torch.testing.assert_close(graph(student.detach()), want.detach())


def test_distributed_tensors(activations, tmp_path) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    student, teacher = activations
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        want = attention_transfer_loss(student, teacher, beta=1.0)
        for axis in (0, 1, 2):
            parts = distribute_tensor(student.detach(), mesh, [Shard(axis)]).requires_grad_()
            loss = attention_transfer_loss(parts, distribute_tensor(teacher, mesh, [Shard(axis)]), beta=1.0)
            loss.backward()
            torch.testing.assert_close(loss.full_tensor(), want)
            (gradient,) = torch.autograd.grad(want, student, retain_graph=True)
            torch.testing.assert_close(parts.grad.full_tensor(), gradient)
        with pytest.raises(
            TypeError, match="expected both sides as DTensor or neither, got DTensor and Tensor"
        ):
            attention_transfer_loss(parts, teacher, beta=1.0)
    finally:
        torch.distributed.destroy_process_group()


# --- a real Caffe -------------------------------------------------------------------------------------------


def caffe_case(folder: Path, name: str) -> tuple[Tensor, Tensor, dict[str, np.ndarray], dict]:
    case = folder / "caffe" / "attention" / name
    inputs, expected = np.load(case / "inputs.npz"), dict(np.load(case / "expected.npz"))
    student, teacher = (torch.from_numpy(inputs[key]).requires_grad_() for key in ("A_s", "A_t"))
    return student, teacher, expected, json.loads((case / "meta.json").read_text())


CAFFE_CASES = [
    ("at_p1", 1.0, "caffe"),
    ("at_p1_no_reshape", 1.0, "caffe"),
    ("at_p1_power", 1.0, "caffe"),
    ("at_p2", 2.0, "caffe"),
    ("at_p2_no_reshape", 2.0, "caffe"),
    ("at_p2_weight", 2.0, "caffe"),
    ("at_p4", 4.0, "caffe"),
    ("at_p4_no_reshape", 4.0, "caffe"),
    ("at_p4_zeros", 4.0, "caffe"),
    ("at_equal", 2.0, "caffe"),
    ("at_large", 2.0, "caffe"),
    ("at_small_eps", 2.0, "caffe"),
    ("at_zero_sample", 2.0, "caffe"),
    ("at_python", 2.0, "paper"),
    ("at_python_equal_sample", 2.0, "paper"),
    ("at_python_no_reshape", 4.0, "paper"),
    ("at_python_weight", 2.0, "paper"),
]


@pytest.mark.parametrize(("name", "p", "form"), CAFFE_CASES)
def test_real_caffe_agrees(shared_reference, name, p, form) -> None:
    """Loss and both gradients, as a real Caffe computed them in float64.

    Caffe adds eps = 1e-10 inside the square root of its norm; ours has no eps. On these activations that
    changes ||Q|| by at most eps / (2 ||Q||^2), which is what the tolerance allows for, beside rounding.
    """
    student, teacher, expected, meta = caffe_case(shared_reference, name)
    beta = next(iter(meta["loss_weights"].values()))
    if form == "paper":  # Caffe's layer sums over the batch, with a beta of its own
        beta *= meta["python_layer"]["beta"] * len(student)
    loss = attention_transfer_loss(student, teacher, beta=beta, p=p, form=form)
    loss.backward()
    energies = torch.cat([attention_map(a.detach(), p=p, norm=None).flatten(1) for a in (student, teacher)])
    norms = energies.norm(dim=1)
    eps = 1e-30 if name == "at_small_eps" else 1e-10
    rtol = 1e-10 + 4 * float(eps / norms[norms > 0].min() ** 2)
    assert rtol < 1e-6
    np.testing.assert_allclose(loss.item(), expected["loss"], rtol=rtol, atol=1e-12)
    for got, want in ((student.grad, expected["grad/A_s"]), (teacher.grad, expected["grad/A_t"])):
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=rtol * np.abs(want).max() + 1e-12)


# --- numerics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1e-300, 1e-38, 1e-20, 1e-4, 300.0, 1e20, 1e37, 1e300])
@pytest.mark.parametrize("p", [1.0, 2.0, 4.0])
def test_map_does_not_change_with_the_scale_of_the_activation(dtype, factor, p) -> None:
    """For any factor under which the activations stay normal numbers of their type."""
    features = (0.5 + torch.rand(2, 6, 4, 3, dtype=torch.float64)) * torch.randn(2, 6, 4, 3).sign()
    limits = torch.finfo(dtype)
    if not limits.tiny < 0.5 * factor < 1.5 * factor < limits.max:
        factor = min(max(factor, 4 * limits.tiny), limits.max / 4)
    scaled = (features * factor).to(dtype)
    assert scaled.isfinite().all() and scaled.count_nonzero() == scaled.numel()
    unscaled = scaled.double() / factor
    got = attention_map(scaled, p=p)
    torch.testing.assert_close(got.double(), plain_map(unscaled, p), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 4.0])
def test_zero_activation_gives_a_zero_map_a_finite_loss_and_a_zero_gradient(dtype, form, p) -> None:
    student = torch.randn(3, 4, 5, 5).to(dtype)
    student[1] = 0
    student.requires_grad_()
    loss = attention_transfer_loss(student, torch.randn(3, 4, 5, 5).to(dtype), beta=1.0, form=form, p=p)
    loss.backward()
    assert (attention_map(student, p=p)[1] == 0).all()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert (student.grad[1] == 0).all() and (student.grad[0] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_identical_maps_give_zero_loss_and_zero_gradient(dtype, form) -> None:
    teacher = torch.randn(2, 4, 5, 5).to(dtype)
    student = teacher.clone().requires_grad_()
    loss = attention_transfer_loss(student, teacher, beta=1.0, form=form)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_are_never_turned_into_a_number(form, bad) -> None:
    student = torch.randn(2, 4, 5, 5)
    student[0, 1, 2, 3] = bad
    student.requires_grad_()
    loss = attention_transfer_loss(student, torch.randn(2, 4, 5, 5), beta=1.0, form=form)
    loss.backward()
    assert loss.isnan()
    assert attention_map(student)[0].isnan().all() and attention_map(student)[1].isfinite().all()
    assert student.grad[0].isnan().any()


@pytest.mark.parametrize("form", FORMS)
def test_loss_does_not_depend_on_how_a_batch_is_split(activations, form) -> None:
    student, teacher = torch.randn(8, 4, 5, 5), torch.randn(8, 4, 5, 5)
    whole = attention_transfer_loss(student, teacher, beta=2.0, form=form)
    parts = [
        attention_transfer_loss(s, t, beta=2.0, form=form)
        for s, t in zip(student.chunk(4), teacher.chunk(4), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_two_small_differences_do_not_vanish() -> None:
    """||D|| of differences whose squares underflow float32 is still their norm."""
    student, teacher = torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1, 3)
    student[..., 0] = teacher[..., 0] = 1
    student[..., 1] = 1e-15  # an energy, and a map entry, of 1e-30
    loss = attention_transfer_loss(student, teacher, beta=2.0)
    torch.testing.assert_close(loss, torch.tensor(1e-30), rtol=1e-5, atol=0)


# --- pairs, weights, resizing -------------------------------------------------------------------------------


def test_a_sequence_of_pairs_is_the_weighted_sum(activations) -> None:
    student, teacher = activations
    other_s, other_t = torch.randn(3, 2, 8, 8).double(), torch.randn(3, 2, 8, 8).double()
    got = attention_transfer_loss([student, other_s], [teacher, other_t], beta=2.0, weights=[1.0, 0.25])
    first = attention_transfer_loss(student, teacher, beta=2.0)
    second = attention_transfer_loss(other_s, other_t, beta=2.0)
    torch.testing.assert_close(got, first + 0.25 * second)


@pytest.mark.parametrize(("small", "large"), [((4, 6), (8, 12)), ((3, 5), (7, 4)), ((1, 4), (5, 5))])
def test_resize_acts_on_maps_and_to_the_other_side(small, large) -> None:
    student, teacher = torch.randn(2, 3, *small), torch.randn(2, 5, *large)
    shrunk = F.adaptive_avg_pool2d(attention_map(teacher, norm=None), tuple(map(min, small, large)))
    shrunk = F.interpolate(shrunk[:, None], small, mode="bilinear")[:, 0]
    want = (plain_map(student) - plain_map(shrunk.sqrt()[:, None])).flatten(1).norm(dim=1).mean() / 2
    got = attention_transfer_loss(student, teacher, beta=1.0, resize="teacher")
    torch.testing.assert_close(got, want)
    swapped = attention_transfer_loss(teacher, student, beta=1.0, resize="student")
    torch.testing.assert_close(swapped, want)


@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_resized_loss_is_twice_differentiable(resize) -> None:
    student = torch.randn(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 4, 4, dtype=torch.float64)

    def loss(features: Tensor) -> Tensor:
        return attention_transfer_loss(features, teacher, beta=1.0, resize=resize)

    assert gradcheck(loss, (student,))
    assert gradgradcheck(loss, (student,))


# --- how it composes ----------------------------------------------------------------------------------------


@pytest.mark.unchecked
@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_a_graph_break(form) -> None:
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return attention_transfer_loss(student, teacher, beta=2.0, form=form)

    student, teacher = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 6, 4, 5)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(student, teacher)
    torch.testing.assert_close(compiled, loss(student, teacher))
    torch.testing.assert_close(
        torch.autograd.grad(compiled, student), torch.autograd.grad(loss(student, teacher), student)
    )


@TRANSFORMS
@pytest.mark.unchecked
def test_transforms_of_torch_func_are_compiled_with_their_numbers() -> None:
    x, direction = torch.randn(2, 2, 3, 4, 4)
    loss = DIFFERENTIABLE["loss, paper"]
    for function in (
        lambda x: torch.func.jvp(loss, (x,), (direction,))[1],
        lambda x: torch.func.vmap(attention_map)(torch.stack([x, direction])),
    ):
        torch.testing.assert_close(torch.compile(function, backend="eager")(x), function(x))


def test_autocast_and_inference_mode() -> None:
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    plain = attention_transfer_loss(student, teacher, beta=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_transfer_loss(student, teacher, beta=1.0) == plain
    with torch.inference_mode():
        assert attention_transfer_loss(student, teacher, beta=1.0) == plain


# --- beta between forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_convert_beta_keeps_the_gradient(source, target) -> None:
    """On one image, whose ||D|| the conversion is told, the gradients of all three forms are equal."""
    student, teacher = torch.randn(1, 4, 6, 5, requires_grad=True), torch.randn(1, 3, 6, 5)
    beta = convert_beta(7.0, source=source, target=target, hw=(6, 5), batch=(student, teacher))
    want = torch.autograd.grad(attention_transfer_loss(student, teacher, beta=7.0, form=source), student)
    got = torch.autograd.grad(attention_transfer_loss(student, teacher, beta=beta, form=target), student)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_convert_beta_there_and_back(source, target) -> None:
    there = convert_beta(3.0, source=source, target=target, hw=(8, 4))
    assert convert_beta(there, source=target, target=source, hw=(8, 4)) == pytest.approx(3.0)


def test_code_and_caffe_convert_exactly(activations) -> None:
    student, teacher = activations
    beta = convert_beta(1000, source="code", target="caffe", hw=(5, 6))
    torch.testing.assert_close(
        attention_transfer_loss(student, teacher, beta=beta, form="caffe"),
        attention_transfer_loss(student, teacher, beta=1000, form="code"),
    )


# --- knowledge distillation ---------------------------------------------------------------------------------


def test_distillation_is_the_plain_formula_and_its_gradient_checks() -> None:
    student = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 7, dtype=torch.float64)
    soft_s, soft_t = (student / 3).softmax(1), (teacher / 3).softmax(1)
    want = 9 * (soft_t * (soft_t.log() - soft_s.log())).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature=3.0), want)
    assert gradcheck(lambda x: distillation_loss(x, teacher, temperature=3.0), (student,))


@pytest.mark.unchecked
def test_distillation_of_each_pixel_is_that_of_as_many_samples() -> None:
    student, teacher = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    rows = [logits.movedim(1, -1).reshape(-1, 5) for logits in (student, teacher)]
    torch.testing.assert_close(distillation_loss(student, teacher), distillation_loss(*rows))
    with pytest.raises(
        ValueError, match=r"or \(b, k, h, w\), got student \(2, 5, 3, 4\) and teacher \(2, 5, 3, 3\)"
    ):
        distillation_loss(student, teacher[..., :3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_distillation_from_itself_is_zero(dtype) -> None:
    logits = (20 * torch.randn(4, 7)).to(dtype)
    assert distillation_loss(logits, logits) == 0


# --- bad input ----------------------------------------------------------------------------------------------

MAPS = torch.randn(2, 3, 8, 8)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"student": MAPS, "teacher": torch.randn(2, 3, 16, 16)},
            r"expected equal \(h, w\), got student \(8, 8\) and"
            r' teacher \(16, 16\)\. Tap layers of equal stride, or pass resize="student"\.',
        ),
        ({"student": MAPS, "teacher": MAPS[:1]}, "expected equal batch sizes, got student 2 and teacher 1"),
        (
            {"student": [MAPS, MAPS], "teacher": [MAPS]},
            "as many student as teacher activations, at least one, got 2 and 1",
        ),
        ({"student": [], "teacher": []}, "at least one, got 0 and 0"),
        ({"student": MAPS[0], "teacher": MAPS}, r"expected student activations of shape \(b, c, h, w\)"),
        (
            {"student": MAPS, "teacher": MAPS[:, :0]},
            r"teacher activations .* no empty axis, got \(2, 0, 8, 8\)",
        ),
        ({"student": MAPS, "teacher": MAPS, "p": 0.5}, "expected 1 <= p <= 64, got 0.5"),
        ({"student": MAPS, "teacher": MAPS, "p": float("nan")}, "expected 1 <= p <= 64, got nan"),
        (
            {"student": MAPS, "teacher": MAPS, "mapping": "mean"},
            r"mapping as one of \['sum', 'max'\], got 'mean'",
        ),
        (
            {"student": MAPS, "teacher": MAPS, "form": "papr"},
            r"form as one of \['paper', 'code', 'caffe'\], got 'papr'",
        ),
        (
            {"student": MAPS, "teacher": MAPS, "resize": "both"},
            r"resize as one of \['student', 'teacher'\], got 'both'",
        ),
        ({"student": MAPS, "teacher": MAPS, "beta": -1.0}, "expected a finite beta >= 0, got -1.0"),
        (
            {"student": MAPS, "teacher": MAPS, "weights": [1.0, 2.0]},
            "expected a weight for each of 1 pairs, got 2",
        ),
    ],
)
def test_loss_refuses_bad_input(arguments, message) -> None:
    with pytest.raises(ValueError, match=rf"^attention_transfer_loss: .*{message}"):
        attention_transfer_loss(**{"beta": 1.0, **arguments})


@pytest.mark.unchecked
def test_other_functions_refuse_bad_input() -> None:
    with pytest.raises(
        TypeError, match=r"attention_map: expected features as a floating tensor, got torch\.int64"
    ):
        attention_map(torch.ones(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="attention_map: expected norm=2 or norm=None, got 1"):
        attention_map(MAPS, norm=1)
    with pytest.raises(
        ValueError, match=r"distillation_loss: .* got student \(2, 10\) and teacher \(2, 100\)\."
    ):
        distillation_loss(torch.randn(2, 10), torch.randn(2, 100))
    with pytest.raises(ValueError, match="distillation_loss: expected temperature > 0, got 0"):
        distillation_loss(torch.randn(2, 10), torch.randn(2, 10), temperature=0)
    with pytest.raises(ValueError, match="convert_beta: expected form as one of"):
        convert_beta(1.0, source="paper", target="authors", hw=(8, 8))
    with pytest.raises(ValueError, match="convert_beta: expected a batch whose maps differ"):
        convert_beta(1.0, source="paper", target="code", hw=(8, 8), batch=(MAPS, MAPS))
