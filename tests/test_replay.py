"""Replay: hosts that do things differently, and what cannot be recorded."""

import pytest
import torch
from conftest import assert_close
from torch import nn
from torch.nn import functional as F
from transformer_hosts import build, output, randn

import scfg
from scfg import evidence
from scfg.recording import replayed
from scfg.recording.layouts import Layout
from scfg.recording.replay import replay
from scfg.recording.replayed import MissingLayers, TransformerRecorder

CONFIG = scfg.SCFGConfig(min_share=0.0, min_peak=0.0)


def recorded(host, config=CONFIG, model=None, **options):
    """Evidence of a call."""
    model = host.model if model is None else model
    recorder = TransformerRecorder(model, config, **options)
    try:
        recorder.start((), host.call)
        with torch.no_grad():
            model(**host.call, return_dict=False)
        return recorder.finish()
    finally:
        recorder.remove()


@pytest.mark.parametrize("name", ["flux", "qwen", "pixart", "wan", "z_image"])
def test_fused_projections_and_other_backends_say_the_same(name):
    host = build(name)
    expected = recorded(host).total(1)
    if name != "pixart":  # goes to the softmax itself
        for module in host.model.modules():
            if hasattr(getattr(module, "processor", None), "_attention_backend"):
                module.processor._attention_backend = "_native_math"
        assert_close(actual=recorded(host).total(1), expected=expected, share=2e-5)
        kept = {
            m.processor._attention_backend for m in host.model.modules() if hasattr(m, "processor")
        }
        assert kept == {"_native_math"}
    if hasattr(host.model, "fuse_qkv_projections"):
        host.model.fuse_qkv_projections()
        assert_close(actual=recorded(host).total(1), expected=expected, share=2e-5)


@pytest.mark.parametrize("how", ["whole", "blocks"])
def test_compiled_networks_say_the_same_and_toggle(how):
    torch._dynamo.reset()
    host = build("flux", num_layers=2)
    expected, plain = recorded(host).total(1), output(host)
    model = host.model
    if how == "whole":
        model = torch.compile(model, backend="eager", fullgraph=True)
    recorder = TransformerRecorder(model, CONFIG)
    if how == "blocks":
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    for on in (False, True, False, True):
        if on:
            recorder.start((), host.call)
        with torch.no_grad():
            assert model(**host.call, return_dict=False)[0].equal(plain)
        if on:
            assert_close(actual=recorder.finish().total(1), expected=expected, share=1e-5)
    recorder.remove()
    torch._dynamo.reset()


def test_maps_too_large_to_form_are_applied(monkeypatch):
    for name, joint in (
        ("qwen", "renormalise"),
        ("lumina2", "raw"),
        ("sana", "raw"),
        ("wan", "raw"),
    ):
        host = build(name)
        config = scfg.SCFGConfig(joint=joint)
        expected = recorded(host, config).total(1)
        with monkeypatch.context() as patch:
            patch.setattr(evidence, "MAP_BUDGET", 20_000)
            patch.setattr(replayed, "MAP_BUDGET", 20_000)
            actual = recorded(host, config).total(1)
        assert_close(actual=actual, expected=expected, share=2e-5, what=name)


