"""What recording costs the host, with every operation replaced by a stand-in that only allocates.

    pytest benchmarks/bench_host.py
    python -m benchmarks.bench_host [--out benchmarks/results/host.json]

On a fast GPU an eager step is bound by the host, which a CPU can measure: modules and operations
compute nothing here, so that what is left is hooks, bookkeeping, checks and dispatch. Everything
from `start` to `finish` counts, and is divided among the recorded layers, which are grouped as on a
GPU. What a launch itself costs the host (Triton's binder, the driver) needs a GPU and is not in it.

Rows are differences between runs with stand-ins at different depths: instead of reading and folding
(hooks), of the operations as the recorder calls them (bookkeeping), and of what does the work
(dispatch). Checks are what `scfg.ops` would add, which the recorder passes by: they are measured on
the public operations, two a layer, and not in the sum. Each is the least of 30 runs, taken in
turns, in processor time of the thread, which other work disturbs less than a clock does.
"""

import argparse
import contextlib
import time
from unittest import mock

import pytest
import torch
from torch import nn

import scfg
from benchmarks import records
from benchmarks.machine import machine
from scfg import backends, ops, reference
from scfg.recording import folding
from scfg.recording.recorder import AttentionRecorder

TOKENS, ROUNDS = 77, 30
CONFIG = scfg.SCFGConfig()
# Latent, (reduction, width, heads) of each block in forward order.
MODELS = {
    "sd15": (64, [(1, 320, 8)] * 2 + [(2, 640, 8)] * 2 + [(4, 1280, 8)] * 2 + [(8, 1280, 8)]
             + [(4, 1280, 8)] * 3 + [(2, 640, 8)] * 3 + [(1, 320, 8)] * 3),
    "sdxl": (128, [(2, 640, 10)] * 4 + [(4, 1280, 20)] * 60 + [(2, 640, 10)] * 6),
}  # fmt: skip
ROWS = ("hooks", "bookkeeping", "dispatch")
MORE = 192  # blocks that are not recorded, added to see what one costs


