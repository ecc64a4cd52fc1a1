"""S-CFG on ComfyUI's transformers, where ComfyUI can be imported: its own softmax is the oracle."""

import dataclasses
import gc
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close

import scfg

if importlib.util.find_spec("comfy") is None:
    pytest.skip("ComfyUI is not on the path", allow_module_level=True)

from comfy_by_hand import OVERRIDE, columns_of, evidence, rates, watched  # noqa: E402
from comfy_hosts import PLAIN, guided, hooks, little_memory  # noqa: E402
from comfy_transformers import HOSTS, flux2, prompts, sample  # noqa: E402

from scfg.adapters.comfyui.layouts import kind_of  # noqa: E402
from scfg.adapters.comfyui.nodes import (  # noqa: E402
    SemanticGuidance,
    SemanticGuidanceMask,
    SemanticGuidanceView,
)
from scfg.adapters.comfyui.phrases import Copy, Prompt  # noqa: E402
from scfg.adapters.comfyui.run import KEY  # noqa: E402

CONFIG = scfg.SCFGConfig(min_share=0.0, min_peak=0.0)


@pytest.fixture(params=HOSTS)
def host(request):
    return HOSTS[request.param]()


def pixels(host, x):
    x = x.repeat_interleave(host.side, -2).repeat_interleave(host.side, -1)
    return x[..., : host.latent[-2], : host.latent[-1]]


def check(host, groups=None, config=CONFIG, foreground=None, prompt=None, **call):
    """One guided step against regions, rates and prediction by hand."""
    step, groups = watched(host, **call), groups or columns_of(host)
    patched, run = guided(host.model, config, prompt=prompt)
    result = sample(host, patched, steps=1, **call)
    (ours,) = run.history
    frames, size = host.grid[0], host.latent[-2:]
    total = evidence(host, step.maps[0], groups)
    best = total.topk(2, dim=1).values
    first = torch.tensor([groups.index(group) for group in range(max(groups) + 1)])
    labels = pixels(host, first[total.argmax(dim=1)])  # (b, f, H, W)
    clear = pixels(host, best[:, 0] - best[:, 1] > 1e-4)
    owners = ours.labels.reshape(labels.shape)
    assert clear.float().mean() > 0.8 and len(owners.unique()) > 2
    assert owners[clear].equal(labels[clear])
    if foreground is not None:
        foreground = pixels(host, foreground(step))
        assert ours.foreground.reshape(labels.shape).equal(foreground)
        assert 0 < foreground.float().mean() < 1
    rate = rates(host, step, owners, foreground)
    assert_close(actual=ours.rate.reshape(rate.shape), expected=rate, share=1e-5, what="rate")
    assert rate.std() > 0.01
    middle = (frames,) if step.text.dim() == 5 else ()
    gap = (step.text.double() - step.uncond.double()) * rate.reshape(len(rate), 1, *middle, *size)
    goal = host.model.model.process_latent_out((step.uncond.double() + 4.0 * gap).float())
    assert_close(actual=result, expected=goal, share=1e-4, what="result")
    return step


@pytest.mark.parametrize("b", [1, 2])
def test_a_step_is_guided_as_by_hand(host, b):
    check(host, b=b)


def test_a_rate_of_1_is_the_host_and_a_constant_one_a_scale(host):
    plain = sample(host)
    one, _ = guided(host.model, PLAIN)
    assert_close(actual=sample(host, one), expected=plain, share=1e-5)
    always = scfg.SCFGConfig(rate_min=1.5, rate_max=1.5, max_scale=None, min_peak=0.0)
    more, _ = guided(host.model, always)
    assert_close(actual=sample(host, more), expected=sample(host, cfg=6.0), share=2e-5)
    assert (sample(host, more) - plain).abs().max() > 1e-2
    assert sample(host).equal(plain) and hooks(host.model) == 0


@pytest.mark.parametrize("name", ["sd3", "wan"])
def test_branches_may_come_one_by_one(name, monkeypatch):
    host = HOSTS[name]()
    with little_memory(monkeypatch):
        step = check(host)
    assert set(step.calls) == {(0,), (1,)}


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_start_of_either_branch_marks_the_foreground(branch):
    host = HOSTS["sd3"]()

    def foreground(step):
        maps = step.maps[0 if branch == "cond" else 1]
        start, rest = evidence(host, maps, [0] + [1] * 19).unbind(dim=1)
        return rest > start

    config = dataclasses.replace(CONFIG, benchmark="foreground", foreground=branch)
    check(host, config=config, foreground=foreground)


def test_words_own_patches_with_all_their_pieces_and_copies():
    """Columns 1 to 5 and 12 to 18: words 0, 1, 1, 2, 3, and 0, 1, 1, 1, 2, 3, 3."""
    host = HOSTS["sd3"]()
    clip = (-1, 0, 1, 1, 2, 3, -1, -1, -1, -1, -1)
    t5 = (-1, 0, 1, 1, 1, 2, 3, 3, -1)
    copies = [Copy((7,) * len(words), words, (1.0,) * len(words), False) for words in (clip, t5)]
    check(host, groups=[*clip, *t5], prompt=Prompt(tuple(copies)))
    third = [c if c.words != clip else dataclasses.replace(c, words=(-1, *clip)) for c in copies]
    patched, _ = guided(host.model, prompt=Prompt(tuple(third)))
    with pytest.raises(ValueError, match="whose text has 20 tokens"):
        sample(host, patched)


