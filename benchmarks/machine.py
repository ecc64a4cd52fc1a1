"""What a number was measured on, and how much memory a step took."""

import contextlib
import ctypes
import gc
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def machine():
    """Processor or GPU, versions, commit and date."""
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    ).stdout.strip()
    about = {"date": date.today().isoformat(), "commit": commit or "unknown"}
    if torch.cuda.is_available():
        about["device"] = torch.cuda.get_device_name()
        about["cuda"] = torch.version.cuda
    else:
        info = Path("/proc/cpuinfo")
        names = (
            [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
        )
        name = names[0].split(":")[1].strip() if names else platform.processor()
        about["device"] = f"{os.cpu_count()} cores of {name or 'an unnamed CPU'}"
        about["threads"] = torch.get_num_threads()
    about |= {"python": platform.python_version(), "torch": torch.__version__}
    return about | {"triton": _version("triton")}


def _status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


@contextlib.contextmanager
def peak_mib(device):
    """A function that, after the block, gives the block's peak memory above its start in MiB."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - start) / 2**20
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what an earlier step freed is not this one's
    Path("/proc/self/clear_refs").write_text("5")  # reset VmHWM
    start = _status("VmRSS")
    yield lambda: _status("VmHWM") - start
