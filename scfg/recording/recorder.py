"""One call of a U-Net, from its queries and keys to `Evidence`: start, fold, finish.

What is known beforehand is planned (`scfg.recording.plan`), hooks see the queries and keys that the
host computes anyway (`scfg.recording.hooks`), and those are folded into the evidence of their level
(`scfg.recording.folding`). The host's own attention is left alone, so its output keeps every bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scfg.config import SCFGConfig
from scfg.evidence import Evidence, map_grid
from scfg.recording.folding import Folded, Folding
from scfg.recording.hooks import Hooks, this_thread
from scfg.recording.plan import Plan, make_plan
from scfg.recording.reading import Block


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

    Raises:
        ValueError: The U-Net has no transformer block.
    """

    def __init__(self, unet: nn.Module, config: SCFGConfig, backend: str, keep_maps: bool = False):
        self.config, self.backend, self.keep_maps = config, backend, keep_maps
        self._plan: Plan | None = None
        self._folding: Folding | None = None  # of the call at hand
        self._folded: list[Folded] = []
        self._order: list[tuple[int, str]] = []  # (reduction, block) in forward order
        self._unused: dict[tuple[int, int], frozenset[str]] = {}  # by size, see `_layers_unused`
        self._skipped: frozenset[str] = frozenset()  # those of the call at hand
        self._hooks = Hooks(unet, config.reductions, self._fold)

    def _fold(self, block: Block, reduction: int) -> None:
        """Fold a block at a chosen resolution that has just run."""
        self._order.append((reduction, block.name))
        if block.name not in self._skipped:
            self._folding.add(block.name, reduction, block.read())

    @property
    def layers(self) -> list[AttentionLayer]:
        """Blocks folded in the last call, in forward order, with their maps where kept."""
        return [
            AttentionLayer(name, reduction, map_grid(self._plan.size, reduction), *maps)
            for name, reduction, *maps in self._folded
        ]

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
        if self._hooks.active and self._hooks.thread != this_thread():
            raise RuntimeError("another thread is recording this U-Net; give each thread its own")
        self.abort()
        self._plan = plan = make_plan(sample, self.config, self._plan)
        self._folding = Folding(self.config, self.backend, plan, owners, self.keep_maps)
        self._order, self._folded = [], self._folding.layers
        if self.config.layers_per_level is not None:
            self._skipped = self._unused.get(plan.size, frozenset())
        self._hooks.begin(plan, sample)

    def finish(self) -> Evidence:
        """End the call.

        Raises:
            RuntimeError: A module did not run exactly once, or none was at a chosen resolution.
        """
        modules, missing = len(self._hooks), self._hooks.missing()
        textless, pixels = 0, []
        if missing or not self._order:
            textless, pixels = self._hooks.lacking_text(), self._hooks.pixels()
        size, folding = self._plan.size, self._folding
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
                f"{size}, expected one at least (see map_reduction, coarsest_reduction); "
                f"attention ran on {pixels} pixels"
            )
        if self.config.layers_per_level is not None:
            self._unused[size] = self._layers_unused(self.config.layers_per_level)
        with torch.no_grad():
            folding.flush()
        self._hooks.settle()
        return folding.evidence

    def _layers_unused(self, last: int) -> frozenset[str]:
        """Blocks before the last so many of each level, which need not be read again."""
        levels: dict[int, list[str]] = {}
        for reduction, name in self._order:
            levels.setdefault(reduction, []).append(name)
        return frozenset(name for level in levels.values() for name in level[:-last])

    def abort(self) -> None:
        """Stop recording and forget what was seen; not what another thread records."""
        if self._hooks.active and self._hooks.thread != this_thread():
            return
        self._folding = None
        self._hooks.clear()

    def remove(self) -> None:
        """Take every hook off the U-Net."""
        self.abort()
        self._hooks.remove()
