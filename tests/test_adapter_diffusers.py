"""attach: what real diffusers pipelines step with, and what they are afterwards."""

import pytest
import torch
from adapter_hosts import (
    NEGATIVE,
    PLAIN,
    PROMPT,
    by_hand,
    deepfloyd,
    diffusers,
    sd,
    sd_parts,
    sdxl,
    sdxl_parts,
    spy,
)
from conftest import assert_close
from diffusers_runs import SCHEDULERS, check_by_hand, image, img2img, quiet, run

from scfg.adapters.diffusers import attach
from scfg.methods.rescale import rescale


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def inpaint(folder):
    parts = sd_parts(folder, in_channels=9)
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    mask = (image() > 0.5).float()[:, :1]
    return quiet(pipe), dict(image=image(), mask_image=mask)


def control(unet):
    """A ControlNet that does something."""
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=3)
    for block in net.controlnet_down_blocks:
        torch.nn.init.normal_(block.weight, std=0.1)
    return net.eval()


def controlnet(folder):
    parts = sd_parts(folder)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=control(parts["unet"]), requires_safety_checker=False
    )
    return quiet(pipe), dict(image=image(), height=None, width=None)


def perturbed(folder):
    parts = sd_parts(folder)
    layers = ["mid_block", "up_blocks.1"]
    pipe = diffusers.StableDiffusionPAGPipeline(
        **parts, requires_safety_checker=False, pag_applied_layers=layers
    )
    return quiet(pipe), dict(pag_scale=2.0)


def xl_img2img(folder):
    parts = sdxl_parts(folder)
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    return quiet(pipe), dict(image=image(), strength=0.7, steps=4, height=None, width=None)


def sd2(folder):
    pipe = sd(folder, use_linear_projection=True, attention_head_dim=(1, 2, 2, 2))
    config = pipe.scheduler.config
    pipe.scheduler = type(pipe.scheduler).from_config(config, prediction_type="v_prediction")
    return pipe, {}


def xl_inpaint(folder):
    pipe = diffusers.StableDiffusionXLInpaintPipeline(**sdxl_parts(folder), add_watermarker=False)
    mask = (image() > 0.5).float()[:, :1]
    return quiet(pipe), dict(image=image(), mask_image=mask, strength=1.0)


def xl_controlnet(folder):
    parts = sdxl_parts(folder)
    pipe = diffusers.StableDiffusionXLControlNetPipeline(
        **parts, controlnet=control(parts["unet"]), add_watermarker=False
    )
    return quiet(pipe), dict(image=image(), height=None, width=None)


HOSTS = {
    "sd": lambda folder: (sd(folder), {}),
    "sd2": sd2,
    "sd_img2img": img2img,
    "sd_inpaint": inpaint,
    "sd_controlnet": controlnet,
    "sdxl": lambda folder: (sdxl(folder), {}),
    "sdxl_img2img": xl_img2img,
    "sdxl_inpaint": xl_inpaint,
    "sdxl_controlnet": xl_controlnet,
}


