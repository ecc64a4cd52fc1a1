"""The benchmark of a step: methods that are the same, beside plain CFG, in the memory there is."""

import pytest
import torch
from conftest import Golden, assert_close

from benchmarks import bench_step, checks, machine, methods, released
from scfg.models.unet import UNet


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


def test_a_step_is_timed_beside_plain_cfg(tiny):
    rows = {row["method"]: row for row in step_rows()}
    assert list(rows) == ["cfg", "scfg torch", "released"]
    assert rows["cfg"]["ratio"] == rows["cfg"]["ratio_fastest"] == 1
    assert rows["cfg"]["extra_mib"] == 0 and rows["released"]["ratio_fastest"] > 0
    assert all(row["ratio_least"] <= row["ratio"] <= row["ratio_most"] for row in rows.values())
    assert rows["released"]["distance"] < 1e-3
    bench_step.show(list(rows.values()))


def test_what_does_not_fit_is_a_row_that_says_so(tiny, monkeypatch, capsys):
    monkeypatch.setattr(released, "evidence", lambda *args: torch.ones(2**28))
    with machine.memory_limit(2**28):
        rows = {row["method"]: row for row in step_rows()}
    assert "allocate" in rows["released"]["failed"] and "seconds" in rows["scfg torch"]
    assert torch.ones(2**28).numel() == 2**28  # the limit has gone
    monkeypatch.setattr(bench_step, "build", lambda *args: torch.ones(2**60))
    rows = step_rows()
    assert all("allocate" in row["failed"] for row in rows)
    bench_step.show(rows)
    assert capsys.readouterr().out.count("can't allocate") == 3


def test_a_method_that_breaks_or_computes_something_else_is_found(tiny, monkeypatch):
    monkeypatch.setattr(released, "evidence", lambda *args: torch.ones(3, 3)[5])
    rows = {row["method"]: row for row in step_rows()}
    assert rows["released"]["failed"].startswith("IndexError") and "ratio" in rows["scfg torch"]
    monkeypatch.setattr(released, "combine", lambda uncond, *args: uncond)
    rows = {row["method"]: row for row in step_rows()}
    assert "not the same method" in rows["released"]["failed"] and "ratio" in rows["scfg torch"]


def test_the_last_layers_of_sdxl_are_a_method_of_their_own():
    names = [name for _, name in methods.methods("sdxl", "cuda", ("graphed",))]
    assert "scfg triton, last 12" in names and "scfg torch, last 12" in names
    modes = methods.methods("sd15", "cpu", ("eager", "compiled"))
    assert ("compiled", "released") not in modes and ("eager", "released") in modes


def test_peak_memory_is_that_of_the_block():
    with machine.peak_mib("cpu") as peak:
        torch.ones(2**24)  # 64 MiB, written and freed
    assert 60 < peak() < 80
