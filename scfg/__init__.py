"""Semantic-aware classifier-free guidance for diffusion U-Nets.

Shape letters, here and everywhere in the package: b batch, g heads, n pixels of an attention map
(n = h*w), t text tokens, d width of a head, c channels, H W latent pixels, h w map pixels.

One convention: ``eps_uncond + guidance_scale * rate * (eps_text - eps_uncond)``, arguments in the
order (uncond, text); guidance_scale 1 is the text prediction, rate 1 everywhere is plain CFG.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scfg import sampling
    from scfg.config import SCFGConfig
    from scfg.guidance import Guided, cfg, semantic_cfg
    from scfg.recording import Recorder, UNetWrapper, guided

__version__ = "0.2.0"
__all__ = [
    "Guided",
    "Recorder",
    "SCFGConfig",
    "UNetWrapper",
    "cfg",
    "guided",
    "sampling",
    "semantic_cfg",
]

_HOMES = {
    "Guided": "guidance",
    "Recorder": "recording",
    "SCFGConfig": "config",
    "UNetWrapper": "recording",
    "cfg": "guidance",
    "guided": "recording",
    "semantic_cfg": "guidance",
}


def __getattr__(name: str) -> object:
    """Import a name, or a module, when it is first asked for: `scfg --help` needs no torch."""
    if name in _HOMES:
        return getattr(import_module(f"scfg.{_HOMES[name]}"), name)
    try:
        return import_module(f"scfg.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"scfg.{name}":
            raise
        raise AttributeError(f"module 'scfg' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
