"""How well embedded networks undo noise on real scenes: one number a noise level.

    python -m benchmarks.denoising [--weights FILE ...] [--out FILE]

Mean squared error of the image that a prediction points to, colours in [-1, 1], over 128 scenes of
their own numbers, captions given. The networks that ship come first; FILE are weights that
``python -m scfg.models.train --export`` wrote, of either network, at any point of their training.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks import machine
from scfg.models.embedded import SCALE, SHIPPED, load_model, to_latents
from scfg.models.emoji import caption, render, sample_scenes
from scfg.models.files import read_tensors, write_text

TIMESTEPS = (50, 200, 350, 500, 650, 800, 950)
SCENES = 128


@torch.no_grad()
def errors(path: Path) -> list[float]:
    """Mean squared error of the weights in a file at each of `TIMESTEPS`."""
    model = load_model(path)
    scenes = sample_scenes(SCENES, np.random.default_rng(11))
    x0 = to_latents(render(scenes)[0])
    context = model.encode([caption(scene) for scene in scenes])
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(11))
    found = []
    for t in TIMESTEPS:
        abar = model.schedule.alphas_cumprod[t]
        x = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
        seen = (x - (1 - abar).sqrt() * model.unet(x, t, context)) / abar.sqrt()
        found.append((seen - x0).square().mean().item() / SCALE**2)
    return found


def main() -> None:
    """Print a line a file and, where asked for, write the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, nargs="+", default=[])
    parser.add_argument("--out", type=Path, help="also write the lines there")
    arguments = parser.parse_args()
    lines = ["images seen  network       error at timestep " + ", ".join(map(str, TIMESTEPS))]
    for path in (*SHIPPED.values(), *arguments.weights):
        facts = read_tensors(path)[1]
        network = load_model(path).network.__class__.__name__
        numbers = "  ".join(f"{error:.4f}" for error in errors(path))
        lines.append(f"{facts['samples']:>11}  {network:16}  {numbers}")
        print(lines[-1], flush=True)
    found = machine.machine()
    lines.append(f"{found['device']}, torch {found['torch']}, {found['date']}")
    if arguments.out is not None:
        write_text(arguments.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
