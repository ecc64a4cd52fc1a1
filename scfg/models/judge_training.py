"""Training of the judge on real scenes, mildly spoilt as generated images are.

``python -m scfg.models.judge_training`` measures the shipped weights on scenes they never saw;
``--train`` makes new ones first. The result is stored with the weights.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfg.models.emoji import NOUNS, OBJECTS, Scene, render, sample_scenes
from scfg.models.files import write_whole
from scfg.models.judge import (
    WEIGHTS,
    Judge,
    agreement,
    load_judge,
    patch_regions,
    read,
    truth,
)

BATCH = 64
MEASURED = 20_001  # seed of the scenes the judge is measured on; training has others


def spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """Noise, blur, contrast and brightness, each of a random strength, on half of the images.

    Args:
        images: (b, 3, 64, 64) in [-1, 1].
        generator: Source of randomness.

    Returns:
        The same shape and range.
    """

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(len(images), 1, 1, 1, generator=generator) * (high - low) + low

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    spoilt = torch.lerp(images, blurred, draw(0, 0.7))
    spoilt = spoilt * draw(0.85, 1.15) + draw(-0.1, 0.1)
    coarse = torch.randn(len(images), 3, 16, 16, generator=generator)
    fine = torch.randn(images.shape, generator=generator)
    spoilt = spoilt + draw(0, 0.12) * F.interpolate(coarse, scale_factor=4.0) + draw(0, 0.15) * fine
    return torch.where(draw(0, 1) < 0.5, images, spoilt).clamp(-1, 1)


def train(minutes: float, seed: int = 0) -> Judge:
    """Train a judge with AdamW and warm-up, at a rate that falls to zero, on scenes drawn anew.

    Args:
        minutes: How long.
        seed: Of weights and scenes.

    Returns:
        The judge, in inference mode, its features scaled.
    """
    from tqdm import tqdm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.01, fused=True)
    start, step, done = time.monotonic(), 0, 0.0
    with tqdm(total=100, unit="%", mininterval=5) as bar:
        while done < 1:
            optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 100) * (1 - done)
            loss = _loss(judge, np.random.default_rng([seed, step]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            done = (time.monotonic() - start) / (60 * minutes)
            bar.update(min(100.0, 100 * done) - bar.n)
            bar.set_postfix(loss=f"{loss.item():.4f}", step=step, refresh=False)
    judge.eval().requires_grad_(False)
    features = judge(render(sample_scenes(2048, np.random.default_rng([seed, step])))[0])[
        "features"
    ]
    judge.feature_mean.copy_(features.mean(dim=0))
    judge.feature_std.copy_(features.std(dim=0))
    return judge


def patch_classes(scenes: Sequence[Scene], masks: Tensor) -> Tensor:
    """Class of each patch, (b, 16, 16) int64: 0 for the ground, else 1 + the place of the noun."""
    nouns = tuple(NOUNS)
    table = torch.zeros(len(scenes), OBJECTS + 1, dtype=torch.int64)
    for i, scene in enumerate(scenes):
        for j, one in enumerate(scene.objects):
            table[i, j] = 1 + nouns.index(one.noun)
    regions = patch_regions(masks)
    return table.gather(1, regions.flatten(1)).view_as(regions)


def _loss(judge: Judge, rng: np.random.Generator) -> Tensor:
    """Cross-entropies of everything that is read, and the errors of width and count."""
    scenes = sample_scenes(BATCH, rng, held_out=True)
    images, masks = render(scenes)
    told = truth(scenes)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    spoilt = spoil(images, generator).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        out = judge(spoilt)
    at = told.there
    return sum((
        F.cross_entropy(out["patches"], patch_classes(scenes, masks)),
        F.binary_cross_entropy_with_logits(out["there"], at.float(), reduction="sum") / at.sum(),
        F.cross_entropy(out["tint"][at], told.tint[at]),
        F.smooth_l1_loss(out["width"][at], told.width[at] / 16, beta=0.1),
        F.smooth_l1_loss(out["count"], told.count.float(), beta=0.2),
        F.cross_entropy(out["colour"], told.colour),
        F.cross_entropy(out["texture"], told.texture),
    ))  # fmt: skip


def measure(judge: Judge, count: int = 4096, seed: int = MEASURED) -> dict[str, float]:
    """Share of `agreement` that the judge reads right on clean real scenes, held-out ones too."""
    scenes = sample_scenes(count, np.random.default_rng(seed), held_out=True)
    values: dict[str, list[Tensor]] = {}
    for begin in range(0, count, 256):
        part = scenes[begin : begin + 256]
        for name, value in agreement(read(judge, render(part)[0])[0], part).items():
            values.setdefault(name, []).append(value)
    return {name: round(torch.cat(parts).nanmean().item(), 5) for name, parts in values.items()}


def main() -> None:
    """Command line of ``python -m scfg.models.judge_training``."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    parser = argparse.ArgumentParser(
        prog="python -m scfg.models.judge_training", description=__doc__
    )
    parser.add_argument("--train", action="store_true", help="train first")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="file to write or measure")
    args = parser.parse_args()
    if args.train:
        judge = train(args.minutes)
        tensors = {
            k: v.half().contiguous() for k, v in judge.state_dict().items() if v.is_floating_point()
        }
        write_whole(args.weights, lambda aside: save_file(tensors, aside))
    measured = measure(load_judge(args.weights))
    with safe_open(args.weights, "pt") as file:
        metadata = file.metadata() or {}
    if args.train:
        metadata = {"minutes": str(args.minutes), "measured": json.dumps(measured)}
        tensors = load_file(args.weights)
        write_whole(args.weights, lambda aside: save_file(tensors, aside, metadata))
    print(json.dumps({"measured": measured, "stored": json.loads(metadata["measured"])}, indent=1))


if __name__ == "__main__":
    main()
