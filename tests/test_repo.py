"""What the repository says about itself is true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "scfg").rglob("*.py"), *(ROOT / "csrc_triton").glob("*.py")])
CORE = {"torch", "numpy", "einops", "scfg", "csrc_triton"}
ALLOWED = {  # module -> what it may import of the project at import time
    "csrc_triton": {"csrc_triton"},
    "scfg/config": set(),
    "scfg/reference": set(),
    "scfg/library": {"scfg.reference"},
    "scfg/ops": {"scfg.reference", "scfg.library"},
    "scfg/blocks": set(),
    "scfg/unet": set(),
    "scfg/sampling": set(),
}
HOSTS = {"diffusers", "comfy", "k_diffusion", "transformers", "comfy_api"}


def imports(path, top_level):
    """Modules a file imports: when it is itself imported, or anywhere."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module in ("scfg", "csrc_triton"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    name = str(path.relative_to(ROOT).with_suffix(""))
    inside = {
        m for m in imports(path, top_level=False) if m.split(".")[0] in ("scfg", "csrc_triton")
    }
    for prefix, allowed in ALLOWED.items():
        if name == prefix or name.startswith(prefix + "/"):
            extra = {m for m in inside if not any(m == a or m.startswith(a + ".") for a in allowed)}
            assert not extra, f"{name} imports {extra}"
    first = {m.split(".")[0] for m in imports(path, top_level=True)}
    if name.startswith("scfg"):
        assert "csrc_triton" not in first and "triton" not in first
    if not name.startswith("scfg/adapters"):
        assert not first & HOSTS


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


def test_every_module_says_what_it_is():
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), f"{path} has no docstring"


def test_every_public_function_has_a_docstring():
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_every_test_file_is_collected():
    for path in (ROOT / "tests").glob("*.py"):
        if re.search(r"^def test_", path.read_text(), re.MULTILINE):
            assert path.name.startswith("test_"), path.name
