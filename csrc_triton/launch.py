"""What every launch shares: no gradient is dropped silently, and the inputs' device is current."""

import torch
from torch import Tensor


def refuse_gradients(operation: str, *inputs: Tensor | None) -> None:
    """Refuse inputs whose gradient a kernel, having no backward pass, would drop.

    Args:
        operation: Name of the launcher, for the message.
        inputs: Its floating point inputs; None for one left out.

    Raises:
        RuntimeError: Gradients are enabled and an input requires one.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise RuntimeError(
            f"csrc_triton.{operation} has no backward pass and an input requires grad: call it "
            f"under torch.no_grad(), or use scfg.reference.{operation}, which is differentiable"
        )


def on_device_of(x: Tensor) -> torch.cuda.device_of:
    """Make the device of x current, as a Triton launch expects; nothing for a CPU tensor."""
    return torch.cuda.device_of(x)
