"""bfloat16 under another name."""

import torch

from zoo.precision.base import Precision

OUTSIDER = Precision(name="outsider", param_dtype=torch.bfloat16)
