"""Runs: the recipe of a run, and the folder that keeps it. Loads no PyTorch."""

from attention_transfer.runs.recipe import Recipe
from attention_transfer.runs.run import Interrupted, Run

__all__ = ["Interrupted", "Recipe", "Run"]
