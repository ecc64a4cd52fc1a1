"""A transformer block of a U-Net, and its queries and keys once it has run."""

from typing import NamedTuple

from torch import Tensor, nn

from scfg.recording.attention import Attention, count_pixels


class Projected(NamedTuple):
    """Queries and keys of a block, as its projections return them.

    Attributes:
        q_self: (b, n, g*d) of the image to itself.
        k_self: (b, n, g*d).
        self_bias: (b, n) added to the scores of each image key, or None.
        self_heads: g of these.
        q_cross: (b, n, g*d) of the image to the text.
        k_cross: (b, t, g*d).
        cross_bias: (b, t) added to the scores of each text key, or None.
        cross_heads: g of these.
        joint: Whether text and image share one softmax, over keys [text, image].
    """

    q_self: Tensor
    k_self: Tensor
    self_bias: Tensor | None
    self_heads: int
    q_cross: Tensor
    k_cross: Tensor
    cross_bias: Tensor | None
    cross_heads: int
    joint: bool = False


class Block:
    """A transformer block and its hooks: all of them, or its gate.

    Attributes:
        name: Module path.
        module: The block.
        folding: The module after which it is read, see `folding_module`.
        attentions: [self, text] or [joint].
        runs: How often it passed its gate in the call.
        pixels: Of the last time.
        chosen: Whether it ran at a chosen resolution in the call.
        tells: Whether its input shows on how many pixels its attention runs.
        lacks_text: Whether it then attended to no text.
    """

    def __init__(self, name: str, module: nn.Module, folding: nn.Module, attentions: list):
        self.name, self.module, self.folding = name, module, folding
        self.attentions: list[Attention] = [Attention(attention) for attention in attentions]
        self.handles: list = []
        self.gated = False
        self.begin()

    def begin(self) -> None:
        """Nothing of a call has been seen."""
        self.runs = self.pixels = 0
        if self.gated:
            return
        self.chosen = self.lacks_text = self.tells = False
        for attention in self.attentions:
            attention.runs = attention.pixels = 0

    def missing(self) -> int:
        """Attention modules that did not run exactly once, as far as its hooks can tell."""
        if self.gated:
            return 0 if self.runs == 1 else len(self.attentions)
        return sum(attention.runs != 1 for attention in self.attentions)

    def clear(self) -> None:
        """Forget what was read."""
        for attention in () if self.gated else self.attentions:
            if attention.called or attention.seen:
                attention.clear()

    def unhook(self) -> None:
        """Take its hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def check_pixels(self, output) -> None:
        """Raise unless its attention runs on all its pixels, where that can be told."""
        own, text = self.attentions[0].pixels, self.attentions[-1].pixels
        if own == text == (own if output is None else count_pixels(output)):
            return
        ran = [attention.pixels for attention in self.attentions if attention.pixels]
        whole, least = max(ran), min(ran)
        if isinstance(output, Tensor) and output.dim() == 3:
            whole = output.shape[1]
        if least != whole:
            raise RuntimeError(
                f"block {self.name!r} attends from {least} of its {whole} pixels; tokens that "
                "are merged or tiled at a chosen resolution (ToMe, HyperTile) have no place in the "
                "image"
            )

    def read(self) -> Projected:
        """Its queries and keys, once it has run."""
        if len(self.attentions) == 1:
            return _read_joint(self.attentions[0])
        own, text = self.attentions
        keys = None if own.x is None else own.context
        keys = own.x if keys is None else keys
        if keys is None or keys.shape[:2] != own.x.shape[:2]:
            raise RuntimeError(
                f"block {self.name!r} must attend to the image, then to the text; its first "
                "attention module did not run as self-attention"
            )
        return Projected(
            own.project("to_q", own.x),
            own.project("to_k", keys),
            own.key_bias(),
            own.module.heads,
            text.project("to_q", text.x),
            text.project("to_k", text.context),
            text.key_bias(),
            text.module.heads,
        )


def _read_joint(both: Attention) -> Projected:
    """Queries and keys of a module whose keys are [text, image]."""
    module, x, text = both.module, both.x, both.context
    x = x.flatten(2).mT if x.dim() == 4 else x  # (b, n, c)
    if getattr(module, "group_norm", None) is not None:
        x = module.group_norm(x.mT).mT
    if getattr(module, "norm_cross", None) and "add_k_proj" not in both.seen:
        text = module.norm_encoder_hidden_states(text)
    q, k = both.project("to_q", x), both.project("to_k", x)
    k_text = both.project("add_k_proj", text)
    t, n = k_text.shape[1], k.shape[1]
    bias = both.key_bias()  # of the text, or of text and image
    bias = None if bias is None else nn.functional.pad(bias, (0, t + n - bias.shape[1]))
    cross_bias, self_bias = (None, None) if bias is None else bias.split((t, n), dim=1)
    heads = module.heads
    return Projected(q, k, self_bias, heads, q, k_text, cross_bias, heads, joint=True)
