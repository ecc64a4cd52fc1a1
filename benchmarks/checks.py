"""What must hold on a device before anything is timed there: results, graphs, streams, compiling.

Every check takes the device, returns numbers to record, and raises `Wrong` where they are not as
they must be. On a CPU, kernels run in Triton's interpreter and what only a GPU has (graphs,
streams) is left out of the same functions.
"""

import contextlib
import secrets
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import scfg
from benchmarks import accuracy, cases, methods
from benchmarks.clock import capture, clone, tensors
from scfg import reference
from scfg.evidence import find_reduction
from scfg.models.unet import SD15, UNet, UNetConfig
from scfg.recording.blocks import find_blocks

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
PAPER = scfg.SCFGConfig()


@dataclass(frozen=True)
class Setup:
    """A U-Net and its inputs; the latent is not square."""

    config: UNetConfig = SD15
    size: tuple[int, int] = (56, 72)
    tokens: int = 77
    b: int = 2


TINY = replace(
    SD15,
    block_out_channels=(16, 16, 32, 32),
    heads=(1, 1, 1, 1),
    layers_per_block=1,
    cross_attention_dim=16,
    norm_groups=8,
)
FULL = Setup()
SMALL = Setup(TINY, (20, 28), 7, 1)  # for the interpreter


class Wrong(AssertionError):
    """A check did not hold; the message has the numbers."""


def require(condition, message):
    if not condition:
        raise Wrong(message)


def same_bits(left, right):
    """Whether all tensors are equal, bit for bit."""
    pairs = list(zip(tensors(left), tensors(right), strict=True))
    if not pairs:
        raise TypeError(f"nothing to compare in {type(left).__name__}")
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


@contextlib.contextmanager
def poisoned():
    """Inside, memory that is not yet written holds NaN, or the largest integer."""
    mode = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])


def kernel(device, op, size, b, dtype, seed=None):
    """An op in Triton on fresh inputs: its error in the bound of `benchmarks.accuracy`, every
    element written, every run the same bits."""
    seed = secrets.randbelow(2**31) if seed is None else seed
    args = cases.arguments(op, size, b, dtype, device, seed)
    run = cases.call(op, "triton")
    with poisoned():
        result = run(*args)
    error, bound = accuracy.check(op, args, result)
    require(error <= bound, f"error {error:.2e}, allowed {bound:.2e}, seed {seed}")
    require(same_bits(result, run(*args)), "a second run gave other bits")
    return {"error": error, "bound": bound, "seed": seed}


def golden(device, path, dtype):
    """A recorded result of the authors' code: the same regions, and the same prediction."""
    import numpy as np

    data = {key: torch.from_numpy(value) for key, value in np.load(path).items()}
    layers = sorted(key[5:] for key in data if key.startswith("self_"))
    own, text = (
        [data[f"{kind}_{x}"].to(device, dtype) for x in layers] for kind in ("self", "cross")
    )
    eps = data["eps_uncond"].to(device, dtype), data["eps_text"].to(device, dtype)
    found = {}
    for propagation in ("official", "paper"):
        config = scfg.SCFGConfig(map_reduction=int(data["meta"][2]), propagation=propagation)
        scale = float(data["guidance_scale"])
        out = scfg.semantic_cfg(*eps, own, text, scale, config, backend="triton")
        expected = {key: data[f"{propagation}_{key}"] for key in ("label", "foreground", "eps")}
        differ = (out.labels.cpu() != expected["label"]).sum().item()
        differ += (out.foreground.cpu() != expected["foreground"].bool()).sum().item()
        off = (out.eps.cpu().float() - expected["eps"]).abs().max().item()
        largest = expected["eps"].abs().max().item()
        allowed = 1e-4 if dtype == torch.float32 else 2e-3 * max(1.0, largest)
        found |= {f"{propagation}_patches": differ, f"{propagation}_eps": off}
        require(differ == 0, f"{propagation}: {differ} patches differ")
        require(off <= allowed, f"{propagation}: eps off by {off:.2e}, allowed {allowed:.1e}")
    return found


def prepare(device, dtype, setup):
    """A U-Net with random weights, and arguments of one call."""
    with torch.device(device):
        net = UNet(setup.config).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setup.b, 4, *setup.size, generator=generator)
    width = setup.config.cross_attention_dim
    context = torch.randn(2 * setup.b, setup.tokens, width, generator=generator)
    t = torch.full((2 * setup.b,), 500, device=device)
    return net, [torch.cat([x, x]).to(device, dtype), t, context.to(device, dtype)]


