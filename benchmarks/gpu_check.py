"""Everything that only a GPU can show, in one command: correct first, then how fast.

    python -m benchmarks.gpu_check [--out FILE] [--only checks|kernels|steps]
    python -m benchmarks.gpu_check --only kernels --sizes sdxl-1024 --batch 4 --ops guide segment

Every kernel and S-CFG end to end in three types against float64, CUDA graphs, torch.compile, two
streams; then the times of operations and steps. Needs torch, triton and this repository. Each check
records what it found and the next one goes on; FILE, one JSON row a check or point, each with GPU,
driver, versions and commit, is rewritten as rows come. Exit code: 0 if all held, 1 if a check or an
operation failed, 2 without a GPU.
"""

import argparse
import itertools
import traceback
from functools import partial

import torch

from benchmarks import bench_step, cases, checks, gpu_timing, records
from benchmarks.machine import first_line, machine

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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


def time_kernels(timed=TIMED, dtypes=("float16",), ops=None):
    """Ceilings, then operations in Triton, torch and, of one image, compiled torch."""
    limits = gpu_timing.ceilings()
    print(", ".join(f"{key} {value / 1e12:.3f} T/s" for key, value in limits.items()))
    yield [{"kind": "ceilings"} | {key: float(f"{v:.4g}") for key, v in limits.items()}]
    print(gpu_timing.HEAD)
    for name, b in timed:
        yield gpu_timing.survey(name, b, dtypes=dtypes, compiled=b == 1, limits=limits, ops=ops)


def time_steps():
    """Steps of `STEPS`."""
    for model, pixels, b, modes in STEPS:
        try:
            rows = bench_step.measure(
                model, pixels, b, rounds=7, width=1.0, device="cuda", dtype=torch.float16,
                modes=modes)  # fmt: skip
        except Exception as error:  # one point that fails must not cost the others
            point = {"kind": "step", "model": model, "pixels": pixels, "batch": b}
            failed = {"mode": modes[0], "method": "all", "failed": first_line(error)}
            rows = [point | failed]
        bench_step.show(rows)
        yield rows
        torch.cuda.empty_cache()


def main(arguments=None):
    """Run what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file to write, e.g. benchmarks/results/h100.json")
    parser.add_argument("--only", choices=("checks", "kernels", "steps"))
    parser.add_argument("--sizes", nargs="+", choices=cases.SIZES, help="of kernels timed")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="with --sizes")
    parser.add_argument("--dtypes", nargs="+", choices=gpu_timing.DTYPES, default=["float16"])
    parser.add_argument("--ops", nargs="+", choices=(*cases.OPS, *cases.STAGES), help="timed")
    parser.add_argument("--commit", help="of a copy of the tree without its history")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check needs a CUDA device and found none: nothing was checked or timed")
        return 2
    about = machine(options.commit)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    found = planned("cuda", cases.SIZES, checks.FULL, DTYPES)
    timed = list(itertools.product(options.sizes, options.batch)) if options.sizes else TIMED
    kernels = time_kernels(timed, dtypes=options.dtypes, ops=options.ops)
    parts = {"checks": run_checks(found), "kernels": kernels, "steps": time_steps()}
    rows = []
    for name, part in parts.items():
        for new in part if options.only in (None, name) else ():
            rows += [row | about for row in new]
            if options.out:
                records.write(options.out, rows)
    done = [row for row in rows if row["kind"] == "check"]
    wrong = [row["check"] for row in done if not row["ok"]]
    print(f"{len(done) - len(wrong)} of {len(done)} checks held")
    kernels = [row for row in rows if row["kind"] == "kernel" and "failed" in row]
    wrong += [f"{row['op']} {row['size']} {row['backend']}" for row in kernels]
    print("".join(f"FAIL {name}\n" for name in wrong), end="")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
