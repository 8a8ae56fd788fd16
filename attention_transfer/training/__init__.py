"""Training: the recipe of a run, the run itself, and the folder that keeps it.

Each name is imported when it is first used: `train` needs models and data, `Recipe` and `Run` do not.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
