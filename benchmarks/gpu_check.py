"""Everything that only a GPU can show, in nine minutes and one command: correct, then how fast.

    python -m benchmarks.gpu_check --out FILE [--keep] [--only PART ...]
    python -m benchmarks.gpu_check --only kernels --sizes sdxl-1024 --batch 4 --ops guide segment
    TRITON_INTERPRET=1 python -m benchmarks.gpu_check --device cpu --quick       # that it runs

Parts, in this order, each with its share of the time; what one leaves the next may use, and what
there is no time for is a row that says so: checks (every kernel and S-CFG end to end in three types
against float64, odd shapes, graphs, torch.compile, streams), kernels (cold and warm, beside torch
and compiled torch), baselines (fused attention of the layer, a product a power), host (first calls,
microseconds of later ones), sweeps (over n, t, b, heads), rules (each host rule with other
constants; --keep writes what is faster to csrc_triton/choices.json), sanitizer, steps. Needs torch,
triton and this repository. FILE, a JSON row a check or point, each with GPU, driver, versions and
commit, is rewritten as rows come. Exit code: 0 if all held, 1 if a check or an operation failed, 2
without a GPU.
"""

import argparse
import itertools
import json
import signal
import time
import traceback
from functools import partial

import torch

from benchmarks import bench_step, cases, checks, gpu_host, gpu_sweeps, gpu_timing, records
from benchmarks.machine import first_line, machine
from benchmarks.sanitize import sanitized
from csrc_triton import choices

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SECONDS = {  # of each part; together nine minutes
    "checks": 180, "kernels": 110, "baselines": 15, "host": 25, "sweeps": 50, "rules": 60,
    "sanitizer": 40, "steps": 60,
}  # fmt: skip
ODD = {  # of which neither pixels nor patches nor tokens are multiples of anything
    "odd-154": cases.ModelSize((4, 68, 84), ((4, 1, 10, 40), (8, 1, 10, 40)), tokens=154),
    "odd-231": cases.ModelSize((3, 52, 76), ((4, 1, 5, 24),), tokens=231),
}
TIMED = (("sd15-512", 1), ("sdxl-1024", 1), ("sdxl-1024", 4))
STEPS = (  # model, pixels, images, modes; compiling comes last, as it takes minutes
    ("sd15", 512, 1, ("eager", "graphed")),
    ("sdxl", 1024, 1, ("eager", "graphed")),
    ("sd15", 512, 4, ("graphed",)),
    ("sdxl", 1024, 4, ("graphed",)),
    ("sd15", 512, 1, ("compiled",)),
)


def name_of(dtype):
    """float16 for torch.float16."""
    return str(dtype).removeprefix("torch.")


def planned(device, sizes, setup, dtypes, batch=2, goldens=True):
    """Every check, as (name, function of no argument)."""
    found = []
    for dtype in dtypes:
        for name, size in sizes.items():
            for op in (*cases.OPS, "guide_evidence"):
                title = f"{op} {name} {name_of(dtype)}"
                found.append((title, partial(checks.kernel, device, op, size, batch, dtype)))
    for dtype in dtypes:
        found.append(
            (f"end to end {name_of(dtype)}", partial(checks.end_to_end, device, dtype, setup))
        )
    for path in sorted(checks.GOLDEN.glob("*.npz")) if goldens else []:
        for dtype in (torch.float32, torch.float16):
            title = f"golden {path.stem} {name_of(dtype)}"
            found.append((title, partial(checks.golden, device, path, dtype)))
    size, half = next(iter(sizes.values())), torch.float16
    found += [
        ("graph of guidance", partial(checks.graph_of_guidance, device, half, size)),
        ("graph of U-Net and guidance", partial(checks.graph_of_step, device, half, setup)),
        ("two streams", partial(checks.two_streams, device, half, size)),
        ("torch.compile, one graph", partial(checks.compiles, device, setup)),
    ]
    return found


def run_checks(found):
    """A row for each check, printed as it comes: what it measured, or how it failed."""
    for name, check in found:
        row = {"kind": "check", "check": name, "ok": True}
        try:
            with torch.no_grad():
                row |= {"found": check()}
        except checks.Wrong as error:
            row |= {"ok": False, "failed": str(error)}
        except Exception as error:  # one check that breaks must not hide the others
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{first_line(error)} ({where.name}, line {where.lineno})"
            row |= {"ok": False, "failed": text}
        numbers = row.get("found", {}).items()
        text = row.get("failed") or ", ".join(
            f"{key} {value:.2g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in numbers
        )
        print(f"{'ok  ' if row['ok'] else 'FAIL'} {name}: {text}", flush=True)
        yield [row]


def time_kernels(timed, limits, device="cuda", dtypes=("float16",), ops=None, sizes=cases.SIZES):
    """Ceilings, then operations in Triton, torch and, of one image, compiled torch."""
    print(", ".join(f"{key} {value / 1e12:.3f} T/s" for key, value in limits.items()))
    yield [{"kind": "ceilings"} | {key: float(f"{v:.4g}") for key, v in limits.items()}]
    print(gpu_timing.HEAD)
    for name, b in timed:
        compiled = b == 1 and device == "cuda"
        for row in gpu_timing.survey(
            name, b, dtypes=dtypes, compiled=compiled, limits=limits, device=device, ops=ops,
            sizes=sizes):  # fmt: skip
            yield [row]


