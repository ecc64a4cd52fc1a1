"""Regions of an image whose prompts each cover a part of it; as pictures; phrases of a prompt."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scfg import reference
from scfg.config import SCFGConfig
from scfg.drawing.picture import NO_WORD, PALETTE, viridis
from scfg.evidence import Evidence
from scfg.guidance import Guided
from scfg.recording.phrases import weigh_phrases
from scfg.regions import Regions, find_regions

ENLARGED = 8  # image pixels per latent pixel


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
        uncond: Negative prompts.
        text: Prompts.
        size: (H, W) of the latent.
        config: Constants.
        backend: See `scfg.ops`.

    Returns:
        Regions, labels and foreground (b, H, W), tokens of all prompts.
    """
    factor, tokens = config.map_reduction, sum(part.tokens for part in text)

    def find(text: Part, uncond: Part) -> Regions:
        return find_regions(
            uncond=uncond.evidence, text=text.evidence, config=config, backend=backend
        )

    if len(text) == len(uncond) == 1 and text[0].area is uncond[0].area is None:
        found = find(text[0], uncond[0])
        labels, foreground = (
            reference.spread(x, *size, factor) for x in (found.labels, found.foreground)
        )
        return Regions(labels, foreground, tokens, found.start_is_flat)
    found = [find(part, part) for part in text]
    first, labels = 0, []
    for part, regions in zip(text, found, strict=True):
        labels.append(regions.labels + first)
        first += part.tokens
    foreground = _lay(text, [regions.foreground for regions in found], size, factor)
    marks = found if config.foreground == "cond" else [find(part, part) for part in uncond]
    flat = torch.stack([regions.start_is_flat.to(labels[0].device) for regions in marks]).any(dim=0)
    if config.foreground == "uncond":
        marked = _lay(uncond, [regions.foreground for regions in marks], size, factor)
        foreground = foreground.where(flat[:, None, None], marked)
    return Regions(_lay(text, labels, size, factor), foreground, tokens, flat)


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


def draw(guided: Guided, rate_max: float) -> tuple[Tensor, Tensor]:
    """Each token's region in a colour, START's grey; and the rate, 0 dark blue to rate_max yellow.

    Args:
        guided: labels (b, H, W) and rate (b, 1, H, W) are read.
        rate_max: Largest rate.

    Returns:
        Two (b, 8H, 8W, 3) float32 in [0, 1], on the CPU.
    """
    labels = guided.labels.cpu().numpy()
    area = np.bincount(labels.flatten())
    table = np.zeros((len(area), 3), np.float32)
    for rank, token in enumerate(np.argsort(-area)):
        colour = PALETTE[rank % len(PALETTE)] if token else NO_WORD
        table[token] = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255
    rates = guided.rate[:, 0].cpu().numpy()
    pictures = [np.asarray(viridis(rate, 0.0, rate_max), np.float32) / 255 for rate in rates]
    images = torch.from_numpy(table[labels]), torch.from_numpy(np.stack(pictures))
    return tuple(_enlarge(image) for image in images)


def _enlarge(image: Tensor) -> Tensor:
    return image.repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2)


def parse_phrases(text: str) -> dict[str, float]:
    """``{"blue square": 1.5}`` from lines such as ``blue square: 1.5``.

    Raises:
        ValueError: A line is not a phrase, a colon and a number > 0.
    """
    weights = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        phrase, _, factor = line.rpartition(":")
        try:
            weights[phrase.strip()] = float(factor)
        except ValueError:
            raise ValueError(f"a line of phrases must be 'phrase: factor', got {line!r}") from None
        if not phrase.strip() or not weights[phrase.strip()] > 0:
            raise ValueError(f"a line of phrases must be 'phrase: factor > 0', got {line!r}")
    return weights


def clip_weights(clip, prompt: str, weights: dict[str, float]) -> Tensor:
    """`scfg.recording.phrases.weigh_phrases` of a prompt as ComfyUI reads it, in chunks.

    Args:
        clip: A CLIP of ComfyUI.
        prompt: The prompt.
        weights: Factors of phrases.

    Returns:
        (1, t).
    """

    def numbers(text: str) -> list[int]:
        branches = clip.tokenize(text)
        chunks = branches.get("l", next(iter(branches.values())))
        return [pair[0] if isinstance(pair[0], int) else -1 for chunk in chunks for pair in chunk]

    frame = set(numbers(""))  # START, END, padding
    phrases = {phrase: [i for i in numbers(phrase) if i not in frame] for phrase in weights}
    return weigh_phrases([numbers(prompt)], phrases, weights)
