"""The embedded transformer: its parts against closed forms, training, regions and a picture."""

import numpy as np
import pytest
import torch
from conftest import assert_close
from PIL import Image
from tiny import TRANSFORMER, randomised
from torch import nn

from scfg import SCFGConfig
from scfg import __main__ as cli
from scfg.models.embedded import (
    FlowPredictor,
    assemble,
    load_model,
    networks,
    save_weights,
    to_latents,
)
from scfg.models.emoji import render, sample_scenes
from scfg.models.training import LEAST_LEVEL, Plan, Trainer
from scfg.models.transformer import JointTransformer, TransformerConfig, rotary_angles, rotate
from scfg.recording.wrapper import Recorder
from scfg.sampling import scaled_linear

PLAN = Plan(samples=320, batch=16, warmup=2, lr=1e-2, model=TRANSFORMER)


def test_rotated_products_know_the_distance_of_patches_and_nothing_else():
    h, w, d = 5, 7, 16
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, d, generator=generator, dtype=torch.float64)
    angles = rotary_angles(h, w, d, torch.device("cpu")).double()
    everywhere = [rotate(x.expand(1, 1, h * w, d), angles)[0, 0] for x in (q, k)]
    products = (everywhere[0] @ everywhere[1].T).view(h, w, h, w)
    assert_close(actual=products[1:, 2:, 1:, 2:], expected=products[:-1, :-2, :-1, :-2], share=1e-6)
    moved = torch.stack([products[0, 0, 0, 1], products[0, 0, 1, 0], products[0, 0, 1, 1]])
    assert (moved - products[0, 0, 0, 0]).abs().min() > 1e-3  # rows and columns both turn it
    assert_close(actual=everywhere[0].norm(dim=-1), expected=q.norm().expand(h * w), share=1e-6)


def test_perfect_x0_becomes_the_noise_that_was_added():
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 6, 48, 5, 3, generator=generator, dtype=torch.float64)
    seen = {}

    class Perfect(nn.Module):
        def forward(self, x, s, context):
            seen.update(x=x, s=s)
            return x0

    abar = scaled_linear().alphas_cumprod
    t = torch.tensor([0, 1, 100, 500, 900, 999])
    a = abar.double()[t][:, None, None, None]
    predict = FlowPredictor(Perfect(), abar)
    actual = predict(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, None)
    assert_close(actual=actual, expected=eps, share=1e-5)
    s = seen["s"][:, None, None, None]
    assert_close(actual=seen["x"], expected=(1 - s) * x0 + s * eps, share=1e-6)


def test_the_loss_is_that_of_the_velocity_on_the_straight_path():
    trainer, kept = Trainer(PLAN), {}

    def nothing(x, s, tokens):
        kept.update(x=x.double(), s=s.double()[:, None, None, None])
        return torch.zeros_like(x, requires_grad=True)

    trainer.predict = nothing
    loss = trainer.step()
    # v = eps - x0 and x = (1 - s) x0 + s eps; x0 predicted as 0 is the velocity x / s.
    x, s = kept["x"], kept["s"]
    x0 = to_latents(render(sample_scenes(16, np.random.default_rng([0, 0, 0])))[0])
    eps = (x - (1 - s) * x0) / s
    expected = (x / s - (eps - x0)).square() * (s / LEAST_LEVEL).clamp(max=1) ** 2
    assert_close(actual=loss, expected=expected.mean(), share=1e-5)
    assert s.std() > 0.1


def test_training_lowers_the_loss_and_resumes_bit_for_bit(tmp_path):
    trainer = Trainer(PLAN)
    losses = [trainer.step().item() for _ in range(10)]
    trainer.save(tmp_path)
    losses += [trainer.step().item() for _ in range(10)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    resumed = Trainer.resume(tmp_path)
    assert resumed.plan == PLAN
    assert [resumed.step().item() for _ in range(10)] == losses[10:]


def test_regions_are_those_of_its_own_softmax():
    """The words' columns of the joint softmax, rows of the image block renormalised, by hand."""
    h, w, t = 6, 5, 7
    config = TransformerConfig(in_channels=4, out_channels=4, width=32, heads=2, context_dim=8)
    model = randomised(JointTransformer(config).double())
    generator = torch.Generator().manual_seed(1)
    x, context = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 4, h, w), (2, t, 8))
    )
    s, inputs = torch.tensor([0.3, 0.7], dtype=torch.float64), []
    hook = model.blocks[2].attn.register_forward_pre_hook(lambda _, args: inputs.append(args))
    plain = model(x, s, context)
    hook.remove()
    settings = SCFGConfig(layers=(2,), min_share=0.0, min_peak=0.0, propagation_steps=1)
    with Recorder(model, settings, "torch") as recorded:
        assert torch.equal(recorded(x, s, context), plain)
        evidence = recorded.evidence.total(1)[..., 3:-1]  # of the t - 1 words

    (y, angles), attn = inputs[0], model.blocks[2].attn
    q, k, _ = attn.qkv(y).unflatten(-1, (3, 2, -1)).unbind(2)  # (b, m, g, d)
    pairs = []
    for part, norm in ((q, attn.norm_q), (k, attn.norm_k)):
        part = part * norm.weight / (part.square().mean(-1, keepdim=True) + norm_eps(norm)).sqrt()
        real, imaginary = part.chunk(2, dim=-1)
        turned = torch.complex(real, imaginary) * torch.exp(1j * angles.double())[:, None]
        pairs.append(torch.cat([turned.real, turned.imag], dim=-1))
    joint = torch.einsum("bmgd,blgd->bgml", *pairs).div(16**0.5).softmax(-1).mean(1)  # (b, m, m)
    own, words = joint[:, t:, t:], joint[:, t:, 1:t]
    completed = own / own.sum(-1, keepdim=True) @ words
    # The scale of a column is the mean of its blurred map: here only its shape is looked at.
    assert_close(
        actual=evidence.double() / evidence.amax(dim=1, keepdim=True),
        expected=completed / completed.amax(dim=1, keepdim=True),
        share=1e-5,
    )


def norm_eps(norm: nn.RMSNorm) -> float:
    return torch.finfo(torch.float64).eps if norm.eps is None else norm.eps


def test_saved_weights_draw_a_picture_with_the_command(tmp_path):
    torch.manual_seed(0)
    parts = networks(TRANSFORMER)
    randomised(parts)
    save_weights(parts, TRANSFORMER, tmp_path / "w.safetensors")
    loaded = load_model(tmp_path / "w.safetensors")
    x, context = torch.randn(2, 48, 4, 6), loaded.encode(["a dog on a red background"] * 2)
    half = {name: p.half().float() for name, p in parts.state_dict().items()}
    parts.load_state_dict(half)
    expected = assemble(parts, TRANSFORMER).unet(x, 500, context)
    assert torch.equal(loaded.unet(x, 500, context), expected)
    out = tmp_path / "out.png"
    prompt = "a dog and a cat on a red background"
    status = cli.main(
        ["generate", prompt, "--steps", "2", "--out", str(out), "--quiet", "--weights",
         str(tmp_path / "w.safetensors")]
    )  # fmt: skip
    assert status == 0 and Image.open(out).size[0] > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [({"width": 30}, "multiple of 4"), ({"depth": 0}, "depth must be")],
)
def test_bad_topologies_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**change)
