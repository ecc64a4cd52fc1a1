"""Regions, controls and the oracle: perfect ones score perfectly, wrong ones as by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import assert_close
from tiny import TRANSFORMER, generate, randomised, tiny_model

from scfg import reference
from scfg.evaluate import draw as drawing
from scfg.evaluate.draw import METHODS, Point, draw, scene, shuffled, weighted_mean
from scfg.evaluate.regions import (
    GROUND,
    find,
    noised,
    overlaps,
    probe,
    region_means,
    score,
    token_owners,
    true_regions,
    variants,
)
from scfg.guidance import Guided, guide_regions
from scfg.methods.samg import samg
from scfg.models.embedded import CONFIG, assemble, networks, to_latents
from scfg.models.emoji import caption, render, sample_scenes
from scfg.models.judge import patch_regions
from scfg.models.transformer import JointTransformer
from scfg.recording.wrapper import Recorder
from scfg.regions import Regions

SCENES = sample_scenes(6, np.random.default_rng(3))
CAPTIONS = [caption(one) for one in SCENES]


@pytest.fixture(scope="module", params=["unet", "transformer"])
def model(request):
    return tiny_model(1) if request.param == "unet" else seeing_transformer()


def seeing_transformer():
    """Words differ in where they are seen, however little, and that counts."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        parts = randomised(networks(TRANSFORMER).eval())
    config = dataclasses.replace(CONFIG, min_share=0.0, min_peak=0.0)
    return dataclasses.replace(assemble(parts, TRANSFORMER), config=config)


@pytest.fixture(scope="module")
def first(model):
    """A level of its probes that is not the whole."""
    return "block 1" if isinstance(model.network, JointTransformer) else "8 x 8"


@pytest.fixture
def three_steps(monkeypatch):
    monkeypatch.setattr(drawing, "STEPS", 3)


def test_tokens_belong_to_the_phrase_they_stand_in(model):
    text = "a small red owl and a car on a checkered green background"
    (owners,) = token_owners(model, [text]).tolist()
    words = model.tokenizer.tokens(text)
    named = {r: [w for w, o in zip(words, owners, strict=True) if o == r] for r in (0, 1, GROUND)}
    assert named == {
        0: ["small", "red", "owl"],
        1: ["car"],
        GROUND: ["checkered", "green", "background"],
    }
    assert set(owners) == {-1, 0, 1, GROUND}


def test_the_true_regions_overlap_with_themselves_and_name_nouns(model):
    masks = render(SCENES)[1]
    truth, owners = patch_regions(masks), token_owners(model, CAPTIONS)
    oracle = true_regions(model, CAPTIONS, masks)
    found = overlaps(oracle.labels, oracle.foreground, truth, owners)
    there = torch.stack([(truth == r).flatten(1).any(1) for r in range(GROUND + 1)], dim=1)
    assert (found[:, :-1] == 1).equal(there) and found[:, :-1].isnan().equal(~there)
    assert (found[:, -1] == 1).all()
    for one, text, labels in zip(SCENES, CAPTIONS, oracle.labels, strict=True):
        words = {model.tokenizer.tokens(text)[token] for token in labels.unique().tolist()}
        assert words <= {region.noun for region in one.regions} and "background" in words


def test_overlap_with_two_objects_exchanged_or_nothing_found():
    truth = torch.full((1, 4, 6), GROUND)
    truth[0, :2, :2], truth[0, 2:, 4:] = 0, 1
    owners = torch.tensor([[-1, 0, 1, GROUND]])
    swapped = torch.tensor([2, 1, 0, 0, 3])[truth]
    seen = overlaps(swapped, truth != GROUND, truth, owners)[0]
    assert seen[[0, 1, GROUND, -1]].tolist() == [0, 0, 1, 1] and seen[2:4].isnan().all()
    nothing = overlaps(torch.zeros_like(truth), truth == GROUND, truth, owners)[0]
    assert nothing[[0, 1, GROUND, -1]].tolist() == [0, 0, 0, 0]


def test_means_over_regions():
    truth = torch.tensor([[[0, 0, 4], [4, 4, 4]]])
    means = region_means(torch.tensor([[[1.0, 3.0, 5.0], [5.0, 5.0, 9.0]]]), truth)[0]
    assert means[[0, 4]].tolist() == [2, 6] and means[1:4].isnan().all()


