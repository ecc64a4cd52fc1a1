"""Samplers over any noise predictor; none of them hears of guidance.

A predictor is any ``eps = predict(x, t)``: x (b, c, H, W) at the variance a U-Net is trained on,
``x = (denoised + sigma * eps) / sqrt(1 + sigma^2)``; t (b,) int64 on x's device, b equal entries;
eps of x's shape. Conditioning and guidance are closed over:

    predict = lambda x, t: guided(x, t, uncond, cond)
    picture = ddim(predict, noise, scaled_linear(), steps=50)

Every sampler is one step rule run by one loop. A rule is written for the unscaled state
``denoised + sigma * eps``, where to go from one noise level to the next is to replace sigma.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Predictor = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> eps
Callback = Callable[[int, int, Tensor, Tensor], object]  # (i, t, x, eps), the result is ignored
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
        if not 1 <= steps <= most:
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


def linear(beta_start: float = 0.0001, beta_end: float = 0.02, train_steps: int = 1000) -> Schedule:
    """Evenly spaced betas, in float32; the defaults are those of DDPM (arXiv 2006.11239)."""
    betas = torch.linspace(beta_start, beta_end, train_steps, dtype=torch.float32)
    return Schedule(torch.cumprod(1 - betas, dim=0))


def ddim(
    predict: Predictor,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    spacing: Spacing = "trailing",
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """DDIM, from the deterministic sampler (eta 0) to the ancestral one (eta 1).

    With u the unscaled state, sigma and sigma' this and the next noise level:
    ``u' = denoised + sqrt(sigma'^2 - up^2) eps + up noise``,
    ``up = eta sigma' sqrt(1 - sigma'^2 / sigma^2)``.

    The next level is that of the next timestep visited, and after the last one no noise at all
    (diffusers: set_alpha_to_one=True). diffusers' DDIMScheduler steps to t - train_steps // steps
    instead: the same with "leading" spacing, and with "trailing" if steps divides train_steps.

    Args:
        predict: ``(x, t) -> eps``, called once a step, without gradients, with x in its own dtype.
        x: (b, c, H, W) floating, to start from: standard normal noise for a new picture. Left
            unchanged. Between steps it is kept in float32 at least, whatever its dtype.
        schedule: The noise levels predict was trained on.
        steps: Number of predictions.
        eta: Share of fresh noise, within [0, 1].
        spacing: See `Schedule.timesteps`.
        generator: The only source of randomness, needed if eta > 0. One draw of x's shape a step,
            in order, in float32 on the generator's own device: one seed gives one picture,
            whatever the dtype and device of x.
        callback: Called as ``callback(i, t, x, eps)`` after each prediction, with the step number,
            the timestep (both int), and the very tensors predict took and returned: read only.
        progress: Show a tqdm bar (tqdm comes with ``scfg[generate]``).

    Returns:
        (b, c, H, W), the dtype of x.

    Raises:
        ValueError: x is not floating (b, c, H, W); steps, eta or spacing is out of range; eta > 0
            without a generator; predict returned anything but a tensor of x's shape.
        RuntimeError: progress is asked for and tqdm is not installed.

    Source: Song et al., arXiv 2010.02502, equations 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be within [0, 1], got {eta}")
    if eta > 0 and generator is None:
        raise ValueError("fresh noise (eta > 0) needs generator, a torch.Generator; got None")

    def step(denoised: Tensor, eps: Tensor, sigma: float, sigma_next: float) -> Tensor:
        if generator is None or eta == 0:
            return denoised + sigma_next * eps
        up = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        down = math.sqrt(sigma_next**2 - up**2)
        return denoised + down * eps + up * _noise_like(eps, generator)

    timesteps = schedule.timesteps(steps, spacing)
    return _sample(step, predict, x, schedule, timesteps, callback, progress)


def euler(predict: Predictor, x: Tensor, schedule: Schedule, steps: int, **options: Any) -> Tensor:
    """Euler's method on ``du/dsigma = eps``: ``u' = u + (sigma' - sigma) eps``.

    As ``u = denoised + sigma eps``, that is `ddim` at eta 0: two names of one sampler. Options,
    result and errors are those of `ddim`, and so is the scale of x: no init_noise_sigma here.

    Source: Karras et al., arXiv 2206.00364; diffusers' EulerDiscreteScheduler, with "linspace"
    timesteps rounded.
    """
    return ddim(predict, x, schedule, steps, eta=0.0, **options)


