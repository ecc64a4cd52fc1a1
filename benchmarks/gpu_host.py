"""What a reader would try instead, what a first call takes, and what a call costs the host.

Instead: the layer's own fused attention, which an S-CFG step runs anyway, and a product of torch
for each power. A first call compiles, into a cache that is empty; later ones of a process find it.
"""

import contextlib
import tempfile
import time
from importlib import import_module

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import accuracy, cases, gpu_timing
from benchmarks.clock import copies

OPS = ("attention_maps", "complete", "guide_evidence")
FILES = ("attention", "evidence", "guidance", "joint", "onepass", "regions")
CALLS = 200


def fused(q_self, k_self, q_cross, k_cross, heads):
    """Both attentions of the layer, values being the keys."""

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    pairs = (q_self, k_self), (q_cross, k_cross)
    return [scaled_dot_product_attention(split(q), split(k), split(k)) for q, k in pairs]


def by_product(self_map, cross_map, weights, total, propagation, powers):
    """`complete` as a `baddbmm` a power, of the paper's sum: SC + S(SC + ...)."""
    first = columns = torch.bmm(self_map, cross_map)
    for _ in range(powers - 1):
        columns = torch.baddbmm(first, self_map, columns)
    columns = torch.cat([columns, columns[..., 1:].sum(-1, keepdim=True)], dim=-1) / powers
    mean = torch.einsum("n,bnt->bt", weights, columns)[:, None]
    return total + torch.where(mean > 0, columns / mean.clamp_min(1e-30), columns)


@torch.no_grad()
def baselines(sizes, device):
    """A row for each size and way."""
    for name, size in sizes.items():
        for op, run, what in (
            ("attention_maps", fused, "sdpa"),
            ("complete", by_product, "baddbmm"),
        ):
            args = cases.arguments(op, size, 1, torch.float16, device)
            row = {"kind": "baseline", "op": op, "size": name, "batch": 1, "backend": what}
            if op == "complete":
                error, bound = accuracy.check(op, args, run(*args))
                if not error <= max(bound, 1e-5):
                    yield [row | {"failed": f"error {error:.2e} is above its bound {bound:.2e}"}]
                    continue
            sets, _ = copies(args, device, 2**27)
            cold, warm = (gpu_timing.timed(run, x, device)[1] for x in (sets, [args]))
            row |= {"p50_us": round(cold * 1e6, 2), "warm_us": round(warm * 1e6, 2)}
            print(op, name, what, row["p50_us"], flush=True)
            yield [row]


@contextlib.contextmanager
def nothing_compiled():
    """Inside, no kernel is compiled yet, in memory or on disk."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        for name in FILES:
            for value in vars(import_module(f"csrc_triton.{name}")).values():
                if hasattr(value, "device_caches"):
                    value.device_caches.clear()
        yield


@torch.no_grad()
def host(sizes, device):
    """A row for each size and operation: seconds of the first call, microseconds of later ones."""

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    for name, size in sizes.items():
        for op in OPS:
            args, run = (
                cases.arguments(op, size, 1, torch.float16, device),
                cases.call(op, "triton"),
            )
            row = {"kind": "host", "op": op, "size": name, "batch": 1}
            with nothing_compiled():
                wait()
                begin = time.perf_counter()
                run(*args)
                wait()
                row["first_seconds"] = round(time.perf_counter() - begin, 4)
            calls = CALLS if device == "cuda" else 1
            run(*args)
            wait()
            begin = time.perf_counter()
            for _ in range(calls):
                run(*args)
            row["host_us"] = round((time.perf_counter() - begin) / calls * 1e6, 2)
            wait()
            print(op, name, row["first_seconds"], row["host_us"], flush=True)
            yield [row]
