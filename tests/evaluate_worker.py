"""One process of a tiny evaluation: ``evaluate_worker.py FOLDER WEIGHTS``, alone or by torchrun."""

import sys
from pathlib import Path

import torch

from scfg.evaluate.draw import Point
from scfg.evaluate.run import one_of_all, share
from scfg.evaluate.work import Plan
from scfg.models import shapes
from scfg.models.embedded import ModelConfig
from scfg.models.unet import UNetConfig

UNET = UNetConfig(
    in_channels=48,
    out_channels=48,
    block_out_channels=(16, 32),
    transformer_depth=(1, 1),
    heads=(2, 2),
    layers_per_block=1,
    cross_attention_dim=32,
    norm_groups=8,
)
TINY = ModelConfig(UNET, 1, 2, words=shapes.WORDS, length=shapes.LENGTH)

METHODS = ("cfg", "scfg", "scfg_none", "samg")
PLAN = Plan(
    points=tuple(Point(method, 2.0, steps=3) for method in METHODS),
    samples=7,
    scenes=5,
    timesteps=(400,),
    reference=6,
    chunk=2,
    weights=("model", "judge"),
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    with one_of_all("cpu") as (rank, world, device):
        share(PLAN, Path(sys.argv[1]), Path(sys.argv[2]), rank, world, device, quiet=rank > 0)
