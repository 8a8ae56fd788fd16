"""The Triton kernels: what they compute, and what they compile to for an H200.

What they compute is tested on a CUDA device where there is one, and everywhere in Triton's interpreter. That
has to be asked for before Triton is imported, so one test runs this file again in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from attention_transfer import kernels
from attention_transfer.kernels import reference
from attention_transfer.kernels.reference import LARGEST_ENERGY, SMALLEST_ENERGY, accumulation_dtype

triton = pytest.importorskip("triton")
cuda = pytest.importorskip("attention_transfer.kernels.cuda")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EXPONENTS = [1.0, 1.5, 2.0, 3.0, 4.0]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
    "cropped_channels_last": lambda x: LAYOUTS["cropped"](LAYOUTS["channels_last"](x)),
    "every_other_channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
    "expanded_positions": lambda x: x[:, :, :1, :1].expand_as(x),
}
SHAPES = [
    (1, 1, 1, 1),
    (3, 6, 5, 7),
    (2, 4, 8, 6),  # rows of whole vectors, in either layout
    (1, 1, 1, 90),
    (1, 3, 90, 1),
]
LARGE_SHAPES = [
    (1, 1100, 2, 3),  # several steps over the channels
    (1, 2, 40, 40),  # several blocks of positions
]


@pytest.fixture
def device() -> Iterator[str]:
    """Where the kernels compute: the interpreter's CPU, or a CUDA device."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no CUDA device; see test_in_the_interpreter")
    with np.errstate(all="ignore"):  # numpy warns of the infinities that are asked for
        yield "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    """Takes back what Triton 3.9's interpreter wraps the language in, once more at every call in a kernel."""
    places = [triton.language, triton.language.core, triton.language.math, triton.language.tensor]
    before = [dict(vars(place)) for place in places]
    yield
    for place, members in zip(places, before, strict=True):
        for name, member in members.items():
            if INTERPRETED and vars(place)[name] is not member:
                setattr(place, name, member)


@pytest.mark.skipif(INTERPRETED, reason="it is the interpreter")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100


# --- what they compute --------------------------------------------------------------------------------------


def check_energy(features: Tensor, p: float, mapping: str) -> tuple[Tensor, Tensor]:
    """The backend's answer, after comparison with the reference in float64."""
    energy, scale = cuda.energy(features, p, mapping)
    want, unit = reference.energy(features.double(), p, mapping)
    assert energy.shape == want.shape and energy.is_contiguous()
    assert energy.dtype == scale.dtype == accumulation_dtype(features.dtype)
    torch.testing.assert_close(
        energy.double() * (scale / unit).view(-1, 1, 1) ** p,
        want,
        rtol=1e-13 if features.dtype == torch.float64 else 1e-5,
        atol=0,
        equal_nan=True,
    )
    return energy, scale


def check_gradient(
    features: Tensor, scale: Tensor, above: Tensor | None, p: float, mapping: str, sizes: float = 1.0
) -> Tensor:
    """The same for the gradient; `sizes`: about how large its entries are."""
    b, _, h, w = features.shape
    grad_energy = torch.randn(b, h, w, dtype=scale.dtype, device=features.device)
    gradient = cuda.gradient(features, scale, grad_energy, above, p, mapping)
    wide_above = None if above is None else above.double()
    want = reference.gradient(features.double(), scale.double(), grad_energy.double(), wide_above, p, mapping)
    assert gradient.dtype == features.dtype
    assert gradient.stride() == torch.empty_like(features).stride()
    eps = torch.finfo(features.dtype).eps
    torch.testing.assert_close(
        gradient.double(), want.to(features.dtype).double(), rtol=4 * eps, atol=max(8 * eps, 1e-6) * sizes
    )
    return gradient


