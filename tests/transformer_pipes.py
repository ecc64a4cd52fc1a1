"""Tiny diffusers pipelines with the models of `transformer_hosts`, prompts as embeddings."""

import torch
from transformer_hosts import build, diffusers, key_mask, randn

G = 4.0  # guidance scale g of the two branches, whatever the pipeline calls it
FLOW = diffusers.FlowMatchEulerDiscreteScheduler


def vae(**options):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.06,
    )


def video_vae(kind, **options):
    return kind(
        base_dim=8, z_dim=4, dim_mult=[1] * 4, num_res_blocks=1, latents_mean=[0.0] * 4,
        temperal_downsample=[False, True, True], latents_std=[1.0] * 4, **options,
    )  # fmt: skip


def text(t, c, *lengths, negative=9):
    """Embeddings of a prompt and of a negative one, which is no multiple of it."""
    return dict(prompt_embeds=randn(1, t, c), negative_prompt_embeds=randn(1, t, c, seed=negative))


def masks(t, own, other, prefix="prompt", dtype=torch.int64):
    return {
        f"{prefix}_attention_mask": key_mask(t, own).to(dtype),
        f"negative_{prefix}_attention_mask": key_mask(t, other).to(dtype),
    }


def none(*names):
    return dict.fromkeys(names)


def sd3():
    names = [f"{part}{i}" for part in ("tokenizer", "text_encoder") for i in ("", "_2", "_3")]
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=build("sd3").model, scheduler=FLOW(), vae=vae(), **none(*names)
    )
    call = text(20, 32) | dict(
        pooled_prompt_embeds=randn(1, 64), negative_pooled_prompt_embeds=randn(1, 64, seed=7)
    )
    return pipe, call | dict(height=128, width=96), "guidance_scale"


def pixart():
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=build("pixart").model, scheduler=diffusers.DDIMScheduler(), vae=vae(),
        **none("tokenizer", "text_encoder"),
    )  # fmt: skip
    call = text(20, 32) | masks(20, 20, 13) | dict(negative_prompt=None)
    return pipe, call | dict(height=128, width=96, use_resolution_binning=False), "guidance_scale"


def sana():
    pipe = diffusers.SanaPipeline(
        transformer=build("sana").model, scheduler=FLOW(), vae=None,
        **none("tokenizer", "text_encoder"),
    )  # fmt: skip
    call = text(10, 8) | masks(10, 10, 6) | dict(negative_prompt=None, use_resolution_binning=False)
    return pipe, call | dict(height=256, width=192), "guidance_scale"


def hunyuan():
    names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "safety_checker")
    pipe = diffusers.HunyuanDiTPipeline(
        transformer=build("hunyuan").model, scheduler=diffusers.DDIMScheduler(), vae=vae(),
        requires_safety_checker=False, **none(*names, "feature_extractor"),
    )  # fmt: skip
    second = {f"{key}_2": value for key, value in text(9, 32, negative=8).items()}
    call = text(7, 32) | masks(7, 7, 4) | second
    call |= {f"{key}_2": value for key, value in masks(9, 6, 9).items()}
    return pipe, call | dict(height=128, width=128, use_resolution_binning=False), "guidance_scale"


def lumina2():
    pipe = diffusers.Lumina2Pipeline(
        transformer=build("lumina2").model, scheduler=FLOW(), vae=vae(),
        **none("tokenizer", "text_encoder"),
    )  # fmt: skip
    call = text(16, 32) | masks(16, 16, 11, dtype=torch.bool)
    return pipe, call | dict(height=128, width=96, cfg_normalization=False), "guidance_scale"


def qwen():
    kind = diffusers.AutoencoderKLQwenImage
    pipe = diffusers.QwenImagePipeline(
        transformer=build("qwen").model, scheduler=FLOW(), vae=video_vae(kind),
        **none("tokenizer", "text_encoder"),
    )  # fmt: skip
    call = text(7, 16) | dict(
        prompt_embeds_mask=key_mask(7, 7).long(), negative_prompt_embeds_mask=key_mask(7, 5).long()
    )
    return pipe, call | dict(height=128, width=96), "true_cfg_scale"


