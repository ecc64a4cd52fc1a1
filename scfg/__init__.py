"""Semantic-aware classifier-free guidance for diffusion U-Nets.

Shape letters, here and everywhere in the package: b batch, g heads, n pixels of an attention map
(n = h*w), t text tokens, d width of a head, c channels, H W latent pixels, h w map pixels.

One convention: ``eps_uncond + guidance_scale * rate * (eps_text - eps_uncond)``, arguments in the
order (uncond, text); guidance_scale 1 is the text prediction, rate 1 everywhere is plain CFG.
"""

import sys

from scfg import sampling
from scfg.config import SCFGConfig
from scfg.guidance import Guided, cfg, semantic_cfg
from scfg.models import unet
from scfg.recording import Recorder, UNetWrapper, guided

__version__ = "0.1.0"
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
sys.modules["scfg.unet"] = unet  # as os.path is: `from scfg.unet import UNet` works