def test_variants_are_scored_as_they_are_found(model, first):
    seen = probe(model, SCENES[:2], [0, 1], 500)
    scores = score(seen)
    ways = variants(seen.levels)
    assert scores["overlap"].shape == (2, len(ways), 6)
    way = ("paper", 4, first)
    out = find(seen, *way)
    expected = overlaps(out.labels, out.foreground, seen.truth, seen.owners)
    assert_close(actual=scores["overlap"][:, ways.index(way)], expected=expected)
    area = torch.stack([(seen.truth == r).float().mean((1, 2)) for r in range(GROUND + 1)], dim=1)
    assert_close(actual=(scores["norm"] * area).nansum(1), expected=torch.ones(2), share=1e-5)


def test_a_block_of_a_transformer_is_looked_at_alone():
    model = seeing_transformer()
    seen = probe(model, SCENES[:2], [0, 1], 500)
    assert seen.levels == ("block 0", "block 1", "block 2", "all", "auto")
    context = torch.cat([model.encode([""] * 2), model.encode(CAPTIONS[:2])])
    seeds = [torch.Generator().manual_seed(i) for i in (0, 1)]
    noise = torch.stack([torch.randn(model.latent_shape, generator=seed) for seed in seeds])
    x = noised(model, render(SCENES[:2])[0], noise, 500).repeat(2, 1, 1, 1)
    rates = {level: find(seen, "official", 2, level).rate for level in seen.levels}
    for layers, level in ((None, "all"), ((0,), "block 0"), ((2,), "block 2")):
        config = dataclasses.replace(model.config, propagation="official", layers=layers)
        with Recorder(model.network, config) as unet:
            unet.words = model.words(["", "", *CAPTIONS[:2]])
            both = unet.record(x, lambda: model.unet(x, 500, context))
            expected = unet.guide(*both.chunk(2), 4.0).rate
        assert_close(actual=rates[level], expected=expected, share=1e-5)
    assert all((rates[level] != rates["all"]).any() for level in seen.levels[:3])


def test_a_probe_does_not_depend_on_its_batch(model):
    both, one = probe(model, SCENES[:2], [4, 9], 300), probe(model, SCENES[1:2], [9], 300)
    assert_close(actual=both.eps_text[1:], expected=one.eps_text, share=1e-4)


def test_the_oracle_gives_each_object_the_rate_of_its_true_region():
    # The object is guided four times as strongly as the ground: equation 8 gives the ground 3, at
    # most, and the object, which alone is the foreground, 1.
    labels = torch.full((1, 6, 8), 5)
    labels[:, 1:5, 2:6] = 2
    eta = torch.where(labels == 2, 4.0, 1.0)[:, None]
    flat = torch.zeros(1, dtype=torch.bool)
    regions = Regions(labels, labels == 2, 7, flat)
    out = guide_regions(torch.zeros_like(eta), eta, regions, 2.0, CONFIG)
    assert out.rate[0, 0, 2:4, 3:5].flatten().tolist() == pytest.approx([1] * 4)
    assert out.rate[0, 0, :, -1].tolist() == pytest.approx([3] * 6)


def test_with_the_regions_that_were_found_the_oracle_is_scfg(model, monkeypatch, three_steps):
    pair, begin = SCENES[:2], 700
    step = [t for t in model.schedule.timesteps(3) if t <= begin]
    images, masks = render(pair)
    noise = torch.stack(
        [
            torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(i))
            for i in (5, 6)
        ]
    )
    x = noised(model, images, noise, step[0])
    abar = model.schedule.alphas_cumprod[step[0]]
    assert_close(
        actual=x, expected=abar.sqrt() * to_latents(images) + (1 - abar).sqrt() * noise, share=1e-6
    )
    seen = probe(model, pair, [5, 6], step[0])
    found = find(seen, "paper", 4, seen.levels[-1])
    regions = Regions(found.labels, found.foreground, seen.owners.shape[1], found.start_is_flat)
    monkeypatch.setattr(drawing, "true_regions", lambda *_: regions)
    monkeypatch.setattr(model.schedule.__class__, "timesteps", lambda *_: step[:1])
    one, other = (draw(model, Point(m, 4.0, begin), pair, [5, 6]) for m in ("oracle", "scfg"))
    assert_close(actual=one[0], expected=other[0], share=1e-4)
    assert_close(actual=one[1]["mean_scale"], expected=other[1]["mean_scale"], share=1e-4)


