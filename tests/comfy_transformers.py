"""Tiny transformers of ComfyUI with random weights, and a run of one."""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from comfy_hosts import CPU, comfy


@dataclass
class Host:
    """A model, its prompts, and where a joint softmax has its image and text.

    Attributes:
        model: ModelPatcher.
        latent: (c, H, W) or (c, f, H, W).
        grid: (f, h, w) of its patches.
        positive: Conditioning.
        negative: Conditioning.
        tokens: Of each text.
        joint: Image and text share a softmax, text first.
        multiple: Text and image are padded to it.
        start: Column that knows nothing of the prompt.
        softmaxes: Of a block, where they are several.
        side: Latent pixels per patch.
    """

    model: object
    latent: tuple
    grid: tuple
    positive: list
    negative: list
    tokens: int
    joint: bool = True
    multiple: int = 1
    start: int | None = None
    softmaxes: int = 2
    side: int = 2


def build(kind, settings):
    config = getattr(comfy.supported_models, kind)(dict(settings))
    for name in ("num_heads", "num_head_channels"):
        if name not in settings:
            config.unet_config.pop(name, None)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    g = torch.Generator().manual_seed(0)
    for name, p in model.diffusion_model.named_parameters():
        fan = p[0].numel() if p.dim() > 1 else 1
        p.requires_grad_(False)
        p.data = torch.randn(p.shape, generator=g) * (fan**-0.5 if p.dim() > 1 else 0.1)
        if p.dim() == 1 and name.endswith(("weight", "scale")):
            p.data += 1
    for name, buffer in model.diffusion_model.named_buffers():
        if name == "pos_embed":
            buffer.copy_(torch.randn(buffer.shape, generator=g))
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def known(parameters, **settings):
    """Those that this version of ComfyUI knows."""
    names = {f.name for f in dataclasses.fields(parameters)} | {"image_model"}
    return {name: value for name, value in settings.items() if name in names}


def prompts(tokens, width, mask=None, **options):
    """A positive and a negative conditioning."""
    made = []
    for seed in (1, 2):
        g = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens, width, generator=g)
        given = {name: torch.randn(1, size, generator=g) for name, size in options.items()}
        if mask is not None:
            given["attention_mask"] = mask
        made.append([[context, given]])
    return made


def sd3(size=(16, 12), self_attention=()):
    model = build(
        "SD3",
        dict(
            in_channels=16, pos_embed_scaling_factor=None, depth=3, patch_size=2,
            adm_in_channels=24, num_patches=256, pos_embed_max_size=16, input_size=None,
            context_embedder_config={
                "target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 192}
            },
            qk_norm="rms", x_block_self_attn_layers=list(self_attention),
        ),
    )  # fmt: skip
    texts = prompts(20, 32, pooled_output=24)
    return Host(model, (16, *size), patches(size), *texts, 20, start=0)


