"""Intervals and distances against closed forms, brute force and repeated sampling."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import assert_close

from scfg.evaluate.metrics import interval, kernel_values, overlap

torch.set_num_threads(1)


def normal(n, d, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def test_paired_differences_know_a_shift_and_a_tie():
    base = normal(200, 4, 0)
    base[normal(200, 4, 1) < -0.3] = torch.nan
    tie, shift = interval(base - base), interval(base + 0.1 - base)
    assert (tie.mean, tie.low, tie.high) == (0, 0, 0)
    assert (shift.mean, shift.low, shift.high) == pytest.approx((0.1, 0.1, 0.1))
    noisy = interval(base + 0.02 + 0.3 * normal(200, 4, 2) - base)
    spread = 0.3 / base.isfinite().sum().item() ** 0.5
    assert noisy.low < 0.02 < noisy.high and 3 * spread < noisy.high - noisy.low < 5 * spread
    alone = interval(base)
    assert alone.high - alone.low > 2 * (noisy.high - noisy.low)  # what pairs share cancels


def test_intervals_cover_the_truth_as_often_as_they_say():
    # Objects of one caption stand or fall together: a caption, not an object, is drawn anew.
    covered = 0
    for seed in range(100):
        captions = (normal(80, 1, seed) > 0.5).double().expand(80, 3)
        seen = interval(captions)
        covered += seen.low <= 0.3085 <= seen.high
    assert 88 <= covered <= 99


def test_what_was_not_measured_is_left_out():
    seen = interval(torch.tensor([[1.0, math.nan], [3.0, 5.0]]))
    assert seen.mean == 3 and seen.low == 1 and seen.high == 4
    assert math.isnan(interval(torch.full((3,), math.nan)).low)


def test_kernel_distance_is_the_double_sum():
    x, y = normal(7, 3, 0), normal(5, 3, 1, 0.5)

    def distance(x, y):
        def k(a, b):
            return (a @ b / 3 + 1) ** 3

        n, m = len(x), len(y)
        within = sum(k(a, b) for a, b in itertools.permutations(x, 2)) / (n * (n - 1))
        within = within + sum(k(a, b) for a, b in itertools.permutations(y, 2)) / (m * (m - 1))
        return within - 2 * sum(k(a, b) for a in x for b in y) / (n * m)

    values = kernel_values(x, y)
    assert_close(actual=values.mean(), expected=distance(x, y), share=1e-12)
    for i in range(len(x)):  # the jackknife
        rest = torch.cat([x[:i], x[i + 1 :]])
        expected = len(x) * distance(x, y) - (len(x) - 1) * distance(rest, y)
        assert_close(actual=values[i], expected=expected, share=1e-9)


def test_kernel_distance_is_unbiased_even_for_few_samples():
    # Equal distributions: mean 0 over many tiny sets; a biased estimate would be tr k / n off.
    runs = torch.stack(
        [kernel_values(normal(4, 3, 2 * s), normal(5, 3, 2 * s + 1)).mean() for s in range(1000)]
    )
    bound = 4 * runs.std() / len(runs) ** 0.5
    assert abs(runs.mean()) < bound < ((1.0 + 1) ** 3 - 1) / 4


def test_the_interval_of_a_kernel_distance_is_its_spread_over_repetitions():
    y = normal(500, 4, 1)
    runs = [interval(kernel_values(normal(300, 4, 2 * s, 0.6), y)) for s in range(1, 100)]
    spread = np.std([run.mean for run in runs])
    assert (runs[0].high - runs[0].low) / 3.92 == pytest.approx(spread, rel=0.3)


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
        kernel_values(normal(5, 3, 0), normal(5, 4, 0))
    with pytest.raises(ValueError, match="x must be at least 3"):
        kernel_values(normal(2, 3, 0), normal(5, 3, 0))
