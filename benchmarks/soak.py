"""Whether anything grows: calls of a recorded network and runs of a pipeline, some of them failing.

    python -m benchmarks.soak [--out benchmarks/results/soak.json]

Calls are of four sizes and three batches; every 23rd call, and every 23rd run, breaks off inside
the network. Ten times on the way resident memory, tensors that Python can reach and hooks are
counted: a row of the result each.
"""

import argparse
import contextlib
import gc
import itertools
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import scfg
from benchmarks import records
from benchmarks.machine import machine
from scfg.adapters.diffusers import attach

CALLS, RUNS, BREAK = 2000, 300, 23
CONFIG = scfg.SCFGConfig(map_reduction=2, coarsest_reduction=4)
SIZES = list(itertools.product([(8, 12), (9, 7), (16, 8), (17, 26)], [1, 2, 3]))


def network():
    """A U-Net of Stable Diffusion's kind, with random weights."""
    torch.manual_seed(0)
    sizes = dict(block_out_channels=(16, 32, 32, 32), attention_head_dim=2, norm_num_groups=8)
    net = UNet2DConditionModel(**sizes, layers_per_block=1, cross_attention_dim=24)
    return net.eval().requires_grad_(False)


def footprint(net):
    """What the process holds."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    return {"rss_mib": round(pages / 256, 1), "tensors": tensors, "hooks": hooks}


@contextlib.contextmanager
def breaking(net, breaks):
    """A block in which the network breaks off, or one like any other."""
    if not breaks:
        yield
        return
    handle = net.mid_block.register_forward_hook(lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        yield
    handle.remove()


def recorded_calls(count, every):
    """Calls of a wrapped network, each guided; its footprint after every so many."""
    net = network()
    with scfg.UNetWrapper(net, CONFIG) as unet:
        for i in range(1, count + 1):
            size, b = SIZES[i % len(SIZES)]
            x, context = torch.randn(2 * b, 4, *size), torch.randn(2 * b, 5 + i % 3, 24)
            with breaking(net, i % BREAK == 0):
                unet.guide(*unet(x, torch.tensor(3), context).sample.chunk(2), 6.0)
            if i % every == 0:
                yield footprint(net)


def pipeline_runs(count, every):
    """Runs of a pipeline of two steps under `attach`; its footprint after every so many."""
    net, vae = network(), AutoencoderKL(norm_num_groups=8, block_out_channels=(8,)).eval()
    parts = dict(vae=vae, text_encoder=None, tokenizer=None, safety_checker=None)
    parts |= dict(feature_extractor=None, requires_safety_checker=False)
    pipe = StableDiffusionPipeline(
        unet=net, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    for i in range(1, count + 1):
        text, negative = torch.randn(2, 1, 7, 24)
        call = dict(prompt_embeds=text, negative_prompt_embeds=negative, height=16, width=24)
        with breaking(net, i % BREAK == 0), attach(pipe, config=CONFIG, every=1 + i % 2):
            pipe(**call, num_inference_steps=2, output_type="latent")
        if i % every == 0:
            yield footprint(net)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=records.RESULTS / "soak.json")
    out, rows, about = parser.parse_args().out, [], machine()
    for work, count in ((recorded_calls, CALLS), (pipeline_runs, RUNS)):
        for tenth, seen in enumerate(work(count, count // 10), 1):
            rows.append({"kind": work.__name__, "after": tenth * count // 10} | seen | about)
            print(rows[-1])
    records.write(out, rows)


if __name__ == "__main__":
    main()
