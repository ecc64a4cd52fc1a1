"""What every launch shares: no gradient and no precision is lost, and the device is current."""

import functools

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

# Products and sums may be fused, as results were checked: Triton 3.10 no longer does it unasked.
OPTIONS = dict(num_warps=8, enable_fp_fusion=True)


def stages(wanted: int) -> int:
    """Stages of a pipelined loop: what is wanted, but two where a block has only 64 KiB."""
    return wanted if knobs.runtime.interpret else min(wanted, _most_stages(driver.active))


@functools.cache
def _most_stages(active) -> int:
    target = active.get_current_target()
    return 2 if target.backend == "hip" and target.arch != "gfx950" else 3


def check_inputs(operation: str, *inputs: Tensor | None) -> None:
    """Refuse inputs whose gradient or precision a kernel would drop.

    Args:
        operation: Name of the launcher, for the message.
        inputs: Its floating point inputs; None for one left out.

    Raises:
        RuntimeError: Gradients are enabled and an input requires one; there is no backward pass.
        TypeError: An input is float64: kernels accumulate in float32.
    """
    given = [x for x in inputs if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise RuntimeError(
            f"csrc_triton.{operation} has no backward pass and an input requires grad: call it "
            f"under torch.no_grad(), or use scfg.reference.{operation}, which is differentiable"
        )
    if any(x.dtype == torch.float64 for x in given):
        raise TypeError(
            f"csrc_triton.{operation} accumulates in float32 and got a float64 input: use "
            f"scfg.reference.{operation}, backend='torch'"
        )


def on_device_of(x: Tensor) -> torch.cuda.device_of:
    """Make the device of x current, as a Triton launch expects; nothing for a CPU tensor."""
    return torch.cuda.device_of(x)
