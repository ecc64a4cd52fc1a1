"""Head-mean attention maps straight from q and k, or applied to columns without forming them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.choices import chosen
from csrc_triton.launch import OPTIONS, check_inputs, on_device_of, stages
from csrc_triton.scores import _all_probabilities, _dot, _mean_probabilities, _softmax_statistics

LAYERS = 8  # of one launch
TILES, ROOM = 64, 8192  # see `_blocks`


@triton.jit
def _map_rows(q_ptr, k_ptr, bias_ptr, out_ptr, image, out_image, tile, n, m,
              HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
              BLOCK_D: tl.constexpr, ONE_PASS: tl.constexpr):  # fmt: skip
    """BLOCK_M rows of one map: scores of all keys at once if they fit, else in two passes."""
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += image * n * (HEADS * D)
    k_ptr += image * m * (HEADS * D)
    if bias_ptr is not None:
        bias_ptr += image * m
    out_ptr += (out_image * n + tile * BLOCK_M) * m
    out = out_ptr + (tl.arange(0, BLOCK_M) * m)[:, None]
    if ONE_PASS:
        keys = tl.arange(0, BLOCK_N)
        total = _all_probabilities(q_ptr, k_ptr, bias_ptr, rows, keys, n, m, HEADS, D, BLOCK_D)
        tl.store(out + keys[None, :], total, mask=(rows < n)[:, None] & (keys < m)[None, :])
    else:
        tops, shares, _ = _softmax_statistics(q_ptr, k_ptr, bias_ptr, rows, n, m, None, HEADS, D,
                                              BLOCK_N, BLOCK_D)  # fmt: skip
        for start in range(0, m, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            total = _mean_probabilities(q_ptr, k_ptr, bias_ptr, tops, shares, rows, keys, n, m,
                                        HEADS, D, BLOCK_D)  # fmt: skip
            tl.store(out + keys[None, :], total, mask=(rows < n)[:, None] & (keys < m)[None, :])


@triton.jit(do_not_specialize=["n", "m"])
def _attention_map_kernel(q_ptr, k_ptr, bias_ptr, out_ptr, n, m,
                          HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
                          ONE_PASS: tl.constexpr):  # fmt: skip
    """BLOCK_M rows of the map of one image, all heads.

    Grid (ceil(n / BLOCK_M), b). q is read once (ONE_PASS), k once per program (from the cache: a
    few MB at most), the map written once. Block sizes: see `_blocks`.
    """
    image = tl.program_id(1).to(tl.int64)
    _map_rows(q_ptr, k_ptr, bias_ptr, out_ptr, image, image, tl.program_id(0), n, m,
              HEADS, D, BLOCK_M, BLOCK_N, BLOCK_D, ONE_PASS)  # fmt: skip


@triton.jit
def _of_layer(tensors, layer):
    """The pointer to a layer's tensor, of a tuple of them."""
    pointer = tensors[0]
    for slot in tl.static_range(1, len(tensors)):
        pointer = tl.where(layer == slot, tensors[slot], pointer)
    return pointer


@triton.jit(do_not_specialize=["b", "n", "t"])
def _attention_maps_kernel(q_self_ptr, k_self_ptr, q_cross_ptr, k_cross_ptr, bias_ptr,
                           self_ptr, cross_ptr, b, n, t,
                           HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                           BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
                           ONE_PASS: tl.constexpr, ONE_PASS_T: tl.constexpr):  # fmt: skip
    """BLOCK_M rows of the self map or of the cross map of one image of one layer, all heads.

    Grid (2 * ceil(n / BLOCK_M), layers * b): the self tiles, which take longest, come first. Inputs
    are tuples, a tensor a layer, results are stacked. Reads, writes and block sizes as in
    `_attention_map_kernel`.
    """
    stacked = tl.program_id(1).to(tl.int64)
    layer, image = tl.program_id(1) // b, (tl.program_id(1) % b).to(tl.int64)
    tile = tl.program_id(0)
    tiles = tl.cdiv(n, BLOCK_M)
    if tile < tiles:
        _map_rows(_of_layer(q_self_ptr, layer), _of_layer(k_self_ptr, layer), None, self_ptr,
                  image, stacked, tile, n, n,
                  HEADS, D, BLOCK_M, BLOCK_N, BLOCK_D, ONE_PASS)  # fmt: skip
    else:
        bias = bias_ptr
        if bias_ptr is not None:
            bias = _of_layer(bias_ptr, layer)
        _map_rows(_of_layer(q_cross_ptr, layer), _of_layer(k_cross_ptr, layer), bias, cross_ptr,
                  image, stacked, tile - tiles, n, t,
                  HEADS, D, BLOCK_M, BLOCK_T, BLOCK_D, ONE_PASS_T)  # fmt: skip


