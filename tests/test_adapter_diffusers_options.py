"""attach: windows, kept regions, weights of phrases, errors, and what is left behind."""

import itertools

import pytest
import torch
from adapter_hosts import (
    PROMPT,
    by_hand,
    deepfloyd,
    diffusers,
    sd,
    sd_parts,
    sdxl,
    spy,
)
from conftest import assert_close
from diffusers_runs import SCHEDULERS, guided, image, img2img, quiet, run

import scfg
from scfg.adapters.diffusers import attach


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


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
            assert_close(actual=stepped[step], expected=fresh.eps, share=1e-4)
        else:
            assert_close(actual=stepped[step], expected=uncond + 6 * (text - uncond), share=1e-4)
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
        assert_close(actual=factor[inner], expected=factor[inner] * 0 + value, share=1e-6)


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
        assert_close(actual=eps, expected=by_hand(output, layers, scale).eps, share=1e-4)
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
    with pytest.raises(ValueError, match="pipe.transformer, got object"), attach(object()):
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
