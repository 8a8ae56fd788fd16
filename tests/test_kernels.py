"""The energy operator: against a plain formula, its registration, and the seam for further backends."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attention_transfer import kernels
from attention_transfer.kernels import reference
from attention_transfer.kernels.reference import LARGEST_ENERGY, SMALLEST_ENERGY, accumulation_dtype

BACKENDS = ["reference", *(["cpu"] if importlib.util.find_spec("numba") else [])]
EXPONENTS = [1.0, 1.5, 2.0, 3.0, 4.0]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def plain_energy(features: Tensor, p: float, mapping: str) -> Tensor:
    powers = features.double().abs() ** p
    return powers.amax(1) if mapping == "max" else powers.sum(1)


def energy(features: Tensor, p: float, mapping: str) -> Tensor:
    relative, scale = kernels.energy(features, p, mapping)
    return relative * scale.view(-1, 1, 1) ** p


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_energy_is_the_plain_formula(mapping: str, p: float, layout: str, dtype: torch.dtype) -> None:
    features = LAYOUTS[layout](torch.randn(3, 5, 7, 4).to(dtype))
    torch.testing.assert_close(
        energy(features, p, mapping).double(),
        plain_energy(features, p, mapping),
        rtol=1e-13 if dtype == torch.float64 else 2e-6,
        atol=0,
    )


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_that_of_the_plain_formula(mapping: str, p: float, layout: str) -> None:
    features = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    features[0, :2] = 0.75  # tied channels
    features[1, :, 0, 0] = 0
    mine = LAYOUTS[layout](features).requires_grad_()
    theirs = features.clone().requires_grad_()
    upstream = torch.randn(2, 3, 4, dtype=torch.float64)
    (grad,) = torch.autograd.grad(energy(mine, p, mapping), mine, upstream)
    (want,) = torch.autograd.grad(plain_energy(theirs, p, mapping), theirs, upstream)
    torch.testing.assert_close(grad, want.nan_to_num(0))


@pytest.mark.parametrize("p", EXPONENTS)
def test_second_derivative_is_finite_at_zero(p: float) -> None:
    features = torch.zeros(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(energy(features, p, "sum").sum(), features, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), features)
    assert grad.count_nonzero() == 0
    assert second.isfinite().all()


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck's own doing
@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, mapping: str, p: float, dtype: torch.dtype) -> None:
    features = torch.randn(2, 3, 4, 5, dtype=dtype, requires_grad=True)
    with kernels.use_backend(backend):
        torch.library.opcheck(kernels.energy, (features, p, mapping))
        energy, scale = kernels.energy(features.detach(), p, mapping)
        for above in (None, torch.randn(2, 3, 4, 5, dtype=dtype)):
            arguments = (features.detach(), scale, energy, above, p, mapping)
            torch.library.opcheck(kernels.energy_gradient, arguments)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0, 64.0])
@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1e-20, 1.0, 3e38])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_is_a_power_of_two_that_brings_the_energy_into_range(
    backend: str, largest: float, p: float
) -> None:
    features = torch.tensor([largest, largest / 3]).view(1, 2, 1, 1)
    with kernels.use_backend(backend):
        relative, scale = kernels.energy(features, p, "sum")
    assert torch.frexp(scale).mantissa == 0.5
    assert SMALLEST_ENERGY <= relative <= LARGEST_ENERGY


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sample_has_its_own_scale_and_keeps_what_is_not_finite(backend: str, mapping: str) -> None:
    features = torch.randn(5, 3, 4, 5)
    features[0] *= 1e-30
    features[1] *= 1e30
    features[2] = 0
    features[3, 1, 2, 3] = float("inf")
    features[4, 1, 2, 3] = float("nan")
    with kernels.use_backend(backend):
        relative, scale = kernels.energy(features, 2.0, mapping)
        alone = kernels.energy(features[1:2], 2.0, mapping)[0]
    peaks = relative[:2].flatten(1).amax(1)
    assert ((peaks >= SMALLEST_ENERGY) & (peaks <= LARGEST_ENERGY)).all()
    assert torch.equal(relative[1:2], alone)
    assert relative[2].count_nonzero() == 0 and scale[2] == 1
    assert relative[3, 2, 3] == float("inf") and relative[4, 2, 3].isnan()
    assert relative[3:].isfinite().sum() == 2 * 20 - 2


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("above", ["none", "contiguous", "channels_last", "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_gradient_is_that_of_the_reference(
    layout: str, above: str, dtype: torch.dtype, p: float, mapping: str
) -> None:
    features = LAYOUTS[layout](torch.randn(3, 6, 5, 7).to(dtype))
    features[0, :2] = features[0, 2:4]  # ties
    grads = {
        "none": None,
        "contiguous": torch.randn(3, 6, 5, 7).to(dtype),
        "channels_last": torch.randn(3, 5, 7, 6).to(dtype).permute(0, 3, 1, 2),
        "expanded": torch.randn(3, 6, 1, 1).to(dtype).expand(3, 6, 5, 7),
    }
    scale = torch.tensor([0.5, 1.0, 2.0]).to(accumulation_dtype(dtype))
    grad_energy = torch.randn(3, 5, 7).to(scale.dtype)
    gradient = kernels.energy_gradient(features, scale, grad_energy, grads[above], p, mapping)
    want = reference.gradient(
        features.double(),
        scale.double(),
        grad_energy.double(),
        None if grads[above] is None else grads[above].double(),
        p,
        mapping,
    )
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), want, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 3, 1, 1500), (2, 2, 40, 60), (1, 70, 3, 3), (4, 16, 32, 33)]
)
@pytest.mark.parametrize("layout", [*LAYOUTS, "cropped", "expanded"])
def test_every_shape_and_stride_is_read_without_a_copy(shape: tuple[int, ...], layout: str) -> None:
    whole = torch.randn(shape)
    views = {
        "cropped": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
        "expanded": lambda x: x[:, :1].expand_as(x),
    }
    features = (LAYOUTS | views)[layout](whole)
    torch.testing.assert_close(
        energy(features, 2.0, "sum").double(), plain_energy(features, 2.0, "sum"), rtol=2e-6, atol=0
    )
    largest = kernels.energy(features, 1.0, "max")
    torch.testing.assert_close(largest[0] * largest[1].view(-1, 1, 1), features.abs().amax(1))
    ones = torch.ones(shape[0])
    gradient = kernels.energy_gradient(features, ones, torch.ones_like(features[:, 0]), None, 2.0, "sum")
    torch.testing.assert_close(gradient, 2 * features)


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_passing_on_gives_the_features_the_energy_and_the_sum_of_both_gradients(
    p: float, mapping: str
) -> None:
    features = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    mine, plain = features.clone().requires_grad_(), features.clone().requires_grad_()
    weight, upstream = torch.randn(2, 5, 3, 4).double(), torch.randn(2, 3, 4).double()
    passed, relative, scale = kernels.pass_energy(mine, p, mapping)
    assert torch.equal(passed, features)
    assert passed.data_ptr() == mine.data_ptr()
    loss = (passed.sin() * weight).sum() + (relative * scale.view(-1, 1, 1) ** p * upstream).sum()
    (got,) = torch.autograd.grad(loss, mine)
    loss = (plain.sin() * weight).sum() + (plain_energy(plain, p, mapping) * upstream).sum()
    torch.testing.assert_close(got, torch.autograd.grad(loss, plain)[0])


@pytest.mark.parametrize("used", ["features", "energy", "neither"])
def test_what_is_not_used_of_what_was_passed_on_has_no_gradient(used: str) -> None:
    features = torch.randn(2, 5, 3, 4, requires_grad=True)
    passed, relative, _ = kernels.pass_energy(features * 1, 2.0, "sum")
    loss = {"features": passed.sum(), "energy": relative.sum(), "neither": features.sum()}[used]
    loss.backward()
    want = {
        "features": torch.ones_like(features),
        "energy": 2 * features,
        "neither": torch.ones_like(features),
    }
    torch.testing.assert_close(features.grad, want[used].detach())


@pytest.mark.parametrize("mapping", ["sum", "max"])
@pytest.mark.parametrize("p", EXPONENTS)
def test_passing_on_can_be_differentiated_twice(p: float, mapping: str) -> None:
    features = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)

    def both(features: Tensor) -> tuple[Tensor, Tensor]:
        passed, relative, _ = kernels.pass_energy(features, p, mapping)
        return passed.sin(), relative

    assert torch.autograd.gradgradcheck(both, features)


def test_the_energy_may_be_computed_from_many_threads_at_once() -> None:
    features = [torch.randn(4, 8, 32, 64) for _ in range(8)]
    want = [kernels.energy(each, 2.0, "sum")[0] for each in features]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            got = pool.map(lambda each: kernels.energy(each, 2.0, "sum")[0], features)
            assert all(map(torch.equal, got, want))


def test_the_compiled_backend_heeds_the_number_of_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    numba = pytest.importorskip("numba")
    from attention_transfer.kernels import cpu

    used = []
    monkeypatch.setattr(cpu._sum_kernel, "serial", lambda *_: used.append(1))
    monkeypatch.setattr(cpu._sum_kernel, "parallel", lambda *_: used.append(numba.get_num_threads()))
    most, before = numba.config.NUMBA_NUM_THREADS, torch.get_num_threads()
    try:
        for threads in (1, 2, 10_000):
            torch.set_num_threads(threads)
            cpu._sum_kernel(cpu.GRAIN)
            cpu._sum_kernel(cpu.GRAIN - 1)
    finally:
        torch.set_num_threads(before)
    assert used == [1, 1, min(2, most), 1, most, 1]


THREADS = """
import torch
from attention_transfer import kernels

