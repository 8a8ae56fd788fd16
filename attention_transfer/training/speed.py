"""What a run does to be fast on the device that it finds, by a rule that can be read here.

* Arithmetic, where the recipe's precision is "auto": bf16-mixed on a GPU or CPU that computes in bfloat16
  itself (on x86: AVX512-BF16 or AMX), 32-true elsewhere. Emulated bfloat16 is slower than float32. The
  teacher computes as the student does, unless another precision is asked of it.
* Layout: models and images are channels-last, always: convolutions are faster so, 1.2 to 1.4 times on a CPU.
* Compiled code on request only: compiling takes longer than a short run.
* Freed memory is kept, by the command and on a CPU: see `_memory`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from attention_transfer._errors import InputError
from attention_transfer._memory import freed_memory
from attention_transfer._quiet import muted
from attention_transfer._reading import first_line
from attention_transfer.runs.recipe import Precision, Recipe

Device = Literal["cpu", "cuda", "mps"]
NAMES: dict[Device, str] = {"cpu": "CPU", "cuda": "GPU", "mps": "Mac GPU"}


@dataclass(frozen=True)
class Speed:
    """What was chosen, and why."""

    device: Device
    precision: Precision
    reason: str
    teacher: str
    compiled: bool

    def __str__(self) -> str:
        chosen = [f"{self.precision} ({self.reason})"]
        chosen += [f"teacher {self.teacher} (as asked)"] if self.teacher != "auto" else []
        chosen += ["channels-last"]
        chosen += [freed_memory()] if self.device == "cpu" else []
        return "speed: " + ", ".join([*chosen, "compiled" if self.compiled else "not compiled"])


def choose_speed(recipe: Recipe) -> Speed:
    """What a run of this recipe will do on this machine.

    Raises:
        ValueError: if it is to be compiled and nothing can be.
    """
    device = device_of(recipe)
    precision, reason = recipe.precision, "as asked"
    if precision == "auto":
        fast = computes_in_bfloat16(device)
        precision = "bf16-mixed" if fast else "32-true"
        reason = f"this {NAMES[device]} has {'' if fast else 'no known '}bfloat16 arithmetic"
    if recipe.compile:
        check_compiler(device)
    return Speed(device, precision, reason, recipe.teacher_precision, recipe.compile)


def device_of(recipe: Recipe) -> Device:
    """The kind of device that Lightning takes for this recipe."""
    if recipe.accelerator != "auto":
        return recipe.accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def computes_in_bfloat16(device: Device) -> bool:
    """Whether bfloat16 is known to be faster than float32 there."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps" or not hasattr(torch.cpu, "get_capabilities"):  # it came after torch 2.6
        return False
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def check_compiler(device: Device) -> None:
    """Compile and run one line, nothing of it from a cache.

    Raises:
        ValueError: if it fails, with the reason.
    """
    double = torch.compile(lambda x: 2 * x, options={"force_disable_caches": True})
    try:
        with muted():
            double(torch.ones(2, device=device))
    except Exception as error:
        raise InputError(
            "train: --compile needs PyTorch's compiler, which does not work here "
            f"({first_line(error):.200}). On a CPU it takes a C++ compiler, such as g++. Install one, or "
            "leave --compile out."
        ) from None


def prepare(model: nn.Module, *, compiled: bool) -> None:
    """Lay a model out channels-last and, on request, compile its calls; the names in its state stay."""
    model.to(memory_format=torch.channels_last)
    if compiled:
        model.compile(dynamic=False)  # for full batches; `uncompiled` runs the others


def uncompiled(eager: bool = True) -> AbstractContextManager[object]:
    """Where compiled models run as they were written."""
    return torch.compiler.set_stance("force_eager") if eager else nullcontext()
