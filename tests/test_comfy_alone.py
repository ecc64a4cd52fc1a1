"""What of the ComfyUI pack can be tested without ComfyUI."""

import json
import re
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import scfg
from scfg.adapters.comfyui.layouts import kind_of
from scfg.adapters.comfyui.phrases import parse_phrases, read_prompt
from scfg.adapters.comfyui.run import ComfyRun
from scfg.evidence import Evidence
from scfg.patches import Patches
from scfg.recording.layouts import Words

ROOT = Path(__file__).parents[1]
WEB = ROOT / "scfg" / "adapters" / "comfyui" / "web"
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
NAMES = ["SemanticCFG_Guidance", "SemanticCFG_Mask", "SemanticCFG_View"]


def test_every_node_has_a_page_and_a_workflow():
    assert [path.stem for path in WORKFLOWS] == NAMES
    assert sorted(path.stem for path in (WEB / "docs").glob("*.md")) == NAMES
    settings = (ROOT / "pyproject.toml").read_text()
    icon = re.search(r'^Icon = "(.+)"$', settings, re.MULTILINE).group(1)
    assert ROOT / icon == WEB / "icon.svg" and (ROOT / icon).read_text().startswith("<svg ")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_links_join_what_they_say(path):
    graph = json.loads(path.read_text())
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert path.stem in {node["type"] for node in nodes.values()}
    ends = [item["link"] for node in nodes.values() for item in node["inputs"]]
    assert sorted(filter(None, ends)) == sorted(link[0] for link in graph["links"])
    for number, source, slot, target, place, kind in graph["links"]:
        output, given = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert output["type"] == given["type"] == kind
        assert number in output["links"] and given["link"] == number
        assert nodes[source]["order"] < nodes[target]["order"]


class Flux(nn.Module):
    """Named and called as ComfyUI's; what each patch looks at is given. Grid 4 x 3, 5 tokens."""

    patch_size = 2
    owner = torch.tensor([[1, 1, 4], [1, 1, 4], [1, 2, 2], [2, 2, 2]])

    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList([Block() for _ in range(3)])
        self.single_blocks = nn.ModuleList()

    def forward(self, x, context, transformer_options):
        for block in self.double_blocks:
            block(self.owner.flatten(), context, transformer_options)
        return x


class Block(nn.Module):
    """Its image attends to one token a patch, once; its second softmax is to be left alone."""

    def forward(self, owner, context, options):
        b, t, n = len(context), context.shape[1], len(owner)
        keys = torch.eye(t + n).expand(b, -1, -1)
        queries = 200 * torch.eye(t + n)[torch.cat([torch.arange(t), owner])].expand(b, -1, -1)
        attend = options.get("optimized_attention_override", lambda f, *given, **_: f(*given))
        for q, k in ((queries, keys), (queries[:, :n].flip(1), keys[:, :n])):
            attend(lambda q, k, v, heads, **_: v, q, k, k, 1, transformer_options=options)


