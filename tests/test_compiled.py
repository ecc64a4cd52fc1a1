"""Kernels compile, fit what a target has, spill nothing, and are few: no GPU needed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from benchmarks import compiled
from scfg import backends

ROOT = Path(__file__).parents[1]
KERNELS = {
    name
    for path in (ROOT / "csrc_triton").glob("*.py")
    for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
}
FEW = ("sm_80", "sm_90", "gfx942")
MAY_SPILL = {  # bytes, at most, of single launches of Triton 3.7.1; not measured what they cost
    "sm_100": {"_attention_maps_kernel": 8, "_joint_maps_kernel": 88},
    "sm_120": {"_attention_map_kernel": 16, "_attention_maps_kernel": 36},
    "gfx942": {"_guide_evidence_kernel": 84},
    "gfx1100": {
        "_attention_maps_kernel": 440,
        "_segment_kernel": 256,
        "_guide_evidence_kernel": 688,
    },
}
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
    MAY_SPILL["sm_80"] = {"_region_sums_kernel": 88}
TARGETS = tuple(compiled.TARGETS)


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


def compile_for(targets, *options):
    words = [word for name in targets for word in ("--target", name)]
    return read(start("-m", "benchmarks.compiled", "--json", *options, *words))


@pytest.fixture(scope="module")
def reports():
    """One float16 launch of each kernel for a few targets; ``-m slow`` compiles all for all."""
    return compile_for(FEW, "--one-each", "--skip", "bfloat16", "float32")


def missing(target):
    """Kernels that a target's compiler breaks on."""
    return {f"_{name}_kernel" for name in compiled.BROKEN.get(target, ())}


def check(reports, targets):
    for target in targets:
        found = {report["kernel"] for report in reports if report["target"] == target}
        assert found == KERNELS - missing(target) and len(KERNELS) >= 10
    assert [x for x in reports if x["shared"] > compiled.LIMITS[x["target"]]] == []
    assert [x for x in reports if x["spilled"] > may_spill(x)] == []


def may_spill(report):
    return MAY_SPILL.get(report["target"], {}).get(report["kernel"], 0)


def test_every_kernel_compiles_fits_its_target_and_spills_nothing(reports):
    check(reports, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_of_every_target(target):
    check(compile_for([target], "--skip", "bfloat16", "float32"), [target])


def test_another_size_or_prompt_length_compiles_at_most_two_kernels():
    """After SD 1.5's and SDXL's: the maps of each of two levels, where its keys need another block.

    Sizes up to SDXL's 1024 patches; the first one beyond takes other kernels, three for the end.
    """
    steps = read(start("-m", "benchmarks.compiled", "--count"))
    assert len(steps) == 12 and len(steps[0][-1]) > 3
    later = [names for *_, names in steps[2:]]
    assert max(map(len, later)) <= 2 and sum(map(len, later)) <= 4
    assert {name for names in later for name in names} == {"_attention_maps_kernel"}


def test_gpus_before_sm_80_run_torch_and_refuse_triton(monkeypatch):
    backends.supported.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu, columns = torch.device("cuda", 7), torch.rand(1, 6, 3)
    arguments = dict(self_map=None, columns=columns, propagation="none", powers=1)
    assert not backends.supported(gpu)
    assert torch.equal(backends.run_unchecked("propagate", "auto", gpu, arguments), columns)
    with pytest.raises(RuntimeError, match=r"from sm_80 on .* \(7, 5\)"):
        backends.run_unchecked("propagate", "triton", gpu, arguments)
    backends.supported.cache_clear()


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
