"""The U-Net against diffusers' UNet2DConditionModel: names, shapes, outputs; and its errors."""

import copy
import dataclasses
import json

import pytest
import torch
from conftest import assert_close
from tiny import MODEL
from torch import nn

from scfg.models.unet import SD15, SD21, SDXL, UNet, UNetConfig

diffusers = pytest.importorskip("diffusers")

SD = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
PUBLISHED = {  # the unet/config.json of each model on the hub
    "sd15": SD | {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": SD
    | {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CONFIGS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
PARAMETERS = {"sd15": 859_520_964, "sd21": 865_910_724, "sdxl": 2_567_463_684}

# Narrow versions, as (changes to the config, the same changes in the words of diffusers).
NARROW = {
    "sd15": (
        {"block_out_channels": (32, 64, 96, 128), "cross_attention_dim": 24},
        {"block_out_channels": (32, 64, 96, 128), "cross_attention_dim": 24},
    ),
    "sd21": (
        {"block_out_channels": (40, 80, 160, 160), "cross_attention_dim": 24, "norm_groups": 20},
        {"block_out_channels": (40, 80, 160, 160), "cross_attention_dim": 24}
        | {"norm_num_groups": 20},
    ),
    "sdxl": (
        {"block_out_channels": (40, 80, 160), "cross_attention_dim": 24, "norm_groups": 20}
        | {"transformer_depth": (0, 2, 3), "mid_depth": 3, "addition": (12, 6, 16)},
        {"block_out_channels": (40, 80, 160), "cross_attention_dim": 24, "norm_num_groups": 20}
        | {"transformer_layers_per_block": (1, 2, 3), "addition_time_embed_dim": 16}
        | {"projection_class_embeddings_input_dim": 12 + 6 * 16},
    ),
}
TINY = MODEL.unet


@pytest.fixture(scope="module", params=list(NARROW))
def pair(request):
    """The same narrow model twice, every parameter random: (its name, ours, diffusers')."""
    changes, changes_of_diffusers = NARROW[request.param]
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**PUBLISHED[request.param] | changes_of_diffusers)
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases of 0 and norms of 1 would hide a swap
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = UNet(dataclasses.replace(CONFIGS[request.param], **changes))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return request.param, ours.eval(), theirs.eval()


def inputs(name, height, width):
    """Latent, one timestep per sample, context, and the conditions of SDXL."""
    generator = torch.Generator().manual_seed(height * width)
    x = torch.randn(2, 4, height, width, generator=generator)
    context = torch.randn(2, 7, 24, generator=generator)
    added = None
    if name == "sdxl":
        ids = torch.tensor([[1024, 768, 0, 0, 1024, 768], [512, 512, 3, 40, 512, 512]])
        added = (torch.randn(2, 12, generator=generator), ids)
    return x, torch.tensor([981, 20]), context, added


@torch.no_grad()
def call_diffusers(model, x, t, context, added, **kwargs):
    if added is not None:
        kwargs["added_cond_kwargs"] = {"text_embeds": added[0], "time_ids": added[1]}
    return model(x, t, context, **kwargs).sample


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (17, 25)])
@torch.no_grad()
def test_output_is_that_of_diffusers(pair, size):
    name, ours, theirs = pair
    x, t, context, added = inputs(name, *size)
    expected = call_diffusers(theirs, x, t, context, added)
    assert expected.std() > 0.1
    assert_close(actual=ours(x, t, context, added), expected=expected, share=1e-5)


@torch.no_grad()
def test_masked_tokens_are_ignored_as_in_diffusers(pair):
    name, ours, theirs = pair
    x, t, context, added = inputs(name, 9, 12)
    mask = torch.arange(7) < torch.tensor([[3], [6]])
    expected = call_diffusers(theirs, x, t, context, added, encoder_attention_mask=mask)
    actual = ours(x, t, context, added, context_mask=mask)
    assert_close(actual=actual, expected=expected, share=1e-5)
    assert (ours(x, t, context, added) - actual).abs().max() > 1e-3


@torch.no_grad()
def test_output_does_not_depend_on_strides(pair):
    name, ours, _ = pair
    unet = copy.deepcopy(
        ours
    ).double()  # layouts may take other convolutions, which round otherwise
    x, t, context, added = inputs(name, 9, 14)
    x, context = x.double(), context.double()
    added = added and (added[0].double(), added[1])
    expected = unet(x, t, context, added)
    x = x.mT.contiguous().mT
    context = context.mT.contiguous().mT
    assert not (x.is_contiguous() or context.is_contiguous())
    assert_close(actual=unet(x, t, context, added), expected=expected, share=1e-12)
    x = x.contiguous(memory_format=torch.channels_last)
    unet.to(memory_format=torch.channels_last)
    assert_close(actual=unet(x, t, context, added), expected=expected, share=1e-12)


