"""Draw with a pipeline of diffusers what `scfg.drawing.generate` draws with the embedded model."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from scfg.adapters.around import around
from scfg.adapters.diffusers import attach
from scfg.config import SCFGConfig
from scfg.drawing.generate import Frame, Generated, Request, frames
from scfg.guidance import Guided

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
}
THUMBNAIL = 128  # pixels, the longer side of the images of a trace


@torch.no_grad()
def draw(
    pipe,
    request: Request,
    after_step: Callable[[], object] | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    own_scheduler: bool = False,
) -> Generated:
    """Draw with a pipeline; the images of a trace are at most 128 pixels a side.

    Args:
        pipe: From `scfg.adapters.checkpoints.load`.
        request: What to draw, at a guidance scale above 1.
        after_step: Called after every step.
        negative_prompt: Of every image.
        height: Pixels; None: what the model was made for.
        width: Pixels.
        own_scheduler: Sample with the pipeline's own scheduler, not with the request's sampler.

    Returns:
        Generated, images (b, 3, height, width).

    Raises:
        ValueError: An argument is out of range.
    """
    if not request.guidance_scale > 1:
        raise ValueError(f"guidance_scale must be > 1, got {request.guidance_scale}")
    watch = _Trace(request.guidance_scale) if request.trace else None
    own = pipe.scheduler
    try:
        if not own_scheduler:
            pipe.scheduler = _scheduler(SCHEDULERS[request.sampler], own)
        with ExitStack() as stack:
            if watch is not None or request.method == "scfg":
                guide = attach(
                    pipe,
                    config=SCFGConfig() if request.config is None else request.config,
                    backend=request.backend,
                    callback=None if watch is None else watch.notice,
                    token_weights=request.token_weights or None,
                    start=request.start,
                    stop=request.stop,
                    every=request.every,
                    observe=request.method == "cfg",
                )
                stack.enter_context(guide)
            if watch is not None:  # after attach: it sees what the pipeline gets
                stack.callback(around(pipe.unet, watch.before, watch.after, lambda: None))
            images = pipe(
                list(request.prompts),
                negative_prompt=[negative_prompt] * len(request.prompts),
                num_inference_steps=request.steps,
                guidance_scale=request.guidance_scale,
                height=height,
                width=width,
                generator=[torch.Generator().manual_seed(seed) for seed in request.seeds],
                output_type="pt",
                callback_on_step_end=_counting(after_step),
            ).images
        trace = () if watch is None else watch.frames(pipe)
    finally:
        pipe.scheduler = own
    words = tuple(prompt_words(pipe.tokenizer, prompt) for prompt in request.prompts)
    images = images.float().cpu() * 2 - 1
    return Generated(request.method, request.prompts, request.seeds, words, images, trace)


def _scheduler(name: str, own):
    import diffusers

    return getattr(diffusers, name).from_config(own.config)


def _counting(callback: Callable[[], object] | None) -> Callable:
    def after(pipe, i, t, tensors):
        if callback is not None:
            callback()
        return tensors

    return after


def prompt_words(tokenizer, prompt: str) -> tuple[str | None, ...]:
    """The whole word at every token position of a prompt; None at START, END and padding.

    Args:
        tokenizer: A CLIP tokenizer.
        prompt: A prompt.
    """
    longest = tokenizer.model_max_length
    ids = tokenizer(prompt, padding="max_length", truncation=True, max_length=longest).input_ids
    words, pieces = [], []
    for i, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        special = i in tokenizer.all_special_ids
        if not special:
            pieces.append(piece.removesuffix("</w>"))
        if special or piece.endswith("</w>"):
            words += ["".join(pieces)] * len(pieces)
            pieces = []
        if special:
            words.append(None)
    return tuple(words)


class _Trace:
    """What guidance did on every call of a U-Net."""

    def __init__(self, guidance_scale: float):
        self.guidance_scale = guidance_scale
        self.calls: list[tuple[float, Tensor, Tensor]] = []  # timestep, latents, guided prediction
        self.given: tuple = ()  # to the call at hand
        self.guided: dict[int, Guided] = {}  # by number of the call

    def notice(self, guided: Guided) -> None:
        self.guided[len(self.calls)] = guided

    def before(self, args: tuple, kwargs: dict) -> None:
        self.given = args

    def after(self, output):
        latents, t = self.given[0].float().chunk(2)[0], float(self.given[1])
        uncond, text = output[0].float().chunk(2)
        self.calls.append((t, latents, uncond + self.guidance_scale * (text - uncond)))
        return output

    def frames(self, pipe) -> tuple[Frame, ...]:
        """The calls as frames."""
        images = _decode(pipe, [_clean(pipe.scheduler, *call) for call in self.calls])
        steps = [(round(call[0]), image) for call, image in zip(self.calls, images, strict=True)]
        return frames(steps, self.guided)


def _clean(scheduler, t: float, latents: Tensor, prediction: Tensor) -> Tensor:
    """Latents x0 that a prediction points to, from what the U-Net saw at timestep t."""
    table = scheduler.alphas_cumprod.cpu()
    abar = float(table[min(round(t), len(table) - 1)])
    signal, noise = abar**0.5, (1 - abar) ** 0.5
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (latents - noise * prediction) / signal
    return signal * latents - noise * prediction if kind == "v_prediction" else prediction


def _decode(pipe, steps: list[Tensor]) -> list[Tensor]:
    """Latents (b, c, H, W) of every step as small images in [-1, 1], on the CPU."""
    vae, dtype = pipe.vae, pipe.vae.dtype
    if dtype == torch.float16 and vae.config.force_upcast:
        vae.to(torch.float32)
    images = []
    for latents in steps:
        x = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float()
        share = min(1.0, THUMBNAIL / max(x.shape[-2:]))
        size = [max(1, round(share * side)) for side in x.shape[-2:]]
        images.append(nn.functional.interpolate(x, size, mode="area").clamp(-1, 1).cpu())
    vae.to(dtype)
    return images
