"""The noise levels that a model was trained on."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Spacing = Literal["trailing", "leading", "linspace"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels a model was trained on: ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``.

    Args:
        alphas_cumprod: abar, (train_steps,), strictly falling and within (0, 1).

    Raises:
        ValueError: alphas_cumprod is anything else; zero terminal SNR (a last abar of 0) too, for
            there eps says nothing of x_0.
    """

    alphas_cumprod: Tensor

    def __post_init__(self) -> None:
        """Refuse what is not a falling sequence within (0, 1)."""
        abar = self.alphas_cumprod
        if abar.ndim != 1 or len(abar) == 0:
            raise ValueError(f"alphas_cumprod must be (train_steps,), got {tuple(abar.shape)}")
        if not (abar[0] < 1 and abar[-1] > 0 and (abar.diff() < 0).all()):
            ends = f"{abar[0]:.9g} to {abar[-1]:.9g}"
            raise ValueError(f"alphas_cumprod must fall strictly within (0, 1), got {ends}")

    @property
    def sigmas(self) -> Tensor:
        """Noise to signal per timestep, ``sqrt((1 - abar) / abar)``: (train_steps,) float64."""
        abar = self.alphas_cumprod.double()
        return ((1 - abar) / abar).sqrt()

    def timesteps(self, steps: int, spacing: Spacing = "trailing") -> list[int]:
        """Timesteps to visit, falling.

        Args:
            steps: How many, 1 to train_steps.
            spacing: "trailing" starts from the last timestep, where x is as good as pure noise,
                whatever the number of steps. "leading" ends at 1 (diffusers' steps_offset=1, as
                Stable Diffusion is configured) and starts short of the last timestep. "linspace"
                has both ends and is rounded to integers.

        Raises:
            ValueError: steps out of range (for "leading" also train_steps itself), or an unknown
                spacing.

        Source: Lin et al., arXiv 2305.08891, Table 2; diffusers' timestep_spacing.
        """
        train_steps = len(self.alphas_cumprod)
        most = train_steps - (spacing == "leading")
        if type(steps) is not int or not 1 <= steps <= most:
            raise ValueError(f"steps must be 1 to {most} with {spacing!r} spacing, got {steps}")
        if spacing == "trailing":
            points = np.arange(train_steps, 0, -train_steps / steps)[:steps].round() - 1
        elif spacing == "leading":
            points = np.arange(steps)[::-1] * (train_steps // steps) + 1
        elif spacing == "linspace":
            points = np.linspace(0, train_steps - 1, steps)[::-1].round()
        else:
            raise ValueError(f"spacing must be one of {get_args(Spacing)}, got {spacing!r}")
        return points.astype(np.int64).tolist()


def scaled_linear(
    beta_start: float = 0.00085, beta_end: float = 0.012, train_steps: int = 1000
) -> Schedule:
    """Betas with evenly spaced square roots, in float32; the defaults are Stable Diffusion's."""
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, train_steps, dtype=torch.float32)
    return Schedule(torch.cumprod(1 - roots**2, dim=0))
