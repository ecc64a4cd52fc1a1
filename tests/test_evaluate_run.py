"""Sharing the work: any number of processes, cut off anywhere, gives the same bits."""

import contextlib
import io
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluate_worker import PLAN
from tiny import MODEL

from scfg.evaluate import draw, run
from scfg.evaluate.draw import Point
from scfg.evaluate.work import Plan, collect, prepare, units, work
from scfg.models.embedded import networks, save_weights
from scfg.options import build_parser

WORKER = Path(__file__).with_name("evaluate_worker.py")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model with few and random weights."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_weights(networks(MODEL), MODEL, path)
    return path


def start(folder, weights, processes):
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = [*launch, str(WORKER), str(folder), str(weights)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    return errors


def done(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, weights):
    """Results of one process."""
    folder, errors, threads = (
        tmp_path_factory.mktemp("alone"),
        io.StringIO(),
        torch.get_num_threads(),
    )
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.setattr(draw, "STEPS", 3)
        run.share(PLAN, folder, weights, 0, 1, "cpu", quiet=False)
    torch.set_num_threads(threads)
    assert f"{len(units(PLAN))}/{len(units(PLAN))}" in errors.getvalue()  # the progress bar
    return collect(PLAN, folder)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for kind in expected:
        assert found[kind].keys() == expected[kind].keys()
        for name, x in expected[kind].items():
            assert torch.equal(found[kind][name].nan_to_num(-7.0), x.nan_to_num(-7.0)), (kind, name)


def test_every_number_is_computed_once(alone):
    assert {kind: len(next(iter(x.values()))) for kind, x in alone.items()} == {
        "reference": 6,
        "probe-400": 5,
        **{point.name: 5 for point in PLAN.points},
    }


def test_a_process_killed_in_the_middle_and_two_that_go_on_give_the_same_bits(
    tmp_path, weights, alone
):
    process = start(tmp_path, weights, 1)
    while len(done(tmp_path)) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.kill()
    process.communicate(timeout=60)
    before = done(tmp_path)
    assert 2 <= len(before) < len(units(PLAN))
    errors = finish(start(tmp_path, weights, 2))  # torchrun and its workers
    assert errors.count("unit/s") + errors.count("s/unit") >= 1  # the bar of rank 0
    after = done(tmp_path)
    assert {path: after[path] for path in before} == before  # none was done again
    assert len(after) == len(units(PLAN))
    assert_same(collect(PLAN, tmp_path), alone)


def test_four_shares_cover_all_units_without_overlap(tmp_path):
    prepare(PLAN, tmp_path)
    seen = []

    def compute(unit):
        seen.append(unit)
        return {"x": torch.arange(unit.first, unit.last)}

    counts = [work(PLAN, tmp_path, compute, rank, 4) for rank in range(4)]
    assert sum(counts) == len(seen) == len(set(seen)) == len(units(PLAN))
    assert collect(PLAN, tmp_path)["reference"]["x"].tolist() == list(range(PLAN.reference))
    assert work(PLAN, tmp_path, compute) == 0


def test_a_folder_of_other_settings_is_refused(tmp_path):
    prepare(PLAN, tmp_path)
    prepare(PLAN, tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        prepare(replace(PLAN, weights=("model", "another")), tmp_path)


def test_more_captions_and_points_leave_the_units_that_are_done(tmp_path):
    prepare(PLAN, tmp_path)
    calls = []

    def compute(unit):
        calls.append(unit)
        return {"x": torch.arange(unit.first, unit.last)}

    work(PLAN, tmp_path, compute)
    calls.clear()
    more = replace(PLAN, samples=7, points=(*PLAN.points, Point("mean", 2.0)))
    prepare(more, tmp_path)
    work(more, tmp_path, compute)
    old = {*(point.name for point in PLAN.points), "probe-400"}
    assert {(unit.first, unit.last) for unit in calls if unit.kind in old} == {(4, 6), (6, 7)}
    assert {unit.first for unit in calls if unit.kind == "mean-2"} == {0, 2, 4, 6}
    assert not [unit for unit in calls if unit.kind == "reference"]
    assert collect(more, tmp_path)["cfg-2"]["x"].tolist() == list(range(7))


def test_the_first_captions_are_drawn_at_every_point_before_the_next():
    firsts = [unit.first for unit in units(PLAN)]
    assert firsts == sorted(firsts) and firsts.count(0) == 2 + len(PLAN.points)


def parse(*arguments):
    return build_parser().parse_args(["evaluate", *arguments])


def test_the_command_writes_a_page_that_needs_nothing_else(tmp_path, weights, monkeypatch):
    methods = {"cfg": (2.0, 4.0, 15.0), "scfg": (4.0,), "shuffled": (4.0,)}
    points = [Point(m, scale) for m, scales in methods.items() for scale in scales]
    known = [replace(p, begin=349) for p in points if p.method != "shuffled"]
    points = (*points, *known, Point("oracle", 4.0, 349))
    plan = Plan(points, 4, (200, 800), 6, ("model", "judge"), 70)
    monkeypatch.setattr(run, "make_plan", lambda *_, **__: plan)
    monkeypatch.setattr("scfg.evaluate.draw.STEPS", 3)
    written = run.run(
        parse("--report", str(tmp_path), "--weights", str(weights), "--reduced", "--quiet")
    )
    assert all(path.stat().st_size > 0 for path in written)
    page = written[0].read_text(encoding="utf-8")
    for gone in ("{{", "<script src", "<link", "url(http", "#010203"):
        assert gone not in page
    assert page.count("<svg") == 6
    assert "scfg evaluate --reduced --weights tiny.safetensors --report DIR" in page
    names = sorted(path.name for path in written if path.suffix == ".csv")
    assert names == ["differences.csv", "points.csv", "rates.csv", "regions.csv"]
    assert (tmp_path / "evidence.png").exists()
    assert (
        page.count("<li>objects found, less CFG of the same") == 3
    )  # the answer, in three readings
    rows = (tmp_path / "points.csv").read_text().splitlines()
    assert len(rows) == 1 + len(points)


def test_too_few_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="samples"):
        run.run(parse("--report", str(tmp_path), "--samples", "3"))
