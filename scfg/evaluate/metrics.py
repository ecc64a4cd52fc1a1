"""Estimates with their sampling error: means, kernel and Frechet distances, overlap of regions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number measured on samples, and how much each of them moves it.

    To first order the error is the mean of the influences, so that a linear combination of
    estimates, such as a difference between two methods on the same prompts and noise, is estimated
    by the same combination of influences, whatever the samples have in common.

    Attributes:
        value: The number.
        influences: One (n,) float64 tensor of mean 0 per independent set of samples.
    """

    value: float
    influences: tuple[Tensor, ...]

    @property
    def error(self) -> float:
        """Standard error, ``sqrt(sum_sets var(influence) / n)``."""
        return sum((x.var() / len(x)).item() for x in self.influences) ** 0.5

    @property
    def interval(self) -> float:
        """Half the width of the 95 % confidence interval."""
        return 1.96 * self.error


def combine(weights: Sequence[float], estimates: Sequence[Estimate]) -> Estimate:
    """``sum_i weights_i estimates_i``, of estimates on the same sets of samples.

    Raises:
        ValueError: The estimates are not on the same number of samples.
    """
    sizes = {tuple(len(x) for x in estimate.influences) for estimate in estimates}
    if len(sizes) != 1:
        raise ValueError(f"estimates must share their sets of samples, got sizes {sorted(sizes)}")
    pairs = list(zip(weights, estimates, strict=True))
    columns = zip(*(estimate.influences for estimate in estimates), strict=True)
    influences = tuple(sum(w * x for w, x in zip(weights, c, strict=True)) for c in columns)
    return Estimate(sum(w * estimate.value for w, estimate in pairs), influences)


def mean(x: Tensor) -> Estimate:
    """Mean of (n,) samples; those that are not a number are left out."""
    x = x[~x.isnan()].double()
    return Estimate(x.mean().item(), (x - x.mean(),))


def kernel_distance(x: Tensor, y: Tensor) -> Estimate:
    """KID: the squared maximum mean discrepancy under the kernel ``(a . b / d + 1)^3``, unbiased.

    ``sum_{i != j} k(x_i, x_j) / (n (n-1)) + the same of y - 2 sum_ij k(x_i, y_j) / (n m)``; it is
    negative as often as positive where both sets have one distribution. Influences are those of the
    jackknife, ``2 sum_{j != i} k(x_i, x_j) / (n-2) - 2 sum_j k(x_i, y_j) / m`` less their mean,
    and likewise for y; where the distributions are equal they are too large rather than too small.

    Args:
        x: (n, d) features, n >= 3.
        y: (m, d) features of the reference, m >= 3.

    Returns:
        The distance, computed in float64, with the influences of x and of y.

    Raises:
        ValueError: Not two such sets.

    Source: Binkowski et al., arXiv 1801.01401, section 4; Gretton et al., JMLR 13, 2012, lemma 6.
    """
    _check(x, y, 3)
    x, y = x.double(), y.double()
    n, m = len(x), len(y)
    own_x, own_y = _kernel_sums(x, x), _kernel_sums(y, y)
    own_x = own_x - _kernel_diagonal(x)  # (n,), sum over j != i
    own_y = own_y - _kernel_diagonal(y)
    cross_x, cross_y = _kernel_sums(x, y), _kernel_sums(y, x)
    within = own_x.sum() / (n * (n - 1)) + own_y.sum() / (m * (m - 1))
    value = (within - 2 * cross_x.sum() / (n * m)).item()
    influence_x = 2 * own_x / (n - 2) - 2 * cross_x / m
    influence_y = 2 * own_y / (m - 2) - 2 * cross_y / n
    return Estimate(value, (influence_x - influence_x.mean(), influence_y - influence_y.mean()))


def _kernel_diagonal(x: Tensor) -> Tensor:
    return (x.square().sum(dim=1) / x.shape[1] + 1) ** 3


def _kernel_sums(x: Tensor, y: Tensor) -> Tensor:
    """``sum_j k(x_i, y_j)``, (n,), a thousand rows at a time."""
    return torch.cat([((part @ y.T / x.shape[1] + 1) ** 3).sum(dim=1) for part in x.split(1024)])


def frechet_distance(x: Tensor, y: Tensor) -> Estimate:
    """Squared Frechet distance between normal distributions with the moments of two sets.

    ``|mu_x - mu_y|^2 + tr(C_x) + tr(C_y) - 2 tr((C_x^1/2 C_y C_x^1/2)^1/2)``, covariances over
    n - 1. Biased upwards, by about ``tr(C) / n`` and more the more dimensions there are: compare
    only at one n. Influences are derivatives by the weights of the samples (the infinitesimal
    jackknife).

    Args:
        x: (n, d) features, n >= 2.
        y: (m, d) features of the reference, m > d, of full rank.

    Returns:
        The distance, computed in float64, with the influences of x and of y.

    Raises:
        ValueError: Not two such sets.

    Source: Dowson and Landau, 1982; Heusel et al., arXiv 1706.08500.
    """
    _check(x, y, 2)
    if len(y) <= y.shape[1]:
        raise ValueError(f"y must have more than {y.shape[1]} samples, got {len(y)}")
    weights = [torch.full((len(z),), 1 / len(z), dtype=torch.float64) for z in (x, y)]
    with torch.enable_grad():
        weights = [w.to(x.device).requires_grad_() for w in weights]
        (mu_x, cov_x), (mu_y, cov_y) = map(_moments, (x, y), weights)
        root = torch.linalg.cholesky(cov_y)  # R R^T = C_y: R^T C_x R has the wanted eigenvalues
        scale = 1e-14 * cov_x.detach().trace() * cov_y.detach().trace()
        roots = torch.linalg.eigvalsh(root.T @ cov_x @ root).clamp_min(scale).sqrt()
        value = (mu_x - mu_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * roots.sum()
        slopes = torch.autograd.grad(value, weights)
    return Estimate(value.item(), tuple(slope - slope.mean() for slope in slopes))


def _moments(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    x = x.double()
    mu = weights @ x
    centred = x - mu
    return mu, (centred.T * weights) @ centred * (len(x) / (len(x) - 1))


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of masks (..., h, w) bool: (...), not a number where both are empty.

    Raises:
        ValueError: The masks have different shapes.
    """
    if a.shape != b.shape:
        raise ValueError(f"masks must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    both, either = (a & b).sum(dim=(-2, -1)), (a | b).sum(dim=(-2, -1))
    return both / either


def _check(x: Tensor, y: Tensor, least: int) -> None:
    for name, z in (("x", x), ("y", y)):
        if z.ndim != 2 or len(z) < least or z.shape[1] != x.shape[1]:
            raise ValueError(
                f"{name} must be at least {least} samples of {x.shape[-1]} features, "
                f"got {tuple(z.shape)}"
            )
