"""The command line: ``scfg generate PROMPT`` and ``scfg evaluate``."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from scfg.backends import BACKENDS
from scfg.config import PROPAGATIONS, SCFGConfig
from scfg.drawing.generate import METHODS, SAMPLERS, Generated, Request, draw
from scfg.models.embedded import WEIGHTS, load_model
from scfg.models.files import write_text, write_whole


def build_parser() -> argparse.ArgumentParser:
    """The options, each with its help text."""
    parser = argparse.ArgumentParser(prog="scfg", description="Semantic-aware CFG for diffusion.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "generate",
        help="draw a prompt with plain CFG and with S-CFG, and show what S-CFG did",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("prompt", help='for example "a penguin and a guitar on a blue background"')
    add("--out", type=Path, default=Path("out.png"), help="the PNG to write")
    add("--seed", type=int, default=0, help="of the first image; image k has seed + k")
    add("--count", type=_positive, default=1, help="number of images, one row each")
    add("--steps", type=int, default=50, help="denoising steps")
    add("--guidance-scale", type=float, help="1 is none; default: 2.5, with --model 7.5")
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
    add("--weights", type=Path, metavar="FILE", help=(
        "of an embedded network, as scfg.models.train exports them; default: the U-Net's"
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
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Those after the program's name; None: those of the process.

    Returns:
        The exit status: 0, or 2 after an error, which is printed.
    """
    options = build_parser().parse_args(arguments)
    try:
        run = run_generate if options.command == "generate" else run_evaluate
        written = run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"scfg {options.command}: error: {error}", file=sys.stderr)
        return 2
    if not options.quiet:
        print("wrote", *written)
    return 0


def run_generate(options: argparse.Namespace) -> list[Path]:
    """Draw the images, write what was asked for, and return the paths.

    Raises:
        ValueError: An option is out of range or a word of the prompt is not known.
        RuntimeError: An optional package is missing, or the backend cannot run.
        OSError: A file cannot be written.
    """
    try:
        from tqdm import tqdm

        from scfg.drawing.page import page
        from scfg.drawing.panel import panel, strip
    except ImportError as error:
        raise RuntimeError(
            f"{error.name} is missing: pip install 'semantic-cfg[generate]'"
        ) from error
    if options.guidance_scale is None:
        options.guidance_scale = 2.5 if options.model is None else 7.5
    source, config = load(options)
    for folder in (options.out.parent, options.trace, options.html and options.html.parent):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    methods = tuple(METHODS) if options.method == "both" else (options.method,)
    total = options.count * len(methods) * options.steps
    threads = nullcontext() if options.model else one_thread()
    with tqdm(total=total, disable=options.quiet or None, unit="step") as bar, threads:
        images = [
            {method: source(_request(options, config, method, k), bar.update) for method in methods}
            for k in range(options.count)
        ]

    sampler = SAMPLERS[options.sampler]
    how = f"{options.steps} {sampler} steps \u00b7 guidance scale {options.guidance_scale:g}"
    _save(panel(images, shown_step(options.steps), how), options.out)
    written = [options.out]
    for image in images if options.trace else []:
        result = image[methods[-1]]
        written.append(options.trace / f"seed{result.seeds[0]}.png")
        _save(strip(result, how), written[-1])
    if options.html:
        write_text(options.html, page(images, how))
        written.append(options.html)
    return written


def _save(image, path: Path) -> None:
    """Write a picture whole, in the format that its name asks for."""
    from PIL import Image

    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"--out must end in .png, got {path}")
    write_whole(path, partial(image.save, format=kind))


def run_evaluate(options: argparse.Namespace) -> list[Path]:
    """Evaluate on this process or, under torchrun, on all of them.

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
        raise RuntimeError(
            f"{error.name} is missing: pip install 'semantic-cfg[evaluate]'"
        ) from error
    return run(options)


def load(options: argparse.Namespace) -> tuple[Callable[..., Generated], SCFGConfig]:
    """What draws, the checkpoint asked for or else the embedded model, and the constants for it.

    Raises:
        ValueError: A word of the prompt is not known, or the checkpoint cannot be used.
        RuntimeError: A package for checkpoints is missing.
    """
    if options.model is not None and options.weights is not None:
        raise ValueError("--model and --weights are two models: give one of them")
    if options.model is not None:
        from scfg.adapters import checkpoints
        from scfg.adapters.generate import draw as draw_with

        source, config = partial(draw_with, checkpoints.load(options.model)), SCFGConfig()
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(WEIGHTS if options.weights is None else options.weights, device)
        model.tokenizer.tokens(options.prompt)
        source, config = partial(draw, model), model.config
    return source, replace(config, propagation=options.propagation)


@contextmanager
def one_thread() -> Iterator[None]:
    """Draw with one thread: the model is too small for more to help.

    Threads that wait for each other on a busy machine cost many times what they save, and their
    number would change the last bits of a picture.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def shown_step(steps: int) -> int:
    """Index of the step whose regions and rate the panel shows.

    Three quarters of the way: there regions agree best with the objects of the finished image.
    """
    return 3 * steps // 4


def _request(options: argparse.Namespace, config: SCFGConfig, method: str, k: int) -> Request:
    """Image k, on its own: the same to the last bit whatever the count."""
    return Request(
        prompts=(options.prompt,),
        seeds=(options.seed + k,),
        guidance_scale=options.guidance_scale,
        method=method,
        steps=options.steps,
        sampler=options.sampler,
        config=config,
        backend=options.backend,
        trace=options.html is not None or method == "scfg" or options.method == "cfg",
        token_weights=dict(options.token_weight or ()),
        start=options.start,
        stop=options.stop,
        every=options.every,
    )


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
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
