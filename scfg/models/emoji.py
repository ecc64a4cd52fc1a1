"""Random scenes of emoji with their captions and the mask of every phrase.

A scene has one to four objects on a ground: 64 x 64 RGB pixels. An object is one of 56 nouns, drawn
from 3D art with soft edges, 14 to 34 pixels wide; some have an attribute, which is a tint
("a blue penguin") or a size ("a small penguin", "a large penguin"). The ground has a colour and
sometimes a texture ("a striped green background"). No two objects of a scene have one noun.

Held out of training: pairs of nouns whose places in `NOUNS` add up to a multiple of 11, and nouns
with an attribute whose places (in `NOUNS` and `ATTRIBUTES`) add up to a multiple of 9
(`held_out_pair`, `held_out_kind`). Every word of them is seen in other company.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scfg.models.emoji_words import ATTRIBUTES, COLOURS, NOUNS, SIZES, TEXTURES, TINTS

ART = Path(__file__).parent / "art" / "emoji.safetensors"
SIZE = 64
SPRITE = 48  # pixels per side of the prepared art
OBJECTS = 4  # most objects of a scene
DARK = 0.78  # brightness of the dark half of a texture
PALE = 0.4  # share of white in the colour of a ground, so that a tint of one name stands out
COUNTS = (0.25, 0.35, 0.25, 0.15)  # share of scenes with 1, 2, 3, 4 objects
LARGEST = (34.0, 32.0, 27.0, 25.0)  # width in pixels of a large object among so many
SMALLEST = 14.0
LENGTH = 24  # tokens of the longest caption, with START and END, and two more
_NAMES = tuple(NOUNS)
_PLACE = {noun: i for i, noun in enumerate(NOUNS)}


@dataclass(frozen=True, slots=True)
class Region:
    """An object, or the ground (`noun` "background", centred, as wide as the image).

    Attributes:
        noun: One of `NOUNS`, or "background".
        colour: Tint of an object, one of `TINTS`, or None; of the ground one of `COLOURS`.
        size_word: One of `SIZES`, or None.
        texture: One of `TEXTURES`; an object's is "plain".
        x: Horizontal centre in pixels, 0 at the left edge.
        y: Vertical centre in pixels, 0 at the top edge.
        size: Width of the bounding square in pixels.
    """

    noun: str
    colour: str | None = None
    size_word: str | None = None
    texture: str = "plain"
    x: float = SIZE / 2
    y: float = SIZE / 2
    size: float = float(SIZE)

    @property
    def phrase(self) -> str:
        """The words that name the region, without its article; plain is not said."""
        texture = None if self.texture == "plain" else self.texture
        return " ".join(w for w in (texture, self.size_word, self.colour, self.noun) if w)


@dataclass(frozen=True, slots=True)
class Scene:
    """One to four objects, in the order of the caption and from back to front, and the ground."""

    objects: tuple[Region, ...]
    background: Region

    @property
    def regions(self) -> tuple[Region, ...]:
        """The objects and then the ground: the order of the phrases in the caption."""
        return (*self.objects, self.background)


def held_out_pair(first: str, second: str) -> bool:
    """Whether training never shows these two nouns together."""
    return (_PLACE[first] + _PLACE[second]) % 11 == 0


def held_out_kind(noun: str, attribute: str | None) -> bool:
    """Whether training never shows a noun with an attribute."""
    return attribute is not None and (_PLACE[noun] + ATTRIBUTES.index(attribute)) % 9 == 0


def caption(scene: Scene) -> str:
    """The sentence that describes a scene.

    Returns:
        For example "a penguin and an owl and a small red car on a striped blue background".
    """
    objects = " and ".join(map(_with_article, scene.objects))
    return f"{objects} on {_with_article(scene.background)}"


def _with_article(region: Region) -> str:
    return f"{'an' if region.phrase[0] in 'aeiou' else 'a'} {region.phrase}"


def sample_scenes(
    count: int, generator: np.random.Generator, held_out: bool = False
) -> list[Scene]:
    """Draw scenes.

    Places are the best of 12 draws: those where bounding circles overlap least.

    Args:
        count: Number of scenes.
        generator: Source of all randomness; the same state gives the same scenes.
        held_out: Also what training never shows.

    Returns:
        `count` scenes.
    """
    objects = 1 + generator.choice(OBJECTS, size=count, p=COUNTS)
    orders = generator.random((count, len(NOUNS))).argsort(1)
    words = generator.random((count, OBJECTS, 2))
    shares = generator.random((count, OBJECTS))
    grounds = generator.random((count, 3))
    draws = generator.random((count, 12, OBJECTS, 2))
    scenes = []
    for i in range(count):
        nouns: list[str] = []
        for place in orders[i]:
            noun = _NAMES[place]
            if held_out or not any(held_out_pair(noun, other) for other in nouns):
                nouns.append(noun)
            if len(nouns) == objects[i]:
                break
        attributes = [
            _attribute(noun, *word, held_out) for noun, word in zip(nouns, words[i], strict=False)
        ]
        sizes = _sizes(attributes, shares[i])
        places = _places(sizes, draws[i, :, : len(nouns)])
        regions = tuple(
            Region(
                noun,
                attribute if attribute in TINTS else None,
                attribute if attribute in SIZES else None,
                x=float(x),
                y=float(y),
                size=float(size),
            )
            for noun, attribute, size, (x, y) in zip(nouns, attributes, sizes, places, strict=True)
        )
        colour = tuple(COLOURS)[int(grounds[i, 0] * len(COLOURS))]
        texture = TEXTURES[1 + int(2 * grounds[i, 2])] if grounds[i, 1] < 0.3 else TEXTURES[0]
        scenes.append(Scene(regions, Region("background", colour, texture=texture)))
    return scenes


def _attribute(noun: str, chance: float, which: float, held_out: bool) -> str | None:
    """Four objects of ten have an attribute, of those that may have one."""
    if chance > 0.4:
        return None
    allowed = [a for a in ATTRIBUTES if held_out or not held_out_kind(noun, a)]
    return allowed[int(which * len(allowed))]


def _sizes(attributes: Sequence[str | None], shares: np.ndarray) -> np.ndarray:
    """Widths: the smallest and the largest quarter of what fits are those that words name."""
    largest = LARGEST[len(attributes) - 1]
    ranges = {"small": (0.0, 0.25), "large": (0.75, 1.0)}
    low, high = np.array([ranges.get(a, (0.1, 0.8)) for a in attributes]).T
    return SMALLEST + (largest - SMALLEST) * (low + (high - low) * shares[: len(attributes)])


def _places(sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Centres (objects, xy) within the image, of the draw that overlaps least."""
    places = sizes[:, None] / 2 + (SIZE - sizes[:, None]) * draws  # (draws, objects, 2)
    apart = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1)
    overlap = np.maximum(0, 0.5 * (sizes[:, None] + sizes[None]) - apart)
    overlap = np.triu(overlap, 1).sum((1, 2))
    return places[overlap.argmin()]


