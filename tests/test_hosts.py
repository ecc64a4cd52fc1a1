"""Pipelines that are not what `attach` takes them for: refused or warned of, in every case."""

import copy
import dataclasses
import gc
import types
import weakref

import pytest
import torch
from conftest import assert_close
from diffusers import DDIMScheduler
from test_recording import hooks
from tiny import LATENT_UNET, tiny_unet

import scfg
from scfg.adapters.diffusers import attach

SCALE, STEPS, SIZE = 6.0, 3, (17, 26)


def plain(u, c, g):
    return u + g * (c - u)


class Host:
    """A pipeline: a U-Net, a scheduler, and how it makes one prediction of several."""

    guidance_scale = SCALE
    do_classifier_free_guidance = True

    def __init__(self, combine=plain, rows=2, out_channels=4, units=(1.0, 0.0)):
        config = dataclasses.replace(LATENT_UNET, out_channels=out_channels)
        self.unet, self.scheduler = tiny_unet(config=config), DDIMScheduler(clip_sample=False)
        self.combine, self.rows, self.units = combine, rows, units

    def __call__(self, seed=0, shape=(1, 4, *SIZE), wrong_time=0.0):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator)
        context = torch.randn(self.rows, 7, 24, generator=generator)
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            eps = self.unet(torch.cat([x] * self.rows), t + wrong_time, context)[:, :4]
            eps = self.combine(*eps.chunk(self.rows), SCALE)
            eps = self.units[0] * eps + self.units[1] * x
            x = self.scheduler.step(eps, t, x).prev_sample
        return x


def untouched(host):
    assert hooks(host.unet) == 0
    assert "step" not in vars(host.scheduler)
    assert not any("scfg" in name or "compiled" in name for name in vars(host.unet))


FORMULAS = {
    "the unconditional half once more": lambda u, c, g: plain(u, c, g) + 0.2 * u,
    "inside a mask only": lambda u, c, g: torch.where(c > 0, plain(u, c, g), u),
    "another scale": lambda u, c, g: plain(u, c, 5.0),
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_another_formula_is_refused_at_the_first_step_unless_only_watched(formula):
    host = Host(FORMULAS[formula])
    with pytest.raises(
        RuntimeError, match=r"Host must combine its predictions as u \+ 6 \(c - u\)"
    ):
        with attach(host):
            host()
    untouched(host)
    expected = host()
    with attach(host, observe=True):
        assert torch.equal(host(), expected)


def test_more_branches_than_two_are_refused():
    host = Host(lambda u, c, e, f, g: plain(u, c, g) + e - f, rows=4)
    with pytest.raises(RuntimeError, match="it has more branches"), attach(host):
        host()
    untouched(host)


@pytest.mark.parametrize("units", [(1.0, 0.0), (0.6, -0.3)])
def test_the_formula_in_other_units_passes_in_every_run(units):
    host, rates = Host(units=units), []
    with attach(host, callback=lambda out: rates.append(out.rate)):
        host(), host(seed=1)
    assert len(rates) == 2 * STEPS
    untouched(host)


def test_channels_beyond_the_latents_do_not_count():
    host, seen = Host(out_channels=8), []
    host.vae = types.SimpleNamespace(config=types.SimpleNamespace(latent_channels=4))
    raw = []
    host.unet.register_forward_hook(lambda m, a, out: raw.append(out[:, :4].clone()))
    with scfg.UNetWrapper(host.unet) as unet, attach(host, callback=seen.append):
        inner, host.unet = host.unet, unet
        host()
        host.unet = inner
        expected = unet.guide(*raw[-1].chunk(2), SCALE)
    assert_close(actual=seen[-1].rate, expected=expected.rate, share=1e-6)


def test_guidance_that_is_denied_is_warned_of():
    host = Host()
    host.do_classifier_free_guidance = False
    none = "acted on none of 3 calls of the U-Net: Host says"
    with pytest.warns(UserWarning, match=none) as told, attach(host):
        host()
    assert told[0].filename == __file__


def test_calls_that_cannot_be_two_branches_say_so():
    cases = [
        (Host(lambda u, g: u, rows=1), {}, "same latents for each of 2 branches"),
        (Host(), {"shape": (1, 4, 5, *SIZE)}, "video is not supported"),
    ]
    for host, call, message in cases:
        with pytest.raises(RuntimeError, match=message), attach(host):
            host(**call)
        untouched(host)
    host = Host()
    with pytest.raises(RuntimeError, match="start, stop and every need a U-Net that is given the"):
        with attach(host, stop=0.5):
            host(wrong_time=0.25)


def test_a_guidance_scale_that_is_not_told_is_asked_for():
    class Silent(Host):
        guidance_scale = property(lambda self: self._guidance_scale)

    host = Silent()
    with pytest.raises(RuntimeError, match="Silent must set its guidance_scale to a number"):
        with attach(host):
            host()
    nameless = types.SimpleNamespace(unet=host.unet)
    for wrong in (-1.0, float("nan"), 1e300, 1e-50):
        with pytest.raises(ValueError, match="guidance_scale must be finite and > 0"):
            attach(nameless, guidance_scale=wrong).__enter__()
        with pytest.raises(ValueError, match="guidance_scale must be finite and > 0"):
            scfg.guided(host.unet, wrong)
    with pytest.raises(TypeError, match="guidance_scale must be a number, got True"):
        scfg.guided(host.unet, True)
    untouched(host)


def test_a_copy_made_inside_the_block_is_plain_and_can_be_attached_to():
    host = Host()
    expected = host()
    with attach(host):
        other = Host()
        other.unet = copy.deepcopy(host.unet)
        assert not torch.equal(host(), expected)
        assert torch.equal(other(), expected)
        with attach(other):
            guided = other()
    assert not torch.equal(guided, expected)
    assert torch.equal(host(), expected)
    assert torch.equal(other(), expected)
    untouched(host)


class Stop(BaseException):
    """Not an Exception, as KeyboardInterrupt and SystemExit are not."""


@pytest.mark.parametrize("kind", [RuntimeError, Stop])
def test_an_error_inside_the_unet_leaves_no_tensor_behind(kind):
    host, kept = Host(), []
    attention = [m.attn2 for m in host.unet.modules() if hasattr(m, "attn2")]
    for module in attention:
        module.to_q.register_forward_hook(lambda m, a, out: kept.append(weakref.ref(out)))

    def fail(*_):
        raise kind

    with attach(host):
        expected = host()
        stop = attention[3].register_forward_hook(fail)  # at a chosen resolution
        kept.clear()
        with pytest.raises(kind):
            host()
        stop.remove()
        gc.collect()
        assert kept and all(reference() is None for reference in kept)
        assert torch.equal(host(), expected)
    assert hooks(host.unet) == len(attention)
