"""Write the tables of the documentation from the records in benchmarks/results.

    python -m benchmarks.table

Every number stands under the machine and the date it was measured on. Of a point measured twice on
one machine the last is shown; a point that failed says so.
"""

import csv
from functools import partial
from pathlib import Path

from benchmarks import records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NO_GPU = "No figure from a GPU yet."
NOTHING = "No figure yet."


def markers(name):
    """What stands before and behind a table."""
    return f"<!-- {name} -->", f"<!-- /{name} -->"


def section(text, name):
    """What stands between the markers of a table.

    Raises:
        ValueError: A marker is missing.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must have {begin} and {end} once each")
    return text.split(begin)[1].split(end)[0]


def replaced(text, name, new):
    """The text with another table between its markers."""
    begin, end = markers(name)
    return text.replace(begin + section(text, name) + end, f"{begin}\n{new}\n{end}")


def performance():
    """Time and memory of steps and operations, in Markdown."""
    return render(records.load())


def objects(folder="evidence"):
    """What each way to draw emoji scenes gives, by the tables in a folder, in Markdown."""
    head = ["scale", "method", "mean scale", "strength", "objects", "captions"]
    head += ["objects, minus CFG", "the same, same strength"]
    lines = []
    differences = _evidence(folder, "differences")
    for row in _evidence(folder, "points"):
        start = [row["scale"], row["method"]]
        start += [f"{float(row[key]):.1f}" for key in ("mean_scale", "strength")]
        start += [f"{float(row[key]):.1%}" for key in ("objects", "all")]
        lines.append([*start, *(_difference(row, differences, of) for of in ("scale", "strength"))])
    return _grid(head, lines)


def _evidence(folder, name):
    """Rows of a table of an evaluation, of pictures that begin as noise."""
    with (RESULTS / folder / f"{name}.csv").open() as file:
        return [row for row in csv.DictReader(file) if not row["begin"]]


def _difference(point, differences, against):
    """Objects found less CFG, in points, with the interval; nothing outside CFG's curve."""
    wanted = (point["method"], point["scale"], against, "objects")
    for row in differences:
        if (row["method"], row["scale"], row["against"], row["measure"]) == wanted:
            names = ("difference", "difference_low", "difference_high")
            value, low, high = (100 * float(row[name]) for name in names)
            return f"{value:+.1f} ({low:.1f} to {high:.1f})"
    return ""


def render(rows):
    """The section, in Markdown."""
    steps = [row for row in rows if row["kind"] == "step" and row.get("width", 1.0) == 1.0]
    kernels = [row for row in rows if row["kind"] == "kernel"]
    held = [row for row in rows if row["kind"] == "check"]
    if not steps and not kernels and not held:
        return NOTHING
    parts = []
    for device in dict.fromkeys(row["device"] for row in steps + kernels + held):
        own = [[row for row in kind if row["device"] == device] for kind in (held, steps, kernels)]
        for rows_of, make in zip(own, (_checks, _steps, _kernels), strict=True):
            if rows_of:
                parts.append(make(rows_of))
    if not any("cuda" in row for row in steps + kernels + held):
        parts.append(NO_GPU)
    return "\n\n".join(parts)


def _where(rows):
    """Machine, versions, dates and commits of some rows."""
    row = rows[-1]
    dates, commits = (sorted({x[key] for x in rows}) for key in ("date", "commit"))
    device = row["device"]
    if "threads" in row:
        device += f", {row['threads']} threads"
    if "driver" in row:
        device += f", driver {row['driver']}"
    versions = f"torch {row['torch']}" + (f", triton {row['triton']}" if "cuda" in row else "")
    return f"{device}; {versions}; {', '.join(dates)}; commit {', '.join(commits)}"


def _latest(rows, keys):
    """Rows by key, a later one in place of an earlier; by size and batch within a model."""
    found = {tuple(row.get(key) for key in keys): row for row in rows}
    models = list(dict.fromkeys(row.get("model", row.get("size")) for row in rows))
    rank = {name: place for place, name in enumerate(models)}

    def place(row):
        size = row.get("pixels", 0), row["batch"]
        return rank[row.get("model", row.get("size"))], *size

    return sorted(found.values(), key=place)


