"""The command line: what it writes, what it says, what it refuses."""

import os
import runpy
import subprocess
import sys
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
from scfg.drawing.panel import GAP, MARGIN, SIDE
from scfg.drawing.picture import CELL
from scfg.models.transformer import JointTransformer
from scfg.models.unet import UNet
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


def test_same_seed_same_bytes_and_another_seed_another_picture(run):
    for name, seed in (("one.png", "1"), ("again.png", "1"), ("two.png", "2")):
        assert run("--seed", seed, "--out", name) == 0
    one, again, two = (Path(f"{name}.png").read_bytes() for name in ("one", "again", "two"))
    assert one == again != two


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
    ("options", "message"),
    [
        (["--count", "0"], "must be a whole number of at least 1"),
        (["--sampler", "heun"], "invalid choice"),
        (["--method", "x"], "invalid choice"),
        (["--seed", "one"], "invalid int"),
        *((["--token-weight", text], "must be PHRASE=FACTOR")
          for text in ("red", "red=", "red=0", "=2", "red=nan")),
    ],
)  # fmt: skip
def test_what_argparse_refuses_has_exit_status_2(run, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert options[0] in said and message in said


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "must have a word"), ("  ", "must have a word"), ("red", "must name an object")],
)
def test_a_prompt_of_nothing_to_draw_is_refused(run, capsys, prompt, message):
    assert run(prompt=prompt) == 2
    assert f"prompt {message}" in capsys.readouterr().err


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


def test_help_names_the_words_and_no_default_of_none(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    text = capsys.readouterr().out
    assert "penguin" in text and "(default: 50)" in text
    assert "default: None" not in text and "default: False" not in text


def module(monkeypatch, *arguments):
    """Exit status of ``python -m scfg``."""
    monkeypatch.setattr(sys, "argv", ["scfg", *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("scfg", run_name="__main__", alter_sys=True)
    return stopped.value.code


@pytest.mark.parametrize("kind", [UNet, JointTransformer])
def test_the_module_runs_on_its_own_weights(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prompt = "a penguin and a guitar on a blue background"
    named = ("--network", "transformer") if kind is JointTransformer else ()
    assert module(monkeypatch, "generate", prompt, "--steps", "2", "--out", "a.png", *named) == 0
    assert capsys.readouterr().out == "wrote a.png\n"
    assert Image.open("a.png").format == "PNG"
    source, _ = commands.load(build_parser().parse_args(["generate", prompt, *named]))
    assert isinstance(source.args[0].network, kind)


def test_the_module_reports_errors_to_the_shell(monkeypatch, capsys):
    assert module(monkeypatch, "generate", PROMPT, "--model", "nowhere") == 2
    said = capsys.readouterr().err
    assert said.startswith("scfg generate: error: nowhere must be a file or a folder")
