"""Steps 1 and 2 of the method as a value: which token owns each patch."""

from dataclasses import dataclass

from torch import Tensor

from scfg import ops
from scfg.config import SCFGConfig
from scfg.evidence import Evidence, map_grid
from scfg.patches import benchmark_rule, needs_uncond, own_patches


@dataclass(frozen=True, eq=False)
class Regions:
    """Steps 1 and 2 of the method: which token owns each patch of b images.

    Attributes:
        labels: (b, h, w) int64 in [0, tokens), token that owns each patch; (b, f, h, w) of a clip.
        foreground: The same shape, bool.
        tokens: t.
        start_is_flat: (b,) bool, whether the branch that should mark the foreground has no START
            (see `scfg.reference.start_is_flat`), so that the text's START marked it.
        benchmark: What rates are relative to, see `scfg.reference.region_rates`; None: config's.
        rule: How the benchmark region was found, in words.
    """

    labels: Tensor
    foreground: Tensor
    tokens: int
    start_is_flat: Tensor
    benchmark: str | None = None
    rule: str = ""


def evidence_levels(*, uncond: Evidence | None, text: Evidence, config: SCFGConfig) -> dict:
    """text, front, h, w and factors of `scfg.reference.segment`."""
    if uncond is None:
        raise RuntimeError("a U-Net's unconditional branch must be recorded too, got None")
    for name, branch in (("uncond", uncond), ("text", text)):
        if branch.tokens < 2:
            raise ValueError(f"{name} must have START and another token, got {branch.tokens} token")
    if text.reductions != uncond.reductions or text.size != uncond.size:
        raise RuntimeError(
            f"both branches must be recorded alike, got levels {uncond.reductions} of size "
            f"{uncond.size} (unconditional) and {text.reductions} of size {text.size} (text)"
        )
    levels = [text.total(r) for r in text.reductions]
    front = [uncond.total(r) for r in text.reductions] if config.foreground == "uncond" else levels
    factors = [r // config.map_reduction for r in text.reductions]
    h, w = map_grid(text.size, config.map_reduction)
    return dict(text=levels, front=front, h=h, w=w, factors=factors)


def find_regions(
    *, uncond: Evidence | None, text: Evidence, config: SCFGConfig, backend: str = "auto"
) -> Regions:
    """Regions from what the network said in its two branches.

    Args:
        uncond: Evidence of the unconditional branch, b rows; None where it is not needed (see
            `scfg.patches.needs_uncond`).
        text: Evidence of the text branch, b rows.
        config: Its foreground says whose START counts.
        backend: See `scfg.ops`.

    Returns:
        Regions.

    Raises:
        RuntimeError: The branches do not have the same levels.
        ValueError: benchmark is "foreground" and the text has no START, or a U-Net's branch has one
            token only, which is START: no region could have a word.
    """
    if text.patches is not None:
        return _patch_regions(uncond, text, config, backend)
    levels = evidence_levels(uncond=uncond, text=text, config=config)
    labels, foreground, flat = ops.segment(**levels, backend=backend)
    return Regions(labels, foreground, text.tokens, flat, *unet_benchmark(config))


def unet_benchmark(config: SCFGConfig) -> tuple[str, str]:
    """`Regions.benchmark` and `Regions.rule` of a U-Net."""
    if config.benchmark == "image":
        return "image", "image"
    branch = "text" if config.foreground == "cond" else "unconditional"
    return "foreground", f"START of the {branch} branch"


def _patch_regions(
    uncond: Evidence | None, text: Evidence, config: SCFGConfig, backend: str
) -> Regions:
    """`find_regions` of a transformer, see `own_patches`."""
    patches, front = text.patches, None
    if config.benchmark == "foreground":
        if not patches.start:
            raise ValueError(
                "benchmark 'foreground' needs text columns that know nothing of the prompt, and "
                "for this model none is known; take 'image' or 'auto'"
            )
        branch = uncond if needs_uncond(config) else text
        if branch is None or branch.patches is None or branch.patches.grid != patches.grid:
            raise RuntimeError("both branches must be recorded alike, the unconditional one is not")
        front = branch.total(1)
    labels, foreground, flat = own_patches(text.total(1), patches, front, config, backend)
    return Regions(labels, foreground, patches.text, flat, "foreground", benchmark_rule(config))
