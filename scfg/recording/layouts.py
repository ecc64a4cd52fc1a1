"""Transformers: the table of what differs from model to model, a row a class.

Everything else about them is found while they run (`scfg.recording.replay`). To add a model, add a
row, or give one as ``layout=``. Source of the rows: diffusers 0.42; of START, what each text
encoder is; of the layers, Shin et al. (arXiv 2508.07519, table of best blocks) and Seg4Diff
(2509.18096), None where nobody has ranked them (the middle third is then read).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

Grid = tuple[int, int, int]  # frames, rows and columns of patches


@dataclass(frozen=True)
class Words:
    """Where one tokenizer's copy of the prompt is among the columns of the text.

    Attributes:
        tokenizer: Attribute of the pipeline.
        first: Column of the prompt's first token; None: the prompt is the last thing before the
            padding, and ends where the mask of the text does.
        room: Columns that the prompt may take, the end token among them; None: all.
    """

    tokenizer: str
    first: int | None = 0
    room: int | None = None


@dataclass(frozen=True)
class Layout:
    """How a transformer holds its image and its text.

    Attributes:
        attention: Of each block: ``("attn",)``, one softmax over text and image keys, or
            ``("attn1", "attn2")``, the image's to itself, then to the text. ``""`` is the block.
        grid: From the model and its call's arguments by name to (f, h, w) of the patches.
        blocks: Lists of blocks, in forward order.
        order: ``"text image"`` or ``"image text"``, of the sequence in a joint softmax.
        registers: Learned tokens before the text.
        multiple: The image's part of the sequence is padded to a multiple of so many.
        packed: Each sample has its text, as long as this argument's mask says, then its image at
            once, then padding; None: text and image have their places.
        mask: Argument that is the text's mask, where the model is given one.
        start: Columns that know nothing of the prompt (negative: from the end), in order of
            preference one group; () if none is known.
        words: Copies of the prompt among the columns.
        layers: Blocks to read, by number of blocks; else the middle third of the first list.
        linear: The self-attention is linear.
        texts: Arguments that hold the text, (b, t, c), one after another.
        listed: The latents and texts are lists, of ``x`` and ``cap_feats``.
        side: Latent pixels along an axis that one token of a packed prediction (b, n, c) has; 0 if
            predictions are not packed.
        variance: Predictions have twice the channels, a learned variance behind.
    """

    attention: tuple[str, ...]
    grid: Callable[[nn.Module, dict], Grid]
    blocks: tuple[str, ...] = ("transformer_blocks",)
    order: str = "text image"
    registers: int = 0
    multiple: int = 1
    packed: str | None = None
    mask: str | None = None
    start: tuple[int, ...] = ()
    words: tuple[Words, ...] = ()
    layers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    linear: bool = False
    texts: tuple[str, ...] = ("encoder_hidden_states",)
    listed: bool = False
    side: int = 0
    variance: bool = False

    def lead(self, grid: Grid) -> int:
        """Columns before the text: registers, and what pads the image."""
        f, h, w = grid
        return self.registers + -f * h * w % self.multiple


def sample_grid(model: nn.Module, call: dict) -> Grid:
    """Of a latent (b, c, H, W) or (b, c, f, H, W), cut into patches of ``config.patch_size``."""
    size = call["hidden_states"].shape[2:]
    patch = model.config.patch_size
    patch = (patch,) * len(size) if isinstance(patch, int) else tuple(patch)[-len(size) :]
    return ((1, 1) + tuple(s // p for s, p in zip(size, patch, strict=True)))[-3:]


def ids_grid(model: nn.Module, call: dict) -> Grid:
    """Of ``img_ids`` (n, 3): image, row and column of each token."""
    images, rows, columns = (call["img_ids"].reshape(-1, 3).amax(dim=0).long() + 1).tolist()
    if images != 1:
        raise ValueError(f"img_ids must be of one image, got {images} (an image to edit?)")
    return 1, rows, columns


def shapes_grid(model: nn.Module, call: dict) -> Grid:
    """Of ``img_shapes``: (f, h, w) of each image of each sample."""
    shapes = call["img_shapes"]
    first = shapes[0] if isinstance(shapes[0], (list, tuple)) else shapes
    images = first if isinstance(first[0], (list, tuple)) else [first]
    if len(images) != 1:
        raise ValueError(f"img_shapes must be of one image, got {len(images)} (an image to edit?)")
    return tuple(images[0])


def named_grid(model: nn.Module, call: dict) -> Grid:
    """Of ``num_frames``, ``height`` and ``width``, which count tokens."""
    return call["num_frames"], call["height"], call["width"]


def pixels_grid(model: nn.Module, call: dict) -> Grid:
    """Of a latent ``x`` (b, c, H, W), each pixel a patch."""
    return 1, *call["x"].shape[2:]


def list_grid(model: nn.Module, call: dict) -> Grid:
    """Of a list of latents (c, f, H, W)."""
    sizes = {tuple(x.shape) for x in call["x"]}
    if len(sizes) != 1:
        raise ValueError(f"x must hold latents of one size, got {sorted(sizes)}")
    _, f, h, w = sizes.pop()
    return f // call["f_patch_size"], h // call["patch_size"], w // call["patch_size"]


T5 = Words("tokenizer")
LAYOUTS = {
    "JointTransformer": Layout(
        ("attn",), pixels_grid, blocks=("blocks",), start=(0,), texts=("context",),
        layers={6: (0, 1)},  # of the weights that ship; measured on 32 scenes, docs/evidence.md
    ),  # scfg.models.transformer
    "SD3Transformer2DModel": Layout(
        ("attn",), sample_grid, order="image text", start=(0,),
        words=(Words("tokenizer", 1, 76), Words("tokenizer_3", 77)),
        layers={24: (7, 8, 9), 38: (16, 18, 20, 21, 24)},
    ),
    "QwenImageTransformer2DModel": Layout(
        ("attn",), shapes_grid, mask="encoder_hidden_states_mask", side=2, words=(T5,),
    ),
    "FluxTransformer2DModel": Layout(
        ("attn",), ids_grid, blocks=("transformer_blocks", "single_transformer_blocks"),
        words=(Words("tokenizer_2"),), layers={57: (12, 14, 17, 18)}, side=2,
    ),
    "ChromaTransformer2DModel": Layout(
        ("attn",), ids_grid, blocks=("transformer_blocks", "single_transformer_blocks"),
        words=(T5,), layers={57: (12, 14, 17, 18)}, side=2,
    ),
    "PixArtTransformer2DModel": Layout(
        ("attn1", "attn2"), sample_grid, mask="encoder_attention_mask", words=(T5,), variance=True,
    ),
    "SanaTransformer2DModel": Layout(
        ("attn1", "attn2"), sample_grid, mask="encoder_attention_mask", start=(0,),
        words=(Words("tokenizer", None),), linear=True,
    ),
    "HunyuanDiT2DModel": Layout(
        ("attn1", "attn2"), sample_grid, blocks=("blocks",), start=(-1,),
        words=(Words("tokenizer", 1, 76), Words("tokenizer_2", 77)), variance=True,
        texts=("encoder_hidden_states", "encoder_hidden_states_t5"),
    ),
    "Lumina2Transformer2DModel": Layout(
        ("attn",), sample_grid, blocks=("layers",), packed="encoder_attention_mask",
        mask="encoder_attention_mask", start=(0,), words=(Words("tokenizer", None),),
    ),
    "ZImageTransformer2DModel": Layout(
        ("attention",), list_grid, blocks=("layers",), order="image text", multiple=32, start=(0,),
        words=(Words("tokenizer", 3),), listed=True,
    ),
    "CogView4Transformer2DModel": Layout(
        ("attn1",), sample_grid, start=(0,), words=(Words("tokenizer", None),),
    ),
    "AuraFlowTransformer2DModel": Layout(
        ("attn",), sample_grid, blocks=("joint_transformer_blocks", "single_transformer_blocks"),
        registers=8, words=(T5,),
    ),
    "WanTransformer3DModel": Layout(
        ("attn1", "attn2"), sample_grid, blocks=("blocks",), start=(-1,), words=(T5,),
    ),
    "LTXVideoTransformer3DModel": Layout(
        ("attn1", "attn2"), named_grid, mask="encoder_attention_mask", side=1,
        words=(T5,),
    ),
}  # fmt: skip


def find_layout(model: nn.Module) -> Layout | None:
    """The row of a model, or of what it is made from; None if there is none."""
    for kind in type(getattr(model, "_orig_mod", model)).__mro__:
        if kind.__name__ in LAYOUTS:
            return LAYOUTS[kind.__name__]
    return None


def find_layers(
    model: nn.Module,
    layout: Layout,
    layers: str | tuple[int | str, ...] | None,
    missing: bool = True,
) -> dict[str, list[str]]:
    """Attention modules of the chosen blocks.

    Args:
        model: The transformer.
        layout: Its row.
        layers: See `SCFGConfig.layers`.
        missing: Whether a block without attention is an error; else it is left out.

    Returns:
        By name of the block, in forward order, the names of its attention modules.

    Raises:
        ValueError: A block, or an attention module in it, is not there.
    """
    model = getattr(model, "_orig_mod", model)
    lists = [
        [f"{name}.{i}" for i in range(len(getattr(model, name, ())))] for name in layout.blocks
    ]
    names = [name for part in lists for name in part]
    kind = type(model).__name__
    if not names:
        raise ValueError(f"{kind} must have blocks in {layout.blocks}, found none")
    if layers == "auto":
        first = max(len(lists[0]), 1)
        middle = tuple(range(first // 3, max(first - first // 3, first // 3 + 1)))
        layers = layout.layers.get(len(names), middle)
    chosen = {}
    for layer in range(len(names)) if layers is None else layers:
        if isinstance(layer, int):
            if not 0 <= layer < len(names):
                raise ValueError(f"layers has {layer}, {kind} has blocks 0 to {len(names) - 1}")
            layer = names[layer]
        block = next(
            (name for name in names if layer == name or layer.startswith(name + ".")), None
        )
        modules = [f"{block}.{attention}".removesuffix(".") for attention in layout.attention]
        if not missing and not all(_has(model, module) for module in modules):
            continue
        if block is None or not all(_has(model, module) for module in modules):
            raise ValueError(
                f"layers has {layer!r}, {kind} has no attention {layout.attention} there"
            )
        chosen[block] = modules
    return {name: chosen[name] for name in names if name in chosen}


def _has(model: nn.Module, name: str) -> bool:
    try:
        return model.get_submodule(name) is not None
    except AttributeError:
        return False


def call_arguments(model: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by name, defaults among them."""
    model = getattr(model, "_orig_mod", model)
    bound = inspect.signature(type(model).forward).bind(model, *args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
