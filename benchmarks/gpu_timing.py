"""Time of every operation on a GPU, beside the least it could take.

One replay of a CUDA graph runs an operation on many copies of its inputs, which together exceed the
L2 cache, each writing a result of its own; its time over their number is one sample. The same on
one set of inputs, which then come from the cache, is its warm time. Beside it stand two floors:
bytes that must move over the bandwidth of a large copy, and operations that must be done over the
rate of a large matrix product, or of exponentials, whichever is longer. All three ceilings are
measured here. A product of float32 inputs is counted as three tf32 products, the cheapest way to
keep float32 accuracy on tensor cores. The command is `benchmarks.gpu_check`.
"""

import itertools

import torch

from benchmarks import accuracy, cases
from benchmarks.clock import capture, copies, percentiles, seconds
from benchmarks.machine import first_line, peak_mib

REPLAYS = 30
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def exponentials(device, chains, repeats=256):
    """A function that evaluates chains * repeats exponentials in registers, and their number."""
    import triton

    from benchmarks.exponentials import exponentials_kernel

    out = torch.empty(chains, device=device)

    def run():
        exponentials_kernel[(triton.cdiv(chains, 1024),)](out, REPEATS=repeats, BLOCK=1024)
        return out

    return run, chains * repeats


def ceilings(device="cuda", gigabytes=1.0, side=8192, chains=2**22):
    """Bytes per second of a copy, operations per second of products, and exponentials per second.

    Medians of ten after two to warm up. Products in float32 are tf32, divided by three.
    """

    def middle(run):
        return percentiles(seconds(run, device, 12)[2:])[1]

    pair = torch.randn(2, int(gigabytes * 2**28), device=device)
    found = {"copy": 4 * pair.numel() / middle(lambda: pair[0].copy_(pair[1]))}
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        for name, dtype in DTYPES.items():
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            taken = middle(lambda a=a, b=b: a @ b)
            found[name] = 2 * side**3 / taken / (3 if name == "float32" else 1)
    finally:
        torch.set_float32_matmul_precision(precision)
    run, count = exponentials(device, chains)
    return found | {"exponentials": count / middle(run)}


def floors(op, args, result, limits):
    """Seconds that moving the bytes and doing the operations takes at least."""
    own = str(args[0].dtype).removeprefix("torch.") if op in cases.OPS and op != "segment" else ""
    products, wide, exponentials = cases.operations(op, args)
    work = products / limits[own] if products else 0.0
    work = max(work + wide / limits["float32"], exponentials / limits["exponentials"])
    return cases.least_bytes(op, args, result) / limits["copy"], work


def timed(run, sets, device):
    """Percentiles of the seconds of one run, all sets of arguments being one sample."""
    same = all(one is sets[0] for one in sets)

    def run_all():
        results = [run(*one) for one in sets[:1]]
        for one in sets[1:]:
            results = [run(*one)] if same else [*results, run(*one)]
        return results  # of different inputs kept apart; of the same in one place

    replay, kept = capture(run_all) if device == "cuda" else (run_all, None)
    taken = [x / len(sets) for x in seconds(replay, device, REPLAYS if device == "cuda" else 1)]
    del kept
    return percentiles(taken)


@torch.no_grad()
def measure(op, name, b, backend, dtype, limits, device="cuda", size=None):
    """One row: correct first, then timed."""
    size = size or cases.SIZES[name]
    args = cases.arguments(op, size, b, dtype, device)
    row = {"kind": "kernel", "op": op, "size": name, "batch": b, "backend": backend}
    row["dtype"] = str(dtype).removeprefix("torch.")
    run = cases.call(op, backend)
    with peak_mib(device) as peak:
        result = run(*args)
    row["peak_mib"] = round(peak(), 1)
    error, bound = accuracy.check(op, args, result)
    row |= {"error": float(f"{error:.2g}"), "bound": float(f"{bound:.2g}")}
    if not error <= bound:
        return row | {"failed": f"error {error:.2e} is above its bound {bound:.2e}"}
    cache = 2**20
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        cache = getattr(properties, "L2_cache_size", 50 * 2**20)
    sets, total = copies(args, device, 2 * cache)
    times = timed(run, sets, device)
    for key, value in zip(("p20_us", "p50_us", "p80_us"), times, strict=True):
        row[key] = round(value * 1e6, 2)
    row["warm_us"] = round(timed(run, [args] * min(8, len(sets)), device)[1] * 1e6, 2)
    row |= {"sets": len(sets), "inputs_mib": round(total / 2**20, 1)}
    if limits is None:
        return row
    if op in cases.OPS:
        moved = cases.least_bytes(op, args, result)
        bytes_floor, work_floor = floors(op, args, result, limits)
        row |= {"bytes": moved, "gb_s": round(moved / times[1] / 1e9, 1)}
        row["copy_share"] = round(bytes_floor / times[1], 3)
        row["floor_bytes_us"] = round(bytes_floor * 1e6, 2)
        row["floor_work_us"] = round(work_floor * 1e6, 2)
    return row


def survey(name, b, *, dtypes, compiled, limits, device="cuda", ops=None, sizes=cases.SIZES):
    """A row for every op, type and backend of a size and batch; what fails says why."""
    size = sizes[name]
    for dtype, op in itertools.product(dtypes, ops or (*cases.OPS, *cases.STAGES)):
        for backend in dict.fromkeys((*cases.backends(op, device, compiled), "triton")):
            try:
                row = measure(op, name, b, backend, DTYPES[dtype], limits, device, size)
            except Exception as error:  # a point that fails must not cost the others
                row = {"kind": "kernel", "op": op, "size": name, "batch": b, "backend": backend}
                row |= {"dtype": dtype, "failed": first_line(error)}
            print(line(row), flush=True)
            yield row
            torch.cuda.empty_cache()


def line(row):
    """One row as a line of a table."""
    start = f"{row['op']:16} {row['size']:10} {row['batch']:3} {row['dtype']:9} {row['backend']:9}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    times = " ".join(f"{row[key]:9.2f}" for key in ("p20_us", "p50_us", "p80_us"))
    rest = ""
    if "gb_s" in row:
        floors = f"{row['floor_bytes_us']:9.2f} {row['floor_work_us']:9.2f}"
        rest = f" {row['gb_s']:8.1f} {row['copy_share']:6.1%} {floors}"
    return f"{start} {times}{rest}"


HEAD = (
    f"{'op':16} {'size':10} {'b':>3} {'dtype':9} {'backend':9} {'p20 us':>9} {'p50 us':>9} "
    f"{'p80 us':>9} {'GB/s':>8} {'share':>6} {'bytes us':>9} {'work us':>9}"
)
