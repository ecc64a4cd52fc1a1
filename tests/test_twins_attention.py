"""Attention and propagation in Triton equal their torch definitions, bit for bit reproducibly."""

from importlib import import_module

import pytest
import torch
from conftest import DEVICE, assert_close

import csrc_triton
from scfg import reference

attention = import_module("csrc_triton.attention")
propagate = import_module("csrc_triton.evidence")  # the package exports a function of that name

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(  # the interpreter's bfloat16 products are wrong
        torch.bfloat16, id="bf16", marks=pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
    ),
]
PROPAGATIONS = ["paper", "official", "none"]


def twin(name):
    return getattr(csrc_triton, name)


def rand(seed, *shape, dtype=torch.float32):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype)


def maps(b, n, t, dtype=torch.float32):
    """A self map as peaked as real ones, and a cross map that differs over space even for t = 1."""
    self_map = (2 * rand(0, b, n, n)).softmax(-1)
    cross_map = rand(1, b, n, t + 1).softmax(-1)[..., :t].contiguous()
    return self_map.to(dtype), cross_map.to(dtype)


def weights(n):
    """Float32, as those of the library."""
    return (reference.spatial_weights(n // 5, 5, 1) if n % 5 == 0 else uneven(n)).float().to(DEVICE)


def uneven(n):
    x = torch.arange(1.0, n + 1, dtype=torch.float64)
    return x / x.sum()


def tuple_of(x):
    return x if isinstance(x, tuple) else (x,)


def check(name, *args):
    """Error against float64 at most twice that of torch on the same inputs, plus 1e-6 of scale."""
    doubles = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args
    ]
    exact, plain = (tuple_of(getattr(reference, name)(*x)) for x in (doubles, args))
    results = tuple_of(twin(name)(*args))
    for index, (actual, expected, torch_twin) in enumerate(zip(results, exact, plain, strict=True)):
        assert actual.dtype == torch.float32
        share = 2 * ((torch_twin - expected).abs().max() / expected.abs().max()).item() + 1e-6
        assert_close(actual=actual, expected=expected, share=share, what=f"{name}[{index}]")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "b, n, m, heads, d, bias",
    [
        (1, 35, 1, 1, 24, None),
        (3, 35, 20, 3, 40, "masked"),
        (1, 20, 77, 8, 160, None),
        (2, 35, 154, 2, 80, "masked"),
        (1, 99, 35, 5, 64, None),
        (2, 20, 35, 1, 24, "lowest"),
        (2, 20, 1100, 2, 24, "masked"),  # in two passes, as the next
        (1, 20, 1100, 1, 40, "lowest"),
    ],
)
def test_attention_map(b, n, m, heads, d, bias, dtype):
    q, k = rand(0, b, n, heads * d, dtype=dtype), rand(1, b, m, heads * d, dtype=dtype)
    key_bias = None
    if bias == "masked":
        key_bias = rand(2, b, m)
        key_bias[0, m // 3 :] = float("-inf")
        key_bias[1, : m - 1] = float("-inf")  # whole blocks of keys masked before the only one left
    if bias == "lowest":  # as hosts mask: every key, so all are equally likely
        key_bias = torch.full((b, m), torch.finfo(torch.float32).min, device=DEVICE)
    check("attention_map", q, k, heads, key_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "b, n, t, heads, d, masked",
    [
        (1, 35, 20, 3, 40, False),
        (2, 35, 77, 1, 160, True),
        (3, 20, 1, 1, 64, False),
        (1, 99, 154, 2, 24, True),
        (1, 20, 1100, 1, 24, True),
        (1, 530, 20, 1, 24, False),
    ],
)
def test_attention_maps(b, n, t, heads, d, masked, dtype):
    q_self, k_self, q_cross = (rand(i, b, n, heads * d, dtype=dtype) for i in range(3))
    k_cross = rand(3, b, t, heads * d, dtype=dtype)
    key_bias = None
    if masked:
        key_bias = torch.zeros(b, t, device=DEVICE)
        key_bias[0, t // 2 :] = float("-inf")
    check("attention_maps", q_self, k_self, q_cross, k_cross, heads, key_bias)


@pytest.mark.parametrize(
    "layers, b, masked",  # one launch takes eight layers
    [(1, 2, True), (3, 2, False), (9, 1, True)],
)
def test_stacked_maps_are_those_of_each_layer_bit_for_bit(layers, b, masked):
    n, t, heads, d = 20, 35, 2, 24
    blocks = [
        [rand(10 * i + j, b, m, heads * d) for j, m in enumerate((n, n, n, t))]
        for i in range(layers)
    ]
    biases = [rand(i, b, t) if masked else None for i in range(layers)]
    q_self, k_self, q_cross, k_cross = (list(x) for x in zip(*blocks, strict=True))
    both = attention.stacked_maps(q_self, k_self, q_cross, k_cross, heads, biases)
    for layer, (block, bias) in enumerate(zip(blocks, biases, strict=True)):
        alone = attention.attention_maps(*block, heads, bias)
        assert all(torch.equal(x[layer], y) for x, y in zip(both, alone, strict=True))
    expected = reference.stacked_maps(q_self, k_self, q_cross, k_cross, heads, biases)
    for actual, exact in zip(both, expected, strict=True):
        assert_close(actual=actual, expected=exact, share=1e-6)


@pytest.mark.parametrize("small_n", [384, 16], ids=["one-launch", "launch-per-power"])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("total", [None, rand(2, 2, 35, 21).abs()], ids=["first", "more"])
def test_layers_completed_together_are_added_in_order_bit_for_bit(
    total, propagation, small_n, monkeypatch
):
    monkeypatch.setattr(propagate, "chosen", lambda name, reasoned: small_n)
    self_map, cross_map = (x.view(3, 2, 35, -1) for x in maps(6, 35, 20))
    both = propagate.complete(self_map, cross_map, weights(35), total, propagation, 3)
    check("complete", self_map, cross_map, weights(35), total, propagation, 3)
    for layer in range(3):
        one = self_map[layer], cross_map[layer]
        total = propagate.complete(*one, weights(35), total, propagation, 3)
    assert torch.equal(both, total)


@pytest.mark.parametrize("joint", ["renormalise", "raw"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "b, n, m, t, heads, d, bias",
    [
        (2, 35, 35, 7, 3, 40, "masked"),
        (1, 20, 99, 77, 1, 64, None),  # some rows of a larger map
        (2, 35, 20, 1, 2, 24, "text"),
        (1, 20, 1100, 20, 2, 24, "masked"),  # in two passes, as the next
        (2, 35, 20, 1100, 1, 40, None),
    ],
)
def test_joint_maps(b, n, m, t, heads, d, bias, dtype, joint):
    q, k = rand(0, b, n, heads * d, dtype=dtype), rand(1, b, t + m, heads * d, dtype=dtype)
    key_bias = None
    if bias == "masked":
        key_bias = rand(2, b, t + m)
        key_bias[0, t // 3 : t] = float("-inf")
    if bias == "text":  # nothing but text is seen
        key_bias = rand(2, b, t + m)
        key_bias[0, t:] = float("-inf")
    check("joint_maps", q, k, t, heads, key_bias, joint)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "b, n, m, t, heads, d",
    [(2, 99, 99, 20, 3, 40), (1, 35, 35, 154, 1, 160), (3, 20, 35, 1, 1, 64)],
)  # fmt: skip
def test_attention_apply(b, n, m, t, heads, d, dtype):
    q, k = rand(0, b, n, heads * d, dtype=dtype), rand(1, b, m, heads * d, dtype=dtype)
    check("attention_apply", q, k, rand(2, b, m, t).abs().to(dtype), heads)


@pytest.mark.parametrize("small_n", [384, 16], ids=["one-launch", "launch-per-power"])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b, n, t", [(3, 35, 20), (1, 99, 77), (2, 35, 1), (1, 20, 154)])
class TestPropagation:
    def test_propagate(self, b, n, t, dtype, propagation, small_n, monkeypatch):
        monkeypatch.setattr(propagate, "chosen", lambda name, reasoned: small_n)
        check("propagate", *maps(b, n, t, dtype), propagation, 4)

    def test_complete(self, b, n, t, dtype, propagation, small_n, monkeypatch):
        monkeypatch.setattr(propagate, "chosen", lambda name, reasoned: small_n)
        total = None if propagation == "official" else rand(2, b, n, t + 1).abs()
        check("complete", *maps(b, n, t, dtype), weights(n), total, propagation, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_complete_in_one_launch_over_several_row_blocks(dtype):
    check("complete", *maps(1, 270, 20, dtype), weights(270), rand(2, 1, 270, 21), "official", 4)


def test_complete_without_propagation_needs_no_self_map_and_keeps_an_empty_column():
    cross_map = maps(2, 35, 20)[1]
    cross_map[0, :, 3] = 0
    check("complete", None, cross_map, weights(35), None, "none", 4)
    check("propagate", None, cross_map, "none", 4)
    assert twin("complete")(None, cross_map, weights(35), None, "none")[0, :, 3].eq(0).all()


def images():
    """Every launcher with the arguments for three images, batched tensors first, then the rest."""
    b, n, t = 3, 20, 35
    pixels, tokens, bias = rand(0, b, n, 2 * 24), rand(1, b, t, 2 * 24), rand(2, b, t)
    self_map, cross_map = maps(b, n, t)
    evidence = [self_map, cross_map, weights(n), rand(3, b, n, t + 1)]
    return {
        "attention_map": (pixels, tokens, 2, bias),
        "attention_map two passes": (rand(0, b, n, 16), rand(1, b, 530, 16), 1),
        "attention_maps": (pixels, pixels, pixels, tokens, 2, bias),
        "attention_apply": (pixels, pixels, cross_map, 2),
        "joint_maps": (pixels, tokens, 15, 2, bias),
        "joint_maps two passes": (rand(0, b, n, 16), rand(1, b, 530, 16), 13, 1),
        "propagate": (self_map, cross_map),
        "propagate per power": (self_map, cross_map),
        "complete": (*evidence,),
        "complete per power": (*evidence,),
    }


@pytest.fixture(params=images())
def launch(request, monkeypatch):
    """A launcher and its arguments; the large path of propagation where the name says so."""
    if "per power" in request.param:
        monkeypatch.setattr(propagate, "chosen", lambda name, reasoned: 16)
    return twin(request.param.split()[0]), images()[request.param]


def batched(x):
    return isinstance(x, torch.Tensor) and x.dim() > 1


def test_an_image_is_the_same_alone_and_beside_a_broken_one(launch):
    function, args = launch
    alone = tuple_of(function(*[x[:1].contiguous() if batched(x) else x for x in args]))
    for index, x in enumerate(args):
        if not batched(x):
            continue
        broken = list(args)
        broken[index] = x.clone()
        broken[index][1] = float("nan")
        for result, expected in zip(tuple_of(function(*broken)), alone, strict=True):
            assert torch.equal(result[:1], expected)
            assert torch.isfinite(result[2]).all()


def test_the_same_inputs_give_the_same_bits(launch):
    function, args = launch
    for first, second in zip(tuple_of(function(*args)), tuple_of(function(*args)), strict=True):
        assert torch.equal(first.view(torch.int32), second.view(torch.int32))


def test_every_input_that_requires_grad_is_refused(launch):
    function, args = launch
    for index, x in enumerate(args):
        if isinstance(x, torch.Tensor):
            tracked = [y.clone().requires_grad_() if i == index else y for i, y in enumerate(args)]
            with pytest.raises(RuntimeError, match="scfg.reference"):
                function(*tracked)


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, counts):
        self.kernel, self.counts = kernel, counts

    def __getitem__(self, grid):
        self.counts.append(self.kernel.__name__)
        return self.kernel[grid]


@pytest.mark.parametrize("small_n, launches", [(35, 2), (34, 6)])
def test_a_layer_takes_two_launches_or_one_per_power_and_two(small_n, launches, monkeypatch):
    monkeypatch.setattr(propagate, "chosen", lambda name, reasoned: small_n)
    counts = []
    for module in (attention, propagate):
        for name in dir(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Counted(getattr(module, name), counts))
    pixels, tokens = rand(0, 1, 35, 24), rand(1, 1, 20, 24)
    both = attention.attention_maps(pixels, pixels, pixels, tokens, 1)
    propagate.complete(*both, weights(35), None)
    assert len(counts) == launches
