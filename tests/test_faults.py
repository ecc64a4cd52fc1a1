"""Whatever is raised wherever: the next call is what it was, and nothing stays behind."""

import pytest
import torch
from conftest import assert_close
from test_hosts import Host, untouched
from test_recording import ALL_LEVELS, NETS, build, hooks, tensor

import scfg
from benchmarks import soak
from scfg.adapters.diffusers import attach
from scfg.adapters.k_diffusion import denoiser

KINDS = (RuntimeError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt, SystemExit)
KINDS += (GeneratorExit,)


def sampled(net, count):
    """Modules of a network that are called, evenly from first to last."""
    called = [m for m in net.modules() if not isinstance(m, torch.nn.ModuleList)]
    return [called[i * (len(called) - 1) // (count - 1)] for i in range(count)]


def raising(module, kind, before):
    """A hook that raises when a module is called, or when it has run."""

    def fail(*_):
        raise kind("on purpose")

    register = module.register_forward_pre_hook if before else module.register_forward_hook
    return register(fail)


@pytest.mark.parametrize("name", NETS)
def test_a_fault_in_a_recorded_call_changes_no_later_one(name):
    net, args, kwargs = build(name, size=(8, 12), b=1)
    plain, raised = tensor(net(*args, **kwargs)), 0
    with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
        predictions = tensor(unet(*args, **kwargs))[:, :3].chunk(2)
        expected = unet.guide(*predictions, 6.0)
        on = hooks(net)
        for i, module in enumerate(sampled(net, 18)):
            handle = raising(module, KINDS[i % len(KINDS)], before=i % 2)
            try:
                unet(*args, **kwargs)
            except KINDS:
                raised += 1
                with pytest.raises(RuntimeError, match="guide needs one recorded call"):
                    unet.guide(*predictions, 6.0)
            handle.remove()
            assert hooks(net) == on
        assert torch.equal(tensor(net(*args, **kwargs)), plain)
        assert torch.equal(tensor(unet(*args, **kwargs)), plain)
        assert torch.equal(unet.guide(*predictions, 6.0).eps, expected.eps)
    assert hooks(net) == 0 and raised > 9
    assert torch.equal(tensor(net(*args, **kwargs)), plain)


@pytest.mark.parametrize("every", [1, 2])
def test_a_fault_in_a_pipeline_changes_no_later_run(every):
    host, raised = Host(), 0
    plain = host()
    with attach(host, every=every):
        expected = host()
        for i, module in enumerate(sampled(host.unet, 12)):
            handle = raising(module, KINDS[i % len(KINDS)], before=i % 2)
            try:
                host()
            except KINDS:
                raised += 1
            handle.remove()
        assert torch.equal(host(), expected)
    assert raised > 6
    untouched(host)
    assert torch.equal(host(), plain)


def test_a_fault_in_a_callback_or_the_loop_changes_no_later_call():
    net, (x, t, context), _ = build("own", size=(8, 12))

    def fail(_):
        raise KeyboardInterrupt

    def model(x, sigma, cond):
        return net(x, sigma, cond)

    with denoiser(model, 6.0, ALL_LEVELS, unet=net) as guided:
        call = x[:2], torch.tensor([10.0, 10.0]), context[:2], context[2:]
        expected = guided(*call)
        guided.run.callback = fail
        with pytest.raises(KeyboardInterrupt):
            guided(*call)
        guided.run.callback = None
        assert torch.equal(guided(*call), expected)
    assert hooks(net) == 0


def test_modes_and_changes_of_weights_while_recording():
    net, args, _ = build("sd15", size=(8, 12), b=1)
    other = build("sd15", size=(8, 12), b=1, seed=1)[0].state_dict()
    own = {name: x.clone() for name, x in net.state_dict().items()}

    def guided(unet):
        output = unet(*args).sample
        return output, unet.guide(*output.chunk(2), 6.0)

    with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
        plain, expected = guided(unet)
        with torch.inference_mode():
            output, out = guided(unet)
            assert torch.equal(output, plain) and torch.equal(out.eps, expected.eps)
        with torch.autocast("cpu", torch.bfloat16):
            output, out = guided(unet)
            assert torch.equal(output, net(*args).sample)
            assert (out.labels == expected.labels).float().mean() > 0.9
        net.load_state_dict(other)
        assert not torch.equal(guided(unet)[1].labels, expected.labels)
        net.load_state_dict(own, assign=True)
        assert torch.equal(guided(unet)[1].eps, expected.eps)
        net.double()
        args = [args[0].double(), args[1], args[2].double()]
        assert_close(actual=guided(unet)[1].rate, expected=expected.rate, share=1e-3)
    assert hooks(net) == 0


@pytest.mark.parametrize("work", [soak.recorded_calls, soak.pipeline_runs])
def test_nothing_grows_from_call_to_call(work):
    first, *later = [(seen["hooks"], seen["tensors"]) for seen in work(count=36, every=12)]
    assert all(seen <= first for seen in later), (first, later)
