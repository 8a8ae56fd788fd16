"""The words that options are chosen from, apart from the code they steer: reading them loads no torch."""

from __future__ import annotations

from typing import Literal

Mapping = Literal["sum", "max"]
Form = Literal["paper", "code", "caffe"]
Side = Literal["student", "teacher"]
Stored = Literal["float16", "uint8"]
Schedule = Literal["constant", "linear", "cosine", "step"]
ExportFormat = Literal["safetensors", "torch", "onnx", "torch-export", "timm"]
ProgramInput = Literal["pixels", "normalised"]
