"""S-CFG as a guider of diffusers' modular pipelines.

pipe.update_components(guider=SemanticGuidance(guidance_scale=7.5))
"""

import dataclasses
from collections.abc import Callable

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput, rescale_noise_cfg
from torch import Tensor, nn

from scfg import checks
from scfg.adapters.around import around
from scfg.config import SCFGConfig
from scfg.evidence import Evidence
from scfg.guidance import Guided
from scfg.patches import needs_uncond
from scfg.recording.layouts import Grid, Layout, find_layout
from scfg.recording.packing import repack, unpack
from scfg.recording.phrases import refuse_phrases
from scfg.recording.recorder import AttentionRecorder
from scfg.recording.replayed import TransformerRecorder
from scfg.recording.run import Run


class SemanticGuidance(ClassifierFreeGuidance):
    """Semantic-aware classifier-free guidance.

    The pipeline calls its network, a U-Net or a transformer, for the text, then for the
    unconditional branch; hooks that record attention are on it from the first guided step of a run
    to the last, or until an error. A guider is not told the prompt: each column of a transformer's
    text counts as a word.

    Args:
        guidance_scale: > 0.
        guidance_rescale: As in ClassifierFreeGuidance.
        use_original_formulation: As there: guidance_scale counts from the text prediction.
        start: Fraction of the steps before which there is no guidance at all, as there.
        stop: Fraction of the steps after which there is none.
        enabled: Whether there is any.
        scfg_config: Constants: an SCFGConfig or its fields; None for the defaults.
        backend: See `scfg.ops`.
        every: Regions are found on every so many steps, and kept in between.
        token_weights: t numbers, or a list of them per prompt, multiply the rate of each token's
            region; see `scfg.recording.phrases.phrase_weights`.
        callback: Called with the `Guided` of every guided step. It is not saved.

    Raises:
        ValueError: guidance_scale, a constant, every, start or stop is out of range.
        TypeError: guidance_scale, start or stop is no number, or token_weights are phrases.
    """

    ignore_for_config = ["callback"]  # noqa: RUF012  (the host reads it from the class)

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        scfg_config: SCFGConfig | dict | None = None,
        backend: str = "auto",
        every: int = 1,
        token_weights: list | Tensor | None = None,
        callback: Callable[[Guided], object] | None = None,
    ):
        checks.guidance_scale(guidance_scale)
        refuse_phrases(token_weights)
        for name, share in (("start", start), ("stop", stop)):
            checks.real(share, name)
        super().__init__(
            guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled
        )
        if not isinstance(scfg_config, SCFGConfig):
            scfg_config = SCFGConfig(**(scfg_config or {}))
        weights = None if token_weights is None else torch.as_tensor(token_weights)
        self.register_to_config(  # as JSON can hold it
            scfg_config=dataclasses.asdict(scfg_config),
            token_weights=None if weights is None else weights.tolist(),
        )
        self._weights = weights
        self._run = Run(scfg_config, backend, callback, every=every)
        self._unet: nn.Module | None = None  # with hooks on; a U-Net or a transformer
        self._recorder: AttentionRecorder | TransformerRecorder | None = None
        self._layout: Layout | None = None  # of a transformer
        self._grid: Grid | None = None
        self._remove_hooks: Callable | None = None
        self._evidence: dict[str, Evidence] = {}  # by name of the prediction
        self._recording: str | None = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """Begin a step."""
        if self._step is None or step <= self._step:
            self._run.begin()
        super().set_state(step, num_inference_steps, timestep)
        self._evidence = {}

    def _records(self) -> bool:
        """Whether regions are found on this step."""
        total = self._num_inference_steps or 1
        return self._run.records_at((self._step or 0) - int(self._start * total), total)

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Get ready to record the next call of the network."""
        super().prepare_models(denoiser)
        if not self._is_cfg_enabled() or not self._records():
            return
        if self._unet is not denoiser:
            self.remove()
            self._layout = find_layout(denoiser)
            self._recorder = self._new_recorder(denoiser)
            self._remove_hooks = around(denoiser, self._before, self._after, self.remove)
            self._unet = denoiser
        prediction = self._input_predictions[self._count_prepared - 1]
        if prediction == "pred_cond" or self._layout is None or needs_uncond(self._run.config):
            self._recording = prediction

    def _new_recorder(self, denoiser: nn.Module) -> AttentionRecorder | TransformerRecorder:
        if self._layout is None:
            return self._run.recorder(denoiser)
        return TransformerRecorder(denoiser, self._run.config, self._run.backend)

    def _before(self, args: tuple, kwargs: dict) -> None:
        if self._recording is None:
            return
        if self._layout is None:
            self._recorder.start(kwargs["sample"] if "sample" in kwargs else args[0])
        else:
            self._recorder.start(args, kwargs)
            self._grid = self._recorder.grid

    def _after(self, output):
        if self._recording is not None:
            try:
                self._evidence[self._recording] = self._recorder.finish()
            except RuntimeError:
                self.remove()
                raise
            self._recording = None
        return output

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """The guided prediction of one step, (b, c, H, W).

        Args:
            pred_cond: (b, c, H, W); of a transformer in the form that its pipeline gives it.
            pred_uncond: Likewise, None where there is no guidance.

        Returns:
            GuiderOutput: pred, pred_cond, pred_uncond.

        Raises:
            RuntimeError: The network was not called between prepare_models and here.
        """
        if not self._is_cfg_enabled():
            return super().forward(pred_cond, pred_uncond)
        scale = self.guidance_scale + (1.0 if self.use_original_formulation else 0.0)
        try:
            pred = self._guide(pred_uncond, pred_cond, scale)
        except Exception:
            self.remove()
            raise
        if self.guidance_rescale > 0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        self._leave_after_last_step()
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _guide(self, pred_uncond: Tensor, pred_cond: Tensor, scale: float) -> Tensor:
        uncond, text = (self._evidence.pop(f"pred_{name}", None) for name in ("uncond", "cond"))
        if self._records():
            lacks_uncond = self._layout is None or needs_uncond(self._run.config)
            if text is None or (uncond is None and lacks_uncond):
                raise RuntimeError(
                    "the network must be called once for each branch; a call is missing"
                )
            self._run.keep_evidence(uncond=uncond, text=text)
        if self._layout is None:
            return self._run.guide(pred_uncond, pred_cond, scale, self._weights).eps
        both = (unpack(x, self._layout, self._grid) for x in (pred_uncond, pred_cond))
        eps = self._run.guide(*both, scale, self._weights).eps
        return repack(eps, pred_cond, self._layout, self._grid)

    def _leave_after_last_step(self) -> None:
        total = self._num_inference_steps
        if total is None or self._step + 1 >= int(self._stop * total):
            self.remove()

    def remove(self) -> None:
        """Leave the network as it was found; needed only after a run that was interrupted."""
        if self._unet is not None:
            self._remove_hooks()
            self._recorder.remove()
        self._unet = self._recorder = self._remove_hooks = self._recording = None
