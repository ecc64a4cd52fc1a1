"""The report of an evaluation: one self-contained page, its figures as PNG, and tables as CSV."""

import html
import json
import platform
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import scfg
from scfg.evaluate import figures
from scfg.evaluate.compare import tables, verdict, write_csv
from scfg.evaluate.draw import INTERVAL, STEPS
from scfg.evaluate.plan import BEGIN, HEADLINE
from scfg.evaluate.work import Found, Plan, collect, seconds_spent
from scfg.models.files import read_tensors, write_text
from scfg.models.judge import WEIGHTS as JUDGE_WEIGHTS

TEMPLATE = Path(__file__).with_name("report.html")
COMPARED = ("objects", "small and weak", "all", "kid")  # columns of the main table


def write_report(plan: Plan, folder: Path, command: str) -> list[Path]:
    """Write everything that the units of a plan, all done, say.

    Args:
        plan: The plan.
        folder: Where its units are, and where to write.
        command: What to type for the same numbers.

    Returns:
        The files written, the page first.
    """
    found = collect(plan, folder)
    rows = tables(found, plan)
    points, differences = rows["points"], rows["differences"]
    drawings = {
        "evidence": partial(figures.evidence, points, differences),
        "quality": partial(figures.quality, points),
        "known": partial(figures.known, points),
        "regions": partial(figures.regions, rows["regions"]),
        "rates": partial(figures.rates, rows["rates"]),
        "pictures": partial(figures.montage, _pictures(plan, found)),
    }
    written = [write_csv(table, folder / f"{name}.csv") for name, table in rows.items()]
    figures.png(drawings["evidence"], folder / "evidence.png")
    parts = {
        **{f"{name}_figure": figures.svg(drawing) for name, drawing in drawings.items()},
        "answers": _list(answers(differences)),
        "main_table": _main_table([r for r in points if r["begin"] is None], differences),
        "known_table": _main_table([r for r in points if r["begin"] is not None], differences),
        "points_table": _points_table(points),
        "about": _about(plan, folder, command),
        "headline": f"{HEADLINE:g}",
        "samples": str(plan.samples),
        "reference": str(plan.reference),
        "begin": str(BEGIN),
        "steps": str(STEPS),
        "interval": " to ".join(f"{100 * share:g}" for share in INTERVAL),
    }
    page = re.sub(r"{{(\w+)}}", lambda m: parts[m[1]], TEMPLATE.read_text(encoding="utf-8"))
    write_text(folder / "report.html", page)
    return [folder / "report.html", folder / "evidence.png", *written]


def answers(differences: Sequence[dict]) -> list[str]:
    """What S-CFG does at `HEADLINE`, a sentence for each question that was asked."""
    chosen = {"method": "scfg", "scale": HEADLINE, "begin": None}
    own = [r for r in differences if all(r[name] == value for name, value in chosen.items())]
    return [
        _sentence(row)
        for row in own
        if row["measure"] in (*COMPARED, "small", "weak", "3 or 4 objects")
        and (row["against"] == "strength" or row["measure"] == "objects")
    ]


def _sentence(row: dict) -> str:
    against = row["against"]
    if against in figures.CONTROLS:
        other = f"less S-CFG with {figures.CONTROLS[against]}"
    else:
        other = f"less CFG of the same {figures.SAME[against][0]} ({row['at']:.2f})"
    said = {1: "more", 0: "not told apart", -1: "less"}[verdict(row)]
    name = figures.MEASURES.get(row["measure"], f"{row['measure']}: objects found")
    return f"{name}, {other}: {difference(row)}: {said}"


def difference(row: dict | None) -> str:
    """A difference with its interval, in points; kernel distances as they are; a dash for none."""
    if row is None:
        return "\u2013"
    factor, digits = (1, 3) if row["measure"] == "kid" else (100, 1)
    names = ("difference", "difference_low", "difference_high")
    value, low, high = (f"{factor * row[name]:+.{digits}f}" for name in names)
    return f"{value} ({low} to {high})".replace("-", "\u2212")


def _list(lines: Sequence[str]) -> str:
    return "".join(f"<li>{html.escape(line)}</li>" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{top}</tr>{body}</table>"


def _main_table(points: Sequence[dict], differences: Sequence[dict]) -> str:
    """Every method at `HEADLINE` less CFG of the same strength."""
    lines = []
    for point in points:
        if point["method"] == "cfg" or point["scale"] != HEADLINE:
            continue
        own = {
            r["measure"]: r
            for r in differences
            if (r["method"], r["scale"], r["begin"], r["against"])
            == (point["method"], HEADLINE, point["begin"], "strength")
        }
        line = [figures.NAMES[point["method"]], f"{point['strength']:.2f}"]
        for name in COMPARED:
            row = own.get(name)
            sign = 0 if row is None else verdict(row) * (-1 if name == "kid" else 1)
            style = {1: "good", 0: "", -1: "bad"}[sign]
            line.append(f"<span class='{style}'>{difference(row)}</span>")
        lines.append(line)
    titles = (figures.MEASURES.get(name, f"{name} objects") for name in COMPARED)
    return _table(("method", "strength", *titles), lines)


def _points_table(points: Sequence[dict]) -> str:
    lines = []
    for row in points:
        line = [figures.NAMES[row["method"]], "noise" if row["begin"] is None else "scene"]
        line += [f"{row[name]:.3g}" for name in ("scale", "mean_scale", "strength")]
        line += [f"{100 * row[name]:.1f}" for name in ("objects", "bound", "all")]
        lines.append([*line, f"{row['kid']:.3f}"])
    head = ("method", "begins as", "scale", "mean scale", "strength")
    return _table((*head, "objects, %", "bound, %", "all right, %", "KID"), lines)


def _pictures(plan: Plan, found: Found) -> list[tuple[str, torch.Tensor]]:
    """Rows of the montage: at `HEADLINE`, or else at the first scale of each method."""
    points = [p for p in plan.points if p.begin is None]
    chosen = {p.method: p for p in reversed(points)}
    chosen |= {p.method: p for p in points if p.guidance_scale == HEADLINE}
    return [
        (f"{figures.NAMES[p.method]} {p.guidance_scale:g}", found[p.name]["pictures"])
        for p in points
        if p in chosen.values()
    ]


def _about(plan: Plan, folder: Path, command: str) -> str:
    """Command, versions, machine, cost and judge."""
    judged = json.loads(read_tensors(JUDGE_WEIGHTS)[1]["measured"])
    spent = seconds_spent(plan, folder)
    facts = {
        "command": f"<code>{html.escape(command)}</code>",
        "versions": f"scfg {scfg.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "machine": html.escape(_machine()),
        "cost": f"{spent / 60:.0f} minutes of one core, to be divided among processes",
        "weights": "model <code>{}</code>, judge <code>{}</code> (SHA-256)".format(*plan.weights),
        "judge on real scenes": ", ".join(f"{k} {v:.4f}" for k, v in judged.items()),
    }
    return "".join(f"<dt>{name}</dt><dd>{fact}</dd>" for name, fact in facts.items())


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()
