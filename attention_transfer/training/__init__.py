"""Training: from a recipe to a run.

The names in `__init__.pyi` are imported, and PyTorch with them, when they are first used.
"""

import lazy_loader

# where they were before they had a room of their own
from attention_transfer.runs import Interrupted, Recipe, Run  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
