"""The same operations, checked once, then sent to torch or to Triton.

Each function here has the parameters of its namesake in `scfg.reference`, whose docstring is the
definition, plus ``backend``:

- ``"auto"``: a `torch.library` custom op, ``torch.ops.scfg.<name>``: the reference on a CPU, Triton
  on CUDA from sm_80 on and on AMD, when triton is installed (else the reference). Opaque to and
  usable under torch.compile.
- ``"torch"``: the reference itself, on any device; the only differentiable choice.
- ``"triton"``: Triton or an error. Kernels take float16, bfloat16 and float32.
"""

import torch
from torch import Tensor

from scfg import backends, checks
from scfg.config import JOINTS


def attention_map(
    q: Tensor, k: Tensor, heads: int, key_bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Attention probabilities averaged over heads, see `scfg.reference.attention_map`."""
    checks.queries_and_keys(q, k, heads)
    if key_bias is not None:
        checks.shape(key_bias, "key_bias", q.shape[0], k.shape[1])
    return backends.run("attention_map", backend, q=q, k=k, heads=heads, key_bias=key_bias)


def attention_maps(
    q_self: Tensor,
    k_self: Tensor,
    q_cross: Tensor,
    k_cross: Tensor,
    heads: int,
    key_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Self- and cross-attention map of one block, see `scfg.reference.attention_maps`."""
    checks.queries_and_keys(q_self, k_self, heads, "_self")
    checks.queries_and_keys(q_cross, k_cross, heads, "_cross")
    checks.shape(q_cross, "q_cross", *q_self.shape)
    if key_bias is not None:
        checks.shape(key_bias, "key_bias", q_cross.shape[0], k_cross.shape[1])
    return backends.run(
        "attention_maps",
        backend,
        q_self=q_self,
        k_self=k_self,
        q_cross=q_cross,
        k_cross=k_cross,
        heads=heads,
        key_bias=key_bias,
    )


def stacked_maps(
    q_self: list[Tensor],
    k_self: list[Tensor],
    q_cross: list[Tensor],
    k_cross: list[Tensor],
    heads: int,
    key_bias: list[Tensor | None],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Maps of several blocks of one shape, see `scfg.reference.stacked_maps`."""
    layers = dict(q_self=q_self, k_self=k_self, q_cross=q_cross, k_cross=k_cross, key_bias=key_bias)
    checks.blocks(layers, heads)
    lists = {name: list(each) for name, each in layers.items()}
    return backends.run("stacked_maps", backend, **lists, heads=heads)


def joint_maps(
    q: Tensor,
    k: Tensor,
    token_count: int,
    heads: int,
    key_bias: Tensor | None = None,
    joint: str = "renormalise",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Self and cross map under one softmax, see `scfg.reference.joint_maps`."""
    checks.queries_and_keys(q, k, heads)
    checks.whole(token_count, "token_count")
    if token_count >= k.shape[1]:
        raise ValueError(
            f"token_count must be 1 to {k.shape[1] - 1}, so that k has text and image keys, got "
            f"{token_count}"
        )
    if key_bias is not None:
        checks.shape(key_bias, "key_bias", q.shape[0], k.shape[1])
    checks.one_of(joint, "joint", JOINTS)
    return backends.run(
        "joint_maps",
        backend,
        q=q,
        k=k,
        token_count=token_count,
        heads=heads,
        key_bias=key_bias,
        joint=joint,
    )


def attention_apply(
    q: Tensor, k: Tensor, columns: Tensor, heads: int, backend: str = "auto"
) -> Tensor:
    """Head-mean self-attention times columns, see `scfg.reference.attention_apply`."""
    checks.queries_and_keys(q, k, heads)
    checks.shape(columns, "columns", q.shape[0], k.shape[1], "t")
    checks.floating(columns, "columns")
    if (columns.dtype == torch.float64) != (q.dtype == torch.float64):
        raise TypeError(
            f"q and columns must be float64 both or neither, got {q.dtype} and {columns.dtype}"
        )
    return backends.run("attention_apply", backend, q=q, k=k, columns=columns, heads=heads)


def propagate(
    self_map: Tensor | None,
    columns: Tensor,
    propagation: str = "paper",
    powers: int = 4,
    backend: str = "auto",
) -> Tensor:
    """Complete token maps through self-attention, see `scfg.reference.propagate`."""
    checks.shape(columns, "columns", "b", "n", "t")
    checks.maps(self_map, columns, "columns", propagation, powers)
    return backends.run(
        "propagate",
        backend,
        self_map=self_map,
        columns=columns,
        propagation=propagation,
        powers=powers,
    )


def complete(
    self_map: Tensor | None,
    cross_map: Tensor,
    weights: Tensor,
    total: Tensor | None = None,
    propagation: str = "paper",
    powers: int = 4,
    backend: str = "auto",
) -> Tensor:
    """Fold layers into the evidence of their level, see `scfg.reference.complete`."""
    checks.maps(self_map, cross_map, "cross_map", propagation, powers)
    b, n, t = cross_map.shape[-3:]
    checks.shape(weights, "weights", n)
    if total is not None:
        checks.shape(total, "total", b, n, t + 1)
    return backends.run(
        "complete",
        backend,
        self_map=self_map,
        cross_map=cross_map,
        weights=weights,
        total=total,
        propagation=propagation,
        powers=powers,
    )


def segment(
    text: list[Tensor],
    front: list[Tensor],
    h: int,
    w: int,
    factors: list[int],
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels and foreground from the evidence of all levels, see `scfg.reference.segment`."""
    checks.levels(text, front, h, w, factors)
    return backends.run(
        "segment", backend, text=list(text), front=list(front), h=h, w=w, factors=list(factors)
    )


def region_sums(
    eps_uncond: Tensor,
    eps_text: Tensor,
    labels: Tensor,
    foreground: Tensor,
    token_count: int,
    factor: int,
    backend: str = "auto",
) -> Tensor:
    """Sums of the guidance norm over regions, see `scfg.reference.region_sums`."""
    checks.predictions(eps_uncond, eps_text)
    checks.labels(eps_text, labels, factor, token_count)
    checks.shape(foreground, "foreground", *labels.shape)
    if foreground.dtype != torch.bool:
        raise TypeError(f"foreground must be bool, got {foreground.dtype}")
    return backends.run(
        "region_sums",
        backend,
        eps_uncond=eps_uncond,
        eps_text=eps_text,
        labels=labels,
        foreground=foreground,
        token_count=token_count,
        factor=factor,
    )


def guide(
    eps_uncond: Tensor,
    eps_text: Tensor,
    labels: Tensor,
    sums: Tensor,
    guidance_scale: float | Tensor,
    factor: int,
    benchmark: str = "foreground",
    rate_min: float = 0.8,
    rate_max: float = 3.0,
    max_scale: float | None = 15.0,
    token_weights: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Rates of the regions and the guided prediction, see `scfg.reference.guide`."""
    checks.predictions(eps_uncond, eps_text)
    b = eps_text.shape[0]
    checks.shape(sums, "sums", b, "p", "t+1", 2)
    checks.labels(eps_text, labels, factor, sums.shape[2] - 1)
    if token_weights is not None:
        checks.weights(token_weights)
        checks.shape(token_weights, "token_weights", b, sums.shape[2] - 1)
    return backends.run(
        "guide",
        backend,
        eps_uncond=eps_uncond,
        eps_text=eps_text,
        labels=labels,
        sums=sums,
        guidance_scale=checks.scale(guidance_scale, eps_text),
        factor=factor,
        **checks.rates(benchmark, rate_min, rate_max, max_scale),
        token_weights=token_weights,
    )


def guide_evidence(
    eps_uncond: Tensor,
    eps_text: Tensor,
    text: list[Tensor],
    front: list[Tensor],
    h: int,
    w: int,
    factors: list[int],
    guidance_scale: float | Tensor,
    factor: int,
    benchmark: str = "foreground",
    rate_min: float = 0.8,
    rate_max: float = 3.0,
    max_scale: float | None = 15.0,
    token_weights: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From evidence to the guided prediction, see `scfg.reference.guide_evidence`."""
    checks.predictions(eps_uncond, eps_text)
    checks.levels(text, front, h, w, factors)
    b, _, height, width = eps_text.shape
    checks.whole(factor, "factor")
    if (h, w) != (-(-height // factor), -(-width // factor)):
        raise ValueError(
            f"h and w must be those of ({height}, {width}) reduced by {factor}, got {h} and {w}"
        )
    if text[0].shape[0] != b:
        raise ValueError(f"text[0] must have {b} images, got {text[0].shape[0]}")
    if token_weights is not None:
        checks.weights(token_weights)
        checks.shape(token_weights, "token_weights", b, text[0].shape[2] - 1)
    return backends.run(
        "guide_evidence",
        backend,
        eps_uncond=eps_uncond,
        eps_text=eps_text,
        text=list(text),
        front=list(front),
        h=h,
        w=w,
        factors=list(factors),
        guidance_scale=checks.scale(guidance_scale, eps_text),
        factor=factor,
        **checks.rates(benchmark, rate_min, rate_max, max_scale),
        token_weights=token_weights,
    )
