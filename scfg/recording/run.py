"""One sampling run, step by step: where S-CFG acts, and when regions are found anew."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from scfg.config import SCFGConfig
from scfg.evidence import Evidence
from scfg.guidance import Guided, find_regions, guide_regions
from scfg.recording.phrases import fit_weights


@dataclass
class Steps:
    """What adapters decide at every step, whatever the host.

    Attributes:
        config: Constants.
        backend: See `scfg.ops`.
        callback: Called with the `Guided` of every step on which S-CFG acted.
        start: S-CFG acts from step ``int(start * steps)`` on; before it, the host's own guidance.
        stop: It acts until before step ``int(stop * steps)``.
        every: Regions are found on every so many steps and kept in between; rates never are.

    Raises:
        ValueError: Not 0 <= start < stop <= 1, or every < 1.
    """

    config: SCFGConfig
    backend: str = "auto"
    callback: Callable[[Guided], object] | None = None
    start: float = 0.0
    stop: float = 1.0
    every: int = 1
    _regions: tuple[Tensor, Tensor, int] | None = field(default=None, init=False)

    def __post_init__(self):
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"0 <= start < stop <= 1 must hold, got {self.start} and {self.stop}")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be an int >= 1, got {self.every!r}")

    @property
    def always(self) -> bool:
        """Whether every step is the same, so that its number does not matter."""
        return (self.start, self.stop, self.every) == (0, 1, 1)

    @staticmethod
    def place(sigma: float, sigmas: Sequence[float]) -> tuple[int, int]:
        """Number of the step that a noise level belongs to in a falling schedule, and of all.

        Between two levels it is the step of the higher one; the final 0 is not a step.
        """
        levels = [level for level in sigmas if level > 0]
        return max(sum(level >= sigma * (1 - 1e-6) for level in levels) - 1, 0), len(levels)

    def forget(self) -> None:
        """Begin a new run."""
        self._regions = None

    def acts(self, step: int, steps: int) -> bool:
        """Whether S-CFG acts on a step, counted from 0."""
        return int(self.start * steps) <= step < int(self.stop * steps)

    def finds(self, step: int, steps: int) -> bool:
        """Whether regions are found on a step on which S-CFG acts: attention is to be recorded."""
        return self._regions is None or (step - int(self.start * steps)) % self.every == 0

    def keep(self, labels: Tensor, foreground: Tensor, tokens: int) -> None:
        """Regions from now on: (b, h, w) int64 below tokens, (b, h, w) bool."""
        self._regions = labels, foreground, tokens

    def guide(
        self,
        eps_uncond: Tensor,
        eps_text: Tensor,
        branches: tuple[Evidence, Evidence] | None,
        guidance_scale: float,
        token_weights: Tensor | None = None,
    ) -> Guided:
        """S-CFG of one step.

        Args:
            eps_uncond: (b, c, H, W).
            eps_text: (b, c, H, W).
            branches: Evidence of the unconditional and of the text branch, or None to keep the
                regions of the last step that had some.
            guidance_scale: > 0.
            token_weights: (t,) or (B, t), one row for each of B prompts, multiplies the rate of
                each token's region; see `fit_weights`. Or None.

        Returns:
            Guided, which the callback has seen.

        Raises:
            RuntimeError: Regions are to be kept and there are none.
        """
        if branches is not None:
            uncond, text = branches
            self.keep(*find_regions(text, uncond, self.config, self.backend), text.tokens)
        if self._regions is None:
            raise RuntimeError("no regions yet: the first step of a run must be recorded")
        if token_weights is not None:
            token_weights = fit_weights(token_weights, len(eps_text), self._regions[-1])
        settings = (guidance_scale, self.config, self.backend, token_weights)
        guided = guide_regions(eps_uncond, eps_text, *self._regions, *settings)
        if self.callback is not None:
            self.callback(guided)
        return guided
