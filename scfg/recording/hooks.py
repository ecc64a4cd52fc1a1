"""Hooks on the transformer blocks of a U-Net: the queries and keys of one that has just run."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scfg.recording.blocks import find_blocks, folding_module

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
class _Attention:
    """What one attention module read and projected during one call of the U-Net.

    Either the module is called, and then its projections; or only its projections are, by a block
    that computes attention itself (``bare``), and what they read is what the module would have.
    """

    module: nn.Module
    hooked: dict[str, nn.Module] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    x: Tensor | None = None
    context: Tensor | None = None
    key_bias: Tensor | None = None
    called: bool = False
    bare: bool = False
    reduction: int | None = None  # the chosen resolution that it runs at, if any
    runs: int = 0

    def clear(self) -> None:
        self.seen.clear()
        self.called = self.bare = False
        self.x = self.context = self.key_bias = self.reduction = None

    def begin(self, x: Tensor, reduction: int | None) -> None:
        """It runs on x, which is kept at a chosen resolution only: memory peaks at others."""
        self.runs += 1
        self.called, self.reduction = True, reduction
        self.x = None if reduction is None else x

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
        return y


class Hooks:
    """Hooks on the transformer blocks of a U-Net, silent unless ``active``.

    Args:
        unet: The U-Net, or a torch.compile of it, which must not have run yet.
        reduction_of: From an attention module's input to the chosen resolution it is at, or None.
        ran: Called as ``ran(name, reduction, read)`` after each block at a chosen resolution that
            attended to a text; ``read()`` is its `Projected`.

    Raises:
        ValueError: The U-Net has no transformer block.
    """

    def __init__(
        self,
        unet: nn.Module,
        reduction_of: Callable[[Tensor], int | None],
        ran: Callable[[str, int, Callable[[], Projected]], None],
    ):
        self.active = False
        self._reduction_of, self._ran = reduction_of, ran
        self._handles: list = []
        self._attentions: list[_Attention] = []
        for name, modules in find_blocks(unet):
            block = [_Attention(module) for module in modules]
            for attention in block:
                self._watch(attention)
            self._attentions += block
            hook = folding_module(unet, name).register_forward_hook(self._after(name, block))
            self._handles.append(hook)

    def _watch(self, attention: _Attention) -> None:
        """Note what goes into an attention module and what its projections return."""

        def before(module, args, kwargs):
            if not self.active:
                return
            attention.clear()
            x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
            attention.begin(x, self._reduction_of(x))
            if attention.reduction is None:
                return
            context = args[1] if len(args) > 1 else None
            for name in ("encoder_hidden_states", "context"):
                context = kwargs.get(name, context)
            context = context[0] if isinstance(context, (tuple, list)) else context
            attention.context = None if context is x else context
            attention.key_bias = _additive(kwargs.get("attention_mask", kwargs.get("mask")), x)

        def keep(name):
            def after(module, args, output):
                if not self.active:
                    return
                if name == "to_q" and not attention.called:
                    attention.begin(args[0], self._reduction_of(args[0]))
                    attention.bare = True
                if attention.reduction is None:
                    return
                attention.seen[name] = output
                if name == "to_k" and attention.bare and args[0] is not attention.x:
                    attention.context = args[0]

            return after

        hook = attention.module.register_forward_pre_hook(before, with_kwargs=True)
        self._handles.append(hook)
        for name in PROJECTIONS:
            projection = getattr(attention.module, name, None)
            if isinstance(projection, nn.Module):
                attention.hooked[name] = projection
                self._handles.append(projection.register_forward_hook(keep(name)))

    def _after(self, name: str, block: list[_Attention]):
        def after(module, args, output):
            if not self.active:
                return
            reduction = block[-1].reduction
            if reduction is not None and block[-1].context is not None:
                with torch.no_grad():
                    self._ran(name, reduction, lambda: _read(name, block))
            for attention in block:
                attention.clear()

        return after

    def begin(self) -> None:
        """Listen to one call of the U-Net."""
        self.clear()
        for attention in self._attentions:
            attention.runs = 0
        self.active = True

    def clear(self) -> None:
        """Stop listening and forget what was seen."""
        self.active = False
        for attention in self._attentions:
            attention.clear()

    def missing(self) -> int:
        """Attention modules that did not run exactly once since `begin`."""
        return sum(attention.runs != 1 for attention in self._attentions)

    def __len__(self) -> int:
        """Attention modules."""
        return len(self._attentions)

    def remove(self) -> None:
        """Take every hook off the U-Net."""
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _read(name: str, block: list[_Attention]) -> Projected:
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


def _read_joint(both: _Attention) -> Projected:
    """Queries and keys of a module whose keys are [text, image]."""
    module, x, text = both.module, both.x, both.context
    x = x.flatten(2).mT if x.dim() == 4 else x  # (b, n, c)
    if getattr(module, "group_norm", None) is not None:
        x = module.group_norm(x.mT).mT
    if getattr(module, "norm_cross", None):
        text = module.norm_encoder_hidden_states(text)
    q, k = both.project("to_q", x), both.project("to_k", x)
    k_text = both.project("add_k_proj", text)
    t, n = k_text.shape[1], k.shape[1]
    bias = both.key_bias  # of the text, or of text and image
    bias = None if bias is None else nn.functional.pad(bias, (0, t + n - bias.shape[1]))
    cross_bias, self_bias = (None, None) if bias is None else bias.split((t, n), dim=1)
    heads = module.heads
    return Projected(q, k, self_bias, heads, q, k_text, cross_bias, heads, joint=True)


def _additive(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A host's key mask, boolean or additive, (b, m) or (b, 1, m), as an additive (b, m)."""
    if mask is None:
        return None
    mask = mask.reshape(mask.shape[0], -1)
    if mask.dtype == torch.bool:
        zero = torch.zeros(mask.shape, dtype=torch.float32, device=x.device)
        mask = zero.masked_fill(~mask, -torch.inf)
    return mask.to(torch.float32).expand(x.shape[0], -1)
