"""One tiny U-Net, one tiny embedded model, and short ways to draw with what is under test."""

import torch
from torch import nn

from scfg.adapters.generate import draw as draw_pipeline
from scfg.drawing.generate import Request, draw
from scfg.models.embedded import ModelConfig, assemble, networks
from scfg.models.transformer import TransformerConfig
from scfg.models.unet import UNet, UNetConfig

LATENT_UNET = UNetConfig(
    4, 4, (16, 32, 32, 32), (1, 1, 1, 1), 1, (2,) * 4, 1, 24, norm_groups=8
)  # attention at reductions 1, 2, 4 and 8 of 4 channels, 24 features of text
MODEL = ModelConfig(
    UNetConfig(48, 48, (16, 32), (1, 1), 1, (1, 2), 1, 24, norm_groups=8),
    text_layers=1,
    text_heads=2,
)
TRANSFORMER = ModelConfig(
    unet=None,
    transformer=TransformerConfig(width=32, depth=3, heads=2, context_dim=16),
    text_layers=1,
)


def randomised(model: nn.Module) -> nn.Module:
    """Weights that start at zero get a value too, so that every part has a say."""
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model.requires_grad_(False)


def tiny_unet(seed=0, config=LATENT_UNET):
    """A U-Net of random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet(config).eval().requires_grad_(False)


def tiny_model(seed=0):
    """The embedded model with random weights: for what does not depend on how well it draws."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return assemble(networks(MODEL).eval().requires_grad_(False), MODEL)


def request(prompts, seeds, guidance_scale=2.5, **options):
    return Request(tuple(prompts), tuple(seeds), guidance_scale, **options)


def generate(model, prompts, seeds, callback=None, **options):
    """Draw with the embedded model."""
    return draw(model, request(prompts, seeds, **options), callback)


def generate_with(pipe, prompts, seeds, *, callback=None, guidance_scale=7.5, sampler="ddim",
                  negative_prompt="", height=None, width=None, **options):  # fmt: skip
    """Draw with a pipeline; sampler None keeps its own scheduler."""
    asked = request(prompts, seeds, guidance_scale, sampler=sampler or "ddim", **options)
    return draw_pipeline(pipe, asked, callback, negative_prompt, height, width, sampler is None)
