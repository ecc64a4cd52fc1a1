"""Blocks of attention scores and probabilities, and the matrix product behind them."""

import triton
import triton.language as tl
from triton.language.target_info import is_hip


@triton.jit
def _dot(a, b, total):
    """Return total + a @ b, to float32 accuracy for float32 blocks.

    On NVIDIA as three tf32 products: "ieee" would leave the tensor cores and spill registers there,
    while AMD multiplies float32 matrices as they are.
    """
    if is_hip():
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _scores(q_ptr, k_ptr, bias_ptr, head, rows, keys, n, m,
            HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Scores of one head, (BLOCK_M, BLOCK_N) float32, -inf beyond the last key.

    The head is read in chunks of BLOCK_D, so a width of 40 or 160 needs no power of two.
    """
    scores = tl.zeros((rows.shape[0], keys.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D)
        q_at = rows[:, None] * (HEADS * D) + (head * D + ds)[None, :]
        k_at = keys[None, :] * (HEADS * D) + (head * D + ds)[:, None]
        q = tl.load(q_ptr + q_at, mask=(rows < n)[:, None] & (ds < D)[None, :], other=0.0)
        k = tl.load(k_ptr + k_at, mask=(keys < m)[None, :] & (ds < D)[:, None], other=0.0)
        scores = _dot(q, k, scores)
    scores *= D**-0.5
    if bias_ptr is not None:
        scores += tl.load(bias_ptr + keys, mask=keys < m, other=0.0).to(tl.float32)[None, :]
    return tl.where((keys < m)[None, :], scores, float("-inf"))


@triton.jit
def _all_probabilities(q_ptr, k_ptr, bias_ptr, rows, keys, n, m,
                       HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Rows of the map whose keys fit one block: (BLOCK_M, BLOCK_N), every score computed once."""
    total = tl.zeros((rows.shape[0], keys.shape[0]), tl.float32)
    for head in range(HEADS):
        scores = _scores(q_ptr, k_ptr, bias_ptr, head, rows, keys, n, m, HEADS, D, BLOCK_D)
        p = tl.exp(scores - tl.max(scores, 1)[:, None])
        total += p * (1.0 / (tl.sum(p, 1) * HEADS))[:, None]
    return total


@triton.jit
def _softmax_statistics(q_ptr, k_ptr, bias_ptr, rows, n, m, t, HEADS: tl.constexpr, D: tl.constexpr,
                        BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Largest score and 1 / (heads * sum of exponentials) of each row and head.

    Two (BLOCK_M, heads) blocks in registers: no scratch memory, no barrier between the passes. And,
    unless t is None, the head-mean probability of each row's keys from t on.
    """
    heads = tl.arange(0, triton.next_power_of_2(HEADS))[None, :]
    tops = tl.zeros((rows.shape[0], heads.shape[1]), tl.float32)
    shares = tl.zeros_like(tops)
    own = tl.zeros((rows.shape[0],), tl.float32)
    for head in range(HEADS):
        top = tl.full((rows.shape[0],), float("-inf"), tl.float32)
        mass = tl.zeros((rows.shape[0],), tl.float32)
        late = tl.zeros((rows.shape[0],), tl.float32)
        for start in range(0, m, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            scores = _scores(q_ptr, k_ptr, bias_ptr, head, rows, keys, n, m, HEADS, D, BLOCK_D)
            new = tl.maximum(top, tl.max(scores, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)  # every key so far is masked
            p, fade = tl.exp(scores - shift[:, None]), tl.exp(top - shift)
            mass = mass * fade + tl.sum(p, 1)
            if t is not None:
                late = late * fade + tl.sum(tl.where((keys >= t)[None, :], p, 0.0), 1)
            top = new
        share = 1.0 / (mass * HEADS)
        tops = tl.where(heads == head, top[:, None], tops)
        shares = tl.where(heads == head, share[:, None], shares)
        if t is not None:
            own += late * share
    return tops, shares, own


@triton.jit
def _mean_probabilities(q_ptr, k_ptr, bias_ptr, tops, shares, rows, keys, n, m,
                        HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) block of the map, given the statistics of its rows."""
    heads = tl.arange(0, tops.shape[1])[None, :]
    total = tl.zeros((rows.shape[0], keys.shape[0]), tl.float32)
    for head in range(HEADS):
        top = tl.sum(tl.where(heads == head, tops, 0.0), 1)
        share = tl.sum(tl.where(heads == head, shares, 0.0), 1)
        scores = _scores(q_ptr, k_ptr, bias_ptr, head, rows, keys, n, m, HEADS, D, BLOCK_D)
        total += tl.exp(scores - top[:, None]) * share[:, None]
    return total
