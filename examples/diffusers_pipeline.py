"""One prompt drawn twice from the same noise by a pipeline of diffusers: as it is, and with S-CFG.

    python examples/diffusers_pipeline.py FOLDER_OR_NAME "a cat beside a small red ball" both.png

The first argument is what `from_pretrained` takes, such as
``stable-diffusion-v1-5/stable-diffusion-v1-5``.
"""

import sys

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from scfg.adapters.diffusers import attach


def draw_both(pipe, prompt, seed=0, **call):
    """Plain and guided image; the call is the same."""

    def draw():
        return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]

    plain = draw()
    with attach(pipe):
        guided = draw()
    return plain, guided


def main(checkpoint, prompt, out):
    """Write both side by side, plain CFG on the left."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(checkpoint).to(device)
    plain, guided = draw_both(pipe, prompt)
    both = Image.new("RGB", (2 * plain.width, plain.height))
    both.paste(plain, (0, 0))
    both.paste(guided, (plain.width, 0))
    both.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
