"""What is checked on a GPU before anything is timed there, run in the interpreter."""

import math

import pytest
import torch
from conftest import DEVICE

import csrc_triton
from benchmarks import cases, checks, gpu_check

SIZE = cases.ModelSize((4, 18, 26), ((4, 2, 2, 8), (8, 1, 2, 8)), tokens=5)


def test_bits_are_compared_in_every_container():
    x = torch.tensor([1.0, math.nan])
    assert checks.same_bits({"a": [x]}, {"a": [x.clone()]})
    assert not checks.same_bits({"a": [x]}, {"a": [x.nextafter(torch.tensor(2.0))]})
    with pytest.raises(TypeError, match="nothing to compare"):
        checks.same_bits({}, {})


@pytest.mark.parametrize("op", ["propagate", "segment", "guide"])
def test_kernel_checks_hold_in_the_interpreter(op):
    found = checks.kernel(DEVICE, op, SIZE, 2, torch.float16, seed=3)
    assert found["error"] <= found["bound"]


def test_end_to_end_check_holds_in_the_interpreter():
    found = checks.end_to_end(DEVICE, torch.float32, checks.SMALL)
    assert found["patches_differ"] == 0 and found["eps_error"] < 1e-6


def test_golden_check_holds_in_the_interpreter():
    found = checks.golden(DEVICE, checks.GOLDEN / "single_res.npz", torch.float32)
    assert found["paper_patches"] == 0


def test_graphs_and_streams_are_checked():
    for check in (checks.graph_of_guidance, checks.two_streams):
        assert check(DEVICE, torch.float16, SIZE)


def test_a_failing_check_is_recorded_and_the_next_one_runs(monkeypatch, capsys):
    guide = csrc_triton.guide

    def wrong(*args, **kwargs):
        eps, rate = guide(*args, **kwargs)
        return eps * 1.001, rate

    monkeypatch.setattr(csrc_triton, "guide", wrong)
    found = gpu_check.planned(DEVICE, {"tiny": SIZE}, checks.SMALL, [torch.float32])
    chosen = [pair for pair in found if pair[0].startswith(("region_sums", "guide tiny"))]
    chosen.insert(0, ("broken", lambda: {}["missing"]))
    rows = [row for (row,) in gpu_check.run_checks(chosen)]
    assert [row["ok"] for row in rows] == [False, True, False]
    assert "KeyError" in rows[0]["failed"] and "allowed" in rows[2]["failed"]
    assert capsys.readouterr().out.count("FAIL") == 2


def test_every_op_graph_stream_and_golden_file_is_planned():
    names = [
        name for name, _ in gpu_check.planned("cuda", cases.SIZES, checks.FULL, gpu_check.DTYPES)
    ]
    assert len(names) == len(set(names)) == 3 * 4 * 9 + 3 + 12 + 4
    assert "complete sdxl-1024 bfloat16" in names and "golden sd15_b1 float16" in names


@pytest.mark.skipif(DEVICE == "cuda", reason="says what happens without a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
