"""What the repository says about itself is true."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import scfg

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "scfg").rglob("*.py"), *(ROOT / "csrc_triton").glob("*.py")])
# A file imports from lower floors, and from its own folder where that makes no circle.
FLOORS = {
    "csrc_triton": 0,
    "scfg/config": 1, "scfg/names": 1, "scfg/reference": 1, "scfg/sampling": 1,
    "scfg/checks": 1.5,
    "scfg/backends": 2, "scfg/models/files": 2, "scfg/models/topology": 2, "scfg/models/unet": 2,
    "scfg/ops": 3,
    "scfg/patches": 3.5,
    "scfg/evidence": 4,
    "scfg/regions": 4.5,
    "scfg/guidance": 5,
    "scfg/recording": 6, "scfg/methods": 6, "scfg/models": 6,
    "scfg/__init__": 7, "scfg/unet": 7,
    "scfg/drawing": 8,
    "scfg/adapters": 9, "scfg/evaluate": 9, "scfg/options": 9,
    "scfg/commands": 10,
    "scfg/__main__": 11,
}  # fmt: skip
HOSTS = {"diffusers", "comfy", "k_diffusion", "transformers", "comfy_api"}


def imports(path, top_level):
    """Modules a file imports: when it is itself imported, or anywhere."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def named(path):
    return str(path.relative_to(ROOT).with_suffix(""))


def room(name):
    """The most precise entry of FLOORS for a file or module, or None."""
    parts = name.replace(".", "/").split("/")
    prefixes = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in FLOORS), None)


def file_of(module):
    """The source that a module's name stands for; a name within a module, that module's."""
    path = ROOT / module.replace(".", "/")
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return named(candidate)
    return file_of(module.rpartition(".")[0])


ARROWS = {
    named(path): {
        file_of(m)
        for m in imports(path, top_level=False)
        if m.split(".")[0] in ("scfg", "csrc_triton")
    }
    for path in SOURCES
}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_point_downwards(path):
    name = named(path)
    assert room(name), f"{name} has no floor"
    for other in ARROWS[name]:
        same = name.rpartition("/")[0] == other.rpartition("/")[0] != "scfg"
        nested = other.startswith(name.rpartition("/")[0] + "/") and name.count("/") > 1
        below = FLOORS[room(other)] < FLOORS[room(name)]
        assert below or same or nested or name == "scfg/__init__", f"{name} imports {other}"
    first = {m.split(".")[0] for m in imports(path, top_level=True)}
    if name.startswith("scfg"):
        assert "csrc_triton" not in first and "triton" not in first
    if not name.startswith("scfg/adapters"):
        assert not first & HOSTS


@pytest.mark.parametrize("of", ["files", "folders"])
def test_no_circle(of):
    def place(name):
        return name if of == "files" or room(name) == name else name.rpartition("/")[0]

    graph = {}
    for name, others in ARROWS.items():
        arrows = graph.setdefault(place(name), set())
        arrows |= {place(other) for other in others} - {place(name)}
    graph.pop("scfg/__init__", None)
    while ready := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in ready:
            del graph[name]
    assert not graph, f"in circles: {graph}"


def test_importing_the_library_needs_torch_alone_and_changes_nothing():
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'triton', 'csrc_triton', 'safetensors', 'tqdm', 'PIL',
                                  'matplotlib', 'diffusers', 'transformers'}:
            raise ImportError(name)
import os, torch
before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
          torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
          torch.random.get_rng_state().sum().item(), dict(os.environ))
sys.meta_path.insert(0, Refuse())
read = []
real = type(os.environ).__getitem__
type(os.environ).__getitem__ = lambda self, key: (read.append(key), real(self, key))[1]
import scfg
assert not read, read
after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),
         torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
         torch.random.get_rng_state().sum().item(), dict(os.environ))
assert before == after
assert set(scfg.__all__) <= set(dir(scfg))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_nothing_reads_pickles_or_the_environment():
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(
            r"\bimport pickle\b|torch\.load\(|torch\.save\(|os\.environ|getenv", text
        ), path


def test_the_version_is_one():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{scfg.__version__}"\n' in project


def test_every_module_says_what_it_is():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"


@pytest.mark.parametrize("path", [p for p in SOURCES if ">>>" in p.read_text()], ids=named)
def test_examples_in_docstrings_hold(path):
    failed, tried = doctest.testmod(importlib.import_module(named(path).replace("/", ".")))
    assert tried and not failed


def test_every_public_function_has_a_docstring():
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_every_test_file_is_collected():
    for path in (ROOT / "tests").glob("*.py"):
        if re.search(r"^def test_", path.read_text(), re.MULTILINE):
            assert path.name.startswith("test_"), path.name