def test_controls_keep_what_they_are_to_keep():
    labels = torch.zeros(2, 4, 6, dtype=torch.int64)
    labels[0, :, 3:] = 5
    values = torch.tensor([[1.0, 2.0], [1.5, 9.0]])
    rate = torch.where(labels == 5, values[:, 1:, None], values[:, :1, None])[:, None]
    guided = Guided(rate, rate, labels, labels > 0, torch.zeros(2, dtype=torch.bool))
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    seen = {tuple(shuffled(guided, generators)[0, 0, [0, 5]].tolist()) for _ in range(20)}
    assert seen == {(1.0, 2.0), (2.0, 1.0)}  # two regions, either way
    assert shuffled(guided, generators)[1].eq(1.5).all()  # one region has its own rate
    norm = torch.ones(2, 4, 6)
    norm[0, :, 3:] = 3
    mean = weighted_mean(rate[:, 0], norm)
    assert mean.tolist() == pytest.approx([(1 + 3 * 2) / 4, 1.5])


def test_the_mean_control_has_the_strength_of_scfg_and_one_rate(model, three_steps, monkeypatch):
    monkeypatch.setattr(model.schedule.__class__, "timesteps", lambda *_: [999])  # the same x
    own, mean = (draw(model, Point(m, 3.0), SCENES[:2], [1, 2])[1] for m in ("scfg", "mean"))
    assert_close(actual=mean["strength"], expected=own["strength"], share=1e-5)
    assert_close(actual=mean["mean_scale"], expected=mean["strength"], share=1e-5)
    assert (own["mean_scale"] != own["strength"]).all()


def test_samg_gives_its_extreme_scales_to_its_extreme_pixels():
    eps_uncond = torch.zeros(1, 2, 1, 3)
    eps_text = torch.tensor([0.0, 1.0, 2.0]).view(1, 1, 1, 3).expand(1, 2, 1, 3)
    eps, rate = samg(eps_uncond, eps_text, 7.5)
    scale = 7.5 * rate.flatten()
    assert scale.tolist() == pytest.approx([12.0, 12 - 7 / 4, 5.0], rel=1e-5)
    torch.testing.assert_close(eps[0, 0, 0], scale * eps_text[0, 0, 0])


@pytest.mark.parametrize("method", ["cfg", "scfg"])
def test_images_and_strengths_are_those_of_generate(model, method, three_steps):
    images, found = draw(model, Point(method, 3.0), SCENES[:2], [11, 12])
    options = {"guidance_scale": 3.0, "steps": 3, "sampler": "dpmpp_2m"}
    expected = generate(model, CAPTIONS[:2], [11, 12], method=method, trace=True, **options)
    assert_close(actual=images, expected=expected.images, share=1e-5)
    rates = torch.stack([step.rate for step in expected.trace])
    if method == "cfg":
        assert_close(actual=found["strength"], expected=torch.full((2,), 3.0), share=1e-6)
        rates = torch.ones_like(rates)
    assert_close(actual=found["mean_scale"], expected=3 * rates.mean(dim=(0, 2, 3)), share=1e-5)


def test_strength_weighs_pixels_by_the_norm_of_guidance(model, monkeypatch):
    monkeypatch.setattr(drawing, "STEPS", 1)
    trace = generate(model, CAPTIONS[:1], [3], guidance_scale=3.0, steps=1, trace=True).trace
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    text, empty = (model.unet(x, 999, model.encode(words)) for words in (CAPTIONS[0], ""))
    norm = reference.guidance_norm(empty, text)
    expected = 3 * (trace[0].rate * norm).sum() / norm.sum()
    found = draw(model, Point("scfg", 3.0), SCENES[:1], [3])[1]
    assert found["strength"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_every_method_draws_and_leaves_no_hook(model, three_steps):
    for method in METHODS:
        begin = 700 if method == "oracle" else None
        images, found = draw(model, Point(method, 2.0, begin), SCENES[:1], [0])
        assert images.isfinite().all() and all(x > 0 for x in found.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.unet.modules())
    limited = draw(model, Point("interval", 4.0), SCENES[:1], [0])[1]
    assert limited["strength"].item() == pytest.approx((1 + 4 + 4) / 3)  # of 0, 1/3 and 2/3
    for point in (Point("oracle", 2.0), Point("magic", 2.0)):
        with pytest.raises(ValueError, match=r"begin must be|method must be one of"):
            draw(model, point, SCENES[:1], [0])


def test_a_caption_depends_on_its_number_alone():
    assert scene(5, 1) == scene(5, 1) != scene(5, 2)
    assert len({caption(scene(i, 1)) for i in range(50)}) > 40
    assert dataclasses.replace(Point("cfg", 2.0), begin=349).name == "cfg-2-from-349"