def _grid(head, lines):
    """A Markdown table; numbers are aligned to the right."""
    rule = [
        ":--" if name in ("model", "mode", "method", "op", "backend") else "--:" for name in head
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def _checks(rows):
    rows = list({row["check"]: row for row in rows}.values())
    wrong = [row["check"] for row in rows if not row["ok"]]
    text = f"Checks on {_where(rows)}: {len(rows) - len(wrong)} of {len(rows)} held."
    return text + (f" Failed: {', '.join(wrong)}." if wrong else "")


def _steps(rows):
    head = ["model", "pixels", "images", "mode", "method", "seconds", "times plain", "fastest"]
    head.append("MiB more")
    lines = []
    rows = _latest(rows, ("model", "pixels", "batch", "dtype", "mode", "method"))
    for row in rows:
        start = [row["model"], str(row["pixels"]), str(row["batch"])]
        start += [f"{row['mode']} {row['dtype']}", row["method"]]
        if "failed" in row:
            lines.append([*start, row["failed"], "", "", ""])
            continue
        ratio, fastest = (
            f"{row[key]:.3f}" if key in row else "" for key in ("ratio", "ratio_fastest")
        )
        extra = f"{row['extra_mib']:+.0f}" if "extra_mib" in row else ""
        lines.append([*start, f"{row['seconds']:.3g}", ratio, fastest, extra])
    text = (
        "One guided step, plain CFG with fused attention being 1: the median of paired rounds, and "
        "the fastest\nstep of each, which other work disturbs least; memory is the peak above it."
    )
    return f"{text}\nMeasured on {_where(rows)}.\n\n{_grid(head, lines)}"


def _kernels(rows):
    head = ["op", "model", "images", "backend", "µs", "GB/s", "of copy", "bytes µs", "work µs"]
    lines = []
    rows = _latest(rows, ("op", "size", "batch", "dtype", "backend"))
    for row in rows:
        start = [row["op"], row["size"], str(row["batch"]), f"{row['backend']} {row['dtype']}"]
        if "failed" in row:
            lines.append([*start, row["failed"], "", "", "", ""])
            continue
        numbers = [f"{row['p50_us']:.1f}"] + [""] * 4
        if "gb_s" in row:
            numbers[1:] = [f"{row['gb_s']:.0f}", f"{row['copy_share']:.0%}"]
            numbers += [f"{row[key]:.1f}" for key in ("floor_bytes_us", "floor_work_us")]
        lines.append([*start, *numbers])
    text = (
        "One operation, median; beside it the least that moving its bytes and its work could take."
    )
    return f"{text}\nMeasured on {_where(rows)}.\n\n{_grid(head, lines)}"


def floors():
    """The least that operations could take on paper, in Markdown."""
    rows = [row for row in records.load() if row["kind"] == "floor"]
    gpus = list(rows[0]["us"])
    head = ["op", "model", "least MiB", "asked MiB", *gpus]
    lines = []
    for row in rows:
        start = [row["op"], row["size"], *(f"{row[key] / 2**20:.3g}" for key in ("least", "asked"))]
        for gpu in gpus:
            numbers = ("?" if x is None else f"{float(f'{x:.2g}'):g}" for x in row["us"][gpu])
            start.append(" / ".join(numbers))
        lines.append(start)
    text = (
        "Microseconds for one image in float16, at least: memory / L2 / arithmetic. A question mark"
        "\nwhere the vendor gives no rate."
    )
    return f"{text}\n\n{_grid(head, lines)}"


TABLES = {
    "performance": ("docs/cost.md", performance),
    "objects": ("docs/evidence.md", objects),
    "objects of the transformer": (
        "docs/evidence.md",
        partial(objects, "evidence_transformer"),
    ),
    "floors": ("docs/operations.md", floors),
}


def main():
    """Rewrite the tables."""
    for name, (page, make) in TABLES.items():
        path = ROOT / page
        path.write_text(replaced(path.read_text(), name, make()))


if __name__ == "__main__":
    main()
