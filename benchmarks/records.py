"""Measurements kept in benchmarks/results: one row a point, each with its machine and commit."""

import json
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


def append(path, rows, about):
    """Add rows to a JSON file, a row a line; every row says what it was measured on."""
    path = Path(path)
    old = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, old + [row | about for row in rows])


def write(path, rows):
    """Write a JSON list, an entry a line, so that a new one is one line of a diff.

    In one piece: whoever is cut off while writing leaves what was there.
    """
    lines = ",\n".join(json.dumps(row) for row in rows)
    unfinished = Path(f"{path}.new")
    unfinished.write_text(f"[\n{lines}\n]\n" if rows else "[]\n")
    unfinished.replace(path)


def load(folder=RESULTS):
    """Every row of every file of a folder, in order of file name."""
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        rows += json.loads(path.read_text())
    return rows
