"""All that follows the last recorded layer, in one launch: from evidence to the guided prediction.

The rate of a region needs its mean over the whole image, so between sums and guidance everybody
waits for everybody. One program an image makes that wait a barrier inside the program: no second
launch, no counters in memory, and every sum in a fixed order. Larger images need more programs than
one, and there the same three phases are three launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton import guidance, regions
from csrc_triton.blur import CENTRE, SIDE, _reflect
from csrc_triton.choices import chosen
from csrc_triton.guidance import SIZES, _combine, _region_rates, _scale_of, _sums, _weighted
from csrc_triton.launch import OPTIONS, check_inputs, on_device_of
from csrc_triton.regions import _flatness, _segment_tile

# One multiprocessor does all of an image: SD 1.5 at 512 has 256 patches and 16,384 values of a
# prediction, SDXL at 1024 has the limits. Arithmetic, not timings: 1024 patches of 77 tokens are
# some 5 M products, 40,000 clocks, and 1 MB is read and written at 50 bytes per ns, 20 us. Three
# launches spread that over the GPU, but cost the host two more, for which a fast GPU waits.
PATCHES, VALUES = 1024, 64  # of a patch


@triton.jit(do_not_specialize=["u", *SIZES])
def _guide_evidence_kernel(
    eps_uncond_ptr, eps_text_ptr, text_ptr, front_ptr, guidance_scale, scales_ptr,
    token_weights_ptr, eps_ptr, rate_ptr, labels_ptr, foreground_ptr, flat_ptr, patch_rates_ptr,
    rate_min, rate_max, max_scale, t, u, c, h, w, height, width,
    FACTOR: tl.constexpr, FOREGROUND: tl.constexpr, FACTORS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_T: tl.constexpr, TOKENS: tl.constexpr,
    AREA: tl.constexpr, PATCHES: tl.constexpr, CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr):  # fmt: skip
    """All of one image. Grid (b,).

    Labels tile by tile; barrier; sums and rates in registers, the rate of each patch to memory;
    barrier; then PIXELS at a time the rate is blurred from the patches and applied. Evidence is
    read once but for halos, predictions twice, results written once; what a phase leaves for the
    next, 21 bytes a patch, stays in the cache.
    """
    image = tl.program_id(0).to(tl.int64)
    flat, both = _flatness(text_ptr, front_ptr, image, t, u, h, w, FACTORS)
    across = tl.cdiv(w, COLS)
    for tile in range(0, tl.cdiv(h, ROWS) * across):
        top, left = tile // across * ROWS, tile % across * COLS
        _segment_tile(text_ptr, front_ptr, labels_ptr, foreground_ptr, image, flat, both, top,
                      left, t, u, h, w, FACTORS, ROWS, COLS, BLOCK_T)  # fmt: skip
    tl.store(flat_ptr + image, flat)
    tl.debug_barrier()  # labels and foreground are complete
    amount, count = _sums(eps_uncond_ptr, eps_text_ptr, labels_ptr, foreground_ptr, image, 0, 1,
                          t, c, h, w, height, width, FACTOR, AREA, PATCHES, TOKENS)  # fmt: skip
    scale, token = _scale_of(guidance_scale, scales_ptr, image), tl.arange(0, TOKENS)
    rates = _region_rates(amount, count, token, t, scale, rate_min, rate_max, max_scale,
                          FOREGROUND)  # fmt: skip
    rates = _weighted(rates, token_weights_ptr, image, token, t)
    for begin in range(0, h * w, PIXELS):
        patch = begin + tl.arange(0, PIXELS)
        label = tl.load(labels_ptr + image * h * w + patch, mask=patch < h * w, other=0)
        near = tl.gather(rates, label.to(tl.int32), 0)
        tl.store(patch_rates_ptr + image * h * w + patch, near, mask=patch < h * w)
    tl.debug_barrier()  # so are the rates of patches
    for begin in range(0, height * width, PIXELS):
        pixel = begin + tl.arange(0, PIXELS)
        inside = pixel < height * width
        y, x = pixel // width, pixel % width
        rate = tl.full((PIXELS,), 0.0, tl.float32)
        for dy in tl.static_range(-1, 2):
            row = (image * h + _reflect(y + dy, height) // FACTOR) * w
            for dx in tl.static_range(-1, 2):
                at = row + _reflect(x + dx, width) // FACTOR
                near = tl.load(patch_rates_ptr + at, mask=inside, other=0.0)
                rate += (CENTRE if dy == 0 else SIDE) * (CENTRE if dx == 0 else SIDE) * near
        _combine(eps_uncond_ptr, eps_text_ptr, eps_ptr, rate_ptr, rate, scale, image, pixel, c,
                 height * width, CHANNELS)  # fmt: skip


def _blocks(c: int, t: int, w: int, factor: int, factors: list[int]) -> dict:
    """The constants of the kernel: those of its phases."""
    tile, sums = regions._blocks(w, factors), guidance._sums_blocks(t, factor)
    channels = triton.next_power_of_2(c)
    return dict(
        FACTOR=factor, FACTORS=tile["FACTORS"], ROWS=tile["ROWS"],
        COLS=tile["COLS"], BLOCK_T=tile["TOKENS"], TOKENS=sums["TOKENS"], AREA=sums["AREA"],
        PATCHES=sums["PATCHES"], CHANNELS=channels,
        PIXELS=min(1024, max(32, 2048 // channels)))  # fmt: skip


def guide_evidence(
    eps_uncond: Tensor,
    eps_text: Tensor,
    text: list[Tensor],
    front: list[Tensor],
    h: int,
    w: int,
    factors: list[int],
    guidance_scale: float | Tensor,
    factor: int,
    benchmark: str = "foreground",
    rate_min: float = 0.8,
    rate_max: float = 3.0,
    max_scale: float | None = 15.0,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the evidence of all levels to the guided prediction.

    Twin of `scfg.reference.guide_evidence`: same arguments, same results, accumulated in float32.
    One launch up to PATCHES patches and VALUES values of a prediction for each of them, else three.

    Raises:
        RuntimeError: An input requires grad.
        TypeError: An input is float64.
    """
    scales = guidance_scale if isinstance(guidance_scale, Tensor) else None
    check_inputs("guide_evidence", eps_uncond, eps_text, *text, *front, scales, token_weights)
    b, c, height, width = eps_text.shape
    t = text[0].shape[2] - 1
    limits = dict(rate_min=rate_min, rate_max=rate_max, max_scale=max_scale)
    most = chosen("PATCHES", PATCHES)
    if h * w > most or c * height * width > VALUES * most:
        labels, foreground, flat = regions.segment(text, front, h, w, factors)
        sums = guidance.region_sums(eps_uncond, eps_text, labels, foreground, t, factor)
        eps, rate = guidance.guide(
            eps_uncond, eps_text, labels, sums, guidance_scale, factor, benchmark,
            token_weights=token_weights, **limits)  # fmt: skip
        return eps, rate, labels, foreground, flat
    eps = torch.empty_like(eps_text)
    rate = eps_text.new_empty((b, 1, height, width), dtype=torch.float32)
    labels = eps_text.new_empty((b, h, w), dtype=torch.int64)
    foreground = eps_text.new_empty((b, h, w), dtype=torch.bool)
    flat = eps_text.new_empty((b,), dtype=torch.bool)
    patch_rates = eps_text.new_empty((b, h, w), dtype=torch.float32)
    with on_device_of(eps):
        _guide_evidence_kernel[(b,)](
            eps_uncond, eps_text, tuple(text), tuple(front),
            guidance_scale if scales is None else 1.0, scales, token_weights, eps, rate, labels,
            foreground, flat, patch_rates, t=t, u=front[0].shape[2] - 1, c=c, h=h, w=w,
            height=height, width=width, FOREGROUND=benchmark == "foreground", **limits,
            **_blocks(c, t, w, factor, factors), **OPTIONS, num_stages=2)  # fmt: skip
    return eps, rate, labels, foreground, flat
