"""S-CFG on a ModelPatcher: what ComfyUI calls during a run, and what is kept between the calls.

Attention is recorded by hooks that the patcher puts on and off (an injection); prompts are told
apart by the ids that ComfyUI gives them, whatever it puts into one batch; predictions are changed
in "pre-CFG" functions, of which ComfyUI keeps a list: ``cond' = uncond + rate (cond - uncond)``.
Its guidance itself may be anybody's; the places that hold one function only
("sampler_cfg_function", the model's wrapper) are left to others. Everything registered is a
closure, for patchers are cloned, and copies of objects would lose touch.
"""

import dataclasses
import logging
import uuid
from collections.abc import Callable

from torch import Tensor, nn

from scfg.adapters.comfyui.layouts import kind_of
from scfg.adapters.comfyui.phrases import Prompt
from scfg.adapters.comfyui.recorders import (
    OTHER,
    TEXT,
    UNCOND,
    Share,
    TransformerCalls,
    UNetCalls,
)
from scfg.adapters.comfyui.regions import Part, compose
from scfg.config import SCFGConfig
from scfg.evidence import Evidence
from scfg.guidance import Guided
from scfg.patches import needs_uncond
from scfg.recording.run import Run

KEY = "semantic_cfg"
PARTIAL = ("area", "mask", "timestep_start", "timestep_end", "default")  # of a prompt


