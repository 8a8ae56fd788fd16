"""All formats, by name."""

from __future__ import annotations

from .base import Format
from .programs import Onnx, TorchExport
from .timm_folder import TimmFolder
from .weights import Safetensors, StateDict

FORMATS: dict[str, Format] = {
    each.name: each for each in (Safetensors(), StateDict(), Onnx(), TorchExport(), TimmFolder())
}
