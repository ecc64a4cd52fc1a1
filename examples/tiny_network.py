"""What S-CFG reads of a network, on one of 30 lines: `heads`, `to_q` and `to_k`, in pairs.

    python examples/tiny_network.py

A block is found by its two children that have those three names, self- before cross-attention; no
base class, no registration. They promise:

- ``to_q`` and ``to_k`` are modules that return (b, n, heads * d), one head after another;
- scores are ``q k^T / sqrt(d)``, or the module has another ``scale``, a number, as an attribute;
- the image's tokens are all pixels of the latent, row by row, at 1, 1/2, 1/4, ... of its size.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import scfg


class Attention(nn.Module):
    """From the image to itself, or to a text."""

    def __init__(self, width, context_width, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context_width, width)
        self.to_v = nn.Linear(context_width, width)

    def forward(self, x, context):  # (b, n, c), (b, m, c')
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Two attentions, one after the other."""

    def __init__(self, width, text_width, heads):
        super().__init__()
        self.to_image = Attention(width, width, heads)
        self.to_text = Attention(width, text_width, heads)

    def forward(self, x, text):
        x = x + self.to_image(x, x)
        return x + self.to_text(x, text)


class Network(nn.Module):
    """One block on patches of 4 x 4 latent pixels, the finest that `SCFGConfig` reads."""

    def __init__(self, width=32, text_width=24, heads=2):
        super().__init__()
        self.enter = nn.Conv2d(4, width, 4, stride=4)
        self.block = Block(width, text_width, heads)
        self.leave = nn.ConvTranspose2d(width, 4, 4, stride=4)

    def forward(self, x, t, text):  # (b, 4, H, W), unused here, (b, t, c)
        y = self.enter(x)
        tokens = self.block(y.flatten(2).mT, text)  # (b, n, c)
        return self.leave(tokens.mT.unflatten(2, y.shape[2:]))


@torch.no_grad()
def main():
    """Guide one step of random weights and print the region of each patch."""
    torch.manual_seed(0)
    x, text = torch.randn(1, 4, 32, 48), torch.randn(2, 7, 24)  # text: unconditional row first
    with scfg.UNetWrapper(Network()) as network:
        eps_uncond, eps_text = network(torch.cat([x, x]), 500, text).chunk(2)
        guided = network.guide(eps_uncond, eps_text, guidance_scale=7.5)
    print(guided.labels[0])


if __name__ == "__main__":
    main()
