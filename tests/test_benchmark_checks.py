"""What is checked on a GPU before anything is timed there, run in the interpreter."""

import json
import math
import time

import pytest
import torch
from conftest import DEVICE

import csrc_triton
from benchmarks import cases, checks, gpu_check, gpu_sweeps
from csrc_triton import choices

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
    sizes = cases.SIZES | gpu_check.ODD
    names = [name for name, _ in gpu_check.planned("cuda", sizes, checks.FULL, gpu_check.DTYPES)]
    assert len(names) == len(set(names)) == 3 * 6 * 10 + 3 + 12 + 4
    assert "complete sdxl-1024 bfloat16" in names and "golden sd15_b1 float16" in names


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs it in full")
@pytest.mark.slow
def test_the_whole_run_holds_in_the_interpreter(tmp_path):
    path = tmp_path / "run.json"
    assert gpu_check.main(["--device", "cpu", "--quick", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())
    kinds = {row["kind"] for row in rows} - {"cut"}
    assert kinds == {"check", "ceilings", "kernel", "baseline", "host", "sweep", "rule", "step"}
    assert not [row for row in rows if "failed" in row]
    assert all(row["first_seconds"] > 0 for row in rows if row["kind"] == "host")


def test_what_there_is_no_time_for_is_said():
    def slow():
        for number in range(3):
            time.sleep(0.2)
            yield [{"kind": "x", "number": number}]

    kept, seconds = [], {"first": 0.1, "second": 3.0, "third": 0.1}
    gpu_check.run_parts({"first": slow(), "second": slow()}, kept.extend, seconds)
    assert [row["kind"] for row in kept] == ["x", "cut", "x", "x", "x"]
    kept.clear()
    gpu_check.run_parts({"third": slow(), "first": slow()}, kept.extend, {"third": 0.05} | seconds)
    assert kept[-1]["kind"] == "cut" and len(kept) <= 3


def test_rules_that_another_constant_makes_faster_are_kept(tmp_path, monkeypatch):
    own = gpu_sweeps.reasoned()
    assert own.keys() == choices.CANDIDATES.keys()
    assert all(value in choices.CANDIDATES[name] for name, value in own.items())
    rows = [
        {"rule": "TILES", "value": value, "size": size, "p50_us": us}
        for size, times in {"a": (5.0, 10.0, 11.0), "b": (9.0, 10.0, 8.0)}.items()
        for value, us in zip((32, 64, 128), times, strict=True)
    ]
    rows += [
        {"rule": "ROOM", "value": value, "size": "a", "p50_us": us}
        for value, us in ((4096, 0.98), (8192, 1.0))  # within the noise
    ]
    assert gpu_sweeps.faster(rows) == {"TILES": 32}
    path = tmp_path / "choices.json"
    path.write_text('{"sm_80": {"ROOM": 4096}}')
    monkeypatch.setattr(choices, "architecture", lambda: "sm_90")
    gpu_check.keep_choices(rows, path)
    assert choices.parse(path.read_text()) == {"sm_80": {"ROOM": 4096}, "sm_90": {"TILES": 32}}


@pytest.mark.parametrize(
    "text", ["[]", '{"sm_90": 3}', '{"sm_90": {"ROOMS": 1}}', '{"sm_90": {"TILES": 33}}',
             '{"sm_90": {"LAYERS": true}}'],
)  # fmt: skip
def test_choices_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="choices.json must"):
        choices.parse(text)


@pytest.mark.skipif(DEVICE == "cuda", reason="says what happens without a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
