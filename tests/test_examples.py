"""The examples run, offline, on small random models, and do what they say."""

import importlib.util
import sys
import types
from pathlib import Path

import torch
from adapter_hosts import sd
from conftest import assert_close
from PIL import Image, ImageChops
from tiny import generate, tiny_model

import scfg

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_example_is_left_out():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"own_loop", "diffusers_pipeline", "k_diffusion_sampler", "tiny_network"}


def test_own_loop_draws_what_the_sampler_of_the_library_draws(tmp_path):
    own, prompt = example("own_loop"), "a red fox and a blue crab on a green background"
    model = tiny_model()
    image = own.sample(model, prompt, steps=4, seed=3)
    expected = generate(model, [prompt], [3], steps=4).images
    assert_close(actual=image, expected=expected, share=1e-4)
    own.main("a penguin on a blue background", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (320, 320)


def test_a_diffusers_pipeline_is_guided_inside_the_block_alone(tmp_path):
    script, pipe = example("diffusers_pipeline"), sd(tmp_path)
    call = dict(num_inference_steps=2, height=128, width=192)
    plain, guided = script.draw_both(pipe, "red blue", **call)
    assert ImageChops.difference(plain, guided).getbbox() is not None
    assert (
        ImageChops.difference(plain, script.draw_both(pipe, "red blue", **call)[0]).getbbox()
        is None
    )
    pipe.save_pretrained(tmp_path / "model")
    script.main(tmp_path / "model", "red blue", tmp_path / "both.png")
    assert Image.open(tmp_path / "both.png").size == (256, 128)


def test_a_sampler_of_k_diffusion(tmp_path, monkeypatch):
    from test_adapter_k_diffusion import external, sampling  # skips where it is not installed

    package = types.ModuleType("k_diffusion")
    for name, module in (("k_diffusion", package), ("k_diffusion.external", external),
                         ("k_diffusion.sampling", sampling)):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    script, pipe = example("k_diffusion_sampler"), sd(tmp_path)
    call = dict(steps=3, size=(16, 24))
    latents = script.sample(pipe, "red blue", **call)
    assert latents.shape == (1, 4, 16, 24) and latents.isfinite().all()
    seen = []
    original = script.denoiser
    monkeypatch.setattr(script, "denoiser", lambda *args: original(*args, callback=seen.append))
    assert torch.equal(script.sample(pipe, "red blue", **call), latents)
    assert len(seen) == 3
    pipe.save_pretrained(tmp_path / "model")
    script.main(tmp_path / "model", "red blue", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").width > 0


@torch.no_grad()
def test_the_maps_of_the_tiny_network_are_its_own_softmax(capsys):
    script = example("tiny_network")
    torch.manual_seed(1)
    network, x, text = script.Network(heads=4), torch.randn(2, 4, 20, 28), torch.randn(2, 7, 24)
    plain = network(x, 500, text)
    block, pixels = network.block, network.enter(x).flatten(2).mT

    def softmax(attention, x, context):
        q, k = (
            y.double().unflatten(-1, (4, -1)) for y in (attention.to_q(x), attention.to_k(context))
        )
        scores = torch.einsum("bngd,bmgd->bgnm", q, k) / q.shape[-1] ** 0.5
        return scores.softmax(-1).mean(1)

    middle = pixels + block.to_image(pixels, pixels)
    with scfg.UNetWrapper(network, keep_maps=True) as unet:
        assert torch.equal(unet(x, 500, text), plain)
        (layer,) = unet.attention
        assert (layer.reduction, layer.grid) == (4, (5, 7))
        for actual, expected in (
            (layer.self_map, softmax(block.to_image, pixels, pixels)),
            (layer.cross_map, softmax(block.to_text, middle, text)),
        ):
            assert_close(actual=actual, expected=expected, share=1e-5)
    script.main()
    assert capsys.readouterr().out.startswith("tensor([[")
