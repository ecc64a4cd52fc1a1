"""Regions from evidence: the token that owns each patch, and the foreground."""

import torch
from einops import rearrange
from torch import Tensor

from scfg.reference.grids import blur, upsample

NO_START = 1e-5  # share of START's value, see `start_is_flat`


def start_is_flat(evidence: list[Tensor]) -> Tensor:
    """Whether START says the same of every patch of an image, and so marks no foreground.

    ``max_x E_START(x) - min_x E_START(x) <= NO_START * max_x E_START(x)`` at every level.

    A context of zeros or of equal tokens makes attention uniform: SDXL's, where no negative prompt
    is given. START then varies by rounding alone, below 1e-6 of its value whatever the type,
    size and number of tokens; the weakest START of a real context that was seen, in U-Nets of
    random weights, by 5e-4 (``python -m benchmarks.start`` prints both).

    Args:
        evidence: From `complete`, one (b, n_l, u+1) per level.

    Returns:
        (b,) bool.

    Source: none; paper and code take it for granted that START exists.
    """
    flat = []
    for x in evidence:
        low, high = x[..., 0].aminmax(dim=1)  # (b,)
        flat.append(high - low <= NO_START * high)
    return torch.stack(flat).all(dim=0)


def segment(
    text: list[Tensor], front: list[Tensor], h: int, w: int, factors: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each patch to the token with the largest evidence, and mark the foreground.

    ``E = blur(sum_l upsample(E_l))``; ``label = argmax_{j<t} E_j``, lowest index on ties;
    ``foreground = E_rest > E_START``, with START and the rest from ``front``, or from ``text``
    for an image of which `start_is_flat`; none where that is so of both.

    Args:
        text: Evidence of the text branch from `complete`, one (b, n_l, t+1) per level with
            n_l = ceil(h/factor_l) * ceil(w/factor_l). Its last column is not read.
        front: Evidence that decides the foreground, one (b, n_l, u+1) per level; columns 0 (START)
            and u (the rest) are read.
        h: Rows of the label grid.
        w: Columns of it.
        factors: Reduction of each level with respect to the label grid.

    Returns:
        labels (b, h, w) int64 in [0, t), foreground (b, h, w) bool, `start_is_flat` of ``front``
        (b,) bool.

    Source: code, whose comparison with the maximum gives a tied patch to every winner; one owner is
    taken here. The mean over layers is a sum: the argmax is the same.
    """

    def assemble(levels: list[Tensor]) -> Tensor:
        total = 0
        for x, factor in zip(levels, factors, strict=True):
            grid = rearrange(x, "b (h w) t -> b t h w", h=-(-h // factor))
            total = total + upsample(grid, h, w, factor)
        return blur(total)  # (b, t, h, w)

    labels = assemble([x[..., :-1] for x in text]).argmax(dim=1)  # (b, h, w)
    flat = start_is_flat(front)  # (b,)
    pairs = [
        torch.where(flat[:, None, None], own[..., (0, -1)], other[..., (0, -1)])
        for own, other in zip(text, front, strict=True)
    ]  # (b, n_l, 2)
    start_map, rest = assemble(pairs).unbind(dim=1)  # (b, h, w) each
    marked = ~(flat & start_is_flat(text))[:, None, None]
    return labels, (rest > start_map) & marked, flat
