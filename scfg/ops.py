"""The same operations, checked once, then sent to torch or to Triton.

Each function here has the parameters of its namesake in `scfg.reference`, whose docstring is the
definition, plus ``backend``:

- ``"auto"``: a `torch.library` custom op, ``torch.ops.scfg.<name>``: the reference on a CPU, Triton
  on CUDA from sm_80 on and on AMD, when triton is installed (else the reference). Opaque to and
  usable under torch.compile.
- ``"torch"``: the reference itself, on any device; the only differentiable choice.
- ``"triton"``: Triton or an error. Kernels take float16, bfloat16 and float32.

On a CPU tensors are checked for NaN and infinity; on other devices that would wait for the device,
so there a NaN stays in the image it came from.
"""

import torch
from torch import Tensor

from scfg import backends

LARGEST = 1e18  # magnitude of a prediction whose norm is taken in float32


def _shape(x: Tensor, name: str, *expected: int | str) -> None:
    """Raise unless x is a floating tensor of the given sizes; a letter stands for any size."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    fits = x.dim() == len(expected) and all(
        isinstance(want, str) or want == size for want, size in zip(expected, x.shape, strict=True)
    )
    if not fits:
        want = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name} must have shape ({want}), got {tuple(x.shape)}")
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")


def _finite(x: Tensor, name: str) -> None:
    """Raise if a CPU tensor holds NaN or infinity; says in which image."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
        bad = (~torch.isfinite(x)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"{name} must be finite, got NaN or infinity in batch rows {bad}")


def check_weights(x: Tensor, name: str = "token_weights") -> None:
    """Raise unless x is a tensor of factors: real numbers, on a CPU finite and > 0 each."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got {x.dtype}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if not (torch.isfinite(x) & (x > 0)).all():
            raise ValueError(f"{name} must be finite and > 0, got {x.flatten().tolist()}")


def _floating(x: Tensor, name: str) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {x.dtype}")


def _check_qk(q: Tensor, k: Tensor, heads: int, suffix: str = "") -> None:
    _shape(q, "q" + suffix, "b", "n", "g*d")
    _shape(k, "k" + suffix, q.shape[0], "m", q.shape[2])
    _floating(q, "q" + suffix)
    if q.dtype != k.dtype:
        raise TypeError(f"q{suffix} and k{suffix} must have one dtype, got {q.dtype} and {k.dtype}")
    if heads < 1 or q.shape[2] % heads:
        raise ValueError(f"heads must divide the width {q.shape[2]} of q{suffix}, got {heads}")


def attention_map(
    q: Tensor, k: Tensor, heads: int, key_bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Attention probabilities averaged over heads, see `scfg.reference.attention_map`."""
    _check_qk(q, k, heads)
    if key_bias is not None:
        _shape(key_bias, "key_bias", q.shape[0], k.shape[1])
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
    _check_qk(q_self, k_self, heads, "_self")
    _check_qk(q_cross, k_cross, heads, "_cross")
    _shape(q_cross, "q_cross", *q_self.shape)
    if key_bias is not None:
        _shape(key_bias, "key_bias", q_cross.shape[0], k_cross.shape[1])
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
    blocks = dict(q_self=q_self, k_self=k_self, q_cross=q_cross, k_cross=k_cross, key_bias=key_bias)
    for name, layers in blocks.items():
        if not isinstance(layers, (list, tuple)):
            raise TypeError(
                f"{name} must be a list, one entry a layer, got {type(layers).__name__}"
            )
        if not layers or len(layers) != len(q_self):
            raise ValueError(
                f"{name} must have as many layers as q_self, {len(q_self)}, at least one, got "
                f"{len(layers)}"
            )
    _check_qk(q_self[0], k_self[0], heads, "_self[0]")
    _check_qk(q_cross[0], k_cross[0], heads, "_cross[0]")
    _shape(q_cross[0], "q_cross[0]", *q_self[0].shape)
    if key_bias[0] is not None:
        _shape(key_bias[0], "key_bias[0]", q_cross[0].shape[0], k_cross[0].shape[1])
    for name, layers in blocks.items():
        first = layers[0]
        for layer, x in enumerate(layers[1:], 1):
            if first is not None or x is not None:
                _alike(x, first, f"{name}[{layer}]")
    return backends.run(
        "stacked_maps",
        backend,
        **{name: list(layers) for name, layers in blocks.items()},
        heads=heads,
    )


