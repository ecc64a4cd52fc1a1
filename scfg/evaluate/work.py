"""The work of an evaluation in units that any process can do, in any order, once.

A unit is a range of numbered captions under one `Point`, of the numbered real scenes that they
describe at one timestep, or of numbered real scenes for reference. What it computes depends on the
unit and the weights alone, batch and all, so that the same bits come out however many processes
share the units, and a folder grows: more points or more captions leave the units that are there.
Each unit is one safetensors file, written aside and moved in place: it is there whole, or has still
to be done.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scfg.evaluate.draw import Point, check, draw, scene
from scfg.evaluate.regions import LEVELS, probe, score
from scfg.models.embedded import EmbeddedModel
from scfg.models.emoji import render
from scfg.models.files import read_json, read_tensors, write_text, write_whole
from scfg.models.judge import Judge, agreement, read

CAPTIONS, REFERENCE = 1, 2  # seeds of captions and of the scenes for reference
SHOWN = 12  # images of each point that are kept

Found = dict[str, dict[str, Tensor]]  # of `collect`


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is computed.

    Attributes:
        points: Ways to draw.
        samples: Captions; number i is the same at every point, and so is its noise.
        timesteps: Noise levels at which the scenes that they describe are looked at.
        reference: Real scenes that pictures are compared with.
        weights: SHA-256 of the weights of the model and of the judge.
        chunk: Captions, or scenes, in a unit.
        levels: What regions may be found from, see `scfg.evaluate.regions.levels_of`.

    Raises:
        ValueError: A point cannot be drawn.
    """

    points: tuple[Point, ...]
    samples: int
    timesteps: tuple[int, ...]
    reference: int
    weights: tuple[str, str]
    chunk: int = 32
    levels: tuple[str, ...] = tuple(LEVELS)

    def __post_init__(self) -> None:
        """Refuse points that cannot be drawn, before hours of those that can."""
        for point in self.points:
            check(point)


@dataclass(frozen=True)
class Unit:
    """Numbers first to last - 1 of a kind: "reference", "probe-T", or the name of a point."""

    kind: str
    first: int
    last: int

    def path(self, folder: Path) -> Path:
        """Its file."""
        return folder / "units" / self.kind / f"{self.first:06d}-{self.last:06d}.safetensors"


def units(plan: Plan) -> list[Unit]:
    """All units of a plan, the first captions at every point before the next captions."""
    kinds = {"reference": plan.reference}
    kinds |= {f"probe-{t}": plan.samples for t in plan.timesteps}
    kinds |= {point.name: plan.samples for point in plan.points}
    found = [
        Unit(kind, first, min(first + plan.chunk, count))
        for kind, count in kinds.items()
        for first in range(0, count, plan.chunk)
    ]
    return sorted(found, key=lambda unit: unit.first)  # stable: kinds stay in order


def compute(unit: Unit, plan: Plan, model: EmbeddedModel, judge: Judge) -> dict[str, Tensor]:
    """Results of one unit, on the CPU, first dimension the numbers of the unit."""
    indices = range(unit.first, unit.last)
    if unit.kind == "reference":
        images = render([scene(i, REFERENCE) for i in indices])[0]
        return {"features": read(judge, images)[1]}
    scenes = [scene(i, CAPTIONS) for i in indices]
    if unit.kind.startswith("probe-"):
        return score(probe(model, scenes, indices, int(unit.kind.removeprefix("probe-"))))
    point = next(point for point in plan.points if point.name == unit.kind)
    images, found = draw(model, point, scenes, indices)
    reading, features = read(judge, images)
    shown = max(0, min(SHOWN, unit.last) - unit.first)
    pictures = (images[:shown].cpu() * 127.5 + 127.5).round().byte()
    return found | {"features": features, "pictures": pictures} | agreement(reading, scenes)


def prepare(plan: Plan, folder: Path) -> None:
    """Make the folder of a plan, or check that its units are of the same weights.

    Raises:
        ValueError: They are not.
    """
    (folder / "units").mkdir(parents=True, exist_ok=True)
    path = folder / "units" / "weights.json"
    if path.exists():
        if read_json(path) != list(plan.weights):
            raise ValueError(
                f"{folder} holds the units of other weights: give another folder, or remove "
                f"{folder / 'units'}"
            )
        return
    (folder / "units" / ".gitignore").write_text("*\n")
    write_text(path, json.dumps(plan.weights))


def work(
    plan: Plan,
    folder: Path,
    compute_unit: Callable[[Unit], dict[str, Tensor]],
    rank: int = 0,
    world: int = 1,
    after: Callable[[], object] = lambda: None,
) -> int:
    """Do the units of one process that are not done yet.

    Args:
        plan: The plan; process `rank` does every `world`-th of its units.
        folder: Made by `prepare`, seen by all processes.
        compute_unit: Makes the tensors of a unit.
        rank: Of this process.
        world: Number of processes.
        after: Called after every unit, done now or before.

    Returns:
        The number of units done now.
    """
    from safetensors.torch import save_file

    done = 0
    for unit in units(plan)[rank::world]:
        path = unit.path(folder)
        if not _is_done(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            start = time.process_time()
            found = {name: x.contiguous() for name, x in compute_unit(unit).items()}
            seconds = {"seconds": f"{time.process_time() - start:.3f}"}
            write_whole(path, partial(save_file, found, metadata=seconds))
            done += 1
        after()
    return done


def _is_done(path: Path) -> bool:
    """Whether the file of a unit is there and whole: its header tells its length."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return bool(file.keys()) and "seconds" in (file.metadata() or {})
    except (SafetensorError, FileNotFoundError):
        return False


def collect(plan: Plan, folder: Path) -> Found:
    """Results of all units, by kind and name, rows in the order of their numbers."""
    parts: dict[str, list[dict[str, Tensor]]] = {}
    for unit in units(plan):
        parts.setdefault(unit.kind, []).append(read_tensors(unit.path(folder))[0])
    return {
        kind: {name: torch.cat([part[name] for part in found]) for name in found[0]}
        for kind, found in parts.items()
    }


def seconds_spent(plan: Plan, folder: Path) -> float:
    """CPU time that all units together took."""
    from safetensors import safe_open

    total = 0.0
    for unit in units(plan):
        with safe_open(unit.path(folder), "pt") as file:
            total += float(file.metadata()["seconds"])
    return total


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
