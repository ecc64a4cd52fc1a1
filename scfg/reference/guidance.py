"""Guidance by region: norms, rates and the guided prediction, equations 6 to 8."""

import torch
from einops import rearrange
from torch import Tensor

from scfg.reference.grids import blur, spread
from scfg.reference.precision import wide
from scfg.reference.regions import segment


def _each(guidance_scale: float | Tensor, x: Tensor) -> Tensor:
    """The guidance scale in the type of x, (b, ...), to be multiplied with it."""
    if isinstance(guidance_scale, Tensor):
        return guidance_scale.to(x).reshape(-1, *[1] * (x.dim() - 1))
    return x.new_full((), guidance_scale)


def guidance_norm(eps_uncond: Tensor, eps_text: Tensor) -> Tensor:
    """How strongly the text acts on each pixel: ``a(x) = ||eps_text(x) - eps_uncond(x)||_2``.

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).

    Returns:
        (b, H, W) in the accumulation type, >= 0.

    Source: equation 7 of the paper.
    """
    return (wide(eps_text) - wide(eps_uncond)).norm(dim=1)


def region_sums(
    eps_uncond: Tensor,
    eps_text: Tensor,
    labels: Tensor,
    foreground: Tensor,
    token_count: int,
    factor: int,
) -> Tensor:
    """Sum of the guidance norm and number of pixels of every region.

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).
        labels: (b, h, w) int64, pixel (i, j) belongs to patch (i // factor, j // factor).
        foreground: (b, h, w) bool.
        token_count: t.
        factor: Latent pixels per patch.

    Returns:
        (b, p, t+1, 2) in the accumulation type: [sum, count] of the t token regions, then of the
        foreground, in p partial sums of which only the total over p is defined (here p = 1).
        Source: none, bookkeeping for equation 8.
    """
    a = guidance_norm(eps_uncond, eps_text)  # (b, H, W)
    a = rearrange([a, torch.ones_like(a)], "k b h w -> b (h w) k")
    size = eps_text.shape[-2:]
    owner = rearrange(spread(labels, *size, factor), "b h w -> b (h w)")
    sums = a.new_zeros(a.shape[0], token_count, 2)
    sums = sums.scatter_add(1, owner[..., None].expand(-1, -1, 2), a)  # (b, t, 2)
    inside = rearrange(spread(foreground, *size, factor), "b h w -> b (h w)")
    benchmark = torch.where(inside[..., None], a, 0).sum(dim=1, keepdim=True)  # (b, 1, 2)
    return torch.cat([sums, benchmark], dim=1)[:, None]


def region_rates(
    sums: Tensor,
    guidance_scale: float | Tensor,
    benchmark: str = "foreground",
    rate_min: float = 0.8,
    rate_max: float = 3.0,
    max_scale: float | None = 15.0,
) -> Tensor:
    """Rate of each token's region.

    ``rate_i = clamp(mean_benchmark(a) / mean_i(a), rate_min, rate_max)``, then at most
    ``max_scale / guidance_scale``. 1 for a region on which the guidance is zero everywhere, and for
    every region of an image whose benchmark region is empty (that image gets plain CFG).

    Args:
        sums: (b, p, t+1, 2) from `region_sums`.
        guidance_scale: Float or (b,), > 0.
        benchmark: ``"foreground"`` or ``"image"`` (all pixels).
        rate_min: Least rate.
        rate_max: Largest rate.
        max_scale: Largest guidance_scale * rate, or None.

    Returns:
        (b, t) in the accumulation type, dimensionless; a token without pixels has an unused value.

    Source: equation 8 of the paper; clamp and cap from the code. On an empty foreground the code
    lets every rate fall to its minimum; here that image is left to plain CFG.
    """
    sums = sums.sum(dim=1)  # (b, t+1, 2)
    regions = sums[:, :-1]  # (b, t, 2)
    reference = sums[:, -1:] if benchmark == "foreground" else regions.sum(dim=1, keepdim=True)
    mean = regions[..., 0] / regions[..., 1].clamp_min(1)  # (b, t)
    standard = reference[..., 0] / reference[..., 1].clamp_min(1)  # (b, 1)
    some = torch.where(mean == 0, 1.0, mean)  # dividing by zero would make gradients NaN
    rate = torch.where(mean == 0, 1.0, standard / some).clamp(rate_min, rate_max)
    if max_scale is not None:
        rate = torch.minimum(rate, max_scale / _each(guidance_scale, rate))
    return torch.where(reference[..., 1] == 0, 1.0, rate)


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

    ``eps = eps_uncond + guidance_scale * rate * (eps_text - eps_uncond)``

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).
        labels: (b, h, w) int64.
        sums: (b, p, t+1, 2) from `region_sums`.
        guidance_scale: Float or (b,), > 0.
        factor: Latent pixels per patch.
        benchmark: See `region_rates`.
        rate_min: See `region_rates`.
        rate_max: See `region_rates`.
        max_scale: See `region_rates`.
        token_weights: (b, t) multiplies the rate of each token's region, after clamp and cap; or
            None.

    Returns:
        eps (b, c, H, W) in the type of eps_text, rate (b, 1, H, W) in the accumulation type.

    Source: equations 6 and 8 of the paper; the blur of the rate map from the code.
    """
    rates = region_rates(sums, guidance_scale, benchmark, rate_min, rate_max, max_scale)  # (b, t)
    if token_weights is not None:
        rates = rates * token_weights.to(rates)
    patches = rates.gather(1, labels.flatten(1)).view(labels.shape)  # (b, h, w)
    rate = blur(spread(patches, *eps_text.shape[-2:], factor))[:, None]  # (b, 1, H, W)
    scale = _each(guidance_scale, rate) * rate
    eps = wide(eps_uncond) + scale * (wide(eps_text) - wide(eps_uncond))
    return eps.to(eps_text.dtype), rate


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
    """From the evidence of all levels to the guided prediction: `segment`, `region_sums`, `guide`.

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).
        text: See `segment`.
        front: See `segment`.
        h: See `segment`.
        w: See `segment`.
        factors: See `segment`.
        guidance_scale: Float or (b,), > 0.
        factor: Latent pixels per patch.
        benchmark: See `region_rates`.
        rate_min: See `region_rates`.
        rate_max: See `region_rates`.
        max_scale: See `region_rates`.
        token_weights: See `guide`.

    Returns:
        eps (b, c, H, W), rate (b, 1, H, W), labels (b, h, w), foreground (b, h, w),
        `start_is_flat` (b,). Source: none, the three in a row.
    """
    labels, foreground, flat = segment(text, front, h, w, factors)
    count = text[0].shape[2] - 1
    sums = region_sums(eps_uncond, eps_text, labels, foreground, count, factor)
    limits = (benchmark, rate_min, rate_max, max_scale)
    eps, rate = guide(
        eps_uncond, eps_text, labels, sums, guidance_scale, factor, *limits, token_weights
    )
    return eps, rate, labels, foreground, flat
