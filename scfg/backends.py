"""Where an operation runs: its definition in torch, its Triton twin, or both behind a custom op."""

import functools
import importlib
import importlib.util
import inspect

import torch
from torch import Tensor

from scfg import reference
from scfg.names import BACKENDS


def check_backend(backend: str) -> None:
    """Raise ValueError unless backend is one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


@functools.cache
def has_triton() -> bool:
    """Whether the package triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def supported(device: torch.device) -> bool:
    """Whether ``"auto"`` takes Triton on a CUDA device: NVIDIA from sm_80 on, or AMD."""
    if not has_triton():
        return False
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def kernel(name: str):
    """The Triton twin called ``name``."""
    return getattr(importlib.import_module("csrc_triton"), name)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def _contiguous(value):
    """The value with every tensor in it contiguous, as the kernels read them."""
    if isinstance(value, Tensor):
        return value.contiguous()
    if isinstance(value, (list, tuple)):
        return [_contiguous(item) for item in value]
    return value


def _launch(name: str, **arguments):
    return kernel(name)(**{key: _contiguous(value) for key, value in arguments.items()})


def run(name: str, backend: str, **arguments):
    """Run an operation of `scfg.reference`, with its own arguments, outside autocast.

    Args:
        name: The operation.
        backend: See `scfg.ops`.
        arguments: Checked already.

    Returns:
        What the operation returns.

    Raises:
        ValueError: An unknown backend, or tensors on several devices.
        RuntimeError: The backend cannot run here, or a gradient is asked of one that has none.
    """
    check_backend(backend)
    values = [x for value in arguments.values() for x in _listed(value)]
    tensors = [x for x in values if isinstance(x, Tensor)]
    device = tensors[0].device
    if any(x.device != device for x in tensors):
        raise ValueError(
            f"{name} needs tensors on one device, got {[str(x.device) for x in tensors]}"
        )
    if backend != "torch" and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{name} got a tensor that requires grad; backend {backend!r} is for inference: "
            "call it under torch.no_grad(), or use backend='torch', which is differentiable"
        )
    if backend == "auto":
        scale = arguments.get("guidance_scale")
        if isinstance(scale, Tensor):
            arguments |= {"guidance_scale": 0.0, "scales": scale}
        function = getattr(torch.ops.scfg, name)
    else:
        function = _function(name, backend, device)
    with torch.autocast(device.type, enabled=False):
        return function(**arguments)


def run_unchecked(name: str, backend: str, device: torch.device, arguments: dict):
    """`run` without a check, and without torch's dispatch unless it is traced.

    Args:
        name: The operation.
        backend: One of BACKENDS.
        device: Of all tensors, none of which requires grad.
        arguments: Of the operation, a guidance scale not among them.
    """
    if backend == "auto" and torch.compiler.is_compiling():
        function = getattr(torch.ops.scfg, name)
    else:
        function = _function(name, backend, device)
    if not torch.is_autocast_enabled(device.type):
        return function(**arguments)
    with torch.autocast(device.type, enabled=False):
        return function(**arguments)


def _function(name: str, backend: str, device: torch.device):
    """The reference or its twin, whichever a backend takes on a device."""
    if backend == "torch":
        return getattr(reference, name)
    if backend == "auto":
        on_gpu = device.type == "cuda" and supported(device)
        return functools.partial(_launch, name) if on_gpu else getattr(reference, name)
    if not has_triton():
        raise RuntimeError("backend 'triton' needs the package triton, which is not installed")
    if device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f"backend 'triton' needs CUDA tensors, got {device}; on a CPU it runs only in "
            "Triton's interpreter (TRITON_INTERPRET=1 before Python starts)"
        )
    if device.type == "cuda" and not supported(device):
        raise RuntimeError(
            f"backend 'triton' needs an NVIDIA GPU from sm_80 on or AMD, got {device} of compute "
            f"capability {torch.cuda.get_device_capability(device)}; backend 'torch' runs there"
        )
    return functools.partial(_launch, name)


def _listed(value) -> list:
    return value if isinstance(value, list) else [value]


def _with_scales(definition):
    """An operation as a custom op has it: guidance_scale is a float, unless there are scales (b,).

    A schema knows no type that is a number or a tensor, and a number made a tensor is a launch.
    """
    signature = inspect.signature(definition)
    scale = signature.parameters["guidance_scale"].replace(annotation=float)
    scales = inspect.Parameter(
        "scales", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=Tensor | None
    )

    parameters = {**signature.parameters, "guidance_scale": scale, "scales": scales}

    def op(*args, **kwargs):
        given = dict(zip(parameters, args, strict=False)) | kwargs
        scales = given.pop("scales", None)
        if scales is not None:
            given["guidance_scale"] = scales
        return definition(**given)

    op.__signature__ = signature.replace(parameters=list(parameters.values()))
    op.__annotations__ = {name: x.annotation for name, x in parameters.items()}
    op.__annotations__["return"] = signature.return_annotation
    return op


def _define(name: str, fake=None) -> None:
    """Register ``torch.ops.scfg.<name>``: the reference, Triton on CUDA, a fake for tracing.

    The reference is its own fake unless it would be traced into more than shapes.
    """
    definition = getattr(reference, name)
    names = list(inspect.signature(definition).parameters)

    def twin(*args, **kwargs):
        given = (x for value in (*args, *kwargs.values()) for x in _listed(value))
        tensor = next(x for x in given if isinstance(x, Tensor))
        if not supported(tensor.device):
            return definition(*args, **kwargs)
        return _launch(name, **dict(zip(names, args, strict=False)), **kwargs)

    if "guidance_scale" in names:
        definition, twin = _with_scales(definition), _with_scales(functools.wraps(definition)(twin))
    op = torch.library.custom_op(f"scfg::{name}", definition, mutates_args=())
    op.register_kernel("cuda")(twin)
    op.register_fake(definition if fake is None else fake)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake_apply(q, k, columns, heads):
    return columns.new_empty(columns.shape, dtype=_wide(columns))


def _fake_region_sums(eps_uncond, eps_text, labels, foreground, token_count, factor):
    b, _, height, width = eps_text.shape
    on_gpu = eps_text.is_cuda and supported(eps_text.device)
    parts = 1
    if on_gpu:
        parts = importlib.import_module("csrc_triton.guidance").partials(height * width)
    return eps_text.new_empty((b, parts, token_count + 1, 2), dtype=_wide(eps_text))


def _fake_guide(eps_uncond, eps_text, *args, **kwargs):
    b, _, height, width = eps_text.shape
    rate = eps_text.new_empty((b, 1, height, width), dtype=_wide(eps_text))
    return eps_text.new_empty(eps_text.shape), rate


def _fake_guide_evidence(eps_uncond, eps_text, text, front, h, w, *args, **kwargs):
    b = eps_text.shape[0]
    labels = eps_text.new_empty((b, h, w), dtype=torch.int64)
    foreground, flat = labels.to(torch.bool), labels.new_empty((b,), dtype=torch.bool)
    return *_fake_guide(eps_uncond, eps_text), labels, foreground, flat


for _name in (
    "attention_map",
    "attention_maps",
    "stacked_maps",
    "joint_maps",
    "propagate",
    "complete",
    "segment",
):
    _define(_name)
_define("attention_apply", _fake_apply)
_define("region_sums", _fake_region_sums)
_define("guide", _fake_guide)
_define("guide_evidence", _fake_guide_evidence)
