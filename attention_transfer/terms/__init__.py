"""The terms of a distillation loss: a file a term, which declares it and defines it.

The public names stand in `__init__.pyi`; each is imported, and PyTorch with it, when it is first used. To add
a term, write its file, and add it to `FILES` and to the public names.
"""

import lazy_loader

FILES = ("attention", "distillation", "activation", "gradient", "flip_symmetry", "input_gradient_norm")
"""The terms' files, in the order in which a method names them: at+kd+..."""

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
