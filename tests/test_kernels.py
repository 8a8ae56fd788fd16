"""The energy operator: against a plain formula, its registration, and the seam for further backends."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attention_transfer import kernels

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
def test_opcheck(mapping: str, p: float, dtype: torch.dtype) -> None:
    features = torch.randn(2, 3, 4, 5, dtype=dtype, requires_grad=True)
    torch.library.opcheck(kernels.energy, (features, p, mapping))


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1e-20, 1.0, 3e38])
def test_scale_is_a_power_of_two_that_brings_the_energy_into_range(largest: float) -> None:
    features = torch.tensor([largest, largest / 3]).view(1, 2, 1, 1)
    relative, scale = kernels.energy(features, 2.0, "sum")
    assert torch.frexp(scale).mantissa == 0.5
    assert 1 <= relative <= 8


BACKEND = """
    import torch
    from attention_transfer.kernels import reference

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
