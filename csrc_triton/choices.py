"""Constants of the host rules that were measured on an architecture, in place of the reasoned ones.

Every rule stands, with its reasons, beside the kernel it launches. `choices.json` holds what
``python -m benchmarks.gpu_check --keep`` found to be faster, by architecture; it is empty where
nothing was measured.
"""

import functools
import json
from pathlib import Path

from triton import knobs
from triton.runtime import driver

FILE = Path(__file__).with_name("choices.json")
CANDIDATES = {  # what each constant may be
    "TILES": (32, 64, 128),  # row tiles of an image
    "ROOM": (4096, 8192),  # scores of a block in more than 16 rows; twice that are scored once
    "LAYERS": (1, 4, 8),  # whose maps one launch makes
    "SMALL_N": (0, 256, 384, 576, 1024),  # pixels up to which one launch applies all powers
    "PATCHES": (0, 256, 1024, 4096),  # up to which one launch does all that follows the last layer
}


def parse(text: str) -> dict[str, dict[str, int]]:
    """The constants in JSON: {architecture: {name: value}}, architectures as sm_90 or gfx942.

    Raises:
        ValueError: It is no such JSON, or a name or value is not among `CANDIDATES`.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(x, dict) for x in found.values()):
        raise ValueError(
            f"{FILE.name} must be {{architecture: {{name: value}}}}, got {text[:80]!r}"
        )
    for architecture, values in found.items():
        for name, value in values.items():
            if type(value) is not int or value not in CANDIDATES.get(name, ()):
                raise ValueError(
                    f"{FILE.name} must have, by architecture, names and values of {CANDIDATES}, "
                    f"got {name}: {value!r} of {architecture}"
                )
    return found


def architecture() -> str:
    """Of the current device: sm_90, gfx942."""
    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch


@functools.cache
def measured(active) -> dict[str, int]:
    """The constants measured on the architecture of a driver."""
    return parse(FILE.read_text()).get(architecture(), {})


def chosen(name: str, reasoned: int) -> int:
    """A constant of a host rule: measured on this architecture, or as reasoned."""
    if knobs.runtime.interpret:
        return reasoned
    return measured(driver.active).get(name, reasoned)
