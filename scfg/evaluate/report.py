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
from scfg.drawing.generate import Request, draw
from scfg.evaluate import figures, tables
from scfg.evaluate.draw import scene
from scfg.evaluate.regions import LEVELS, find, probe
from scfg.evaluate.tradeoff import (
    COMPARED,
    Measured,
    matched_rows,
    measure_point,
    point_rows,
)
from scfg.evaluate.work import PROMPTS, Plan, collect, seconds_spent
from scfg.models.embedded import EmbeddedModel
from scfg.models.files import write_text
from scfg.models.shapes import caption
from scfg.models.shapes_judge import WEIGHTS as JUDGE_WEIGHTS

TEMPLATE = Path(__file__).with_name("report.html")
MATCHED = {"scale": "mean scale", "strength": "strength"}
SAMPLES = 8  # pages of single samples
SAMPLE_SCALE, SAMPLE_STEPS = 2.5, 20


def write_report(plan: Plan, folder: Path, model: EmbeddedModel, command: str) -> list[Path]:
    """Write everything that the units of a plan, all done, say.

    Args:
        plan: The plan.
        folder: Where its units are, and where to write.
        model: The model, to show examples.
        command: What to type for the same numbers.

    Returns:
        The files written, the page first.
    """
    found = collect(plan, folder)
    reference = found["reference"]["features"]
    points = [measure_point(point, found[point.name], reference) for point in plan.points]
    rows = {
        "tradeoff": point_rows(points, plan.samples),
        "matched": matched_rows(points),
        "regions": tables.region_rows(found, plan),
        "inconsistency": tables.inconsistency_rows(found, plan, model),
    }
    drawings = {
        "tradeoff": partial(figures.tradeoff, rows["tradeoff"]),
        "pictures": partial(figures.montage, _pictures(plan, found)),
        "inconsistency": partial(figures.inconsistency, rows["inconsistency"]),
        "regions": partial(figures.regions, rows["regions"]),
        "segmentation": partial(figures.segmentation, _examples(model)),
    }
    written = [tables.write_csv(table, folder / f"{name}.csv") for name, table in rows.items()]
    for name, drawing in drawings.items():
        written.append(folder / f"{name}.png")
        figures.png(drawing, written[-1])
    parts = {
        **{name: figures.svg(drawing) for name, drawing in drawings.items()},
        "samples": str(plan.samples),
        "reference": str(plan.reference),
        "scenes": str(plan.scenes),
        "verdicts": _verdicts(rows["matched"]),
        "interpolation": _interpolation(rows["matched"]),
        "matched_table": _matched_table(rows["matched"]),
        "best_table": _best_table(points),
        "points_table": _points_table(rows["tradeoff"]),
        "sample_links": _sample_pages(plan, folder, model),
        "about": _about(plan, folder, command),
    }
    page = re.sub(r"{{(\w+)}}", lambda m: parts[m[1]], TEMPLATE.read_text(encoding="utf-8"))
    write_text(folder / "report.html", page)
    return [folder / "report.html", *written]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{top}</tr>{body}</table></div>"


def _number(row: dict, name: str, digits: int = 3) -> str:
    if row[name] is None:
        return "\u2013"
    return f"{row[name]:.{digits}f} \u00b1 {row[f'{name}_interval']:.{digits}f}"


def _sign(row: dict, name: str) -> int:
    """1 better than CFG, -1 worse, 0 not told apart: within interval and interpolation together."""
    value = row[f"{name}_difference"]
    if value is None:
        return 0
    if abs(value) <= row[f"{name}_difference_interval"] + row[f"{name}_interpolation"]:
        return 0
    return 1 if (value < 0) == (name == "kid") else -1


def _matched_table(rows: Sequence[dict]) -> str:
    lines = []
    for row in rows:
        line = [figures.NAMES[row["method"]], f"{row['sampler']}, {row['steps']}"]
        line += [MATCHED[row["matched"]], f"{row['guidance_scale']:g}", f"{row['cfg_scale']:.2f}"]
        for name in COMPARED:
            style = {1: "good", 0: "", -1: "bad"}[_sign(row, name)]
            line.append(f"<span class='{style}'>{_number(row, f'{name}_difference')}</span>")
        lines.append(line)
    head = ("method", "sampler", "same", "guidance scale", "CFG's scale")
    changes = ("alignment, difference", "all right, difference", "KID, difference")
    return _table((*head, *changes), lines)


def _verdicts(rows: Sequence[dict]) -> str:
    """One item per method and match."""
    items = []
    for method, match in dict.fromkeys((row["method"], row["matched"]) for row in rows):
        lines = [row for row in rows if (row["method"], row["matched"]) == (method, match)]
        lines = [row for row in lines if row["kid_difference"] is not None]
        counts = []
        for name, title in (("alignment", "alignment"), ("kid", "KID")):
            signs = [_sign(row, name) for row in lines]
            counts.append(f"{title} better at {signs.count(1)}, worse at {signs.count(-1)}")
        text = f"{figures.NAMES[method]}, same {MATCHED[match]}: of {len(lines)} points "
        items.append(f"<li>{html.escape(text + '; '.join(counts))}</li>")
    return "".join(items)


