"""How many graphs torch.compile makes of a guided step, and of a U-Net that is recorded."""

import pytest
import torch
from conftest import assert_close
from tiny import tiny_unet

import scfg
from scfg.models.unet import UNetConfig

TWO_LEVELS = UNetConfig(4, 4, (8, 16), (1, 0), 1, (2, 2), 1, 24, norm_groups=4)
ONE_LEVEL = UNetConfig(4, 4, (8,), (1,), 1, (2,), 1, 24, norm_groups=4)
SIZES = [(8, 12), (12, 16), (16, 12), (8, 20), (20, 16)]


def arguments(size):
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(*s, generator=generator) for s in ((1, 4, *size), (2, 7, 24)))
    return torch.cat([x, x]), torch.tensor([500, 500]), context


class Counting:
    """A compiler that only counts what it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def step_of(unet):
    return lambda *args: unet.guide(*unet(*args).chunk(2), 6.0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("whole", "config", "dynamic", "sizes", "most"),
    [
        (True, TWO_LEVELS, False, 1, 1),
        (True, TWO_LEVELS, True, 5, 2),
        (False, ONE_LEVEL, True, 5, 2),
    ],
    ids=["step", "step-dynamic", "unet-dynamic"],
)
def test_one_graph_a_size_or_two_for_all(whole, config, dynamic, sizes, most):
    torch._dynamo.reset()
    net, count = tiny_unet(config=config), Counting()
    levels = scfg.SCFGConfig(map_reduction=1, coarsest_reduction=len(config.heads))
    options = dict(fullgraph=True, dynamic=dynamic, backend=count)
    if whole:
        step = torch.compile(step_of(scfg.UNetWrapper(net, levels)), **options)
    else:
        step = step_of(scfg.UNetWrapper(torch.compile(net, **options), levels))
    plain = step_of(scfg.UNetWrapper(tiny_unet(config=config), levels))
    for size in (*SIZES[:sizes], SIZES[0], SIZES[0]):
        out, expected = step(*arguments(size)), plain(*arguments(size))
        assert_close(actual=out.eps, expected=expected.eps, share=1e-4)
        assert torch.equal(out.labels, expected.labels)
    assert count.graphs <= most
