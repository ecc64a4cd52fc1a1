"""Train the embedded model: ``python -m scfg.models.train --out DIR --minutes 110``.

Several processes share every batch if started by ``torchrun --nproc-per-node 2 -m
scfg.models.train``; on a busy CPU that is faster than as many threads.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from scfg.models.embedded import SHIPPED, TRANSFORMER, ModelConfig, assemble, save_weights
from scfg.models.emoji import caption, sample_scenes
from scfg.models.training import Plan, Trainer
from scfg.names import NETWORKS
from scfg.sampling import ddim


def preview(trainer: Trainer, path: Path, count: int = 16, guidance_scale: float = 2.0) -> None:
    """Draw what the averaged weights make of `count` fixed captions, with plain guidance.

    Args:
        trainer: The run.
        path: PNG to write: rows of eight pictures; their captions go to the same name in .txt.
        count: Number of captions, a multiple of eight.
        guidance_scale: Of ``eps_uncond + guidance_scale * (eps_text - eps_uncond)``.
    """
    from PIL import Image

    model = assemble(trainer.ema, trainer.plan.model)
    captions = [caption(scene) for scene in sample_scenes(count, np.random.default_rng(1))]
    context = torch.cat([model.encode([""] * count), model.encode(captions)])

    def predict(x: Tensor, t: Tensor) -> Tensor:
        uncond, text = model.unet(torch.cat([x, x]), torch.cat([t, t]), context).chunk(2)
        return uncond + guidance_scale * (text - uncond)

    noise = torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    latents = ddim(predict, noise.to(trainer.device), model.schedule, steps=30)
    rows = (model.decode(latents).cpu() * 127.5 + 127.5).unflatten(0, (-1, 8))
    grid = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (h of all, w of all, 3)
    Image.fromarray(grid.round().byte().numpy()).save(path)
    path.with_suffix(".txt").write_text("\n".join(captions) + "\n")


def run(trainer: Trainer, out: Path, checkpoint_minutes: float, preview_minutes: float) -> None:
    """Train to the end of the plan, with a line of log.jsonl every 100 steps."""
    from tqdm import tqdm

    mean = saved = shown = None
    leads = trainer.rank == 0
    with tqdm(total=100, unit="%", mininterval=5, disable=not leads) as bar:
        while trainer.progress < 1:
            loss = trainer.step()
            mean = loss if mean is None else mean + 0.01 * (loss - mean)
            now = time.monotonic()
            if not leads:
                continue
            if trainer.steps % 100 == 0:
                entry = {
                    "samples": trainer.samples,
                    "loss": round(float(mean), 5),
                    "samples_per_second": round(trainer.samples / trainer.seconds, 1),
                    "minutes": round(trainer.seconds / 60, 2),
                }
                with open(out / "log.jsonl", "a") as log:
                    log.write(json.dumps(entry) + "\n")
                bar.set_postfix(entry)
                bar.update(round(100 * min(1.0, trainer.progress), 1) - bar.n)
            saved, shown = saved or now, shown or now
            done = trainer.progress >= 1
            if done or now - saved > 60 * checkpoint_minutes:
                trainer.save(out)
                saved = now
            if done or now - shown > 60 * preview_minutes:
                preview(trainer, out / f"preview-{trainer.samples}.png")
                shown = now


def carried_on(plan: Plan, given: dict) -> Plan:
    """The plan of a run that goes on, with other minutes than it was started with if given.

    Args:
        plan: The plan so far.
        given: Options of the command line by name, without those that were left out.

    Raises:
        ValueError: An option is not what the run was planned with; only minutes, of a run that was
            planned in them, may change.
    """
    planned = vars(plan) | {"network": plan.model.network}
    for name, value in given.items():
        if value != planned[name] and (name != "minutes" or plan.samples is not None):
            kind = "minutes" if plan.samples is None else "samples"
            raise ValueError(
                f"--{name} must be left out, or be {planned[name]} as in the plan of the run that "
                f"--resume goes on with, a plan in {kind}; got {value}"
            )
    return replace(plan, minutes=given.get("minutes", plan.minutes))


def build_parser() -> argparse.ArgumentParser:
    """Options of the command, those of the plan without a default: what was given can be told."""
    parser = argparse.ArgumentParser(prog="python -m scfg.models.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--network", choices=NETWORKS, help="default: unet")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"length of the run, {Plan.minutes:g} if not given; with --resume another one than it "
        "was started with",
    )
    parser.add_argument("--samples", type=int, help="length of the run instead of --minutes")
    parser.add_argument("--batch", type=int, help=f"images a step; default: {Plan.batch}")
    parser.add_argument("--lr", type=float, help=f"learning rate; default: {Plan.lr}")
    parser.add_argument(
        "--decay",
        type=float,
        help=f"share of the run, its last, in which the lr falls; default: {Plan.decay:g}",
    )
    parser.add_argument("--seed", type=int, help=f"default: {Plan.seed}")
    parser.add_argument("--bf16", action="store_true", default=None, help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile, worth it on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0)
    parser.add_argument("--preview-minutes", type=float, default=20.0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--export",
        type=Path,
        nargs="?",
        const=Path(),
        help="write the averaged weights of the checkpoint in --out to this file (by default into "
        "the package) and end; no training",
    )
    return parser


def export(out: Path, file: Path) -> None:
    """Write the averaged weights of the checkpoint in `out`, with its plan, to `file`.

    ``Path()`` is where the package keeps those of the network.
    """
    trainer = Trainer.resume(out)
    plan = {name: value for name, value in vars(trainer.plan).items() if name != "model"}
    minutes = f"{trainer.seconds / 60:.1f}"
    facts = {"plan": json.dumps(plan), "samples": str(trainer.samples), "minutes": minutes}
    file = SHIPPED[trainer.plan.model.network] if file == Path() else file
    save_weights(trainer.ema, trainer.plan.model, file, **facts)
    print(f"{file}: {trainer.samples} samples, {minutes} minutes, {plan}")


def main() -> None:
    """Command line of ``python -m scfg.models.train``."""
    parser = build_parser()
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.export is not None:
        export(args.out, args.export)
        return
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    names = ("network", "minutes", "samples", "batch", "lr", "decay", "seed", "bf16")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        if args.resume:
            trainer = Trainer.resume(args.out, args.device, args.compile)
            trainer.plan = carried_on(trainer.plan, given)
        elif (args.out / "checkpoint.json").exists():
            raise ValueError(f"{args.out} holds a run already: give --resume or another --out")
        else:
            network = given.pop("network", "unet")
            plan = Plan(**given, model=ModelConfig() if network == "unet" else TRANSFORMER)
            trainer = Trainer(plan, args.device, args.compile)
    except ValueError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    run(trainer, args.out, args.checkpoint_minutes, args.preview_minutes)


if __name__ == "__main__":
    main()
