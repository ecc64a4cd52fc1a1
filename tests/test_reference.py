"""Closed-form answers for the torch definitions."""

import math

import pytest
import torch
from conftest import assert_close

from scfg import reference


def stochastic(b, n, generator):
    return torch.rand(b, n, n, generator=generator, dtype=torch.float64).softmax(dim=-1)


def test_attention_map_equals_explicit_softmax_per_head():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 35, 3 * 20, generator=g, dtype=torch.float64)
    k = torch.randn(2, 7, 3 * 20, generator=g, dtype=torch.float64)
    bias = torch.zeros(2, 7, dtype=torch.float64)
    bias[1, 5:] = -math.inf
    heads_q, heads_k = (x.unflatten(-1, (3, 20)).transpose(1, 2) for x in (q, k))  # (b, g, n, d)
    value = torch.eye(7, dtype=torch.float64).expand(2, 3, 7, 7)
    mask = bias[:, None, None, :].expand(2, 3, 35, 7)
    expected = torch.nn.functional.scaled_dot_product_attention(heads_q, heads_k, value, mask)
    actual = reference.attention_map(q, k, 3, bias)
    assert_close(actual=actual, expected=expected.mean(1), share=1e-12)
    assert (actual[1, :, 5:] == 0).all()


def test_attention_apply_equals_map_times_columns_over_row_tiles():
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 300, 24, generator=g).unbind(0)
    columns = torch.rand(1, 300, 5, generator=g)
    expected = reference.attention_map(q.double(), k.double(), 2) @ columns.double()
    assert_close(actual=reference.attention_apply(q, k, columns, 2), expected=expected, share=1e-6)


@pytest.mark.parametrize(
    ("propagation", "steps", "weights"),
    [("paper", 4, (0.25,) * 4), ("paper", 1, (1,)), ("official", 4, (0.25, 0.75)), ("none", 4, ())],
)
def test_propagate_is_the_stated_polynomial_in_s(propagation, steps, weights):
    g = torch.Generator().manual_seed(2)
    s = stochastic(2, 35, g)
    c = torch.rand(2, 35, 5, generator=g, dtype=torch.float64)
    polynomial = sum(w * torch.linalg.matrix_power(s, p + 1) for p, w in enumerate(weights))
    expected = polynomial @ c if weights else c
    assert_close(
        actual=reference.propagate(s, c, propagation, steps), expected=expected, share=1e-12
    )


def test_identity_self_attention_leaves_columns_unchanged():
    c = torch.rand(1, 6, 3, dtype=torch.float64)
    for propagation in ("paper", "official"):
        actual = reference.propagate(torch.eye(6, dtype=torch.float64)[None], c, propagation)
        assert_close(actual=actual, expected=c, share=1e-15)


def test_upsample_equals_bilinear_interpolation_where_the_factor_divides():
    x = torch.rand(2, 3, 4, 7, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(x, scale_factor=4, mode="bilinear")
    assert_close(actual=reference.upsample(x, 16, 28, 4), expected=expected, share=1e-14)


def test_upsample_of_an_odd_size_is_the_cropped_even_one():
    x = torch.rand(1, 3, 5)
    even = reference.upsample(x, 6, 10, 2)
    assert torch.equal(reference.upsample(x, 5, 9, 2), even[:, :5, :9])


def test_blur_equals_a_reflect_padded_convolution():
    x = torch.rand(2, 3, 9, 5, dtype=torch.float64)
    line = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    expected = torch.nn.functional.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None])
    assert_close(actual=reference.blur(x), expected=expected.view_as(x), share=1e-14)


def test_blur_leaves_an_axis_of_one_pixel_alone():
    x = torch.rand(1, 1, 4, dtype=torch.float64)
    column = reference.blur(x.mT)
    assert_close(actual=column.mT, expected=reference.blur(x), share=1e-15)
    single = torch.full((1, 1, 1), 3.0)
    assert_close(actual=reference.blur(single), expected=single, share=1e-6)


