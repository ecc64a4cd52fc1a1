"""`generate`: what it draws, what it traces, and what a picture depends on."""

import pytest
import torch
from conftest import assert_close
from tiny import generate, tiny_model

from scfg import sampling
from scfg.models.embedded import CONFIG
from scfg.recording.predictor import guided

PROMPTS = ["a striped red penguin on a green background", "a blue star on a red background"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def start(seed):
    return torch.randn(1, 48, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_scale_one_is_sampling_with_the_text_alone(model):
    context = model.encode(PROMPTS[:1])
    latents = sampling.ddim(lambda x, t: model.unet(x, t, context), start(3), model.schedule, 4)
    actual = generate(model, PROMPTS[:1], [3], method="cfg", guidance_scale=1.0, steps=4)
    assert_close(actual=actual.images, expected=model.decode(latents), share=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_scfg_images_regions_and_rates_are_those_of_the_public_predictor(model, sampler):
    uncond, cond = model.encode([""]), model.encode(PROMPTS[:1])
    steps = []
    predictor = guided(model.unet, 2.5, CONFIG, callback=steps.append)
    run = getattr(sampling, sampler)
    latents = run(lambda x, t: predictor(x, t, uncond, cond), start(3), model.schedule, 4)
    predictor.remove()
    actual = generate(model, PROMPTS[:1], [3], steps=4, sampler=sampler, trace=True)
    assert_close(actual=actual.images, expected=model.decode(latents), share=1e-6)
    for step, expected in zip(actual.trace, steps, strict=True):
        assert step.labels.equal(expected.labels)
        assert step.foreground.equal(expected.foreground)
        assert_close(actual=step.rate, expected=expected.rate[:, 0], share=1e-6)
    assert actual.images.isfinite().all() and actual.images.std() > 0.01


def test_the_last_prediction_of_ddim_is_the_image(model):
    result = generate(model, PROMPTS, [0, 1], steps=3, trace=True)
    assert [step.t for step in result.trace] == model.schedule.timesteps(3)
    assert_close(actual=result.trace[-1].x0, expected=result.images, share=1e-5)


def test_recording_leaves_plain_cfg_as_it_is(model):
    silent = generate(model, PROMPTS, [0, 1], method="cfg", steps=3)
    traced = generate(model, PROMPTS, [0, 1], method="cfg", steps=3, trace=True)
    assert traced.images.equal(silent.images)
    assert len(traced.trace) == 3 and not silent.trace


@pytest.mark.parametrize("method", ["cfg", "scfg"])
def test_an_image_does_not_depend_on_its_batch(model, method):
    both = generate(model, PROMPTS, [7, 8], method=method, steps=3)
    alone = generate(model, PROMPTS[1:], [8], method=method, steps=3)
    assert_close(actual=both.images[1:], expected=alone.images, share=1e-4)
    assert both.seeds == (7, 8) and both.prompts == tuple(PROMPTS)


def test_words_stand_at_their_token_and_markers_have_none(model):
    (words,) = generate(model, PROMPTS[1:], [0], steps=1).words
    assert words == (None, *PROMPTS[1].split(), *[None] * 16)


def test_ancestral_noise_comes_from_the_seed(model):
    draw = {"sampler": "euler_ancestral", "steps": 3}
    first, again = (generate(model, PROMPTS[:1], [5], **draw).images for _ in range(2))
    other = generate(model, PROMPTS[:1], [5], sampler="ddim", steps=3).images
    assert first.equal(again)
    assert (first - other).abs().max() > 0.1


def test_the_callback_runs_once_a_step_and_no_hook_stays(model):
    calls = []
    generate(model, PROMPTS, [0, 1], steps=3, callback=lambda: calls.append(1))
    assert len(calls) == 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.unet.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["a red hippo"]}, "hippo"),
        ({"seeds": [0, 1]}, "seeds must be one per prompt, got 2 for 1"),
        ({"prompts": [], "seeds": []}, "seeds must be one per prompt"),
        ({"method": "magic"}, "method must be one of .* got 'magic'"),
        ({"sampler": "heun"}, "sampler must be one of .* got 'heun'"),
        ({"steps": 0}, "steps"),
        ({"guidance_scale": 0.0}, "guidance_scale"),
        (
            {"prompts": PROMPTS, "seeds": [0, 1], "sampler": "euler_ancestral"},
            "one image at a time",
        ),
    ],
)
def test_bad_arguments_are_named(model, change, message):
    arguments = {"prompts": PROMPTS[:1], "seeds": [0], "steps": 1, **change}
    with pytest.raises(ValueError, match=message):
        generate(model, **arguments)


def test_outside_the_window_guidance_is_plain(model):
    whole, plain = (generate(model, PROMPTS[:1], [3], method=m, steps=4) for m in ("scfg", "cfg"))
    late = generate(model, PROMPTS[:1], [3], steps=4, start=0.5, trace=True)
    plain_x0 = generate(model, PROMPTS[:1], [3], method="cfg", steps=4, trace=True).trace
    for i in (0, 1):
        assert late.trace[i].x0.equal(plain_x0[i].x0)
        assert (late.trace[i].rate == 1).all()
        assert late.trace[i].labels.equal(late.trace[2].labels)
    assert (late.trace[2].rate != 1).any()
    assert not late.trace[2].x0.equal(plain_x0[2].x0)
    assert not late.images.equal(whole.images) and not late.images.equal(plain.images)
    with pytest.raises(ValueError, match="start < stop"):
        generate(model, PROMPTS[:1], [3], steps=4, start=0.7, stop=0.2)


def test_regions_are_kept_between_every_so_many_steps_and_rates_are_not(model):
    trace = generate(model, PROMPTS[:1], [3], steps=4, every=2, trace=True).trace
    assert trace[0].labels.equal(trace[1].labels) and trace[2].labels.equal(trace[3].labels)
    assert not trace[0].rate.equal(trace[1].rate)
    fresh = generate(model, PROMPTS[:1], [3], steps=4, trace=True).trace
    assert trace[0].labels.equal(fresh[0].labels)


def test_a_phrase_multiplies_the_rate_of_its_words(model):
    weights = {"striped red penguin": 2.0}
    plain = generate(model, PROMPTS, [3, 4], steps=1, trace=True).trace[0]
    weighted = generate(model, PROMPTS, [3, 4], steps=1, trace=True, token_weights=weights).trace[0]
    ratio = weighted.rate / plain.rate
    inside = torch.isin(plain.labels[0], torch.tensor([2, 3, 4]))  # START, a, striped, red, penguin
    deep = torch.nn.functional.avg_pool2d(inside[None].float(), 3, 1, 1, False, False)[0]
    assert_close(
        actual=ratio[0][deep > 0.99],
        expected=torch.full_like(ratio[0][deep > 0.99], 2.0),
        share=1e-5,
    )
    assert_close(
        actual=ratio[0][deep < 0.01], expected=torch.ones_like(ratio[0][deep < 0.01]), share=1e-5
    )
    assert_close(actual=ratio[1], expected=torch.ones_like(ratio[1]), share=1e-6)
    assert (deep > 0.99).any() or (deep < 0.01).any()
    with pytest.raises(ValueError, match="green star"):
        generate(model, PROMPTS[:1], [3], steps=1, token_weights={"green star": 2.0})
