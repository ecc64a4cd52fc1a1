"""S-CFG for the samplers of k-diffusion, and for loops that call ``denoised = model(x, sigma)``.

with denoiser(model, guidance_scale=7.5) as guided:
sample_heun(guided, x, sigmas, extra_args=dict(uncond=uncond, cond=cond))
"""

from collections.abc import Callable

from torch import Tensor, nn

from scfg import checks
from scfg.config import SCFGConfig
from scfg.guidance import Guided
from scfg.recording.predictor import Predictor
from scfg.recording.run import Run


def denoiser(
    model: Callable,
    guidance_scale: float | Tensor = 7.5,
    config: SCFGConfig = SCFGConfig(),  # noqa: B008  (frozen)
    backend: str = "auto",
    callback: Callable[[Guided], object] | None = None,
    token_weights: Tensor | None = None,
    sigmas: Tensor | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    every: int = 1,
    unet: nn.Module | None = None,
) -> Predictor:
    """A model with S-CFG: ``guided(x, sigma, uncond, cond) -> denoised``.

    Args:
        model: Called as ``model(x, sigma, cond=condition)``; one of ``k_diffusion.external``, or
            any function, together with ``unet``. Returns (b, c, H, W), denoised or noise.
        guidance_scale: Float or (b,) tensor, > 0.
        config: Constants.
        backend: See `scfg.ops`.
        callback: Called with the `Guided` of every call on which S-CFG acted.
        token_weights: (t,) or (prompts, t) multiplies the rate of each token's region, or None; see
            `scfg.recording.phrases.phrase_weights`.
        sigmas: The schedule given to the sampler; needed by start, stop and every.
        start: See `Run`.
        stop: See `Run`.
        every: See `Run`.
        unet: The module whose attention is recorded, where it is not within ``model``.

    Returns:
        Predictor, which says when one run ends and the next begins.

    Raises:
        ValueError: No transformer block found, or an argument missing or out of range.
    """
    unet = model if unet is None else unet
    if not isinstance(unet, nn.Module):
        raise ValueError(f"unet must be given with a model that is a {type(model).__name__}")
    run = Run(config, backend, callback, start, stop, every)
    if sigmas is not None:
        checks.shape(sigmas, "sigmas", "steps")
    levels = None if sigmas is None else [sigma for sigma in sigmas.tolist() if sigma > 0]
    if levels is None and not run.always:
        raise ValueError("start, stop and every need sigmas, the schedule of the sampler")

    def call(x: Tensor, sigma: Tensor, condition, **extra) -> Tensor:
        return model(x, sigma, cond=condition, **extra)

    return Predictor(call, unet, guidance_scale, run, token_weights, levels)