class Projection(nn.Module):
    """Returns what it was given to return."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


class Attention(nn.Module):
    """Calls its projections and nothing else."""

    def __init__(self, q, k, heads):
        super().__init__()
        self.heads, self.to_q, self.to_k = heads, Projection(q), Projection(k)

    def forward(self, x, context=None, attention_mask=None):
        self.to_q(x)
        self.to_k(x if context is None else context)
        return x


class Block(nn.Module):
    """Self-attention, then attention to a text."""

    def __init__(self, latent, reduction, width, heads):
        super().__init__()
        n = (latent // reduction) ** 2
        self.x = torch.empty(2, n, width, dtype=torch.float16)
        text = torch.empty(2, TOKENS, width, dtype=torch.float16)
        self.attn1 = Attention(self.x, self.x, heads)
        self.attn2 = Attention(self.x, text, heads)

    def forward(self, x, context):
        x = self.attn1(x)
        return self.attn2(x, context, attention_mask=None)


class Net(nn.Module):
    """Blocks as those of a published U-Net, one after another."""

    def __init__(self, model, more=0):
        super().__init__()
        latent, blocks = MODELS[model]
        blocks = blocks + [(2, 640, 10)] * more
        self.sample = torch.empty(2, 4, latent, latent, dtype=torch.float16)
        self.context = torch.empty(2, TOKENS, 768, dtype=torch.float16)
        self.blocks = nn.ModuleList(Block(latent, *block) for block in blocks)
        self.recorded = sum(reduction in (4, 8) for reduction, _, _ in blocks)

    def forward(self):
        for block in self.blocks:
            block(block.x, self.context)


def _allocate(x, *shape):
    """A result, at the cost that a caching allocator has: no page of it is asked for."""
    return x.new_empty((1,), dtype=torch.float32).expand(shape)


def _attention_maps(q_self, k_self, q_cross, k_cross, heads, key_bias=None):
    (b, n, _), t = q_self.shape, k_cross.shape[1]
    return tuple(_allocate(q_self, b, n, m) for m in (n, t))


def _stacked_maps(q_self, k_self, q_cross, k_cross, heads, key_bias):
    (b, n, _), t = q_self[0].shape, k_cross[0].shape[1]
    return tuple(_allocate(q_self[0], len(q_self), b, n, m) for m in (n, t))


def _complete(self_map, cross_map, weights, total=None, propagation="paper", powers=4):
    b, n, t = cross_map.shape[-3:]
    return _allocate(cross_map, b, n, t + 1)


STANDINS = {
    "attention_maps": _attention_maps,
    "stacked_maps": _stacked_maps,
    "complete": _complete,
}


@contextlib.contextmanager
def standing_in(depth, recorder):
    """Inside, stand-ins do the work from so deep on, and a CPU folds in groups as a GPU does."""
    with contextlib.ExitStack() as stack:

        def put(*patch):
            stack.enter_context(mock.patch.object(*patch))

        put(folding, "GROUP_BUDGET", {"cpu": folding.GROUP_BUDGET["cuda"]})
        if depth == "hooks":
            put(recorder._hooks, "ran", lambda block, *_: recorder._order.append((4, block.name)))
        if depth == "bookkeeping":
            put(
                backends,
                "run_unchecked",
                lambda name, backend, device, given: STANDINS[name](**given),
            )
        for name, function in STANDINS.items():
            put(reference, name, function)
        yield


def checks(block, rounds):
    """Seconds that the checks of the operations of one layer take."""
    qk = [block.x, block.x, block.x, block.attn2.to_k.output]
    maps = [x.new_zeros((2, x.shape[1], m), dtype=torch.float32)
            for x, m in ((block.x, block.x.shape[1]), (block.x, TOKENS))]  # fmt: skip
    weights, heads = torch.zeros(block.x.shape[1]), block.attn1.heads
    taken = {}
    with mock.patch.object(backends, "run", lambda *_, **__: None):
        for _ in range(10 * rounds):
            for name, args in (("attention_maps", (*qk, heads)), ("complete", (*maps, weights))):
                seconds = _seconds(lambda n=name, a=args: getattr(ops, n)(*a))
                taken[name] = min(taken.get(name, seconds), seconds)
    return sum(taken.values())


def _seconds(run):
    begin = time.thread_time()
    run()
    return time.thread_time() - begin


@torch.no_grad()
def measure(model, rounds=ROUNDS):
    """One row: microseconds a recorded layer, and a block that is not recorded."""
    nets = {more: Net(model, more) for more in (0, MORE)}
    recorders = {more: AttentionRecorder(net, CONFIG, "auto") for more, net in nets.items()}
    plain = {more: Net(model, more) for more in nets}
    least = {}
    for turn in range(rounds + 2):
        for more, net in nets.items():
            recorder = recorders[more]

            def run(net=net, recorder=recorder):
                recorder.start(net.sample)
                net()
                recorder.finish()

            taken = {"plain": _seconds(plain[more])}
            for depth in ROWS:
                with standing_in(depth, recorder):
                    taken[depth] = _seconds(run)
            for depth, seconds in taken.items():
                if turn > 1:  # what is found out in a first call is kept
                    least[more, depth] = min(least.get((more, depth), seconds), seconds)
    above = {key: taken - least[key[0], "plain"] for key, taken in least.items()}
    unread = (above[MORE, "hooks"] - above[0, "hooks"]) / MORE
    net = nets[0]
    others = (len(net.blocks) - net.recorded) * unread
    row, before = {"kind": "host", "model": model, "recorded": net.recorded}, others
    for depth in ROWS:
        row[depth] = round((above[0, depth] - before) / net.recorded * 1e6, 1)
        before = above[0, depth]
    chosen = next(block for block in net.blocks if block.x.shape[1] == (MODELS[model][0] // 4) ** 2)
    row["checks"] = round(checks(chosen, rounds) * 1e6, 1)
    row["layer"] = round((above[0, "dispatch"] - others) / net.recorded * 1e6, 1)
    row["unrecorded"] = round(unread * 1e6, 1)
    row["step_ms"] = round(above[0, "dispatch"] * 1e3, 2)
    return row


def show(rows):
    """The rows as text: microseconds, but for the step."""
    columns = ("model", "recorded", *ROWS, "layer", "checks", "unrecorded", "step_ms")
    lines = [" ".join(f"{column:>11}" for column in columns)]
    lines += [" ".join(f"{row[column]:>11}" for column in columns) for row in rows]
    return "\n".join(lines)


@pytest.mark.parametrize("model", MODELS)
def test_host(model, capsys):
    row = measure(model)
    with capsys.disabled():
        print("\n" + show([row]))
    assert row["layer"] > row["unrecorded"] > 0


def main():
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="append rows to this JSON file, e.g. in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(model) for model in MODELS]
    print(show(rows))
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if options.out:
        records.append(options.out, rows, about)


if __name__ == "__main__":
    main()
