"""What the method promises of any maps and predictions, whatever their size and magnitude."""

import dataclasses

import pytest
import torch
from conftest import assert_close
from hypothesis import assume, given
from hypothesis import strategies as st

import scfg
from scfg.guidance import guide_regions
from scfg.regions import Regions

TIGHT = 1e-9  # share; cases are float64, where near ties do not occur


@dataclasses.dataclass(repr=False)
class Case:
    """Random arguments of `semantic_cfg`."""

    u: torch.Tensor
    c: torch.Tensor
    self_maps: list
    cross_maps: list
    scale: float
    config: scfg.SCFGConfig

    def run(self, **changes):
        case = dataclasses.replace(self, **changes)
        maps = case.self_maps, case.cross_maps
        return scfg.semantic_cfg(case.u, case.c, *maps, case.scale, case.config, backend="torch")


@st.composite
def configs(draw):
    low = draw(st.floats(0.05, 1.5))
    return scfg.SCFGConfig(
        map_reduction=1,
        coarsest_reduction=2,
        propagation=draw(st.sampled_from(["paper", "official", "none"])),
        propagation_steps=draw(st.integers(1, 5)),
        foreground=draw(st.sampled_from(["uncond", "cond"])),
        benchmark=draw(st.sampled_from(["foreground", "image"])),
        layers_per_level=draw(st.sampled_from([None, 1, 2])),
        rate_min=low,
        rate_max=low * draw(st.floats(1, 8)),
        max_scale=draw(st.one_of(st.none(), st.floats(0.5, 30))),
    )


