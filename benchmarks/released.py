"""The released S-CFG algorithm, written from its description: what a user would run instead.

Every layer's probabilities are formed for every head and kept, every layer is completed with matrix
powers of its self map, upsampled, blurred and normalised on its own, and the regions are masks.
`Released(unet)` records by hooks, `combine` does the rest; square latents only. Constants are those
of `scfg.SCFGConfig(propagation="official")`, so results can be compared before anything is timed.
"""

import torch
import torch.nn.functional as F

from scfg.attention import find_blocks


def _probabilities(module, x, context):
    q, k = module.to_q(x), module.to_k(x if context is None else context)
    q, k = (y.unflatten(-1, (module.heads, -1)).transpose(1, 2).contiguous() for y in (q, k))
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)  # (2b, g, n, m)


def _blur(x):
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], device=x.device) ** 2)).to(x)
    kernel = (torch.outer(line, line) / line.sum() ** 2).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])


class Released:
    """Attention modules replaced so that their probabilities are formed and kept."""

    def __init__(self, unet, reduction=4):
        self.reduction, self.maps, self.originals = reduction, [], []
        for _, block in find_blocks(unet):
            for module in block:
                self.originals.append((module, module.forward))
                module.forward = self._forward(module)

    def _forward(self, module):
        def forward(x, context=None, *args, **kwargs):
            probabilities = _probabilities(module, x, context)
            self.maps.append((context is not None, probabilities.mean(dim=1)))
            v = module.to_v(x if context is None else context)
            v = v.unflatten(-1, (module.heads, -1)).transpose(1, 2)
            out = (probabilities @ v).transpose(1, 2).flatten(2)
            return module.to_out[0](out)

        return forward

    def remove(self):
        for module, _ in self.originals:
            del module.forward
        self.maps.clear()

    def evidence(self, side, latent):
        """Completed, upsampled, blurred, normalised maps averaged over layers: (2b, t+1, h, h)."""
        layers = []
        pairs = zip(self.maps[::2], self.maps[1::2], strict=True)
        for (_, self_map), (_, cross_map) in pairs:
            n = self_map.shape[1]
            size = round(n**0.5)
            if latent // size not in (self.reduction, 2 * self.reduction):
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

    def combine(self, eps_uncond, eps_text, guidance_scale):
        """The guided prediction from the maps kept since the last call."""
        b, latent = eps_text.shape[0], eps_text.shape[-1]
        side = latent // self.reduction
        uncond, text = self.evidence(side, latent).split(b)
        self.maps.clear()
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
        return eps_uncond + guidance_scale * rate * difference
