"""A U-Net that remembers the attention of its last call, and guides by it."""

from collections.abc import Callable

from torch import Tensor, nn

from scfg.config import SCFGConfig
from scfg.evidence import Evidence
from scfg.guidance import Guided, guide_evidence
from scfg.recording.recorder import AttentionLayer, AttentionRecorder


class UNetWrapper:
    """A U-Net that remembers the attention of its last call: same call, same output, bit for bit.

        with UNetWrapper(unet) as unet:
            eps_uncond, eps_text = unet(torch.cat([x, x]), t, context).chunk(2)
            eps = unet.guide(eps_uncond, eps_text, guidance_scale=7.5).eps

    The two branches may also be two calls. Whether they arrive as rows or as calls, ``order`` says
    which comes first; calls may differ in their number of tokens.

    Args:
        unet: Any U-Net with transformer blocks (see `scfg.recording.blocks`), or a torch.compile of
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
        return self.record(sample, lambda: self.unet(*args, **kwargs))

    def record(self, sample: Tensor, call: Callable[[], object]):
        """Record the U-Net inside ``call()``, which runs it once on a latent of sample's size.

        Returns:
            What ``call()`` returns.

        Raises:
            RuntimeError: As a call of the wrapper does.
        """
        self._recorder.start(sample)
        try:
            output = call()
            self._calls = [*self._calls[-1:], self._recorder.finish()]
        except BaseException:
            self._recorder.abort()
            self._calls = []
            raise
        return output

    @property
    def attention(self) -> list[AttentionLayer]:
        """Layers of the last call in forward order, with their maps if ``keep_maps``."""
        return self._recorder.layers if self._calls else []

    def branches(self, b: int) -> dict[str, Evidence]:
        """What the call, or the two calls, for b images recorded, as ``uncond`` and ``text``.

        Raises:
            RuntimeError: The recorded calls are not one of 2b rows or two of b rows.
        """
        rows = [call.total(call.reductions[0]).shape[0] for call in self._calls]
        if rows[-1:] == [2 * b]:
            parts = [self._calls[-1].rows(0, b), self._calls[-1].rows(b, 2 * b)]
        elif rows == [b, b]:
            parts = self._calls
        else:
            raise RuntimeError(
                f"guide needs one recorded call of {2 * b} rows or two of {b}, got {rows or 'none'}"
            )
        return dict(zip(self.order, parts, strict=True))

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
        return guide_evidence(
            eps_uncond,
            eps_text,
            **self.branches(eps_text.shape[0]),
            guidance_scale=guidance_scale,
            config=self.config,
            backend=self.backend,
            token_weights=token_weights,
        )

    def remove(self) -> None:
        """Leave the U-Net exactly as it was found."""
        self._recorder.remove()
        self._calls = []

    def __enter__(self) -> "UNetWrapper":
        return self

    def __exit__(self, *_) -> None:
        self.remove()
