"""The 3 x 3 blur, joined with what precedes it, as a small matrix along one axis.

Blur and bilinear upsampling are separable and linear: along an axis they are together a banded
matrix of at most three coarse pixels a row, made in registers from the indices, and a map goes
through both axes as ``vertical @ map @ horizontal.T``, every input read once.
"""

import math

import triton
import triton.language as tl

SIDE = tl.constexpr(math.exp(-1) / (1 + 2 * math.exp(-1)))
CENTRE = tl.constexpr(1 / (1 + 2 * math.exp(-1)))


@triton.jit
def _reflect(index, size):
    """Index -1 reads 1 and index size reads size - 2; an axis of size 1 has only index 0."""
    index = tl.abs(index)
    return tl.maximum(tl.minimum(index, 2 * (size - 1) - index), 0)


@triton.jit
def _blurred_upsampling(fine, coarse, size, FACTOR: tl.constexpr):
    """blur(upsample(.)) along one axis: (fine, coarse) float32."""
    last = ((size - 1) // FACTOR).to(tl.float32)
    weight = tl.full((fine.shape[0], coarse.shape[0]), 0.0, tl.float32)
    for step in tl.static_range(-1, 2):
        position = (_reflect(fine + step, size) + 0.5) * (1.0 / FACTOR) - 0.5
        position = tl.minimum(tl.maximum(position, 0.0), last)
        share = 1.0 - tl.abs(position[:, None] - coarse[None, :])
        weight += (CENTRE if step == 0 else SIDE) * tl.maximum(share, 0.0)
    return weight
