"""One CFG step of the real U-Net shapes: plain CFG, S-CFG, and the released algorithm, in one run.

    python -m benchmarks.bench_step [--quick] [--model sdxl] [--sizes 512 1024] [--batch 1 4 16]

The U-Net is `scfg.models.unet` at full width with random weights; plain CFG, with fused attention,
is the floor. Methods take turns in one process, in an order that reverses every round; a ratio is
the median over rounds of time / time of plain CFG in the same round and mode; beside it stands that
of the fastest step of each, which other work on the machine disturbs least. Peak memory is that of
a step above what was there before: of the process (VmHWM, reset before each step) on a CPU, of the
allocator on a GPU. On a GPU everything but "eager" is replayed as a CUDA graph. What does not fit
is a row that says so.
"""

import argparse
import contextlib
import gc
import itertools
import statistics
import sys

import torch

from benchmarks import records
from benchmarks.clock import seconds
from benchmarks.machine import first_line, machine, memory_limit, peak_mib
from benchmarks.methods import MODELS, MODES, build, inputs, methods, prepare

# Of results that are the same method's; a patch that rounding gives to another token changes rates.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02}


def start(found, net, arguments, device, failures):
    """Steps that run, results, and peaks of the recorded ones; others get an entry in failures."""
    steps, results, peaks = {}, {}, {}
    for key, make in found.items():
        try:
            steps[key], results[key], peak = prepare(key[0], make, net, arguments, device)
        except Exception as error:  # out of memory, or what a compiler does not take
            failures[key] = first_line(error)
        else:
            if peak is not None:
                peaks[key] = [peak]
        if key in failures:  # after the error, whose frames hold tensors
            gc.collect()
            torch.cuda.empty_cache()
    return steps, results, peaks


def compare(steps, results, failures):
    """Distance of every S-CFG of all layers to the torch one; one that is far off is not timed.

    A region may go to another token where two are nearly level, more often in half precision.
    """
    distances = {}
    expected = next((results[key].double() for key in steps if key[1] == "scfg torch"), None)
    for key in list(steps):
        if expected is None or key[1] == "cfg" or "last" in key[1]:
            continue
        distance = ((results[key].double() - expected).norm() / expected.norm()).item()
        distances[key] = float(f"{distance:.2g}")
        if not distance <= TOLERANCE[results[key].dtype]:
            failures[key] = f"is {distance:.3f} from scfg torch: not the same method"
            del steps[key]
    return distances


def take_turns(steps, arguments, rounds, device, peaks):
    """Seconds of a step and peak MiB of every method in every round."""
    times = {key: [] for key in steps}
    recorded = set(peaks)
    count = 1  # steps in a row of one turn; on a GPU, about a fifth of a second of them
    if device == "cuda":
        fastest = min(min(seconds(lambda s=s: s(*arguments), device)) for s in steps.values())
        count = max(1, min(10, int(0.2 / fastest)))
    for turn in range(rounds):
        order = list(steps) if turn % 2 == 0 else list(steps)[::-1]
        print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
        for key in order:
            with peak_mib(device) as peak:
                taken = seconds(lambda key=key: steps[key](*arguments), device, count)
            times[key].append(statistics.median(taken))
            if key not in recorded:
                peaks.setdefault(key, []).append(peak())
    return times


@torch.no_grad()
def measure(model, pixels, batch, *, rounds, width, device, dtype, modes=("eager",), skip=()):
    """One row per mode and method."""
    found = methods(model, device, modes)
    found = {key: make for key, make in found.items() if key[1] not in skip}
    about = {"kind": "step", "model": model, "width": width, "pixels": pixels, "batch": batch}
    about |= {"dtype": str(dtype).removeprefix("torch."), "rounds": rounds}
    steps, times, peaks, distances, failures = {}, {}, {}, {}, {}
    try:
        net = build(model, width, device, dtype)
        arguments = inputs(net.config, pixels, batch, device, dtype)
    except (RuntimeError, MemoryError) as error:
        failures = dict.fromkeys(found, first_line(error))
    else:
        steps, results, peaks = start(found, net, arguments, device, failures)
        distances = compare(steps, results, failures)
    if steps:
        times = take_turns(steps, arguments, rounds, device, peaks)
    rows = []
    for key in found:
        row = about | {"mode": key[0], "method": key[1]}
        if key in failures:
            rows.append(row | {"failed": failures[key]})
            continue
        row["seconds"] = float(f"{statistics.median(times[key]):.5g}")
        floor = (key[0], "cfg")
        if floor in times:
            ratios = [a / b for a, b in zip(times[key], times[floor], strict=True)]
            row["ratio"] = round(statistics.median(ratios), 4)
            row["ratio_least"], row["ratio_most"] = round(min(ratios), 4), round(max(ratios), 4)
            row["ratio_fastest"] = round(min(times[key]) / min(times[floor]), 4)
            above = statistics.median(peaks[key]) - statistics.median(peaks[floor])
            row["extra_mib"] = round(above, 1)
        row["peak_mib"] = round(statistics.median(peaks[key]), 1)
        if key in distances:
            row["distance"] = distances[key]
        rows.append(row)
    return rows


def show(rows):
    """Print rows as a table."""
    names = ("model", "pixels", "b", "mode", "method", "seconds", "ratio", "least", "most")
    names += ("fastest", "MiB")
    head = "{:6} {:>6} {:>3} {:8} {:20} {:>9} {:>7} {:>7} {:>7} {:>7} {:>9}".format(*names)
    print(head + "\n" + "-" * len(head))
    for row in rows:
        start = f"{row['model']:6} {row['pixels']:6} {row['batch']:3} {row['mode']:8} "
        start += f"{row['method']:20} "
        if "failed" in row:
            print(start + row["failed"])
            continue
        print(start + f"{row['seconds']:9.4g} ", end="")
        if "ratio" in row:
            keys = ("ratio", "ratio_least", "ratio_most", "ratio_fastest")
            ratios = " ".join(f"{row[key]:7.3f}" for key in keys)
            print(f"{ratios} {row['extra_mib']:+9.1f}", end="")
        print()


def main():
    """Parse arguments, measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512], help="pixels")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: eager; on a GPU all")
    parser.add_argument("--skip", nargs="*", default=[], help="methods left out, as printed")
    parser.add_argument("--quick", action="store_true", help="a fifth of the width, 5 rounds")
    parser.add_argument("--out", help="append rows to this JSON file, e.g. in benchmarks/results")
    parser.add_argument("--commit", help="of a copy of the tree without its history")
    options = parser.parse_args()
    if options.quick and options.model != "sd15":
        parser.error("--quick is for sd15: the others' heads do not divide a narrower U-Net")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    modes = options.modes or (MODES if device == "cuda" else ("eager",))
    if device == "cpu" and "graphed" in modes:
        parser.error("--modes graphed needs a CUDA device")
    width, rounds = (0.2, 5) if options.quick else (1.0, options.rounds)
    rows = []
    with memory_limit() if device == "cpu" else contextlib.nullcontext():
        for pixels, batch in itertools.product(options.sizes, options.batch):
            rows += measure(
                options.model, pixels, batch, rounds=rounds, width=width, device=device,
                dtype=dtype, modes=modes, skip=options.skip)  # fmt: skip
            torch.cuda.empty_cache()
    show(rows)
    about = machine(options.commit)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if options.quick:
        print("--quick: a fifth of the width, so guidance weighs more than in a real U-Net")
    if options.out:
        records.append(options.out, rows, about)


if __name__ == "__main__":
    main()
