"""The machine: what a number was measured on, memory there is and a step took, errors in a line."""

import contextlib
import ctypes
import gc
import os
import platform
import resource
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def _output(*command):
    """What a command prints, stripped; empty where it fails or is not there."""
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "an unnamed CPU"


def machine(commit=None):
    """Date, commit, processor or GPU, and versions.

    Args:
        commit: For a copy of the tree without its history; by default git is asked.
    """
    described = _output("git", "describe", "--always", "--dirty", "--exclude", "*")
    about = {"date": date.today().isoformat(), "commit": commit or described or "unknown"}
    if torch.cuda.is_available():
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        about |= {"device": torch.cuda.get_device_name()}
        about["driver"] = driver.splitlines()[0] if driver else "unknown"
        about["cuda"] = torch.version.cuda or torch.version.hip
    else:
        about |= {"device": f"{os.cpu_count()} cores of {_processor()}"}
        about["threads"] = torch.get_num_threads()
    about |= {"python": platform.python_version(), "torch": torch.__version__}
    return about | {"triton": _version("triton")}


def first_line(error):
    """An error on one short line."""
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:160]


def _kilobytes(path, key):
    for line in Path(path).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"{path} has no {key}")


def _available_bytes():
    """Main memory a process may still take: of the machine, and of its container."""
    free = _kilobytes("/proc/meminfo", "MemAvailable") * 1024
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


@contextlib.contextmanager
def memory_limit(free=None):
    """Inside, taking more than so many bytes, by default all there are, is an error.

    Otherwise the system kills the process that takes the last of its memory.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    taken = _kilobytes("/proc/self/status", "VmData") * 1024
    soft = taken + (_available_bytes() if free is None else free)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


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
    start = _kilobytes("/proc/self/status", "VmRSS")
    yield lambda: (_kilobytes("/proc/self/status", "VmHWM") - start) / 1024
