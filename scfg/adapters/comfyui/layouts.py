"""ComfyUI's transformers: the table of what differs from class to class, a row a class.

The fields are those of `scfg.recording.layouts`, which has diffusers' own; ``Words.tokenizer`` is
the key under which ComfyUI's CLIP returns the tokens. To add a model, add a row: its blocks are
those whose attention ComfyUI hands ``transformer_options`` to.
"""

import dataclasses
from dataclasses import dataclass

from torch import nn

from scfg.recording.blocks import find_blocks
from scfg.recording.layouts import LAYOUTS, Grid, Layout, Words


def latent_grid(model: nn.Module, call: dict) -> Grid:
    """Of a latent (b, c, H, W) or (b, c, f, H, W), padded to whole patches."""
    size = tuple(call["x"].shape[2:])
    patch = model.patch_size
    patch = (patch,) * 2 if isinstance(patch, int) else tuple(patch)
    patch = (1, 1, *patch)[-len(size) :]
    return ((1, 1) + tuple(-(-s // p) for s, p in zip(size, patch, strict=True)))[-3:]


FLUX = Layout(  # and Flux.2, whose text has a template, and padding in front
    ("",), latent_grid, blocks=("double_blocks", "single_blocks"),
    words=(
        Words("t5xxl"), Words("mistral3_24b", None), Words("qwen3_4b", None),
        Words("qwen3_8b", None),
    ),
    layers=LAYOUTS["FluxTransformer2DModel"].layers,
)  # fmt: skip
ROWS = {
    "OpenAISignatureMMDITWrapper": Layout(
        ("",), latent_grid, blocks=("joint_blocks",), start=(0,),
        words=(Words("l"), Words("t5xxl")), layers=LAYOUTS["SD3Transformer2DModel"].layers,
    ),
    "Flux": FLUX,
    "Chroma": FLUX,
    "QwenImageTransformer2DModel": Layout(
        ("attn",), latent_grid, words=(Words("qwen25_7b", None),),
    ),
    "NextDiT": Layout(
        ("attention",), latent_grid, blocks=("layers",), start=(0,),
        words=(Words("gemma2_2b", None),),
    ),
    "WanModel": Layout(
        ("self_attn", "cross_attn"), latent_grid, blocks=("blocks",), start=(-1,),
        words=(Words("umt5xxl"),),
    ),
}  # fmt: skip
UNET = (Words("l"),)
KNOWN = "SD3, Flux, Flux.2, Chroma, Qwen-Image, Lumina 2, Z-Image, Wan"


@dataclass(frozen=True)
class Kind:
    """What a diffusion model of ComfyUI is to S-CFG.

    Attributes:
        layout: Of a transformer; None: it is a U-Net.
    """

    layout: Layout | None

    @property
    def words(self) -> tuple[Words, ...]:
        """Copies of the prompt among the columns of the text."""
        return UNET if self.layout is None else self.layout.words


def kind_of(model: nn.Module) -> Kind:
    """What a diffusion model is.

    Raises:
        ValueError: It is neither a U-Net with transformer blocks nor a transformer with a row: its
            attention cannot be recorded.
    """
    name = type(model).__name__
    layout = ROWS.get(name)  # by the very class: its heirs attend in other ways
    if layout is None and not hasattr(model, "input_blocks"):
        raise ValueError(
            f"{name} is neither a U-Net nor a transformer that Semantic-aware CFG can record "
            f"({KNOWN}), so that it would be plain CFG. Take the node out"
        )
    if layout is None:
        find_blocks(model)
    elif getattr(model, "pad_tokens_multiple", None):  # Z-Image
        words = (Words("qwen3_4b", None),)
        layout = dataclasses.replace(layout, multiple=model.pad_tokens_multiple, words=words)
    return Kind(layout)
