"""Time of every op on every backend, at the usual sizes of the published models.

    pytest benchmarks [-k "complete and sdxl"]

Each result is checked against the definition in float64 before it is timed. On a CPU: torch in
float32. On a GPU: Triton, torch and torch.compile in float16; pytest-benchmark then shows one call
as the host sees it, and ``extra_info`` of --benchmark-json the time on the device, its floors and
its share of the copy bandwidth (`benchmarks.gpu_check` prints the same without pytest).
"""

import functools

import pytest
import torch

from benchmarks import accuracy, cases, gpu_timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
ceilings = functools.cache(gpu_timing.ceilings)


def pytest_generate_tests(metafunc):
    points = []
    for op in (*cases.OPS, *cases.STAGES):
        for size in cases.SIZES:
            if DEVICE == "cpu" and op == "guide_maps" and size.startswith("sd"):
                continue  # cubes of matrices in the released algorithm: seconds a run
            for backend in cases.backends(op, DEVICE, compiled=DEVICE == "cuda"):
                points.append(pytest.param(op, size, backend, id=f"{op}-{size}-{backend}"))
    metafunc.parametrize(("op", "size", "backend"), points)


@pytest.mark.benchmark(max_time=0.4, min_rounds=5, warmup=False)
@torch.no_grad()
def test_op(benchmark, op, size, backend):
    benchmark.group = op
    args = cases.arguments(op, cases.SIZES[size], 1, DTYPE, DEVICE)
    run = cases.call(op, backend)
    error, bound = accuracy.check(op, args, run(*args))
    assert error <= bound
    if DEVICE == "cpu":
        benchmark(run, *args)
        return
    benchmark.extra_info |= gpu_timing.measure(op, size, 1, backend, DTYPE, ceilings())
    run = cases.call(op, backend)
    run(*args)

    def call():
        run(*args)
        torch.cuda.synchronize()

    benchmark(call)