def randn(*shape: int, dtype: torch.dtype = torch.float32, device: str) -> Tensor:
    return torch.randn(shape).to(device, dtype)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *((shape, layout) for shape in SHAPES for layout in LAYOUTS),
        *((shape, layout) for shape in LARGE_SHAPES for layout in ("contiguous", "channels_last", "cropped")),
    ],
)
def test_every_shape_and_stride(shape: tuple[int, ...], layout: str, device: str) -> None:
    features = LAYOUTS[layout](randn(*shape, device=device))
    _, scale = check_energy(features, 2.0, "sum")
    check_gradient(features, scale, randn(*shape, device=device), 2.0, "sum")


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_type_exponent_and_mapping(dtype: torch.dtype, p: float, mapping: str, device: str) -> None:
    features = randn(2, 5, 3, 7, dtype=dtype, device=device)
    features[0, 1] = -features[0, 0]  # ties
    features[0, :, 1] = 0.5
    features[1, :, 0] = 0
    _, scale = check_energy(features, p, mapping)
    check_gradient(features, scale, randn(2, 5, 3, 7, dtype=dtype, device=device), p, mapping)


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 64.0])
def test_raw_energies_keep_what_the_type_can_hold(p: float, mapping: str, device: str) -> None:
    sizes = torch.linspace(-126, 126, 43, device=device).exp2() ** (1 / p)
    features = torch.stack([sizes, -sizes / 2]).view(1, 2, 1, 43)
    want = reference.raw_energy(features.double(), p, mapping)
    torch.testing.assert_close(cuda.raw_energy(features, p, mapping), want.float(), rtol=2e-5, atol=0)
    wide = cuda.raw_energy(features.double(), p, mapping)
    torch.testing.assert_close(wide, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("p", [1.1, 2.5, 7.3, 31.0, 64.0])
def test_any_real_exponent(p: float, device: str) -> None:
    features = randn(2, 5, 3, 7, dtype=torch.float64, device=device)
    _, scale = check_energy(features, p, "sum")
    check_gradient(features, scale, None, p, "sum", sizes=1e3)


@pytest.mark.parametrize("above", ["none", *LAYOUTS])
@pytest.mark.parametrize(("layout", "mapping"), [("contiguous", "sum"), ("channels_last", "max")])
def test_the_gradient_from_above_may_lie_otherwise(
    layout: str, above: str, mapping: str, device: str
) -> None:
    features = LAYOUTS[layout](randn(2, 8, 4, 6, device=device))
    grad = None if above == "none" else LAYOUTS[above](randn(2, 8, 4, 6, device=device))
    check_gradient(features, torch.tensor([0.5, 4.0], device=device), grad, 2.0, mapping)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_maximum_over_channels_of_several_steps(layout: str, device: str) -> None:
    features = LAYOUTS[layout](randn(1, 1100, 2, 3, device=device))
    features[:, [3, 700, 1099]] = 9  # they tie across steps
    _, scale = check_energy(features, 2.0, "max")
    gradient = check_gradient(features, scale, None, 2.0, "max", sizes=10)
    assert gradient.count_nonzero(1).eq(3).all()


def test_the_gradient_of_a_map_may_be_expanded(device: str) -> None:
    features = randn(2, 3, 4, 5, device=device)
    one = torch.ones((), device=device)
    gradient = cuda.gradient(features, one.expand(2), one.expand(2, 4, 5), None, 2.0, "sum")
    torch.testing.assert_close(gradient, 2 * features)


@pytest.fixture
def planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that change what the plans of launches are made of."""
    for cached in (cuda._energy_plans, cuda._gradient_plan):
        monkeypatch.setattr(cuda, cached.__name__, cached.__wrapped__)


@pytest.mark.usefixtures("planned_anew")
@pytest.mark.parametrize("layout", ["contiguous", "cropped"])
def test_offsets_of_64_bits(layout: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LARGEST_OFFSET", 0)
    features = LAYOUTS[layout](randn(2, 3, 4, 5, device=device))
    _, scale = check_energy(features, 2.0, "sum")
    check_gradient(features, scale, None, 2.0, "max")


@pytest.mark.parametrize(("stride", "large"), [(2**31 - 4, False), (2**31 - 3, True)])
def test_offsets_grow_to_64_bits_with_the_reach_of_a_sample(stride: int, large: bool) -> None:
    walk = cuda._walk((9, 2, 2, 2), ((2**40, stride, 2, 1),), itemsize=4)
    assert walk.constants["LARGE"] is large


@pytest.mark.parametrize(
    ("shape", "strides", "unit_c", "unit_n"),
    [
        ((2, 8, 4, 6), (192, 24, 6, 1), 4, 1),
        ((2, 8, 4, 6), (192, 1, 48, 8), 1, 4),
        ((1, 8, 4, 6), (7, 24, 6, 1), 4, 1),
        ((2, 1, 4, 6), (24, 1, 6, 1), 4, 1),
        ((2, 8, 24, 1), (192, 24, 1, 99), 4, 1),
        ((2, 8, 1, 24), (192, 24, 99, 1), 4, 1),
        ((2, 8, 4, 6), (192, 24, 1, 4), 1, 1),
        ((2, 8, 4, 6), (386, 48, 6, 1), 2, 1),
    ],
)
def test_vectors_are_as_long_as_the_strides_of_other_axes_permit(
    shape: tuple[int, ...], strides: tuple[int, ...], unit_c: int, unit_n: int
) -> None:
    walk = cuda._walk(shape, (strides,), itemsize=4)
    assert (walk.constants["UNIT_C"], walk.constants["UNIT_N"]) == (unit_c, unit_n)
    assert walk.channels_inner == (unit_n > 1)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_sample_of_more_than_2_31_entries(layout: str, device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a CUDA device with 16 GB")
    side = 2**15
    features = LAYOUTS[layout](torch.zeros(1, 3, side, side, dtype=torch.float16, device=device))
    features[0, 2, -1, -1] = 3
    energy, scale = cuda.energy(features, 2.0, "sum")
    assert energy[0, -1, -1] == energy.sum() == 9
    gradient = cuda.gradient(features, scale, energy, features, 2.0, "sum")
    assert gradient[0, 2, -1, -1] == gradient.sum() == 2 * 3 * 9 + 3


def test_the_host_does_not_wait_and_answers_repeat(device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a CUDA device")
    features = randn(8, 64, 33, 35, device=device)
    features[3] *= 1e30
    torch.cuda.set_sync_debug_mode("error")
    try:
        answers = [cuda.energy(features, 2.0, "sum") for _ in range(5)]
        energy, scale = answers[0]
        gradients = [cuda.gradient(features, scale, energy, features, 2.0, "sum") for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(answer[0], energy) and torch.equal(answer[1], scale) for answer in answers)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


# --- the scale ----------------------------------------------------------------------------------------------

RANGES = [
    (torch.float32, 2.0, 1e-20, "sum"),
    (torch.float32, 2.0, 1e20, "max"),
    (torch.float32, 2.0, 1e-45, "sum"),
    (torch.float32, 2.0, 3e38, "max"),
    (torch.float32, 1.0, 1e-20, "sum"),
    (torch.float32, 4.0, 1e12, "max"),
    (torch.float32, 64.0, 5.0, "sum"),
    (torch.float32, 2.5, 1e-30, "max"),
    (torch.float64, 2.0, 1e-200, "sum"),
    (torch.float64, 2.0, 5e-324, "max"),
    (torch.float64, 4.0, 1e300, "sum"),
    (torch.float64, 2.0, 1.7e308, "max"),
    (torch.float16, 4.0, 1e-4, "sum"),
    (torch.float16, 64.0, 300.0, "max"),
    (torch.bfloat16, 2.0, 1e-30, "sum"),
]


@pytest.mark.parametrize(("dtype", "p", "largest", "mapping"), RANGES)
def test_a_sample_out_of_bounds_gets_a_scale_and_the_others_keep_theirs(
    dtype: torch.dtype, p: float, largest: float, mapping: str, device: str
) -> None:
    features = torch.rand(3, 5, 4, 6, device=device).to(dtype) + 0.5
    features[1] = torch.linspace(-1, 1, 120, device=device).double().mul(largest).to(dtype).view(5, 4, 6)
    energy, scale = check_energy(features, p, mapping)
    assert scale[0] == scale[2] == 1
    assert scale[1] != 1 and torch.frexp(scale[1]).mantissa == 0.5
    assert SMALLEST_ENERGY <= energy[1].max() <= LARGEST_ENERGY
    assert torch.equal(energy[[0, 2]], cuda.energy(features[[0, 2]], p, mapping)[0])


def test_one_scale_serves_where_the_energy_keeps_within_bounds(device: str) -> None:
    for size in (300.0, 1e-4):
        features = torch.full((2, 5, 4, 6), size, dtype=torch.float16, device=device)
        _, scale = check_energy(features, 2.0, "sum")
        assert scale.eq(1).all()


@pytest.mark.usefixtures("planned_anew")
def test_the_scale_is_found_among_many_blocks_and_channels(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cuda._BOUNDS, "PARTS", 2)
    features = torch.zeros(3, 3, 50, 50, device=device)
    features[0, 2, 49, 49] = 1e30
    features[1, 1, 0, 1] = 1e-30
    features[2, 0, 49, 49] = 5
    _, scale = check_energy(features, 2.0, "sum")
    assert scale.log2().tolist() == [100, -100, 0]


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_and_what_is_not_finite_keep_to_their_samples(
    dtype: torch.dtype, mapping: str, device: str
) -> None:
    features = randn(4, 3, 4, 5, dtype=dtype, device=device)
    features[1] = 0
    features[2, 1, 2, 3] = -float("inf")
    features[3, 1, 2, 3] = float("nan")
    energy, scale = cuda.energy(features, 2.0, mapping)
    check_energy(features[:2], 2.0, mapping)
    assert energy[1].count_nonzero() == 0
    assert energy[2, 2, 3] == float("inf") and energy[3, 2, 3].isnan()
    assert energy[2:].isfinite().sum() == 2 * 20 - 2
    assert scale.eq(1).all()
    gradient = cuda.gradient(features, scale, torch.ones_like(energy), features, 2.0, mapping)
    assert gradient[:2].isfinite().all() and gradient[1].count_nonzero() == 0
    assert gradient.isfinite().logical_not().sum() == 2


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("size", [1e-45, 1e-20, 1e20])
def test_the_gradient_at_a_scale_far_from_one(size: float, p: float, device: str) -> None:
    features = randn(2, 3, 4, 5, device=device) * size
    _, scale = cuda.energy(features, p, "sum")
    assert scale.ne(1).any()
    grad_energy = torch.randn(2, 4, 5, device=device) * scale.view(-1, 1, 1)
    gradient = cuda.gradient(features, scale, grad_energy, None, p, "sum")
    want = reference.gradient(features.double(), scale.double(), grad_energy.double(), None, p, "sum")
    torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-6)


# --- distances of maps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 1500), (70, 70)])
def test_distance_and_its_gradient(
    shape: tuple[int, int], dtype: torch.dtype, squared: bool, device: str
) -> None:
    student, teacher = (torch.rand(6, *shape, device=device).to(dtype) + 0.1 for _ in range(2))
    student[1] *= 2.0**60
    teacher[2] *= 2.0**-40
    student[3], teacher[4], student[5] = 0, 0, teacher[5]
    student, teacher = student.transpose(1, 2), teacher.transpose(1, 2)
    grad = torch.tensor([1.0, 0, -2, 0, 3, 0, 0.5, 0, 0.25, 0, 4], dtype=dtype, device=device)[::2]
    got = cuda.distance(student, teacher, squared)
    slope = cuda.distance_gradient(student, teacher, grad, squared)
    assert got.dtype == slope.dtype == dtype
    wide = student.double(), teacher.double()
    tolerance = {
        "rtol": 1e-6 if dtype == torch.float32 else 1e-12,
        "atol": 1e-7 if shape == (1, 1) else 1e-14,
    }
    torch.testing.assert_close(got.double(), reference.distance(*wide, squared), **tolerance)
    want = reference.distance_gradient(*wide, grad.double(), squared)
    norm = wide[0].flatten(1).norm(dim=1).view(-1, 1, 1)  # gradients go by one over it
    torch.testing.assert_close(slope.double() * norm, want * norm, **(tolerance | {"atol": 1e-7}))
    assert got[5] == 0 and slope[3].count_nonzero() == slope[5].count_nonzero() == 0


def test_distance_of_large_maps_is_left_to_the_reference(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = torch.rand(2, 5, 7, device=device), torch.rand(2, 5, 7, device=device)
    near = cuda.distance(student, teacher, False)
    slope = cuda.distance_gradient(student, teacher, near, False)
    monkeypatch.setattr(cuda, "LARGEST_MAP", 34)
    cuda._map_plan.cache_clear()
    assert cuda._map_plan((2, 5, 7), False) is None
    torch.testing.assert_close(cuda.distance(student, teacher, False), near)
    torch.testing.assert_close(cuda.distance_gradient(student, teacher, near, False), slope)
    cuda._map_plan.cache_clear()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_distance_of_a_map_that_is_not_finite_is_not_finite(bad: float, device: str) -> None:
    student, teacher = torch.rand(2, 5, 7, device=device), torch.rand(2, 5, 7, device=device)
    student[0, 1, 2] = bad
    distance = cuda.distance(student, teacher, False)
    slope = cuda.distance_gradient(student, teacher, torch.ones(2, device=device), False)
    assert distance.isfinite().tolist() == [False, True]
    assert slope.isfinite().flatten(1).all(1).tolist() == [False, True]


# --- the choice of the backend ------------------------------------------------------------------------------


def test_opcheck(device: str) -> None:
    features = randn(2, 3, 4, 5, device=device).requires_grad_()
    with kernels.use_backend("cuda"):
        torch.library.opcheck(kernels.energy, (features, 2.0, "sum"))
        energy, scale = kernels.energy(features.detach(), 2.0, "sum")
        arguments = (features.detach(), scale, energy, features.detach(), 2.0, "sum")
        torch.library.opcheck(kernels.energy_gradient, arguments)


def test_it_serves_those_who_pass_features_on(device: str) -> None:
    features = randn(2, 3, 4, 5, device=device).requires_grad_()
    gradients = {}
    for backend in ("cuda", "reference"):
        with kernels.use_backend(backend):
            passed, energy, scale = kernels.pass_energy(features, 2.0, "sum")
            loss = passed.sin().sum() + (energy * scale.view(-1, 1, 1) ** 2).square().sum()
            (gradients[backend],) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(gradients["cuda"], gradients["reference"])


def test_it_is_chosen_for_cuda_and_on_a_cpu_only_when_asked_for(device: str) -> None:
    features = randn(2, 3, 4, 5, device=device)
    assert (cuda.unsupported(features, 2.0, "sum") is None) == (device == "cuda")
    assert (kernels._backend(features, 2.0, "sum") is cuda) == (device == "cuda")
    with kernels.use_backend("cuda"):
        assert kernels._backend(features, 2.0, "sum") is cuda


@pytest.mark.skipif(INTERPRETED, reason="the interpreter computes on a CPU")
def test_features_on_a_cpu_are_refused() -> None:
    with (
        kernels.use_backend("cuda"),
        pytest.raises(
            ValueError, match="'cuda' was asked for, but it needs features on a CUDA device, not on cpu"
        ),
    ):
        kernels.energy(torch.ones(1, 1, 1, 1), 2.0, "sum")


def test_other_types_are_refused() -> None:
    features = torch.zeros(1, 1, 1, 1, dtype=torch.float8_e5m2)
    assert re.match(
        r"it covers torch.float16, .*, torch.float64, not torch.float8",
        cuda.unsupported(features, 2.0, "sum"),
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_does_not_start_is_passed_over() -> None:
    assert cuda._device_problem(0).startswith("Triton does not start: ")


@pytest.mark.parametrize(("backend", "arch"), [("cuda", 75), ("hip", "gfx942")])
def test_other_devices_are_passed_over(
    backend: str, arch: int | str, ahead: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = SimpleNamespace(backend=backend, arch=arch)
    monkeypatch.setattr(triton.runtime.driver.active, "get_current_target", lambda: target)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    cuda._device_problem.cache_clear()
    assert "NVIDIA device of compute capability 8.0 or more" in cuda._device_problem(0)
    cuda._device_problem.cache_clear()


# --- what they compile to -----------------------------------------------------------------------------------


class H200:
    """As much of a driver as it takes to compile for a device that is not there."""

    def get_current_target(self) -> object:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> str:
        return "ahead of time"

    def get_current_stream(self, device: str) -> None:
        return None


@pytest.fixture
def ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """Launches only compile, for an H200; collects the compiled kernels."""
    if INTERPRETED:
        pytest.skip("the interpreter does not compile")
    compiled = []

    def launcher(kernel: object, grid: tuple[int]) -> object:
        return lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", H200())
    monkeypatch.setattr(triton.runtime.jit.KernelInterface, "__getitem__", launcher)
    return compiled


def widths(kernel: object, instruction: str) -> dict[int, int]:
    """How many `instruction`s on global memory there are of each width in bytes."""
    found = re.findall(rf"{instruction}\.global\S*?(?:\.v(\d))?\.b(\d+) ", kernel.asm["ptx"])
    return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in found)


def stack_bytes(kernel: object, folder: Path) -> int:
    """What the kernel spills, each thread."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", report)[1])


