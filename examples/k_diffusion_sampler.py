"""A sampler of k-diffusion with S-CFG, on the U-Net of a Stable Diffusion checkpoint.

    python examples/k_diffusion_sampler.py FOLDER_OR_NAME "a cat beside a small red ball" out.png

Needs ``pip install k-diffusion`` and diffusers, which loads the checkpoint.
"""

import sys

import torch
from diffusers import StableDiffusionPipeline
from k_diffusion.external import DiscreteEpsDDPMDenoiser
from k_diffusion.sampling import sample_dpmpp_2m

from scfg.adapters.k_diffusion import denoiser


class Denoiser(DiscreteEpsDDPMDenoiser):
    """A U-Net of diffusers as k-diffusion calls its models."""

    def get_eps(self, x, t, cond):
        """The noise in x."""
        return self.inner_model(x, t, cond).sample


@torch.no_grad()
def sample(pipe, prompt, guidance_scale=7.5, steps=20, size=(64, 64), seed=0):
    """Latents (1, 4, h, w) that a pipeline's VAE decodes."""
    cond, uncond = pipe.encode_prompt(prompt, pipe.device, 1, True, negative_prompt="")
    model = Denoiser(pipe.unet, pipe.scheduler.alphas_cumprod.to(cond), quantize=False)
    sigmas = model.get_sigmas(steps)
    x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed)).to(cond)
    with denoiser(model, guidance_scale) as guided:
        extra = dict(uncond=uncond, cond=cond)
        return sample_dpmpp_2m(guided, x * sigmas[0], sigmas, extra_args=extra, disable=True)


@torch.no_grad()
def main(checkpoint, prompt, out):
    """Draw a prompt and write it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusionPipeline.from_pretrained(checkpoint).to(device)
    latents = sample(pipe, prompt)
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    pipe.image_processor.postprocess(pixels)[0].save(out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
