"""A minimal text-conditioned U-Net whose state dict is that of diffusers' UNet2DConditionModel.

Sources: Ronneberger et al. 2015 (arXiv 1505.04597), Rombach et al. 2022 (arXiv 2112.10752), Podell
et al. 2023 (arXiv 2307.01952). Names, epsilons and rounding of sizes are those of diffusers 0.42.
"""

# ruff: noqa: D102, D105, D107 - the docstring of a layer describes its forward

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfg.models.topology import SD15, SD21, SDXL, UNetConfig

__all__ = ["SD15", "SD21", "SDXL", "UNet", "UNetConfig"]


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """Embed (m,) numbers as [cos(t f), sin(t f)], f_i = 10000^(-i / (width // 2)): (m, width).

    Computed in float32; an odd width ends in a zero. Source: Ho et al. 2020 (arXiv 2006.11239).
    """
    half = width // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t[:, None].float() * torch.exp(-math.log(10000) * i / half)  # (m, half)
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, width % 2))


def require(name: str, value: Tensor, *shape: int | None) -> None:
    """Raise ValueError unless value has this shape, where None is any size."""
    pairs = zip(shape, value.shape, strict=False)
    wrong = (want is not None and want != n for want, n in pairs)
    if value.ndim != len(shape) or any(wrong):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def named(**layers: nn.Module) -> nn.Sequential:
    """Sequential whose layers have names."""
    return nn.Sequential(OrderedDict(layers))


