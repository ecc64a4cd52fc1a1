"""What the operations are given: the published models at their usual sizes, and what that costs.

``b`` is a number of images; a U-Net call, and so what records it, has 2b rows. Besides the ops of
`scfg.ops` there are two stages made of them: ``guide_evidence``, all that follows the last recorded
layer, and ``guide_maps``, the whole of S-CFG from the maps of all layers, which is also what the
released algorithm does after the U-Net.
"""

import functools
from dataclasses import dataclass

import torch

import scfg
from benchmarks import released
from benchmarks.clock import tensors
from scfg import guidance, ops, reference
from scfg.evidence import Evidence, map_grid


@dataclass(frozen=True)
class ModelSize:
    """A model at one size; levels are (reduction, layers, heads, head width), finest first."""

    latent: tuple[int, int, int]  # c, H, W
    levels: tuple[tuple[int, int, int, int], ...]
    tokens: int = 77

    @property
    def reduction(self):
        """Latent pixels per patch of the labels."""
        return self.levels[0][0]

    @property
    def config(self):
        """The constants, with the propagation of the released code, so that it can be compared."""
        levels = dict(map_reduction=self.reduction, coarsest_reduction=self.levels[-1][0])
        return scfg.SCFGConfig(propagation="official", **levels)

    def grid(self, reduction):
        """(h, w) of the maps of a level."""
        return map_grid(self.latent[1:], reduction)


SIZES = {
    "sd15-512": ModelSize((4, 64, 64), ((4, 5, 8, 160), (8, 1, 8, 160))),
    "sd21-768": ModelSize((4, 96, 96), ((4, 5, 20, 64), (8, 1, 20, 64))),
    "sdxl-1024": ModelSize((4, 128, 128), ((4, 60, 20, 64),)),
    "embedded-64": ModelSize((48, 16, 16), ((1, 3, 2, 32), (2, 4, 2, 64)), tokens=24),
}
OPS = (
    "attention_map",
    "attention_maps",
    "attention_apply",
    "joint_maps",
    "propagate",
    "complete",
    "segment",
    "region_sums",
    "guide",
)
STAGES = ("guide_evidence", "guide_maps")
SCALE = 7.5


