"""The probe: layers by how far they agree with the others."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from conftest import assert_close
from transformer_hosts import build, output
from transformer_pipes import G, draw, given, pipeline

import scfg
from scfg.adapters import layers
from scfg.adapters.layers import main, rank_pipeline
from scfg.evidence import Evidence
from scfg.patches import Patches
from scfg.recording.probe import rank_evidence, rank_layers, table
from scfg.recording.replayed import TransformerRecorder


def test_a_layer_that_disagrees_comes_last():
    grid, groups = (1, 4, 6), 4  # START, other, two words
    left = torch.zeros(2, 24, 5)
    left[..., 2], left[:, 12:, 3] = 1.0, 2.0
    right = torch.zeros(2, 24, 5)
    right[..., 3], right[:, 12:, 2] = 0.1, 0.15
    columns = torch.arange(groups).expand(2, -1)
    owning = torch.tensor([[False, False, True, True]] * 2)
    found = Patches(grid, columns, owning, False, 4)
    evidence = Evidence((4, 6), {1: [left, right, left * 2]}, found)
    recorder = SimpleNamespace(names=["a", "b", "c"], text_masses=[0.1, 0.2, 0.3])
    ranked = rank_evidence(evidence, recorder, scfg.SCFGConfig(), "torch")
    assert [layer.name for layer in ranked] == ["a", "c", "b"]
    assert [layer.agreement for layer in ranked] == [1.0, 1.0, 0.0]
    peaks = torch.tensor([layer.peak for layer in ranked])
    assert_close(actual=peaks, expected=torch.tensor([2.0, 2.0, 2.0]), share=1e-6)
    assert [layer.text_mass for layer in ranked] == [0.1, 0.3, 0.2]


def test_all_layers_of_a_model_with_their_text_mass():
    host = build("cogview4")
    ranked = rank_layers(host.model, lambda: output(host))
    assert len(ranked) == 3 and table(ranked).splitlines()[1].startswith(ranked[0].name)
    for layer in ranked:
        config = scfg.SCFGConfig(layers=(layer.name,))
        recorder = TransformerRecorder(host.model, config, "torch", keep_maps=True)
        recorder.start((), host.call)
        output(host)
        recorder.finish()
        mass = recorder.layers[0].cross_map.sum(-1).mean()
        recorder.remove()
        assert_close(actual=torch.tensor(layer.text_mass), expected=mass, share=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_layers_of_a_pipeline_in_its_own_run(name):
    pipe, call, key = pipeline(name)
    plain = draw(name, pipe, call, key, steps=4)
    options = {**call, key: G, "num_inference_steps": 4, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    ranked = rank_pipeline(pipe, 0.5, given(key, name), **options, generator=generator)
    count = 3 if name == "sd3" else 4
    assert len(ranked) == count and all(0 <= layer.agreement <= 1 for layer in ranked)
    assert draw(name, pipe, call, key, steps=4).equal(plain)
    options[key] = 1.0
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="not guided"):
        rank_pipeline(pipe, 0.5, 1.0 if name == "flux" else None, **options)


def test_the_command_says_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "true_cfg_scale" in capsys.readouterr().out


def test_the_command_loads_and_draws_as_it_is_told(monkeypatch):
    seen = {}

    def load(folder, **options):
        seen["load"] = (folder, options)
        return SimpleNamespace(to=lambda device: device)

    def rank(*given, **call):
        seen["rank"] = (given, call)
        return []

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)
    monkeypatch.setattr(layers, "rank_pipeline", rank)
    monkeypatch.setattr(layers, "table", str)
    line = "folder dog --steps 4 --at 0.25 --scale 3 --size 64 96 --dtype bfloat16"
    main(line.split())
    safe = dict(torch_dtype=torch.bfloat16, local_files_only=True, use_safetensors=True)
    assert seen["load"] == ("folder", safe)
    call = dict(prompt="dog", negative_prompt=" ", num_inference_steps=4, height=64, width=96)
    call |= dict(output_type="latent", true_cfg_scale=3.0)
    assert seen["rank"] == (("cpu", 0.25, 3.0), call)
