"""The nodes' own part, with stand-ins for ComfyUI: inputs become constants, or errors."""

import asyncio
import importlib
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from test_comfy_alone import Flux, encoder

import scfg
from scfg.adapters.comfyui.run import KEY, ComfyRun
from scfg.guidance import Guided

CHOICES = dict(rate_min=0.5, rate_max=2.0, max_scale=0.0, start=0.1, stop=0.9, every=2)
CHOICES |= dict(propagation="none", map_reduction=16)


@pytest.fixture
def nodes(monkeypatch):
    """The module of the nodes, made with an interface that only remembers."""
    io = MagicMock(ComfyNode=object, NodeOutput=lambda *given: given, Schema=lambda **given: given)
    parts = {
        "comfy": {}, "comfy_api": {},
        "comfy_api.latest": dict(ComfyExtension=object, io=io),
        "comfy.model_patcher": dict(PatcherInjection=lambda *pair: pair),
        "comfy.patcher_extension": dict(CallbacksMP=MagicMock(), WrappersMP=MagicMock()),
    }  # fmt: skip
    for name, holds in parts.items():
        module = ModuleType(name)
        vars(module).update(holds)
        monkeypatch.setitem(sys.modules, name, module)
    own = ["scfg.adapters.comfyui.nodes", "scfg.adapters.comfyui.patch"]
    for name in own:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(own[0])
    for name in own:
        sys.modules.pop(name, None)


def patcher():
    model = MagicMock(
        model=SimpleNamespace(diffusion_model=Flux()), model_options={}, attachments={}
    )
    model.clone.return_value = model
    model.set_attachments = model.attachments.__setitem__
    return model


def test_what_a_node_is_given_becomes_a_run_of_the_model(nodes):
    from scfg.adapters.comfyui import comfy_entrypoint

    listed = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
    schemas = [node.define_schema() for node in listed]
    assert [schema["node_id"].split("_")[1] for schema in schemas] == ["Guidance", "View", "Mask"]
    clip = SimpleNamespace(tokenize=encoder)
    text = dict(clip=clip, prompt="a red circle", phrases="red circle: 2")
    (model,) = nodes.SemanticGuidance.execute(patcher(), **CHOICES, **text)
    run = model.attachments[KEY].run
    assert (run.start, run.stop, run.every) == (0.1, 0.9, 2)
    assert run.config == scfg.SCFGConfig(
        map_reduction=16, coarsest_reduction=16, propagation="none", rate_min=0.5, rate_max=2.0,
        max_scale=None,
    )  # fmt: skip
    assert model.set_model_sampler_pre_cfg_function.call_args.args[0].semantic_cfg
    with pytest.raises(ValueError, match="phrases need clip and prompt"):
        nodes.SemanticGuidance.execute(patcher(), **CHOICES, phrases="red: 2")


def test_a_look_at_what_did_not_run_is_refused_by_name(nodes):
    model, latent = patcher(), {"samples": torch.zeros(1, 4, 8, 6)}
    look = nodes.SemanticGuidanceView.execute
    with pytest.raises(ValueError, match="model must come from Semantic-aware CFG"):
        look(model, latent, -1)
    run = model.attachments[KEY] = ComfyRun(scfg.SCFGConfig())
    with pytest.raises(ValueError, match="step must be one of 0 that were guided, got -1"):
        look(model, latent, -1)
    labels = torch.zeros(1, 8, 6, dtype=torch.int64)
    rate = torch.ones(1, 1, 8, 6)
    run.history.append(Guided(rate, rate, labels, labels > 0, torch.zeros(1) > 0))
    regions, rates = look(model, latent, 0)
    assert regions.shape[-1] == rates.shape[-1] == 3
    with pytest.raises(ValueError, match=r"samples must be of the last run .* \(8, 6\), got"):
        look(model, {"samples": torch.zeros(1, 4, 8, 8)}, 0)
    with pytest.raises(ValueError, match="phrase must be words of the prompt, got none"):
        nodes.SemanticGuidanceMask.execute(model, latent, 0, None, "a dog", " ")
