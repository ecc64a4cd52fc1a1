"""From one grid to another: blur, upsampling, spreading, and what they do to a mean."""

import math

import torch
from torch import Tensor

BLUR = (math.exp(-1) / (1 + 2 * math.exp(-1)), 1 / (1 + 2 * math.exp(-1)))  # side, centre


def blur(x: Tensor) -> Tensor:
    """3 x 3 blur with weights exp(-(dx^2 + dy^2)), normalised, edges reflected without repeating.

    Args:
        x: (..., h, w). An axis of size 1 is left as it is.

    Returns:
        Same shape and type.

    Source: the code's Gaussian has exponent -(x/(2 sigma))^2 with sigma 0.5, not -x^2/(2 sigma^2).
    """
    side, centre = BLUR
    for axis in (-2, -1):
        size = x.shape[axis]
        index = torch.arange(size, device=x.device)
        before = (index - 1).abs().clamp_max(size - 1)
        after = (size - 1 - (size - 2 - index).abs()).clamp_min(0)
        x = centre * x + side * (x.index_select(axis, before) + x.index_select(axis, after))
    return x


def upsample(x: Tensor, h: int, w: int, factor: int) -> Tensor:
    """Bilinear upsampling by a power of two, pixel centres at half integers, edges repeated.

    Pixel i reads the coarse position (i + 1/2) / factor - 1/2, clamped to the map.

    Args:
        x: (..., ceil(h/factor), ceil(w/factor)).
        h: Rows of the result.
        w: Columns of the result.
        factor: At least 1.

    Returns:
        (..., h, w).

    Source: code (bilinear interpolation). A size that factor does not divide keeps the factor, as
    strided convolutions do, and is cropped at the end.
    """
    for axis, size in ((-2, h), (-1, w)):
        last = x.shape[axis] - 1
        centres = torch.arange(size, device=x.device, dtype=x.dtype) + 0.5
        position = (centres / factor - 0.5).clamp(0, last)  # exact: factor is a power of two
        low = position.floor().long()
        high = (low + 1).clamp_max(last)
        share = (position - low).unsqueeze(-1) if axis == -2 else position - low
        x = x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share
    return x


def spread(patches: Tensor, h: int, w: int, factor: int) -> Tensor:
    """Give every pixel the value of its patch: pixel (i, j) reads (i // factor, j // factor).

    Args:
        patches: (..., ceil(h/factor), ceil(w/factor)), any type.
        h: Rows of the result.
        w: Columns of the result.
        factor: Pixels per patch.

    Returns:
        (..., h, w). Source: none, bookkeeping.

    >>> spread(torch.tensor([[1, 2]]), h=2, w=3, factor=2)
    tensor([[1, 1, 2],
            [1, 1, 2]])
    """
    rows = torch.arange(h, device=patches.device) // factor
    cols = torch.arange(w, device=patches.device) // factor
    return patches.index_select(-2, rows).index_select(-1, cols)


def spatial_weights(h: int, w: int, factor: int, device: torch.device | str = "cpu") -> Tensor:
    """Weights v of a coarse map such that ``mean(blur(upsample(y))) = v . y``.

    Blur and upsampling are linear, so their spatial mean is a fixed weighting of the coarse pixels;
    with it a map is renormalised at its own resolution.

    Args:
        h: Rows of the finest map grid.
        w: Columns of it.
        factor: Reduction of the coarse map with respect to the finest, a power of two.
        device: Where to compute them.

    Returns:
        (ceil(h/factor) * ceil(w/factor),) float64, sum 1. Source: none, follows from linearity.
    """
    sides = []
    for size in (h, w):
        basis = torch.eye(-(-size // factor), dtype=torch.float64, device=device)[:, None, :]
        sides.append(blur(upsample(basis, 1, size, factor)).mean(dim=(1, 2)))  # (m,)
    return torch.outer(*sides).flatten()
