"""In what precision operators compute."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a linear would compute in; an operand is cast to it before it travels, not after."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What partial results of this dtype are added up in."""
    return torch.promote_types(dtype, torch.float32)
