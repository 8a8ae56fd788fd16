"""What would stop a student once its teacher is trained, hours later, found on a few images before."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import nn

from attention_transfer.data import Splits
from attention_transfer.preflight import PreflightWarning
from attention_transfer.runs.recipe import Recipe
from attention_transfer.training.build import Teacher, build_augment, build_distiller, build_student

IMAGES = 8


def rehearse(recipe: Recipe, splits: Splits, student: nn.Module, teacher: Recipe) -> None:
    """Take a student's first step, all but the update, from a teacher that `teacher` is yet to train.

    What the untrained teacher sees teaches nothing, so nothing is said of it: only errors count. It draws
    other weights than those it is trained from, as a student of the same make and seed would be its copy.
    Student and random state are left as they were.

    Raises:
        ValueError: for layers, maps, classes or terms that do not fit each other, as `Distiller.preflight`.
    """
    rows = torch.linspace(0, len(splits.train) - 1, min(IMAGES, len(splits.train))).long()
    images = splits.train.select(rows)
    inputs = build_augment(recipe, splits).normalise(images.decoded())
    plain = replace(recipe, teacher_precision="auto")  # that of the device, which need not be this one
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", PreflightWarning)
        other = replace(teacher, seed=(teacher.seed + 1) % 2**32)
        model = build_student(other, splits, role="teacher")
        distiller = build_distiller(
            plain, student, Teacher(teacher.student, model, splits.num_classes, None), inputs[:2]
        )
        distiller.settle(distiller.balance(inputs, images.labels))
        distiller.preflight(inputs, images.labels, classes=splits.num_classes)
