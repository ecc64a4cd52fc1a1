"""Hooks that see what the attention modules of a U-Net read and project while it runs."""

import inspect
from collections.abc import Callable
from threading import get_ident

import torch
from torch import Tensor, nn

from scfg.recording.attention import (
    PROJECTIONS,
    Attention,
    Projected,
    additive,
    check_pixels,
    read_block,
)
from scfg.recording.blocks import find_blocks, folding_module


def _nothing(*_) -> None:
    """What is left of a hook in a copy of its module."""


def _get_nothing() -> Callable:
    return _nothing


class _Hook:
    """A hook that a copy or a pickle of its module goes without."""

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *call):
        return self.function(*call)

    def __reduce__(self):
        return _get_nothing, ()


class Hooks:
    """Hooks on the transformer blocks of a U-Net, silent unless ``active``.

    Args:
        unet: The U-Net, or a torch.compile of it, which must not have run yet.
        reduction_of: From an attention module's input to the chosen resolution it is at, or None.
        ran: Called as ``ran(name, reduction, read)`` after each block at a chosen resolution that
            attended to a text; ``read()`` is its `Projected`.

    Raises:
        ValueError: The U-Net has no transformer block.
    """

    def __init__(
        self,
        unet: nn.Module,
        reduction_of: Callable[[Tensor], int | None],
        ran: Callable[[str, int, Callable[[], Projected]], None],
    ):
        self.active = False
        self.thread: int | None = None  # that it listens to
        self._reduction_of, self._ran = reduction_of, ran
        self._handles: list = []
        self._attentions: list[Attention] = []
        for name, modules in find_blocks(unet):
            block = [Attention(module) for module in modules]
            for attention in block:
                self._watch(attention)
            self._attentions += block
            folding = folding_module(unet, name)
            whole = folding is unet.get_submodule(name)
            hook = folding.register_forward_hook(_Hook(self._after(name, block, whole)))
            self._handles.append(hook)

    def _listens(self) -> bool:
        """Whether a call of now and here is listened to."""
        return self.active and (torch.compiler.is_compiling() or self.thread == get_ident())

    def _watch(self, attention: Attention) -> None:
        """Note what goes into an attention module and what its projections return."""
        attention.parameters = tuple(inspect.signature(attention.module.forward).parameters)

        def before(module, args, kwargs):
            if not self._listens():
                return
            attention.clear()
            known = min(len(attention.parameters), len(args))  # torch 2.8 compiles no uneven zip
            given = dict(zip(attention.parameters[:known], args[:known], strict=True)) | kwargs
            x = args[0] if args else given.get("hidden_states", given.get("x"))
            attention.begin(x, self._reduction_of(x))
            if attention.reduction is None:
                return
            context = args[1] if len(args) > 1 else None
            for name in ("encoder_hidden_states", "context"):
                context = kwargs.get(name, context)
            context = context[0] if isinstance(context, (tuple, list)) else context
            attention.context = None if context is x else context
            attention.key_bias = additive(given.get("attention_mask", given.get("mask")), x)

        def keep(name):
            def after(module, args, output):
                if not self._listens():
                    return
                if name == "to_q" and not attention.called:
                    attention.begin(args[0], self._reduction_of(args[0]))
                    attention.bare = True
                if attention.reduction is not None:
                    attention.read(name, args[0], output)

            return after

        hook = attention.module.register_forward_pre_hook(_Hook(before), with_kwargs=True)
        self._handles.append(hook)
        for name in PROJECTIONS:
            projection = getattr(attention.module, name, None)
            if isinstance(projection, nn.Module):
                attention.hooked[name] = projection
                self._handles.append(projection.register_forward_hook(_Hook(keep(name))))

    def _after(self, name: str, block: list[Attention], whole: bool):
        def after(module, args, output):
            if not self._listens():
                return
            if any(attention.reduction is not None for attention in block):
                check_pixels(name, block, output if whole else None)
            last = block[-1]
            if last.reduction is not None and last.context is not None:
                with torch.no_grad():
                    self._ran(name, last.reduction, lambda: read_block(name, block))
            elif last.reduction is not None:
                last.lacks_text = True
            for attention in block:
                attention.clear()

        return after

    def begin(self) -> None:
        """Listen to one call of the U-Net."""
        self.clear()
        for attention in self._attentions:
            attention.runs = attention.pixels = 0
            attention.lacks_text = False
        self.active, self.thread = True, get_ident()

    def clear(self) -> None:
        """Stop listening and forget what was seen."""
        self.active = False
        for attention in self._attentions:
            attention.clear()

    def missing(self) -> int:
        """Attention modules that did not run exactly once since `begin`."""
        return sum(attention.runs != 1 for attention in self._attentions)

    def lacking_text(self) -> int:
        """Blocks at a chosen resolution that attended to no text since `begin`."""
        return sum(attention.lacks_text for attention in self._attentions)

    def pixels(self) -> list[int]:
        """Pixels of the maps since `begin`, each number once."""
        return sorted({attention.pixels for attention in self._attentions if attention.runs})

    @property
    def on(self) -> bool:
        """Whether the hooks are on the U-Net: until `remove`."""
        return bool(self._handles)

    def __len__(self) -> int:
        """Attention modules."""
        return len(self._attentions)

    def remove(self) -> None:
        """Take every hook off the U-Net."""
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
