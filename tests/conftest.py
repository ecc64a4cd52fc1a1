"""The Triton interpreter where there is no GPU, golden files, and one comparison helper."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when csrc_triton is imported

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # a core for each process of the suite

# ``--hypothesis-profile long`` takes ten minutes where the suite takes seconds
settings.register_profile("suite", max_examples=12, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=1500, deadline=None, print_blob=True)
settings.load_profile("suite")

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def one_thread():
    """Where the number of threads changes the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Golden:
    """One golden file as tensors: maps per layer, predictions, and the expected results."""

    def __init__(self, path, dtype=torch.float32):
        data = np.load(path)
        self.name = path.stem
        self.b, self.size, self.reduction, self.tokens = data["meta"].tolist()
        self.guidance_scale = float(data["guidance_scale"])
        self.expected = {key: torch.from_numpy(data[key]) for key in data.files}
        self.eps_uncond = self.expected["eps_uncond"].to(dtype)
        self.eps_text = self.expected["eps_text"].to(dtype)
        layers = sorted(key[5:] for key in data.files if key.startswith("self_"))
        self.reductions = [int(layer.split("_")[0][1:]) for layer in layers]
        self.self_maps = [self.expected["self_" + layer].to(dtype) for layer in layers]
        self.cross_maps = [self.expected["cross_" + layer].to(dtype) for layer in layers]


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden_path(request):
    return request.param


def assert_close(*, actual, expected, share=0.0, what="result"):
    """Fail with the place and both values of the largest error above a share of max |expected|.

    The one rule of the suite: a result is judged by the scale of what it is compared with, so that
    latents of magnitude 100 and rates near 1 are held to the same number of digits.
    """
    assert actual.shape == expected.shape, f"{what}: {actual.shape} against {expected.shape}"
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    finite = torch.isfinite(expected)
    assert torch.isfinite(actual).equal(finite), f"{what}: finite elsewhere"
    error = torch.where(finite, (actual - expected).abs(), 0.0)
    scale = torch.where(finite, expected.abs(), 0.0).max().item() if expected.numel() else 0.0
    if error.numel() and error.max() > share * scale:
        where = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
        raise AssertionError(
            f"{what}: {actual[where]} against {expected[where]} at {where}; the error is "
            f"{error.max():.3e}, allowed {share} of {scale:.3e}"
        )
