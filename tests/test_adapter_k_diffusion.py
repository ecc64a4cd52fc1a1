"""denoiser: k-diffusion's own wrappers and samplers, loaded from its wheel without its imports."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from adapter_hosts import CONFIG, PLAIN, UNET, by_hand, diffusers
from conftest import assert_close

import scfg
from scfg.adapters.k_diffusion import denoiser
from scfg.guidance import guide_regions
from scfg.recording.recorder import AttentionRecorder
from scfg.regions import find_regions

SPEC = importlib.util.find_spec("k_diffusion")
if SPEC is None:
    pytest.skip("k-diffusion is not installed", allow_module_level=True)
for needed in ("scipy", "torchdiffeq", "torchsde"):
    pytest.importorskip(needed, reason=f"k-diffusion's samplers need {needed}")

SAMPLERS = [
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
]


def load(name):
    """A module of k-diffusion alone: the package itself imports much that samplers do not need."""
    if "k_diffusion_alone" not in sys.modules:
        package = types.ModuleType("k_diffusion_alone")
        package.__path__ = [str(Path(SPEC.origin).parent)]
        utils = types.ModuleType("k_diffusion_alone.utils")
        utils.append_dims = lambda x, dims: x.reshape(x.shape + (1,) * (dims - x.dim()))
        package.utils = utils
        sys.modules["k_diffusion_alone"], sys.modules["k_diffusion_alone.utils"] = package, utils
    return importlib.import_module(f"k_diffusion_alone.{name}")


sampling, external = load("sampling"), load("external")


class Inner(torch.nn.Module):
    """What k-diffusion's wrappers call: (x, t, cond) -> a tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unet = diffusers.UNet2DConditionModel(**UNET).eval()

    def forward(self, x, t, cond):
        return self.unet(x, t, cond).sample


def make(kind="DiscreteEpsDDPMDenoiser"):
    alphas = scfg.sampling.scaled_linear().alphas_cumprod
    return getattr(external, kind)(Inner().requires_grad_(False), alphas, quantize=False)


def inputs(model, steps=3, tokens=(9, 9), b=1):
    g = torch.Generator().manual_seed(1)
    sigmas = model.get_sigmas(steps)
    x = torch.randn(b, 4, 10, 13, generator=g) * sigmas[0]
    uncond, cond = (torch.randn(b, t, 32, generator=g) for t in tokens)
    return x, sigmas, dict(uncond=uncond, cond=cond)


def sample(name, model, x, sigmas, extra_args):
    torch.manual_seed(2)  # ancestral noise
    with torch.no_grad():
        function = getattr(sampling, f"sample_{name}")
        return function(model, x, sigmas, extra_args=extra_args, disable=True)


def plain(model, guidance_scale):
    """The guidance of user scripts."""

    def predict(x, sigma, uncond, cond):
        both = model(torch.cat([x] * 2), torch.cat([sigma] * 2), cond=torch.cat([uncond, cond]))
        u, c = both.chunk(2)
        return u + (c - u) * guidance_scale

    return predict


def spied(model, seen, guidance_scale=7.5):
    """S-CFG by hand, from calls and maps of its own."""
    recorder = AttentionRecorder(model, CONFIG, "torch", keep_maps=True)

    def predict(x, sigma, uncond, cond):
        recorder.start(x)
        both = model(torch.cat([x, x]), torch.cat([sigma] * 2), cond=torch.cat([uncond, cond]))
        recorder.finish()
        out = by_hand(both, recorder.layers, guidance_scale)
        seen.append(out)
        return out.eps

    predict.remove = recorder.remove
    return predict


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_give_what_semantic_cfg_gives_by_hand_and_plain_guidance_at_rate_1(name):
    model, seen, expected = make(), [], []
    x, sigmas, extra = inputs(model)
    hand = spied(model, expected)
    by_hands = sample(name, hand, x, sigmas, extra)
    hand.remove()
    with denoiser(model, guidance_scale=7.5, callback=seen.append) as guided:
        actual = sample(name, guided, x, sigmas, extra)
    assert len(seen) == len(expected) >= 3
    for out, by in zip(seen, expected, strict=True):
        assert out.labels.equal(by.labels)
    assert_close(actual=actual, expected=by_hands, share=1e-4)
    ordinary = sample(name, plain(model, 7.5), x, sigmas, extra)
    with denoiser(model, 7.5, config=PLAIN) as guided:
        one = sample(name, guided, x, sigmas, extra)
    assert_close(actual=one, expected=ordinary, share=1e-5)
    assert (actual - ordinary).abs().max() > 1e-2
    assert sample(name, plain(model, 7.5), x, sigmas, extra).equal(ordinary)


