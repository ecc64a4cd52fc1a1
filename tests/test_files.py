"""Damaged files are errors that name them, and no file is ever left half written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODEL

from scfg.__main__ import main
from scfg.adapters.checkpoints import load
from scfg.evaluate import work
from scfg.evaluate.draw import Point
from scfg.models import judge
from scfg.models.embedded import load_model, networks, save_weights
from scfg.models.files import read_tensors, write_text, write_whole


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_weights(networks(MODEL), MODEL, path)
    load_model(path)
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def pickled(path):
    torch.save({"a": torch.ones(2)}, path)


def empty(path):
    path.write_bytes(b"")


def with_metadata(metadata):
    return lambda path: save_file(load_file(path), path, metadata)


def integers(path):
    with_config = read_tensors(path)[1]
    save_file({k: x.to(torch.int8) for k, x in load_file(path).items()}, path, with_config)


DAMAGE = [cut, lengthen, pickled, empty, integers]
DAMAGE += [with_metadata(None)]
DAMAGE += [with_metadata({"config": text}) for text in ("{", "[]", "{}", '{"unet": {"x": 1}}')]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_model_is_an_error_that_names_the_file(weights, damage):
    damage(weights)
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        load_model(weights)
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        judge.load_judge(weights)


def test_a_file_that_is_not_there_is_named():
    for read in (load_model, judge.load_judge):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            read("nowhere.safetensors")


@pytest.mark.parametrize(
    "index", ["{}", "[]", "{", '{"_class_name": "No"}', '{"_class_name": "models"}', "\udcff"]
)
def test_a_damaged_checkpoint_ends_the_command_with_its_name(tmp_path, index, capsys):
    file = tmp_path / "model_index.json"
    file.write_bytes(index.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"model_index\.json"):
        load(tmp_path)
    assert main(["generate", "a", "--model", str(tmp_path), "--out", str(tmp_path / "o.png")]) == 2
    assert "model_index.json" in capsys.readouterr().err


def test_a_checkpoint_without_its_parts_is_named(tmp_path):
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "No"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=tmp_path.name):
        load(tmp_path)


class Stop(BaseException):
    pass


def test_what_is_cut_off_leaves_the_file_of_before(tmp_path):
    path = tmp_path / "report.html"
    write_text(path, "old")

    def fail(aside):
        aside.write_text("ne")
        raise Stop

    with pytest.raises(Stop):
        write_whole(path, fail)
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_damaged_unit_is_done_again_and_a_damaged_plan_is_named(tmp_path):
    plan = work.Plan((Point("cfg", 2.0),), 4, (50,), 4, ("a", "b"), 2)
    calls = []

    def compute(unit):
        calls.append(unit)
        return {"x": torch.arange(unit.first, unit.last)}

    work.prepare(plan, tmp_path)
    todo = work.units(plan)
    assert work.work(plan, tmp_path, compute) == len(todo) == len(calls)
    whole = work.collect(plan, tmp_path)
    for unit, damage in zip(todo, (cut, empty, pickled), strict=False):
        damage(unit.path(tmp_path))
    calls.clear()
    assert work.work(plan, tmp_path, compute) == 3
    assert calls == todo[:3]
    again = work.collect(plan, tmp_path)
    assert all(again[kind]["x"].equal(found["x"]) for kind, found in whole.items())
    cut(todo[1].path(tmp_path))
    with pytest.raises(ValueError, match=todo[1].path(tmp_path).name):
        work.collect(plan, tmp_path)
    (tmp_path / "units" / "weights.json").write_text("{")
    with pytest.raises(ValueError, match=r"weights\.json is no JSON"):
        work.prepare(plan, tmp_path)
