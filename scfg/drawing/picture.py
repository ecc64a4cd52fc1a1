"""Images, token regions and rate maps as square cells of a picture, drawn with pillow."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

CELL = 320  # pixels, the side of a cell
INK, PAPER = "#1b1f24", "#ffffff"
NO_WORD = "#c4c8ce"  # START, END, padding and small words
SMALL_WORDS = frozenset("a an the and or on in at of with by to from over under near".split())
# Okabe and Ito 2008, then colours far from these and from each other to deuteranopes, protanopes
# and tritanopes too: given to the words in their order.
PALETTE = (
    "#e69f00 #56b4e9 #009e73 #f0e442 #0072b2 #d55e00 #cc79a7 "
    "#661100 #332288 #ddcc77 #882255 #ffaabb #aa4499 #88ccee"
).split()
NAMED = dict(zip("cyan green yellow blue red purple".split(), PALETTE[1:7], strict=True))
# matplotlib's viridis (CC0) at 17 even points; straight lines between them are within 6 / 255.
VIRIDIS = (
    "#440154 #48186a #472d7b #424086 #3b528b #33638d #2c728e #26818e #21908c "
    "#1f9f88 #28ae80 #3ebc74 #5dc963 #82d34c #abdc32 #d5e21a #fde725"
).split()


def phrases(words: Sequence[str | None]) -> dict[str, list[int]]:
    """The phrases of a prompt and the token positions of each: runs of words between small words.

    >>> phrases([None, "a", "blue", "owl", "on", "a", "red", "background", None])
    {'blue owl': [2, 3], 'red background': [6, 7]}
    """
    found: dict[str, list[int]] = {}
    run: list[int] = []
    for position, word in enumerate([*words, None]):
        if word is not None and word.lower() not in SMALL_WORDS:
            run.append(position)
        elif run:
            named = [words[i] for i in run]
            text = " ".join(w for i, w in enumerate(named) if i == 0 or w != named[i - 1])
            found.setdefault(text, []).extend(run)  # pieces of a word are named once
            run = []
    return found


def phrase_colours(words: Sequence[str | None]) -> dict[str, str]:
    """Colour of every phrase of a prompt, the same in every picture of it.

    A phrase with a word that names a colour of the palette has it, the first one; the others take
    the rest in their order. Small words, START, END and padding have none.
    """
    found = phrases(words)
    colours: dict[str, str] = {}
    for text in found:
        named = [NAMED[word] for word in text.split() if word in NAMED]
        if named and named[0] not in colours.values():
            colours[text] = named[0]
    free = [colour for colour in PALETTE if colour not in colours.values()]
    others = [text for text in found if text not in colours]
    colours |= {text: free[i % len(free)] for i, text in enumerate(others)}
    return {text: colours[text] for text in found}


def owned_phrases(words: Sequence[str | None], labels: Sequence[Tensor]) -> set[str]:
    """The phrases that own a patch in any of the label maps (h, w)."""
    owners = set(np.concatenate([x.flatten().numpy() for x in labels]).tolist())
    return {text for text, positions in phrases(words).items() if owners & set(positions)}


def position_colours(words: Sequence[str | None], colours: dict[str, str]) -> dict[int, str]:
    """Colour of every token position that has one, from `phrase_colours`."""
    return {i: colours[t] for t, at in phrases(words).items() if t in colours for i in at}


def to_pillow(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [-1, 1] at its own size."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def enlarge(image: Image.Image) -> Image.Image:
    """To the size of a cell; small images keep their pixels visible."""
    small = image.width <= CELL // 4
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return image.resize((CELL, CELL), how)


def draw_regions(
    image: Tensor, labels: Tensor, words: Sequence[str | None], colours: dict[str, str]
) -> Image.Image:
    """A cell with each phrase's region in its colour, outlined and named, over a grey image.

    Args:
        image: (3, H, W) in [-1, 1].
        labels: (h, w) int64.
        words: Word of every token position.
        colours: From `phrase_colours`.
    """
    rows, columns = (np.arange(CELL) * size // CELL for size in labels.shape)
    places = phrases(words)
    names = [text for text in places if text in colours]
    merged = np.full(len(words), -1)  # from token position to phrase
    for number, text in enumerate(names):
        merged[places[text]] = number
    found = merged[labels.numpy()]  # (h, w)
    owner = found[rows][:, columns]  # (CELL, CELL)
    table = np.array([_rgb(c) for c in (*(colours[text] for text in names), NO_WORD)], np.uint8)
    grey = enlarge(to_pillow(image)).convert("L").point(lambda v: 100 + v * 0.6).convert("RGB")
    cell = Image.blend(grey, Image.fromarray(table[owner]), 0.75)
    edge = np.zeros(owner.shape, bool)
    edge[2:] = owner[2:] != owner[:-2]
    edge[:, 2:] |= owner[:, 2:] != owner[:, :-2]
    cell.paste(PAPER, mask=Image.fromarray(edge))
    draw = ImageDraw.Draw(cell)
    taken: list[tuple[float, ...]] = []
    for number, text in enumerate(names):
        anchor = _anchor(found == number)
        if anchor is not None:
            box = _name_box(anchor, found.shape, text)
            if not any(_overlap(box, other) for other in taken):
                taken.append(box)
                where = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                halo = {"stroke_width": 3, "stroke_fill": PAPER}
                draw.text(where, text, INK, font=font(15), anchor="mm", **halo)
    return cell


def _anchor(mask: np.ndarray, least: int = 6) -> tuple[int, int] | None:
    """The patch of a region that is deepest inside it; None for one of fewer patches than least."""
    if mask.sum() < least:
        return None
    padded = Image.fromarray(np.pad(mask * np.uint8(255), 4))
    depth = np.array(padded.filter(ImageFilter.GaussianBlur(2)))[4:-4, 4:-4] * mask
    return np.unravel_index(depth.argmax(), depth.shape)


def _name_box(anchor: tuple[int, int], grid: tuple[int, int], word: str) -> tuple[float, ...]:
    """Left, top, right and bottom of a word centred on a patch, kept inside the cell."""
    width, height = font(15).getlength(word) + 8, 20
    row, column = ((i + 0.5) * CELL / size for i, size in zip(anchor, grid, strict=True))
    x = min(max(column, width / 2), CELL - width / 2)
    y = min(max(row, height / 2), CELL - height / 2)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def rate_range(rates: Sequence[Tensor]) -> tuple[float, float]:
    """Least and largest rate, rounded outwards to a tenth: the ends of the colour bar."""
    low = math.floor(min(rate.min().item() for rate in rates) * 10 + 0.01)  # 0.8 is 0.8000001
    high = math.ceil(max(rate.max().item() for rate in rates) * 10 - 0.01)
    return low / 10, max(high, low + 1) / 10


def draw_rate(rate: Tensor, low: float, high: float) -> Image.Image:
    """A cell with the rate (H, W) of every latent pixel, from low (dark blue) to high (yellow)."""
    return viridis(rate.numpy(), low, high).resize((CELL, CELL), Image.Resampling.NEAREST)


def viridis(values: np.ndarray, low: float, high: float) -> Image.Image:
    """Numbers (h, w) as colours, low dark blue and high yellow."""
    position = (values - low) / (high - low) * (len(VIRIDIS) - 1)
    knots = np.array([_rgb(colour) for colour in VIRIDIS]).T  # (3, 17)
    channels = [np.interp(position, np.arange(len(VIRIDIS)), channel) for channel in knots]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The typeface that comes with pillow."""
    return ImageFont.load_default(size)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
