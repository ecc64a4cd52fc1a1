"""A minimal text-conditioned U-Net whose state dict is that of diffusers' UNet2DConditionModel.

`SD15`, `SD21` and `SDXL` are the published models; a narrower one of the same topology is
`dataclasses.replace(SD15, block_out_channels=(32, 64, 128, 128))`.

Sources: Ronneberger et al. 2015 (arXiv 1505.04597), Rombach et al. 2022 (arXiv 2112.10752), Podell
et al. 2023 (arXiv 2307.01952). Names, epsilons and the rounding of sizes follow diffusers 0.42.
"""

# ruff: noqa: D102, D107 - the docstring of a layer describes its forward

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """Topology of a `UNet`. Tuples have one entry per level, finest first (lists are converted).

    Args:
        in_channels: channels of the latent.
        out_channels: channels of the prediction.
        block_out_channels: feature channels; each level halves the resolution of the one before.
        transformer_depth: transformer blocks per attention layer; 0: no attention at that level.
        mid_depth: transformer blocks in the middle, at the coarsest level; at least 1.
        heads: attention heads (diffusers configs call this number `attention_head_dim`).
        layers_per_block: residual layers of a level going down; going up has one more.
        cross_attention_dim: width of the context.
        linear_projection: project in and out of a transformer with Linear instead of Conv2d 1x1.
        norm_groups: groups of every GroupNorm.
        addition: (width of the pooled text, number of time ids, sinusoid width of one id), the
            conditions that SDXL adds to the timestep embedding, or None.

    Raises:
        ValueError: lengths differ, a number is out of range, or channels do not divide.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    mid_depth: int = 1
    heads: tuple[int, ...] = (8, 8, 8, 8)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    linear_projection: bool = False
    norm_groups: int = 32
    addition: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:  # noqa: D105
        for name in ("block_out_channels", "transformer_depth", "heads", "addition"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        for name in ("transformer_depth", "heads"):
            if len(getattr(self, name)) != len(self.block_out_channels):
                raise ValueError(
                    f"{name} must have one entry per level of block_out_channels "
                    f"{self.block_out_channels}, got {getattr(self, name)}"
                )
        for name, value in vars(self).items():
            least = 0 if name == "transformer_depth" else 1
            values = value if isinstance(value, tuple) else (value,)
            if name not in ("linear_projection", "addition") and (
                not values or any(type(v) is not int or v < least for v in values)
            ):
                raise ValueError(f"{name} must be integers of at least {least}, got {value!r}")
        if self.addition is not None and (len(self.addition) != 3 or min(self.addition) < 1):
            raise ValueError(f"addition must be three positive integers, got {self.addition}")
        for level, c in enumerate(self.block_out_channels):
            if c % self.norm_groups or c % self.heads[level]:
                raise ValueError(
                    f"block_out_channels[{level}] = {c} must be a multiple of norm_groups "
                    f"{self.norm_groups} and of heads[{level}] = {self.heads[level]}"
                )


SD15 = UNetConfig()
SD21 = UNetConfig(heads=(5, 10, 20, 20), cross_attention_dim=1024, linear_projection=True)
SDXL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    transformer_depth=(0, 2, 10),
    mid_depth=10,
    heads=(5, 10, 20),
    cross_attention_dim=2048,
    linear_projection=True,
    addition=(1280, 6, 256),
)


def sinusoidal_embedding(t: Tensor, width: int) -> Tensor:
    """Embed numbers as [cos(t f), sin(t f)], f_i = 10000^(-i / (width // 2)), in float32.

    Args:
        t: (m,) timesteps, fractional ones allowed.
        width: features per number; an odd width ends in a zero.

    Returns:
        (m, width), float32.

    Source: Ho et al. 2020 (arXiv 2006.11239); diffusers' flip_sin_to_cos=True, freq_shift=0.
    """
    half = width // 2
    f = torch.exp(
        torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(1e4) / half)
    )
    angle = t[:, None].float() * f
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, width % 2))


def embedding(c_in: int, c: int) -> nn.Module:
    """Linear, SiLU, Linear on an embedding."""
    layers = {"linear_1": nn.Linear(c_in, c), "act": nn.SiLU(), "linear_2": nn.Linear(c, c)}
    return nn.Sequential(OrderedDict(layers))


class Attention(nn.Module):
    """Multi-head attention softmax(q k^T / sqrt(d)) v of pixels over themselves or over a context.

    The mask is boolean (True attends) or additive, (b, 1, t), as diffusers passes it.
    """

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
        return self.to_out(out.transpose(1, 2).flatten(2))  # (b, n, c)


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
        self.ff = nn.Sequential(OrderedDict(net=net))

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
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(c, config.cross_attention_dim, heads) for _ in range(depth)
        )
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


def resample(c: int, stride: int) -> nn.Module:
    """The convolution before (stride 2) or after (stride 1) which the resolution changes."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(c, c, 3, stride=stride, padding=1)))


class Block(nn.Module):
    """The residual layers of a level, the first `attentions` of them followed by a transformer."""

    def __init__(
        self, c_in: Sequence[int], level: int, attentions: int, depth: int, config: UNetConfig
    ) -> None:
        super().__init__()
        c, heads = config.block_out_channels[level], config.heads[level]
        self.resnets = nn.ModuleList(Resnet(c_layer, c, config) for c_layer in c_in)
        self.attentions = nn.ModuleList(
            Transformer(c, depth, heads, config) for _ in range(attentions)
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def layer(self, i: int, x: Tensor, emb: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        x = self.resnets[i](x, emb)
        return self.attentions[i](x, context, mask) if i < len(self.attentions) else x


class UNet(nn.Module):
    """Predict from a noisy latent, a timestep and a text context.

    Args:
        config: the topology; `SD15`, `SD21`, `SDXL` or one's own.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, layers = config.block_out_channels, config.layers_per_block
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = embedding(channels[0], 4 * channels[0])
        if config.addition is not None:
            pooled, ids, width = config.addition
            self.add_embedding = embedding(pooled + ids * width, 4 * channels[0])

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [channels[0]]
        for level, c in enumerate(channels):
            depth = config.transformer_depth[level]
            c_in = (skips[-1], *[c] * (layers - 1))
            block = Block(c_in, level, layers if depth else 0, depth, config)
            skips += [c] * layers
            if level < len(channels) - 1:
                block.downsamplers.append(resample(c, stride=2))
                skips.append(c)
            self.down_blocks.append(block)

        c = channels[-1]
        self.mid_block = Block((c, c), -1, 1, config.mid_depth, config)

        for level in reversed(range(len(channels))):
            depth, c_before, c = config.transformer_depth[level], c, channels[level]
            c_in = [h + skips.pop() for h in (c_before, *[c] * layers)]
            block = Block(c_in, level, layers + 1 if depth else 0, depth, config)
            if level > 0:
                block.upsamplers.append(resample(c, stride=1))
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        context: Tensor,
        added: tuple[Tensor, Tensor] | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Run the U-Net in the dtype of its weights; only sinusoids are computed in float32.

        Args:
            x: (b, in_channels, H, W), any H and W: levels round up, and back to the same sizes.
            t: timestep in training steps, a scalar or (b,).
            context: (b, t, cross_attention_dim) text features.
            added: (pooled text (b, pooled width), time ids (b, ids)) if the config has `addition`.
            context_mask: (b, t) bool, False for tokens that cross-attention must not see. A row
                without any True has no defined output.

        Returns:
            (b, out_channels, H, W), dtype of x.

        Raises:
            ValueError: a shape does not fit, or `added` is missing or not expected.
        """
        emb = F.silu(self.embed(x, t, added))  # every residual layer starts with this SiLU
        if context.ndim != 3 or context.shape[::2] != (len(x), self.config.cross_attention_dim):
            raise ValueError(
                f"context must be ({len(x)}, t, {self.config.cross_attention_dim}), "
                f"got {tuple(context.shape)}"
            )
        if context_mask is not None and context_mask.shape != context.shape[:2]:
            raise ValueError(
                f"context_mask must be {tuple(context.shape[:2])}, got {tuple(context_mask.shape)}"
            )
        mask = None if context_mask is None else context_mask[:, None]  # (b, 1, t)

        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, x, emb, context, mask)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        for i in range(2):
            x = self.mid_block.layer(i, x, emb, context, mask)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = block.layer(i, torch.cat([x, skips.pop()], dim=1), emb, context, mask)
            for upsample in block.upsamplers:
                x = upsample(F.interpolate(x, size=skips[-1].shape[2:], mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def embed(
        self, x: Tensor, t: Tensor | float, added: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Embed the timestep, and what SDXL adds to it: (b, 4 * block_out_channels[0])."""
        b, config = len(x), self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ValueError(f"x must be (b, {config.in_channels}, H, W), got {tuple(x.shape)}")
        t = torch.as_tensor(t, device=x.device)
        if t.shape not in ((), (1,), (b,)):
            raise ValueError(f"t must be a scalar or ({b},), got {tuple(t.shape)}")
        width = config.block_out_channels[0]
        emb = self.time_embedding(sinusoidal_embedding(t.expand(b), width).to(x.dtype))
        if (added is None) != (config.addition is None):
            raise ValueError(f"added must be {'given' if config.addition else 'None'} for {config}")
        if added is None:
            return emb
        pooled, ids = added
        n_pooled, n_ids, width = config.addition
        if pooled.shape != (b, n_pooled) or ids.shape != (b, n_ids):
            raise ValueError(
                f"added must be ({b}, {n_pooled}) and ({b}, {n_ids}), "
                f"got {tuple(pooled.shape)} and {tuple(ids.shape)}"
            )
        ids = sinusoidal_embedding(ids.flatten(), width).unflatten(0, (b, n_ids)).flatten(1)
        return emb + self.add_embedding(torch.cat([pooled, ids.to(x.dtype)], dim=1).to(x.dtype))
