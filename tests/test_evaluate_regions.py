"""Regions and spread: perfect ones score perfectly, and wrong ones as computed by hand."""

import numpy as np
import pytest
import torch
from evaluate_worker import TINY
from tiny import generate

from scfg.evaluate.draw import CONFIGS, METHODS, Point, draw, samg, scene, spread
from scfg.evaluate.inconsistency import true_spread
from scfg.evaluate.regions import (
    find,
    overlaps,
    phrase_regions,
    probe,
    score,
    token_owners,
    variants,
)
from scfg.models.embedded import assemble, networks
from scfg.models.shapes import caption, render, sample_scenes
from scfg.models.shapes_judge import patch_regions


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        parts = networks(TINY)
    return assemble(parts.eval().requires_grad_(False), TINY)


SCENES = sample_scenes(6, np.random.default_rng(3))


def perfect_labels(model, scenes):
    """For every patch of the true masks, some token of the phrase that names it."""
    regions = patch_regions(render(scenes)[1])
    owners = torch.stack([token_owners(model, caption(s)) for s in scenes])
    labels = torch.zeros_like(regions)
    for b in range(len(scenes)):
        for r in regions[b].unique().tolist():
            tokens = (owners[b] == r).nonzero()[:, 0]
            spots = (regions[b] == r).nonzero()
            labels[b, spots[:, 0], spots[:, 1]] = tokens[torch.arange(len(spots)) % len(tokens)]
    return labels, owners, regions


def test_overlap_of_the_true_masks_is_one(model):
    labels, owners, regions = perfect_labels(model, SCENES)
    found = phrase_regions(labels, owners)
    assert torch.equal(overlaps(found, regions != 2, regions), torch.ones(6, 4))


def test_overlap_with_two_objects_exchanged_or_nothing_found(model):
    pair = next(s for s in SCENES if len(s.objects) == 2)
    regions = patch_regions(render([pair])[1])
    swapped = torch.tensor([1, 0, 2])[regions]
    assert overlaps(swapped, regions != 2, regions)[0].tolist() == pytest.approx([1 / 3, 0, 1, 1])
    nothing = torch.full_like(regions, -1)
    assert overlaps(nothing, regions == 2, regions).abs().max() == 0


def test_overlap_leaves_out_the_object_that_is_not_there():
    single = next(s for s in SCENES if len(s.objects) == 1)
    regions = patch_regions(render([single])[1])
    found = regions.clone()
    found[regions == 0] = -1
    assert overlaps(found, regions != 2, regions)[0].tolist() == pytest.approx([1 / 2, 0, 1, 1])


def test_tokens_belong_to_the_phrase_they_stand_in(model):
    text = "a striped red circle and a blue square on a checkered green background"
    owners = token_owners(model, text).tolist()
    words = model.tokenizer.tokens(text)
    named = {r: [w for w, o in zip(words, owners, strict=True) if o == r] for r in (0, 1, 2)}
    assert named[0] == ["striped", "red", "circle"]
    assert named[1] == ["blue", "square"]
    assert named[2] == ["checkered", "green", "background"]
    single = token_owners(model, "a red star on a cyan background").tolist()
    assert set(single) == {-1, 0, 2}


def test_variants_are_scored_as_they_are_found(model):
    seen = probe(model, SCENES[:2], [0, 1], 500)
    scores = score(seen)
    assert scores.shape == (2, len(variants()), 4)
    v = variants().index(("paper", 3, "8 x 8"))
    assert torch.equal(scores[:, v], overlaps(*find(seen, "paper", 3, "8 x 8"), seen.truth))
    # One power of "paper" is S C; "official" is not any of the paper's.
    assert len({x.sum().item() for x in scores[0, :10]}) > 1


def test_a_probe_does_not_depend_on_its_batch(model):
    both, one = probe(model, SCENES[:2], [4, 9], 300), probe(model, SCENES[1:2], [9], 300)
    torch.testing.assert_close(both.images[1:], one.images, atol=1e-5, rtol=0)
    torch.testing.assert_close(both.eps_text[1:], one.eps_text, atol=1e-4, rtol=0)


