"""What an attention module read during a call, and from it the queries and keys of its block."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

PROJECTIONS = ("to_q", "to_k", "add_k_proj")
NORMS = {"to_q": "norm_q", "to_k": "norm_k"}


@dataclass(frozen=True, eq=False)
class Projected:
    """Queries and keys of a block, as its projections return them.

    Attributes:
        q_self: (b, n, g*d) of the image to itself.
        k_self: (b, n, g*d).
        self_bias: (b, n) added to the scores of each image key, or None.
        self_heads: g of these.
        q_cross: (b, n, g*d) of the image to the text.
        k_cross: (b, t, g*d).
        cross_bias: (b, t) added to the scores of each text key, or None.
        cross_heads: g of these.
        joint: Whether text and image share one softmax, over keys [text, image].
    """

    q_self: Tensor
    k_self: Tensor
    self_bias: Tensor | None
    self_heads: int
    q_cross: Tensor
    k_cross: Tensor
    cross_bias: Tensor | None
    cross_heads: int
    joint: bool = False


@dataclass
class Attention:
    """What one attention module read and projected during one call of the U-Net.

    Either the module is called, and then its projections; or only its projections are, by a block
    that computes attention itself (``bare``), and what they read is what the module would have.
    What a projection read counts, not what the module was given: a host may give it more.
    """

    module: nn.Module
    parameters: tuple[str, ...] = ()  # of its forward, by position
    hooked: dict[str, nn.Module] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    x: Tensor | None = None
    query: Tensor | None = None  # what to_q read: x, or x normalised, or a part of it
    context: Tensor | None = None
    key_bias: Tensor | None = None
    called: bool = False
    bare: bool = False
    reduction: int | None = None  # the chosen resolution that it runs at, if any
    runs: int = 0
    pixels: int = 0  # of the last run
    lacks_text: bool = False  # its block ran at a chosen resolution without a text

    def clear(self) -> None:
        """Forget what was read."""
        self.seen.clear()
        self.called = self.bare = False
        self.x = self.query = self.context = self.key_bias = self.reduction = None

    def begin(self, x: Tensor, reduction: int | None) -> None:
        """It runs on x, which is kept at a chosen resolution only: memory peaks at others."""
        self.runs += 1
        self.called, self.reduction = True, reduction
        self.pixels = x.shape[2] * x.shape[3] if x.dim() == 4 else x.shape[1]
        self.x = self.query = None if reduction is None else x

    def read(self, name: str, x: Tensor, output: Tensor) -> None:
        """A projection read x."""
        if x.dim() != 3:
            raise RuntimeError(
                f"{name} of {type(self.module).__name__} must read features (b, n, c), got shape "
                f"{tuple(x.shape)}"
            )
        self.seen[name] = output
        if name == "to_q":
            self.query = x
        elif name == "add_k_proj":
            self.context = x
        elif "add_k_proj" not in self.hooked and x is not self.x and x is not self.query:
            self.context = x

    @property
    def keys(self) -> Tensor:
        """What it attends to."""
        return self.x if self.context is None else self.context

    def project(self, name: str, x: Tensor) -> Tensor:
        """Output (b, n, g*d) of a projection: what its hook saw, else computed again."""
        projection = getattr(self.module, name)
        y = self.seen.get(name) if self.hooked.get(name) is projection else None
        if y is None or y.shape[:-1] != x.shape[:-1]:
            y = projection(x)
        norm = getattr(self.module, NORMS.get(name, ""), None)
        if norm is not None:
            y = norm(y.unflatten(-1, (self.module.heads, -1))).flatten(-2)
        return self._scaled(y) if name == "to_q" else y

    def _scaled(self, q: Tensor) -> Tensor:
        """Queries (b, n, g*d) whose scores, over sqrt(d), are those that the module takes."""
        scale, width = getattr(self.module, "scale", None), q.shape[-1] // self.module.heads
        if not isinstance(scale, (int, float)) or abs(scale * width**0.5 - 1) < 1e-3:
            return q
        if hasattr(self.module, "processor"):  # of which some heed it and some do not
            raise RuntimeError(
                f"scale of {type(self.module).__name__} must be 1/sqrt(d) = {width**-0.5:.4g}, got "
                f"{scale:.4g}"
            )
        return q * (scale * width**0.5)


def check_pixels(name: str, block: list[Attention], output) -> None:
    """Raise unless a block's attention runs on all its pixels, where that can be told."""
    ran = [attention.pixels for attention in block if attention.pixels]
    whole, least = max(ran), min(ran)
    if isinstance(output, Tensor) and output.dim() == 3:
        whole = output.shape[1]
    if least != whole:
        raise RuntimeError(
            f"block {name!r} attends from {least} of its {whole} pixels; tokens that are merged or "
            "tiled at a chosen resolution (ToMe, HyperTile) have no place in the image"
        )


def read_block(name: str, block: list[Attention]) -> Projected:
    """Queries and keys of a block that has just run."""
    if len(block) == 1:
        return _read_joint(block[0])
    own, text = block
    if own.x is None or own.keys.shape[:2] != own.x.shape[:2]:
        raise RuntimeError(
            f"block {name!r} must attend to the image, then to the text; its first attention "
            "module did not run as self-attention"
        )
    return Projected(
        q_self=own.project("to_q", own.x),
        k_self=own.project("to_k", own.keys),
        self_bias=own.key_bias,
        self_heads=own.module.heads,
        q_cross=text.project("to_q", text.x),
        k_cross=text.project("to_k", text.context),
        cross_bias=text.key_bias,
        cross_heads=text.module.heads,
    )


def _read_joint(both: Attention) -> Projected:
    """Queries and keys of a module whose keys are [text, image]."""
    module, x, text = both.module, both.x, both.context
    x = x.flatten(2).mT if x.dim() == 4 else x  # (b, n, c)
    if getattr(module, "group_norm", None) is not None:
        x = module.group_norm(x.mT).mT
    if getattr(module, "norm_cross", None) and "add_k_proj" not in both.seen:
        text = module.norm_encoder_hidden_states(text)
    q, k = both.project("to_q", x), both.project("to_k", x)
    k_text = both.project("add_k_proj", text)
    t, n = k_text.shape[1], k.shape[1]
    bias = both.key_bias  # of the text, or of text and image
    bias = None if bias is None else nn.functional.pad(bias, (0, t + n - bias.shape[1]))
    cross_bias, self_bias = (None, None) if bias is None else bias.split((t, n), dim=1)
    heads = module.heads
    return Projected(q, k, self_bias, heads, q, k_text, cross_bias, heads, joint=True)


def additive(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A host's key mask, boolean or additive, (b, m) or (b, 1, m), as an additive (b, m)."""
    if mask is None:
        return None
    mask = mask.reshape(mask.shape[0], -1)
    if mask.dtype == torch.bool:
        zero = torch.zeros(mask.shape, dtype=torch.float32, device=x.device)
        mask = zero.masked_fill(~mask, -torch.inf)
    return mask.to(torch.float32).expand(x.shape[0], -1)
