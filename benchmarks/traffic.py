"""Bytes each launcher moves, over the least that `benchmarks.cases` counts.

Counted in Triton's interpreter, lane by lane: what a kernel asks for, before any cache. A value
that several programs load counts each time, though on a GPU it mostly comes from L2.

``TRITON_INTERPRET=1 python -m benchmarks.traffic`` prints the table, in a minute, without a GPU.
"""

import contextlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from triton import knobs
from triton.runtime.interpreter import InterpreterBuilder

import csrc_triton
from benchmarks import cases


@dataclass
class Traffic:
    """Bytes loaded and stored, and those loaded from the watched tensor alone."""

    loaded: int = 0
    stored: int = 0
    watched: int = 0

    @property
    def moved(self) -> int:
        return self.loaded + self.stored


@contextlib.contextmanager
def counting(watch: torch.Tensor | None = None):
    """Count the bytes of every active lane of every load and store inside; yields a `Traffic`."""
    if not knobs.runtime.interpret:
        raise RuntimeError("counting needs TRITON_INTERPRET=1, set before Python starts")
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def active(pointers, mask):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        return pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)], size

    def counted_load(builder, pointers, mask, *rest):
        addresses, size = active(pointers, mask)
        traffic.loaded += addresses.size * size
        if watch is not None:
            start = watch.data_ptr()
            inside = (addresses >= start) & (addresses < start + watch.nbytes)
            traffic.watched += int(inside.sum()) * size
        return load(builder, pointers, mask, *rest)

    def counted_store(builder, pointers, value, mask, *rest):
        addresses, size = active(pointers, mask)
        traffic.stored += addresses.size * size
        return store(builder, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = counted_load
    InterpreterBuilder.create_masked_store = counted_store
    try:
        yield traffic
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


# The most an operation may move, over the least. In one pass 1.3, for the halo of tiles and the
# partial sums that every program adds up. The others read what stays in the L2 cache again and
# again, since tiles small enough to fill a GPU share it: every 16 rows of a map all the keys, every
# 16 columns (SD 1.5, one launch for all powers) all of S, every 16 rows (SDXL) all columns.
BOUNDS = {
    "sd15-512": {"attention_maps": 6.2, "complete": 5.4},
    "sdxl-1024": {"attention_maps": 15.2, "complete": 5.9},
}
for _bounds in BOUNDS.values():
    _bounds |= dict.fromkeys(("segment", "region_sums", "guide"), 1.3)


def arguments(op: str, size: cases.ModelSize, powers: int = 4) -> list:
    """Of one row of a U-Net call or, after the last layer, of one image."""
    if op == "guide_evidence":
        eps = cases.arguments("region_sums", size, 1, torch.float16)[:2]
        text, front, h, w, factors = cases.arguments("segment", size, 1, torch.float16)
        return [*eps, text, front, h, w, factors, cases.SCALE, size.reduction]
    args = cases.arguments(op, size, 1, torch.float16)
    if op in ("propagate", "complete"):
        args = *args[:-1], powers
    if op == "guide":  # adds up as many partial sums as the kernel before it leaves
        sums = csrc_triton.region_sums(*cases.arguments("region_sums", size, 1, torch.float16))
        args = *args[:3], sums, *args[4:]
    return [x[:1] if isinstance(x, torch.Tensor) and x.dim() == 3 else x for x in args]


def measure(op: str, size: cases.ModelSize, powers: int = 4) -> tuple[int, int, float]:
    """Bytes moved, the least, and how often the first argument is read, of one row."""
    args = arguments(op, size, powers)
    with counting(watch=args[0] if isinstance(args[0], torch.Tensor) else None) as traffic:
        result = getattr(csrc_triton, op)(*args)
    least = cases.least_bytes(op, args, result)
    return traffic.moved, least, traffic.watched / max(1, getattr(args[0], "nbytes", 1))


def by_head(size: cases.ModelSize, op: str = "attention_maps") -> tuple[int, int]:
    """Bytes an operation on queries and keys moves, and the least, continued in a straight line.

    Counted with one and two heads: all heads are read alike.
    """
    (reduction, layers, heads, width), *coarser = size.levels
    found = []
    for few in (1, 2):
        levels = ((reduction, layers, few, width), *coarser)
        found.append(measure(op, replace(size, levels=levels))[:2])
    return tuple(one + (heads - 1) * (two - one) for one, two in zip(*found, strict=True))


def main() -> None:
    print("model     operation        moved MiB  least MiB  ratio  bound  reads of S")
    for name, bounds in BOUNDS.items():
        for op, bound in bounds.items():
            size = cases.SIZES[name]
            moved, least, *reads = by_head(size) if op == "attention_maps" else measure(op, size)
            of_s = f"{reads[0]:11.1f}" if op == "complete" else ""
            print(f"{name:9} {op:15} {moved / 2**20:10.3f} {least / 2**20:10.3f} "
                  f"{moved / least:6.2f} {bound:6.1f} {of_s}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
