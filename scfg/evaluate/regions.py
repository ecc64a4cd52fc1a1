"""Regions that attention finds in noised real scenes, beside the masks they were drawn with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scfg import reference
from scfg.config import SCFGConfig
from scfg.evaluate.metrics import overlap
from scfg.guidance import Guided, guide_regions, semantic_cfg
from scfg.models.embedded import EmbeddedModel, to_latents
from scfg.models.emoji import OBJECTS, Scene, caption, render
from scfg.models.judge import patch_regions
from scfg.models.transformer import JointTransformer
from scfg.recording.wrapper import Recorder
from scfg.regions import Regions

GROUND = OBJECTS  # number of the ground's region, after those of the objects
POWERS = (1, 2, 3, 4, 6, 8)
LEVELS = {"16 x 16": (1,), "8 x 8": (2,), "both": (1, 2)}  # of a U-Net: reductions that are used
RATED_AT = 4.0  # guidance scale of rates, which depend on it through their cap alone


@dataclass(frozen=True, eq=False)
class Probe:
    """What the network says about b noised real scenes at one timestep.

    Attributes:
        eps_uncond: (b, c, 16, 16).
        eps_text: (b, c, 16, 16).
        layers: Of a U-Net, per layer its reduction, self map (2b, n, n) and cross map (2b, n, t).
        again: S-CFG at a scale of `RATED_AT` with other constants, from another call.
        levels: See `levels_of`.
        truth: (b, 16, 16) int64, region of most pixels of a patch: 0 to 3 objects, 4 the ground.
        owners: (b, t) int64, region that each token names, or -1.
        regions: The true ones, as the method would have them.
        config: The constants of S-CFG that suit the model.
    """

    eps_uncond: Tensor
    eps_text: Tensor
    layers: list[tuple[int, Tensor, Tensor]]
    again: Callable[[SCFGConfig], Guided]
    levels: tuple[str, ...]
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


def levels_of(model: EmbeddedModel) -> tuple[str, ...]:
    """What regions may be found from, the model's own choice last.

    Resolutions of a U-Net; of a transformer each block, all, and those that its layout chooses.
    """
    if isinstance(model.network, JointTransformer):
        return (*(f"block {i}" for i in range(len(model.network.blocks))), "all", "auto")
    return tuple(LEVELS)


def recorder(
    model: EmbeddedModel, captions: Sequence[str], config: SCFGConfig, keep_maps: bool = False
) -> Recorder:
    """Of the network within the model, for calls of it on the empty caption and then these."""
    recorded = Recorder(model.network, config, keep_maps=keep_maps)
    recorded.words = model.words([""] * len(captions) + list(captions))
    return recorded


@torch.no_grad()
def probe(model: EmbeddedModel, scenes: Sequence[Scene], indices: Sequence[int], t: int) -> Probe:
    """Noise real scenes to timestep t, each with noise of its own number, and call the network."""
    captions = [caption(one) for one in scenes]
    context = torch.cat([model.encode([""] * len(captions)), model.encode(captions)])
    images, masks = render(scenes, context.device)
    generators = [torch.Generator().manual_seed(index) for index in indices]
    noise = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
    x = noised(model, images, noise.to(context.device), t)
    x = torch.cat([x, x])

    def call() -> Tensor:
        return model.unet(x, t, context)

    @torch.no_grad()
    def again(config: SCFGConfig) -> Guided:
        with recorder(model, captions, config) as recorded:
            return recorded.guide(*recorded.record(x, call).chunk(2), RATED_AT)

    levels = levels_of(model)
    with recorder(model, captions, model.config, levels == tuple(LEVELS)) as recorded:
        eps_uncond, eps_text = recorded.record(x, call).chunk(2)
        layers = [(a.reduction, a.self_map, a.cross_map) for a in recorded.attention]
    truth, owners = patch_regions(masks), token_owners(model, captions).to(masks.device)
    regions = true_regions(model, captions, masks)
    return Probe(eps_uncond, eps_text, layers, again, levels, truth, owners, regions, model.config)


def find(probe: Probe, propagation: str, powers: int, level: str) -> Guided:
    """S-CFG as it would act: `Guided` at a scale of `RATED_AT`.

    Args:
        probe: What the network said.
        propagation: See `SCFGConfig`.
        powers: Number of powers of "paper".
        level: One of the probe's levels.
    """
    config = replace(probe.config, propagation=propagation, propagation_steps=max(powers, 1))
    if level not in LEVELS:
        blocks = {"all": None, "auto": config.layers}
        blocks |= {name: (i,) for i, name in enumerate(probe.levels[:-2])}
        return probe.again(replace(config, layers=blocks[level]))
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


def variants(levels: Sequence[str]) -> list[tuple[str, int, str]]:
    """Every (propagation, powers, level) that is measured.

    Each block of a transformer alone, which costs a call, is looked at with four powers only.
    """
    ways = [("none", 0), ("official", 2), *(("paper", p) for p in POWERS)]
    *parts, whole = levels
    some = ways if whole in LEVELS else [("paper", 4)]
    found = [(name, powers, level) for level in parts for name, powers in some]
    return found + [(name, powers, whole) for name, powers in ways]


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
    for way in variants(probe.levels):
        seen = find(probe, *way)
        scores.append(overlaps(seen.labels, seen.foreground, probe.truth, probe.owners))
    norm = reference.guidance_norm(probe.eps_uncond, probe.eps_text)
    norm = norm / norm.mean(dim=(1, 2), keepdim=True)
    own = find(probe, probe.config.propagation, probe.config.propagation_steps, probe.levels[-1])
    predictions = (probe.eps_uncond, probe.eps_text)
    true = guide_regions(*predictions, probe.regions, RATED_AT, probe.config)
    maps = {"norm": norm, "rate": own.rate[:, 0], "oracle": true.rate[:, 0]}
    means = {name: region_means(x.float(), probe.truth) for name, x in maps.items()}
    return {name: x.cpu() for name, x in {"overlap": torch.stack(scores, 1), **means}.items()}
