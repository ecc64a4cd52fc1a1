"""One self-contained HTML page on which every step of images can be looked at, word by word."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from scfg.drawing.generate import Frame, Generated
from scfg.drawing.picture import (
    NO_WORD,
    VIRIDIS,
    phrase_colours,
    position_colours,
    rate_range,
    to_pillow,
)

TEMPLATE = Path(__file__).with_name("page.html")


def page(images: Sequence[dict[str, Generated]], how: str, step: int | None = None) -> str:
    """The page: no server, no network, no other file.

    Args:
        images: Per image, `Generated` of one image with its trace, by method; all of one prompt.
        how: How the images were made, in a few words.
        step: Index of the step at which it opens; None: the last.

    Returns:
        HTML.
    """
    results = [result for image in images for result in image.values()]
    first = results[0]
    steps = [step for result in results for step in result.trace]
    words = first.words[0]
    colours = position_colours(words, phrase_colours(words))
    data = {
        "prompt": first.prompts[0],
        "settings": how,
        "words": first.words[0],
        "colours": [colours.get(i, NO_WORD) for i in range(len(first.words[0]))],
        "step": len(first.trace) - 1 if step is None else step,
        "timesteps": [step.t for step in first.trace],
        "labelSize": list(first.trace[0].labels.shape[1:]),
        "rateSize": list(first.trace[0].rate.shape[1:]),
        "rateRange": rate_range([step.rate for step in steps]),
        "rateColours": VIRIDIS,
        "images": [
            {
                "seed": next(iter(image.values())).seeds[0],
                **{method: _trace(result.trace) for method, result in image.items()},
            }
            for image in images
        ],
    }
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = TEMPLATE.read_text(encoding="utf-8").split("{{data}}")
    title = html.escape(first.prompts[0])
    return parts[0].replace("{{title}}", title) + embedded + parts[1]


def _trace(trace: Sequence[Frame]) -> dict:
    """Predictions as one tall PNG, labels and rates as one row of numbers per step."""
    frames = [to_pillow(step.x0[0]) for step in trace]
    width, height = frames[0].size
    tall = Image.new("RGB", (width, height * len(frames)))
    for i, frame in enumerate(frames):
        tall.paste(frame, (0, i * height))
    file = io.BytesIO()
    tall.save(file, "PNG", optimize=True)
    return {
        "frames": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii"),
        "labels": [step.labels[0].flatten().tolist() for step in trace],
        "rates": [[round(x, 3) for x in step.rate[0].flatten().tolist()] for step in trace],
    }
