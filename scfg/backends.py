"""The operations of `scfg.reference` as torch.library custom ops, with Triton as CUDA kernel."""

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from scfg import reference


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


def kernel(name: str):
    """The Triton twin called ``name``."""
    return getattr(importlib.import_module("csrc_triton"), name)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def contiguous(value):
    """The value with every tensor in it contiguous, as the kernels read them."""
    if isinstance(value, Tensor):
        return value.contiguous()
    if isinstance(value, (list, tuple)):
        return [contiguous(item) for item in value]
    return value


def _define(name: str, fake) -> None:
    """Register ``torch.ops.scfg.<name>``: the reference, Triton on CUDA, a fake for tracing."""
    definition = getattr(reference, name)
    op = torch.library.custom_op(f"scfg::{name}", definition, mutates_args=())

    @op.register_kernel("cuda")
    def _(*args, **kwargs):
        if not has_triton():
            return definition(*args, **kwargs)
        return kernel(name)(*map(contiguous, args), **{k: contiguous(v) for k, v in kwargs.items()})

    op.register_fake(fake)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake_segment(tokens, start, h, w, factors):
    shape = (tokens[0].shape[0], h, w)
    return tokens[0].new_empty(shape, dtype=torch.int64), tokens[0].new_empty(
        shape, dtype=torch.bool
    )


def _fake_region_sums(eps_uncond, eps_text, labels, foreground, tokens, factor):
    b, _, height, width = eps_text.shape
    on_gpu = eps_text.is_cuda and has_triton()
    parts = kernel("partials")(height * width) if on_gpu else 1
    return eps_text.new_empty((b, parts, tokens + 1, 2), dtype=_wide(eps_text))


def _fake_guide(eps_uncond, eps_text, *args, **kwargs):
    b, _, height, width = eps_text.shape
    rate = eps_text.new_empty((b, 1, height, width), dtype=_wide(eps_text))
    return eps_text.new_empty(eps_text.shape), rate


def _fake_map(q, k, heads, key_bias=None):
    return q.new_empty((q.shape[0], q.shape[1], k.shape[1]), dtype=_wide(q))


def _fake_complete(self_map, cross_map, *args, **kwargs):
    b, n, t = cross_map.shape
    return cross_map.new_empty((b, n, t + 1), dtype=_wide(cross_map))


_define("attention_map", _fake_map)
_define(
    "attention_maps",
    lambda q_self, k_self, q_cross, k_cross, heads, key_bias=None: (
        _fake_map(q_self, k_self, heads),
        _fake_map(q_cross, k_cross, heads),
    ),
)
_define(
    "attention_apply",
    lambda q, k, columns, heads: columns.new_empty(columns.shape, dtype=_wide(columns)),
)
_define(
    "propagate",
    lambda self_map, columns, propagation="paper", steps=4: columns.new_empty(
        columns.shape, dtype=_wide(columns)
    ),
)
_define("complete", _fake_complete)
_define("segment", _fake_segment)
_define("region_sums", _fake_region_sums)
_define("guide", _fake_guide)
