"""The meter counts what kernels ask memory for, and every stage stays within its bound."""

import pytest
import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.interpreter import InterpreterBuilder

import csrc_triton
from benchmarks import cases, records, rooflines, traffic, transformer_cost
from scfg import reference

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="bytes are counted in the interpreter"
)
SD15, SD21 = cases.SIZES["sd15-512"], cases.SIZES["sd21-768"]


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n) * tl.load(factor_ptr)
    tl.store(y_ptr + i, x.to(tl.float16), mask=i < n)


def test_active_lanes_are_counted_with_their_size_and_by_tensor():
    n, programs = 1000, 4
    x, factor, y = torch.rand(n), torch.rand(1), torch.empty(n, dtype=torch.float16)
    with traffic.counting(watch=x) as counted:
        _scale_kernel[(programs,)](x, factor, y, n, BLOCK=256)
    assert torch.equal(y, (x * factor).half())
    assert counted == traffic.Traffic(loaded=4 * n + 4 * programs, stored=2 * n, watched=4 * n)
    assert counted.moved == 6 * n + 4 * programs


def test_the_interpreter_is_left_as_it_was_also_after_an_error():
    before = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    with pytest.raises(KeyError), traffic.counting():
        raise KeyError
    after = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    assert before == after


@pytest.mark.parametrize("name", traffic.BOUNDS)
@pytest.mark.parametrize("op", ["segment", "region_sums", "guide"])
def test_operations_of_one_pass_move_little_more_than_the_least(op, name):
    moved, least, _ = traffic.measure(op, cases.SIZES[name])
    assert 1 <= moved / least <= traffic.BOUNDS[name][op] == 1.3


def test_propagation_reads_a_large_map_once_a_power():
    _, _, reads = traffic.measure("complete", SD21, powers=1)  # every power is a launch like it
    assert 1 <= reads <= 1 + 1.3


def test_propagation_in_one_launch_reads_a_small_map_once_a_power_and_column_block():
    moved, least, reads = traffic.measure("complete", SD15)
    assert reads == 4 * 5  # powers * ceil(78 / 16): stays in L2
    assert moved / least <= traffic.BOUNDS["sd15-512"]["complete"]


def test_maps_are_counted_by_head():
    size = cases.ModelSize((4, 24, 24), ((4, 1, 3, 24),), tokens=20)
    assert traffic.by_head(size) == traffic.measure("attention_maps", size)[:2]


def test_maps_stay_within_their_bound():
    moved, least = traffic.by_head(SD15)
    assert 1 <= moved / least <= traffic.BOUNDS["sd15-512"]["attention_maps"]


def test_the_joint_map_of_the_cost_table_is_what_the_definition_multiplies():
    n, m, width = transformer_cost.PATCHES, transformer_cost.TEXT, transformer_cost.WIDTH
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        q, k = torch.empty(1, n, width), torch.empty(1, m + n, width)
        self_map, cross_map = reference.joint_maps(q, k, m, transformer_cost.HEADS)
        columns = torch.empty(1, n, transformer_cost.WORDS)
        mapped = counted.get_total_flops()
        reference.propagate(self_map, columns, "paper", transformer_cost.POWERS)
    rows = {name: (operations, moved) for name, operations, moved in transformer_cost.ours()}
    layers = transformer_cost.LAYERS
    assert rows["joint map, split"][0] == 2 * layers * mapped  # scored twice
    assert rows["completion"][0] == layers * (counted.get_total_flops() - mapped)
    written = sum(x.numel() * 4 for x in (self_map, cross_map))
    assert rows["joint map, split"][1] > layers * written


@pytest.mark.parametrize("op", ["region_sums", "guide", "guide_evidence"])
def test_the_floors_on_paper_are_those_that_are_recorded(op):
    kept = [row for row in records.load() if row["kind"] == "floor"]
    assert len(kept) == len(rooflines.SIZES) * len((*rooflines.OPS, *rooflines.AFTER))
    (row,) = (row for row in kept if (row["op"], row["size"]) == (op, "sd15-512"))
    us = row.pop("us")
    assert rooflines.counted(op, "sd15-512") == row
    assert {name: list(rooflines.floors(row, gpu)) for name, gpu in rooflines.GPUS.items()} == us


def test_floors_of_a_map_worked_out_on_paper():
    """2 rows, n = 256, m = 256 + 77, 8 heads of 160: 0.437 G operations, 1.36 M exponentials."""
    products, least = 2 * 2 * 256 * 333 * 1280, 2 * (2 * 1280 * (3 * 256 + 77) + 4 * 256 * 333)
    row = dict(least=least, asked=3 * least, products=products, float32_products=0)
    row |= dict(exponentials=2 * 256 * 333 * 8, elementwise=0)
    gpu = rooflines.Gpu(1e12, 4e12, 100e12, 50e12, 10e12, 1e12)
    memory, l2, work = rooflines.floors(row, gpu)
    assert (memory, l2, work) == (5.01, 3.76, 4.36)
    (kept,) = (
        row
        for row in records.load()
        if row.get("op") == "attention_maps" and row.get("size") == "sd15-512" and "us" in row
    )
    assert (kept["least"], kept["products"]) == (least, products)


@pytest.mark.parametrize("joint", ["renormalise", "raw"])
def test_joint_maps_are_written_once_and_keys_are_read_once_a_program(joint):
    n, t, heads, d = 250, 21, 2, 24
    q, k = torch.randn(1, n, heads * d).half(), torch.randn(1, t + n, heads * d).half()
    with traffic.counting(watch=k) as counted:
        maps = csrc_triton.joint_maps(q, k, t, heads, None, joint)
    assert counted.stored == sum(x.nbytes for x in maps)  # the joint map itself is nowhere
    programs = counted.watched // k.nbytes
    assert counted.watched == programs * k.nbytes and programs == -(-n // 16)
    assert counted.loaded == q.nbytes + counted.watched
