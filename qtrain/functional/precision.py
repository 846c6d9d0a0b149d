"""Where products need the digits that mixed precision takes from them."""

import torch
from torch import Tensor


def full_precision(x: Tensor) -> torch.autocast:
    """Inside, products have the type of ``x``: bf16 loses differences of nearly equal similarities and distances."""
    return torch.autocast(x.device.type, enabled=False)
