"""Comparison at the same strength: a method with itself is 0, a shift of scale is no gain."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from scfg.evaluate.compare import Measured, bend, difference_rows, interpolate, strata, verdict
from scfg.evaluate.draw import METHODS, Point
from scfg.evaluate.plan import HEADLINE, full_points, make_plan, reduced_points
from scfg.evaluate.report import answers
from scfg.models.emoji import sample_scenes

N = 60
SCENES = sample_scenes(N, np.random.default_rng(3))
NORM = torch.rand(N, 5, generator=torch.Generator().manual_seed(0))
MASKS = strata(SCENES, NORM)
SCALES = (1.0, 2.0, 4.0, 8.0)


def measured(method, scale, quality, mean_scale=None, strength=None, begin=None):
    """Objects found to a degree of `quality`, but for noise of each caption that all share."""
    shared = torch.randn(N, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.where(MASKS["objects"], quality + 0.1 * shared, torch.nan)
    values = {"found": found, "bound": found}
    values |= {name: found[:, 0] for name in ("count", "clean", "ground", "all", "kid")}
    return Measured(
        Point(method, scale, begin), scale, mean_scale or scale, strength or scale, values
    )


def curve(quality=lambda scale: 0.2 * math.log(scale), begin=None):
    return [measured("cfg", scale, quality(scale), begin=begin) for scale in SCALES]


def rows(points, measure="objects"):
    found = difference_rows(points, MASKS)
    return {row["against"]: row for row in found if row["measure"] == measure}


def test_every_object_counts_once_in_size_in_weakness_and_in_number():
    pairs = (("small", "large"), ("weak", "strong"), ("1 or 2 objects", "3 or 4 objects"))
    for one, other in pairs:
        assert (MASKS[one] ^ MASKS[other])[MASKS["objects"]].all()
        assert MASKS[one].any() and MASKS[other].any()
        assert not (MASKS[one] | MASKS[other])[~MASKS["objects"]].any()
    assert MASKS["small and weak"].equal(MASKS["small"] & MASKS["weak"])
    assert NORM[:, :4][MASKS["weak"]].max() < NORM[:, :4][MASKS["strong"]].min()
    sizes = [region.size for one in SCENES for region in one.objects]
    assert MASKS["small"].sum() == sum(size < 20 for size in sizes)


def test_cfg_compared_with_itself_is_zero():
    points = curve()
    for point in points:
        plain = interpolate(points, point.scale)["found"]
        torch.testing.assert_close(plain, point.values["found"], equal_nan=True)
    # Named S-CFG, drawn as CFG at 3: between two points of the curve.
    seen = rows([*points, measured("scfg", 3.0, 0.2 * math.log(3))])
    assert seen.keys() == {"scale", "mean_scale", "strength"}
    for row in seen.values():
        ends = (row["difference"], row["difference_low"], row["difference_high"])
        assert ends == pytest.approx((0, 0, 0), abs=1e-9)


def test_readings_of_the_same_compare_with_other_points_of_the_curve():
    point = measured("scfg", 2.0, 0.2 * math.log(4), mean_scale=8.0, strength=4.0)
    seen = rows([*curve(), point])
    assert [seen[name]["at"] for name in ("scale", "mean_scale", "strength")] == [2, 8, 4]
    gains = [seen[name]["difference"] for name in ("scale", "mean_scale", "strength")]
    assert gains == pytest.approx([0.2 * math.log(2), -0.2 * math.log(2), 0], abs=1e-9)
    assert [verdict(seen[name]) for name in ("scale", "mean_scale", "strength")] == [1, -1, 0]


def test_a_better_method_is_found_better_with_the_error_of_pairs():
    row = rows([*curve(), measured("samg", 3.0, 0.2 * math.log(3) + 0.05)])["strength"]
    assert row["difference"] == pytest.approx(0.05) == row["difference_low"]
    assert row["value"] - row["other"] == pytest.approx(0.05)
    assert row["count"] == MASKS["objects"].sum()


def test_a_gain_on_small_objects_alone_is_found_there_alone():
    point = measured("scfg", 4.0, 0.2 * math.log(4))
    point.values["found"][MASKS["small"]] += 0.3
    points = [*curve(), point]
    small, large, both = (rows(points, name)["strength"] for name in ("small", "large", "objects"))
    assert small["difference"] == pytest.approx(0.3) and verdict(small) == 1
    assert large["difference"] == pytest.approx(0, abs=1e-9) and verdict(large) == 0
    assert both["difference"] == pytest.approx(0.3 * small["count"] / both["count"])


def test_outside_the_curve_nothing_is_claimed_and_beginnings_are_kept_apart():
    assert interpolate(curve(), 12.8) is None and interpolate([], 2.0) is None
    assert "strength" not in rows([*curve(), measured("samg", 8.0, 0.5, strength=12.8)])
    assert not rows([*curve(begin=349), measured("samg", 4.0, 0.5)])
    assert rows([*curve(begin=349), measured("samg", 4.0, 0.5, begin=349)])


def test_scfg_is_compared_with_its_controls_at_the_same_scale():
    points = [measured("scfg", 4.0, 0.7), measured("mean", 4.0, 0.6), measured("mean", 2.0, 0.1)]
    seen = rows([*points, measured("shuffled", 4.0, 0.5)])
    assert seen["mean"]["difference"] == pytest.approx(0.1)
    assert seen["shuffled"]["difference"] == pytest.approx(0.2)


def test_interpolation_may_add_what_the_curvature_says_and_no_verdict_rests_on_it():
    assert bend(curve(), MASKS)["objects"] == pytest.approx(0, abs=1e-9)
    bent = curve(lambda scale: math.log2(scale) ** 2)
    assert bend(bent, MASKS)["objects"] == pytest.approx(0.25)  # (0 + 4) / 2 - 1, of it a quarter
    row = rows([*bent, measured("scfg", math.sqrt(8), 2.25)])["strength"]
    assert row["difference"] == pytest.approx(-0.25) and row["interpolation"] == pytest.approx(0.25)
    assert verdict(row | {"difference_high": -0.24}) == 0
    assert verdict(row | {"difference_high": -0.26}) == -1


def test_answers_say_what_the_table_says():
    points = [*curve(), measured("scfg", HEADLINE, 0.2 * math.log(HEADLINE) + 0.05)]
    lines = answers(difference_rows(points, MASKS))
    said = "objects found, less CFG of the same strength (4.00): +5.0 (+5.0 to +5.0): more"
    assert said in lines


def test_settings_measure_what_they_promise():
    full, reduced = full_points(), reduced_points()
    for points in (full, reduced):
        assert len({p.name for p in points}) == len(points)
        assert {p.method for p in points} == set(METHODS)
        assert {p.method for p in points if p.guidance_scale == HEADLINE} == set(METHODS)
    assert {1.0, 15.0} <= {p.guidance_scale for p in full}
    assert set(reduced) - set(full) == {
        replace(Point("cfg", scale), begin=begin)
        for scale, begin in ((6.0, None), (9.0, None), (14.0, None), (6.0, 349), (9.0, 349))
    }
    with pytest.raises(ValueError, match="samples must be at least 4, got 3"):
        make_plan(True, 3, "model")


def test_at_a_point_of_the_curve_nothing_is_interpolated():
    bent = curve(lambda scale: math.log2(scale) ** 2)
    seen = rows([*bent, measured("scfg", 4.0, 5.0, strength=5.0)])
    assert seen["scale"]["interpolation"] == 0 < seen["strength"]["interpolation"]
