"""Which layers of a transformer find regions: a ranking for models that nobody has ranked.

A layer that agrees with what the others say together is better than one that does not: it was so of
a small network on drawn scenes, whose masks are known. That it holds for real weights is a
conjecture; look at the labels too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from scfg.config import SCFGConfig
from scfg.evidence import Evidence
from scfg.patches import own_patches
from scfg.recording.layouts import Layout
from scfg.recording.replayed import TransformerRecorder


@dataclass(frozen=True)
class RankedLayer:
    """What one layer says.

    Attributes:
        name: Module path of the block.
        agreement: Share of the patches, 0 to 1, whose owner is that which all other layers name
            together.
        peak: Largest ratio of peak to mean of a word's evidence; near 1 it says nothing.
        text_mass: Share of the attention of a patch that goes to the text, 0 to 1; 1 where text is
            attended to apart.
    """

    name: str
    agreement: float
    peak: float
    text_mass: float


def rank_layers(
    model: nn.Module,
    call: Callable[[], object],
    config: SCFGConfig = SCFGConfig(),  # noqa: B008  (frozen)
    layout: Layout | None = None,
    words: Tensor | None = None,
    rows: slice = slice(None),
    backend: str = "auto",
) -> list[RankedLayer]:
    """Rank the layers of a transformer by one call of it, best first.

    Args:
        model: The transformer, not compiled.
        call: Runs it once on text and a latent, half of the noise gone.
        config: All but its layers is used.
        layout: Row of the model; None: looked up.
        words: See `TransformerRecorder.start`.
        rows: Rows of the batch that have the text.
        backend: See `scfg.ops`.

    Raises:
        ValueError: No row fits.
        RuntimeError: A layer cannot be recorded.
    """
    config = replace(config, layers=None)
    recorder = TransformerRecorder(model, config, backend, layout=layout)
    recorder.apart = True

    def start(module, args, kwargs):
        recorder.start(args, kwargs, words, rows)

    hook = model.register_forward_pre_hook(start, with_kwargs=True)
    try:
        with torch.no_grad():
            call()
        evidence = recorder.finish()
    finally:
        hook.remove()
        recorder.remove()
    return rank_evidence(evidence, recorder, config, backend)


def rank_evidence(
    evidence: Evidence, recorder: TransformerRecorder, config: SCFGConfig, backend: str = "auto"
) -> list[RankedLayer]:
    """`rank_layers` from evidence whose layers a recorder kept apart, all on all patches."""
    patches, total = evidence.patches, evidence.total(1)
    config = replace(config, min_share=0.0)
    owning = patches.owning.to(total.device)
    ranked = []
    for own, name, mass in zip(
        evidence.levels[1], recorder.names, recorder.text_masses, strict=True
    ):
        labels = own_patches(own, patches, None, config, backend)[0]
        others = own_patches(total - own, patches, None, config, backend)[0]
        columns = own[..., :-1]
        peaks = columns.amax(dim=1) / columns.mean(dim=1).clamp_min(1e-30)  # (b, groups)
        ranked.append(
            RankedLayer(
                name,
                (labels == others).float().mean().item(),
                torch.where(owning, peaks, 0).amax(dim=1).mean().item(),
                float(mass),
            )
        )
    return sorted(ranked, key=lambda layer: -layer.agreement)


def table(ranked: list[RankedLayer]) -> str:
    """The ranking as text."""
    width = max(len(layer.name) for layer in ranked)
    lines = [f"{'layer':{width}}  agreement  peak/mean  text mass"]
    for x in ranked:
        lines.append(f"{x.name:{width}}  {x.agreement:9.3f}  {x.peak:9.2f}  {x.text_mass:9.3f}")
    return "\n".join(lines)
