"""What `scfg evaluate` measures: the reduced setting, and the one of a night on two cores."""

from pathlib import Path

from scfg.evaluate.draw import CONTROLS, METHODS, Point
from scfg.evaluate.regions import levels_of
from scfg.evaluate.work import Plan, sha256
from scfg.models.embedded import load_model
from scfg.models.judge import WEIGHTS as JUDGE_WEIGHTS

HEADLINE = 4.0  # guidance scale at which methods are compared in sentences
BEGIN = 349  # there objects are where the real scene had them, and methods still differ
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0)
KNOWN = (1.0, 2.5, 4.0, 7.0, 10.0, 15.0)  # of pictures that begin as real scenes
REDUCED = {  # method: guidance scales
    "cfg": (1.0, 2.5, 4.0, 6.0, 9.0, 14.0),
    "scfg": (2.5, 4.0, 7.0),
    **dict.fromkeys(("scfg_official", "scfg_none", "scfg_image"), (4.0,)),
    **dict.fromkeys(("samg", "interval", "mean", "shuffled"), (4.0,)),
}
REDUCED_KNOWN = {"cfg": (2.5, 4.0, 6.0, 9.0), "scfg": (4.0,), "oracle": (2.5, 4.0)}


def full_points() -> tuple[Point, ...]:
    """Every method at every scale, and at scale 22 CFG, for strengths that others reach."""
    drawn = [m for m in METHODS if m != "oracle"]
    points = [Point(method, scale) for method in drawn for scale in SCALES]
    known = [Point(m, scale, BEGIN) for m in ("cfg", "scfg", *CONTROLS) for scale in KNOWN]
    return (*points, Point("cfg", 22.0), *known, Point("cfg", 22.0, BEGIN))


def reduced_points() -> tuple[Point, ...]:
    """Few scales."""
    points = [Point(method, scale) for method, scales in REDUCED.items() for scale in scales]
    known = [Point(m, scale, BEGIN) for m, scales in REDUCED_KNOWN.items() for scale in scales]
    return (*points, *known)


def make_plan(
    reduced: bool,
    samples: int | None,
    weights: Path,
    judge: Path = JUDGE_WEIGHTS,
    gpu: bool = False,
) -> Plan:
    """The plan of a setting.

    Args:
        reduced: The reduced setting: ten minutes on two cores. The other takes a night there.
        samples: Captions; None: 96 in the reduced setting, else 10,000 on a GPU and 768 without
            one. Units of fewer captions are not done again when more are asked for.
        weights: Of the model.
        judge: Weights of the judge.
        gpu: Whether units are large, as a GPU likes them; results differ by rounding.

    Raises:
        ValueError: samples is below 4, or the weights are damaged.
        FileNotFoundError: There are none.
    """
    if samples is None:
        samples = 96 if reduced else 10_000 if gpu else 768
    if samples < 4:
        raise ValueError(f"samples must be at least 4, got {samples}")
    return Plan(
        points=reduced_points() if reduced else full_points(),
        samples=samples,
        timesteps=(200, 500, 800) if reduced else (50, 200, 350, 500, 650, 800, 950),
        reference=2048 if reduced else 4096,
        weights=(sha256(weights), sha256(judge)),
        chunk=500 if gpu else 32,
        levels=levels_of(load_model(weights)),
    )