class ComfyRun:
    """State of one patched model: of a run, of the step at hand, of each of its devices.

    Attributes:
        history: `Guided` of every step of the last run on which S-CFG acted; labels and foreground
            are per latent pixel.
        tokens: Of the last run's text; of several prompts together.
    """

    def __init__(
        self,
        config: SCFGConfig,
        backend: str = "auto",
        start: float = 0.0,
        stop: float = 1.0,
        every: int = 1,
        prompt: Prompt | None = None,
    ):
        self.run = Run(config, backend, self._keep, start, stop, every)
        self.prompt = prompt
        self.history: list[Guided] = []
        self.tokens = 0
        self.recorders: dict[nn.Module, UNetCalls | TransformerCalls] = {}
        self.begin_run()

    def _keep(self, guided: Guided) -> None:
        self.history.append(dataclasses.replace(guided, eps=guided.eps.new_empty(0)))

    def begin_run(self) -> None:
        """Forget the run before."""
        self.run.begin()
        self.history.clear()
        self.acts = self.records = self.warned = False
        self.waiting: float | None = None  # noise level of a step that was not guided yet
        self.prompts: dict[uuid.UUID, tuple[int, dict]] = {}  # of the step: branch, prompt
        self.seen: dict[uuid.UUID, Evidence] = {}

    def inject(self, patcher) -> None:
        """Put hooks on the diffusion model of a patcher."""
        model = patcher.model.diffusion_model
        layout = kind_of(model).layout
        calls = (
            UNetCalls(model, self.run)
            if layout is None
            else TransformerCalls(model, self.run, layout)
        )
        self.recorders[model] = calls

    def eject(self, patcher) -> None:
        """Take them off."""
        recorder = self.recorders.pop(patcher.model.diffusion_model, None)
        if recorder is not None:
            recorder.remove()

    def begin_step(self, conds: list, sigma: Tensor, options: dict) -> list:
        """Decide what a prediction is for, and tell its prompts apart.

        Args:
            conds: ComfyUI's [prompts, negative prompts, ...], None where there are none.
            sigma: (b,) noise level.
            options: ``transformer_options``.

        Returns:
            conds, in which no two prompts have one id.

        Raises:
            RuntimeError: There is no schedule, or the step before was guided past S-CFG.
        """
        if len(conds) < 2 or conds[0] is None or conds[1] is None:
            return conds  # not a guided prediction; the guided one may be waiting for its end
        level = float(sigma.flatten()[0])
        if self.waiting not in (None, level):
            raise RuntimeError(
                "the guider of this workflow does not ask the model's pre-CFG functions (Dual CFG "
                "and Perp-Neg guiders do not), so that Semantic-aware CFG would do nothing"
            )
        self.acts = self.records = True
        if not self.run.always:
            schedule = options.get("sample_sigmas")
            if schedule is None:
                raise RuntimeError("start, stop and every need the sampler's schedule, it has none")
            step, steps = self.run.place(level, [x for x in schedule.tolist() if x > 0])
            self.acts = self.run.acts_at(step, steps)
            self.records = self.acts and self.run.records_at(step, steps)
        self.waiting = level if self.acts else None
        self.prompts, self.seen, told = {}, {}, []
        for branch, prompts in enumerate(conds):
            told.append(prompts and [self._tell_apart(branch, prompt) for prompt in prompts])
        return told

    def _tell_apart(self, branch: int, prompt: dict) -> dict:
        name, copy = prompt["uuid"], 0
        while name in self.prompts:  # ComfyUI cuts negative prompts to areas under one id
            copy += 1
            name = uuid.uuid5(prompt["uuid"], str(copy))
        self.prompts[name] = min(branch, OTHER), prompt
        return {**prompt, "uuid": name} if copy else prompt

    def record(self, model: nn.Module, call: Callable, x: Tensor, context: Tensor, options: dict):
        """``call(options)`` a diffusion model on latents x and texts context (b, t, c).

        What each prompt attended to is kept.
        """
        recorder = self.recorders.get(model)
        shares = [self._share_of(name) for name in options.get("uuids", [])]
        if recorder is None or not self.records or all(s.branch == OTHER for s in shares):
            return call(options)
        output, seen = recorder.record(call, x, context, options, shares)
        self.seen.update(seen)
        return output

    def _share_of(self, name: uuid.UUID) -> Share:
        branch, prompt = self.prompts.get(name, (OTHER, {}))
        context = prompt.get("model_conds", {}).get("c_crossattn")
        tokens = None if context is None else context.cond.shape[1]
        words = None
        if self.prompt is not None and branch == TEXT and tokens is not None:
            words = self.prompt.words(tokens)
        return Share(name, branch, tokens, words)

    def combine(self, conds: list, predictions: list, x: Tensor, scale: float, sigma: Tensor):
        """Predictions with S-CFG in them: the text's is changed.

        Args:
            conds: As ComfyUI has them.
            predictions: [text, unconditional, ...], each (b, c, H, W), or (b, c, f, H, W) of clips.
            x: Noisy latent of that shape.
            scale: Guidance scale.
            sigma: (b,) noise level.

        Returns:
            predictions.

        Raises:
            RuntimeError: A prompt was predicted without its attention being seen.
            ValueError: Words are known, but several prompts share the image.
        """
        self.waiting = None
        if conds[1] is None and not self.warned:
            self.warned = True
            logging.warning("Semantic-aware CFG does nothing: cfg is 1, there is no guidance")
        if conds[1] is None or not self.acts:
            return predictions
        single = x.dim() == 5 and x.shape[2] == 1  # an image, as models of clips have it
        text, uncond = (p[:, :, 0] if single else p for p in predictions[:2])
        if self.records:
            self._find_regions(x, sigma)
        self.acts = self.records = False
        weights = None if self.prompt is None else self.prompt.weights(self.tokens)
        rate = self.run.guide(uncond, text, scale, weights).rate
        changed = uncond + rate.to(text.dtype) * (text - uncond)
        return [changed[:, :, None] if single else changed, *predictions[1:]]

    def _find_regions(self, x: Tensor, sigma: Tensor) -> None:
        """Regions from now on are what this step's calls say."""
        parts = self._parts(x, sigma)
        if self.prompt is not None and len(parts[TEXT]) > 1:
            raise ValueError("prompt and phrases need one prompt, this image has several")
        regions = compose(
            uncond=parts[UNCOND],
            text=parts[TEXT],
            size=tuple(x.shape[-2:]),
            config=self.run.config,
            backend=self.run.backend,
        )
        self.tokens = regions.tokens
        self.run.keep(regions)

    def _parts(self, x: Tensor, sigma: Tensor) -> tuple[list[Part], list[Part]]:
        """The prompts of both branches that took part in the prediction."""
        branches = [], []
        for name, (branch, prompt) in self.prompts.items():
            share = None if branch == OTHER else _share(prompt, x, sigma)
            if share is None or not (branch == TEXT or self._needs_uncond):
                continue
            if name not in self.seen:
                raise RuntimeError(
                    "the attention of the model was not seen: another node calls it another way, "
                    "or a torch.compile of it was made before"
                )
            evidence = self.seen[name].to(x.device)
            tokens = self._share_of(name).tokens or evidence.tokens
            branches[branch].append(Part(evidence, tokens, *share))
        return branches

    @property
    def _needs_uncond(self) -> bool:
        """Whether the unconditional branch is recorded."""
        patches = [isinstance(calls, TransformerCalls) for calls in self.recorders.values()]
        return not any(patches) or needs_uncond(self.run.config)


def _share(prompt: dict, x: Tensor, sigma: Tensor) -> tuple | None:
    """Area (h, w, y, x) and weight of a prompt, None where it does not take part."""
    if not any(key in prompt for key in PARTIAL):
        return None, None
    from comfy.samplers import get_area_and_mult

    share = get_area_and_mult(prompt, x, sigma)
    if share is None:
        return None
    weight = share.mult[:, 0] * (1e-6 if "default" in prompt else 1)
    if weight.dim() == 4 and weight.shape[1] == 1:
        weight = weight[:, 0]
    if share.area is None:
        return None, weight
    half = len(share.area) // 2  # (f,) h, w, (first frame,) y, x
    return (*share.area[half - 2 : half], *share.area[-2:]), weight
