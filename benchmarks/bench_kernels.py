"""Time of every op on every backend, at the usual sizes of the published models.

    pytest benchmarks [--compiled] [-k "complete and sdxl"]

Each result is checked against the definition in float64 before it is timed. On a CPU: torch in
float32, and with --compiled torch.compile of it. On a GPU: Triton, torch and torch.compile in
float16; pytest-benchmark then shows one call as the host sees it, and ``extra_info`` of
--benchmark-json the time on the device, its floors and its share of the copy bandwidth (see
`benchmarks.gpu_timing`, which prints the same without pytest).
"""

import functools

import pytest
import torch

from benchmarks import accuracy, cases, gpu_timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
ceilings = functools.cache(gpu_timing.ceilings)


def pytest_generate_tests(metafunc):
    compiled = DEVICE == "cuda" or metafunc.config.getoption("--compiled")
    points = []
    for op in (*cases.OPS, *cases.STAGES):
        for shape in cases.SHAPES:
            if DEVICE == "cpu" and op == "guide_maps" and shape.startswith("sd"):
                continue  # cubes of matrices in the released algorithm: seconds a run
            for backend in cases.backends(op, DEVICE, compiled):
                points.append(pytest.param(op, shape, backend, id=f"{op}-{shape}-{backend}"))
    metafunc.parametrize(("op", "shape", "backend"), points)


@pytest.mark.benchmark(max_time=0.4, min_rounds=5, warmup=False)
@torch.no_grad()
def test_op(benchmark, op, shape, backend):
    benchmark.group = op
    args = cases.arguments(op, cases.SHAPES[shape], 1, DTYPE, DEVICE)
    run = cases.call(op, backend)
    error, bound = accuracy.check(op, args, run(*args))
    assert error <= bound
    if DEVICE == "cpu":
        benchmark(run, *args)
        return
    benchmark.extra_info |= gpu_timing.measure(op, shape, 1, backend, DTYPE, ceilings())
    run = cases.call(op, backend)
    run(*args)

    def call():
        run(*args)
        torch.cuda.synchronize()

    benchmark(call)
