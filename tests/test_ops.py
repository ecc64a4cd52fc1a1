"""The custom ops are what torch.library asks for, dispatch as stated, and refuse what they must."""

import inspect

import pytest
import torch
from conftest import assert_close

import csrc_triton
import scfg
from scfg import backends, ops, reference


def arguments(dtype=torch.float32):
    """Positional arguments of every op, on shapes that divide nothing."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    q, k, text = rand(2, 35, 3 * 20), rand(2, 35, 3 * 20), rand(2, 7, 3 * 20)
    maps = rand(2, 35, 35).softmax(-1), rand(2, 35, 7).softmax(-1)
    weights = reference.spatial_weights(5, 7, 1).float()
    evidence = [rand(2, 35, 8).float(), rand(2, 12, 8).float()]
    u, c = rand(2, 4, 17, 25), rand(2, 4, 17, 25)
    labels = torch.randint(0, 7, (2, 5, 7), generator=g)
    foreground = labels > 2
    sums = torch.rand(2, 3, 8, 2, generator=g) + 0.5
    scale = torch.tensor([7.5, 2.0])
    image = ("image", 0.8, 3.0, None, torch.ones(2, 7))
    return {
        "attention_map": (q, text, 3, torch.zeros(2, 7)),
        "attention_maps": (q, k, q, text, 3, None),
        "stacked_maps": ([q, k], [k, q], [q, q], [text, text], 3, [torch.zeros(2, 7)] * 2),
        "attention_apply": (q, k, maps[1], 3),
        "joint_maps": (q, k, 7, 3, torch.zeros(2, 35)),
        "propagate": (*maps, "official", 4),
        "complete": (*maps, weights, rand(2, 35, 8).float(), "paper", 4),
        "segment": (evidence, evidence, 5, 7, [1, 2]),
        "region_sums": (u, c, labels, foreground, 7, 4),
        "guide": (u, c, labels, sums, scale, 4, *image),
        "guide_evidence": (u, c, evidence, evidence, 5, 7, [1, 2], 7.5, 4, *image),
    }


@pytest.mark.parametrize("name", csrc_triton.__all__)
def test_an_operation_has_the_parameters_and_defaults_of_its_definition(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (ops, reference))
    *own, backend = ours.values()
    assert own == list(theirs.values()) and str(backend) == "backend: str = 'auto'"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", arguments())
def test_opcheck(name, dtype):
    args, scales = list(arguments(dtype)[name]), {}
    if name == "guide":  # the op itself takes a number, or scales
        args[4], scales["scales"] = 1.0, args[4]
    tests = {} if dtype == torch.float32 else {"test_utils": "test_faketensor"}
    torch.library.opcheck(getattr(torch.ops.scfg, name), tuple(args), scales, **tests)


@pytest.mark.parametrize("name", arguments())
def test_auto_and_torch_agree_on_a_cpu_and_the_reference_is_differentiable(name):
    args = arguments()[name]
    auto, reference_result = getattr(ops, name)(*args), getattr(ops, name)(*args, backend="torch")
    results = (
        (auto, reference_result) if isinstance(auto, tuple) else ((auto,), (reference_result,))
    )
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    if name == "segment":
        return
    given = (x for value in args for x in (value if isinstance(value, list) else [value]))
    leaf = next(x for x in given if isinstance(x, torch.Tensor) and x.is_floating_point())
    leaf.requires_grad_()
    for backend in ("auto", "triton"):
        with pytest.raises(RuntimeError, match=f"{name} got a tensor that requires grad"):
            getattr(ops, name)(*args, backend=backend)
    out = getattr(ops, name)(*args, backend="torch")
    (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    assert leaf.grad.abs().max() > 0
    with torch.no_grad():
        getattr(ops, name)(*args)


def test_unknown_backend_is_named():
    args = arguments()["propagate"]
    with pytest.raises(ValueError, match="backend must be one of .* got 'cuda'"):
        ops.propagate(*args, backend="cuda")


def test_triton_that_cannot_run_raises(monkeypatch):
    args = arguments()["propagate"]
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, got cpu"):
        ops.propagate(*args, backend="triton")
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="triton, which is not installed"):
        ops.propagate(*args, backend="triton")


@pytest.mark.parametrize("name", arguments())
def test_kernels_refuse_what_they_would_round(name):
    wide = list(arguments(torch.float64)[name])
    if name == "segment":
        wide[:2] = [[level.double() for level in levels] for levels in wide[:2]]
    with pytest.raises(TypeError, match="accumulates in float32 and got a float64"):
        getattr(ops, name)(*wide, backend="triton")


def test_autocast_does_not_reach_the_operations():
    args = arguments()["propagate"]
    expected = ops.propagate(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.propagate(*args), expected)
        assert torch.equal(ops.propagate(*args, backend="torch"), expected)


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("attention_map", 1, torch.randn(2, 7, 59), r"k must have shape \(2, m, 60\)"),
        ("attention_map", 2, 7, "heads must divide the width 60"),
        ("attention_map", 3, torch.zeros(2, 8), r"key_bias must have shape \(2, 7\)"),
        ("joint_maps", 2, 35, "token_count must be 1 to 34"),
        ("joint_maps", 4, torch.zeros(2, 28), r"key_bias must have shape \(2, 35\)"),
        ("propagate", 0, None, "self_map must be a tensor"),
        ("propagate", 2, "all", "propagation must be"),
        ("propagate", 3, 0, "powers must be an int >= 1"),
        ("complete", 2, torch.ones(34), r"weights must have shape \(35\)"),
        ("complete", 3, torch.ones(2, 35, 7), r"total must have shape \(2, 35, 8\)"),
        ("segment", 4, [1], "one entry per level"),
        ("segment", 2, 9, r"text\[0\] must have shape \(2, 63, 8\)"),
        ("region_sums", 2, torch.zeros(2, 5, 6, dtype=torch.int64), r"labels must have shape"),
        ("guide", 2, torch.full((2, 5, 7), 7), r"labels must be in \[0, 7\)"),
        ("region_sums", 2, torch.full((2, 5, 7), -1), r"labels must be in \[0, 7\)"),
        ("guide_evidence", 4, 6, r"text\[0\] must have shape"),
        ("guide", 4, torch.ones(3), r"guidance_scale must be a float or \(2,\)"),
        ("guide", 10, torch.ones(2, 8), r"token_weights must have shape \(2, 7\)"),
    ],
)
def test_bad_arguments_are_named(name, position, value, message):
    args = list(arguments()[name])
    args[position] = value
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(*args)


def test_labels_must_be_int64():
    args = list(arguments()["region_sums"])
    args[2] = args[2].int()
    with pytest.raises(TypeError, match="labels must be int64"):
        ops.region_sums(*args)


def test_semantic_cfg_compiles_into_one_graph():
    g = torch.Generator().manual_seed(1)
    u, c = torch.randn(2, 1, 4, 20, 28, generator=g).unbind(0)
    self_maps = [torch.randn(2, 35, 35, generator=g).softmax(-1)]
    cross_maps = [(3 * torch.randn(2, 35, 6, generator=g)).softmax(-1)]
    expected = scfg.semantic_cfg(u, c, self_maps, cross_maps, 5.0)
    compiled = torch.compile(scfg.semantic_cfg, fullgraph=True, backend="aot_eager")
    actual = compiled(u, c, self_maps, cross_maps, 5.0)
    assert torch.equal(actual.labels, expected.labels)
    assert_close(actual=actual.eps, expected=expected.eps, share=1e-5)


def test_every_operation_is_registered_for_cuda():
    for name in arguments():
        keys = torch._C._dispatch_dump(f"scfg::{name}")
        assert "CUDA" in keys, name
