"""Pictures: colours of regions and rates, and the size of the panel."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import generate, tiny_model

from scfg.drawing.panel import BAR, GAP, MARGIN, SIDE, panel
from scfg.drawing.picture import (
    CELL,
    NO_WORD,
    draw_regions,
    owned_phrases,
    phrase_colours,
    phrases,
    rate_range,
    viridis,
)


def test_regions_have_the_colour_of_their_phrase_and_markers_none():
    words = (None, "red", "circle", "on", None, "sky")
    labels = torch.tensor([[0, 1, 1, 2], [3, 2, 2, 2]])
    assert owned_phrases(words, [labels]) == {"red circle"}  # "sky" owns nothing, "on" is small
    colours = phrase_colours(words)
    cell = np.array(draw_regions(torch.zeros(3, 64, 64), labels, words, colours)).astype(int)
    size = (CELL // 2, CELL // 4)
    for (row, column), label in np.ndenumerate(labels.numpy()):
        pixel = cell[row * size[0] + 10, column * size[1] + 10]
        colour = colours["red circle"] if label in (1, 2) else NO_WORD
        colour = np.array(list(bytes.fromhex(colour[1:])))
        grey = int(100 + 0.6 * 128)
        assert (abs(pixel - (0.75 * colour + 0.25 * grey)) <= 2).all(), (row, column)


def test_a_phrase_that_names_a_colour_has_it_once_and_no_two_share_one():
    words = (None, "a", "red", "circle", "and", "red", "owl", "on", "blue", "ground", None)
    colours = phrase_colours(words)
    assert list(colours) == ["red circle", "red owl", "blue ground"]
    assert (colours["red circle"], colours["blue ground"]) == ("#d55e00", "#0072b2")
    assert len(set(colours.values())) == 3
    labels = [torch.arange(4).view(2, 2), torch.tensor([[8, 0]])]
    assert owned_phrases(words, labels) == {"red circle", "blue ground"}
    pieces = phrases(("a", "strawberry", "strawberry", "and", "strawberry", None))
    assert pieces == {"strawberry": [1, 2, 4]}


def test_the_rate_colours_are_viridis():
    colormaps = pytest.importorskip("matplotlib").colormaps
    values = np.linspace(0.8, 3, 50)[None]
    expected = colormaps["viridis"]((values - 0.8) / 2.2)[..., :3] * 255
    assert abs(np.array(viridis(values, 0.8, 3)) - expected).max() < 7


def test_the_ends_of_the_rate_bar_enclose_the_rates():
    rates = [torch.tensor([[0.8, 1.23]]), torch.tensor([[0.97, 2.0]])]
    assert rate_range(rates) == (0.8, 2.0)
    assert rate_range([torch.ones(2, 2)]) == (1.0, 1.1)


def test_a_long_prompt_makes_the_panel_taller_not_wider():
    model = tiny_model()
    short = "a red owl"
    long = "red owl and blue car on green star and yellow house and purple"
    images = [generate(model, [text], [0], steps=2, trace=True) for text in (short, long)]
    pictures = [panel([{"scfg": image}], 1, "settings") for image in images]
    assert pictures[0].width == pictures[1].width
    assert pictures[0].height < pictures[1].height


@pytest.mark.parametrize(("apart", "columns"), [(0.06, 5), (0.14, 4)])
def test_the_difference_is_shown_of_pictures_that_look_alike_and_not_of_others(apart, columns):
    made = torch.rand(2, 1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    drawn = generate(tiny_model(), ["a red owl"], [0], steps=2, trace=True)
    plain = [replace(drawn, method="cfg", images=image - 0.9) for image in made]
    ours = [replace(drawn, images=image - 0.9 + 2 * apart * made[0]) for image in made]
    rows = [{"cfg": a, "scfg": b} for a, b in zip(plain, ours, strict=True)]
    picture = np.array(panel(rows, 1, "settings")).astype(int)  # apart by half of it on average
    assert picture.shape[1] == 2 * MARGIN + SIDE + columns * (CELL + GAP) + BAR
    top, left = MARGIN + 40 + 54 + 2 * 26, MARGIN + SIDE
    for k in range(2 if columns == 5 else 0):
        y = slice(top + k * (CELL + GAP), top + k * (CELL + GAP) + CELL)
        cells = [picture[y, x : x + CELL] for x in range(left, 9999, CELL + GAP)]
        assert (cells[2] == np.minimum(8 * abs(cells[1] - cells[0]), 255)).all()
        assert cells[2].max() > 100
