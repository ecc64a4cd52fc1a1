"""Samplers over any noise predictor; none of them hears of guidance.

A predictor is any ``eps = predict(x, t)``: x (b, c, H, W) at the variance a U-Net is trained on,
``x = (denoised + sigma * eps) / sqrt(1 + sigma^2)``; t (b,) int64 on x's device, b equal entries;
eps of x's shape. Conditioning and guidance are closed over:

    predict = lambda x, t: guided(x, t, uncond, cond)
    picture = ddim(predict, noise, scaled_linear(), steps=50)

Every sampler is one rule run by one loop, `sample`. A rule goes from one noise level to the next,
``u' = rule(denoised, eps, sigma, sigma_next)``, on the unscaled state ``u = denoised + sigma eps``,
where that is to replace sigma. A rule may remember: make a new one for each run.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scfg.sampling.noise import Schedule, Spacing

Predictor = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> eps
Rule = Callable[[Tensor, Tensor, float, float], Tensor]  # (denoised, eps, sigma, sigma') -> u'
Callback = Callable[[int, int, Tensor, Tensor], object]  # (i, t, x, eps), the result is ignored


@torch.no_grad()
def sample(
    rule: Rule,
    predict: Predictor,
    x: Tensor,
    schedule: Schedule,
    timesteps: list[int],
    callback: Callback | None = None,
) -> Tensor:
    """Predict at each timestep, and let a rule go from each noise level to the next.

    After the last timestep comes no noise at all (diffusers: set_alpha_to_one=True).

    Args:
        rule: One of `ddim_rule`, `dpmpp_2m_rule`, or one's own.
        predict: ``(x, t) -> eps``, called once a step, without gradients, with x in its own dtype.
        x: (b, c, H, W) floating, to start from: standard normal noise for a new picture. Left
            unchanged. Between steps it is kept in float32 at least, whatever its dtype.
        schedule: The noise levels predict was trained on.
        timesteps: Those to visit, falling, see `Schedule.timesteps`.
        callback: Called as ``callback(i, t, x, eps)`` after each prediction, with the step number,
            the timestep (both int), and the very tensors predict took and returned: read only.

    Returns:
        (b, c, H, W), the dtype of x.

    Raises:
        ValueError: x is not floating (b, c, H, W), or predict returned anything but a tensor of x's
            shape.
        TypeError: x is no tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating (b, c, H, W), got {x.dtype} {tuple(x.shape)}")
    sigmas = [*schedule.sigmas[timesteps].tolist(), 0.0]
    state = x.to(torch.promote_types(x.dtype, torch.float32))
    for i, t in enumerate(timesteps):
        seen = state.to(x.dtype)
        eps = predict(seen, torch.full((len(x),), t, device=x.device))
        if not isinstance(eps, Tensor) or eps.shape != x.shape:
            got = tuple(eps.shape) if isinstance(eps, Tensor) else type(eps).__name__
            raise ValueError(f"predict must return a tensor {tuple(x.shape)} like x, got {got}")
        if callback is not None:
            callback(i, t, seen, eps)
        eps = eps.to(state.dtype)
        denoised = math.hypot(1, sigmas[i]) * state - sigmas[i] * eps
        state = rule(denoised, eps, sigmas[i], sigmas[i + 1]) / math.hypot(1, sigmas[i + 1])
    return state.to(x.dtype)


