"""What is known of a call before the U-Net runs: which numbers of pixels are at which level."""

from dataclasses import dataclass

import torch
from torch import Tensor

from scfg.config import SCFGConfig
from scfg.evidence import find_reduction, level_weights, map_grid


@dataclass(frozen=True, eq=False)
class Plan:
    """The chosen resolutions of latents of one size.

    Attributes:
        size: (H, W) of the latent.
        device: Of the latent.
        pixels: (pixels, reduction) of each level, finest first.
        weights: (n,) of each level, see `level_weights`, by reduction.
    """

    size: tuple[int, int]
    device: torch.device
    pixels: tuple[tuple[int, int], ...]
    weights: dict[int, Tensor]

    def reduction(self, n: int) -> int | None:
        """The chosen resolution that has n pixels, or None."""
        for pixels, reduction in self.pixels:
            if pixels == n:
                return reduction
        return None


def make_plan(sample: Tensor, config: SCFGConfig, last: Plan | None = None) -> Plan:
    """The plan of a latent (b, c, H, W): the last one where it is the same."""
    size, device = (sample.shape[-2], sample.shape[-1]), sample.device
    # What an earlier call left would be a guard to a compiler, and each call a new graph.
    if not torch.compiler.is_compiling() and last is not None:
        if (last.size, last.device) == (size, device):
            return last
    grids = [(map_grid(size, reduction), reduction) for reduction in config.reductions]
    pixels = tuple((h * w, reduction) for (h, w), reduction in grids)
    return Plan(size, device, pixels, level_weights(size, config, device))


class TracedPlan:
    """The plan of a call as a compiler sees it: every number a function of the latent's shape."""

    def __init__(self, sample: Tensor, reductions: tuple[int, ...]):
        self.sample, self.reductions = sample, reductions

    def reduction(self, n: int) -> int | None:
        """The chosen resolution that has n pixels, or None."""
        return find_reduction(self.sample.shape[-2:], n, self.reductions)
