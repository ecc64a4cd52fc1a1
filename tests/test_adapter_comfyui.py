"""The ComfyUI nodes against a real ModelPatcher and sampler, where ComfyUI can be imported."""

import asyncio
import contextlib
import importlib.util
import sys
import uuid
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close

import scfg
from scfg.attention import AttentionRecorder

if importlib.util.find_spec("comfy") is None:
    pytest.skip("ComfyUI is not on the path", allow_module_level=True)


@contextlib.contextmanager
def arguments(*values):
    kept, sys.argv = sys.argv, [sys.argv[0], *values]
    try:
        yield
    finally:
        sys.argv = kept


with arguments(*([] if torch.cuda.is_available() else ["--cpu"])):
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402

from scfg.adapters.comfyui import comfy_entrypoint  # noqa: E402
from scfg.adapters.comfyui.guide import KEY, Guide  # noqa: E402
from scfg.adapters.comfyui.nodes import SemanticGuidance, SemanticGuidanceView  # noqa: E402
from scfg.adapters.comfyui.patch import patch  # noqa: E402
from scfg.adapters.comfyui.words import clip_weights, parse_phrases  # noqa: E402

CONFIG = scfg.SCFGConfig()
PLAIN = scfg.SCFGConfig(rate_min=1, rate_max=1, max_scale=None)
CPU = torch.device("cpu")
SD15 = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=32,
    num_res_blocks=[1] * 4,
    channel_mult=[1, 1, 2, 2],
    transformer_depth=[1] * 3 + [0],
    transformer_depth_output=[1] * 6 + [0] * 2,
    transformer_depth_middle=1,
    context_dim=32,
    use_spatial_transformer=True,
    legacy=False,
    use_linear_in_transformer=False,
    adm_in_channels=None,
    use_temporal_attention=False,
)
SDXL = SD15 | dict(
    num_res_blocks=[1] * 3,
    channel_mult=[1, 1, 2],
    transformer_depth=[0, 1, 2],
    transformer_depth_output=[0, 0, 1, 1, 2, 2],
    transformer_depth_middle=2,
    use_linear_in_transformer=True,
    num_classes="sequential",
    adm_in_channels=2816,
)


def make(kind="SD15", settings=SD15):
    config = getattr(comfy.supported_models, kind)(dict(settings))
    config.unet_config["num_heads"] = 2
    config.unet_config.pop("num_head_channels", None)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    g = torch.Generator().manual_seed(0)
    for name, p in model.diffusion_model.named_parameters():
        fan = p[0].numel() if p.dim() > 1 else 1
        p.requires_grad_(False)
        p.data = torch.randn(p.shape, generator=g) * (fan**-0.5 if p.dim() > 1 else 0.05)
        if p.dim() == 1 and name.endswith("weight"):
            p.data += 1
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


@pytest.fixture(scope="module")
def model():
    return make()


def text(seed, tokens=77, **options):
    context = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(seed))
    return [[context, dict(options)]]


def run(model, positive=None, negative=None, cfg=6.0, steps=2, sampler="euler", b=1, size=(16, 24)):
    noise = torch.randn(b, 4, *size, generator=torch.Generator().manual_seed(0))
    positive, negative = positive or text(1), negative or text(2)
    inputs = (positive, negative, torch.zeros_like(noise))
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "normal", *inputs, seed=0, disable_pbar=True
    )


def guided(model, config=CONFIG, **options):
    guide = Guide(config, **options)
    return patch(model, guide), guide


def hooks(model):
    modules = model.model.diffusion_model.modules()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


class Watch:
    """Maps and predictions of every step, by a recorder and a post-CFG function of its own."""

    def __init__(self, model):
        self.model, self.steps, self.calls = model.clone(), [], []
        unet = model.model.diffusion_model
        self.recorder = AttentionRecorder(unet, CONFIG, "torch", keep_maps=True)

        def call(executor, x, timesteps, context, *args, **kwargs):
            self.recorder.start(x)
            output = executor(x, timesteps, context, *args, **kwargs)
            options = next(a for a in args if isinstance(a, dict) and "uuids" in a)
            layers = self.recorder.finish().layers
            self.calls.append((list(options["cond_or_uncond"]), layers, tuple(x.shape)))
            return output

        def after(args):
            self.steps.append((args["uncond_denoised"], args["cond_denoised"], args["denoised"]))
            return args["denoised"]

        self.model.add_wrapper_with_key("diffusion_model", "watch", call)
        self.model.set_model_sampler_post_cfg_function(after)


