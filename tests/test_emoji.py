"""Emoji scenes, their captions and their judge, against cases whose answers are known."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import assert_close
from safetensors.torch import load_file

from scfg.models import emoji, judge
from scfg.models.emoji_words import WORDS
from scfg.models.files import read_tensors
from scfg.models.judge_training import measure, patch_classes, spoil
from scfg.models.text import END, START, Tokenizer

TOKENIZER = Tokenizer(WORDS, emoji.LENGTH)
SCENES = emoji.sample_scenes(300, np.random.default_rng(3))
OWL = emoji.Region("owl", colour="blue", x=20.0, y=24.0, size=30.0)
CAR = emoji.Region("car", size_word="small", x=48.0, y=50.0, size=16.0)
GROUND = emoji.Region("background", "gray", texture="striped")


def test_captions_say_what_is_there_and_fit_the_tokens():
    scene = emoji.Scene((OWL, CAR, emoji.Region("owl")), GROUND)
    assert emoji.caption(scene) == (
        "a blue owl and a small car and an owl on a striped gray background"
    )
    for scene in SCENES:
        words = TOKENIZER.tokens(emoji.caption(scene))
        spans = TOKENIZER.phrase_spans(emoji.caption(scene))
        assert [" ".join(words[a:b]) for a, b in spans] == [r.phrase for r in scene.regions]
    assert TOKENIZER.phrase_spans("") == ()
    assert TOKENIZER.phrase_spans("a red owl a") == ((2, 4), (5, 5))
    assert TOKENIZER.tokens("a red, owl!") == TOKENIZER.tokens("a red owl")


def test_tokens_round_trip_and_are_padded_with_end():
    captions = [emoji.caption(scene) for scene in SCENES] + ["", "A Red\towl"]
    ids = TOKENIZER(captions)
    assert ids.shape == (302, emoji.LENGTH) and ids.dtype == torch.int64
    for text, row in zip(captions, ids.tolist(), strict=True):
        tokens = tuple(TOKENIZER.vocabulary[i] for i in row)
        assert tokens == TOKENIZER.tokens(text)
        words = tokens[1 : tokens.index(END)]
        assert tokens[0] == START and " ".join(words) == " ".join(text.lower().split())
        assert set(tokens[1 + len(words) :]) == {END}


def test_unknown_and_surplus_words_are_refused_by_name():
    with pytest.raises(ValueError, match="'circle'") as error:
        TOKENIZER(["a red owl", "a pink circle"])
    for word in WORDS:
        assert word in str(error.value)
    with pytest.raises(ValueError, match="'<start>'"):
        TOKENIZER("<start>")
    with pytest.raises(ValueError, match="23 words, at most 22 fit"):
        TOKENIZER("red " * 23)


def test_scenes_follow_from_the_generator_alone_and_pictures_not_from_their_batch():
    assert emoji.sample_scenes(300, np.random.default_rng(3)) == SCENES
    generator = np.random.default_rng(5)
    assert emoji.sample_scenes(2, generator) != emoji.sample_scenes(2, generator)
    images, masks = emoji.render(SCENES[:9])
    for scene, *expected in zip(SCENES, images, masks, strict=False):
        image, mask = emoji.render([scene])
        assert_close(actual=image[0], expected=expected[0], share=1e-6)
        assert mask[0].equal(expected[1])
    with pytest.raises(ValueError, match="scenes is empty"):
        emoji.render([])


def test_stripes_are_horizontal_and_checkers_alternate_both_ways():
    shown = {}
    for texture in emoji.TEXTURES:
        owl = emoji.Region("owl", x=12.0, y=12.0, size=20.0)
        ground = emoji.Region("background", "yellow", texture=texture)
        shown[texture] = emoji.render([emoji.Scene((owl,), ground)])[0][0, 0, 32:]
    flat, stripes, checkers = shown.values()
    assert (flat == flat[0, 0]).all()
    assert (stripes == stripes[:, :1]).all() and not (stripes == stripes[:1]).all()
    assert (checkers[:8] != checkers[8:16]).all() and (checkers[:, :8] != checkers[:, 8:16]).all()
    assert checkers[:-8, :-8].equal(checkers[8:, 8:])


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
    art = load_file(emoji.ART)["sprites"] / 255
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
    stored = json.loads(read_tensors(judge.WEIGHTS)[1]["measured"])
    for name, value in measure(read, 256).items():  # of the 4096 that were measured
        error = (max(stored[name] * (1 - stored[name]), 1e-3) / 256) ** 0.5
        assert abs(value - stored[name]) < 4 * error, (name, value, stored[name])


def test_features_are_those_of_the_picture_alone_and_of_unit_scale_on_real_scenes():
    images, _ = emoji.render(SCENES[:256])
    features = judge.read(judge.load_judge(), images)[1]
    assert features.mean(dim=0).abs().max() < 0.3 and (features.std(dim=0) - 1).abs().max() < 0.4
    alone = judge.read(judge.load_judge(), images[7:8])[1]
    assert_close(actual=alone[0], expected=features[7], share=1e-4)


def test_patches_belong_to_the_region_of_most_of_their_pixels():
    masks = torch.zeros(1, 5, 64, 64, dtype=torch.bool)
    masks[0, 4] = True
    masks[0, 0, :4, :3], masks[0, 4, :4, :3] = True, False  # 12 of 16 pixels
    masks[0, 1, :4, 4:5], masks[0, 4, :4, 4:5] = True, False  # 4 of 16
    regions = judge.patch_regions(masks)
    assert regions[0, 0, :3].tolist() == [0, 4, 4] and (regions[0, 1:] == 4).all()
    classes = patch_classes([emoji.Scene((OWL, CAR), GROUND)], masks)
    assert judge.CLASSES[classes[0, 0, 0]] == "owl" and (classes[0, 1:] == 0).all()


def test_spoilt_images_stay_images():
    images, _ = emoji.render(SCENES[:16])
    spoilt = spoil(images, torch.Generator().manual_seed(0))
    assert spoilt.shape == images.shape and spoilt.abs().max() <= 1
    changed = (spoilt != images).flatten(1).any(dim=1)
    assert changed.any() and not changed.all()
