"""Images from prompts, with plain CFG or S-CFG, and what guidance did at every step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scfg import sampling
from scfg.config import SCFGConfig
from scfg.guidance import Guided, cfg
from scfg.models.embedded import ShapesModel
from scfg.models.text import END, START
from scfg.recording.phrases import find_phrase
from scfg.recording.recorder import AttentionRecorder
from scfg.recording.run import Steps

METHODS = ("cfg", "scfg")
SAMPLERS = ("ddim", "dpmpp_2m", "euler", "euler_ancestral")
SHAPES_CONFIG = SCFGConfig(map_reduction=1, coarsest_reduction=2)  # its grid is 16 x 16 and 8 x 8


@dataclass(frozen=True, eq=False)
class Step:
    """One denoising step of b images, on the CPU.

    Where plain CFG acted, regions and rate are those that S-CFG would have used.

    Attributes:
        t: Timestep.
        x0: (b, 3, 64, 64) float32 in [-1, 1], the image that the guided prediction points to.
        labels: (b, h, w) int64, position of the token that owns each patch.
        foreground: (b, h, w) bool.
        rate: (b, H, W) float32, multiplier of the guidance scale at each latent pixel.
    """

    t: int
    x0: Tensor
    labels: Tensor
    foreground: Tensor
    rate: Tensor


@dataclass(frozen=True, eq=False)
class Generated:
    """Result of `generate`, on the CPU.

    Attributes:
        method: One of `METHODS`.
        prompts: b prompts.
        seeds: b seeds.
        words: Per image, the word at every token position; None at START, END and padding.
        images: (b, 3, 64, 64) float32 in [-1, 1].
        trace: One `Step` per denoising step, in the order of sampling; empty unless asked for.
    """

    method: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    words: tuple[tuple[str | None, ...], ...]
    images: Tensor
    trace: tuple[Step, ...]


@torch.no_grad()
def generate(
    model: ShapesModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    method: str = "scfg",
    guidance_scale: float = 2.5,
    steps: int = 50,
    sampler: str = "ddim",
    config: SCFGConfig = SHAPES_CONFIG,
    backend: str = "auto",
    trace: bool = False,
    callback: Callable[[], object] | None = None,
    token_weights: Mapping[str, float] | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    every: int = 1,
) -> Generated:
    """Draw one image per prompt, all in one batch.

    Image i starts from noise of seeds[i] alone: the same noise whatever the method and the batch.

    Args:
        model: The model, on any device.
        prompts: b prompts.
        seeds: b seeds, one per prompt.
        method: One of `METHODS`.
        guidance_scale: > 0; 1 is no guidance.
        steps: Number of predictions.
        sampler: One of `SAMPLERS`.
        config: Constants of S-CFG.
        backend: See `scfg.ops`.
        trace: Keep every step. Plain CFG then records attention too, only to be looked at.
        callback: Called after every step.
        token_weights: Factors of the rates of phrases, as ``{"blue square": 1.5}``.
        start: S-CFG acts from this fraction of the steps on; plain CFG before it.
        stop: It acts until this fraction.
        every: Regions are found on every so many steps and kept in between.

    Returns:
        Generated.

    Raises:
        ValueError: A prompt has a word the model does not know, a phrase is in no prompt, an
            argument is out of range, or a sampler that draws noise on its way is given several
            images, whose noise would then depend on each other.
    """
    check_request(prompts, seeds, method=(method, METHODS), sampler=(sampler, SAMPLERS))
    if sampler == "euler_ancestral" and len(prompts) > 1:
        raise ValueError(f"sampler {sampler!r} draws one image at a time, got {len(prompts)}")

    context = torch.cat([model.encode([""] * len(prompts)), model.encode(prompts)])  # (2b, t, d)
    rule = Steps(config, backend, None, start, stop, every)
    weights = None if token_weights is None else _weights(model, prompts, token_weights)
    guidance = (guidance_scale, rule, weights)
    predict = _Predictor(model, context, steps, *guidance, acts=method == "scfg", looks=trace)
    history: list[Step] = []

    def after(i: int, t: int, x: Tensor, eps: Tensor) -> None:
        if trace:
            history.append(_step(model, t, x, eps, predict.guided))
        if callback is not None:
            callback()

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
    noise = noise.to(context.device)  # drawn on the CPU: the same there and on a GPU
    options = {"generator": generators[0], "callback": after}
    try:
        latents = getattr(sampling, sampler)(predict, noise, model.schedule, steps, **options)
    finally:
        predict.remove()
    words = tuple(_words(model, prompt) for prompt in prompts)
    images = model.decode(latents).cpu()
    return Generated(method, tuple(prompts), tuple(seeds), words, images, tuple(history))


def check_request(
    prompts: Sequence[str], seeds: Sequence[int], **choices: tuple[object, Sequence]
) -> None:
    """Check what every way to generate is asked for.

    Args:
        prompts: b prompts.
        seeds: b seeds.
        choices: By name of the argument, what was chosen and what can be.

    Raises:
        ValueError: There is no prompt, or not one seed for each, or a choice is none of the known.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"seeds must be one per prompt, got {len(seeds)} for {len(prompts)}")
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")


