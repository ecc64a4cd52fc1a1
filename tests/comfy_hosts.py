"""Tiny models of ComfyUI with random weights, and S-CFG of one of their steps by hand."""

import contextlib
import sys

import torch
from conftest import assert_close

import scfg
from scfg.recording.recorder import AttentionRecorder


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
from comfy.ldm.modules.attention import attention_basic  # noqa: E402, F401

from scfg.adapters.comfyui.patch import patch  # noqa: E402
from scfg.adapters.comfyui.run import ComfyRun  # noqa: E402

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
    guide = ComfyRun(config, **options)
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
            self.recorder.finish()
            layers = self.recorder.layers
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
    assert_close(actual=result, expected=goal, share=1e-4)
    labels = expected.labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert guide.history[0].labels.equal(labels)
    assert_close(actual=guide.history[0].rate, expected=expected.rate, share=1e-5)
    return guide


@contextlib.contextmanager
def little_memory(monkeypatch):
    def free(device=None, torch_free_too=False):
        return (2**30, 2**30) if torch_free_too else 0

    with monkeypatch.context() as patched:
        patched.setattr(comfy.model_management, "get_free_memory", free)
        yield
