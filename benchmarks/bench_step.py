"""One CFG step of the real U-Net shapes: plain CFG, S-CFG, and the released algorithm, in one run.

    python -m benchmarks.bench_step [--quick] [--sizes 512 1024] [--out FILE]

The U-Net is `scfg.unet` at full width with random weights; plain CFG, with fused attention, is the
floor. Methods take turns in one process; the ratio is the median over rounds of time / time of
plain CFG in the same round. Peak memory is that of a step above what was there before: of the process
(VmHWM, reset before each step) on a CPU, of the allocator on a GPU.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

import scfg
from benchmarks.machine import machine, peak_mib
from benchmarks.released import Released
from scfg.unet import SD15, SD21, SDXL, UNet

MODELS = {"sd15": (SD15, 77), "sd21": (SD21, 77), "sdxl": (SDXL, 77)}
OFFICIAL = scfg.SCFGConfig(propagation="official")
SCALE = 7.5


def build(name, width, device, dtype):
    """A U-Net of a published shape, `width` times as wide, with random weights."""
    config, _ = MODELS[name]
    channels = tuple(int(c * width) for c in config.block_out_channels)
    with torch.device(device):
        net = UNet(replace(config, block_out_channels=channels)).to(dtype)
    return net.eval().requires_grad_(False)


def inputs(net, name, pixels, batch, device, dtype):
    """Arguments of the U-Net for one batched CFG call."""
    generator = torch.Generator().manual_seed(0)
    config, tokens = MODELS[name]
    x = torch.randn(batch, 4, pixels // 8, pixels // 8, generator=generator)
    context = torch.randn(2 * batch, tokens, config.cross_attention_dim, generator=generator)
    x, context = x.to(device, dtype), context.to(device, dtype)
    arguments = [torch.cat([x, x]), torch.full((2 * batch,), 500, device=device), context]
    if config.addition:
        pooled, ids, _ = config.addition
        added = torch.randn(2 * batch, pooled, generator=generator), torch.rand(2 * batch, ids)
        arguments.append(tuple(y.to(device, dtype) for y in added))
    return arguments


class Plain:
    """Plain CFG."""

    def __init__(self, net):
        self.net = net

    def __call__(self, *arguments):
        return scfg.cfg(*self.net(*arguments).chunk(2), SCALE)

    def remove(self):
        pass


class Semantic:
    """S-CFG by this library."""

    def __init__(self, net, backend="auto", config=OFFICIAL):
        self.unet = scfg.UNetWrapper(net, config, backend)

    def __call__(self, *arguments):
        return self.unet.guide(*self.unet(*arguments).chunk(2), SCALE).eps

    def remove(self):
        self.unet.remove()


class ReleasedStep:
    """S-CFG by the released algorithm."""

    def __init__(self, net):
        self.net, self.released = net, Released(net)

    def __call__(self, *arguments):
        return self.released.combine(*self.net(*arguments).chunk(2), SCALE)

    def remove(self):
        self.released.remove()


def methods(device):
    """What is compared, by name."""
    found = {"cfg": Plain, "scfg (torch)": lambda net: Semantic(net, "torch")}
    if device == "cuda":
        found["scfg (triton)"] = lambda net: Semantic(net, "triton")
    found["released"] = ReleasedStep
    return found


def run_once(make, net, arguments, device):
    """Seconds and peak MiB above the start of one step."""
    method = make(net)
    try:
        with peak_mib(device) as peak:
            start = time.perf_counter()
            eps = method(*arguments)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        return seconds, peak(), eps
    finally:
        method.remove()


@torch.no_grad()
def measure(name, pixels, batch, rounds, width, device, dtype, skip=()):
    """One row per method: median seconds, ratio to plain CFG, peak memory above plain CFG."""
    net = build(name, width, device, dtype)
    arguments = inputs(net, name, pixels, batch, device, dtype)
    found = {key: make for key, make in methods(device).items() if key not in skip}
    seconds, peaks = {key: [] for key in found}, {key: [] for key in found}
    results, failed = {}, {}
    for turn in range(rounds + 1):  # the first round warms up
        for key, make in found.items():
            if key in failed:
                continue
            try:
                taken, peak, results[key] = run_once(make, net, arguments, device)
            except (RuntimeError, MemoryError) as error:
                failed[key] = str(error).splitlines()[0][:80]
                continue
            if turn:
                seconds[key].append(taken)
                peaks[key].append(peak)
    if "released" in results:  # the same method, or the times say nothing
        torch.testing.assert_close(
            results["scfg (torch)"].float(), results["released"].float(), atol=1e-2, rtol=1e-2
        )
    rows = []
    for key in found:
        row = {"model": name, "width": width, "pixels": pixels, "batch": batch, "method": key}
        row |= {"dtype": str(dtype).removeprefix("torch."), "rounds": rounds}
        if key in failed:
            rows.append(row | {"error": failed[key]})
            continue
        pairs = zip(seconds[key], seconds["cfg"], strict=True)
        row["seconds"] = round(statistics.median(seconds[key]), 4)
        row["ratio"] = round(statistics.median(a / b for a, b in pairs), 4)
        above = statistics.median(peaks[key]) - statistics.median(peaks["cfg"])
        rows.append(row | {"extra_mib": round(above, 1)})
    return rows


def show(rows):
    """Print rows as a table."""
    names = ("model", "pixels", "batch", "method", "seconds", "ratio", "MiB")
    head = "{:6} {:>6} {:>5} {:14} {:>9} {:>7} {:>9}".format(*names)
    print(head + "\n" + "-" * len(head))
    for row in rows:
        start = f"{row['model']:6} {row['pixels']:6} {row['batch']:5} {row['method']:14} "
        if "error" in row:
            print(start + row["error"])
        else:
            print(start + f"{row['seconds']:9.3f} {row['ratio']:7.3f} {row['extra_mib']:+9.1f}")


def main():
    """Parse arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], help="methods left out")
    parser.add_argument(
        "--quick", action="store_true", help="a fifth of the width (sd15), 3 rounds"
    )
    parser.add_argument("--out", type=Path, help="append rows to this JSON file")
    options = parser.parse_args()
    if options.quick and options.model != "sd15":
        parser.error(
            "--quick is for --model sd15: the others' heads do not divide a narrower U-Net"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    width, rounds = (0.2, 3) if options.quick else (1.0, options.rounds)
    rows = []
    for pixels in options.sizes:
        for batch in options.batch:
            rows += measure(
                options.model, pixels, batch, rounds, width, device, dtype, options.skip
            )
    show(rows)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if options.out:
        old = json.loads(options.out.read_text()) if options.out.exists() else []
        options.out.write_text(
            json.dumps(old + [{"machine": about, "rows": rows}], indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
