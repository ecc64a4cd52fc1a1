"""The kernels, in their order, reproduce what the authors' code gave."""

import pytest
import torch
from conftest import DEVICE, GOLDEN, Golden, assert_close

import scfg


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files_are_reproduced(path):
    reproduce(path, torch.float32, "paper", 5e-6)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(x, marks=[pytest.mark.slow] * (DEVICE == "cpu" and x.stat().st_size > 600_000))
        for x in GOLDEN
    ],
    ids=lambda path: path.stem,
)
def test_golden_files_are_reproduced_in_float16(path):
    reproduce(path, torch.float16, "official", 1e-3)  # its rounding


def reproduce(path, dtype, propagation, share):
    golden = Golden(path, dtype)
    config = scfg.SCFGConfig(map_reduction=golden.reduction, propagation=propagation)
    maps = [[x.to(DEVICE) for x in maps] for maps in (golden.self_maps, golden.cross_maps)]
    eps = golden.eps_uncond.to(DEVICE), golden.eps_text.to(DEVICE)
    out = scfg.semantic_cfg(*eps, *maps, golden.guidance_scale, config, backend="triton")
    expected = {k: golden.expected[f"{propagation}_{k}"] for k in ("label", "foreground", "eps")}
    assert torch.equal(out.labels.cpu(), expected["label"].long())
    assert torch.equal(out.foreground.cpu(), expected["foreground"].bool())
    assert_close(actual=out.eps, expected=expected["eps"], share=share, what="eps")
