"""Every kernel compiles for every target, and on sm_90 spills nothing: no GPU needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compiled

ROOT = Path(__file__).parents[1]
KERNELS = {
    name
    for path in (ROOT / "csrc_triton").glob("*.py")
    for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
}
COMMAND = ("-m", "benchmarks.compiled", "--json", "--skip", "bfloat16", "float32")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
KIN = ("sm_86", "sm_89")  # the instructions of sm_80, with the memory of sm_120


def start(*command):
    """A process in which kernels are compiled rather than interpreted."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=env, stdout=-1, stderr=-1, text=True
    )


def read(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-2000:]
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def reports():
    """One launch of each kernel for each target."""
    return read(start(*COMMAND, "--one-each", *(f"--target={name}" for name in TARGETS)))


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(reports, target):
    found = {report["kernel"] for report in reports if report["target"] == target}
    assert found == KERNELS and len(KERNELS) >= 10


def test_every_launch_fits_its_target(reports):
    assert [x for x in reports if x["shared"] > compiled.LIMITS[x["target"]]] == []


def test_next_to_nothing_spills_on_sm_90(reports):
    check_spills([report for report in reports if report["target"] == "sm_90"])


@pytest.mark.slow
def test_all_float16_launches_compile_for_sm_90_and_each_kernel_for_its_kin():
    """`benchmarks.compiled` has those of the other types too."""
    kin = start(*COMMAND, "--one-each", *(f"--target={name}" for name in KIN))
    found = read(start(*COMMAND, "--target=sm_90"))
    assert len(found) > 30
    check_spills(found)
    test_every_launch_fits_its_target(found)
    found = read(kin)
    for target in KIN:
        test_every_kernel_compiles(found, target)
    test_every_launch_fits_its_target(found)


def check_spills(found):
    spilled = [report for report in found if report["spilled"]]
    assert {x["kernel"] for x in spilled} <= {"_guide_evidence_kernel", "_attention_maps_kernel"}
    assert all(report["spilled"] <= 8 for report in spilled)  # the embedded model's size


def test_another_size_or_prompt_length_compiles_few_kernels():
    steps = read(start("-m", "benchmarks.compiled", "--count"))
    assert len(steps) == 12 and len(steps[0][-1]) > 3
    later = [len(names) for *_, names in steps[2:]]
    assert max(later) <= 4 and later.count(0) >= 5


def test_a_kernel_that_spills_is_reported(tmp_path):
    (tmp_path / "spilling.py").write_text("""
import json
import torch
import triton
import triton.language as tl
from benchmarks.compiled import TARGETS, compiling

@triton.jit
def _wide_kernel(x_ptr, y_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(y_ptr + tl.arange(0, N), tl.sum(x, 0) * x)

x = torch.empty(16384, device="meta")
with compiling(TARGETS["sm_90"]) as reports:
    _wide_kernel[(1,)](x, x, N=16384, num_warps=1)
print(json.dumps(reports[0]))
""")
    process = start("-c", f"import runpy; runpy.run_path({str(tmp_path / 'spilling.py')!r})")
    assert read(process)[0]["spilled"] > 0
