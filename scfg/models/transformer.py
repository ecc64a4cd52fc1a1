"""A minimal text-conditioned diffusion transformer with joint attention, for latents of any size.

Text and patches are one sequence under one softmax, as in SD3 (Esser et al., arXiv 2403.03206) with
shared weights, as in Lumina-Image 2.0 (Qin et al., 2503.21758); patches have a two-dimensional
rotary embedding (Su et al., 2104.09864), queries and keys an RMSNorm, each block its own adaLN-zero
modulation by the noise level (Peebles and Xie, 2212.09748). What a patch sees of its neighbours
comes from a 3 x 3 depthwise convolution before the feed-forward, as in Sana (Xie et al.,
2410.10629): a small network learns shapes from far fewer images with it.
"""

# ruff: noqa: D102, D105, D107 - the docstring of a layer describes its forward

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfg.models.unet import require, sinusoidal_embedding


@dataclass(frozen=True)
class TransformerConfig:
    """Topology of a `JointTransformer`; each token is one pixel of the latent.

    Raises:
        ValueError: a number is too small, or heads do not divide the width by a multiple of 4.
    """

    in_channels: int = 48
    out_channels: int = 48
    width: int = 192
    depth: int = 6
    heads: int = 4
    context_dim: int = 96

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        if self.width % (4 * self.heads):
            raise ValueError(f"width must be a multiple of 4 * heads, got {self}")


def rotary_angles(h: int, w: int, d: int, device: torch.device) -> Tensor:
    """Angles of the rotary embedding of h x w patches: (h*w, d/2) float32.

    Half of the pairs turn by the row, half by the column, with frequencies ``100^(-i / (d/4))``.
    """
    frequency = 100.0 ** (-torch.arange(d // 4, device=device) / (d // 4))  # (d/4,)
    rows = torch.arange(h, device=device)[:, None] * frequency
    columns = torch.arange(w, device=device)[:, None] * frequency
    grids = (rows[:, None].expand(h, w, -1), columns[None].expand(h, w, -1))
    return torch.cat(grids, dim=-1).flatten(0, 1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (i, i + d/2) of x (b, g, m, d) by angles (m, d/2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class JointAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over text and patches; only patches have a place."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(c, 3 * c, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(c // heads), nn.RMSNorm(c // heads)
        self.out = nn.Linear(c, c)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (b, g, m, d)
        q, k = rotate(self.norm_q(q), angles), rotate(self.norm_k(k), angles)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Mix each patch with its neighbours, then widen and narrow every token."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.up, self.down = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        n = grid[0] * grid[1]
        text, patches = x[:, :-n], x[:, -n:]
        near = self.local(patches.transpose(1, 2).unflatten(2, grid))  # (b, c, h, w)
        x = torch.cat([text, patches + near.flatten(2).transpose(1, 2)], dim=1)
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class JointBlock(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the noise level."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c, elementwise_affine=False)
        self.attn = JointAttention(c, heads)
        self.ff = FeedForward(c)
        self.modulation = nn.Linear(c, 6 * c)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, emb: Tensor, angles: Tensor, grid: tuple[int, int]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm(x) * (1 + scale1) + shift1, angles)
        return x + gate2 * self.ff(self.norm(x) * (1 + scale2) + shift2, grid)


class JointTransformer(nn.Module):
    """Predict the clean latent from a noisy one, its noise level and a text context."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = config.width
        self.config = config
        self.conv_in = nn.Conv2d(config.in_channels, c, 3, padding=1)
        self.context_in = nn.Linear(config.context_dim, c)
        self.time_embedding = nn.Sequential(nn.Linear(c, c), nn.SiLU(), nn.Linear(c, c))
        self.blocks = nn.ModuleList(JointBlock(c, config.heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(c)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, s: Tensor, context: Tensor) -> Tensor:
        """Run in the dtype of the weights.

        Args:
            x: (b, in_channels, H, W), ``(1 - s) x0 + s eps``, any H and W.
            s: (b,) noise levels in [0, 1].
            context: (b, t, context_dim) text features.

        Returns:
            x0, (b, out_channels, H, W), dtype of x.

        Raises:
            ValueError: a shape does not fit the config.
        """
        config, b, grid = self.config, len(x), tuple(x.shape[2:])
        require("x", x, b, config.in_channels, None, None)
        require("s", s, b)
        require("context", context, b, None, config.context_dim)
        emb = sinusoidal_embedding(1000 * s, config.width).to(x.dtype)
        emb = F.silu(self.time_embedding(emb))  # every modulation would begin with it
        angles = rotary_angles(*grid, config.width // config.heads, x.device)
        angles = F.pad(angles, (0, 0, context.shape[1], 0))  # text does not turn
        patches = self.conv_in(x).flatten(2).transpose(1, 2)  # (b, n, c)
        y = torch.cat([self.context_in(context), patches], dim=1)  # (b, t + n, c)
        for block in self.blocks:
            y = block(y, emb, angles, grid)
        y = self.norm_out(y[:, -patches.shape[1] :])
        return self.conv_out(y.transpose(1, 2).unflatten(2, grid)).to(x.dtype)
