"""What S-CFG adds to a step of SD3.5-M at 1024 px, by count: no device is needed, nothing runs.

    python -m benchmarks.transformer_cost [--out benchmarks/results/transformer_cost.txt]

The model is diffusers' class with the published configuration of SD3.5 medium, on device "meta", in
float16, its two branches in one batch. Arithmetic: products, two operations a multiplication and
addition. Bytes: each operation's inputs and outputs once, as eager PyTorch moves them; attention is
one operation; views move nothing; weights are among the inputs. Ours: the operations of the
recorder, the text branch alone; scores are computed twice where a row does not fit, S is read once
for each power; keys that many programs share come from the L2 cache and count once.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

HEADS, WIDTH, TEXT, PATCHES = 24, 1536, 333, 64 * 64
WORDS = 40  # of the prompt, with START and what is no word
LAYERS, POWERS = 3, 4
CONFIG = dict(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24,
    attention_head_dim=64, num_attention_heads=HEADS, joint_attention_dim=4096,
    caption_projection_dim=WIDTH, pooled_projection_dim=2048, pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
)  # fmt: skip


class Bytes(TorchDispatchMode):
    """Adds up the bytes that operations read and write."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        aliases = any(out.alias_info is not None for out in function._schema.returns)
        if not aliases or function._schema.is_mutable:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
            self.moved += sum(x.numel() * x.element_size() for x in tensors)
        return result


class Fused(TorchFunctionMode):
    """Attention as one operation that keeps no scores: on "meta" PyTorch takes it apart."""

    def __init__(self):
        super().__init__()
        self.operations = self.moved = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        query, key, value = (*args, *(kwargs or {}).values())[:3]
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        self.operations += 4 * query.numel() * key.shape[-2]
        self.moved += sum(x.numel() * x.element_size() for x in (query, key, value, out))
        return out


def model_step() -> tuple[float, float]:
    """(operations, bytes) of one call with both branches."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(**CONFIG).half().eval()
        call = dict(
            hidden_states=torch.empty(2, 16, 128, 128).half(),
            encoder_hidden_states=torch.empty(2, TEXT, 4096).half(),
            pooled_projections=torch.empty(2, 2048).half(),
            timestep=torch.empty(2),
        )
        with torch.no_grad(), Fused() as fused, FlopCounterMode(display=False) as operations:
            model(**call)
        with torch.no_grad(), Fused(), Bytes() as counted:
            model(**call)
    return operations.get_total_flops() + fused.operations, counted.moved + fused.moved


def ours() -> list[tuple[str, float, float]]:
    """(what, operations, bytes) of everything that S-CFG adds to the step."""
    n, m, half, single = PATCHES, TEXT + PATCHES, 2, 4
    keys = m * WIDTH * half
    order = 2 * 2 * keys  # keys with the text first: read and written; the query is a view
    maps = 2 * 2 * n * m * WIDTH, n * WIDTH * half + 2 * keys + n * m * single
    grouped = 0, n * (TEXT + WORDS) * single
    power = 2 * n * n * WORDS, n * n * single + 2 * n * WORDS * single
    total = 0, 3 * n * (WORDS + 1) * single
    layer = [
        ("queries and keys once more", 2 * 2 * (n + TEXT) * WIDTH * WIDTH,
         2 * WIDTH * WIDTH * half * 2 + 4 * (n + TEXT) * WIDTH * half * 3),
        ("text first", 0, order),
        ("joint map, split", *maps),
        ("columns of a word", *grouped),
        ("completion", POWERS * power[0], POWERS * power[1]),
        ("evidence", *total),
    ]  # fmt: skip
    rows = [(name, LAYERS * flops, LAYERS * moved) for name, flops, moved in layer]
    eps = 16 * 128 * 128 * half
    tail = 4 * n * WORDS * single + 2 * 3 * eps + 128 * 128 * single + 4 * n * 8
    return [*rows, ("regions, rates, guidance", 0, tail)]


def table() -> list[str]:
    """The lines of the report."""
    operations, moved = model_step()
    rows = ours()
    total = [sum(row[i] for row in rows) for i in (1, 2)]
    lines = [
        f"SD3.5-M, 1024 px, float16, one image; {LAYERS} layers recorded, text branch; counted",
        f"{'':30} {'Gflop':>10} {'MiB':>10}",
        f"{'the model, both branches':30} {operations / 1e9:10.1f} {moved / 2**20:10.1f}",
    ]
    lines += [f"{name:30} {flops / 1e9:10.1f} {size / 2**20:10.1f}" for name, flops, size in rows]
    shares = total[0] / operations, total[1] / moved
    lines.append(f"{'S-CFG in all':30} {total[0] / 1e9:10.1f} {total[1] / 2**20:10.1f}")
    lines.append(f"{'share of the step':30} {shares[0]:10.2%} {shares[1]:10.2%}")
    largest = PATCHES * math.fsum((TEXT, PATCHES)) * 4 / 2**20
    lines.append(f"memory beside the step: one layer's maps, {largest:.0f} MiB")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    text = "\n".join(table())
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
