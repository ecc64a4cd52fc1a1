"""One call of a diffusion model, which holds rows of several prompts: what each attended to."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scfg.adapters.comfyui.attention import Listen
from scfg.evidence import Evidence
from scfg.patches import needs_uncond
from scfg.recording.layouts import Layout
from scfg.recording.replayed import TransformerRecorder
from scfg.recording.run import Run

CHUNK = 77  # tokens that CLIP reads at a time, START first
TEXT, UNCOND, OTHER = range(3)  # branches


@dataclass(frozen=True)
class Share:
    """One prompt's rows of a call.

    Attributes:
        name: ComfyUI's id of the prompt, or one made of it.
        branch: TEXT, UNCOND or OTHER, which S-CFG has nothing to do with.
        tokens: Of the prompt, before ComfyUI repeats them to a common length; None: unknown.
        words: (tokens,) the word of each, -1 for none; None: unknown.
    """

    name: uuid.UUID
    branch: int
    tokens: int | None
    words: Tensor | None = None


class UNetCalls:
    """Calls of a U-Net, with hooks on it until `remove`."""

    def __init__(self, unet: nn.Module, run: Run):
        self._recorder = run.recorder(unet)
        self.remove = self._recorder.remove

    def record(
        self, call: Callable, x: Tensor, context: Tensor, options: dict, shares: list[Share]
    ) -> tuple[Tensor, dict[uuid.UUID, Evidence]]:
        """Make a call, and say what each prompt attended to.

        Args:
            call: ``call(options)`` makes it.
            x: (b, c, H, W) latents.
            context: (b, t, c) texts.
            options: ``transformer_options``.
            shares: b is a multiple of their number.

        Returns:
            Its output, and evidence by name.

        Raises:
            RuntimeError: See `scfg.recording.recorder.AttentionRecorder.finish`.
        """
        b = len(x) // len(shares)
        try:
            self._recorder.start(x, _owners(shares, b, context))
            output = call(options)
            evidence = self._recorder.finish()
        finally:
            self._recorder.abort()
        seen = {share.name: evidence.rows(i * b, i * b + b) for i, share in enumerate(shares)}
        return output, seen


def _owners(shares: list[Share], b: int, context: Tensor) -> Tensor | None:
    """The token that every key counts to: repeats to the first, every START to START."""
    keys = torch.arange(context.shape[1])
    lengths = [share.tokens or len(keys) for share in shares]
    if len(keys) <= CHUNK and set(lengths) == {len(keys)}:
        return None
    rows = []
    for length in lengths:
        token = keys % length
        chunks = length > CHUNK and length % CHUNK == 0
        rows.append(token.where(token % CHUNK != 0, 0) if chunks else token)
    return torch.stack(rows).repeat_interleave(b, dim=0).to(context.device)


class TransformerCalls:
    """Calls of a transformer, with hooks on it until `remove`."""

    def __init__(self, model: nn.Module, run: Run, layout: Layout):
        self._listen: Listen | None = None
        self._both = needs_uncond(run.config)
        self._layout = layout

        def watch(*args) -> Listen:
            self._listen = Listen(*args)
            return self._listen

        self._recorder = TransformerRecorder(
            model, run.config, run.backend, layout=layout, watch=watch
        )
        self.remove = self._recorder.remove

    def record(
        self, call: Callable, x: Tensor, context: Tensor, options: dict, shares: list[Share]
    ) -> tuple[Tensor, dict[uuid.UUID, Evidence]]:
        """As `UNetCalls.record`; only prompts whose attention is needed have evidence.

        Raises:
            RuntimeError: See `scfg.recording.replayed.TransformerRecorder.finish`; or the model saw
                more than latents and texts (images to edit).
        """
        b, branches = len(x) // len(shares), (TEXT, UNCOND) if self._both else (TEXT,)
        wanted = [(i, share) for i, share in enumerate(shares) if share.branch in branches]
        if not wanted:
            return call(options), {}
        rows = torch.tensor([i * b + row for i, _ in wanted for row in range(b)], device=x.device)
        t = context.shape[1]
        words = torch.stack([self._words(share, t) for _, share in wanted])
        try:
            self._recorder.start_call({"x": x}, words.repeat_interleave(b, dim=0), rows)
            self._listen.keys = self._keys(t)
            output = call(self._listen.override(options))
            evidence = self._of_text(self._recorder.finish())
        finally:
            self._recorder.abort()
        parts = enumerate(wanted)
        return output, {share.name: evidence.rows(i * b, i * b + b) for i, (_, share) in parts}

    def _of_text(self, evidence: Evidence) -> Evidence:
        """The same, columns being counted from the text's first one."""
        patches, lead = evidence.patches, self._layout.lead(self._recorder.grid)
        columns = (patches.columns - lead).clamp_min(0)
        return replace(evidence, patches=replace(patches, columns=columns))

    def _keys(self, t: int) -> int:
        """Keys of the first softmax: those of the image, and in a joint one of the text."""
        f, h, w = self._recorder.grid
        n, multiple = f * h * w, self._layout.multiple
        joint = len(self._layout.attention) == 1
        return n + (-n % multiple + t + -t % multiple if joint else 0)

    def _words(self, share: Share, t: int) -> Tensor:
        """(t,) the word of each column: its own where nothing is known, but for START."""
        tokens = share.tokens or t
        words = torch.arange(tokens) if share.words is None else share.words
        start = [column for column in self._layout.start if -tokens <= column < tokens]
        if share.words is None and start:
            words[torch.tensor(start)] = -1
        return words.repeat(-(-t // tokens))[:t]
