"""Record attention from a U-Net while it runs.

Hooks on the projections of its transformer blocks see the queries and keys that the host computes
anyway; what they miss (fused projections, a LoRA loaded later) is projected again. The host's own
attention is left alone, so its output keeps every bit. A block's maps live until they are folded
into the evidence of their level; layers at other resolutions form none.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scfg import ops
from scfg.config import SCFGConfig
from scfg.evidence import (
    AttentionLayer,
    Evidence,
    find_reduction,
    fits,
    fold,
    level_weights,
    map_grid,
    propagate_unformed,
)
from scfg.recording.hooks import find_blocks, folding_module

PROJECTIONS = ("to_q", "to_k", "add_k_proj")
NORMS = {"to_q": "norm_q", "to_k": "norm_k"}


@dataclass
class _Attention:
    """Inputs and projections of one attention module during one call."""

    module: nn.Module
    hooked: dict[str, nn.Module] = field(default_factory=dict)
    seen: dict[str, Tensor] = field(default_factory=dict)
    x: Tensor | None = None
    context: Tensor | None = None
    key_bias: Tensor | None = None
    called: bool = False
    reduction: int | None = None  # the chosen resolution that it runs at, if any
    bare: bool = False  # its projections were called, it was not
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


def _additive(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A host's key mask, boolean or additive, (b, m) or (b, 1, m), as an additive (b, m)."""
    if mask is None:
        return None
    mask = mask.reshape(mask.shape[0], -1)
    if mask.dtype == torch.bool:
        zero = torch.zeros(mask.shape, dtype=torch.float32, device=x.device)
        mask = zero.masked_fill(~mask, -torch.inf)
    return mask.to(torch.float32).expand(x.shape[0], -1)


