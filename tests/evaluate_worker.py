"""One process of a tiny evaluation: ``evaluate_worker.py FOLDER WEIGHTS``, alone or by torchrun."""

import sys
from pathlib import Path

import torch

from scfg.evaluate import draw
from scfg.evaluate.draw import Point
from scfg.evaluate.run import one_of_all, share
from scfg.evaluate.work import Plan

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
