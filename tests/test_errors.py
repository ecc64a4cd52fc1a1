"""Wrong arguments are errors of the documented type that name the argument; runs do not meet."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_recording import build

import scfg
from scfg import ops
from scfg.adapters.diffusers import attach
from scfg.adapters.k_diffusion import denoiser
from scfg.adapters.modular import SemanticGuidance
from scfg.models.unet import UNet
from scfg.recording.phrases import fit_weights
from scfg.recording.run import Run
from scfg.sampling import dpmpp_2m, scaled_linear

B, T, H, W = 2, 5, 8, 12
EPS = torch.randn(2, B, 4, H, W, generator=torch.Generator().manual_seed(0))
LABELS = torch.zeros(B, H, W, dtype=torch.int64)
SUMS = torch.ones(B, 1, T + 1, 2)
MAP = torch.full((2 * B, H * W, H * W), 1 / (H * W))
CROSS = torch.full((2 * B, H * W, T), 1 / T)
CONFIG = scfg.SCFGConfig(map_reduction=1, coarsest_reduction=1)


def semantic(scale=5.0, weights=None, self_map=MAP):
    return scfg.semantic_cfg(*EPS, [self_map], [CROSS], scale, CONFIG, token_weights=weights)


def by_regions(weights):
    net, (x, t, context), _ = build("own")
    with scfg.UNetWrapper(net, scfg.SCFGConfig(map_reduction=1, coarsest_reduction=1)) as unet:
        return unet.guide(*unet(x, t, context).chunk(2), 5.0, token_weights=weights)


def region_sums(labels=LABELS, factor=1):
    return ops.region_sums(*EPS, labels, LABELS == 0, T, factor)


def guide(labels=LABELS, factor=1):
    return ops.guide(*EPS, labels, SUMS, torch.ones(B), factor)


LEVEL = torch.ones(B, H * W, T + 1)
REFUSED = {
    "weights a list": (lambda: semantic(weights=[1.0] * T), TypeError, "token_weights must be a t"),
    "weights a dict": (lambda: semantic(weights={}), TypeError, "token_weights must be a tensor"),
    "weights bool": (lambda: semantic(weights=torch.ones(T) > 0), TypeError, "token_weights must"),
    "weights 0-d": (lambda: semantic(weights=torch.tensor(1.0)), ValueError, r"must be \(5,\) or"),
    "weights short": (lambda: semantic(weights=torch.ones(2)), ValueError, r"got \(2,\)"),
    "weights rows": (lambda: semantic(weights=torch.ones(3, T)), ValueError, r"got \(3, 5\)"),
    "fit empty": (lambda: fit_weights(torch.ones(0, T), 4, T), ValueError, "token_weights must be"),
    "fit 0-d": (lambda: fit_weights(torch.tensor(1.0), 4, T), ValueError, "token_weights must be"),
    "fit rows": (
        lambda: fit_weights(torch.ones(3, T), 4, T),
        ValueError,
        "has 3 rows, for a batch",
    ),
    "fit long": (lambda: fit_weights(torch.full((9,), 2.0), 4, T), ValueError, "at most 5 tokens"),
    "scale big": (lambda: semantic(1e300), ValueError, "guidance_scale must be finite and > 0"),
    "scale small": (lambda: semantic(1e-50), ValueError, "guidance_scale must be finite and > 0"),
    "scale text": (lambda: semantic("7"), TypeError, "guidance_scale must be a number"),
    "two types": (lambda: semantic(self_map=MAP.double()), TypeError, "must have one dtype"),
    "factor 0": (lambda: guide(factor=0), ValueError, "factor must be an int >= 1, got 0"),
    "sums factor 0": (
        lambda: region_sums(factor=0),
        ValueError,
        "factor must be an int >= 1, got 0",
    ),
    "labels high": (
        lambda: guide(LABELS + T),
        ValueError,
        r"labels must be in \[0, 5\), got 5 to 5",
    ),
    "labels low": (lambda: region_sums(LABELS - 1), ValueError, r"labels must be in \[0, 5\)"),
    "no front": (lambda: ops.segment([LEVEL], None, H, W, [1]), TypeError, "front must be a list"),
    "front None": (lambda: ops.segment([LEVEL], [None], H, W, [1]), TypeError, r"front\[0\] must"),
    "factors 0": (
        lambda: ops.segment([LEVEL], [LEVEL], H, W, [0]),
        ValueError,
        r"factors\[0\] must",
    ),
    "every": (lambda: Run(CONFIG, every=True), ValueError, "every must be an int >= 1, got True"),
    "rate_max": (lambda: scfg.SCFGConfig(rate_max=1e308), ValueError, "rate_max must be finite"),
    "reduction": (lambda: scfg.SCFGConfig(map_reduction=True), ValueError, "map_reduction must be"),
    "layers": (lambda: scfg.SCFGConfig(layers_per_level=True), ValueError, "layers_per_level must"),
    "half a step": (lambda: scaled_linear().timesteps(2.5, "leading"), ValueError, "got 2.5"),
    "all steps": (
        lambda: dpmpp_2m(None, EPS[0], scaled_linear(), 1000, spacing="linspace"),
        ValueError,
        "steps must be 1 to 999 with 'linspace' spacing, got 1000",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_argument_out_of_place_is_named(case):
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call()


NET = build("own")[0]
CONSTRUCTORS = {
    "UNetWrapper": scfg.UNetWrapper,
    "guided": lambda net, config=CONFIG, **options: scfg.guided(net, 7.5, config, **options),
    "denoiser": lambda net, config=CONFIG, **options: denoiser(net, 7.5, config, **options),
    "attach": lambda net, config=CONFIG, **options: attach(net, 7.5, config, **options),
    "guider": lambda net, config=None, **options: SemanticGuidance(7.5, **options),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constants_and_backend_are_looked_at_when_a_thing_is_made(name):
    make = CONSTRUCTORS[name]
    with pytest.raises(ValueError, match="backend must be one of .* got 'cuda'"):
        make(NET, backend="cuda")
    if name in ("guided", "denoiser"):
        with make(NET, backend="torch") as made:
            assert made.unet.backend == "torch"
    if name != "guider":  # takes a dict, as JSON has it
        for wrong in ({"rate_max": 2.0}, 7.5):
            with pytest.raises(TypeError, match="config must be a scfg.SCFGConfig, got"):
                make(NET, wrong)


def test_weights_of_phrases_are_refused_where_no_prompt_is_seen():
    for make in (scfg.guided, denoiser, lambda net, **weights: SemanticGuidance(**weights)):
        with pytest.raises(TypeError, match="got phrases, and here no prompt is seen"):
            make(NET, token_weights={"blue square": 1.5})


@pytest.mark.parametrize("scale", [0, -1.0, math.nan])
def test_a_guider_refuses_a_scale_that_is_none_when_it_is_made(scale):
    with pytest.raises(ValueError, match="guidance_scale must be finite and > 0"):
        SemanticGuidance(scale)


def test_conditions_have_a_row_for_each_image():
    x, context = torch.randn(2, 4, 16, 24), torch.randn(2, 7, 24)
    with scfg.guided(NET, 5.0, CONFIG) as guided:
        for conditions, name in (
            ((context[:1], context), "uncond"),
            ((context, context[:1]), "cond"),
        ):
            with pytest.raises(ValueError, match=f"{name} must have as many rows as x, 2, got 1"):
                guided(x, torch.tensor(3), *conditions)


def test_attach_without_a_block_says_that_it_did_nothing():
    with pytest.warns(UserWarning, match="acts inside a block only"):
        attach(NET)


@given(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -1.0]), st.integers(0, T - 1))
def test_weights_are_finite_and_positive_wherever_they_are_given(value, token):
    weights = torch.ones(T)
    weights[token] = value
    seven = torch.nn.functional.pad(weights, (0, 2), value=1.0)
    for call in (
        lambda: semantic(weights=weights),
        lambda: by_regions(seven),
        lambda: fit_weights(weights, 2, T),
    ):
        with pytest.raises(ValueError, match="token_weights must be finite and > 0"):
            call()


@given(st.integers(1, 100), st.integers(0, 100), st.integers(0, 100))
def test_a_window_holds_the_steps_it_names_and_two_make_a_whole(steps, first, end):
    first, end = sorted((first % (steps + 1), end % (steps + 1)))
    if first == end:
        return
    acts = {}
    for part in ((0, first), (first, end), (end, steps)):
        if part[0] < part[1]:
            run = Run(CONFIG, start=part[0] / steps, stop=part[1] / steps)
            for step in range(steps):
                if run.acts_at(step, steps):
                    assert step not in acts
                    acts[step] = part
    assert acts == {
        step: part for part in ((0, first), (first, end), (end, steps)) for step in range(*part)
    }


def test_an_empty_window_is_an_error():
    with pytest.raises(ValueError, match="must have a step of 20 between them"):
        Run(CONFIG, start=0.5, stop=0.51).acts_at(3, 20)


def test_a_size_at_which_levels_collide_does_not_meet_the_next():
    net = build("own")[0]
    assert isinstance(net, UNet)
    config = scfg.SCFGConfig(map_reduction=1, coarsest_reduction=4, layers_per_level=1)

    def call(unet, size):
        make = torch.Generator().manual_seed(sum(size))
        x, context = torch.randn(2, 4, *size, generator=make), torch.randn(2, 7, 24, generator=make)
        eps = unet(x, torch.tensor(3), context).chunk(2)
        return unet.guide(*eps, 5.0).labels, {layer.reduction for layer in unet.attention}

    with scfg.UNetWrapper(net, config) as fresh:
        expected, _ = call(fresh, (16, 16))
    with scfg.UNetWrapper(net, config) as unet:
        call(unet, (2, 2))
        for _ in range(2):
            labels, levels = call(unet, (16, 16))
            assert torch.equal(labels, expected)
            assert levels == {1, 2, 4}
    coarse = scfg.SCFGConfig(map_reduction=4, coarsest_reduction=4)
    with scfg.UNetWrapper(net, coarse) as fresh:
        expected, _ = call(fresh, (2, 2))
    with scfg.UNetWrapper(net, coarse) as unet:  # finer blocks now have the pixels of level 4
        call(unet, (16, 16))
        assert torch.equal(call(unet, (2, 2))[0], expected)


def test_a_run_of_another_picture_from_a_later_step_finds_its_own_regions():
    net, (x, _, context), _ = build("own")
    steps, seen = [9.0, 7.0, 5.0, 3.0], []
    other = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(9))
    options = dict(config=CONFIG, timesteps=steps, every=4, callback=seen.append)
    with scfg.guided(net, 5.0, **options) as guided:
        halves = context[:2], context[2:]
        for t in steps[:2]:
            guided(x[:2], torch.tensor(t), *halves)
        mixed = other[:2], other[2:]
        guided(x[2:] + 1, torch.tensor(steps[2]), *mixed)
    with scfg.guided(net, 5.0, CONFIG) as alone:
        alone.run.callback = seen.append
        alone(x[2:] + 1, torch.tensor(steps[2]), *mixed)
    assert torch.equal(seen[2].labels, seen[3].labels)
    assert not torch.equal(seen[2].labels, seen[1].labels)
