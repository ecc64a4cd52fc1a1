"""CFG and S-CFG as functions of two predictions."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from scfg import checks, ops
from scfg.config import SCFGConfig, check_config
from scfg.evidence import Evidence, fold_maps, map_grid
from scfg.regions import Regions, evidence_levels, find_regions, unet_benchmark


@dataclass(frozen=True, eq=False)
class Guided:
    """Steps 3 and 4: what guidance by regions comes to.

    Attributes:
        eps: (b, c, H, W) guided prediction, in the type of eps_text.
        rate: (b, 1, H, W) float32, multiplier of the guidance scale.
        labels: (b, h, w) int64, token that owns each patch.
        foreground: (b, h, w) bool.
        start_is_flat: (b,) bool, see `Regions`.
        rule: How the region with rate 1 was found, in words.

    A clip of f frames has (b, c, f, H, W), (b, 1, f, H, W) and (b, f, h, w).
    """

    eps: Tensor
    rate: Tensor
    labels: Tensor
    foreground: Tensor
    start_is_flat: Tensor
    rule: str = ""


def cfg(eps_uncond: Tensor, eps_text: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: ``eps_uncond + guidance_scale * (eps_text - eps_uncond)``.

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).
        guidance_scale: Float or (b,) tensor, > 0; 1 is eps_text.

    Returns:
        (b, c, H, W) in the type of eps_text, computed in float32 at least.

    Raises:
        ValueError: guidance_scale is not finite and > 0, or the predictions differ in shape.
        TypeError: An argument is of another type.
    """
    checks.shape(eps_text, "eps_text", "b", "c", "H", "W")
    checks.shape(eps_uncond, "eps_uncond", *eps_text.shape)
    wide = torch.promote_types(eps_text.dtype, torch.float32)
    scale = checks.scale(guidance_scale, eps_text)
    if isinstance(scale, Tensor):
        scale = scale.to(wide)[:, None, None, None]
    eps = eps_uncond.to(wide) + scale * (eps_text.to(wide) - eps_uncond.to(wide))
    return eps.to(eps_text.dtype)


