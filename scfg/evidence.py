"""Layers folded, level by level, into what a call of a U-Net says about tokens."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scfg import checks, ops, reference
from scfg.config import SCFGConfig
from scfg.patches import Patches

MAP_BUDGET = 2**28  # bytes of one self-attention map; above it the map is applied, never formed


@dataclass
class Evidence:
    """What one call of a U-Net says about tokens.

    Attributes:
        size: (H, W) of the latent.
        levels: By reduction, evidence (b, n, t+1) as `scfg.reference.complete` returns it: the sum
            over layers so far, ``{4: [sum], 8: [sum]}``, or with ``layers_per_level=2`` one tensor
            for each last layer, ``{4: [layer, layer], 8: [layer, layer]}``.
        patches: Of a transformer: its grid and words. It has one level, 1, and size counts patches.
    """

    size: tuple[int, int]
    levels: dict[int, list[Tensor]] = field(default_factory=dict)
    patches: Patches | None = None

    @property
    def reductions(self) -> list[int]:
        """Reductions seen, finest first."""
        return sorted(self.levels)

    @property
    def batch(self) -> int:
        """Rows of the call, b; 0 of none."""
        for layers in self.levels.values():
            return layers[0].shape[0]
        return 0

    @property
    def tokens(self) -> int:
        """Tokens of the text, t."""
        if self.patches is not None:
            return self.patches.text
        return self.levels[self.reductions[0]][0].shape[-1] - 1

    def total(self, reduction: int) -> Tensor:
        """Evidence of a level summed over its layers, (b, n, t+1)."""
        first, *others = self.levels[reduction]
        return sum(others, first)

    def rows(self, begin: int, end: int) -> "Evidence":
        """The evidence of a part of the batch."""
        levels = {r: [x[begin:end] for x in layers] for r, layers in self.levels.items()}
        patches = None if self.patches is None else self.patches.rows(begin, end)
        return Evidence(self.size, levels, patches)

    def to(self, device: torch.device) -> "Evidence":
        """The evidence on a device."""
        levels = {r: [x.to(device) for x in layers] for r, layers in self.levels.items()}
        return Evidence(self.size, levels, self.patches)


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
    q: Tensor, k: Tensor, columns: Tensor, heads: int, config: SCFGConfig, apply: Callable
) -> Tensor:
    """`scfg.reference.propagate`, attention being applied once per power instead of formed.

    Args:
        q: (b, n, g*d) queries of self-attention.
        k: (b, n, g*d) keys.
        columns: (b, n, t).
        heads: g.
        config: Its propagation, other than ``"none"``, and propagation_steps are used.
        apply: `scfg.ops.attention_apply`.

    Returns:
        (b, n, t) float32.
    """
    total = 0
    for weight in reference.power_weights(config.propagation, config.propagation_steps):
        columns = apply(q=q, k=k, columns=columns, heads=heads)
        total = total + weight * columns
    return total


def fold(
    evidence: Evidence,
    reduction: int,
    self_map: Tensor | None,
    cross_map: Tensor,
    weights: Tensor,
    config: SCFGConfig,
    complete: Callable,
) -> None:
    """Complete the cross map of one layer, or of several, through the self map; add to the level.

    Args:
        evidence: Changed in place.
        reduction: Level of the layer.
        self_map: (b, n, n), or (l, b, n, n) of l layers; None: cross_map is propagated already, or
            is not to be.
        cross_map: (b, n, t) or (l, b, n, t).
        weights: (n,) from `level_weights`.
        config: Its propagation, propagation_steps and layers_per_level are used.
        complete: `scfg.ops.complete`.
    """
    limit = config.layers_per_level
    layers = evidence.levels.setdefault(reduction, [])
    completed = complete(
        self_map=self_map,
        cross_map=cross_map,
        weights=weights,
        total=layers.pop() if layers and limit is None else None,
        propagation="none" if self_map is None else config.propagation,
        powers=config.propagation_steps,
    )
    layers.append(completed)
    if limit is not None:
        del layers[:-limit]


def fold_maps(
    eps: Tensor,
    self_maps: list[Tensor],
    cross_maps: list[Tensor],
    config: SCFGConfig,
    backend: str,
) -> Evidence:
    """Evidence, of 2b rows, of given maps."""
    b, size = eps.shape[0], tuple(eps.shape[-2:])
    evidence = Evidence(size)
    weights = level_weights(size, config, eps.device)
    complete = functools.partial(ops.complete, backend=backend)
    powers = tuple(1 << level for level in range(max(size).bit_length() + 1))
    for layer, (self_map, cross_map) in enumerate(zip(self_maps, cross_maps, strict=True)):
        checks.attention_map(cross_map, f"cross_maps[{layer}]", 2 * b)
        n, t = cross_map.shape[1:]
        checks.attention_map(self_map, f"self_maps[{layer}]", 2 * b, n, n)
        if t != cross_maps[0].shape[2]:
            raise ValueError(
                f"cross_maps[{layer}] must have {cross_maps[0].shape[2]} tokens, got {t}"
            )
        reduction = find_reduction(size, n, config.reductions)
        if reduction is not None:
            fold(evidence, reduction, self_map, cross_map, weights[reduction], config, complete)
        elif find_reduction(size, n, powers) is None:
            raise ValueError(
                f"cross_maps[{layer}] must have ceil(H/r) * ceil(W/r) pixels, r a power of 2, "
                f"(H, W) = {size}, got {n}"
            )
    if not evidence.levels:
        raise ValueError(
            f"self_maps must hold a layer at one of the reductions {config.reductions} of a latent "
            f"of size {size}, got n = {[m.shape[1] for m in self_maps]}"
        )
    return evidence
