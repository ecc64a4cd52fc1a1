"""semantic_cfg against the golden files, its invariances, and its errors."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import Golden, assert_close

import scfg
from scfg import reference
from scfg.guidance import guide_regions
from scfg.regions import Regions


def case(b=2, size=(17, 25), tokens=9, channels=4, reductions=(4, 8), seed=0):
    """Random predictions, and maps peaked enough for several regions to appear."""
    g = torch.Generator().manual_seed(seed)
    self_maps, cross_maps = [], []
    for r in reductions:
        n = -(-size[0] // r) * -(-size[1] // r)
        self_maps.append((3 * torch.randn(2 * b, n, n, generator=g)).softmax(-1))
        cross_maps.append((3 * torch.randn(2 * b, n, tokens, generator=g)).softmax(-1))
    predictions = torch.randn(2, b, channels, *size, generator=g).unbind(0)
    return *predictions, self_maps, cross_maps


@pytest.mark.parametrize("propagation", ["official", "paper"])
def test_golden_files_are_reproduced(golden_path, propagation):
    golden = Golden(golden_path)
    config = scfg.SCFGConfig(map_reduction=golden.reduction, propagation=propagation)
    maps = golden.self_maps, golden.cross_maps
    out = scfg.semantic_cfg(
        golden.eps_uncond, golden.eps_text, *maps, golden.guidance_scale, config
    )
    expected = {key: golden.expected[f"{propagation}_{key}"] for key in ("rate", "eps")}
    assert torch.equal(out.labels, golden.expected[f"{propagation}_label"].long())
    assert torch.equal(out.foreground, golden.expected[f"{propagation}_foreground"].bool())
    assert_close(actual=out.rate, expected=expected["rate"], share=2e-5, what="rate")
    assert_close(actual=out.eps, expected=expected["eps"], share=1e-5, what="eps")


@pytest.mark.parametrize(
    ("b", "size", "tokens", "channels"),
    [(1, (72, 88), 77, 4), (8, (17, 25), 2, 1), (2, (25, 17), 154, 12), (3, (64, 8), 20, 3)],
)
def test_float32_agrees_with_float64_on_non_square_and_odd_latents(b, size, tokens, channels):
    u, c, self_maps, cross_maps = case(b, size, tokens, channels)
    out = scfg.semantic_cfg(u, c, self_maps, cross_maps, 7.5)
    wide = [m.double() for m in self_maps], [m.double() for m in cross_maps]
    exact = scfg.semantic_cfg(u.double(), c.double(), *wide, 7.5)
    assert out.labels.shape == (b, -(-size[0] // 4), -(-size[1] // 4))
    assert torch.equal(out.labels, exact.labels)
    assert_close(actual=out.eps, expected=exact.eps, share=1e-4)
    assert out.eps.dtype == u.dtype and out.rate.dtype == torch.float32


def test_rate_held_at_one_is_plain_cfg():
    u, c, self_maps, cross_maps = case()
    config = scfg.SCFGConfig(rate_min=1.0, rate_max=1.0, max_scale=None)
    out = scfg.semantic_cfg(u, c, self_maps, cross_maps, 7.5, config)
    assert_close(actual=out.eps, expected=u + 7.5 * (c - u), share=1e-5)
    assert_close(actual=scfg.cfg(u, c, 7.5), expected=u + 7.5 * (c - u), share=1e-5)


@pytest.mark.parametrize("factor", [-14.6, 0.03, 250.0])
def test_rates_are_the_same_in_every_prediction_space(factor):
    # at one step eps, v, x0 and flow are affine in each other: x * shift + factor * eps
    u, c, self_maps, cross_maps = case()
    x = torch.randn(u.shape, generator=torch.Generator().manual_seed(1))
    out = scfg.semantic_cfg(u, c, self_maps, cross_maps, 5.0)
    other = scfg.semantic_cfg(x + factor * u, x + factor * c, self_maps, cross_maps, 5.0)
    assert_close(actual=other.rate, expected=out.rate, share=1e-4)
    assert_close(actual=other.eps, expected=x + factor * out.eps, share=2e-4 * abs(factor) + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_cfg_is_its_formula_image_by_image(dtype):
    make = torch.Generator().manual_seed(0)
    u, c = torch.randn(2, 3, 4, 5, 7, generator=make, dtype=torch.float64).to(dtype)
    scale = torch.tensor([1.5, 3.0, 12.0])
    expected = u.double() + scale.double()[:, None, None, None] * (c.double() - u.double())
    assert_close(actual=scfg.cfg(u, c, scale), expected=expected, share=torch.finfo(dtype).eps)
    assert scfg.cfg(u, c, scale).dtype == dtype


def test_clips_of_one_batch_have_their_own_scales_and_weights():
    make = torch.Generator().manual_seed(0)
    u, c = torch.randn(2, 2, 4, 3, 8, 6, generator=make)  # (b, c, f, H, W)
    labels = torch.randint(0, 5, (2, 3, 4, 3), generator=make)
    regions = Regions(labels, labels == 0, 5, torch.zeros(2, dtype=torch.bool), "foreground")
    config = scfg.SCFGConfig(map_reduction=2)
    scale, weights = torch.tensor([2.0, 9.0]), torch.rand(2, 5, generator=make) + 0.5
    both = guide_regions(u, c, regions, scale, config, token_weights=weights)
    still = replace(
        regions, labels=(frame := labels[:, :1].expand(-1, 3, -1, -1)), foreground=frame == 0
    )
    for frames in (2, 3):
        cut = replace(still, **{n: getattr(still, n)[:, :frames] for n in ("labels", "foreground")})
        rate = guide_regions(u[:, :, :frames], c[:, :, :frames], cut, scale, config).rate
        assert rate.unique().numel() > 2 and rate.equal(rate[:, :, :1].expand_as(rate))
    for k in range(2):
        own = Regions(labels[[k]], labels[[k]] == 0, 5, regions.start_is_flat[[k]], "foreground")
        one = guide_regions(u[[k]], c[[k]], own, float(scale[k]), config, token_weights=weights[k])
        assert_close(actual=both.eps[[k]], expected=one.eps, share=1e-6)
        assert_close(actual=both.rate[[k]], expected=one.rate, share=1e-6)


@pytest.mark.parametrize("known", [None, "image", "foreground"])
@pytest.mark.parametrize("asked", ["auto", "image", "foreground"])
def test_regions_that_know_their_benchmark_keep_it(known, asked):
    u, c, *_ = case(size=(8, 6))
    labels = torch.arange(12).view(1, 4, 3).expand(2, -1, -1) // 5
    regions = Regions(labels, labels == 0, 3, torch.zeros(2, dtype=torch.bool), known)
    config = scfg.SCFGConfig(map_reduction=2, benchmark=asked)
    found = guide_regions(u, c, regions, 5.0, config).rate
    used = known or ("image" if asked == "image" else "foreground")
    expected = guide_regions(u, c, replace(regions, benchmark=used), 5.0, scfg.SCFGConfig()).rate
    other = {"image": "foreground", "foreground": "image"}[used]
    unlike = guide_regions(u, c, replace(regions, benchmark=other), 5.0, scfg.SCFGConfig()).rate
    assert found.equal(expected) and not found.equal(unlike)


def test_guidance_scale_may_differ_per_image():
    u, c, self_maps, cross_maps = case()
    out = scfg.semantic_cfg(u, c, self_maps, cross_maps, torch.tensor([2.0, 12.0]))
    for image, scale in enumerate((2.0, 12.0)):
        rows = [image, image + 2]
        maps = [m[rows] for m in self_maps], [m[rows] for m in cross_maps]
        one = scfg.semantic_cfg(u[image : image + 1], c[image : image + 1], *maps, scale)
        assert_close(actual=out.eps[image], expected=one.eps[0], share=1e-5)


def test_foreground_can_come_from_the_text_branch():
    u, c, self_maps, cross_maps = case()
    b = len(u)
    swapped = [m.roll(b, 0) for m in self_maps], [m.roll(b, 0) for m in cross_maps]
    cond = scfg.semantic_cfg(u, c, self_maps, cross_maps, 5.0, scfg.SCFGConfig(foreground="cond"))
    uncond = scfg.semantic_cfg(u, c, *swapped, 5.0)  # text rows in the unconditional place
    assert torch.equal(cond.foreground, uncond.foreground)
    assert not torch.equal(cond.labels, uncond.labels)


def test_non_contiguous_inputs_change_nothing():
    u, c, self_maps, cross_maps = case()
    strided = [m.mT.contiguous().mT for m in cross_maps]
    out = scfg.semantic_cfg(u, c, self_maps, cross_maps, 5.0)
    other = scfg.semantic_cfg(
        u.transpose(2, 3).contiguous().transpose(2, 3), c, self_maps, strided, 5.0
    )
    assert torch.equal(out.labels, other.labels)
    assert_close(actual=other.eps, expected=out.eps, share=1e-5)


def test_layers_per_level_keeps_the_last_ones():
    u, c, self_maps, cross_maps = case(reductions=(4, 4, 8, 4))
    config = scfg.SCFGConfig(layers_per_level=1)
    out = scfg.semantic_cfg(u, c, self_maps, cross_maps, 5.0, config)
    last = scfg.semantic_cfg(u, c, self_maps[2:], cross_maps[2:], 5.0)
    assert torch.equal(out.labels, last.labels)
    every = scfg.semantic_cfg(u, c, self_maps, cross_maps, 5.0)
    assert not torch.equal(out.labels, every.labels)


def test_token_weights_multiply_the_rate_of_their_region():
    u, c, self_maps, cross_maps = case()
    config = scfg.SCFGConfig(rate_min=1.0, rate_max=1.0, max_scale=None)
    weights = torch.linspace(0.5, 2, 9)
    out = scfg.semantic_cfg(u, c, self_maps, cross_maps, 5.0, config, token_weights=weights)
    pixels = weights[reference.spread(out.labels, 17, 25, 4)]
    assert_close(actual=out.rate[:, 0], expected=reference.blur(pixels), share=1e-6)


def test_half_precision_inputs_keep_their_type_and_labels():
    u, c, self_maps, cross_maps = case()
    half = [m.half().float() for m in self_maps], [m.half().float() for m in cross_maps]
    expected = scfg.semantic_cfg(u.half().float(), c.half().float(), *half, 5.0)
    maps = [m.half() for m in self_maps], [m.half() for m in cross_maps]
    out = scfg.semantic_cfg(u.half(), c.half(), *maps, 5.0)
    assert out.eps.dtype == torch.float16 and out.rate.dtype == torch.float32
    assert torch.equal(out.labels, expected.labels)
    assert_close(actual=out.eps.float(), expected=expected.eps, share=1e-2)


def test_a_nan_in_one_image_never_touches_another():
    u, c, self_maps, cross_maps = case(b=3)
    rows = [0, 2]
    clean = scfg.semantic_cfg(u, c, self_maps, cross_maps, 5.0)
    c = c.clone()
    c[1, 0, 3, 3] = math.nan
    labels, foreground = clean.labels, clean.foreground
    sums = reference.region_sums(u, c, labels, foreground, 9, 4)
    eps, rate = reference.guide(u, c, labels, sums, torch.full((3,), 5.0), 4)
    assert torch.equal(eps[rows], clean.eps[rows]) and torch.equal(rate[rows], clean.rate[rows])
    self_maps[0][1, 2, 2] = math.nan
    evidence = reference.complete(self_maps[0][:3], cross_maps[0][:3], torch.full((35,), 1 / 35))
    other, *_ = reference.segment([evidence], [evidence], 5, 7, [1])
    alone = reference.complete(self_maps[0][rows], cross_maps[0][rows], torch.full((35,), 1 / 35))
    expected, *_ = reference.segment([alone], [alone], 5, 7, [1])
    assert torch.equal(other[rows], expected)


def broken(position, change):
    args = list(case())
    args[position] = change(args[position])
    return args


def spoil(x, value):
    x = x.clone()
    x.view(-1)[-1] = value
    return x


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (broken(0, lambda x: x[0]), ValueError, r"eps_uncond.*\(2, 4, 17, 25\).*\(4, 17, 25\)"),
        (
            broken(1, lambda x: x[..., :-1]),
            ValueError,
            r"eps_uncond must have shape \(2, 4, 17, 24",
        ),
        (broken(0, lambda x: x.long()), TypeError, "eps_uncond must be a floating point"),
        (broken(0, lambda x: spoil(x, math.nan)), ValueError, r"eps_uncond must be finite.*\[1\]"),
        (broken(1, lambda x: spoil(x, math.inf)), ValueError, r"eps_text must be finite.*\[1\]"),
        (broken(2, lambda x: x[:1]), ValueError, "one entry per layer.*got 1 and 2"),
        (broken(2, lambda x: [x[0][:2], x[1]]), ValueError, r"self_maps\[0\].*\(4, 35, 35\)"),
        (broken(3, lambda x: [x[0][:3], x[1]]), ValueError, r"cross_maps\[0\] must have shape \(4"),
        (
            broken(3, lambda x: [x[0], spoil(x[1], math.nan)]),
            ValueError,
            r"cross_maps\[1\].*finite",
        ),
        (
            broken(3, lambda x: [x[0], x[1][..., :8]]),
            ValueError,
            r"cross_maps\[1\].*9 tokens, got 8",
        ),
        (broken(1, lambda x: "eps"), TypeError, "eps_text must be a tensor, got str"),
    ],
)
def test_bad_input_is_named(args, error, message):
    with pytest.raises(error, match=message):
        scfg.semantic_cfg(*args, 7.5)


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf, torch.tensor([1.0, -2.0])])
def test_guidance_scale_must_be_positive_and_finite(scale):
    with pytest.raises(ValueError, match="guidance_scale must be finite and > 0"):
        scfg.semantic_cfg(*case(), scale)


def test_maps_of_no_known_or_chosen_size_are_refused():
    u, c, self_maps, cross_maps = case()
    with pytest.raises(ValueError, match=r"cross_maps\[0\] must have .* got 34"):
        maps = [self_maps[0][:, :34, :34]], [cross_maps[0][:, :34]]
        scfg.semantic_cfg(u, c, *maps, 7.5)
    with pytest.raises(ValueError, match=r"reductions \(1, 2\)"):
        config = scfg.SCFGConfig(map_reduction=1, coarsest_reduction=2)
        scfg.semantic_cfg(u, c, self_maps, cross_maps, 7.5, config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("map_reduction", 3),
        ("coarsest_reduction", 2),
        ("propagation", "both"),
        ("propagation_steps", 0),
        ("foreground", "text"),
        ("benchmark", "all"),
        ("layers_per_level", 0),
        ("rate_min", 0.0),
        ("rate_max", 0.5),
        ("rate_max", math.inf),
        ("max_scale", -1.0),
        ("rate_min", "low"),
    ],
)
def test_config_names_the_field_that_is_wrong(field, value):
    with pytest.raises(ValueError, match=field):
        scfg.SCFGConfig(**{field: value})


def test_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        scfg.SCFGConfig().rate_min = 2