@pytest.mark.parametrize(("h", "w", "factor"), [(8, 8, 1), (18, 22, 2), (5, 7, 2), (13, 9, 4)])
def test_spatial_weights_give_the_mean_of_the_blurred_upsampled_map(h, w, factor):
    grid = -(-h // factor), -(-w // factor)
    y = torch.rand(*grid, dtype=torch.float64)
    mean = reference.blur(reference.upsample(y, h, w, factor)).mean()
    weights = reference.spatial_weights(h, w, factor)
    assert_close(actual=weights @ y.flatten(), expected=mean, share=1e-14)
    assert_close(actual=weights.sum(), expected=torch.tensor(1.0), share=1e-14)


def test_complete_gives_every_column_spatial_mean_one_and_adds_up():
    g = torch.Generator().manual_seed(3)
    s, c = stochastic(2, 35, g), torch.rand(2, 35, 6, generator=g, dtype=torch.float64)
    weights = reference.spatial_weights(5, 7, 1)
    one = reference.complete(s, c, weights)
    assert one.shape == (2, 35, 7)
    mean = torch.einsum("n,bnt->bt", weights, one)
    assert_close(actual=mean, expected=torch.ones(2, 7), share=1e-12)
    rest = reference.propagate(s, c[..., 1:].sum(-1, keepdim=True))
    assert_close(actual=one[..., 6:], expected=rest / (weights @ rest)[:, None], share=1e-12)
    both = reference.complete(s, c, weights, one)
    assert_close(actual=both, expected=2 * one, share=1e-12)


def test_complete_keeps_a_column_of_zeros_zero():
    c = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    out = reference.complete(None, c, torch.tensor([0.5, 0.5]), propagation="none")
    assert_close(actual=out[..., 1:], expected=torch.zeros(1, 2, 2))


def test_segment_gives_one_hot_evidence_its_regions_and_ties_to_the_lowest_token():
    owner = torch.tensor([[0, 0, 2, 2, 2], [0, 0, 2, 2, 2], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    evidence = torch.nn.functional.one_hot(owner.flatten(), 4).float()[None] * 100
    evidence = torch.cat([evidence, 100 - evidence[..., :1]], dim=-1)
    labels, foreground, _ = reference.segment([evidence], [evidence], 4, 5, [1])
    assert torch.equal(labels[0], owner)
    assert torch.equal(foreground[0], owner != 0)
    tied = torch.ones(1, 20, 5)
    labels, foreground, _ = reference.segment([tied], [tied], 4, 5, [1])
    assert (labels == 0).all() and not foreground.any()


def test_segment_permutes_labels_with_tokens():
    g = torch.Generator().manual_seed(4)
    evidence = torch.rand(2, 35, 6, generator=g)
    order = torch.tensor([0, 3, 1, 4, 2, 5])
    labels, *_ = reference.segment([evidence], [evidence], 5, 7, [1])
    permuted, *_ = reference.segment([evidence[..., order]], [evidence], 5, 7, [1])
    assert torch.equal(order[permuted], labels)


def test_region_sums_equal_a_loop_over_pixels():
    g = torch.Generator().manual_seed(5)
    u, c = torch.randn(2, 2, 3, 9, 7, generator=g, dtype=torch.float64).unbind(0)
    labels = torch.randint(0, 4, (2, 3, 2), generator=g)
    foreground = torch.rand(2, 3, 2, generator=g) > 0.5
    expected = torch.zeros(2, 5, 2, dtype=torch.float64)
    for image in range(2):
        for y in range(9):
            for x in range(7):
                a = math.dist(c[image, :, y, x].tolist(), u[image, :, y, x].tolist())
                patch = image, y // 4, x // 4
                for region in [int(labels[patch])] + [4] * bool(foreground[patch]):
                    expected[image, region] += torch.tensor([a, 1.0], dtype=torch.float64)
    actual = reference.region_sums(u, c, labels, foreground, 4, 4).sum(1)
    assert_close(actual=actual, expected=expected, share=1e-12)


def test_region_rates_by_hand():
    # means 2, 8, 1 and an empty region; foreground mean 4; cap 15 / 7.5 = 2
    sums = torch.tensor([[[[4.0, 2], [8, 1], [3, 3], [0, 0], [8, 2]]]])
    scale = torch.tensor([7.5])
    rates = reference.region_rates(sums, scale)
    assert_close(actual=rates[:, :3], expected=torch.tensor([[2.0, 0.8, 2.0]]), share=1e-7)
    rates = reference.region_rates(sums, scale, max_scale=None)
    assert_close(actual=rates[:, :3], expected=torch.tensor([[2.0, 0.8, 3.0]]), share=1e-7)
    rates = reference.region_rates(sums, scale, benchmark="image")  # image mean 15 / 6
    assert_close(actual=rates[:, :3], expected=torch.tensor([[1.25, 0.8, 2.0]]), share=1e-7)


def test_empty_foreground_is_plain_cfg_whatever_the_cap():
    sums = torch.tensor([[[[4.0, 2], [8, 1], [0, 0]]]])
    rates = reference.region_rates(sums, torch.tensor([40.0]))
    assert torch.equal(rates, torch.ones(1, 2))


def test_region_without_guidance_has_rate_one():
    sums = torch.tensor([[[[0.0, 2], [8, 1], [8, 1]]]])
    assert torch.equal(reference.region_rates(sums, torch.tensor([2.0])), torch.ones(1, 2))


def test_guide_spreads_blurs_and_combines():
    g = torch.Generator().manual_seed(6)
    u, c = torch.randn(2, 1, 2, 5, 6, generator=g, dtype=torch.float64).unbind(0)
    labels = torch.tensor([[[0, 0, 1], [0, 1, 1], [0, 0, 0]]])
    sums = torch.tensor([[[[2.0, 1], [1, 1], [2, 1]]]], dtype=torch.float64)  # rates 1 and 2
    eps, rate = reference.guide(u, c, labels, sums, torch.tensor([3.0]), 2)
    pixels = torch.ones(5, 6, dtype=torch.float64)
    pixels[:2, 4:] = pixels[2:4, 2:] = 2
    expected = reference.blur(pixels)
    assert_close(actual=rate[0, 0], expected=expected, share=1e-12)
    assert_close(actual=eps, expected=u + 3 * expected * (c - u), share=1e-12)
    weights = torch.tensor([[2.0, 0.5]])
    _, rate = reference.guide(u, c, labels, sums, torch.tensor([3.0]), 2, token_weights=weights)
    expected = reference.blur(torch.where(pixels == 2, 1.0, 2.0).double())
    assert_close(actual=rate[0, 0], expected=expected, share=1e-12)
