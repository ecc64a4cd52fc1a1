"""The command ``scfg evaluate``: share the work, wait for each other, write the report."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from scfg.evaluate.plan import make_plan
from scfg.evaluate.report import write_report
from scfg.evaluate.work import Plan, compute, prepare, units, work
from scfg.models.embedded import SHIPPED, WEIGHTS, load_model
from scfg.models.judge import load_judge


def run(options: argparse.Namespace) -> list[Path]:
    """Evaluate, and return the paths of what was written; other processes than the first: none.

    Raises:
        ValueError: The folder holds the units of other weights, or an option is out of range.
        RuntimeError: The device is not there.
    """
    weights = options.weights or SHIPPED[options.network]
    plan = make_plan(options.reduced, options.samples, weights, gpu=options.device == "cuda")
    with one_of_all(options.device) as (rank, world, device):
        with _threads(options.threads):
            share(plan, options.report, weights, rank, world, device, options.quiet)
            if rank > 0:
                return []
            return write_report(plan, options.report, command(options))


def share(
    plan: Plan,
    folder: Path,
    weights: Path = WEIGHTS,
    rank: int = 0,
    world: int = 1,
    device: torch.device = torch.device("cpu"),  # noqa: B008
    quiet: bool = False,
) -> None:
    """Do this process's units of a plan, with a progress bar on the first, and wait for the rest.

    Raises:
        ValueError: The folder holds the units of other weights.
    """
    from tqdm import tqdm

    if rank == 0:
        prepare(plan, folder)
    _wait(device)
    model, judge = load_model(weights, device), load_judge(device=device)
    total = len(units(plan)[rank::world])
    with tqdm(total=total, unit="unit", disable=quiet or rank > 0, file=sys.stderr) as bar:
        work(plan, folder, lambda unit: compute(unit, plan, model, judge), rank, world, bar.update)
    _wait(device)


@contextlib.contextmanager
def one_of_all(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device of this one: those of torchrun, or one alone.

    Raises:
        RuntimeError: The device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda: torch sees no CUDA device")
    if not dist.is_torchelastic_launched():
        yield 0, 1, torch.device(device)
        return
    if device == "cuda":
        device = f"cuda:{dist.get_node_local_rank()}"
        torch.cuda.set_device(device)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    try:
        yield dist.get_rank(), dist.get_world_size(), torch.device(device)
    finally:
        dist.destroy_process_group()


def _wait(device: torch.device) -> None:
    """For the other processes."""
    if dist.is_initialized():
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def command(options: argparse.Namespace) -> str:
    """What was asked for, as it can be typed; other processes give the same numbers."""
    words = ["scfg evaluate", *["--reduced"] * options.reduced]
    defaults = dict(samples=None, network="unet", weights=None, device="cpu", threads=1)
    for name, default in defaults.items():
        value = getattr(options, name)
        if value != default:
            words.append(f"--{name} {value.name if isinstance(value, Path) else value}")
    return " ".join([*words, "--report DIR"])
