"""The commands that train what ships: a step of each, what they write, and what reads it."""

import json
import sys

import pytest
import torch
from tiny import MODEL

from scfg.models import judge_training, train
from scfg.models.embedded import load_model
from scfg.models.files import read_tensors
from scfg.models.judge import load_judge


def call(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
    main()


def test_a_judge_is_trained_measured_and_written_with_what_was_measured(
    monkeypatch, tmp_path, capsys
):
    file, counts = tmp_path / "judge.safetensors", []
    whole = judge_training.measure

    def measure(judge):
        counts.append(whole(judge, 8))
        return counts[-1]

    monkeypatch.setattr(judge_training, "measure", measure)
    monkeypatch.setattr(judge_training, "BATCH", 8)
    call(monkeypatch, judge_training.main, "--train", "--minutes", 1e-4, "--weights", file)
    call(monkeypatch, judge_training.main, "--weights", file)
    said = json.loads(capsys.readouterr().out.rpartition("\n{")[2].join(["{", ""]))
    assert said["measured"] == said["stored"] == counts[0] == counts[1]
    assert load_judge(file).feature_std.max() > 0


def test_a_network_is_trained_carried_on_and_exported(monkeypatch, tmp_path, capsys):
    out, file = tmp_path / "run", tmp_path / "weights.safetensors"
    monkeypatch.setattr(train, "ModelConfig", lambda: MODEL)
    monkeypatch.setattr(train, "preview", lambda trainer, path: path.write_bytes(b"seen"))
    options = "--batch", 2, "--threads", 1, "--out", out
    call(monkeypatch, train.main, *options, "--samples", 4)
    assert (out / "preview-4.png").read_bytes() == b"seen"
    with pytest.raises(SystemExit):
        call(monkeypatch, train.main, *options)
    assert "holds a run already" in capsys.readouterr().err
    call(monkeypatch, train.main, *options, "--resume")
    for changed in (("--lr", 0.5), ("--minutes", 3), ("--network", "transformer"), ("--bf16",)):
        with pytest.raises(SystemExit):
            call(monkeypatch, train.main, *options, "--resume", *changed)
        assert f"error: {changed[0]} must be left out, or be " in capsys.readouterr().err
    options = "--batch", 2, "--threads", 1, "--out", tmp_path / "longer"
    call(monkeypatch, train.main, *options, "--minutes", 1e-9)
    first = json.loads((tmp_path / "longer" / "checkpoint.json").read_text())
    minutes = first["seconds"] / 60 + 1e-3
    call(monkeypatch, train.main, *options, "--resume", "--minutes", minutes)
    longer = json.loads((tmp_path / "longer" / "checkpoint.json").read_text())
    assert longer["plan"]["minutes"] == minutes and longer["steps"] > first["steps"]
    monkeypatch.setitem(train.SHIPPED, "unet", file)  # where the package would keep it
    call(monkeypatch, train.main, "--out", out, "--export")
    assert f"{file}: 4 samples" in capsys.readouterr().out
    elsewhere = tmp_path / "elsewhere.safetensors"
    call(monkeypatch, train.main, "--out", out, "--export", elsewhere)
    (tensors, facts), (expected, stored) = read_tensors(elsewhere), read_tensors(file)
    assert facts == stored and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], x) for name, x in expected.items())
    assert read_tensors(file) and load_model(file, "cpu").config
