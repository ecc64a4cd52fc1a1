"""attach: real diffusers pipelines, tiny and random, with S-CFG, without, and afterwards."""

import itertools

import pytest
import torch
from adapter_hosts import (
    CONFIG,
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

import scfg
from scfg.adapters.around import around
from scfg.adapters.diffusers import attach

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "dpmpp": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(height=128, width=192):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(5))


def img2img(folder):
    parts = sd_parts(folder)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    return quiet(pipe), dict(image=image(), strength=0.7, steps=4, height=None, width=None)


def inpaint(folder):
    parts = sd_parts(folder, in_channels=9)
    pipe = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    mask = (image() > 0.5).float()[:, :1]
    return quiet(pipe), dict(image=image(), mask_image=mask)


def controlnet(folder):
    parts = sd_parts(folder)
    net = diffusers.ControlNetModel.from_unet(
        parts["unet"], conditioning_channels=3, load_weights_from_unet=True
    )
    for block in net.controlnet_down_blocks:
        torch.nn.init.normal_(block.weight, std=0.1)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=net.eval(), requires_safety_checker=False
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


HOSTS = {
    "sd": lambda folder: (sd(folder), {}),
    "sd_img2img": img2img,
    "sd_inpaint": inpaint,
    "sd_controlnet": controlnet,
    "sdxl": lambda folder: (sdxl(folder), {}),
    "sdxl_img2img": xl_img2img,
}


def run(pipe, **call):
    """`latents`, for pipelines that take no size too."""
    call = {key: value for key, value in {"height": 128, "width": 192, **call}.items()}
    generator = torch.Generator().manual_seed(call.pop("seed", 0))
    call = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": 6.0, **call}
    call["num_inference_steps"] = call.pop("steps", 2)
    call = {key: value for key, value in call.items() if value is not None}
    return pipe(**call, generator=generator, output_type="latent").images


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
        assert_close(actual=eps, expected=expected.eps, atol=1e-4, what="prediction")
        assert_close(actual=out.rate, expected=expected.rate, atol=1e-5, what="rate")
        assert out.labels.equal(expected.labels) and out.foreground.equal(expected.foreground)
    assert (guided - plain).abs().max() > 1e-3
    assert run(pipe, **call).equal(plain)
    with attach(pipe, config=PLAIN):
        assert_close(actual=run(pipe, **call), expected=plain, rtol=1e-5, atol=1e-5)
    assert run(pipe, **call).equal(plain)


def check_by_hand(pipe, guidance_scale=6.0, **call):
    """Run with `attach`; every prediction must be the one made by hand from the same maps."""
    raw, stepped, end = spy(pipe)
    with attach(pipe):
        result = run(pipe, guidance_scale=guidance_scale, **call)
    end()
    assert len(raw) == len(stepped) > 1
    for (output, layers), eps in zip(raw, stepped, strict=True):
        expected = by_hand(output, layers, guidance_scale).eps
        assert_close(actual=eps, expected=expected, atol=1e-4, what="prediction")
    return result, len(raw)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_steps_with_the_guided_prediction(name, folder):
    pipe = sd(folder)
    pipe.scheduler = SCHEDULERS[name].from_config(pipe.scheduler.config)
    plain = run(pipe, steps=3)
    _, calls = check_by_hand(pipe, steps=3)
    assert calls == (5 if name == "heun" else 3)
    with attach(pipe, config=PLAIN):
        assert_close(actual=run(pipe, steps=3), expected=plain, rtol=1e-5, atol=1e-5)


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
        expected = scfg.sampling.rescale(guided, output.chunk(2)[1], 0.7)
        assert_close(actual=eps, expected=expected, atol=1e-4, what="rescaled prediction")


def test_perturbed_attention_guidance_is_added_to_the_guided_prediction(folder):
    pipe, call = perturbed(folder)
    raw, stepped, end = spy(pipe)
    with attach(pipe):
        run(pipe, **call)
    end()
    for (output, layers), eps in zip(raw, stepped, strict=True):
        _, text, worse = output.chunk(3)
        expected = by_hand(output, layers, 6.0, b=1).eps + 2.0 * (text - worse)
        assert_close(actual=eps, expected=expected, atol=1e-4, what="prediction")


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
        assert_close(actual=eps, expected=expected, atol=1e-4, what="prediction")
        assert variance.equal(output[1:, 3:])
    with attach(pipe, guidance_scale=5.0, config=PLAIN):
        assert_close(actual=run_deepfloyd(pipe, **call), expected=plain, atol=1e-5)
    assert run_deepfloyd(pipe, **call).equal(plain)


