"""Models by name, the paper's networks, and weights on disk."""

from .._channels import why_not as why_not
from .._trust import trusting as trusting
from .build import build_model as build_model
from .build import is_of_timm as is_of_timm
from .build import pretrained_statistics as pretrained_statistics
from .build import size_options as size_options
from .nin import NetworkInNetwork as NetworkInNetwork
from .sizes import native_size as native_size
from .weights import LoadReport as LoadReport
from .weights import Mismatch as Mismatch
from .weights import fingerprint as fingerprint
from .weights import load_weights as load_weights
from .weights import read_metadata as read_metadata
from .weights import save_weights as save_weights
from .wide_resnet import WideResNet as WideResNet
