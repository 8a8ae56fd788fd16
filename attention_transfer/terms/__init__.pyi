from .activation import ActivationTransfer as ActivationTransfer
from .attention import AttentionTransfer as AttentionTransfer
from .declaration import Declaration as Declaration
from .declaration import Energy as Energy
from .declaration import Range as Range
from .declaration import Setting as Setting
from .distillation import KnowledgeDistillation as KnowledgeDistillation
from .flip_symmetry import FlipSymmetry as FlipSymmetry
from .gradient import GradientTransfer as GradientTransfer
from .input_gradient_norm import InputGradientNorm as InputGradientNorm
from .term import Observation as Observation
from .term import Reading as Reading
from .term import Term as Term

FILES: tuple[str, ...]
