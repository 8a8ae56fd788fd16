"""Attention transfer: train a small convolutional network to look where a large one looks.

The method of Zagoruyko & Komodakis, "Paying More Attention to Attention" (ICLR 2017), for any PyTorch model.

The public names stand in `__init__.pyi`; each is imported, and torch with it, when it is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