def arguments(op, size, b, dtype=torch.float32, device="cpu", seed=0):
    """Random arguments of an op; attention ops are given the finest level."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size, of=dtype):
        return torch.randn(*size, generator=generator, device=device).to(of)

    def maps(n, m):
        return (2 * normal(2 * b, n, m, of=torch.float32)).softmax(-1)

    def evidence(reduction):
        h, w = size.grid(reduction)
        return normal(b, h * w, t + 1, of=torch.float32).exp()

    t, factor, config = size.tokens, size.reduction, size.config
    _, _, heads, width = size.levels[0]
    h, w = size.grid(factor)
    n = h * w
    if op.startswith("attention") or op == "joint_maps":
        q, k, q_cross = (normal(2 * b, n, heads * width) for _ in range(3))
        k_cross = normal(2 * b, t, heads * width)
        if op == "attention_map":
            return q_cross, k_cross, heads
        if op == "joint_maps":
            return q, torch.cat([k_cross, k], dim=1), t, heads
        if op == "attention_maps":
            return q, k, q_cross, k_cross, heads
        return q, k, maps(n, t), heads
    if op == "propagate":
        return maps(n, n), maps(n, t), "paper", 4
    if op == "complete":
        weights = reference.spatial_weights(h, w, 1).float().to(device)
        total = normal(2 * b, n, t + 1, of=torch.float32).exp()
        return maps(n, n), maps(n, t), weights, total, "paper", 4
    factors = [level[0] // factor for level in size.levels]
    levels = [[evidence(level[0]) for level in size.levels] for _ in range(2)]
    if op == "segment":
        return *levels, h, w, factors
    eps = normal(b, *size.latent), normal(b, *size.latent)
    if op == "guide_evidence":
        return *eps, *levels, size.latent[1:], config
    if op == "guide_maps":
        sizes = [size.grid(r) for r, layers, _, _ in size.levels for _ in range(layers)]
        pixels = [h * w for h, w in sizes]
        return *eps, [maps(n, n) for n in pixels], [maps(n, t) for n in pixels], SCALE, config
    labels, foreground, _ = reference.segment(*levels, h, w, factors)
    sums = reference.region_sums(*eps, labels, foreground, t, factor)
    if op == "region_sums":
        return *eps, labels, foreground, t, factor
    return *eps, labels, sums, torch.full((b,), SCALE, device=device), factor


def _guide_evidence(eps_uncond, eps_text, text, front, size, config, backend="auto"):
    """All that follows the last recorded layer, from the evidence (b, n, t+1) of each level."""
    uncond, text = (
        Evidence(size, {r: [x] for r, x in zip(config.reductions, levels, strict=True)})
        for levels in (front, text)
    )
    settings = dict(guidance_scale=SCALE, config=config, backend=backend)
    out = guidance.guide_evidence(eps_uncond, eps_text, uncond=uncond, text=text, **settings)
    return out.eps, out.rate, out.labels, out.foreground


def _guide_maps(eps_uncond, eps_text, self_maps, cross_maps, scale, config, backend="auto"):
    """S-CFG from the maps of all layers."""
    out = scfg.semantic_cfg(eps_uncond, eps_text, self_maps, cross_maps, scale, config, backend)
    return out.eps, out.rate, out.labels, out.foreground


def _released(eps_uncond, eps_text, self_maps, cross_maps, scale, config):
    """The same by the released algorithm."""
    reduction = config.map_reduction
    return (released.combine(eps_uncond, eps_text, self_maps, cross_maps, scale, reduction),)


def backends(op, device, compiled):
    """Backends that can run an op here; a loop over 60 layers takes minutes to compile."""
    found = ["torch"] + ["compiled"] * (compiled and op != "guide_maps")
    found += ["triton"] * (device == "cuda")
    return found + ["released"] * (op == "guide_maps")


def call(op, backend):
    """The function that runs an op on a backend; ``"compiled"`` is torch.compile of ``"torch"``."""
    if backend == "released":
        return _released
    function = {"guide_evidence": _guide_evidence, "guide_maps": _guide_maps}.get(op)
    function = function or getattr(ops, op)
    if backend == "compiled":
        torch._dynamo.reset()  # a size must not be refused, or made dynamic, because of another
        run = functools.partial(function, backend="torch")
        return torch.compile(run, fullgraph=True, dynamic=False)
    return functools.partial(function, backend=backend)


def least_bytes(op, args, result):
    """Bytes that must move: inputs read once, results written once, but S once per power.

    `segment` reads the tokens of the text's evidence, and START and the rest of the other.
    """
    moved = sum(x.nbytes for x in tensors([args, result]))
    if op in ("segment", "guide_evidence"):
        levels = args[:2] if op == "segment" else args[2:4]
        moved -= sum(x[..., 0].nbytes + y[..., 2:].nbytes for x, y in zip(*levels, strict=True))
    if op in ("propagate", "complete"):
        moved += (len(reference.power_weights(*args[-2:])) - 1) * args[0].nbytes
    return moved


def operations(op, args):
    """(floating-point operations of products in the inputs' type, of products in float32,
    exponentials) that must be done; `elementwise` counts the rest."""
    if op.startswith("attention") or op == "joint_maps":
        q, k, heads = args[0], args[1], args[3] if op == "joint_maps" else args[-1]
        (rows, n, width), m = q.shape, k.shape[1]
        m += args[3].shape[1] if op == "attention_maps" else 0
        own = 2 * rows * n * n * args[2].shape[2] if op == "attention_apply" else 0
        return 2 * rows * n * m * width, own, rows * n * m * heads
    if op in ("propagate", "complete"):
        rows, n, t = args[1].shape
        return 0, 2 * rows * n * n * t * len(reference.power_weights(*args[-2:])), 0
    return 0, 0, 0


def elementwise(op, args):
    """Floating-point operations in float32 that are no product of matrices.

    Blur and upsampling are three multiply-adds along each axis, a norm and a guided value three
    operations a channel.
    """
    if op == "segment":
        text, _, h, w, factors = args
        (b, _, columns), found = text[0].shape, 0
        for factor in factors:
            found += 6 * b * columns * h * (-(-w // factor) + w)
        return found
    if op == "guide_evidence":
        return (
            elementwise("segment", args[2:7])
            + elementwise("region_sums", args)
            + elementwise("guide", args)
        )
    if op in ("region_sums", "guide"):
        b, c, height, width = args[1].shape
        return b * height * width * (3 * c + 18 * (op == "guide"))
    return 0
