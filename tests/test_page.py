"""The page: what is embedded, and what a browser makes of it."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from browser import Tab, start_chromium
from PIL import Image

from scfg.drawing.generate import Frame, Generated
from scfg.drawing.page import page

WORDS = (None, "red", '</script><b>"&', "red", None, None)  # one word twice, one that bites
PROMPT = " ".join(filter(None, WORDS))
GRID, STEPS, SEEDS = (5, 8), 4, (11, 12)


def made_up(method, seed):
    """A `Generated` of random numbers, of which a page must show exactly these."""
    generator = torch.Generator().manual_seed(seed + 100 * (method == "cfg"))
    trace = [
        Frame(
            t=900 - 300 * i,
            x0=torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1,
            labels=torch.randint(len(WORDS) - 1, (1, *GRID), generator=generator),
            foreground=torch.ones(1, *GRID, dtype=torch.bool),
            rate=torch.rand(1, 10, 16, generator=generator) * 2 + 0.8,
        )
        for i in range(STEPS)
    ]
    return Generated(method, (PROMPT,), (seed,), (WORDS,), trace[-1].x0, tuple(trace))


@pytest.fixture(scope="module")
def images():
    return [{method: made_up(method, seed) for method in ("cfg", "scfg")} for seed in SEEDS]


@pytest.fixture(scope="module")
def text(images):
    return page(images, "4 DDIM steps")


def embedded(text):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(data)


def bytes_of(image):
    """(3, 64, 64) in [-1, 1] as the bytes of a PNG: (64, 64, 3)."""
    return ((image.numpy().transpose(1, 2, 0) + 1) / 2 * 255).round().astype(np.uint8)


def test_labels_rates_and_predictions_are_those_of_the_trace(images, text):
    data = embedded(text)
    assert data["words"] == list(WORDS) and data["labelSize"] == list(GRID)
    assert data["timesteps"] == [900, 600, 300, 0]
    for shown, image, seed in zip(data["images"], images, SEEDS, strict=True):
        assert shown["seed"] == seed
        for method, result in image.items():
            png = base64.b64decode(shown[method]["frames"].removeprefix("data:image/png;base64,"))
            tall = np.array(Image.open(io.BytesIO(png)))
            for i, step in enumerate(result.trace):
                assert shown[method]["labels"][i] == step.labels.flatten().tolist()
                rates = torch.tensor(shown[method]["rates"][i])
                assert (rates - step.rate.flatten()).abs().max() <= 0.0005
                assert (tall[64 * i : 64 * i + 64] == bytes_of(step.x0[0])).all()


def test_the_page_needs_nothing_else(text):
    assert not re.findall(r"https?://|src=|@import|url\(|<link", text.replace("img-src", ""))
    assert "default-src 'none'" in text


def test_the_prompt_is_escaped_everywhere(text):
    assert "<b>" not in text
    assert "<title>red &lt;/script&gt;&lt;b&gt;&quot;&amp; red</title>" in text
    assert embedded(text)["prompt"] == PROMPT
    assert text.count("</script>") == 2


def test_a_page_of_one_method_has_only_that(images):
    data = embedded(page([{"cfg": images[0]["cfg"]}], ""))
    assert set(data["images"][0]) == {"seed", "cfg"}


@pytest.fixture(scope="module")
def chromium():
    browser = start_chromium()
    yield browser
    browser.quit()


@pytest.fixture
def tab(chromium, text, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(text, encoding="utf-8")
    tab = Tab(chromium, path)
    yield tab
    assert chromium.get_log("browser") == []  # no error, no warning


def owned(images, view, step, position, image=0):
    method = "cfg" if view == "cfg" else "scfg"
    return (images[image][method].trace[step].labels[0] == position).tolist()


VIEWS = ("cfg", "scfg", "regions", "rate")


def test_hovering_a_word_lights_exactly_the_labels_computed(tab, images):
    assert [tab.lit(view) for view in VIEWS] == [None] * 4
    for position in (1, 2, 3):
        tab.actions().move_to_element(tab.word(position)).perform()
        for view in VIEWS:
            assert tab.lit(view) == owned(images, view, STEPS - 1, position), (view, position)
    tab.away()
    assert tab.lit("scfg") is None


def test_arrow_keys_on_the_slider_walk_the_steps(tab, images):
    slider = tab.all("#step")[0]
    tab.driver.execute_script("arguments[0].focus()", slider)
    for step in (2, 1, 0):
        tab.press(tab.keys.ARROW_LEFT)
        trace = images[0]["scfg"].trace[step]
        assert tab.all("#when")[0].text == f"{step + 1} of 4, t = {trace.t}"
        assert (tab.canvas("scfg", 0)[..., :3] == bytes_of(trace.x0[0])).all()
        expected = bytes_of(images[0]["cfg"].trace[step].x0[0])
        assert (tab.canvas("cfg", 0)[..., :3] == expected).all()
    tab.actions().move_to_element(tab.word(3)).perform()
    assert tab.lit("scfg") == owned(images, "scfg", 0, 3)


def test_regions_have_the_colour_of_their_word_and_rates_their_place_on_the_bar(tab, images):
    trace, data = images[0]["scfg"].trace[-1], tab.driver.execute_script("return data")
    colours = [list(bytes.fromhex(colour[1:])) for colour in data["colours"]]
    expected = np.array(colours)[trace.labels[0].numpy()]
    assert (tab.canvas("regions", 1)[..., :3] == expected).all()
    low, high = data["rateRange"]
    stops = np.array([list(bytes.fromhex(colour[1:])) for colour in data["rateColours"]])
    place = (trace.rate[0].numpy() - low) / (high - low) * (len(stops) - 1)
    expected = [np.interp(place, range(len(stops)), channel) for channel in stops.T]
    shown = tab.canvas("rate", 1)[..., :3].astype(float)
    assert abs(shown - np.stack(expected, axis=-1)).max() <= 1.5


def test_every_word_is_reached_by_tab_and_lit_while_focused(tab, images):
    for position in (1, 2, 3):
        tab.press(tab.keys.TAB)
        assert tab.driver.switch_to.active_element == tab.word(position)
        assert tab.lit("scfg") == owned(images, "scfg", STEPS - 1, position)
    tab.press(tab.keys.TAB)
    assert tab.lit("scfg") is None


def test_a_click_keeps_a_word_lit_until_escape(tab, images):
    tab.word(2).click()
    tab.away()
    assert tab.lit("scfg") == owned(images, "scfg", STEPS - 1, 2)
    assert tab.word(2).get_attribute("aria-pressed") == "true"
    tab.press(tab.keys.ESCAPE)
    assert tab.lit("scfg") is None


def test_pointing_at_the_picture_lights_the_word_that_owns_the_patch(tab, images):
    labels = images[0]["scfg"].trace[-1].labels[0]
    (stack,) = tab.all("#scfg .stack")
    size = stack.size
    for row, column in ((0, 0), (4, 7), (2, 3), (1, 6)):
        x = (column + 0.5) / GRID[1] * size["width"] - size["width"] / 2
        y = (row + 0.5) / GRID[0] * size["height"] - size["height"] / 2
        tab.actions().move_to_element_with_offset(stack, round(x), round(y)).perform()
        owner = int(labels[row, column])
        expected = None if WORDS[owner] is None else owned(images, "scfg", STEPS - 1, owner)
        assert tab.lit("scfg") == expected
    top = "document.elementFromPoint(arguments[0], arguments[1]).className"
    for view in VIEWS:
        box = tab.all(f"#{view} .stack")[0].rect
        centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        assert tab.driver.execute_script(f"return {top}", *centre) == "veil"


def test_a_word_says_how_many_patches_it_owns_and_their_mean_rate(tab, images):
    trace = images[0]["scfg"].trace[-1]
    tab.actions().move_to_element(tab.word(1)).perform()
    mask = (trace.labels[0] == 1).repeat_interleave(2, 0).repeat_interleave(2, 1)  # (10, 16)
    patches, mean = int((trace.labels == 1).sum()), trace.rate[0][mask].mean().item()
    said = re.fullmatch(r"red: (\d+) of 40 patches, mean rate ([\d.]+)", tab.all("#about")[0].text)
    assert int(said[1]) == patches
    assert abs(float(said[2]) - mean) <= 0.006


def test_each_figure_can_be_switched_off_and_on(tab):
    for view in VIEWS:
        box, figure = tab.all(f"input[data-view={view}]")[0], tab.all(f"#{view}")[0]
        assert figure.is_displayed()
        box.click()
        assert not figure.is_displayed()
        box.send_keys(tab.keys.SPACE)
        assert figure.is_displayed()


def test_another_image_can_be_chosen(tab, images):
    tab.all("#image")[0].send_keys(f"seed {SEEDS[1]}")
    expected = bytes_of(images[1]["scfg"].trace[-1].x0[0])
    assert (tab.canvas("scfg", 0)[..., :3] == expected).all()
    tab.actions().move_to_element(tab.word(1)).perform()
    assert tab.lit("cfg") == owned(images, "cfg", STEPS - 1, 1, image=1)


def test_a_page_of_one_image_offers_no_choice(chromium, images, tab, tmp_path):
    assert tab.all("#image")[0].is_displayed()
    path = tmp_path / "single.html"
    path.write_text(page(images[:1], ""), encoding="utf-8")
    assert not Tab(chromium, path).all("#image")[0].is_displayed()


def test_it_fits_a_phone_and_turns_dark(tab):
    tab.screen(360, 740, mobile=True, scheme="dark")
    width = "document.scrollingElement.scrollWidth <= 360"
    assert tab.driver.execute_script(f"return {width}")
    assert all(button.size["height"] >= 44 for button in tab.all("#words button"))
    style = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    ink, paper = (
        sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in tab.driver.execute_script(style)
    )
    assert ink > 600 and paper < 150
    tab.screen(1280, 1000)
    ink, paper = (
        sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in tab.driver.execute_script(style)
    )
    assert ink < 150 and paper > 600