@torch.no_grad()
def test_one_timestep_serves_the_whole_batch(pair):
    name, ours, _ = pair
    x, _, context, added = inputs(name, 8, 10)
    expected = ours(x, torch.tensor([333, 333]), context, added)
    assert torch.equal(ours(x, 333, context, added), expected)
    assert torch.equal(ours(x, torch.tensor(333.0), context, added), expected)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_full_width_has_the_names_shapes_heads_and_norms_of_diffusers(name):
    with torch.device("meta"):
        ours = UNet(CONFIGS[name])
        theirs = diffusers.UNet2DConditionModel(**PUBLISHED[name])

    def shapes(model):
        return {key: tuple(value.shape) for key, value in model.state_dict().items()}

    def settings(model):
        norms = (nn.GroupNorm, nn.LayerNorm)
        return {
            key: (module.eps, getattr(module, "num_groups", None))
            if isinstance(module, norms)
            else module.heads
            for key, module in model.named_modules()
            if isinstance(module, norms) or hasattr(module, "to_q")
        }

    assert shapes(ours) == shapes(theirs)
    assert settings(ours) == settings(theirs)
    assert sum(parameter.numel() for parameter in ours.parameters()) == PARAMETERS[name]


@torch.no_grad()
def test_compiles_to_one_graph_also_when_sizes_change():
    torch._dynamo.reset()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    unet = UNet(dataclasses.replace(TINY, in_channels=3, transformer_depth=(0, 1))).eval()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for size in ((7, 6), (9, 8), (5, 12)):
        args = torch.randn(2, 3, *size), torch.tensor([3, 900]), torch.randn(2, 5, 24)
        expected = unet(*args, context_mask=mask)
        assert torch.equal(compiled(*args, context_mask=mask), expected)


def test_gradient_reaches_every_parameter_and_both_inputs():
    torch.manual_seed(0)
    unet = UNet(TINY)
    x = torch.randn(3, 48, 16, 16, requires_grad=True)
    context = torch.randn(3, 5, 24, requires_grad=True)
    out = unet(x, torch.tensor([0, 500, 999]), context)
    assert out.shape == x.shape
    out.square().mean().backward()
    gradients = dict(unet.named_parameters()) | {"x": x, "context": context}
    dead = [n for n, p in gradients.items() if p.grad is None or not 0 < p.grad.norm() < 1e6]
    assert not dead


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_output_keeps_the_dtype_of_weights_and_input(dtype):
    unet = UNet(TINY).to(dtype)
    out = unet(torch.randn(1, 48, 4, 6).to(dtype), 10, torch.randn(1, 3, 24).to(dtype))
    assert out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("config", [SD15, SDXL, TINY])
def test_config_survives_json(config):
    again = UNetConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config and hash(again) == hash(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("heads", (8, 8)),
        ("heads", (8, 8, 8, 0)),
        ("heads", (8, 8, 8, 7)),
        ("transformer_depth", (1, 1, 1)),
        ("transformer_depth", (1, 1, -1, 0)),
        ("block_out_channels", ()),
        ("block_out_channels", (320, 640, 1280, 1288)),
        ("norm_groups", 33),
        ("norm_groups", 0),
        ("mid_depth", 0),
        ("layers_per_block", 0),
        ("in_channels", 0),
        ("out_channels", -4),
        ("cross_attention_dim", 0),
        ("addition", (1280, 6)),
        ("addition", (1280, 6, 0)),
    ],
)
def test_impossible_config_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(SD15, **{name: value})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("x", {"x": torch.zeros(2, 4, 8, 8)}),
        ("x", {"x": torch.zeros(48, 8, 8)}),
        ("t", {"t": torch.zeros(3)}),
        ("t", {"t": torch.zeros(2, 2)}),
        ("context", {"context": torch.zeros(2, 5, 23)}),
        ("context", {"context": torch.zeros(1, 5, 24)}),
        ("context", {"context": torch.zeros(5, 24)}),
        ("added", {"added": (torch.zeros(2, 8), torch.zeros(2, 6))}),
        ("context_mask", {"context_mask": torch.ones(2, 4, dtype=torch.bool)}),
        ("context_mask", {"context_mask": torch.ones(2, 5)}),
    ],
)
def test_input_that_does_not_fit_is_refused_by_name(name, changes):
    fitting = {"x": torch.zeros(2, 48, 8, 8), "t": 1, "context": torch.zeros(2, 5, 24)}
    with pytest.raises((ValueError, TypeError), match=f"^{name} "):
        UNet(TINY)(**fitting | changes)


@pytest.mark.parametrize(
    ("name", "added"),
    [
        ("added", None),
        ("pooled text", (torch.zeros(2, 11), torch.zeros(2, 6))),
        ("time ids", (torch.zeros(2, 12), torch.zeros(1, 6))),
    ],
)
def test_conditions_of_sdxl_are_required_and_checked(name, added):
    unet = UNet(dataclasses.replace(TINY, addition=(12, 6, 16)))
    with pytest.raises(ValueError, match=f"^{name} "):
        unet(torch.zeros(2, 48, 8, 8), 1, torch.zeros(2, 5, 24), added)
