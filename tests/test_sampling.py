"""Samplers against diffusers' schedulers, step by step, and against closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from diffusers.guiders.guider_utils import rescale_noise_cfg

from scfg.methods.rescale import rescale
from scfg.sampling import Schedule, ddim, dpmpp_2m, euler, euler_ancestral
from scfg.sampling import scaled_linear as sd_schedule

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 4, 13, 10)
EACH = pytest.mark.parametrize("sampler", [ddim, euler, euler_ancestral, dpmpp_2m])
RANDOM = pytest.mark.parametrize("sampler,options", [(ddim, {"eta": 0.7}), (euler_ancestral, {})])
SPACINGS = ["trailing", "leading", "linspace"]
SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)


def linear(beta_start=0.0001, beta_end=0.02, train_steps=1000) -> Schedule:
    return Schedule(torch.cumprod(1 - torch.linspace(beta_start, beta_end, train_steps), dim=0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(dtype=torch.float32, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=seeded()).to(dtype)


def toy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A predictor that mixes pixels and channels, is not linear, and depends on t."""
    s = (t / 1000).to(x.dtype).view(-1, 1, 1, 1)
    return s * x + 0.5 * torch.sin(x.roll(1, -1) + 3 * s) + 0.3 * torch.cos(2 * x.roll(1, 1))


def run(sampler, predict=toy, x=None, steps=7, **options) -> torch.Tensor:
    options.setdefault("generator", seeded(4))
    return sampler(predict, noise() if x is None else x, sd_schedule(), steps, **options)


def trajectory(sampler, **options) -> list[torch.Tensor]:
    """Every x the predictor saw, and the result."""
    seen = []
    result = run(sampler, callback=lambda i, t, x, eps: seen.append(x.clone()), **options)
    return [*seen, result]


def diffusers_trajectory(scheduler, steps, **options) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    in_sigma_space = "Euler" in type(scheduler).__name__
    sample, seen = noise() * (math.hypot(1, scheduler.sigmas[0]) if in_sigma_space else 1), []
    for t in scheduler.timesteps:
        seen.append(scheduler.scale_model_input(sample, t))
        eps = toy(seen[-1], t.expand(len(sample)))
        sample = scheduler.step(eps, t, sample, **options).prev_sample
    return [*seen, sample]


