"""What the commands do: draw a prompt and write the pictures, or evaluate."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from scfg.config import SCFGConfig
from scfg.drawing.generate import Generated, Request, draw
from scfg.models.embedded import SHIPPED, load_model
from scfg.models.emoji_words import NOUNS
from scfg.models.files import write_text, write_whole
from scfg.names import METHODS, SAMPLERS


def run_generate(options: argparse.Namespace) -> list[Path]:
    """Draw the images, write what was asked for, and return the paths.

    Raises:
        ValueError: An option is out of range or a word of the prompt is not known.
        RuntimeError: An optional package is missing, or the backend cannot run.
        OSError: A file cannot be written.
        KeyboardInterrupt: With the paths of what was written of the images that were complete.
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
    _check_outputs(options)
    with _silence(options):
        source, config = load(options)
    for folder in _folders(options):
        folder.mkdir(parents=True, exist_ok=True)

    methods = tuple(METHODS) if options.method == "both" else (options.method,)
    total = options.count * len(methods) * options.steps
    threads = nullcontext() if options.model else one_thread()
    images, interrupted = [], False
    bar = tqdm(total=total, disable=options.quiet or None, unit="step")
    with bar, threads, _silence(options):
        try:
            for k in range(options.count):
                requests = {method: _request(options, config, method, k) for method in methods}
                images.append({name: source(asked, bar.update) for name, asked in requests.items()})
        except KeyboardInterrupt:
            if not images:
                raise
            interrupted = True

    how, step = settings(options), shown_step(options.steps)
    _save(panel(images, step, how), options.out)
    written = [options.out]
    for image in images if options.trace else []:
        result = image[methods[-1]]
        written.append(options.trace / f"seed{result.seeds[0]}.png")
        _save(strip(result, how), written[-1])
    if options.html:
        write_text(options.html, page(images, how, step))
        written.append(options.html)
    if interrupted:
        raise KeyboardInterrupt(*written)
    return written


def settings(options: argparse.Namespace) -> str:
    """How images were made, on a line: every option that changes them and is not the default."""
    parts = [f"{options.steps} {SAMPLERS[options.sampler]} steps"]
    parts.append(f"guidance scale {options.guidance_scale:g}")
    parts += [f"{phrase} x {factor:g}" for phrase, factor in options.token_weight or ()]
    if (options.start, options.stop) != (0, 1):
        parts.append(f"S-CFG from {options.start:g} to {options.stop:g} of the steps")
    if options.every > 1:
        parts.append(f"regions every {options.every} steps")
    if options.propagation != "paper":
        parts.append(f"propagation {options.propagation}")
    if options.network == "transformer":
        parts.append("transformer")
    return " \u00b7 ".join(parts)


def _silence(options: argparse.Namespace) -> AbstractContextManager:
    """Keeps the packages that draw a checkpoint quiet too, where that is asked for."""
    if not options.quiet or options.model is None:
        return nullcontext()
    from scfg.adapters.checkpoints import silence

    return silence()


def _folders(options: argparse.Namespace) -> list[Path]:
    """Folders that files are written to."""
    folders = (options.out.parent, options.trace, options.html and options.html.parent)
    return [folder for folder in folders if folder is not None]


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse, before anything is loaded or drawn, what could not be written afterwards."""
    from PIL import Image

    kind = Image.registered_extensions().get(options.out.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"--out must end in .png, got {options.out}")
    for name, path in (("out", options.out), ("html", options.html)):
        if path is not None and path.is_dir():
            raise ValueError(f"--{name} must be a file, got the folder {path}")
    for folder in _folders(options):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise OSError(f"cannot write to {folder}: {there} is no folder that can be written to")


def _save(image, path: Path) -> None:
    """Write a picture whole, in the format that its name asks for."""
    from PIL import Image

    kind = Image.registered_extensions()[path.suffix.lower()]
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
        ValueError: A word of the prompt is not known, none is an object, or the checkpoint cannot
            be used.
        RuntimeError: A package for checkpoints is missing.
    """
    if options.model_config is not None and options.model is None:
        raise ValueError("--model-config is of a --model, got none")
    given = [name for name in ("model", "weights", "network") if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} are two models: give one of them")
    if options.model is not None:
        from scfg.adapters import checkpoints
        from scfg.adapters.generate import draw as draw_with

        pipe = checkpoints.load(options.model, config=options.model_config)
        source, config = partial(draw_with, pipe), SCFGConfig()
    else:
        if not options.prompt.strip():
            raise ValueError("prompt must have a word, got none")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(options.weights or SHIPPED[options.network or "unet"], device)
        if not {*model.tokenizer.tokens(options.prompt)} & {*NOUNS}:
            raise ValueError(f"prompt must name an object, as 'penguin', got {options.prompt!r}")
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
