"""One of two processes: records its branch of a tiny network and guides with the other's."""

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))


def networks():
    """Every network that is tried: its model, and the calls of its two branches."""
    from tiny import tiny_unet
    from transformer_hosts import B, build, randn

    import scfg

    for name in ("sd3", "flux"):
        host = build(name)
        other = dict(host.call)
        other["encoder_hidden_states"] = host.call["encoder_hidden_states"].flip(1)
        for benchmark in ("auto", "foreground") if name == "sd3" else ("auto",):
            config = scfg.SCFGConfig(min_peak=0.0, benchmark=benchmark)
            yield f"{name} {benchmark}", host.model, config, ((), other), ((), host.call)
    x, t = randn(B, 4, 16, 24), torch.full((B,), 500)
    calls = [((x, t, randn(B, tokens, 24, seed=tokens)), {}) for tokens in (5, 7)]
    yield "unet", tiny_unet(), scfg.SCFGConfig(), *calls


def first(output):
    """The prediction in what a model returns."""
    return output if isinstance(output, torch.Tensor) else output[0]


def main(rank, store, out):
    """Run as rank of two, and save what comes out."""
    from safetensors.torch import save_file

    import scfg
    from scfg.recording.parallel import guide_across

    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=3),
    )
    found = {}
    for name, model, config, *calls in networks():
        args, kwargs = calls[rank]
        with scfg.Recorder(model, config) as network, torch.no_grad():
            options = {} if name == "unet" else {"return_dict": False}
            eps = first(network(*args, **kwargs, **options))
            guided = guide_across(network, eps, 4.0, ("uncond", "text")[rank])
            try:
                guide_across(network, eps, 4.0, "text")
            except RuntimeError as error:
                found[f"{name} refused"] = torch.tensor("two ranks" in str(error))
        found |= {
            f"{name} {key}": getattr(guided, key).clone() for key in ("eps", "rate", "labels")
        }
    save_file({key: x.contiguous() for key, x in found.items()}, out)
    dist.barrier()  # a rank that leaves first takes the other down
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
