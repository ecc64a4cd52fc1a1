"""Recording changes nothing, sees the right maps, grows with nothing, and leaves no trace."""

import dataclasses
import gc
import weakref

import pytest
import torch
from conftest import assert_close
from diffusers import UNet2DConditionModel
from tiny import LATENT_UNET, tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode

import scfg
from scfg import evidence
from scfg.models.unet import UNet, UNetConfig
from scfg.recording.blocks import find_blocks

COMMON = {"norm_num_groups": 8, "layers_per_block": 1, "cross_attention_dim": 24}
DOWN, UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


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


def own():
    return UNet(
        UNetConfig(
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32, 32),
            transformer_depth=(1, 1, 1),
            heads=(2, 2, 2),
            layers_per_block=1,
            cross_attention_dim=24,
            norm_groups=8,
        )
    )


NETS = {"sd15": sd15, "sdxl": sdxl, "deepfloyd": deepfloyd, "own": own}
ALL_LEVELS = scfg.SCFGConfig(map_reduction=2, coarsest_reduction=8)


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


@pytest.mark.parametrize("size", [(18, 26), (17, 25), (16, 8)])
@pytest.mark.parametrize("name", NETS)
def test_output_is_bit_identical_and_regions_equal_those_of_the_kept_maps(name, size):
    net, args, kwargs = build(name, size)
    plain = tensor(net(*args, **kwargs))
    with scfg.UNetWrapper(net, ALL_LEVELS, keep_maps=True) as unet:
        output = tensor(unet(*args, **kwargs))
        assert torch.equal(output, plain)
        predictions = output[:, :3].chunk(2)
        out = unet.guide(*predictions, 6.0)
        layers = unet.attention
    for layer in layers:
        assert layer.grid == tuple(-(-s // layer.reduction) for s in output.shape[2:])
    maps = [x.self_map for x in layers], [x.cross_map for x in layers]
    expected = scfg.semantic_cfg(*predictions, *maps, 6.0, ALL_LEVELS)
    assert out.labels.unique().numel() > 1
    assert torch.equal(out.labels, expected.labels)
    assert torch.equal(out.foreground, expected.foreground)
    assert_close(actual=out.eps, expected=expected.eps, share=1e-5)
    assert hooks(net) == 0


@pytest.mark.parametrize("name", ["sd15", "sdxl", "own"])
def test_recorded_maps_equal_the_hosts_own_probabilities(name):
    net, args, kwargs = build(name)
    seen = {}

    def probabilities(block, which):
        def hook(module, inputs, options, output):
            text = options.get("encoder_hidden_states", inputs[1] if len(inputs) > 1 else None)
            q = module.to_q(inputs[0]).double().unflatten(-1, (module.heads, -1)).transpose(1, 2)
            k = module.to_k(inputs[0] if text is None else text).double()
            k = k.unflatten(-1, (module.heads, -1)).transpose(1, 2)
            identity = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
            host = torch.nn.functional.scaled_dot_product_attention(q, k, identity)
            seen[block, which] = host.mean(1)

        return hook

    for block, module in net.named_modules():
        if hasattr(module, "attn2"):
            module.attn1.register_forward_hook(probabilities(block, "self"), with_kwargs=True)
            module.attn2.register_forward_hook(probabilities(block, "cross"), with_kwargs=True)
    with scfg.UNetWrapper(net, ALL_LEVELS, keep_maps=True) as unet:
        unet(*args, **kwargs)
        assert unet.attention
        for layer in unet.attention:
            expected = seen[layer.name, "self"], seen[layer.name, "cross"]
            assert_close(actual=layer.self_map, expected=expected[0], share=1e-6)
            assert_close(actual=layer.cross_map, expected=expected[1], share=1e-6)


def test_joint_keys_share_one_softmax():
    net, args, _ = build("deepfloyd")
    with scfg.UNetWrapper(net, ALL_LEVELS, keep_maps=True) as unet:
        unet(*args)
        for layer in unet.attention:
            rows = layer.self_map.sum(-1) + layer.cross_map.sum(-1)
            assert_close(actual=rows, expected=torch.ones_like(rows), share=1e-5)
            assert layer.cross_map.shape[-1] == 7


def test_two_calls_in_either_order_equal_one_batched_call():
    net, (x, t, context), _ = build("own")
    with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
        eps = unet(x, t, context).chunk(2)
        joint = unet.guide(*eps, 6.0)
        for _ in range(2):  # a second step must not see the first
            unet(x[:2], t, context[:2]), unet(x[2:], t, context[2:])
            separate = unet.guide(*eps, 6.0)
            assert torch.equal(separate.labels, joint.labels)
            assert_close(actual=separate.eps, expected=joint.eps, share=1e-5)
    with scfg.UNetWrapper(net, ALL_LEVELS, order=("text", "uncond")) as unet:
        unet(x, t, context.roll(2, 0))
        assert torch.equal(unet.guide(*eps, 6.0).labels, joint.labels)
        unet(x[2:], t, context[2:]), unet(x[:2], t, context[:2])
        assert torch.equal(unet.guide(*eps, 6.0).labels, joint.labels)


def test_branches_may_differ_in_tokens():
    net, (x, t, context), _ = build("own")
    predict = scfg.guided(net, 6.0, ALL_LEVELS)
    out = []
    predict = scfg.guided(net, 6.0, ALL_LEVELS, callback=out.append)
    longer = torch.cat([context[2:], context[2:, :3]], dim=1)  # 10 tokens against 7
    eps = predict(x[:2], t, context[:2], longer)
    assert torch.equal(eps, out[0].eps)
    assert out[0].labels.max() < 10
    predict.unet.remove()


def test_guided_equals_the_wrapper_by_hand():
    net, (x, t, context), _ = build("sd15")
    with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
        expected = unet.guide(*unet(x, t, context).sample.chunk(2), 6.0).eps
    predict = scfg.guided(net, 6.0, ALL_LEVELS)
    actual = predict(x[:2], torch.tensor([10, 10]), *context.chunk(2))
    assert_close(actual=actual, expected=expected, share=1e-5)
    predict.unet.remove()
    assert hooks(net) == 0


def test_key_masks_are_honoured():
    net, args, _ = build("sd15")
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[2:, 4:] = False
    with scfg.UNetWrapper(net, ALL_LEVELS, keep_maps=True) as unet:
        plain = net(*args, encoder_attention_mask=mask).sample
        assert torch.equal(unet(*args, encoder_attention_mask=mask).sample, plain)
        for layer in unet.attention:
            assert (layer.cross_map[2:, :, 4:] == 0).all()
            assert (layer.cross_map[:2, :, 4:] > 0).all()


def test_attention_slicing_and_fused_projections_are_survived():
    net, args, _ = build("sd15")
    with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
        eps = unet(*args).sample.chunk(2)
        expected = unet.guide(*eps, 6.0)
        for change in (
            lambda: net.set_attention_slice(1),
            lambda: net.set_default_attn_processor(),
            lambda: net.fuse_qkv_projections(),
        ):
            change()
            unet(*args)
            out = unet.guide(*eps, 6.0)
            assert torch.equal(out.labels, expected.labels)
            assert_close(actual=out.eps, expected=expected.eps, share=1e-4)


def test_a_projection_replaced_later_is_used():
    net, args, _ = build("own")
    with scfg.UNetWrapper(net, ALL_LEVELS, keep_maps=True) as unet:
        for module in net.modules():
            if hasattr(module, "to_q"):
                base = module.to_q
                module.to_q = torch.nn.Sequential(
                    base, torch.nn.Linear(base.out_features, base.out_features)
                )
        net.requires_grad_(False)
        unet(*args)
        recorded = [layer.cross_map for layer in unet.attention]
    with scfg.UNetWrapper(net, ALL_LEVELS, keep_maps=True) as unet:
        unet(*args)
        for actual, layer in zip(recorded, unet.attention, strict=True):
            assert torch.equal(actual, layer.cross_map)


def test_an_exception_inside_the_unet_leaves_nothing_behind():
    net, args, _ = build("sd15")
    before = net(*args).sample
    unet = scfg.UNetWrapper(net, ALL_LEVELS)
    eps = unet(*args).sample.chunk(2)

    def fail(*_):
        raise KeyboardInterrupt

    handle = net.mid_block.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        unet(*args)
    handle.remove()
    with pytest.raises(RuntimeError, match="guide needs one recorded call"):
        unet.guide(*eps, 6.0)
    unet(*args)
    unet.guide(*eps, 6.0)
    unet.remove()
    assert hooks(net) == 0
    assert torch.equal(net(*args).sample, before)


def test_leaving_the_context_by_an_exception_removes_hooks():
    net, args, _ = build("sd15")
    with pytest.raises(ZeroDivisionError):
        with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
            unet(*args)
            1 / 0  # noqa: B018
    assert hooks(net) == 0


def test_two_wrappers_of_one_unet_do_not_meet():
    net, args, _ = build("own")
    eps = net(*args).chunk(2)
    first, second = scfg.UNetWrapper(net, ALL_LEVELS), scfg.UNetWrapper(net, ALL_LEVELS)
    first(*args)
    with pytest.raises(RuntimeError, match="got none"):
        second.guide(*eps, 6.0)
    second.remove()
    first.guide(*eps, 6.0)
    first.remove()
    assert hooks(net) == 0


def tensors_alive():
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    storages = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter):  # not the fakes of a trace
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


def test_what_is_kept_does_not_grow_with_layers():
    kept = {}
    for depth in (1, 4):
        config = dataclasses.replace(LATENT_UNET, transformer_depth=(depth,) * 4)
        net = tiny_unet(config=config)
        x, t, context = torch.randn(4, 4, 18, 26), torch.tensor(500), torch.randn(4, 7, 24)
        with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
            unet(x, t, context)
            unet.regions(2)
            before = tensors_alive()
            unet.remove()
            kept[depth] = before - tensors_alive()
    assert kept[1] == kept[4] > 0


def test_nothing_is_kept_of_layers_at_other_resolutions():
    net, args, _ = build("own")
    sizes = set()

    def feed_forward(block, queries):
        def before(module, inputs):
            (x,) = inputs
            kept = [query for query in queries if query() is not None]
            assert len(kept) == (0 if x.shape[1] == 18 * 26 else 2)
            sizes.add(x.shape[1])

        return block.ff.register_forward_pre_hook(before)

    with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
        for _, (own_attention, text_attention) in find_blocks(net):
            block = next(m for m in net.modules() if getattr(m, "attn1", None) is own_attention)
            queries = []
            for module in (own_attention, text_attention):
                module.to_q.register_forward_hook(
                    lambda m, a, output, kept=queries: kept.append(weakref.ref(output))
                )
            feed_forward(block, queries)
        unet(*args)
    assert sizes == {18 * 26, 9 * 13, 5 * 7}


class ShapesSeen(TorchDispatchMode):
    """Shapes of everything that is computed."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.shapes.add(tuple(x.shape))
        return result


@pytest.mark.parametrize("propagation", ["paper", "official", "none"])
def test_maps_over_the_budget_are_applied_and_never_formed(monkeypatch, propagation):
    net, args, _ = build("own", size=(17, 25))
    config = scfg.SCFGConfig(map_reduction=1, coarsest_reduction=4, propagation=propagation)
    eps = net(*args).chunk(2)
    with scfg.UNetWrapper(net, config) as unet:
        unet(*args)
        expected = unet.guide(*eps, 6.0)
        monkeypatch.setattr(evidence, "MAP_BUDGET", 4 * 117 * 117 * 4)
        with ShapesSeen() as seen:
            unet(*args)
            out = unet.guide(*eps, 6.0)
    formed = {n for n in (17 * 25, 117, 35) if (4, n, n) in seen.shapes}
    assert formed == (set() if propagation == "none" else {117, 35})
    assert (out.labels == expected.labels).float().mean() > 0.99
    assert_close(actual=out.rate.mean(), expected=expected.rate.mean(), share=1e-2)


def test_layers_per_level_uses_the_last_layers_in_forward_order():
    net, args, _ = build("own")
    eps = net(*args).chunk(2)
    config = scfg.SCFGConfig(map_reduction=1, coarsest_reduction=4, layers_per_level=2)
    every = scfg.SCFGConfig(map_reduction=1, coarsest_reduction=4)
    with scfg.UNetWrapper(net, every, keep_maps=True) as unet:
        unet(*args)
        layers = unet.attention
    last = [x for r in (1, 2, 4) for x in [y for y in layers if y.reduction == r][-2:]]
    maps = [x.self_map for x in last], [x.cross_map for x in last]
    expected = scfg.semantic_cfg(*eps, *maps, 6.0, every)
    with scfg.UNetWrapper(net, config, keep_maps=True) as unet:
        for kept in (len(layers), len(last)):  # from the second call on, early layers are skipped
            unet(*args)
            assert len(unet.attention) == kept
            assert torch.equal(unet.guide(*eps, 6.0).labels, expected.labels)


def test_missing_layers_and_levels_are_errors():
    net, args, _ = build("own")
    with scfg.UNetWrapper(net, scfg.SCFGConfig(map_reduction=8, coarsest_reduction=16)) as unet:
        with pytest.raises(RuntimeError, match=r"no attention layer at reductions \(8, 16\)"):
            unet(*args)
    unet = scfg.UNetWrapper(net, ALL_LEVELS)
    skipped = next(m for m in net.modules() if hasattr(m, "attn2"))
    original, skipped.forward = skipped.forward, lambda x, *rest, **options: x
    with pytest.raises(RuntimeError, match="recorded .* attention modules, expected all"):
        unet(*args)
    skipped.forward = original
    unet.remove()
    with pytest.raises(ValueError, match="found none in Linear"):
        scfg.UNetWrapper(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="order must be"):
        scfg.UNetWrapper(net, order=("cond", "uncond"))


def test_guide_refuses_a_batch_it_did_not_record():
    net, args, _ = build("own")
    with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
        eps = unet(*args)
        with pytest.raises(
            RuntimeError, match=r"one recorded call of 8 rows or two of 4, got \[4\]"
        ):
            unet.guide(eps, eps, 6.0)


def test_compiled_unet_records_the_same():
    net, args, _ = build("own")
    with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
        eps = unet(*args).chunk(2)
        expected = unet.guide(*eps, 6.0)
    torch._dynamo.reset()
    with scfg.UNetWrapper(
        torch.compile(net, fullgraph=True, backend="aot_eager"), ALL_LEVELS
    ) as unet:
        for scale in (6.0, 3.0):
            out = unet.guide(*unet(*args).chunk(2), scale)
        assert torch.equal(out.labels, expected.labels)
    assert hooks(net) == 0
