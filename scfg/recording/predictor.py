"""Guided predictions for loops that call a model: S-CFG where a run acts, else plain CFG."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from scfg import checks
from scfg.config import SCFGConfig
from scfg.guidance import Guided, cfg
from scfg.recording.phrases import refuse_phrases
from scfg.recording.run import Run
from scfg.recording.wrapper import UNetWrapper


class Predictor:
    """Guided predictions of a loop that calls a model: S-CFG where the run acts, else plain CFG.

        prediction = predictor(x, level, uncond, cond)

    Conditions of one shape make one batched call of the model, [uncond, cond]; others (77 and 154
    tokens, dictionaries) two. Extra keywords of a call go to the model. What the model speaks (eps,
    v, x0, flow) does not matter: at one noise level differences are proportional, and rates are
    ratios.

    With a window or kept regions the predictor has to know its run. A new one begins where noise
    rises, the conditions are other objects, or the batch has another shape; else say `begin`.

    Args:
        model: ``(x, level, condition, **extra) -> prediction``, (b, c, H, W).
        unet: The module within model whose attention is recorded.
        guidance_scale: Float or (b,) tensor, > 0.
        run: Window, kept regions and callback.
        token_weights: (t,) or (prompts, t) multiplies the rate of each token's region, or None.
        levels: Levels that the loop visits, falling; needed unless every step is the same.
        observe: Only look: the callback gets what S-CFG would do, predictions are plain CFG.

    Attributes:
        unet: The `UNetWrapper`.

    Raises:
        ValueError: No transformer block found, or levels missing; on a call: a condition has
            another number of rows than x.
        TypeError: guidance_scale is no number, or token_weights no tensor.
        RuntimeError: On a call: see `AttentionRecorder.finish`.
    """

    def __init__(
        self,
        model: Callable,
        unet: nn.Module,
        guidance_scale: float | Tensor,
        run: Run,
        token_weights: Tensor | None = None,
        levels: Sequence[float] | None = None,
        observe: bool = False,
    ):
        if levels is None and not run.always:
            raise ValueError("start, stop and every need the levels that the loop visits, got none")
        checks.guidance_scale(guidance_scale)
        refuse_phrases(token_weights)
        self.model, self.guidance_scale, self.run = model, guidance_scale, run
        self.token_weights, self.observe = token_weights, observe
        self.unet = UNetWrapper(unet, run.config, run.backend)
        self._levels = levels
        self.begin()

    def begin(self) -> None:
        """Begin a new run: regions of the one before are forgotten."""
        self.run.begin()
        self._step, self._of = 0, (None, None, None)

    def _plan(self, x: Tensor, level, uncond, cond) -> tuple[bool, bool]:
        """Whether S-CFG acts on a call, and whether it then finds regions."""
        if self.run.always:
            return True, True
        level = float(level.flatten()[0]) if isinstance(level, Tensor) else float(level)
        step, steps = self.run.place(level, self._levels)
        shape, *conditions = self._of
        same = x.shape == shape and conditions[0] is uncond and conditions[1] is cond
        if step < self._step or not same:
            self.begin()
        self._step, self._of = step, (x.shape, uncond, cond)
        acts = self.run.acts_at(step, steps)
        return acts, acts and self.run.records_at(step, steps)

    @torch.no_grad()
    def __call__(self, x: Tensor, level, uncond, cond, **extra) -> Tensor:
        """The guided prediction (b, c, H, W) of x at a level: a number, 0-d or (b,)."""
        for name, condition in (("uncond", uncond), ("cond", cond)):
            if isinstance(condition, Tensor) and len(condition) != len(x):
                raise ValueError(
                    f"{name} must have as many rows as x, {len(x)}, got {len(condition)}"
                )
        acts, records = self._plan(x, level, uncond, cond)

        def call(x: Tensor, level, condition) -> Tensor:
            if not records:
                return self.model(x, level, condition, **extra)
            return self.unet.record(x, lambda: self.model(x, level, condition, **extra))

        if isinstance(cond, Tensor) and isinstance(uncond, Tensor) and cond.shape == uncond.shape:
            many = isinstance(level, Tensor) and level.dim() > 0
            twice = torch.cat([level, level]) if many else level
            both = call(torch.cat([x, x]), twice, torch.cat([uncond, cond]))
            eps_uncond, eps_text = both.chunk(2)
        else:
            eps_uncond, eps_text = (call(x, level, condition) for condition in (uncond, cond))
        if records:
            branches = self.unet.branches(len(x))
            self.run.keep_evidence(uncond=branches["uncond"], text=branches["text"])
        if acts:
            guided = self.run.guide(eps_uncond, eps_text, self.guidance_scale, self.token_weights)
            if not self.observe:
                return guided.eps
        return cfg(eps_uncond, eps_text, self.guidance_scale)

    def remove(self) -> None:
        """Leave the U-Net exactly as it was found."""
        self.unet.remove()
        self.begin()

    def __enter__(self) -> "Predictor":
        return self

    def __exit__(self, *_) -> None:
        self.remove()


def guided(
    unet: nn.Module,
    guidance_scale: float | Tensor = 7.5,
    config: SCFGConfig = SCFGConfig(),  # noqa: B008  (frozen)
    backend: str = "auto",
    callback: Callable[[Guided], None] | None = None,
    token_weights: Tensor | None = None,
    timesteps: Sequence[float] | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    every: int = 1,
) -> Predictor:
    """A predictor ``(x, t, uncond, cond) -> eps`` with S-CFG, for any sampler loop.

    Args:
        unet: Called as ``unet(x, t, context)``; its output is a tensor or has ``.sample``.
        guidance_scale: Float or (b,) tensor, > 0.
        config: Constants.
        backend: See `scfg.ops`.
        callback: Called with the `Guided` of every step on which S-CFG acted.
        token_weights: See `Predictor`.
        timesteps: Those the loop visits, falling; needed by start, stop and every.
        start: See `Run`.
        stop: See `Run`.
        every: See `Run`.

    Returns:
        The predictor; ``remove()`` it when done, or use it in a ``with`` block.

    Raises:
        ValueError: No transformer block found, or an argument missing or out of range.
    """

    def model(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        output = unet(x, t, context)
        return output if isinstance(output, Tensor) else output.sample

    run = Run(config, backend, callback, start, stop, every)
    return Predictor(model, unet, guidance_scale, run, token_weights, timesteps)
