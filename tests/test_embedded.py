"""The embedded model: its networks, its training, and the weights that are shipped."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import MODEL
from torch import nn

from scfg.models import emoji
from scfg.models.embedded import (
    SHIPPED,
    EpsPredictor,
    assemble,
    load_model,
    networks,
    save_weights,
    to_latents,
)
from scfg.models.emoji import (
    Scene,
    caption,
    render,
    sample_scenes,
)
from scfg.models.emoji_words import WORDS
from scfg.models.text import Tokenizer
from scfg.models.training import Plan, Trainer
from scfg.names import NETWORKS

pytestmark = pytest.mark.usefixtures("one_thread")


def scenes_of(seed: int, count: int = 200) -> list[Scene]:
    return sample_scenes(count, np.random.default_rng(seed))


def test_tokens_are_encoded_knowing_only_the_words_before_them():
    torch.manual_seed(0)
    encoder = networks(MODEL)["text_encoder"].double()
    tokenizer = Tokenizer(WORDS, emoji.LENGTH)
    first = tokenizer("a red dog on a blue background")
    second = tokenizer("a red dog and a green fox on a blue background")
    a, b = encoder(first), encoder(second)
    torch.testing.assert_close(a[:, :4], b[:, :4], atol=1e-12, rtol=0)  # START a red dog
    assert ((a[:, 4:] - b[:, 4:]).abs().amax(-1) > 1e-6).all()
    empty = encoder(tokenizer(""))
    torch.testing.assert_close(a[:, 0], empty[:, 0], atol=1e-12, rtol=0)


def test_perfect_x0_becomes_the_noise_that_was_added():
    model = assemble(networks(MODEL), MODEL)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 48, 5, 3, generator=generator, dtype=torch.float64)

    class Perfect(nn.Module):
        def forward(self, x, t, context):
            return x0

    abar = model.schedule.alphas_cumprod
    predict = EpsPredictor(Perfect(), abar)
    t = torch.tensor([0, 1, 100, 500, 900, 999])
    a = abar.double()[t][:, None, None, None]
    x = a.sqrt() * x0 + (1 - a).sqrt() * eps
    torch.testing.assert_close(predict(x, t, None), eps, atol=1e-5, rtol=0)
    for i in range(len(t)):  # one timestep for the whole batch, as an int
        torch.testing.assert_close(predict(x, t[i].item(), None)[i], eps[i], atol=1e-5, rtol=0)


def test_latents_and_images_are_inverse():
    images, _ = render(scenes_of(9, 3))
    model = assemble(networks(MODEL), MODEL)
    latents = to_latents(images)
    assert latents.shape == (3, *model.latent_shape)
    torch.testing.assert_close(model.decode(latents), images, atol=1e-6, rtol=0)
    # Channel c * 16 + i * 4 + j of a latent is pixel (i, j) of its patch, halved.
    assert latents[1, 2 * 16 + 3 * 4 + 1, 7, 11] == images[1, 2, 4 * 7 + 3, 4 * 11 + 1] / 2


def test_saved_weights_load_as_the_same_model(tmp_path):
    torch.manual_seed(1)
    parts = networks(MODEL)
    save_weights(parts, MODEL, tmp_path / "w.safetensors")
    model = load_model(tmp_path / "w.safetensors")
    assert not any(p.requires_grad for p in model.unet.parameters())
    loaded = {**model.unet.unet.state_dict(prefix="unet.")}
    loaded |= model.text_encoder.state_dict(prefix="text_encoder.")
    assert loaded.keys() == parts.state_dict().keys()
    for name, p in parts.state_dict().items():
        assert torch.equal(loaded[name], p.half().float()), name
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "absent.safetensors")


def plan(**kwargs) -> Plan:
    return Plan(**{"samples": 24, "batch": 4, "warmup": 2, "empty": 0.5, "model": MODEL} | kwargs)


def test_resumed_training_is_bit_for_bit_that_of_one_go(tmp_path):
    straight = Trainer(plan())
    losses = [straight.step().item() for _ in range(6)]
    assert straight.progress == 1

    cut = Trainer(plan())
    assert [cut.step().item() for _ in range(3)] == losses[:3]
    cut.save(tmp_path)
    cut.step()  # what comes after the checkpoint is lost
    resumed = Trainer.resume(tmp_path)
    assert resumed.plan == plan() and resumed.samples == 12
    assert [resumed.step().item() for _ in range(3)] == losses[3:]
    for name in ("parts", "ema"):
        expected = getattr(straight, name).state_dict()
        for key, value in getattr(resumed, name).state_dict().items():
            assert torch.equal(value, expected[key]), (name, key)


def test_checkpoints_are_safetensors_and_json_and_replace_each_other(tmp_path):
    trainer = Trainer(plan())
    for _ in range(2):
        trainer.step()
        trainer.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-2.safetensors",
        "checkpoint.json",
    ]
    header = (tmp_path / "checkpoint-2.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    assert "ema.unet.conv_in.weight" in json.loads(header[8 : 8 + size])


@pytest.mark.parametrize(
    "decay, factors",
    [(1.0, (0.5, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)), (0.5, (0.5, 1, 1, 1, 2 / 3, 1 / 3))],
)
def test_learning_rate_rises_over_the_warm_up_and_falls_to_zero(decay, factors):
    trainer = Trainer(plan(lr=0.1, decay=decay))
    rates = []
    for _ in range(6):
        trainer.step()
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * f for f in factors])
    timed = Trainer(plan(samples=None, minutes=2.0))
    timed.seconds = 30.0
    assert timed.progress == 0.25


def test_a_rate_that_would_never_fall_is_refused():
    for decay in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"decay must be in \(0, 1\], got {decay}"):
            plan(decay=decay)


def test_training_lowers_the_loss():
    trainer = Trainer(plan(samples=320, batch=16, lr=1e-2))
    losses = [trainer.step().item() for _ in range(20)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def _train_two_steps(process, rank, folder):
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    trainer = Trainer(plan())
    for step in "12":
        trainer.step()
        trainer.save(folder / f"{step}-{rank}")
    dist.destroy_process_group()


def _gradients(rank):
    """Those of one process's share of a batch of 4, before they are clipped."""
    trainer, found = Trainer(plan(batch=2)), {}
    trainer.rank = rank
    for name, p in trainer.parts.named_parameters():
        p.register_hook(lambda gradient, name=name: found.update({name: gradient.clone()}))
    trainer.step()
    return found


