"""From noise to pictures by any noise predictor; knows nothing of guidance."""

from scfg.sampling.noise import Schedule, Spacing, scaled_linear
from scfg.sampling.samplers import (
    Callback,
    Predictor,
    Rule,
    ddim,
    ddim_rule,
    dpmpp_2m,
    dpmpp_2m_rule,
    euler,
    euler_ancestral,
    sample,
)

__all__ = [
    "Callback",
    "Predictor",
    "Rule",
    "Schedule",
    "Spacing",
    "ddim",
    "ddim_rule",
    "dpmpp_2m",
    "dpmpp_2m_rule",
    "euler",
    "euler_ancestral",
    "sample",
    "scaled_linear",
]
