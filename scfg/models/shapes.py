"""Random drawn scenes with their captions and the mask of every phrase.

A scene has one or two objects, never touching, on a background: 64 x 64 RGB pixels. Every region
(object or background) has a colour and a texture; no two regions of a scene share a colour, so a
caption names each of them unambiguously. Textures are tied to the pixel grid (period 8), not to
the object.

Held out of training: of the 72 (texture, colour, shape) kinds of object, the six for which
``shape = colour mod 4`` and ``texture = (colour + 2) mod 3``, counted in the order of the tuples
below (`held_out`): checkered red circle, plain yellow square, striped green triangle, checkered
cyan star, plain blue circle, striped purple square. Every word of them is seen in other kinds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "yellow": (0.98, 0.85, 0.15),
    "green": (0.15, 0.70, 0.25),
    "cyan": (0.35, 0.85, 0.95),
    "blue": (0.15, 0.25, 0.90),
    "purple": (0.65, 0.20, 0.75),
}
TEXTURES = ("plain", "striped", "checkered")
WORDS = ("a", "and", "on", "background", *SHAPES, *COLOURS, *TEXTURES[1:])  # plain is not said
LENGTH = 16  # tokens of the longest caption, with START and END
DARK = 0.45  # brightness of the dark half of a texture
MIN_SIZE, MAX_SIZE = 18.0, 30.0  # width of an object in pixels
GAP, MARGIN = 2.0, 1.0  # pixels between two objects, and between an object and the border

_COLOUR_NAMES = tuple(COLOURS)
_COLOUR = {name: i for i, name in enumerate(COLOURS)}
_TEXTURE = {name: i for i, name in enumerate(TEXTURES)}


@dataclass(frozen=True, slots=True)
class Region:
    """An object, or the background (`noun` "background", centred, as wide as the image).

    Attributes:
        texture: One of `TEXTURES`.
        colour: One of `COLOURS`.
        noun: One of `SHAPES`, or "background".
        x: Horizontal centre of the bounding box in pixels, 0 at the left edge.
        y: Vertical centre of the bounding box in pixels, 0 at the top edge.
        size: Width of the bounding box in pixels.
    """

    texture: str
    colour: str
    noun: str
    x: float = SIZE / 2
    y: float = SIZE / 2
    size: float = float(SIZE)

    @property
    def phrase(self) -> str:
        """The words that name the region, without its article; plain is not said."""
        words = (self.colour, self.noun)
        return " ".join(words if self.texture == "plain" else (self.texture, *words))


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two objects, in the order of the caption, and the background."""

    objects: tuple[Region, ...]
    background: Region

    @property
    def regions(self) -> tuple[Region, ...]:
        """The objects and then the background: the order of the phrases in the caption."""
        return (*self.objects, self.background)


def held_out(texture: str, colour: str, shape: str) -> bool:
    """Whether training never shows this kind of object (the rule of the module docstring)."""
    c = _COLOUR[colour]
    return SHAPES.index(shape) == c % 4 and _TEXTURE[texture] == (c + 2) % 3