def _alike(x: Tensor, first: Tensor, name: str) -> None:
    """Raise unless a layer's tensor is one of the first layer's shape and type."""
    if not isinstance(first, Tensor):
        raise TypeError(f"{name} must be None, as of the first layer, got {type(x).__name__}")
    _shape(x, name, *first.shape)
    if x.dtype != first.dtype:
        raise TypeError(f"{name} must be {first.dtype}, as of the first layer, got {x.dtype}")


def attention_apply(
    q: Tensor, k: Tensor, columns: Tensor, heads: int, backend: str = "auto"
) -> Tensor:
    """Head-mean self-attention times columns, see `scfg.reference.attention_apply`."""
    _check_qk(q, k, heads)
    _shape(columns, "columns", q.shape[0], k.shape[1], "t")
    return backends.run("attention_apply", backend, q=q, k=k, columns=columns, heads=heads)


def _check_maps(self_map: Tensor | None, columns: Tensor, name: str, propagation: str, steps: int):
    stack = columns.shape[:1] if isinstance(columns, Tensor) and columns.dim() == 4 else ()
    _shape(columns, name, *stack, "b", "n", "t")
    _floating(columns, name)
    if propagation not in ("paper", "official", "none"):
        raise ValueError(f"propagation must be 'paper', 'official' or 'none', got {propagation!r}")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if propagation == "none":
        return
    if self_map is None:
        raise ValueError(f"self_map must be a tensor when propagation is {propagation!r}, got None")
    b, n, _ = columns.shape[-3:]
    _shape(self_map, "self_map", *stack, b, n, n)
    _floating(self_map, "self_map")
    if self_map.dtype != columns.dtype:
        raise TypeError(
            f"self_map and {name} must have one dtype, got {self_map.dtype} and {columns.dtype}"
        )


def propagate(
    self_map: Tensor | None,
    columns: Tensor,
    propagation: str = "paper",
    steps: int = 4,
    backend: str = "auto",
) -> Tensor:
    """Complete token maps through self-attention, see `scfg.reference.propagate`."""
    _shape(columns, "columns", "b", "n", "t")
    _check_maps(self_map, columns, "columns", propagation, steps)
    return backends.run(
        "propagate",
        backend,
        self_map=self_map,
        columns=columns,
        propagation=propagation,
        steps=steps,
    )


def complete(
    self_map: Tensor | None,
    cross_map: Tensor,
    weights: Tensor,
    total: Tensor | None = None,
    propagation: str = "paper",
    steps: int = 4,
    backend: str = "auto",
) -> Tensor:
    """Fold layers into the evidence of their level, see `scfg.reference.complete`."""
    _check_maps(self_map, cross_map, "cross_map", propagation, steps)
    b, n, t = cross_map.shape[-3:]
    _shape(weights, "weights", n)
    if total is not None:
        _shape(total, "total", b, n, t + 1)
    return backends.run(
        "complete",
        backend,
        self_map=self_map,
        cross_map=cross_map,
        weights=weights,
        total=total,
        propagation=propagation,
        steps=steps,
    )


