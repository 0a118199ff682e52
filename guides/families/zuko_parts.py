"""What the conditioned flows take from Zuko: masked networks and transforms of one variable.

Importing Zuko switches torch's validation of distributions off for the whole process; here it is
put back as it was.
"""

from __future__ import annotations

import torch

_validate = torch.distributions.Distribution._validate_args
from zuko.nn import MaskedMLP  # noqa: E402
from zuko.transforms import MonotonicAffineTransform, MonotonicRQSTransform  # noqa: E402

torch.distributions.Distribution.set_default_validate_args(_validate)

__all__ = ["MaskedMLP", "MonotonicAffineTransform", "MonotonicRQSTransform"]
