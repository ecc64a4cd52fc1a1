"""S-CFG as nodes of ComfyUI: put ``custom_nodes/semantic_cfg.py`` there, with one line.

from scfg.adapters.comfyui import comfy_entrypoint
"""


async def comfy_entrypoint():
    """What ComfyUI calls to load the pack."""
    from scfg.adapters.comfyui.nodes import Extension

    return Extension()
