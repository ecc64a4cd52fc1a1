"""Regions of an image whose prompts each cover a part of it; as pictures and masks."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scfg import reference
from scfg.config import SCFGConfig
from scfg.drawing.picture import NO_WORD, PALETTE, viridis
from scfg.evidence import Evidence, map_grid
from scfg.guidance import Guided
from scfg.regions import Regions, find_regions

ENLARGED = 8  # image pixels per latent pixel


@dataclass
class Part:
    """One prompt's share of an image.

    Attributes:
        evidence: Of its b rows, recorded on its own area.
        tokens: t.
        area: (h, w, y, x) in latent pixels, or None for the whole image.
        weight: (b, h, w), how much its prediction counts at each pixel; None: 1. (b, f, h, w) of a
            clip.
    """

    evidence: Evidence
    tokens: int
    area: tuple[int, int, int, int] | None = None
    weight: Tensor | None = None


def compose(
    *,
    uncond: list[Part],
    text: list[Part],
    size: tuple[int, int],
    config: SCFGConfig,
    backend: str,
) -> Regions:
    """Regions of latent pixels.

    A pixel belongs to a token of the prompt that counts most there; the tokens of prompt i are
    numbered after those of the prompts before it.

    Args:
        uncond: Negative prompts; may be empty where `scfg.patches.needs_uncond` says so.
        text: Prompts.
        size: (H, W) of the latent.
        config: Constants.
        backend: See `scfg.ops`.

    Returns:
        Regions, labels and foreground (b, H, W), or (b, f, H, W), tokens of all prompts.
    """
    tokens = sum(part.tokens for part in text)

    def find(text: Part, uncond: Part | None) -> Regions:
        other = None if uncond is None else uncond.evidence
        return find_regions(uncond=other, text=text.evidence, config=config, backend=backend)

    whole = [part for part in (*text, *uncond) if part.area is not None] == []
    if whole and len(text) == 1 and len(uncond) < 2:
        found = find(text[0], uncond[0] if uncond else None)
        labels, foreground = (_spread(x, size) for x in (found.labels, found.foreground))
        return replace(found, labels=labels, foreground=foreground, tokens=tokens)
    found = [find(part, part) for part in text]
    first, labels = 0, []
    for part, regions in zip(text, found, strict=True):
        labels.append(regions.labels + first)
        first += part.tokens
    foreground = _lay(text, [regions.foreground for regions in found], size)
    marks = found if config.foreground == "cond" else [find(part, part) for part in uncond]
    marks = marks or found
    flat = torch.stack([regions.start_is_flat.to(labels[0].device) for regions in marks]).any(dim=0)
    if config.foreground == "uncond" and uncond:
        marked = _lay(uncond, [regions.foreground for regions in marks], size)
        keep = flat.view(-1, *(1,) * (foreground.dim() - 1))
        foreground = foreground.where(keep, marked)
    return replace(
        found[0],
        labels=_lay(text, labels, size),
        foreground=foreground,
        tokens=tokens,
        start_is_flat=flat,
    )


def _spread(patches: Tensor, size: tuple[int, int]) -> Tensor:
    """Patch maps (..., h, w) as pixel maps (..., H, W)."""
    factor = 1
    while map_grid(size, factor) != tuple(patches.shape[-2:]):
        factor *= 2
        if factor > 2 * max(size):
            raise ValueError(f"no map of size {size} has a grid of {tuple(patches.shape[-2:])}")
    return reference.spread(patches, *size, factor)


def _lay(parts: list[Part], maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Patch maps (b, h, w) of parts as one pixel map (b, H, W), the part of most weight on top."""
    result = maps[0].new_zeros(*maps[0].shape[:-2], *size)
    most = torch.zeros(result.shape, device=result.device)
    for part, patches in zip(parts, maps, strict=True):
        h, w, y, x = part.area or (*size, 0, 0)
        weight = most.new_ones(1) if part.weight is None else part.weight.to(most)
        where = (..., slice(y, y + h), slice(x, x + w))
        over = weight > most[where]
        pixels = _spread(patches.to(result.device), (h, w))
        result[where] = torch.where(over, pixels, result[where])
        most[where] = torch.maximum(most[where], weight.expand_as(over))
    return result


def draw(guided: Guided, rate_max: float) -> tuple[Tensor, Tensor]:
    """Each token's region in a colour, START's grey; and the rate, 0 dark blue to rate_max yellow.

    Args:
        guided: labels (b, H, W) and rate (b, 1, H, W) are read, or (b, f, H, W), (b, 1, f, H, W).
        rate_max: Largest rate.

    Returns:
        Two (b, 8H, 8W, 3) float32 in [0, 1], on the CPU; frames one after another.
    """
    labels = guided.labels.cpu().flatten(0, -3).numpy()
    area = np.bincount(labels.flatten())
    table = np.zeros((len(area), 3), np.float32)
    for rank, token in enumerate(np.argsort(-area)):
        colour = PALETTE[rank % len(PALETTE)] if token else NO_WORD
        table[token] = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255
    rates = guided.rate[:, 0].cpu().flatten(0, -3).numpy()
    pictures = [np.asarray(viridis(rate, 0.0, rate_max), np.float32) / 255 for rate in rates]
    images = torch.from_numpy(table[labels]), torch.from_numpy(np.stack(pictures))
    return tuple(_enlarge(image) for image in images)


def mask_of(guided: Guided, columns: Tensor) -> Tensor:
    """Where any of some columns of the text owns the image.

    Args:
        guided: labels (b, H, W) or (b, f, H, W) are read.
        columns: (t,) bool.

    Returns:
        (b, 8H, 8W) float32, 0 or 1, on the CPU; frames one after another.
    """
    labels = guided.labels.cpu().flatten(0, -3)
    return _enlarge(columns[labels].float())


def _enlarge(image: Tensor) -> Tensor:
    return image.repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2)
