"""A U-Net that records its attention, and a predictor made from it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scfg.config import SCFGConfig
from scfg.evidence import AttentionLayer, Evidence
from scfg.guidance import Guided, guide_evidence
from scfg.recording.recorder import AttentionRecorder


class UNetWrapper:
    """A U-Net that remembers the attention of its last call: same call, same output, bit for bit.

        with UNetWrapper(unet) as unet:
            eps_uncond, eps_text = unet(torch.cat([x, x]), t, context).chunk(2)
            eps = unet.guide(eps_uncond, eps_text, guidance_scale=7.5).eps

    The two branches may also be two calls. Whether they arrive as rows or as calls, ``order`` says
    which comes first; calls may differ in their number of tokens.

    Args:
        unet: Any U-Net with transformer blocks (see `scfg.recording.hooks`), or a torch.compile of
            one that has not run yet. Its first 4-D tensor argument is the latent.
        config: Constants.
        backend: See `scfg.ops`.
        order: ``("uncond", "text")`` or ``("text", "uncond")``.
        keep_maps: Keep the maps of the last call's layers, for `attention`.

    Raises:
        ValueError: No transformer block found, or bad order.
    """

    def __init__(
        self,
        unet: nn.Module,
        config: SCFGConfig = SCFGConfig(),  # noqa: B008  (frozen)
        backend: str = "auto",
        order: tuple[str, str] = ("uncond", "text"),
        keep_maps: bool = False,
    ):
        if sorted(order) != ["text", "uncond"]:
            raise ValueError(f"order must be ('uncond', 'text') or its reverse, got {order!r}")
        self.unet, self.config, self.backend, self.order = unet, config, backend, tuple(order)
        self._recorder = AttentionRecorder(unet, config, backend, keep_maps)
        self._calls: list[Evidence] = []

    def __call__(self, *args, **kwargs):
        """Call the U-Net and record it.

        Raises:
            RuntimeError: Not every attention module was seen once (see `AttentionRecorder.finish`).
        """
        sample = next(
            (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 4), None
        )
        if sample is None:
            raise ValueError(
                "the U-Net must be called with a latent (b, c, H, W), got no 4-D tensor"
            )
        self._recorder.start(sample)
        try:
            output = self.unet(*args, **kwargs)
            self._calls = [*self._calls[-1:], self._recorder.finish()]
        except BaseException:
            self._recorder.abort()
            self._calls = []
            raise
        return output

    @property
    def attention(self) -> list[AttentionLayer]:
        """Layers of the last call in forward order, with their maps if ``keep_maps``."""
        return self._calls[-1].layers if self._calls else []

    def guide(
        self,
        eps_uncond: Tensor,
        eps_text: Tensor,
        guidance_scale: float | Tensor,
        token_weights: Tensor | None = None,
    ) -> Guided:
        """S-CFG of two predictions by what the call, or the two calls, that made them recorded.

        Args:
            eps_uncond: (b, c, H, W).
            eps_text: (b, c, H, W).
            guidance_scale: Float or (b,) tensor, > 0.
            token_weights: (t,) or (b, t) multiplies the rate of each token's region, or None.

        Returns:
            Guided, see `semantic_cfg`.

        Raises:
            RuntimeError: The recorded calls are not one of 2b rows or two of b rows.
        """
        uncond, text = self._branches(eps_text.shape[0])
        settings = (guidance_scale, self.config, self.backend, token_weights)
        return guide_evidence(eps_uncond, eps_text, uncond, text, *settings)

    def _branches(self, b: int) -> tuple[Evidence, Evidence]:
        """Evidence of the unconditional and of the text branch."""
        rows = [call.total(call.reductions[0]).shape[0] for call in self._calls]
        if rows[-1:] == [2 * b]:
            parts = [self._calls[-1].rows(0, b), self._calls[-1].rows(b, 2 * b)]
        elif rows == [b, b]:
            parts = self._calls
        else:
            raise RuntimeError(
                f"guide needs one recorded call of {2 * b} rows or two of {b}, got {rows or 'none'}"
            )
        branches = dict(zip(self.order, parts, strict=True))
        return branches["uncond"], branches["text"]

    def remove(self) -> None:
        """Leave the U-Net exactly as it was found."""
        self._recorder.remove()
        self._calls = []

    def __enter__(self) -> "UNetWrapper":
        return self

    def __exit__(self, *_) -> None:
        self.remove()


def guided(
    unet: nn.Module,
    guidance_scale: float | Tensor = 7.5,
    config: SCFGConfig = SCFGConfig(),  # noqa: B008  (frozen)
    backend: str = "auto",
    callback: Callable[[Guided], None] | None = None,
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A predictor ``(x, t, uncond, cond) -> eps`` with S-CFG, for any sampler loop.

    One batched U-Net call where uncond and cond have one shape, else two.

    Args:
        unet: Called as ``unet(x, t, context)``; its output is a tensor or has ``.sample``.
        guidance_scale: Float or (b,) tensor, > 0.
        config: Constants.
        backend: See `scfg.ops`.
        callback: Called with the `Guided` of every step.

    Returns:
        The predictor; ``predictor.unet`` is the `UNetWrapper`, to ``remove()`` when done.
    """
    wrapper = UNetWrapper(unet, config, backend)

    def call(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        output = wrapper(x, t, context)
        return output if isinstance(output, Tensor) else output.sample

    @torch.no_grad()
    def predict(x: Tensor, t: Tensor, uncond: Tensor, cond: Tensor) -> Tensor:
        if uncond.shape == cond.shape:
            twice = torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t
            eps = call(torch.cat([x, x]), twice, torch.cat([uncond, cond]))
            eps_uncond, eps_text = eps.chunk(2)
        else:
            eps_uncond, eps_text = call(x, t, uncond), call(x, t, cond)
        out = wrapper.guide(eps_uncond, eps_text, guidance_scale)
        if callback is not None:
            callback(out)
        return out.eps

    predict.unet = wrapper
    return predict