@contextlib.contextmanager
def projections(net):
    """What the projections of every block return inside: q and k of self, then of cross."""
    seen, handles = {}, []

    def keep(name, key):
        def after(module, args, output):
            seen.setdefault(name, {})[key] = output.double()

        return after

    for name, (own, text) in find_blocks(net):
        for key, module in enumerate((own.to_q, own.to_k, text.to_q, text.to_k)):
            handles.append(module.register_forward_hook(keep(name, key)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def end_to_end(device, dtype, setup):
    """U-Net and guidance against float64 guidance made of the same projections and predictions."""
    net, arguments = prepare(device, dtype, setup)
    plain = net(*arguments)
    with scfg.UNetWrapper(net, PAPER, "triton") as unet, projections(net) as seen:
        eps = unet(*arguments)
        require(same_bits(eps, plain), "recording changed the output of the U-Net")
        out = unet.guide(*eps.chunk(2), cases.SCALE)
        again = unet.guide(*unet(*arguments).chunk(2), cases.SCALE)
    require(same_bits(vars(out), vars(again)), "a second run gave other bits")
    maps = []
    for own_q, own_k, q, k in (list(block.values()) for block in seen.values()):
        if find_reduction(setup.size, q.shape[1], PAPER.reductions):
            heads = setup.config.heads[-1]
            maps.append(reference.attention_maps(own_q, own_k, q, k, heads))
    branches = [x.double() for x in eps.chunk(2)]
    exact = scfg.semantic_cfg(*branches, *zip(*maps, strict=True), cases.SCALE, PAPER, "torch")
    differ = (out.labels != exact.labels).sum() + (out.foreground != exact.foreground).sum()
    differ, patches = differ.item(), out.labels.numel()
    require(differ <= patches // 100, f"{differ} of {patches} patches differ")
    found = (out.labels, out.foreground, arguments[2].shape[1], out.start_is_flat)
    regions = scfg.guidance.Regions(*found)
    given = scfg.guidance.guide_regions(*branches, regions, cases.SCALE, PAPER, "torch")
    error = accuracy.distance(out.eps, given.eps)
    allowed = accuracy.LIMITS[dtype]
    require(error <= allowed, f"eps is {error:.2e} away, allowed {allowed:.0e}")
    return {"patches_differ": differ, "patches": patches, "eps_error": error}


def guidance_stage(device, dtype, size, seed):
    """All that follows the last recorded layer, and its arguments."""
    args = cases.arguments("guide_evidence", size, 2, dtype, device, seed)
    return cases.call("guide_evidence", "triton"), args


def graph_of_guidance(device, dtype, size):
    """All that follows the U-Net, as a CUDA graph on new inputs: the bits of a plain run."""
    run, static = guidance_stage(device, dtype, size, seed=0)
    _, fresh = guidance_stage(device, dtype, size, seed=1)
    return _replay(device, run, static, fresh, 0.0)


def graph_of_step(device, dtype, setup):
    """U-Net and guidance replayed as one CUDA graph on new inputs."""
    net, static = prepare(device, dtype, setup)
    fresh = [static[0] + 0.1, static[1], static[2].flip(1)]
    step = methods.semantic("triton")(net)
    return _replay(device, step, static, fresh, 10 * accuracy.LIMITS[dtype])


def _replay(device, run, static, fresh, allowed):
    static = clone(static)
    expected = clone(run(*fresh))
    if device != "cuda":
        return {"replayed": False}
    replay, result = capture(lambda: run(*static))
    for place, value in zip(tensors(static), tensors(fresh), strict=True):
        place.copy_(value)
    replay()
    torch.cuda.synchronize()
    error = accuracy.distance(next(tensors(result)), next(tensors(expected)).double())
    if not allowed:
        require(same_bits(result, expected), f"the replay is {error:.1e} away from a plain run")
    require(error <= allowed or not allowed, f"the replay is {error:.1e} away from a plain run")
    return {"replayed": True, "same_bits": same_bits(result, expected), "error": error}


def compiles(device, setup):
    """torch.compile of U-Net and guidance into one graph, float32: what it gives uncompiled.

    Rounding may move a patch between two nearly level tokens: 1 pixel in 100 may differ.
    """
    allow = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        net, arguments = prepare(device, torch.float32, setup)
        step = methods.semantic("auto")(net)
        expected = step(*arguments)
        torch._dynamo.reset()
        backend = "inductor" if device == "cuda" else "aot_eager"
        result = torch.compile(step, fullgraph=True, dynamic=False, backend=backend)(*arguments)
    finally:
        torch.backends.cudnn.allow_tf32 = allow
    off = (result - expected).abs() > 1e-3 * expected.abs().max()
    share = off.float().mean().item()
    require(share <= 0.01, f"{share:.1%} of the values differ")
    return {"share_off": share, "largest": (result - expected).abs().max().item()}


def two_streams(device, dtype, size, rounds=20):
    """Two callers at once, each on a stream of its own: the bits each gets alone."""
    stages = [guidance_stage(device, dtype, size, seed) for seed in (0, 1)]
    expected = [clone(run(*args)) for run, args in stages]
    streams = [contextlib.nullcontext()] * 2
    if device == "cuda":
        torch.cuda.synchronize()
        streams = [torch.cuda.stream(torch.cuda.Stream()) for _ in range(2)]
        results = []
        for _ in range(rounds):
            for stream, (run, args) in zip(streams, stages, strict=True):
                with stream:
                    results.append(run(*args))
        torch.cuda.synchronize()
    else:
        results = [run(*args) for run, args in stages]
    wrong = sum(not same_bits(x, expected[i % 2]) for i, x in enumerate(results))
    require(wrong == 0, f"{wrong} of {len(results)} results differ from those made alone")
    return {"results": len(results)}
