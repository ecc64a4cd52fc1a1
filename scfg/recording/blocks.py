"""U-Nets: which of their modules are transformer blocks.

A transformer block is a module with exactly two children that have ``to_q``, ``to_k``, ``heads``:
self-attention, then cross-attention (diffusers, CompVis, ComfyUI, `scfg.models.unet`), or an
attention module with ``add_k_proj``, whose keys are text and image at once (DeepFloyd IF). Those of
a control branch (``ctrl_*``, ControlNet-XS) do not count: they may be left out at some steps.
"""

from torch import nn


def _is_attention(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("to_q", "to_k", "heads"))


def _is_joint(module: nn.Module) -> bool:
    return _is_attention(module) and getattr(module, "add_k_proj", None) is not None


def find_blocks(unet: nn.Module) -> list[tuple[str, list[nn.Module]]]:
    """Every transformer block of a U-Net.

    Returns:
        Name and attention modules of each, [self, cross] or [joint], in order of registration.

    Raises:
        TypeError: unet is no network.
        ValueError: There is none, or one that no map can be read from.
    """
    if not hasattr(unet, "named_modules"):
        holds = "; give its .unet, or use scfg.adapters" if hasattr(unet, "unet") else ""
        raise TypeError(f"unet must be a torch.nn.Module, got {type(unet).__name__}{holds}")
    blocks = []
    for name, module in unet.named_modules():
        if any(part.startswith("ctrl_") for part in name.split(".")):
            continue
        if _is_joint(module):
            _check_joint(name, module)
        attentions = [child for child in module.children() if _is_attention(child)]
        if _is_joint(module):
            blocks.append((name, [module]))
        elif len(attentions) == 2 and not any(map(_is_joint, attentions)):
            blocks.append((name, attentions))
    if not blocks:
        raise ValueError(
            "unet must have transformer blocks (modules with to_q, to_k, heads, self- before "
            f"cross-attention), found none in {type(unet).__name__}"
        )
    return blocks


def _check_joint(name: str, module: nn.Module) -> None:
    """Raise where text and image share a softmax in another way than DeepFloyd IF's."""
    if getattr(module, "add_q_proj", None) is not None:
        raise ValueError(f"unet must be a U-Net, but in {name!r} the text attends too (add_q_proj)")
    if module.to_k is None:
        raise ValueError(
            f"unet must have self-attention, but {name!r} attends to the text only "
            "(only_cross_attention)"
        )


def folding_module(unet: nn.Module, name: str) -> nn.Module:
    """The module after which a block's attention is folded: the block itself.

    A block that is compiled by itself shares its code with its likes, for as long as their hooks
    do the same; folding differs from layer to layer and is done after what holds the block.
    """
    module = unet.get_submodule(name)
    while isinstance(module, nn.ModuleList) or getattr(module, "_compiled_call_impl", None):
        name = name.rpartition(".")[0]
        module = unet.get_submodule(name)
        if not name:
            break
    return module
