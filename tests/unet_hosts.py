"""Tiny U-Nets of every kind that is recorded: three of diffusers, and that of the tests."""

import torch
from diffusers import UNet2DConditionModel
from tiny import tiny_unet

import scfg

COMMON = {"norm_num_groups": 8, "layers_per_block": 1, "cross_attention_dim": 24}
DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
ALL_LEVELS = scfg.SCFGConfig(map_reduction=2, coarsest_reduction=8)


def sd15():
    return UNet2DConditionModel(block_out_channels=(16, 32, 32, 32), attention_head_dim=2, **COMMON)


def sdxl():
    return UNet2DConditionModel(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", DOWN, DOWN),
        up_block_types=(UP, UP, "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,
        **COMMON,
    )


def deepfloyd():
    return UNet2DConditionModel(
        in_channels=3,
        out_channels=6,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
        attention_head_dim=8,
        encoder_hid_dim=24,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="positional",
        **COMMON,
    )


NETS = {"sd15": sd15, "sdxl": sdxl, "deepfloyd": deepfloyd, "own": tiny_unet}


def build(name, size=(18, 26), b=2, tokens=7, seed=0):
    """A random U-Net, its batched arguments and keyword arguments."""
    if name == "deepfloyd":  # its downsampling takes even sizes only
        size = tuple(-(-s // 8) * 8 for s in size)
    torch.manual_seed(seed)
    net = NETS[name]().eval().requires_grad_(False)
    x = torch.randn(b, 3 if name == "deepfloyd" else 4, *size)
    args = [torch.cat([x, x]), torch.tensor(10), torch.randn(2 * b, tokens, 24)]
    added = {"text_embeds": torch.randn(2 * b, 10), "time_ids": torch.rand(2 * b, 6)}
    return net, args, {"added_cond_kwargs": added} if name == "sdxl" else {}


def tensor(output):
    return output if isinstance(output, torch.Tensor) else output.sample


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
