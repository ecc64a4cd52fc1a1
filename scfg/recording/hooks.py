"""Hooks that see what the attention modules of a U-Net read and project while it runs.

A block that is read has hooks on its attention modules and their projections, which store what they
see, and one behind it, which has it read. One that ran at another resolution has a single hook from
then on, its gate, which puts the others back where the block comes to run at a chosen resolution.
What was compiled keeps all hooks, for a compiler does not look whether they change.
"""

from collections.abc import Callable
from threading import get_ident

import torch
from torch import Tensor, nn

from scfg.recording.attention import PROJECTIONS, Attention, count_pixels
from scfg.recording.blocks import find_blocks, folding_module
from scfg.recording.plan import Plan, TracedPlan
from scfg.recording.reading import Block


def _nothing(*_) -> None:
    """What is left of a hook in a copy of its module."""


def _get_nothing() -> Callable:
    return _nothing


def this_thread() -> int | None:
    """The thread that calls; None while a compiler traces the call, which cannot ask."""
    return None if torch.compiler.is_compiling() else get_ident()


class _Hook:
    """A hook that a copy or a pickle of its module goes without."""

    def __reduce__(self):
        return _get_nothing, ()


class _Called(_Hook):
    """Before an attention module: what it is called with."""

    def __init__(self, hooks: "Hooks", attention: Attention):
        self.hooks, self.attention = hooks, attention

    def __call__(self, module, args, kwargs):
        plan = self.hooks.listening()
        if plan is not None:
            self.attention.call(args, kwargs, plan)


class _Projected(_Hook):
    """Behind a projection of an attention module: what it read and returned."""

    def __init__(self, hooks: "Hooks", attention: Attention, name: str):
        self.hooks, self.attention, self.name = hooks, attention, name

    def __call__(self, module, args, output):
        plan, attention = self.hooks.listening(), self.attention
        if plan is None:
            return
        if not attention.called and self.name == "to_q":  # by a block that attends by itself
            attention.begin(args[0], plan)
        if attention.reduction is not None:
            attention.read(self.name, args[0], output)


class _Ran(_Hook):
    """Behind a block: read it."""

    def __init__(self, hooks: "Hooks", block: Block):
        self.hooks, self.block = hooks, block
        self.whole = block.folding is block.module

    def __call__(self, module, args, output):
        if self.hooks.listening() is None:
            return
        block = self.block
        last = block.attentions[-1]
        if last.reduction is None and block.attentions[0].reduction is None:
            block.tells = len(args) > 0 and count_pixels(args[0]) == last.pixels
        else:
            block.chosen = True
            block.check_pixels(output if self.whole else None)
            if last.reduction is not None and last.context is None:
                block.lacks_text = True
            elif last.reduction is not None and torch.is_grad_enabled():
                with torch.no_grad():
                    self.hooks.ran(block, last.reduction)
            elif last.reduction is not None:
                self.hooks.ran(block, last.reduction)
        block.clear()


class _Gate(_Hook):
    """Before a block that is not read: count it, unless it has come to run where it is."""

    def __init__(self, hooks: "Hooks", block: Block):
        self.hooks, self.block = hooks, block

    def __call__(self, module, args, kwargs=None):
        plan, block = self.hooks.listening(), self.block
        if plan is None:
            return
        block.runs += 1
        pixels = count_pixels(args[0]) if args else 0
        if pixels and plan.reduction(pixels) is None:
            block.pixels = pixels
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"block {block.name!r} ran at another resolution before it was compiled; record "
                "the U-Net once at this size before compiling it"
            )
        self.hooks.put_all(block)
        for attention in block.attentions:
            attention.runs = block.runs - 1
        if module is block.attentions[0].module:  # whose hooks of this call are read already
            block.attentions[0].call(args, kwargs, plan)


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
        self.on = True  # the U-Net: until `remove`
        self.thread: int | None = None  # that it listens to
        self.ran = ran
        self._plan: Plan | None = None  # of the call that it listens to
        self._traced: TracedPlan | None = None
        self._reductions, self._unet = reductions, unet
        self._compiled = hasattr(unet, "_orig_mod")  # or seen to be
        self._blocks = [
            Block(name, unet.get_submodule(name), folding_module(unet, name), modules)
            for name, modules in find_blocks(unet)
        ]
        self._modules = sum(len(block.attentions) for block in self._blocks)
        for block in self._blocks:
            self.put_all(block)

    def listening(self) -> Plan | TracedPlan | None:
        """The plan, if a call of now and here is listened to."""
        if torch.compiler.is_compiling():
            self._compiled = True
            return self._traced
        return self._plan if self.thread == get_ident() else None

    def put_all(self, block: Block) -> None:
        """Put the hooks of a block that is read on."""
        block.unhook()
        block.gated = False
        for attention in block.attentions:
            self._watch(attention, block.handles)
        block.handles.append(block.folding.register_forward_hook(_Ran(self, block)))

    def _watch(self, attention: Attention, handles: list) -> None:
        """Note what goes into an attention module and what its projections return."""
        called, module = _Called(self, attention), attention.module
        handles.append(module.register_forward_pre_hook(called, with_kwargs=True))
        attention.hooked.clear()
        for name in PROJECTIONS:
            projection = getattr(module, name, None)
            if isinstance(projection, nn.Module):
                attention.hooked[name] = projection
                hook = _Projected(self, attention, name)
                handles.append(projection.register_forward_hook(hook))

    def _put_gate(self, block: Block) -> None:
        """Put the hook of a block that is not read on, in place of all others."""
        block.unhook()
        block.begin()
        block.gated = True
        joint = len(block.attentions) == 1
        gate = block.module.register_forward_pre_hook(_Gate(self, block), with_kwargs=joint)
        block.handles.append(gate)

    def begin(self, plan: Plan, sample: Tensor) -> None:
        """Listen to one call of the U-Net on a latent of the plan's size."""
        for block in self._blocks:
            block.begin()
            if block.gated and block.module._compiled_call_impl is not None:
                self.put_all(block)
        self._plan, self._traced = plan, TracedPlan(sample, self._reductions)
        self.thread = this_thread()

    def clear(self) -> None:
        """Stop listening and forget what was seen."""
        if self._plan is None:
            return
        self._plan = self._traced = self.thread = None
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

    def __len__(self) -> int:
        """Attention modules."""
        return self._modules

    def remove(self) -> None:
        """Take every hook off the U-Net."""
        self.on = False
        self.clear()
        for block in self._blocks:
            block.unhook()
