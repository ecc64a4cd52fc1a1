"""Draw with a pipeline of diffusers as `scfg.drawing.generate` draws with the embedded model."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from scfg.adapters.diffusers import attach
from scfg.config import SCFGConfig
from scfg.drawing.generate import METHODS, Generated, Step, check_request
from scfg.guidance import Guided

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
}
THUMBNAIL = 128  # pixels, the longer side of the images of a trace


@torch.no_grad()
def generate(
    pipe,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    method: str = "scfg",
    guidance_scale: float = 7.5,
    steps: int = 50,
    sampler: str | None = "ddim",
    config: SCFGConfig = SCFGConfig(),  # noqa: B008  (frozen)
    backend: str = "auto",
    trace: bool = False,
    callback: Callable[[], object] | None = None,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    token_weights: Mapping[str, float] | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    every: int = 1,
) -> Generated:
    """Draw one image per prompt, all in one batch: `scfg.drawing.generate.generate` for a pipeline.

    Args:
        pipe: From `load`.
        prompts: b prompts.
        seeds: b seeds; image i starts from noise of seeds[i] alone.
        method: One of `scfg.drawing.generate.METHODS`.
        guidance_scale: > 1.
        steps: Number of steps.
        sampler: One of `SAMPLERS`, or None for the pipeline's own scheduler.
        config: Constants of S-CFG.
        backend: See `scfg.ops`.
        trace: Keep every step; its images are at most 128 pixels a side. Plain CFG then records
            attention too, only to be looked at.
        callback: Called after every step.
        negative_prompt: Of every image.
        height: Pixels; None: what the model was made for.
        width: Pixels.
        token_weights: See `scfg.adapters.diffusers.attach`.
        start: See there.
        stop: See there.
        every: See there.

    Returns:
        Generated, images (b, 3, height, width).

    Raises:
        ValueError: An argument is out of range.
    """
    choices = dict(method=(method, METHODS), sampler=(sampler, (*SAMPLERS, None)))
    check_request(prompts, seeds, **choices)
    if not guidance_scale > 1:
        raise ValueError(f"guidance_scale must be > 1, got {guidance_scale}")
    watch = _Trace(guidance_scale) if trace else None
    options = dict(config=config, backend=backend, token_weights=token_weights)
    options |= dict(start=start, stop=stop, every=every, observe=method == "cfg")
    own = pipe.scheduler
    try:
        if sampler is not None:
            pipe.scheduler = _scheduler(SAMPLERS[sampler], own)
        with ExitStack() as stack:
            if watch is not None or method == "scfg":
                notice = None if watch is None else watch.notice
                stack.enter_context(attach(pipe, callback=notice, **options))
            if watch is not None:  # after attach: it sees what the pipeline gets
                hook = pipe.unet.register_forward_hook(watch.after, with_kwargs=True)
                stack.callback(hook.remove)
            images = pipe(
                list(prompts),
                negative_prompt=[negative_prompt] * len(prompts),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                callback_on_step_end=_counting(callback),
            ).images
        history = () if watch is None else watch.steps(pipe)
    finally:
        pipe.scheduler = own
    words = tuple(prompt_words(pipe.tokenizer, prompt) for prompt in prompts)
    images = images.float().cpu() * 2 - 1
    return Generated(method, tuple(prompts), tuple(seeds), words, images, history)


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
        self.guided: dict[int, Guided] = {}  # by number of the call

    def notice(self, guided: Guided) -> None:
        self.guided[len(self.calls)] = guided

    def after(self, unet, args: tuple, kwargs: dict, output) -> None:
        latents = args[0].float().chunk(2)[0]
        uncond, text = output[0].float().chunk(2)
        eps = uncond + self.guidance_scale * (text - uncond)
        self.calls.append((float(args[1]), latents, eps))

    def steps(self, pipe) -> tuple[Step, ...]:
        """The calls as steps; where S-CFG did not act, the rate is 1 and regions are the nearest.

        Raises:
            ValueError: It never acted.
        """
        if not self.guided:
            raise ValueError("the window from start to stop must hold a step, it holds none")
        steps = []
        images = _decode(pipe, [_clean(pipe.scheduler, *call) for call in self.calls])
        for i, (t, latents, _) in enumerate(self.calls):
            out = self.guided[min(self.guided, key=lambda j: abs(i - j))]
            rate = out.rate[:, 0] if i in self.guided else latents.new_ones(out.rate[:, 0].shape)
            rest = (tensor.cpu() for tensor in (out.labels, out.foreground, rate))
            steps.append(Step(round(t), images[i], *rest))
        return tuple(steps)


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