@st.composite
def cases(draw, even=False):
    """One to four layers of an image, or three, of 4 to 11 pixels a side."""
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    b, t, channels = draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(1, 5))
    h, w = (draw(st.integers(2, 5)) * 2 + (0 if even else draw(st.integers(0, 1))) for _ in "hw")
    sharp = draw(st.sampled_from([0.5, 3.0, 40.0]))  # the last saturates the softmax
    self_maps, cross_maps = [], []
    for r in [1, *draw(st.lists(st.sampled_from([1, 2]), max_size=3))]:
        n = -(-h // r) * -(-w // r)
        for maps, m in ((self_maps, n), (cross_maps, t)):
            noise = torch.randn(2 * b, n, m, generator=make, dtype=torch.float64)
            maps.append((sharp * noise).softmax(-1))
    u, c = torch.randn(2, b, channels, h, w, generator=make, dtype=torch.float64)
    return Case(u, c, self_maps, cross_maps, draw(st.floats(0.3, 20)), draw(configs()))


def same(out, expected):
    assert torch.equal(out.labels, expected.labels)
    assert torch.equal(out.foreground, expected.foreground)
    assert_close(actual=out.rate, expected=expected.rate, share=TIGHT)
    assert_close(actual=out.eps, expected=expected.eps, share=TIGHT)


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_tokens_and_of_layers_does_not_matter(case, random):
    t, layers = case.cross_maps[0].shape[2], list(range(len(case.cross_maps)))
    order = [0, *random.sample(range(1, t), t - 1)]
    if case.config.layers_per_level is None:
        random.shuffle(layers)
    out = case.run(
        self_maps=[case.self_maps[i] for i in layers],
        cross_maps=[case.cross_maps[i][..., order] for i in layers],
    )
    expected = case.run()
    same(dataclasses.replace(out, labels=torch.tensor(order)[out.labels]), expected)


@given(cases())
def test_an_image_is_guided_alone_as_in_a_batch(case):
    b, expected = len(case.u), case.run()
    for i in range(b):
        rows = [i, b + i]
        out = case.run(
            u=case.u[i : i + 1],
            c=case.c[i : i + 1],
            self_maps=[x[rows] for x in case.self_maps],
            cross_maps=[x[rows] for x in case.cross_maps],
        )
        part = {name: x[i : i + 1] for name, x in vars(expected).items() if torch.is_tensor(x)}
        same(out, dataclasses.replace(expected, **part))


MOVES = {
    "up and down": lambda x: x.flip(-2),
    "left and right": lambda x: x.flip(-1),
    "transposed": lambda x: x.mT,
}


@pytest.mark.parametrize("move", MOVES)
@given(case=cases(even=True))
def test_a_mirrored_image_is_guided_as_the_mirror_image(move, case):
    move, (h, w) = MOVES[move], case.u.shape[-2:]

    def moved(x, axis):
        n = x.shape[axis]
        r = 1 if n == h * w else 2
        order = move(torch.arange(n).view(h // r, w // r)).flatten()
        return x.index_select(axis, order)

    out = case.run(
        u=move(case.u),
        c=move(case.c).contiguous(),
        self_maps=[moved(moved(x, 1), 2) for x in case.self_maps],
        cross_maps=[moved(x, 1) for x in case.cross_maps],
    )
    expected = case.run()
    tensors = {name: x for name, x in vars(expected).items() if torch.is_tensor(x) and x.dim() > 1}
    same(out, dataclasses.replace(expected, **{name: move(x) for name, x in tensors.items()}))


@given(cases(), st.floats(0.02, 0.98))
def test_rates_are_those_of_noise_v_x0_and_flow(case, alpha):
    x, expected = torch.linspace(-2, 3, case.u.numel(), dtype=torch.float64).view_as(case.u), None
    signal, noise = alpha**0.5, (1 - alpha) ** 0.5
    spoken = {
        "x0": lambda eps: (x - noise * eps) / signal,
        "v": lambda eps: (eps - noise * x) / signal,
        "flow": lambda eps: (eps - x) / signal,
    }
    expected = case.run()
    for name, convert in spoken.items():
        out = case.run(u=convert(case.u), c=convert(case.c))
        assert_close(actual=out.rate, expected=expected.rate, share=1e-8, what=name)
        assert_close(actual=out.eps, expected=convert(expected.eps), share=1e-8, what=name)


@given(cases())
def test_rates_keep_their_bounds_and_cap_and_fixed_at_one_are_cfg(case):
    out, config = case.run(), case.config
    cap = torch.inf if config.max_scale is None else config.max_scale / case.scale
    for rate, foreground in zip(out.rate, out.foreground, strict=True):
        if config.benchmark == "foreground" and not foreground.any():
            assert_close(actual=rate, expected=torch.ones_like(rate), share=1e-12)
            continue
        assert rate.max() <= min(config.rate_max, cap) * (1 + 1e-6)
        assert rate.min() >= min(config.rate_min, cap) * (1 - 1e-6)
    eps = case.u + case.scale * out.rate * (case.c - case.u)
    assert_close(actual=out.eps, expected=eps, share=1e-6)  # the scale is float32
    one = dataclasses.replace(config, rate_min=1.0, rate_max=1.0, max_scale=None)
    plain = case.u + case.scale * (case.c - case.u)
    assert_close(actual=case.run(config=one).eps, expected=plain, share=1e-6)


@given(cases(), st.sampled_from(["one region", "nothing to guide", "empty", "full"]))
def test_degenerate_images_are_plain_guidance(case, kind):
    h, w = case.u.shape[-2:]
    b, tokens = len(case.u), case.cross_maps[0].shape[2]
    labels = case.run().labels
    foreground = torch.full_like(labels, kind != "empty", dtype=torch.bool)
    if kind == "one region":
        labels = torch.full_like(labels, tokens - 1)
    c = case.u if kind == "nothing to guide" else case.c
    free = scfg.SCFGConfig(
        map_reduction=1, coarsest_reduction=1, rate_min=1e-6, rate_max=1e6, max_scale=None
    )
    regions = Regions(labels, foreground, tokens, torch.zeros(b, dtype=torch.bool))
    out = guide_regions(case.u, c, regions, case.scale, free, "torch")
    if kind == "full":  # then the foreground is the image
        image = dataclasses.replace(free, benchmark="image")
        expected = guide_regions(case.u, c, regions, case.scale, image, "torch").rate
    else:
        expected = torch.ones(b, 1, h, w)
    assert_close(actual=out.rate, expected=expected, share=1e-9)


@given(cases(), st.sampled_from([1e-37, 1e-15, 1e15, 1e18]), st.sampled_from(["torch", "auto"]))
def test_magnitude_does_not_matter_and_what_has_no_square_is_refused(case, size, backend):
    assume(case.config.benchmark == "image" or case.run().foreground.flatten(1).any(1).all())
    peak = torch.stack([case.u, case.c]).abs().max()

    def run(size, dtype):
        case32 = [(size * x / peak).to(dtype) for x in (case.u, case.c)]
        maps = [x.float() for x in case.self_maps], [x.float() for x in case.cross_maps]
        return scfg.semantic_cfg(*case32, *maps, case.scale, case.config, backend=backend)

    expected, out = run(1.0, torch.float32), run(size, torch.float32)
    assert torch.equal(out.labels, expected.labels)
    assert torch.isfinite(out.rate).all() and torch.isfinite(out.eps).all()
    if size > 1e-30:  # below, squares are nothing, and so is what rates are factors of
        assert_close(actual=out.rate, expected=expected.rate, share=1e-4)
    half = run(6e4, torch.float16)
    assert_close(actual=half.rate, expected=expected.rate, share=2e-2)
    with pytest.raises(ValueError, match=r"eps_(uncond|text) must be within \+-1e\+18"):
        run(3e38, torch.float32)
