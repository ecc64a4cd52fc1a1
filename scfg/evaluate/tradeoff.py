"""Quality against alignment: curves, and every method against CFG at the same mean scale."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from scfg.evaluate.draw import Point
from scfg.evaluate.metrics import Estimate, combine, frechet_distance, kernel_distance, mean

AGREEMENTS = ("alignment", "colour", "shape", "texture", "clean", "all")
COMPARED = ("alignment", "all", "kid")  # with CFG at the same scale
MATCHES = ("scale", "strength")  # what is the same


@dataclass(frozen=True, eq=False)
class Measured:
    """One point of a curve.

    Attributes:
        point: How its images were drawn.
        scale: Mean of guidance_scale * rate over pixels, steps and images.
        strength: The same, pixels weighing as much as the norm of guidance there. A method that
            raises the rate where there is little to guide has a lower strength than scale.
        results: By name: "kid", "frechet" (if there are samples enough) and `AGREEMENTS`.
    """

    point: Point
    scale: float
    strength: float
    results: dict[str, Estimate]


def measure_point(point: Point, found: dict[str, Tensor], reference: Tensor) -> Measured:
    """The numbers of a point.

    Args:
        point: How the images were drawn.
        found: Results of its units.
        reference: (m, d) judge features of real scenes.
    """
    results = {name: mean(found[name]) for name in AGREEMENTS}
    results["kid"] = kernel_distance(found["features"], reference)
    if len(found["features"]) > reference.shape[1] < len(reference):
        results["frechet"] = frechet_distance(found["features"], reference)
    scale, strength = (found[name].double().mean().item() for name in MATCHES)
    return Measured(point, scale, strength, results)


def interpolate(curve: Sequence[Measured], scale: float, name: str) -> Estimate | None:
    """What CFG gives at a scale: linear in the logarithm of the scale between measured points.

    Args:
        curve: Measured points of CFG, in any order.
        scale: Where.
        name: Of the result.

    Returns:
        The estimate; None outside the scales that were measured.
    """
    curve = sorted(curve, key=lambda measured: measured.scale)
    for low, high in zip(curve, curve[1:], strict=False):
        if low.scale * (1 - 1e-6) <= scale <= high.scale * (1 + 1e-6):
            share = math.log(scale / low.scale) / math.log(high.scale / low.scale)
            weights = (1 - share, share)
            return combine(weights, (low.results[name], high.results[name]))
    return None


def matched(
    measured: Measured, curve: Sequence[Measured], name: str, match: str = "scale"
) -> tuple[Estimate, Estimate] | None:
    """CFG at a point's mean scale, or at its strength, and the point less that.

    Prompts and noise being the same, the error of the difference is that of paired samples.

    Args:
        measured: A point of any method.
        curve: CFG with the same sampler.
        name: Of the result.
        match: One of `MATCHES`, which are the same thing for CFG.

    Returns:
        Estimates of CFG and of the difference; None outside the curve.
    """
    plain = interpolate(curve, getattr(measured, match), name)
    if plain is None:
        return None
    return plain, combine((1, -1), (measured.results[name], plain))


def interpolation_errors(curve: Sequence[Measured], name: str) -> list[float]:
    """How far each inner point of a curve is from what its neighbours say.

    About four times what interpolation adds to differences, where the curve is smooth: the gap is
    twice as wide.
    """
    curve = sorted(curve, key=lambda measured: measured.scale)
    errors = []
    for i in range(1, len(curve) - 1):
        between = interpolate([curve[i - 1], curve[i + 1]], curve[i].scale, name)
        errors.append(abs(between.value - curve[i].results[name].value))
    return errors


def curves(points: Sequence[Measured]) -> dict[tuple[str, int], list[Measured]]:
    """CFG's points by (sampler, steps)."""
    found: dict[tuple[str, int], list[Measured]] = {}
    for measured in points:
        if measured.point.method == "cfg":
            key = (measured.point.sampler, measured.point.steps)
            found.setdefault(key, []).append(measured)
    return found


def point_rows(points: Sequence[Measured], samples: int) -> list[dict]:
    """A table of the points; intervals are half widths at 95 %."""
    rows = []
    for measured in points:
        point = measured.point
        row = {
            "method": point.method,
            "sampler": point.sampler,
            "steps": point.steps,
            "guidance_scale": point.guidance_scale,
            "mean_scale": measured.scale,
            "strength": measured.strength,
            "samples": samples,
        }
        for name in (*AGREEMENTS, "kid", "frechet"):
            result = measured.results.get(name)
            row[name] = result and result.value
            row[f"{name}_interval"] = result and result.interval
        rows.append(row)
    return rows


def matched_rows(points: Sequence[Measured]) -> list[dict]:
    """A table of the differences to CFG at a matched scale; empty cells outside its curve.

    Beside each difference stand the half width of its interval at 95 % and what interpolating CFG's
    curve may add, a quarter of the largest of `interpolation_errors`.
    """
    plain = curves(points)
    others = [measured for measured in points if measured.point.method != "cfg"]
    rows = []
    for match, measured in itertools.product(MATCHES, others):
        point = measured.point
        row = {
            "matched": match,
            "method": point.method,
            "sampler": point.sampler,
            "steps": point.steps,
            "guidance_scale": point.guidance_scale,
            "cfg_scale": getattr(measured, match),
        }
        for name in COMPARED:
            curve = plain.get((point.sampler, point.steps), [])
            both = matched(measured, curve, name, match)
            row[name] = measured.results[name].value
            row[f"cfg_{name}"] = both and both[0].value
            row[f"{name}_difference"] = both and both[1].value
            row[f"{name}_difference_interval"] = both and both[1].interval
            row[f"{name}_interpolation"] = max(interpolation_errors(curve, name), default=0.0) / 4
        rows.append(row)
    return rows
