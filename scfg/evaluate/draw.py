"""Images of numbered prompts under one way of guiding, and what guidance did on the way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scfg import ops, reference, sampling
from scfg.guidance import cfg
from scfg.methods.samg import samg
from scfg.models.embedded import CONFIG, EmbeddedModel
from scfg.models.shapes import Scene, caption, sample_scenes
from scfg.recording.wrapper import UNetWrapper

CONFIGS = {  # ways of guiding that record attention
    "scfg": CONFIG,
    "scfg_none": replace(CONFIG, propagation="none"),
    "scfg_image": replace(CONFIG, benchmark="image"),
    "scfg_official": replace(CONFIG, propagation="official"),
}
METHODS = ("cfg", *CONFIGS, "samg")
SMALL = 4  # patches; smaller regions are left out of the spread over regions


@dataclass(frozen=True)
class Point:
    """A way to draw images: one point of a curve.

    Attributes:
        method: One of `METHODS`.
        guidance_scale: > 0.
        sampler: A deterministic one of `scfg.sampling`.
        steps: Number of predictions.
    """

    method: str
    guidance_scale: float
    sampler: str = "dpmpp_2m"
    steps: int = 20

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.method}-{self.guidance_scale:g}-{self.sampler}-{self.steps}"


def scene(index: int, seed: int) -> Scene:
    """The scene that prompt number `index` describes; it depends on nothing else."""
    return sample_scenes(1, np.random.default_rng([seed, index]))[0]


def spread(eps_uncond: Tensor, eps: Tensor, labels: Tensor, regions: int) -> Tensor:
    """Spatial inconsistency: how unevenly guidance acts on the regions of an image.

    Coefficient of variation (standard deviation over mean, regions weighing alike) of the mean of
    ``||eps - eps_uncond||`` over each region of at least `SMALL` patches.

    Args:
        eps_uncond: (b, c, H, W).
        eps: (b, c, H, W), the text prediction for guidance at one scale, or a guided prediction.
        labels: (b, H, W) int64, owner of each pixel.
        regions: Labels are below it.

    Returns:
        (b,), not a number where there are fewer than two such regions.
    """
    everything = torch.ones_like(labels, dtype=torch.bool)
    sums = ops.region_sums(eps_uncond, eps, labels, everything, regions, 1).sum(dim=1)[:, :-1]
    large = sums[..., 1] >= SMALL  # (b, regions)
    means = torch.where(large, sums[..., 0] / sums[..., 1].clamp_min(1), torch.nan)
    average = means.nanmean(dim=1)
    variance = (means - average[:, None]).square().nanmean(dim=1)
    return torch.where(large.sum(dim=1) > 1, variance.sqrt() / average, torch.nan)


@torch.no_grad()
def draw(
    model: EmbeddedModel, point: Point, scenes: Sequence[Scene], indices: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw one image per scene's caption, in one batch.

    Args:
        model: The model.
        point: How.
        scenes: b scenes.
        indices: Their b numbers: the seeds of the noise.

    Returns:
        Images (b, 3, 64, 64), and float32 tensors: "scale" (b,), the mean of guidance_scale * rate
        over pixels and steps; "strength" (b,), the same with each pixel of a step weighing as much
        as the norm of guidance there, ``sum scale ||eta|| / sum ||eta||``; where token regions
        exist, "spread_before" and "spread_after" (b, steps), the `spread` over them without and
        with the rate.
    """
    captions = [caption(s) for s in scenes]
    context = torch.cat([model.encode([""] * len(captions)), model.encode(captions)])
    config, scale = CONFIGS.get(point.method), point.guidance_scale
    unet = model.unet if config is None else UNetWrapper(model.unet, config)
    scales, strengths, before, after = [], [], [], []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        eps_uncond, eps_text = unet(torch.cat([x, x]), torch.cat([t, t]), context).chunk(2)
        if point.method == "cfg":
            eps, rate = cfg(eps_uncond, eps_text, scale), torch.ones_like(x[:, :1])
        elif point.method == "samg":
            eps, rate = samg(eps_uncond, eps_text, scale)
        else:
            guided = unet.guide(eps_uncond, eps_text, scale)
            eps, rate = guided.eps, guided.rate
            regions = (guided.labels, context.shape[1])
            before.append(spread(eps_uncond, eps_text, *regions))
            after.append(spread(eps_uncond, eps, *regions))
        norm = reference.guidance_norm(eps_uncond, eps_text)[:, None]  # (b, 1, H, W)
        scales.append(scale * rate.mean(dim=(1, 2, 3)))
        strengths.append(scale * (rate * norm).sum(dim=(1, 2, 3)) / norm.sum(dim=(1, 2, 3)))
        return eps

    generators = [torch.Generator().manual_seed(index) for index in indices]
    noise = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
    try:
        sampler = getattr(sampling, point.sampler)
        latents = sampler(predict, noise.to(context.device), model.schedule, point.steps)
    finally:
        if config is not None:
            unet.remove()
    found = {"scale": torch.stack(scales).mean(0), "strength": torch.stack(strengths).mean(0)}
    if before:
        found |= {"spread_before": torch.stack(before, 1), "spread_after": torch.stack(after, 1)}
    return model.decode(latents), {name: x.cpu() for name, x in found.items()}
