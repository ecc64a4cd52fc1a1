"""What attention says of tokens: maps completed by self-attention, equation 5, and added up."""

import torch
from torch import Tensor

from scfg.reference.precision import wide


def group_columns(cross_map: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sum of the columns of each group: pieces and copies of a word are one token.

    Exact before `propagate` as after it, for columns do not depend on each other.

    Args:
        cross_map: (b, n, t).
        groups: (b, t) int64 in [0, count), the group of each column.
        count: Number of groups.

    Returns:
        (b, n, count) in the accumulation type. Source: none, bookkeeping.
    """
    cross_map = wide(cross_map)
    total = cross_map.new_zeros(*cross_map.shape[:2], count)
    return total.scatter_add(-1, groups[:, None, :].expand_as(cross_map), cross_map)


def power_weights(propagation: str, powers: int) -> tuple[float, ...]:
    """Weight of S^p C, p = 1, 2, ..., in `propagate`; empty for ``"none"``.

    >>> power_weights("paper", 4)
    (0.25, 0.25, 0.25, 0.25)
    """
    return {"paper": (1 / powers,) * powers, "official": (1 / 4, 3 / 4), "none": ()}[propagation]


def propagate(
    self_map: Tensor | None, columns: Tensor, propagation: str = "paper", powers: int = 4
) -> Tensor:
    """Complete token maps through self-attention.

    ``"paper"``: (1/P) sum_{p=1..P} S^p C; ``"official"``: (S + 3 S^2) C / 4; ``"none"``: C.
    Evaluated as S(SC): n^2 t work per power, columns independent of each other.

    Args:
        self_map: (b, n, n), S; may be None when propagation is ``"none"``.
        columns: (b, n, t), C.
        propagation: ``"paper"``, ``"official"`` or ``"none"``.
        powers: P, the number of powers of ``"paper"``.

    Returns:
        (b, n, t) in the accumulation type.

    Source: equation 5 of the paper; ``"official"`` is what the code's loop, which multiplies the
    unchanged S by itself each time, comes to.
    """
    columns = wide(columns)
    if propagation == "none":
        return columns.clone()
    self_map = wide(self_map)
    total = torch.zeros_like(columns)
    for weight in power_weights(propagation, powers):
        columns = self_map @ columns
        total = total + weight * columns
    return total


def complete(
    self_map: Tensor | None,
    cross_map: Tensor,
    weights: Tensor,
    total: Tensor | None = None,
    propagation: str = "paper",
    powers: int = 4,
) -> Tensor:
    """Fold layers into the evidence of their level: propagate, renormalise over space, add.

    With Y = propagate(S, C), extended by the column sum_{j>=1} Y_j (everything but START):
    ``total_j + Y_j / (v . Y_j)``, so that each token's map has spatial mean 1 before layers are
    added up. A column that is zero everywhere stays zero.

    Args:
        self_map: (b, n, n), or (l, b, n, n) of l layers, added one after another; may be None when
            propagation is ``"none"``.
        cross_map: (b, n, t) or (l, b, n, t), token 0 is START.
        weights: (n,) from `spatial_weights`.
        total: (b, n, t+1) evidence so far, or None for zero.
        propagation: See `propagate`.
        powers: See `propagate`.

    Returns:
        (b, n, t+1) in the accumulation type, a new tensor: t token columns, then "not START".

    Source: the code upsamples, blurs, then divides by the spatial mean; the division commutes with
    both, which are linear.
    """
    if cross_map.dim() == 4:
        for layer, columns in enumerate(cross_map):
            own = None if self_map is None else self_map[layer]
            total = complete(own, columns, weights, total, propagation, powers)
        return total
    tokens = propagate(self_map, cross_map, propagation, powers)  # (b, n, t)
    rest = tokens[..., 1:].sum(dim=-1, keepdim=True)  # (b, n, 1)
    columns = torch.cat([tokens, rest], dim=-1)  # (b, n, t+1)
    mean = torch.einsum("n,bnt->bt", weights.to(columns), columns)[:, None, :]  # (b, 1, t+1)
    evidence = torch.where(mean > 0, columns / mean.clamp_min(1e-30), columns)
    return evidence if total is None else total + evidence