def add_lora(pipe):
    """Random LoRA on every attention of the U-Net, large enough to move the maps."""
    from peft import LoraConfig

    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v"]
    lora = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=targets)
    pipe.unet.add_adapter(lora)


def guided(pipe, inside=None, **call):
    """Latents and rates of a run; `inside` is done to the pipeline inside the block."""
    rates = []
    with attach(pipe, callback=lambda out: rates.append(out.rate)):
        if inside is not None:
            inside(pipe)
        return run(pipe, **call), torch.stack(rates)


def test_lora_counts_whether_loaded_before_or_inside_the_block(folder):
    before, after, fused = (sd(folder) for _ in range(3))
    add_lora(before)
    expected = guided(before)
    torch.testing.assert_close(guided(after, inside=add_lora), expected, rtol=0, atol=0)
    add_lora(fused)
    fused.fuse_lora()
    torch.testing.assert_close(guided(fused), expected, rtol=1e-4, atol=1e-4)
    assert (guided(sd(folder))[1] - expected[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("do", "undo"),
    [
        ("enable_attention_slicing", "disable_attention_slicing"),
        ("fuse_qkv_projections", "unfuse_qkv_projections"),
    ],
)
def test_other_attention_of_the_host_gives_the_same(do, undo, folder):
    pipe = sd(folder)
    expected = guided(pipe)
    inside = guided(pipe, inside=lambda pipe: getattr(pipe, do)())
    torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(guided(pipe), expected, rtol=1e-4, atol=1e-4)
    getattr(pipe, undo)()
    torch.testing.assert_close(guided(pipe), expected, rtol=0, atol=0)


def add_ip_adapter(pipe):
    torch.manual_seed(4)
    names = pipe.unet.attn_processors
    cross = [i for i, name in enumerate(names) if name.endswith("attn2.processor")]
    width = {
        name: pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for name in names
    }
    weights = {
        f"{i}.to_{kind}_ip.weight": torch.randn(width[list(names)[i]], 32) * 0.3
        for i in cross
        for kind in "kv"
    }
    projection = {
        "proj.weight": torch.randn(4 * 32, 16),
        "proj.bias": torch.zeros(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    state = {"image_proj": projection, "ip_adapter": weights}
    pipe.unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)


def test_ip_adapter_is_kept_and_the_text_alone_makes_regions(folder):
    image = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(6))
    call = dict(ip_adapter_image_embeds=[image])
    pipe = sd(folder)
    add_ip_adapter(pipe)
    plain = run(pipe, **call)
    check_by_hand(pipe, **call)
    expected = guided(pipe, **call)
    torch.testing.assert_close(
        guided(sd(folder), inside=add_ip_adapter, **call), expected, rtol=0, atol=0
    )
    assert (run(sd(folder)) - plain).abs().max() > 1e-3  # the adapter does something
    assert run(pipe, **call).equal(plain)


def test_weights_offloaded_leaf_by_leaf_are_used_where_they_are(folder):
    from accelerate import cpu_offload

    pipe = sd(folder)
    expected = guided(pipe)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    torch.testing.assert_close(guided(pipe), expected, rtol=0, atol=0)


def compile_outside(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)


def compile_blocks(pipe):
    pipe.unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("compile_unet", [compile_outside, compile_blocks])
def test_compiled_unets_are_guided_or_say_what_to_do(compile_unet, folder):
    torch._dynamo.reset()
    pipe = sd(
        folder,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    config = scfg.SCFGConfig(map_reduction=1, coarsest_reduction=2)
    with attach(pipe, config=config):
        expected = run(pipe)
    plain = run(pipe)
    compile_unet(pipe)
    with attach(pipe, config=config):
        inside = run(pipe)
    assert_close(actual=inside, expected=expected, atol=1e-4)
    assert_close(actual=run(pipe), expected=plain, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"torch\._dynamo\.reset"):
        with attach(pipe, config=config):
            run(pipe)
    torch._dynamo.reset()


def test_module_compiled_in_place_has_its_calls_wrapped_and_not_traced():
    class Sum(torch.nn.Module):
        def forward(self, x):
            return x @ torch.ones(3, 2)

    torch._dynamo.reset()
    module, seen = Sum(), []
    module.compile(backend="eager", fullgraph=True)
    compiled, x = module._compiled_call_impl, torch.ones(1, 3)
    plain = module(x)

    def after(output):
        return output + float(seen[-1])  # would break a graph

    undo = around(module, lambda args, kwargs: seen.append(args[0].sum().item()), after, seen.clear)
    assert module(x).equal(plain + 3) and seen == [3.0]
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 4))
    assert not seen
    undo()
    assert module._compiled_call_impl is compiled and module(x).equal(plain)
    torch._dynamo.reset()