@functools.cache
def _sprites() -> tuple[Tensor, Tensor]:
    """Premultiplied RGBA (nouns, 4, 48, 48) and at half that size, float32 in [0, 1]."""
    from safetensors.torch import load_file

    fine = load_file(ART)["sprites"].float() / 255
    return fine, F.avg_pool2d(fine, 2)


def _tinted(sprites: Tensor, colours: Tensor, tinted: Tensor) -> Tensor:
    """Sprites (k, 4, p, p), most of whose own colour gives way to another (k, 3) where tinted."""
    weights = sprites.new_tensor([0.30, 0.59, 0.11])
    light = torch.einsum("kchw,c->khw", sprites[:, :3], weights)[:, None]  # premultiplied
    other = (
        light * 0.9 * colours[:, :, None, None]
        + 0.25 * light
        + 0.12 * (sprites[:, 3:] * colours[:, :, None, None])
    )
    mixed = torch.cat([0.15 * sprites[:, :3] + other, sprites[:, 3:]], dim=1)
    mixed[:, :3] = torch.minimum(mixed[:, :3], mixed[:, 3:])
    return torch.where(tinted[:, None, None, None], mixed, sprites)


def render(scenes: Sequence[Scene], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Draw a batch of scenes.

    Objects are laid over the ground in the order of the caption, each sampled bilinearly from its
    premultiplied art.

    Args:
        scenes: b scenes.
        device: Where to draw.

    Returns:
        Images (b, 3, 64, 64), float32 in [-1, 1], and masks (b, 5, 64, 64), bool: four objects,
        empty where there is none, then the ground. A pixel belongs to the foremost object that
        covers at least half of it: the masks partition the image.
    """
    if not scenes:
        raise ValueError("scenes is empty: expected at least one scene to draw")
    images = _grounds(scenes, device)
    masks = torch.zeros(len(scenes), OBJECTS + 1, SIZE, SIZE, dtype=torch.bool, device=device)
    masks[:, OBJECTS] = True
    for slot in range(max(len(scene.objects) for scene in scenes)):
        rows = [i for i, scene in enumerate(scenes) if slot < len(scene.objects)]
        rgba = _objects([scenes[i].objects[slot] for i in rows], device)  # (k, 4, 64, 64)
        rows = torch.tensor(rows, device=device)
        images[rows] = images[rows] * (1 - rgba[:, 3:]) + rgba[:, :3]
        inside = rgba[:, 3] >= 0.5
        masks[rows] &= ~inside[:, None]
        masks[rows, slot] = inside
    return images * 2 - 1, masks


def _grounds(scenes: Sequence[Scene], device: str | torch.device) -> Tensor:
    """Grounds (b, 3, 64, 64) in [0, 1]."""
    half = torch.arange(SIZE, device=device) // 8 % 2  # 8 pixels bright, 8 pixels dark
    rows, columns = half[:, None].expand(SIZE, SIZE), half[None, :]
    dark = torch.stack((torch.zeros_like(rows), rows, rows ^ columns))
    tone = 1 - (1 - DARK) * dark  # (textures, 64, 64)
    grounds = [scene.background for scene in scenes]
    colours = torch.tensor([COLOURS[ground.colour] for ground in grounds], device=device)
    colours = (1 - PALE) * colours + PALE
    textures = torch.tensor([TEXTURES.index(ground.texture) for ground in grounds], device=device)
    return colours[:, :, None, None] * tone[textures][:, None]


def _objects(regions: Sequence[Region], device: str | torch.device) -> Tensor:
    """Premultiplied RGBA (k, 4, 64, 64) of objects, each at its place on an empty image."""
    grid = torch.arange(SIZE, device=device) + 0.5
    box = torch.tensor([(r.x, r.y, r.size) for r in regions], device=device)
    x = (grid - box[:, :1]) * (2 / box[:, 2:])  # (k, 64), -1 to 1 inside
    y = (grid - box[:, 1:2]) * (2 / box[:, 2:])
    where = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    nouns = torch.tensor([_PLACE[r.noun] for r in regions])
    tints = torch.tensor([COLOURS[r.colour] if r.colour else (0.0, 0.0, 0.0) for r in regions])
    tinted = torch.tensor([r.colour is not None for r in regions])
    result = torch.empty(len(regions), 4, SIZE, SIZE, device=device)
    coarse = box[:, 2].cpu() < SPRITE / 2
    for level, chosen in zip(_sprites(), (~coarse, coarse), strict=True):
        if chosen.any():
            art = _tinted(level[nouns[chosen]], tints[chosen], tinted[chosen]).to(device)
            here = chosen.to(device)
            result[here] = F.grid_sample(art, where[here], align_corners=False)
    return result
