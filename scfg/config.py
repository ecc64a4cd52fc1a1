"""SCFGConfig: every constant of the method, with where it comes from."""

import math
from dataclasses import dataclass

SMALLEST = 2.0**-126  # number > 0 that float32 holds with all its digits
PROPAGATIONS = ("paper", "official", "none")
JOINTS = ("renormalise", "raw")


@dataclass(frozen=True)
class SCFGConfig:
    """Constants of semantic-aware guidance; immutable, checks itself when made.

    "Paper" is arXiv 2404.05384, "code" the authors' release of it.

    Attributes:
        map_reduction: Finest attention maps used, in latent pixels per map pixel; the resolution of
            the labels. A power of two. Code: 4 (Stable Diffusion, 64 x 64 latents).
        coarsest_reduction: Coarsest maps used, a power of two, at least ``map_reduction``. Levels
            between the two are all used, those the U-Net lacks are skipped. Code: 8.
        propagation: How self-attention S completes the cross-attention map C. ``"paper"``: mean of
            S^p C, p = 1..``propagation_steps`` (paper, section 3.2). ``"official"``: (S + 3SS)C/4,
            which the code computes, its loop never advancing past S^2. ``"none"``: C (ablation).
        propagation_steps: Number of powers of ``"paper"``, at least 1. Paper and code: 4.
        foreground: Branch whose START token marks the foreground: ``"uncond"`` (code), ``"cond"``.
            An image whose unconditional branch has no START, as SDXL's where no negative prompt is
            given, takes the text's with either value; one whose text has none either gets plain
            CFG. Where token 0 is a word (T5, Kandinsky's image embeddings), its evidence plays the
            part of START, as in the code; ``benchmark="image"`` needs no START.
        benchmark: Region that has rate 1: ``"foreground"`` (paper, code), or ``"image"`` (ablation
            of the paper). ``"auto"``: the foreground of a U-Net; the image of a transformer, whose
            START has seen the picture, where there is one at all.
        layers_per_level: Use only the last so many layers of a level, in forward order; None: all.
            Code: all for Stable Diffusion, 3 for DeepFloyd IF.
        rate_min: Least rate, dimensionless, > 0. Code: 0.8.
        rate_max: Largest rate, >= ``rate_min``. Code: 3.
        max_scale: Cap on guidance_scale * rate, or None for no cap. Code: 15.
        layers: Transformers only: layers that are read, as numbers of blocks in forward order, or
            names of modules. ``"auto"``: those that the model's row in
            `scfg.recording.layouts` names, or its middle third; None: all. Source: Seg4Diff
            (arXiv 2509.18096) and Shin et al. (2508.07519), who find regions in a few layers.
        joint: Transformers only: how text and image keys of one softmax are told apart, see
            `scfg.reference.split_joint`. ``"renormalise"`` or ``"raw"``. Source: none, measured
            on a small model only.
        min_share: Transformers only: a region with a smaller share of the patches goes, patch by
            patch, to the tokens that come next; 0 keeps all. Source: none; hundreds of tokens would
            leave means over a handful of pixels.
        min_peak: Transformers only: an image on which no word's evidence reaches this many times
            its mean gets plain CFG; 1 or less turns it off. Source: ASG (arXiv 2609.37492), which
            takes peak over mean below 1.5 for a map that says nothing.

    Raises:
        ValueError: A field is out of range; the message names it.
    """

    map_reduction: int = 4
    coarsest_reduction: int = 8
    propagation: str = "paper"
    propagation_steps: int = 4
    foreground: str = "uncond"
    benchmark: str = "auto"
    layers_per_level: int | None = None
    rate_min: float = 0.8
    rate_max: float = 3.0
    max_scale: float | None = 15.0
    layers: str | tuple[int | str, ...] | None = "auto"
    joint: str = "renormalise"
    min_share: float = 0.01
    min_peak: float = 1.5

    def __post_init__(self):
        for name in ("map_reduction", "coarsest_reduction"):
            value = getattr(self, name)
            if type(value) is not int or value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two >= 1, got {value!r}")
        if self.coarsest_reduction < self.map_reduction:
            raise ValueError(
                f"coarsest_reduction must be >= map_reduction ({self.map_reduction}), "
                f"got {self.coarsest_reduction}"
            )
        for name, allowed in (
            ("propagation", PROPAGATIONS),
            ("foreground", ("uncond", "cond")),
            ("benchmark", ("auto", "foreground", "image")),
            ("joint", JOINTS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("propagation_steps", "layers_per_level"):
            value = getattr(self, name)
            optional = name == "layers_per_level" and value is None
            if not optional and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        for name in ("rate_min", "rate_max", "max_scale", "min_share", "min_peak"):
            value = getattr(self, name)
            if value is None and name == "max_scale":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not name.startswith("min_") and not SMALLEST <= value <= 1 / SMALLEST:
                raise ValueError(f"{name} must be finite and > 0, as float32, got {value!r}")
        if not 0 <= self.min_share < 1:
            raise ValueError(f"min_share must be in [0, 1), got {self.min_share!r}")
        if not 0 <= self.min_peak < math.inf:
            raise ValueError(f"min_peak must be finite and >= 0, got {self.min_peak!r}")
        if isinstance(self.layers, list):  # as JSON has it
            object.__setattr__(self, "layers", tuple(self.layers))
        named = isinstance(self.layers, tuple) and self.layers
        if self.layers not in ("auto", None) and not (
            named and all(type(layer) in (int, str) for layer in self.layers)
        ):
            raise ValueError(
                f"layers must be 'auto', None or numbers and names of layers, got {self.layers!r}"
            )
        if self.rate_max < self.rate_min:
            raise ValueError(f"rate_max must be >= rate_min ({self.rate_min}), got {self.rate_max}")

    @property
    def reductions(self) -> tuple[int, ...]:
        """Reductions of the levels used, finest first: map_reduction, twice that, ..."""
        levels = (self.coarsest_reduction // self.map_reduction).bit_length()
        return tuple(self.map_reduction << level for level in range(levels))


def check_config(config: SCFGConfig) -> None:
    """Raise TypeError unless config is a `SCFGConfig`."""
    if not isinstance(config, SCFGConfig):
        raise TypeError(f"config must be a scfg.SCFGConfig, got {config!r}")
