"""S-CFG in diffusers' pipelines with a transformer: `scfg.adapters.diffusers.attach` goes on here.

Hooks on the transformer do what `scfg.adapters.branches` says; what is decided once for a pipeline,
its prompts, scale and steps, is here.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from scfg import checks
from scfg.adapters.around import around, is_marked, mark
from scfg.adapters.branches import Branches, calls_of
from scfg.recording.layouts import find_layout
from scfg.recording.run import Run
from scfg.recording.words import Prompt, read_prompt


def transformers_of(pipe) -> list[nn.Module]:
    """The transformers of a pipeline, Wan 2.2 has two."""
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return [module for module in found if isinstance(module, nn.Module)]


@contextmanager
def attach_transformers(
    pipe, guidance_scale: float | None, run: Run, token_weights, observe: bool
) -> Iterator[None]:
    """`scfg.adapters.diffusers.attach` for a pipeline with transformers.

    Raises:
        ValueError: A transformer is not known or is attached to already; guidance_scale is missing,
            superfluous or not > 0.
    """
    models = transformers_of(pipe)
    for model in models:
        if is_marked(model):
            raise ValueError(
                "pipe.transformer is guided already, by another attach that has not ended"
            )
    tells = calls_of(models[0]).told and hasattr(type(pipe), "guidance_scale")
    if tells == (guidance_scale is not None):
        need = "be None, for it is read from the pipeline" if tells else "be given as in the call"
        name = "" if tells else " (true_cfg_scale, where the call has one)"
        raise ValueError(f"guidance_scale must {need}{name}: {type(pipe).__name__}")
    if guidance_scale is not None:
        checks.positive(guidance_scale, "guidance_scale")
    attached = AttachedTransformers(pipe, guidance_scale, run, token_weights, observe)
    try:
        attached.add()
        yield
    finally:
        attached.remove()


class AttachedTransformers:
    """Hooks around the transformers of one pipeline, and what they know about its run."""

    def __init__(self, pipe, guidance_scale, run: Run, token_weights, observe: bool):
        self.pipe, self.guidance_scale, self.run = pipe, guidance_scale, run
        self.observe = observe
        self.phrases = token_weights if isinstance(token_weights, Mapping) else None
        self.token_weights: Tensor | None = None if self.phrases else token_weights
        self.prompts: list[Prompt] | None = None
        self.schedule, self.step = None, -1
        self.unguided = 0  # text calls since the last one that was followed by its other branch
        self.warned = False
        self.branches: list[Branches] = []
        self._undo: list[Callable[[], object]] = []

    def add(self) -> None:
        """Put the hooks on."""
        for model in transformers_of(self.pipe):
            self._undo.append(mark(model))
            branch = Branches(self, model)
            self.branches.append(branch)
            self._undo.append(branch.recorder.remove)
            self._undo.append(around(model, branch.before, branch.after, branch.forget))
        if hasattr(self.pipe, "encode_prompt"):
            self._read_prompts(find_layout(transformers_of(self.pipe)[0]).words)

    def remove(self) -> None:
        """Take everything off."""
        if self.unguided > 1:
            self.warn_unguided("no unconditional call came")
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def _read_prompts(self, places) -> None:
        """Note the prompt of each run, as it is encoded; a second encoding is the negative one."""
        pipe, encode = self.pipe, self.pipe.encode_prompt
        parameters = inspect.signature(encode)
        own = "encode_prompt" in vars(pipe)

        def encode_prompt(*args, **kwargs):
            if self.prompts is None or self.step >= 0:
                self.step = -1
                given = parameters.bind(*args, **kwargs).arguments
                self.prompts = self._prompts(given, places)
            return encode(*args, **kwargs)

        pipe.encode_prompt = encode_prompt
        if own:
            self._undo.append(lambda: setattr(pipe, "encode_prompt", encode))
        else:
            self._undo.append(lambda: vars(pipe).pop("encode_prompt"))

    def _prompts(self, given: Mapping, places) -> list[Prompt] | None:
        prompt = given.get("prompt")
        tokenizers = [getattr(self.pipe, place.tokenizer, None) for place in places]
        if prompt is None or None in tokenizers:
            if self.phrases:
                raise ValueError(
                    "token_weights by phrase need the prompt and its tokenizers, the call has only "
                    "its embeddings; give a tensor of weights"
                )
            return None
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        read = []
        for row in range(len(prompts)):
            texts = []
            for place in places:
                other = given.get(place.tokenizer.replace("tokenizer", "prompt")) or prompts
                texts.append(other if isinstance(other, str) else other[row])
            read.append(read_prompt(texts, places, tokenizers))
        return read

    def scale(self, model: nn.Module) -> float:
        """The scale g of the two branches at hand; 1 where the pipeline does not guide."""
        if self.guidance_scale is not None:
            return float(self.guidance_scale)
        second = model is getattr(self.pipe, "transformer_2", None)
        scale = getattr(self.pipe, "_guidance_scale_2", None) if second else None
        scale = float(self.pipe.guidance_scale if scale is None else scale)
        scale += calls_of(model).offset
        guides = getattr(self.pipe, "do_classifier_free_guidance", scale > 1)
        return scale if guides else 1.0

    def next_step(self) -> tuple[int, int]:
        """Number of the step that begins, and how many its run has."""
        schedule = self.pipe.scheduler.timesteps
        if schedule is not self.schedule:  # schedulers make a new one for each run
            self.schedule, self.step = schedule, -1
            self.run.begin()
        self.step += 1
        total = getattr(self.pipe, "num_timesteps", None) or len(schedule)
        return min(self.step, total - 1), total

    def warn_unguided(self, why: str) -> None:
        """Say once that the pipeline's own output is all there is."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"{type(self.pipe).__name__}: {why}, so S-CFG does nothing: there are not two "
                "branches. Guidance is off (Flux and Qwen-Image need true_cfg_scale > 1 and a "
                "negative prompt), or the checkpoint is distilled",
                stacklevel=2,
            )
