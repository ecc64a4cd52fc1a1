"""Does S-CFG help the small and weakly guided object? CFG and S-CFG paired on emoji scenes.

    python -m scfg.evaluate.objects --images 192 --scales 2.5 4 --out benchmarks/results/objects.csv

Every method draws the same captions from the same noise; `scfg.models.judge` reads which of the
captioned objects are there. A method's strength has three readings: the nominal scale, the mean of
scale times rate over pixels and steps, and that mean weighted by the norm of guidance. S-CFG is
compared with CFG at its nominal scale and at its norm-weighted strength, and with two controls: its
rate map replaced by the map's norm-weighted mean, and its rates shuffled among the regions. Of
differences the 95 % interval of a bootstrap over captions is given.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scfg import reference
from scfg.guidance import Guided, cfg
from scfg.methods.samg import samg
from scfg.models import emoji
from scfg.models.embedded import EmbeddedModel, load_model
from scfg.models.judge import Judge, agreement, load_judge, read
from scfg.recording.wrapper import UNetWrapper
from scfg.sampling import dpmpp_2m

BATCH = 32
STEPS = 20
SMALL = 20.0  # pixels; an object is small below it
INTERVAL = (0.2, 0.8)  # of the steps, in which the limited interval guides


@dataclass(frozen=True, eq=False)
class Drawn:
    """One method at one scale on all captions.

    Attributes:
        found: (images, 4) 1 where an object is there, 0 where not, NaN where none is asked.
        everything: (images,) 1 where the whole caption is carried.
        mean_scale: Mean of scale times rate over pixels and steps.
        strength: The same, weighted by the norm of guidance.
    """

    found: np.ndarray
    everything: np.ndarray
    mean_scale: float
    strength: float


def weighted_mean(rate: Tensor, norm: Tensor) -> Tensor:
    """``sum_x rate(x) a(x) / sum_x a(x)`` of each image, (b, 1, 1, 1), of rates (b, 1, H, W)."""
    norm = norm[:, None]
    total = norm.sum(dim=(2, 3), keepdim=True).clamp_min(1e-12)
    return (rate * norm).sum(dim=(2, 3), keepdim=True) / total


def shuffled(guided: Guided, generator: torch.Generator) -> Tensor:
    """The rates of an image's regions dealt out among these regions anew, blurred as they were."""
    size, maps = guided.rate.shape[-2:], []
    factor = -(-size[0] // guided.labels.shape[1])
    for labels, rate in zip(guided.labels, guided.rate[:, 0], strict=True):
        owner = reference.spread(labels, *size, factor)
        tokens = owner.unique()
        values = torch.stack([rate[owner == token].mean() for token in tokens])
        dealt = values[torch.randperm(len(tokens), generator=generator)]
        maps.append(dealt[torch.searchsorted(tokens, owner)])
    return reference.blur(torch.stack(maps))[:, None]


def rates(method: str, eps_uncond, eps_text, guide: Callable[[], Guided], scale, generator):
    """Rate (b, 1, H, W) of a method at one step."""
    ones = torch.ones_like(eps_text[:, :1])
    if method in ("cfg", "interval"):
        return ones
    if method == "samg":
        return samg(eps_uncond, eps_text, scale)[1]
    guided = guide()
    if method == "mean":
        norm = reference.guidance_norm(eps_uncond, eps_text)
        return weighted_mean(guided.rate, norm).expand_as(guided.rate)
    return shuffled(guided, generator) if method == "shuffled" else guided.rate


@torch.no_grad()
def draw(model: EmbeddedModel, scenes, seeds, method: str, scale: float):
    """Images (b, 3, 64, 64) of scenes' captions, and the mean and the weighted mean scale."""
    captions = [emoji.caption(scene) for scene in scenes]
    context = torch.cat([model.encode([""] * len(scenes)), model.encode(captions)])
    noise = [torch.randn(model.latent_shape, generator=_seeded(seed)) for seed in seeds]
    generator, steps, sums = _seeded(seeds[0]), [], [0.0, 0.0]
    unet = UNetWrapper(model.unet, model.config)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        records = method not in ("cfg", "interval", "samg")
        call = unet if records else model.unet
        both = call(torch.cat([x, x]), torch.cat([t, t]), context)
        eps_uncond, eps_text = both.chunk(2)
        share = len(steps) / STEPS
        steps.append(share)
        if method == "interval" and not INTERVAL[0] <= share < INTERVAL[1]:
            sums[0], sums[1] = sums[0] + 1, sums[1] + 1
            return eps_text
        guide = lambda: unet.guide(eps_uncond, eps_text, scale)  # noqa: E731
        rate = rates(method, eps_uncond, eps_text, guide, scale, generator)
        norm = reference.guidance_norm(eps_uncond, eps_text)
        sums[0] += scale * rate.mean().item()
        sums[1] += scale * weighted_mean(rate, norm).mean().item()
        if method == "cfg":
            return cfg(eps_uncond, eps_text, scale)
        return eps_uncond + scale * rate * (eps_text - eps_uncond)

    with unet:
        latents = dpmpp_2m(predict, torch.stack(noise), model.schedule, STEPS)
    return model.decode(latents), sums[0] / STEPS, sums[1] / STEPS


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measure(model: EmbeddedModel, judge: Judge, scenes, method: str, scale: float) -> Drawn:
    """Draw every scene's caption, the i-th from noise i, and read the images."""
    found, everything, means = [], [], []
    for begin in range(0, len(scenes), BATCH):
        part = scenes[begin : begin + BATCH]
        seeds = range(begin, begin + len(part))
        images, *strengths = draw(model, part, seeds, method, scale)
        carried = agreement(read(judge, images)[0], part)
        found.append(carried["found"].numpy())
        everything.append(carried["all"].numpy())
        means.append(strengths)
    mean_scale, strength = np.mean(means, axis=0)
    return Drawn(np.concatenate(found), np.concatenate(everything), mean_scale, strength)


def paired(one: np.ndarray, other: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean difference of two measurements of the same captions, and its 95 % interval.

    Args:
        one: (images, k), NaN where nothing was measured, the same places in both.
        other: Likewise.
        seed: Of the 2000 resamplings of captions.

    Returns:
        Mean of one - other over all that was measured, and the 2.5 and 97.5 percentiles.
    """
    difference = (one - other).reshape(len(one), -1)
    total = np.nansum(difference, axis=1)
    count = np.isfinite(difference).sum(axis=1)
    picks = np.random.default_rng(seed).integers(len(one), size=(2000, len(one)))
    means = total[picks].sum(1) / np.maximum(count[picks].sum(1), 1)
    low, high = np.percentile(means, [2.5, 97.5])
    return total.sum() / max(count.sum(), 1), low, high


def strata(scenes) -> dict[str, np.ndarray]:
    """Masks (images, 4) of the objects of every stratum."""
    sizes = np.full((len(scenes), emoji.OBJECTS), np.nan)
    for i, scene in enumerate(scenes):
        sizes[i, : len(scene.objects)] = [one.size for one in scene.objects]
    count = np.isfinite(sizes).sum(1)[:, None]
    there = np.isfinite(sizes)
    return {
        "objects": there,
        "small": sizes < SMALL,
        "large": sizes >= SMALL,
        "few": there & (count <= 2),
        "many": there & (count > 2),
    }


def rows(scenes, results: dict[tuple[str, float], Drawn], scale: float):
    """Lines of the table at one nominal scale."""
    masks, base = strata(scenes), results["cfg", scale]
    strong = results["cfg at the strength of S-CFG", scale]
    for (method, nominal), drawn in results.items():
        if nominal != scale:
            continue
        row = {"method": method, "scale": scale, "mean_scale": drawn.mean_scale}
        row |= {"strength": drawn.strength, "images": len(scenes)}
        row["found"] = np.nanmean(drawn.found)
        row["all"] = drawn.everything.mean()
        for name, mask in masks.items():
            for against, other in (("cfg", base), ("strength", strong)):
                pair = (np.where(mask, x.found, np.nan) for x in (drawn, other))
                mean, low, high = paired(*pair)
                row[f"{name}_minus_{against}"] = mean
                row |= {f"{name}_{against}_low": low, f"{name}_{against}_high": high}
        yield {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    """Command line of ``python -m scfg.evaluate.objects``."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m scfg.evaluate.objects", description=__doc__)
    parser.add_argument(
        "--images", type=int, default=192, help="captions, each drawn once a method"
    )
    parser.add_argument("--scales", type=float, nargs="+", default=[2.5, 4.0])
    parser.add_argument("--methods", nargs="+", default=["mean", "shuffled", "samg", "interval"])
    parser.add_argument("--seed", type=int, default=7, help="of the captions")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write")
    args = parser.parse_args()
    model, judge = load_model(), load_judge()
    scenes = emoji.sample_scenes(args.images, np.random.default_rng(args.seed))
    results: dict[tuple[str, float], Drawn] = {}
    with tqdm(total=len(args.scales) * (3 + len(args.methods)), unit="point") as bar:
        for scale in args.scales:
            for method in ("cfg", "scfg", *args.methods):
                results[method, scale] = measure(model, judge, scenes, method, scale)
                bar.update()
            same = results["scfg", scale].strength
            name = "cfg at the strength of S-CFG"
            results[name, scale] = measure(model, judge, scenes, "cfg", same)
            bar.update()
    table = [row for scale in args.scales for row in rows(scenes, results, scale)]
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=table[0])
        writer.writeheader()
        writer.writerows(table)
    for row in table:
        print(f"{row['method']:30} {row['scale']:4} strength {row['strength']:.2f} "
              f"found {row['found']:.3f} all {row['all']:.3f} minus cfg "
              f"{row['objects_minus_cfg']:+.3f} [{row['objects_cfg_low']:+.3f}, "
              f"{row['objects_cfg_high']:+.3f}]")  # fmt: skip


if __name__ == "__main__":
    main()
