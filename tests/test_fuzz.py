"""Whatever is given: it works, or a documented error names what is out of place."""

import contextlib
import io
import math
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tiny_unet

import scfg
from scfg import __main__ as cli
from scfg import commands, ops
from scfg.adapters.diffusers import attach
from scfg.adapters.k_diffusion import denoiser
from scfg.adapters.modular import SemanticGuidance
from scfg.drawing.generate import Request
from scfg.models.embedded import WEIGHTS, load_model
from scfg.recording.phrases import fit_weights
from scfg.recording.predictor import Predictor
from scfg.recording.run import Run

JUNK = [None, True, False, 0, 1, -1, 4, 6, 0.5, 1.5, -0.5, math.nan, math.inf, 1e300, 1e-50]
JUNK += [
    1e40,
    2j,
    "",
    "paper",
    "auto",
    b"x",
    [],
    [0],
    (),
    (1, "a"),
    {},
    {"a": 1.0},
    set(),
    object(),
]
JUNK += [np.float32(1.5), np.int64(2), torch.tensor(1.0), torch.ones(3), torch.ones(2, dtype=bool)]


def whole(x):
    return type(x) is int and x >= 1


def number(x, low, high):
    return type(x) in (int, float, np.float64) and low <= x <= high


def one_of(*known):
    return lambda x: type(x) is str and x in known


def some_layers(x):
    named = type(x) in (tuple, list) and x and all(type(i) in (int, str) for i in x)
    return x is None or (type(x) is str and x == "auto") or named


FLOATS = 2.0**-126, 2.0**126
FIELDS = {  # as SCFGConfig documents them: what is allowed, and some values that are
    "map_reduction": (lambda x: whole(x) and x.bit_count() == 1, [1, 2, 4]),
    "coarsest_reduction": (lambda x: whole(x) and x.bit_count() == 1, [4, 8, 64]),
    "propagation": (one_of("paper", "official", "none"), ["official"]),
    "propagation_steps": (whole, [1, 9]),
    "foreground": (one_of("uncond", "cond"), ["cond"]),
    "benchmark": (one_of("auto", "foreground", "image"), ["image"]),
    "layers_per_level": (lambda x: x is None or whole(x), [3]),
    "rate_min": (lambda x: number(x, *FLOATS), [0.1, 1]),
    "rate_max": (lambda x: number(x, *FLOATS), [2.5, 9]),
    "max_scale": (lambda x: x is None or number(x, *FLOATS), [15]),
    "layers": (some_layers, [(0, "a.b")]),
    "joint": (one_of("renormalise", "raw"), ["raw"]),
    "min_share": (lambda x: number(x, 0, 1) and x < 1, [0.0, 0.25]),
    "min_peak": (lambda x: number(x, 0, 1e308), [2.5]),
}


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(st.sampled_from(good), st.sampled_from(JUNK))
            for name, (_, good) in FIELDS.items()
        },
    )
)
def test_constants_are_as_documented_or_the_error_names_one_that_is_not(fields):
    bad = [name for name, value in fields.items() if not FIELDS[name][0](value)]
    default = scfg.SCFGConfig()
    at = {name: fields.get(name, getattr(default, name)) for name in FIELDS}
    for low, high in (("rate_min", "rate_max"), ("map_reduction", "coarsest_reduction")):
        if low not in bad and high not in bad and at[low] > at[high]:
            bad.append(high)
    if not bad:
        scfg.SCFGConfig(**fields)
        return
    with pytest.raises(ValueError) as error:
        scfg.SCFGConfig(**fields)
    assert str(error.value).split()[0] in bad


