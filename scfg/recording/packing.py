"""Predictions of transformers as images (b, c, H, W), and back in the form they came in."""

import torch
from torch import Tensor

from scfg.recording.layouts import Grid, Layout


def unpack(prediction: Tensor | list[Tensor], layout: Layout, grid: Grid) -> Tensor:
    """A prediction as (b, c, H, W), or (b, c, f, H, W) for several frames, a view where it can be.

    Args:
        prediction: As the model returns it: such a tensor, (b, n, c) packed, or a list of
            (c, f, H, W).
        layout: Its side and variance are used.
        grid: (f, h, w) of the patches.
    """
    if isinstance(prediction, list):
        prediction = torch.stack(prediction)
    f, h, w = grid
    if layout.side:
        side = layout.side
        b, _, packed = prediction.shape
        parts = prediction.view(b, f, h, w, packed // side**2, side, side)
        prediction = parts.permute(0, 4, 1, 2, 5, 3, 6).reshape(b, -1, f, h * side, w * side)
    if layout.variance:
        prediction = prediction[:, : prediction.shape[1] // 2]
    return prediction[:, :, 0] if prediction.dim() == 5 and f == 1 else prediction


def repack(eps: Tensor, like: Tensor | list[Tensor], layout: Layout, grid: Grid):
    """The inverse of `unpack`: eps in the form of a prediction, whose variance stays.

    Args:
        eps: (b, c, H, W) or (b, c, f, H, W).
        like: The prediction.
        layout: Its side and variance are used.
        grid: (f, h, w) of the patches.
    """
    f, h, w = grid
    if isinstance(like, list):
        return list(eps.unsqueeze(2) if eps.dim() == 4 else eps)
    if layout.side:
        side = layout.side
        b, c = eps.shape[:2]
        parts = eps.reshape(b, c, f, h, side, w, side)
        return parts.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, f * h * w, -1)
    if like.dim() == 5 and eps.dim() == 4:
        eps = eps.unsqueeze(2)
    if layout.variance:
        like = like.clone()
        like[:, : eps.shape[1]] = eps
        return like
    return eps
