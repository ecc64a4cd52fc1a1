"""Benchmarks measure what they say, refuse wrong results, and the README repeats their records."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, Golden, assert_close

import csrc_triton
import scfg
from benchmarks import (
    accuracy,
    bench_step,
    cases,
    checks,
    clock,
    gpu_check,
    gpu_timing,
    machine,
    methods,
    records,
    released,
    table,
)
from scfg.models.unet import SD15, UNet

ROOT = Path(__file__).parents[1]
SHAPE = cases.Shape((4, 18, 26), ((4, 2, 2, 8), (8, 1, 2, 8)), tokens=5)
SQUARE = cases.Shape((4, 32, 32), ((4, 2, 2, 8), (8, 1, 2, 8)), tokens=5)
CEILINGS = dict.fromkeys(("copy", "float16", "bfloat16", "float32", "exponentials"), 1e12)
CPU_ONLY = pytest.mark.skipif(DEVICE == "cuda", reason="says what happens without a GPU")


@pytest.fixture
def tiny(monkeypatch):
    """The step benchmark on a U-Net that takes milliseconds."""
    monkeypatch.setitem(methods.MODELS, "sd15", checks.TINY)
    monkeypatch.setattr(methods, "TOKENS", 7)


def step_rows(**options):
    settings = dict(rounds=2, width=1.0, device="cpu", dtype=torch.float32) | options
    return bench_step.measure("sd15", 256, 1, **settings)


def test_the_released_algorithm_reproduces_the_golden_files(golden_path):
    golden = Golden(golden_path)
    maps = golden.self_maps, golden.cross_maps
    eps = released.combine(
        golden.eps_uncond, golden.eps_text, *maps, golden.guidance_scale, golden.reduction
    )
    assert_close(actual=eps, expected=golden.expected["official_eps"], share=1e-4)


def test_the_released_attention_is_the_fused_one():
    net = UNet(checks.TINY).eval().requires_grad_(False)
    arguments = methods.inputs(checks.TINY, 128, 1, "cpu", torch.float32)
    expected = net(*arguments)
    other = methods.twin(net)
    recorded = released.Released(other)
    recorded.start(16 * 16)
    assert_close(actual=other(*arguments), expected=expected, share=1e-5)
    sizes = [m.shape[-1] for m in recorded.self_maps]
    assert sizes == [64, 16, 4, 16, 16, 64, 64]  # all layers but those of the full resolution
    recorded.combine(*expected.chunk(2), 7.5)
    assert not recorded.self_maps and not recorded.cross_maps  # they would hide in the next step
    assert torch.equal(net(*arguments), expected)  # a twin's hooks are its own


def test_the_released_algorithm_needs_what_the_authors_code_was_seen_to_take():
    at_512, at_1024 = (released.extra_bytes(SD15, side, 1, 4) / 2**20 for side in (64, 128))
    assert at_512 == pytest.approx(1973, rel=0.1)  # MiB, measured on the authors' code
    assert at_1024 > 24 * 1024


@pytest.mark.parametrize("op", (*cases.OPS, *cases.STAGES))
def test_every_op_is_measured_and_right(op):
    for dtype in (torch.float32, torch.float16):
        shape = SQUARE if op == "guide_maps" else SHAPE
        for backend in cases.backends(op, "cpu", compiled=False):
            row = gpu_timing.measure(op, "tiny", 2, backend, dtype, CEILINGS, "cpu", shape)
            assert "failed" not in row and row["error"] <= row["bound"], row
            assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"]
            assert "p50_us" in gpu_timing.HEAD or gpu_timing.line(row)


@pytest.mark.parametrize("shape", cases.SHAPES.values(), ids=cases.SHAPES)
def test_shapes_are_those_of_the_models(shape):
    grids = [shape.grid(level[0]) for level in shape.levels]
    assert grids[0] == tuple(-(-side // shape.reduction) for side in shape.latent[1:])
    layers = sum(level[1] for level in shape.levels)
    assert layers == {16: 7, 64: 6, 96: 6, 128: 60}[shape.latent[1]]


def test_bytes_and_operations_are_counted():
    args = cases.arguments("attention_maps", SHAPE, 2)  # 4 rows, 5 x 7 pixels, 2 heads 8 wide
    result = cases.call("attention_maps", "torch")(*args)
    inputs, outputs = 4 * (3 * 35 + 5) * 16, 4 * 35 * (35 + 5)
    assert cases.least_bytes("attention_maps", args, result) == 4 * (inputs + outputs)
    products, own, exponentials = cases.operations("attention_maps", args)
    assert (products, own, exponentials) == (2 * 4 * 35 * 40 * 16, 0, 4 * 35 * 40 * 2)
    args = cases.arguments("propagate", SHAPE, 2)
    result = cases.call("propagate", "torch")(*args)
    assert cases.least_bytes("propagate", args, result) == 4 * 4 * (4 * 35 * 35 + 2 * 35 * 5)
    assert cases.operations("propagate", args) == (0, 4 * 2 * 4 * 35 * 35 * 5, 0)


def test_a_wrong_result_is_not_timed(monkeypatch):
    args = cases.arguments("guide", SHAPE, 2)
    eps, rate = cases.call("guide", "torch")(*args)
    for spoilt in (eps * 1.001, torch.where(eps == eps.max(), math.nan, eps)):
        error, bound = accuracy.check("guide", args, (spoilt, rate))
        assert error > bound
    args = cases.arguments("segment", SHAPE, 2)
    labels, foreground, flat = cases.call("segment", "torch")(*args)
    for wrong in ((labels.roll(1, 2), foreground, flat), (labels, ~foreground, flat)):
        error, bound = accuracy.check("segment", args, wrong)
        assert error > bound
    monkeypatch.setattr(scfg.ops, "guide", lambda *args, backend: (eps * 1.001, rate))
    row = gpu_timing.measure("guide", "tiny", 2, "torch", torch.float32, CEILINGS, "cpu", SHAPE)
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


def test_a_step_is_timed_beside_plain_cfg(tiny):
    rows = {row["method"]: row for row in step_rows()}
    assert list(rows) == ["cfg", "scfg torch", "released"]
    assert rows["cfg"]["ratio"] == rows["cfg"]["ratio_fastest"] == 1
    assert rows["cfg"]["extra_mib"] == 0 and rows["released"]["ratio_fastest"] > 0
    assert all(row["ratio_least"] <= row["ratio"] <= row["ratio_most"] for row in rows.values())
    assert rows["released"]["distance"] < 1e-3
    bench_step.show(list(rows.values()))


def test_what_does_not_fit_is_a_row_that_says_so(tiny, monkeypatch, capsys):
    need = methods.needed_bytes(checks.TINY, "released", 256, 1, 4)
    monkeypatch.setattr(bench_step, "available_bytes", lambda: need - 1)
    rows = {row["method"]: row for row in step_rows()}
    assert "GiB more" in rows["released"]["failed"] and "seconds" in rows["scfg torch"]
    monkeypatch.setattr(bench_step, "available_bytes", lambda: 1000)
    rows = step_rows()
    assert all("of weights" in row["failed"] for row in rows)
    bench_step.show(rows)
    assert capsys.readouterr().out.count("of weights") == 3


def test_a_method_that_breaks_or_computes_something_else_is_found(tiny, monkeypatch):
    monkeypatch.setattr(released, "evidence", lambda *args: torch.ones(3, 3)[5])
    rows = {row["method"]: row for row in step_rows()}
    assert rows["released"]["failed"].startswith("IndexError") and "ratio" in rows["scfg torch"]
    monkeypatch.setattr(released, "combine", lambda uncond, *args: uncond)
    rows = {row["method"]: row for row in step_rows()}
    assert "not the same method" in rows["released"]["failed"] and "ratio" in rows["scfg torch"]


def test_bits_are_compared_in_every_container():
    x = torch.tensor([1.0, math.nan])
    assert checks.same_bits({"a": [x]}, {"a": [x.clone()]})
    assert not checks.same_bits({"a": [x]}, {"a": [x.nextafter(torch.tensor(2.0))]})
    with pytest.raises(TypeError, match="nothing to compare"):
        checks.same_bits({}, {})


def test_the_last_layers_of_sdxl_are_a_method_of_their_own():
    names = [name for _, name in methods.methods("sdxl", "cuda", ("graphed",))]
    assert "scfg triton, last 12" in names and "scfg torch, last 12" in names
    modes = methods.methods("sd15", "cpu", ("eager", "compiled"))
    assert ("compiled", "released") not in modes and ("eager", "released") in modes


def test_peak_memory_is_that_of_the_block():
    with machine.peak_mib("cpu") as peak:
        torch.ones(2**24)  # 64 MiB, written and freed
    assert 60 < peak() < 80


@pytest.mark.parametrize("op", ["propagate", "segment", "guide"])
def test_kernel_checks_hold_in_the_interpreter(op):
    found = checks.kernel(DEVICE, op, SHAPE, 2, torch.float16, seed=3)
    assert found["error"] <= found["bound"]


def test_end_to_end_check_holds_in_the_interpreter():
    found = checks.end_to_end(DEVICE, torch.float32, checks.SMALL)
    assert found["patches_differ"] == 0 and found["eps_error"] < 1e-6


def test_golden_check_holds_in_the_interpreter():
    found = checks.golden(DEVICE, checks.GOLDEN / "single_res.npz", torch.float32)
    assert found["paper_patches"] == 0


def test_graphs_and_streams_are_checked():
    for check in (checks.graph_of_guidance, checks.two_streams):
        assert check(DEVICE, torch.float16, SHAPE)


def test_a_failing_check_is_recorded_and_the_next_one_runs(monkeypatch, capsys):
    guide = csrc_triton.guide

    def wrong(*args, **kwargs):
        eps, rate = guide(*args, **kwargs)
        return eps * 1.001, rate

    monkeypatch.setattr(csrc_triton, "guide", wrong)
    found = gpu_check.planned(DEVICE, {"tiny": SHAPE}, checks.SMALL, [torch.float32])
    chosen = [pair for pair in found if pair[0].startswith(("region_sums", "guide tiny"))]
    chosen.insert(0, ("broken", lambda: {}["missing"]))
    rows = [row for (row,) in gpu_check.run_checks(chosen)]
    assert [row["ok"] for row in rows] == [False, True, False]
    assert "KeyError" in rows[0]["failed"] and "allowed" in rows[2]["failed"]
    assert capsys.readouterr().out.count("FAIL") == 2


def test_every_op_graph_stream_and_golden_file_is_planned():
    names = [
        name for name, _ in gpu_check.planned("cuda", cases.SHAPES, checks.FULL, gpu_check.DTYPES)
    ]
    assert len(names) == len(set(names)) == 3 * 4 * 9 + 3 + 12 + 4
    assert "complete sdxl-1024 bfloat16" in names and "golden sd15_b1 float16" in names


@CPU_ONLY
def test_gpu_commands_without_a_gpu_say_so(capsys):
    assert gpu_check.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
    command = [sys.executable, "-m", "benchmarks.gpu_timing"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and "needs a CUDA device" in run.stderr


def test_records_keep_every_row_with_its_machine(tmp_path):
    about = machine.machine("abc1234")
    assert {"date", "commit", "device", "torch", "triton"} <= set(about)
    path = tmp_path / "results" / "steps.json"
    records.append(path, [{"kind": "step", "seconds": 1.0}], about)
    records.append(path, [{"kind": "step", "seconds": 2.0}], about)
    rows = records.load(path.parent)
    assert [row["seconds"] for row in rows] == [1.0, 2.0]
    assert all(row["commit"] == "abc1234" for row in rows)
    assert len(path.read_text().splitlines()) == 4 and rows == json.loads(path.read_text())


ABOUT = {"date": "2026-01-02", "commit": "abc", "device": "a CPU", "threads": 2, "torch": "2.9"}
STEP = {"kind": "step", "model": "sd15", "width": 1.0, "pixels": 512, "batch": 1}
STEP |= {"dtype": "float32", "mode": "eager"} | ABOUT


def test_the_table_states_every_point_with_its_machine():
    ratios = {"ratio": 1.0044, "ratio_fastest": 1.0021}
    rows = [
        STEP | {"method": "cfg", "seconds": 12.345, "ratio": 1.0, "extra_mib": 0.0},
        STEP | {"method": "scfg torch", "seconds": 99.0, "ratio": 8.0, "extra_mib": 1.0},
        STEP | {"method": "scfg torch", "seconds": 12.4, "extra_mib": 3.4} | ratios,
        STEP | {"method": "released", "failed": "needs about 34 GiB", "pixels": 1024},
        STEP | {"method": "cfg", "seconds": 0.1, "ratio": 1.0, "width": 0.2},
    ]
    text = table.render(rows)
    assert "a CPU, 2 threads; torch 2.9; 2026-01-02; commit abc" in text
    assert "| scfg torch | 12.4 | 1.004 | 1.002 | +3 |" in text and "99" not in text
    assert "| needs about 34 GiB |  |  |  |" in text and "| 0.1 |" not in text
    assert text.endswith(table.NO_GPU) and table.render([]) == table.NOTHING


def test_the_table_states_gpu_figures():
    gpu = ABOUT | {"device": "a GPU", "cuda": "13", "driver": "580", "triton": "3.6"}
    kernel = {"kind": "kernel", "op": "guide", "shape": "sdxl-1024", "batch": 4} | gpu
    kernel |= {"backend": "triton", "dtype": "float16", "p50_us": 3.21, "gb_s": 2100.0}
    kernel |= {"copy_share": 0.7, "floor_bytes_us": 2.2, "floor_work_us": 0.0}
    text = table.render([kernel, {"kind": "check", "check": "x", "ok": False} | gpu])
    assert "| triton float16 | 3.2 | 2100 | 70% | 2.2 | 0.0 |" in text and "driver 580" in text
    assert "0 of 1 held. Failed: x." in text and table.NO_GPU not in text


def test_the_section_of_the_readme_is_replaced_and_nothing_else():
    text = f"a\n{table.BEGIN}\nold\n{table.END}\nb\n"
    assert table.replaced(text, "new") == f"a\n{table.BEGIN}\nnew\n{table.END}\nb\n"
    with pytest.raises(ValueError, match="once each"):
        table.section("no markers")


def test_the_readme_repeats_the_records():
    text = table.section((ROOT / "README.md").read_text())
    assert text == f"\n{table.render(records.load())}\n", "run python -m benchmarks.table"


@CPU_ONLY
def test_microbenchmarks_are_collected_and_run():
    command = [sys.executable, "-m", "pytest", "benchmarks", "-k", "region_sums and shapes"]
    env = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout
    assert "region_sums-emoji-64-torch" in run.stdout and "1 passed" in run.stdout
