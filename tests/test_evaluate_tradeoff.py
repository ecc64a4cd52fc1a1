"""Comparison at matched mean scale: a method with itself is 0, a shift of scale is not a gain."""

import math
from dataclasses import replace

import pytest
import torch

from scfg.evaluate.draw import METHODS, Point
from scfg.evaluate.plan import full_points, reduced_points
from scfg.evaluate.report import _sign
from scfg.evaluate.tradeoff import (
    AGREEMENTS,
    interpolate,
    interpolation_errors,
    matched,
    matched_rows,
    measure_point,
    point_rows,
)

SCALES = (1.0, 2.0, 4.0, 8.0)
REFERENCE = torch.randn(300, 5, generator=torch.Generator().manual_seed(99))


def measured(method, guidance_scale, mean_scale, quality, n=60, strength=None):
    """A point whose images have alignment ``quality`` plus noise that all methods share."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(n, generator=generator)
    found = {name: quality + noise for name in AGREEMENTS}
    found["features"] = torch.randn(n, 5, generator=generator) * (1 + quality)
    found["scale"] = torch.full((n,), mean_scale)
    found["strength"] = torch.full((n,), mean_scale if strength is None else strength)
    return measure_point(Point(method, guidance_scale), found, REFERENCE)


def curve(quality=lambda scale: 0.2 * math.log(scale)):
    return [measured("cfg", scale, scale, quality(scale)) for scale in SCALES]


@pytest.mark.parametrize("name", ["alignment", "kid", "frechet"])
def test_a_method_compared_with_itself_is_zero(name):
    points = curve()
    for point in points:
        plain, difference = matched(point, points, name)
        assert plain.value == pytest.approx(point.results[name].value, abs=1e-12)
        assert difference.value == pytest.approx(0, abs=1e-12)
        assert difference.interval == pytest.approx(0, abs=1e-12)


def test_a_method_that_only_raises_the_scale_gains_nothing():
    # Named 2, it really guides with 3, as plain CFG there does.
    points = curve()
    raised = measured("samg", 2.0, 3.0, 0.2 * math.log(3))
    assert raised.results["alignment"].value > points[1].results["alignment"].value
    _, difference = matched(raised, points, "alignment")
    assert abs(difference.value) < 1e-6  # float32 of the mean scale
    _, difference = matched(raised, [*points, measured("cfg", 3.0, 3.0, 0.2 * math.log(3))], "kid")
    assert abs(difference.value) < 1e-6


def test_a_better_method_is_found_better_with_the_error_of_pairs():
    better = measured("scfg", 2.0, 3.0, 0.2 * math.log(3) + 0.05)
    plain, difference = matched(better, curve(), "alignment")
    assert difference.value == pytest.approx(0.05, abs=1e-6)
    assert difference.interval < 1e-6 < plain.interval  # the shared noise cancels


def test_points_are_matched_by_mean_scale_and_by_strength():
    quality = 0.2 * math.log(2)
    point = measured("scfg", 2.0, 4.0, quality, strength=2.0)
    by_scale, by_strength = matched_rows([*curve(), point])
    assert (by_scale["matched"], by_strength["matched"]) == ("scale", "strength")
    assert (by_scale["cfg_scale"], by_strength["cfg_scale"]) == (4.0, 2.0)
    assert by_scale["alignment_difference"] == pytest.approx(-0.2 * math.log(2), abs=1e-6)
    assert by_strength["alignment_difference"] == pytest.approx(0, abs=1e-6)


def test_outside_the_curve_nothing_is_claimed():
    high = measured("samg", 8.0, 12.8, 0.5)
    assert matched(high, curve(), "kid") is None
    row = matched_rows([*curve(), high])[0]
    assert row["kid_difference"] is None and row["kid"] is not None
    assert interpolate([], 2.0, "kid") is None


def test_points_are_compared_with_their_own_sampler():
    other = measured("scfg", 2.0, 2.0, 0.3)
    other = replace(other, point=replace(other.point, sampler="ddim"))
    assert matched_rows([*curve(), other])[0]["alignment_difference"] is None


def test_interpolation_errors_are_those_of_the_curvature():
    assert interpolation_errors(curve(), "alignment") == pytest.approx([0, 0], abs=1e-6)
    bent = interpolation_errors(curve(lambda s: math.log2(s) ** 2), "alignment")
    assert bent == pytest.approx([1, 1], abs=1e-5)  # (0 + 4) / 2 - 1, (1 + 9) / 2 - 4


def test_better_is_beyond_interval_and_interpolation_together():
    row = dict(kid_difference=-0.3, kid_difference_interval=0.1, kid_interpolation=0.1)
    assert _sign(row, "kid") == 1 and _sign(row | {"kid_difference": 0.3}, "kid") == -1
    assert _sign(row | {"kid_interpolation": 0.21}, "kid") == 0
    assert _sign(row | {"kid_difference": None}, "kid") == 0
    bent = curve(lambda s: math.log2(s) ** 2)
    row = matched_rows([*bent, measured("scfg", 2.0, math.sqrt(8), 2.25)])[0]
    assert row["alignment_difference"] == pytest.approx(-0.25, abs=1e-5)  # all interpolation's
    assert row["alignment_interpolation"] == pytest.approx(0.25, abs=1e-5)


def test_mean_scale_is_measured_not_named():
    rows = point_rows([measured("scfg", 2.0, 2.7, 0.4)], 60)
    assert rows[0]["guidance_scale"] == 2.0
    assert rows[0]["mean_scale"] == pytest.approx(2.7)
    assert rows[0]["alignment"] == pytest.approx(0.4, abs=0.01)


def test_frechet_distance_needs_more_samples_than_features():
    few = measured("cfg", 1.0, 1.0, 0.0, n=5)
    assert "frechet" not in few.results
    assert point_rows([few], 5)[0]["frechet"] is None


def test_settings_measure_what_they_promise():
    full, reduced = full_points(), reduced_points()
    assert {p.method for p in full} == set(METHODS)
    assert {p.sampler for p in full} == {"ddim", "dpmpp_2m"}
    for points in (full, reduced):
        assert len({p.name for p in points}) == len(points)
        assert {"cfg", "scfg", "scfg_none", "scfg_image", "samg"} <= {p.method for p in points}
        top = max(p.guidance_scale for p in points if p.method == "cfg")
        others = [p.guidance_scale for p in points if p.method not in ("cfg", "samg")]
        assert max(others) <= top and min(others) >= 1
    assert {1.0, 15.0} <= {p.guidance_scale for p in full}
