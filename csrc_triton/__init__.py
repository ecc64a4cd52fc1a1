"""Triton twins of `scfg.reference`: names, parameters, order and defaults are the same; on CUDA."""

from csrc_triton.attention import attention_apply, attention_map, attention_maps, stacked_maps
from csrc_triton.evidence import complete, propagate
from csrc_triton.guidance import guide, region_sums
from csrc_triton.joint import joint_maps
from csrc_triton.onepass import guide_evidence
from csrc_triton.regions import segment

__all__ = [
    "attention_apply",
    "attention_map",
    "attention_maps",
    "complete",
    "guide",
    "guide_evidence",
    "joint_maps",
    "propagate",
    "region_sums",
    "segment",
    "stacked_maps",
]
