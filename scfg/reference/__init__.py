"""Every operation in plain torch: the definition the Triton kernels are tested against.

A file a step, named as that of its kernels in `csrc_triton`. Everything is differentiable except
`segment`, whose result is discrete. Inputs are not checked: `scfg.ops` does that.
"""

from scfg.reference.attention import (
    attention_apply,
    attention_map,
    attention_maps,
    joint_maps,
    linear_attention_map,
    split_joint,
    stacked_maps,
)
from scfg.reference.evidence import complete, group_columns, power_weights, propagate
from scfg.reference.grids import BLUR, blur, spatial_weights, spread, upsample
from scfg.reference.guidance import guidance_norm, guide, guide_evidence, region_rates, region_sums
from scfg.reference.regions import NO_START, segment, start_is_flat

__all__ = [
    "BLUR", "NO_START", "attention_apply", "attention_map", "attention_maps", "blur",
    "complete", "group_columns", "guidance_norm", "guide", "guide_evidence",
    "joint_maps", "linear_attention_map", "power_weights", "propagate", "region_rates",
    "region_sums", "segment", "spatial_weights", "split_joint", "spread", "stacked_maps",
    "start_is_flat", "upsample",
]  # fmt: skip
