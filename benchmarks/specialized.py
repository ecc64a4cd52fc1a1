"""The launches that host rules pick at the usual sizes, on device "meta", to compile without a GPU.

Calling ``launcher(*arguments)`` inside `benchmarks.compiled.compiling` compiles exactly what a GPU
would run: the host rule, the types and the alignment are the launcher's own.
"""

from collections.abc import Sequence

import torch

import csrc_triton
from benchmarks import cases
from csrc_triton import guidance
from scfg.evidence import map_grid

# n, heads, d, t of the layers recorded by default: SD 1.5 at 512 and 1024, SD 2.1 at 768, SDXL at
# 1024 and the embedded model; then layers for which no map is formed.
LAYERS = (
    (256, 8, 160, 77), (64, 8, 160, 77), (1024, 8, 160, 77), (576, 20, 64, 77), (144, 20, 64, 77),
    (1024, 20, 64, 77), (256, 2, 32, 16), (64, 2, 64, 16),
)  # fmt: skip
# n, heads, d, t of joint attention: SD3.5-M and the embedded transformer, rows of Qwen-Image.
JOINT = ((4096, 24, 64, 333), (256, 4, 48, 24), (1024, 24, 128, 512))
LARGE = ((16384, 8, 40, 77), (9216, 5, 64, 77))


def _meta(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device="meta")


def _attention(dtype):
    for n, heads, d, t in LAYERS + LARGE:
        pixels, tokens = (_meta(2, m, heads * d, dtype=dtype) for m in (n, t))
        yield csrc_triton.attention_map, (pixels, tokens, heads)
        if n > 4096:
            yield csrc_triton.attention_apply, (pixels, pixels, _meta(2, n, t), heads)
        else:
            yield csrc_triton.attention_maps, (pixels, pixels, pixels, tokens, heads)
    for n, heads, d, t in JOINT:
        q, k = (_meta(2, m, heads * d, dtype=dtype) for m in (n, t + n))
        for joint in ("renormalise", "raw"):
            yield csrc_triton.joint_maps, (q, k, t, heads, None, joint)


def _evidence():
    for n, t in dict.fromkeys((n, t) for n, _, _, t in LAYERS):
        maps, weights, total = (_meta(2, n, n), _meta(2, n, t)), _meta(n), _meta(2, n, t + 1)
        for propagation in ("paper", "none"):
            yield csrc_triton.propagate, (*maps, propagation)
            yield csrc_triton.complete, (*maps, weights, None, propagation)
            yield csrc_triton.complete, (*maps, weights, total, propagation)


def _guidance(dtype):
    for size in cases.SIZES.values():
        eps = _meta(2, *size.latent, dtype=dtype)
        t, factor, (h, w) = size.tokens, size.reduction, size.grid(size.reduction)
        levels = [_meta(2, a * b, t + 1) for a, b in (size.grid(r[0]) for r in size.levels)]
        factors = [level[0] // factor for level in size.levels]
        labels = _meta(2, h, w, dtype=torch.int64)
        foreground, scales, weights = labels.to(torch.bool), _meta(2), _meta(2, t)
        sums = _meta(2, guidance.partials(eps[0, 0].numel()), t + 1, 2)
        yield csrc_triton.segment, (levels, levels, h, w, factors)
        yield csrc_triton.region_sums, (eps, eps, labels, foreground, t, factor)
        image = ("image", 0.8, 3.0, None, weights)
        for options in ((7.5, factor), (scales, factor, *image)):
            yield csrc_triton.guide, (eps, eps, labels, sums, *options)
            yield csrc_triton.guide_evidence, (eps, eps, levels, levels, h, w, factors, *options)


# (latent), tokens of one step after another: SD 1.5's and SDXL's, then ten others.
STEPS = (
    ((64, 64), 77), ((128, 128), 77), ((96, 96), 77), ((64, 96), 77), ((96, 64), 77),
    ((80, 80), 77), ((72, 88), 77), ((68, 68), 77), ((128, 128), 154), ((128, 128), 231),
    ((128, 128), 80), ((104, 152), 77),
)  # fmt: skip


def step(size: tuple[int, int], tokens: int):
    """The launches of a step with two levels of SDXL's heads, as (launcher, arguments)."""
    levels = []
    for reduction in (4, 8):
        n = map_grid(size, reduction)[0] * map_grid(size, reduction)[1]
        pixels, text = (_meta(2, m, 1280, dtype=torch.float16) for m in (n, tokens))
        yield csrc_triton.stacked_maps, (*[[pixels] * 2] * 3, [text] * 2, 20, [None] * 2)
        maps, total = (_meta(2, 2, n, n), _meta(2, 2, n, tokens)), _meta(2, n, tokens + 1)
        for before in (None, total):
            yield csrc_triton.complete, (*maps, _meta(n), before)
        levels.append(total[:1])
    eps = _meta(1, 4, *size, dtype=torch.float16)
    grid = map_grid(size, 4)
    yield csrc_triton.guide_evidence, (eps, eps, levels, levels, *grid, [1, 2], 7.5, 4)


def launches(skip: Sequence[str] = ()):
    """Every launch as (launcher, arguments), but those with tensors of types to skip."""
    yield from _evidence()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if str(dtype).removeprefix("torch.") not in skip:
            yield from _attention(dtype)
            yield from _guidance(dtype)
