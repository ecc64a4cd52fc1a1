"""Tiny diffusers pipelines with random weights, built offline: the topology of the real ones."""

import functools
import json
import os

import pytest
import torch

import scfg
from scfg.recording.recorder import AttentionRecorder

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers", reason="diffusers pipelines need transformers")

PROMPT = "a red circle and a blue square"
NEGATIVE = "blurry"
CONFIG = scfg.SCFGConfig()
PLAIN = scfg.SCFGConfig(rate_min=1, rate_max=1, max_scale=None)  # S-CFG that is plain CFG


def byte_characters() -> list[str]:
    """The characters byte-level BPE writes the 256 bytes with."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + i) for i in range(len(moved))]


@functools.cache
def clip_tokenizer(folder: str):
    """A CLIP tokenizer of single bytes and a few merged words."""
    merges = ["r e", "re d</w>", "b l", "u e</w>", "bl ue</w>"]
    characters = byte_characters()
    words = [*characters, *(c + "</w>" for c in characters), *(m.replace(" ", "") for m in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab, merge_file = os.path.join(folder, "vocab.json"), os.path.join(folder, "merges.txt")
    with open(vocab, "w", encoding="utf-8") as file:
        json.dump({word: i for i, word in enumerate(words)}, file)
    with open(merge_file, "w", encoding="utf-8") as file:
        file.write("\n".join(["#version: 0.2", *merges]))
    return transformers.CLIPTokenizer(vocab, merge_file, model_max_length=77)


def text_config(tokenizer, width=32, **options):
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )


def ddim():
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


UNET = dict(
    sample_size=16,
    block_out_channels=(16, 32, 32, 32),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=32,
    attention_head_dim=2,
)


def sd_parts(folder, **unet) -> dict:
    """Components of a Stable Diffusion 1.5 pipeline: attention at r1, r2, r4 and in the middle."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(str(folder))
    return dict(
        tokenizer=tokenizer,
        text_encoder=transformers.CLIPTextModel(text_config(tokenizer)).eval(),
        unet=diffusers.UNet2DConditionModel(**{**UNET, **unet}).eval(),
        vae=vae().eval(),
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
    )


def sd(folder, **unet):
    """Stable Diffusion 1.5."""
    pipe = diffusers.StableDiffusionPipeline(
        **sd_parts(folder, **unet), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sdxl_parts(folder) -> dict:
    """Components of SDXL: several transformer blocks a layer, attention at r2 and r4."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(str(folder))
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=(1, 2, 2),
        use_linear_projection=True,
        cross_attention_dim=64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    second = text_config(tokenizer, projection_dim=32)
    return dict(
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        text_encoder=transformers.CLIPTextModel(text_config(tokenizer)).eval(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(second).eval(),
        unet=unet.eval(),
        vae=vae().eval(),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )


def sdxl(folder):
    """SDXL."""
    pipe = diffusers.StableDiffusionXLPipeline(**sdxl_parts(folder), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def deepfloyd(stage=1):
    """DeepFloyd IF, prompts given as embeddings: text among the keys, variance in the output."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=3 * stage,
        out_channels=6,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=8,
        encoder_hid_dim=24,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        class_embed_type="timestep" if stage == 2 else None,
        resnet_time_scale_shift="scale_shift",
        only_cross_attention=False,
    )
    schedule = dict(beta_schedule="squaredcos_cap_v2")
    parts = dict(
        tokenizer=None,
        text_encoder=None,
        unet=unet.eval(),
        scheduler=diffusers.DDPMScheduler(
            variance_type="learned_range", thresholding=True, **schedule
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    if stage == 1:
        pipe = diffusers.IFPipeline(**parts)
    else:
        noising = diffusers.DDPMScheduler(**schedule)
        pipe = diffusers.IFSuperResolutionPipeline(**parts, image_noising_scheduler=noising)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, seed=0, steps=2, height=128, width=192, **call):
    """Latents a pipeline ends with: non-square by default."""
    generator = torch.Generator().manual_seed(seed)
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 6.0, **call}
    return pipe(
        **call,
        num_inference_steps=steps,
        height=height,
        width=width,
        generator=generator,
        output_type="latent",
    ).images


def spy(pipe, keep=True):
    """What the U-Net returns before anything rewrites it, and what reaches the scheduler.

    Returns:
        A list of (raw output, maps or None) per U-Net call, one of scheduler inputs, and a function
        that ends it. To be called before `attach`.
    """
    raw, stepped = [], []
    recorder = AttentionRecorder(pipe.unet, CONFIG, "torch", keep_maps=True) if keep else None
    step = pipe.scheduler.step

    def before(unet, args, kwargs):
        if keep:
            recorder.start(args[0] if args else kwargs["sample"])

    def after(unet, args, output):
        output = output[0] if isinstance(output, tuple) else output.sample
        if keep:
            recorder.finish()
        raw.append((output.clone(), recorder.layers if keep else None))

    def observed(model_output, *args, **kwargs):
        stepped.append(model_output.clone())
        return step(model_output, *args, **kwargs)

    hooks = pipe.unet.register_forward_pre_hook(before, with_kwargs=True)
    hooks = [hooks, pipe.unet.register_forward_hook(after)]
    pipe.scheduler.step = observed

    def end():
        for hook in hooks:
            hook.remove()
        if keep:
            recorder.remove()
        del pipe.scheduler.step

    return raw, stepped, end


def by_hand(raw, layers, guidance_scale, channels=None, config=None, **options):
    """`scfg.semantic_cfg` on maps of one batched call, [unconditional, text, ...]."""
    channels, b = channels or raw.shape[1], options.pop("b", len(raw) // 2)
    uncond, text = raw[:b, :channels], raw[b : 2 * b, :channels]
    maps = [layer.self_map[: 2 * b] for layer in layers], [x.cross_map[: 2 * b] for x in layers]
    return scfg.semantic_cfg(uncond, text, *maps, guidance_scale, config or CONFIG, **options)
