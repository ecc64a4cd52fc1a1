"""attach on diffusers' pipelines with a transformer: their own formula, their own runs."""

import functools
import re

import pytest
import torch
from conftest import assert_close
from transformer_hosts import build, diffusers, scaled
from transformer_pipes import PIPES, G, draw, given, pipeline

import scfg
from scfg.adapters.diffusers import attach

REAL = scfg.SCFGConfig(min_peak=0.0)  # random weights say nothing, and would be left to plain CFG


def constant(rate):
    return scfg.SCFGConfig(rate_min=rate, rate_max=rate, max_scale=None, min_peak=0.0)


def within(expected, error):
    """An absolute error as a share of the largest value."""
    return error / expected.abs().max().item()


def held(pipe):
    """Attributes and hooks of every module of the transformer."""
    return [
        (set(vars(m)), len(m._forward_hooks), len(m._forward_pre_hooks))
        for m in pipe.transformer.modules()
    ]


@pytest.fixture(params=PIPES)
def name(request):
    return request.param


def test_rate_one_is_the_host_a_constant_rate_another_scale_and_leaving_leaves_nothing(name):
    pipe, call, key = pipeline(name)
    g = given(key, name)
    plain = draw(name, pipe, call, key)
    before = held(pipe)
    with attach(pipe, g, constant(1.0)):
        assert_close(
            actual=draw(name, pipe, call, key),
            expected=plain,
            share=within(plain, 1e-5),
            what="rate 1",
        )
    expected = draw_scaled(name, 1.5 * G)
    with attach(pipe, g, constant(1.5)):
        assert_close(
            actual=draw(name, pipe, call, key),
            expected=expected,
            share=within(expected, 2e-5),
            what="rate 1.5",
        )
    seen = []
    with attach(pipe, g, REAL, callback=seen.append):
        result = draw(name, pipe, call, key)
    assert not result.equal(plain) and torch.isfinite(result).all()
    assert len(seen) == 3 and {out.rule for out in seen} == {"image"}
    with attach(pipe, g, REAL, callback=seen.append, observe=True):
        assert draw(name, pipe, call, key).equal(plain)
    assert torch.stack([x.rate for x in seen[:1]]).equal(torch.stack([x.rate for x in seen[3:4]]))
    assert held(pipe) == before and "encode_prompt" not in vars(pipe)
    assert draw(name, pipe, call, key).equal(plain)


def draw_scaled(name, g):
    """A run of another pipeline, of another guidance scale."""
    pipe, call, key = pipeline(name)
    return draw(name, pipe, call, key, g=g)


@pytest.mark.parametrize("name", ["sd3", "cogview4", "hunyuan", "wan", "z_image"])
def test_both_branches_are_recorded_where_the_foreground_is_the_unconditional_ones(name):
    pipe, call, key = pipeline(name)
    seen = []
    config = scfg.SCFGConfig(benchmark="foreground", min_peak=0.0)
    with attach(pipe, given(key, name), config, callback=seen.append):
        draw(name, pipe, call, key)
    assert {out.rule for out in seen} == {"START of the unconditional branch"}
    assert any(0 < out.foreground.float().mean() < 1 for out in seen)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_window_and_kept_regions(name):
    pipe, call, key = pipeline(name)
    seen = []
    options = dict(start=0.25, stop=0.75, every=2, callback=seen.append)
    with attach(pipe, given(key, name), REAL, **options):
        draw(name, pipe, call, key, steps=8)
        draw(name, pipe, call, key, steps=8)
    assert len(seen) == 8
    for first in (0, 2, 4, 6):
        assert seen[first].labels is seen[first + 1].labels
    assert seen[0].labels is not seen[2].labels and seen[4].labels.equal(seen[0].labels)


def test_guidance_that_is_off_is_said_once():
    pipe, call, key = pipeline("flux")
    without = {k: v for k, v in call.items() if not k.startswith("negative")}
    plain = draw("flux", pipe, without, key)
    with pytest.warns(UserWarning, match="true_cfg_scale") as caught:
        with attach(pipe, G, REAL):
            assert draw("flux", pipe, without, key).equal(plain)
    assert len([w for w in caught if "S-CFG" in str(w.message)]) == 1
    pipe, call, key = pipeline("sd3")
    plain = draw("sd3", pipe, call, key, g=1.0)
    with pytest.warns(UserWarning, match="S-CFG does nothing"), attach(pipe, None, REAL):
        assert draw("sd3", pipe, call, key, g=1.0).equal(plain)


