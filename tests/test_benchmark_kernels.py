"""Benchmarks of operations: right before they are timed, bytes and operations counted."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, assert_close

import scfg
from benchmarks import accuracy, cases, clock, gpu_timing

ROOT = Path(__file__).parents[1]
SIZE = cases.ModelSize((4, 18, 26), ((4, 2, 2, 8), (8, 1, 2, 8)), tokens=5)
SQUARE = cases.ModelSize((4, 32, 32), ((4, 2, 2, 8), (8, 1, 2, 8)), tokens=5)
CEILINGS = dict.fromkeys(("copy", "float16", "bfloat16", "float32", "exponentials"), 1e12)


@pytest.mark.parametrize("op", (*cases.OPS, *cases.STAGES))
def test_every_op_is_measured_and_right(op):
    for dtype in (torch.float32, torch.float16):
        shape = SQUARE if op == "guide_maps" else SIZE
        for backend in cases.backends(op, "cpu", compiled=False):
            row = gpu_timing.measure(op, "tiny", 2, backend, dtype, CEILINGS, "cpu", shape)
            assert "failed" not in row and row["error"] <= row["bound"], row
            assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] and row["warm_us"] > 0


@pytest.mark.parametrize("shape", cases.SIZES.values(), ids=cases.SIZES)
def test_shapes_are_those_of_the_models(shape):
    grids = [shape.grid(level[0]) for level in shape.levels]
    assert grids[0] == tuple(-(-side // shape.reduction) for side in shape.latent[1:])
    layers = sum(level[1] for level in shape.levels)
    assert layers == {16: 7, 64: 6, 96: 6, 128: 60}[shape.latent[1]]


def test_bytes_and_operations_are_counted():
    args = cases.arguments("attention_maps", SIZE, 2)  # 4 rows, 5 x 7 pixels, 2 heads 8 wide
    result = cases.call("attention_maps", "torch")(*args)
    inputs, outputs = 4 * (3 * 35 + 5) * 16, 4 * 35 * (35 + 5)
    assert cases.least_bytes("attention_maps", args, result) == 4 * (inputs + outputs)
    products, own, exponentials = cases.operations("attention_maps", args)
    assert (products, own, exponentials) == (2 * 4 * 35 * 40 * 16, 0, 4 * 35 * 40 * 2)
    args = cases.arguments("region_sums", SIZE, 2)  # 18 x 26 pixels, 4 channels
    assert cases.elementwise("region_sums", args) == 2 * 18 * 26 * 4 * 3
    args = cases.arguments("propagate", SIZE, 2)
    result = cases.call("propagate", "torch")(*args)
    assert cases.least_bytes("propagate", args, result) == 4 * 4 * (4 * 35 * 35 + 2 * 35 * 5)
    assert cases.operations("propagate", args) == (0, 4 * 2 * 4 * 35 * 35 * 5, 0)


def test_a_wrong_result_is_not_timed(monkeypatch):
    args = cases.arguments("guide", SIZE, 2)
    eps, rate = cases.call("guide", "torch")(*args)
    for spoilt in (eps * 1.001, torch.where(eps == eps.max(), math.nan, eps)):
        error, bound = accuracy.check("guide", args, (spoilt, rate))
        assert error > bound
    args = cases.arguments("segment", SIZE, 2)
    labels, foreground, flat = cases.call("segment", "torch")(*args)
    for wrong in ((labels.roll(1, 2), foreground, flat), (labels, ~foreground, flat)):
        error, bound = accuracy.check("segment", args, wrong)
        assert error > bound
    monkeypatch.setattr(scfg.ops, "guide", lambda *args, backend: (eps * 1.001, rate))
    row = gpu_timing.measure("guide", "tiny", 2, "torch", torch.float32, CEILINGS, "cpu", SIZE)
    assert "above its bound" in row["failed"] and "p50_us" not in row


def test_ceilings_are_measured():
    found = gpu_timing.ceilings(DEVICE, gigabytes=2**-12, side=64, chains=1024)
    assert set(found) == set(CEILINGS) and all(rate > 0 for rate in found.values())
    assert torch.get_float32_matmul_precision() == "highest"
    run, count = gpu_timing.exponentials(DEVICE, 1024, repeats=3)
    x = torch.arange(1024.0) * 1e-9
    assert_close(actual=run(), expected=(-(-(-x).exp()).exp()).exp(), share=1e-6)
    assert count == 3 * 1024


def test_percentiles_and_copies():
    assert clock.percentiles([float(i) for i in range(11)]) == (2.0, 5.0, 8.0)
    args = (torch.ones(256), [torch.ones(256)], 3)
    sets, total = clock.copies(args, "cuda", 8 * 2048 - 1)
    assert len(sets) == 8 and total == 8 * 2048
    addresses = {x.data_ptr() for one in sets for x in clock.tensors(one)}
    assert len(addresses) == 16 and sets[5][2] == 3


@pytest.mark.skipif(DEVICE == "cuda", reason="times torch on a CPU")
def test_microbenchmarks_are_collected_and_run():
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "region_sums and embedded"]
    env = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    assert "region_sums-embedded-64-torch" in run.stdout and "1 passed" in run.stdout
