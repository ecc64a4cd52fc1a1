"""Self and cross map of patches under one softmax over text and image keys, split as formed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.attention import _blocks
from csrc_triton.launch import check_inputs, on_device_of
from csrc_triton.scores import _all_probabilities, _mean_probabilities, _softmax_statistics


@triton.jit
def _store(self_ptr, cross_ptr, image, rows, keys, total, own, n, m, t,
           RENORMALISE: tl.constexpr):  # fmt: skip
    """Put a block of the joint map where it belongs, image keys divided by their share."""
    text = (rows < n)[:, None] & (keys < t)[None, :]
    cross = cross_ptr + image * n * t + rows[:, None].to(tl.int64) * t + keys[None, :]
    tl.store(cross, total, mask=text)
    if RENORMALISE:
        total /= tl.maximum(own, 1e-30)[:, None]
    patches = (rows < n)[:, None] & (keys >= t)[None, :] & (keys < m)[None, :]
    at = rows[:, None].to(tl.int64) * (m - t) + (keys - t)[None, :]
    tl.store(self_ptr + image * n * (m - t) + at, total, mask=patches)


@triton.jit
def _joint_maps_kernel(q_ptr, k_ptr, bias_ptr, self_ptr, cross_ptr, n, m, t,
                       HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ONE_PASS: tl.constexpr,
                       RENORMALISE: tl.constexpr):  # fmt: skip
    """BLOCK_M rows of both maps of one image, all heads.

    Grid (ceil(n / BLOCK_M), b). As `csrc_triton.attention._attention_map_kernel`, but that the row
    is cut at the last text key and its image part, whose share is known before it is written, is
    written renormalised: the joint map is never in memory, and S is not read again.
    """
    image = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += image * n * (HEADS * D)
    k_ptr += image * m * (HEADS * D)
    if bias_ptr is not None:
        bias_ptr += image * m
    if ONE_PASS:
        keys = tl.arange(0, BLOCK_N)
        total = _all_probabilities(q_ptr, k_ptr, bias_ptr, rows, keys, n, m, HEADS, D, BLOCK_D)
        own = tl.sum(tl.where((keys >= t)[None, :], total, 0.0), 1)
        _store(self_ptr, cross_ptr, image, rows, keys, total, own, n, m, t, RENORMALISE)
    else:
        tops, shares, own = _softmax_statistics(q_ptr, k_ptr, bias_ptr, rows, n, m, t, HEADS, D,
                                                BLOCK_N, BLOCK_D)  # fmt: skip
        for start in range(0, m, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            total = _mean_probabilities(q_ptr, k_ptr, bias_ptr, tops, shares, rows, keys, n, m,
                                        HEADS, D, BLOCK_D)  # fmt: skip
            _store(self_ptr, cross_ptr, image, rows, keys, total, own, n, m, t, RENORMALISE)


def joint_maps(
    q: Tensor,
    k: Tensor,
    token_count: int,
    heads: int,
    key_bias: Tensor | None = None,
    joint: str = "renormalise",
) -> tuple[Tensor, Tensor]:
    """Self and cross map of image patches under one softmax, in one launch.

    Twin of `scfg.reference.joint_maps`: contiguous inputs of one type, float32 scores and results
    (b, n, m-t) and (b, n, t).

    Raises:
        RuntimeError: An input requires grad.
        TypeError: An input is float64.
    """
    check_inputs("joint_maps", q, k, key_bias)
    (b, n, width), m = q.shape, k.shape[1]
    rows, [(keys, one_pass)], options = _blocks(n, width // heads, heads, q.element_size(), m)
    keys = keys if one_pass else keys // 2  # beside a third sum; else it spills
    self_map = q.new_empty((b, n, m - token_count), dtype=torch.float32)
    cross_map = q.new_empty((b, n, token_count), dtype=torch.float32)
    with on_device_of(q):
        _joint_maps_kernel[(triton.cdiv(n, rows), b)](
            q, k, key_bias, self_map, cross_map, n, m, token_count, BLOCK_M=rows, BLOCK_N=keys,
            ONE_PASS=one_pass, RENORMALISE=joint == "renormalise", **options)  # fmt: skip
    return self_map, cross_map
