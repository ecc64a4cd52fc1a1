"""Every Python block of the README runs on small random models."""

import re
from pathlib import Path

import pytest
import torch
from adapter_hosts import diffusers, sd, sdxl_parts

import scfg
from scfg.models.unet import UNet, UNetConfig

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


class Eps(torch.nn.Module):
    """A model as k-diffusion has them: denoised = x - sigma eps."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, sigma, cond):
        scale = sigma[:, None, None, None]
        return x - scale * self.unet(x / (scale**2 + 1).sqrt(), 400 * sigma, cond)


def heun(model, x, sigmas, extra_args):
    """A sampler that calls the model as those of k-diffusion do."""
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        d = (x - model(x, sigma.expand(len(x)), **extra_args)) / sigma
        second = (x + (after - sigma) * d - model(x, after.expand(len(x)), **extra_args)) / after
        x = x + (after - sigma) * (d + second) / 2
    return x


@pytest.fixture
def names():
    torch.manual_seed(0)
    config = UNetConfig(4, 4, (16, 32, 32, 32), (1, 1, 1, 1), 1, (2,) * 4, 1, 24, norm_groups=8)
    unet = UNet(config).eval()
    noise, uncond, cond = (torch.randn(size) for size in ((1, 4, 24, 40), (1, 7, 24), (1, 7, 24)))
    return {
        "torch": torch, "scfg": scfg, "any_unet": unet, "model": Eps(unet), "sample_heun": heun,
        "x": noise, "t": torch.tensor(500), "context": torch.cat([uncond, cond]),
        "noise": noise, "uncond": uncond, "cond": cond, "sigmas": torch.tensor([2.0, 1.0, 0.5]),
    }  # fmt: skip


@torch.no_grad()
def run(block, names):
    """What the names stand for after the one block that has this text."""
    (code,) = [code for code in BLOCKS if block in code]
    exec(code, names)
    return names


def test_no_block_is_left_out():
    assert len(BLOCKS) == 5


def test_wrapper(names):
    eps = run("UNetWrapper(", names)["eps"]
    assert eps.shape == names["noise"].shape and eps.isfinite().all()


@pytest.mark.parametrize("block", ["scfg.guided(", "denoiser("])
def test_samplers(names, block):
    x = run(block, names)["x"]
    assert x.shape == names["noise"].shape and x.isfinite().all() and not x.equal(names["noise"])


def test_classic_pipeline(names, tmp_path):
    assert run("attach(", names | {"pipe": sd(tmp_path)})["image"].size == (128, 128)


def test_modular_pipeline(names, tmp_path):
    blocks = pytest.importorskip("diffusers.modular_pipelines").StableDiffusionXLAutoBlocks()
    pipe = blocks.init_pipeline()
    pipe.update_components(**sdxl_parts(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    run("SemanticGuidance(", names | {"pipe": pipe})
    call = dict(num_inference_steps=2, height=128, width=192, output_type="latent", output="images")
    plain = diffusers.guiders.ClassifierFreeGuidance(guidance_scale=7.5)
    images = []
    for guider in (pipe.guider, plain):
        pipe.update_components(guider=guider)
        images.append(pipe(prompt="red blue", generator=torch.Generator().manual_seed(0), **call))
    assert not images[0].equal(images[1])
