"""Every operation in plain torch: the definition the Triton kernels are tested against.

Accumulation is float32, or float64 where the input is float64. Everything here is differentiable
except `segment`, whose result is discrete. Inputs are not checked: `scfg.ops` does that.
"""

import math

import torch
from einops import rearrange
from torch import Tensor

NO_START = 1e-5  # share of START's value, see `start_is_flat`
BLUR = (math.exp(-1) / (1 + 2 * math.exp(-1)), 1 / (1 + 2 * math.exp(-1)))  # side, centre


def _wide(x: Tensor) -> Tensor:
    """The tensor in the type it is accumulated in: float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _each(guidance_scale: float | Tensor, x: Tensor) -> Tensor:
    """The guidance scale in the type of x, (b, ...), to be multiplied with it."""
    if isinstance(guidance_scale, Tensor):
        return guidance_scale.to(x).reshape(-1, *[1] * (x.dim() - 1))
    return x.new_full((), guidance_scale)


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
    q, k = _wide(q), _wide(k)
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
        (b, n, n) and (b, n, t), rows of both sum to 1.
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
        (b, n, t) in the accumulation type.
    """
    rows = 256  # of the map alive at a time
    tiles = q.split(rows, dim=1)
    return torch.cat([attention_map(tile, k, heads) @ _wide(columns) for tile in tiles], dim=1)


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
    q, k = (rearrange(_wide(x).relu(), "b n (g d) -> b g n d", g=heads) for x in (q, k))
    scores = q @ k.mT  # (b, g, n, m)
    return (scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-15)).mean(dim=1)


def split_joint(joint_map: Tensor, text: int, joint: str = "renormalise") -> tuple[Tensor, Tensor]:
    """Self and cross map of image patches whose softmax runs over text and image keys at once.

    ``C = J[:, :text]`` as it is; ``S = J[:, text:]``, divided by its row sums if ``joint`` is
    ``"renormalise"``.

    Args:
        joint_map: (b, n, text+n) head-mean probabilities of the image patches, text keys first.
        text: t, the number of text keys.
        joint: ``"renormalise"``: a walk from patch to patch goes on whatever a patch reads of the
            text, as in a U-Net, where the two maps are apart. ``"raw"``: S^p C fades with the share
            of text that patches read.

    Returns:
        S (b, n, n), C (b, n, t), in the accumulation type.

    Source: none in the paper. ``"raw"`` is what the code does for DeepFloyd IF; C is left raw
    because that was best in Seg4Diff's comparison (arXiv 2509.18096).
    """
    cross_map, self_map = _wide(joint_map).split((text, joint_map.shape[-1] - text), dim=-1)
    if joint == "renormalise":
        self_map = self_map / self_map.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    return self_map, cross_map


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
    cross_map = _wide(cross_map)
    total = cross_map.new_zeros(*cross_map.shape[:2], count)
    return total.scatter_add(-1, groups[:, None, :].expand_as(cross_map), cross_map)


def power_weights(propagation: str, steps: int) -> tuple[float, ...]:
    """Weight of S^p C, p = 1, 2, ..., in `propagate`; empty for ``"none"``."""
    return {"paper": (1 / steps,) * steps, "official": (1 / 4, 3 / 4), "none": ()}[propagation]


def propagate(
    self_map: Tensor | None, columns: Tensor, propagation: str = "paper", steps: int = 4
) -> Tensor:
    """Complete token maps through self-attention.

    ``"paper"``: (1/P) sum_{p=1..P} S^p C; ``"official"``: (S + 3 S^2) C / 4; ``"none"``: C.
    Evaluated as S(SC): n^2 t work per power, columns independent of each other.

    Args:
        self_map: (b, n, n), S; may be None when propagation is ``"none"``.
        columns: (b, n, t), C.
        propagation: ``"paper"``, ``"official"`` or ``"none"``.
        steps: P, the number of powers of ``"paper"``.

    Returns:
        (b, n, t) in the accumulation type.

    Source: equation 5 of the paper; ``"official"`` is what the code's loop, which multiplies the
    unchanged S by itself each time, comes to.
    """
    columns = _wide(columns)
    if propagation == "none":
        return columns.clone()
    self_map = _wide(self_map)
    total = torch.zeros_like(columns)
    for weight in power_weights(propagation, steps):
        columns = self_map @ columns
        total = total + weight * columns
    return total


