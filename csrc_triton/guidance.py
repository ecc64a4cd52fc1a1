"""From labels to the guided prediction in two launches: region sums, then rate, blur and combine.

The rate of a region needs its mean over the whole image, so every sum must be there before the
first pixel is guided: that wait for the whole grid is the boundary between the two launches. Sums
are written as partials, one per program, and added up in a fixed order by whoever reads them: no
atomics, the same bits on every run.

`csrc_triton.onepass` does all of it, and segmentation, in one launch where one program an image is
enough.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.blur import CENTRE, SIDE, _reflect
from csrc_triton.launch import OPTIONS, check_inputs, on_device_of

SIZES = ("t", "c", "h", "w", "height", "width")  # no kernel of its own for each value


@triton.jit
def _sums(eps_uncond_ptr, eps_text_ptr, labels_ptr, foreground_ptr, image, first, stride,
          t, c, h, w, height, width, FACTOR: tl.constexpr, AREA: tl.constexpr,
          PATCHES: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Sum of the guidance norm and number of pixels of each region: (TOKENS,) twice.

    Of every stride-th block of PATCHES patches, from the first one on. The pixels of a patch share
    a label, so they are summed first, and each prediction, label and flag is read once. PATCHES x
    TOKENS, the comparison of labels with tokens, is at most 8192 elements, 32 registers a thread.
    """
    token, pixel = tl.arange(0, TOKENS), tl.arange(0, AREA)
    amount = tl.full((TOKENS,), 0.0, tl.float32)
    count = tl.full((TOKENS,), 0.0, tl.float32)
    for begin in range(first * PATCHES, h * w, stride * PATCHES):
        patch = begin + tl.arange(0, PATCHES)
        y = (patch // w * FACTOR)[:, None] + (pixel // FACTOR)[None, :]
        x = (patch % w * FACTOR)[:, None] + (pixel % FACTOR)[None, :]
        inside = (y < height) & (x < width) & (pixel < FACTOR * FACTOR)[None, :]
        squares = tl.full((PATCHES, AREA), 0.0, tl.float32)
        for channel in tl.range(0, c, loop_unroll_factor=4):  # that many loads under way
            offset = ((image * c + channel) * height + y) * width + x
            eps_uncond = tl.load(eps_uncond_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            eps_text = tl.load(eps_text_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            squares += (eps_text - eps_uncond) * (eps_text - eps_uncond)
        patch_amount = tl.sum(tl.sqrt_rn(squares), axis=1)  # (PATCHES,)
        patch_count = tl.sum(inside.to(tl.float32), axis=1)
        offset = image * h * w + patch
        label = tl.load(labels_ptr + offset, mask=patch < h * w, other=-1).to(tl.int32)
        front = tl.load(foreground_ptr + offset, mask=patch < h * w, other=0).to(tl.int1)
        member = (label[:, None] == token[None, :]) & (token < t)[None, :]
        member = member | (front[:, None] & (token == t)[None, :])
        amount += tl.sum(tl.where(member, patch_amount[:, None], 0.0), axis=0)
        count += tl.sum(tl.where(member, patch_count[:, None], 0.0), axis=0)
    return amount, count


@triton.jit(do_not_specialize=SIZES)
def _region_sums_kernel(eps_uncond_ptr, eps_text_ptr, labels_ptr, foreground_ptr, sums_ptr,
                        t, c, h, w, height, width, FACTOR: tl.constexpr, AREA: tl.constexpr,
                        PATCHES: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """One partial sum over all t regions and the foreground of one image, see `_sums`.

    Grid (b, p): a program takes every p-th block of patches.
    """
    image = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    amount, count = _sums(eps_uncond_ptr, eps_text_ptr, labels_ptr, foreground_ptr, image, part,
                          parts, t, c, h, w, height, width, FACTOR, AREA, PATCHES,
                          TOKENS)  # fmt: skip
    token = tl.arange(0, TOKENS)
    offset = ((image * parts + part) * (t + 1) + token) * 2
    tl.store(sums_ptr + offset, amount, mask=token <= t)
    tl.store(sums_ptr + offset + 1, count, mask=token <= t)


@triton.jit
def _region_rates(amount, count, token, t, guidance_scale, rate_min, rate_max, max_scale,
                  FOREGROUND: tl.constexpr):  # fmt: skip
    """`scfg.reference.region_rates` of one image: (TOKENS,)."""
    benchmark = (token == t) if FOREGROUND else (token < t)
    pixels = tl.sum(tl.where(benchmark, count, 0.0), axis=0)
    standard = tl.sum(tl.where(benchmark, amount, 0.0), axis=0)
    standard = tl.div_rn(standard, tl.maximum(pixels, 1.0))
    mean = tl.div_rn(amount, tl.maximum(count, 1.0))
    rate = tl.where(mean == 0, 1.0, tl.div_rn(standard, tl.where(mean == 0, 1.0, mean)))
    rate = tl.clamp(rate, rate_min, rate_max, propagate_nan=tl.PropagateNan.ALL)
    if max_scale is not None:
        cap = tl.div_rn(max_scale, guidance_scale)
        rate = tl.minimum(rate, cap, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(pixels == 0, 1.0, rate)


@triton.jit
def _scale_of(guidance_scale, scales_ptr, image):
    """The guidance scale of an image: one for all, unless there are scales (b,)."""
    if scales_ptr is not None:
        guidance_scale = tl.load(scales_ptr + image).to(tl.float32)
    return guidance_scale


@triton.jit
def _weighted(rates, token_weights_ptr, image, token, t):
    """Rates times the weight of each token, where there are weights."""
    if token_weights_ptr is not None:
        weight = tl.load(token_weights_ptr + image * t + token, mask=token < t, other=0.0)
        rates *= weight.to(tl.float32)
    return rates


@triton.jit
def _combine(eps_uncond_ptr, eps_text_ptr, eps_ptr, rate_ptr, rate, guidance_scale, image, pixel,
             c, size, CHANNELS: tl.constexpr):  # fmt: skip
    """Write rate and guided prediction of some pixels, all channels, of one image."""
    tl.store(rate_ptr + image * size + pixel, rate, mask=pixel < size)
    channel = tl.arange(0, CHANNELS)[:, None]
    offset = (image * c + channel) * size + pixel[None, :]
    inside = (channel < c) & (pixel < size)[None, :]
    eps_uncond = tl.load(eps_uncond_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    eps_text = tl.load(eps_text_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    eps = eps_uncond + (guidance_scale * rate)[None, :] * (eps_text - eps_uncond)
    tl.store(eps_ptr + offset, eps.to(eps_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["parts", *SIZES])
def _guide_kernel(eps_uncond_ptr, eps_text_ptr, labels_ptr, sums_ptr, guidance_scale,
                  scales_ptr, token_weights_ptr, eps_ptr, rate_ptr, rate_min, rate_max, max_scale,
                  t, parts, c, h, w, height, width, FACTOR: tl.constexpr, FOREGROUND: tl.constexpr,
                  PARTS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
                  PIXELS: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Rate and guided prediction of PIXELS consecutive pixels, all channels, of one image.

    Grid (b, ceil(height * width / PIXELS)). Every program adds up the partial sums; predictions are
    read once, rate and eps written once, and labels read once but for the patches around the tile,
    whose rates the blur picks from registers. PIXELS x CHANNELS is 4096 elements, 16 a thread.
    """
    image = tl.program_id(0).to(tl.int64)
    guidance_scale = _scale_of(guidance_scale, scales_ptr, image)
    token, part = tl.arange(0, TOKENS), tl.arange(0, PARTS)
    offset = ((image * parts + part[:, None]) * (t + 1) + token[None, :]) * 2
    present = (part < parts)[:, None] & (token <= t)[None, :]
    amount = tl.sum(tl.load(sums_ptr + offset, mask=present, other=0.0), axis=0)
    count = tl.sum(tl.load(sums_ptr + offset + 1, mask=present, other=0.0), axis=0)
    rates = _region_rates(amount, count, token, t, guidance_scale, rate_min, rate_max, max_scale,
                          FOREGROUND)  # fmt: skip
    rates = _weighted(rates, token_weights_ptr, image, token, t)
    start = tl.program_id(1) * PIXELS
    pixel = start + tl.arange(0, PIXELS)
    final = tl.minimum(start + PIXELS, height * width) - 1
    first_row = tl.maximum(start // width - 1, 0) // FACTOR
    final_row = tl.minimum(final // width + 1, height - 1) // FACTOR
    patch = first_row * w + tl.arange(0, WINDOW)
    label = tl.load(labels_ptr + image * h * w + patch, mask=patch < (final_row + 1) * w, other=0)
    label = tl.minimum(tl.maximum(label.to(tl.int32), 0), t - 1)  # never outside, whatever is given
    patch_rates = tl.gather(rates, label, 0)  # (WINDOW,)
    y, x = tl.minimum(pixel, final) // width, pixel % width
    rate = tl.full((PIXELS,), 0.0, tl.float32)
    for dy in tl.static_range(-1, 2):
        row = (_reflect(y + dy, height) // FACTOR - first_row) * w
        for dx in tl.static_range(-1, 2):
            near = tl.gather(patch_rates, row + _reflect(x + dx, width) // FACTOR, 0)
            rate += (CENTRE if dy == 0 else SIDE) * (CENTRE if dx == 0 else SIDE) * near
    _combine(eps_uncond_ptr, eps_text_ptr, eps_ptr, rate_ptr, rate, guidance_scale, image, pixel, c,
             height * width, CHANNELS)  # fmt: skip


def partials(pixels: int) -> int:
    """How many partial sums `region_sums` writes for an image of so many pixels.

    One program per 512 pixels; at most 8, since every program of `guide` reads all of them.
    """
    return min(8, triton.cdiv(pixels, 512))


def _tokens(t: int) -> int:
    """Lanes for t tokens and the foreground: one kernel for prompts of 77, 154 and 231."""
    return max(256, triton.next_power_of_2(t + 1))


def _sums_blocks(t: int, factor: int) -> dict:
    tokens, area = _tokens(t), triton.next_power_of_2(factor * factor)
    patches = max(1, min(8192 // tokens, 1024 // area))
    return dict(FACTOR=factor, AREA=area, PATCHES=patches, TOKENS=tokens)


def _guide_blocks(c: int, t: int, parts: int, factor: int, height: int, width: int) -> dict:
    channels = triton.next_power_of_2(c)
    pixels = min(1024, max(64, 4096 // channels))
    rows = triton.cdiv(pixels, width) + (pixels % width > 0) + 2  # of pixels, neighbours included
    rows = min((rows + factor - 2) // factor + 1, triton.cdiv(height, factor))  # of patches
    window = triton.next_power_of_2(rows * triton.cdiv(width, factor))
    return dict(FACTOR=factor, PARTS=triton.next_power_of_2(parts), CHANNELS=channels,
                TOKENS=_tokens(t), PIXELS=pixels, WINDOW=window)  # fmt: skip


def region_sums(
    eps_uncond: Tensor,
    eps_text: Tensor,
    labels: Tensor,
    foreground: Tensor,
    token_count: int,
    factor: int,
) -> Tensor:
    """Sum of the guidance norm and number of pixels of every region.

    Twin of `scfg.reference.region_sums`: same arguments, accumulated in float32.

    Returns:
        (b, p, t+1, 2) float32 with p from `partials`; only the total over p is defined.

    Raises:
        RuntimeError: An input requires grad.
        TypeError: An input is float64.
    """
    check_inputs("region_sums", eps_uncond, eps_text)
    b, c, height, width = eps_text.shape
    h, w = labels.shape[1:]
    parts = partials(height * width)
    sums = eps_text.new_empty((b, parts, token_count + 1, 2), dtype=torch.float32)
    with on_device_of(sums):
        _region_sums_kernel[(b, parts)](
            eps_uncond, eps_text, labels, foreground, sums, token_count, c, h, w, height, width,
            **_sums_blocks(token_count, factor), **OPTIONS)  # fmt: skip
    return sums


def guide(
    eps_uncond: Tensor,
    eps_text: Tensor,
    labels: Tensor,
    sums: Tensor,
    guidance_scale: float | Tensor,
    factor: int,
    benchmark: str = "foreground",
    rate_min: float = 0.8,
    rate_max: float = 3.0,
    max_scale: float | None = 15.0,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rates of the regions, spread over their pixels and blurred, and the guided prediction.

    Twin of `scfg.reference.guide`: same arguments, accumulated in float32.

    Returns:
        eps (b, c, H, W) in the type of eps_text, rate (b, 1, H, W) float32.

    Raises:
        RuntimeError: An input requires grad.
        TypeError: An input is float64.
    """
    scales = guidance_scale if isinstance(guidance_scale, Tensor) else None
    check_inputs("guide", eps_uncond, eps_text, sums, scales, token_weights)
    b, c, height, width = eps_text.shape
    h, w = labels.shape[1:]
    parts, tokens = sums.shape[1], sums.shape[2] - 1
    eps = torch.empty_like(eps_text)
    rate = eps_text.new_empty((b, 1, height, width), dtype=torch.float32)
    blocks = _guide_blocks(c, tokens, parts, factor, height, width)
    with on_device_of(eps):
        _guide_kernel[(b, triton.cdiv(height * width, blocks["PIXELS"]))](
            eps_uncond, eps_text, labels, sums, guidance_scale if scales is None else 1.0, scales,
            token_weights, eps, rate,
            rate_min, rate_max, max_scale, tokens, parts, c, h, w, height, width,
            FOREGROUND=benchmark == "foreground", **blocks, **OPTIONS)  # fmt: skip
    return eps, rate