class AttentionRecorder:
    """Hooks that turn the attention of a U-Net, between `start` and `finish`, into `Evidence`.

    Args:
        unet: The U-Net, or a torch.compile of it, which must not have run yet.
        config: Which resolutions and layers, and how maps are completed.
        backend: See `scfg.ops`.
        keep_maps: Keep each layer's maps, to be looked at; memory then grows with the layers.

    Raises:
        ValueError: The U-Net has no transformer block.
    """

    def __init__(self, unet: nn.Module, config: SCFGConfig, backend: str, keep_maps: bool = False):
        self.config, self.backend, self.keep_maps = config, backend, keep_maps
        self.active = False
        self._evidence: Evidence | None = None
        self._weights: dict[int, Tensor] = {}
        self._weights_for: tuple | None = None
        self._owners: Tensor | None = None
        self._unused: frozenset[str] = frozenset()  # blocks before the last layers_per_level
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
            attention.begin(x, self._reduction(x))
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
                    attention.begin(args[0], self._reduction(args[0]))
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
            if self.active:
                with torch.no_grad():
                    self._record(name, block)
                for attention in block:
                    attention.clear()

        return after

    def _reduction(self, x: Tensor) -> int | None:
        """The chosen resolution that an attention module's input is at, or None."""
        n = x.shape[2] * x.shape[3] if x.dim() == 4 else x.shape[1]  # (b, c, h, w) or (b, n, c)
        return find_reduction(self._evidence.size, n, self.config.reductions)

    def _record(self, name: str, block: list[_Attention]) -> None:
        """Fold a block that has just run, if it is at a chosen resolution."""
        evidence, reduction = self._evidence, block[-1].reduction
        if reduction is None or block[-1].context is None:  # `finish` counts what did not run
            return
        evidence.order.append((reduction, name))
        if name in self._unused:
            return
        if len(block) == 1:
            self_map, cross_map = self._joint_maps(block[0])
        elif block[0].x is None or block[0].keys.shape[:2] != block[0].x.shape[:2]:
            raise RuntimeError(
                f"block {name!r} must attend to the image, then to the text; its first attention "
                "module did not run as self-attention"
            )
        else:
            self_map, cross_map = self._maps(*block)
        if self._owners is not None:
            index = self._owners[:, None].expand_as(cross_map)
            cross_map = torch.zeros_like(cross_map).scatter_add(-1, index, cross_map)
        columns = cross_map
        if self_map is None:
            own, settings = block[0], (self.config, self.backend)
            q, k = own.project("to_q", own.x), own.project("to_k", own.keys)
            columns = propagate_unformed(q, k, cross_map, own.module.heads, *settings)
        weights = self._weights[reduction]
        fold(evidence, reduction, self_map, columns, weights, self.config, self.backend)
        grid = map_grid(evidence.size, reduction)
        maps = (self_map, cross_map) if self.keep_maps else (None, None)
        evidence.layers.append(AttentionLayer(name, reduction, grid, *maps))

    def _maps(self, own: _Attention, text: _Attention) -> tuple[Tensor | None, Tensor]:
        """Self map, None where not needed or too large, and cross map of a block."""
        heads = text.module.heads
        q_cross, k_cross = text.project("to_q", text.x), text.project("to_k", text.context)
        cross = (q_cross, k_cross, heads, text.key_bias, self.backend)
        b, n, _ = q_cross.shape
        needed = self.config.propagation != "none" or self.keep_maps
        if not needed or not fits(b, n):
            return None, ops.attention_map(*cross)
        q_self, k_self = own.project("to_q", own.x), own.project("to_k", own.keys)
        if own.key_bias is None and own.module.heads == heads:
            return ops.attention_maps(q_self, k_self, *cross)
        own_map = ops.attention_map(q_self, k_self, own.module.heads, own.key_bias, self.backend)
        return own_map, ops.attention_map(*cross)

    def _joint_maps(self, both: _Attention) -> tuple[Tensor, Tensor]:
        """One softmax over [text, image] keys, then split: rows of neither part sum to 1."""
        module, x, text = both.module, both.x, both.context
        x = x.flatten(2).mT if x.dim() == 4 else x  # (b, n, c)
        if getattr(module, "group_norm", None) is not None:
            x = module.group_norm(x.mT).mT
        if getattr(module, "norm_cross", None):
            text = module.norm_encoder_hidden_states(text)
        q, k = both.project("to_q", x), both.project("to_k", x)
        k_text = both.project("add_k_proj", text)
        t, n = k_text.shape[1], k.shape[1]
        bias = both.key_bias
        if bias is not None and bias.shape[1] == t:
            bias = nn.functional.pad(bias, (0, n))
        keys = torch.cat([k_text, k], dim=1)  # (b, t+n, g*d)
        joint = ops.attention_map(q, keys, module.heads, bias, self.backend)  # (b, n, t+n)
        return joint[..., t:], joint[..., :t]

    def start(self, sample: Tensor, owners: Tensor | None = None) -> None:
        """Begin a call of the U-Net.

        Args:
            sample: Latent (b, c, H, W).
            owners: (b, t) int64: the token to which the attention to each key counts, where a host
                repeats tokens; None: each to itself.
        """
        self.abort()
        self._owners = owners
        size = (sample.shape[-2], sample.shape[-1])
        if self._weights_for != (size, sample.device):
            self._weights = level_weights(size, self.config, sample.device)
            self._weights_for = (size, sample.device)
        for attention in self._attentions:
            attention.runs = 0
        self._evidence = Evidence(size)
        self.active = True

    def finish(self) -> Evidence:
        """End the call.

        Raises:
            RuntimeError: A module did not run exactly once, or none was at a chosen resolution.
        """
        evidence = self._evidence
        self.abort()
        once = sum(attention.runs == 1 for attention in self._attentions)
        if once != len(self._attentions):
            raise RuntimeError(
                f"recorded {once} attention modules, expected all {len(self._attentions)} once. "
                "Layers were skipped or repeated, or code that torch.compile made before the hooks "
                "were there ran instead: call torch._dynamo.reset() first, or compile with "
                "torch._dynamo.config.skip_nnmodule_hook_guards = False"
            )
        if not evidence.order:
            raise RuntimeError(
                f"no attention layer at reductions {self.config.reductions} of a latent of size "
                f"{evidence.size}, expected one at least (see map_reduction, coarsest_reduction)"
            )
        limit = self.config.layers_per_level
        if limit is not None:
            levels = [[b for s, b in evidence.order if s == r] for r in evidence.reductions]
            self._unused = frozenset(name for level in levels for name in level[:-limit])
        return evidence

    def abort(self) -> None:
        """Stop recording and forget what was seen."""
        self.active, self._evidence = False, None
        for attention in self._attentions:
            attention.clear()

    def remove(self) -> None:
        """Take every hook off the U-Net."""
        self.abort()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
