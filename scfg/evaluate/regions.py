"""Regions that attention finds in noised real scenes, beside the masks they were drawn with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scfg import reference
from scfg.config import SCFGConfig
from scfg.evaluate.metrics import overlap
from scfg.guidance import guide_regions, semantic_cfg
from scfg.models.embedded import EmbeddedModel, to_latents
from scfg.models.emoji import OBJECTS, Scene, caption, render
from scfg.models.judge import patch_regions
from scfg.recording.wrapper import UNetWrapper
from scfg.regions import Regions

GROUND = OBJECTS  # number of the ground's region, after those of the objects
POWERS = (1, 2, 3, 4, 6, 8)
LEVELS = {"16 x 16": (1,), "8 x 8": (2,), "both": (1, 2)}  # reductions whose layers are used
RATED_AT = 4.0  # guidance scale of rates, which depend on it through their cap alone


@dataclass(frozen=True, eq=False)
class Probe:
    """What the U-Net says about b noised real scenes at one timestep.

    Attributes:
        eps_uncond: (b, c, 16, 16).
        eps_text: (b, c, 16, 16).
        layers: Per layer its reduction, self map (2b, n, n) and cross map (2b, n, t).
        truth: (b, 16, 16) int64, region of most pixels of a patch: 0 to 3 objects, 4 the ground.
        owners: (b, t) int64, region that each token names, or -1.
        regions: The true ones, as the method would have them.
        config: The constants of S-CFG that suit the model.
    """

    eps_uncond: Tensor
    eps_text: Tensor
    layers: list[tuple[int, Tensor, Tensor]]
    truth: Tensor
    owners: Tensor
    regions: Regions
    config: SCFGConfig


def noised(model: EmbeddedModel, images: Tensor, noise: Tensor, t: int) -> Tensor:
    """Latents of images at timestep t, ``sqrt(abar) x0 + sqrt(1 - abar) noise``."""
    abar = model.schedule.alphas_cumprod[t].item()
    return abar**0.5 * to_latents(images) + (1 - abar) ** 0.5 * noise


def token_owners(model: EmbeddedModel, captions: Sequence[str]) -> Tensor:
    """Region named by each token of scenes' captions, (b, t) int64.

    -1 for the words outside phrases, START, END and padding.
    """
    owners = torch.full((len(captions), model.tokenizer.length), -1)
    for row, text in zip(owners, captions, strict=True):
        spans = model.tokenizer.phrase_spans(text)
        for region, (first, end) in zip((*range(len(spans) - 1), GROUND), spans, strict=True):
            row[first:end] = region
    return owners


def true_regions(model: EmbeddedModel, captions: Sequence[str], masks: Tensor) -> Regions:
    """The regions that a perfect segmentation would give: each patch to its phrase's noun.

    Args:
        model: The model.
        captions: b captions of scenes.
        masks: (b, 5, 64, 64) of `render`.
    """
    truth = patch_regions(masks)
    owners = token_owners(model, captions).to(masks.device)
    tokens = torch.arange(owners.shape[1], device=masks.device)
    nouns = torch.stack(
        [torch.where(owners == r, tokens, -1).amax(dim=1) for r in range(GROUND + 1)], dim=1
    )  # (b, 5), the last token of each phrase
    labels = nouns.gather(1, truth.flatten(1)).view_as(truth)
    flat = torch.zeros(len(captions), dtype=torch.bool, device=masks.device)
    return Regions(labels, truth != GROUND, owners.shape[1], flat, rule="true masks")


@torch.no_grad()
def probe(model: EmbeddedModel, scenes: Sequence[Scene], indices: Sequence[int], t: int) -> Probe:
    """Noise real scenes to timestep t, each with noise of its own number, and call the U-Net."""
    captions = [caption(one) for one in scenes]
    context = torch.cat([model.encode([""] * len(captions)), model.encode(captions)])
    images, masks = render(scenes, context.device)
    generators = [torch.Generator().manual_seed(index) for index in indices]
    noise = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
    x = noised(model, images, noise.to(context.device), t)
    with UNetWrapper(model.unet, model.config, keep_maps=True) as unet:
        eps_uncond, eps_text = unet(torch.cat([x, x]), t, context).chunk(2)
        layers = [(a.reduction, a.self_map, a.cross_map) for a in unet.attention]
    truth, owners = patch_regions(masks), token_owners(model, captions).to(masks.device)
    regions = true_regions(model, captions, masks)
    return Probe(eps_uncond, eps_text, layers, truth, owners, regions, model.config)


def find(probe: Probe, propagation: str, powers: int, level: str):
    """S-CFG as it would act: `Guided` at a scale of `RATED_AT`.

    Args:
        probe: What the U-Net said.
        propagation: See `SCFGConfig`.
        powers: Number of powers of "paper".
        level: One of `LEVELS`.
    """
    config = replace(probe.config, propagation=propagation, propagation_steps=max(powers, 1))
    maps = [(own, cross) for reduction, own, cross in probe.layers if reduction in LEVELS[level]]
    own_maps, cross_maps = map(list, zip(*maps, strict=True))
    predictions = (probe.eps_uncond, probe.eps_text)
    return semantic_cfg(*predictions, own_maps, cross_maps, RATED_AT, config)


def overlaps(labels: Tensor, foreground: Tensor, truth: Tensor, owners: Tensor) -> Tensor:
    """Intersection over union with the true regions, (b, 6), NaN where there is no such region.

    Args:
        labels: (b, h, w) int64, token that owns each patch.
        foreground: (b, h, w) bool.
        truth: (b, h, w) int64 regions.
        owners: (b, t) from `token_owners`.

    Returns:
        Of the four objects and the ground, patches owned by any token of the phrase that names the
        region; then the foreground against the objects together.
    """
    found = owners.gather(1, labels.flatten(1)).view_as(labels)
    each = []
    for r in range(GROUND + 1):
        there = (truth == r).flatten(1).any(dim=1)
        each.append(torch.where(there, overlap(found == r, truth == r), torch.nan))
    return torch.stack([*each, overlap(foreground, truth != GROUND)], dim=1)


def variants() -> list[tuple[str, int, str]]:
    """Every (propagation, powers, level) that is measured."""
    ways = [("none", 0), ("official", 2), *(("paper", p) for p in POWERS)]
    return [(name, powers, level) for level in LEVELS for name, powers in ways]


def region_means(x: Tensor, truth: Tensor) -> Tensor:
    """Mean of x (b, h, w) over each true region, (b, 5), NaN where there is none."""
    inside = torch.stack([truth == r for r in range(GROUND + 1)], dim=1).to(x.dtype)
    return torch.einsum("bhw,brhw->br", x, inside) / inside.sum(dim=(2, 3))


def score(probe: Probe) -> dict[str, Tensor]:
    """What one noise level says, on the CPU.

    Returns:
        "overlap" (b, variants, 6), see `overlaps`; and over each true region (b, 5): "norm", the
        mean norm of guidance in units of the picture's mean, "rate", the mean rate of S-CFG, and
        "oracle", that with true regions.
    """
    scores = []
    for way in variants():
        seen = find(probe, *way)
        scores.append(overlaps(seen.labels, seen.foreground, probe.truth, probe.owners))
    norm = reference.guidance_norm(probe.eps_uncond, probe.eps_text)
    norm = norm / norm.mean(dim=(1, 2), keepdim=True)
    own = find(probe, probe.config.propagation, probe.config.propagation_steps, "both")
    predictions = (probe.eps_uncond, probe.eps_text)
    true = guide_regions(*predictions, probe.regions, RATED_AT, probe.config)
    maps = {"norm": norm, "rate": own.rate[:, 0], "oracle": true.rate[:, 0]}
    means = {name: region_means(x.float(), probe.truth) for name, x in maps.items()}
    return {name: x.cpu() for name, x in {"overlap": torch.stack(scores, 1), **means}.items()}
