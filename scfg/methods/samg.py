"""SAMG: a scale for every pixel, low where the text acts strongly."""

from torch import Tensor


def samg(eps_uncond: Tensor, eps_text: Tensor, guidance_scale: float) -> tuple[Tensor, Tensor]:
    """Spatially adaptive guidance by the energy of each pixel: S-CFG's rival without attention.

    ``E = mean_c (eps_text - eps_uncond)^2``, ``E' = (E - min E) / (max E - min E + 1e-8)`` over the
    pixels of an image, ``scale = w_max - E' (w_max - w_min)``, with w_min = 2/3 and w_max = 1.6
    times the guidance scale, which come to the published [5, 12] at 7.5.

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).
        guidance_scale: g.

    Returns:
        The guided prediction (b, c, H, W), and the rate (b, 1, H, W) of ``g * rate = scale``.

    Source: Li et al., arXiv 2604.26503, as catalogued by a third party; the paper itself was not at
    hand, and a schedule over time, if it has one, is not here.
    """
    difference = eps_text.float() - eps_uncond.float()
    energy = difference.square().mean(dim=1, keepdim=True)  # (b, 1, H, W)
    low, high = energy.amin(dim=(2, 3), keepdim=True), energy.amax(dim=(2, 3), keepdim=True)
    rate = 1.6 - (energy - low) / (high - low + 1e-8) * (1.6 - 2 / 3)
    return eps_uncond + guidance_scale * rate * difference, rate