def case(*shape: int, dtype: torch.dtype, layout: str, width: int, slow: bool = True) -> object:
    marks = [pytest.mark.slow] if slow else []
    name = f"{'x'.join(map(str, shape))}-{layout}-{str(dtype)[6:]}"
    return pytest.param(shape, dtype, layout, width, marks=marks, id=name)


WIDTHS = [
    case(64, 256, 56, 56, dtype=torch.float32, layout="contiguous", width=16, slow=False),
    case(64, 256, 56, 56, dtype=torch.bfloat16, layout="channels_last", width=16, slow=False),
    case(64, 512, 14, 14, dtype=torch.bfloat16, layout="contiguous", width=8, slow=False),
    case(64, 512, 14, 14, dtype=torch.float32, layout="contiguous", width=16),
    case(32, 2048, 7, 7, dtype=torch.float32, layout="contiguous", width=4),
    case(32, 2048, 7, 7, dtype=torch.bfloat16, layout="contiguous", width=2),
    *(
        case(*shape, dtype=dtype, layout=layout, width=16)
        for shape in [(128, 16, 32, 32), (128, 64, 32, 32), (16, 256, 56, 56)]
        for dtype in FLOATS
        for layout in ("contiguous", "channels_last")
    ),
    *(
        case(*shape, dtype=dtype, layout="channels_last", width=16)
        for shape in [(64, 512, 14, 14), (32, 2048, 7, 7)]
        for dtype in FLOATS
    ),
]


