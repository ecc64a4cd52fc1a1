"""The ComfyUI nodes against a real ModelPatcher and sampler, where ComfyUI can be imported."""

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

from scfg.adapters.comfyui.nodes import (  # noqa: E402
    SemanticGuidance,
    SemanticGuidanceMask,
    SemanticGuidanceView,
)
from scfg.adapters.comfyui.patch import patch  # noqa: E402
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
    nowhere, _ = guided(model, start=0.0, stop=0.01)
    with pytest.raises(ValueError, match="a step of 2 between them"):
        run(nowhere)


def test_model_without_such_blocks_is_refused():
    odd = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="Linear is neither a U-Net nor a transformer"):
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


def execute(node, **given):
    """A node as the graph calls it, with its defaults."""
    inputs = {item.id: getattr(item, "default", None) for item in node.define_schema().inputs}
    wanted = {name: value for name, value in inputs.items() if value is not None} | given
    return node.execute(**wanted).args


def test_nodes_guide_and_show(model):
    (patched,) = execute(SemanticGuidance, model=model)
    expected, guide = guided(model)
    samples = run(patched, b=2)
    assert samples.equal(run(expected, b=2))
    look = dict(model=patched, samples={"samples": samples})
    regions, rate = execute(SemanticGuidanceView, **look)
    assert regions.shape == rate.shape == (2, 128, 192, 3)
    labels = patched.attachments[KEY].history[-1].labels
    colours = {tuple(c) for c in regions.flatten(0, 2).tolist()}
    assert len(colours) == min(len(labels.unique()), 14)  # START, which is grey, owns nothing here
    assert labels.min() > 0
    with pytest.raises(ValueError, match="step must be"):
        execute(SemanticGuidanceView, **look, step=5)
    with pytest.raises(ValueError, match="must come from"):
        execute(SemanticGuidanceView, **look | {"model": model})
    with pytest.raises(ValueError, match="must be of the last run of the model, 2 latents"):
        execute(SemanticGuidanceView, **look | {"samples": {"samples": samples[:1]}})
    with pytest.raises(ValueError, match="need clip and prompt"):
        execute(SemanticGuidance, model=model, phrases="blue: 2")


def test_mask_is_where_the_words_of_a_phrase_own_the_image(model):
    text = "a red circle and a green blue square"
    words = " ".join(f"word{i}" for i in range(60)) + " " + text
    many = SimpleNamespace(tokenize=lambda prompt: {"l": [sentence(prompt)]})
    (patched,) = execute(SemanticGuidance, model=model, clip=many, prompt=words)
    samples = run(patched, b=2)
    look = dict(model=patched, samples={"samples": samples}, clip=many, prompt=words)
    labels = patched.attachments[KEY].history[-1].labels
    owner = int(labels.flatten().mode().values)  # token i is word i - 1
    chosen = words.split()[owner - 1] if owner < 69 else "square"
    (mask,) = execute(SemanticGuidanceMask, **look, phrase=chosen)
    tokens = [i + 1 for i, word in enumerate(words.split()) if word == chosen]
    expected = torch.isin(labels, torch.tensor(tokens))
    assert mask.shape == (2, 128, 192) and mask.dtype == torch.float32
    assert mask[:, 4::8, 4::8].bool().equal(expected)
    assert mask.equal(expected.float().repeat_interleave(8, 1).repeat_interleave(8, 2))
    for bad, error in (("  ", "phrase must be words"), ("teapot", "which has no")):
        with pytest.raises(ValueError, match=error):
            execute(SemanticGuidanceMask, **look, phrase=bad)


def sentence(prompt):
    """77 tokens, one a word."""
    ids = [1000 + sum(map(ord, word)) for word in prompt.split()]
    return [(i, 1.0) for i in [1, *ids, *[2] * (76 - len(ids))]]


def test_a_guider_that_passes_by_is_an_error(model):
    """It predicts with both prompts, but asks nobody before it combines."""
    run_of = ComfyRun(CONFIG)
    prompts = [[{"uuid": uuid.uuid4()}], [{"uuid": uuid.uuid4()}], [{"uuid": uuid.uuid4()}]]
    run_of.begin_step(prompts, torch.ones(1), {})
    run_of.begin_step(prompts, torch.ones(1), {})  # of the same step
    with pytest.raises(RuntimeError, match="would do nothing"):
        run_of.begin_step(prompts, torch.full((1,), 0.5), {})


def test_no_guidance_is_said_once(model, caplog):
    patched, guide = guided(model)
    assert run(patched, cfg=1.0, steps=3).equal(run(model, cfg=1.0, steps=3))
    assert not guide.history
    assert caplog.text.count("Semantic-aware CFG does nothing: cfg is 1") == 1


def test_prompts_under_one_id_are_told_apart():
    guide, name = ComfyRun(CONFIG), uuid.uuid4()
    prompts = [{"uuid": name}, {"uuid": name}]
    told = guide.begin_step([[{"uuid": uuid.uuid4()}], prompts], torch.ones(1), {})
    again = guide.begin_step([[{"uuid": uuid.uuid4()}], prompts], torch.ones(1), {})
    assert len({prompt["uuid"] for prompt in told[1]}) == 2
    assert [p["uuid"] for p in told[1]] == [p["uuid"] for p in again[1]]  # caches go by them
