"""Transformers: what is recorded of diffusers' models against what their own softmax is given."""

import math

import pytest
import torch
from by_hand import blurred, region_rates
from conftest import assert_close
from torch.nn import functional as F
from transformer_hosts import HOSTS, B, build, output

import scfg
from scfg.recording.layouts import find_layout
from scfg.recording.packing import unpack
from scfg.recording.replayed import TransformerRecorder

READ = {
    "sd3": (1,),
    "hunyuan": (1, 2),
}  # blocks read by default: of 3 the middle, of 4 the middle 2
CONFIG = scfg.SCFGConfig(min_share=0.0, min_peak=0.0)


def heard(host, monkeypatch, **call):
    """Queries, keys and mask, float64, of each softmax in the host's own forward.

    Linear attention counts as one, with the features that it multiplies by.
    """
    calls, features = [], []
    softmax, relu = F.scaled_dot_product_attention, F.relu

    def listen(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
        enable_gqa=False,
    ):  # fmt: skip
        assert not dropout_p and not is_causal and not enable_gqa
        result = softmax(query, key, value, attn_mask=attn_mask, scale=scale)
        width = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query.double() @ key.double().mT * width  # (b, g, m, l)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        probabilities = scores.softmax(dim=-1)
        ours = (probabilities @ value.double()).float()
        seen = torch.isfinite(ours)  # a row of padding sees nothing
        assert_close(actual=ours[seen], expected=result[seen], share=1e-5, what="softmax by hand")
        calls.append(probabilities.mean(dim=1))
        return result

    def listen_relu(x, *args, **kwargs):
        y = relu(x, *args, **kwargs)
        if y.dim() == 4 and type(host.model).__name__.startswith("Sana") and y.shape[1] == 2:
            features.append(y.double())
            if len(features) == 2:
                q, k = features[0].mT, features[1]  # (b, g, n, d)
                product = q @ k.mT
                calls.append((product / product.sum(-1, keepdim=True)).mean(dim=1))
                features.clear()
        return y

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", listen)
        patch.setattr(F, "relu", listen_relu)
        output(host, **call)
    return calls


def layer_maps(host, name, calls, joint="renormalise"):
    """S and C of the blocks read by default, from the list of all softmaxes of a call."""
    n = math.prod(host.grid)
    calls = [c for c in calls if c.shape[1] >= n]  # what is pooled of the text
    if name == "sd3":  # the first block has an attention more, of the image alone
        calls = [c for c in calls if c.shape[-1] != n]
    if name in ("lumina2", "z_image"):  # refiners come first
        calls = [c for c in calls if c.shape[-1] >= n + host.text]
    for block in READ.get(name, (1,)):
        if host.image is None:
            yield calls[2 * block], calls[2 * block + 1]
            continue
        rows = []
        for row, first in enumerate(host.image):
            own = calls[block][row, first : first + n]  # (n, m)
            text = own.clone()
            text = torch.cat([text[:, :first], text[:, first + n :]], dim=1)[:, : host.text]
            image = own[:, first : first + n]
            if joint == "renormalise":
                image = image / image.sum(dim=1, keepdim=True)
            rows.append((image, F.pad(text, (0, host.text - text.shape[1]))))
        yield tuple(torch.stack(part) for part in zip(*rows, strict=True))


@pytest.fixture(params=HOSTS)
def name(request):
    return request.param


@pytest.mark.parametrize("joint", ["renormalise", "raw"])
def test_maps_are_those_of_the_hosts_own_softmax(name, joint, monkeypatch):
    host = build(name)
    plain = output(host)
    expected = list(layer_maps(host, name, heard(host, monkeypatch), joint))
    recorder = TransformerRecorder(
        host.model, scfg.SCFGConfig(joint=joint), "torch", keep_maps=True
    )
    recorder.start((), host.call)
    assert output(host).equal(plain)
    recorder.finish()
    assert len(recorder.layers) == len(expected)
    for layer, (self_map, cross_map) in zip(recorder.layers, expected, strict=True):
        assert_close(actual=layer.self_map, expected=self_map, share=1e-5, what="S")
        assert_close(actual=layer.cross_map, expected=cross_map, share=1e-5, what="C")
    recorder.remove()
    assert output(host).equal(plain)


def test_labels_and_rates_follow_from_those_maps(name, monkeypatch):
    """Segmentation, rates and eps written out in float64, without a function of the library."""
    host = build(name)
    with scfg.Recorder(host.model, CONFIG, order=("text", "uncond")) as network:
        text = call_form(network(**host.call, return_dict=False)[0])
        network(**host.call, return_dict=False)
        uncond = [x * 0.5 for x in text] if isinstance(text, list) else text * 0.5
        guided = network.guide(uncond, text, guidance_scale=4.0)
    f, h, w = host.grid
    total = 0
    for self_map, cross_map in layer_maps(host, name, heard(host, monkeypatch)):
        powers = sum(torch.linalg.matrix_power(self_map, p) for p in (1, 2, 3, 4))
        token = (powers @ cross_map).mT.reshape(B, -1, f, h, w)
        token = blurred(token)
        total = total + token / token.mean(dim=(2, 3, 4), keepdim=True).clamp_min(1e-300)
    layout = find_layout(host.model)
    lead = layout.registers + (16 if name == "z_image" else 0)
    for column in layout.start:
        total[:, lead + column if column >= 0 else column] = 0
    total[:, :lead] = 0
    labels = total.argmax(dim=1).reshape(guided.labels.shape)
    best = total.topk(2, dim=1).values
    clear = (best[:, 0] - best[:, 1] > 1e-4).reshape(labels.shape)
    assert clear.float().mean() > 0.9
    assert guided.labels[clear].equal(labels[clear])

    def image(x):
        return unpack(x, layout, host.grid)

    eta = (image(text).double() - image(uncond).double()).reshape(B, -1, *pixels(image(text)))
    norm = eta.norm(dim=1)  # (b, f, H, W)
    side = norm.shape[-1] // w
    owner = guided.labels.reshape(B, f, h, w)
    owner = owner.repeat_interleave(side, -2).repeat_interleave(side, -1)
    rate = region_rates(norm, owner)
    assert_close(actual=guided.rate.reshape(rate.shape), expected=rate, share=1e-5, what="rate")
    assert guided.rule == "image" and guided.foreground.all()
    eps = image(uncond).double() + 4.0 * rate.reshape(guided.rate.shape) * eta.reshape(
        image(text).shape
    )
    assert_close(actual=image(guided.eps), expected=eps, share=1e-5, what="eps")


def call_form(x):
    return list(x) if isinstance(x, (list, tuple)) else x


def pixels(x):
    return (1, *x.shape[-2:]) if x.dim() == 4 else x.shape[-3:]
