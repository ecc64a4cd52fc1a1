"""Errors that no other test provokes: of the documented type, and they name what was wrong."""

import sys
from argparse import Namespace
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from test_errors import CONFIG, EPS, LABELS, NET, B, H, T, W
from test_recording import ALL_LEVELS, build
from tiny import TRANSFORMER
from torch import nn
from torch.nn import functional as F

import scfg
from scfg import commands, ops
from scfg.adapters import checkpoints
from scfg.adapters.around import around
from scfg.adapters.branches import Branches
from scfg.adapters.comfyui.regions import _spread
from scfg.adapters.modular import SemanticGuidance
from scfg.adapters.pipelines import AttachedTransformers
from scfg.evaluate.run import one_of_all
from scfg.evidence import Evidence
from scfg.guidance import guide_regions
from scfg.models import embedded, files, training
from scfg.patches import Patches
from scfg.recording import parallel
from scfg.recording.layouts import LAYOUTS, find_layers, list_grid, shapes_grid
from scfg.recording.run import Run
from scfg.regions import Regions, find_regions
from scfg.sampling import dpmpp_2m, scaled_linear

Q = torch.randn(B, 6, 8)
LEVEL = torch.ones(B, H * W, T + 1)
FRONT = LABELS == 0


def stacked(**other):
    two = [Q, Q]
    layers = dict(q_self=two, k_self=two, q_cross=two, k_cross=two, key_bias=[None, None])
    return ops.stacked_maps(**{**layers, **other}, heads=2)


def guide_evidence(rows=B, factor=1):
    level = LEVEL[:rows]
    limits = dict(rate_min=0.8, rate_max=3.0, max_scale=15.0, benchmark="foreground")
    return ops.guide_evidence(
        *EPS, [level], [level], guidance_scale=5.0, h=H, w=W, factors=[1], factor=factor, **limits
    )


def by_regions(labels):
    flat = torch.zeros(len(labels), dtype=torch.bool)
    return guide_regions(*EPS, Regions(labels, labels == 0, T, flat), 5.0, CONFIG)


def evidence(size=(H, W), tokens=T, patches=None):
    return Evidence(size, {1: [torch.ones(B, H * W, tokens + 1)]}, patches)


def regions(uncond, text=None, config=CONFIG):
    return find_regions(uncond=uncond, text=text or evidence(), config=config)


