"""What goes into the softmax of a transformer's blocks, as ComfyUI itself hands it over.

ComfyUI lets ``transformer_options["optimized_attention_override"]`` stand in for its attention
function. The one put there only looks: it notes queries and keys of the block at hand and calls
what it stands in for. Hooks on the blocks tell which block that is.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scfg.recording.replay import Scores

OVERRIDE = "optimized_attention_override"


class Listen:
    """What `scfg.recording.replay.Watch` is for others: queries and keys of some modules.

    Args:
        modules: By name.
        alike: Of no use here.
        ran: Called with the name of a module that has run.

    Attributes:
        keys: How many a joint softmax, or the image's to itself, has to have.
    """

    def __init__(
        self, modules: dict[str, nn.Module], alike: list[nn.Module], ran: Callable[[str], None]
    ):
        self._ran = ran
        self.keys = 0
        self._on = False
        self._inside: list[str] = []
        self._seen: dict[str, Scores] = {}
        self._handles = []
        for name, module in modules.items():
            before, after = self._enter(name), self._leave(name)
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after, always_call=True))

    def _enter(self, name: str) -> Callable:
        def before(module, args):
            self._inside.append(name)

        return before

    def _leave(self, name: str) -> Callable:
        def after(module, args, output):
            if self._inside:
                self._inside.pop()
            if self._on and output is not None:
                self._ran(name)

        return after

    def override(self, options: dict) -> dict:
        """``transformer_options`` with an attention function that is listened to."""
        inner = options.get(OVERRIDE)

        def attend(function, *args, **kwargs):
            name = self._inside[-1] if self._inside else None
            if self._on and name is not None:
                with torch.no_grad():
                    self._hear(name, *args, **kwargs)
            if inner is not None:
                return inner(function, *args, **kwargs)
            return function(*args, **kwargs)

        return {**options, OVERRIDE: attend}

    def _hear(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision=None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        scale: float | None = None,
        **other,
    ) -> None:
        """Keep the first call of a module that has one over ``keys``, else the last.

        SD3.5's blocks have a second one, of the image alone; the attention to the text of Wan's
        image-to-video comes after that to an image.
        """
        if name in self._seen and self._seen[name].k.shape[1] == self.keys:
            return
        if skip_reshape:  # (b, g, n, d)
            q, k = (x.transpose(1, 2).flatten(2) for x in (q, k))
        width = q.shape[-1] // heads
        if k.shape[-1] != q.shape[-1]:  # fewer heads of keys
            k = k.unflatten(-1, (-1, width))
            k = k.repeat_interleave(heads // k.shape[-2], dim=-2).flatten(2)
        if scale is not None:
            q = q * (scale * width**0.5)
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]  # (b, 1, 1 or m, l)
        self._seen[name] = Scores(q, k, mask, heads)

    def begin(self) -> None:
        """Listen."""
        self.clear()
        self._on = True

    def seen(self, name: str) -> bool:
        """Whether the softmax of a module has been seen since `begin`, and was not taken."""
        return name in self._seen

    def take(self, name: str, linear: bool = False) -> Scores:
        """What went into it; it is then forgotten.

        Raises:
            RuntimeError: There are other keys than those of the latent and the text.
        """
        scores = self._seen.pop(name)
        queries, keys = scores.q.shape[1], scores.k.shape[1]
        if queries == keys != self.keys:
            raise RuntimeError(
                f"{name!r} attends to {keys} tokens, the latent and the text have {self.keys}: "
                "S-CFG does not know what the others are (images to edit are not supported)"
            )
        return scores

    def clear(self) -> None:
        """Stop listening and forget what was seen."""
        self._on = False
        self._seen.clear()
        self._inside.clear()

    def remove(self) -> None:
        """Leave the modules as they were found."""
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
