"""From the queries and keys of layers to the evidence of their level: alone, or a group at once.

On a fast GPU the host is what a step waits for, so there the queries and keys of a level's layers
are kept, up to a budget, and then folded together: one launch forms the maps of the group, and
those that complete them are shared. On a CPU memory is the point, and each layer is folded as it
comes.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from scfg import backends, evidence
from scfg.config import SCFGConfig
from scfg.evidence import Evidence, fold, propagate_unformed
from scfg.recording.plan import Plan
from scfg.recording.reading import Projected

# Bytes of queries and keys that are kept until they are folded, by type of device: four layers of
# SDXL at 1024 x 1024, all of SD 1.5 at 512 x 512.
GROUP_BUDGET = {"cuda": 2**26}
GROUP = 8  # layers that one launch takes


class Folded(NamedTuple):
    """A block that was folded and, where they are kept, its maps."""

    name: str
    reduction: int
    self_map: Tensor | None
    cross_map: Tensor | None


@dataclass(eq=False)
class _Group:
    """Layers of one level that are kept, to be folded at once.

    Attributes:
        kind: What they have in common.
        formed: Whether their self maps are.
        room: Most layers of a group; 0: they are not alike enough for that.
        bytes: Queries and keys of one.
        layers: Those that are kept.
    """

    kind: tuple
    formed: bool
    room: int
    bytes: int
    layers: list[Projected] = field(default_factory=list)


class Folding:
    """Layers on their way into the evidence of one call.

    Args:
        config: How maps are completed.
        backend: See `scfg.ops`.
        plan: Of the call.
        owners: (b, t) int64: the token to which the attention to each key counts, or None.
        keep_maps: Keep each layer's maps.

    Attributes:
        evidence: What the layers said, complete after `finish`.
        layers: Those that were folded, in forward order.
    """

    def __init__(
        self,
        config: SCFGConfig,
        backend: str,
        plan: Plan,
        owners: Tensor | None,
        keep_maps: bool,
    ):
        self.config, self.backend, self.plan, self.owners = config, backend, plan, owners
        self.keep_maps = keep_maps
        self.evidence = Evidence(plan.size)
        self.layers: list[Folded] = []
        self._groups: dict[int, _Group] = {}
        alone = keep_maps or config.layers_per_level is not None or torch.compiler.is_compiling()
        self._budget = 0 if alone else GROUP_BUDGET.get(plan.device.type, 0)
        self._kept = 0  # bytes of all groups

    def add(self, name: str, reduction: int, layer: Projected) -> None:
        """Fold a layer, or keep it for its group."""
        kind = (layer.q_self.shape, layer.q_cross.shape, layer.k_cross.shape, layer.self_heads)
        kind += (layer.cross_heads, layer.q_self.dtype, layer.cross_bias is None)
        group = self._groups.get(reduction)
        if group is None or group.kind != kind or layer.self_bias is not None or layer.joint:
            self._flush(reduction)
            group = self._group(kind, layer)
            self._groups[reduction] = group
        if not group.room:
            self._fold_special(name, reduction, layer, group.formed)
        elif not self._budget:
            self._fold_alone(name, reduction, layer)
        else:
            if self._kept + group.bytes > self._budget:
                self.flush()
            group.layers.append(layer)
            self._kept += group.bytes
            self.layers.append(Folded(name, reduction, None, None))
            if len(group.layers) == group.room:
                self._flush(reduction)

    def _group(self, kind: tuple, layer: Projected) -> _Group:
        """An empty group for layers like this one, with room for none if it must go alone."""
        (b, n, width), t = layer.q_cross.shape, layer.k_cross.shape[1]
        formed = evidence.fits(b, n) and (self.config.propagation != "none" or self.keep_maps)
        simple = formed and layer.self_bias is None and not layer.joint
        room = GROUP
        while room > 1 and not evidence.fits(room * b, n):
            room -= 1
        if not simple or layer.self_heads != layer.cross_heads:
            room = 0
        return _Group(kind, formed, room, (3 * n + t) * b * width * layer.q_self.element_size())

    def flush(self) -> None:
        """Fold what is kept."""
        for reduction in self._groups:
            self._flush(reduction)

    def _flush(self, reduction: int) -> None:
        """Fold what is kept of a level."""
        group = self._groups.get(reduction)
        if group is None or not group.layers:
            return
        layers, group.layers = group.layers, []
        self._kept -= len(layers) * group.bytes
        maps = self._run(
            "stacked_maps",
            q_self=[layer.q_self for layer in layers],
            k_self=[layer.k_self for layer in layers],
            q_cross=[layer.q_cross for layer in layers],
            k_cross=[layer.k_cross for layer in layers],
            heads=layers[0].cross_heads,
            key_bias=[layer.cross_bias for layer in layers],
        )
        self._complete(reduction, maps[0], self._owned(maps[1]))

    def _fold_alone(self, name: str, reduction: int, layer: Projected) -> None:
        maps = self._run(
            "attention_maps",
            q_self=layer.q_self,
            k_self=layer.k_self,
            q_cross=layer.q_cross,
            k_cross=layer.k_cross,
            heads=layer.cross_heads,
            key_bias=layer.cross_bias,
        )
        self._complete(reduction, maps[0], self._owned(maps[1]))
        self._note(name, reduction, *maps)

    def _complete(self, reduction: int, self_map: Tensor | None, columns: Tensor) -> None:
        """Add maps, (b, n, m) or (l, b, n, m), to their level."""
        weights, complete = self.plan.weights[reduction], partial(self._run, "complete")
        fold(self.evidence, reduction, self_map, columns, weights, self.config, complete)

    def _fold_special(self, name: str, reduction: int, layer: Projected, formed: bool) -> None:
        """Fold a layer whose self map is not formed, or whose maps are not formed by one launch."""
        if layer.joint:
            self_map, cross_map = self._joint_maps(layer)
        else:
            self_map, cross_map = None, self._map(layer.q_cross, layer.k_cross, layer, "cross")
            if formed:
                self_map = self._map(layer.q_self, layer.k_self, layer, "self")
        columns = self._owned(cross_map)
        if self_map is None and self.config.propagation != "none":
            if layer.self_bias is not None:
                raise RuntimeError(
                    f"{name!r} masks pixels of the image, which is supported only where its map "
                    f"of {layer.q_self.shape[1]} pixels fits in memory"
                )
            apply = partial(self._run, "attention_apply")
            qk = layer.q_self, layer.k_self
            columns = propagate_unformed(*qk, columns, layer.self_heads, self.config, apply)
        self._complete(reduction, self_map, columns)
        self._note(name, reduction, self_map, cross_map)

    def _map(self, q: Tensor, k: Tensor, layer: Projected, which: str) -> Tensor:
        heads, bias = getattr(layer, f"{which}_heads"), getattr(layer, f"{which}_bias")
        return self._run("attention_map", q=q, k=k, heads=heads, key_bias=bias)

    def _joint_maps(self, layer: Projected) -> tuple[Tensor, Tensor]:
        """One softmax over [text, image] keys, then split: rows of neither part sum to 1."""
        keys = torch.cat([layer.k_cross, layer.k_self], dim=1)  # (b, t+n, g*d)
        bias = None
        if layer.cross_bias is not None:
            bias = torch.cat([layer.cross_bias, layer.self_bias], dim=1)  # (b, t+n)
        return self._run(
            "joint_maps",
            q=layer.q_cross,
            k=keys,
            token_count=layer.k_cross.shape[1],
            heads=layer.cross_heads,
            key_bias=bias,
            joint="raw",
        )

    def _owned(self, cross_map: Tensor) -> Tensor:
        """Attention to a key counted to the token that owns it."""
        if self.owners is None:
            return cross_map
        index = self.owners[:, None].expand_as(cross_map)
        return torch.zeros_like(cross_map).scatter_add(-1, index, cross_map)

    def _note(self, name: str, reduction: int, self_map, cross_map) -> None:
        kept = (self_map, cross_map) if self.keep_maps else (None, None)
        self.layers.append(Folded(name, reduction, *kept))

    def _run(self, name: str, **arguments):
        """An operation on tensors that the recorder made or a projection returned: unchecked."""
        return backends.run_unchecked(name, self.backend, self.plan.device, arguments)
