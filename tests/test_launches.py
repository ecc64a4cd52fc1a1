"""How many kernels a guidance step launches at the sizes of Stable Diffusion 1.5."""

import contextlib

import pytest
import torch
from conftest import DEVICE
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import scfg
from benchmarks import cases
from scfg import ops
from scfg.evidence import Evidence, fold, level_weights

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


@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("sd15-512", ["_guide_evidence_kernel"]),
        ("sdxl-1024", ["_guide_evidence_kernel"]),
        ("beyond", ["_segment_kernel", "_region_sums_kernel", "_guide_kernel"]),
    ],
)
def test_one_follows_the_last_layer(name, launches):
    wide = cases.ModelSize((4, 4, 4 * 1025), ((4, 1, 1, 8),), tokens=2)
    shape = cases.SIZES.get(name, wide)
    args = cases.arguments("guide_evidence", shape, 1, device=DEVICE)
    with counting_launches() as launched:
        cases.call("guide_evidence", "triton")(*args)
    assert launched == launches