def test_spread_is_the_coefficient_of_variation_of_regional_means():
    labels = torch.zeros(2, 4, 6, dtype=torch.int64)
    labels[:, :, 3:] = 2
    labels[1, 0, 0] = 1  # one pixel: too small to count
    eps_uncond = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    eps = eps_uncond.clone()
    eps[:, 1] += torch.where(labels == 2, 5.0, 1.0)
    assert spread(eps_uncond, eps, labels, 3).tolist() == pytest.approx([2 / 3, 2 / 3], rel=1e-5)
    assert spread(eps_uncond, eps, torch.zeros_like(labels), 3).isnan().all()


def test_spread_does_not_change_with_the_scale_and_vanishes_where_guidance_is_even():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (1, 8, 8), generator=generator)
    eta = torch.randn(1, 4, 8, 8, generator=generator)
    zero = torch.zeros_like(eta)
    once, thrice = (spread(zero, k * eta, labels, 3) for k in (1.0, 3.0))
    torch.testing.assert_close(once, thrice)
    even = eta / eta.norm(dim=1, keepdim=True)
    assert spread(zero, even, labels, 3) < 1e-6 < once


def test_samg_gives_its_extreme_scales_to_its_extreme_pixels():
    eps_uncond = torch.zeros(1, 2, 1, 3)
    eps_text = torch.tensor([0.0, 1.0, 2.0]).view(1, 1, 1, 3).expand(1, 2, 1, 3)
    eps, rate = samg(eps_uncond, eps_text, 7.5)
    scale = 7.5 * rate.flatten()
    assert scale.tolist() == pytest.approx([12.0, 12 - 7 / 4, 5.0], rel=1e-5)
    torch.testing.assert_close(eps[0, 0, 0], scale * eps_text[0, 0, 0])


def test_the_spread_of_true_regions_is_that_of_each_method(model):
    seen = probe(model, SCENES[:3], range(3), 400)
    found = true_spread(seen)
    assert found.shape == (3, len(METHODS)) and found.isfinite().all()
    plain = spread(seen.eps_uncond, 7 * seen.eps_text - 6 * seen.eps_uncond, seen.truth, 3)
    torch.testing.assert_close(found[:, METHODS.index("cfg")], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["cfg", "scfg"])
def test_images_are_those_of_generate(model, method):
    scenes = SCENES[:2]
    images, found = draw(model, Point(method, 3.0, "dpmpp_2m", 4), scenes, [11, 12])
    prompts = [caption(s) for s in scenes]
    expected = generate(
        model, prompts, [11, 12], method=method, guidance_scale=3.0, steps=4, sampler="dpmpp_2m"
    )
    assert torch.equal(images, expected.images)
    if method == "cfg":
        assert (found["scale"] == 3).all()
        torch.testing.assert_close(found["strength"], found["scale"])


def test_the_mean_scale_is_that_of_the_rates(model):
    scenes = SCENES[:2]
    prompts = [caption(s) for s in scenes]
    options = {"guidance_scale": 3.0, "steps": 3, "sampler": "ddim"}
    trace = generate(model, prompts, [1, 2], trace=True, **options).trace
    expected = 3 * torch.stack([step.rate.mean(dim=(1, 2)) for step in trace]).mean(dim=0)
    found = draw(model, Point("scfg", 3.0, "ddim", 3), scenes, [1, 2])[1]
    torch.testing.assert_close(found["scale"], expected)
    assert (found["strength"] != found["scale"]).all()
    assert found["spread_after"].shape == (2, 3)
    assert found["spread_after"].nanmean() < found["spread_before"].nanmean()


def test_strength_weighs_pixels_by_the_norm_of_guidance(model):
    prompt = caption(SCENES[0])
    trace = generate(model, [prompt], [3], guidance_scale=3.0, steps=1, trace=True).trace
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    eta = model.unet(x, 999, model.encode(prompt)) - model.unet(x, 999, model.encode(""))
    norm = eta.norm(dim=1)
    expected = 3 * (trace[0].rate * norm).sum() / norm.sum()
    found = draw(model, Point("scfg", 3.0, "ddim", 1), SCENES[:1], [3])[1]
    assert found["strength"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_every_method_draws(model):
    for method in METHODS:
        images, found = draw(model, Point(method, 2.0, "ddim", 2), SCENES[:1], [0])
        assert images.isfinite().all()
        assert ("spread_after" in found) == (method in CONFIGS)


def test_a_prompt_depends_on_its_number_alone():
    assert scene(5, 1) == scene(5, 1)
    assert len({caption(scene(i, 1)) for i in range(50)}) > 40
    assert scene(5, 1) != scene(5, 2)
