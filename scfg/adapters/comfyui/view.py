"""Regions and rates of a step as images."""

import numpy as np
import torch
from torch import Tensor

from scfg.drawing.picture import NO_WORD, PALETTE, viridis
from scfg.guidance import Guided

ENLARGED = 8  # image pixels per latent pixel


def draw(guided: Guided, rate_max: float) -> tuple[Tensor, Tensor]:
    """Each token's region in a colour, START's grey; and the rate, 0 dark blue to rate_max yellow.

    Args:
        guided: labels (b, H, W) and rate (b, 1, H, W) are read.
        rate_max: Largest rate.

    Returns:
        Two (b, 8H, 8W, 3) float32 in [0, 1], on the CPU.
    """
    labels = guided.labels.cpu().numpy()
    area = np.bincount(labels.flatten())
    table = np.zeros((len(area), 3), np.float32)
    for rank, token in enumerate(np.argsort(-area)):
        colour = PALETTE[rank % len(PALETTE)] if token else NO_WORD
        table[token] = np.frombuffer(bytes.fromhex(colour[1:]), np.uint8) / 255
    rates = guided.rate[:, 0].cpu().numpy()
    pictures = [np.asarray(viridis(rate, 0.0, rate_max), np.float32) / 255 for rate in rates]
    images = torch.from_numpy(table[labels]), torch.from_numpy(np.stack(pictures))
    return tuple(_enlarge(image) for image in images)


def _enlarge(image: Tensor) -> Tensor:
    return image.repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2)