@triton.jit(do_not_specialize=["n", "m"])
def _attention_apply_kernel(q_ptr, k_ptr, columns_ptr, out_ptr, n, m, t,
                            HEADS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
                            BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
                            BLOCK_D: tl.constexpr):  # fmt: skip
    """BLOCK_M rows and BLOCK_T columns of (head-mean attention) @ columns of one image.

    Grid (ceil(n / BLOCK_M), ceil(t / BLOCK_T), b). Two passes over the keys: the second adds up the
    probabilities of all heads before the one float32 product with the columns, which, done per
    head, would cost more than scoring twice. k is read twice and the columns once per program, the
    result written once. Block sizes: see `attention_apply`.
    """
    image = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    q_ptr += image * n * (HEADS * D)
    k_ptr += image * m * (HEADS * D)
    columns_ptr += image * m * t
    out_ptr += image * n * t
    tops, shares, _ = _softmax_statistics(q_ptr, k_ptr, None, rows, n, m, None, HEADS, D, BLOCK_N,
                                          BLOCK_D)  # fmt: skip
    out = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
    for start in range(0, m, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        p = _mean_probabilities(q_ptr, k_ptr, None, tops, shares, rows, keys, n, m, HEADS, D,
                                BLOCK_D)  # fmt: skip
        inside = (keys < m)[:, None] & (cols < t)[None, :]
        columns = tl.load(columns_ptr + keys[:, None] * t + cols[None, :], mask=inside, other=0.0)
        out = _dot(p, columns.to(tl.float32), out)
    inside = (rows < n)[:, None] & (cols < t)[None, :]
    tl.store(out_ptr + rows[:, None] * t + cols[None, :], out, mask=inside)


def row_block(n: int) -> int:
    """Rows per program, see `_blocks`."""
    return min(max(triton.next_power_of_2(n) // chosen("TILES", TILES), 16), 64)


def _blocks(n: int, d: int, heads: int, itemsize: int, *keys: int) -> tuple[int, list, dict]:
    """Rows per program, (keys per block, one pass?) of each map, and the other launch options.

    About TILES row tiles an image, 16 to 64 rows each: reading all of k through one multiprocessor
    should take longer than the arithmetic, so small maps are spread over many programs. A block
    of scores and its running mean stay in the registers of 8 warps up to ROOM scores, or twice that
    in 16 rows, which need no warp groups; half that for float32, whose products are split in three.
    Keys that fit so are scored once, others twice. A chunk of a head is at most 64 wide, less where
    two stages of it do not fit 96 KiB of shared memory; 16 and one stage for float32, or a few
    registers spill. None of this depends on b: an image's result does not depend on its neighbours.
    """
    wide = itemsize == 4
    room = chosen("ROOM", ROOM) // (2 if wide else 1)
    rows = min(row_block(n), 32 if wide else 64)
    sizes = [max(16, triton.next_power_of_2(m)) for m in keys]
    while rows > 16 and rows * max(sizes) > room and 16 * max(sizes) <= 2 * room:
        rows //= 2
    limit = 2 * room if rows == 16 else room
    columns = [(m, True) if rows * m <= limit else (room // rows, False) for m in sizes]
    chunk = 16 if wide else min(64, max(16, triton.next_power_of_2(d)))
    while chunk > 16 and 2 * (rows + max(m for m, _ in columns)) * chunk * itemsize > 98304:
        chunk //= 2
    options = dict(HEADS=heads, D=d, BLOCK_D=chunk, **OPTIONS, num_stages=stages(2 if wide else 3))
    return rows, columns, options


def attention_map(q: Tensor, k: Tensor, heads: int, key_bias: Tensor | None = None) -> Tensor:
    """Attention probabilities, averaged over heads, in one launch.

    Twin of `scfg.reference.attention_map`: contiguous float16, bfloat16 or float32 inputs, float32
    scores and result (b, n, m).

    Raises:
        RuntimeError: An input requires grad.
        TypeError: An input is float64.
    """
    check_inputs("attention_map", q, k, key_bias)
    (b, n, width), m = q.shape, k.shape[1]
    rows, [(keys, one_pass)], options = _blocks(n, width // heads, heads, q.element_size(), m)
    out = q.new_empty((b, n, m), dtype=torch.float32)
    with on_device_of(q):
        _attention_map_kernel[(triton.cdiv(n, rows), b)](
            q, k, key_bias, out, n, m, BLOCK_M=rows, BLOCK_N=keys, ONE_PASS=one_pass,
            **options)  # fmt: skip
    return out


def attention_maps(
    q_self: Tensor,
    k_self: Tensor,
    q_cross: Tensor,
    k_cross: Tensor,
    heads: int,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Self- and cross-attention map of one transformer block, both in one launch.

    Twin of `scfg.reference.attention_maps`: contiguous inputs of one type, float32 scores and
    results (b, n, n) and (b, n, t).

    Raises:
        RuntimeError: An input requires grad.
        TypeError: An input is float64.
    """
    bias = [key_bias]
    maps = stacked_maps([q_self], [k_self], [q_cross], [k_cross], heads, bias)
    return maps[0][0], maps[1][0]


def stacked_maps(
    q_self: list[Tensor],
    k_self: list[Tensor],
    q_cross: list[Tensor],
    k_cross: list[Tensor],
    heads: int,
    key_bias: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Maps of transformer blocks of one shape, one launch for every LAYERS of them.

    Twin of `scfg.reference.stacked_maps`: contiguous inputs of one type, float32 scores and results
    (l, b, n, n) and (l, b, n, t). Blocks have a bias all or none.

    Raises:
        RuntimeError: An input requires grad.
        TypeError: An input is float64.
    """
    inputs = (q_self, k_self, q_cross, k_cross, key_bias)
    check_inputs("stacked_maps", *(x for layers in inputs for x in layers))
    (b, n, width), t, count = q_self[0].shape, k_cross[0].shape[1], len(q_self)
    itemsize = q_self[0].element_size()
    rows, columns, options = _blocks(n, width // heads, heads, itemsize, n, t)
    (keys, one_pass), (keys_t, one_pass_t) = columns
    self_map = q_self[0].new_empty((count, b, n, n), dtype=torch.float32)
    cross_map = q_self[0].new_empty((count, b, n, t), dtype=torch.float32)
    slots = chosen("LAYERS", LAYERS)
    for first in range(0, count, slots):
        # as many pointers for any number of layers: one kernel
        own = [tuple((x[first : first + slots] + slots * x[-1:])[:slots]) for x in inputs]
        own[-1] = None if key_bias[0] is None else own[-1]
        with on_device_of(self_map):
            _attention_maps_kernel[(2 * triton.cdiv(n, rows), min(slots, count - first) * b)](
                *own, self_map[first:], cross_map[first:], b, n, t, BLOCK_M=rows,
                BLOCK_N=keys, BLOCK_T=keys_t, ONE_PASS=one_pass, ONE_PASS_T=one_pass_t,
                **options)  # fmt: skip
    return self_map, cross_map


def attention_apply(q: Tensor, k: Tensor, columns: Tensor, heads: int) -> Tensor:
    """Head-mean self-attention times columns, the map itself never formed, in one launch.

    Twin of `scfg.reference.attention_apply`: contiguous inputs, q and k of one type, float32
    probabilities, products and result (b, n, t).

    Raises:
        RuntimeError: An input requires grad.
        TypeError: An input is float64.
    """
    check_inputs("attention_apply", q, k, columns)
    (b, n, width), (_, m, t) = q.shape, columns.shape
    out = q.new_empty((b, n, t), dtype=torch.float32)
    block_t = min(128, max(16, triton.next_power_of_2(t)))
    line = 128 // q.element_size()  # of the width of a head; as many keys spill on sm_80 in float16
    with on_device_of(q):
        _attention_apply_kernel[(triton.cdiv(n, 64), triton.cdiv(t, block_t), b)](
            q, k, columns, out, n, m, t, HEADS=heads, D=width // heads, BLOCK_M=64, BLOCK_N=32,
            BLOCK_T=block_t, BLOCK_D=min(line, max(16, triton.next_power_of_2(width // heads))),
            **OPTIONS, num_stages=2)  # fmt: skip
    return out
