"""Tiny diffusers transformers with random weights, and the call each is made with."""

import os
from dataclasses import dataclass

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")

B = 2  # rows of a call
GRID = (1, 8, 6)  # frames, rows and columns of patches


@dataclass
class Host:
    """A model, a call of it, and where this call has its image and text.

    Attributes:
        model: The transformer.
        call: Keywords of a call with B rows.
        grid: (f, h, w) of its patches.
        image: Position of the first image key of a joint softmax, in each row; None where image and
            text are attended to apart.
        text: Number of text keys, with those that are masked.
    """

    model: torch.nn.Module
    call: dict
    grid: tuple
    image: list | None = None
    text: int = 0


def scaled(model):
    """Weights at which every layer matters: matrices of 1 / sqrt(fan in), gates open."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
            elif p.dim() == 1 and not name.endswith("weight"):
                torch.nn.init.normal_(p, std=0.1)
    return model.eval().requires_grad_(False)


def randn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def key_mask(t, *lengths):
    """(b, t) bool: True for the first so many of each row."""
    return torch.arange(t) < torch.tensor(lengths)[:, None]


def sd3(**options):
    options = {**dict(num_layers=3, dual_attention_layers=(0,), qk_norm="rms_norm"), **options}
    model = diffusers.SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, out_channels=4, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=64, pos_embed_max_size=32, **options,
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 4, 16, 12),
        encoder_hidden_states=randn(B, 20, 32),
        pooled_projections=randn(B, 64),
        timestep=torch.full((B,), 500.0),
    )
    return Host(model, call, GRID, [0] * B, 20)


def pixart(**options):
    model = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=32, in_channels=4, out_channels=8, cross_attention_dim=24,
        norm_type="ada_norm_single", norm_elementwise_affine=False,
        use_additional_conditions=False,
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 4, 16, 12),
        encoder_hidden_states=randn(B, 20, 32),
        encoder_attention_mask=key_mask(20, 20, 13).float(),
        timestep=torch.full((B,), 500.0),
        added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
    )
    return Host(model, call, GRID, None, 20)


def hunyuan():
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    model = diffusers.HunyuanDiT2DModel(
        sample_size=16, num_layers=4, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        in_channels=4, cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16,
        hidden_size=24, text_len=7, text_len_t5=9,
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 4, 16, 12),
        encoder_hidden_states=randn(B, 7, 32),
        text_embedding_mask=key_mask(7, 7, 4),
        encoder_hidden_states_t5=randn(B, 9, 32, seed=2),
        text_embedding_mask_t5=key_mask(9, 6, 9),
        image_meta_size=randn(B, 6),
        style=torch.zeros(B, dtype=torch.long),
        timestep=torch.full((B,), 500.0),
        image_rotary_emb=get_2d_rotary_pos_embed(8, ((0, 0), (8, 6)), (8, 6), output_type="pt"),
    )
    return Host(model, call, GRID, None, 16)


def lumina2(lengths=(16, 11)):
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=3,
        num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2,
        axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128), cap_feat_dim=32,
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 4, 16, 12),
        encoder_hidden_states=randn(B, 16, 32),
        encoder_attention_mask=key_mask(16, *lengths),
        timestep=torch.full((B,), 0.5),
    )
    return Host(model, call, GRID, list(lengths), max(lengths))


def qwen(**options):
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 48, 16),
        encoder_hidden_states=randn(B, 7, 16),
        encoder_hidden_states_mask=key_mask(7, 7, 5),
        img_shapes=[[(1, 8, 6)]] * B,
        timestep=torch.full((B,), 0.5),
    )
    return Host(model, call, GRID, [7] * B, 7)


def token_ids(h=8, w=6):
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([torch.zeros(h * w), rows.flatten(), columns.flatten()], dim=1).float()


def flux(**options):
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        **{**dict(num_layers=3, num_single_layers=1), **options},
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 48, 16),
        encoder_hidden_states=randn(B, 12, 32),
        pooled_projections=randn(B, 32),
        img_ids=token_ids(),
        txt_ids=torch.zeros(12, 3),
        timestep=torch.full((B,), 0.5),
    )
    return Host(model, call, GRID, [12] * B, 12)


def chroma():
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=3, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
        approximator_num_channels=64, approximator_hidden_dim=32, approximator_layers=1,
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 48, 16),
        encoder_hidden_states=randn(B, 12, 32),
        attention_mask=torch.cat([key_mask(12, 12, 8), torch.ones(B, 48, dtype=torch.bool)], 1),
        img_ids=token_ids(),
        txt_ids=torch.zeros(12, 3),
        timestep=torch.full((B,), 0.5),
    )
    return Host(model, call, GRID, [12] * B, 12)


def sana():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=3,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=8, sample_size=32, patch_size=1,
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 4, 8, 6),
        encoder_hidden_states=randn(B, 10, 8),
        encoder_attention_mask=key_mask(10, 10, 6).float(),
        timestep=torch.full((B,), 500.0),
    )
    return Host(model, call, GRID, None, 10)


def z_image():
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32], cap_feat_dim=16,
    )  # fmt: skip
    call = dict(
        x=list(randn(B, 4, 1, 16, 12)),
        t=torch.full((B,), 0.5),
        cap_feats=[randn(7, 16), randn(40, 16, seed=3)],
    )
    return Host(model, call, GRID, [0] * B, 16 + 64)


def cogview4():
    model = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=4,
        num_attention_heads=4, text_embed_dim=32, time_embed_dim=8, condition_dim=4,
        sample_size=128, rope_axes_dim=(8, 8),
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 4, 16, 12),
        encoder_hidden_states=randn(B, 16, 32),
        original_size=torch.tensor([[128.0, 96.0]] * B),
        target_size=torch.tensor([[128.0, 96.0]] * B),
        crop_coords=torch.zeros(B, 2),
        timestep=torch.full((B,), 500.0),
    )
    return Host(model, call, GRID, [16] * B, 16)


def aura_flow():
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=3,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=256,
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 4, 16, 12),
        encoder_hidden_states=randn(B, 12, 32),
        timestep=torch.full((B,), 0.5),
    )
    return Host(model, call, GRID, [20] * B, 20)


def wan(frames=3):
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, ffn_dim=32, num_layers=3, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32, freq_dim=16,
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 4, frames, 8, 12),
        encoder_hidden_states=randn(B, 12, 16),
        timestep=torch.full((B,), 500.0),
    )
    return Host(model, call, (frames, 4, 6), None, 12)


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12,
        cross_attention_dim=24, num_layers=3, caption_channels=16,
    )  # fmt: skip
    call = dict(
        hidden_states=randn(B, 3 * 4 * 6, 8),
        encoder_hidden_states=randn(B, 12, 16),
        encoder_attention_mask=key_mask(12, 12, 7).float(),
        num_frames=3,
        height=4,
        width=6,
        timestep=torch.full((B,), 500.0),
    )
    return Host(model, call, (3, 4, 6), None, 12)


HOSTS = dict(
    sd3=sd3, qwen=qwen, flux=flux, chroma=chroma, pixart=pixart, sana=sana, hunyuan=hunyuan,
    lumina2=lumina2, z_image=z_image, cogview4=cogview4, aura_flow=aura_flow, wan=wan, ltx=ltx,
)  # fmt: skip


def build(name, **options):
    """A host, the same each time."""
    torch.manual_seed(0)
    host = HOSTS[name](**options)
    scaled(host.model)
    return host


def output(host, **call):
    """What the model returns, as one tensor."""
    with torch.no_grad():
        result = host.model(**{**host.call, **call}, return_dict=False)[0]
    return torch.stack(result) if isinstance(result, list) else result