def test_two_processes_follow_the_gradient_of_their_averaged_losses(tmp_path):
    other = torch.multiprocessing.spawn(_train_two_steps, (1, tmp_path), nprocs=1, join=False)
    _train_two_steps(0, 0, tmp_path)
    while not other.join():
        pass
    first, second = (Trainer.resume(tmp_path / f"2-{rank}") for rank in "01")
    for name, p in first.parts.named_parameters():
        assert torch.equal(p, second.parts.get_parameter(name)), name

    shared = Trainer.resume(tmp_path / "1-0")
    one, other = (_gradients(rank) for rank in (0, 1))
    mean = {name: (gradient + other[name]) / 2 for name, gradient in one.items()}
    norm = torch.cat([gradient.flatten() for gradient in mean.values()]).double().norm()
    for name, p in shared.parts.named_parameters():
        # AdamW's first mean is (1 - 0.9) times the gradient; its step, a sign, would not do.
        expected = mean[name] / norm.clamp_min(1)
        bound = 1e-5 * expected.abs().max().item() + 1e-9
        actual = 10 * shared.optimizers[0].state[p]["exp_avg"]
        torch.testing.assert_close(actual, expected, atol=bound, rtol=0, msg=name)


@pytest.mark.parametrize("network", NETWORKS)
def test_shipped_model_is_small_and_predicts_eps(network):
    assert SHIPPED[network].stat().st_size <= 10e6
    model = load_model(SHIPPED[network])
    context = model.encode(["", "a red dog on a blue background"])
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    eps = model.unet(noise, torch.tensor([999, 999]), context)
    assert eps.shape == noise.shape and eps.dtype == torch.float32
    # At the last timestep x is nearly the noise itself.
    assert (eps - noise).square().mean() < 0.02


def test_attention_of_the_shipped_unet_has_the_names_that_the_recorder_looks_for():
    modules = dict(load_model().unet.named_modules())
    pairs = {name.rsplit(".", 1)[0] for name in modules if name.endswith(("attn1", "attn2"))}
    assert len(pairs) == 7
    for name in pairs:
        for kind in ("attn1", "attn2"):
            attention = modules[f"{name}.{kind}"]
            assert attention.to_q.in_features % attention.heads == 0 and attention.to_k is not None


@pytest.mark.parametrize("network", NETWORKS)
def test_shipped_model_restores_its_scenes_from_noise_and_listens_to_the_caption(network):
    model = load_model(SHIPPED[network])
    scenes = scenes_of(10, 16)
    x0 = to_latents(render(scenes)[0])
    captions = [caption(scene) for scene in scenes]
    t = torch.full((16,), 700)
    abar = model.schedule.alphas_cumprod[700]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * noise

    def error(captions):
        eps = model.unet(x, t, model.encode(captions))
        return ((x - (1 - abar).sqrt() * eps) / abar.sqrt() - x0).square().mean((1, 2, 3))

    right, wrong = error(captions), error(captions[1:] + captions[:1])
    spread = x0.var()
    assert right.mean() < 0.3 * spread
    assert (right < wrong).float().mean() >= 0.9
