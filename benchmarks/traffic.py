"""Bytes each launcher moves over the least: every input read once, every output written once.

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
        return pointers.data[np.broadcast_to(mask.data, pointers.data.shape)], size

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


@dataclass(frozen=True)
class Shape:
    """Sizes of one model, one image: maps of the label grid, latent, and the levels there are."""

    name: str
    side: int  # of the label grid
    heads: int
    d: int
    factors: tuple[int, ...]
    t: int = 77
    c: int = 4
    factor: int = 4  # latent pixels per patch

    @property
    def n(self) -> int:
        return self.side**2


SHAPES = (Shape("SD 1.5", 16, 8, 160, (1, 2)), Shape("SDXL", 32, 20, 64, (1,)))


# The most a stage may move, over the least. Single-pass stages: 1.3, for the halo of their tiles
# and the partial sums that every program adds up. The others read what stays in the L2 cache again
# and again, since tiles small enough to fill a GPU share it: every 16 rows of a map all the keys,
# every 16 columns (SD 1.5, one launch for all powers) all of S, every 16 rows (SDXL) all columns.
BOUNDS = {
    "segment": {"SD 1.5": 1.3, "SDXL": 1.3},
    "region_sums": {"SD 1.5": 1.3, "SDXL": 1.3},
    "guide": {"SD 1.5": 1.3, "SDXL": 1.3},
    "attention_maps": {"SD 1.5": 6.2, "SDXL": 15.2},
    "complete": {"SD 1.5": 13.6, "SDXL": 20.2},
}


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(x.nbytes for x in tensors)


def _count_maps(shape: Shape) -> tuple[int, int]:
    q, k, q_cross = torch.randn(3, 1, shape.n, shape.heads * shape.d).half()
    text = torch.randn(1, shape.t, shape.heads * shape.d).half()
    with counting() as traffic:
        maps = csrc_triton.attention_maps(q, k, q_cross, text, shape.heads)
    return traffic.moved, _bytes(q, k, q_cross, text, *maps)


def attention_maps(shape: Shape):
    """Counted with one and two heads and continued in a straight line: all heads are read alike."""
    one, two = (_count_maps(replace(shape, heads=heads)) for heads in (1, 2))
    return *(x + (shape.heads - 1) * (y - x) for x, y in zip(one, two, strict=True)), None


def complete(shape: Shape, steps: int = 4):
    """Also returns how many times S is read."""
    self_map, cross = torch.rand(1, shape.n, shape.n), torch.rand(1, shape.n, shape.t)
    total, weights = torch.rand(1, shape.n, shape.t + 1), torch.full((shape.n,), 1 / shape.n)
    with counting(watch=self_map) as traffic:
        out = csrc_triton.complete(self_map, cross, weights, total, "paper", steps)
    least = _bytes(self_map, cross, weights, total, out)
    return traffic.moved, least, traffic.watched / self_map.nbytes


def segment(shape: Shape):
    levels = [torch.rand(1, (shape.side // f) ** 2, shape.t + 1) for f in shape.factors]
    with counting() as traffic:
        out = csrc_triton.segment(levels, levels, shape.side, shape.side, list(shape.factors))
    read = sum(level.shape[1] * (shape.t + 2) * 4 for level in levels)  # t tokens, START and rest
    return traffic.moved, read + _bytes(*out), None


def _predictions(shape: Shape):
    size = shape.side * shape.factor
    eps = torch.randn(2, 1, shape.c, size, size).half()
    labels = torch.randint(0, shape.t, (1, shape.side, shape.side))
    return eps[0], eps[1], labels


def region_sums(shape: Shape):
    eps_uncond, eps_text, labels = _predictions(shape)
    args = (eps_uncond, eps_text, labels, labels > 20)
    with counting() as traffic:
        sums = csrc_triton.region_sums(*args, shape.t, shape.factor)
    return traffic.moved, _bytes(*args, sums), None


def guide(shape: Shape):
    eps_uncond, eps_text, labels = _predictions(shape)
    sums = csrc_triton.region_sums(eps_uncond, eps_text, labels, labels > 20, shape.t, shape.factor)
    args = (eps_uncond, eps_text, labels, sums, torch.full((1,), 7.5))
    with counting() as traffic:
        out = csrc_triton.guide(*args, shape.factor)
    return traffic.moved, _bytes(*args, *out), None


STAGES = (attention_maps, complete, segment, region_sums, guide)


def main() -> None:
    print("model   stage            moved MiB  least MiB  ratio  bound  reads of S")
    for shape in SHAPES:
        for stage in STAGES:
            moved, least, reads = stage(shape)
            bound = BOUNDS[stage.__name__][shape.name]
            print(f"{shape.name:7} {stage.__name__:15} {moved / 2**20:10.3f} {least / 2**20:10.3f} "
                  f"{moved / least:6.2f} {bound:6.1f} {'' if reads is None else f'{reads:11.1f}'}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
