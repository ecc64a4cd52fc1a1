"""Unconditional branches without a START: whose START marks the foreground then, in every host."""

import pytest
import torch
from adapter_hosts import PROMPT, by_hand, diffusers, sdxl, sdxl_parts, spy
from conftest import DEVICE, assert_close
from diffusers_runs import image, quiet
from tiny import tiny_unet
from torch.nn.attention import SDPBackend, sdpa_kernel

import csrc_triton
import scfg
from scfg import reference
from scfg.adapters.diffusers import attach
from scfg.evidence import Evidence

COND = scfg.SCFGConfig(foreground="cond")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def levels(seed, b=3, t=5, flat=()):
    """Evidence of a 6 x 7 grid and of its half, as folded layers leave it; some images flat."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for n in (6 * 7, 3 * 4):
        x = 1 + torch.rand(b, n, t + 1, generator=generator)
        for row in flat:
            x[row] = 2 + 1e-7 * torch.randn(n, t + 1)
        result.append(x.to(DEVICE))
    return result


@pytest.mark.parametrize("implementation", [reference, csrc_triton], ids=["torch", "triton"])
def test_each_image_takes_the_start_it_has(implementation):
    tokens, start = levels(0, flat=[2]), levels(1, t=9, flat=[1, 2])
    labels, foreground, flat = implementation.segment(tokens, start, 6, 7, [1, 2])
    usual = implementation.segment(tokens, levels(1, t=9), 6, 7, [1, 2])
    by_text = implementation.segment(tokens, tokens, 6, 7, [1, 2])
    assert flat.tolist() == [False, True, True]
    assert labels.equal(usual[0]) and labels.equal(by_text[0])
    assert foreground[0].equal(usual[1][0]) and foreground[1].equal(by_text[1][1])
    assert 0 < foreground[1].float().mean() < 1 and not foreground[1].equal(usual[1][1])
    assert not foreground[2].any()


def test_the_margin_lies_between_rounding_and_the_weakest_start():
    for share, flat in ((0.5, True), (2.0, False)):
        x = torch.ones(1, 42, 4, dtype=torch.float64)
        x[0, 7, 0] -= share * reference.NO_START
        assert reference.start_is_flat([x]).tolist() == [flat]
    varied = torch.ones(1, 12, 4)
    varied[0, 3, 0] = 1.5
    assert not reference.start_is_flat([torch.ones(1, 42, 4), varied]).any()  # one level is enough


def test_a_context_of_zeros_is_guided_by_the_texts_start_image_by_image():
    net = tiny_unet()
    x, text = torch.randn(2, 4, 20, 28), torch.randn(2, 9, 24)
    usual = torch.randn(2, 7, 24)
    mixed = usual.clone()
    mixed[0] = 0
    seen = []
    for config, uncond in ((scfg.SCFGConfig(), usual), (scfg.SCFGConfig(), mixed), (COND, mixed)):
        with scfg.guided(net, 5.0, config, callback=seen.append) as guided:
            guided(x, torch.tensor(500), uncond, text)
    usual, mixed, cond = seen
    assert mixed.start_is_flat.tolist() == [True, False]
    assert not usual.start_is_flat.any()
    assert mixed.foreground[0].equal(cond.foreground[0])
    assert mixed.foreground[1].equal(usual.foreground[1])
    assert_close(actual=mixed.rate[1], expected=usual.rate[1], share=1e-6)
    assert_close(actual=mixed.rate[0], expected=cond.rate[0], share=1e-6)


def test_one_token_is_refused():
    net = tiny_unet()
    with scfg.guided(net, 5.0) as guided, pytest.raises(ValueError, match="another token, got 1"):
        guided(torch.randn(1, 4, 16, 24), 3, torch.randn(1, 1, 24), torch.randn(1, 1, 24))


def text_to_image(folder):
    return sdxl(folder), {}


def image_to_image(folder):
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**sdxl_parts(folder), add_watermarker=False)
    return quiet(pipe), dict(image=image(), strength=0.7, height=None, width=None, steps=4)


def inpainting(folder):
    pipe = diffusers.StableDiffusionXLInpaintPipeline(**sdxl_parts(folder), add_watermarker=False)
    mask = torch.zeros(1, 1, 128, 192)
    mask[..., :96] = 1
    return quiet(pipe), dict(image=image(), mask_image=mask, strength=0.9, steps=4)


def control_net(folder):
    parts = sdxl_parts(folder)
    torch.manual_seed(7)
    control = diffusers.ControlNetModel.from_unet(parts["unet"]).eval()
    pipe = diffusers.StableDiffusionXLControlNetPipeline(
        **parts, controlnet=control, add_watermarker=False
    )
    return quiet(pipe), dict(image=image())


def adapter(folder):
    torch.manual_seed(8)
    added = diffusers.T2IAdapter(
        3, [16, 32, 32, 32], num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl"
    )
    pipe = diffusers.StableDiffusionXLAdapterPipeline(**sdxl_parts(folder), adapter=added.eval())
    return quiet(pipe), dict(image=image())


def perturbed(folder):
    pipe = diffusers.StableDiffusionXLPAGPipeline(
        **sdxl_parts(folder), pag_applied_layers=["mid"], add_watermarker=False
    )
    return quiet(pipe), {}


HOSTS = [text_to_image, image_to_image, inpainting, control_net, adapter, perturbed]


def run(pipe, dtype=torch.float32, config=None, **call):
    """What S-CFG did in a call as users write it: a prompt and nothing else but sizes."""
    seen = []
    pipe.to(dtype=dtype)
    call = {"prompt": PROMPT, "height": 128, "width": 192, "num_inference_steps": 2, **call}
    call["num_inference_steps"] = call.pop("steps", call["num_inference_steps"])
    call = {key: value for key, value in call.items() if value is not None}
    generator = torch.Generator().manual_seed(0)
    with attach(pipe, config=config or scfg.SCFGConfig(), callback=seen.append):
        pipe(**call, generator=generator, output_type="latent")
    return seen


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_sdxl_without_a_negative_prompt_is_guided_by_its_texts_start(host, folder):
    pipe, call = host(folder)
    ours, cond = run(pipe, **call), run(pipe, config=COND, **call)
    assert len(ours) == len(cond) > 1
    for step, expected in zip(ours, cond, strict=True):
        assert step.start_is_flat.all()
        assert step.foreground.equal(expected.foreground) and step.rate.equal(expected.rate)
        assert 0 < step.foreground.float().mean() < 1
    blurry = run(pipe, negative_prompt="blurry", **call)
    assert not any(step.start_is_flat.any() for step in blurry)


@pytest.mark.parametrize("size", [(128, 192), (256, 128)])
def test_the_foreground_is_the_same_in_every_type(size, folder):
    pipe, _ = text_to_image(folder)
    height, width = size
    noise = torch.randn(1, 4, height // 8, width // 8)
    call = dict(height=height, width=width, steps=1)
    # torch's own bfloat16 attention fails on a machine with AMX that is held to AVX2.
    with sdpa_kernel(SDPBackend.MATH):
        steps = {
            name: run(pipe, dtype, latents=noise.to(dtype), **call)[0]
            for name, dtype in TYPES.items()
        }
    exact = steps["float64"]
    for name, share in (("float32", 1.0), ("bfloat16", 0.9)):  # bfloat16 moves near ties
        agree = (steps[name].foreground == exact.foreground).float().mean()
        assert agree >= share, (name, agree)
        assert steps[name].start_is_flat.all()


def test_empty_negative_prompts_and_a_mixed_batch(folder):
    """An empty string is a prompt, with a START of its own; None is zeros, for a whole call."""
    pipe, _ = text_to_image(folder)
    (empty,) = run(pipe, negative_prompt="", steps=1)
    assert not empty.start_is_flat.any()
    embeds = pipe.encode_prompt([PROMPT, "a dog"], device="cpu", negative_prompt=["", ""])
    text, uncond, pooled, pooled_uncond = embeds
    uncond, pooled_uncond = uncond.clone(), pooled_uncond.clone()
    uncond[1], pooled_uncond[1] = 0, 0
    raw, _, end = spy(pipe)
    (mixed,) = run(
        pipe,
        prompt=None,
        prompt_embeds=text,
        negative_prompt_embeds=uncond,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=pooled_uncond,
        guidance_scale=6.0,
        steps=1,
    )
    end()
    assert mixed.start_is_flat.tolist() == [False, True]
    output, layers = raw[0]
    for config, row in ((scfg.SCFGConfig(), 0), (COND, 1)):
        expected = by_hand(output, layers, 6.0, config=config)
        assert mixed.foreground[row].equal(expected.foreground[row])


def test_modular_and_classic_pipelines_agree_without_a_negative_prompt(folder):
    modular = pytest.importorskip("diffusers.modular_pipelines")
    from scfg.adapters.modular import SemanticGuidance

    pipe = modular.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**sdxl_parts(folder))
    pipe.set_progress_bar_config(disable=True)
    seen = []
    pipe.update_components(guider=SemanticGuidance(guidance_scale=5.0, callback=seen.append))
    generator = torch.Generator().manual_seed(0)
    size = dict(height=128, width=192, num_inference_steps=2)
    pipe(prompt=PROMPT, generator=generator, output_type="latent", output="images", **size)
    classic = run(text_to_image(folder)[0], guidance_scale=5.0)
    for ours, theirs in zip(seen, classic, strict=True):
        assert ours.start_is_flat.all() and ours.foreground.equal(theirs.foreground)
        assert_close(actual=ours.rate, expected=theirs.rate, share=1e-4)


def test_comfyui_conditioning_that_is_zeroed_out_takes_the_texts_start_part_by_part():
    from scfg.adapters.comfyui.regions import Part, compose

    def part(seed, flat=(), **options):
        levels_of = dict(zip((4, 8), ([x] for x in levels(seed, flat=flat)), strict=True))
        return Part(Evidence((24, 28), levels_of), 5, **options)

    settings = dict(size=(24, 28), config=scfg.SCFGConfig(), backend="torch")
    whole = compose(uncond=[part(1, flat=[1])], text=[part(0)], **settings)
    area = dict(area=(24, 28, 0, 0))
    parts = compose(uncond=[part(1, flat=[1], **area)], text=[part(0, **area)], **settings)
    cond = compose(uncond=[part(1)], text=[part(0)], **{**settings, "config": COND})
    for regions in (whole, parts):
        assert regions.start_is_flat.tolist() == [False, True, False]
        assert regions.foreground[1].equal(cond.foreground[1])
        assert not regions.foreground[0].equal(cond.foreground[0])


def test_models_without_a_start_can_choose():
    """DeepFloyd's T5 and Kandinsky's image embeddings: token 0 is a word, both choices are open."""
    from adapter_hosts import deepfloyd

    pipe = deepfloyd()
    embeds = torch.randn(2, 1, 9, 24, generator=torch.Generator().manual_seed(3))
    call = dict(
        prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], num_inference_steps=1,
        guidance_scale=7.0, height=32, width=48, output_type="pt",
    )  # fmt: skip
    rates = {}
    for name, options in (("uncond", {}), ("cond", {"foreground": "cond"}),
                          ("image", {"benchmark": "image"})):  # fmt: skip
        seen = []
        config = scfg.SCFGConfig(map_reduction=2, coarsest_reduction=8, **options)
        with attach(pipe, guidance_scale=7.0, config=config, callback=seen.append):
            pipe(**call, generator=torch.Generator().manual_seed(0))
        rates[name] = seen[0].rate
    assert not rates["uncond"].equal(rates["cond"])
    assert not rates["image"].equal(rates["cond"])
