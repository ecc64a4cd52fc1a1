"""One guided step of a real U-Net shape, by every method compared, and the memory it needs."""

from dataclasses import replace

import torch

import scfg
from benchmarks import released
from benchmarks.clock import capture
from benchmarks.machine import peak_mib
from scfg.models.unet import SD15, SD21, SDXL, UNet
from scfg.recording.blocks import find_blocks

MODELS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
TOKENS = 77
SCALE = 7.5
OFFICIAL = scfg.SCFGConfig(propagation="official")  # so that results can be compared
MODES = ("eager", "compiled", "graphed")


def build(name, width, device, dtype):
    """A U-Net of a published shape, `width` times as wide, with random weights.

    Queries are six times as long as at initialisation. Attention would otherwise be nearly even,
    every patch nearly a tie between tokens, and rounding would decide to which it goes.
    """
    config = MODELS[name]
    channels = tuple(int(c * width) for c in config.block_out_channels)
    with torch.device(device):
        net = UNet(replace(config, block_out_channels=channels)).to(dtype)
    with torch.no_grad():
        for _, block in find_blocks(net):
            for module in block:
                module.to_q.weight.mul_(6)
    return net.eval().requires_grad_(False)


def inputs(config, pixels, batch, device, dtype):
    """Arguments of the U-Net for one batched CFG call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, pixels // 8, pixels // 8, generator=generator)
    context = torch.randn(2 * batch, TOKENS, config.cross_attention_dim, generator=generator)
    x, context = x.to(device, dtype), context.to(device, dtype)
    arguments = [torch.cat([x, x]), torch.full((2 * batch,), 500, device=device), context]
    if config.addition:
        pooled, ids, _ = config.addition
        added = torch.randn(2 * batch, pooled, generator=generator), torch.rand(2 * batch, ids)
        arguments.append(tuple(y.to(device, dtype) for y in added))
    return arguments


def twin(net):
    """Another U-Net around the same weights: hooks on one are not seen by the other."""
    with torch.device("meta"):
        other = UNet(net.config)
    other.load_state_dict(net.state_dict(), assign=True)
    return other.eval().requires_grad_(False)


def plain(net):
    """Plain CFG with fused attention: the floor."""

    def plain_step(*arguments):
        return scfg.cfg(*net(*arguments).chunk(2), SCALE)

    return plain_step


def semantic(backend, layers=None):
    """S-CFG by this library."""
    config = replace(OFFICIAL, layers_per_level=layers)

    def make(net):
        unet = scfg.UNetWrapper(net, config, backend)

        def semantic_step(*arguments):
            return unet.guide(*unet(*arguments).chunk(2), SCALE).eps

        return semantic_step

    return make


def unfused(net):
    """S-CFG by the released algorithm."""
    method = released.Released(net)

    def released_step(x, *arguments):
        method.start(x.shape[-2] * x.shape[-1])
        return method.combine(*net(x, *arguments).chunk(2), SCALE)

    return released_step


def methods(model, device, modes):
    """What is compared: (mode, name) -> a function that makes a step of a U-Net.

    ``"compiled"`` is torch.compile of the whole step; of the torch backend it is what a compiler
    gives for nothing. The released algorithm keeps lists that a compiler does not follow.
    """
    backends = ["torch"] + ["triton"] * (device == "cuda")
    found = {"cfg": plain} | {f"scfg {name}": semantic(name) for name in backends}
    if model == "sdxl":
        found |= {f"scfg {name}, last 12": semantic(name, 12) for name in backends}
    found["released"] = unfused
    table = {(mode, name): make for mode in modes for name, make in found.items()}
    table.pop(("compiled", "released"), None)
    return table


def prepare(mode, make, net, arguments, device):
    """A step ready to be timed, its result, and, where it is a graph, the MiB it took to record it.

    It runs once as it is: which blocks ``layers_per_level`` leaves out is known after one call.
    """
    step = make(twin(net))
    result = step(*arguments)
    if mode == "compiled":
        if device == "cuda":
            torch._dynamo.reset()  # each compiled step is captured before the next one is made
        step = torch.compile(step, fullgraph=True, dynamic=False)
        result = step(*arguments)
    if device == "cpu" or mode == "eager":
        return step, result, None
    with peak_mib(device) as peak:
        replay, result = capture(lambda: step(*arguments))

    def replayed(*_):
        replay()
        return result

    return replayed, result, peak()