# The kind, texture * 4 + shape, that is held out for each colour.
_HELD_OUT_KIND = np.array(
    [
        next(
            k
            for k in range(len(TEXTURES) * len(SHAPES))
            if held_out(TEXTURES[k // len(SHAPES)], colour, SHAPES[k % len(SHAPES)])
        )
        for colour in COLOURS
    ]
)


def caption(scene: Scene) -> str:
    """The sentence that describes a scene.

    Args:
        scene: A scene.

    Returns:
        For example "a striped red circle and a blue square on a checkered green background".
    """
    objects = " and ".join(f"a {region.phrase}" for region in scene.objects)
    return f"{objects} on a {scene.background.phrase}"


def sample_scenes(count: int, generator: np.random.Generator) -> list[Scene]:
    """Draw training scenes, half of them with one object and half with two.

    Colours are drawn without replacement, then texture and shape uniformly over what `held_out`
    leaves. Two objects are kept `GAP` pixels apart along an axis drawn at random, so their
    bounding boxes never meet and no position is ever rejected.

    Args:
        count: Number of scenes.
        generator: Source of all randomness; the same state gives the same scenes.

    Returns:
        `count` scenes.
    """
    colours = generator.random((count, len(COLOURS))).argsort(1)
    kinds = generator.integers(len(TEXTURES) * len(SHAPES) - 1, size=(count, 2))
    kinds += kinds >= _HELD_OUT_KIND[colours[:, :2]]
    textures = generator.integers(len(TEXTURES), size=count)
    pairs = generator.integers(2, size=count)
    sizes = generator.uniform(MIN_SIZE, MAX_SIZE, (count, 2))
    places = _places(sizes, pairs, generator)
    scenes = []
    for i in range(count):
        objects = tuple(
            Region(
                TEXTURES[kinds[i, j] // len(SHAPES)],
                _COLOUR_NAMES[colours[i, j]],
                SHAPES[kinds[i, j] % len(SHAPES)],
                *places[i, j].tolist(),
                float(sizes[i, j]),
            )
            for j in range(1 + pairs[i])
        )
        background = Region(TEXTURES[textures[i]], _COLOUR_NAMES[colours[i, 2]], "background")
        scenes.append(Scene(objects, background))
    return scenes


def _places(sizes: np.ndarray, pairs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Centres (count, 2 objects, xy): free within the border, apart along one axis where paired."""
    count = len(sizes)
    room = SIZE - 2 * MARGIN - sizes[:, :, None]
    places = MARGIN + sizes[:, :, None] / 2 + room * generator.random((count, 2, 2))
    slack = SIZE - 2 * MARGIN - GAP - sizes.sum(1)
    cuts = np.sort(generator.random((count, 2)), 1) * slack[:, None]
    axis = generator.integers(2, size=count)
    first = generator.integers(2, size=count)  # which object lies left or on top
    rows = np.arange(count)
    apart = np.empty((count, 2))
    apart[rows, first] = MARGIN + cuts[:, 0] + sizes[rows, first] / 2
    width = sizes[rows, first] + GAP
    apart[rows, 1 - first] = MARGIN + cuts[:, 1] + width + sizes[rows, 1 - first] / 2
    both = pairs.astype(bool)
    places[rows[both], :, axis[both]] = apart[both]
    return places


def render(scenes: Sequence[Scene], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Draw a batch of scenes.

    The colour of a pixel is the mean of the regions' colours weighted by how much of the pixel each
    covers; the coverage of an edge pixel is its signed distance to the outline plus a half.

    Args:
        scenes: b scenes.
        device: Where to draw.

    Returns:
        Images (b, 3, 64, 64), float32 in [-1, 1], and masks (b, 3, 64, 64), bool: first object,
        second object (empty where there is none), background. A pixel belongs to the region that
        covers at least half of it: the three masks partition the image.
    """
    if not scenes:
        raise ValueError("scenes is empty: expected at least one scene to draw")
    palette = torch.tensor(list(COLOURS.values()))
    colour = torch.zeros(len(scenes), 3, 3)
    texture = torch.zeros(len(scenes), 3, dtype=torch.int64)
    cover = torch.zeros(len(scenes), 3, SIZE, SIZE, device=device)
    slots: dict[str, list[tuple[int, int]]] = {shape: [] for shape in SHAPES}
    boxes: dict[str, list[tuple[float, float, float]]] = {shape: [] for shape in SHAPES}
    for b, scene in enumerate(scenes):
        for r, region in zip((*range(len(scene.objects)), 2), scene.regions, strict=True):
            colour[b, r] = palette[_COLOUR[region.colour]]
            texture[b, r] = _TEXTURE[region.texture]
            if r < 2:
                slots[region.noun].append((b, r))
                boxes[region.noun].append((region.x, region.y, region.size))
    for shape in SHAPES:
        if slots[shape]:
            b, r = torch.tensor(slots[shape], device=device).unbind(1)
            cover[b, r] = _coverage(shape, torch.tensor(boxes[shape], device=device))
    cover[:, 2] = 1 - cover[:, 0] - cover[:, 1]
    tone = _textures(device)[texture.to(device)]  # (b, 3, h, w)
    images = torch.einsum("brhw,brc->bchw", cover * tone, colour.to(device)) * 2 - 1
    masks = cover >= 0.5
    masks[:, 2] = ~(masks[:, 0] | masks[:, 1])
    return images, masks


def _textures(device: str | torch.device) -> Tensor:
    """Brightness of every texture over the image, (3 textures, 64, 64)."""
    half = torch.arange(SIZE, device=device) // 4 % 2  # 4 pixels bright, 4 pixels dark
    rows, columns = half[:, None].expand(SIZE, SIZE), half[None, :]
    dark = torch.stack((torch.zeros_like(rows), rows, rows ^ columns))
    return 1 - (1 - DARK) * dark


def _coverage(shape: str, boxes: Tensor) -> Tensor:
    """Share of every pixel inside shapes of one kind, from boxes (k, xy and size): (k, 64, 64)."""
    grid = torch.arange(SIZE, device=boxes.device) + 0.5
    x = grid[None, None, :] - boxes[:, 0, None, None]  # (k, 1, w)
    y = grid[None, :, None] - boxes[:, 1, None, None]  # (k, h, 1)
    size = boxes[:, 2, None, None]
    if shape == "circle":
        return (size / 2 + 0.5 - torch.hypot(x, y)).clamp_(0, 1)
    if shape == "square":
        return (size / 2 + 0.5 - torch.maximum(x.abs(), y.abs())).clamp_(0, 1)
    # A regular triangle lies inside three half-planes, a five-pointed star inside at least four of
    # five. Both point up; their centre lies below that of the bounding box by `drop`.
    points, start, wanted = (3, math.pi, 1) if shape == "triangle" else (5, 0.0, 2)
    radius = size / (2 * math.sin(2 * math.pi / points))
    drop = radius * (1 - math.cos(math.pi / points)) / 2
    first = second = torch.full_like(size, math.inf)
    for angle in (start + 2 * math.pi * k / points for k in range(points)):
        inside = radius * abs(math.cos(2 * math.pi / points)) - (
            x * math.sin(angle) - (y - drop) * math.cos(angle)
        )
        second = torch.minimum(second, torch.maximum(first, inside))
        first = torch.minimum(first, inside)
    return ((first if wanted == 1 else second) + 0.5).clamp_(0, 1)
