"""The options of the command line, each with its help text."""

import argparse
import importlib.metadata
from pathlib import Path

from scfg.config import PROPAGATIONS
from scfg.models.emoji_words import WORDS
from scfg.names import BACKENDS, METHODS, NETWORKS, SAMPLERS


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def version() -> str:
    """Version of this package and where it lies; of an installed distribution, what pip says."""
    import scfg

    folder = Path(scfg.__file__).parent
    try:
        found = importlib.metadata.distribution("semantic-cfg")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is not None and Path(found.locate_file("scfg")).resolve() == folder.resolve():
        return found.version
    return f"{scfg.__version__} (in {folder.parent}, as it is there)"


def build_parser() -> argparse.ArgumentParser:
    """The options, each with its help text."""
    parser = argparse.ArgumentParser(prog="scfg", description="Semantic-aware CFG for diffusion.")
    parser.add_argument("--version", action="version", version=f"scfg {version()}")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "generate",
        help="draw a prompt with plain CFG and with S-CFG, and show what S-CFG did",
        epilog=f"Words that the model knows: {', '.join(WORDS)}.",
        formatter_class=_Help,
    )
    add = command.add_argument
    add("prompt", help='for example "a penguin and a guitar on a blue background"')
    add("--out", type=Path, default=Path("out.png"), help="the PNG to write")
    add("--seed", type=int, default=0, help="of the first image; image k has seed + k")
    add("--count", type=_positive, default=1, help="number of images, one row each")
    add("--steps", type=int, default=50, help="denoising steps")
    add("--guidance-scale", type=float, help="1 is none; 2.5 if not given, with --model 7.5")
    add("--sampler", choices=SAMPLERS, default="ddim", help="how to denoise")
    add("--method", choices=(*METHODS, "both"), default="both", help="guidance to draw with")
    add("--propagation", choices=PROPAGATIONS, default="paper", help="completion of word maps")
    add("--backend", choices=BACKENDS, default="auto", help="auto: triton on a GPU, else torch")
    add("--token-weight", type=_phrase_weight, action="append", metavar="PHRASE=FACTOR", help=(
        "multiply the rate of a phrase's region, as 'blue square=1.5'; may be repeated"
    ))  # fmt: skip
    add("--start", type=float, default=0.0, help="fraction of the steps before S-CFG acts")
    add("--stop", type=float, default=1.0, help="fraction of the steps until which it acts")
    add("--every", type=_positive, default=1, help="find regions on every so many steps only")
    add("--trace", type=Path, metavar="DIR", help="also one PNG per image of several steps there")
    add("--html", type=Path, metavar="FILE", help="also one interactive page")
    add("--model", type=Path, metavar="PATH", help="a folder or .safetensors file for diffusers")
    add("--network", choices=NETWORKS, help="embedded network that draws; default: unet")
    add("--weights", type=Path, metavar="FILE", help=(
        "of an embedded network, as scfg.models.train exports them, in place of those shipped"
    ))  # fmt: skip
    add("--model-config", type=Path, metavar="DIR", help=(
        "for a .safetensors file: folder of a model of its kind, of which no weights are read"
    ))  # fmt: skip
    add("--quiet", action="store_true", help="print nothing but errors")
    command = commands.add_parser(
        "evaluate", help="measure on the embedded model what S-CFG does, and write a report"
    )
    add = command.add_argument
    add("--report", type=Path, required=True, metavar="DIR", help=(
        "write report.html, figures and CSV there; what is done stays in DIR/units, so that the "
        "same command goes on where it was cut off"
    ))  # fmt: skip
    add("--reduced", action="store_true", help="ten minutes on two cores instead of a night")
    add("--samples", type=int, help=(
        "captions; default: 96 with --reduced, else 10,000 on a GPU and 768 without; a larger "
        "number goes on from a smaller one"
    ))  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one GPU per process")
    add("--threads", type=int, default=1, help=(
        "CPU threads of each process; results have the same bits for any number of processes, but "
        "not for any number of threads"
    ))  # fmt: skip
    add("--network", choices=NETWORKS, default="unet", help="embedded network to measure")
    add("--weights", type=Path, metavar="FILE", help="of another than those shipped")
    add("--quiet", action="store_true", help="print nothing but errors")
    return parser


def _phrase_weight(text: str) -> tuple[str, float]:
    phrase, _, factor = text.rpartition("=")
    try:
        weight = float(factor)
    except ValueError:
        weight = 0.0
    if not phrase or not 0 < weight < float("inf"):
        raise argparse.ArgumentTypeError(f"must be PHRASE=FACTOR, FACTOR > 0, got {text!r}")
    return phrase, weight


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
