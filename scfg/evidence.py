"""Fold attention, layer by layer, into what a U-Net call says about tokens at each resolution."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from scfg import ops, reference
from scfg.config import SCFGConfig

MAP_BUDGET = 2**28  # bytes of one self-attention map; above it the map is applied, never formed


@dataclass(frozen=True)
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


@dataclass
class Evidence:
    """What one call of a U-Net says about tokens.

    Attributes:
        size: (H, W) of the latent.
        levels: By reduction, evidence (b, n, t+1) as `scfg.reference.complete` returns it: the sum
            over layers so far or, with ``layers_per_level``, one tensor for each last layer.
        order: (reduction, block) of every block at a chosen resolution, in forward order.
        layers: Every block folded, with its maps where kept.
    """

    size: tuple[int, int]
    levels: dict[int, list[Tensor]] = field(default_factory=dict)
    order: list[tuple[int, str]] = field(default_factory=list)
    layers: list[AttentionLayer] = field(default_factory=list)

    @property
    def reductions(self) -> list[int]:
        """Reductions seen, finest first."""
        return sorted(self.levels)

    @property
    def tokens(self) -> int:
        """Tokens of the text, t."""
        return self.levels[self.reductions[0]][0].shape[-1] - 1

    def total(self, reduction: int) -> Tensor:
        """Evidence of a level summed over its layers, (b, n, t+1)."""
        first, *others = self.levels[reduction]
        return sum(others, first)

    def rows(self, begin: int, end: int) -> "Evidence":
        """The evidence of a part of the batch."""
        levels = {r: [x[begin:end] for x in layers] for r, layers in self.levels.items()}
        return Evidence(self.size, levels, self.order)

    def to(self, device: torch.device) -> "Evidence":
        """The evidence on a device."""
        levels = {r: [x.to(device) for x in layers] for r, layers in self.levels.items()}
        return Evidence(self.size, levels, self.order)


def map_grid(size: tuple[int, int], reduction: int) -> tuple[int, int]:
    """(h, w) of the map that a U-Net, halving and rounding up, has at a reduction."""
    return -(-size[0] // reduction), -(-size[1] // reduction)


def find_reduction(size: tuple[int, int], n: int, reductions: tuple[int, ...]) -> int | None:
    """The reduction whose map of a latent of the given size has n pixels, if there is one."""
    for reduction in reductions:
        h, w = map_grid(size, reduction)
        if h * w == n:
            return reduction
    return None


def level_weights(
    size: tuple[int, int], config: SCFGConfig, device: torch.device | str = "cpu"
) -> dict[int, Tensor]:
    """`scfg.reference.spatial_weights` of every level, by reduction, float32, on a device."""
    finest = config.map_reduction
    h, w = map_grid(size, finest)
    on_gpu = torch.device(device).type == "cuda"  # a copy there would wait; others lack float64
    where = device if on_gpu else "cpu"
    exact = {r: reference.spatial_weights(h, w, r // finest, where) for r in config.reductions}
    return {r: weights.float().to(device) for r, weights in exact.items()}


def fits(b: int, n: int) -> bool:
    """Whether a (b, n, n) float32 map is within the memory budget."""
    return b * n * n * 4 <= MAP_BUDGET


def propagate_unformed(
    q: Tensor, k: Tensor, columns: Tensor, heads: int, config: SCFGConfig, backend: str
) -> Tensor:
    """`scfg.reference.propagate`, attention being applied once per power instead of formed.

    Args:
        q: (b, n, g*d) queries of self-attention.
        k: (b, n, g*d) keys.
        columns: (b, n, t).
        heads: g.
        config: Its propagation and propagation_steps are used.
        backend: See `scfg.ops`.

    Returns:
        (b, n, t) float32.
    """
    if config.propagation == "none":
        return columns
    total = 0
    for weight in reference.power_weights(config.propagation, config.propagation_steps):
        columns = ops.attention_apply(q, k, columns, heads, backend)
        total = total + weight * columns
    return total


def fold(
    evidence: Evidence,
    reduction: int,
    self_map: Tensor | None,
    cross_map: Tensor,
    weights: Tensor,
    config: SCFGConfig,
    backend: str,
) -> None:
    """Add one layer to its level.

    Args:
        evidence: Changed in place.
        reduction: Level of the layer.
        self_map: (b, n, n), or None where cross_map is already propagated.
        cross_map: (b, n, t).
        weights: (n,) from `level_weights`.
        config: Its propagation, propagation_steps and layers_per_level are used.
        backend: See `scfg.ops`.
    """
    propagation = "none" if self_map is None else config.propagation
    limit = config.layers_per_level
    layers = evidence.levels.setdefault(reduction, [])
    total = layers.pop() if layers and limit is None else None
    steps = config.propagation_steps
    layers.append(ops.complete(self_map, cross_map, weights, total, propagation, steps, backend))
    if limit is not None:
        del layers[:-limit]
