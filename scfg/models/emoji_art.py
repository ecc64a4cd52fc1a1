"""Prepare the sprites of `scfg.models.emoji`: ``python -m scfg.models.emoji_art FOLDER``.

FOLDER holds one webp a code point, 256 x 256 RGBA: the assets of the npm package
``@lobehub/fluent-emoji-3d`` 1.1.0 (``npm pack @lobehub/fluent-emoji-3d``; licence beside the file
that is written). Each emoji is cut to what is visible, made square, reduced and premultiplied.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from scfg.models.emoji import ART, NOUNS, SPRITE


def sprite(path: Path) -> torch.Tensor:
    """One emoji as premultiplied RGBA, (4, 48, 48) uint8, its longer side filling the square."""
    from PIL import Image

    image = Image.open(path).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    rgba = np.asarray(square, np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    planes = torch.from_numpy(rgba).permute(2, 0, 1)[None]  # (1, 4, side, side)
    small = torch.nn.functional.interpolate(planes, (SPRITE, SPRITE), mode="area")
    return (small[0] * 255).round().byte()


def main() -> None:
    """Command line of ``python -m scfg.models.emoji_art``."""
    parser = argparse.ArgumentParser(prog="python -m scfg.models.emoji_art", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the webp files")
    parser.add_argument("--out", type=Path, default=ART)
    options = parser.parse_args()
    sprites = [sprite(options.folder / f"{code}.webp") for code in NOUNS.values()]
    save_file({"sprites": torch.stack(sprites)}, options.out)
    print(f"{options.out}: {len(sprites)} sprites, {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