@pytest.mark.unchecked
@pytest.mark.parametrize(("shape", "dtype", "layout", "width"), WIDTHS)
def test_memory_is_read_and_written_in_whole_vectors(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, width: int, ahead: list, tmp_path: Path
) -> None:
    order = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    features = torch.empty(shape, dtype=dtype, memory_format=order)
    energy, scale = cuda.energy(features, 2.0, "sum")
    cuda.gradient(features, scale, energy, features, 2.0, "sum")
    first, _, last = ahead
    assert set(widths(first, "ld")) == {width}
    assert set(widths(last, "st")) == {width}
    assert widths(last, "ld")[width] >= 2 * widths(last, "st")[width]
    assert sum(widths(last, "ld").values()) <= 2 * widths(last, "st")[width] + 3  # the scale, and a map's
    assert stack_bytes(first, tmp_path) == stack_bytes(last, tmp_path) == 0


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("dtype", "p", "mapping", "layout"),
    [
        (torch.float64, 1.0, "max", "contiguous"),
        (torch.float64, 2.5, "sum", "cropped_channels_last"),
        (torch.bfloat16, 2.0, "max", "cropped"),
        *(
            pytest.param(dtype, p, mapping, layout, marks=pytest.mark.slow)
            for dtype in FLOATS
            for p in [*EXPONENTS, 7.3]
            for mapping in ("sum", "max")
            for layout in ("contiguous", "cropped_channels_last")
        ),
    ],
)
def test_every_case_compiles(dtype: torch.dtype, p: float, mapping: str, layout: str, ahead: list) -> None:
    features = LAYOUTS[layout](torch.empty(4, 24, 9, 8, dtype=dtype))
    energy, scale = cuda.energy(features, p, mapping)
    for above in (None, features.contiguous()):
        cuda.gradient(features, scale, energy, above, p, mapping)
    assert len(ahead) == 4


@pytest.mark.unchecked
@pytest.mark.parametrize("squared", [False, True])
def test_equal_maps_are_not_set_apart_by_the_rounding_of_fused_products(squared: bool, ahead: list) -> None:
    energy = torch.empty(4, 56, 56)
    cuda.distance(energy, energy, squared)
    cuda.distance_gradient(energy, energy, energy[:, 0, 0], squared)
    for kernel in ahead:
        assert "mul.rn.f64" in kernel.asm["ptx"] and "fma.rn.f64" not in kernel.asm["ptx"]