torch.set_num_threads(2)
with kernels.use_backend("cpu"):
    kernels.energy(torch.randn(4, 8, 64, 64), 2.0, "sum")
assert torch.get_num_threads() == 2, torch.get_num_threads()
"""


def test_the_compiled_backend_leaves_the_number_of_threads_of_torch_alone() -> None:
    pytest.importorskip("numba")
    environment = os.environ | {"NUMBA_NUM_THREADS": "4"}
    command = [sys.executable, "-W", "ignore", "-c", THREADS]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


BITS = """
import hashlib, torch
import attention_transfer as at

torch.set_num_threads(1)
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for mapping in ("sum", "max"):
        for memory in (torch.contiguous_format, torch.channels_last):
            student, teacher = (
                torch.randn(4, 32, 9, 8).to(dtype).contiguous(memory_format=memory) for _ in range(2)
            )
            student.requires_grad_()
            loss = at.attention_transfer_loss(student, teacher, beta=1.0, mapping=mapping)
            loss.backward()
            digest.update(str(loss.item()).encode() + student.grad.double().contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def test_compiling_and_loading_give_the_same_bits(tmp_path: Path) -> None:
    """A run may be begun by the process that compiles the kernels, and resumed by one that loads them."""
    pytest.importorskip("numba")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", BITS]
    runs = [subprocess.run(command, capture_output=True, text=True, env=environment) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs
    assert list(tmp_path.rglob("*.nbc"))
    assert runs[0].stdout == runs[1].stdout


FORKED = """
import os, torch
from attention_transfer import kernels

features = torch.randn(4, 8, 64, 64)
torch.set_num_threads(2)
with kernels.use_backend("cpu"):
    want = kernels.energy(features, 2.0, "sum")[0]
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(kernels.energy(features, 2.0, "sum")[0], want) else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_compiled_backend_works_in_a_forked_process() -> None:
    pytest.importorskip("numba")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (torch.zeros(1, 1, 2, 2, device="meta"), "it takes dense tensors on the CPU, got .* one on meta"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.float8_e5m2), "it takes float16, .*, got torch.float8_e5m2"),
    ],
)
def test_the_compiled_backend_says_what_it_does_not_cover(features: Tensor, reason: str) -> None:
    pytest.importorskip("numba")
    from attention_transfer.kernels import cpu

    assert re.match(reason, cpu.unsupported(features, 2.0, "sum"))


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    caching = pytest.importorskip("numba.core.caching")
    from attention_transfer.kernels import cpu

    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    kernel = cpu._Kernel(lambda out: out.fill(3))
    out = torch.zeros(2)
    kernel(1, out.numpy())
    assert out.tolist() == [3, 3]


# --- distances of maps --------------------------------------------------------------------------------------


def maps() -> tuple[Tensor, Tensor]:
    """Energies whose samples are far apart, one that is zero on either side, and one equal pair."""
    student, teacher = torch.rand(6, 5, 7, dtype=torch.float64), torch.rand(6, 5, 7, dtype=torch.float64)
    student[1] *= 2.0**40
    teacher[2] *= 2.0**-30
    student[3], teacher[4], student[5] = 0, 0, teacher[5]
    return student, teacher


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_distance_and_its_gradient_are_those_of_the_plain_formula(
    backend: str, dtype: torch.dtype, squared: bool
) -> None:
    student, teacher = (each.to(dtype).transpose(1, 2).requires_grad_() for each in maps())
    plain = [each.detach().double().requires_grad_() for each in (student, teacher)]
    y_s, y_t = (
        each.flatten(1) / each.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-300) for each in plain
    )
    want = (y_s - y_t).square().sum(1) if squared else (y_s - y_t).norm(dim=1)
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.25, 4.0], dtype=dtype)
    with kernels.use_backend(backend):
        got = kernels.distance(student, teacher, squared=squared)
        grads = torch.autograd.grad(got, (student, teacher), upstream)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 0.0}
    torch.testing.assert_close(got.double(), want, **tolerance)
    assert got[5] == 0 and all(grad[5].count_nonzero() == 0 for grad in grads)
    assert grads[0][3].count_nonzero() == 0 and grads[1][4].count_nonzero() == 0  # zero maps stay
    wanted = torch.autograd.grad(want, plain, upstream.double())
    for energy, grad, each, zero in zip(plain, grads, wanted, (3, 4), strict=True):
        rows = [row for row in range(5) if row != zero]
        norm = energy.detach()[rows].flatten(1).norm(dim=1).view(-1, 1, 1)  # gradients go by one over it
        tolerance["atol"] = tolerance["rtol"]
        torch.testing.assert_close(grad[rows] * norm, each[rows] * norm, check_dtype=False, **tolerance)


@pytest.mark.parametrize("squared", [False, True])
def test_distance_can_be_differentiated_twice(squared: bool) -> None:
    inputs = [torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *maps: kernels.distance(*maps, squared=squared), inputs)
    assert torch.autograd.gradgradcheck(lambda *maps: kernels.distance(*maps, squared=squared), inputs)


def test_distance_of_a_map_that_is_not_finite_is_not_finite() -> None:
    student, teacher = maps()
    for bad in (float("inf"), float("nan")):
        student[0, 1, 2] = bad
        assert not kernels.distance(student, teacher, squared=False)[0].isfinite()


# --- the seam -----------------------------------------------------------------------------------------------


BACKEND = """
    import torch
    from attention_transfer.kernels import reference
    from attention_transfer.kernels.reference import distance, distance_gradient, gradient

    def unsupported(features, p, mapping):
        return None if p == 2 else f"it covers only p = 2, not p = {p:g}"

    def energy(features, p, mapping):
        energy, scale = reference.energy(features, p, mapping)
        return 0 * energy + 42, scale
"""


@pytest.fixture
def added_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Adding a backend is adding a file; this one is recognised by its answer, 42."""
    (tmp_path / "answer.py").write_text(textwrap.dedent(BACKEND))
    (tmp_path / "broken.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    return "answer"


def test_backends_are_the_files_of_the_folder(added_backend: str) -> None:
    assert kernels.backends() == [*sorted(set(kernels.backends()) - {"reference"}), "reference"]
    assert added_backend in kernels.backends()


def test_automatic_choice_takes_the_first_backend_that_covers_the_case(added_backend: str) -> None:
    features = torch.randn(1, 2, 3, 3)
    assert (kernels.energy(features, 2.0, "sum")[0] == 42).all()
    torch.testing.assert_close(energy(features, 3.0, "sum"), plain_energy(features, 3.0, "sum").float())


def test_an_explicit_backend_computes_or_raises(added_backend: str) -> None:
    features = torch.randn(1, 2, 3, 3)
    with kernels.use_backend("reference"):
        torch.testing.assert_close(energy(features, 2.0, "sum"), plain_energy(features, 2.0, "sum").float())
    with kernels.use_backend(added_backend):
        assert (kernels.energy(features, 2.0, "sum")[0] == 42).all()
        with pytest.raises(
            ValueError, match=r"backend 'answer' was asked for, but it covers only p = 2, not p = 3"
        ):
            kernels.energy(features, 3.0, "sum")
    with kernels.use_backend("broken"), pytest.raises(ImportError, match="a_package_that_is_not_installed"):
        kernels.energy(features, 2.0, "sum")


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"use_backend: expected one of \[.*'reference'\], got 'refrence'"):
        with kernels.use_backend("refrence"):
            pass


def test_gradient_of_an_added_backend_is_the_same_closed_form(added_backend: str) -> None:
    features = torch.randn(1, 2, 3, 3, requires_grad=True)
    kernels.energy(features, 2.0, "sum")[0].sum().backward()
    scale = kernels.energy(features, 2.0, "sum")[1].view(-1, 1, 1, 1)
    torch.testing.assert_close(features.grad, 2 * features.detach() / scale**2)