@pytest.mark.parametrize("host", HOSTS)
def test_scheduler_gets_what_semantic_cfg_makes_by_hand_and_the_pipeline_is_left_as_found(
    host, folder
):
    pipe, call = HOSTS[host](folder)
    plain = run(pipe, **call)
    raw, stepped, end = spy(pipe)
    seen = []
    with attach(pipe, callback=seen.append):
        guided = run(pipe, **call)
    end()
    assert len(seen) == len(raw) == len(stepped) >= 2
    for (output, layers), eps, out in zip(raw, stepped, seen, strict=True):
        expected = by_hand(output, layers, 6.0)
        assert_close(actual=eps, expected=expected.eps, share=1e-4, what="prediction")
        assert_close(actual=out.rate, expected=expected.rate, share=1e-5, what="rate")
        assert out.labels.equal(expected.labels) and out.foreground.equal(expected.foreground)
    assert (guided - plain).abs().max() > 1e-3
    assert run(pipe, **call).equal(plain)
    with attach(pipe, config=PLAIN):
        assert_close(actual=run(pipe, **call), expected=plain, share=1e-5)
    assert run(pipe, **call).equal(plain)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_steps_with_the_guided_prediction(name, folder):
    pipe = sd(folder)
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    plain = run(pipe, steps=3)
    _, calls = check_by_hand(pipe, steps=3)
    assert calls == (5 if name == "heun" else 3)
    with attach(pipe, config=PLAIN):
        assert_close(actual=run(pipe, steps=3), expected=plain, share=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        dict(prompt=[PROMPT, "a dog"], negative_prompt=None, num_images_per_prompt=2),
        dict(height=136, width=88),
        dict(guidance_scale=1.2),
    ],
    ids=["prompts_x_images", "odd_size", "small_scale"],
)
def test_calls_of_every_kind_are_guided(call, folder):
    check_by_hand(sd(folder), **{"guidance_scale": 6.0, **call})


def test_embeddings_are_guided_as_their_prompts_are(folder):
    pipe = sd(folder)
    text, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    call = dict(
        prompt=None, negative_prompt=None, prompt_embeds=text, negative_prompt_embeds=negative
    )
    expected, _ = check_by_hand(pipe)
    with attach(pipe):
        assert run(pipe, **call).equal(expected)


@pytest.mark.parametrize("guidance_scale", [1.2, 7.5])
def test_guidance_rescale_is_the_pipelines_own(guidance_scale, folder):
    pipe = sd(folder)
    raw, stepped, end = spy(pipe)
    with attach(pipe):
        run(pipe, guidance_scale=guidance_scale, guidance_rescale=0.7)
    end()
    for (output, layers), eps in zip(raw, stepped, strict=True):
        guided = by_hand(output, layers, guidance_scale).eps
        expected = rescale(guided, output.chunk(2)[1], 0.7)
        assert_close(actual=eps, expected=expected, share=1e-4, what="rescaled prediction")


def test_perturbed_attention_guidance_is_added_to_the_guided_prediction(folder):
    pipe, call = perturbed(folder)
    raw, stepped, end = spy(pipe)
    with attach(pipe):
        run(pipe, **call)
    end()
    for (output, layers), eps in zip(raw, stepped, strict=True):
        _, text, worse = output.chunk(3)
        expected = by_hand(output, layers, 6.0, b=1).eps + 2.0 * (text - worse)
        assert_close(actual=eps, expected=expected, share=1e-4, what="prediction")


def run_deepfloyd(pipe, **call):
    text = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))
    return pipe(
        prompt_embeds=text[:1],
        negative_prompt_embeds=text[1:],
        guidance_scale=5.0,
        num_inference_steps=2,
        height=16,
        width=24,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **call,
    ).images


@pytest.mark.parametrize("stage", [1, 2])
def test_deepfloyd_is_guided_at_the_scale_given_and_keeps_its_variance(stage):
    pipe, call = deepfloyd(stage), dict(image=image(8, 12)) if stage == 2 else {}
    plain = run_deepfloyd(pipe, **call)
    raw, stepped, end = spy(pipe)
    with attach(pipe, guidance_scale=5.0):
        run_deepfloyd(pipe, **call)
    end()
    for (output, layers), stepped_with in zip(raw, stepped, strict=True):
        expected = by_hand(output, layers, 5.0, channels=3).eps
        eps, variance = stepped_with.split(3, dim=1)
        assert_close(actual=eps, expected=expected, share=1e-4, what="prediction")
        assert variance.equal(output[1:, 3:])
    with attach(pipe, guidance_scale=5.0, config=PLAIN):
        assert_close(actual=run_deepfloyd(pipe, **call), expected=plain, share=1e-5)
    assert run_deepfloyd(pipe, **call).equal(plain)
