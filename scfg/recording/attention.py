"""What an attention module of a U-Net read and projected during a call."""

import inspect

import torch
from torch import Tensor, nn

PROJECTIONS = ("to_q", "to_k", "add_k_proj")
NORMS = {"to_q": "norm_q", "to_k": "norm_k"}


class Attention:
    """What one attention module read and projected during one call of the U-Net.

    Either the module is called, and then its projections; or only its projections are, by a block
    that computes attention itself, and what they read is what the module would have. What a
    projection read counts, not what the module was given: a host may give it more.

    Attributes:
        module: The attention module.
        hooked: Its projections that have hooks, by name.
        runs: How often it ran in the call.
        pixels: Of the last run.
        reduction: The chosen resolution that it runs at, or None: then nothing is kept, for memory
            peaks at others.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.hooked: dict[str, nn.Module] = {}
        self.runs = self.pixels = 0
        self._parameters = tuple(inspect.signature(module.forward).parameters)
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}  # what each projection read and returned
        self.clear()

    def clear(self) -> None:
        """Forget what was read."""
        self.seen.clear()
        self.called = False
        self.x = self.given = self.mask = self.reduction = None

    def begin(self, x: Tensor, plan) -> None:
        """It runs on x, (b, c, h, w) or (b, n, c), of a latent with a `Plan`."""
        self.runs += 1
        self.called = True
        self.pixels = count_pixels(x)
        self.reduction = plan.reduction(self.pixels)
        if self.reduction is not None:
            self.x = x

    def call(self, args: tuple, kwargs: dict, plan) -> None:
        """The module is called."""
        self.clear()
        x = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
        self.begin(x, plan)
        if self.reduction is None:
            return
        context = args[1] if len(args) > 1 else None
        for name in ("encoder_hidden_states", "context"):
            if name in kwargs:
                context = kwargs[name]
        context = context[0] if isinstance(context, (tuple, list)) else context
        self.given = None if context is x else context
        given = kwargs
        if len(args) > 2:
            known = min(len(self._parameters), len(args))  # torch 2.8 compiles no uneven zip
            given = dict(zip(self._parameters[:known], args[:known], strict=True)) | kwargs
        self.mask = given.get("attention_mask", given.get("mask"))

    def read(self, name: str, x: Tensor, output: Tensor) -> None:
        """A projection read x."""
        if x.dim() != 3:
            raise RuntimeError(
                f"{name} of {type(self.module).__name__} must read features (b, n, c), got shape "
                f"{tuple(x.shape)}"
            )
        self.seen[name] = (x, output)

    @property
    def context(self) -> Tensor | None:
        """What it attends to, where that is not x."""
        if "add_k_proj" in self.hooked:
            return self.seen["add_k_proj"][0] if "add_k_proj" in self.seen else self.given
        if "to_k" not in self.seen:
            return self.given
        read = self.seen["to_k"][0]
        own = read is self.x or ("to_q" in self.seen and read is self.seen["to_q"][0])
        return self.given if own else read

    def key_bias(self) -> Tensor | None:
        """(b, m) added to the scores of each key: the host's mask."""
        return None if self.mask is None else additive(self.mask, self.x)

    def project(self, name: str, x: Tensor) -> Tensor:
        """Output (b, n, g*d) of a projection: what its hook saw, else computed again."""
        module = self.module
        modules = module._modules  # of which __getattr__ makes a detour
        read, y = self.seen.get(name, (None, None))
        if self.hooked.get(name) is not modules.get(name):
            y = None
        if y is None or (read is not x and y.shape[:-1] != x.shape[:-1]):
            y = getattr(module, name)(x)
        norm = modules.get(NORMS[name]) if name in NORMS else None
        if norm is not None:
            y = norm(y.unflatten(-1, (module.heads, -1))).flatten(-2)
        return self._scaled(y) if name == "to_q" else y

    def _scaled(self, q: Tensor) -> Tensor:
        """Queries (b, n, g*d) whose scores, over sqrt(d), are those that the module takes."""
        own = vars(self.module)  # of what it lacks, getattr is slow to say so
        scale = own["scale"] if "scale" in own else getattr(type(self.module), "scale", None)
        if not isinstance(scale, (int, float)):
            return q
        width = q.shape[-1] // self.module.heads
        if abs(scale * width**0.5 - 1) < 1e-3:
            return q
        if hasattr(self.module, "processor"):  # of which some heed it and some do not
            raise RuntimeError(
                f"scale of {type(self.module).__name__} must be 1/sqrt(d) = {width**-0.5:.4g}, got "
                f"{scale:.4g}"
            )
        return q * (scale * width**0.5)


def count_pixels(x) -> int:
    """Pixels of features (b, c, h, w) or (b, n, c); 0 of anything else."""
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        return 0
    return x.shape[2] * x.shape[3] if x.dim() == 4 else x.shape[1]


def additive(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A host's key mask, boolean or additive, (b, m) or (b, 1, m), as an additive (b, m)."""
    if mask is None:
        return None
    mask = mask.reshape(mask.shape[0], -1)
    if mask.dtype == torch.bool:
        zero = torch.zeros(mask.shape, dtype=torch.float32, device=x.device)
        mask = zero.masked_fill(~mask, -torch.inf)
    return mask.to(torch.float32).expand(x.shape[0], -1)
