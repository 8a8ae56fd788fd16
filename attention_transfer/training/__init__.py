"""Training: from a recipe to a run.

Each name is imported, and PyTorch with it, when it is first used.
"""

import lazy_loader

from attention_transfer.runs import Interrupted as Interrupted
from attention_transfer.runs import Recipe as Recipe
from attention_transfer.runs import Run as Run

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "caching": ["build_cache"],
        "evaluation": ["Evaluation", "evaluate_model"],
        "fit": ["resume", "train"],
    },
)
