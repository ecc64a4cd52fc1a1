"""The ComfyUI nodes against a real ModelPatcher and sampler, where ComfyUI can be imported."""

import asyncio
import importlib.util
import uuid
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close

import scfg

if importlib.util.find_spec("comfy") is None:
    pytest.skip("ComfyUI is not on the path", allow_module_level=True)

from comfy_hosts import (  # noqa: E402
    CONFIG,
    PLAIN,
    SDXL,
    attention_basic,
    check,
    guided,
    hooks,
    little_memory,
    make,
    run,
    text,
)

from scfg.adapters.comfyui import comfy_entrypoint  # noqa: E402
from scfg.adapters.comfyui.nodes import (  # noqa: E402
    SemanticGuidance,
    SemanticGuidanceView,
    patch,  # noqa: E402
)
from scfg.adapters.comfyui.regions import clip_weights, parse_phrases  # noqa: E402
from scfg.adapters.comfyui.run import KEY, ComfyRun  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.mark.parametrize("b", [1, 2])
def test_joint_batch_is_guided_as_by_hand(model, b):
    check(model, [[1, 0]], b=b)


def test_separate_calls_are_guided_as_by_hand(model, monkeypatch):
    with little_memory(monkeypatch):
        check(model, [[1], [0]])


def test_sdxl_is_guided_as_by_hand():
    model = make("SDXL", SDXL)
    pooled = dict(pooled_output=torch.zeros(1, 1280))
    check(model, [[1, 0]], positive=text(1, **pooled), negative=text(2, **pooled))


def test_repeated_tokens_count_once_and_every_start_is_start(model):
    def fold(cross):  # of both: 77 tokens twice, or two chunks, which differ in the rest
        start = cross[..., :77] + cross[..., 77:]
        once = torch.cat(
            [start[..., :1], cross[..., 1:77], 0 * start[..., :1], cross[..., 78:]], -1
        )
        twice = torch.cat([start, torch.zeros_like(start)], -1)
        return twice if cross[..., 1:77].allclose(cross[..., 78:]) else once

    check(model, [[1, 0]], fold=fold, positive=text(1, 154))
    check(model, [[1, 0]], fold=fold, negative=text(2, 154))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_rate_of_1_is_the_hosts_own_guidance_which_is_left_as_found(model, sampler):
    plain = run(model, sampler=sampler)
    one, _ = guided(model, PLAIN)
    assert_close(actual=run(one, sampler=sampler), expected=plain, share=1e-5)
    patched, guide = guided(model)
    assert (run(patched, sampler=sampler) - plain).abs().max() > 1e-2
    assert len(guide.history) == (3 if sampler == "heun" else 2)
    assert run(model, sampler=sampler).equal(plain)
    assert hooks(model) == 0


def test_each_area_has_the_regions_of_its_prompt(model):
    left, right = (16, 12, 0, 0), (16, 12, 0, 12)
    prompts = text(1, area=left) + text(3, area=right)
    patched, guide = guided(model)
    run(patched, positive=prompts, steps=1)
    labels = guide.history[0].labels
    assert labels.shape == (1, 16, 24)
    assert (labels[:, :, :12] < 77).all() and (labels[:, :, 12:] >= 77).all()
    assert (labels < 154).all()
    one, _ = guided(model, PLAIN)
    plain = run(model, positive=prompts)
    assert_close(actual=run(one, positive=prompts), expected=plain, share=1e-5)


def test_each_mask_has_the_regions_of_its_prompt(model):
    mask = torch.zeros(1, 16, 24)
    mask[:, 5:, :7] = 1
    prompts = text(1, mask=mask) + text(3, mask=1 - mask)
    patched, guide = guided(model)
    run(patched, positive=prompts, steps=1, b=2)
    inside = mask.bool().expand(2, -1, -1)
    assert (guide.history[0].labels < 77).equal(inside)


def test_prompts_of_some_steps_only_take_part_there(model):
    late = text(1, start_percent=0.0, end_percent=0.5) + text(3, start_percent=0.5, end_percent=1.0)
    patched, guide = guided(model)
    run(patched, positive=late, steps=4)
    assert len(guide.history) == 4
    assert all((out.labels < 77).all() for out in guide.history)


def test_no_guidance_is_left_alone(model):
    patched, guide = guided(model)
    assert run(patched, cfg=1.0).equal(run(model, cfg=1.0))
    assert not guide.history


def test_other_patches_of_attention_and_guidance_are_kept(model):
    def rescale(args):
        return (args["cond"] * 0.9 + args["uncond"] * 0.1) * 2

    def replace(q, k, v, extra, mask=None):
        return attention_basic(q, k, v, extra["n_heads"])

    other = model.clone()
    other.set_model_attn1_replace(replace, "middle", 0)
    other.set_model_attn2_replace(replace, "output", 3)
    other.set_model_attn2_patch(lambda n, context, value, extra: (n, context * 1.5, value))
    check(other, [[1, 0]])
    other.set_model_sampler_cfg_function(rescale)
    plain = run(other)
    one, _ = guided(other, PLAIN)
    assert_close(actual=run(one), expected=plain, share=1e-5)
    patched, guide = guided(other)
    assert (run(patched) - plain).abs().max() > 1e-2


