"""The command line: what it writes, what it says, what its pictures show."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import generate, tiny_model

import scfg
from scfg import __main__ as cli
from scfg import commands
from scfg.commands import one_thread, settings, shown_step
from scfg.drawing.generate import Request, draw
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
from scfg.models.embedded import WEIGHTS
from scfg.names import METHODS
from scfg.options import build_parser

PROMPT = "a striped red penguin on a green background"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def run(model, monkeypatch, tmp_path):
    """Run `scfg generate` in an empty folder, for three steps."""
    monkeypatch.setattr(commands, "load_model", lambda path, device: model)
    monkeypatch.chdir(tmp_path)

    def run(*options, prompt=PROMPT):
        return cli.main(["generate", prompt, "--steps", "3", *options])

    return run


def bytes_of(image):
    """(3, 64, 64) in [-1, 1] as the bytes of a PNG: (64, 64, 3)."""
    return ((image.numpy().transpose(1, 2, 0) + 1) / 2 * 255).round().astype(np.uint8)


def cells(path, rows, columns):
    """Cells of a panel with a title of one line and notes of two, by row and column."""
    picture = np.array(Image.open(path))
    top = MARGIN + 40 + 54 + 2 * 26
    return [
        [picture[y : y + CELL, x : x + CELL] for x in range(MARGIN + SIDE, 9999, CELL + GAP)][
            :columns
        ]
        for y in range(top, top + rows * (CELL + GAP), CELL + GAP)
    ]


@pytest.mark.parametrize("method", ["cfg", "scfg", "both"])
def test_the_panel_holds_the_images_of_each_method_pixel_by_pixel(run, model, method):
    assert run("--method", method, "--count", "2", "--seed", "4") == 0
    methods = ["cfg", "scfg"] if method == "both" else [method]
    rows = cells("out.png", 2, len(methods))
    for k, row in enumerate(rows):
        for name, cell in zip(methods, row, strict=True):
            with one_thread():  # as the command draws, for the last bits
                expected = generate(model, [PROMPT], [4 + k], method=name, steps=3).images[0]
            assert (cell == np.kron(bytes_of(expected), np.ones((5, 5, 1), np.uint8))).all()


@pytest.mark.parametrize(("apart", "columns"), [(0.06, 5), (0.14, 4)])
def test_the_difference_is_shown_of_pictures_that_look_alike_and_not_of_others(
    model, tmp_path, apart, columns
):
    rows = [
        {name: generate(model, [PROMPT], [k], method=name, steps=2, trace=True) for name in METHODS}
        for k in range(2)
    ]
    noise = [torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    for row, plain in zip(rows, noise, strict=True):  # apart in one direction, half of it the mean
        row["cfg"] = replace(row["cfg"], images=plain - 0.9)
        row["scfg"] = replace(row["scfg"], images=plain - 0.9 + 2 * apart * noise[0])
    panel(rows, 1, "settings").save(tmp_path / "a.png")
    width = Image.open(tmp_path / "a.png").width
    assert width == 2 * MARGIN + SIDE + columns * (CELL + GAP) + BAR
    if columns == 5:
        for cell, row in zip(cells(tmp_path / "a.png", 2, 3), rows, strict=True):
            plain, ours = (bytes_of(row[name].images[0]).astype(int) for name in METHODS)
            expected = np.minimum(8 * abs(ours - plain), 255)
            assert 0 < expected.min() + expected.max()
            assert (cell[2] == np.kron(expected, np.ones((5, 5, 1), int))).all()


def test_same_seed_same_bytes_and_another_seed_another_picture(run):
    for name, seed in (("one.png", "1"), ("again.png", "1"), ("two.png", "2")):
        assert run("--seed", seed, "--out", name) == 0
    one, again, two = (Path(f"{name}.png").read_bytes() for name in ("one", "again", "two"))
    assert one == again
    assert one != two


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler", "euler_ancestral"])
def test_an_image_does_not_depend_on_the_count(run, sampler):
    assert run("--sampler", sampler, "--trace", "alone", "--out", "alone.png") == 0
    assert run("--sampler", sampler, "--trace", "three", "--out", "three.png", "--count", "3") == 0
    assert sorted(p.name for p in Path("three").iterdir()) == [f"seed{k}.png" for k in range(3)]
    assert Path("alone/seed0.png").read_bytes() == Path("three/seed0.png").read_bytes()
    alone, three = cells("alone.png", 1, 2)[0], cells("three.png", 3, 2)[0]
    assert all((a == b).all() for a, b in zip(alone, three, strict=True))


def test_every_option_reaches_the_request(run, monkeypatch):
    seen = []

    def spy(model, request, after_step):
        seen.append(request)
        return draw(model, request, after_step)

    monkeypatch.setattr(commands, "draw", spy)
    given = ("--seed", "9", "--guidance-scale", "1.75", "--sampler", "dpmpp_2m", "--every", "2")
    given += ("--start", "0.25", "--stop", "0.75", "--token-weight", "red penguin=2")
    assert run(*given, "--backend", "torch", "--propagation", "official", "--method", "scfg") == 0
    (request,) = seen
    assert request.config.propagation == "official"
    assert request == Request(
        prompts=(PROMPT,),
        seeds=(9,),
        guidance_scale=1.75,
        method="scfg",
        steps=3,
        sampler="dpmpp_2m",
        config=request.config,
        backend="torch",
        trace=True,
        token_weights={"red penguin": 2.0},
        start=0.25,
        stop=0.75,
        every=2,
    )


def test_the_number_of_threads_is_given_back_also_after_an_error(run):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert run() == 0
        assert run("--guidance-scale", "-1") == 2
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_it_says_what_it_wrote_unless_quiet(run, capsys):
    assert run("--out", "new/folder/a.png", "--html", "b/b.html", "--trace", "c") == 0
    assert capsys.readouterr().out.split() == [
        "wrote",
        *("new/folder/a.png", "c/seed0.png", "b/b.html"),
    ]
    assert run("--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_an_unknown_word_is_named_with_the_known_ones_and_nothing_is_written(run, capsys):
    assert run("--trace", "strips", prompt="a red hippopotamus on a green background") == 2
    message = capsys.readouterr().err
    assert "'hippopotamus'" in message
    for word in ("red", "penguin", "checkered", "background"):
        assert word in message.split("hippopotamus")[1]
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance-scale", "0"], "guidance_scale must be finite and > 0, got 0.0"),
        (["--guidance-scale", "nan"], "guidance_scale must be finite and > 0, got nan"),
        (["--steps", "0"], "steps"),
        (["--steps", "1001"], "steps"),
        (["--model", "checkpoint"], "checkpoint must be a file or a folder with"),
        (["--out", "file/out.png"], "file"),
        (["--out", "out.unknown"], "unknown"),
    ],
)
def test_a_bad_option_is_named_with_exit_status_2(run, capsys, options, message):
    Path("file").write_text("not a folder")
    assert run(*options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--count", "0"], ["--sampler", "heun"], ["--method", "x"], ["--seed", "one"]]
)
def test_what_argparse_refuses_has_exit_status_2(run, capsys, options):
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert stopped.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "must have a word"), ("  ", "must have a word"), ("red", "must name an object")],
)
def test_a_prompt_of_nothing_to_draw_is_refused(run, capsys, prompt, message):
    assert run(prompt=prompt) == 2
    assert f"prompt {message}" in capsys.readouterr().err


def test_punctuation_after_a_word_is_left_out(run):
    assert run("--out", "one.png", "--method", "scfg") == 0
    with_stops = PROMPT.replace("circle", "circle,") + "."
    assert run("--out", "two.png", "--method", "scfg", prompt=with_stops) == 0
    assert np.array_equal(cells("one.png", 1, 1)[0][0], cells("two.png", 1, 1)[0][0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "noext"], "--out must end in .png, got noext"),
        (["--out", "a.docx"], "--out must end in .png, got a.docx"),
        (["--out", "folder.png"], "--out must be a file, got the folder folder.png"),
        (["--html", "folder.png"], "--html must be a file, got the folder"),
        (["--out", "file/deep/a.png"], "cannot write to file/deep"),
        (["--trace", "file/deep"], "cannot write to file/deep"),
        (["--model-config", "there"], "--model-config is of a --model"),
    ],
)
def test_what_could_not_be_written_is_refused_before_anything_is_loaded_or_drawn(
    run, monkeypatch, capsys, options, message
):
    Path("file").write_text("no folder")
    Path("folder.png").mkdir()
    monkeypatch.setattr(commands, "load_model", lambda *_: pytest.fail("loaded"))
    assert run(*options) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize(("complete", "said"), [(0, "interrupted\n"), (2, "; wrote out.png t/")])
def test_an_interrupt_keeps_the_images_that_are_complete(run, monkeypatch, capsys, complete, said):
    drawn = []

    def interrupted(model, request, after_step):
        if len(drawn) == 2 * complete + 1:  # within an image of two methods
            raise KeyboardInterrupt
        drawn.append(request)
        return draw(model, request, after_step)

    monkeypatch.setattr(commands, "draw", interrupted)
    assert run("--count", "5", "--trace", "t") == 130
    assert said in capsys.readouterr().err
    assert Path("out.png").exists() == (complete > 0)
    assert len(list(Path("t").iterdir())) == complete
    if complete:
        monkeypatch.setattr(commands, "draw", draw)
        assert run("--count", "2", "--out", "whole.png") == 0
        assert Path("out.png").read_bytes() == Path("whole.png").read_bytes()


def test_what_changes_a_picture_and_is_no_default_stands_under_its_title():
    def line(*options):
        options = build_parser().parse_args(["generate", PROMPT, "--guidance-scale", "3", *options])
        return settings(options)

    assert line() == "50 DDIM steps \u00b7 guidance scale 3"
    given = ("--token-weight", "red circle=1.5", "--stop", "0.8", "--every", "2")
    assert line(*given, "--propagation", "none").split(" \u00b7 ")[2:] == [
        "red circle x 1.5",
        "S-CFG from 0 to 0.8 of the steps",
        "regions every 2 steps",
        "propagation none",
    ]


def test_the_page_opens_at_the_step_of_the_panel(run):
    assert run("--html", "a.html") == 0
    assert f'"step":{shown_step(3)},' in Path("a.html").read_text()


def test_the_version_is_that_of_what_runs(monkeypatch, tmp_path, capsys):
    class Installed:
        version = "9.9"

        def __init__(self, folder):
            self.folder = folder

        def locate_file(self, name):
            return self.folder / name

    root = Path(cli.__file__).parents[1]
    for folder, expected in ((root, "9.9"), (tmp_path, f"{scfg.__version__} (in {root}")):
        monkeypatch.setattr("importlib.metadata.distribution", lambda name, f=folder: Installed(f))
        with pytest.raises(SystemExit) as stopped:
            cli.main(["--version"])
        assert stopped.value.code == 0
        assert capsys.readouterr().out.startswith(f"scfg {expected}")


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_what_only_prints_imports_no_torch(option):
    code = f"import sys; from scfg.__main__ import main\ntry: main(['{option}'])\n"
    code += "except SystemExit: sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


def test_the_version_is_one():
    project = (Path(cli.__file__).parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{scfg.__version__}"\n' in project


def test_help_names_the_words_and_no_default_of_none(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    text = capsys.readouterr().out
    assert "penguin" in text and "(default: 50)" in text
    assert "default: None" not in text and "default: False" not in text


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the embedded weights are not there")
def test_the_module_runs_on_its_own_weights(tmp_path):
    prompt = "a penguin and a guitar on a blue background"
    command = [sys.executable, "-m", "scfg", "generate", prompt, "--steps", "2", "--out", "a.png"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "wrote a.png\n"
    assert Image.open(tmp_path / "a.png").format == "PNG"


def test_the_module_reports_errors_to_the_shell(tmp_path):
    command = [sys.executable, "-m", "scfg", "generate", PROMPT, "--model", "nowhere"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("scfg generate: error: nowhere must be a file or a folder")


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


def test_a_long_prompt_makes_the_panel_taller_not_wider(model):
    short = "a red owl"
    long = "red owl and blue car on green star and yellow house and purple"
    images = [generate(model, [text], [0], steps=2, trace=True) for text in (short, long)]
    pictures = [panel([{"scfg": image}], 1, "settings") for image in images]
    assert pictures[0].width == pictures[1].width
    assert pictures[0].height < pictures[1].height


@pytest.mark.parametrize("text", ["red", "red=", "red=0", "=2", "red=nan"])
def test_a_token_weight_is_a_phrase_and_a_positive_factor(run, capsys, text):
    with pytest.raises(SystemExit) as stop:
        run("--token-weight", text)
    assert stop.value.code == 2
    assert "must be PHRASE=FACTOR" in capsys.readouterr().err


def test_window_and_token_weights_reach_the_drawing(run, model):
    options = ("--token-weight", "red penguin=2", "--start", "0.5", "--every", "2", "--quiet")
    assert run("--out", "out.png", "--seed", "4", *options) == 0
    with one_thread():
        expected = generate(
            model, [PROMPT], [4], steps=3, token_weights={"red penguin": 2.0}, start=0.5, every=2
        )
    assert np.array_equal(cells("out.png", 1, 2)[0][1][::5, ::5], bytes_of(expected.images[0]))
