"""Hooks that see what the attention modules of a U-Net read and project while it runs.

A block that is read has hooks on its attention modules and their projections, which store what they
see, and one behind it, which has it read. A block that ran at another resolution than the chosen
ones has a single hook from then on, its gate: it counts, and puts the others back where the block
comes to run at a chosen resolution. What is or was compiled keeps all hooks, for a compiler does
not look whether they change.
"""

from collections.abc import Callable
from threading import get_ident

import torch
from torch import Tensor, nn

from scfg.evidence import find_reduction
from scfg.recording.attention import PROJECTIONS, Attention, count_pixels
from scfg.recording.blocks import find_blocks, folding_module
from scfg.recording.plan import Plan
from scfg.recording.reading import Block


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
    """Hooks on the transformer blocks of a U-Net, silent but for the thread that is listened to.

    Args:
        unet: The U-Net, or a torch.compile of it, which must not have run yet.
        reductions: The chosen resolutions.
        ran: Called as ``ran(block, reduction)`` after each block at a chosen resolution that
            attended to a text, to be read.

    Raises:
        ValueError: The U-Net has no transformer block.
    """

    def __init__(
        self,
        unet: nn.Module,
        reductions: tuple[int, ...],
        ran: Callable[[Block, int], None],
    ):
        self._plan: Plan | None = None  # of the call that it listens to
        self._sample: Tensor | None = None
        self.thread: int | None = None  # that it listens to
        self._reductions, self._ran, self._unet = reductions, ran, unet
        self._compiled = hasattr(unet, "_orig_mod")  # or seen to be
        self._blocks = [
            Block(name, unet.get_submodule(name), folding_module(unet, name), modules)
            for name, modules in find_blocks(unet)
        ]
        self._modules = sum(len(block.attentions) for block in self._blocks)
        for block in self._blocks:
            self._put_all(block)

    def _listens(self) -> bool:
        """Whether a call of now and here is listened to."""
        if torch.compiler.is_compiling():
            self._compiled = True
            return self._plan is not None
        return self.thread == get_ident()

    def _reduction(self, n: int) -> int | None:
        """The chosen resolution that has n pixels, or None."""
        if torch.compiler.is_compiling():  # a plan made outside is numbers, each size a new graph
            return find_reduction(self._sample.shape[-2:], n, self._reductions)
        return self._plan.reduction(n)

    def _put_all(self, block: Block) -> None:
        """Put the hooks of a block that is read on."""
        block.unhook()
        block.gated = False
        for attention in block.attentions:
            self._watch(attention, block.handles)
        hook = block.folding.register_forward_hook(_Hook(self._after(block)))
        block.handles.append(hook)

    def _put_gate(self, block: Block) -> None:
        """Put the hook of a block that is not read on, in place of all others."""

        def gate(module, args, kwargs):
            if not self._listens():
                return
            block.runs += 1
            pixels = count_pixels(args[0]) if args else 0
            if pixels and self._reduction(pixels) is None:
                block.pixels = pixels
                return
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    f"block {block.name!r} ran at another resolution before it was compiled; "
                    "record the U-Net once at this size before compiling it"
                )
            self._put_all(block)
            for attention in block.attentions:
                attention.runs = block.runs - 1
            if module is block.attentions[0].module:  # whose hooks of this call are read already
                block.attentions[0].call(args, kwargs, self._reduction)

        block.unhook()
        block.gated = True
        hook = block.module.register_forward_pre_hook(_Hook(gate), with_kwargs=True)
        block.handles.append(hook)

    def _watch(self, attention: Attention, handles: list) -> None:
        """Note what goes into an attention module and what its projections return."""

        def before(module, args, kwargs):
            if self._listens():
                attention.call(args, kwargs, self._reduction)

        def keep(name):
            def after(module, args, output):
                if not self._listens():
                    return
                if not attention.called and name == "to_q":
                    attention.begin(args[0], self._reduction)
                if attention.reduction is not None:
                    attention.read(name, args[0], output)

            return after

        hook = attention.module.register_forward_pre_hook(_Hook(before), with_kwargs=True)
        handles.append(hook)
        attention.hooked.clear()
        for name in PROJECTIONS:
            projection = getattr(attention.module, name, None)
            if isinstance(projection, nn.Module):
                attention.hooked[name] = projection
                handles.append(projection.register_forward_hook(_Hook(keep(name))))

    def _after(self, block: Block):
        whole = block.folding is block.module

        def after(module, args, output):
            if not self._listens():
                return
            last = block.attentions[-1]
            if last.reduction is None and block.attentions[0].reduction is None:
                block.tells = bool(args) and count_pixels(args[0]) == last.pixels
            else:
                block.chosen = True
                block.check_pixels(output if whole else None)
            if last.reduction is not None and last.context is None:
                block.lacks_text = True
            elif last.reduction is not None:
                with torch.no_grad():
                    self._ran(block, last.reduction)
            block.clear()

        return after

    def begin(self, plan: Plan, sample: Tensor) -> None:
        """Listen to one call of the U-Net on a latent of the plan's size."""
        for block in self._blocks:
            block.begin()
            if block.gated and block.module._compiled_call_impl is not None:
                self._put_all(block)
        self.clear()
        self._plan, self._sample, self.thread = plan, sample, get_ident()

    def clear(self) -> None:
        """Stop listening and forget what was seen."""
        self._plan = self._sample = self.thread = None
        for block in self._blocks:
            block.clear()

    def settle(self) -> None:
        """After a call that was read: blocks where there was nothing to read keep their gate."""
        if self._compiled or getattr(self._unet, "_compiled_call_impl", None) is not None:
            return
        for block in self._blocks:
            if block.tells and not block.chosen and block.folding is block.module:
                self._put_gate(block)

    @property
    def active(self) -> bool:
        """Whether a call is listened to."""
        return self._plan is not None

    def missing(self) -> int:
        """Attention modules that did not run exactly once since `begin`."""
        return sum(block.missing() for block in self._blocks)

    def lacking_text(self) -> int:
        """Blocks at a chosen resolution that attended to no text since `begin`."""
        return sum(block.lacks_text for block in self._blocks)

    def pixels(self) -> list[int]:
        """Pixels of the maps since `begin`, each number once."""
        ran = [part.pixels for block in self._blocks for part in (block, *block.attentions)]
        return sorted({pixels for pixels in ran if pixels})

    @property
    def on(self) -> bool:
        """Whether the hooks are on the U-Net: until `remove`."""
        return any(block.handles for block in self._blocks)

    def __len__(self) -> int:
        """Attention modules."""
        return self._modules

    def remove(self) -> None:
        """Take every hook off the U-Net."""
        self.clear()
        for block in self._blocks:
            block.unhook()
