"""Segmentation, region sums and guidance in Triton equal their torch definitions."""

import inspect

import pytest
import torch
from conftest import DEVICE, assert_close

import csrc_triton
import scfg
from csrc_triton import guidance, onepass
from scfg import reference

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(  # the interpreter truncates what it stores in bfloat16
        torch.bfloat16, id="bf16", marks=pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
    ),
]
# b, c, H, W, pixels per patch, t: sizes that divide nothing, every size of a tile exceeded once
PREDICTIONS = [
    (1, 4, 13, 11, 1, 2),
    (2, 1, 13, 11, 4, 1),
    (3, 12, 17, 25, 2, 154),
    (1, 3, 72, 88, 4, 77),
    (2, 4, 1, 7, 4, 20),
    (1, 48, 9, 16, 1, 20),
]
# b, h, w, factors, t, columns of the evidence that decides the foreground
LEVELS = [
    (1, 16, 16, [1, 2], 20, 20),
    (2, 13, 11, [1, 2, 4], 2, 5),
    (3, 5, 1, [2], 1, 2),
    (1, 9, 22, [1, 4], 77, 3),
    (1, 8, 35, [1], 20, 20),
    (1, 1, 7, [1], 154, 77),
]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def predictions(b, c, height, width, factor, t, dtype=torch.float32, seed=0):
    """eps_uncond, eps_text, labels, foreground; the guidance varies between and within regions."""
    g, size = generator(seed), (-(-height // factor), -(-width // factor))
    eps_uncond = torch.randn(b, c, height, width, generator=g)
    labels = torch.randint(t, (b, *size), generator=g)
    strength = reference.spread(1 + labels.float() / t, height, width, factor)[:, None]
    eps_text = eps_uncond + 0.3 * strength * torch.randn(eps_uncond.shape, generator=g)
    foreground = torch.rand(b, *size, generator=g) > 0.4
    tensors = eps_uncond.to(dtype), eps_text.to(dtype), labels, foreground
    return tuple(x.to(DEVICE) for x in tensors)


def evidence(b, h, w, factors, columns, dtype=torch.float32, seed=0):
    """Smooth enough that blur and upsampling leave clear winners, in places."""
    g = generator(seed)
    sizes = [-(-h // factor) * -(-w // factor) for factor in factors]
    return [torch.rand(b, n, columns, generator=g).pow(4).to(DEVICE, dtype) for n in sizes]


def double(x):
    if isinstance(x, (list, tuple)):
        return [double(item) for item in x]
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check(actual, plain, exact, what):
    """Error against float64 at most twice that of torch in that precision, plus 1e-6 of scale."""
    assert actual.dtype == plain.dtype
    share = 2 * ((plain.double() - exact).abs().max() / exact.abs().max()).item() + 1e-6
    assert_close(actual=actual, expected=exact, share=share, what=what)


@pytest.mark.parametrize("name", csrc_triton.__all__)
def test_twins_have_one_signature(name):
    ours, theirs = (inspect.signature(getattr(m, name)) for m in (csrc_triton, reference))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


def smoothed(levels, h, w, factors):
    """blur(sum upsample(E)) in the type of the levels: (b, columns, h, w)."""
    grids = [
        x.mT.unflatten(-1, (-(-h // f), -(-w // f))) for x, f in zip(levels, factors, strict=True)
    ]
    up = [reference.upsample(x, h, w, f) for x, f in zip(grids, factors, strict=True)]
    return reference.blur(sum(up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b, h, w, factors, t, u", LEVELS)
def test_segment(b, h, w, factors, t, u, dtype):
    tokens = evidence(b, h, w, factors, t + 1, dtype)
    start = evidence(b, h, w, factors, u + 1, dtype, seed=1)
    labels, foreground, flat = csrc_triton.segment(tokens, start, h, w, factors)
    assert labels.dtype == torch.int64 and foreground.dtype == torch.bool

    exact = [smoothed(double(x), h, w, factors) for x in (tokens, start)]
    plain = [smoothed([y.float() for y in x], h, w, factors) for x in (tokens, start)]
    error = [2 * (p - e).abs().max() + 1e-6 for p, e in zip(plain, exact, strict=True)]
    best, winner = exact[0][:, :t].max(dim=1)
    chosen = exact[0].gather(1, labels[:, None])[:, 0]
    assert (best - chosen).max() <= error[0]
    others = exact[0][:, :t].scatter(1, winner[:, None], -1).amax(dim=1)
    clear = best - others > error[0]
    assert torch.equal(labels[clear], winner[clear]) and (t == 1 or clear.double().mean() > 0.9)
    margin = exact[1][:, -1] - exact[1][:, 0]
    clear = margin.abs() > error[1]
    assert torch.equal(foreground[clear], margin[clear] > 0) and clear.double().mean() > 0.9


def test_the_lowest_of_equal_tokens_wins_within_and_across_blocks_of_tokens():
    column = evidence(1, 7, 11, [1, 2], 1)
    equal = [x.expand(-1, -1, 21).contiguous() for x in column]
    labels, foreground, _ = csrc_triton.segment(equal, equal, 7, 11, [1, 2])
    assert labels.eq(0).all() and not foreground.any()
    for x in equal:
        x[..., :17] = 0
    assert csrc_triton.segment(equal, equal, 7, 11, [1, 2])[0].eq(17).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b, c, height, width, factor, t", PREDICTIONS)
def test_region_sums(b, c, height, width, factor, t, dtype):
    args = (*predictions(b, c, height, width, factor, t, dtype), t, factor)
    sums = csrc_triton.region_sums(*args)
    assert sums.shape[1] == guidance.partials(height * width)
    results = sums, reference.region_sums(*args), reference.region_sums(*double(args))
    (amount, count), plain, exact = (x.double().sum(1).unbind(-1) for x in results)
    assert torch.equal(count, exact[1])
    pixels = count.clamp_min(1)  # what is used of a sum is its mean
    check(*(x / pixels for x in (amount, plain[0], exact[0])), "means")


HALVES = [pytest.param(*x.values, "weighted", id=x.id, marks=x.marks) for x in DTYPES[1:]]
LIMITS = {
    "foreground": ("foreground",),
    "image": ("image", 0.5, 2.0),
    "uncapped": ("foreground", 0.8, 3.0, None),
    "weighted": ("foreground", 0.8, 3.0, 15.0),
}


@pytest.mark.parametrize("dtype, limits", [(torch.float32, x) for x in LIMITS] + HALVES)
@pytest.mark.parametrize("b, c, height, width, factor, t", PREDICTIONS)
def test_guide(b, c, height, width, factor, t, dtype, limits):
    *eps, labels, foreground = predictions(b, c, height, width, factor, t, dtype)
    sums = csrc_triton.region_sums(*eps, labels, foreground, t, factor)
    scale = torch.linspace(2, 9, b, device=DEVICE)  # different in every image
    args = [*eps, labels, sums, scale, factor, *LIMITS[limits]]
    if limits == "weighted":
        args.append(torch.rand(b, t, generator=generator(5)).to(DEVICE) + 0.5)
    results = (f(*args) for f in (csrc_triton.guide, reference.guide))
    for name, actual, plain, exact in zip(
        ("eps", "rate"), *results, reference.guide(*double(args)), strict=True
    ):
        check(actual, plain, exact, name)


def test_an_empty_foreground_and_a_region_without_guidance():
    """The image without a foreground gets plain CFG; where the branches agree the rate is 1."""
    *eps, labels, foreground = predictions(3, 4, 13, 11, 4, 5)
    foreground[0] = False
    still = reference.spread(labels == labels[1, 0, 0], 13, 11, 4)
    still[0] = still[2] = False
    eps[1] = torch.where(still[:, None], eps[0], eps[1])
    scale = torch.tensor([7.5, 2.0, 5.0], device=DEVICE)
    sums = csrc_triton.region_sums(*eps, labels, foreground, 5, 4)
    out, rate = csrc_triton.guide(*eps, labels, sums, scale, 4)
    assert_close(actual=rate[0], expected=torch.ones_like(rate[0]), share=1e-6)
    plain = scfg.cfg(*eps, scale)
    assert_close(actual=out[0], expected=plain[0], share=1e-5)
    inner = -reference.blur(-still.double()) == 1  # no neighbour of another region
    assert inner[1].any()
    assert_close(actual=rate[1, 0][inner[1]], expected=torch.ones(int(inner[1].sum())), share=1e-6)
    assert_close(actual=rate, expected=reference.guide(*eps, labels, sums, scale, 4)[1], share=1e-6)


@pytest.mark.parametrize(
    ("b", "c", "height", "width", "factor", "t", "factors", "flat"),
    [
        (2, 4, 18, 26, 4, 5, [1, 2], False),
        (2, 4, 18, 26, 4, 5, [1, 2], True),
        (1, 48, 9, 18, 1, 20, [1], False),
        (1, 48, 9, 18, 1, 20, [1], True),
        (3, 4, 72, 40, 4, 77, [1, 2], True),
    ],
)
def test_one_launch_gives_the_bits_of_three(
    b, c, height, width, factor, t, factors, flat, monkeypatch
):
    *eps, labels, _ = predictions(b, c, height, width, factor, t, torch.float16)
    h, w = labels.shape[1:]
    tokens, start = (evidence(b, h, w, factors, t + 1, seed=seed) for seed in (0, 1))
    if flat:
        for x in start:
            x[0] = 1
    scale = torch.linspace(2, 9, b, device=DEVICE) if b > 1 else 7.5
    args = (*eps, tokens, start, h, w, factors, scale, factor)
    one = csrc_triton.guide_evidence(*args)
    monkeypatch.setattr(onepass, "chosen", lambda name, reasoned: 0)
    three = csrc_triton.guide_evidence(*args)
    assert all(same_bits(x, y) for x, y in zip(one, three, strict=True))
    assert one[4][0].item() is flat


def launches():
    """Every launcher with arguments for three images."""
    *eps, labels, foreground = predictions(3, 4, 13, 11, 2, 20)
    sums = csrc_triton.region_sums(*eps, labels, foreground, 20, 2)
    scale, weights = torch.full((3,), 7.5, device=DEVICE), torch.ones(3, 20, device=DEVICE)
    tokens, start = evidence(3, 7, 6, [2], 21), evidence(3, 7, 6, [2], 6, seed=1)
    limits = ("foreground", 0.8, 3.0, 15.0, weights)
    return {
        "segment": (tokens, start, 7, 6, [2]),
        "region_sums": (*eps, labels, foreground, 20, 2),
        "guide": (*eps, labels, sums, scale, 2, "foreground", 0.8, 3.0, 15.0, weights),
        "guide_evidence": (*eps, tokens, start, 7, 6, [2], scale, 2, *limits),
    }


def map_tensors(args, change):
    """The arguments with change(index, tensor) in place of every tensor."""
    count = iter(range(99))
    return [
        [change(next(count), x) for x in arg]
        if isinstance(arg, list) and isinstance(arg[0], torch.Tensor)
        else change(next(count), arg)
        if isinstance(arg, torch.Tensor)
        else arg
        for arg in args
    ]


def floating(args):
    """Positions, as `map_tensors` counts them, of the floating point tensors."""
    found = []
    map_tensors(args, lambda i, x: found.append(i) if x.is_floating_point() else None)
    return found


def outputs(name, args):
    out = getattr(csrc_triton, name)(*args)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("name", ["segment", "region_sums", "guide", "guide_evidence"])
def test_an_image_has_the_same_bits_alone_beside_a_broken_one_and_again(name):
    args = launches()[name]
    alone = outputs(name, map_tensors(args, lambda i, x: x[:1].contiguous()))
    for broken in (None, *floating(args)):

        def spoil(i, x, broken=broken):
            x = x.clone()
            if i == broken:
                x[1] = float("nan")
            return x

        for result, expected in zip(outputs(name, map_tensors(args, spoil)), alone, strict=True):
            assert same_bits(result[:1], expected)
            assert torch.isfinite(result[2].double()).all()
            if result.dtype == torch.int64:
                assert result.ge(0).all() and result.lt(20).all()  # labels stay indices


@pytest.mark.parametrize("name", ["segment", "region_sums", "guide", "guide_evidence"])
def test_every_input_that_requires_grad_is_refused(name):
    args = launches()[name]
    for index in floating(args):
        tracked = map_tensors(args, lambda i, x, n=index: x.clone().requires_grad_(i == n))
        with pytest.raises(RuntimeError, match=f"scfg.reference.{name}"):
            getattr(csrc_triton, name)(*tracked)
    with torch.no_grad():
        getattr(csrc_triton, name)(*tracked)
