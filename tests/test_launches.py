"""How many kernels a guidance step launches, torch's own too, as a GPU would see them."""

import contextlib
import functools

import pytest
import torch
from conftest import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

import scfg
from benchmarks import bench_host, cases
from scfg import backends, ops
from scfg.evidence import Evidence, fold, level_weights
from scfg.recording import folding
from scfg.recording.recorder import AttentionRecorder

SIZE = (64, 64)
PAPER = scfg.SCFGConfig()
WIDTH, TOKENS = 160, 77  # of a head; as many launches for any number of heads


@contextlib.contextmanager
def counting_launches():
    """The names of all kernels launched inside, where none of them runs."""
    names = []
    with pytest.MonkeyPatch.context() as patch:
        for kind, method in ((GridExecutor, "__call__"), (JITFunction, "run")):

            def run(kernel, *args, **kwargs):
                names.append(kernel.fn.__name__)

            patch.setattr(kind, method, run)
        yield names


@pytest.mark.parametrize("reduction", [4, 8])
def test_a_captured_layer_takes_two(reduction):
    layers = Evidence(SIZE)
    weights = level_weights(SIZE, PAPER)[reduction].to(DEVICE)
    pixels = torch.randn(2, (64 // reduction) ** 2, WIDTH, device=DEVICE)
    text = torch.randn(2, TOKENS, WIDTH, device=DEVICE)
    with counting_launches() as launched:
        both = ops.attention_maps(pixels, pixels, pixels, text, 1, backend="triton")
        complete = functools.partial(ops.complete, backend="triton")
        fold(layers, reduction, *both, weights, PAPER, complete)
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


class Computed(TorchDispatchMode):
    """Operations of torch that launch something: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function.__name__:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class WithoutAutocast:
    """The module torch, but that autocast, which does not know the device "meta", is off."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def autocast(self, *_, **__):
        return contextlib.nullcontext()

    def is_autocast_enabled(self, *_):
        return False


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "most", "own"),
    [
        ("sd15", 5, {"_attention_maps_kernel": 2, "_complete_kernel": 2}),
        (
            "sdxl",
            100,
            {"_attention_maps_kernel": 15, "_propagate_kernel": 60, "_renormalise_kernel": 15},
        ),
    ],
)
def test_a_step_of_the_published_models_at_512_and_1024(model, most, own, monkeypatch):
    monkeypatch.setitem(folding.GROUP_BUDGET, "meta", folding.GROUP_BUDGET["cuda"])
    monkeypatch.setattr(backends, "interpreting", lambda: True)
    monkeypatch.setattr(backends, "torch", WithoutAutocast())
    config = scfg.SCFGConfig()
    with torch.device("meta"):  # no check looks at values there, as on a GPU
        net = bench_host.Net(model)
        eps = net.sample.chunk(2)
        recorder = AttentionRecorder(net, config, "triton")
        for _ in range(2):  # a step like any other: what is found out once is known
            with counting_launches() as launched, Computed() as computed:
                recorder.start(net.sample)
                net()
                both = recorder.finish()
                scfg.guidance.guide_evidence(
                    *eps,
                    uncond=both.rows(0, 1),
                    text=both.rows(1, 2),
                    guidance_scale=7.5,
                    config=config,
                    backend="triton",
                )
    assert computed.names == []
    assert {name: launched.count(name) for name in launched} == {**own, "_guide_evidence_kernel": 1}
    assert len(launched) + len(computed.names) <= most