class _Predictor:
    """Guided predictions of one drawing: S-CFG where it acts, else plain CFG.

    Attributes:
        guided: S-CFG of the last step on which it acted or, with looks, of the last step.
    """

    def __init__(
        self,
        model: ShapesModel,
        context: Tensor,
        steps: int,
        guidance_scale: float,
        rule: Steps,
        weights: Tensor | None,
        acts: bool,
        looks: bool,
    ):
        self.model, self.context, self.steps = model, context, steps
        self.guidance_scale, self.rule, self.weights = guidance_scale, rule, weights
        self.acts, self.looks = acts, looks
        self.guided: Guided | None = None
        self._numbers = iter(range(steps))
        self._recorder = None
        if acts or looks:
            self._recorder = AttentionRecorder(model.unet, rule.config, rule.backend)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction eps (b, c, H, W) for a latent x at timesteps t (b,)."""
        i = next(self._numbers)
        acts = self.acts and self.rule.acts(i, self.steps)
        looks = acts or self.looks
        finds = looks and self.rule.finds(i, self.steps)
        both = torch.cat([x, x])
        if finds:
            self._recorder.start(both)
        eps_uncond, eps_text = self.model.unet(both, torch.cat([t, t]), self.context).chunk(2)
        if looks:
            branches = None
            if finds:
                evidence, b = self._recorder.finish(), len(x)
                branches = evidence.rows(0, b), evidence.rows(b, 2 * b)
            settings = (branches, self.guidance_scale, self.weights)
            self.guided = self.rule.guide(eps_uncond, eps_text, *settings)
        return self.guided.eps if acts else cfg(eps_uncond, eps_text, self.guidance_scale)

    def remove(self) -> None:
        """Leave the model as it was found."""
        if self._recorder is not None:
            self._recorder.remove()


def _step(model: ShapesModel, t: int, x: Tensor, eps: Tensor, guided: Guided) -> Step:
    abar = model.schedule.alphas_cumprod[t].item()
    x0 = model.decode((x - (1 - abar) ** 0.5 * eps) / abar**0.5)
    rest = (x0, guided.labels, guided.foreground, guided.rate[:, 0])
    return Step(t, *(tensor.cpu() for tensor in rest))


def _weights(
    model: ShapesModel, prompts: Sequence[str], token_weights: Mapping[str, float]
) -> Tensor:
    """Weights of tokens (b, t), 1 where no phrase is."""
    texts = [model.tokenizer.tokens(prompt) for prompt in prompts]
    table = torch.ones(len(texts), len(texts[0]))
    for phrase, weight in token_weights.items():
        words = phrase.lower().split()
        spans = [(row, i) for row, text in enumerate(texts) for i in find_phrase(text, words)]
        if not words or not spans:
            raise ValueError(
                f"token_weights has the phrase {phrase!r}, which is not in {list(prompts)}"
            )
        for row, i in spans:
            table[row, i : i + len(words)] = weight
    return table


def _words(model: ShapesModel, prompt: str) -> tuple[str | None, ...]:
    tokens = model.tokenizer.tokens(prompt)
    return tuple(None if token in (START, END) else token for token in tokens)
