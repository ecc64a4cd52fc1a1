"""Regions of an image whose prompts each cover a part of it, from what each part attended to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scfg import reference
from scfg.config import SCFGConfig
from scfg.evidence import Evidence
from scfg.guidance import find_regions


@dataclass
class Part:
    """One prompt's share of an image.

    Attributes:
        evidence: Of its b rows, recorded on its own area.
        tokens: t.
        area: (h, w, y, x) in latent pixels, or None for the whole image.
        weight: (b, h, w), how much its prediction counts at each pixel; None: 1.
    """

    evidence: Evidence
    tokens: int
    area: tuple[int, int, int, int] | None = None
    weight: Tensor | None = None


def compose(
    text: list[Part], uncond: list[Part], size: tuple[int, int], config: SCFGConfig, backend: str
) -> tuple[Tensor, Tensor, int]:
    """Labels and foreground of every latent pixel.

    A pixel belongs to a token of the prompt that counts most there; the tokens of prompt i are
    numbered after those of the prompts before it.

    Args:
        text: Prompts.
        uncond: Negative prompts.
        size: (H, W) of the latent.
        config: Constants.
        backend: See `scfg.ops`.

    Returns:
        labels (b, H, W) int64, foreground (b, H, W) bool, number of tokens of all prompts.
    """
    factor, tokens = config.map_reduction, sum(part.tokens for part in text)
    if len(text) == len(uncond) == 1 and text[0].area is uncond[0].area is None:
        regions = find_regions(text[0].evidence, uncond[0].evidence, config, backend)
        labels, foreground = (reference.spread(x, *size, factor) for x in regions)
        return labels, foreground, tokens
    found = [find_regions(part.evidence, part.evidence, config, backend) for part in text]
    first = 0
    for i, part in enumerate(text):
        found[i] = found[i][0] + first, found[i][1]
        first += part.tokens
    labels = _lay(text, [pair[0] for pair in found], size, factor)
    marks = found
    if config.foreground == "uncond":
        marks = [find_regions(part.evidence, part.evidence, config, backend) for part in uncond]
    marked = uncond if config.foreground == "uncond" else text
    return labels, _lay(marked, [pair[1] for pair in marks], size, factor), tokens


def _lay(parts: list[Part], maps: list[Tensor], size: tuple[int, int], factor: int) -> Tensor:
    """Patch maps (b, h, w) of parts as one pixel map (b, H, W), the part of most weight on top."""
    result = maps[0].new_zeros(maps[0].shape[0], *size)
    most = torch.zeros(result.shape, device=result.device)
    for part, patches in zip(parts, maps, strict=True):
        h, w, y, x = part.area or (*size, 0, 0)
        weight = most.new_ones(1) if part.weight is None else part.weight.to(most)
        where = (..., slice(y, y + h), slice(x, x + w))
        over = weight > most[where]
        pixels = reference.spread(patches.to(result.device), h, w, factor)
        result[where] = torch.where(over, pixels, result[where])
        most[where] = torch.maximum(most[where], weight.expand_as(over))
    return result
