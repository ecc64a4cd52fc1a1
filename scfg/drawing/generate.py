"""What to draw and how, what came of it, and the embedded model drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scfg import checks, sampling
from scfg.config import SCFGConfig
from scfg.guidance import Guided, cfg
from scfg.models.embedded import EmbeddedModel
from scfg.models.text import END, START
from scfg.names import METHODS, SAMPLERS
from scfg.recording.phrases import weigh_phrases
from scfg.recording.predictor import Predictor
from scfg.recording.run import Run


@dataclass(frozen=True)
class Request:
    """Images to draw, all in one batch; image i starts from noise of seeds[i] alone.

    Attributes:
        prompts: b prompts.
        seeds: b seeds, one per prompt.
        guidance_scale: > 0; 1 is no guidance.
        method: One of `METHODS`.
        steps: Number of denoising steps.
        sampler: One of `SAMPLERS`.
        config: Constants of S-CFG; None: those that suit the model.
        backend: See `scfg.ops`.
        trace: Keep every step. Plain CFG then records attention too, only to be looked at.
        token_weights: Factors of the rates of phrases, as ``{"blue square": 1.5}``.
        start: See `Run`.
        stop: See `Run`.
        every: See `Run`.

    Raises:
        ValueError: There is no prompt, or not one seed for each, or a method or sampler is none of
            the known.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance_scale: float
    method: str = "scfg"
    steps: int = 50
    sampler: str = "ddim"
    config: SCFGConfig | None = None
    backend: str = "auto"
    trace: bool = False
    token_weights: Mapping[str, float] = field(default_factory=dict)
    start: float = 0.0
    stop: float = 1.0
    every: int = 1

    def __post_init__(self):
        prompts, seeds = len(self.prompts), len(self.seeds)
        if not prompts or prompts != seeds:
            raise ValueError(f"seeds must be one per prompt, got {seeds} for {prompts}")
        for name, value, known in (
            ("method", self.method, METHODS),
            ("sampler", self.sampler, SAMPLERS),
        ):
            checks.one_of(value, name, tuple(known))


@dataclass(frozen=True, eq=False)
class Frame:
    """One denoising step of b images, on the CPU.

    Where S-CFG did not act, the rate is 1 and regions are those of the nearest step on which it
    did; plain CFG shows what S-CFG would have done on the steps of the window.

    Attributes:
        t: Timestep.
        x0: (b, 3, h', w') float32 in [-1, 1], the image that the guided prediction points to.
        labels: (b, h, w) int64, position of the token that owns each patch.
        foreground: (b, h, w) bool.
        rate: (b, H, W) float32, multiplier of the guidance scale at each latent pixel.
    """

    t: int
    x0: Tensor
    labels: Tensor
    foreground: Tensor
    rate: Tensor


def frames(steps: Sequence[tuple[int, Tensor]], guided: Mapping[int, Guided]) -> tuple[Frame, ...]:
    """Frames of a run.

    Args:
        steps: Timestep and x0 of every step.
        guided: By number of the step, what S-CFG did; of one step at least.
    """
    found = []
    for i, (t, x0) in enumerate(steps):
        out = guided[min(guided, key=lambda j: abs(i - j))]
        rate = out.rate[:, 0] if i in guided else torch.ones_like(out.rate[:, 0])
        labels, foreground = out.labels.cpu(), out.foreground.cpu()
        found.append(Frame(t, x0.cpu(), labels, foreground, rate.float().cpu()))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Generated:
    """Images drawn, on the CPU.

    Attributes:
        method: One of `METHODS`.
        prompts: b prompts.
        seeds: b seeds.
        words: Per image, the word at every token position; None at START, END and padding.
        images: (b, 3, h, w) float32 in [-1, 1].
        trace: One `Frame` per denoising step, in the order of sampling; empty unless asked for.
    """

    method: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    words: tuple[tuple[str | None, ...], ...]
    images: Tensor
    trace: tuple[Frame, ...]


