"""The command line: ``scfg generate PROMPT``."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from scfg.config import PROPAGATIONS
from scfg.generate import METHODS, SAMPLERS, SHAPES_CONFIG, Generated, generate
from scfg.ops import BACKENDS
from scfg.shapes.model import ShapesModel, load_shapes_model

TITLES = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)", "euler": "Euler"}
TITLES["euler_ancestral"] = "Euler ancestral"


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
    add("prompt", help='for example "a red circle and a blue square on a green background"')
    add("--out", type=Path, default=Path("out.png"), help="the PNG to write")
    add("--seed", type=int, default=0, help="of the first image; image k has seed + k")
    add("--count", type=_positive, default=1, help="number of images, one row each")
    add("--steps", type=int, default=50, help="denoising steps")
    add("--guidance-scale", type=float, default=2.5, help="1 is none; 1.5 to 3 suits the model")
    add("--sampler", choices=SAMPLERS, default="ddim", help="how to denoise")
    add("--method", choices=(*METHODS, "both"), default="both", help="guidance to draw with")
    add("--propagation", choices=PROPAGATIONS, default="paper", help="completion of word maps")
    add("--backend", choices=BACKENDS, default="auto", help="auto: triton on a GPU, else torch")
    add("--trace", type=Path, metavar="DIR", help="also one PNG per image of several steps there")
    add("--html", type=Path, metavar="FILE", help="also one interactive page")
    add("--model", type=Path, metavar="PATH", help="a diffusers checkpoint instead of the own one")
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
        written = run_generate(options)
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

        from scfg.page import page
        from scfg.panel import panel, strip
    except ImportError as error:
        raise RuntimeError(f"{error.name} is missing: pip install 'scfg[generate]'") from error
    model = load_model(options.model)
    model.tokenizer.tokens(options.prompt)
    for folder in (options.out.parent, options.trace, options.html and options.html.parent):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    methods = METHODS if options.method == "both" else (options.method,)
    total = options.count * len(methods) * options.steps
    with tqdm(total=total, disable=options.quiet or None, unit="step") as bar, one_thread():
        images = [
            {method: _draw(model, options, method, k, bar.update) for method in methods}
            for k in range(options.count)
        ]

    sampler = TITLES[options.sampler]
    settings = f"{options.steps} {sampler} steps \u00b7 guidance scale {options.guidance_scale:g}"
    panel(images, shown_step(options.steps), settings).save(options.out)
    written = [options.out]
    for image in images if options.trace else []:
        result = image[methods[-1]]
        written.append(options.trace / f"seed{result.seeds[0]}.png")
        strip(result, settings).save(written[-1])
    if options.html:
        options.html.write_text(page(images, settings), encoding="utf-8")
        written.append(options.html)
    return written


def load_model(path: Path | None) -> ShapesModel:
    """The embedded model, on the GPU if there is one; a checkpoint folder once an adapter reads it.

    Raises:
        ValueError: path is not None.
    """
    if path is not None:
        raise ValueError(
            f"--model {path}: checkpoints need the diffusers adapter, which this version does not "
            "have; leave --model out to draw with the embedded model"
        )
    return load_shapes_model(device="cuda" if torch.cuda.is_available() else "cpu")


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


def _draw(model, options, method, k, callback) -> Generated:
    """Image k, on its own: the same to the last bit whatever the count."""
    return generate(
        model,
        [options.prompt],
        [options.seed + k],
        method=method,
        guidance_scale=options.guidance_scale,
        steps=options.steps,
        sampler=options.sampler,
        config=replace(SHAPES_CONFIG, propagation=options.propagation),
        backend=options.backend,
        trace=options.html is not None or method == "scfg" or options.method == "cfg",
        callback=callback,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
