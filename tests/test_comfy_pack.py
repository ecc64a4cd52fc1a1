"""The clone as a pack of ComfyUI nodes: loaded by ComfyUI's own loader, with its workflows run."""

import asyncio
import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("comfy") is None:
    pytest.skip("ComfyUI is not on the path", allow_module_level=True)

from comfy_hosts import make  # noqa: E402
from test_comfy_alone import NAMES, ROOT, WEB, WORKFLOWS  # noqa: E402


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """ComfyUI's module of nodes, after it has loaded this folder and those of its own we use."""
    import nodes

    clone = tmp_path_factory.mktemp("custom_nodes") / "semantic-cfg"
    clone.symlink_to(ROOT, target_is_directory=True)
    assert asyncio.run(nodes.load_custom_node(str(clone)))
    extras = Path(nodes.__file__).parent / "comfy_extras"
    for name in ("nodes_mask", "nodes_primitive"):
        assert asyncio.run(nodes.load_custom_node(str(extras / f"{name}.py")))
    return nodes


def test_the_clone_loads(pack):
    assert set(NAMES) <= set(pack.NODE_CLASS_MAPPINGS)
    assert Path(pack.EXTENSION_WEB_DIRS["semantic-cfg"]).samefile(WEB)
    from comfy_config.config_parser import extract_node_configuration

    settings = extract_node_configuration(str(ROOT))
    assert settings.tool_comfy.display_name == "Semantic-aware CFG"
    assert settings.project.supported_comfyui_version == ">=0.3.64"


@pytest.mark.parametrize("name", NAMES)
def test_pages_tell_of_every_input_and_output(pack, name):
    schema = pack.NODE_CLASS_MAPPINGS[name].GET_SCHEMA()
    assert schema.display_name == pack.NODE_DISPLAY_NAME_MAPPINGS[name]
    assert schema.description and schema.category == "advanced/guidance"
    page = (WEB / "docs" / f"{name}.md").read_text()
    assert page.startswith(f"# {schema.display_name}\n")
    told = set(re.findall(r"`(\w+)`", page))
    assert {item.id for item in schema.inputs} <= told
    assert {item.display_name for item in schema.outputs} <= told


def tiny_checkpoint():
    """What the checkpoint loader gives: a model, a CLIP of one token a word, a decoder."""

    def tokenize(text, **options):
        ids = [1000 + sum(map(ord, word)) for word in text.split()]
        return {"l": [[(i, 1.0) for i in [1, *ids, *[2] * (76 - len(ids))]]]}

    def encode(tokens):
        ids = torch.tensor([[pair[0] for pair in tokens["l"][0]]], dtype=torch.float32)
        g = torch.Generator().manual_seed(0)
        waves = torch.randn(32, generator=g)
        return [[torch.sin(ids[..., None] * waves), {}]]

    clip = SimpleNamespace(tokenize=tokenize, encode_from_tokens_scheduled=encode)
    decode = SimpleNamespace(decode=lambda x: torch.zeros(len(x), 8, 8, 3))
    return make(), clip, decode


def values(node, definition):
    """Widgets of a node by name, as the browser assigns them; those that are linked come later."""
    widgets = iter(node["widgets_values"])
    given = {}
    for group in ("required", "optional"):
        for name, (kind, *_) in definition.INPUT_TYPES().get(group, {}).items():
            if isinstance(kind, list) or kind in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"):
                given[name] = next(widgets)
                if name == "seed":
                    next(widgets)  # what the browser does to it after a run
    assert next(widgets, None) is None
    return given


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run(pack, path):
    """The graph, in order; the checkpoint is a tiny one, and nothing is written."""
    graph = json.loads(path.read_text())
    sources = {link[0]: (link[1], link[2]) for link in graph["links"]}
    results, shown = {}, []
    for node in sorted(graph["nodes"], key=lambda node: node["order"]):
        definition = pack.NODE_CLASS_MAPPINGS[node["type"]]
        given = values(node, definition)
        for item in node["inputs"]:
            if item["link"] is None:
                continue
            source, slot = sources[item["link"]]
            given[item["name"]] = results[source][slot]
        if node["type"] == "CheckpointLoaderSimple":
            results[node["id"]] = tiny_checkpoint()
            continue
        if node["type"] in ("SaveImage", "PreviewImage"):
            shown.append(given["images"])
            continue
        if node["type"] == "KSampler":
            given |= {"steps": 2}
        if node["type"] == "EmptyLatentImage":
            given |= {"width": 192, "height": 128}
        owner = definition if inspect.ismethod(definition.__dict__.get("execute")) else definition()
        out = getattr(owner, definition.FUNCTION)(**given)
        results[node["id"]] = getattr(out, "args", out)
    assert all(image.dim() == 4 and image.shape[-1] == 3 for image in shown)
    assert len(shown) == {"Guidance": 1, "View": 3, "Mask": 2}[path.stem.split("_")[1]]
