"""S-CFG on a ModelPatcher: what ComfyUI calls during a run, and what is kept between the calls.

Attention is recorded by hooks that the patcher puts on and off (an injection); prompts are told
apart by the ids that ComfyUI gives them, whatever it puts into one batch; predictions are changed
in "pre-CFG" functions, of which ComfyUI keeps a list: ``cond' = uncond + rate (cond - uncond)``.
Its guidance itself may be anybody's; the places that hold one function only
("sampler_cfg_function", the model's wrapper) are left to others. Everything registered is a
closure, for patchers are cloned, and copies of objects would lose touch.
"""

import dataclasses
import uuid
from collections.abc import Callable

import torch
from torch import Tensor, nn

from scfg.adapters.comfyui.regions import Part, compose
from scfg.config import SCFGConfig
from scfg.evidence import Evidence
from scfg.guidance import Guided
from scfg.recording.blocks import find_blocks
from scfg.recording.recorder import AttentionRecorder
from scfg.recording.run import Run

KEY = "semantic_cfg"
CHUNK = 77  # tokens that CLIP reads at a time, START first
PARTIAL = ("area", "mask", "timestep_start", "timestep_end", "default")  # of a prompt


def check_unet(model: nn.Module) -> None:
    """Raise unless ComfyUI's diffusion model is one whose attention can be recorded.

    Raises:
        ValueError: It is no U-Net, or has no transformer block.
    """
    if not hasattr(model, "input_blocks"):
        raise ValueError(
            f"{type(model).__name__} is not a U-Net: Semantic-aware CFG does not record ComfyUI's "
            "transformers (SD3, Flux, Qwen-Image, Lumina, Z-Image, Wan, ...) yet, and would be "
            "plain CFG. Take the node out, or use diffusers"
        )
    find_blocks(model)