def test_pipeline_is_as_it_was_after_errors(folder):
    pipe = sd(folder)
    plain = run(pipe)
    modules = {name: dict(vars(module)) for name, module in pipe.unet.named_modules()}

    def fail(*_):
        raise KeyboardInterrupt

    for broken in ("callback", "unet", "body"):
        with (
            pytest.raises(KeyboardInterrupt),
            attach(
                pipe, callback=fail if broken == "callback" else None, token_weights={"blue": 2.0}
            ),
        ):
            if broken == "unet":
                hook = pipe.unet.up_blocks[1].register_forward_hook(fail)
            if broken == "body":
                fail()
            run(pipe)
        if broken == "unet":
            hook.remove()
        assert "encode_prompt" not in vars(pipe)
        for name, module in pipe.unet.named_modules():
            assert vars(module) == modules[name]
        assert run(pipe).equal(plain)


def test_two_pipelines_do_not_share_state(folder):
    one, other = sd(folder), sdxl(folder)
    expected, expected_other = guided(one), guided(other, guidance_scale=3.0)
    rates, others = [], []
    with attach(one, callback=rates.append), attach(other, callback=others.append):

        def other_inside(pipe, i, t, kwargs):
            if i == 0:
                nested.append(run(other, guidance_scale=3.0))
            return kwargs

        nested = []
        first = run(one, callback_on_step_end=other_inside)
    assert first.equal(expected[0]) and nested[0].equal(expected_other[0])
    assert torch.stack([out.rate for out in others]).equal(expected_other[1])


def test_window_and_every_leave_out_what_they_should(folder):
    pipe = sd(folder)
    raw, stepped, end = spy(pipe)
    seen = []
    with attach(pipe, callback=seen.append, start=0.25, stop=0.9, every=2):
        run(pipe, steps=8)
    assert len(seen) == 5  # steps 2 to 6
    hand = [by_hand(output, layers, 6.0) for output, layers in raw]
    for step in range(8):
        uncond, text = raw[step][0].chunk(2)
        if 2 <= step < 7:
            out, found = seen[step - 2], hand[step - step % 2]
            assert out.labels.equal(found.labels)
            maps = raw[step - step % 2][1]
            fresh = by_hand(raw[step][0], maps, 6.0)  # regions of then, rates of now
            assert_close(actual=stepped[step], expected=fresh.eps, atol=1e-4)
        else:
            assert_close(actual=stepped[step], expected=uncond + 6 * (text - uncond), atol=1e-4)
    end()


def test_window_counts_the_noise_levels_of_the_run(folder):
    pipe, call = img2img(folder)  # strength 0.7 of 4 steps: it runs 2
    seen = []
    with attach(pipe, callback=seen.append, start=0.5):
        run(pipe, **call)
    assert len(seen) == 1
    pipe = sd(folder)
    pipe.scheduler = SCHEDULERS["heun"].from_config(pipe.scheduler.config)
    with attach(pipe, callback=seen.append, stop=0.5):
        run(pipe, steps=4)  # levels 0, 1 1, 2 2, 3 3
    assert len(seen) == 1 + 3