def test_patches_go_to_what_they_look_at_and_rates_to_regions():
    model, run = Flux(), ComfyRun(scfg.SCFGConfig(propagation="none", min_share=0.0))
    patcher = SimpleNamespace(model=SimpleNamespace(diffusion_model=model))
    names = uuid.uuid4(), uuid.uuid4()
    context = torch.zeros(1, 5, 8)
    conds = [
        [{"uuid": name, "model_conds": {"c_crossattn": SimpleNamespace(cond=context)}}]
        for name in names
    ]
    run.inject(patcher)
    x, options = torch.zeros(2, 1, 8, 6), {"uuids": names[::-1], "cond_or_uncond": [1, 0]}
    told = run.begin_step(conds, torch.ones(1), options)
    assert told == conds
    both = context.expand(2, -1, -1)
    run.record(model, lambda options: model(x, both, options), x, both, options)
    labels = model.owner.repeat_interleave(2, 0).repeat_interleave(2, 1)  # (8, 6)
    strength = torch.tensor([0.0, 1.0, 2.0, 0.0, 4.0])[labels][None, None]
    uncond = torch.full((1, 1, 8, 6), 3.0)
    text, _ = run.combine(conds, [uncond + strength, uncond], x[:1], 2.0, torch.ones(1))
    rate = ((text - uncond) / strength)[0, 0]
    mean = float(strength.mean())
    assert run.history[0].labels[0].equal(labels)
    for row, column, norm in ((1, 1, 1.0), (7, 4, 2.0), (1, 5, 4.0)):  # inside, where no blur is
        assert float(rate[row, column]) == pytest.approx(min(max(mean / norm, 0.8), 3.0), rel=1e-5)
    run.eject(patcher)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_step_that_cannot_be_guided_says_why():
    def prompts(count):
        cond = {"c_crossattn": SimpleNamespace(cond=torch.zeros(1, 6, 8))}
        return [{"uuid": uuid.uuid4(), "model_conds": cond} for _ in range(count)]

    conds, sigma, x = [prompts(1), prompts(1)], torch.ones(1), torch.zeros(1, 1, 8, 6)
    with pytest.raises(RuntimeError, match="start, stop and every need the sampler's schedule"):
        ComfyRun(scfg.SCFGConfig(), every=2).begin_step(conds, sigma, {})
    run = ComfyRun(scfg.SCFGConfig())
    run.begin_step(conds, sigma, {})
    with pytest.raises(RuntimeError, match="the guider of this workflow does not ask the model's"):
        run.begin_step(conds, 2 * sigma, {})
    with pytest.raises(RuntimeError, match="the attention of the model was not seen"):
        run.combine(conds, [x, x], x, 2.0, sigma)
    one = read_prompt(SimpleNamespace(tokenize=encoder), "a cat", [Words("l")], {"a cat": 2.0})
    conds[0] += prompts(1)
    run = ComfyRun(scfg.SCFGConfig(), prompt=one)
    run.begin_step(conds, sigma, {})
    columns = torch.arange(7)[None]
    patches = Patches((1, 4, 3), columns=columns, owning=columns > 0, start=True, text=6)
    run.seen = dict.fromkeys(run.prompts, Evidence((4, 3), {1: [torch.ones(1, 12, 7)]}, patches))
    with pytest.raises(ValueError, match="prompt and phrases need one prompt, this image has"):
        run.combine(conds, [x, x], x, 2.0, sigma)


def encoder(text):
    """Tokenizers as ComfyUI has them: chunks with START, END and padding; and a template."""
    words = [len(word) for word in text.replace("(", " ").replace(":1.3)", " ").split()]
    pieces = [n for word in words for n in ([word] if word < 6 else [word, 0])]
    chunks = [words[i : i + 4] for i in range(0, max(len(words), 1), 4)]
    pad = [[1, *c, 2, *[2] * (4 - len(c))] for c in chunks]
    both = {"l": pad, "qwen25_7b": [[8, 9, 8, *pieces, 9, 7]]}
    return {name: [[(n, 1.0) for n in chunk] for chunk in rows] for name, rows in both.items()}


def test_prompts_are_read_through_chunks_templates_and_emphasis():
    clip = SimpleNamespace(tokenize=encoder)
    text = "a red circle (blue square:1.3)"
    found = {}
    for name, first in (("l", 0), ("qwen25_7b", None)):
        prompt = read_prompt(clip, text, [Words(name, first)], {"Blue square": 1.5})
        found[name] = prompt
    assert found["l"].words(12).tolist() == [-1, 0, 1, 2, 3, -1, -1, 4, -1, -1, -1, -1]
    assert found["l"].weights(12).tolist() == [1, 1, 1, 1, 1.5, 1, 1, 1.5, 1, 1, 1, 1]
    template = [-1, 0, 1, 2, 2, 3, 4, 4, -1, -1]
    assert found["qwen25_7b"].words(10).tolist() == template
    assert found["qwen25_7b"].words(13).tolist() == [-1, -1, -1, *template]
    with pytest.raises(ValueError, match="has 77 tokens; got one of 12"):
        found["l"].words(77)
    with pytest.raises(ValueError, match=r"has no \['a circle'\]"):
        read_prompt(clip, text, [Words("l")], {"a circle": 2.0})


def test_what_is_neither_a_unet_nor_known_is_refused():
    with pytest.raises(ValueError, match="Linear is neither a U-Net nor a transformer"):
        kind_of(nn.Linear(1, 1))


def test_lines_of_phrases_are_phrases_with_factors():
    assert parse_phrases("blue square: 1.5\n\n a: b : 2 \n") == {"blue square": 1.5, "a: b": 2.0}
    for line in ("blue square", "square: x", ": 2", "square: 0", "square: nan", "square: inf"):
        with pytest.raises(ValueError, match=f"must be 'phrase: factor.*, got '{line}'"):
            parse_phrases(line)