class ComfyRun:
    """State of one patched model: of a run, of the step at hand, of each of its devices.

    Attributes:
        history: `Guided` of every step of the last run on which S-CFG acted; labels and foreground
            are per latent pixel.
    """

    def __init__(
        self,
        config: SCFGConfig,
        backend: str = "auto",
        start: float = 0.0,
        stop: float = 1.0,
        every: int = 1,
        token_weights: Tensor | None = None,
    ):
        self.run = Run(config, backend, self._keep, start, stop, every)
        self.token_weights = token_weights
        self.history: list[Guided] = []
        self.recorders: dict[nn.Module, AttentionRecorder] = {}
        self.begin_run()

    def _keep(self, guided: Guided) -> None:
        self.history.append(dataclasses.replace(guided, eps=guided.eps.new_empty(0)))

    def begin_run(self) -> None:
        """Forget the run before."""
        self.run.begin()
        self.history.clear()
        self.acts = self.records = False
        self.prompts: dict[uuid.UUID, tuple[int, dict]] = {}  # of the step: (0 text, 1 not), prompt
        self.seen: dict[uuid.UUID, Evidence] = {}

    def inject(self, patcher) -> None:
        """Put hooks on the U-Net of a patcher."""
        unet = patcher.model.diffusion_model
        self.recorders[unet] = self.run.recorder(unet)

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
        """
        if len(conds) < 2 or conds[0] is None or conds[1] is None:
            return conds  # not a guided prediction; the guided one may be waiting for its end
        self.acts = self.records = True
        if not self.run.always:
            schedule = options.get("sample_sigmas")
            if schedule is None:
                raise RuntimeError("start, stop and every need the sampler's schedule, it has none")
            levels = [level for level in schedule.tolist() if level > 0]
            step, steps = self.run.place(float(sigma.flatten()[0]), levels)
            self.acts = self.run.acts_at(step, steps)
            self.records = self.acts and self.run.records_at(step, steps)
        self.prompts, self.seen, told = {}, {}, []
        for branch, prompts in enumerate(conds):
            told.append(prompts and [self._tell_apart(branch, prompt) for prompt in prompts])
        return told

    def _tell_apart(self, branch: int, prompt: dict) -> dict:
        name, copy = prompt["uuid"], 0
        while name in self.prompts:  # ComfyUI cuts negative prompts to areas under one id
            copy += 1
            name = uuid.uuid5(prompt["uuid"], str(copy))
        self.prompts[name] = branch, prompt
        return {**prompt, "uuid": name} if copy else prompt

    def record(self, unet: nn.Module, call: Callable, x: Tensor, context: Tensor, options: dict):
        """Call a U-Net on x and context (b, t, c), and keep what each prompt attended to."""
        recorder = self.recorders.get(unet)
        names = options.get("uuids", [])
        wanted = [self.prompts.get(name, (2,))[0] < 2 for name in names]
        if recorder is None or not self.records or not any(wanted):
            return call()
        b = len(x) // len(names)
        try:
            recorder.start(x, self._owners(names, b, context))
            output = call()
            evidence = recorder.finish()
        finally:
            recorder.abort()
        for i, name in enumerate(names):
            self.seen[name] = evidence.rows(i * b, (i + 1) * b)
        return output

    def _length(self, name: uuid.UUID) -> int | None:
        """Tokens of a prompt, before ComfyUI repeats them to a common length."""
        prompt = self.prompts.get(name, (2, {}))[1].get("model_conds", {}).get("c_crossattn")
        return None if prompt is None else prompt.cond.shape[1]

    def _owners(self, names: list, b: int, context: Tensor) -> Tensor | None:
        """The token that every key counts to: repeats to the first, every START to START."""
        keys = torch.arange(context.shape[1])
        lengths = [self._length(name) or len(keys) for name in names]
        if len(keys) <= CHUNK and set(lengths) == {len(keys)}:
            return None
        rows = []
        for length in lengths:
            token = keys % length
            chunks = length > CHUNK and length % CHUNK == 0
            rows.append(token.where(token % CHUNK != 0, 0) if chunks else token)
        return torch.stack(rows).repeat_interleave(b, dim=0).to(context.device)

    def combine(self, conds: list, predictions: list, x: Tensor, scale: float, sigma: Tensor):
        """Predictions with S-CFG in them: the text's is changed.

        Args:
            conds: As ComfyUI has them.
            predictions: [text, unconditional, ...], each (b, c, H, W).
            x: (b, c, H, W) noisy latent.
            scale: Guidance scale.
            sigma: (b,) noise level.

        Returns:
            predictions.

        Raises:
            RuntimeError: A prompt was predicted without its attention being seen.
        """
        if conds[1] is None or not self.acts:
            return predictions
        text, uncond = predictions[:2]
        if self.records:
            parts = self._parts(x, sigma)
            regions = compose(
                uncond=parts[1],
                text=parts[0],
                size=tuple(x.shape[-2:]),
                config=self.run.config,
                backend=self.run.backend,
            )
            self.run.keep(regions)
            if self.token_weights is not None and len(parts[0]) > 1:
                raise ValueError("weights of phrases need one prompt, this image has several")
        self.acts = self.records = False
        rate = self.run.guide(uncond, text, scale, self.token_weights).rate
        changed = uncond + rate.to(text.dtype) * (text - uncond)
        return [changed, *predictions[1:]]

    def _parts(self, x: Tensor, sigma: Tensor) -> tuple[list[Part], list[Part]]:
        """The prompts of both branches that took part in the prediction."""
        branches = [], []
        for name, (branch, prompt) in self.prompts.items():
            if branch > 1:
                continue
            share = _share(prompt, x, sigma)
            if share is None:
                continue
            if name not in self.seen:
                raise RuntimeError(
                    "the attention of the U-Net was not seen: another node calls it another way, "
                    "or a torch.compile of it was made before"
                )
            evidence = self.seen[name].to(x.device)
            tokens = self._length(name) or evidence.tokens
            branches[branch].append(Part(evidence, tokens, *share))
        return branches


def _share(prompt: dict, x: Tensor, sigma: Tensor) -> tuple | None:
    """Area and weight of a prompt, None where it does not take part."""
    if not any(key in prompt for key in PARTIAL):
        return None, None
    from comfy.samplers import get_area_and_mult

    share = get_area_and_mult(prompt, x, sigma)
    if share is None:
        return None
    weight = share.mult[:, 0] * (1e-6 if "default" in prompt else 1)
    return None if share.area is None else tuple(share.area), weight
