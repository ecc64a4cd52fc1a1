"""The U-Net of a pipeline of diffusers, call by call: recorded, and its output rewritten.

The pipeline computes ``u + g (c - u)``. The unconditional half of what its U-Net returns becomes
``u' = c - (c - u) (g rate - 1) / (g - 1)``, so that this formula gives ``u + g rate (c - u)``. The
text half is left alone, and with it ``guidance_rescale``, perturbed-attention guidance and
DeepFloyd IF's variance.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from scfg.adapters.around import around, mark
from scfg.adapters.formula import Formula
from scfg.recording.phrases import phrase_weights
from scfg.recording.recorder import AttentionRecorder
from scfg.recording.run import Run

LATENT = "latent_channels"


class AttachedUNet:
    """Hooks around the U-Net of one pipeline, and what they have to know about its run."""

    def __init__(self, pipe, guidance_scale, run: Run, token_weights, observe: bool):
        self.pipe, self.guidance_scale, self.run = pipe, guidance_scale, run
        self.observe = observe
        by_phrase = isinstance(token_weights, Mapping)
        self.phrases: Mapping[str, float] = token_weights if by_phrase else {}
        self.token_weights = None if by_phrase else token_weights
        self.recorder: AttentionRecorder | None = None
        self.acting = self.recording = False
        self._undo: list[Callable[[], object]] = []
        self._schedule, self._levels = None, []  # noise levels of the run at hand
        self._checked: tuple | None = None  # shape of the last batch found to be in two halves
        self._calls = self._acted = 0
        self._formula = Formula(pipe)

    def add(self, unet: nn.Module) -> None:
        """Put the hooks on."""
        self._undo.append(mark(unet))
        self.recorder = self.run.recorder(unet)
        self._undo.append(self.recorder.remove)
        self._undo.append(around(unet, self.before, self.after, self.recorder.abort))
        self._undo.append(self._formula.forget)
        if self.phrases:
            self._read_prompts()

    def warn_if_idle(self) -> None:
        """Warn where S-CFG did nothing although the guidance scale asks for it."""
        try:
            asked = self._given_scale() > 1
        except RuntimeError:  # the pipeline did not run
            return
        if asked and self._calls and not self._acted:
            warnings.warn(
                f"S-CFG acted on none of {self._calls} calls of the U-Net: "
                f"{type(self.pipe).__name__} says that it does not guide "
                "(do_classifier_free_guidance)",
                stacklevel=5,
            )

    def remove(self) -> None:
        """Take everything off."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _read_prompts(self) -> None:
        """Look the phrases up in the prompt of every call, as it is encoded."""
        pipe, encode = self.pipe, self.pipe.encode_prompt
        parameters = inspect.signature(encode)
        convert = getattr(pipe, "maybe_convert_prompt", lambda prompt, tokenizer: prompt)

        def encode_prompt(*args, **kwargs):
            prompt = parameters.bind(*args, **kwargs).arguments.get("prompt")
            if prompt is None:
                raise ValueError(
                    "token_weights by phrase need the prompt, the call has only its embeddings; "
                    "give a tensor of weights (see scfg.recording.phrases.phrase_weights)"
                )
            prompt = convert(prompt, pipe.tokenizer)
            self.token_weights = phrase_weights(pipe.tokenizer, prompt, self.phrases)
            return encode(*args, **kwargs)

        pipe.encode_prompt = encode_prompt
        self._undo.append(lambda: vars(pipe).pop("encode_prompt"))

    def _scale(self) -> float:
        """The guidance scale of the call at hand; 1 where it is not guided."""
        scale = self._given_scale()
        return scale if getattr(self.pipe, "do_classifier_free_guidance", scale > 1) else 1.0

    def _given_scale(self) -> float:
        """The guidance scale that the pipeline or the caller names."""
        if self.guidance_scale is not None:
            return float(self.guidance_scale)
        try:
            return float(self.pipe.guidance_scale)
        except (AttributeError, TypeError) as error:
            raise RuntimeError(
                f"{type(self.pipe).__name__} must set its guidance_scale to a number: {error}"
            ) from error

    def _parts(self) -> int:
        """Branches in a batch; the third is perturbed attention."""
        return 3 if getattr(self.pipe, "do_perturbed_attention_guidance", False) else 2

    def _step(self, t: Tensor | float) -> tuple[int, int]:
        """Number of a timestep among the noise levels of its run, and how many those are."""
        schedule = self.pipe.scheduler.timesteps
        if schedule is not self._schedule:  # schedulers make a new one for each run
            self._schedule = schedule
            self.run.begin()
            levels = [float(level) for level in schedule]
            if float(t) not in levels:
                raise RuntimeError(
                    f"start, stop and every need a U-Net that is given the scheduler's timesteps, "
                    f"that of {type(self.pipe).__name__} got {float(t):g}"
                )
            begin = levels.index(float(t))
            count = getattr(self.pipe, "num_timesteps", None) or len(levels)
            self._levels = list(dict.fromkeys(levels[begin : begin + count]))
        return self._levels.index(float(t)), len(self._levels)

    def before(self, args: tuple, kwargs: dict) -> None:
        """Decide whether S-CFG acts on this call, and start recording."""
        self.recorder.abort()
        self._formula.forget()
        self.acting = self._scale() > 1
        if self.acting and not self.run.always:
            t = kwargs["timestep"] if "timestep" in kwargs else args[1]
            step, steps = self._step(t)
            self.acting = self.run.acts_at(step, steps)
            self.recording = self.acting and self.run.records_at(step, steps)
        else:
            self.recording = self.acting
        if self.acting:
            sample = kwargs["sample"] if "sample" in kwargs else args[0]
            self._check(sample)
            if self.recording:
                self.recorder.start(sample)
        self._calls += 1
        self._acted += self.acting

    def _check(self, sample: Tensor) -> None:
        """Raise unless a batch is [unconditional, text] of the same latents."""
        if sample.shape == self._checked:  # once, for it waits for the device
            return
        if sample.dim() != 4:
            raise RuntimeError(
                f"the U-Net of {type(self.pipe).__name__} must be called with a latent "
                f"(b, c, H, W), got shape {tuple(sample.shape)}; video is not supported"
            )
        parts = sample.chunk(self._parts())
        if len(parts) != self._parts() or not all(
            part.shape == parts[0].shape and part.equal(parts[0]) for part in parts
        ):
            raise RuntimeError(
                f"the U-Net of {type(self.pipe).__name__} must be called with the same latents for "
                f"each of {self._parts()} branches, [unconditional, text]; got another batch of "
                f"shape {tuple(sample.shape)}"
            )
        self._checked = sample.shape

    def after(self, output):
        """Rewrite what the U-Net returned."""
        if not self.acting:
            return output
        if isinstance(output, tuple):
            return (self.rewrite(output[0]), *output[1:])
        if isinstance(output, Tensor):
            return self.rewrite(output)
        return dataclasses.replace(output, sample=self.rewrite(output.sample))

    def rewrite(self, prediction: Tensor) -> Tensor:
        """The prediction with another unconditional part."""
        scale, b = self._scale(), len(prediction) // self._parts()
        eps = prediction[:, : self._channels(prediction)]
        uncond, text = eps[:b], eps[b : 2 * b]
        if self.recording:
            evidence = self.recorder.finish()
            self.run.keep_evidence(uncond=evidence.rows(0, b), text=evidence.rows(b, 2 * b))
        guided = self.run.guide(uncond, text, scale, self.token_weights)
        rate = guided.rate
        if self.observe:
            return prediction
        self._formula.expect(guided.eps, text, scale)
        wide = text.to(rate.dtype)
        gap = (wide - uncond.to(rate.dtype)) * ((scale * rate - 1) / (scale - 1))
        rewritten = prediction.clone()
        rewritten[:b, : eps.shape[1]] = (wide - gap).to(prediction.dtype)
        return rewritten

    def _channels(self, prediction: Tensor) -> int:
        """Channels that are guided; others are a variance, or unused."""
        channels = prediction.shape[1]
        for name in ("vae", "movq"):
            latent = getattr(getattr(getattr(self.pipe, name, None), "config", None), LATENT, None)
            if latent is not None:
                return min(latent, channels)
        kind = getattr(self.pipe.scheduler.config, "variance_type", None)
        return channels // 2 if channels == 6 or kind in ("learned", "learned_range") else channels
