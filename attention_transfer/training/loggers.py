"""Where a run's numbers and pictures go besides the run folder: Lightning's loggers, by name."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from attention_transfer._errors import InputError
from attention_transfer._extras import require
from attention_transfer._files import links_in, write_atomically
from attention_transfer._reading import parse_json, read_text
from attention_transfer._tables import printable
from attention_transfer.runs.recipe import Recipe, loggers_of
from attention_transfer.runs.run import Run

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

PROJECT = "attention-transfer"
LOCAL_MLFLOW = "sqlite:///mlflow.db"  # MLflow's own default; where MLFLOW_TRACKING_URI says nothing else


def build_loggers(run: Run, recipe: Recipe) -> list[Logger]:
    """The recipe's loggers; a resumed run goes on with the one run it has in each of them.

    Raises:
        ImportError: if a logger's package is not installed; the message names the extra.
    """
    return [_BUILDERS[name](run, recipe) for name in loggers_of(recipe.loggers)]


def _tensorboard(run: Run, recipe: Recipe) -> Logger:
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(run.folder, name="tensorboard", version="")


def _wandb(run: Run, recipe: Recipe) -> Logger:
    require("wandb", extra="loggers", user="train")
    from lightning.pytorch.loggers import WandbLogger

    identity = _remembered(run, "wandb", uuid.uuid4().hex[:16])
    logger = WandbLogger(
        project=PROJECT, name=printable(run.folder.name), save_dir=run.folder, id=identity, resume="allow"
    )
    logger.log_hyperparams(asdict(recipe))
    return logger


def _mlflow(run: Run, recipe: Recipe) -> Logger:
    require("mlflow", extra="loggers", user="train")
    from lightning.pytorch.loggers import MLFlowLogger

    address = os.environ.get("MLFLOW_TRACKING_URI", LOCAL_MLFLOW)
    if address == LOCAL_MLFLOW:
        # guard: logger-links
        _check_links()
    known = _identities(run).get("mlflow")
    logger = MLFlowLogger(PROJECT, run_name=printable(run.folder.name), tracking_uri=address, run_id=known)
    if known is None:
        _remembered(run, "mlflow", str(logger.run_id))
        logger.log_hyperparams(asdict(recipe))
    return logger


def _check_links() -> None:
    """Raise OSError if what MLflow writes into the current folder would go through a link."""
    here = Path()
    places = [here / "mlruns", *here.glob("mlflow.db*")]  # a journal beside the database
    for link in [*(each for each in places if each.is_symlink()), *links_in(here / "mlruns")]:
        raise OSError(
            f"train: expected MLflow's own files in the current folder, got a link at {link}, which may lead "
            "anywhere. Remove it, or name the place by MLFLOW_TRACKING_URI."
        )


_BUILDERS = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


def log_pictures(
    loggers: Sequence[Logger], name: str, pictures: UInt8[np.ndarray, "n h w 3"], step: int
) -> None:
    """Send some pictures to every logger that shows pictures."""
    from lightning.pytorch import loggers as known

    for logger in loggers:
        if isinstance(logger, known.TensorBoardLogger):
            logger.experiment.add_images(name, pictures, step, dataformats="NHWC")
        elif isinstance(logger, known.WandbLogger):
            logger.log_image(name, list(pictures), step=step)
        elif isinstance(logger, known.MLFlowLogger):
            for position, picture in enumerate(pictures):
                logger.experiment.log_image(logger.run_id, picture, key=f"{name}-{position}", step=step)


def _identities(run: Run) -> dict[str, str]:
    path = _identity_file(run)
    if not path.exists():
        return {}
    try:
        known = parse_json(read_text(path))
        if not isinstance(known, dict) or not all(isinstance(each, str) for each in known.values()):
            raise InputError("no JSON object of texts")
    except ValueError as error:
        raise InputError(
            f"train: expected the run's names with its loggers in {path}, got a damaged file ({error}). "
            "Delete it: the loggers begin a new run."
        ) from None
    return known


def _remembered(run: Run, name: str, identity: str) -> str:
    """The run's identity with a logger: what was written down before, or else this one."""
    known = {name: identity, **_identities(run)}
    write_atomically(_identity_file(run), json.dumps(known, indent=2) + "\n")
    return known[name]


def _identity_file(run: Run) -> Path:
    return run.folder / "loggers.json"
