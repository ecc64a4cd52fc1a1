"""One training run of the embedded model: its plan, a step, and its checkpoint.

The network predicts x0 on scenes drawn on the fly; one caption in ten is empty. A U-Net's loss has
min-SNR-5 weights, ``min(abar / (1 - abar), 5) |x0 - target|^2`` (Hang et al., arXiv 2303.09556); a
transformer's is that of the velocity on the straight path ``(1 - s) x0 + s eps``, which is
``|x0 - target|^2 / s^2``, with logit-normal s (Esser et al., 2403.03206). AdamW, and Muon (Jordan
et al., 2024) for the matrices that a transformer's tokens pass, with a short warm-up, then a
learning rate that falls linearly to zero over the planned minutes or samples, or the last share of
them; the weights that are shown and exported are an exponential moving average (EMA).
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scfg.models.embedded import ModelConfig, networks, read_config, to_latents
from scfg.models.emoji import caption, render, sample_scenes
from scfg.models.files import read_json, read_tensors, write_text, write_whole
from scfg.models.text import Tokenizer
from scfg.sampling import scaled_linear

LEAST_LEVEL = 0.1  # below it a velocity's weight grows no more
MEAN_LOGIT = 0.6  # of a transformer's noise levels: shapes are decided above a half
STATE = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # what the optimizers keep a weight


@dataclass(frozen=True)
class Plan:
    """What determines a run. The learning rate reaches zero at `minutes` or, if given, `samples`.

    It begins to fall when `decay`, a share of the run in (0, 1], is left: by default at once. A run
    that may be given more time later keeps its rate until then.
    Only a run planned in samples is reproducible bit for bit; minutes are what a machine allows.
    """

    minutes: float = 110.0
    samples: int | None = None
    batch: int = 32
    seed: int = 0
    lr: float = 1e-3
    warmup: int = 200  # steps
    decay: float = 1.0
    ema_decay: float = 0.998
    empty: float = 0.1  # share of empty captions
    bf16: bool = False
    model: ModelConfig = ModelConfig()

    def __post_init__(self) -> None:
        """Refuse a learning rate that would fall at no time, or before the run begins."""
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {self.decay}")


def optimizers(parts: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of a transformer's attention and feed-forward, AdamW for the rest."""
    kinds = {True: [], False: []}
    for name, p in parts.named_parameters():
        mixes = ".attn." in name or ".ff." in name
        kinds[plan.model.network == "transformer" and mixes and p.ndim == 2].append(p)
    adamw = torch.optim.AdamW(
        kinds[False], plan.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    if not kinds[True]:
        return [adamw]
    muon = torch.optim.Muon(
        kinds[True], plan.lr, weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw"
    )
    return [adamw, muon]


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
        self.optimizers = optimizers(self.parts, plan)
        self.predict = torch.compile(self._predict) if compile else self._predict
        self.tokenizer = Tokenizer(plan.model.words, plan.model.length)
        self.abar = scaled_linear().alphas_cumprod.to(device)
        self.steps, self.seconds = 0, 0.0
        self.rank, self.world = 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if plan.batch % self.world:
            raise ValueError(f"batch {plan.batch} cannot be split among {self.world} processes")

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
        return self.parts[self.plan.model.network](x, t, self.parts["text_encoder"](tokens))

    def step(self) -> Tensor:
        """One step on fresh scenes, drawn from (seed, step, process) and nothing else.

        Returns:
            The loss, a scalar.
        """
        start, plan = time.perf_counter(), self.plan
        loss = self._loss(np.random.default_rng([plan.seed, self.steps, self.rank]))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        loss = loss.detach()
        if self.world > 1:
            loss = self._average(loss)
        nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        falling = min(1, max(0, 1 - self.progress) / plan.decay)
        rate = plan.lr * min(1, (self.steps + 1) / plan.warmup) * falling
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        self.steps += 1
        decay = min(plan.ema_decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for average, p in zip(self.ema.parameters(), self.parts.parameters(), strict=True):
                average.lerp_(p, 1 - decay)
        self.seconds += time.perf_counter() - start
        return loss

    def _loss(self, rng: np.random.Generator) -> Tensor:
        """Weighted loss of this process's share of a batch."""
        count = self.plan.batch // self.world
        scenes = sample_scenes(count, rng)
        dropped = rng.random(count) < self.plan.empty
        captions = ["" if d else caption(s) for s, d in zip(scenes, dropped, strict=True)]
        x0 = to_latents(render(scenes, self.device)[0])
        generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**63)))
        level, signal, noise, weight = self._levels(count, generator)
        eps = torch.randn(x0.shape, generator=generator, device=self.device)
        signal, noise, weight = (y[:, None, None, None] for y in (signal, noise, weight))
        x = signal * x0 + noise * eps
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.bf16):
            prediction = self.predict(x, level, self.tokenizer(captions).to(self.device))
        return (weight * (prediction.float() - x0).square()).mean()

    def _levels(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Noise levels as the network takes them, factors of signal and noise, weights: (b,)."""
        options = {"generator": generator, "device": self.device}
        if self.plan.model.network == "transformer":
            s = torch.sigmoid(MEAN_LOGIT + torch.randn(count, **options))
            return s, 1 - s, s, s.clamp_min(LEAST_LEVEL) ** -2
        t = torch.randint(len(self.abar), (count,), **options)
        abar = self.abar[t]
        return t, abar.sqrt(), (1 - abar).sqrt(), (abar / (1 - abar)).clamp(max=5)

    def _average(self, loss: Tensor) -> Tensor:
        """Average gradients and loss over the processes, and agree on the time."""
        clock = loss.new_tensor(self.seconds)
        tensors = [*(p.grad for p in self.parts.parameters()), loss, clock]
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / self.world).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        self.seconds = clock.item()
        return loss

    def save(self, folder: Path) -> None:
        """Write everything that `resume` needs: tensors as safetensors, numbers as JSON.

        Both files are written aside and then moved in place, the JSON, which names its tensors,
        last: a run that is cut off while it writes leaves the checkpoint of before.
        """
        from safetensors.torch import save_file

        tensors = {}
        for name, p in self.parts.named_parameters():
            tensors |= {f"parts.{name}": p.detach()}
            for optimizer in self.optimizers:
                tensors |= {f"{key}.{name}": v for key, v in optimizer.state.get(p, {}).items()}
        tensors |= {f"ema.{name}": p for name, p in self.ema.named_parameters()}
        numbers = {
            "plan": asdict(self.plan),
            "steps": self.steps,
            "seconds": self.seconds,
            "tensors": f"checkpoint-{self.steps}.safetensors",
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / numbers["tensors"], lambda aside: save_file(tensors, aside))
        write_text(folder / "checkpoint.json", json.dumps(numbers, indent=1))
        for old in folder.glob("checkpoint-*.safetensors"):
            if old.name != numbers["tensors"]:
                old.unlink()

    @classmethod
    def resume(cls, folder: Path, device: str = "cpu", compile: bool = False) -> "Trainer":
        """Continue from the checkpoint in a folder, on the plan it was started with."""
        numbers = read_json(folder / "checkpoint.json")
        tensors, _ = read_tensors(folder / numbers["tensors"])
        model = numbers["plan"].pop("model")
        trainer = cls(Plan(**numbers["plan"], model=read_config(model)), device, compile)
        with torch.no_grad():
            for name, p in trainer.parts.named_parameters():
                p.copy_(tensors[f"parts.{name}"])
                kept = {key: tensors.get(f"{key}.{name}") for key in STATE}
                kept = {key: value.to(device) for key, value in kept.items() if value is not None}
                trainer.optimizers["momentum_buffer" in kept].state[p] = kept
            for name, p in trainer.ema.named_parameters():
                p.copy_(tensors[f"ema.{name}"])
        trainer.steps, trainer.seconds = numbers["steps"], numbers["seconds"]
        return trainer