B, T, H, W, R = 2, 5, 6, 10, 2
N = (H // R) * (W // R)
make = torch.Generator().manual_seed(0)
EPS = torch.randn(2, B, 4, H, W, generator=make)
SELF, CROSS = (torch.rand(2 * B, N, m, generator=make).softmax(-1) for m in (N, T))
Q, K = torch.randn(2, B, N, 8, generator=make)
TEXT, LEVEL = torch.randn(B, T, 8, generator=make), torch.rand(B, N, T + 1, generator=make)
LABELS = torch.randint(T, (B, H // R, W // R), generator=make)
CONFIG = scfg.SCFGConfig(map_reduction=R, coarsest_reduction=R)
NET, MODEL = tiny_unet(), tiny_model()
EPSILONS = dict(eps_uncond=EPS[0], eps_text=EPS[1])
LEVELS = dict(text=[LEVEL], front=[LEVEL], h=H // R, w=W // R, factors=[1])
SCHEDULE = scfg.sampling.scaled_linear()
LOOP = dict(config=CONFIG, backend="torch", token_weights=None, start=0.0, stop=1.0, every=1)
SAMPLER = dict(x=EPS[0], steps=3, spacing="leading", generator=None)


def attached(**options):
    with attach(SimpleNamespace(unet=NET, encode_prompt=len, tokenizer=None), **options):
        pass


def sampled(sampler, **arguments):
    return sampler(lambda x, t: x, schedule=SCHEDULE, **arguments)


CALLS = {  # a call that works of each function, with every argument
    "semantic_cfg": (scfg.semantic_cfg, dict(
        **EPSILONS, self_maps=[SELF], cross_maps=[CROSS], guidance_scale=5.0, config=CONFIG,
        backend="torch", token_weights=torch.ones(T),
    )),
    "cfg": (scfg.cfg, dict(**EPSILONS, guidance_scale=5.0)),
    "attention_map": (ops.attention_map, dict(q=Q, k=TEXT, heads=2, key_bias=None, backend="auto")),
    "attention_maps": (ops.attention_maps, dict(
        q_self=Q, k_self=K, q_cross=Q, k_cross=TEXT, heads=2, key_bias=None, backend="torch",
    )),
    "stacked_maps": (ops.stacked_maps, dict(
        q_self=[Q], k_self=[K], q_cross=[Q], k_cross=[TEXT], heads=2, key_bias=[None],
        backend="torch",
    )),
    "joint_maps": (ops.joint_maps, dict(
        q=Q, k=torch.cat([TEXT, K], 1), token_count=T, heads=2, key_bias=None, joint="raw",
        backend="torch",
    )),
    "attention_apply": (ops.attention_apply, dict(
        q=Q, k=K, columns=CROSS[:B], heads=2, backend="torch",
    )),
    "propagate": (ops.propagate, dict(
        self_map=SELF, columns=CROSS, propagation="paper", powers=2, backend="torch",
    )),
    "complete": (ops.complete, dict(
        self_map=SELF[:B], cross_map=CROSS[:B], weights=torch.ones(N), total=LEVEL,
        propagation="official", powers=2, backend="torch",
    )),
    "segment": (ops.segment, dict(**LEVELS, backend="torch")),
    "region_sums": (ops.region_sums, dict(
        **EPSILONS, labels=LABELS, foreground=LABELS > 1, token_count=T, factor=R, backend="torch",
    )),
    "guide": (ops.guide, dict(
        **EPSILONS, labels=LABELS, sums=torch.ones(B, 1, T + 1, 2), guidance_scale=5.0, factor=R,
        benchmark="image", rate_min=0.8, rate_max=3.0, max_scale=15.0, token_weights=None,
        backend="torch",
    )),
    "guide_evidence": (ops.guide_evidence, dict(
        **EPSILONS, **LEVELS, guidance_scale=5.0, factor=R, benchmark="image", rate_min=0.8,
        rate_max=3.0, max_scale=15.0, token_weights=None, backend="torch",
    )),
    "fit_weights": (lambda token_weights: fit_weights(token_weights, B, T), dict(
        token_weights=torch.ones(T),
    )),
    "Run": (Run, dict(config=CONFIG, backend="torch", start=0.0, stop=1.0, every=1)),
    "guided": (scfg.guided, dict(unet=NET, guidance_scale=5.0, timesteps=[9.0, 5.0], **LOOP)),
    "denoiser": (denoiser, dict(
        model=NET, guidance_scale=5.0, sigmas=torch.tensor([9.0, 0.0]), unet=NET, **LOOP,
    )),
    "attach": (attached, dict(guidance_scale=5.0, **LOOP)),
    "guider": (SemanticGuidance, dict(guidance_scale=5.0, start=0.0, stop=1.0, backend="torch")),
    "UNetWrapper": (scfg.UNetWrapper, dict(
        model=NET, config=CONFIG, backend="torch", order=("uncond", "text"),
    )),
    "ddim": (partial(sampled, scfg.sampling.ddim), dict(**SAMPLER, eta=0.0)),
    "dpmpp_2m": (partial(sampled, scfg.sampling.dpmpp_2m), SAMPLER),
    "timesteps": (SCHEDULE.timesteps, dict(steps=5, spacing="leading")),
    "Request": (partial(Request, ("a",), (0,), 2.0), dict(method="cfg", sampler="ddim")),
}  # fmt: skip


@st.composite
def mistakes(draw):
    """A call, its arguments, and one of them replaced."""
    name = draw(st.sampled_from(sorted(CALLS)))
    arguments = CALLS[name][1]
    which = draw(st.sampled_from(sorted(arguments)))
    right, wrong = arguments[which], list(JUNK)
    listed = isinstance(right, list) and right and torch.is_tensor(right[0])
    x = right[0] if listed else right
    if torch.is_tensor(x):
        near = [x[:1], x[:, :0] if x.dim() > 1 else x[:0], x.double(), x.int(), x.bool(), x[None]]
        near += [x * math.nan, torch.cat([x, x])]
        wrong = [*wrong, *near] + ([[y] for y in near] + [[None], ["x"]] if listed else [])
    return name, which, draw(st.sampled_from(wrong))


@given(mistakes())
@settings(max_examples=5 * settings.default.max_examples)
def test_an_argument_works_or_is_named(mistake):
    name, which, wrong = mistake
    function, arguments = CALLS[name]
    try:
        made = function(**{**arguments, which: wrong})
    except (ValueError, TypeError, RuntimeError) as error:
        names = {which.rstrip("s"), *(f"{other} must" for other in arguments)}
        said = str(error).replace("[0]", "").replace("unet must", "unet (model) must")
        assert any(n in said for n in names), f"{name}({which}={wrong!r}) says {error!r}"
    else:
        if isinstance(made, (scfg.UNetWrapper, Predictor)):
            made.remove()


def load(path, device):
    return MODEL if path == WEIGHTS else load_model(path, device)


def maybe(*values):
    return st.sampled_from(["", "-1", "0", "0.5", "1", "2", "nan", "inf", "x", "1e9", *values])


OPTIONS = {
    "--seed": maybe("99999999999999999999"), "--count": st.sampled_from(["1", "0", "x", "1.5"]),
    "--steps": st.sampled_from(["1", "2", "0", "-3", "1001", "x", "1e3"]),
    "--guidance-scale": maybe("1e300"), "--sampler": maybe("euler", "dpmpp_2m"),
    "--method": maybe("cfg", "scfg"), "--propagation": maybe("none"), "--backend": maybe("torch"),
    "--token-weight": maybe("red=2", "red=0", "=2", "penguin=nan", "moon=2", "a red=1.5"),
    "--start": maybe(), "--stop": maybe(), "--every": maybe(), "--out": maybe("a.png", "a.txt"),
    "--trace": maybe("a.png", "t"), "--html": maybe("a.html", "."), "--model": maybe(),
    "--weights": maybe("."), "--model-config": maybe(),
}  # fmt: skip
WORDS = ["a red penguin", "", "red", "a moon", "PENGUIN!", "a" * 300, "red " * 100, "\0", "-"]


@given(
    st.sampled_from(WORDS),
    st.fixed_dictionaries({}, optional=OPTIONS),
)
@settings(max_examples=max(1, settings.default.max_examples // 2))
def test_a_command_draws_or_says_what_is_wrong_with_it(prompt, options):
    asked = {"--method": "cfg", "--steps": "1", **options}
    line = [text for name, value in asked.items() for text in (name, value)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(commands, "load_model", load)
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            try:
                status = cli.main(["generate", prompt, "--quiet", *line])
            except SystemExit as stop:
                status = stop.code
        if status == 0:
            assert Path(asked.get("--out", "out.png")).stat().st_size and not errors.getvalue()
        else:
            said = errors.getvalue().replace("_", "-")
            names = {name.strip("-") for name in asked} | {
                "prompt",
                "word",
                "phrase",
                "file",
                "exist",
            }
            assert status == 2 and any(name in said for name in names), said
