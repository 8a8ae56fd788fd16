from . import caffe as caffe
from . import data as data
from . import distiller as distiller
from . import functional as functional
from . import kernels as kernels
from . import losses as losses
from . import models as models
from . import pairs as pairs
from . import taps as taps
from . import training as training
from . import visualize as visualize
from .distiller import Distiller as Distiller
from .distiller import InputTransform as InputTransform
from .functional import attention_map as attention_map
from .functional import attention_transfer_loss as attention_transfer_loss
from .functional import convert_beta as convert_beta
from .functional import distillation_loss as distillation_loss
from .losses import AttentionTransfer as AttentionTransfer
from .losses import KnowledgeDistillation as KnowledgeDistillation
from .models import build_model as build_model
from .models import load_weights as load_weights
from .models import save_weights as save_weights
from .pairs import Pair as Pair
from .pairs import suggest_pairs as suggest_pairs
from .taps import Taps as Taps

__version__: str
