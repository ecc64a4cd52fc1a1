"""The 64 pictures that the card of the models speaks of, and what the judge finds in them.

    python -m benchmarks.looked_at --network transformer --out FILE.png

Plain CFG at 2.5 on 64 captions that no evaluation has, rows of eight.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from scfg.evaluate.draw import Point, draw, scene
from scfg.models.embedded import SHIPPED, load_model
from scfg.models.judge import agreement, load_judge, read
from scfg.names import NETWORKS

COUNT, SEED, BATCH = 64, 70, 16


def main() -> None:
    """Draw, print a line, and write the pictures where asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="unet")
    parser.add_argument("--out", type=Path, help="also write the pictures there")
    arguments = parser.parse_args()
    model, point = load_model(SHIPPED[arguments.network]), Point("cfg", 2.5)
    scenes = [scene(i, SEED) for i in range(COUNT)]
    images = torch.cat(
        [
            draw(model, point, scenes[i : i + BATCH], range(i, i + BATCH))[0]
            for i in range(0, COUNT, BATCH)
        ]
    )
    seen = agreement(read(load_judge(), images)[0], scenes)
    found = seen["found"]  # (64, 4), NaN where there is no such object
    whole = ((found == 1) | found.isnan()).all(dim=1).sum().item()
    print(
        f"{found.nanmean():.1%} of the objects found; of {COUNT} pictures {whole} have every "
        f"captioned object, {seen['all'].sum():.0f} nothing wrong"
    )
    if arguments.out is not None:
        rows = (images * 127.5 + 127.5).round().byte().unflatten(0, (-1, 8))
        grid = rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
        Image.fromarray(grid.numpy()).save(arguments.out)


if __name__ == "__main__":
    main()
