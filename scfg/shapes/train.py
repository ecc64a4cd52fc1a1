"""Train the embedded model: ``python -m scfg.shapes.train --out DIR --minutes 110``.

The network predicts x0 under min-SNR-5 weights, ``min(abar / (1 - abar), 5) |x0 - target|^2``
(Hang et al., arXiv 2303.09556), on scenes drawn on the fly; one caption in ten is empty. AdamW with
a short warm-up, then a learning rate that falls linearly to zero over the planned minutes or
samples; the weights that are shown and exported are an exponential moving average (EMA).
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scfg.sampling import ddim, scaled_linear
from scfg.shapes.model import WEIGHTS, ModelConfig, assemble, networks, save_weights, to_latents
from scfg.shapes.scenes import caption, render, sample_scenes
from scfg.shapes.tokenizer import Tokenizer
from scfg.unet import UNetConfig


@dataclass(frozen=True)
class Plan:
    """What determines a run. The learning rate reaches zero at `minutes` or, if given, `samples`.

    Only a run planned in samples is reproducible bit for bit; minutes are what a machine allows.
    """

    minutes: float = 110.0
    samples: int | None = None
    batch: int = 32
    seed: int = 0
    lr: float = 1e-3
    warmup: int = 200  # steps
    ema_decay: float = 0.998
    empty: float = 0.1  # share of empty captions
    bf16: bool = False
    model: ModelConfig = ModelConfig()


class Trainer:
    """Everything that changes while training, and one step of it.

    Args:
        plan: What determines the run.
        device: Where to train.
        compile: Run the networks through `torch.compile`.
    """

    def __init__(self, plan: Plan, device: str = "cpu", compile: bool = False) -> None:
        self.plan, self.device = plan, torch.device(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            self.parts = networks(plan.model).to(device)
        self.ema = networks(plan.model).to(device).requires_grad_(False)
        self.ema.load_state_dict(self.parts.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.parts.parameters(), plan.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.predict = torch.compile(self._predict) if compile else self._predict
        self.scenes = np.random.default_rng(plan.seed)
        self.noise = torch.Generator(device).manual_seed(plan.seed)
        self.tokenizer, self.abar = Tokenizer(), scaled_linear().alphas_cumprod.to(device)
        self.steps, self.seconds = 0, 0.0

    @property
    def samples(self) -> int:
        """Training images seen."""
        return self.steps * self.plan.batch

    @property
    def progress(self) -> float:
        """Share of the plan that is done; training ends at 1."""
        if self.plan.samples is not None:
            return self.samples / self.plan.samples
        return self.seconds / (60 * self.plan.minutes)

    def _predict(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.parts["unet"](x, t, self.parts["text_encoder"](tokens))

    def step(self) -> Tensor:
        """One step on fresh scenes. Returns the loss, a scalar that may still be on its way."""
        start, plan = time.perf_counter(), self.plan
        scenes = sample_scenes(plan.batch, self.scenes)
        dropped = self.scenes.random(plan.batch) < plan.empty
        captions = ["" if d else caption(s) for s, d in zip(scenes, dropped, strict=True)]
        x0 = to_latents(render(scenes, self.device)[0])
        options = {"generator": self.noise, "device": self.device}
        t = torch.randint(len(self.abar), (plan.batch,), **options)
        abar = self.abar[t][:, None, None, None]  # (b, 1, 1, 1)
        x = abar.sqrt() * x0 + (1 - abar).sqrt() * torch.randn(x0.shape, **options)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=plan.bf16):
            prediction = self.predict(x, t, self.tokenizer(captions).to(self.device))
        weight = (abar / (1 - abar)).clamp(max=5)
        loss = (weight * (prediction.float() - x0).square()).mean()

        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        rate = plan.lr * min(1, (self.steps + 1) / plan.warmup) * max(0, 1 - self.progress)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.steps += 1
        decay = min(plan.ema_decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for average, p in zip(self.ema.parameters(), self.parts.parameters(), strict=True):
                average.lerp_(p, 1 - decay)
        self.seconds += time.perf_counter() - start
        return loss.detach()

    def save(self, folder: Path) -> None:
        """Write everything that `resume` needs: tensors as safetensors, numbers as JSON.

        Both files are written aside and then moved in place, the JSON, which names its tensors,
        last: a run that is cut off while it writes leaves the checkpoint of before.
        """
        from safetensors.torch import save_file

        tensors = {"noise": self.noise.get_state()}
        for name, p in self.parts.named_parameters():
            tensors |= {f"parts.{name}": p.detach()}
            tensors |= {f"{key}.{name}": v for key, v in self.optimizer.state[p].items()}
        tensors |= {f"ema.{name}": p for name, p in self.ema.named_parameters()}
        numbers = {
            "plan": asdict(self.plan),
            "steps": self.steps,
            "seconds": self.seconds,
            "scenes": self.scenes.bit_generator.state,
            "tensors": f"checkpoint-{self.steps}.safetensors",
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / numbers["tensors"])
        (folder / "checkpoint.json.new").write_text(json.dumps(numbers, indent=1))
        (folder / "checkpoint.json.new").replace(folder / "checkpoint.json")
        for old in folder.glob("checkpoint-*.safetensors"):
            if old.name != numbers["tensors"]:
                old.unlink()

    @classmethod
    def resume(cls, folder: Path, device: str = "cpu", compile: bool = False) -> "Trainer":
        """Continue from the checkpoint in a folder, on the plan it was started with."""
        from safetensors.torch import load_file

        numbers = json.loads((folder / "checkpoint.json").read_text())
        tensors = load_file(folder / numbers["tensors"])
        model = numbers["plan"].pop("model")
        model["unet"] = UNetConfig(**model["unet"])
        trainer = cls(Plan(**numbers["plan"], model=ModelConfig(**model)), device, compile)
        with torch.no_grad():
            for name, p in trainer.parts.named_parameters():
                p.copy_(tensors[f"parts.{name}"])
                trainer.optimizer.state[p] = {
                    key: tensors[f"{key}.{name}"].to(device)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
            for name, p in trainer.ema.named_parameters():
                p.copy_(tensors[f"ema.{name}"])
        trainer.noise.set_state(tensors["noise"])
        trainer.scenes.bit_generator.state = numbers["scenes"]
        trainer.steps, trainer.seconds = numbers["steps"], numbers["seconds"]
        return trainer


def preview(trainer: Trainer, path: Path, count: int = 16, guidance_scale: float = 2.0) -> None:
    """Draw what the averaged weights make of `count` fixed captions, with plain guidance.

    Args:
        trainer: The run.
        path: PNG to write: rows of eight pictures; their captions go to the same name in .txt.
        count: Number of captions, a multiple of eight.
        guidance_scale: Of ``eps_uncond + guidance_scale * (eps_text - eps_uncond)``.
    """
    from PIL import Image

    model = assemble(trainer.ema)
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
    with tqdm(total=100, unit="%", mininterval=5) as bar:
        while trainer.progress < 1:
            loss = trainer.step()
            mean = loss if mean is None else mean + 0.01 * (loss - mean)
            now = time.monotonic()
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


def main() -> None:
    """Command line of ``python -m scfg.shapes.train``."""
    parser = argparse.ArgumentParser(prog="python -m scfg.shapes.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=Plan.minutes, help="length of the run")
    parser.add_argument("--samples", type=int, help="length of the run instead of --minutes")
    parser.add_argument("--batch", type=int, default=Plan.batch)
    parser.add_argument("--lr", type=float, default=Plan.lr)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
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
        const=WEIGHTS,
        help="write the averaged weights of the checkpoint in --out to this file (by default into "
        "the package) and end; no training",
    )
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.export is not None:
        trainer = Trainer.resume(args.out)
        save_weights(trainer.ema, trainer.plan.model, args.export)
        print(f"{args.export}: {trainer.samples} samples, {trainer.seconds / 60:.1f} minutes")
        return
    if args.resume:
        trainer = Trainer.resume(args.out, args.device, args.compile)
    elif (args.out / "checkpoint.json").exists():
        parser.error(f"{args.out} holds a run already: give --resume or another --out")
    else:
        names = ("minutes", "samples", "batch", "lr", "seed", "bf16")
        plan = Plan(**{name: getattr(args, name) for name in names})
        trainer = Trainer(plan, args.device, args.compile)
    args.out.mkdir(parents=True, exist_ok=True)
    run(trainer, args.out, args.checkpoint_minutes, args.preview_minutes)


if __name__ == "__main__":
    main()
