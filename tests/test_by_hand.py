"""One whole step worked out on paper: every number below is from the equations, none from code."""

import math

import pytest
import torch
from conftest import assert_close

import scfg


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_a_step_of_four_patches_and_three_tokens(backend):
    """From maps to the guided prediction, patches in rows: 0 1 / 2 3.

    Each patch attends to itself, so nothing spreads, and to one token: in the text branch 0 and 1
    to "a", 2 to "b", 3 to START; in the other 0, 1 and 2 to "a", 3 to START. Divided by their means
    the text's maps are a (2, 2, 0, 0), b (0, 0, 4, 0), START (0, 0, 0, 4), and of the other branch
    START (0, 0, 0, 4), the rest (4/3, 4/3, 4/3, 0).

    The blur keeps c = 1 / (1 + 2/e) = 0.576 of a patch along each axis and takes k = 1 - c of its
    neighbour: c^2 = 0.332 of itself, ck = 0.244 of each neighbour, k^2 = 0.180 of the opposite one.

        patch     0      1      2      3
        START   0.719  0.977  0.977  1.327
        a       1.152  1.152  0.848  0.848
        b       0.977  0.719  1.327  0.977
        owner     a      a      b    START
        rest    1.094  1.008  1.008  0.891     (the other branch's, against the same START)
        in front yes    yes    yes    no

    The guidance norm is (1, 3, 4, 2): 8/3 in front, 2 of a, 4 of b, 2 of START. Rates are 4/3, 2/3
    raised to 0.8, and 4/3. Blurred, b's 0.8 is 8/15 less than all around it.
    """
    text = torch.tensor([[0.0, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    uncond = torch.tensor([[0.0, 1, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0]])
    cross_map, self_map = torch.stack([uncond, text]), torch.eye(4).expand(2, 4, 4)
    norm = torch.tensor([[[[1.0, 3], [4, 2]]]])
    eps_uncond = torch.full_like(norm, 0.5)
    config = scfg.SCFGConfig(map_reduction=1, coarsest_reduction=1)
    out = scfg.semantic_cfg(
        eps_uncond, eps_uncond - norm, [self_map], [cross_map], 3.0, config, backend
    )
    assert out.labels.tolist() == [[[1, 1], [2, 0]]]
    assert out.foreground.tolist() == [[[True, True], [True, False]]]
    c = 1 / (1 + 2 / math.e)
    k, less = 1 - c, 8 / 15
    top = [4 / 3 - c * k * less, 4 / 3 - k * k * less]
    rate = [top, [4 / 3 - c * c * less, 4 / 3 - c * k * less]]
    rate = torch.tensor([[rate]])
    assert_close(actual=out.rate, expected=rate, share=1e-6)
    assert_close(actual=out.eps, expected=0.5 - 3 * rate * norm, share=1e-6)
