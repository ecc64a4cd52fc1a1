"""Attention maps from queries and keys: equation 4."""

import torch
from einops import rearrange
from torch import Tensor

from scfg.reference.precision import wide


def attention_map(q: Tensor, k: Tensor, heads: int, key_bias: Tensor | None = None) -> Tensor:
    """Attention probabilities, averaged over heads.

    ``A = (1/g) sum_g softmax_m(q_g k_g^T / sqrt(d) + key_bias)``

    Args:
        q: (b, n, g*d) queries as the projection returns them.
        k: (b, m, g*d) keys.
        heads: g.
        key_bias: (b, m) added to the scores of each key, -inf or very negative where a key is
            masked, or None.

    Returns:
        (b, n, m) in the accumulation type; rows sum to 1.

    Source: equation 4 of the paper; the code averages the same probabilities over heads.
    """
    q, k = wide(q), wide(k)
    width = q.shape[-1] // heads
    total = q.new_zeros(q.shape[0], q.shape[1], k.shape[1])  # (b, n, m)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = (q[..., part] * width**-0.5) @ k[..., part].mT  # (b, n, m)
        if key_bias is not None:
            scores = scores + key_bias[:, None, :]
        total += scores.softmax(dim=-1)
    return total / heads


def attention_maps(
    q_self: Tensor,
    k_self: Tensor,
    q_cross: Tensor,
    k_cross: Tensor,
    heads: int,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Self- and cross-attention map of one transformer block.

    Args:
        q_self: (b, n, g*d).
        k_self: (b, n, g*d).
        q_cross: (b, n, g*d).
        k_cross: (b, t, g*d).
        heads: g.
        key_bias: (b, t) for the text keys, see `attention_map`.

    Returns:
        (b, n, n) and (b, n, t), rows of both sum to 1. Source: none, twice `attention_map`.
    """
    return attention_map(q_self, k_self, heads), attention_map(q_cross, k_cross, heads, key_bias)


def stacked_maps(
    q_self: list[Tensor],
    k_self: list[Tensor],
    q_cross: list[Tensor],
    k_cross: list[Tensor],
    heads: int,
    key_bias: list[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """`attention_maps` of l transformer blocks of one shape.

    Args:
        q_self: l times (b, n, g*d).
        k_self: l times (b, n, g*d).
        q_cross: l times (b, n, g*d).
        k_cross: l times (b, t, g*d).
        heads: g.
        key_bias: l times (b, t) for the text keys, or None.

    Returns:
        (l, b, n, n) and (l, b, n, t), rows of both sum to 1.
    """
    blocks = zip(q_self, k_self, q_cross, k_cross, key_bias, strict=True)
    maps = [attention_maps(*qk, heads, bias) for *qk, bias in blocks]
    return torch.stack([own for own, _ in maps]), torch.stack([text for _, text in maps])


def attention_apply(q: Tensor, k: Tensor, columns: Tensor, heads: int) -> Tensor:
    """Head-mean self-attention times columns, the map itself never formed.

    ``attention_map(q, k, heads) @ columns``, for n so large that (b, n, n) does not fit.

    Args:
        q: (b, n, g*d).
        k: (b, n, g*d).
        columns: (b, n, t).
        heads: g.

    Returns:
        (b, n, t) in the accumulation type. Source: none, a product in another order.
    """
    rows = 256  # of the map alive at a time
    tiles = q.split(rows, dim=1)
    return torch.cat([attention_map(tile, k, heads) @ wide(columns) for tile in tiles], dim=1)


def linear_attention_map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Linear attention as a map, averaged over heads.

    ``A = (1/g) sum_g relu(q_g) relu(k_g)^T / row sum``; a row without any overlap is zero.

    Args:
        q: (b, n, g*d).
        k: (b, m, g*d).
        heads: g.

    Returns:
        (b, n, m) in the accumulation type, >= 0; rows sum to 1.

    Source: none in the paper. What Sana's self-attention (arXiv 2410.10629) multiplies its values
    by, one head's rows each divided by their sum.
    """
    q, k = (rearrange(wide(x).relu(), "b n (g d) -> b g n d", g=heads) for x in (q, k))
    scores = q @ k.mT  # (b, g, n, m)
    return (scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-15)).mean(dim=1)


def split_joint(
    joint_map: Tensor, token_count: int, joint: str = "renormalise"
) -> tuple[Tensor, Tensor]:
    """Self and cross map of image patches whose softmax runs over text and image keys at once.

    ``C = J[:, :t]`` as it is; ``S = J[:, t:]``, divided by its row sums if ``joint`` is
    ``"renormalise"``.

    Args:
        joint_map: (b, n, t+n) head-mean probabilities of the image patches, text keys first.
        token_count: t, the number of text keys.
        joint: ``"renormalise"``: a walk from patch to patch goes on whatever a patch reads of the
            text, as in a U-Net, where the two maps are apart. ``"raw"``: S^p C fades with the share
            of text that patches read.

    Returns:
        S (b, n, n), C (b, n, t), in the accumulation type.

    Source: none in the paper. ``"raw"`` is what the code does for DeepFloyd IF; C is left raw
    because that was best in Seg4Diff's comparison (arXiv 2509.18096).
    """
    cross_map, self_map = wide(joint_map).split(
        (token_count, joint_map.shape[-1] - token_count), dim=-1
    )
    if joint == "renormalise":
        self_map = self_map / self_map.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    return self_map, cross_map


def joint_maps(
    q: Tensor,
    k: Tensor,
    token_count: int,
    heads: int,
    key_bias: Tensor | None = None,
    joint: str = "renormalise",
) -> tuple[Tensor, Tensor]:
    """Self and cross map of image patches under one softmax over text and image keys.

    ``split_joint(attention_map(q, k, heads, key_bias), token_count, joint)``

    Args:
        q: (b, n, g*d) of patches: all, or some rows of a map that does not fit.
        k: (b, t+m, g*d), text keys first.
        token_count: t, the number of text keys, less than all.
        heads: g.
        key_bias: (b, t+m), see `attention_map`.
        joint: See `split_joint`.

    Returns:
        S (b, n, m) and C (b, n, t), in the accumulation type.
    """
    self_map, cross_map = split_joint(attention_map(q, k, heads, key_bias), token_count, joint)
    return self_map.contiguous(), cross_map.contiguous()
