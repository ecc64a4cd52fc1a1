"""Propagation of token maps through self-attention, alone or folded into a level's evidence."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.attention import row_block
from csrc_triton.choices import chosen
from csrc_triton.launch import OPTIONS, check_inputs, on_device_of, stages
from csrc_triton.scores import _dot

# Up to this many pixels one program takes a block of columns through all powers. It reads S at the
# speed of one multiprocessor: for four powers of 384 pixels (SD 1.5 at 512 x 768) some 50 us, at
# 50 bytes per ns, about twice what five launches take (arithmetic, not timings) but one launch in
# place of five, which a U-Net at that size, bound by its launches, notices more. Beyond, the time
# grows with n * n.
SMALL_N = 384


@triton.jit
def _add_product(total, self_ptr, source_ptr, rows, cols, first, n, t, BLOCK_K: tl.constexpr):
    """The total and S @ source, of the pixels from the first on."""
    for start in range(first, n, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        s_ok = (rows < n)[:, None] & (ks < n)[None, :]
        y_ok = (ks < n)[:, None] & (cols < t)[None, :]
        s_at = rows.to(tl.int64)[:, None] * n + ks[None, :]
        s = tl.load(self_ptr + s_at, mask=s_ok, other=0.0).to(tl.float32)
        y = tl.load(source_ptr + ks[:, None] * t + cols[None, :], mask=y_ok, other=0.0)
        total = _dot(s, y.to(tl.float32), total)
    return total


@triton.jit
def _product(self_ptr, source_ptr, image, rows, cols, n, t, BLOCK_K: tl.constexpr):
    """S @ source of an image, (BLOCK_M, BLOCK_T) float32.

    Of two loops one does all: the first reads S 16 bytes at a time, the second goes without an n
    that allows it. So all n share a kernel. One after the other and not if and else, which would
    each be given shared memory of its own.
    """
    total = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    even = tl.where(n % 16 == 0, n // 16 * 16, 0)  # the compiler sees that 16 divides it
    total = _add_product(total, self_ptr + image * even * even, source_ptr, rows, cols, 0, even, t,
                         BLOCK_K)  # fmt: skip
    return _add_product(total, self_ptr + image * n * n, source_ptr, rows, cols, even, n, t,
                        BLOCK_K)  # fmt: skip


@triton.jit
def _load_columns(cross_ptr, rows, cols, n, t, WITH_REST: tl.constexpr):
    """A block of C; with WITH_REST column t is the sum of columns 1 to t - 1."""
    ok = (rows < n)[:, None] & (cols < t)[None, :]
    c = tl.load(cross_ptr + rows[:, None] * t + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    if WITH_REST:
        if tl.max(cols, 0) >= t:
            rest = tl.zeros((rows.shape[0],), tl.float32)
            for start in range(0, t, cols.shape[0]):
                js = start + tl.arange(0, cols.shape[0])
                ok = (rows < n)[:, None] & ((js > 0) & (js < t))[None, :]
                x = tl.load(cross_ptr + rows[:, None] * t + js[None, :], mask=ok, other=0.0)
                rest += tl.sum(x.to(tl.float32), 1)
            c = tl.where((cols == t)[None, :], rest[:, None], c)
    return c


@triton.jit(do_not_specialize=["powers", "layers", "more", "n", "t"])
def _complete_kernel(self_ptr, cross_ptr, weights_ptr, total_ptr, scratch_ptr, out_ptr,
                     gain, scale, powers, layers, more, n, t,
                     BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                     COLUMNS: tl.constexpr):  # fmt: skip
    """COLUMNS columns of one image through all powers; with weights, renormalised and added.

    Grid (ceil(columns / COLUMNS), b): columns are independent, and so is the rest column, as
    propagation is linear. Evaluated from the inside, S(C + gain S(C + ...)), so that no sum of
    powers is kept: C and two blocks of scratch that take turns, a barrier before each power. S is
    read once per power, total and the result once, C once (by the rest column once more). 16
    columns are the least a matrix product takes: the most programs. Layers follow each other in
    the program, so that their sum has one order; more says whether there is a total before them.
    """
    b = tl.num_programs(1)
    lanes = tl.arange(0, COLUMNS)
    cols = tl.program_id(0) * COLUMNS + lanes
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    first = scratch_ptr + program * (3 * n * COLUMNS)
    for layer in range(layers):
        image = (layer * b + tl.program_id(1)).to(tl.int64)
        for start in range(0, n, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            c = _load_columns(cross_ptr + image * n * t, rows, cols, n, t, weights_ptr is not None)
            at = rows[:, None] * COLUMNS + lanes[None, :]
            tl.store(first + at, c, mask=(rows < n)[:, None])
        source = first
        for power in range(powers):
            tl.debug_barrier()  # the source is complete
            target = first + (1 + power % 2) * (n * COLUMNS)
            for start in range(0, n, BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)
                at = rows[:, None] * COLUMNS + lanes[None, :]
                y = _product(self_ptr, source, image, rows, lanes, n, COLUMNS, BLOCK_K)
                c = tl.load(first + at, mask=(rows < n)[:, None], other=0.0)
                y = tl.where(power == powers - 1, y * scale, c + y * gain)
                tl.store(target + at, y, mask=(rows < n)[:, None])
            source = target
        tl.debug_barrier()
        mean = tl.zeros((COLUMNS,), tl.float32)
        width = t
        if weights_ptr is not None:
            width = t + 1
            for start in range(0, n, BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)
                at = rows[:, None] * COLUMNS + lanes[None, :]
                y = tl.load(source + at, mask=(rows < n)[:, None], other=0.0)
                v = tl.load(weights_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)
                mean += tl.sum(y * v[:, None], 0)
        for start in range(0, n, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            at = rows[:, None] * COLUMNS + lanes[None, :]
            y = tl.load(source + at, mask=(rows < n)[:, None], other=0.0)
            y = tl.where(mean > 0, y / tl.maximum(mean, 1e-30), y)
            ok = (rows < n)[:, None] & (cols < width)[None, :]
            at = (tl.program_id(1).to(tl.int64) * n + rows)[:, None] * width + cols[None, :]
            if layer > 0:
                y += tl.load(out_ptr + at, mask=ok, other=0.0)
            else:
                y += tl.load(total_ptr + at, mask=ok & (rows < n * more)[:, None], other=0.0)
            tl.store(out_ptr + at, y, mask=ok)
        tl.debug_barrier()  # scratch is free, and the sum so far complete


@triton.jit(do_not_specialize=["last", "n", "t"])
def _propagate_kernel(self_ptr, columns_ptr, source_ptr, weights_ptr, out_ptr, partial_ptr,
                      factor, last, n, t, t_in, t_out,
                      BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
                      BLOCK_T: tl.constexpr):  # fmt: skip
    """One power, columns + factor * S @ source, for BLOCK_M rows; no columns in the last power.

    Grid (ceil(n / BLOCK_M), ceil(t / BLOCK_T), b). S is read once while t <= BLOCK_T, source once
    per program (from the cache), the result written once. With weights, a program of the last power
    also writes its part of the spatial mean of each column, to be added up in a fixed order. Source
    and result have t_in and t_out columns, zero beyond t. Block sizes: see `_large`.
    """
    image = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    self_ptr += image * n * n
    source_ptr += image * n * t_in
    y = tl.zeros((BLOCK_M, BLOCK_T), tl.float32)
    y = _add_product(y, self_ptr, source_ptr, rows, cols, 0, n, t_in, BLOCK_K) * factor
    row_at = (image * n + rows)[:, None]
    rows_ok = (rows < n)[:, None]
    c_ok = (rows < n * (1 - last))[:, None] & (cols < t)[None, :]
    y += tl.load(columns_ptr + row_at * t + cols[None, :], mask=c_ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row_at * t_out + cols[None, :], y, mask=rows_ok & (cols < t_out)[None, :])
    if weights_ptr is not None:
        if last > 0:
            v = tl.load(weights_ptr + rows, mask=rows < n, other=0.0).to(tl.float32)
            at = (image * tl.num_programs(0) + tile) * t + cols
            tl.store(partial_ptr + at, tl.sum(y * v[:, None], 0), mask=cols < t)


@triton.jit(do_not_specialize=["layers", "more", "parts", "n", "t"])
def _renormalise_kernel(columns_ptr, partial_ptr, total_ptr, out_ptr, layers, more, n, t, t_in,
                        parts, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """BLOCK_M rows of one image: divide columns and rest by their spatial means, add to total.

    Grid (ceil(n / BLOCK_M), b), BLOCK_T >= t: all columns of a row meet here, so the rest column
    needs no propagation, and so do all layers, added one after another. Everything is read and
    written once, but for the parts of the means, which every program adds up. BLOCK_M * BLOCK_T is
    4096: 16 registers a thread, and as many for the sum.
    """
    b = tl.num_programs(1)
    image = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_T)
    ok = (rows < n)[:, None] & (cols < t)[None, :]
    row_at = (image * n + rows) * (t + 1)
    at = row_at[:, None] + cols[None, :]
    total = tl.load(total_ptr + at, mask=ok & (rows < n * more)[:, None], other=0.0)
    total_rest = tl.load(total_ptr + row_at + t, mask=rows < n * more, other=0.0)
    for layer in range(layers):
        stacked = (layer * b + tl.program_id(1)).to(tl.int64)
        mean = tl.zeros((BLOCK_T,), tl.float32)
        for start in range(0, parts, BLOCK_M):
            ps = start + tl.arange(0, BLOCK_M)
            present = (ps < parts)[:, None] & (cols < t)[None, :]
            at = (stacked * parts + ps)[:, None] * t + cols[None, :]
            mean += tl.sum(tl.load(partial_ptr + at, mask=present, other=0.0), 0)
        at = (stacked * n + rows)[:, None] * t_in + cols[None, :]
        y = tl.load(columns_ptr + at, mask=ok, other=0.0)
        rest = tl.sum(tl.where(cols > 0, y, 0.0), 1)
        rest_mean = tl.sum(tl.where(cols > 0, mean, 0.0), 0)
        total += tl.where(mean > 0, y / tl.maximum(mean, 1e-30), y)
        total_rest += tl.where(rest_mean > 0, rest / tl.maximum(rest_mean, 1e-30), rest)
    tl.store(out_ptr + row_at[:, None] + cols[None, :], total, mask=ok)
    tl.store(out_ptr + row_at + t, total_rest, mask=rows < n)


def _schedule(propagation: str, powers: int) -> tuple[int, float, float]:
    """Powers P, gain and scale with scale * S(C + gain S(C + ... + gain S C)), S applied P times.

    (S + 3 S^2) C / 4 is S(C + 3 S C) / 4; without propagation P is 0 and C remains.
    """
    schedules = {"paper": (powers, 1.0, 1.0 / powers), "official": (2, 3.0, 0.25)}
    return schedules.get(propagation, (0, 1.0, 1.0))


def _small(self_map, columns, weights, total, powers, gain, scale):
    """All powers in one launch, see `_complete_kernel`; without weights only propagated."""
    b, n, t = columns.shape[-3:]
    layers = columns.shape[0] if columns.dim() == 4 else 1
    width = t if weights is None else t + 1
    blocks = triton.cdiv(width, 16)
    scratch = columns.new_empty((b, blocks, 3, n, 16), dtype=torch.float32)
    out = columns.new_empty((b, n, width), dtype=torch.float32)
    more, total = (0, out) if total is None else (1, total)
    with on_device_of(columns):
        _complete_kernel[(blocks, b)](
            columns if self_map is None else self_map, columns, weights, total, scratch, out,
            gain, scale, powers, layers, more, n, t, BLOCK_M=256, BLOCK_K=32, COLUMNS=16,
            **OPTIONS, num_stages=stages(3))  # fmt: skip
    return out


def _large(self_map, columns, weights, powers, gain, scale):
    """One launch per power; returns the columns and, with weights, the parts of their means.

    Rows as in `csrc_triton.attention`, and up to 128 columns, so that S comes from memory once per
    power. Columns in between are padded to a multiple of 16, which every program then copies 16
    bytes at a time; with weights so is the result.
    """
    b, n, t = columns.shape
    rows = row_block(n)
    block_t = min(128, max(16, triton.next_power_of_2(t)))
    tiles = triton.cdiv(n, rows)
    padded = triton.cdiv(t, 16) * 16
    parts = None if weights is None else columns.new_empty((b, tiles, t), dtype=torch.float32)
    source = columns
    for power in range(powers):
        last = power == powers - 1
        width = t if last and weights is None else padded
        out = columns.new_empty((b, n, width), dtype=torch.float32)
        with on_device_of(columns):
            _propagate_kernel[(tiles, triton.cdiv(t, block_t), b)](
                self_map, columns, source, weights, out, parts, scale if last else gain, int(last),
                n, t, source.shape[2], width,
                BLOCK_M=rows, BLOCK_K=32, BLOCK_T=block_t, **OPTIONS,
                num_stages=stages(3))  # fmt: skip
        source = out
    return source, parts


def propagate(
    self_map: Tensor | None, columns: Tensor, propagation: str = "paper", powers: int = 4
) -> Tensor:
    """Complete token maps through self-attention.

    Twin of `scfg.reference.propagate`: contiguous inputs, float32 products and result (b, n, t), a
    new tensor. One launch up to SMALL_N pixels or without propagation, else one per power.

    Raises:
        RuntimeError: An input requires grad.
        TypeError: An input is float64.
    """
    check_inputs("propagate", self_map, columns)
    powers, gain, scale = _schedule(propagation, powers)
    if powers == 0 or columns.shape[1] <= chosen("SMALL_N", SMALL_N):
        return _small(self_map, columns, None, None, powers, gain, scale)
    return _large(self_map, columns, None, powers, gain, scale)[0]


def complete(
    self_map: Tensor | None,
    cross_map: Tensor,
    weights: Tensor,
    total: Tensor | None = None,
    propagation: str = "paper",
    powers: int = 4,
) -> Tensor:
    """Fold layers into the evidence of their level: propagate, renormalise over space, add.

    Twin of `scfg.reference.complete`: contiguous inputs, total float32, float32 products and result
    (b, n, t+1). One launch up to SMALL_N pixels or without propagation, else one per power and one,
    for any number of layers.

    Raises:
        RuntimeError: An input requires grad.
        TypeError: An input is float64.
    """
    check_inputs("complete", self_map, cross_map, weights, total)
    powers, gain, scale = _schedule(propagation, powers)
    b, n, t = cross_map.shape[-3:]
    if powers == 0 or n <= chosen("SMALL_N", SMALL_N):
        return _small(self_map, cross_map, weights, total, powers, gain, scale)
    layers = cross_map.shape[0] if cross_map.dim() == 4 else 1
    stacked = self_map.view(layers * b, n, n), cross_map.view(layers * b, n, t)
    columns, parts = _large(*stacked, weights, powers, gain, scale)
    out = cross_map.new_empty((b, n, t + 1), dtype=torch.float32)
    block_t = max(256, triton.next_power_of_2(t))  # one kernel for prompts of 77, 154 and 231
    rows = max(1, 4096 // block_t)
    more, total = (0, out) if total is None else (1, total)
    with on_device_of(cross_map):
        _renormalise_kernel[(triton.cdiv(n, rows), b)](
            columns, parts, total, out, layers, more, n, t, columns.shape[2], parts.shape[1],
            BLOCK_M=rows, BLOCK_T=block_t, **OPTIONS)  # fmt: skip
    return out
