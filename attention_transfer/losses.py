"""The former name of `attention_transfer.terms`, which goes with the next release."""

import warnings

from .terms import *  # noqa: F403

warnings.warn("attention_transfer.losses is now attention_transfer.terms", DeprecationWarning, stacklevel=2)
