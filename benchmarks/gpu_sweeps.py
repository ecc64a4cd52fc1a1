"""Kernels on a GPU over n, t, b and heads, and every host rule with each value that it may have.

A rule (one pass or two, one launch or several, layers of a launch) was reasoned; here each value in
`csrc_triton.choices.CANDIDATES` is timed where it matters. Where another is faster over all its
points by more than noise, `faster` names it, for `csrc_triton/choices.json`.
"""

import contextlib
import math
from dataclasses import replace
from importlib import import_module
from unittest import mock

import torch

import csrc_triton
from benchmarks import cases, gpu_timing
from benchmarks.machine import first_line
from csrc_triton import choices

BASE = cases.ModelSize((4, 128, 128), ((4, 1, 20, 64),))
TINY = cases.ModelSize((4, 20, 20), ((4, 1, 2, 16),), tokens=5)
NOISE = 0.03  # a rule stays as it is unless another value saves more
MODULES = [import_module(f"csrc_triton.{name}") for name in ("attention", "evidence", "onepass")]


def of(base, latent=None, tokens=None, heads=None):
    """A size like another but for what is given; latent is its (H, W)."""
    (reduction, layers, own, width), *_ = base.levels
    return replace(
        base,
        latent=(base.latent[0], *(latent or base.latent[1:])),
        levels=((reduction, layers, heads or own, width),),
        tokens=tokens or base.tokens,
    )


def points(quick=False):
    """(name, size, images) of the sweeps, one thing changed at a time."""
    if quick:
        return [("tiny", TINY, 1)]
    sides = ((32, 32), (64, 64), (64, 96), (80, 80), (104, 152), (192, 192))
    found = [(f"latent {h}x{w}", of(BASE, latent=(h, w)), 1) for h, w in sides]
    found += [(f"t {t}", of(BASE, tokens=t), 1) for t in (154, 231)]
    found += [(f"heads {g}", of(BASE, heads=g), 1) for g in (5, 10)]
    return found + [(f"images {b}", BASE, b) for b in (2, 4, 8)]


def sweeps(device, quick=False):
    """A row for each operation that grows, at each point."""
    for name, size, b in points(quick):
        for op in ("attention_maps", "complete", "guide_evidence"):
            yield [_row(op, name, size, b, device) | {"kind": "sweep"}]


def _row(op, name, size, b, device):
    try:
        row = gpu_timing.measure(op, name, b, "triton", torch.float16, None, device, size)
    except Exception as error:  # a point that fails must not cost the others
        row = {"op": op, "size": name, "batch": b, "failed": first_line(error)}
    print(op, name, row.get("p50_us", row.get("failed")), flush=True)
    return row


@contextlib.contextmanager
def trying(name, value):
    """Inside, the constant of a host rule has this value."""

    def chosen(asked, reasoned):
        return value if asked == name else choices.chosen(asked, reasoned)

    with contextlib.ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(mock.patch.object(module, "chosen", chosen))
        yield


def decided(quick=False):
    """{name of a constant: (operation, sizes) that it decides}."""
    if quick:
        return {name: ("complete", [TINY]) for name in choices.CANDIDATES if name != "LAYERS"}
    squares = {side: of(BASE, latent=(side, side)) for side in (64, 96, 128, 192, 256)}
    wide = of(BASE, latent=(64, 96))
    return {
        "TILES": ("attention_maps", [squares[64], squares[128], squares[192]]),
        "ROOM": ("attention_maps", [squares[96], squares[128], squares[192]]),
        "SMALL_N": ("complete", [squares[64], wide, squares[96], squares[128]]),
        "PATCHES": ("guide_evidence", [squares[64], squares[96], squares[128], squares[256]]),
    }


def rules(device, quick=False):
    """A row for each value of each constant, at each point it decides."""
    for name, (op, sizes) in decided(quick).items():
        for size in sizes:
            values = choices.CANDIDATES[name]
            for value in (values[0], values[-1]) if quick else values:
                point = "x".join(map(str, size.latent[1:]))
                with trying(name, value):
                    row = _row(op, point, size, 1, device)
                yield [row | {"kind": "rule", "rule": name, "value": value}]
    for n in (20,) if quick else (256, 1024):
        yield from _layers(n, device)


def _layers(n, device, layers=8):
    """Maps of eight layers, so many a launch; the bits are those of any other number."""
    generator = torch.Generator(device).manual_seed(0)
    heads, width, t, expected = 20, 1280, 77, None
    if device == "cpu":
        heads, width, t = 1, 16, 5

    def made(m):
        return [
            torch.randn(2, m, width, generator=generator, device=device).half()
            for _ in range(layers)
        ]

    pixels, text = made(n), made(t)
    args = pixels, pixels, pixels, text, heads, [None] * layers
    for value in choices.CANDIDATES["LAYERS"]:
        row = {"kind": "rule", "rule": "LAYERS", "value": value, "op": "stacked_maps", "size": n}
        with trying("LAYERS", value):
            maps = csrc_triton.stacked_maps(*args)
            expected = expected or maps
            if not all(torch.equal(x, y) for x, y in zip(maps, expected, strict=True)):
                row["failed"] = "other bits than with one layer a launch"
            else:
                taken = gpu_timing.timed(csrc_triton.stacked_maps, [args], device)
                row["p50_us"] = round(taken[1] * 1e6, 2)
        print("stacked_maps", n, value, row.get("p50_us", row.get("failed")), flush=True)
        yield [row]


def faster(rows):
    """{name: value} of the rules that another value makes faster by more than noise.

    Compared is the geometric mean over the points at which every value gave a time.
    """
    found = {}
    for name in choices.CANDIDATES:
        times = {}
        for row in rows:
            if row.get("rule") == name:
                times.setdefault(row["size"], {})[row["value"]] = row.get("p50_us")
        full = [x for x in times.values() if len(x) > 1 and None not in x.values()]
        if not full:
            continue
        mean = {v: math.fsum(math.log(x[v]) for x in full) / len(full) for v in full[0]}
        best = min(mean, key=mean.get)
        if mean[best] < mean[reasoned()[name]] + math.log(1 - NOISE):
            found[name] = best
    return found


def reasoned():
    """{name: value} of every constant as its module has it."""
    return {
        name: getattr(module, name)
        for name in choices.CANDIDATES
        for module in MODULES
        if hasattr(module, name)
    }