def test_weighted_phrase_has_its_rate_multiplied(folder):
    pipe = sd(folder)
    tokens = pipe.tokenizer(PROMPT).input_ids
    inside = range(len(tokens) - 1 - len("square") - 1, len(tokens) - 1)  # blue + 6 letters
    plain, weighted, by_tensor = [], [], []
    prompts = [PROMPT, "a red dog"]
    call = dict(prompt=prompts, negative_prompt=None, num_images_per_prompt=2, steps=1)
    with attach(pipe, callback=plain.append):
        run(pipe, **call)
    with attach(pipe, callback=weighted.append, token_weights={"blue square": 1.5}):
        run(pipe, **call)
    table = torch.ones(2, 77)
    table[0, list(inside)] = 1.5
    with attach(pipe, callback=by_tensor.append, token_weights=table):
        run(pipe, **call)
    assert weighted[0].rate.equal(by_tensor[0].rate)
    assert weighted[0].labels.equal(plain[0].labels)
    assert weighted[0].rate[2:].equal(plain[0].rate[2:])  # the other prompt's images
    labels = plain[0].labels
    chosen = ((labels >= inside[0]) & (labels <= inside[-1])).float()
    chosen = chosen.repeat_interleave(4, 1).repeat_interleave(4, 2)[:2]  # of the first prompt
    factor = (weighted[0].rate / plain[0].rate)[:2, 0]
    for region, value in ((chosen, 1.5), (1 - chosen, 1.0)):
        inner = torch.nn.functional.max_pool2d(1 - region, 3, 1, 1) == 0  # the blur ends there
        assert inner.any()
        assert_close(actual=factor[inner], expected=factor[inner] * 0 + value, atol=1e-6)


def test_live_guidance_scale_is_followed_and_no_guidance_is_left_alone(folder):
    pipe = sd(folder)
    scales = itertools.cycle([4.0, 9.0])

    def change(pipe, i, t, kwargs):
        pipe._guidance_scale = next(scales)
        return kwargs

    raw, stepped, end = spy(pipe)
    with attach(pipe):
        run(pipe, steps=3, callback_on_step_end=change)
    end()
    for (output, layers), eps, scale in zip(raw, stepped, (6.0, 4.0, 9.0), strict=True):
        assert_close(actual=eps, expected=by_hand(output, layers, scale).eps, atol=1e-4)
    plain, seen = run(pipe, guidance_scale=1.0), []
    with attach(pipe, callback=seen.append):
        assert run(pipe, guidance_scale=1.0).equal(plain)
    assert not seen


def test_errors_name_what_is_wrong(folder):
    pipe = sd(folder)
    bad = [
        (dict(guidance_scale=7.5), "guidance_scale must be None"),
        (dict(start=0.5, stop=0.5), "start < stop"),
        (dict(every=0), "every must be"),
    ]
    for options, message in bad:
        with pytest.raises(ValueError, match=message), attach(pipe, **options):
            pass
    with pytest.raises(ValueError, match="must have a U-Net"), attach(object()):
        pass
    with pytest.raises(ValueError, match="guidance_scale must be given"), attach(deepfloyd()):
        pass
    with pytest.raises(ValueError, match="guided already"), attach(pipe), attach(pipe):
        pass
    with (
        pytest.raises(ValueError, match="'green'.*not in"),
        attach(pipe, token_weights={"green": 2.0}),
    ):
        run(pipe)
    with (
        pytest.raises(ValueError, match="only its embeddings"),
        attach(pipe, token_weights={"blue": 2.0}),
    ):
        run(pipe, prompt=None, prompt_embeds=torch.zeros(1, 77, 32), negative_prompt=None)


def test_three_branches_of_another_kind_are_refused(folder):
    parts = sd_parts(folder, in_channels=8)
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    call = dict(image=image(128, 128), height=None, width=None, prompt=[PROMPT] * 2)
    call["negative_prompt"] = None
    with pytest.raises(RuntimeError, match="same latents"), attach(quiet(pipe)):
        run(pipe, **call)


def test_config_reaches_the_pipeline(folder):
    pipe = sd(folder)
    config = scfg.SCFGConfig(map_reduction=2, coarsest_reduction=4, foreground="cond")
    seen = []
    with attach(pipe, config=config, backend="torch", callback=seen.append):
        run(pipe)
    assert seen[0].labels.shape == (1, 8, 12)
    assert CONFIG != config