def _check_levels(
    tokens: list[Tensor], start: list[Tensor], h: int, w: int, factors: list[int]
) -> None:
    for name, value in (("tokens", tokens), ("start", start), ("factors", factors)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list, one entry a level, got {type(value).__name__}")
    if not tokens or not len(tokens) == len(start) == len(factors):
        raise ValueError(
            "tokens, start and factors must have one entry per level, at least one, "
            f"got {len(tokens)}, {len(start)} and {len(factors)}"
        )
    for name, levels in (("tokens", tokens), ("start", start)):
        _shape(levels[0], f"{name}[0]", "b", "n", "t+1")
        for level, (x, factor) in enumerate(zip(levels, factors, strict=True)):
            if factor < 1:
                raise ValueError(f"factors[{level}] must be >= 1, got {factor}")
            n = -(-h // factor) * -(-w // factor)
            _shape(x, f"{name}[{level}]", tokens[0].shape[0], n, levels[0].shape[2])
            _finite(x, f"{name}[{level}] (evidence of the attention maps)")


def segment(
    tokens: list[Tensor],
    start: list[Tensor],
    h: int,
    w: int,
    factors: list[int],
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels and foreground from the evidence of all levels, see `scfg.reference.segment`."""
    _check_levels(tokens, start, h, w, factors)
    return backends.run(
        "segment", backend, tokens=list(tokens), start=list(start), h=h, w=w, factors=list(factors)
    )


def check_map(x: Tensor, name: str, b: int, n: int | str = "n", m: int | str = "t") -> None:
    """Raise unless x is a finite (b, n, m) attention map."""
    _shape(x, name, b, n, m)
    _floating(x, name)
    _finite(x, name)


def check_predictions(eps_uncond: Tensor, eps_text: Tensor) -> None:
    """Raise unless both are finite floating point tensors of one shape (b, c, H, W).

    On a CPU they are also refused above `LARGEST`, where float32 has no room for their squares.
    """
    _shape(eps_text, "eps_text", "b", "c", "H", "W")
    _shape(eps_uncond, "eps_uncond", *eps_text.shape)
    for name, x in (("eps_uncond", eps_uncond), ("eps_text", eps_text)):
        _floating(x, name)
        _finite(x, name)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            if x.dtype != torch.float64 and x.abs().amax() > LARGEST:
                raise ValueError(f"{name} must be within +-{LARGEST:g}, got {x.abs().amax():g}")


def _check_labels(eps_text: Tensor, labels: Tensor, factor: int, tokens: int) -> None:
    b, _, height, width = eps_text.shape
    if factor < 1:
        raise ValueError(f"factor must be >= 1, got {factor}")
    _shape(labels, "labels", b, -(-height // factor), -(-width // factor))
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if not 0 <= labels.min() <= labels.max() < tokens:
            raise ValueError(
                f"labels must be in [0, {tokens}), got {labels.min():d} to {labels.max():d}"
            )


def _check_scale(guidance_scale: float | Tensor, b: int) -> float | Tensor:
    """The guidance scale, a float or (b,), as the operations take it."""
    if isinstance(guidance_scale, Tensor):
        _shape(guidance_scale, "guidance_scale", b)
        return guidance_scale
    return float(guidance_scale)


def region_sums(
    eps_uncond: Tensor,
    eps_text: Tensor,
    labels: Tensor,
    foreground: Tensor,
    tokens: int,
    factor: int,
    backend: str = "auto",
) -> Tensor:
    """Sums of the guidance norm over regions, see `scfg.reference.region_sums`."""
    check_predictions(eps_uncond, eps_text)
    _check_labels(eps_text, labels, factor, tokens)
    _shape(foreground, "foreground", *labels.shape)
    return backends.run(
        "region_sums",
        backend,
        eps_uncond=eps_uncond,
        eps_text=eps_text,
        labels=labels,
        foreground=foreground,
        tokens=tokens,
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
    check_predictions(eps_uncond, eps_text)
    b = eps_uncond.shape[0]
    _shape(sums, "sums", b, "p", "t+1", 2)
    _check_labels(eps_text, labels, factor, sums.shape[2] - 1)
    if token_weights is not None:
        check_weights(token_weights)
        _shape(token_weights, "token_weights", b, sums.shape[2] - 1)
    return backends.run(
        "guide",
        backend,
        eps_uncond=eps_uncond,
        eps_text=eps_text,
        labels=labels,
        sums=sums,
        guidance_scale=_check_scale(guidance_scale, b),
        factor=factor,
        benchmark=benchmark,
        rate_min=float(rate_min),
        rate_max=float(rate_max),
        max_scale=None if max_scale is None else float(max_scale),
        token_weights=token_weights,
    )


def guide_evidence(
    eps_uncond: Tensor,
    eps_text: Tensor,
    tokens: list[Tensor],
    start: list[Tensor],
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
    check_predictions(eps_uncond, eps_text)
    _check_levels(tokens, start, h, w, factors)
    b, _, height, width = eps_text.shape
    if (h, w) != (-(-height // factor), -(-width // factor)):
        raise ValueError(
            f"h and w must be those of ({height}, {width}) reduced by {factor}, got {h} and {w}"
        )
    if tokens[0].shape[0] != b:
        raise ValueError(f"tokens[0] must have {b} images, got {tokens[0].shape[0]}")
    if token_weights is not None:
        check_weights(token_weights)
        _shape(token_weights, "token_weights", b, tokens[0].shape[2] - 1)
    return backends.run(
        "guide_evidence",
        backend,
        eps_uncond=eps_uncond,
        eps_text=eps_text,
        tokens=list(tokens),
        start=list(start),
        h=h,
        w=w,
        factors=list(factors),
        guidance_scale=_check_scale(guidance_scale, b),
        factor=factor,
        benchmark=benchmark,
        rate_min=float(rate_min),
        rate_max=float(rate_max),
        max_scale=None if max_scale is None else float(max_scale),
        token_weights=token_weights,
    )
