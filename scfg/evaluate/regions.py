"""Regions that attention finds in noised real scenes, against the masks they were drawn with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scfg.evaluate.metrics import overlap
from scfg.guidance import semantic_cfg
from scfg.models.embedded import CONFIG, EmbeddedModel, to_latents
from scfg.models.shapes import Scene, caption, render
from scfg.models.shapes_judge import patch_regions
from scfg.recording.wrapper import UNetWrapper

POWERS = tuple(range(1, 9))
LEVELS = {"16 x 16": (1,), "8 x 8": (2,), "both": (1, 2)}  # reductions whose layers are used
KINDS = ("phrases", "objects", "background", "foreground")


@dataclass(frozen=True, eq=False)
class Probe:
    """What the U-Net says about b noised real scenes at one timestep.

    Attributes:
        eps_uncond: (b, c, 16, 16).
        eps_text: (b, c, 16, 16).
        layers: Per layer its reduction, self map (2b, n, n) and cross map (2b, n, t).
        truth: (b, 16, 16) int64, region of most pixels of a patch: 0, 1 objects, 2 background.
        owners: (b, t) int64, region that each token names, or -1.
        images: (b, 3, 64, 64), the noised images.
    """

    eps_uncond: Tensor
    eps_text: Tensor
    layers: list[tuple[int, Tensor, Tensor]]
    truth: Tensor
    owners: Tensor
    images: Tensor


@torch.no_grad()
def probe(model: EmbeddedModel, scenes: Sequence[Scene], indices: Sequence[int], t: int) -> Probe:
    """Noise real scenes to timestep t, each with noise of its own number, and call the U-Net."""
    images, masks = render(scenes)
    captions = [caption(s) for s in scenes]
    context = torch.cat([model.encode([""] * len(captions)), model.encode(captions)])
    generators = [torch.Generator().manual_seed(index) for index in indices]
    noise = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
    abar = model.schedule.alphas_cumprod[t].item()
    x = (abar**0.5 * to_latents(images) + (1 - abar) ** 0.5 * noise).to(context.device)
    with UNetWrapper(model.unet, CONFIG, keep_maps=True) as unet:
        eps_uncond, eps_text = unet(torch.cat([x, x]), t, context).chunk(2)
        layers = [(a.reduction, a.self_map, a.cross_map) for a in unet.attention]
    owners = torch.stack([token_owners(model, text) for text in captions])
    truth = patch_regions(masks)
    parts = (truth.to(x.device), owners.to(x.device), model.decode(x / abar**0.5))
    return Probe(eps_uncond, eps_text, layers, *parts)


def token_owners(model: EmbeddedModel, text: str) -> Tensor:
    """Region named by each token of a scene's caption, (t,) int64: 0, 1 objects, 2 background.

    -1 for the words outside phrases, START, END and padding.
    """
    spans = model.tokenizer.phrase_spans(text)
    owners = torch.full((model.tokenizer.length,), -1)
    for region, (first, end) in zip((*range(len(spans) - 1), 2), spans, strict=True):
        owners[first:end] = region
    return owners


def find(
    probe: Probe, propagation: str, powers: int, level: str, guidance_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Region of every patch, (b, 16, 16) int64 (-1: none), and foreground (b, 16, 16) bool.

    Args:
        probe: What the U-Net said.
        propagation: See `SCFGConfig`.
        powers: Number of powers of "paper".
        level: One of `LEVELS`.
        guidance_scale: Regions do not depend on it.
    """
    config = replace(CONFIG, propagation=propagation, propagation_steps=powers)
    maps = [(own, cross) for reduction, own, cross in probe.layers if reduction in LEVELS[level]]
    own_maps, cross_maps = map(list, zip(*maps, strict=True))
    predictions = (probe.eps_uncond, probe.eps_text)
    out = semantic_cfg(*predictions, own_maps, cross_maps, guidance_scale, config)
    return phrase_regions(out.labels, probe.owners), out.foreground


def phrase_regions(labels: Tensor, owners: Tensor) -> Tensor:
    """Region (b, h, w) whose phrase each patch's token is part of, -1 for none.

    Args:
        labels: (b, h, w) int64, tokens.
        owners: (b, t) int64 from `token_owners`.
    """
    return owners.gather(1, labels.flatten(1)).view_as(labels)


def overlaps(found: Tensor, foreground: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union with the true regions, (b, 4) in the order of `KINDS`.

    Args:
        found: (b, h, w) int64 regions, -1 for none.
        foreground: (b, h, w) bool.
        truth: (b, h, w) int64 regions.

    Returns:
        Mean over all phrases of a scene, mean over its objects, background, and the foreground
        against the objects together.
    """
    each = torch.stack([overlap(found == r, truth == r) for r in range(3)], dim=1)  # (b, 3)
    there = torch.stack([(truth == r).any(dim=2).any(dim=1) for r in range(3)], dim=1)
    each = torch.where(there, each, torch.nan)
    front = overlap(foreground, truth != 2)
    return torch.stack([each.nanmean(1), each[:, :2].nanmean(1), each[:, 2], front], dim=1)


def variants() -> list[tuple[str, int, str]]:
    """Every (propagation, powers, level) that is measured."""
    ways = [("none", 0), ("official", 2), *(("paper", p) for p in POWERS)]
    return [(name, powers, level) for level in LEVELS for name, powers in ways]


def score(probe: Probe) -> Tensor:
    """`overlaps` of every one of `variants`, (b, variants, 4) float32."""
    scores = [
        overlaps(*find(probe, name, max(powers, 1), level), probe.truth)
        for name, powers, level in variants()
    ]
    return torch.stack(scores, dim=1).cpu()