def flux():
    names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    pipe = diffusers.FluxPipeline(
        transformer=build("flux").model, scheduler=FLOW(), vae=vae(), **none(*names)
    )
    call = text(12, 32) | dict(
        pooled_prompt_embeds=randn(1, 32), negative_pooled_prompt_embeds=randn(1, 32, seed=7)
    )
    return pipe, call | dict(height=128, width=96), "true_cfg_scale"


def chroma():
    pipe = diffusers.ChromaPipeline(
        transformer=build("chroma").model, scheduler=FLOW(), vae=vae(),
        **none("tokenizer", "text_encoder"),
    )  # fmt: skip
    call = text(12, 32) | masks(12, 12, 8, dtype=torch.bool)
    return pipe, call | dict(height=128, width=96), "guidance_scale"


def cogview4():
    scheduler = FLOW(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    pipe = diffusers.CogView4Pipeline(
        transformer=build("cogview4").model, scheduler=scheduler, vae=vae(),
        **none("tokenizer", "text_encoder"),
    )  # fmt: skip
    return pipe, text(16, 32) | dict(height=128, width=96), "guidance_scale"


def aura_flow():
    pipe = diffusers.AuraFlowPipeline(
        transformer=build("aura_flow").model, scheduler=FLOW(), vae=vae(),
        **none("tokenizer", "text_encoder"),
    )  # fmt: skip
    call = text(12, 32) | masks(12, 12, 9)
    return pipe, call | dict(height=128, width=96), "guidance_scale"


def z_image():
    pipe = diffusers.ZImagePipeline(
        transformer=build("z_image").model, scheduler=FLOW(), vae=vae(),
        **none("tokenizer", "text_encoder"),
    )  # fmt: skip
    call = dict(
        prompt_embeds=[randn(7, 16)], negative_prompt_embeds=[randn(40, 16, seed=3)],
        height=128, width=96,
    )  # fmt: skip
    return pipe, call, "guidance_scale"


def wan(**options):
    pipe = diffusers.WanPipeline(
        transformer=build("wan").model, scheduler=FLOW(),
        vae=video_vae(diffusers.AutoencoderKLWan),
        **none("tokenizer", "text_encoder"), **options,
    )  # fmt: skip
    return pipe, text(12, 16) | dict(height=64, width=96, num_frames=9), "guidance_scale"


def ltx():
    pipe = diffusers.LTXPipeline(
        transformer=build("ltx").model, scheduler=FLOW(), vae=None,
        **none("tokenizer", "text_encoder"),
    )  # fmt: skip
    call = text(12, 16) | masks(12, 12, 7)
    return pipe, call | dict(height=128, width=192, num_frames=17), "guidance_scale"


PIPES = dict(
    sd3=sd3, qwen=qwen, flux=flux, chroma=chroma, pixart=pixart, sana=sana, hunyuan=hunyuan,
    lumina2=lumina2, z_image=z_image, cogview4=cogview4, aura_flow=aura_flow, wan=wan, ltx=ltx,
)  # fmt: skip


def pipeline(name, **options):
    """A pipeline, its call without the scale, and the keyword of the scale."""
    pipe, call, scale = PIPES[name](**options)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call, scale


def draw(name, pipe, call, key, g=G, steps=3, **options):
    """Latents that a run ends with, guided by g."""
    g = g - 1 if name == "z_image" else g
    generator = torch.Generator().manual_seed(0)
    options = {**call, key: g, **options}
    result = pipe(
        **options, num_inference_steps=steps, generator=generator, output_type="latent",
        return_dict=False,
    )  # fmt: skip
    return result[0]


def given(key, name, g=G):
    """What `attach` has to be told of the scale."""
    return g if key == "true_cfg_scale" or name == "pixart" else None
