"""Spatial inconsistency on noised real scenes: guidance over their true regions."""

import torch
from torch import Tensor

from scfg.evaluate.draw import CONFIGS, METHODS, samg, spread
from scfg.evaluate.regions import Probe
from scfg.guidance import semantic_cfg

GUIDANCE_SCALE = 2.5  # rates depend on it only through the cap of 15, the spread of CFG not at all


def true_spread(probe: Probe) -> Tensor:
    """`spread` over the regions a scene was drawn with, (b, methods) in the order of `METHODS`.

    The regions are those of the masks, not those that a method found: no method can make its own
    regions even and be measured on them.
    """
    predictions = (probe.eps_uncond, probe.eps_text)
    guided = {"cfg": probe.eps_text, "samg": samg(*predictions, GUIDANCE_SCALE)[0]}
    own_maps, cross_maps = ([layer[i] for layer in probe.layers] for i in (1, 2))
    for method, config in CONFIGS.items():
        out = semantic_cfg(*predictions, own_maps, cross_maps, GUIDANCE_SCALE, config)
        guided[method] = out.eps
    spreads = [spread(probe.eps_uncond, guided[method], probe.truth, 3) for method in METHODS]
    return torch.stack(spreads, dim=1).cpu()
