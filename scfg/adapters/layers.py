"""Rank the layers of a pipeline's transformer.

python -m scfg.adapters.layers FOLDER "a red circle and a blue square" --size 1024 1024
"""

import argparse
from dataclasses import replace

from scfg.adapters.pipelines import AttachedTransformers
from scfg.config import SCFGConfig
from scfg.recording.probe import RankedLayer, rank_evidence, table
from scfg.recording.run import Run


def rank_pipeline(
    pipe,
    at: float = 0.5,
    true_scale: float | None = None,
    config: SCFGConfig = SCFGConfig(),  # noqa: B008  (frozen)
    backend: str = "auto",
    **call,
) -> list[RankedLayer]:
    """`scfg.recording.probe.rank_layers` of one step of a pipeline's own run.

    Args:
        pipe: A pipeline with a transformer; what it draws is what it draws without this.
        at: Fraction of the run's steps at which layers are read.
        true_scale: guidance_scale of `scfg.adapters.diffusers.attach`.
        config: All but its layers is used.
        backend: See `scfg.ops`.
        call: Of the pipeline, num_inference_steps among it.

    Raises:
        RuntimeError: The step was not guided.
    """
    steps = call["num_inference_steps"]
    first = min(int(at * steps), steps - 1)
    config = replace(config, layers=None)
    window = dict(start=first / steps, stop=(first + 1) / steps)
    attached = AttachedTransformers(
        pipe, true_scale, Run(config, backend, **window), None, observe=True
    )
    try:
        attached.add()
        for branch in attached.branches:
            branch.recorder.apart = True
        pipe(**call)
        for branch in attached.branches:
            if branch.recorder.finished is not None:
                return rank_evidence(branch.recorder.finished, branch.recorder, config, backend)
    finally:
        attached.remove()
    raise RuntimeError(
        f"step {first} of {steps} was not guided by two branches, so there is nothing to rank"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m scfg.adapters.layers", description=__doc__)
    parser.add_argument("folder", help="of a diffusers pipeline with safetensors weights")
    parser.add_argument("prompt")
    parser.add_argument("--negative", default=" ", help="negative prompt")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--at", type=float, default=0.5, help="fraction of the steps")
    parser.add_argument("--scale", type=float, help="true_cfg_scale, where the pipeline has one")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("H", "W"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    options = parser.parse_args(arguments)
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(
        options.folder,
        torch_dtype=getattr(torch, options.dtype),
        local_files_only=True,
        use_safetensors=True,
    ).to(options.device)
    call = dict(
        prompt=options.prompt,
        negative_prompt=options.negative,
        num_inference_steps=options.steps,
        height=options.size[0],
        width=options.size[1],
        output_type="latent",
    )
    if options.scale is not None:
        call["true_cfg_scale"] = options.scale
    print(table(rank_pipeline(pipe, options.at, options.scale, **call)))


if __name__ == "__main__":
    main()
