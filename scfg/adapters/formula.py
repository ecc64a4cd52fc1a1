"""Whether a pipeline combines its two predictions as ``u + g (c - u)``, and nothing else."""

import functools

import torch
from torch import Tensor

SHARE = 0.02  # of the guidance that a prediction may be off


class Formula:
    """What the scheduler is given, compared with what it should be, once a run.

    S-CFG is put into the unconditional prediction: a pipeline that uses it by itself, has other
    branches or another scale would do something else without a word.

    Args:
        pipe: A pipeline of diffusers.
    """

    def __init__(self, pipe):
        self.pipe = pipe
        self._schedule = None  # of the last run that was looked at
        self._scheduler, self._own = None, None  # whose step is watched, and its own attribute

    def _skips(self) -> bool:
        """Whether the pipeline is asked to add what is not compared."""
        added = ("guidance_rescale", "pag_scale")
        return any((getattr(self.pipe, name, None) or 0) > 0 for name in added)

    def expect(self, eps: Tensor, text: Tensor, guidance_scale: float) -> None:
        """Look at what the scheduler's next step gets.

        Args:
            eps: (b, c, H, W) what it should be, as it is or put into other units.
            text: (b, c, H, W) prediction of the text branch.
            guidance_scale: Of the call.
        """
        scheduler = self.pipe.scheduler
        if scheduler.timesteps is self._schedule or self._skips():
            return
        self._schedule = scheduler.timesteps
        self._scheduler, self._own = scheduler, vars(scheduler).get("step")
        step = scheduler.step

        @functools.wraps(step)
        def watched(model_output, timestep, sample, *args, **kwargs):
            self.forget()
            self._compare(model_output, sample, eps, text, guidance_scale)
            return step(model_output, timestep, sample, *args, **kwargs)

        scheduler.step = watched

    def forget(self) -> None:
        """Leave the scheduler as it was."""
        if self._scheduler is None:
            return
        if self._own is None:
            vars(self._scheduler).pop("step", None)
        else:
            self._scheduler.step = self._own
        self._scheduler = self._own = None

    def _compare(self, given: Tensor, sample: Tensor, eps: Tensor, text: Tensor, scale) -> None:
        """Raise unless given is a combination of eps and sample."""
        fits = given.shape[1] >= eps.shape[1] and given[:, : eps.shape[1]].shape == eps.shape
        if fits:
            given, text = given[:, : eps.shape[1]].cpu().double(), text.cpu().double()
            parts = [eps.cpu().double()]
            if sample.shape == eps.shape:  # the model's output may have been put into other units
                parts.append(sample.cpu().double())
            wanted = torch.stack([part.flatten() for part in parts], dim=1)  # (n, 1 or 2)
            factors = torch.linalg.pinv(wanted) @ given.flatten()
            off = (given.flatten() - wanted @ factors).norm()
            guidance = scale / (scale - 1) * (text - parts[0]).norm()
            rounding = 8 * torch.finfo(eps.dtype).eps * scale * text.norm()
            fits = bool(off <= (SHARE * guidance + rounding) * factors[0].abs())
        if not fits:
            raise RuntimeError(
                f"{type(self.pipe).__name__} must combine its predictions as u + {scale:g} (c - u) "
                "and give that to the scheduler; it has more branches, another formula or another "
                "scale, or it is another pipeline with the U-Net of the one attached to"
            )
