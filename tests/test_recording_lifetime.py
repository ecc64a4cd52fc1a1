"""What recording keeps and for how long: nothing after an error, nothing that grows, no trace."""

import dataclasses
import gc
import weakref

import pytest
import torch
from conftest import assert_close
from tiny import LATENT_UNET, tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode
from unet_hosts import ALL_LEVELS, build, hooks

import scfg
from scfg import evidence
from scfg.recording.blocks import find_blocks


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
    assert sizes == {18 * 26, 9 * 13, 5 * 7, 3 * 4}


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


def test_missing_layers_and_levels_are_errors():
    net, args, _ = build("own")
    with scfg.UNetWrapper(net, scfg.SCFGConfig(map_reduction=16, coarsest_reduction=32)) as unet:
        with pytest.raises(RuntimeError, match=r"no attention layer at reductions \(16, 32\)"):
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
        with pytest.raises(ValueError, match=r"eps_uncond must have shape \(4, .* got \(2, "):
            unet.guide(eps[:2], eps, 6.0)
