"""Every way to draw against CFG of the same strength, caption by caption, in tables.

"The same" has three readings: the nominal guidance scale; the mean of scale times rate over pixels
and steps; and that mean weighted by the norm of guidance, here called strength. CFG at a strength
between two of its points is interpolated caption by caption, linear in the logarithm of the scale.
"""

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scfg.evaluate.draw import Point, scene
from scfg.evaluate.metrics import Interval, interval, kernel_values
from scfg.evaluate.regions import GROUND, variants
from scfg.evaluate.work import CAPTIONS, Found, Plan
from scfg.models.emoji import OBJECTS, Scene
from scfg.models.files import write_whole

SMALL = 20.0  # pixels; an object is small below it
READINGS = ("scale", "mean_scale", "strength")
WHOLE = ("count", "clean", "ground", "all", "kid")  # one value a caption


@dataclass(frozen=True, eq=False)
class Measured:
    """One point.

    Attributes:
        point: How it was drawn.
        scale: The nominal guidance scale.
        mean_scale: Mean of scale times rate over pixels, steps and pictures.
        strength: The same, weighted by the norm of guidance.
        values: By name, "found" and "bound" (n, 4), and `WHOLE` (n,), caption by caption.
    """

    point: Point
    scale: float
    mean_scale: float
    strength: float
    values: dict[str, Tensor]


def measure(point: Point, found: dict[str, Tensor], reference: Tensor) -> Measured:
    """A point from the results of its units.

    Args:
        point: How it was drawn.
        found: Results.
        reference: (m, d) judge features of real scenes.
    """
    names = ("found", "bound", "count", "clean", "ground", "all")
    values = {name: found[name].double() for name in names}
    values["kid"] = kernel_values(found["features"], reference)
    means = [found[name].double().mean().item() for name in READINGS[1:]]
    return Measured(point, point.guidance_scale, *means, values)


def strata(scenes: Sequence[Scene], norm: Tensor) -> dict[str, Tensor]:
    """Masks (n, 4) of the objects of every stratum.

    Args:
        scenes: n scenes.
        norm: (n, 5) norm of guidance over each true region, in units of the picture's mean. Weak is
            an object below the median: it is known before anything is drawn.
    """
    sizes = torch.full((len(scenes), OBJECTS), torch.nan)
    for i, one in enumerate(scenes):
        sizes[i, : len(one.objects)] = torch.tensor([region.size for region in one.objects])
    there, norm = sizes.isfinite(), norm[:, :OBJECTS]
    many = there & (there.sum(dim=1, keepdim=True) > 2)
    weak = there & (norm < norm[there].nanmedian())
    small = sizes < SMALL
    return {
        "objects": there,
        "small": small,
        "large": there & ~small,
        "weak": weak,
        "strong": there & ~weak,
        "small and weak": small & weak,
        "1 or 2 objects": there & ~many,
        "3 or 4 objects": many,
    }


