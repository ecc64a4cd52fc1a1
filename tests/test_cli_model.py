"""`scfg generate --model`: a checkpoint on disk draws the same panel as the embedded model."""

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