def test_words_end_where_a_text_that_is_padded_in_front_ends():
    host = flux2()
    numbers = (-1, 0, 1, 1, 2, 3, 4, 4, 5, 6, 7, -1)
    prompt = Prompt((Copy((7,) * 12, numbers, (1.0,) * 12, True),))
    check(host, groups=[-1] * 500 + list(numbers), prompt=prompt)


def test_tokens_that_are_repeated_to_a_common_length_count_once():
    host = HOSTS["wan"]()
    longer = prompts(24, 24)[1]
    step = check(host, groups=[*range(11), -1] * 2, negative=longer)
    assert set(step.calls) == {(1, 0)}


def test_weights_of_words_multiply_rates():
    host = HOSTS["qwen"]()
    heavy = Prompt((Copy((7,) * 30, (-1,) * 25 + (0, 1, 2, 3, -1), (1.5,) * 30, True),))
    light = Prompt((dataclasses.replace(heavy.copies[0], weights=(1.0,) * 30),))
    rate = []
    for prompt in (heavy, light):
        patched, run = guided(host.model, CONFIG, prompt=prompt)
        sample(host, patched, steps=1)
        rate.append(run.history[0].rate)
        assert set(run.history[0].labels.unique().tolist()) <= {4, 5, 6, 7}  # the last of 9
    assert_close(actual=rate[0], expected=1.5 * rate[1], share=1e-6)


def test_each_area_and_mask_has_the_regions_of_its_prompt():
    host = HOSTS["flux"]()
    (context, options), (other, _) = host.positive[0], host.negative[0]
    left, right = ((16, 6, 0, 0), (16, 6, 0, 6))
    two = [[context, {**options, "area": left}], [other, {**options, "area": right}]]
    mask = torch.zeros(1, 16, 12)
    mask[:, 5:, :7] = 1
    masked = [[context, {**options, "mask": mask}], [other, {**options, "mask": 1 - mask}]]
    inside = torch.zeros(16, 12, dtype=torch.bool)
    inside[:, :6] = True
    for positive, first in ((two, inside), (masked, mask[0].bool())):
        patched, run = guided(host.model, CONFIG)
        sample(host, patched, steps=1, positive=positive)
        labels = run.history[0].labels[0]
        assert (labels < host.tokens).equal(first) and (labels < 2 * host.tokens).all()
        one, _ = guided(host.model, PLAIN)
        plain = sample(host, positive=positive)
        assert_close(actual=sample(host, one, positive=positive), expected=plain, share=1e-5)


def test_what_cannot_be_recorded_is_an_error():
    host = HOSTS["flux"]()
    patched, _ = guided(host.model)
    edit = [[[c, {**o, "reference_latents": [torch.zeros(1, 16, 4, 6)]}]] for c, o in host.positive]
    with pytest.raises(RuntimeError, match="attends to 66 tokens, the latent and the text have 60"):
        sample(host, patched, positive=edit[0], negative=edit[0])
    skipped = host.model.clone()
    skipped.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
    patched, _ = guided(skipped)
    with pytest.raises(RuntimeError, match=r"0 of 1 layers; not seen: \['double_blocks.1'"):
        sample(host, patched)
    assert hooks(host.model)  # ComfyUI takes them off when the next clone runs
    del patched
    gc.collect()
    assert not hooks(host.model)
    heir = type("VaceWanModel", (type(HOSTS["wan"]().model.model.diffusion_model),), {})
    with pytest.raises(ValueError, match="VaceWanModel is neither a U-Net nor a transformer that"):
        kind_of(heir.__new__(heir))


def test_another_nodes_attention_function_is_kept():
    host = HOSTS["flux"]()

    def warmer(function, q, k, v, *args, **options):
        return function(q * 0.5, k, v, *args, **options)

    other = host.model.clone()
    other.model_options["transformer_options"][OVERRIDE] = warmer
    plain = sample(host, other)
    assert (plain - sample(host)).abs().max() > 1e-3
    one, _ = guided(other, PLAIN)
    assert_close(actual=sample(host, one), expected=plain, share=1e-5)


@pytest.mark.parametrize("first", ["compiled", "guided"])
def test_a_compiled_model_is_guided_alike(first):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    host = HOSTS["flux"]()
    patched, run = guided(host.model, CONFIG)
    expected, labels = sample(host, patched), run.history[-1].labels
    model = host.model.clone() if first == "compiled" else guided(host.model, CONFIG)[0].clone()
    set_torch_compile_wrapper(model, backend="eager")
    if first == "compiled":
        model, _ = guided(model, CONFIG)
    assert_close(actual=sample(host, model), expected=expected, share=1e-6)
    assert model.attachments[KEY].history[-1].labels.equal(labels)


def test_nodes_show_clips_frame_by_frame():
    host = HOSTS["wan"]()
    words = [(i, 1.0) for i in range(10, 22)]
    clip = SimpleNamespace(tokenize=lambda text: {"umt5xxl": [words if text else words[:0]]})
    options = dict(model=host.model, rate_min=0.8, rate_max=3.0, max_scale=15.0, start=0.0,
                   stop=1.0, every=1, propagation="paper", map_reduction=4)  # fmt: skip
    (patched,) = SemanticGuidance.execute(**options).args
    samples = sample(host, patched)
    look = patched, {"samples": samples}, -1
    pictures = SemanticGuidanceView.execute(*look).args
    assert [tuple(x.shape) for x in pictures] == [(3, 64, 96, 3)] * 2
    labels = patched.attachments[KEY].history[-1].labels[0]
    (mask,) = SemanticGuidanceMask.execute(*look, clip, "all of it", "all of it").args
    assert mask.shape == (3, 64, 96) and mask[:, ::8, ::8].equal((labels < 12).float())