def test_what_cannot_be_recorded_is_an_error():
    class Silent:  # a kernel of its own
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *rest):
            return hidden_states if encoder_hidden_states is None else (hidden_states,) * 2

    class Stateful:
        def __init__(self, inner):
            self.inner, self.calls = inner, 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            return self.inner(*args, **kwargs)

    host = build("flux")
    block = host.model.transformer_blocks[1]
    own = block.attn.processor
    block.attn.processor = Stateful(own)
    with pytest.raises(RuntimeError, match=r"transformer_blocks.1.attn.*Stateful.*keeps state"):
        recorded(host)
    block.attn.processor = own
    own._parallel_config = object()
    with pytest.raises(RuntimeError, match="context parallel"):
        replay("attn", block.attn, (), {})
    del own._parallel_config
    host.model.transformer_blocks[1].forward = lambda hidden_states, encoder_hidden_states, **_: (
        encoder_hidden_states,
        hidden_states,
    )
    with pytest.raises(MissingLayers, match=r"0 of 1 layers; not seen: \['transformer_blocks.1'\]"):
        recorded(host)
    del host.model.transformer_blocks[1].forward
    block.attn.processor = Silent()
    block.attn.forward = lambda hidden_states, encoder_hidden_states=None, **_: (
        hidden_states,
        encoder_hidden_states,
    )
    with pytest.raises(RuntimeError, match="Silent.*never called scaled_dot_product_attention"):
        recorded(host)
    recorder = TransformerRecorder(host.model, CONFIG)
    with pytest.raises(ValueError, match="recorded already"):
        TransformerRecorder(host.model, CONFIG)
    recorder.remove()
    for layers, message in (((7,), "blocks 0 to 3"), (("nothing.1",), "no attention")):
        with pytest.raises(ValueError, match=message):
            TransformerRecorder(host.model, scfg.SCFGConfig(layers=layers))
    call = dict(host.call, img_ids=host.call["img_ids"] + torch.tensor([1.0, 0, 0]))
    recorder = TransformerRecorder(host.model, CONFIG)
    with pytest.raises(ValueError, match="of one image"):
        recorder.start((), call)
    recorder.remove()


def test_layers_are_chosen_by_number_or_name():
    host = build("aura_flow")
    first, last = "joint_transformer_blocks.0", "single_transformer_blocks.0"
    found = []
    for layers in (None, (3, 0), (last, f"{first}.attn")):
        recorder = TransformerRecorder(host.model, scfg.SCFGConfig(layers=layers), keep_maps=True)
        recorder.start((), host.call)
        output(host)
        recorder.finish()
        found.append([layer.name for layer in recorder.layers])
        recorder.remove()
    assert len(found[0]) == 4 and found[1] == found[2] == [first, last]
    for layers in ("some", (), (1.5,), "1"):
        with pytest.raises(ValueError, match="layers must be"):
            scfg.SCFGConfig(layers=layers)


class Own(nn.Module):
    """A network of one joint softmax over [text, image], that nobody has a row for."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Mixer(), Mixer()])

    def forward(self, pixels, words):
        b, c, h, w = pixels.shape
        x = torch.cat([words, pixels.flatten(2).mT], dim=1)
        for layer in self.layers:
            x = x + layer(x)
        return x[:, words.shape[1] :].mT.unflatten(2, (h, w))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = Attend()

    def forward(self, x):
        return self.mix(x)


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_network_without_a_row_is_given_one():
    torch.manual_seed(0)
    model, x, words = Own().requires_grad_(False), randn(1, 8, 4, 6), randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"no row in scfg.recording.layouts; give layout="):
        TransformerRecorder(model, CONFIG)
    layout = Layout(
        attention=("mix",),
        blocks=("layers",),
        grid=lambda model, call: (1, *call["pixels"].shape[2:]),
        start=(0,),
    )
    plain = model(torch.cat([x, x]), words)
    attributes = [set(vars(m)) for m in model.modules()]
    with scfg.Recorder(model, CONFIG, layout=layout) as network:
        eps = network(torch.cat([x, x]), words)
        assert eps.equal(plain)
        out = network.guide(*eps.chunk(2), 3.0)
    assert out.labels.shape == (1, 4, 6) and 0 not in out.labels.unique()
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not any(m._forward_hooks for m in model.modules())
    expected = eps[:1] + 3.0 * out.rate * (eps[1:] - eps[:1])
    assert_close(actual=out.eps, expected=expected, share=1e-5)


def test_start_is_refused_where_none_is_known():
    host = build("flux")
    config = scfg.SCFGConfig(benchmark="foreground")
    with scfg.Recorder(host.model, config) as network:
        eps = network(**host.call, return_dict=False)[0]
        with pytest.raises(ValueError, match="for this model none is known"):
            network.guide(eps[:1], eps[1:], 4.0)


def test_comfyui_says_which_models_it_does_not_record():
    from scfg.adapters.comfyui.layouts import kind_of

    class LTXVModel(Own):
        """Its blocks look like those of a U-Net: two modules with to_q, to_k, heads."""

    with pytest.raises(ValueError, match=r"LTXVModel is neither a U-Net nor .*plain CFG"):
        kind_of(LTXVModel())
