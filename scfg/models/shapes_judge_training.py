"""Training of the judge on real scenes, mildly spoilt as generated images are.

``python -m scfg.models.shapes_judge_training`` measures the shipped weights on scenes they never
saw; ``--train`` makes new ones first. The result is stored with the weights.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfg.models.files import write_whole
from scfg.models.shapes import render, sample_scenes
from scfg.models.shapes_judge import WEIGHTS, Judge, layouts, load_judge, measure, truth

BATCH = 128


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


def train(steps: int, seed: int = 0) -> Judge:
    """Train a judge with AdamW, warm-up and cosine decay, on scenes drawn on the fly.

    Args:
        steps: Number of steps of `BATCH` scenes.
        seed: Of weights and scenes.

    Returns:
        The judge, in inference mode, its features scaled.
    """
    from tqdm import trange

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.05)
    bar = trange(steps, mininterval=5)
    for step in bar:
        loss = _loss(judge, np.random.default_rng([seed, step]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    judge.eval().requires_grad_(False)
    images = render(sample_scenes(2048, np.random.default_rng([seed, steps])))[0]
    features = judge(images)[-1]
    judge.feature_mean.copy_(features.mean(dim=0))
    judge.feature_std.copy_(features.std(dim=0))
    return judge


def _loss(judge: Judge, rng: np.random.Generator) -> Tensor:
    """Cross-entropies of noun, texture and patch colours, which weigh alike."""
    scenes = sample_scenes(BATCH, rng)
    images, masks = render(scenes)
    noun, texture = truth(scenes)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    colours, nouns, textures, _ = judge(spoil(images, generator))
    texture = torch.where(noun > 0, texture, -1)
    losses = (
        F.cross_entropy(nouns.flatten(0, 1), noun.flatten()),
        F.cross_entropy(textures.flatten(0, 1), texture.flatten(), ignore_index=-1),
        F.cross_entropy(colours, layouts(scenes, masks)),
    )
    return sum(losses)


def main() -> None:
    """Command line of ``python -m scfg.models.shapes_judge_training``."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    parser = argparse.ArgumentParser(
        prog="python -m scfg.models.shapes_judge_training", description=__doc__
    )
    parser.add_argument("--train", action="store_true", help="train first")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of 128 scenes")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="file to write or measure")
    args = parser.parse_args()
    if args.train:
        judge = train(args.steps)
        tensors = {k: v.half() for k, v in judge.state_dict().items() if v.is_floating_point()}
        write_whole(args.weights, lambda aside: save_file(tensors, aside))
    measured = measure(load_judge(args.weights))
    with safe_open(args.weights, "pt") as file:
        metadata = file.metadata() or {}
    if args.train:
        metadata = {"steps": str(args.steps), "measured": json.dumps(measured)}
        tensors = load_file(args.weights)
        write_whole(args.weights, lambda aside: save_file(tensors, aside, metadata))
    print(json.dumps({"measured": measured, "stored": json.loads(metadata["measured"])}, indent=1))


if __name__ == "__main__":
    main()
