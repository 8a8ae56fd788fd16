"""Models by name, the paper's networks, and weights on disk."""

from .._trust import trusting as trusting
from .build import build_model as build_model
from .build import is_of_timm as is_of_timm
from .build import pretrained_statistics as pretrained_statistics
from .nin import NetworkInNetwork as NetworkInNetwork
from .weights import LoadReport as LoadReport
from .weights import Mismatch as Mismatch
from .weights import fingerprint as fingerprint
from .weights import load_weights as load_weights
from .weights import read_metadata as read_metadata
from .weights import save_weights as save_weights
from .wide_resnet import WideResNet as WideResNet
