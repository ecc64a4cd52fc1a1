"""Tables of an evaluation, lists of rows that are written as CSV and drawn as figures."""

import csv
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from scfg.evaluate.draw import METHODS
from scfg.evaluate.metrics import mean
from scfg.evaluate.regions import KINDS, variants
from scfg.evaluate.work import Plan
from scfg.models.embedded import EmbeddedModel

Found = dict[str, dict[str, Tensor]]  # of `scfg.evaluate.work.collect`


def region_rows(found: Found, plan: Plan) -> list[dict]:
    """Overlap of each variant at each timestep, and over all; intervals are half widths at 95 %."""
    by_time = {t: found[f"probe-{t}"]["overlap"] for t in plan.timesteps}  # (b, variants, 4)
    everything: dict[int | str, Tensor] = {**by_time}
    everything["all"] = sum(by_time.values()) / len(by_time)  # scenes, not views, are independent
    rows = []
    for t, scores in everything.items():
        for v, (propagation, powers, level) in enumerate(variants()):
            row = {"timestep": t, "level": level, "propagation": propagation, "powers": powers}
            for k, kind in enumerate(KINDS):
                estimate = mean(scores[:, v, k])
                row |= {kind: estimate.value, f"{kind}_interval": estimate.interval}
            rows.append(row)
    return rows


def inconsistency_rows(found: Found, plan: Plan, model: EmbeddedModel) -> list[dict]:
    """Spread of guidance over the true regions of real scenes, and over those found on the way."""
    rows = []
    for m, method in enumerate(METHODS):
        for t in plan.timesteps:
            spread = found[f"probe-{t}"]["spread"]  # (b, methods)
            row = {"regions": "true", "method": method, "timestep": t}
            rows.append(row | _spreads(spread[:, METHODS.index("cfg")], spread[:, m]))
    for point in plan.points:
        results = found[point.name]
        if "spread_after" in results:
            times = model.schedule.timesteps(point.steps)
            for i, t in enumerate(times):
                row = {"regions": "found", "method": point.method, "timestep": t}
                row |= {"guidance_scale": point.guidance_scale, "sampler": point.sampler}
                row |= _spreads(results["spread_before"][:, i], results["spread_after"][:, i])
                rows.append(row)
    return rows


def _spreads(before: Tensor, after: Tensor) -> dict[str, float]:
    row = {}
    for name, estimate in (("before", mean(before)), ("after", mean(after))):
        row |= {name: estimate.value, f"{name}_interval": estimate.interval}
    return row


def write_csv(rows: Sequence[dict], path: Path) -> Path:
    """Write rows, columns in the order in which they first occur, numbers with six digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            cells = (row.get(name) for name in names)
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in cells])
    return path
