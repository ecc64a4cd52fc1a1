"""`scfg generate --model`: a checkpoint on disk draws the same panel as the embedded model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_hosts import sd
from PIL import Image

from scfg import __main__ as cli
from scfg.adapters import checkpoints
from scfg.adapters.generate import draw
from scfg.drawing.generate import Request


def test_a_saved_pipeline_draws_the_panel_the_page_and_the_trace(tmp_path, capsys):
    sd(tmp_path).save_pretrained(tmp_path / "model")
    out, page, trace = tmp_path / "out.png", tmp_path / "out.html", tmp_path / "trace"
    arguments = ["generate", "red blue", "--model", str(tmp_path / "model"), "--steps", "3"]
    arguments += ["--out", str(out), "--html", str(page), "--trace", str(trace), "--seed", "4"]
    assert cli.main(arguments) == 0, capsys.readouterr().err
    assert "guidance scale 7.5" in page.read_text()
    assert Image.open(out).width > 1000 and (trace / "seed4.png").exists()


def test_the_checkpoint_draws_what_the_library_draws(tmp_path, monkeypatch):
    sd(tmp_path).save_pretrained(tmp_path / "model")
    drawn = []
    monkeypatch.setattr(
        "scfg.drawing.panel.panel",
        lambda images, *_: drawn.append(images) or Image.new("L", (1, 1)),
    )
    arguments = ["generate", "red blue", "--model", str(tmp_path / "model"), "--steps", "3"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out.png"), "--quiet"]) == 0
    pipe = checkpoints.load(tmp_path / "model")
    for method, image in drawn[0][0].items():
        expected = draw(pipe, Request(("red blue",), (0,), 7.5, method=method, steps=3))
        assert torch.equal(image.images, expected.images)


def test_quiet_with_a_checkpoint_prints_nothing(tmp_path):
    sd(tmp_path).save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "scfg", "generate", "red blue", "--quiet", "--steps", "2"]
    command += ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out.png")]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_printed_otherwise_is_as_loud_as_before():
    from diffusers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(ZeroDivisionError), checkpoints.silence():
        assert not logging.is_progress_bar_enabled()
        raise ZeroDivisionError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
