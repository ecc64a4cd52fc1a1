"""One sampling run, step by step: where S-CFG acts, and when regions are found anew.

Of 8 steps with ``start=0.25, stop=0.75, every=2``:

    step                0    1    2    3    4    5    6    7
    acts_at             no   no   yes  yes  yes  yes  no   no
    records_at                    yes  no   yes  no
    regions used                  2    2    4    4
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from scfg import checks
from scfg.backends import check_backend
from scfg.config import SCFGConfig, check_config
from scfg.evidence import Evidence
from scfg.guidance import Guided, guide_evidence, guide_regions
from scfg.recording.phrases import fit_weights
from scfg.recording.recorder import AttentionRecorder
from scfg.regions import Regions, find_regions, unet_benchmark


@dataclass
class Run:
    """What is decided at every step, whatever the host.

    Attributes:
        config: Constants.
        backend: See `scfg.ops`.
        callback: Called with the `Guided` of every step on which S-CFG acted.
        start: S-CFG acts from this fraction of the steps on; before it, the host's own guidance.
        stop: It acts until this fraction.
        every: Regions are found on every so many steps and kept in between; rates never are.

    Raises:
        ValueError: Not 0 <= start < stop <= 1, every < 1, or an unknown backend.
        TypeError: config is no SCFGConfig, or start or stop no number.
    """

    config: SCFGConfig
    backend: str = "auto"
    callback: Callable[[Guided], object] | None = None
    start: float = 0.0
    stop: float = 1.0
    every: int = 1
    _regions: Regions | None = field(default=None, init=False)
    _branches: dict[str, Evidence] | None = field(default=None, init=False)

    def __post_init__(self):
        check_config(self.config)
        check_backend(self.backend)
        for name in ("start", "stop"):
            checks.real(getattr(self, name), name)
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(f"0 <= start < stop <= 1 must hold, got {self.start} and {self.stop}")
        checks.whole(self.every, "every")

    def recorder(self, unet: nn.Module) -> AttentionRecorder:
        """A recorder of a U-Net with the run's constants."""
        return AttentionRecorder(unet, self.config, self.backend)

    @property
    def always(self) -> bool:
        """Whether every step is the same, so that its number does not matter."""
        return (self.start, self.stop, self.every) == (0, 1, 1)

    @staticmethod
    def place(level: float, levels: Sequence[float]) -> tuple[int, int]:
        """Number of the step that a level belongs to among those of a run, and how many those are.

        Args:
            level: Noise level or timestep.
            levels: At which a step begins, falling; a final 0 of sigmas is none.

        Returns:
            Step and steps. Between two levels it is the step of the higher one.
        """
        return max(sum(other >= level * (1 - 1e-6) for other in levels) - 1, 0), len(levels)

    def begin(self) -> None:
        """Begin a new run: regions of the one before are forgotten."""
        self._regions = self._branches = None

    def _window(self, steps: int) -> tuple[int, int]:
        """First step on which S-CFG acts, and first after it on which it does not.

        Raises:
            ValueError: There is no step between the two.
        """
        first, end = (int(share * steps + 1e-9) for share in (self.start, self.stop))
        if first >= end:
            raise ValueError(
                f"start and stop must have a step of {steps} between them, got {self.start} and "
                f"{self.stop}, which have none"
            )
        return first, end

    def acts_at(self, step: int, steps: int) -> bool:
        """Whether S-CFG acts on a step, counted from 0."""
        first, end = self._window(steps)
        return first <= step < end

    def records_at(self, step: int, steps: int) -> bool:
        """Whether regions are found on a step on which S-CFG acts: attention is to be recorded."""
        return self._regions is None or (step - self._window(steps)[0]) % self.every == 0

    @property
    def regions(self) -> Regions | None:
        """Those that are kept."""
        return self._regions

    def keep(self, regions: Regions) -> None:
        """Regions from now on."""
        self._regions, self._branches = regions, None

    def keep_evidence(self, uncond: Evidence, text: Evidence) -> None:
        """Regions from now on are what two branches say.

        Those of a U-Net are found by the next `guide` as it goes, in one operation.
        """
        if text.patches is None:
            self._regions, self._branches = None, {"uncond": uncond, "text": text}
        else:
            config, backend = self.config, self.backend
            self.keep(find_regions(uncond=uncond, text=text, config=config, backend=backend))

    def guide(
        self,
        eps_uncond: Tensor,
        eps_text: Tensor,
        guidance_scale: float | Tensor,
        token_weights: Tensor | None = None,
    ) -> Guided:
        """S-CFG of one step, by the regions kept last.

        Args:
            eps_uncond: (b, c, H, W).
            eps_text: (b, c, H, W).
            guidance_scale: > 0.
            token_weights: (t,) or (B, t), one row for each of B prompts, multiplies the rate of
                each token's region; see `fit_weights`. Or None.

        Returns:
            Guided, which the callback has seen.

        Raises:
            RuntimeError: No regions are kept.
            ValueError: Those that are kept belong to another batch or size.
        """
        if self._regions is None and self._branches is None:
            raise RuntimeError("no regions yet: the first step of a run must be recorded")
        tokens = self._branches["text"].tokens if self._branches else self._regions.tokens
        if token_weights is not None:
            token_weights = fit_weights(token_weights, len(eps_text), tokens)
        if self._branches:
            guided = guide_evidence(
                eps_uncond,
                eps_text,
                uncond=self._branches["uncond"],
                text=self._branches["text"],
                guidance_scale=guidance_scale,
                config=self.config,
                backend=self.backend,
                token_weights=token_weights,
            )
            found = (guided.labels, guided.foreground, tokens, guided.start_is_flat)
            self.keep(Regions(*found, *unet_benchmark(self.config)))
        else:
            guided = guide_regions(
                eps_uncond,
                eps_text,
                self._regions,
                guidance_scale,
                self.config,
                self.backend,
                token_weights,
            )
        if self.callback is not None:
            self.callback(guided)
        return guided
