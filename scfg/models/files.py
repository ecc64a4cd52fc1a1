"""Files: written whole or not at all, and read with errors that say which file it is."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file aside, wait until the disk has it, and move it in place.

    Args:
        path: The file; what it held stays, whatever goes wrong.
        write: Writes the file that it is given, in the same folder.
    """
    path = Path(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """`write_whole` of a text in UTF-8."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no whole safetensors file.
        RuntimeError: safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise RuntimeError(
            "weights need safetensors: pip install 'semantic-cfg[generate]'"
        ) from error
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"{path} is no JSON: {error}") from error
