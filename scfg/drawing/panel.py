"""The pictures of `scfg generate`: a panel of images, and a strip of steps."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from scfg.drawing.generate import Generated
from scfg.drawing.picture import (
    CELL,
    INK,
    NO_WORD,
    PAPER,
    draw_rate,
    draw_regions,
    enlarge,
    font,
    owned_phrases,
    phrase_colours,
    rate_range,
    to_pillow,
    viridis,
)
from scfg.names import METHODS

GAP, MARGIN, SIDE = 20, 48, 96  # pixels: between cells, border, labels of rows
BAR = 92  # the colour bar and its numbers
FAINT = "#5d6672"
ALIKE, AMPLIFIED = 0.05, 8  # mean difference below which it is shown, and how many times as strong
NOBODY = "no word (START, END, padding), and small words"


def panel(images: Sequence[dict[str, Generated]], step: int, how: str) -> Image.Image:
    """Plain CFG and S-CFG from the same noise, token regions and rate: one row per image.

    Where the two look alike, with a mean absolute difference below `ALIKE` of the range of a pixel,
    their difference stands beside them, `AMPLIFIED` times as strong.

    Args:
        images: Per row, `Generated` of one image with its trace, by method; all of one prompt.
        step: Index of the step whose regions and rate are shown: of S-CFG where it is there.
        how: How the images were made, for the line under the title.

    Returns:
        The picture.
    """
    shown = [row.get("scfg") or row["cfg"] for row in images]
    words = shown[0].words[0]
    labels = [result.trace[step].labels[0] for result in shown]
    rates = [result.trace[step].rate[0] for result in shown]
    colours, limits = phrase_colours(words), rate_range(rates)
    pictures = [[to_pillow(result.images[0]) for result in row.values()] for row in images]
    gaps = [ImageChops.difference(*pair) for pair in pictures if len(pair) == 2]
    gap = float(np.mean([np.asarray(one) for one in gaps])) / 255 if gaps else None
    titles = [METHODS[method] for method in images[0]]
    if gap is not None and gap < ALIKE:
        titles.append(f"Difference x {AMPLIFIED}")
        for row, one in zip(pictures, gaps, strict=True):
            row.append(one.point(lambda value: min(value * AMPLIFIED, 255)))
    cells = []
    for row, result, label, rate in zip(pictures, shown, labels, rates, strict=True):
        regions = draw_regions(result.images[0], label, words, colours)
        cells.append([*map(enlarge, row), regions, draw_rate(rate, *limits)])
    steps = len(shown[0].trace)
    source = f"regions and rate: step {step + 1} of {steps} of {METHODS[shown[0].method]}"
    return _compose(
        shown[0].prompts[0],
        [f"{how} \u00b7 {source}", _reading(gap)],
        [*titles, "Regions of words", "Rate"],
        [f"seed {result.seeds[0]}" for result in shown],
        cells,
        _legend(words, labels),
        limits,
    )


def _reading(gap: float | None) -> str:
    """How to read the panel, on a line."""
    text = "Rate multiplies the guidance scale: above 1 a region is guided more than by plain CFG."
    if gap is None:
        return text
    share = f"{100 * gap:.1f} % of the range of a pixel"
    shown = f"; below {100 * ALIKE:g} % that is shown, {AMPLIFIED} times as strong"
    return f"{text} CFG and S-CFG differ by {share} on average{shown if gap < ALIKE else ''}."


def _legend(words, labels) -> list[tuple[str, str | None]]:
    """Every phrase with its colour, None if it owns no patch."""
    colours, owned = phrase_colours(words), owned_phrases(words, labels)
    return [(text, colours[text] if text in owned else None) for text in colours]


def strip(result: Generated, how: str, columns: int = 8) -> Image.Image:
    """Prediction, token regions and rate of one image at several steps, first to last.

    Args:
        result: One image with its trace.
        how: As for `panel`.
        columns: Number of steps shown, evenly spaced; all of them if there are fewer.

    Returns:
        The picture.
    """
    last = len(result.trace) - 1
    picks = sorted({round(i * last / max(columns - 1, 1)) for i in range(columns)})
    chosen, words = [result.trace[i] for i in picks], result.words[0]
    colours = phrase_colours(words)
    limits = rate_range([step.rate[0] for step in chosen])
    spans = [rate_range([step.rate[0]]) for step in chosen]  # of one step: much of the bar is dark
    cells = [
        [enlarge(to_pillow(step.x0[0])) for step in chosen],
        [draw_regions(step.x0[0], step.labels[0], words, colours) for step in chosen],
        [draw_rate(step.rate[0], *limits) for step in chosen],
    ]
    return _compose(
        result.prompts[0],
        [f"{METHODS[result.method]} \u00b7 seed {result.seeds[0]} \u00b7 {how}"],
        [
            f"step {i + 1}: rate {low:g} to {high:g}"
            for i, (low, high) in zip(picks, spans, strict=True)
        ],
        ["image", "regions", "rate"],
        cells,
        _legend(words, [step.labels[0] for step in chosen]),
        limits,
    )


def _compose(title, notes, headers, sides, cells, legend, limits) -> Image.Image:
    """Title and notes, cells under headers, legend of words below, colour bar on the right."""
    rows, columns = len(cells), len(headers)
    width = 2 * MARGIN + SIDE + columns * (CELL + GAP) + BAR
    lines = _wrap(title, 30, width - 2 * MARGIN)
    notes = [line for note in notes for line in _wrap(note, 18, width - 2 * MARGIN)]
    top = MARGIN + 40 * len(lines) + 54 + 26 * len(notes)
    words = _flow([word for word, _ in legend] + [NOBODY], width - 2 * MARGIN - SIDE)
    height = top + rows * (CELL + GAP) + 20 + 40 * (words[-1][1] + 1) + MARGIN
    page = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + 40 * i), line, INK, font=font(30))
    for i, line in enumerate(notes):
        draw.text((MARGIN, MARGIN + 40 * len(lines) + 2 + 26 * i), line, FAINT, font=font(18))
    left = MARGIN + SIDE
    for j, header in enumerate(headers):
        x = left + j * (CELL + GAP)
        draw.text((x, top - 12), header, INK, font=font(20), anchor="ls")
    for i, row in enumerate(cells):
        y = top + i * (CELL + GAP)
        draw.text((MARGIN, y + CELL / 2), sides[i], FAINT, font=font(18), anchor="lm")
        for j, cell in enumerate(row):
            page.paste(cell, (left + j * (CELL + GAP), y))
    end = top + rows * (CELL + GAP) - GAP
    _draw_bar(page, draw, (left + columns * (CELL + GAP), end - CELL), limits)
    colours = [colour for _, colour in legend] + [NO_WORD]
    for (x, line, word), colour in zip(words, colours, strict=True):
        x, y = left + x, end + GAP + 30 + 40 * line
        chip = (x, y - 10, x + 20, y + 10)
        draw.rounded_rectangle(chip, 4, fill=colour, outline=None if colour else "#c4c8ce", width=2)
        draw.text((x + 29, y), word, INK if colour else FAINT, font=font(20), anchor="lm")
    return page


def _draw_bar(page, draw, corner, limits) -> None:
    x, y = corner
    low, high = limits
    ramp = np.linspace(high, low, CELL)[:, None].repeat(18, axis=1)
    page.paste(viridis(ramp, low, high), corner)
    apart = (high - low) / 14  # two numbers closer than this would touch
    ticks = [low, high] + [1.0] * bool(low + apart < 1 < high - apart)
    for value in ticks:
        where = y + (CELL - 1) * (high - value) / (high - low)
        draw.line((x + 18, where, x + 24, where), FAINT)
        draw.text((x + 30, where), f"{value:.1f}", INK, font=font(18), anchor="lm")


def _flow(words: list[str], width: float) -> list[tuple[float, int, str]]:
    """Place legend entries left to right, line after line: (x, line, word) of each."""
    x, line, places = 0.0, 0, []
    for word in words:
        needed = 29 + font(20).getlength(word)
        if x and x + needed > width:
            x, line = 0.0, line + 1
        places.append((x, line, word))
        x += needed + 28
    return places


def _wrap(text: str, size: int, width: float) -> list[str]:
    lines = [""]
    for word in text.split() or [""]:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(size).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