def test_clones_and_second_nodes_do_what_one_does(model):
    patched, _ = guided(model)
    expected = run(patched)
    clone = patched.clone()
    clone.set_model_sampler_post_cfg_function(lambda args: args["denoised"])
    assert run(clone).equal(expected)
    twice, guide = guided(patched)
    assert run(twice).equal(expected) and len(guide.history) == 2
    assert run(patched).equal(expected)
    other, _ = guided(make(), scfg.SCFGConfig(propagation="none"))
    run(other)
    assert run(patched).equal(expected)


def test_window_and_every(model):
    patched, guide = guided(model, start=0.25, stop=0.9, every=2)
    run(patched, steps=8)
    assert len(guide.history) == 5  # steps 2 to 6
    same = [guide.history[i].labels.equal(guide.history[i + 1].labels) for i in range(0, 4, 2)]
    assert all(same)
    always, every_step = guided(model)
    run(always, steps=8)
    assert len(every_step.history) == 8
    plain, never = guided(model, start=0.0, stop=0.01)
    assert run(plain).equal(run(model)) and not never.history


def test_model_without_such_blocks_is_refused():
    odd = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="found none"):
        patch(odd, ComfyRun(CONFIG))


def test_hooks_leave_after_errors(model):
    patched, guide = guided(model)
    plain = run(model)

    def fail(args):
        raise OSError

    patched.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(OSError):
        run(patched)
    assert run(model).equal(plain) and hooks(model) == 0


def clip():
    """A CLIP that gives numbers to words, in chunks of 8."""

    def tokenize(prompt):
        ids = [1000 + sum(map(ord, word)) for word in prompt.split()]
        chunks = [ids[i : i + 6] for i in range(0, max(len(ids), 1), 6)]
        return {"l": [[(i, 1.0) for i in [1, *c, 2, *[2] * (6 - len(c))]] for c in chunks]}

    return SimpleNamespace(tokenize=tokenize)


def test_phrases_are_found_in_chunks_and_weighted(model):
    assert parse_phrases("blue square: 1.5\n\n a: b: 2 ") == {"blue square": 1.5, "a: b": 2.0}
    for bad in ("blue", "blue: -1", ": 2", "blue: x"):
        with pytest.raises(ValueError, match="phrase: factor"):
            parse_phrases(bad)
    prompt = "a red circle and a green blue square"
    table = clip_weights(clip(), prompt, {"blue square": 1.5, "red": 2.0})
    assert table.shape == (1, 16)
    assert [i for i in range(16) if table[0, i] != 1] == [2, 9, 10]
    weights = torch.full((1, 77), 1.5)
    plain, weighted = guided(model), guided(model, token_weights=weights)
    run(plain[0], steps=1), run(weighted[0], steps=1)
    rates = plain[1].history[0].rate, weighted[1].history[0].rate
    assert_close(actual=rates[1], expected=1.5 * rates[0], share=1e-6)


def test_nodes_guide_and_show():
    extension = asyncio.run(comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    assert [node.GET_SCHEMA().node_id for node in nodes] == [
        "SemanticGuidance",
        "SemanticGuidanceView",
    ]
    defaults = {
        item.id: item.default
        for item in SemanticGuidance.define_schema().inputs
        if getattr(item, "default", None) is not None
    }
    model = make()
    patched = SemanticGuidance.execute(model, **defaults, propagation="paper").args[0]
    expected, guide = guided(model)
    samples = run(patched, b=2)
    assert samples.equal(run(expected, b=2))
    regions, rate = SemanticGuidanceView.execute(patched, {"samples": samples}, -1).args
    assert regions.shape == rate.shape == (2, 128, 192, 3)
    labels = patched.attachments[KEY].history[-1].labels
    colours = {tuple(c) for c in regions.flatten(0, 2).tolist()}
    assert len(colours) == min(len(labels.unique()), 14)  # START, which is grey, owns nothing here
    assert labels.min() > 0
    with pytest.raises(ValueError, match="step must be"):
        SemanticGuidanceView.execute(patched, {"samples": samples}, 5)
    with pytest.raises(ValueError, match="must come from"):
        SemanticGuidanceView.execute(model, {"samples": samples}, 0)
    with pytest.raises(ValueError, match="need clip"):
        SemanticGuidance.execute(model, **defaults, propagation="paper", phrases="blue: 2")


def test_prompts_under_one_id_are_told_apart():
    guide, name = ComfyRun(CONFIG), uuid.uuid4()
    prompts = [{"uuid": name}, {"uuid": name}]
    told = guide.begin_step([[{"uuid": uuid.uuid4()}], prompts], torch.ones(1), {})
    again = guide.begin_step([[{"uuid": uuid.uuid4()}], prompts], torch.ones(1), {})
    assert len({prompt["uuid"] for prompt in told[1]}) == 2
    assert [p["uuid"] for p in told[1]] == [p["uuid"] for p in again[1]]  # caches go by them
