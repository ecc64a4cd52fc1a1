"""One call of a transformer, from what is replayed of its attention to `Evidence`.

Between `start` and `finish` each chosen block is folded as soon as its attention has run (compiled
blocks when the whole network has), so that the maps of one layer are alive at a time. Other blocks
are not touched, and neither is the host's own attention.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from scfg import ops, reference
from scfg.config import SCFGConfig
from scfg.evidence import MAP_BUDGET, Evidence, fits
from scfg.recording.layouts import Grid, Layout, call_arguments, find_layers, find_layout
from scfg.recording.recorder import AttentionLayer
from scfg.recording.replay import Scores, Watch
from scfg.recording.words import group_words


class TransformerRecorder:
    """The attention of a transformer, between `start` and `finish`, as `Evidence`.

    Args:
        model: The transformer, or a torch.compile of it, which must not have run yet.
        config: Its layers, joint and propagation are used.
        backend: See `scfg.ops`.
        keep_maps: Keep each layer's maps, to be looked at; memory then grows with the layers.
        layout: Row of the model; None: looked up by its class.
        watch: Where queries and keys come from, see `scfg.recording.replay.Watch`.

    Attributes:
        layout: The row.
        layers: Blocks folded in the last call, in forward order, with their maps where kept.
        apart: Keep the evidence of each layer apart, and its text_masses, to compare them.
        names: Blocks folded in the last call, in the order of that evidence.
        finished: Evidence of the last call.

    Raises:
        ValueError: No row fits, a layer is not there, or attention is recorded already.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SCFGConfig,
        backend: str = "auto",
        keep_maps: bool = False,
        layout: Layout | None = None,
        watch: Callable = Watch,
    ):
        layout = find_layout(model) if layout is None else layout
        if layout is None:
            raise ValueError(
                f"{type(model).__name__} has no row in scfg.recording.layouts; give layout=, a "
                "Layout: at least the attention modules of a block and a function from a call to "
                "the grid of patches, and what differs from its defaults"
            )
        self.model, self.layout, self.config, self.backend = model, layout, config, backend
        self.keep_maps = keep_maps
        self.layers: list[AttentionLayer] = []
        self.names: list[str] = []
        self.text_masses: list[Tensor] = []
        self.apart = False
        self.finished: Evidence | None = None
        self._blocks = find_layers(model, layout, config.layers)
        self._block_of = {name: block for block, names in self._blocks.items() for name in names}
        plain = getattr(model, "_orig_mod", model)
        chosen = {name: plain.get_submodule(name) for name in self._block_of}
        every = find_layers(model, layout, None, missing=False)
        names = [name for block in every.values() for name in block if name not in chosen]
        self._watch = watch(chosen, [plain.get_submodule(name) for name in names], self._ran)
        self._weights: dict[tuple, Tensor] = {}
        self.abort()

    def start(
        self,
        args: tuple,
        kwargs: dict,
        words: Tensor | None = None,
        rows: slice = slice(None),
    ) -> None:
        """Begin a call of the model.

        Args:
            args: Of the call.
            kwargs: Of the call.
            words: (t,) or (rows, t) int64: the word of the prompt that each column of the text is a
                piece or copy of, from 0; -1 for columns that are none of it. None: unknown; each
                column is a word, but for those that know nothing of the prompt.
            rows: Rows of the batch to record.

        Raises:
            ValueError: The call's grid cannot be told, see the layout.
        """
        self.start_call(call_arguments(self.model, args, kwargs), words, rows)

    def start_call(
        self, call: dict, words: Tensor | None = None, rows: slice | Tensor = slice(None)
    ) -> None:
        """`start` from the call's arguments by name, as far as the layout needs them."""
        self.abort()
        self._call = call
        self._grid = self.layout.grid(self.model_itself, self._call)
        self._words, self._rows = words, rows
        self.layers, self.names, self.text_masses = [], [], []
        self._evidence = Evidence(self._grid[1:])
        self._watch.begin()

    @property
    def model_itself(self) -> nn.Module:
        """The model, inside of torch.compile."""
        return getattr(self.model, "_orig_mod", self.model)

    @property
    def grid(self) -> Grid | None:
        """(f, h, w) of the patches of the call at hand, or the last one."""
        return self._grid

    def _ran(self, name: str) -> None:
        """An attention module has run: fold its block if it was the last of it."""
        block = self._block_of[name]
        if block in self._done:
            self._repeated.add(block)
        elif all(self._watch.seen(other) for other in self._blocks[block]):
            self._fold(block)

    def finish(self) -> Evidence:
        """End the call.

        Raises:
            RuntimeError: A chosen module did not run, ran twice, or cannot be replayed.
        """
        for block, names in self._blocks.items():  # what ran compiled
            if block not in self._done and all(self._watch.seen(name) for name in names):
                self._fold(block)
        done, repeated, evidence = set(self._done), set(self._repeated), self._evidence
        self.abort()
        if repeated or done != self._blocks.keys():
            missing = sorted(self._blocks.keys() - done)
            raise MissingLayers(
                f"recorded {len(done)} of {len(self._blocks)} layers; not seen: {missing}, seen "
                f"more than once: {sorted(repeated)}. A cache skipped or repeated them, or code "
                "that torch.compile made before the hooks were there ran instead: call "
                "torch._dynamo.reset() first"
            )
        order = list(self._blocks)
        self.finished = evidence
        self.layers.sort(key=lambda layer: order.index(layer.name))
        return evidence

    def abort(self) -> None:
        """Stop recording and forget what was seen."""
        self._watch.clear()
        self._evidence, self._call, self._words = None, {}, None
        self._groups: Tensor | None = None
        self._done: set[str] = set()
        self._repeated: set[str] = set()
        self._grid = getattr(self, "_grid", None)

    def remove(self) -> None:
        """Take every hook off the model."""
        self.abort()
        self._watch.remove()

    @torch.no_grad()
    def _fold(self, block: str) -> None:
        """Fold a block whose attention has been called."""
        self._done.add(block)
        first, *other = self._blocks[block]
        scores = self._watch.take(first, self.layout.linear).rows(self._rows)
        f, h, w = self._grid
        if other:
            self._expect(block, scores.q.shape[1] == scores.k.shape[1] == f * h * w, scores)
            cross = self._watch.take(other[0]).rows(self._rows)
            q, k, bias, text = scores.q, scores.k, scores.key_bias(0), 0
            cross_map = ops.attention_map(
                cross.q, cross.k, cross.heads, cross.key_bias(0), self.backend
            )
            self._expect(block, cross.q.shape[1] == f * h * w, cross)
        else:
            self._expect(block, scores.q.shape[1] == scores.k.shape[1] > f * h * w, scores)
            q, k, bias, text = self._in_order(scores)
            cross_map = None
        attend = _Attend(
            q, k, bias, scores.heads, text, self.layout.linear, self.config, self.backend
        )
        formed = fits(q.shape[0], k.shape[1])
        if formed and (cross_map is None or self.config.propagation != "none" or self.keep_maps):
            self_map, own = attend(q)
        else:
            self_map, own = None, None if other else torch.cat([c for _, c in attend.tiles()], 1)
        cross_map = own if cross_map is None else cross_map
        columns = self._group(cross_map)
        if self_map is None and self.config.propagation != "none":
            columns = attend.propagate(columns)
        propagation = "none" if self_map is None else self.config.propagation
        layers = self._evidence.levels.setdefault(1, [])
        total = layers.pop() if layers and not self.apart else None
        steps, weights = self.config.propagation_steps, self._spatial(q.device)
        folded = ops.complete(self_map, columns, weights, total, propagation, steps, self.backend)
        layers.append(folded)
        self.names.append(block)
        if self.apart:
            self.text_masses.append(cross_map.sum(dim=-1).mean())
        kept = (self_map, cross_map) if self.keep_maps else (None, None)
        self.layers.append(AttentionLayer(block, 1, (f * h, w), *kept))

    def _expect(self, block: str, right: bool, scores: Scores) -> None:
        if not right:
            raise RuntimeError(
                f"{block!r} attends with {scores.q.shape[1]} queries to {scores.k.shape[1]} keys, "
                f"for a grid (f, h, w) of {self._grid}: not what its layout says, {self.layout}"
            )

    def _in_order(self, scores: Scores) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Queries of the image; keys and their bias, text first; number of text keys."""
        f, h, w = self._grid
        n, m = f * h * w, scores.q.shape[1]
        if self.layout.packed is not None:
            lengths = self._call[self.layout.packed][self._rows].sum(dim=1).long()  # (b,)
            texts = torch.arange(m - n, device=lengths.device).expand(len(lengths), -1)
            images = lengths[:, None] + torch.arange(n, device=lengths.device)  # (b, n)
            order = torch.cat([texts, images], dim=1)  # (b, m)
            masked = torch.where(texts < lengths[:, None], 0.0, -torch.inf)
            q, k = (
                x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
                for x, index in ((scores.q, images), (scores.k, order))
            )
            return q, k, torch.nn.functional.pad(masked, (0, n)), m - n
        first = 0 if self.layout.order == "image text" else m - n - -n % self.layout.multiple
        q, bias = scores.q[:, first : first + n], scores.key_bias(first)

        def text_first(x: Tensor) -> Tensor:
            return torch.cat([x[:, first + n :], x[:, :first], x[:, first : first + n]], dim=1)

        return q, text_first(scores.k), None if bias is None else text_first(bias), m - n

    def _group(self, cross_map: Tensor) -> Tensor:
        """(b, n, groups): START, what is no word of the prompt, the words."""
        if self._groups is None:
            b, _, t = cross_map.shape
            self._groups, self._evidence.patches = group_words(
                self._words, b, t, self.layout, self.layout.lead(self._grid), self._grid
            )
            self._groups = self._groups.to(cross_map.device)
        return reference.group_columns(
            cross_map, self._groups, self._evidence.patches.owning.shape[1]
        )

    def _spatial(self, device: torch.device) -> Tensor:
        """(f*h*w,) weights of the mean of a blurred map, see `scfg.reference.spatial_weights`."""
        key = (self._grid, device)
        if key not in self._weights:
            f, h, w = self._grid
            frame = reference.spatial_weights(h, w, 1) / f
            self._weights = {key: frame.float().repeat(f).to(device)}
        return self._weights[key]


class MissingLayers(RuntimeError):
    """Not every chosen layer ran: the regions of an earlier call may still be good."""


class _Attend:
    """The attention of one layer: formed whole, or by rows that fit."""

    def __init__(self, q, k, bias, heads, text, linear, config: SCFGConfig, backend: str):
        self.q, self.k, self.bias, self.heads, self.text = q, k, bias, heads, text
        self.linear, self.config, self.backend = linear, config, backend

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Self and cross map of some rows."""
        if self.linear:
            return reference.linear_attention_map(q, self.k, self.heads), q[..., :0]
        if not self.text:
            return ops.attention_map(q, self.k, self.heads, self.bias, self.backend), q[..., :0]
        return ops.joint_maps(
            q, self.k, self.text, self.heads, self.bias, self.config.joint, self.backend
        )

    def tiles(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Self and cross map, some rows at a time."""
        b, m, _ = self.k.shape
        for tile in self.q.split(max(MAP_BUDGET // (b * m * 4), 1), dim=1):
            yield self(tile)

    def propagate(self, columns: Tensor) -> Tensor:
        """`scfg.reference.propagate`, the self map being formed again for each power."""
        total = 0
        config = self.config
        for weight in reference.power_weights(config.propagation, config.propagation_steps):
            columns = torch.cat([self_map @ columns for self_map, _ in self.tiles()], dim=1)
            total = total + weight * columns
        return total
