"""Pictures of numbered captions under one way of guiding, and how strong that was on the way.

Every way is a rate: ``eps = eps_uncond + guidance_scale * rate * (eps_text - eps_uncond)``. Beside
CFG and S-CFG there are two rivals that need no attention, and three controls: S-CFG's rate map
replaced by its mean ("mean"), the rates of its regions dealt out among them anew ("shuffled"), and
the true regions in place of those found ("oracle"), which needs a picture that begins as a noised
real scene, whose masks are known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scfg import reference
from scfg.evaluate.regions import noised, recorder, true_regions
from scfg.guidance import Guided, guide_regions
from scfg.methods.samg import samg
from scfg.models.embedded import EmbeddedModel
from scfg.models.emoji import Scene, caption, render, sample_scenes
from scfg.sampling import dpmpp_2m_rule, sample

VARIANTS = {  # ways of S-CFG, and what each changes in the model's constants
    "scfg": {},
    "scfg_official": {"propagation": "official"},
    "scfg_none": {"propagation": "none"},
    "scfg_image": {"benchmark": "image"},
}
CONTROLS = ("mean", "shuffled", "oracle")
METHODS = ("cfg", *VARIANTS, "samg", "interval", *CONTROLS)
PLAIN = ("cfg", "samg", "interval")  # read no attention
STEPS = 20  # of DPM-Solver++(2M)
INTERVAL = (0.2, 0.8)  # of the steps, in which the limited interval guides


@dataclass(frozen=True)
class Point:
    """A way to draw: one point of a curve.

    Attributes:
        method: One of `METHODS`.
        guidance_scale: > 0.
        begin: None: from noise. Else from the real scene, noised to the first timestep visited that
            is not above this one.
    """

    method: str
    guidance_scale: float
    begin: int | None = None

    @property
    def name(self) -> str:
        """For files."""
        begin = "" if self.begin is None else f"-from-{self.begin}"
        return f"{self.method}-{self.guidance_scale:g}{begin}"


def scene(index: int, seed: int) -> Scene:
    """The scene that caption number `index` describes; it depends on nothing else."""
    return sample_scenes(1, np.random.default_rng([seed, index]))[0]


def weighted_mean(rate: Tensor, norm: Tensor) -> Tensor:
    """``sum_x rate(x) a(x) / sum_x a(x)`` of each picture, (b,), of (b, h, w) both."""
    return (rate * norm).sum(dim=(1, 2)) / norm.sum(dim=(1, 2)).clamp_min(1e-12)


def shuffled(guided: Guided, generators: Sequence[torch.Generator]) -> Tensor:
    """The rates of each picture's regions dealt out among these regions anew, blurred: (b, h, w).

    Args:
        guided: With labels at the resolution of the rate.
        generators: b sources of randomness.
    """
    maps = []
    for labels, rate, generator in zip(guided.labels, guided.rate[:, 0], generators, strict=True):
        tokens, regions = labels.unique(return_inverse=True)
        values = torch.stack([rate[regions == i].mean() for i in range(len(tokens))])
        order = torch.randperm(len(tokens), generator=generator).to(values.device)
        maps.append(values[order][regions])
    return reference.blur(torch.stack(maps))


@torch.no_grad()
def draw(
    model: EmbeddedModel, point: Point, scenes: Sequence[Scene], indices: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw one picture per scene's caption, in one batch.

    Args:
        model: The model.
        point: How.
        scenes: b scenes.
        indices: Their b numbers: the seeds of the noise.

    Returns:
        Images (b, 3, 64, 64), and two readings of strength, (b,) float32 on the CPU: "mean_scale",
        the mean of guidance_scale * rate over pixels and steps; "strength", the same with each
        pixel of a step weighing as much as the norm of guidance there.

    Raises:
        ValueError: The method is none of `METHODS`, or the oracle is to begin from noise.
    """
    check(point)
    captions = [caption(one) for one in scenes]
    context = torch.cat([model.encode([""] * len(captions)), model.encode(captions)])
    generators = [torch.Generator().manual_seed(index) for index in indices]
    noise = [torch.randn(model.latent_shape, generator=g) for g in generators]
    x = torch.stack(noise).to(context.device)
    timesteps, truth = model.schedule.timesteps(STEPS), None
    if point.begin is not None:
        images, masks = render(scenes, context.device)
        timesteps = [t for t in timesteps if t <= point.begin]
        x = noised(model, images, x, timesteps[0])
        truth = true_regions(model, captions, masks)
    config = replace(model.config, **VARIANTS.get(point.method, {}))
    plain = point.method in PLAIN
    recorded = None if plain else recorder(model, captions, config)
    means, strengths = [], []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        x, t = torch.cat([x, x]), torch.cat([t, t])

        def call() -> Tensor:
            return model.unet(x, t, context)

        eps_uncond, eps_text = (call() if plain else recorded.record(x, call)).chunk(2)

        def guide() -> Guided:
            if point.method != "oracle":
                return recorded.guide(eps_uncond, eps_text, point.guidance_scale)
            return guide_regions(eps_uncond, eps_text, truth, point.guidance_scale, config)

        norm = reference.guidance_norm(eps_uncond, eps_text)  # (b, h, w)
        done = len(means) / len(timesteps)
        rate = rates(point, eps_uncond, eps_text, norm, done, guide, generators)
        means.append(point.guidance_scale * rate.mean(dim=(1, 2)))
        strengths.append(point.guidance_scale * weighted_mean(rate, norm))
        scale = point.guidance_scale * rate[:, None]
        return eps_uncond + scale * (eps_text - eps_uncond)

    try:
        latents = sample(dpmpp_2m_rule(), predict, x, model.schedule, timesteps)
    finally:
        if not plain:
            recorded.remove()
    found = {"mean_scale": torch.stack(means).mean(0), "strength": torch.stack(strengths).mean(0)}
    return model.decode(latents), {name: value.cpu() for name, value in found.items()}


def check(point: Point) -> None:
    """Raise unless a point can be drawn.

    Raises:
        ValueError: The method is none of `METHODS`, or the oracle is to begin from noise.
    """
    if point.method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {point.method!r}")
    if point.method == "oracle" and point.begin is None:
        raise ValueError("begin must be a timestep for 'oracle', which needs true masks; got None")


def rates(
    point: Point,
    eps_uncond: Tensor,
    eps_text: Tensor,
    norm: Tensor,
    done: float,
    guide: Callable[[], Guided],
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Rate (b, h, w) of a way to draw at one step.

    Args:
        point: How.
        eps_uncond: (b, c, h, w).
        eps_text: (b, c, h, w).
        norm: (b, h, w), of guidance.
        done: Share of the steps that came before, in [0, 1).
        guide: S-CFG of this step, called where it is needed.
        generators: One a picture, to shuffle.
    """
    if point.method == "cfg":
        return torch.ones_like(norm)
    if point.method == "interval":  # outside it the text's own prediction
        inside = INTERVAL[0] <= done < INTERVAL[1]
        return torch.full_like(norm, 1.0 if inside else 1 / point.guidance_scale)
    if point.method == "samg":
        return samg(eps_uncond, eps_text, point.guidance_scale)[1][:, 0]
    guided = guide()
    if point.method == "mean":
        return weighted_mean(guided.rate[:, 0], norm)[:, None, None].expand_as(norm)
    return shuffled(guided, generators) if point.method == "shuffled" else guided.rate[:, 0]
