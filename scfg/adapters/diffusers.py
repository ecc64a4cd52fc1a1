"""S-CFG in diffusers' classic pipelines, whose call stays as it is.

    with attach(pipe):
        image = pipe("a red circle and a blue square").images[0]

The pipelines combine predictions by themselves. Hooks on their network record its attention and
rewrite what it returns, so that the pipeline's own formula gives S-CFG: `scfg.adapters.unets` and
`scfg.adapters.pipelines`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from scfg import checks
from scfg.adapters.around import is_marked
from scfg.adapters.pipelines import attach_transformers, transformers_of
from scfg.adapters.unets import AttachedUNet
from scfg.config import SCFGConfig
from scfg.guidance import Guided
from scfg.recording.run import Run


class _Attachment(AbstractContextManager):
    """What `attach` returns: acts between enter and exit, and says so where it never did."""

    def __init__(self, inner: AbstractContextManager):
        self._inner, self._entered = inner, False

    def __enter__(self):
        self._entered = True
        return self._inner.__enter__()

    def __exit__(self, *error):
        return self._inner.__exit__(*error)

    def __del__(self):
        if not self._entered:
            warnings.warn(
                "attach(pipe) acts inside a block only, `with attach(pipe): pipe(...)`; without "
                "with it did nothing",
                stacklevel=2,
            )


def attach(
    pipe,
    guidance_scale: float | None = None,
    config: SCFGConfig = SCFGConfig(),  # noqa: B008  (frozen)
    backend: str = "auto",
    callback: Callable[[Guided], object] | None = None,
    token_weights: Mapping[str, float] | Tensor | None = None,
    start: float = 0.0,
    stop: float = 1.0,
    every: int = 1,
    observe: bool = False,
) -> AbstractContextManager:
    """Guide everything that a pipeline makes inside a ``with`` block by S-CFG.

    Afterwards, also after an error, the pipeline is what it was. The hooks are on ``pipe.unet``, or
    on ``pipe.transformer`` (experimental; see `scfg.recording.layouts` for which): another pipeline
    that shares it is not to be used inside the block.

    Args:
        pipe: A pipeline of diffusers with two-branch classifier-free guidance.
        guidance_scale: For pipelines that do not tell theirs (DeepFloyd IF, PixArt, and Flux and
            Qwen-Image, where it is ``true_cfg_scale``): the same as in the call. For all others
            None: it is read at every step.
        config: Constants.
        backend: See `scfg.ops`.
        callback: Called with the `Guided` of every step on which S-CFG acted.
        token_weights: Factors of the rates of phrases, as ``{"blue square": 1.5}``, found in the
            prompt of each call; or (t,) or (prompts, t), one for each token.
        start: S-CFG acts from this fraction of a run's noise levels on; plain guidance before it.
        stop: It acts until this fraction.
        every: Regions are found on every so many noise levels, and kept in between.
        observe: Only look: the callback gets what S-CFG would do, the pipeline does what it always
            did.

    Returns:
        A context manager, whose value is pipe.

    Raises:
        TypeError: config is no SCFGConfig, or guidance_scale, start or stop no number.
        ValueError: start, stop, every or backend is out of range; on entering the block: the
            pipeline has no U-Net, or is attached to already; guidance_scale is missing or
            superfluous; from the pipeline's call: a phrase is not in a prompt.
        RuntimeError: From the pipeline's call: its batch is not [unconditional, text], or the
            attention of the U-Net was not seen (see `AttentionRecorder.finish`).
    """
    run = Run(config, backend, callback, start, stop, every)
    return _Attachment(_attached(pipe, guidance_scale, run, token_weights, observe))


@contextmanager
def _attached(pipe, guidance_scale, run: Run, token_weights, observe: bool) -> Iterator:
    """The block of `attach`."""
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module) and transformers_of(pipe):
        with attach_transformers(pipe, guidance_scale, run, token_weights, observe):
            yield pipe
        return
    if not isinstance(unet, nn.Module):
        raise ValueError(f"pipe must have pipe.unet or pipe.transformer, got {type(pipe).__name__}")
    if is_marked(unet):
        raise ValueError("pipe.unet is guided already, by another attach that has not ended")
    tells = hasattr(type(pipe), "guidance_scale")
    if tells == (guidance_scale is not None):
        need = "be None, for it is read from the pipeline" if tells else "be given as in the call"
        raise ValueError(f"guidance_scale must {need} ({type(pipe).__name__})")
    if guidance_scale is not None:
        checks.positive(guidance_scale, "guidance_scale")
    attached = AttachedUNet(pipe, guidance_scale, run, token_weights, observe)
    try:
        attached.add(unet)
        yield pipe
        attached.warn_if_idle()
    finally:
        attached.remove()
