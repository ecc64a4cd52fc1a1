"""S-CFG of one step of ComfyUI's transformers by hand: its own softmax, formed anew in float64."""

import math
from dataclasses import dataclass, field

import torch
from by_hand import blurred, region_rates
from comfy_transformers import sample

OVERRIDE = "optimized_attention_override"
BLOCK = 1  # of three: the one that is read


@dataclass
class Step:
    """What one unguided step said.

    Attributes:
        maps: By branch, 0 the text, the probabilities of all softmaxes, (b, m, l) float64.
        calls: Branches in each call of the model.
        uncond: Prediction.
        text: Prediction.
    """

    maps: dict = field(default_factory=lambda: {0: [], 1: []})
    calls: list = field(default_factory=list)
    uncond: torch.Tensor | None = None
    text: torch.Tensor | None = None


def watched(host, **call):
    """One step of the host itself, every softmax of which is formed anew and held against it."""
    step, model = Step(), host.model.clone()

    def attend(function, q, k, v, heads, mask=None, **options):
        result = function(q, k, v, heads, mask=mask, **options)
        if not options.get("skip_reshape"):
            q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
        scores = q.double() @ k.double().mT * options.get("scale", q.shape[-1] ** -0.5)
        if mask is not None:
            scores = scores + mask.view(-1, 1, *mask.shape[-2:])
        probabilities = scores.softmax(dim=-1)
        ours = (probabilities @ v.double()).transpose(1, 2).flatten(2)
        assert (ours - result).abs().max() <= 1e-5 * result.abs().max()
        branches = options["transformer_options"]["cond_or_uncond"]
        step.calls.append(tuple(branches))
        for branch, rows in zip(branches, probabilities.mean(1).chunk(len(branches)), strict=True):
            step.maps[branch].append(rows)
        return result

    def after(args):
        step.uncond, step.text = args["uncond_denoised"], args["cond_denoised"]
        return args["denoised"]

    model.model_options["transformer_options"][OVERRIDE] = attend
    model.set_model_sampler_post_cfg_function(after)
    sample(host, model, steps=1, **call)
    return step


def block_maps(host, maps):
    """S, rows that sum to 1, and C, (b, n, n) and (b, n, t), of the block that is read."""
    n, t = math.prod(host.grid), host.tokens
    if not host.joint:
        block = maps[host.softmaxes * BLOCK : host.softmaxes * (BLOCK + 1)]
        return block[0], block[-1]
    first = -(-t // host.multiple) * host.multiple
    keys = first + -(-n // host.multiple) * host.multiple
    own = [p for p in maps if p.shape[-1] == keys][BLOCK][:, first : first + n]
    image = own[..., first : first + n]
    return image / image.sum(-1, keepdim=True), own[..., :t]


def columns_of(host):
    """Groups where nothing is known of the prompt: each column is one, but for START."""
    groups = list(range(host.tokens - (host.start is not None)))
    if host.start is not None:
        groups.insert(host.start % host.tokens, -1)
    return groups


def evidence(host, maps, groups):
    """(b, groups, f, h, w), float64: completed columns over their means.

    Args:
        host: The model.
        maps: Of a branch.
        groups: Of each column, -1 for none.
    """
    self_map, cross_map = block_maps(host, maps)
    count = max(groups) + 1
    columns = torch.stack(
        [cross_map[..., [i for i, g in enumerate(groups) if g == group]].sum(-1)
         for group in range(count)], dim=-1,
    )  # fmt: skip
    powers = sum(torch.linalg.matrix_power(self_map, p) for p in (1, 2, 3, 4))
    token = blurred((powers @ columns).mT.unflatten(-1, host.grid))
    return token / token.mean(dim=(2, 3, 4), keepdim=True).clamp_min(1e-300)


def rates(host, step, labels, foreground=None):
    """(b, f, H, W): norms of the difference by hand, for given labels (b, f, H, W)."""
    eta = (step.text.double() - step.uncond.double()).reshape(len(step.text), -1, *labels.shape[1:])
    return region_rates(eta.norm(dim=1), labels, foreground)
