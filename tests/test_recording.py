"""Recording changes nothing, and sees the maps that the network forms."""

import pytest
import torch
from conftest import assert_close
from tiny import tiny_unet
from torch.nn import functional as F
from unet_hosts import ALL_LEVELS, NETS, build, hooks, tensor

import scfg
from scfg import backends
from scfg.evidence import fold_maps
from scfg.models.unet import UNetConfig
from scfg.recording import folding
from scfg.recording.recorder import AttentionRecorder


@pytest.mark.parametrize("size", [(18, 26), (17, 25), (16, 8)])
@pytest.mark.parametrize("name", NETS)
def test_output_is_bit_identical_and_regions_equal_those_of_the_kept_maps(name, size):
    net, args, kwargs = build(name, size)
    plain = tensor(net(*args, **kwargs))
    with scfg.UNetWrapper(net, ALL_LEVELS, keep_maps=True) as unet:
        output = tensor(unet(*args, **kwargs))
        assert torch.equal(output, plain)
        predictions = output[:, :3].chunk(2)
        out, found = unet.guide(*predictions, 6.0), unet.regions(len(predictions[0]))
        layers = unet.attention
    assert torch.equal(found.labels, out.labels) and found.rule == out.rule
    assert found.tokens == layers[0].cross_map.shape[-1]
    for layer in layers:
        assert layer.grid == tuple(-(-s // layer.reduction) for s in output.shape[2:])
    maps = [x.self_map for x in layers], [x.cross_map for x in layers]
    expected = scfg.semantic_cfg(*predictions, *maps, 6.0, ALL_LEVELS)
    assert out.labels.unique().numel() > 1
    assert torch.equal(out.labels, expected.labels)
    assert torch.equal(out.foreground, expected.foreground)
    assert_close(actual=out.eps, expected=expected.eps, share=1e-5)
    assert hooks(net) == 0


@pytest.mark.parametrize("budget", [2**26, 60_000, 1], ids=["all", "some", "none"])
@pytest.mark.parametrize("name", NETS)
def test_layers_that_are_kept_and_folded_together_say_what_they_say_one_by_one(
    name, budget, monkeypatch
):
    net, args, kwargs = build(name, (17, 26))
    found, stacked = [], []
    run = backends.run_unchecked

    def listen(operation, backend, device, arguments):
        if operation == "stacked_maps":
            stacked.append(len(arguments["q_self"]))
        return run(operation, backend, device, arguments)

    monkeypatch.setattr(backends, "run_unchecked", listen)
    for room in (0, budget):
        monkeypatch.setitem(folding.GROUP_BUDGET, "cpu", room)
        with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
            for _ in range(2):  # nothing of one call is left to the next
                unet(*args, **kwargs)
            found.append(unet.evidence)
            names = [layer.name for layer in unet.attention]
        assert room or not stacked
    alone, together = found
    assert alone.reductions == together.reductions and len(names) > 1
    for reduction in alone.reductions:
        assert torch.equal(alone.total(reduction), together.total(reduction))
    if budget == 2**26 and name in ("sd15", "sdxl"):
        assert max(stacked) > 1 and sum(stacked) == 2 * len(names)


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


def test_attention_to_a_key_counts_to_the_token_that_owns_it():
    net, args, _ = build("own")
    owners = torch.tensor([[0, 1, 1, 2, 2, 2, 6]]).expand(4, -1)
    found = []
    for given in (None, owners):
        recorder = AttentionRecorder(net, ALL_LEVELS, "auto", keep_maps=True)
        recorder.start(args[0], given)
        net(*args)
        found.append(recorder.finish())
        layers = recorder.layers
        recorder.remove()
    self_maps, cross_maps = [x.self_map for x in layers], [x.cross_map for x in layers]
    owned = [x @ F.one_hot(owners[0], 7).float() for x in cross_maps]
    for evidence, maps in zip(found, (cross_maps, owned), strict=True):
        expected = fold_maps(args[0][:2], self_maps, maps, ALL_LEVELS, "auto")
        for reduction in expected.reductions:
            total = expected.total(reduction)
            assert_close(actual=evidence.total(reduction), expected=total, share=1e-5)


def test_joint_keys_share_one_softmax():
    net, args, _ = build("deepfloyd")
    with scfg.UNetWrapper(net, ALL_LEVELS, keep_maps=True) as unet:
        unet(*args)
        for layer in unet.attention:
            rows = layer.self_map.sum(-1) + layer.cross_map.sum(-1)
            assert_close(actual=rows, expected=torch.ones_like(rows), share=1e-5)
            assert layer.cross_map.shape[-1] == 7


def test_masked_text_under_one_softmax_is_as_if_it_were_not_there():
    net, (x, t, context), _ = build("deepfloyd")
    mask = (torch.arange(7) < 5).expand(len(x), -1)
    with scfg.UNetWrapper(net, ALL_LEVELS, keep_maps=True) as unet:
        unet(x, t, context[:, :5])
        short = unet.attention
        unet(x, t, context, encoder_attention_mask=mask)
        for layer, expected in zip(unet.attention, short, strict=True):
            assert_close(actual=layer.self_map, expected=expected.self_map, share=1e-4)
            assert_close(actual=layer.cross_map[..., :5], expected=expected.cross_map, share=1e-4)
            assert not layer.cross_map[..., 5:].any()


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


def test_compiled_unet_records_the_same():
    net = tiny_unet(config=UNetConfig(4, 4, (8, 16), (1, 1), 1, (1, 2), 1, 24, norm_groups=4))
    args, config = build("own")[1], scfg.SCFGConfig(map_reduction=1, coarsest_reduction=2)
    with scfg.UNetWrapper(net, config) as unet:
        eps = unet(*args).chunk(2)
        expected = unet.guide(*eps, 6.0)
    torch._dynamo.reset()
    with scfg.UNetWrapper(torch.compile(net, fullgraph=True, backend="aot_eager"), config) as unet:
        for scale in (6.0, 3.0):
            out = unet.guide(*unet(*args).chunk(2), scale)
        assert torch.equal(out.labels, expected.labels)
    assert hooks(net) == 0
