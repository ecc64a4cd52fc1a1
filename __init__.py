"""Lets a clone of this repository be a folder of ComfyUI's ``custom_nodes``."""

import sys
from pathlib import Path

if __package__:  # loaded as a pack of nodes, not found on the way by a test runner
    sys.path.append(str(Path(__file__).parent))
    from scfg.adapters.comfyui import comfy_entrypoint

    WEB_DIRECTORY = "scfg/adapters/comfyui/web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
