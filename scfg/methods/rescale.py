"""Rescaled guidance: the spread of the guided prediction brought back towards the text's."""

import torch
from torch import Tensor


def rescale(eps_guided: Tensor, eps_text: Tensor, phi: float) -> Tensor:
    """Bring the spread of a guided prediction back towards that of the text prediction.

    ``phi * eps_guided * std(eps_text) / std(eps_guided) + (1 - phi) * eps_guided``, std over all
    but the batch dimension, in float32 at least. Not a number where eps_guided is constant.

    Args:
        eps_guided: (b, ...), what guidance made.
        eps_text: (b, ...), the conditional prediction alone.
        phi: Strength within [0, 1]; 0 changes nothing.

    Returns:
        The shape and dtype of eps_guided.

    Raises:
        ValueError: phi is out of range.

    Source: Lin et al., arXiv 2305.08891, section 3.4; diffusers' rescale_noise_cfg.
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi must be within [0, 1], got {phi}")
    wide = torch.promote_types(eps_guided.dtype, torch.float32)
    guided, text = eps_guided.to(wide), eps_text.to(wide)
    dims = tuple(range(1, guided.ndim))
    ratio = text.std(dims, keepdim=True) / guided.std(dims, keepdim=True)  # (b, 1, ...)
    return (guided * (phi * ratio + (1 - phi))).to(eps_guided.dtype)
