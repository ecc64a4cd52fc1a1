"""A network that remembers the attention of its last call."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from scfg import checks
from scfg.backends import check_backend
from scfg.config import SCFGConfig, check_config
from scfg.evidence import Evidence
from scfg.guidance import Guided, guide_evidence
from scfg.recording.layouts import Grid, Layout, find_layout
from scfg.recording.packing import repack, unpack
from scfg.recording.recorder import AttentionLayer, AttentionRecorder
from scfg.recording.replayed import TransformerRecorder
from scfg.regions import Regions, find_regions

# What the last two calls said; of one type whether or not they were made, which a compiler asks.
NO_CALLS = Evidence((0, 0)), Evidence((0, 0))


class Recorder:
    """A network that remembers the attention of its last call: same call, same output, bit for bit.

        with Recorder(unet) as unet:
            eps_uncond, eps_text = unet(torch.cat([x, x]), t, context).chunk(2)
            eps = unet.guide(eps_uncond, eps_text, guidance_scale=7.5).eps

    The same lines hold for a transformer, whose predictions `guide` takes and gives in the form in
    which the model returns them (packed, lists, with a variance).

    The two branches may also be two calls. Whether they arrive as rows or as calls, ``order`` says
    which comes first; calls may differ in their number of tokens.

    Args:
        model: A U-Net with transformer blocks (see `scfg.recording.hooks`), whose first 4-D tensor
            argument is the latent; or a transformer (see `scfg.recording.layouts`); or a
            torch.compile of one, that has not run yet.
        config: Constants.
        backend: See `scfg.ops`.
        order: ``("uncond", "text")`` or ``("text", "uncond")``.
        keep_maps: Keep the maps of the last call's layers, for `attention`.
        layout: Row of a transformer whose class is not in the table.

    Attributes:
        words: Of a transformer: (t,) or (rows, t), the word of the prompt that each column of the
            text belongs to, see `TransformerRecorder.start`; None: each is one.

    Raises:
        ValueError: No transformer block found, no layout, bad order or backend.
        TypeError: config is no SCFGConfig, or model no network.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SCFGConfig = SCFGConfig(),  # noqa: B008  (frozen)
        backend: str = "auto",
        order: tuple[str, str] = ("uncond", "text"),
        keep_maps: bool = False,
        layout: Layout | None = None,
    ):
        check_config(config)
        check_backend(backend)
        if not isinstance(order, (tuple, list)) or sorted(map(str, order)) != ["text", "uncond"]:
            raise ValueError(f"order must be ('uncond', 'text') or its reverse, got {order!r}")
        self.model, self.config, self.backend, self.order = model, config, backend, tuple(order)
        self.words: Tensor | None = None
        layout = find_layout(model) if layout is None else layout
        if layout is None:
            self._recorder = AttentionRecorder(model, config, backend, keep_maps)
        else:
            self._recorder = TransformerRecorder(model, config, backend, keep_maps, layout)
        self.layout = layout
        self._calls = NO_CALLS

    def __call__(self, *args, **kwargs):
        """Call the network and record it.

        Raises:
            RuntimeError: Not every attention module was seen once (see `AttentionRecorder.finish`).
        """
        if self.layout is not None:
            self._recorder.start(args, kwargs, self.words)
            return self._finish(lambda: self.model(*args, **kwargs))
        sample = next(
            (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim() == 4), None
        )
        if sample is None:
            raise ValueError(
                "the U-Net must be called with a latent (b, c, H, W), got no 4-D tensor"
            )
        return self.record(sample, lambda: self.model(*args, **kwargs))

    def record(self, sample: Tensor, call: Callable[[], object]):
        """Record the network inside ``call()``, which runs it once on a latent of sample's size.

        Returns:
            What ``call()`` returns.

        Raises:
            RuntimeError: As a call of the wrapper does.
        """
        if self.layout is None:
            self._recorder.start(sample)
            return self._finish(call)

        def start(model, args, kwargs):
            self._recorder.start(args, kwargs, self.words)

        hook = self.model.register_forward_pre_hook(start, with_kwargs=True)
        try:
            return self._finish(call)
        finally:
            hook.remove()

    def _finish(self, call: Callable[[], object]):
        """What a call that has been started returns."""
        try:
            output = call()
            self._calls = (self._calls[1], self._recorder.finish())
        except BaseException:
            self._recorder.abort()
            self._calls = NO_CALLS
            raise
        return output

    @property
    def attention(self) -> list[AttentionLayer]:
        """Layers of the last call in forward order, with their maps if ``keep_maps``."""
        return self._recorder.layers if self._calls[1].levels else []

    @property
    def evidence(self) -> Evidence:
        """What the last call says.

        Raises:
            RuntimeError: None is recorded.
        """
        if not self._calls[1].levels:
            raise RuntimeError("no call is recorded")
        return self._calls[1]

    @property
    def grid(self) -> Grid | None:
        """(f, h, w) of the patches of a transformer's last call; None for a U-Net."""
        return None if self.layout is None else self._recorder.grid

    def branches(self, b: int) -> dict[str, Evidence]:
        """What the call, or the two calls, for b images recorded, as ``uncond`` and ``text``.

        Raises:
            RuntimeError: The recorded calls are not one of 2b rows or two of b rows.
        """
        before, last = self._calls
        if last.batch == 2 * b:  # a compiler must not look at the one before
            return dict(zip(self.order, (last.rows(0, b), last.rows(b, 2 * b)), strict=True))
        rows = [call.batch for call in self._calls if call.levels]
        if rows != [b, b]:
            raise RuntimeError(
                f"guide needs one recorded call of {2 * b} rows or two of {b}, got {rows or 'none'}"
            )
        return dict(zip(self.order, (before, last), strict=True))

    def regions(self, b: int) -> Regions:
        """Regions of b images by `branches`.

        Raises:
            RuntimeError: The recorded calls are not one of 2b rows or two of b rows.
        """
        branches = self.branches(b)
        return find_regions(
            uncond=branches["uncond"],
            text=branches["text"],
            config=self.config,
            backend=self.backend,
        )

    def guide(
        self,
        eps_uncond: Tensor,
        eps_text: Tensor,
        guidance_scale: float | Tensor,
        token_weights: Tensor | None = None,
    ) -> Guided:
        """S-CFG of two predictions by what the call, or the two calls, that made them recorded.

        Args:
            eps_uncond: (b, c, H, W); of a transformer, b rows in the form that it returns.
            eps_text: The same form.
            guidance_scale: Float or (b,) tensor, > 0.
            token_weights: (t,) or (b, t) multiplies the rate of each token's region, or None.

        Returns:
            Guided, see `semantic_cfg`.

        Raises:
            RuntimeError: The recorded calls are not one of 2b rows or two of b rows.
            ValueError: The predictions differ in shape, and as `semantic_cfg`.
        """
        like = eps_text
        if self.layout is not None:
            grid = self._recorder.grid
            eps_uncond, eps_text = (unpack(x, self.layout, grid) for x in (eps_uncond, eps_text))
        if isinstance(eps_text, Tensor):  # before rows are counted, by those of one of them
            checks.shape(eps_uncond, "eps_uncond", *eps_text.shape)
        branches = self.branches(len(like))
        guided = guide_evidence(
            eps_uncond,
            eps_text,
            uncond=branches["uncond"],
            text=branches["text"],
            guidance_scale=guidance_scale,
            config=self.config,
            backend=self.backend,
            token_weights=token_weights,
        )
        if self.layout is None:
            return guided
        return replace(guided, eps=repack(guided.eps, like, self.layout, grid))

    def remove(self) -> None:
        """Leave the network exactly as it was found."""
        self._recorder.remove()
        self._calls = NO_CALLS

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_) -> None:
        self.remove()


UNetWrapper = Recorder  # its name among U-Nets
