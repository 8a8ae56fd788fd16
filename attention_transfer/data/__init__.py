"""Data sets by name or path, batches in a reproducible order, and augmentation on the device."""

from .augment import Augment as Augment
from .batches import Batches as Batches
from .classes import class_order as class_order
from .classes import match_classes as match_classes
from .classes import unknown_classes as unknown_classes
from .decode import DECODING as DECODING
from .identity import data_fingerprint as data_fingerprint
from .images import Images as Images
from .images import Splits as Splits
from .images import StreamedImages as StreamedImages
from .loading import load_data as load_data
from .named import NAMES as NAMES
from .views import Views as Views
