"""Triton twins of `scfg.reference`: same names, parameters, order and defaults, for CUDA tensors."""

from csrc_triton.attention import attention_apply, attention_map, attention_maps
from csrc_triton.guide import guide, partials, region_sums
from csrc_triton.propagate import complete, propagate
from csrc_triton.segment import segment

__all__ = [
    "attention_apply",
    "attention_map",
    "attention_maps",
    "complete",
    "guide",
    "partials",
    "propagate",
    "region_sums",
    "segment",
]
