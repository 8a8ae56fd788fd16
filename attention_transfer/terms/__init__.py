"""The terms of a distillation loss: a file a term, which declares it and defines it.

Each name is imported, and PyTorch with it, when it is first used. To add a term, write its file and add it
to the two tables below.
"""

import lazy_loader

FILES = ("attention", "distillation", "activation", "gradient", "flip_symmetry", "input_gradient_norm")
"""The terms' files, in the order in which a method names them: at+kd+..."""

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "attention": ["AttentionTransfer"],
        "distillation": ["KnowledgeDistillation"],
        "activation": ["ActivationTransfer"],
        "gradient": ["GradientTransfer"],
        "flip_symmetry": ["FlipSymmetry"],
        "input_gradient_norm": ["InputGradientNorm"],
        "term": ["Observation", "Reading", "Term"],
        "declaration": ["Declaration", "Energy", "Range", "Setting"],
    },
)
