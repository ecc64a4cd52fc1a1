"""What operations ask of their arguments; an error names the argument, what came, what was due.

On a CPU tensors are checked for NaN and infinity; on other devices that would wait for the device,
so there a NaN stays in the image it came from.
"""

import numbers

import torch
from torch import Tensor

from scfg.config import PROPAGATIONS, SMALLEST

FLOATS = SMALLEST, torch.finfo(torch.float32).max  # numbers > 0 that float32 holds in full
LARGEST = 1e18  # magnitude of a prediction whose norm is taken in float32


def shape(x: Tensor, name: str, *expected: int | str) -> None:
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


def listed(x: list, name: str, entry: str) -> None:
    """Raise unless x is a list, which has one entry for each of something."""
    if not isinstance(x, (list, tuple)):
        raise TypeError(f"{name} must be a list, one entry a {entry}, got {type(x).__name__}")


def whole(x: int, name: str) -> None:
    """Raise unless x is an int of at least 1."""
    if isinstance(x, bool) or not isinstance(x, int) or x < 1:
        raise ValueError(f"{name} must be an int >= 1, got {x!r}")


def real(x: float, name: str) -> None:
    """Raise unless x is a real number."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name} must be a number, got {x!r}")


def positive(x: float, name: str) -> None:
    """Raise unless x is a number > 0 that float32 can hold."""
    real(x, name)
    if not FLOATS[0] <= x <= FLOATS[1]:
        raise ValueError(f"{name} must be finite and > 0, got {x}")


def one_of(x: str, name: str, known: tuple[str, ...]) -> None:
    """Raise unless x is one of the names that are known."""
    if x not in known:
        raise ValueError(f"{name} must be one of {known}, got {x!r}")


def finite(x: Tensor, name: str) -> None:
    """Raise if a CPU tensor holds NaN or infinity; says in which image."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not torch.isfinite(x.sum()) and not torch.isfinite(x).all():
        bad = (~torch.isfinite(x)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(f"{name} must be finite, got NaN or infinity in batch rows {bad}")


def floating(x: Tensor, name: str) -> None:
    """Raise unless the tensor is of a floating point type."""
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {x.dtype}")


def weights(x: Tensor, name: str = "token_weights") -> None:
    """Raise unless x is a tensor of factors: real numbers, on a CPU finite and > 0 each."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got {x.dtype}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if not (torch.isfinite(x) & (x > 0)).all():
            raise ValueError(f"{name} must be finite and > 0, got {x.flatten().tolist()}")


def attention_map(x: Tensor, name: str, b: int, n: int | str = "n", m: int | str = "t") -> None:
    """Raise unless x is a finite (b, n, m) attention map."""
    shape(x, name, b, n, m)
    floating(x, name)
    finite(x, name)


def predictions(eps_uncond: Tensor, eps_text: Tensor) -> None:
    """Raise unless both are finite floating point tensors of one shape (b, c, H, W).

    On a CPU they are also refused above `LARGEST`, where float32 has no room for their squares.
    """
    shape(eps_text, "eps_text", "b", "c", "H", "W")
    shape(eps_uncond, "eps_uncond", *eps_text.shape)
    for name, x in (("eps_uncond", eps_uncond), ("eps_text", eps_text)):
        floating(x, name)
        finite(x, name)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            if x.dtype != torch.float64 and x.abs().amax() > LARGEST:
                raise ValueError(f"{name} must be within +-{LARGEST:g}, got {x.abs().amax():g}")


def guidance_scale(value: float | Tensor) -> None:
    """Raise unless a guidance scale is a tensor, or a number > 0 that float32 can hold."""
    if not isinstance(value, Tensor):
        positive(value, "guidance_scale")


def scale(value: float | Tensor, eps: Tensor) -> float | Tensor:
    """The guidance scale as a float, or as a (b,) float32 tensor on the device of eps.

    Raises:
        TypeError: It is no number and no tensor.
        ValueError: It is not finite and > 0 (a tensor is checked on a CPU only), or not (b,).
    """
    b = eps.shape[0]
    guidance_scale(value)
    if not isinstance(value, Tensor):
        return float(value)
    if value.shape not in ((), (b,)):
        raise ValueError(f"guidance_scale must be a float or ({b},), got {tuple(value.shape)}")
    value = value.to(eps.device, torch.float32).expand(b)
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        if not (torch.isfinite(value) & (value > 0)).all():
            raise ValueError(f"guidance_scale must be finite and > 0, got {value.tolist()}")
    return value


def rates(
    benchmark: str, rate_min: float, rate_max: float, max_scale: float | None
) -> dict[str, str | float | None]:
    """What `scfg.reference.region_rates` is told, as the operations take it."""
    one_of(benchmark, "benchmark", ("foreground", "image"))
    for name, x in (("rate_min", rate_min), ("rate_max", rate_max), ("max_scale", max_scale)):
        if x is not None or name != "max_scale":
            positive(x, name)
    return dict(
        benchmark=benchmark,
        rate_min=float(rate_min),
        rate_max=float(rate_max),
        max_scale=None if max_scale is None else float(max_scale),
    )


def queries_and_keys(q: Tensor, k: Tensor, heads: int, suffix: str = "") -> None:
    """Raise unless q and k are (b, n, g*d) and (b, m, g*d), of one type."""
    shape(q, "q" + suffix, "b", "n", "g*d")
    shape(k, "k" + suffix, q.shape[0], "m", q.shape[2])
    floating(q, "q" + suffix)
    if q.dtype != k.dtype:
        raise TypeError(f"q{suffix} and k{suffix} must have one dtype, got {q.dtype} and {k.dtype}")
    whole(heads, "heads")
    if q.shape[2] % heads:
        raise ValueError(f"heads must divide the width {q.shape[2]} of q{suffix}, got {heads}")


def blocks(layers: dict[str, list[Tensor]], heads: int) -> None:
    """Raise unless queries, keys and biases of several blocks, by name, are alike and fit."""
    count = len(layers["q_self"]) if isinstance(layers["q_self"], (list, tuple)) else 0
    for name, each in layers.items():
        listed(each, name, "layer")
        if not each or len(each) != count:
            raise ValueError(
                f"{name} must have as many layers as q_self, {count}, at least one, got {len(each)}"
            )
    q_self, k_self, q_cross, k_cross, key_bias = (each[0] for each in layers.values())
    queries_and_keys(q_self, k_self, heads, "_self[0]")
    queries_and_keys(q_cross, k_cross, heads, "_cross[0]")
    shape(q_cross, "q_cross[0]", *q_self.shape)
    if key_bias is not None:
        shape(key_bias, "key_bias[0]", q_cross.shape[0], k_cross.shape[1])
    for name, (first, *others) in layers.items():
        for layer, x in enumerate(others, 1):
            if first is not None or x is not None:
                _alike(x, first, f"{name}[{layer}]")


def _alike(x: Tensor, first: Tensor, name: str) -> None:
    """Raise unless a layer's tensor is one of the first layer's shape and type."""
    if not isinstance(first, Tensor):
        raise TypeError(f"{name} must be None, as of the first layer, got {type(x).__name__}")
    shape(x, name, *first.shape)
    if x.dtype != first.dtype:
        raise TypeError(f"{name} must be {first.dtype}, as of the first layer, got {x.dtype}")


def maps(
    self_map: Tensor | None, columns: Tensor, name: str, propagation: str, powers: int
) -> None:
    """Raise unless columns (b, n, t) and, where needed, self_map (b, n, n) fit the propagation.

    Both may be those of several layers, stacked.
    """
    stack = columns.shape[:1] if isinstance(columns, Tensor) and columns.dim() == 4 else ()
    shape(columns, name, *stack, "b", "n", "t")
    floating(columns, name)
    one_of(propagation, "propagation", PROPAGATIONS)
    whole(powers, "powers")
    if propagation == "none":
        return
    if self_map is None:
        raise ValueError(f"self_map must be a tensor when propagation is {propagation!r}, got None")
    b, n, _ = columns.shape[-3:]
    shape(self_map, "self_map", *stack, b, n, n)
    floating(self_map, "self_map")
    if self_map.dtype != columns.dtype:
        raise TypeError(
            f"self_map and {name} must have one dtype, got {self_map.dtype} and {columns.dtype}"
        )


def levels(text: list[Tensor], front: list[Tensor], h: int, w: int, factors: list[int]) -> None:
    """Raise unless both branches have finite evidence of every level of the grid (h, w)."""
    for name, value in (("text", text), ("front", front), ("factors", factors)):
        listed(value, name, "level")
    whole(h, "h"), whole(w, "w")
    if not text or not len(text) == len(front) == len(factors):
        raise ValueError(
            "text, front and factors must have one entry per level, at least one, "
            f"got {len(text)}, {len(front)} and {len(factors)}"
        )
    for name, branch in (("text", text), ("front", front)):
        shape(branch[0], f"{name}[0]", "b", "n", "t+1")
        for level, (x, factor) in enumerate(zip(branch, factors, strict=True)):
            whole(factor, f"factors[{level}]")
            n = -(-h // factor) * -(-w // factor)
            shape(x, f"{name}[{level}]", text[0].shape[0], n, branch[0].shape[2])
            floating(x, f"{name}[{level}]")
            finite(x, f"{name}[{level}] (evidence of the attention maps)")


def labels(eps_text: Tensor, labels: Tensor, factor: int, token_count: int) -> None:
    """Raise unless labels are int64 in [0, token_count), one a patch of the prediction."""
    b, _, height, width = eps_text.shape
    whole(factor, "factor")
    whole(token_count, "token_count")
    shape(labels, "labels", b, -(-height // factor), -(-width // factor))
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        if not 0 <= labels.min() <= labels.max() < token_count:
            raise ValueError(
                f"labels must be in [0, {token_count}), got {labels.min():d} to {labels.max():d}"
            )
