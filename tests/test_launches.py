"""How many kernels a guidance step launches at the sizes of Stable Diffusion 1.5."""

import contextlib

import pytest
import torch
from conftest import DEVICE
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import scfg
from scfg import ops
from scfg.evidence import Evidence, fold, level_weights
from scfg.guidance import find_regions, guide_regions

SIZE = (64, 64)
PAPER = scfg.SCFGConfig()
WIDTH, TOKENS = 160, 77  # of a head; as many launches for any number of heads


@contextlib.contextmanager
def counting_launches():
    """The names of all kernels launched inside."""
    names = []
    with pytest.MonkeyPatch.context() as patch:
        for kind in (InterpretedFunction, JITFunction):

            def run(kernel, *args, launch=kind.run, **kwargs):
                names.append(kernel.__name__)
                return launch(kernel, *args, **kwargs)

            patch.setattr(kind, "run", run)
        yield names


@pytest.mark.parametrize("reduction", [4, 8])
def test_a_captured_layer_takes_two(reduction):
    evidence = Evidence(SIZE)
    weights = level_weights(SIZE, PAPER)[reduction].to(DEVICE)
    pixels = torch.randn(2, (64 // reduction) ** 2, WIDTH, device=DEVICE)
    text = torch.randn(2, TOKENS, WIDTH, device=DEVICE)
    with counting_launches() as launched:
        both = ops.attention_maps(pixels, pixels, pixels, text, 1, backend="triton")
        fold(evidence, reduction, *both, weights, PAPER, "triton")
    assert launched == ["_attention_maps_kernel", "_complete_kernel"]


def test_three_follow_the_last_layer():
    g = torch.Generator().manual_seed(0)
    levels = {4: [torch.rand(2, 256, 78, generator=g)], 8: [torch.rand(2, 64, 78, generator=g)]}
    evidence = Evidence(SIZE, {r: [x.to(DEVICE) for x in level] for r, level in levels.items()})
    eps = torch.randn(2, 1, 4, *SIZE, generator=g).to(DEVICE).unbind(0)
    with counting_launches() as launched:
        uncond, text = evidence.rows(0, 1), evidence.rows(1, 2)
        regions = find_regions(uncond=uncond, text=text, config=PAPER, backend="triton")
        guide_regions(*eps, regions, 7.5, PAPER, "triton")
    assert launched == ["_segment_kernel", "_region_sums_kernel", "_guide_kernel"]