def _interpolation(rows: Sequence[dict]) -> str:
    names = ("alignment", "kid")
    worst = [max((row[f"{name}_interpolation"] for row in rows), default=0.0) for name in names]
    return "{:.3f} in alignment and {:.3f} in KID".format(*worst)


def _best_table(points: Sequence[Measured]) -> str:
    """Per method, the scale of most alignment and the scale of least KID."""
    lines = []
    for method in dict.fromkeys(m.point.method for m in points):
        own = [m for m in points if m.point.method == method]
        picks = {
            "most alignment": max(own, key=lambda m: m.results["alignment"].value),
            "least KID": min(own, key=lambda m: m.results["kid"].value),
        }
        for title, best in picks.items():
            row = point_rows([best], 0)[0]
            cells = [_number(row, n) for n in ("alignment", "colour", "shape", "texture", "kid")]
            scale = f"{best.point.guidance_scale:g}"
            lines.append([figures.NAMES[method], title, best.point.sampler, scale, *cells])
    head = ("method", "best by", "sampler", "guidance scale")
    return _table((*head, "alignment", "colour", "shape", "texture", "KID"), lines)


def _points_table(rows: Sequence[dict]) -> str:
    names = ("alignment", "colour", "shape", "texture", "clean", "all", "kid", "frechet")
    lines = []
    for row in rows:
        line = [figures.NAMES[row["method"]], f"{row['sampler']}, {row['steps']}"]
        line += [f"{row[name]:.3g}" for name in ("guidance_scale", "mean_scale", "strength")]
        lines.append([*line, *(_number(row, name) for name in names)])
    head = ("method", "sampler", "guidance scale", "mean scale", "strength")
    titles = ("alignment", "colour", "shape", "texture", "no other", "all right", "KID", "Fréchet")
    return _table((*head, *titles), lines)


def _pictures(plan: Plan, found: tables.Found) -> list[tuple[str, torch.Tensor]]:
    """Rows of the montage: CFG and S-CFG at each scale they share, with the first sampler."""
    sampler = plan.points[0].sampler
    points = [p for p in plan.points if p.sampler == sampler and p.method in ("cfg", "scfg")]
    shared = {p.guidance_scale for p in points if p.method == "scfg"}
    shared &= {p.guidance_scale for p in points if p.method == "cfg"}
    chosen = [p for p in points if p.guidance_scale in shared]
    chosen.sort(key=lambda p: (p.guidance_scale, p.method))
    return [
        (f"{figures.NAMES[p.method]} {p.guidance_scale:g}", found[p.name]["pictures"])
        for p in chosen
    ]


def _examples(model: EmbeddedModel, times: Sequence[int] = (800, 500, 200)) -> list[dict]:
    """Columns of the segmentation figure: the first scenes with two objects, at falling noise."""
    indices = [i for i in range(64) if len(scene(i, PROMPTS).objects) == 2][:3]
    columns = []
    ways = {"no propagation": ("none", 1), "released code": ("official", 1), "paper": ("paper", 4)}
    for i in indices:
        for t in times:
            one = scene(i, PROMPTS)
            seen = probe(model, [one], [i], t)
            found = {title: find(seen, *way, "both")[0][0] for title, way in ways.items()}
            columns.append({
                "title": f"t = {t}",
                "image": seen.images[0],
                "colours": [region.colour for region in one.regions],
                "found": {**found, "truth": seen.truth[0]},
            })  # fmt: skip
    return columns


def _sample_pages(plan: Plan, folder: Path, model: EmbeddedModel) -> str:
    """Write one interactive page per sample, and link to them."""
    from scfg.drawing.page import page

    (folder / "samples").mkdir(exist_ok=True)
    links = []
    for i in range(min(SAMPLES, plan.samples)):
        prompt = caption(scene(i, PROMPTS))
        common = {"guidance_scale": SAMPLE_SCALE, "steps": SAMPLE_STEPS, "sampler": "dpmpp_2m"}
        both = {
            method: draw(model, Request((prompt,), (i,), method=method, trace=True, **common))
            for method in ("cfg", "scfg")
        }
        how = f"{SAMPLE_STEPS} DPM-Solver++(2M) steps, guidance scale {SAMPLE_SCALE:g}"
        path = folder / "samples" / f"{i}.html"
        write_text(path, page([both], how))
        links.append(f"<li><a href='samples/{i}.html'>{html.escape(prompt)}</a></li>")
    return "".join(links)


def _about(plan: Plan, folder: Path, command: str) -> str:
    """Command, versions, machine, cost and judge."""
    from safetensors import safe_open

    with safe_open(JUDGE_WEIGHTS, "pt") as file:
        judged = json.loads(file.metadata()["measured"])
    spent = seconds_spent(plan, folder)
    facts = {
        "command": f"<code>{html.escape(command)}</code>",
        "versions": f"scfg {scfg.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "machine": html.escape(_machine()),
        "cost": f"{spent / 60:.1f} minutes of one process, to be divided among processes",
        "weights": "model <code>{}</code>, judge <code>{}</code> (SHA-256)".format(*plan.weights),
        "judge on real scenes": ", ".join(f"{k} {v:.4f}" for k, v in judged.items()),
        "levels": f"maps {', '.join(LEVELS)}; timesteps {', '.join(map(str, plan.timesteps))}",
    }
    return "".join(f"<dt>{name}</dt><dd>{fact}</dd>" for name, fact in facts.items())


def _machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor()
