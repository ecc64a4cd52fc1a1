"""SemanticGuidance in modular pipelines with transformers, tiny, prompts as embeddings."""

import importlib

import pytest
import torch
from conftest import assert_close

import scfg
from scfg.recording.layouts import find_layout
from scfg.recording.packing import unpack

pytest.importorskip("diffusers.modular_pipelines")
from diffusers.guiders import ClassifierFreeGuidance  # noqa: E402
from transformer_hosts import randn  # noqa: E402
from transformer_pipes import PIPES  # noqa: E402

from scfg.adapters.modular import SemanticGuidance  # noqa: E402

CORES = {
    "sd3": ("stable_diffusion_3.modular_blocks_stable_diffusion_3", "StableDiffusion3T2I"),
    "qwen": ("qwenimage.modular_blocks_qwenimage", "QwenImage"),
    "z_image": ("z_image.modular_blocks_z_image", "ZImage"),
    "wan": ("wan.modular_blocks_wan", "Wan"),
    "ltx": ("ltx.modular_blocks_ltx", "LTX"),
}


def make(kind):
    """The denoising part of a modular pipeline, and the call that is made of it."""
    classic, call, _ = PIPES[kind]()
    module, name = CORES[kind]
    module = importlib.import_module(f"diffusers.modular_pipelines.{module}")
    pipe = getattr(module, f"{name}CoreDenoiseStep")().init_pipeline()
    pipe.update_components(transformer=classic.transformer, scheduler=classic.scheduler)
    pipe.set_progress_bar_config(disable=True)
    if kind == "wan":  # without a VAE it takes the channels of the released ones
        call["latents"] = randn(1, 4, 3, 8, 12)
    return pipe, call


@pytest.fixture(params=CORES)
def host(request):
    return make(request.param)


def run(host, guider, steps=2):
    pipe, call = host
    pipe.update_components(guider=guider)
    generator = torch.Generator().manual_seed(0)
    return pipe(**call, num_inference_steps=steps, generator=generator, output="latents")


def test_a_step_is_guided_as_by_hand(host):
    transformer = host[0].transformer
    calls, seen = [], []

    def keep(module, args, kwargs, output):
        calls.append((args, kwargs))

    handle = transformer.register_forward_hook(keep, with_kwargs=True)
    run(host, ClassifierFreeGuidance(guidance_scale=4.0), steps=1)
    handle.remove()
    assert len(calls) == 2
    layout = find_layout(transformer)
    with scfg.Recorder(transformer, order=("text", "uncond")) as network:
        text, uncond = (network(*args, **kwargs)[0] for args, kwargs in calls)
        grid = network.grid
        expected = network.guide(uncond, text, guidance_scale=4.0)
    run(host, SemanticGuidance(guidance_scale=4.0, callback=seen.append), steps=1)
    (ours,) = seen
    assert ours.labels.equal(expected.labels) and len(ours.labels.unique()) > 1
    assert_close(actual=ours.rate, expected=expected.rate, share=1e-5, what="rate")
    sign = -1 if type(transformer).__name__.startswith("ZImage") else 1  # its own pipeline turns it
    goal = unpack(expected.eps, layout, grid)
    assert_close(actual=sign * ours.eps, expected=goal.reshape(ours.eps.shape), share=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer.modules())


def test_rate_1_is_the_hosts_own_guidance_and_a_constant_one_a_scale(host):
    plain = run(host, ClassifierFreeGuidance(guidance_scale=4.0))
    for rate in (1.0, 1.5):
        config = scfg.SCFGConfig(rate_min=rate, rate_max=rate, max_scale=None, min_peak=0.0)
        ours = run(host, SemanticGuidance(guidance_scale=4.0, scfg_config=config))
        expected = run(host, ClassifierFreeGuidance(guidance_scale=4.0 * rate))
        assert_close(actual=ours, expected=expected, share=2e-5)
    assert (ours - plain).abs().max() > 1e-3
    assert run(host, ClassifierFreeGuidance(guidance_scale=4.0)).equal(plain)


def test_regions_are_kept_and_the_foreground_needs_both_branches():
    host = make("sd3")
    seen = []
    config = scfg.SCFGConfig(benchmark="foreground")
    guider = SemanticGuidance(4.0, scfg_config=config, every=2, callback=seen.append)
    run(host, guider, steps=4)
    assert [a.labels.equal(b.labels) for a, b in zip(seen, seen[1:], strict=False)][::2] == [
        True
    ] * 2
    assert all(guided.rule == "START of the unconditional branch" for guided in seen)