def test_samplers_that_choose_their_own_noise_levels_run():
    model = make()
    x, sigmas, extra = inputs(model)
    ends = dict(sigma_min=float(sigmas[-2]), sigma_max=float(sigmas[0]))
    with denoiser(model) as guided, torch.no_grad():
        fast = sampling.sample_dpm_fast(guided, x, **ends, n=4, extra_args=extra, disable=True)
    assert fast.isfinite().all()


@pytest.mark.parametrize("sigma", [14.6, 1.0, 0.03])
@pytest.mark.parametrize("kind", ["DiscreteEpsDDPMDenoiser", "DiscreteVDDPMDenoiser"])
def test_rates_do_not_depend_on_the_space_of_the_prediction(kind, sigma):
    model, seen = make(kind), []
    x, _, extra = inputs(model)
    level = torch.tensor([sigma])
    c_in = model.get_scalings(level)[-1]

    def raw(x, sigma, cond):
        return model.inner_model(x * c_in, model.sigma_to_t(sigma), cond)

    with denoiser(model, callback=seen.append) as guided:
        guided(x / 15 * sigma, level, **extra)
    with denoiser(raw, unet=model, callback=seen.append) as guided:
        guided(x / 15 * sigma, level, **extra)
    assert seen[0].labels.equal(seen[1].labels)
    assert_close(actual=seen[0].rate, expected=seen[1].rate, share=1e-4)


def test_conditions_of_different_length_are_two_calls():
    model, seen = make(), []
    x, sigmas, extra = inputs(model, tokens=(5, 11), b=2)
    sigma = sigmas[:1].expand(2)
    with denoiser(model, callback=seen.append) as guided:
        actual = guided(x, sigma, **extra)
    recorder = AttentionRecorder(model, CONFIG, "torch")
    parts = []
    for name in ("uncond", "cond"):
        recorder.start(x)
        with torch.no_grad():
            parts.append((model(x, sigma, cond=extra[name]), recorder.finish()))
    recorder.remove()
    (u, uncond), (c, text) = parts
    regions = find_regions(uncond=uncond, text=text, config=CONFIG)
    out = guide_regions(u, c, regions, 7.5, CONFIG)
    assert_close(actual=actual, expected=out.eps, share=1e-4)
    assert seen[0].labels.equal(out.labels) and seen[0].labels.max() < 11


def test_window_and_every_go_by_noise_level_not_by_call():
    model, seen, hand = make(), [], []
    x, sigmas, extra = inputs(model, steps=6)
    options = dict(callback=seen.append, sigmas=sigmas, start=0.2, stop=0.7, every=2)
    with denoiser(model, **options) as guided:
        sample("heun", guided, x, sigmas, extra)
        assert len(seen) == 6  # levels 1, 2, 3: the end of a step, and the start of the next
        sample("heun", guided, x, sigmas, extra)
    assert torch.equal(seen[0].rate, seen[6].rate)  # nothing kept from the run before
    predict = spied(model, hand)
    with denoiser(model, **options | dict(every=1, start=0.0, stop=1.0)) as guided:
        for i, level in enumerate(sigmas[:-1]):
            sigma = level[None]
            out = guided(x / (i + 1), sigma, **extra)
            assert_close(actual=out, expected=predict(x / (i + 1), sigma, **extra), share=1e-4)
    predict.remove()


def test_kept_regions_are_those_of_the_last_search():
    model, seen, hand = make(), [], []
    x, sigmas, extra = inputs(model, steps=4)
    with denoiser(model, callback=seen.append, sigmas=sigmas, every=3) as guided:
        sample("euler", guided, x, sigmas, extra)
    predict = spied(model, hand)
    predict(x, sigmas[:1], **extra)
    predict.remove()
    assert all(out.labels.equal(hand[0].labels) for out in seen[:3])
    assert not torch.equal(seen[1].rate, seen[0].rate)


def test_tokens_are_weighted():
    model, seen = make(), []
    x, sigmas, extra = inputs(model)
    weights = torch.full((9,), 2.0)
    with denoiser(model, callback=seen.append) as guided:
        guided(x, sigmas[:1], **extra)
    with denoiser(model, callback=seen.append, token_weights=weights) as guided:
        guided(x, sigmas[:1], **extra)
    assert_close(actual=seen[1].rate, expected=2 * seen[0].rate, share=1e-6)


def test_model_is_left_as_found_after_errors_and_errors_name_the_argument():
    model = make()
    x, sigmas, extra = inputs(model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(KeyError), denoiser(model) as guided:
        guided(x, sigmas[:1], **extra)
        raise KeyError
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="unet must be given"):
        denoiser(lambda x, sigma, cond: x)
    with pytest.raises(ValueError, match="need sigmas"):
        denoiser(model, every=2)