def patches(size):
    return (1, *(-(-s // 2) for s in size))


def flux(size=(16, 12)):
    model = build(
        "FluxSchnell",
        known(
            comfy.ldm.flux.model.FluxParams,
            image_model="flux", guidance_embed=False, in_channels=16, out_channels=16,
            vec_in_dim=24, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=3,
            depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10000, patch_size=2, qkv_bias=True,
            txt_ids_dims=[],
        ),
    )  # fmt: skip
    texts = prompts(12, 32, pooled_output=24)
    return Host(model, (16, *size), patches(size), *texts, 12)


def flux2():
    if not hasattr(comfy.supported_models, "Flux2"):
        pytest.skip("this ComfyUI has no Flux.2")
    model = build(
        "Flux2",
        dict(
            image_model="flux2", guidance_embed=False, in_channels=128, out_channels=128,
            vec_in_dim=None, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=3,
            depth_single_blocks=1, axes_dim=[4, 4, 4, 4], theta=2000, patch_size=1, qkv_bias=False,
            txt_ids_dims=[3], global_modulation=True, mlp_silu_act=True, ops_bias=False,
        ),
    )  # fmt: skip
    return Host(model, (128, 8, 6), (1, 8, 6), *prompts(12, 32), 512, side=1)  # padded in front


def chroma():
    model = build(
        "Chroma",
        known(
            comfy.ldm.chroma.model.ChromaParams,
            image_model="chroma", in_channels=64, out_channels=64, context_in_dim=32,
            hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=3, depth_single_blocks=1,
            axes_dim=[4, 6, 6], theta=10000, patch_size=2, qkv_bias=True, in_dim=64, out_dim=32,
            hidden_dim=32, n_layers=1, txt_ids_dims=[], vec_in_dim=24,
        ),
    )  # fmt: skip
    return Host(model, (16, 16, 12), (1, 8, 6), *prompts(12, 32, pooled_output=24), 12)


def qwen():
    model = build(
        "QwenImage",
        dict(
            image_model="qwen_image", in_channels=64, num_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=24,
            axes_dims_rope=(4, 6, 6),
        ),
    )  # fmt: skip
    mask = torch.tensor([[1] * 7 + [0] * 2])
    return Host(model, (16, 1, 16, 12), (1, 8, 6), *prompts(9, 24, mask), 9)


def lumina2(**options):
    model = build(
        "Lumina2",
        dict(
            image_model="lumina2", patch_size=2, in_channels=16, dim=32, n_layers=3,
            n_refiner_layers=1, n_heads=2, n_kv_heads=1, multiple_of=8, qk_norm=True,
            cap_feat_dim=24, axes_dims=[4, 6, 6], axes_lens=[300, 64, 64],
            ffn_dim_multiplier=1.0,
        )
        | options,
    )  # fmt: skip
    return Host(
        model,
        (16, 16, 12),
        (1, 8, 6),
        *prompts(11, 24, torch.ones(1, 11, dtype=torch.long)),
        11,
        start=0,
    )


def z_image():
    if not hasattr(comfy.supported_models, "ZImage"):
        pytest.skip("this ComfyUI has no Z-Image")
    host = lumina2(
        z_image_modulation=True, pad_tokens_multiple=32, n_heads=8, n_kv_heads=8, dim=256,
        axes_dims=[8, 12, 12],
    )  # fmt: skip
    host.multiple = 32
    return host


def wan(frames=3, kind="t2v"):
    model = build(
        "WAN21_T2V",
        dict(
            image_model="wan2.1", model_type=kind, patch_size=(1, 2, 2), in_dim=16, out_dim=16,
            dim=36, ffn_dim=48, freq_dim=16, text_dim=24, num_heads=3, num_layers=3,
            cross_attn_norm=True, qk_norm=True,
        ),
    )  # fmt: skip
    texts = prompts(12, 24)
    host = Host(model, (16, frames, 8, 12), (frames, 4, 6), *texts, 12, joint=False, start=-1)
    if kind == "i2v":  # blocks attend to an image, too, before the text
        host.softmaxes = 3
        g = torch.Generator().manual_seed(5)
        seen = SimpleNamespace(penultimate_hidden_states=torch.randn(1, 9, 1280, generator=g))
        for text in texts:
            text[0][1]["clip_vision_output"] = seen
    return host


HOSTS = {
    "sd3": sd3,
    "sd3.5": lambda: sd3(self_attention=(0, 1)),
    "sd3 odd": lambda: sd3(size=(13, 18)),
    "flux": flux,
    "chroma": chroma,
    "qwen": qwen,
    "lumina2": lumina2,
    "z_image": z_image,
    "wan": wan,
    "wan image": lambda: wan(1),
    "wan i2v": lambda: wan(2, "i2v"),
}


def sample(host, model=None, cfg=4.0, steps=2, b=1, positive=None, negative=None):
    noise = torch.randn(b, *host.latent, generator=torch.Generator().manual_seed(0))
    return comfy.sample.sample(
        host.model if model is None else model, noise, steps, cfg, "euler", "normal",
        positive or host.positive, negative or host.negative, torch.zeros_like(noise), seed=0,
        disable_pbar=True,
    )  # fmt: skip