class Attention(nn.Module):
    """Multi-head softmax(q k^T / sqrt(d)) v; a mask (b, 1, t) is boolean or additive."""

    def __init__(self, c: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(context_dim, c, bias=False)
        self.to_v = nn.Linear(context_dim, c, bias=False)
        self.to_out = nn.Sequential(nn.Linear(c, c))

    def forward(
        self, x: Tensor, context: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, g, n or t, d)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        mask = None if attention_mask is None else attention_mask[:, None]  # (b, 1, 1, t)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.to_out(out.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """value * gelu(gate). Source: Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, c: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(c, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each on a LayerNorm and added."""

    def __init__(self, c: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(c), nn.LayerNorm(c), nn.LayerNorm(c)
        self.attn1 = Attention(c, c, heads)
        self.attn2 = Attention(c, context_dim, heads)
        net = nn.Sequential(GEGLU(c, 4 * c), nn.Identity(), nn.Linear(4 * c, c))
        self.ff = named(net=net)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, attention_mask=mask)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, added to it."""

    def __init__(self, c: int, depth: int, heads: int, config: UNetConfig) -> None:
        super().__init__()
        self.linear = config.linear_projection
        self.norm = nn.GroupNorm(config.norm_groups, c, eps=1e-6)
        self.proj_in = nn.Linear(c, c) if self.linear else nn.Conv2d(c, c, 1)
        blocks = (TransformerBlock(c, config.cross_attention_dim, heads) for _ in range(depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(c, c) if self.linear else nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        y = y.flatten(2).transpose(1, 2)  # (b, n, c)
        y = self.proj_in(y) if self.linear else y
        for block in self.transformer_blocks:
            y = block(y, context, mask)
        y = self.proj_out(y) if self.linear else y
        y = y.transpose(1, 2).unflatten(2, x.shape[2:])  # (b, c, h, w)
        return x + (y if self.linear else self.proj_out(y))


class Resnet(nn.Module):
    """Two convolutions with the (already activated) timestep embedding added between them."""

    def __init__(self, c_in: int, c: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], c)
        self.norm2 = nn.GroupNorm(config.norm_groups, c)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c, 1) if c_in != c else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(emb)[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Block(nn.Module):
    """Layers of one level: each a Resnet, then a Transformer if its depth is not 0."""

    def __init__(self, c_in: list[int], depths: list[int], level: int, config: UNetConfig) -> None:
        super().__init__()
        c, heads = config.block_out_channels[level], config.heads[level]
        self.resnets = nn.ModuleList(Resnet(c_layer, c, config) for c_layer in c_in)
        transformers = (Transformer(c, depth, heads, config) for depth in depths if depth)
        self.attentions = nn.ModuleList(transformers)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def layer(self, i: int, x: Tensor, emb: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, context, mask) if i < len(self.attentions) else x


class UNet(nn.Module):
    """Predict from a noisy latent, a timestep and a text context."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, layers = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = self.mlp(channels[0])
        if config.addition is not None:
            pooled, ids, width = config.addition
            self.add_embedding = self.mlp(pooled + ids * width)

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [channels[0]]
        for level, (c, depth) in enumerate(zip(channels, config.transformer_depth, strict=True)):
            c_in = [skips[-1]] + [c] * (layers - 1)
            block = Block(c_in, [depth] * layers, level, config)
            skips += [c] * layers
            if level < len(channels) - 1:
                block.downsamplers.append(named(conv=nn.Conv2d(c, c, 3, stride=2, padding=1)))
                skips.append(c)
            self.down_blocks.append(block)
        c = channels[-1]
        mid_depths = [config.mid_depth, 0]
        self.mid_block = Block([c, c], mid_depths, len(channels) - 1, config)
        for level in reversed(range(len(channels))):
            c_before, c, depth = c, channels[level], config.transformer_depth[level]
            c_in = [c_layer + skips.pop() for c_layer in [c_before] + [c] * layers]
            block = Block(c_in, [depth] * (layers + 1), level, config)
            if level > 0:
                block.upsamplers.append(named(conv=nn.Conv2d(c, c, 3, padding=1)))
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(config.norm_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def mlp(self, c_in: int) -> nn.Sequential:
        c = 4 * self.config.block_out_channels[0]
        return named(linear_1=nn.Linear(c_in, c), act=nn.SiLU(), linear_2=nn.Linear(c, c))

    def embed(self, t: Tensor, added: tuple[Tensor, Tensor] | None, dtype: torch.dtype) -> Tensor:
        sinusoids = sinusoidal_embedding(t, self.config.block_out_channels[0])
        emb = self.time_embedding(sinusoids.to(dtype))
        if added is not None:
            pooled, ids = added
            ids = sinusoidal_embedding(ids.flatten(), self.config.addition[2]).view(len(t), -1)
            emb = emb + self.add_embedding(torch.cat([pooled, ids.to(pooled.dtype)], dim=1))
        return F.silu(emb)  # every Resnet would begin with it

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor,
        added: tuple[Tensor, Tensor] | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Run in the dtype of the weights; only the sinusoids are computed in float32.

        Args:
            x: (b, in_channels, H, W), any H and W: each level rounds up.
            t: timestep, a number or (b,).
            context: (b, t, cross_attention_dim) text features.
            added: (pooled text (b, width), time ids (b, ids)) where the config has `addition`.
            context_mask: (b, t) bool, True for tokens to attend to, at least one in each row.

        Returns:
            (b, out_channels, H, W), dtype of x.

        Raises:
            ValueError: a shape does not fit the config, or `added` is missing or not expected.
            TypeError: the mask is not boolean.
        """
        b, config, t = len(x), self.config, torch.as_tensor(t, device=x.device)
        require("x", x, b, config.in_channels, None, None)
        require("t", t, *[b] * (t.ndim > 0))
        require("context", context, b, None, config.cross_attention_dim)
        if (added is None) != (config.addition is None):
            raise ValueError(f"added is {added}, but the config has addition={config.addition}")
        if added is not None:
            require("pooled text", added[0], b, config.addition[0])
            require("time ids", added[1], b, config.addition[1])
        if context_mask is not None:
            require("context_mask", context_mask, b, context.shape[1])
            if context_mask.dtype != torch.bool:
                raise TypeError(f"context_mask must be bool, got {context_mask.dtype}")
            context_mask = context_mask[:, None]  # (b, 1, t)

        emb = self.embed(t.expand(b), added, x.dtype)
        skips = [x := self.conv_in(x)]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                skips.append(x := block.layer(i, x, emb, context, context_mask))
            for downsample in block.downsamplers:
                skips.append(x := downsample(x))
        for i in range(2):
            x = self.mid_block.layer(i, x, emb, context, context_mask)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, torch.cat([x, skips.pop()], 1), emb, context, context_mask)
            for upsample in block.upsamplers:
                x = upsample(F.interpolate(x, size=skips[-1].shape[2:], mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))
