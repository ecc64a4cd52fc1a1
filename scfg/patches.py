"""Evidence of a transformer's patches: words own them, one grid, over one image or a clip."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from scfg import ops
from scfg.config import SCFGConfig

START, OTHER = 0, 1  # the first two groups of columns; words follow


@dataclass(frozen=True, eq=False)
class Patches:
    """What the evidence of a transformer has beside that of a U-Net.

    Attributes:
        grid: (f, h, w) of the patches; f frames, 1 for an image.
        columns: (b, groups) int64, the first column of the text that each group stands for.
        owning: (b, groups) bool, groups that may own a patch: words of the prompt.
        start: Whether group 0 holds columns that know nothing of the prompt.
        text: t, columns of the text.
    """

    grid: tuple[int, int, int]
    columns: Tensor
    owning: Tensor
    start: bool
    text: int

    def rows(self, begin: int, end: int) -> "Patches":
        """Those of a part of the batch."""
        columns, owning = self.columns[begin:end], self.owning[begin:end]
        return Patches(self.grid, columns, owning, self.start, self.text)


def benchmark_rule(config: SCFGConfig) -> str:
    """Which region has rate 1 on a transformer: ``"image"``, or START of a branch."""
    if config.benchmark != "foreground":
        return "image"
    return f"START of the {'text' if config.foreground == 'cond' else 'unconditional'} branch"


def needs_uncond(config: SCFGConfig) -> bool:
    """Whether the unconditional branch of a transformer has to be recorded too."""
    return config.benchmark == "foreground" and config.foreground == "uncond"


def own_patches(
    text: Tensor,
    patches: Patches,
    front: Tensor | None,
    config: SCFGConfig,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels and benchmark region of the patches of b images or clips.

    Words compete for each patch (`scfg.reference.segment`); a word with a smaller share of the
    patches than ``min_share`` gives them to those that come next; where no word's evidence reaches
    ``min_peak`` times its mean, the benchmark region is empty, which leaves that image to plain
    CFG.

    Args:
        text: (b, f*h*w, groups+1) evidence of the text branch.
        patches: Its grid and groups.
        front: (b, f*h*w, u+1) evidence whose START decides the foreground; None: it is the whole
            image.
        config: Its min_share and min_peak are used.
        backend: See `scfg.ops`.

    Returns:
        labels (b, f, h, w) int64, columns of the text; benchmark (b, f, h, w) bool, f being left
        out where it is 1; and (b,) bool, see `scfg.reference.start_is_flat` of front.
    """
    f, h, w = patches.grid
    owning = patches.owning.to(text.device)
    words = _only(text, owning)
    frames = _frames(words, f)
    labels, fore, _ = ops.segment([frames], [frames], h, w, [1], backend)
    if config.min_share > 0:
        kept = _large(labels, owning, f, config.min_share)
        frames = _frames(_only(words, kept), f)
        labels, _, _ = ops.segment([frames], [frames], h, w, [1], backend)
    flat_start = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    if front is None:
        fore = torch.ones_like(fore)
    else:
        pair = [_frames(text, f)], [_frames(front, f)]
        _, fore, flat_start = ops.segment(*pair, h, w, [1], backend)
        flat_start = flat_start.view(-1, f).all(dim=1)
    flat = _peak(words, owning) < config.min_peak  # (b,)
    labels, fore = (rearrange(x, "(b f) h w -> b f h w", f=f) for x in (labels, fore))
    fore = fore & ~flat[:, None, None, None]
    columns = patches.columns.to(text.device)
    labels = columns.gather(1, labels.flatten(1)).view(labels.shape)
    return (labels, fore, flat_start) if f > 1 else (labels[:, 0], fore[:, 0], flat_start)


def _frames(x: Tensor, f: int) -> Tensor:
    """A clip's evidence as that of its frames: blur and argmax stay within a frame."""
    return rearrange(x, "b (f n) t -> (b f) n t", f=f)


def _only(evidence: Tensor, owning: Tensor) -> Tensor:
    """Evidence in which all but the given groups are zero, and so never win."""
    keep = torch.cat([owning, torch.ones_like(owning[:, :1])], dim=1)  # the column of the rest
    return evidence * keep[:, None, :]


def _large(labels: Tensor, owning: Tensor, f: int, share: float) -> Tensor:
    """(b, groups) bool: groups with at least this share of the patches; all, if none has."""
    owners = rearrange(labels, "(b f) h w -> b (f h w)", f=f)
    ones = torch.ones_like(owners, dtype=torch.float32)
    counts = ones.new_zeros(owning.shape).scatter_add(1, owners, ones)
    large = owning & (counts >= share * owners.shape[1])
    return torch.where(large.any(dim=1, keepdim=True), large, owning)


def _peak(words: Tensor, owning: Tensor) -> Tensor:
    """(b,): largest ratio of peak to mean among the words' evidence."""
    columns = words[..., :-1]
    mean = columns.mean(dim=1).clamp_min(1e-30)  # (b, groups)
    return torch.where(owning, columns.amax(dim=1) / mean, 0).amax(dim=1)