def test_schedules_equal_diffusers_bit_for_bit():
    for ours, theirs in [
        (sd_schedule(), DDIMScheduler(**SD)),
        (linear(), DDIMScheduler()),
        (linear(2e-4, 0.03, 77), DDIMScheduler(77, beta_start=2e-4, beta_end=0.03)),
    ]:
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    sigmas = EulerDiscreteScheduler(**SD).sigmas[:-1].flip(0).double()
    torch.testing.assert_close(sd_schedule().sigmas, sigmas, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers(spacing):
    scheduler, schedule = DDIMScheduler(**SD, timestep_spacing=spacing), sd_schedule()
    for steps in range(1, 1000):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()[:steps]  # some "trailing" ones end in a stray -1
        assert schedule.timesteps(steps, spacing) == expected, steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("train_steps", [2, 3, 17, 64])
def test_timesteps_fall_within_range(spacing, train_steps):
    schedule = linear(train_steps=train_steps)
    for steps in range(1, train_steps + (spacing != "leading")):
        timesteps = schedule.timesteps(steps, spacing)
        assert len(timesteps) == steps and 0 <= timesteps[-1] and timesteps[0] < train_steps
        assert all(a > b for a, b in pairwise(timesteps))


# Where t - 1000 // steps, to which DDIMScheduler steps, is the timestep it visits next.
DDIM_CASES = [("trailing", n) for n in [1, 2, 50]] + [("leading", n) for n in [1, 2, 7, 50]]
# With linspace, where the Euler timesteps of diffusers are whole numbers, as ours always are.
EULER_CASES = [(s, n) for s in ["trailing", "leading"] for n in [1, 2, 7, 50]]
EULER_CASES += [("linspace", n) for n in [1, 2, 4, 28]]
CASES = [
    *[(ddim, DDIMScheduler, {"eta": eta}, *c) for eta in [0.0, 0.7] for c in DDIM_CASES],
    *[(euler, EulerDiscreteScheduler, {}, *c) for c in EULER_CASES],
    *[(euler_ancestral, EulerAncestralDiscreteScheduler, {}, *c) for c in EULER_CASES],
    *[(dpmpp_2m, DPMSolverMultistepScheduler, {}, s, n) for s in SPACINGS for n in [1, 2, 7, 50]],
]


@pytest.mark.parametrize("sampler,scheduler,options,spacing,steps", CASES)
def test_every_x_follows_diffusers(sampler, scheduler, options, spacing, steps):
    extra = {"clip_sample": False} if scheduler is DDIMScheduler else {}
    theirs = scheduler(**SD, timestep_spacing=spacing, **extra)
    generators = seeded(1), seeded(1)
    expected = diffusers_trajectory(theirs, steps, generator=generators[0], **options)
    actual = trajectory(sampler, steps=steps, spacing=spacing, generator=generators[1], **options)
    assert len(actual) == len(expected) == steps + 1
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        error, size = (a - e).abs().max().item(), e.abs().max().item()
        assert error <= 1e-5 * size, f"x_{i}: error {error:.3g} where |x| is up to {size:.3g}"
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


MU, S = 0.6, 0.5  # data from N(MU, S^2), whose eps is known exactly


def gaussian_eps(x, t):
    """``E[eps | x_t]``, with u = x_t / alpha: ``sigma (u - MU) / (S^2 + sigma^2)``."""
    sigma = sd_schedule().sigmas[t].view(-1, 1, 1, 1)
    return sigma * (x * (1 + sigma**2).sqrt() - MU) / (S**2 + sigma**2)


def sigma_steps(steps):
    schedule = sd_schedule()
    return list(pairwise([*schedule.sigmas[schedule.timesteps(steps)].tolist(), 0.0]))


@pytest.mark.parametrize("sampler", [ddim, euler])
def test_each_first_order_step_of_a_gaussian_is_a_known_factor(sampler):
    x, steps = noise(torch.float64), sigma_steps(7)
    expected = x * math.hypot(1, steps[0][0]) - MU
    for sigma, sigma_next in steps:
        expected = expected * (1 + (sigma_next - sigma) * sigma / (S**2 + sigma**2))
    torch.testing.assert_close(run(sampler, gaussian_eps, x), MU + expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler,order", [(ddim, 1), (euler, 1), (dpmpp_2m, 2)])
def test_error_falls_with_the_order_of_the_solver(sampler, order):
    x, (first, half) = noise(torch.float64), sd_schedule().sigmas[[999, 499]].tolist()
    exact = MU + (x * math.hypot(1, first) - MU) * math.hypot(S, half) / math.hypot(S, first)
    errors = []
    for steps in [50, 100, 200]:
        path = trajectory(sampler, predict=gaussian_eps, x=x, steps=steps)
        errors.append((path[steps // 2] * math.hypot(1, half) - exact).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert abs(math.log2(coarse / fine) - order) < 0.2, errors


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_fresh_noise_leaves_the_known_variance(eta):
    steps = sigma_steps(7)
    mean, var = -MU, 1 + steps[0][0] ** 2  # of u - MU
    for sigma, sigma_next in steps:
        up = eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
        factor = (S**2 + math.sqrt(sigma_next**2 - up**2) * sigma) / (S**2 + sigma**2)
        mean, var = mean * factor, var * factor**2 + up**2
    end = run(ddim, gaussian_eps, noise(torch.float64, (2, 1, 300, 400)), 7, eta=eta)
    assert abs(end.mean().item() - (MU + mean)) < 4 * math.sqrt(var / end.numel())
    assert abs(end.var().item() / var - 1) < 4 * math.sqrt(2 / end.numel())


@RANDOM
def test_one_seed_one_picture(sampler, options):
    before = torch.get_rng_state()
    a, b, other = (run(sampler, generator=seeded(seed), **options) for seed in [5, 5, 6])
    assert torch.equal(a, b) and (a - other).abs().max() > 0.1
    assert torch.equal(before, torch.get_rng_state())  # the global generator is left alone


@RANDOM
def test_noise_is_drawn_on_the_device_of_the_generator(sampler, options):
    here, elsewhere = seeded(5), seeded(5)
    run(sampler, generator=here, **options)
    end = run(sampler, x=noise().to("meta"), generator=elsewhere, **options)
    assert end.device.type == "meta" and torch.equal(here.get_state(), elsewhere.get_state())


@EACH
def test_callback_sees_each_call_of_the_predictor_in_order(sampler):
    calls, hooked = [], []

    def predict(x, t):
        calls.append((t, x, toy(x, t)))
        return calls[-1][2]

    x = noise()
    run(sampler, predict, x, callback=lambda *args: hooked.append(args))
    timesteps = sd_schedule().timesteps(7)
    assert [(i, t) for i, t, *_ in hooked] == list(enumerate(timesteps))
    for (_, _, *tensors), (t, *expected), timestep in zip(hooked, calls, timesteps, strict=True):
        assert all(a is e for a, e in zip(tensors, expected, strict=True))
        assert torch.equal(t, torch.tensor([timestep] * SHAPE[0]))
    assert torch.equal(calls[0][1], noise()) and torch.equal(x, noise())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EACH
def test_low_precision_rounds_only_what_the_predictor_sees(sampler, dtype):
    def predict(x, t):
        assert x.dtype == dtype
        return toy(x, t)

    actual = run(sampler, predict, noise(dtype))
    expected = run(sampler, lambda x, t: toy(x.to(dtype), t).float(), noise(dtype).float())
    assert actual.dtype == dtype and torch.equal(actual, expected.to(dtype))


@EACH
def test_samplers_keep_no_graph(sampler):
    weight = torch.ones((), requires_grad=True)
    assert not run(sampler, lambda x, t: weight * toy(x, t)).requires_grad


NO_SCHEDULES = [[[0.9, 0.5]], [], [0.9, 0.9], [0.5, 0.9], [1.0, 0.5], [0.5, 0.0], [0.9, math.nan]]


@pytest.mark.parametrize("alphas", NO_SCHEDULES, ids=str)
def test_schedule_refuses_what_is_none(alphas):
    with pytest.raises(ValueError, match="alphas_cumprod must"):
        Schedule(torch.tensor(alphas))


BAD_OPTIONS = {
    "zero": ({"steps": 0, "spacing": "leading"}, "steps must be 1 to 999"),
    "negative": ({"steps": -1, "spacing": "linspace"}, "steps must be 1 to 1000"),
    "many": ({"steps": 1001}, "steps must be 1 to 1000"),
    "leading": ({"steps": 1000, "spacing": "leading"}, "steps must be 1 to 999"),
    "spacing": ({"spacing": "karras"}, "spacing must be one of"),
    "3d": ({"x": noise()[0]}, "x must be floating"),
    "int": ({"x": noise().int()}, "x must be floating"),
    "broadcast": ({"predict": lambda x, t: x[:1]}, r"like x, got \(1, 4, 13, 10\)"),
    "tuple": ({"predict": lambda x, t: (x,)}, "like x, got tuple"),
}


@EACH
@pytest.mark.parametrize("options,match", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_arguments_are_refused(sampler, options, match):
    with pytest.raises(ValueError, match=match):
        run(sampler, **options)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_eta_and_phi_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="eta must be within"):
        run(ddim, eta=value)
    with pytest.raises(ValueError, match="phi must be within"):
        rescale(noise(), noise(), value)


@RANDOM
def test_fresh_noise_needs_a_generator(sampler, options):
    with pytest.raises(ValueError, match="generator"):
        run(sampler, generator=None, **options)


def guided_and_text(dtype):
    """16 images of unlike spread, with channels of unlike spread."""
    scale = torch.linspace(0.5, 3, 64).view(16, 4, 1, 1)
    guided = 4 * scale * noise(shape=(16, 4, 13, 10)) + 1
    return guided.to(dtype), (guided.roll(5, 0) * scale.flip(1)).to(dtype)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_equals_diffusers(phi):
    guided, text = guided_and_text(torch.float64)
    expected = rescale_noise_cfg(guided, text, guidance_rescale=phi)
    torch.testing.assert_close(rescale(guided, text, phi), expected, rtol=1e-13, atol=1e-13)


def test_rescale_in_half_precision_is_rounded_once():
    guided, text = guided_and_text(torch.float16)
    expected = rescale_noise_cfg(guided.double(), text.double(), guidance_rescale=0.7)
    actual = rescale(guided, text, 0.7)
    assert actual.dtype == torch.float16
    error = ((actual.double() - expected) / expected).abs().max()
    assert error <= 0.51 * torch.finfo(torch.float16).eps
