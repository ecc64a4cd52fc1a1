"""How far a result is from the definition in float64, and how far it may be."""

import torch

from benchmarks import cases
from scfg import reference

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # of a rounded result


def double(value):
    """Nested tuples and lists with floating point tensors in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(map(double, value)) if isinstance(value, (tuple, list)) else value


def distance(actual, exact):
    """``||actual - exact|| / ||exact||``, infinite where anything is not finite."""
    if actual.shape != exact.shape:
        raise ValueError(f"result has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    error = (actual.double() - exact).norm() / exact.norm().clamp_min(1e-300)
    return error.item() if torch.isfinite(error) else float("inf")


def _assembled(levels, h, w, factors):
    total = 0
    for x, factor in zip(levels, factors, strict=True):
        grid = x.mT.unflatten(-1, (-(-h // factor), -(-w // factor)))
        total = total + reference.upsample(grid, h, w, factor)
    return reference.blur(total)  # (b, t+1, h, w)


def segmentation(labels, foreground, flat, text, front, h, w, factors):
    """How much less evidence than the winner's a patch's owner has, relative to the largest.

    Zero where labels and foreground are exact; the size of a tie where they are not.
    """
    expected = reference.start_is_flat(front)
    if (
        not torch.equal(flat, expected)
        or foreground[expected & reference.start_is_flat(text)].any()
    ):
        return float("inf")
    front = [
        torch.where(expected[:, None, None], own[..., [0, -1]], other[..., [0, -1]])
        for own, other in zip(text, front, strict=True)
    ]
    evidence = _assembled(double(text), h, w, factors)[:, :-1]
    lost = evidence.amax(dim=1) - evidence.gather(1, labels[:, None])[:, 0]
    both = _assembled([x[..., [0, -1]] for x in double(front)], h, w, factors)
    margin = both[:, 1] - both[:, 0]
    wrong = torch.where(foreground == (margin > 0), 0.0, margin.abs())
    worst = max((lost / evidence.max()).max().item(), (wrong / both.max()).max().item())
    return worst if worst == worst else float("inf")


def errors(op, args, result):
    """Distance of each result of an op from the definition in float64.

    Labels and foreground count by the evidence they lose; of partial sums only the total counts.
    """
    if op == "segment":
        return [segmentation(*result, *args)]
    exact = getattr(reference, op)(*double(args))
    results, exacts = (x if isinstance(x, tuple) else (x,) for x in (result, exact))
    if op == "region_sums":
        results, exacts = ([x.double().sum(dim=1) for x in y] for y in (results, exacts))
    return [distance(*pair) for pair in zip(results, exacts, strict=True)]


def bounds(op, args):
    """What `errors` may be: twice the error of torch in the same precision and 1e-6, but never
    more than the type of the result excuses."""
    result = getattr(reference, op)(*args)
    limits = [LIMITS[torch.float32]]
    if op == "guide":
        limits = [LIMITS[args[1].dtype], LIMITS[torch.float32]]
    own = errors(op, args, result)
    pairs = zip(own, limits * len(own) if len(limits) == 1 else limits, strict=True)
    return [min(2 * error + 1e-6, limit) for error, limit in pairs]


def check(op, args, result):
    """The error of an op or stage and its bound, the worst relative to the other.

    A stage is compared by its prediction, given the labels it found: those of near ties may differ.
    """
    if op in cases.OPS:
        pairs = zip(errors(op, args, result), bounds(op, args), strict=True)
        return max(pairs, key=lambda pair: pair[0] / pair[1])
    return _check_stage(op, args, result)


def _check_stage(op, args, result):
    exact = cases.call(op, "torch")(*double(args))
    eps, config = args[:2], args[-1]
    limit = LIMITS[eps[0].dtype]
    if len(result) == 1:  # the released algorithm tells no labels
        wrong = (result[0].double() - exact[0]).abs() > 10 * limit * exact[0].abs().max()
        return wrong.double().mean().item(), 0.02
    found, rate, labels, foreground = result
    if (labels != exact[2]).double().mean() > 0.01:
        return float("inf"), limit
    factor, tokens = config.map_reduction, int(labels.max()) + 1
    sums = reference.region_sums(*double(eps), labels, foreground, tokens, factor)
    scale = torch.full((len(found),), cases.SCALE, device=found.device)
    expected = reference.guide(*double(eps), labels, sums, scale, factor)
    return max(distance(found, expected[0]), distance(rate, expected[1])), limit
