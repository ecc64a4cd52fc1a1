"""Distances and their errors against closed forms, brute force and repeated sampling."""

import itertools
import math

import pytest
import torch

from scfg.evaluate.metrics import combine, frechet_distance, kernel_distance, mean, overlap

torch.set_num_threads(1)


def normal(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def with_moments(x, mu, root):
    """Samples moved so that their mean and covariance are exactly mu and root @ root.T."""
    x = x - x.mean(dim=0)
    own = torch.linalg.cholesky(x.T @ x / (len(x) - 1))
    return torch.linalg.solve_triangular(own, x.T, upper=False).T @ root.T + mu


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    # Commuting covariances: |mu - nu|^2 + sum_i (sqrt(a_i) - sqrt(b_i))^2 in any rotation.
    turn = torch.linalg.qr(normal(5, 5, 0)).Q
    a, b = torch.tensor([0.1, 1, 2, 3, 9.0]), torch.tensor([0.4, 1, 0.5, 5, 4.0])
    a, b = a.double(), b.double()
    mu, nu = normal(1, 5, 1)[0], normal(1, 5, 2)[0]
    x = with_moments(normal(40, 5, 3), mu, turn * a.sqrt())
    y = with_moments(normal(31, 5, 4), nu, turn * b.sqrt())
    expected = (mu - nu).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(x, y).value == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute():
    mu = torch.zeros(2, dtype=torch.float64)
    root_a = torch.tensor([[2.0, 0.0], [0.0, 1.0]]).double()
    root_b = torch.tensor([[1.0, 0.0], [0.9, 0.5]]).double()
    x = with_moments(normal(50, 2, 0), mu, root_a)
    y = with_moments(normal(60, 2, 1), mu, root_b)
    a, b = root_a @ root_a.T, root_b @ root_b.T
    # tr (AB)^1/2 of 2 x 2 matrices: sqrt(tr AB + 2 sqrt(det AB)).
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.linalg.det(product)))
    expected = (a.trace() + b.trace()).item() - 2 * root
    assert frechet_distance(x, y).value == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    x = normal(100, 6, 0)
    assert abs(frechet_distance(x, x).value) < 1e-7  # the clamp of the eigenvalues


def test_frechet_error_is_the_spread_over_repetitions():
    runs = [
        frechet_distance(normal(400, 3, 2 * s, 1.0), normal(800, 3, 2 * s + 1)) for s in range(200)
    ]
    spread = torch.tensor([run.value for run in runs]).std().item()
    assert runs[0].error == pytest.approx(spread, rel=0.2)


def test_kernel_distance_is_the_double_sum():
    x, y = normal(7, 3, 0), normal(5, 3, 1, 0.5)

    def k(a, b):
        return (a @ b / 3 + 1) ** 3

    within = sum(k(a, b) for a, b in itertools.permutations(x, 2)) / (7 * 6)
    within = within + sum(k(a, b) for a, b in itertools.permutations(y, 2)) / (5 * 4)
    cross = sum(k(a, b) for a in x for b in y) / (7 * 5)
    assert kernel_distance(x, y).value == pytest.approx((within - 2 * cross).item(), rel=1e-12)


def test_kernel_influences_are_those_of_leaving_one_out():
    x, y = normal(9, 3, 0), normal(8, 3, 1, 0.5)
    full = kernel_distance(x, y)
    for side, z in enumerate((x, y)):
        rest = []
        for i in range(len(z)):
            fewer = torch.cat([z[:i], z[i + 1 :]])
            rest.append(kernel_distance(*((fewer, y) if side == 0 else (x, fewer))).value)
        pseudo = len(z) * full.value - (len(z) - 1) * torch.tensor(rest, dtype=torch.float64)
        torch.testing.assert_close(full.influences[side], pseudo - pseudo.mean())


def test_kernel_distance_is_unbiased_even_for_few_samples():
    # Equal distributions: mean 0 over many tiny sets; a biased estimate would be tr k / n off.
    runs = torch.tensor(
        [kernel_distance(normal(4, 3, 2 * s), normal(5, 3, 2 * s + 1)).value for s in range(4000)]
    )
    assert abs(runs.mean()) < 4 * runs.std() / len(runs) ** 0.5
    biased = ((torch.tensor(1.0) + 1) ** 3 - 1) / 4
    assert 4 * runs.std() / len(runs) ** 0.5 < biased  # the test could tell


def test_kernel_distance_of_equal_distributions_covers_zero_as_often_as_it_should():
    runs = [kernel_distance(normal(100, 8, 2 * s), normal(150, 8, 2 * s + 1)) for s in range(200)]
    assert sum(abs(run.value) > run.interval for run in runs) <= 20  # at most about 5 %


def test_kernel_error_of_different_distributions_is_the_spread_over_repetitions():
    runs = [
        kernel_distance(normal(300, 4, 2 * s, 0.6), normal(500, 4, 2 * s + 1)) for s in range(200)
    ]
    spread = torch.tensor([run.value for run in runs]).std().item()
    assert runs[0].error == pytest.approx(spread, rel=0.25)


def test_differences_of_estimates_know_what_the_samples_share():
    x = normal(50, 1, 0)[:, 0]
    noise = 0.01 * normal(50, 1, 1)[:, 0]
    a, b = mean(x + noise), mean(x)
    difference = combine([1, -1], [a, b])
    assert difference.value == pytest.approx(noise.mean().item())
    assert difference.error == pytest.approx(mean(noise).error)
    with pytest.raises(ValueError, match="sizes"):
        combine([1, -1], [a, mean(x[1:])])


def test_mean_leaves_out_what_is_not_a_number():
    estimate = mean(torch.tensor([1.0, math.nan, 3.0]))
    assert estimate.value == 2
    assert estimate.error == pytest.approx(1.0)  # sqrt(2) / sqrt(2)


def test_overlap_counts_pixels():
    a = torch.zeros(3, 4, 5, dtype=torch.bool)
    b = a.clone()
    a[0, :2], b[0, 1:3] = True, True  # rows 0 1 against 1 2
    a[1, 0], b[1, 0] = True, True
    assert overlap(a, b)[:2].tolist() == pytest.approx([1 / 3, 1.0])
    assert overlap(a, b)[2].isnan()
    with pytest.raises(ValueError, match="shape"):
        overlap(a, b[:1])


def test_sets_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="y must be"):
        kernel_distance(normal(5, 3, 0), normal(5, 4, 0))
    with pytest.raises(ValueError, match="more than 3"):
        frechet_distance(normal(5, 3, 0), normal(3, 3, 0))
