"""Checkpoints on disk, as pipelines of diffusers; `scfg.adapters.generate` draws with them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from scfg.models.files import read_json


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    config: str | Path | None = None,
    allow_pickle: bool = False,
):
    """A text-to-image pipeline from a folder or a file; nothing is downloaded.

    Args:
        path: A folder that diffusers has saved, or one file of all weights (``.safetensors``).
        device: None: the GPU if there is one, else the CPU.
        dtype: None: float16 on a GPU, float32 on a CPU.
        config: For a file: the folder of a model of its kind, of which only the configuration and
            the tokenizer are read. None: what Hugging Face's cache has.
        allow_pickle: Also take weights that are pickles, which only diffusers' restricted reader
            guards. Leave it off for files of strangers.

    Returns:
        A pipeline of diffusers on the device.

    Raises:
        ValueError: path is neither, holds no U-Net pipeline, or has pickles only.
        RuntimeError: diffusers or transformers is not installed, or a file's configuration is not
            on this machine.
    """
    path = Path(path)
    if not path.is_file() and not (path / "model_index.json").is_file():
        raise ValueError(f"{path} must be a file or a folder with a model_index.json")
    if path.is_file() and path.suffix != ".safetensors" and not allow_pickle:
        raise ValueError(
            f"{path} is not a .safetensors file; pickles are loaded from Python only, by "
            "scfg.adapters.checkpoints.load(path, allow_pickle=True)"
        )
    try:
        import diffusers
        import transformers  # noqa: F401
    except ImportError as error:
        need = f"checkpoints need {error.name}: pip install 'semantic-cfg[diffusers]'"
        raise RuntimeError(need) from error
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    options = {"torch_dtype": dtype, "local_files_only": True}
    if (path / "model_index.json").is_file():
        _pipeline_class(path)
        if not allow_pickle:
            options |= {"use_safetensors": True, "variant": _variant(path)}
        try:
            pipe = diffusers.DiffusionPipeline.from_pretrained(path, **options)
        except Exception as error:  # whatever diffusers makes of a damaged folder
            raise ValueError(f"{path} cannot be loaded from safetensors: {error!r}") from error
    else:
        folder = _configuration(path) if config is None else Path(config)
        kind = _pipeline_class(folder)
        try:
            pipe = kind.from_single_file(path, config=str(folder), **options)
        except Exception as error:
            raise ValueError(f"{path} cannot be loaded as a {kind.__name__}: {error!r}") from error
    if not hasattr(type(pipe), "guidance_scale") or getattr(pipe, "unet", None) is None:
        raise ValueError(f"{path} holds a {type(pipe).__name__}, which has no U-Net to guide")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@contextmanager
def silence() -> Iterator[None]:
    """Keep diffusers and transformers from printing anything but errors, inside a block."""
    try:
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers
    except ImportError:  # what is inside will say so
        yield
        return
    hosts = (of_diffusers, of_transformers)
    levels = [host.get_verbosity() for host in hosts]
    bars = [host.is_progress_bar_enabled() for host in hosts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for host in hosts:
            host.set_verbosity_error()
            host.disable_progress_bar()
        try:
            yield
        finally:
            for host, level, bar in zip(hosts, levels, bars, strict=True):
                host.set_verbosity(level)
                if bar:
                    host.enable_progress_bar()


def _pipeline_class(folder: Path) -> type:
    """The class that a folder's model_index.json names."""
    import diffusers

    index = read_json(folder / "model_index.json")
    name = index.get("_class_name") if isinstance(index, dict) else None
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ValueError(
            f"{folder / 'model_index.json'} must name a pipeline of diffusers, got {name!r}"
        )
    return kind


def _variant(folder: Path) -> str | None:
    """The variant to load where a folder has weights of no other."""
    files = [file.name for file in (folder / "unet").glob("*.safetensors")]
    return "fp16" if files and all(".fp16." in name for name in files) else None


def _configuration(file: Path) -> Path:
    """The folder in Hugging Face's cache with the configuration of a file's model."""
    from diffusers.loaders.single_file_utils import (
        fetch_diffusers_config,
        load_single_file_checkpoint,
    )
    from huggingface_hub import snapshot_download

    kind = fetch_diffusers_config(load_single_file_checkpoint(str(file)))
    name = kind["pretrained_model_name_or_path"]
    missing = RuntimeError(
        f"{file} looks like {name}, whose configuration is not on this machine; give config (on "
        "the command line --model-config), the folder of such a model, of which no weights are read"
    )
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except OSError as error:
        raise missing from error
    if not (folder / "model_index.json").is_file():
        raise missing
    return folder
