"""Scenes of the embedded model against closed forms, and the words that describe them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scfg.models import shapes
from scfg.models.shapes import (
    COLOURS,
    DARK,
    MAX_SIZE,
    MIN_SIZE,
    SHAPES,
    SIZE,
    TEXTURES,
    Region,
    Scene,
    caption,
    held_out,
    render,
    sample_scenes,
)
from scfg.models.text import END, START, Tokenizer


def scenes_of(seed: int, count: int = 200) -> list[Scene]:
    return sample_scenes(count, np.random.default_rng(seed))


def alone(shape: str, size: float, x: float = 31.3, y: float = 33.1, **kwargs) -> Scene:
    return Scene(
        (Region(kwargs.get("texture", "plain"), "red", shape, x, y, size),),
        Region("plain", "green", "background"),
    )


def area(shape: str, size: float) -> float:
    """Area of a shape as wide as `size`: textbook formulas."""
    if shape == "circle":
        return math.pi * size**2 / 4
    if shape == "square":
        return size**2
    if shape == "triangle":
        return math.sqrt(3) / 4 * size**2
    radius = size / (2 * math.sin(math.radians(72)))  # pentagram in a circle of this radius
    return 10 * math.tan(math.pi / 10) / (3 - math.tan(math.pi / 10) ** 2) * radius**2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [18.0, 23.7, 30.0])
def test_drawn_area_is_that_of_the_shape(shape, size):
    images, masks = render([alone(shape, size)])
    red, green = (torch.tensor(COLOURS[name]) for name in ("red", "green"))
    share = (images[0] / 2 + 0.5 - green[:, None, None]) / (red - green)[:, None, None]
    assert share.min() > -1e-5 and share.max() < 1 + 1e-5
    for channel in share:
        assert channel.sum() == pytest.approx(area(shape, size), rel=0.02)
    assert masks[0, 0].sum().item() == pytest.approx(area(shape, size), rel=0.06)


@pytest.mark.parametrize("shape", SHAPES)
def test_bounding_box_is_where_the_region_says(shape):
    x, y, size = 29.0, 35.0, 28.0
    _, masks = render([alone(shape, size, x, y)])
    rows, columns = masks[0, 0].nonzero().unbind(1)
    # Tips of a triangle and a star are thinner than a pixel.
    slack = {"circle": 1, "square": 0, "triangle": 2, "star": 3}[shape]
    height = {"triangle": size * math.sqrt(3) / 2, "star": size * 0.9511}.get(shape, size)
    for low, high, centre, extent in (
        (columns.min(), columns.max() + 1, x, size),
        (rows.min(), rows.max() + 1, y, height),
    ):
        assert centre - extent / 2 - 0.5 <= low <= centre - extent / 2 + slack + 0.5
        assert centre + extent / 2 - slack - 0.5 <= high <= centre + extent / 2 + 0.5


def test_star_has_five_points_and_triangle_three():
    for shape, points in (("star", 5), ("triangle", 3)):
        _, masks = render([alone(shape, 30.0, 32.0, 32.0)])
        inside = masks[0, 0].numpy()
        rows, columns = np.nonzero(inside)
        radius = 0.62 * 30 / (2 * math.sin(2 * math.pi / points))
        angle = np.linspace(0, 2 * math.pi, 720, endpoint=False)
        circle_y = np.floor(rows.mean() + 0.5 + radius * np.sin(angle)).astype(int)
        circle_x = np.floor(columns.mean() + 0.5 + radius * np.cos(angle)).astype(int)
        on = inside[circle_y, circle_x]
        assert (on & ~np.roll(on, 1)).sum() == points


def test_masks_partition_the_image_and_second_is_empty_for_one_object():
    scenes = scenes_of(0)
    images, masks = render(scenes)
    assert images.shape == (200, 3, SIZE, SIZE) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert masks.dtype == torch.bool
    assert (masks.sum(1) == 1).all()
    for scene, mask in zip(scenes, masks, strict=True):
        assert mask[0].any() and mask[1].any() == (len(scene.objects) == 2)
    assert {len(scene.objects) for scene in scenes} == {1, 2}


def test_pixels_within_a_mask_have_the_colour_and_the_tones_of_the_texture():
    scenes = scenes_of(1, 60)
    images, masks = render(scenes)
    for scene, image, mask in zip(scenes, images / 2 + 0.5, masks, strict=True):
        for region, slot in zip(scene.regions, (*range(len(scene.objects)), 2), strict=True):
            # Away from edges, where no other region has a share; a star's tips leave the mask.
            outside, away = (~mask[slot]).float()[None, None], 4 if slot == 2 else 1
            inside = nn.functional.max_pool2d(outside, 2 * away + 1, 1, away)[0, 0] == 0
            tone = image[:, inside] / torch.tensor(COLOURS[region.colour])[:, None]
            torch.testing.assert_close(tone, tone[:1].expand(3, -1), atol=1e-5, rtol=0)
            bright, dark = (tone[0] - 1).abs() < 1e-5, (tone[0] - DARK).abs() < 1e-5
            assert (bright | dark).all() and bright.any()
            assert dark.any() == (region.texture != "plain")


def test_stripes_are_horizontal_and_checkers_alternate_both_ways():
    shown = {}
    for texture in TEXTURES:
        scene = Scene(
            (Region("plain", "red", "circle", 15.0, 15.0, 18.0),),
            Region(texture, "yellow", "background"),
        )
        shown[texture] = render([scene])[0][0, 0, 32:]  # red channel, below the circle
    flat, stripes, checkers = (shown[t] for t in ("plain", "striped", "checkered"))
    assert (flat == flat[0, 0]).all()
    assert (stripes == stripes[:, :1]).all() and not (stripes == stripes[:1]).all()
    torch.testing.assert_close(stripes[:4], stripes[8:12], atol=0, rtol=0)
    assert (stripes[:4] != stripes[4:8]).all()
    assert (checkers[:4] != checkers[4:8]).all()
    assert (checkers[:, :4] != checkers[:, 4:8]).all()
    torch.testing.assert_close(checkers[:-4, :-4], checkers[4:, 4:], atol=0, rtol=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_objects_stay_in_the_image_and_apart_and_differ_in_colour(seed):
    for scene in scenes_of(seed, 20):
        colours = [region.colour for region in scene.regions]
        assert len(set(colours)) == len(colours)
        for region in scene.objects:
            assert MIN_SIZE <= region.size <= MAX_SIZE
            assert region.size / 2 <= min(region.x, region.y)
            assert max(region.x, region.y) <= SIZE - region.size / 2
        if len(scene.objects) == 2:
            a, b = scene.objects
            distance = max(abs(a.x - b.x), abs(a.y - b.y))
            assert distance >= (a.size + b.size) / 2 + 1.9


def test_held_out_kinds_are_the_six_listed_and_never_drawn():
    kinds = {(t, c, s) for t in TEXTURES for c in COLOURS for s in SHAPES}
    out = {kind for kind in kinds if held_out(*kind)}
    assert out == {
        ("checkered", "red", "circle"),
        ("plain", "yellow", "square"),
        ("striped", "green", "triangle"),
        ("checkered", "cyan", "star"),
        ("plain", "blue", "circle"),
        ("striped", "purple", "square"),
    }
    drawn = {(r.texture, r.colour, r.noun) for s in scenes_of(2, 4000) for r in s.objects}
    assert drawn == kinds - out


def test_scenes_follow_from_the_generator_alone():
    assert scenes_of(3) == scenes_of(3) != scenes_of(4)
    generator = np.random.default_rng(5)
    assert sample_scenes(2, generator) != sample_scenes(2, generator)


def test_rendering_a_scene_does_not_depend_on_its_batch():
    scenes = scenes_of(6, 9)
    images, masks = render(scenes)
    for i, scene in enumerate(scenes):
        image, mask = render([scene])
        torch.testing.assert_close(image[0], images[i], atol=1e-6, rtol=0)
        assert torch.equal(mask[0], masks[i])
    with pytest.raises(ValueError, match="scenes is empty"):
        render([])


def test_caption_says_what_is_drawn():
    scene = Scene(
        (Region("striped", "red", "circle", 20, 20, 20), Region("plain", "blue", "square", 45, 40)),
        Region("checkered", "green", "background"),
    )
    text = "a striped red circle and a blue square on a checkered green background"
    assert caption(scene) == text
    assert caption(replace(scene, objects=scene.objects[1:])) == (
        "a blue square on a checkered green background"
    )


def test_phrase_spans_hold_the_phrases_in_the_order_of_the_masks():
    tokenizer = Tokenizer(shapes.WORDS, shapes.LENGTH)
    for scene in scenes_of(7):
        text = caption(scene)
        tokens = tokenizer.tokens(text)
        phrases = [" ".join(tokens[a:b]) for a, b in tokenizer.phrase_spans(text)]
        assert phrases == [region.phrase for region in scene.regions]
    assert tokenizer.phrase_spans("") == ()
    assert tokenizer.phrase_spans("a red circle a") == ((2, 4), (5, 5))


def test_tokens_round_trip_and_are_padded_with_end():
    tokenizer = Tokenizer(shapes.WORDS, shapes.LENGTH)
    captions = [caption(scene) for scene in scenes_of(8)] + ["", "A Red\tcircle"]
    ids = tokenizer(captions)
    assert ids.shape == (202, 16) and ids.dtype == torch.int64
    for text, row in zip(captions, ids.tolist(), strict=True):
        tokens = tuple(tokenizer.vocabulary[i] for i in row)
        assert tokens == tokenizer.tokens(text)
        words = tokens[1 : tokens.index(END)]
        assert tokens[0] == START and " ".join(words) == " ".join(text.lower().split())
        assert set(tokens[1 + len(words) :]) == {END}
    assert torch.equal(tokenizer(captions[0]), ids[:1])
    assert max(tokenizer.tokens(text).index(END) for text in captions) == 15  # the longest fits


def test_unknown_and_surplus_words_are_refused_by_name():
    tokenizer = Tokenizer(shapes.WORDS, shapes.LENGTH)
    with pytest.raises(ValueError, match="'pink'") as error:
        tokenizer(["a red circle", "a pink circle"])
    for word in (*SHAPES, *COLOURS, "striped", "checkered", "background", "and", "on", "a"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match="'<start>'"):
        tokenizer("<start>")
    with pytest.raises(ValueError, match="15 words, at most 14 fit"):
        tokenizer("red " * 15)
