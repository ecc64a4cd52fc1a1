"""Queries and keys of an attention module by running it once more, up to its softmax.

A hook keeps what a module was called with. Its ``forward`` is called again under a mode that stops
at ``scaled_dot_product_attention`` and hands over query, key, mask and scale: after norms, rotary
embedding, concatenation and repeated heads, whatever the module's processor does. The host's own
call is not touched.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name everybody knows it by)
from torch.overrides import TorchFunctionMode

# Attributes of a watched module. They are always there, so that a compiled block, which shares its
# code with its likes, is guarded by their value.
WANTED, SEEN, RAN = "_scfg_wanted", "_scfg_seen", "_scfg_ran"


@dataclass(frozen=True, eq=False)
class Scores:
    """What goes into a softmax.

    Attributes:
        q: (b, m, g*d), multiplied so that scores are q k^T / sqrt(d) + bias.
        k: (b, l, g*d).
        mask: As `scaled_dot_product_attention` takes it, or None.
        heads: g.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    heads: int

    def rows(self, rows: slice | Tensor) -> "Scores":
        """Those of a part of the batch."""
        whole = self.mask is None or self.mask.dim() < 4 or self.mask.shape[0] == 1
        return Scores(
            self.q[rows], self.k[rows], self.mask if whole else self.mask[rows], self.heads
        )

    def key_bias(self, row: int) -> Tensor | None:
        """(b, l) added to the scores of each key, as it is for one query: all see the same keys."""
        if self.mask is None:
            return None
        mask = self.mask
        mask = mask[(None,) * (4 - mask.dim())]  # (b or 1, g or 1, m or 1, l)
        mask = mask[:, 0, row if mask.shape[2] > 1 else 0]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
        return mask.float().expand(self.q.shape[0], -1)


class _Reached(Exception):  # noqa: N818  (not an error)
    """The softmax was reached."""


class _Stop(TorchFunctionMode):
    """Stops at the softmax, or at linear attention's second relu."""

    def __init__(self, linear: bool):
        super().__init__()
        self.linear, self.scores, self.features = linear, None, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self.scores = _softmax_of(*args, **kwargs)
            raise _Reached
        if function is F.relu and self.linear:
            self.features.append(function(*args, **kwargs))
            if len(self.features) == 2:
                self.scores = _linear_of(*self.features)
                raise _Reached
            return self.features[-1]
        return function(*args, **kwargs)


def _softmax_of(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
) -> Scores:
    """`Scores` from the arguments of `scaled_dot_product_attention`."""
    if is_causal:
        raise RuntimeError("attention must not be causal, a patch sees the whole image and text")
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if scale is not None:
        query = query * (scale * query.shape[-1] ** 0.5)
    q, k = (x.transpose(1, 2).flatten(2) for x in (query, key))  # (b, m, g*d)
    return Scores(q, k, attn_mask, query.shape[1])


def _linear_of(q: Tensor, k: Tensor) -> Scores:
    """`Scores` from Sana's features, (b, g, d, n) and (b, g, n, d)."""
    return Scores(q.permute(0, 3, 1, 2).flatten(2), k.transpose(1, 2).flatten(2), None, q.shape[1])


@contextmanager
def _native(processor) -> Iterator[None]:
    """Another backend of the host's, or a split over devices, would not pass by the softmax."""
    saved = {name: getattr(processor, name, None) for name in ("_attention_backend",)}
    has = "_attention_backend" in vars(processor)
    if hasattr(processor, "_attention_backend"):
        processor._attention_backend = "native"
    try:
        yield
    finally:
        if hasattr(processor, "_attention_backend"):
            processor._attention_backend = saved["_attention_backend"]
            if not has:
                del processor._attention_backend