COLUMNS = torch.arange(T).expand(B, -1)
PATCHES = Patches((1, H, W), columns=COLUMNS, owning=COLUMNS > 0, start=True, text=T)
OPTIONS = Namespace(model_config=None, model="m", weights="w", network=None)
REFUSED = {
    "empty": (lambda: scfg.cfg(EPS[0][:0], EPS[1][:0], 2.0), ValueError, "eps_text must not be em"),
    "q and k": (
        lambda: ops.attention_apply(Q, Q.double(), Q, 2),
        TypeError,
        "q and k must have one dtype",
    ),
    "columns": (
        lambda: ops.attention_apply(Q, Q, Q.double(), 2),
        TypeError,
        "q and columns must be float64 both or neither",
    ),
    "devices": (
        lambda: ops.attention_apply(Q, Q, Q.to("meta"), 2),
        ValueError,
        r"attention_apply needs tensors on one device, got \['cpu', 'cpu', 'meta'\]",
    ),
    "layers": (
        lambda: stacked(k_self=[Q]),
        ValueError,
        "k_self must have as many layers as q_self",
    ),
    "a bias": (
        lambda: stacked(key_bias=[None, Q[:, :, 0]]),
        TypeError,
        r"key_bias\[1\] must be None, as of the first layer",
    ),
    "a layer's type": (
        lambda: stacked(q_self=[Q, Q.half()], k_self=[Q, Q.half()]),
        TypeError,
        r"q_self\[1\] must be torch.float32, as of the first layer",
    ),
    "foreground": (
        lambda: ops.region_sums(*EPS, LABELS, FRONT.float(), T, 1),
        TypeError,
        "foreground must be bool",
    ),
    "grid": (lambda: guide_evidence(factor=2), ValueError, r"h and w must be those of \(8, 12\)"),
    "images": (lambda: guide_evidence(rows=1), ValueError, r"text\[0\] must have 2 images, got 1"),
    "min_share": (lambda: scfg.SCFGConfig(min_share=1.0), ValueError, r"min_share must be in \[0"),
    "min_peak": (lambda: scfg.SCFGConfig(min_peak=-1.0), ValueError, "min_peak must be finite and"),
    "regions' images": (lambda: by_regions(LABELS[:1]), ValueError, "regions must be of the same"),
    "regions' size": (lambda: by_regions(LABELS[:, 1:]), ValueError, "reduced by a power of two"),
    "no branch": (lambda: regions(None), RuntimeError, "unconditional branch must be recorded too"),
    "other branch": (
        lambda: regions(evidence(size=(W, H))),
        RuntimeError,
        "both branches must be recorded alike, got levels",
    ),
    "START alone": (lambda: regions(evidence(tokens=1)), ValueError, "uncond must have START and"),
    "transformer's branch": (
        lambda: regions(
            evidence(), evidence(patches=PATCHES), scfg.SCFGConfig(benchmark="foreground")
        ),
        RuntimeError,
        "both branches must be recorded alike, the unconditional one is not",
    ),
    "two networks": (
        lambda: embedded.ModelConfig(unet=None),
        ValueError,
        "one of unet and transformer must be given",
    ),
    "two models": (lambda: commands.load(OPTIONS), ValueError, "--model and --weights are two mod"),
    "levels": (lambda: scfg.guided(NET, 7.5, every=2), ValueError, "levels that the loop visits"),
    "x": (
        lambda: dpmpp_2m(None, [0.0], scaled_linear(), 4),
        TypeError,
        "x must be a tensor, got l",
    ),
    "branch": (
        lambda: parallel.guide_across(None, EPS[0], 5.0, branch="cond"),
        ValueError,
        "branch must be one of .* got 'cond'",
    ),
    "images to edit": (
        lambda: shapes_grid(None, {"img_shapes": [[(1, 2, 2), (1, 2, 2)]]}),
        ValueError,
        "img_shapes must be of one image, got 2",
    ),
    "latents": (
        lambda: list_grid(None, {"x": [torch.ones(4, 1, 2, n) for n in (2, 4)]}),
        ValueError,
        "x must hold latents of one size, got",
    ),
    "blocks": (
        lambda: find_layers(nn.Linear(1, 1), LAYOUTS["FluxTransformer2DModel"], "auto"),
        ValueError,
        r"Linear must have blocks in \(.*\), found none",
    ),
    "patch map": (lambda: _spread(torch.ones(1, 3, 9), (8, 6)), ValueError, "no map of size"),
    "a name": (lambda: scfg.nothing, AttributeError, "module 'scfg' has no attribute 'nothing'"),
    "no region kept": (lambda: Run(CONFIG).guide(*EPS, 5.0), RuntimeError, "no regions yet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_error_says_what_is_wrong(case):
    call, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        call()


def test_a_wrapper_says_what_its_network_lacks():
    net, args, _ = build("own")
    with scfg.UNetWrapper(net, ALL_LEVELS) as unet:
        with pytest.raises(RuntimeError, match="no call is recorded"):
            _ = unet.evidence
        with pytest.raises(ValueError, match=r"must be called with a latent \(b, c, H, W\)"):
            unet(torch.zeros(3))
        name = "mid_block.attentions.0.transformer_blocks.0"
        block = net.get_submodule(name)
        attend = block.attn1.forward
        block.attn1.forward = lambda x, context: attend(x)
        block.forward = lambda x, context, mask: block.attn2(block.attn1(x, x[:, :5]), context)
        with pytest.raises(RuntimeError, match=f"block '{name}' must attend to the image, then"):
            unet(*args)


@pytest.mark.parametrize(
    "queries, causal, message",
    [(None, True, "attention must not be causal"), (3, False, "attends with 3 queries to 3 keys")],
)
def test_an_attention_of_a_transformer_that_is_another_is_refused(queries, causal, message):
    model = embedded.networks(TRANSFORMER)["transformer"].requires_grad_(False)

    def attend(self, x, angles):
        few = x[:, None, :queries]
        return x + F.scaled_dot_product_attention(few, few, few, is_causal=causal)[:, 0].mean()

    for block in model.blocks:
        block.attn.__class__ = type("Other", (type(block.attn),), {"forward": attend})
    with scfg.UNetWrapper(model) as network, pytest.raises(RuntimeError, match=message):
        network(torch.ones(2, 48, 4, 6), torch.ones(2), torch.ones(2, 5, 16))


def test_a_guider_says_that_a_call_is_missing():
    guider = SemanticGuidance(7.5)
    guider.set_state(0, 1, torch.tensor(0))
    with pytest.raises(RuntimeError, match="called once for each branch; a call is missing"):
        guider.forward(EPS[1], EPS[0])


def test_embeddings_alone_have_no_phrases():
    attached = SimpleNamespace(pipe=SimpleNamespace(), phrases={"a cat": 2.0})
    places = [SimpleNamespace(tokenizer="tokenizer")]
    with pytest.raises(ValueError, match="need the prompt and its tokenizers"):
        AttachedTransformers._prompts(attached, {"prompt_embeds": Q}, places)


@dataclass
class Output:
    sample: torch.Tensor


def test_what_a_transformer_returns_is_rewritten_in_its_own_form():
    branch = SimpleNamespace(role="text", acts=True, _rewrite=lambda prediction: prediction + 1)
    for output, read in (
        (Output(Q), lambda x: x.sample),
        ((Q, "rest"), lambda x: x[0]),
        (Q, lambda x: x),
    ):
        new = Branches.after(branch, output)
        assert type(new) is type(output) and read(new).equal(Q + 1)


def test_a_call_around_another_that_is_gone_hands_everything_on():
    module, seen = nn.Linear(2, 2), []
    nothing = dict(after=lambda output: output, failed=lambda: None)
    leave = around(module, lambda args, kwargs: seen.append("first"), **nothing)
    around(module, lambda args, kwargs: seen.append("second"), **nothing)
    leave()
    assert module(input=torch.ones(1, 2)).shape == (1, 2) and seen == ["second"]


def test_regions_of_a_transformer_say_whether_its_start_is_flat():
    branch = evidence(patches=PATCHES)
    found = regions(branch, branch, scfg.SCFGConfig(benchmark="foreground"))
    assert found.start_is_flat.dtype == torch.bool and found.start_is_flat.shape == (B,)


def test_a_level_may_be_one_number_an_image():
    x, context = torch.randn(2, 4, 8, 12), torch.randn(2, 7, 24)
    levels, found = [9.0, 5.0, 1.0], []
    for t in (torch.tensor(5.0), torch.tensor([5.0, 5.0])):
        with scfg.guided(NET, 5.0, CONFIG, timesteps=levels, start=0.3, stop=0.7) as predict:
            found.append(predict(x, t, context, context.flip(1)))
    assert found[0].equal(found[1])


def test_a_gradient_passes_where_the_reference_is_asked_for():
    eps = [x.clone().requires_grad_() for x in EPS]
    self_map, cross_map = (
        torch.full((2 * B, H * W, m), 1 / m, requires_grad=True) for m in (H * W, T)
    )
    scfg.semantic_cfg(*eps, [self_map], [cross_map], 5.0, CONFIG, "torch").eps.sum().backward()
    assert all(torch.isfinite(x.grad).all() and x.grad.any() for x in eps)
    with pytest.raises(RuntimeError, match="complete got a tensor that requires grad"):
        scfg.semantic_cfg(*EPS, [self_map], [cross_map], 5.0, CONFIG)


def test_a_block_that_a_compiler_may_not_begin_to_read_is_named(monkeypatch):
    config = scfg.SCFGConfig(map_reduction=4, coarsest_reduction=4)
    with scfg.UNetWrapper(NET, config) as unet:
        unet(torch.ones(2, 4, 16, 16), torch.tensor(3), torch.ones(2, 7, 24))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(RuntimeError, match="ran at another resolution before it was compiled"):
            unet(torch.ones(2, 4, 2, 2), torch.tensor(3), torch.ones(2, 7, 24))


def test_a_configuration_that_is_not_at_hand_is_asked_for(monkeypatch, tmp_path):
    single_file = "diffusers.loaders.single_file_utils"
    monkeypatch.setattr(f"{single_file}.load_single_file_checkpoint", lambda file: None)
    kind = {"pretrained_model_name_or_path": "owner/model"}
    monkeypatch.setattr(f"{single_file}.fetch_diffusers_config", lambda checkpoint: kind)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: tmp_path)
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(RuntimeError, match="looks like owner/model, .* give config"):
        checkpoints.load(tmp_path / "x.safetensors")


def test_a_batch_is_split_evenly(monkeypatch):
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(training.dist, name, lambda value=value: value)
    with pytest.raises(ValueError, match="batch 3 cannot be split among 2 processes"):
        training.Trainer(training.Plan(batch=3, model=embedded.TRANSFORMER))


@pytest.mark.parametrize(
    "branches, levels, message",
    [
        ((1, 1), (1, 1), r"two ranks, one 'uncond' and one 'text'; .* Got branches \[1, 1\]"),
        ((0, 1), (1, 2), "both branches must be recorded at the same levels"),
    ],
)
def test_ranks_are_one_of_each_branch(monkeypatch, branches, levels, message):
    def exchange(head, group):
        pairs = zip(branches, levels, strict=True)
        return [torch.tensor([branch, *head[1:-2], level, 1]) for branch, level in pairs]

    monkeypatch.setattr(parallel, "exchange", exchange)
    with pytest.raises(RuntimeError, match=message):
        parallel.exchange_evidence(evidence(), "text")


@pytest.mark.parametrize(
    "module, call, message",
    [
        ("safetensors", lambda: files.read_tensors("x"), "weights need safetensors: pip install"),
        (
            "safetensors.torch",
            lambda: embedded.save_weights(nn.ModuleDict(), embedded.ModelConfig(), "x"),
            "weights need safetensors: pip install",
        ),
        (
            "tqdm",
            lambda: commands.run_generate(None),
            r"tqdm is missing: pip install '.*\[generate\]'",
        ),
        (
            "matplotlib",
            lambda: commands.run_evaluate(None),
            r"matplotlib is missing: pip install 'semantic-cfg\[evaluate\]'",
        ),
        ("transformers", None, r"need transformers: pip install 'semantic-cfg\[diffusers\]'"),
    ],
)
def test_what_is_not_installed_is_named_with_what_installs_it(
    module, call, message, monkeypatch, tmp_path
):
    (tmp_path / "model_index.json").touch()
    for name in ("run", "report", "figures"):
        monkeypatch.delitem(sys.modules, f"scfg.evaluate.{name}", raising=False)
        monkeypatch.delattr(f"scfg.evaluate.{name}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeError, match=message):
        (call or (lambda: checkpoints.load(tmp_path)))()


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="--device cuda: torch sees no CUDA device"):
        with one_of_all("cuda"):
            pass
