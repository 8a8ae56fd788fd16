"""Whole programs, which need no code of the model: ONNX and torch.export."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._files import write_atomically
from attention_transfer._onnx import EXTRA, free_dimension, open_onnx, quiet, require_onnx, root_of, to_onnx

from .base import Format, Predict, input_lines, input_of
from .student import Program, Student

CARD = "model_card.json"
"""Where a .pt2 holds the card."""


class Onnx(Format):
    name, path, tolerance = "onnx", "model.onnx", 1e-4
    summary = "The whole program, for onnxruntime and others, with the card as metadata; any batch size."

    def check(self, student: Student) -> None:
        require_onnx("export: onnx")

    def write(self, student: Student, path: Path) -> None:
        onnx = require("onnx", extra=EXTRA, user="export: onnx")
        traced = {_input_name(student): _example(student)}
        proto = to_onnx(_program(student), traced, ["logits"], free_batch=True, user="export: onnx")
        onnx.helper.set_model_props(proto, student.card.as_metadata())
        write_atomically(path, proto.SerializeToString())

    def load(self, student: Student, path: Path) -> Predict:
        session, name = open_onnx(path, user="export: onnx"), _input_name(student)
        return lambda pixels: torch.from_numpy(
            session.run(["logits"], {name: input_of(student, pixels).numpy()})[0]
        )

    def snippet(self, student: Student) -> str:
        making, name = input_lines(student)
        return (
            "import onnxruntime\nimport torch\n\n"
            f'session = onnxruntime.InferenceSession("{self.path}")\n'
            f'{making}\n(logits,) = session.run(["logits"], {{"{_input_name(student)}": {name}.numpy()}})'
        )


class TorchExport(Format):
    name, path, tolerance = "torch-export", "model.pt2", 1e-5
    summary = "The whole program, for `torch.export.load` and AOTInductor; any batch size."

    def write(self, student: Student, path: Path) -> None:
        shapes = {"images": {0: free_dimension()}}
        try:
            with quiet(), torch.no_grad():
                program = torch.export.export(_program(student), (_example(student),), dynamic_shapes=shapes)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
            raise InputError(
                f"export: torch-export: expected a module that torch can export, got: {root_of(error)}"
            ) from None
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        extra = {CARD: student.card.as_json()}
        write_atomically(path, lambda file: torch.export.save(program, file, extra_files=extra))

    def load(self, student: Student, path: Path) -> Predict:
        program = torch.export.load(path).module()
        return lambda pixels: program(input_of(student, pixels))

    def snippet(self, student: Student) -> str:
        making, name = input_lines(student)
        return (
            f'import torch\n\nprogram = torch.export.load("{self.path}").module()\n{making}\n'
            f"with torch.no_grad():\n    logits = program({name})"
        )


def _program(student: Student) -> Program:
    return Program(student.model, student.augment if student.input == "pixels" else None)


def _example(student: Student) -> Tensor:
    return input_of(student, student.pixels[:3])


def _input_name(student: Student) -> str:
    """What an ONNX file calls its input: uint8 `pixels`, or float32 `images`."""
    return "pixels" if student.input == "pixels" else "images"
