"""CFG and S-CFG as functions of two predictions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scfg import ops
from scfg.config import SCFGConfig
from scfg.evidence import Evidence, find_reduction, fold, level_weights, map_grid


@dataclass(frozen=True, eq=False)
class Regions:
    """Steps 1 and 2 of the method: which token owns each patch of b images.

    Attributes:
        labels: (b, h, w) int64 in [0, tokens), token that owns each patch.
        foreground: (b, h, w) bool.
        tokens: t.
        start_is_flat: (b,) bool, whether the branch that should mark the foreground has no START
            (see `scfg.reference.start_is_flat`), so that the text's START marked it.
    """

    labels: Tensor
    foreground: Tensor
    tokens: int
    start_is_flat: Tensor


@dataclass(frozen=True, eq=False)
class Guided:
    """Steps 3 and 4: what guidance by regions comes to.

    Attributes:
        eps: (b, c, H, W) guided prediction, in the type of eps_text.
        rate: (b, 1, H, W) float32, multiplier of the guidance scale.
        labels: (b, h, w) int64, token that owns each patch.
        foreground: (b, h, w) bool.
        start_is_flat: (b,) bool, see `Regions`.
    """

    eps: Tensor
    rate: Tensor
    labels: Tensor
    foreground: Tensor
    start_is_flat: Tensor


def as_scale(guidance_scale: float | Tensor, eps: Tensor) -> float | Tensor:
    """The guidance scale as a float, or as a (b,) float32 tensor on the device of eps.

    Raises:
        ValueError: It is not finite and > 0 (a tensor is checked on a CPU only), or not (b,).
    """
    b = eps.shape[0]
    if not isinstance(guidance_scale, Tensor):
        if not 0 < guidance_scale < math.inf:  # which a compiler follows, unlike isfinite
            raise ValueError(f"guidance_scale must be finite and > 0, got {guidance_scale}")
        return float(guidance_scale)
    if guidance_scale.shape not in ((), (b,)):
        raise ValueError(
            f"guidance_scale must be a float or of shape ({b},), got {tuple(guidance_scale.shape)}"
        )
    scale = guidance_scale.to(eps.device, torch.float32).expand(b)
    if scale.device.type == "cpu" and not torch.compiler.is_compiling():
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise ValueError(f"guidance_scale must be finite and > 0, got {scale.tolist()}")
    return scale


def cfg(eps_uncond: Tensor, eps_text: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: ``eps_uncond + guidance_scale * (eps_text - eps_uncond)``.

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).
        guidance_scale: Float or (b,) tensor, > 0; 1 is eps_text.

    Returns:
        (b, c, H, W) in the type of eps_text, computed in float32 at least.

    Raises:
        ValueError: guidance_scale is not finite and > 0.
    """
    wide = torch.promote_types(eps_text.dtype, torch.float32)
    scale = as_scale(guidance_scale, eps_text)
    if isinstance(scale, Tensor):
        scale = scale.to(wide)[:, None, None, None]
    eps = eps_uncond.to(wide) + scale * (eps_text.to(wide) - eps_uncond.to(wide))
    return eps.to(eps_text.dtype)


