"""The judge: a small network that reads colours, shapes, textures and layout back from an image.

Colours are unique among the regions of a scene, so a scene is read colour by colour: is there a
region of this colour, what is it (the background or a shape), and what is its texture? The layout
is the colour of every 4 x 4 patch.

`scfg.models.shapes_judge_training` trains it and measures it on scenes it never saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfg.models.files import read_tensors
from scfg.models.shapes import COLOURS, SHAPES, TEXTURES, Scene, render, sample_scenes

WEIGHTS = Path(__file__).parent / "weights" / "judge-shapes.safetensors"
NOUNS = ("absent", "background", *SHAPES)
PATCH, GRID = 4, 16  # pixels per side of a patch, patches per side of an image
MEASURED = 20_001  # seed of the scenes the judge is measured on; training has others


class Judge(nn.Module):
    """Convolutions down to 8 x 8, read out on the patches that seem to have each colour.

    ``pooled_c = sum_x p_c(x) f(x) / sum_x p_c(x)``, p the colour probabilities of patches, f the
    features; noun and texture are linear in pooled_c and the logarithm of the area of c.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.fine = nn.Sequential(  # 64 x 64 pixels to 16 x 16 patches
            nn.PixelUnshuffle(2), *_layer(12, width // 2), *_layer(width // 2, width, 2)
        )
        self.patches = nn.Sequential(*_layer(width, width))
        self.coarse = nn.Sequential(*_layer(width, width, 2), *_layer(width, width))
        self.colour = nn.Conv2d(width, len(COLOURS), 1)
        self.readout = nn.Linear(2 * width + 1, len(NOUNS) + len(TEXTURES))
        self.register_buffer("feature_mean", torch.zeros(2 * width))
        self.register_buffer("feature_std", torch.ones(2 * width))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read images (b, 3, 64, 64) in [-1, 1].

        Returns:
            Logits of colours (b, 6, 16, 16), nouns (b, 6, 6) and textures (b, 6, 3), by colour, and
            features (b, 128), the spatial means of both resolutions, of unit scale on real scenes.
        """
        fine = self.patches(self.fine(images))  # (b, width, 16, 16)
        coarse = self.coarse(fine)  # (b, width, 8, 8)
        colour = self.colour(fine)
        both = torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], dim=1)
        share = colour.softmax(dim=1).flatten(2)  # (b, 6, n)
        area = share.sum(dim=-1, keepdim=True)  # (b, 6, 1)
        pooled = share @ both.flatten(2).mT / (area + 0.1)  # (b, 6, 2 width)
        logits = self.readout(torch.cat([pooled, (area + 0.1).log()], dim=-1))
        noun, texture = logits.split((len(NOUNS), len(TEXTURES)), dim=-1)
        features = torch.cat([fine.mean(dim=(2, 3)), coarse.mean(dim=(2, 3))], dim=1)
        return colour, noun, texture, (features - self.feature_mean) / self.feature_std


def _layer(inside: int, outside: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outside), nn.ReLU()


@dataclass(frozen=True, eq=False)
class Reading:
    """What the judge sees in b images; colours and textures in the order of `scfg.models.shapes`.

    Attributes:
        noun: (b, 6) int64, what is of each colour, an index of `NOUNS`.
        texture: (b, 6) int64, the texture of it; meaningless where absent.
        layout: (b, 16, 16) int64, colour of each patch.
        features: (b, 128) float32, for distances between sets of images.
    """

    noun: Tensor
    texture: Tensor
    layout: Tensor
    features: Tensor


@torch.no_grad()
def read(judge: Judge, images: Tensor) -> Reading:
    """Read images (b, 3, 64, 64) in [-1, 1]; the result is on the CPU."""
    colour, noun, texture, features = judge(images.to(judge.feature_mean.device))
    found = (noun.argmax(-1), texture.argmax(-1), colour.argmax(1), features)
    return Reading(*(x.cpu() for x in found))


def truth(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Noun and texture of every colour, as in `Reading`; texture 0 where absent."""
    names = tuple(COLOURS)
    noun = torch.zeros(len(scenes), len(names), dtype=torch.int64)
    texture = torch.zeros_like(noun)
    for i, scene in enumerate(scenes):
        for region in scene.regions:
            noun[i, names.index(region.colour)] = NOUNS.index(region.noun)
            texture[i, names.index(region.colour)] = TEXTURES.index(region.texture)
    return noun, texture


def patch_regions(masks: Tensor) -> Tensor:
    """Region that has most pixels of each patch, (b, 16, 16) int64 of masks (b, r, 64, 64)."""
    return F.avg_pool2d(masks.float(), PATCH).argmax(dim=1)


def agreement(reading: Reading, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Share of each scene's attributes that the images carry, each (b,) float32 in [0, 1].

    "colour": regions whose colour is there, as an object or as the background, as described.
    "shape": objects that have their colour and shape. "texture": regions that have their colour and
    texture. "alignment": all of these attributes together. "clean": 1 if there is no other colour.
    "all": 1 if nothing is wrong.
    """
    noun, texture = truth(scenes)
    told, seen = noun > 0, reading.noun > 0
    colour = told & seen & ((noun == 1) == (reading.noun == 1))
    shape, objects = colour & (noun == reading.noun) & (noun > 1), noun > 1
    same_texture = colour & (texture == reading.texture)

    def count(x: Tensor) -> Tensor:
        return x.sum(dim=1).float()

    right = count(colour) + count(shape) + count(same_texture)
    asked = 2 * count(told) + count(objects)
    clean = ~(seen & ~told).any(dim=1)
    return {
        "colour": count(colour) / count(told),
        "shape": count(shape) / count(objects),
        "texture": count(same_texture) / count(told),
        "alignment": right / asked,
        "clean": clean.float(),
        "all": (clean & (right == asked)).float(),
    }


def measure(judge: Judge, count: int = 4096, seed: int = MEASURED) -> dict[str, float]:
    """Share of attributes read right on clean real scenes.

    Args:
        judge: The judge.
        count: Number of scenes.
        seed: Of the scenes.

    Returns:
        Means of `agreement`; "place", the share of objects whose centre of mass is found within 3
        pixels; "layout", the share of patches that have the right colour.
    """
    scenes = sample_scenes(count, np.random.default_rng(seed))
    sums: dict[str, float] = {}
    for begin in range(0, count, 256):
        part = scenes[begin : begin + 256]
        images, masks = render(part)
        reading = read(judge, images)
        values = agreement(reading, part)
        values["layout"] = (layouts(part, masks) == reading.layout).float().mean(dim=(1, 2))
        values["place"] = _places_found(reading, part, masks)
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.sum().item() / count
    return {name: round(value, 5) for name, value in sums.items()}


def region_colours(scenes: Sequence[Scene]) -> Tensor:
    """Colour of first object, second object (else the first again) and background, (b, 3) int64."""
    names = tuple(COLOURS)
    rows = [(scene.objects[0], scene.objects[-1], scene.background) for scene in scenes]
    return torch.tensor([[names.index(region.colour) for region in row] for row in rows])


def layouts(scenes: Sequence[Scene], masks: Tensor) -> Tensor:
    """Colour of each patch, (b, 16, 16) int64, of scenes and their masks from `render`."""
    regions = patch_regions(masks)
    return region_colours(scenes).gather(1, regions.flatten(1)).view_as(regions)


def _places_found(reading: Reading, scenes: Sequence[Scene], masks: Tensor) -> Tensor:
    """Share of each scene's objects that the layout puts where they are, (b,)."""
    there = masks[:, :2].any(dim=3).any(dim=2)  # (b, 2)
    colours = region_colours(scenes)[:, :2, None, None]  # (b, 2, 1, 1)
    seen = _centres(reading.layout[:, None] == colours)
    near = (seen - _centres(masks[:, :2])).norm(dim=-1) <= 3
    return (near & there).sum(dim=1) / there.sum(dim=1)


def _centres(masks: Tensor) -> Tensor:
    """Centre of mass in pixels of the image, (..., 2), of masks (..., n, n)."""
    n = masks.shape[-1]
    position = (torch.arange(n) + 0.5) * (PATCH * GRID / n)
    weights = torch.stack([masks.sum(dim=-1), masks.sum(dim=-2)], dim=-2).float()  # (..., 2, n)
    return (weights * position).sum(dim=-1) / weights.sum(dim=-1).clamp_min(1)


def load_judge(path: str | Path = WEIGHTS, device: str | torch.device = "cpu") -> Judge:
    """Load weights, in float32 and for inference.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds something else.
    """
    weights, judge = read_tensors(path)[0], Judge()
    needed = {name for name, x in judge.state_dict().items() if x.is_floating_point()}
    try:
        if not needed <= weights.keys():
            raise KeyError(*sorted(needed - weights.keys())[:1])
        judge.load_state_dict({name: x.float() for name, x in weights.items()}, strict=False)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is no judge: {error!r}") from error
    return judge.eval().requires_grad_(False).to(device)