def spatial_weights(h: int, w: int, factor: int, device: torch.device | str = "cpu") -> Tensor:
    """Weights v of a coarse map such that ``mean(blur(upsample(y))) = v . y``.

    Blur and upsampling are linear, so their spatial mean is a fixed weighting of the coarse pixels;
    with it a map is renormalised at its own resolution.

    Args:
        h: Rows of the finest map grid.
        w: Columns of it.
        factor: Reduction of the coarse map with respect to the finest, a power of two.
        device: Where to compute them.

    Returns:
        (ceil(h/factor) * ceil(w/factor),) float64, sum 1.
    """
    sides = []
    for size in (h, w):
        basis = torch.eye(-(-size // factor), dtype=torch.float64, device=device)[:, None, :]
        sides.append(blur(upsample(basis, 1, size, factor)).mean(dim=(1, 2)))  # (m,)
    return torch.outer(*sides).flatten()


def complete(
    self_map: Tensor | None,
    cross_map: Tensor,
    weights: Tensor,
    total: Tensor | None = None,
    propagation: str = "paper",
    steps: int = 4,
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
        steps: See `propagate`.

    Returns:
        (b, n, t+1) in the accumulation type, a new tensor: t token columns, then "not START".

    Source: the code upsamples, blurs, then divides by the spatial mean; the division commutes with
    both, which are linear.
    """
    if cross_map.dim() == 4:
        for layer, columns in enumerate(cross_map):
            own = None if self_map is None else self_map[layer]
            total = complete(own, columns, weights, total, propagation, steps)
        return total
    tokens = propagate(self_map, cross_map, propagation, steps)  # (b, n, t)
    rest = tokens[..., 1:].sum(dim=-1, keepdim=True)  # (b, n, 1)
    columns = torch.cat([tokens, rest], dim=-1)  # (b, n, t+1)
    mean = torch.einsum("n,bnt->bt", weights.to(columns), columns)[:, None, :]  # (b, 1, t+1)
    evidence = torch.where(mean > 0, columns / mean.clamp_min(1e-30), columns)
    return evidence if total is None else total + evidence


def blur(x: Tensor) -> Tensor:
    """3 x 3 blur with weights exp(-(dx^2 + dy^2)), normalised, edges reflected without repeating.

    Args:
        x: (..., h, w). An axis of size 1 is left as it is.

    Returns:
        Same shape and type.

    Source: the code's Gaussian has exponent -(x/(2 sigma))^2 with sigma 0.5, not -x^2/(2 sigma^2).
    """
    side, centre = BLUR
    for axis in (-2, -1):
        size = x.shape[axis]
        index = torch.arange(size, device=x.device)
        before = (index - 1).abs().clamp_max(size - 1)
        after = (size - 1 - (size - 2 - index).abs()).clamp_min(0)
        x = centre * x + side * (x.index_select(axis, before) + x.index_select(axis, after))
    return x


def upsample(x: Tensor, h: int, w: int, factor: int) -> Tensor:
    """Bilinear upsampling by a power of two, pixel centres at half integers, edges repeated.

    Pixel i reads the coarse position (i + 1/2) / factor - 1/2, clamped to the map.

    Args:
        x: (..., ceil(h/factor), ceil(w/factor)).
        h: Rows of the result.
        w: Columns of the result.
        factor: At least 1.

    Returns:
        (..., h, w).

    Source: code (bilinear interpolation). A size that factor does not divide keeps the factor, as
    strided convolutions do, and is cropped at the end.
    """
    for axis, size in ((-2, h), (-1, w)):
        last = x.shape[axis] - 1
        centres = torch.arange(size, device=x.device, dtype=x.dtype) + 0.5
        position = (centres / factor - 0.5).clamp(0, last)  # exact: factor is a power of two
        low = position.floor().long()
        high = (low + 1).clamp_max(last)
        share = (position - low).unsqueeze(-1) if axis == -2 else position - low
        x = x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share
    return x


def spread(patches: Tensor, h: int, w: int, factor: int) -> Tensor:
    """Give every pixel the value of its patch: pixel (i, j) reads (i // factor, j // factor).

    Args:
        patches: (..., ceil(h/factor), ceil(w/factor)), any type.
        h: Rows of the result.
        w: Columns of the result.
        factor: Pixels per patch.

    Returns:
        (..., h, w).
    """
    rows = torch.arange(h, device=patches.device) // factor
    cols = torch.arange(w, device=patches.device) // factor
    return patches.index_select(-2, rows).index_select(-1, cols)


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
    tokens: list[Tensor], start: list[Tensor], h: int, w: int, factors: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each patch to the token with the largest evidence, and mark the foreground.

    ``E = blur(sum_l upsample(E_l))``; ``label = argmax_{j<t} E_j``, lowest index on ties;
    ``foreground = E_rest > E_START``, with START and the rest from ``start``, or from ``tokens``
    for an image of which `start_is_flat`; none where that is so of both.

    Args:
        tokens: Evidence of the text branch from `complete`, one (b, n_l, t+1) per level with
            n_l = ceil(h/factor_l) * ceil(w/factor_l). Its last column is not read.
        start: Evidence that decides the foreground, one (b, n_l, u+1) per level; columns 0 (START)
            and u (the rest) are read.
        h: Rows of the label grid.
        w: Columns of it.
        factors: Reduction of each level with respect to the label grid.

    Returns:
        labels (b, h, w) int64 in [0, t), foreground (b, h, w) bool, `start_is_flat` of ``start``
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

    labels = assemble([x[..., :-1] for x in tokens]).argmax(dim=1)  # (b, h, w)
    flat = start_is_flat(start)  # (b,)
    pairs = [
        torch.where(flat[:, None, None], own[..., (0, -1)], other[..., (0, -1)])
        for own, other in zip(tokens, start, strict=True)
    ]  # (b, n_l, 2)
    start_map, rest = assemble(pairs).unbind(dim=1)  # (b, h, w) each
    marked = ~(flat & start_is_flat(tokens))[:, None, None]
    return labels, (rest > start_map) & marked, flat


def guidance_norm(eps_uncond: Tensor, eps_text: Tensor) -> Tensor:
    """How strongly the text acts on each pixel: ``a(x) = ||eps_text(x) - eps_uncond(x)||_2``.

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).

    Returns:
        (b, H, W) in the accumulation type, >= 0.

    Source: equation 7 of the paper.
    """
    return (_wide(eps_text) - _wide(eps_uncond)).norm(dim=1)


def region_sums(
    eps_uncond: Tensor,
    eps_text: Tensor,
    labels: Tensor,
    foreground: Tensor,
    tokens: int,
    factor: int,
) -> Tensor:
    """Sum of the guidance norm and number of pixels of every region.

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).
        labels: (b, h, w) int64, pixel (i, j) belongs to patch (i // factor, j // factor).
        foreground: (b, h, w) bool.
        tokens: t.
        factor: Latent pixels per patch.

    Returns:
        (b, p, t+1, 2) in the accumulation type: [sum, count] of the t token regions, then of the
        foreground, in p partial sums of which only the total over p is defined (here p = 1).
    """
    a = guidance_norm(eps_uncond, eps_text)  # (b, H, W)
    a = rearrange([a, torch.ones_like(a)], "k b h w -> b (h w) k")
    size = eps_text.shape[-2:]
    owner = rearrange(spread(labels, *size, factor), "b h w -> b (h w)")
    sums = a.new_zeros(a.shape[0], tokens, 2)
    sums = sums.scatter_add(1, owner[..., None].expand(-1, -1, 2), a)  # (b, t, 2)
    inside = rearrange(spread(foreground, *size, factor), "b h w -> b (h w)")
    benchmark = torch.where(inside[..., None], a, 0).sum(dim=1, keepdim=True)  # (b, 1, 2)
    return torch.cat([sums, benchmark], dim=1)[:, None]


def region_rates(
    sums: Tensor,
    guidance_scale: float | Tensor,
    benchmark: str = "foreground",
    rate_min: float = 0.8,
    rate_max: float = 3.0,
    max_scale: float | None = 15.0,
) -> Tensor:
    """Rate of each token's region.

    ``rate_i = clamp(mean_benchmark(a) / mean_i(a), rate_min, rate_max)``, then at most
    ``max_scale / guidance_scale``. 1 for a region on which the guidance is zero everywhere, and for
    every region of an image whose benchmark region is empty (that image gets plain CFG).

    Args:
        sums: (b, p, t+1, 2) from `region_sums`.
        guidance_scale: Float or (b,), > 0.
        benchmark: ``"foreground"`` or ``"image"`` (all pixels).
        rate_min: Least rate.
        rate_max: Largest rate.
        max_scale: Largest guidance_scale * rate, or None.

    Returns:
        (b, t) in the accumulation type, dimensionless; a token without pixels has an unused value.

    Source: equation 8 of the paper; clamp and cap from the code. On an empty foreground the code
    lets every rate fall to its minimum; here that image is left to plain CFG.
    """
    sums = sums.sum(dim=1)  # (b, t+1, 2)
    regions = sums[:, :-1]  # (b, t, 2)
    reference = sums[:, -1:] if benchmark == "foreground" else regions.sum(dim=1, keepdim=True)
    mean = regions[..., 0] / regions[..., 1].clamp_min(1)  # (b, t)
    standard = reference[..., 0] / reference[..., 1].clamp_min(1)  # (b, 1)
    some = torch.where(mean == 0, 1.0, mean)  # dividing by zero would make gradients NaN
    rate = torch.where(mean == 0, 1.0, standard / some).clamp(rate_min, rate_max)
    if max_scale is not None:
        rate = torch.minimum(rate, max_scale / _each(guidance_scale, rate))
    return torch.where(reference[..., 1] == 0, 1.0, rate)


def guide(
    eps_uncond: Tensor,
    eps_text: Tensor,
    labels: Tensor,
    sums: Tensor,
    guidance_scale: float | Tensor,
    factor: int,
    benchmark: str = "foreground",
    rate_min: float = 0.8,
    rate_max: float = 3.0,
    max_scale: float | None = 15.0,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rates of the regions, spread over their pixels and blurred, and the guided prediction.

    ``eps = eps_uncond + guidance_scale * rate * (eps_text - eps_uncond)``

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).
        labels: (b, h, w) int64.
        sums: (b, p, t+1, 2) from `region_sums`.
        guidance_scale: Float or (b,), > 0.
        factor: Latent pixels per patch.
        benchmark: See `region_rates`.
        rate_min: See `region_rates`.
        rate_max: See `region_rates`.
        max_scale: See `region_rates`.
        token_weights: (b, t) multiplies the rate of each token's region, after clamp and cap; or
            None.

    Returns:
        eps (b, c, H, W) in the type of eps_text, rate (b, 1, H, W) in the accumulation type.

    Source: equations 6 and 8 of the paper; the blur of the rate map from the code.
    """
    rates = region_rates(sums, guidance_scale, benchmark, rate_min, rate_max, max_scale)  # (b, t)
    if token_weights is not None:
        rates = rates * token_weights.to(rates)
    patches = rates.gather(1, labels.flatten(1)).view(labels.shape)  # (b, h, w)
    rate = blur(spread(patches, *eps_text.shape[-2:], factor))[:, None]  # (b, 1, H, W)
    scale = _each(guidance_scale, rate) * rate
    eps = _wide(eps_uncond) + scale * (_wide(eps_text) - _wide(eps_uncond))
    return eps.to(eps_text.dtype), rate


def guide_evidence(
    eps_uncond: Tensor,
    eps_text: Tensor,
    tokens: list[Tensor],
    start: list[Tensor],
    h: int,
    w: int,
    factors: list[int],
    guidance_scale: float | Tensor,
    factor: int,
    benchmark: str = "foreground",
    rate_min: float = 0.8,
    rate_max: float = 3.0,
    max_scale: float | None = 15.0,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the evidence of all levels to the guided prediction: `segment`, `region_sums`, `guide`.

    Args:
        eps_uncond: (b, c, H, W).
        eps_text: (b, c, H, W).
        tokens: See `segment`.
        start: See `segment`.
        h: See `segment`.
        w: See `segment`.
        factors: See `segment`.
        guidance_scale: Float or (b,), > 0.
        factor: Latent pixels per patch.
        benchmark: See `region_rates`.
        rate_min: See `region_rates`.
        rate_max: See `region_rates`.
        max_scale: See `region_rates`.
        token_weights: See `guide`.

    Returns:
        eps (b, c, H, W), rate (b, 1, H, W), labels (b, h, w), foreground (b, h, w),
        `start_is_flat` (b,).
    """
    labels, foreground, flat = segment(tokens, start, h, w, factors)
    count = tokens[0].shape[2] - 1
    sums = region_sums(eps_uncond, eps_text, labels, foreground, count, factor)
    limits = (benchmark, rate_min, rate_max, max_scale)
    eps, rate = guide(
        eps_uncond, eps_text, labels, sums, guidance_scale, factor, *limits, token_weights
    )
    return eps, rate, labels, foreground, flat
