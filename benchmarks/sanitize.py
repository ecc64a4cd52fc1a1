"""Every kernel under compute-sanitizer, where it is installed: addresses, races, barriers.

python -m benchmarks.sanitize        # what the sanitizer runs: each operation once, small
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import cases

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck")
SIZE = cases.ModelSize((4, 68, 84), ((4, 1, 2, 40), (8, 1, 2, 40)), tokens=77)


def sanitized(seconds=60, program="compute-sanitizer"):
    """A row for each tool: whether it found nothing, or why it did not run."""
    if shutil.which(program) is None:
        yield [{"kind": "check", "check": program, "ok": True, "found": {"installed": False}}]
        return
    for tool in TOOLS:
        row = {"kind": "check", "check": f"{program} {tool}", "ok": True}
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m",
                   "benchmarks.sanitize"]  # fmt: skip
        try:
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
            if run.returncode:
                row |= {"ok": False, "failed": (run.stdout + run.stderr)[-400:]}
        except subprocess.TimeoutExpired:
            row["found"] = {"unfinished after seconds": seconds}
        print(row, flush=True)
        yield [row]


def main():
    """Run every operation once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        for op in (*cases.OPS, "guide_evidence"):
            cases.call(op, "triton")(*cases.arguments(op, SIZE, 1, torch.float16, device))


if __name__ == "__main__":
    main()