@contextlib.contextmanager
def watched(model):
    """`semantic_cfg` by hand needs the prediction before S-CFG: an unguided twin run gives it."""
    watch = Watch(model)
    try:
        yield watch
    finally:
        watch.recorder.remove()


def by_hand(model, expected_calls, config=CONFIG, fold=None, b=1, **call):
    """What one step of euler has to predict, from maps and predictions of an unguided step."""
    with watched(model) as watch:
        run(watch.model, steps=1, b=b, **call)
    assert [kind for kind, *_ in watch.calls] == expected_calls
    rows = {}
    for kinds, layers, _ in watch.calls:
        for i, kind in enumerate(kinds):
            part = slice(i * b, i * b + b)
            maps = [(layer.self_map[part], layer.cross_map[part]) for layer in layers]
            rows[kind] = maps if fold is None else [(s, fold(c)) for s, c in maps]
    self_maps = [torch.cat([u[0], c[0]]) for u, c in zip(rows[1], rows[0], strict=True)]
    cross_maps = [torch.cat([u[1], c[1]]) for u, c in zip(rows[1], rows[0], strict=True)]
    uncond, cond, _ = watch.steps[0]
    return scfg.semantic_cfg(uncond, cond, self_maps, cross_maps, 6.0, config)


def check(model, expected_calls, fold=None, **call):
    """One guided step against `by_hand`; euler's only step gives the denoised image."""
    expected = by_hand(model, expected_calls, fold=fold, **call)
    patched, guide = guided(model)
    result = run(patched, steps=1, **call)
    goal = model.model.process_latent_out(expected.eps)
    assert_close(actual=result, expected=goal, atol=1e-4, rtol=1e-4)
    labels = expected.labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert guide.history[0].labels.equal(labels)
    assert_close(actual=guide.history[0].rate, expected=expected.rate, atol=1e-5)
    return guide


@contextlib.contextmanager
def little_memory(monkeypatch):
    def free(device=None, torch_free_too=False):
        return (2**30, 2**30) if torch_free_too else 0

    with monkeypatch.context() as patched:
        patched.setattr(comfy.model_management, "get_free_memory", free)
        yield


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
    assert_close(actual=run(one, sampler=sampler), expected=plain, atol=1e-5, rtol=1e-5)
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
    assert_close(actual=run(one, positive=prompts), expected=plain, atol=1e-5, rtol=1e-5)


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
        return comfy.ldm.modules.attention.attention_basic(q, k, v, extra["n_heads"])

    other = model.clone()
    other.set_model_attn1_replace(replace, "middle", 0)
    other.set_model_attn2_replace(replace, "output", 3)
    other.set_model_attn2_patch(lambda n, context, value, extra: (n, context * 1.5, value))
    check(other, [[1, 0]])
    other.set_model_sampler_cfg_function(rescale)
    plain = run(other)
    one, _ = guided(other, PLAIN)
    assert_close(actual=run(one), expected=plain, atol=1e-5, rtol=1e-5)
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
        patch(odd, Guide(CONFIG))


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
    assert_close(actual=rates[1], expected=1.5 * rates[0], rtol=1e-6)


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
    guide, name = Guide(CONFIG), uuid.uuid4()
    prompts = [{"uuid": name}, {"uuid": name}]
    told = guide.begin_step([[{"uuid": uuid.uuid4()}], prompts], torch.ones(1), {})
    again = guide.begin_step([[{"uuid": uuid.uuid4()}], prompts], torch.ones(1), {})
    assert len({prompt["uuid"] for prompt in told[1]}) == 2
    assert [p["uuid"] for p in told[1]] == [p["uuid"] for p in again[1]]  # caches go by them