def euler_ancestral(
    predict: Predictor, x: Tensor, schedule: Schedule, steps: int, **options: Any
) -> Tensor:
    """Euler's method to below the next noise level, then fresh noise up to it ("Euler a").

    ``u' = u + (down - sigma) eps + up noise``, ``up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2``,
    ``down^2 = sigma'^2 - up^2``: that is `ddim` at eta 1. Options (generator is needed), result and
    errors are those of `ddim`.

    Source: k-diffusion's sample_euler_ancestral; diffusers' EulerAncestralDiscreteScheduler.
    """
    return ddim(predict, x, schedule, steps, eta=1.0, **options)


def dpmpp_2m(
    predict: Predictor,
    x: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "trailing",
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """DPM-Solver++(2M): second order, at one prediction a step.

    With ``h = log(sigma / sigma')`` and h_old, denoised_old those of the step before,
    ``u' = denoised + sigma' eps + (1 - sigma' / sigma) (denoised - denoised_old) h / (2 h_old)``.
    The last term is missing on the first step, which has no past, and on the last one, where h is
    infinite. Arguments, result and errors are those of `ddim`; generator is taken so that samplers
    can be swapped, and not used.

    Source: Lu et al., arXiv 2211.01095, algorithm 2; diffusers' DPMSolverMultistepScheduler
    (dpmsolver++, order 2, midpoint, final_sigmas_type="zero").
    """
    past = None  # sigma and denoised of the step before

    def step(denoised: Tensor, eps: Tensor, sigma: float, sigma_next: float) -> Tensor:
        nonlocal past
        u = denoised + sigma_next * eps
        if past is not None and sigma_next > 0:
            sigma_old, denoised_old = past
            h, h_old = math.log(sigma / sigma_next), math.log(sigma_old / sigma)
            u = u + (1 - sigma_next / sigma) * h / (2 * h_old) * (denoised - denoised_old)
        past = sigma, denoised
        return u

    timesteps = schedule.timesteps(steps, spacing)
    if spacing != "trailing":  # as DPMSolverMultistepScheduler: one more, and the cleanest dropped
        timesteps = schedule.timesteps(steps + 1, spacing)[:-1]
    return _sample(step, predict, x, schedule, timesteps, callback, progress)


def rescale(eps_guided: Tensor, eps_text: Tensor, phi: float) -> Tensor:
    """Bring the spread of a guided prediction back towards that of the text prediction.

    ``phi * eps_guided * std(eps_text) / std(eps_guided) + (1 - phi) * eps_guided``, std over all
    but the batch dimension, in float32 at least. Not a number where eps_guided is constant.

    Args:
        eps_guided: (b, ...), what guidance made.
        eps_text: (b, ...), the conditional prediction alone.
        phi: Strength within [0, 1]; 0 changes nothing.

    Returns:
        The shape and dtype of eps_guided.

    Raises:
        ValueError: phi is out of range.

    Source: Lin et al., arXiv 2305.08891, section 3.4; diffusers' rescale_noise_cfg.
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"phi must be within [0, 1], got {phi}")
    guided, text = eps_guided.to(_work_dtype(eps_guided)), eps_text.to(_work_dtype(eps_text))
    dims = tuple(range(1, guided.ndim))
    ratio = text.std(dims, keepdim=True) / guided.std(dims, keepdim=True)  # (b, 1, ...)
    return (guided * (phi * ratio + (1 - phi))).to(eps_guided.dtype)


@torch.no_grad()
def _sample(step, predict, x, schedule, timesteps, callback, progress) -> Tensor:
    """Predict at each timestep, and let `step` go from each noise level to the next."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating (b, c, H, W), got {x.dtype} {tuple(x.shape)}")
    sigmas = [*schedule.sigmas[timesteps].tolist(), 0.0]
    state = x.to(_work_dtype(x))
    for i, t in enumerate(_progress_bar(timesteps) if progress else timesteps):
        seen = state.to(x.dtype)
        eps = predict(seen, torch.full((len(x),), t, device=x.device))
        if not isinstance(eps, Tensor) or eps.shape != x.shape:
            got = tuple(eps.shape) if isinstance(eps, Tensor) else type(eps).__name__
            raise ValueError(f"predict must return a tensor {tuple(x.shape)} like x, got {got}")
        if callback is not None:
            callback(i, t, seen, eps)
        eps = eps.to(state.dtype)
        denoised = math.hypot(1, sigmas[i]) * state - sigmas[i] * eps
        state = step(denoised, eps, sigmas[i], sigmas[i + 1]) / math.hypot(1, sigmas[i + 1])
    return state.to(x.dtype)


def _progress_bar(timesteps: list[int]):
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise RuntimeError("progress=True needs tqdm: pip install 'scfg[generate]'") from error
    return tqdm(timesteps)


def _noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    options = dict(generator=generator, device=generator.device, dtype=torch.float32)
    return torch.randn(x.shape, **options).to(x)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
