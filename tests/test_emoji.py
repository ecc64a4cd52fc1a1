"""Emoji scenes, their judge and the paired comparison, against cases whose answers are known."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import assert_close

from scfg.evaluate import objects
from scfg.guidance import Guided
from scfg.models import emoji, judge
from scfg.models.text import Tokenizer

SCENES = emoji.sample_scenes(300, np.random.default_rng(3))
OWL = emoji.Region("owl", colour="blue", x=20.0, y=24.0, size=30.0)
CAR = emoji.Region("car", size_word="small", x=48.0, y=50.0, size=16.0)
GROUND = emoji.Region("background", "gray", texture="striped")


def test_captions_say_what_is_there_and_fit_the_tokens():
    scene = emoji.Scene((OWL, CAR, emoji.Region("owl")), GROUND)
    assert emoji.caption(scene) == (
        "a blue owl and a small car and an owl on a striped gray background"
    )
    tokenizer = Tokenizer(emoji.WORDS, emoji.LENGTH)
    for scene in SCENES:
        words = tokenizer.tokens(emoji.caption(scene))
        spans = tokenizer.phrase_spans(emoji.caption(scene))
        assert [" ".join(words[a:b]) for a, b in spans] == [r.phrase for r in scene.regions]


def test_what_is_held_out_is_not_drawn_unless_asked_for():
    def held(scenes):
        pairs = [
            (a.noun, b.noun) for s in scenes for i, a in enumerate(s.objects) for b in s.objects[:i]
        ]
        kinds = [(o.noun, o.colour or o.size_word) for s in scenes for o in s.objects]
        return any(emoji.held_out_pair(*p) for p in pairs), any(
            emoji.held_out_kind(*k) for k in kinds
        )

    assert held(SCENES) == (False, False)
    assert held(emoji.sample_scenes(300, np.random.default_rng(4), held_out=True)) == (True, True)


def test_masks_partition_the_image_and_lie_where_the_objects_are():
    images, masks = emoji.render(SCENES[:50])
    assert images.shape == (50, 3, 64, 64) and images.abs().max() <= 1
    assert (masks.sum(1) == 1).all()
    for scene, mask in zip(SCENES[:50], masks, strict=True):
        assert not mask[len(scene.objects) : emoji.OBJECTS].any()
        for one, region in zip(scene.objects, mask, strict=False):
            y, x = region.nonzero().double().T
            assert x.numel() > 20  # nobody is hidden
            assert (x + 0.5 - one.x).abs().max() <= one.size / 2 + 1
            assert (y + 0.5 - one.y).abs().max() <= one.size / 2 + 1


def test_a_lone_sprite_is_its_art_over_the_ground():
    art, _ = emoji._sprites()
    one = emoji.Region("star", x=30.0, y=28.0, size=48.0)
    (image,), (masks,) = emoji.render([emoji.Scene((one,), emoji.Region("background", "gray"))])
    rgba = art[list(emoji.NOUNS).index("star")]
    ground = torch.tensor(emoji.COLOURS["gray"]) * (1 - emoji.PALE) + emoji.PALE
    expected = rgba[:3] + (1 - rgba[3:]) * ground[:, None, None]
    assert_close(actual=image[:, 4:52, 6:54] / 2 + 0.5, expected=expected, share=1e-5)
    assert masks[0, 4:52, 6:54].equal(rgba[3] >= 0.5)


def reading(**changes):
    return dataclasses.replace(judge.truth([emoji.Scene((OWL, CAR), GROUND)]), **changes)


def test_agreement_with_the_truth_and_with_one_thing_wrong():
    scene = emoji.Scene((OWL, CAR), GROUND)
    perfect = judge.agreement(reading(), [scene])
    assert perfect["found"][0, :2].tolist() == perfect["bound"][0, :2].tolist() == [1, 1]
    assert perfect["found"][0, 2:].isnan().all() and perfect["all"].item() == 1
    owl, car = (list(emoji.NOUNS).index(noun) for noun in ("owl", "car"))
    true = reading()
    gone = judge.agreement(
        reading(there=true.there.index_fill(1, torch.tensor([car]), False)), [scene]
    )
    assert gone["found"][0, :2].tolist() == gone["bound"][0, :2].tolist() == [1, 0]
    red = judge.agreement(reading(tint=true.tint.index_fill(1, torch.tensor([owl]), 1)), [scene])
    assert red["bound"][0, :2].tolist() == [0, 1] and red["found"][0, :2].tolist() == [1, 1]
    for wrong in (gone, red, judge.agreement(reading(count=true.count + 1), [scene])):
        assert wrong["all"].item() == 0


@pytest.mark.skipif(not judge.WEIGHTS.exists(), reason="no judge shipped")
def test_the_shipped_judge_reads_real_scenes():
    read = judge.load_judge()
    scenes = emoji.sample_scenes(256, np.random.default_rng(99), held_out=True)
    seen, _ = judge.read(read, emoji.render(scenes)[0])
    for name, share in judge.agreement(seen, scenes).items():
        if name != "all":
            assert share.nanmean() >= 0.95, name


def test_paired_differences_know_a_shift_and_a_tie():
    rng = np.random.default_rng(0)
    base = rng.random((200, 4))
    base[rng.random((200, 4)) < 0.4] = np.nan
    assert objects.paired(base, base) == (0, 0, 0)
    mean, low, high = objects.paired(base + 0.1, base)
    assert (mean, low, high) == pytest.approx((0.1, 0.1, 0.1))
    noisy = base + 0.02 + 0.3 * rng.standard_normal(base.shape)
    mean, low, high = objects.paired(noisy, base)
    spread = 0.3 / np.sqrt(np.isfinite(base).sum())
    assert low < 0.02 < high and 2 * spread < high - low < 6 * spread


def test_controls_keep_what_they_are_to_keep():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(2, 4, 6, dtype=torch.int64)
    labels[0, :, 3:] = 5
    values = torch.tensor([[1.0, 2.0], [1.5, 9.0]])
    rate = torch.where(labels == 5, values[:, 1:, None], values[:, :1, None])[:, None]
    guided = Guided(rate, rate, labels, labels > 0, torch.zeros(2, dtype=torch.bool))
    seen = {tuple(objects.shuffled(guided, generator)[0, 0, 0, [0, 5]].tolist()) for _ in range(20)}
    assert seen == {(1.0, 2.0), (2.0, 1.0)}  # two regions, either way
    assert objects.shuffled(guided, generator)[1].eq(1.5).all()  # one region has its own rate
    norm = torch.ones(2, 4, 6)
    norm[0, :, 3:] = 3
    mean = objects.weighted_mean(rate, norm)
    assert mean.flatten().tolist() == pytest.approx([(1 + 3 * 2) / 4, 1.5])


def test_strata_count_every_object_once_in_size_and_in_number():
    masks = objects.strata(SCENES)
    for one, other in (("small", "large"), ("few", "many")):
        assert (masks[one] ^ masks[other])[masks["objects"]].all()
        assert masks[one].any() and masks[other].any()