def time_steps(steps, device="cuda", width=1.0):
    """Steps as in `STEPS`."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    for model, pixels, b, modes in steps:
        try:
            rows = bench_step.measure(
                model, pixels, b, rounds=7 if device == "cuda" else 1, width=width, device=device,
                dtype=dtype, modes=modes)  # fmt: skip
        except Exception as error:  # one point that fails must not cost the others
            point = {"kind": "step", "model": model, "pixels": pixels, "batch": b}
            failed = {"mode": modes[0], "method": "all", "failed": first_line(error)}
            rows = [point | failed]
        bench_step.show(rows)
        yield rows
        torch.cuda.empty_cache()


def parts_on(device, quick, options):
    """{name: rows to come}, nothing of which has run yet."""
    if quick:
        tiny = {"tiny": gpu_sweeps.TINY}
        found = planned(device, tiny, checks.SMALL, [torch.float32], batch=1, goldens=False)
        limits = partial(gpu_timing.ceilings, device, gigabytes=2**-12, side=64, chains=1024)
        timed, sizes, steps = [("tiny", 1)], tiny, [("sd15", 256, 1, ("eager",))]
    else:
        found = planned(device, cases.SIZES | ODD, checks.FULL, DTYPES)
        limits, timed, sizes, steps = gpu_timing.ceilings, TIMED, cases.SIZES, STEPS
        if options.sizes:
            timed = list(itertools.product(options.sizes, options.batch))
    both = {name: sizes[name] for name in dict(timed)}

    def kernels():
        ops, dtypes = options.ops, options.dtypes
        yield from time_kernels(timed, limits(), device, dtypes, ops, sizes)

    return {
        "checks": run_checks(found),
        "kernels": kernels(),
        "baselines": gpu_host.baselines(both, device),
        "host": gpu_host.host(both, device),
        "sweeps": gpu_sweeps.sweeps(device, quick),
        "rules": gpu_sweeps.rules(device, quick),
        "sanitizer": sanitized(),
        "steps": time_steps(steps, device, width=0.1 if quick else 1.0),
    }


class TimeUp(BaseException):
    """Nine minutes are over; no part may catch this as one of its own errors."""


def run_parts(parts, keep, seconds):
    """Hand rows of every part to `keep` until its time, or that of all, is over."""

    def stop(*_):
        raise TimeUp

    ends, begin, name = 0.0, time.monotonic(), ""
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, sum(seconds[name] for name in parts))
    try:
        for name, part in parts.items():
            ends += seconds[name]
            for rows in part:
                keep(rows)
                if time.monotonic() - begin > ends:
                    keep([{"kind": "cut", "part": name}])
                    break
    except TimeUp:
        keep([{"kind": "cut", "part": name, "and": "all that follow"}])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def keep_choices(rows, path=choices.FILE):
    """Write the constants that were faster here beside those of other architectures."""
    found = choices.parse(path.read_text()) | {choices.architecture(): gpu_sweeps.faster(rows)}
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def main(arguments=None):
    """Run what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file to write, e.g. benchmarks/results/h100.json")
    parser.add_argument("--only", nargs="+", choices=SECONDS, help="parts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; what a CPU can do")
    parser.add_argument("--keep", action="store_true", help="write csrc_triton/choices.json")
    parser.add_argument("--sizes", nargs="+", choices=cases.SIZES, help="of kernels timed")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="with --sizes")
    parser.add_argument("--dtypes", nargs="+", choices=gpu_timing.DTYPES, default=["float16"])
    parser.add_argument("--ops", nargs="+", choices=(*cases.OPS, *cases.STAGES), help="timed")
    parser.add_argument("--commit", help="of a copy of the tree without its history")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu needs --quick")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check needs a CUDA device and found none: nothing was checked or timed")
        return 2
    about = machine(options.commit)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []

    def keep(new):
        rows.extend(row | about for row in new)
        if options.out:
            records.write(options.out, rows)

    parts = parts_on(options.device, options.quick, options)
    run_parts({x: parts[x] for x in options.only or parts}, keep, SECONDS)
    if options.keep:
        keep_choices(rows)
    return verdict(rows)


def verdict(rows):
    """Print what failed and was cut; the exit code."""
    done = [row for row in rows if row["kind"] == "check"]
    wrong = [row["check"] for row in done if not row["ok"]]
    print(f"{len(done) - len(wrong)} of {len(done)} checks held")
    timed = [row for row in rows if row["kind"] in ("kernel", "sweep", "rule", "baseline")]
    wrong += [f"{x['op']} {x['size']} {x.get('backend', '')}" for x in timed if "failed" in x]
    print("".join(f"FAIL {name}\n" for name in wrong), end="")
    print("".join(f"CUT {row['part']}\n" for row in rows if row["kind"] == "cut"), end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
