"""Measuring what guidance does to the embedded model, against what is known of its scenes.

The command ``scfg evaluate``; importing this module loads none of the rest.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``scfg evaluate``."""
    add = parser.add_argument
    add("--report", type=Path, required=True, metavar="DIR", help=(
        "write report.html, figures and CSV there; what is done stays in DIR/units, so that the "
        "same command goes on where it was cut off"
    ))  # fmt: skip
    add("--reduced", action="store_true", help="minutes instead of hours: fewer points and samples")
    add("--samples", type=int, help=(
        "images per point; default: 96 with --reduced, else 10,000 on a GPU and 1000 without"
    ))  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU per process")
    add("--threads", type=int, default=1, help=(
        "CPU threads of each process; results have the same bits for any number of processes, but "
        "not for any number of threads"
    ))  # fmt: skip
    add("--weights", type=Path, metavar="FILE", help="of the model; default: those shipped")
    add("--quiet", action="store_true", help="print nothing but errors")


def main(options: argparse.Namespace) -> list[Path]:
    """Evaluate on this process or, under torchrun, on all of them.

    Args:
        options: Parsed by the parser of `add_arguments`.

    Returns:
        The files written, by the first process; none by the others.

    Raises:
        ValueError: An option is out of range, or DIR holds the units of other settings.
        RuntimeError: An optional package or the device is missing.
        OSError: A file cannot be read or written.
    """
    try:
        from scfg.evaluate.run import run
    except ImportError as error:
        raise RuntimeError(f"{error.name} is missing: pip install 'scfg[evaluate]'") from error
    return run(options)