def replay(name: str, module: nn.Module, args: tuple, kwargs: dict, linear: bool = False) -> Scores:
    """What a module's softmax is made of, for a call it has had.

    Args:
        name: Of the module, for errors.
        module: With a ``processor``, or any that calls `scaled_dot_product_attention` itself.
        args: Of the call.
        kwargs: Of the call.
        linear: It is linear attention, ``relu(q) relu(k)^T``.

    Returns:
        Scores.

    Raises:
        RuntimeError: It never gets to a softmax, it keeps state between calls, or the sequence is
            split over devices.
    """
    processor = getattr(module, "processor", module)
    if getattr(processor, "_parallel_config", None) is not None:
        raise RuntimeError(
            f"{name!r} is split over devices (context parallel), which is not supported: each "
            "holds a part of the queries and keys"
        )
    before = dict(vars(processor))
    stop = _Stop(linear)
    with torch.no_grad(), _native(processor), stop:
        try:
            type(module).forward(module, *args, **kwargs)  # past whatever wraps this instance
        except _Reached:
            pass
    kind = type(processor).__name__
    if stop.scores is None:
        raise RuntimeError(
            f"{name!r} ({kind}) never called scaled_dot_product_attention, so its queries and keys "
            "are not known"
        )
    after = vars(processor)
    if before.keys() != after.keys() or any(before[key] is not after[key] for key in before):
        raise RuntimeError(f"{name!r} ({kind}) keeps state between calls, it cannot be run again")
    return stop.scores


def _keep(module, args, kwargs) -> None:
    if module._scfg_wanted:
        module._scfg_seen = (args, kwargs)


def _ran(module, args, output) -> None:
    if torch.compiler.is_compiling():
        return  # replayed when the whole network has run
    if module._scfg_wanted:
        module._scfg_ran()


class Watch:
    """Hooks on attention modules that keep what they are called with.

    Args:
        modules: By name.
        alike: Other modules, of which nothing is kept; they get the same hooks, for blocks that are
            compiled one by one share their code, and torch does not guard on hooks.
        ran: Called with the name of a module that has run, unless it runs compiled.

    Raises:
        ValueError: A module is watched already.
    """

    def __init__(
        self, modules: dict[str, nn.Module], alike: list[nn.Module], ran: Callable[[str], None]
    ):
        self._modules, self._alike, self._ran = modules, alike, ran
        self._handles: list = []
        watched = [name for name, module in modules.items() if hasattr(module, WANTED)]
        watched += [type(module).__name__ for module in alike if hasattr(module, WANTED)]
        if watched:
            raise ValueError(f"attention is recorded already, by another recorder: {watched}")
        for name, module in modules.items():
            setattr(module, WANTED, False)
            setattr(module, SEEN, None)
            setattr(module, RAN, lambda name=name: self._ran(name))
        for module in alike:
            setattr(module, WANTED, False)
        for module in (*modules.values(), *alike):
            self._handles.append(module.register_forward_pre_hook(_keep, with_kwargs=True))
            self._handles.append(module.register_forward_hook(_ran))

    def begin(self) -> None:
        """Listen."""
        for module in self._modules.values():
            setattr(module, WANTED, True)

    def seen(self, name: str) -> bool:
        """Whether a module has run since `begin` and was not taken."""
        return getattr(self._modules[name], SEEN) is not None

    def take(self, name: str, linear: bool = False) -> Scores:
        """`replay` of a module, whose call is then forgotten."""
        module = self._modules[name]
        args, kwargs = getattr(module, SEEN)
        setattr(module, SEEN, None)
        return replay(name, module, args, kwargs, linear)

    def clear(self) -> None:
        """Stop listening and forget what was seen."""
        for module in self._modules.values() if self._handles else ():
            setattr(module, WANTED, False)
            setattr(module, SEEN, None)

    def remove(self) -> None:
        """Leave the modules as they were found."""
        self.clear()
        for handle in self._handles:
            handle.remove()
        for module in self._modules.values() if self._handles else ():
            for name in (WANTED, SEEN, RAN):
                delattr(module, name)
        for module in self._alike if self._handles else ():
            delattr(module, WANTED)
        self._handles.clear()
