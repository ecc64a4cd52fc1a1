"""How far START varies over patches where there is one, and where there is none.

    python -m benchmarks.start [--out benchmarks/results/start.txt]

The share of its value by which START varies, the largest over the levels of a call, is what
`scfg.reference.start_is_flat` compares with ``NO_START``. Uniform attention (a context of zeros)
is measured in every type, on both backends; a real START in the golden files of the authors' code,
in U-Nets of random weights, and in the embedded model at every tenth of its noise levels.
"""

import argparse
import itertools
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import machine
from scfg import ops, reference
from scfg.config import SCFGConfig
from scfg.models import emoji as scenes
from scfg.models.embedded import PATCH, load_model, to_latents
from scfg.models.unet import UNet, UNetConfig
from scfg.recording.predictor import guided
from scfg.recording.recorder import AttentionRecorder

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
CONFIG = SCFGConfig(map_reduction=1, coarsest_reduction=8)
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def variation(levels):
    """(b,) largest share of its value by which START varies at a level."""
    columns = [x[..., 0].double() for x in levels]
    shares = [(x.amax(1) - x.amin(1)) / x.amax(1) for x in columns]
    return torch.stack(shares).amax(dim=0)


def uniform(dtype, h, w, t, layers, backend):
    """Evidence of layers whose text keys are all zero and whose self-attention is random."""
    generator = torch.Generator().manual_seed(h * t + layers)
    weights = reference.spatial_weights(h, w, 1)
    total = None
    for _ in range(layers):
        q, k = (torch.randn(2, h * w, 40, generator=generator).to(dtype) for _ in range(2))
        text = torch.zeros(2, t, 40, dtype=dtype)
        maps = ops.attention_maps(2 * q, 2 * k, q, text, 2, backend=backend)
        total = ops.complete(*maps, weights.to(maps[0]), total, backend=backend)
    return [total]


def of_uniform(out):
    """Shares where there is no START, printed by type."""
    triton = bool(os.environ.get("TRITON_INTERPRET")) or torch.cuda.is_available()
    for backend in ("torch", "triton") if triton else ("torch",):
        for dtype in TYPES:
            if backend == "triton" and dtype in (torch.float64, torch.bfloat16):
                continue  # refused, and wrong in the interpreter
            small = [(8, 12, 9, 1), (13, 7, 77, 3)]
            sizes = small if backend == "triton" else [*small, (32, 32, 77, 20), (16, 16, 231, 60)]
            shares = [variation(uniform(dtype, *size, backend)) for size in sizes]
            worst = torch.stack(shares).max().item()
            out(f"uniform attention  {backend:6}  {str(dtype)[6:]:9}  at most  {worst:.1e}")


def of_golden(out):
    """Shares of the golden files of the authors' code."""
    for path in sorted(GOLDEN.glob("*.npz")):
        data = np.load(path)
        b, size, *_ = data["meta"].tolist()
        names = sorted(name[5:] for name in data.files if name.startswith("self_"))
        levels = {}
        for name in names:
            maps = [
                torch.from_numpy(data[kind + name])[:b].double() for kind in ("self_", "cross_")
            ]
            side = int(maps[0].shape[1] ** 0.5)
            weights = reference.spatial_weights(side, side, 1)
            key = name.split("_")[0]
            levels[key] = reference.complete(*maps, weights, levels.get(key))
        least = variation(levels.values()).min().item()
        out(f"golden file        {path.stem:17}  at least {least:.1e}")


@torch.no_grad()
def recorded(recorder, unet, x, t, context):
    recorder.start(x)
    unet(x, t, context)
    evidence = recorder.finish()
    return variation([evidence.total(r) for r in evidence.reductions])


def of_random(out):
    """Shares of U-Nets with random weights, at contexts of usual and of small scale."""
    config = UNetConfig(4, 4, (16, 32, 32, 32), (1, 1, 1, 1), 1, (2,) * 4, 1, 24, norm_groups=8)
    for scale in (1.0, 0.1):
        least = []
        for seed, (h, w) in itertools.product(range(5), [(16, 24), (64, 40)]):
            torch.manual_seed(seed)
            unet = UNet(config).eval()
            recorder = AttentionRecorder(unet, CONFIG, "torch")
            x, context = torch.randn(2, 4, h, w), scale * torch.randn(2, 7, 24)
            least.append(recorded(recorder, unet, x, torch.tensor(500), context))
        out(
            f"random U-Nets      context * {scale:<7}  at least {torch.cat(least).min().item():.1e}"
        )


def of_embedded(out):
    """Shares of the embedded model's empty caption."""
    model = load_model()
    recorder = AttentionRecorder(model.unet, model.config, "torch")
    x = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    context = model.encode([""] * 4)
    times = range(99, len(model.schedule.alphas_cumprod), 100)
    shares = [recorded(recorder, model.unet, x, t, context) for t in times]
    out(f"embedded model     empty caption      at least {torch.cat(shares).min().item():.1e}")


@torch.no_grad()
def of_judge(out):
    """The rule on the embedded model: a context of zeros beside its empty caption."""
    model = load_model()
    known = scenes.sample_scenes(64, np.random.default_rng(5))
    images, masks = scenes.render(known)
    truth = F.avg_pool2d(1 - masks[:, -1:].float(), PATCH)[:, 0] > 0.5  # (b, 16, 16)
    text = model.encode([scenes.caption(scene) for scene in known])
    empty = model.encode([""] * len(known))
    noise = torch.randn(len(known), *model.latent_shape, generator=torch.Generator().manual_seed(1))
    for t in (800, 600, 400, 200):
        abar = model.schedule.alphas_cumprod[t]
        x = abar.sqrt() * to_latents(images) + (1 - abar).sqrt() * noise
        seen = []
        for uncond in (empty, torch.zeros_like(empty)):
            with guided(model.unet, 2.5, model.config, callback=seen.append) as predict:
                predict(x, t, uncond, text)
        caption, zeros = seen
        rates = (zeros.rate - caption.rate).abs().mean().item()
        ious = [overlap(step.foreground, truth) for step in seen]
        means = [step.rate.mean().item() for step in seen]
        out(
            f"embedded model     t = {t}: foreground and objects, IoU {ious[0]:.3f} with an empty "
            f"caption, {ious[1]:.3f} with zeros, of the two "
            f"{overlap(zeros.foreground, caption.foreground):.3f}; mean rate {means[0]:.3f}, "
            f"{means[1]:.3f}, mean difference {rates:.3f}"
        )


def overlap(a, b):
    """Mean intersection over union of two sets of masks (b, h, w)."""
    union = (a | b).flatten(1).sum(1)
    return ((a & b).flatten(1).sum(1) / union.clamp_min(1)).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the lines there")
    arguments = parser.parse_args()
    lines = []

    def out(line):
        lines.append(line)
        print(line, flush=True)

    out(f"share of its value by which START varies over patches; NO_START = {reference.NO_START}")
    for part in (of_uniform, of_golden, of_random, of_embedded, of_judge):
        part(out)
    found = machine.machine()
    out(f"{found['device']}, torch {found['torch']}, {found['date']}")
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