def _row_weights(token_weights: Tensor | None, eps: Tensor, tokens: int) -> Tensor | None:
    """Weights (t,) or (b, t) as (b, t) float32 on the device of eps."""
    if token_weights is None:
        return None
    checks.weights(token_weights)
    b = len(eps)
    if token_weights.shape not in ((tokens,), (b, tokens)):
        raise ValueError(
            f"token_weights must be ({tokens},) or ({b}, {tokens}), got "
            f"{tuple(token_weights.shape)}"
        )
    return token_weights.to(eps.device, torch.float32).expand(b, -1)


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
        eps_uncond: (b, c, H, W), or (b, c, f, H, W).
        eps_text: The same shape.
        regions: Of the same images; how many latent pixels a patch has follows from their size.
        guidance_scale: Float or (b,) tensor, > 0.
        config: Its benchmark, rate_min, rate_max and max_scale are used.
        backend: See `scfg.ops`.
        token_weights: (t,) or (b, t) multiplies the rate of each token's region, or None.

    Returns:
        Guided.

    Raises:
        TypeError: token_weights is not a tensor of real numbers.
        ValueError: The regions are those of another batch or size, or token_weights are not finite
            and > 0 (checked on a CPU only).
    """
    factor = _pixels_per_patch(eps_text, regions.labels)
    scale = checks.scale(guidance_scale, eps_text)
    token_weights = _row_weights(token_weights, eps_text, regions.tokens)
    frames = eps_text.shape[2] if eps_text.dim() == 5 else 1
    labels, foreground = regions.labels, regions.foreground
    if eps_text.dim() == 5:  # each frame by itself, but for the sums
        eps_uncond, eps_text = (
            rearrange(x, "b c f h w -> (b f) c h w") for x in (eps_uncond, eps_text)
        )
        labels, foreground = (x.flatten(0, 1) for x in (labels, foreground))
    sums = ops.region_sums(
        eps_uncond,
        eps_text,
        labels,
        foreground,
        token_count=regions.tokens,
        factor=factor,
        backend=backend,
    )
    if frames > 1:  # one rate for each region of the clip
        clip = rearrange(sums, "(b f) p t k -> b (f p) t k", f=frames)
        sums = clip.repeat_interleave(frames, dim=0)
        scale = scale.repeat_interleave(frames) if isinstance(scale, Tensor) else scale
        if token_weights is not None:
            token_weights = token_weights.repeat_interleave(frames, dim=0)
    eps, rate = ops.guide(
        eps_uncond,
        eps_text,
        labels,
        sums,
        scale,
        factor=factor,
        benchmark=regions.benchmark or ("image" if config.benchmark == "image" else "foreground"),
        rate_min=config.rate_min,
        rate_max=config.rate_max,
        max_scale=config.max_scale,
        token_weights=token_weights,
        backend=backend,
    )
    if regions.labels.dim() == 4:
        eps, rate = (rearrange(x, "(b f) c h w -> b c f h w", f=frames) for x in (eps, rate))
    return Guided(
        eps, rate, regions.labels, regions.foreground, regions.start_is_flat, regions.rule
    )


def guide_evidence(
    eps_uncond: Tensor,
    eps_text: Tensor,
    *,
    uncond: Evidence | None,
    text: Evidence,
    guidance_scale: float | Tensor,
    config: SCFGConfig,
    backend: str = "auto",
    token_weights: Tensor | None = None,
) -> Guided:
    """`find_regions`, then `guide_regions`; of a U-Net as one operation, mostly one launch.

    Raises:
        RuntimeError: As `find_regions`.
        ValueError: As both.
    """
    if text.patches is not None:
        regions = find_regions(uncond=uncond, text=text, config=config, backend=backend)
        return guide_regions(
            eps_uncond, eps_text, regions, guidance_scale, config, backend, token_weights
        )
    benchmark, rule = unet_benchmark(config)
    token_weights = _row_weights(token_weights, eps_text, text.tokens)
    found = ops.guide_evidence(
        eps_uncond,
        eps_text,
        **evidence_levels(uncond=uncond, text=text, config=config),
        guidance_scale=guidance_scale,
        factor=config.map_reduction,
        benchmark=benchmark,
        rate_min=config.rate_min,
        rate_max=config.rate_max,
        max_scale=config.max_scale,
        token_weights=token_weights,
        backend=backend,
    )
    return Guided(*found, rule)


def _pixels_per_patch(eps: Tensor, labels: Tensor) -> int:
    """Latent pixels along each axis of a patch of the label grid: a power of two."""
    size, grid = tuple(eps.shape[-2:]), tuple(labels.shape[-2:])
    if (
        eps.dim() != labels.dim() + 1
        or eps.shape[0] != len(labels)
        or (eps.dim() == 5 and eps.shape[2] != labels.shape[1])
    ):
        raise ValueError(
            f"regions must be of the same images as predictions of shape {tuple(eps.shape)}, got "
            f"labels of shape {tuple(labels.shape)}"
        )
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
        TypeError: Not floating point tensors, or config is no SCFGConfig.

    Source: Shen et al., CVPR 2024, arXiv 2404.05384; see `SCFGConfig` for where the code differs.
    """
    check_config(config)
    checks.listed(self_maps, "self_maps", "layer")
    checks.listed(cross_maps, "cross_maps", "layer")
    if len(self_maps) != len(cross_maps) or not self_maps:
        raise ValueError(
            "self_maps and cross_maps must have one entry per layer, at least one, "
            f"got {len(self_maps)} and {len(cross_maps)}"
        )
    checks.predictions(eps_uncond, eps_text)
    b = eps_text.shape[0]
    both = fold_maps(eps_text, self_maps, cross_maps, config, backend)
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