def ddim_rule(eta: float = 0.0, generator: torch.Generator | None = None) -> Rule:
    """The rule of `ddim`, with u the unscaled state, sigma and sigma' this and the next level.

    ``u' = denoised + sqrt(sigma'^2 - up^2) eps + up noise``,
    ``up = eta sigma' sqrt(1 - sigma'^2 / sigma^2)``.

    Args:
        eta: Share of fresh noise, within [0, 1].
        generator: The only source of randomness, needed if eta > 0. One draw of x's shape a step,
            in order, in float32 on the generator's own device: one seed gives one picture,
            whatever the dtype and device of x.

    Raises:
        ValueError: eta is out of range, or above 0 without a generator.

    Source: Song et al., arXiv 2010.02502, equations 12 and 16.
    """
    if not isinstance(eta, (int, float)) or not 0 <= eta <= 1:
        raise ValueError(f"eta must be within [0, 1], got {eta}")
    if eta > 0 and generator is None:
        raise ValueError("fresh noise (eta > 0) needs generator, a torch.Generator; got None")

    def rule(denoised: Tensor, eps: Tensor, sigma: float, sigma_next: float) -> Tensor:
        if generator is None or eta == 0:
            return denoised + sigma_next * eps
        up = eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        down = math.sqrt(sigma_next**2 - up**2)
        options = dict(generator=generator, device=generator.device, dtype=torch.float32)
        noise = torch.randn(eps.shape, **options).to(eps)
        return denoised + down * eps + up * noise

    return rule


def dpmpp_2m_rule() -> Rule:
    """The rule of `dpmpp_2m`, which remembers the step before.

    With ``h = log(sigma / sigma')`` and h_old, denoised_old those of the step before,
    ``u' = denoised + sigma' eps + (1 - sigma' / sigma) (denoised - denoised_old) h / (2 h_old)``.
    The last term is missing on the first step, which has no past, and on the last one, where h is
    infinite.

    Source: Lu et al., arXiv 2211.01095, algorithm 2; diffusers' DPMSolverMultistepScheduler
    (dpmsolver++, order 2, midpoint, final_sigmas_type="zero").
    """
    past = None  # sigma and denoised of the step before

    def rule(denoised: Tensor, eps: Tensor, sigma: float, sigma_next: float) -> Tensor:
        nonlocal past
        u = denoised + sigma_next * eps
        if past is not None and sigma_next > 0:
            sigma_old, denoised_old = past
            h, h_old = math.log(sigma / sigma_next), math.log(sigma_old / sigma)
            u = u + (1 - sigma_next / sigma) * h / (2 * h_old) * (denoised - denoised_old)
        past = sigma, denoised
        return u

    return rule


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
) -> Tensor:
    """DDIM, from the deterministic sampler (eta 0) to the ancestral one (eta 1), see `ddim_rule`.

    The next level is that of the next timestep visited. diffusers' DDIMScheduler steps to
    t - train_steps // steps instead: the same with "leading" spacing, and with "trailing" if steps
    divides train_steps.

    Args:
        predict: See `sample`.
        x: See `sample`.
        schedule: See `sample`.
        steps: Number of predictions.
        eta: See `ddim_rule`.
        spacing: See `Schedule.timesteps`.
        generator: See `ddim_rule`.
        callback: See `sample`.

    Returns:
        (b, c, H, W), the dtype of x.

    Raises:
        ValueError: As in `sample`, `ddim_rule` and `Schedule.timesteps`.
    """
    timesteps = schedule.timesteps(steps, spacing)
    return sample(ddim_rule(eta, generator), predict, x, schedule, timesteps, callback)


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
) -> Tensor:
    """DPM-Solver++(2M): second order, at one prediction a step, see `dpmpp_2m_rule`.

    Arguments, result and errors are those of `ddim`; generator is taken so that samplers can be
    swapped, and not used.
    """
    timesteps = schedule.timesteps(steps, spacing)
    most = len(schedule.alphas_cumprod) - 1 - (spacing == "leading")
    if spacing != "trailing" and steps > most:
        raise ValueError(f"steps must be 1 to {most} with {spacing!r} spacing, got {steps}")
    if spacing != "trailing":  # as DPMSolverMultistepScheduler: one more, and the cleanest dropped
        timesteps = schedule.timesteps(steps + 1, spacing)[:-1]
    return sample(dpmpp_2m_rule(), predict, x, schedule, timesteps, callback)