def test_a_scale_that_cannot_be_read_has_to_be_given():
    for name in ("flux", "qwen", "pixart"):
        with pytest.raises(ValueError, match="be given as in the call"), attach(pipeline(name)[0]):
            pass
    pipe = pipeline("sd3")[0]
    with pytest.raises(ValueError, match="must be None"), attach(pipe, 4.0):
        pass
    with attach(pipe), pytest.raises(ValueError, match="guided already"), attach(pipe):
        pass
    pipe.transformer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layouts.*CALLS"), attach(pipe):
        pass


def test_skip_layer_guidance_passes_untouched():
    pipe, call, key = pipeline("sd3")
    skip = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1)
    plain = draw("sd3", pipe, call, key, **skip)
    with attach(pipe, None, constant(1.0)):
        actual = draw("sd3", pipe, call, key, **skip)
    assert_close(
        actual=actual, expected=plain, share=within(plain, 1e-5), what="with skipped layers"
    )
    assert not plain.equal(draw("sd3", pipe, call, key))


def test_two_transformers_share_a_run():
    torch.manual_seed(5)
    second = scaled(type(build("wan").model)(**build("wan").model.config))
    pipe, call, key = pipeline("wan", transformer_2=second, boundary_ratio=0.6)
    plain = draw("wan", pipe, call, key, steps=4, guidance_scale_2=3.0)
    with attach(pipe, None, constant(1.0)):
        actual = draw("wan", pipe, call, key, steps=4, guidance_scale_2=3.0)
    assert_close(actual=actual, expected=plain, share=within(plain, 1e-5), what="rate 1")
    expected = draw("wan", pipe, call, key, g=6.0, steps=4, guidance_scale_2=4.5)
    for every in (1, 4):  # regions of the first stand for the second
        with attach(pipe, None, constant(1.5), every=every):
            actual = draw("wan", pipe, call, key, steps=4, guidance_scale_2=3.0)
        assert_close(
            actual=actual,
            expected=expected,
            share=within(expected, 2e-5),
            what=f"rate 1.5, every {every}",
        )


def test_a_cache_that_skips_layers_keeps_the_regions_and_says_so():
    pipe, call, key = pipeline("flux")
    cache = diffusers.FirstBlockCacheConfig(threshold=1e9)  # all but the first step are skipped
    pipe.transformer.enable_cache(cache)
    seen = []
    with attach(pipe, G, REAL, callback=seen.append):
        draw("flux", pipe, call, key)
    assert len(seen) == 3 and seen[0].rule == "image"
    assert all("cache skipped layers" in out.rule for out in seen[1:])
    assert seen[2].labels is seen[0].labels


def test_phrases_are_words_of_the_prompt_in_every_copy():
    pipe, call, key = pipeline("sd3")

    class Tokenizer:  # each half of a word is a token
        def __call__(self, text, add_special_tokens=True):
            ids = [
                hash(half) for w in text.split() for half in (w[: len(w) // 2], w[len(w) // 2 :])
            ]
            return type("Ids", (), {"input_ids": [i for i in ids if i != hash("")]})

    embeds = {k: call.pop(k) for k in list(call) if "embeds" in k}
    order = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds"]
    order.append("negative_pooled_prompt_embeds")
    pipe.tokenizer = pipe.tokenizer_2 = pipe.tokenizer_3 = Tokenizer()
    long = torch.cat([embeds["prompt_embeds"]] * 5, dim=1)[:, :90]  # 77 of CLIP, 13 of T5
    embeds |= dict(prompt_embeds=long, negative_prompt_embeds=long.flip(1))
    encode = lambda self, prompt=None, **rest: tuple(embeds[k] for k in order)  # noqa: E731
    pipe.__class__ = type("Pipe", (type(pipe),), {"encode_prompt": encode})
    plain, weighted = [], []
    with attach(pipe, None, REAL, callback=plain.append):
        draw("sd3", pipe, call, key, prompt="red square, and blue")
    with attach(pipe, None, REAL, callback=weighted.append, token_weights={"red square": 2.0}):
        draw("sd3", pipe, call, key, prompt=["red square, and blue"])
    assert set(plain[0].labels.unique().tolist()) <= {1, 3, 5, 7}  # the first halves, after START
    inside = torch.isin(plain[0].labels, torch.tensor([1, 3]))
    assert 0 < inside.float().mean() < 1
    ratio = (weighted[0].rate / plain[0].rate)[:, 0]
    inner = torch.nn.functional.interpolate(inside[:, None].float(), scale_factor=2)
    deep = 1 - torch.nn.functional.max_pool2d(1 - inner, 3, 1, 1)[:, 0]  # away from the blur
    outer = 1 - torch.nn.functional.max_pool2d(inner, 3, 1, 1)[:, 0]
    assert_close(actual=ratio[deep > 0], expected=torch.full_like(ratio[deep > 0], 2), share=1e-5)
    assert_close(actual=ratio[outer > 0], expected=torch.ones_like(ratio[outer > 0]), share=1e-5)
    assert deep.any() and outer.any()
    own = pipe.encode_prompt = functools.partial(encode, pipe)
    with attach(pipe, None, REAL, token_weights={"red square": 2.0}):
        draw("sd3", pipe, call, key, prompt="red square, and blue")
    assert vars(pipe)["encode_prompt"] is own
    missing = pytest.raises(ValueError, match=re.escape("'green'"))
    with attach(pipe, None, REAL, token_weights={"green": 2.0}), missing:
        draw("sd3", pipe, call, key, prompt="red square")


def lora(pipe):
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v"]
    torch.manual_seed(4)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=targets)
    )


