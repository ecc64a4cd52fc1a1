"""The least time each kernel could take on a GPU, on paper: three floors from its data sheet.

    TRITON_INTERPRET=1 python -m benchmarks.rooflines [--out benchmarks/results/rooflines.json]

Of one image in float16: bytes that must move over the memory's bandwidth; bytes that the kernels
ask for, counted in the interpreter, over that of the L2 cache, as if nothing stayed in a
multiprocessor; and operations over the rate of tensor cores, exponentials over that of the special
function units, whichever is longer. No kernel was timed, and nothing here says how near it comes.
"""

import argparse
from dataclasses import dataclass

from benchmarks import cases, records, traffic

SIZES = ("sd15-512", "sdxl-1024")
OPS = ("attention_maps", "joint_maps", "attention_apply", "complete")  # on both rows of an image
AFTER = ("segment", "region_sums", "guide", "guide_evidence")


@dataclass(frozen=True)
class Gpu:
    """Bytes and operations a second, at boost clock, without sparsity.

    A product of float32 matrices is three in tf32; exponentials are 16 a clock and multiprocessor
    (CUDA programming guide). L2 is None where the vendor gives no rate.
    """

    memory: float
    l2: float | None
    half: float
    tf32: float
    float32: float
    exponentials: float


GPUS = {
    # data sheet; architecture white paper: L2 is read at 5120 bytes a clock, 1.41 GHz
    "A100 80GB SXM": Gpu(2039e9, 5120 * 1.41e9, 312e12, 156e12, 19.5e12, 108 * 16 * 1.41e9),
    # data sheet; architecture white paper: 132 multiprocessors; 67 T/s mean 1.98 GHz
    "H100 SXM": Gpu(3350e9, None, 989e12, 494.5e12, 67e12, 132 * 16 * 1.98e9),
    # Ada white paper, float16 summed in float32; 128 multiprocessors, 2.52 GHz
    "RTX 4090": Gpu(1008e9, None, 165.2e12, 82.6e12, 82.6e12, 128 * 16 * 2.52e9),
}


def counted(op, name):
    """What an operation moves and computes for one image, whatever the GPU."""
    size, rows = cases.SIZES[name], 2 if op in OPS else 1
    if op in OPS and op != "complete":
        asked, least = traffic.by_head(size, op)
    else:
        asked, least, _ = traffic.measure(op, size)
    args = traffic.arguments(op, size)
    products, wide, exponentials = cases.operations(op, args)
    other = cases.elementwise(op, args)
    row = {"kind": "floor", "op": op, "size": name, "least": rows * least, "asked": rows * asked}
    row |= {"products": rows * products, "float32_products": rows * wide}
    return row | {"exponentials": rows * exponentials, "elementwise": rows * other}


def floors(row, gpu):
    """Microseconds: memory, L2 or None, arithmetic."""
    work = row["products"] / gpu.half + 3 * row["float32_products"] / gpu.tf32
    work = max(work, row["exponentials"] / gpu.exponentials, row["elementwise"] / gpu.float32)
    found = row["least"] / gpu.memory, gpu.l2 and row["asked"] / gpu.l2, work
    return tuple(x if x is None else float(f"{x * 1e6:.3g}") for x in found)


def main():
    """Count, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    rows = []
    for name in SIZES:
        for op in (*OPS, *AFTER):
            row = counted(op, name)
            row["us"] = {gpu: floors(row, rates) for gpu, rates in GPUS.items()}
            rows.append(row)
            print(f"{name:9} {op:15} {row['least'] / 2**20:8.3f} {row['asked'] / 2**20:8.3f} MiB",
                  *(f"{gpu}: {us}" for gpu, us in row["us"].items()), flush=True)  # fmt: skip
    if options.out:
        records.write(options.out, rows)


if __name__ == "__main__":
    main()
