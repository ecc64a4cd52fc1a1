"""One call of a U-Net, from its queries and keys to `Evidence`: start, fold, finish.

`scfg.recording.hooks` sees the queries and keys that the host computes anyway. The host's own
attention is left alone, so its output keeps every bit. A block's maps live until they are folded
into the evidence of their level; layers at other resolutions form none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident

import torch
from torch import Tensor, nn

from scfg import ops
from scfg.config import SCFGConfig
from scfg.evidence import (
    Evidence,
    find_reduction,
    fits,
    fold,
    fold_columns,
    level_weights,
    map_grid,
    propagate_unformed,
)
from scfg.recording.attention import Projected
from scfg.recording.hooks import Hooks


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """A block at a chosen resolution and, on request, what it attended to.

    Attributes:
        name: Module path of the block.
        reduction: Latent pixels per map pixel, along each axis.
        grid: (h, w) of the map.
        self_map: (b, h*w, h*w) float32 head-mean probabilities; None unless kept and formed.
        cross_map: (b, h*w, t) float32 head-mean probabilities; None unless kept.
    """

    name: str
    reduction: int
    grid: tuple[int, int]
    self_map: Tensor | None
    cross_map: Tensor | None


class AttentionRecorder:
    """The attention of a U-Net, between `start` and `finish`, as `Evidence`.

    Args:
        unet: The U-Net, or a torch.compile of it, which must not have run yet.
        config: Which resolutions and layers, and how maps are completed.
        backend: See `scfg.ops`.
        keep_maps: Keep each layer's maps, to be looked at; memory then grows with the layers.

    Attributes:
        layers: Blocks folded in the last call, in forward order, with their maps where kept.

    Raises:
        ValueError: The U-Net has no transformer block.
    """

    def __init__(self, unet: nn.Module, config: SCFGConfig, backend: str, keep_maps: bool = False):
        self.config, self.backend, self.keep_maps = config, backend, keep_maps
        self.layers: list[AttentionLayer] = []
        self._evidence: Evidence | None = None
        self._weights: dict[int, Tensor] = {}
        self._weights_for: tuple | None = None
        self._owners: Tensor | None = None
        self._order: list[tuple[int, str]] = []  # (reduction, block) in forward order
        self._unused: dict[tuple[int, int], frozenset[str]] = {}  # by size, see `_layers_unused`
        self._hooks = Hooks(unet, self._reduction, self._fold)

    def _reduction(self, x: Tensor) -> int | None:
        """The chosen resolution that an attention module's input is at, or None."""
        n = x.shape[2] * x.shape[3] if x.dim() == 4 else x.shape[1]  # (b, c, h, w) or (b, n, c)
        return find_reduction(self._evidence.size, n, self.config.reductions)

    def _fold(self, name: str, reduction: int, read: Callable[[], Projected]) -> None:
        """Fold a block at a chosen resolution that has just run."""
        self._order.append((reduction, name))
        evidence = self._evidence
        if name in self._unused.get(evidence.size, ()):
            return
        layer = read()
        self_map, cross_map = self._maps(layer)
        if self._owners is not None:
            index = self._owners[:, None].expand_as(cross_map)
            cross_map = torch.zeros_like(cross_map).scatter_add(-1, index, cross_map)
        weights = self._weights[reduction]
        if self_map is None:
            columns = propagate_unformed(
                layer.q_self, layer.k_self, cross_map, layer.self_heads, self.config, self.backend
            )
            fold_columns(evidence, reduction, columns, weights, self.config, self.backend)
        else:
            fold(evidence, reduction, self_map, cross_map, weights, self.config, self.backend)
        kept = (self_map, cross_map) if self.keep_maps else (None, None)
        grid = map_grid(evidence.size, reduction)
        self.layers.append(AttentionLayer(name, reduction, grid, *kept))

    def _maps(self, layer: Projected) -> tuple[Tensor | None, Tensor]:
        """Self map, None where not needed or too large, and cross map of a block."""
        if layer.joint:
            return self._joint_maps(layer)
        b, n, _ = layer.q_cross.shape
        formed = fits(b, n) and (self.config.propagation != "none" or self.keep_maps)
        if formed and layer.self_bias is None and layer.self_heads == layer.cross_heads:
            return ops.attention_maps(
                layer.q_self,
                layer.k_self,
                layer.q_cross,
                layer.k_cross,
                heads=layer.cross_heads,
                key_bias=layer.cross_bias,
                backend=self.backend,
            )
        cross_map = ops.attention_map(
            layer.q_cross, layer.k_cross, layer.cross_heads, layer.cross_bias, self.backend
        )
        if not formed:
            return None, cross_map
        self_map = ops.attention_map(
            layer.q_self, layer.k_self, layer.self_heads, layer.self_bias, self.backend
        )
        return self_map, cross_map

    def _joint_maps(self, layer: Projected) -> tuple[Tensor, Tensor]:
        """One softmax over [text, image] keys, then split: rows of neither part sum to 1."""
        keys = torch.cat([layer.k_cross, layer.k_self], dim=1)  # (b, t+n, g*d)
        bias = None
        if layer.cross_bias is not None:
            bias = torch.cat([layer.cross_bias, layer.self_bias], dim=1)  # (b, t+n)
        joint = ops.attention_map(layer.q_cross, keys, layer.cross_heads, bias, self.backend)
        t = layer.k_cross.shape[1]
        return joint[..., t:], joint[..., :t]

    def start(self, sample: Tensor, owners: Tensor | None = None) -> None:
        """Begin a call of the U-Net.

        Args:
            sample: Latent (b, c, H, W).
            owners: (b, t) int64: the token to which the attention to each key counts, where a host
                repeats tokens; None: each to itself.

        Raises:
            RuntimeError: The hooks were removed, or another thread is inside the U-Net.
        """
        if not self._hooks.on:
            raise RuntimeError("the U-Net is not recorded any more: its wrapper was removed")
        if self._hooks.active and self._hooks.thread != get_ident():
            raise RuntimeError("another thread is recording this U-Net; give each thread its own")
        self.abort()
        self._owners = owners
        size = (sample.shape[-2], sample.shape[-1])
        if self._weights_for != (size, sample.device):
            self._weights = level_weights(size, self.config, sample.device)
            self._weights_for = (size, sample.device)
        self._evidence = Evidence(size)
        self.layers, self._order = [], []
        self._hooks.begin()

    def finish(self) -> Evidence:
        """End the call.

        Raises:
            RuntimeError: A module did not run exactly once, or none was at a chosen resolution.
        """
        evidence, modules, missing = self._evidence, len(self._hooks), self._hooks.missing()
        textless, pixels = self._hooks.lacking_text(), self._hooks.pixels()
        self.abort()
        if missing:
            raise RuntimeError(
                f"recorded {modules - missing} attention modules, expected all {modules} once. "
                "Layers were skipped or repeated, or code that torch.compile made before the hooks "
                "were there ran instead: call torch._dynamo.reset() first, or compile with "
                "torch._dynamo.config.skip_nnmodule_hook_guards = False"
            )
        if not self._order and textless:
            raise RuntimeError(
                f"{textless} blocks ran at reductions {self.config.reductions}, but none attended "
                "to a text, which S-CFG needs"
            )
        if not self._order:
            raise RuntimeError(
                f"no attention layer at reductions {self.config.reductions} of a latent of size "
                f"{evidence.size}, expected one at least (see map_reduction, coarsest_reduction); "
                f"attention ran on {pixels} pixels"
            )
        if self.config.layers_per_level is not None:
            self._unused[evidence.size] = self._layers_unused(self.config.layers_per_level)
        return evidence

    def _layers_unused(self, last: int) -> frozenset[str]:
        """Blocks before the last so many of each level, which need not be read again."""
        levels: dict[int, list[str]] = {}
        for reduction, name in self._order:
            levels.setdefault(reduction, []).append(name)
        return frozenset(name for level in levels.values() for name in level[:-last])

    def abort(self) -> None:
        """Stop recording and forget what was seen; not what another thread records."""
        if self._hooks.active and self._hooks.thread != get_ident():
            return
        self._evidence = None
        self._hooks.clear()

    def remove(self) -> None:
        """Take every hook off the U-Net."""
        self.abort()
        self._hooks.remove()
