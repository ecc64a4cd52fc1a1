"""Means and paired differences with bootstrap intervals, kernel distance, overlap of regions.

Everything is measured caption by caption: (n,), or (n, k) with NaN where nothing was asked. Even a
distance between sets is: `kernel_values` gives each picture its share of it.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RESAMPLINGS = 2000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, 2.5 to 97.5 % of a bootstrap over captions."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out 0, else 0."""
        return (self.low > 0) - (self.high < 0)


def interval(x: Tensor, seed: int = 0) -> Interval:
    """Mean of everything that was measured, captions being drawn anew with all they hold.

    A difference of two ways to draw the same captions from the same noise is the interval of
    ``one - other``: what the pair has in common cancels.

    Args:
        x: (n,) or (n, k), NaN where nothing was measured.
        seed: Of the resamplings.

    Returns:
        NaN three times where nothing was measured at all.
    """
    values = x.double().reshape(len(x), -1).numpy()
    total, count = np.nansum(values, axis=1), np.isfinite(values).sum(axis=1)
    if not count.any():
        return Interval(*[float("nan")] * 3)
    times = _resamplings(len(x), seed)  # (resamplings, n)
    means = times @ total / np.maximum(times @ count, 1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(total.sum() / count.sum()), float(low), float(high))


@functools.lru_cache(maxsize=4)
def _resamplings(n: int, seed: int) -> np.ndarray:
    """How often each of n captions is drawn, (resamplings, n)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n, np.full(n, 1 / n), size=RESAMPLINGS).astype(np.float64)


def kernel_values(x: Tensor, y: Tensor) -> Tensor:
    """KID, the kernel distance between two sets, as one value for each sample of the first.

    KID is the squared maximum mean discrepancy under ``k(a, b) = (a . b / d + 1)^3``, unbiased:
    ``sum_{i != j} k(x_i, x_j) / (n (n-1)) + the same of y - 2 sum_ij k(x_i, y_j) / (n m)``. The
    values are the jackknife's, ``n KID - (n - 1) KID without x_i``: their mean is KID, and their
    spread its error as far as it comes from x. The error of y, which all ways to draw share, is
    not in them.

    Args:
        x: (n, d) features, n >= 3.
        y: (m, d) features of the reference, m >= 3.

    Returns:
        (n,) float64.

    Raises:
        ValueError: Not two such sets.

    Source: Binkowski et al., arXiv 1801.01401, section 4; Gretton et al., JMLR 13, 2012, lemma 6.
    """
    for name, z in (("x", x), ("y", y)):
        if z.ndim != 2 or len(z) < 3 or z.shape[1] != x.shape[1]:
            raise ValueError(
                f"{name} must be at least 3 samples of {x.shape[-1]} features, got {tuple(z.shape)}"
            )
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    own = _sums(x, x) - _diagonal(x)  # (n,), sum over j != i
    cross = _sums(x, y) / m
    within_y = (_sums(y, y) - _diagonal(y)).sum() / (m * (m - 1))
    whole = own.sum() / (n * (n - 1)) - 2 * cross.mean() + within_y
    rest = (own.sum() - 2 * own) / ((n - 1) * (n - 2)) - 2 * (cross.sum() - cross) / (n - 1)
    return n * whole - (n - 1) * (rest + within_y)


def _diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(dim=1) / x.shape[1] + 1) ** 3


def _sums(x: Tensor, y: Tensor) -> Tensor:
    """``sum_j k(x_i, y_j)``, (n,), a thousand rows at a time."""
    return torch.cat([((part @ y.T / x.shape[1] + 1) ** 3).sum(dim=1) for part in x.split(1024)])


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks (..., h, w) bool: (...), not a number where both are empty.

    Raises:
        ValueError: The masks have different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"masks must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    both, either = (a & b).sum(dim=(-2, -1)), (a | b).sum(dim=(-2, -1))
    return both / either
