"""A sampling loop of your own with S-CFG: `scfg.guided` is the one line that differs.

    python examples/own_loop.py "a penguin and a guitar on a blue background" out.png

Draws with the model that ships with the package; yours goes in its place, called as
``unet(x, t, context)``.
"""

import sys

import torch

import scfg


def sample(model, prompt, guidance_scale=2.5, steps=20, seed=0):
    """DDIM, written out: an image (1, 3, 64, 64) in [-1, 1]."""
    uncond, cond = model.encode(""), model.encode(prompt)
    abar = model.schedule.alphas_cumprod
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    with scfg.guided(model.unet, guidance_scale, model.config) as predict:
        times = model.schedule.timesteps(steps)
        for t, after in zip(times, [*times[1:], None], strict=True):
            eps = predict(x, torch.tensor([t]), uncond, cond)
            x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
            x = x0 if after is None else abar[after].sqrt() * x0 + (1 - abar[after]).sqrt() * eps
    return model.decode(x)


def main(prompt, out):
    """Draw a prompt and write it, five times enlarged."""
    from PIL import Image

    from scfg.models.embedded import load_model

    torch.set_num_threads(1)  # more only wait for each other on a model this small
    image = sample(load_model(), prompt)[0]
    pixels = ((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).resize((320, 320), Image.Resampling.NEAREST).save(out)


if __name__ == "__main__":
    main(*sys.argv[1:3])
