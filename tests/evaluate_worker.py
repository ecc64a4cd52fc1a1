"""One process of a tiny evaluation: ``evaluate_worker.py FOLDER WEIGHTS``, alone or by torchrun."""

import sys
from pathlib import Path

import torch

from scfg.evaluate import draw
from scfg.evaluate.draw import Point
from scfg.evaluate.run import one_of_all, share
from scfg.evaluate.work import Plan
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
TINY = ModelConfig(UNET, text_layers=1, text_heads=2)

PLAN = Plan(
    points=(Point("cfg", 2.0), Point("shuffled", 2.0), Point("oracle", 2.0, 349)),
    samples=5,
    timesteps=(400,),
    reference=6,
    weights=("model", "judge"),
    chunk=2,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    draw.STEPS = 3
    with one_of_all("cpu") as (rank, world, device):
        share(PLAN, Path(sys.argv[1]), Path(sys.argv[2]), rank, world, device, quiet=rank > 0)
