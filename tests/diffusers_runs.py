"""Runs of tiny diffusers pipelines, as they are, watched and guided."""

import torch
from adapter_hosts import (
    NEGATIVE,
    PROMPT,
    by_hand,
    diffusers,
    sd_parts,
    spy,
)
from conftest import assert_close

from scfg.adapters.diffusers import attach

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "dpmpp": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(height=128, width=192):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(5))


def img2img(folder):
    parts = sd_parts(folder)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    return quiet(pipe), dict(image=image(), strength=0.7, steps=4, height=None, width=None)


def run(pipe, **call):
    """`latents`, for pipelines that take no size too."""
    call = {key: value for key, value in {"height": 128, "width": 192, **call}.items()}
    generator = torch.Generator().manual_seed(call.pop("seed", 0))
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 6.0, **call}
    call["num_inference_steps"] = call.pop("steps", 2)
    call = {key: value for key, value in call.items() if value is not None}
    return pipe(**call, generator=generator, output_type="latent").images


def check_by_hand(pipe, guidance_scale=6.0, **call):
    """Run with `attach`; every prediction must be the one made by hand from the same maps."""
    raw, stepped, end = spy(pipe)
    with attach(pipe):
        result = run(pipe, guidance_scale=guidance_scale, **call)
    end()
    assert len(raw) == len(stepped) > 1
    for (output, layers), eps in zip(raw, stepped, strict=True):
        expected = by_hand(output, layers, guidance_scale).eps
        assert_close(actual=eps, expected=expected, share=1e-4, what="prediction")
    return result, len(raw)


def guided(pipe, inside=None, **call):
    """Latents and rates of a run; `inside` is done to the pipeline inside the block."""
    rates = []
    with attach(pipe, callback=lambda out: rates.append(out.rate)):
        if inside is not None:
            inside(pipe)
        return run(pipe, **call), torch.stack(rates)
