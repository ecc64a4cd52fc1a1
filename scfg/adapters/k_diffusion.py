"""S-CFG for the samplers of k-diffusion, and for loops that call ``denoised = model(x, sigma)``.

    with denoiser(model, guidance_scale=7.5) as guided:
        sample_heun(guided, x, sigmas, extra_args=dict(uncond=uncond, cond=cond))

At one noise level denoised images differ by a multiple of what the noise predictions differ by, and
rates are ratios: it does not matter in which of the two spaces the model speaks.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scfg.config import SCFGConfig
from scfg.evidence import Evidence
from scfg.guidance import Guided, cfg
from scfg.recording.recorder import AttentionRecorder
from scfg.recording.run import Steps


class Denoiser:
    """A model with S-CFG: ``guided(x, sigma, uncond, cond) -> denoised``.

    Extra keywords of a call go to the model. Conditions of one shape make one batched call of the
    model, [uncond, cond]; others (77 and 154 tokens, dictionaries) two.

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
        start: S-CFG acts from this fraction of the noise levels on; plain guidance before it.
        stop: It acts until this fraction.
        every: Regions are found on every so many noise levels, and kept in between.
        unet: The module whose attention is recorded, where it is not within ``model``.

    Raises:
        ValueError: No transformer block found, or an argument missing or out of range.
        RuntimeError: On a call: see `scfg.recording.recorder.AttentionRecorder.finish`.
    """

    def __init__(
        self,
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
    ):
        unet = model if unet is None else unet
        if not isinstance(unet, nn.Module):
            raise ValueError(f"unet must be given with a model that is a {type(model).__name__}")
        self.steps = Steps(config, backend, callback, start, stop, every)
        if sigmas is None and not self.steps.always:
            raise ValueError("start, stop and every need sigmas, the schedule of the sampler")
        self.model, self.guidance_scale, self.token_weights = model, guidance_scale, token_weights
        self._levels = [] if sigmas is None else sigmas.tolist()
        self._last = len(self._levels)
        self._recorder = AttentionRecorder(unet, config, backend)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor, uncond, cond, **extra) -> Tensor:
        """The guided prediction at noise levels sigma (b,)."""
        acts, finds = self._plan(sigma)
        together = isinstance(cond, Tensor) and isinstance(uncond, Tensor)
        if together and uncond.shape == cond.shape:
            twice, levels = torch.cat([x, x]), torch.cat([sigma, sigma])
            both, evidence = self._predict(finds, twice, levels, torch.cat([uncond, cond]), extra)
            pair, b = both.chunk(2), len(x)
            branches = (evidence.rows(0, b), evidence.rows(b, 2 * b)) if finds else None
        else:
            calls = [self._predict(finds, x, sigma, c, extra) for c in (uncond, cond)]
            pair, branches = zip(*calls, strict=True)
        if not acts:
            return cfg(*pair, self.guidance_scale)
        branches = branches if finds else None
        return self.steps.guide(*pair, branches, self.guidance_scale, self.token_weights).eps

    def _plan(self, sigma: Tensor) -> tuple[bool, bool]:
        """Whether S-CFG acts on a call, and whether it then finds regions."""
        if self.steps.always:
            return True, True
        place = self.steps.place(float(sigma.flatten()[0]), self._levels)
        if place[0] < self._last:  # the noise has risen: another run
            self.steps.forget()
        self._last = place[0]
        acts = self.steps.acts(*place)
        return acts, acts and self.steps.finds(*place)

    def _predict(
        self, finds: bool, x: Tensor, sigma: Tensor, condition, extra: dict
    ) -> tuple[Tensor, Evidence | None]:
        if not finds:
            return self.model(x, sigma, cond=condition, **extra), None
        self._recorder.start(x)
        try:
            prediction = self.model(x, sigma, cond=condition, **extra)
            return prediction, self._recorder.finish()
        finally:
            self._recorder.abort()

    def remove(self) -> None:
        """Leave the model exactly as it was found."""
        self._recorder.remove()

    def __enter__(self) -> "Denoiser":
        return self

    def __exit__(self, *_) -> None:
        self.remove()


denoiser = Denoiser  # named as the functions of k-diffusion are
