"""The judge: a small network that reads nouns, tints, sizes, count and ground back from an image.

The nouns of a scene differ, so a scene is read noun by noun: is there one, which tint has it, and
how wide is it? Which noun each 4 x 4 patch shows is read first, and tells where to look.

`scfg.models.judge_training` trains it and measures it on scenes it never saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfg.models.emoji import (
    COLOURS,
    LARGEST,
    NOUNS,
    OBJECTS,
    SMALLEST,
    TEXTURES,
    TINTS,
    Scene,
)
from scfg.models.files import read_tensors

WEIGHTS = Path(__file__).parent / "weights" / "judge-emoji.safetensors"
CLASSES = ("ground", *NOUNS)  # of patches
PATCH = 4  # pixels per side
MIDDLE = (0.45, 0.55)  # a small object is below it, a large one above, as a share of what fits


class Judge(nn.Module):
    """Convolutions down to 8 x 8, read out on the patches that seem to show each noun.

    ``pooled_n = sum_x p_n(x) f(x) / sum_x p_n(x)``, p the class probabilities of patches, f the
    features; what is said of a noun is linear in pooled_n and the logarithm of its area.
    """

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.fine = nn.Sequential(  # 64 x 64 pixels to 16 x 16 patches
            nn.PixelUnshuffle(2), *_layer(12, width // 2), *_layer(width // 2, width, 2)
        )
        self.patches = nn.Sequential(*_layer(width, width))
        self.coarse = nn.Sequential(*_layer(width, 128, 2), *_layer(128, 128))
        both = width + 128
        self.classes = nn.Conv2d(both, len(CLASSES), 1)
        self.density = nn.Conv2d(both, 1, 1)
        nn.init.constant_(self.density.bias, -4.5)  # about 3 objects
        self.readout = nn.Linear(both + 1, 2 + 1 + len(TINTS))  # there, width, tint
        self.ground = nn.Linear(both, len(COLOURS) + len(TEXTURES))
        self.register_buffer("feature_mean", torch.zeros(both))
        self.register_buffer("feature_std", torch.ones(both))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Read images (b, 3, 64, 64) in [-1, 1].

        Returns:
            "patches" (b, 57, 16, 16), "there" (b, 56), "tint" (b, 56, 5), "colour" (b, 8) and
            "texture" (b, 3) logits; "width" (b, 56) in units of 16 pixels; "count" (b,), the number
            of objects; "features" (b, 208), spatial means of unit scale on real scenes.
        """
        fine = self.patches(self.fine(images))  # (b, width, 16, 16)
        coarse = self.coarse(fine)  # (b, 128, 8, 8)
        both = torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], dim=1)
        patches = self.classes(both).float()
        share = patches.softmax(dim=1).flatten(2)  # (b, 57, n)
        area = share.sum(dim=-1, keepdim=True)  # (b, 57, 1)
        pooled = share @ both.float().flatten(2).mT / (area + 0.1)  # (b, 57, both)
        said = self.readout(torch.cat([pooled, (area + 0.1).log()], dim=-1)[:, 1:]).float()
        ground = self.ground(pooled[:, 0]).float()
        features = both.float().mean(dim=(2, 3))
        return {
            "patches": patches,
            "there": said[..., 0],
            "width": said[..., 1],
            "tint": said[..., 2:],
            "colour": ground[:, : len(COLOURS)],
            "texture": ground[:, len(COLOURS) :],
            "count": F.softplus(self.density(both).float()).sum(dim=(1, 2, 3)),
            "features": (features - self.feature_mean) / self.feature_std,
        }


def _layer(inside: int, outside: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outside), nn.ReLU()


@dataclass(frozen=True, eq=False)
class Reading:
    """What is in b images, on the CPU: seen by the judge, or told by scenes.

    Attributes:
        there: (b, 56) bool, which of `scfg.models.emoji.NOUNS`.
        tint: (b, 56) int64, 0 for none, else 1 + its place in `TINTS`; meaningless where absent.
        width: (b, 56) in pixels, likewise.
        count: (b,) int64, number of objects.
        colour: (b,) int64, of the ground.
        texture: (b,) int64, of the ground.
    """

    there: Tensor
    tint: Tensor
    width: Tensor
    count: Tensor
    colour: Tensor
    texture: Tensor


@torch.no_grad()
def read(judge: Judge, images: Tensor) -> tuple[Reading, Tensor]:
    """What the judge sees in images (b, 3, 64, 64) in [-1, 1], and their features (b, 208)."""
    out = {k: v.cpu() for k, v in judge(images.to(judge.feature_mean.device)).items()}
    names = ("tint", "colour", "texture")
    best = {name: out[name].argmax(-1) for name in names}
    count = out["count"].round().long()
    return Reading(out["there"] > 0, width=out["width"] * 16, count=count, **best), out["features"]


def truth(scenes: Sequence[Scene]) -> Reading:
    """What scenes say."""
    nouns, colours = tuple(NOUNS), tuple(COLOURS)
    there = torch.zeros(len(scenes), len(nouns), dtype=torch.bool)
    tint = torch.zeros(there.shape, dtype=torch.int64)
    width = torch.zeros(there.shape)
    for i, scene in enumerate(scenes):
        for one in scene.objects:
            place = nouns.index(one.noun)
            there[i, place], width[i, place] = True, one.size
            tint[i, place] = 1 + TINTS.index(one.colour) if one.colour else 0
    grounds = [scene.background for scene in scenes]
    colour = torch.tensor([colours.index(ground.colour) for ground in grounds])
    texture = torch.tensor([TEXTURES.index(ground.texture) for ground in grounds])
    return Reading(there, tint, width, there.sum(1), colour, texture)


def agreement(reading: Reading, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """What of each caption an image carries, float32: 1 right, 0 wrong, NaN where not asked.

    Returns:
        By object in the order of the caption, (b, 4): "found", it is there; "bound", it is there
        and has the tint or the size that is said, asked of those only of which one is said. By
        image, (b,): "count", as many objects as said; "clean", no other noun; "ground", its colour
        and texture; "all", all of that.
    """
    nouns = tuple(NOUNS)
    found = torch.full((len(scenes), OBJECTS), torch.nan)
    bound = found.clone()
    for i, scene in enumerate(scenes):
        room = LARGEST[len(scene.objects) - 1] - SMALLEST
        for j, one in enumerate(scene.objects):
            place = nouns.index(one.noun)
            found[i, j] = reading.there[i, place]
            share = (reading.width[i, place].item() - SMALLEST) / room
            if one.colour:
                right = reading.tint[i, place].item() == 1 + TINTS.index(one.colour)
            elif one.size_word:
                right = share < MIDDLE[1] if one.size_word == "small" else share > MIDDLE[0]
            else:
                continue
            bound[i, j] = right and bool(found[i, j])
    told = truth(scenes)
    whole = {
        "count": (reading.count == told.count).float(),
        "clean": (~(reading.there & ~told.there).any(1)).float(),
        "ground": ((reading.colour == told.colour) & (reading.texture == told.texture)).float(),
    }
    everything = [found.nan_to_num(1).amin(1), bound.nan_to_num(1).amin(1), *whole.values()]
    return {"found": found, "bound": bound, **whole, "all": torch.stack(everything).amin(0)}


def patch_regions(masks: Tensor) -> Tensor:
    """Region that has most pixels of each patch, (b, 16, 16) int64 of masks (b, r, 64, 64)."""
    return F.avg_pool2d(masks.float(), PATCH).argmax(dim=1)


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