@torch.no_grad()
def draw(
    model: EmbeddedModel, request: Request, after_step: Callable[[], object] | None = None
) -> Generated:
    """Draw with the embedded model.

    Args:
        model: The model, on any device.
        request: What to draw.
        after_step: Called after every step.

    Returns:
        Generated.

    Raises:
        ValueError: A prompt has a word the model does not know, a phrase is in no prompt, an
            argument is out of range, or a sampler that draws noise on its way is given several
            images, whose noise would then depend on each other.
    """
    b = len(request.prompts)
    if request.sampler == "euler_ancestral" and b > 1:
        raise ValueError(f"sampler {request.sampler!r} draws one image at a time, got {b}")
    uncond, cond = model.encode([""] * b), model.encode(request.prompts)
    steps: list[tuple[int, Tensor]] = []
    guided: dict[int, Guided] = {}

    def after(i: int, t: int, x: Tensor, eps: Tensor) -> None:
        steps.append((t, _denoised(model, t, x, eps) if request.trace else x.new_empty(0)))
        if after_step is not None:
            after_step()

    def notice(out: Guided) -> None:
        if request.trace:
            guided[len(steps)] = out

    predictor = _predictor(model, request, notice)
    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    noise = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
    sampler = getattr(sampling, request.sampler)
    try:
        latents = sampler(
            lambda x, t: predictor(x, t, uncond, cond),
            noise.to(cond.device),  # drawn on the CPU: the same there and on a GPU
            model.schedule,
            request.steps,
            generator=generators[0],
            callback=after,
        )
    finally:
        if isinstance(predictor, Predictor):
            predictor.remove()
    words = tuple(_words(model, prompt) for prompt in request.prompts)
    images = model.decode(latents).cpu()
    trace = frames(steps, guided) if request.trace else ()
    return Generated(request.method, request.prompts, request.seeds, words, images, trace)


def _predictor(
    model: EmbeddedModel, request: Request, notice: Callable[[Guided], None]
) -> Callable:
    """The predictor ``(x, t, uncond, cond) -> eps`` that a request asks for."""
    if request.method == "cfg" and not request.trace:

        def plain(x: Tensor, t: Tensor, uncond: Tensor, cond: Tensor) -> Tensor:
            context = torch.cat([uncond, cond])
            both = model.unet(torch.cat([x, x]), torch.cat([t, t]), context)
            return cfg(*both.chunk(2), request.guidance_scale)

        return plain
    config = model.config if request.config is None else request.config
    run = Run(config, request.backend, notice, request.start, request.stop, request.every)
    predictor = Predictor(
        model.unet,
        model.network,
        request.guidance_scale,
        run,
        token_weights=_weights(model, request),
        levels=model.schedule.timesteps(request.steps),
        observe=request.method == "cfg",
    )
    predictor.unet.words = model.words([""] * len(request.prompts) + list(request.prompts))
    return predictor


def _denoised(model: EmbeddedModel, t: int, x: Tensor, eps: Tensor) -> Tensor:
    """The image (b, 3, 64, 64) that a prediction points to."""
    abar = model.schedule.alphas_cumprod[t].item()
    return model.decode((x - (1 - abar) ** 0.5 * eps) / abar**0.5)


def _weights(model: EmbeddedModel, request: Request) -> Tensor | None:
    """Weights of tokens (b, t), 1 where no phrase is."""
    if not request.token_weights:
        return None
    texts = [model.tokenizer.tokens(prompt) for prompt in request.prompts]
    phrases = {phrase: phrase.lower().split() for phrase in request.token_weights}
    return weigh_phrases(texts, phrases, request.token_weights)


def _words(model: EmbeddedModel, prompt: str) -> tuple[str | None, ...]:
    tokens = model.tokenizer.tokens(prompt)
    return tuple(None if token in (START, END) else token for token in tokens)
