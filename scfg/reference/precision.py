"""The type that results are accumulated in: float32, or float64 where the input is float64."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """The tensor in the type it is accumulated in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
