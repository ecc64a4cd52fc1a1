"""Compile every kernel the host rules can pick, without a GPU, and show what the compiler reports.

``python -m benchmarks.compiled`` compiles all launches of `benchmarks.specialized` for all targets,
which takes minutes.
"""

import argparse
import contextlib
import io
import json
import re
import tempfile

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.specialized import STEPS, launches, step

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}
TARGETS |= {"gfx942": GPUTarget("hip", "gfx942", 64), "gfx1100": GPUTarget("hip", "gfx1100", 32)}
# Launches that end the compiler, in an assertion of Triton 3.7.1, and so are left out.
BROKEN = {"gfx1100": ("attention_apply",)}
LIMITS = {  # bytes of shared memory a block may ask for
    "sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448,
    "sm_120": 101376, "gfx942": 65536, "gfx1100": 65536,
}  # fmt: skip
AMD = ("vgpr_count", "vgpr_spill_count")


class _NoDevice:
    """What a launch asks of the active driver, for a target that is not there."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: str(target)  # kernels are kept by device
        self.get_current_stream = lambda device: 0


@contextlib.contextmanager
def compiling(target: GPUTarget, one_each: bool = False):
    """Inside, launches compile for the target instead; yields the list of reports, one a kernel.

    A report has the kernel's name, its shared memory in bytes, its registers a thread and bytes
    spilled, as ptxas or the code for AMD says.
    """
    reports, seen = [], set()
    launch, device = JITFunction.run, driver._active

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        if one_each and kernel.__name__ in seen:
            return
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        seen.add(kernel.__name__)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            reports.append(_report(compiled, log.getvalue()))

    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = cache  # a kernel found in the cache would come without a log
        knobs.nvidia.dump_ptxas_log = True
        JITFunction.run = compile_only
        driver.set_active(_NoDevice(target))
        try:
            yield reports
        finally:
            JITFunction.run = launch
            driver.set_active(device)


@contextlib.contextmanager
def counting(target: GPUTarget):
    """Inside, launches compile nothing; yields the kernels that they would have compiled."""
    names, seen = [], set()
    launch, compile_kernel, device = JITFunction.run, JITFunction._do_compile, driver._active

    def note(kernel, key, *_):
        if (kernel.__name__, key) not in seen:
            seen.add((kernel.__name__, key))
            names.append(kernel.__name__)

    def warm_up(kernel, *args, grid, warmup, **kwargs):
        return launch(kernel, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run, JITFunction._do_compile = warm_up, note
    driver.set_active(_NoDevice(target))
    try:
        yield names
    finally:
        JITFunction.run, JITFunction._do_compile = launch, compile_kernel
        driver.set_active(device)


def new_kernels(target: GPUTarget) -> list[tuple]:
    """Of one step after another: its size, tokens, and the kernels it is the first to need."""
    steps = []
    with counting(target) as names:
        for size, tokens in STEPS:
            before = len(names)
            for launch, args in step(size, tokens):
                launch(*args)
            steps.append((*size, tokens, names[before:]))
    return steps


def _report(compiled, log: str) -> dict:
    report = {"kernel": compiled.metadata.name, "warps": compiled.metadata.num_warps}
    report["shared"] = compiled.metadata.shared
    if compiled.metadata.target.backend == "cuda":
        report["registers"] = int(re.search(r"Used (\d+) registers", log)[1])
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        report["spilled"] = sum(map(int, spills))
    else:  # of 4 bytes in each lane
        found = (re.search(rf"\.{key}:\s+(\d+)", compiled.asm["amdgcn"]) for key in AMD)
        report["registers"], spilled = (int(match[1]) for match in found)
        report["spilled"] = 4 * spilled
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="of all, only this one")
    parser.add_argument("--one-each", action="store_true", help="compile every kernel only once")
    parser.add_argument("--skip", nargs="*", default=[], help="types left out, e.g. bfloat16")
    parser.add_argument("--json", action="store_true", help="print a line of JSON per kernel")
    parser.add_argument("--count", action="store_true", help="kernels that steps compile, by size")
    arguments = parser.parse_args()
    if arguments.count:
        for line in new_kernels(TARGETS["sm_90"]):
            print(json.dumps(line))
        return
    columns = ("kernel", "warps", "registers", "spilled", "shared")
    if not arguments.json:
        print(f"triton {triton.__version__}; registers a thread, spilled and shared in bytes")
        print(f"target  {'kernel':24}", *(f"{column:>9}" for column in columns[1:]))
    for name in arguments.target or TARGETS:
        with compiling(TARGETS[name], arguments.one_each) as reports:
            shown = 0
            for launch, args in launches(arguments.skip):
                if launch.__name__ in BROKEN.get(name, ()):
                    continue
                launch(*args)
                for report in reports[shown:]:
                    if arguments.json:
                        print(json.dumps({"target": name, **report}), flush=True)
                    else:
                        cells = (str(report.get(column, "-")) for column in columns[1:])
                        print(f"{name:7} {report['kernel']:24}", *(f"{x:>9}" for x in cells),
                              flush=True)  # fmt: skip
                shown = len(reports)


if __name__ == "__main__":
    main()
