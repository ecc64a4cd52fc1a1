"""Records keep their machine, and the README repeats them."""

import json
from pathlib import Path

import pytest

from benchmarks import machine, records, table

ROOT = Path(__file__).parents[1]
ABOUT = {"date": "2026-01-02", "commit": "abc", "device": "a CPU", "threads": 2, "torch": "2.9"}
STEP = {"kind": "step", "model": "sd15", "width": 1.0, "pixels": 512, "batch": 1}
STEP |= {"dtype": "float32", "mode": "eager"} | ABOUT


def test_records_keep_every_row_with_its_machine(tmp_path):
    about = machine.machine("abc1234")
    assert {"date", "commit", "device", "torch", "triton"} <= set(about)
    path = tmp_path / "results" / "steps.json"
    records.append(path, [{"kind": "step", "seconds": 1.0}], about)
    records.append(path, [{"kind": "step", "seconds": 2.0}], about)
    rows = records.load(path.parent)
    assert [row["seconds"] for row in rows] == [1.0, 2.0]
    assert all(row["commit"] == "abc1234" for row in rows)
    assert len(path.read_text().splitlines()) == 4 and rows == json.loads(path.read_text())


def test_the_table_states_every_point_with_its_machine():
    ratios = {"ratio": 1.0044, "ratio_fastest": 1.0021}
    rows = [
        STEP | {"method": "cfg", "seconds": 12.345, "ratio": 1.0, "extra_mib": 0.0},
        STEP | {"method": "scfg torch", "seconds": 99.0, "ratio": 8.0, "extra_mib": 1.0},
        STEP | {"method": "scfg torch", "seconds": 12.4, "extra_mib": 3.4} | ratios,
        STEP | {"method": "released", "failed": "needs about 34 GiB", "pixels": 1024},
        STEP | {"method": "cfg", "seconds": 0.1, "ratio": 1.0, "width": 0.2},
    ]
    text = table.render(rows)
    assert "a CPU, 2 threads; torch 2.9; 2026-01-02; commit abc" in text
    assert "| scfg torch | 12.4 | 1.004 | 1.002 | +3 |" in text and "99" not in text
    assert "| needs about 34 GiB |  |  |  |" in text and "| 0.1 |" not in text
    assert text.endswith(table.NO_GPU) and table.render([]) == table.NOTHING


def test_the_table_states_gpu_figures():
    gpu = ABOUT | {"device": "a GPU", "cuda": "13", "driver": "580", "triton": "3.6"}
    kernel = {"kind": "kernel", "op": "guide", "size": "sdxl-1024", "batch": 4} | gpu
    kernel |= {"backend": "triton", "dtype": "float16", "p50_us": 3.21, "gb_s": 2100.0}
    kernel |= {"copy_share": 0.7, "floor_bytes_us": 2.2, "floor_work_us": 0.0}
    text = table.render([kernel, {"kind": "check", "check": "x", "ok": False} | gpu])
    assert "| triton float16 | 3.2 | 2100 | 70% | 2.2 | 0.0 |" in text and "driver 580" in text
    assert "0 of 1 held. Failed: x." in text and table.NO_GPU not in text


def test_a_table_of_a_page_is_replaced_and_nothing_else():
    begin, end = table.markers("x")
    text = f"a\n{begin}\nold\n{end}\nb\n"
    assert table.replaced(text, "x", "new") == f"a\n{begin}\nnew\n{end}\nb\n"
    with pytest.raises(ValueError, match="once each"):
        table.section("no markers", "x")


@pytest.mark.parametrize("name", table.TABLES)
def test_the_pages_repeat_the_records(name):
    page, make = table.TABLES[name]
    text = table.section((ROOT / page).read_text(), name)
    assert text == f"\n{make()}\n", "run python -m benchmarks.table"
    assert len(text.splitlines()) > 6
