"""From the evidence of all levels to labels and foreground, in one launch: upsample, blur, argmax.

Tokens are compared within one program, so a patch needs no second pass; labels of one tile need no
other tile's, so nothing waits for the whole grid.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.blur import _blurred_upsampling
from csrc_triton.launch import OPTIONS, check_inputs, on_device_of

NO_START = tl.constexpr(1e-5)  # as in scfg.reference


@triton.jit
def _first_read(fine, size, FACTOR: tl.constexpr):
    """Lowest coarse pixel that pixel `fine` reads through blur and upsampling; it reads three."""
    return tl.minimum(tl.maximum(2 * fine - 1 - FACTOR, 0) // (2 * FACTOR), (size - 1) // FACTOR)


@triton.jit
def _blurred_level(x_ptr, column, active, stride, top, left, h, w,
                   FACTOR: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Some columns of one level, upsampled and blurred on one tile: (COLS, ROWS * columns).

    Coarse columns come 16 at a time: a dot 32 deep holds too many operands to stay in registers.
    How often is a number of the launch, so that all widths of an image share a kernel.
    """
    COLUMNS: tl.constexpr = column.shape[0]
    HEIGHT: tl.constexpr = 2 * ROWS  # at least ROWS + 2, and the 16 a dot takes
    y = _first_read(top, h, FACTOR) + tl.arange(0, HEIGHT)
    y_end = _first_read(tl.minimum(top + ROWS, h) - 1, h, FACTOR) + 3
    width = (w - 1) // FACTOR + 1
    x_first = _first_read(left, w, FACTOR)
    x_end = tl.minimum(_first_read(tl.minimum(left + COLS, w) - 1, w, FACTOR) + 3, width)
    active_y = (y < tl.minimum(y_end, (h - 1) // FACTOR + 1))[:, None, None] & active[None, None, :]
    vertical = _blurred_upsampling(top + tl.arange(0, ROWS), y, h, FACTOR)
    total = tl.full((COLS, ROWS * COLUMNS), 0.0, tl.float32)
    for part in tl.range(x_first, x_end, 16, num_stages=1):  # fetched ahead, it spills on sm_80
        x = part + tl.arange(0, 16)
        offset = ((y[:, None] * width + x[None, :]) * stride)[:, :, None] + column[None, None, :]
        inside = active_y & (x < x_end)[None, :, None]
        block = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        block = tl.reshape(block, (HEIGHT, 16 * COLUMNS))
        block = tl.dot(vertical, block, input_precision="ieee")
        block = tl.permute(tl.reshape(block, (ROWS, 16, COLUMNS)), (1, 0, 2))
        horizontal = _blurred_upsampling(left + tl.arange(0, COLS), x, w, FACTOR)
        block = tl.reshape(block, (16, ROWS * COLUMNS))
        total = tl.dot(horizontal, block, acc=total, input_precision="ieee")
    return total


@triton.jit
def _start_is_flat(x_ptr, image, stride, h, w, FACTORS: tl.constexpr):
    """Whether column 0 says the same of every patch of an image, at every level."""
    CHUNK: tl.constexpr = 256
    flat = True
    for level in tl.static_range(len(FACTORS)):
        n = ((h - 1) // FACTORS[level] + 1) * ((w - 1) // FACTORS[level] + 1)
        low = tl.full((CHUNK,), float("inf"), tl.float32)
        high = tl.full((CHUNK,), float("-inf"), tl.float32)
        for begin in range(0, n, CHUNK):
            patch = begin + tl.arange(0, CHUNK)
            value_ptr = x_ptr[level] + image * n * stride + patch * stride
            low = tl.minimum(low, tl.load(value_ptr, mask=patch < n, other=float("inf")))
            high = tl.maximum(high, tl.load(value_ptr, mask=patch < n, other=float("-inf")))
        most = tl.max(high, axis=0)
        flat = flat & (most - tl.min(low, axis=0) <= most * NO_START)
    return flat


@triton.jit
def _start_loses(x_ptr, image, last, top, left, h, w, FACTORS: tl.constexpr,
                 ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Whether the last column exceeds START on each patch of a tile: (COLS, ROWS) bool."""
    side = tl.arange(0, 2)  # START, the rest
    total = tl.full((COLS, ROWS * 2), 0.0, tl.float32)
    for level in tl.static_range(len(FACTORS)):
        n = ((h - 1) // FACTORS[level] + 1) * ((w - 1) // FACTORS[level] + 1)
        total += _blurred_level(x_ptr[level] + image * n * (last + 1), side * last, side < 2,
                                last + 1, top, left, h, w,
                                FACTORS[level], ROWS, COLS)  # fmt: skip
    margin = tl.where((side == 0)[None, None, :], -1.0, 1.0) * tl.reshape(total, (COLS, ROWS, 2))
    return tl.sum(margin, axis=2) > 0


@triton.jit
def _label_tile(x_ptr, image, top, left, t, h, w, FACTORS: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """The token with the largest evidence on each patch of a tile: (COLS, ROWS) int32."""
    best = tl.full((COLS, ROWS), float("-inf"), tl.float32)
    label = tl.full((COLS, ROWS), 0, tl.int32)
    for block in range(0, t, TOKENS):
        token = block + tl.arange(0, TOKENS)
        total = tl.full((COLS, ROWS * TOKENS), 0.0, tl.float32)
        for level in tl.static_range(len(FACTORS)):
            n = ((h - 1) // FACTORS[level] + 1) * ((w - 1) // FACTORS[level] + 1)
            level_ptr = x_ptr[level] + image * n * (t + 1)
            total += _blurred_level(level_ptr, token, token < t, t + 1, top, left, h, w,
                                    FACTORS[level], ROWS, COLS)  # fmt: skip
        total = tl.reshape(total, (COLS, ROWS, TOKENS))
        wins = (token < t)[None, None, :] & (total == total)  # NaN does not
        total = tl.where(wins, total, float("-inf"))
        value, index = tl.max(total, axis=2, return_indices=True)  # lowest index on ties
        label = tl.where(value > best, block + index, label)
        best = tl.maximum(best, value)
    return tl.minimum(label, t - 1)


@triton.jit
def _flatness(text_ptr, front_ptr, image, t, u, h, w, FACTORS: tl.constexpr):
    """Whether START is flat in the evidence that marks the foreground, and in both."""
    flat = _start_is_flat(front_ptr, image, u + 1, h, w, FACTORS)
    both = flat
    if flat:
        both = flat & _start_is_flat(text_ptr, image, t + 1, h, w, FACTORS)
    return flat, both


@triton.jit
def _segment_tile(text_ptr, front_ptr, labels_ptr, foreground_ptr, image, flat, both, top, left,
                  t, u, h, w, FACTORS: tl.constexpr, ROWS: tl.constexpr,
                  COLS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Write labels and foreground of one tile of ROWS x COLS patches of one image.

    TOKENS columns at a time, the evidence under the tile and its halo is read once, labels are
    written once. 8 rows and the full width of SD 1.5 and SDXL make the halo, read by two tiles, at
    most a quarter; 16 tokens are two sectors, and all that fits the registers of 8 warps.
    """
    label = _label_tile(text_ptr, image, top, left, t, h, w, FACTORS, ROWS, COLS, TOKENS)
    if flat:
        marked = _start_loses(text_ptr, image, t, top, left, h, w, FACTORS, ROWS, COLS)
        marked = marked & ~both
    else:
        marked = _start_loses(front_ptr, image, u, top, left, h, w, FACTORS, ROWS, COLS)
    row, col = top + tl.arange(0, ROWS)[None, :], left + tl.arange(0, COLS)[:, None]
    offset, inside = (image * h + row) * w + col, (row < h) & (col < w)
    tl.store(labels_ptr + offset, label.to(tl.int64), mask=inside)
    tl.store(foreground_ptr + offset, marked, mask=inside)


@triton.jit(do_not_specialize=["t", "u", "h", "w"])
def _segment_kernel(text_ptr, front_ptr, labels_ptr, foreground_ptr, flat_ptr, t, u, h, w,
                    FACTORS: tl.constexpr, ROWS: tl.constexpr,
                    COLS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """One tile of one image, see `_segment_tile`. Grid (b, ceil(h / ROWS), ceil(w / COLS))."""
    image = tl.program_id(0).to(tl.int64)
    flat, both = _flatness(text_ptr, front_ptr, image, t, u, h, w, FACTORS)
    top, left = tl.program_id(1) * ROWS, tl.program_id(2) * COLS
    _segment_tile(text_ptr, front_ptr, labels_ptr, foreground_ptr, image, flat, both, top, left,
                  t, u, h, w, FACTORS, ROWS, COLS, TOKENS)  # fmt: skip
    tl.store(flat_ptr + image, flat)  # the same from every program of the image


def _blocks(w: int, factors: list[int]) -> dict:
    """The constants of `_segment_tile`."""
    return dict(FACTORS=tuple(factors), ROWS=8, COLS=16 if w <= 16 else 32, TOKENS=16)


def segment(
    text: list[Tensor], front: list[Tensor], h: int, w: int, factors: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each patch to the token with the largest evidence, and mark the foreground.

    Twin of `scfg.reference.segment`: same arguments, same results, accumulated in float32. Any
    number of levels. A token whose evidence is NaN wins no patch.

    Raises:
        RuntimeError: An input requires grad.
        TypeError: An input is float64.
    """
    check_inputs("segment", *text, *front)
    b, _, columns = text[0].shape
    labels = text[0].new_empty((b, h, w), dtype=torch.int64)
    foreground = text[0].new_empty((b, h, w), dtype=torch.bool)
    flat = text[0].new_empty((b,), dtype=torch.bool)
    blocks = _blocks(w, factors)
    grid = (b, triton.cdiv(h, blocks["ROWS"]), triton.cdiv(w, blocks["COLS"]))
    with on_device_of(labels):
        _segment_kernel[grid](
            tuple(text), tuple(front), labels, foreground, flat, columns - 1,
            front[0].shape[2] - 1, h, w, **blocks, **OPTIONS, num_stages=2)  # fmt: skip
    return labels, foreground, flat