def measures(values: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything that is compared: objects found, by stratum, then what else captions say."""
    parts = {
        name: torch.where(mask, values["found"], torch.nan)
        for name, mask in masks.items()
        if mask.any()
    }
    return parts | {"bound": values["bound"]} | {name: values[name] for name in WHOLE}


def interpolate(curve: Sequence[Measured], scale: float) -> dict[str, Tensor] | None:
    """What CFG gives at a scale, caption by caption; None outside the scales measured."""
    curve = sorted(curve, key=lambda measured: measured.scale)
    for low, high in zip(curve, curve[1:], strict=False):
        if low.scale * (1 - 1e-6) <= scale <= high.scale * (1 + 1e-6):
            share = math.log(scale / low.scale) / math.log(high.scale / low.scale)
            return {name: torch.lerp(x, high.values[name], share) for name, x in low.values.items()}
    return None


def bend(curve: Sequence[Measured], masks: dict[str, Tensor]) -> dict[str, float]:
    """What interpolation may add to a difference, by measure.

    A quarter of the largest distance of an inner point of CFG's curve from what its neighbours say:
    that gap is twice as wide.
    """
    curve, worst = sorted(curve, key=lambda measured: measured.scale), {}
    for low, here, high in zip(curve, curve[1:], curve[2:], strict=False):
        between = measures(interpolate([low, high], here.scale), masks)
        for name, x in measures(here.values, masks).items():
            off = (x - between[name]).nanmean().abs().item() / 4
            worst[name] = max(worst.get(name, 0.0), off)
    return worst


def _cells(name: str, value: Interval) -> dict[str, float]:
    return {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}


def point_rows(points: Sequence[Measured], masks: dict[str, Tensor]) -> list[dict]:
    """What every point gives, with intervals at 95 %."""
    rows = []
    for measured in points:
        row = {"method": measured.point.method, "begin": measured.point.begin}
        row |= {name: getattr(measured, name) for name in READINGS}
        row["captions"] = len(measured.values["all"])
        for name, x in measures(measured.values, masks).items():
            row |= _cells(name, interval(x))
        rows.append(row)
    return rows


def difference_rows(points: Sequence[Measured], masks: dict[str, Tensor]) -> list[dict]:
    """Every point less what it is compared with, on the same captions and noise.

    That is CFG in the three readings of "the same", for each point of another method within CFG's
    curve of the same beginning; and for S-CFG its own controls at the same guidance scale.
    """
    rows = []
    for begin in dict.fromkeys(measured.point.begin for measured in points):
        own = [measured for measured in points if measured.point.begin == begin]
        curve = [measured for measured in own if measured.point.method == "cfg"]
        bends = bend(curve, masks)
        for measured in own:
            for against, at, other in _others(measured, own, curve):
                common = {"method": measured.point.method, "begin": begin}
                common |= {"scale": measured.scale, "against": against, "at": at}
                between = not any(math.isclose(at, plain.scale) for plain in curve)
                curved = against in READINGS and between
                for name, x in measures(measured.values, masks).items():
                    y = measures(other, masks)[name]
                    row = common | {"measure": name, "count": int(x.isfinite().sum())}
                    row |= {"value": x.nanmean().item(), "other": y.nanmean().item()}
                    row |= _cells("difference", interval(x - y))
                    rows.append(row | {"interpolation": bends.get(name, 0.0) if curved else 0.0})
    return rows


def _others(
    measured: Measured, points: Sequence[Measured], curve: Sequence[Measured]
) -> Iterator[tuple[str, float, dict[str, Tensor]]]:
    """What a point is compared with: name, scale there, values."""
    if measured.point.method == "cfg":
        return
    for reading in READINGS:
        at = getattr(measured, reading)
        plain = interpolate(curve, at)
        if plain is not None:
            yield reading, at, plain
    for other in points:
        if measured.point.method == "scfg" and other.scale == measured.scale:
            if other.point.method in ("mean", "shuffled", "oracle"):
                yield other.point.method, other.scale, other.values


def verdict(row: dict) -> int:
    """1 more, -1 less, 0 not told apart: beyond interval and interpolation together."""
    low, high = (row[f"difference_{end}"] for end in ("low", "high"))
    return (low > row["interpolation"]) - (high < -row["interpolation"])


def region_rows(found: Found, plan: Plan, masks: dict[str, Tensor]) -> list[dict]:
    """Overlap of each variant of finding regions with the true ones, at each timestep and over all.

    Over all, a scene's mean over timesteps counts once: scenes, not views, are independent.
    """
    by_time: dict[int | str, Tensor] = {t: found[f"probe-{t}"]["overlap"] for t in plan.timesteps}
    by_time["all"] = torch.stack(list(by_time.values())).mean(dim=0)  # (n, variants, 6)
    rows = []
    for (t, scores), (v, way) in itertools.product(
        by_time.items(), enumerate(variants(plan.levels))
    ):
        row = {"timestep": t, **dict(zip(("propagation", "powers", "level"), way, strict=True))}
        for name in ("objects", "small", "large"):
            row |= _cells(
                name, interval(torch.where(masks[name], scores[:, v, :OBJECTS], torch.nan))
            )
        row |= _cells("background", interval(scores[:, v, GROUND]))
        rows.append(row | _cells("foreground", interval(scores[:, v, GROUND + 1])))
    return rows


def rate_rows(found: Found, plan: Plan, masks: dict[str, Tensor]) -> list[dict]:
    """How strongly guidance acts on true regions of noised real scenes, and S-CFG's rate there."""
    rows = []
    for t in plan.timesteps:
        for name in ("small", "large", "background"):
            row = {"timestep": t, "region": name}
            for title, key in (("norm", "norm"), ("rate", "rate"), ("true_rate", "oracle")):
                x = found[f"probe-{t}"][key]  # (n, 5)
                objects = torch.where(masks.get(name, masks["objects"]), x[:, :OBJECTS], torch.nan)
                row |= _cells(title, interval(x[:, GROUND] if name == "background" else objects))
            rows.append(row)
    return rows


def tables(found: Found, plan: Plan) -> dict[str, list[dict]]:
    """All tables of a plan whose units are done."""
    scenes = [scene(i, CAPTIONS) for i in range(plan.samples)]
    norms = torch.stack([found[f"probe-{t}"]["norm"] for t in plan.timesteps])
    masks = strata(scenes, norms.mean(dim=0))
    reference = found["reference"]["features"]
    points = [measure(point, found[point.name], reference) for point in plan.points]
    return {
        "points": point_rows(points, masks),
        "differences": difference_rows(points, masks),
        "regions": region_rows(found, plan, masks),
        "rates": rate_rows(found, plan, masks),
    }


def write_csv(rows: Sequence[dict], path: Path) -> Path:
    """Write rows, columns in the order in which they first occur, numbers with six digits."""
    write_whole(path, partial(_write, rows))
    return path


def _write(rows: Sequence[dict], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            cells = (row.get(name) for name in names)
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in cells])
