"""What `scfg evaluate` measures in its reduced and in its full setting."""

from pathlib import Path

from scfg.evaluate.draw import Point
from scfg.evaluate.work import Plan, sha256
from scfg.models.shapes_judge import WEIGHTS as JUDGE_WEIGHTS

FULL = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0)  # guidance scales
CFG_MORE = (22.0,)  # reached by the mean scale of a method that raises it
REDUCED = {  # method: guidance scales
    "cfg": (1.0, 2.5, 4.0, 7.0, 11.0),
    "scfg": (1.5, 2.5, 7.0),
    "scfg_none": (7.0,),
    "scfg_image": (7.0,),
    "samg": (2.5, 7.0),
}
TIMESTEPS = (50, 200, 350, 500, 650, 800, 950)


def full_points() -> tuple[Point, ...]:
    """Every method at every scale, with 20 steps of DPM-Solver++(2M) and with 50 of DDIM."""
    scales = {method: FULL for method in (*REDUCED, "scfg_official")}
    scales["cfg"] += CFG_MORE
    return tuple(
        Point(method, scale, sampler, steps)
        for sampler, steps in (("dpmpp_2m", 20), ("ddim", 50))
        for method, values in scales.items()
        for scale in values
    )


def reduced_points() -> tuple[Point, ...]:
    """Few scales and one sampler."""
    return tuple(Point(method, scale) for method, scales in REDUCED.items() for scale in scales)


def make_plan(
    reduced: bool,
    samples: int | None,
    weights: Path,
    judge: Path = JUDGE_WEIGHTS,
    gpu: bool = False,
) -> Plan:
    """The plan of a setting.

    Args:
        reduced: The reduced setting instead of the full one.
        samples: Images per point; None: 96 in the reduced setting, else 10,000 on a GPU and 1000
            without one.
        weights: Of the model.
        judge: Weights of the judge.
        gpu: Whether units are large, as a GPU likes them; results differ by rounding.

    Raises:
        ValueError: samples is below 4.
    """
    if samples is None:
        samples = 96 if reduced else 10_000 if gpu else 1000
    if samples < 4:
        raise ValueError(f"samples must be at least 4, got {samples}")
    return Plan(
        points=reduced_points() if reduced else full_points(),
        samples=samples,
        scenes=min(samples, 64 if reduced else 512),
        timesteps=TIMESTEPS,
        reference=max(samples, 2048 if reduced else 4096),
        chunk=500 if gpu else 32,
        weights=(sha256(weights), sha256(judge)),
    )