def cast(pipe):
    """Weights are kept in eight bits, and widened for each module as it runs."""
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )


def offload(pipe):
    """Weights come when a group of modules runs, and go after it."""
    pipe.transformer.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )


def plainly(change, pipe, name):
    """A pipeline of the same weights, that is nothing but them."""
    same, _, _ = pipeline(name)
    if change is lora:
        lora(same)
        same.transformer.fuse_lora()
    for ours, theirs in zip(
        same.transformer.parameters(), pipe.transformer.parameters(), strict=change is not lora
    ):
        if change is cast and theirs.dtype == torch.float8_e4m3fn:
            ours.data = theirs.float()
    return same


@pytest.mark.parametrize("change", [lora, cast, offload], ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_what_hosts_do_to_weights_reaches_both_the_network_and_what_is_recorded(name, change):
    pipe, call, key = pipeline(name)
    g, unchanged = given(key, name), draw(name, pipe, call, key)
    change(pipe)
    plain = draw(name, pipe, call, key)
    assert plain.equal(unchanged) == (change is offload)
    with attach(pipe, g, constant(1.0)):
        actual = draw(name, pipe, call, key)
    assert_close(actual=actual, expected=plain, share=within(plain, 1e-5), what="rate 1")
    seen, expected = [], []
    for drawn, by in ((pipe, seen), (plainly(change, pipe, name), expected)):
        with attach(drawn, g, REAL, callback=by.append):
            draw(name, drawn, call, key)
    assert_close(actual=seen[0].rate, expected=expected[0].rate, share=1e-4, what="rates")
    assert (seen[0].labels == expected[0].labels).float().mean() > 0.98  # but for ties
    assert draw(name, pipe, call, key).equal(plain)


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_in_bfloat16_rate_one_is_the_host_as_far_as_its_own_rounding(name):
    pipe, call, key = pipeline(name)
    exact = draw(name, pipe, call, key)
    pipe.to(torch.bfloat16)
    low = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }
    plain = draw(name, pipe, low, key)
    error = (plain.float() - exact).abs().max().item()
    with attach(pipe, given(key, name), constant(1.0)):
        actual = draw(name, pipe, low, key)
    assert actual.dtype == torch.bfloat16
    assert_close(actual=actual, expected=exact, share=within(exact, 2 * error), what="rate 1")
    seen = []
    with attach(pipe, given(key, name), REAL, callback=seen.append):
        draw(name, pipe, low, key)
    assert all(torch.isfinite(out.rate).all() and out.rate.std() > 0 for out in seen)


def test_latents_that_differ_are_not_taken_for_two_branches(monkeypatch):
    pipe, call, key = pipeline("pixart")
    rows = torch.arange(2.0).view(2, 1, 1, 1)
    monkeypatch.setattr(pipe.scheduler, "scale_model_input", lambda x, t: x + rows)
    with pytest.raises(RuntimeError, match="same latents for two branches, got .* of 2 rows"):
        with attach(pipe, given(key, "pixart")):
            draw("pixart", pipe, call, key)
