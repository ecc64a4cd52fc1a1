"""The rate at which a GPU evaluates exponentials: the ceiling of every softmax."""

import triton
import triton.language as tl


@triton.jit
def exponentials_kernel(out_ptr, REPEATS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK chains of REPEATS exponentials, each of the last's result, in registers.

    x -> exp(-x) keeps every value in (0, 1]. Enough warps hide the latency of a chain.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = at.to(tl.float32) * 1e-9
    for _ in range(REPEATS):
        x = tl.exp(-x)
    tl.store(out_ptr + at, x)