def _levels(uncond: Evidence, text: Evidence, config: SCFGConfig) -> tuple:
    """tokens, start, h, w and factors of `scfg.reference.segment`."""
    for name, branch in (("uncond", uncond), ("text", text)):
        if branch.tokens < 2:
            raise ValueError(f"{name} must have START and another token, got {branch.tokens} token")
    if text.reductions != uncond.reductions or text.size != uncond.size:
        raise RuntimeError(
            f"both branches must be recorded alike, got levels {uncond.reductions} of size "
            f"{uncond.size} (unconditional) and {text.reductions} of size {text.size} (text)"
        )
    tokens = [text.total(r) for r in text.reductions]
    start = [uncond.total(r) for r in text.reductions] if config.foreground == "uncond" else tokens
    factors = [r // config.map_reduction for r in text.reductions]
    h, w = map_grid(text.size, config.map_reduction)
    return tokens, start, h, w, factors


def find_regions(
    *, uncond: Evidence, text: Evidence, config: SCFGConfig, backend: str = "auto"
) -> Regions:
    """Regions from what the U-Net said in its two branches.

    Args:
        uncond: Evidence of the unconditional branch, b rows.
        text: Evidence of the text branch, b rows.
        config: Its foreground says whose START counts.
        backend: See `scfg.ops`.

    Returns:
        Regions.

    Raises:
        RuntimeError: The branches do not have the same levels.
        ValueError: A branch has one token only, which is START: no region could have a word.
    """
    tokens, start, h, w, factors = _levels(uncond, text, config)
    labels, foreground, flat = ops.segment(tokens, start, h, w, factors, backend)
    return Regions(labels, foreground, text.tokens, flat)


def guide_regions(
    eps_uncond: Tensor,
    eps_text: Tensor,
    regions: Regions,
    guidance_scale: float | Tensor,
    config: SCFGConfig,
    backend: str = "auto",
    token_weights: Tensor | None = None,
) -> Guided:
    """Steps 3 and 4 of the method: rates of given regions, and the guided prediction.

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).
        regions: Of the same images; how many latent pixels a patch has follows from their size.
        guidance_scale: Float or (b,) tensor, > 0.
        config: Its benchmark, rate_min, rate_max and max_scale are used.
        backend: See `scfg.ops`.
        token_weights: (t,) or (b, t) multiplies the rate of each token's region, or None.

    Returns:
        Guided.

    Raises:
        ValueError: The regions are those of another batch or size.
    """
    factor = _pixels_per_patch(eps_text, regions.labels)
    if token_weights is not None:
        token_weights = token_weights.to(eps_text.device, torch.float32)
        token_weights = token_weights.expand(eps_text.shape[0], -1)
    sums = ops.region_sums(
        eps_uncond,
        eps_text,
        regions.labels,
        regions.foreground,
        tokens=regions.tokens,
        factor=factor,
        backend=backend,
    )
    eps, rate = ops.guide(
        eps_uncond,
        eps_text,
        regions.labels,
        sums,
        as_scale(guidance_scale, eps_text),
        factor=factor,
        benchmark=config.benchmark,
        rate_min=config.rate_min,
        rate_max=config.rate_max,
        max_scale=config.max_scale,
        token_weights=token_weights,
        backend=backend,
    )
    return Guided(eps, rate, regions.labels, regions.foreground, regions.start_is_flat)


def guide_evidence(
    eps_uncond: Tensor,
    eps_text: Tensor,
    *,
    uncond: Evidence,
    text: Evidence,
    guidance_scale: float | Tensor,
    config: SCFGConfig,
    backend: str = "auto",
    token_weights: Tensor | None = None,
) -> Guided:
    """`find_regions`, then `guide_regions`, as one operation: on a GPU, mostly one launch.

    Raises:
        RuntimeError: As `find_regions`.
        ValueError: As both.
    """
    tokens, start, h, w, factors = _levels(uncond, text, config)
    if token_weights is not None:
        token_weights = token_weights.to(eps_text.device, torch.float32)
        token_weights = token_weights.expand(eps_text.shape[0], -1)
    eps, rate, labels, foreground, flat = ops.guide_evidence(
        eps_uncond,
        eps_text,
        tokens,
        start,
        h,
        w,
        factors,
        as_scale(guidance_scale, eps_text),
        factor=config.map_reduction,
        benchmark=config.benchmark,
        rate_min=config.rate_min,
        rate_max=config.rate_max,
        max_scale=config.max_scale,
        token_weights=token_weights,
        backend=backend,
    )
    return Guided(eps, rate, labels, foreground, flat)


def _pixels_per_patch(eps: Tensor, labels: Tensor) -> int:
    """Latent pixels along each axis of a patch of the label grid: a power of two."""
    size, grid = tuple(eps.shape[-2:]), tuple(labels.shape[-2:])
    factor = 1
    while factor < 2 * max(size):
        if map_grid(size, factor) == grid:
            return factor
        factor *= 2
    raise ValueError(
        f"regions must be for a latent of size {size} reduced by a power of two, got a grid {grid}"
    )


def semantic_cfg(
    eps_uncond: Tensor,
    eps_text: Tensor,
    self_maps: list[Tensor],
    cross_maps: list[Tensor],
    guidance_scale: float | Tensor,
    config: SCFGConfig = SCFGConfig(),  # noqa: B008  (frozen)
    backend: str = "auto",
    token_weights: Tensor | None = None,
) -> Guided:
    """Semantic-aware classifier-free guidance of one denoising step.

    ``eps = eps_uncond + guidance_scale * rate * (eps_text - eps_uncond)``, rate being constant, but
    for a 3 x 3 blur, on each region of the latent that the text branch's attention gives to one
    token. The same whether the predictions are noise, v, x0 or flow velocity: at one step their
    differences are proportional, and rates are ratios.

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).
        self_maps: One (2b, n, n) per layer, head-mean probabilities, unconditional rows first. n
            must be ceil(H/r) * ceil(W/r) for a power of two r; layers at other r than config's are
            left out.
        cross_maps: One (2b, n, t) per layer; token 0 is START.
        guidance_scale: Float or (b,) tensor, > 0.
        config: Constants.
        backend: See `scfg.ops`.
        token_weights: (t,) or (b, t) multiplies the rate of each token's region, or None.

    Returns:
        Guided: eps, rate, labels, foreground. Statistics are accumulated in float32.

    Raises:
        ValueError: Wrong shape, NaN or infinity, a scale <= 0, or no layer at a chosen resolution.
        TypeError: Not floating point tensors.

    Source: Shen et al., CVPR 2024, arXiv 2404.05384; see `SCFGConfig` for where the code differs.
    """
    if len(self_maps) != len(cross_maps) or not self_maps:
        raise ValueError(
            "self_maps and cross_maps must have one entry per layer, at least one, "
            f"got {len(self_maps)} and {len(cross_maps)}"
        )
    ops.check_predictions(eps_uncond, eps_text)
    b = eps_text.shape[0]
    both = _fold_maps(eps_text, self_maps, cross_maps, config, backend)
    return guide_evidence(
        eps_uncond,
        eps_text,
        uncond=both.rows(0, b),
        text=both.rows(b, 2 * b),
        guidance_scale=guidance_scale,
        config=config,
        backend=backend,
        token_weights=token_weights,
    )


def _fold_maps(
    eps: Tensor,
    self_maps: list[Tensor],
    cross_maps: list[Tensor],
    config: SCFGConfig,
    backend: str,
) -> Evidence:
    """Evidence, of 2b rows, of given maps."""
    b, size = eps.shape[0], tuple(eps.shape[-2:])
    evidence = Evidence(size)
    weights = level_weights(size, config, eps.device)
    powers = tuple(1 << level for level in range(max(size).bit_length() + 1))
    for layer, (self_map, cross_map) in enumerate(zip(self_maps, cross_maps, strict=True)):
        ops.check_map(cross_map, f"cross_maps[{layer}]", 2 * b)
        n, t = cross_map.shape[1:]
        ops.check_map(self_map, f"self_maps[{layer}]", 2 * b, n, n)
        if t != cross_maps[0].shape[2]:
            raise ValueError(
                f"cross_maps[{layer}] must have {cross_maps[0].shape[2]} tokens, got {t}"
            )
        reduction = find_reduction(size, n, config.reductions)
        if reduction is not None:
            fold(evidence, reduction, self_map, cross_map, weights[reduction], config, backend)
        elif find_reduction(size, n, powers) is None:
            raise ValueError(
                f"cross_maps[{layer}] must have ceil(H/r) * ceil(W/r) pixels, r a power of 2, "
                f"(H, W) = {size}, got {n}"
            )
    if not evidence.levels:
        raise ValueError(
            f"self_maps must hold a layer at one of the reductions {config.reductions} of a latent "
            f"of size {size}, got n = {[m.shape[1] for m in self_maps]}"
        )
    return evidence
