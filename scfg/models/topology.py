"""What a `scfg.models.unet.UNet` is made of, and what the published models are.

A narrower one of the same topology is
`dataclasses.replace(SD15, block_out_channels=(32, 64, 128, 128))`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class UNetConfig:
    """Topology of a `UNet`. Tuples have one entry per level, finest first (lists are converted).

    Raises:
        ValueError: lengths differ, a number is too small, or channels do not divide.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # a level has half the resolution
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)  # blocks per attention layer; 0: no attention
    mid_depth: int = 1  # blocks of the attention layer in the middle, at the coarsest level
    heads: tuple[int, ...] = (8, 8, 8, 8)  # diffusers configs call it attention_head_dim
    layers_per_block: int = 2  # of a level going down; going up has one more
    cross_attention_dim: int = 768  # channels of the context
    linear_projection: bool = False  # in and out of a transformer: Linear instead of Conv2d 1x1
    norm_groups: int = 32  # of every GroupNorm
    addition: tuple[int, int, int] | None = None  # SDXL: (pooled channels, time ids, their width)

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels) or 1
        counts = dict.fromkeys(("block_out_channels", "transformer_depth", "heads"), levels)
        counts["addition"] = 3
        for name, value in vars(self).items():
            if value is None:
                continue
            values = (value,)
            if name in counts:
                values = tuple(value)
                object.__setattr__(self, name, values)
            count = counts.get(name, 1)
            least = 0 if name in ("transformer_depth", "linear_projection") else 1
            if len(values) != count or min(values) < least:
                raise ValueError(f"{name} must be {count} number(s) >= {least}, got {value}")
        for c, g in zip(self.block_out_channels, self.heads, strict=True):
            if c % self.norm_groups or c % g:
                raise ValueError(f"block_out_channels must divide by norm_groups and heads: {self}")


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
