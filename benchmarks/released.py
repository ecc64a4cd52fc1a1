"""The released S-CFG algorithm, written from its description: what a user would run instead.

Every layer's probabilities are formed for every head, their means kept for every layer but those of
the full resolution; every layer used is completed with matrix powers of its self map, upsampled,
blurred and normalised on its own, and the regions are masks. `Released(unet)` records by replacing
attention, `combine` does the rest; square latents only. Constants are those of
``scfg.SCFGConfig(propagation="official")``, so that results can be compared before being timed.
"""

import torch
import torch.nn.functional as F

from scfg.recording.blocks import find_blocks


def _blur(x):
    line = torch.exp(-(torch.arange(-1.0, 2.0, device=x.device) ** 2)).to(x)
    kernel = (torch.outer(line, line) / line.sum() ** 2).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])


def evidence(self_maps, cross_maps, side, coarsest):
    """Completed, upsampled, blurred, normalised maps averaged over layers: (2b, t+1, side, side).

    Layers finer than `side` pixels a side, or coarser than `coarsest`, are left out.
    """
    layers = []
    for self_map, cross_map in zip(self_maps, cross_maps, strict=True):
        size = round(self_map.shape[1] ** 0.5)
        if not coarsest <= size <= side:
            continue
        self_map, cross_map = self_map.float(), cross_map.float()
        cross_map = torch.cat([cross_map, cross_map[..., 1:].sum(-1, keepdim=True)], dim=-1)
        total = self_map.clone()
        for _ in range(3):
            total = total + self_map @ self_map
        y = (total / 4 @ cross_map).mT.unflatten(-1, (size, size))
        y = _blur(F.interpolate(y, size=(side, side), mode="bilinear"))
        layers.append(y / y.mean(dim=(-1, -2), keepdim=True))
    return torch.stack(layers).mean(dim=0)


def combine(eps_uncond, eps_text, self_maps, cross_maps, guidance_scale, reduction=4):
    """The guided prediction from the maps of all layers, (2b, n, n) and (2b, n, t) each."""
    b, latent = eps_text.shape[0], eps_text.shape[-1]
    uncond, text = evidence(self_maps, cross_maps, latent // reduction, latent // 8).split(b)
    tokens = text[:, :-1]
    masks = (tokens == tokens.amax(dim=1, keepdim=True)).float()
    foreground = (uncond[:, -1:] > uncond[:, :1]).float()
    masks, foreground = (F.interpolate(m, size=(latent, latent)) for m in (masks, foreground))
    difference = eps_text - eps_uncond
    a = difference.float().norm(dim=1, keepdim=True)

    def mean(mask):
        return (a * mask).sum((-1, -2), True) / (mask.sum((-1, -2), True) + 1e-8)

    rates = mean(foreground) / (mean(masks) + 1e-8)
    rate = (rates * masks).sum(dim=1, keepdim=True).clamp(0.8, 3.0)
    rate = _blur(rate.clamp_max(15.0 / guidance_scale))
    return (eps_uncond + guidance_scale * rate * difference).to(eps_text.dtype)


class Released:
    """Attention modules replaced so that their probabilities are formed, their means kept."""

    def __init__(self, unet):
        self.full, self.self_maps, self.cross_maps = 0, [], []
        for _, block in find_blocks(unet):
            for module in block:
                module.forward = self._forward(module)

    def _forward(self, module):
        def heads(y):
            return y.unflatten(-1, (module.heads, -1)).transpose(1, 2)  # (2b, g, n, d)

        def forward(x, context=None, *args, **kwargs):
            source = x if context is None else context
            q, k, v = (heads(y) for y in (module.to_q(x), module.to_k(source), module.to_v(source)))
            probabilities = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(dim=-1)  # (2b, g, n, m)
            if x.shape[1] < self.full:
                kept = self.self_maps if context is None else self.cross_maps
                kept.append(probabilities.mean(dim=1))
            return module.to_out((probabilities @ v).transpose(1, 2).flatten(2))

        return forward

    def start(self, latent):
        """Forget the last call; a latent of so many pixels follows."""
        self.full = latent
        self.self_maps.clear()
        self.cross_maps.clear()

    def combine(self, eps_uncond, eps_text, guidance_scale):
        """The guided prediction by the maps kept since `start`, which are then forgotten."""
        maps = self.self_maps, self.cross_maps
        out = combine(eps_uncond, eps_text, *maps, guidance_scale)
        self.start(0)
        return out
