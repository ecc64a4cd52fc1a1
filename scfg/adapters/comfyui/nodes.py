"""Three nodes: S-CFG for a model, a look at what it did, and the region of a phrase as a mask."""

import inspect
from collections.abc import Callable

from comfy_api.latest import ComfyExtension, io

from scfg.adapters.comfyui.layouts import kind_of
from scfg.adapters.comfyui.patch import patch
from scfg.adapters.comfyui.phrases import parse_phrases, read_prompt
from scfg.adapters.comfyui.regions import draw, mask_of
from scfg.adapters.comfyui.run import KEY, ComfyRun
from scfg.config import PROPAGATIONS, SCFGConfig
from scfg.guidance import Guided

CATEGORY = "advanced/guidance"
NAME = "Semantic-aware CFG"


def known(function: Callable, **options) -> dict:
    """Those of the options that this version of ComfyUI knows."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}


ADVANCED = known(io.Float.Input, advanced=True)


class SemanticGuidance(io.ComfyNode):
    """S-CFG for everything sampled with the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        share = dict(min=0.0, max=1.0, step=0.01, tooltip="Fraction of the steps.", **ADVANCED)
        return io.Schema(
            node_id="SemanticCFG_Guidance",
            display_name=NAME,
            category=CATEGORY,
            description="Guides every region of the image as strongly as its words need (S-CFG). "
            "Works at any cfg above 1, with a positive and a negative prompt.",
            is_experimental=True,
            inputs=[
                io.Model.Input("model"),
                io.Float.Input(
                    "rate_min",
                    default=0.8,
                    min=0.01,
                    max=10.0,
                    step=0.05,
                    tooltip="Least factor of cfg that a region gets.",
                ),
                io.Float.Input(
                    "rate_max",
                    default=3.0,
                    min=0.01,
                    max=10.0,
                    step=0.05,
                    tooltip="Largest factor of cfg that a region gets.",
                ),
                io.Float.Input(
                    "max_scale",
                    default=15.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="Cap on cfg times rate; 0 is no cap.",
                ),
                io.Float.Input("start", default=0.0, **share),
                io.Float.Input("stop", default=1.0, **share),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Find regions on every so many steps, and keep them in between.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "propagation",
                    options=list(PROPAGATIONS),
                    default="paper",
                    tooltip="How attention of the image to itself completes regions.",
                    **ADVANCED,
                ),
                io.Int.Input(
                    "map_reduction",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="U-Nets: finest attention maps, in latent pixels; a power of two. "
                    "4 is for SD 1.x, 2.x and SDXL.",
                    **ADVANCED,
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Encoder of the prompt, to know its words: for phrases, and for "
                    "transformers, where only words then own regions.",
                ),
                io.String.Input(
                    "prompt",
                    optional=True,
                    multiline=True,
                    tooltip="The positive prompt, as it is encoded.",
                ),
                io.String.Input(
                    "phrases",
                    optional=True,
                    multiline=True,
                    tooltip="Lines such as 'blue square: 1.5' multiply the rate of a phrase.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="patched_model", tooltip="The model, with S-CFG.")
            ],
            **known(
                io.Schema,
                search_aliases=["S-CFG", "SCFG", "semantic guidance", "regional cfg", "cfg"],
            ),
        )

    @classmethod
    def execute(
        cls,
        model,
        rate_min,
        rate_max,
        max_scale,
        start,
        stop,
        every,
        propagation,
        map_reduction,
        clip=None,
        prompt="",
        phrases="",
    ) -> io.NodeOutput:
        """The model with S-CFG."""
        config = SCFGConfig(
            map_reduction=map_reduction,
            coarsest_reduction=max(8, map_reduction),
            propagation=propagation,
            rate_min=rate_min,
            rate_max=rate_max,
            max_scale=max_scale or None,
        )
        kind, text, weights = kind_of(model.model.diffusion_model), None, {}
        if (phrases or "").strip():
            if clip is None or not (prompt or "").strip():
                raise ValueError("phrases need clip and prompt: the encoder, and what it encodes")
            weights = parse_phrases(phrases)
        if clip is not None and (prompt or "").strip():
            text = read_prompt(clip, prompt, kind.words, weights)
        run = ComfyRun(config, start=start, stop=stop, every=every, prompt=text)
        return io.NodeOutput(patch(model, run))


def ran() -> list:
    """Inputs that say which step of which run to look at."""
    return [
        io.Model.Input("model", tooltip="From Semantic-aware CFG."),
        io.Latent.Input("samples", tooltip="From the sampler, so that it has run."),
        io.Int.Input("step", default=-1, min=-10000, max=10000, tooltip="-1 is the last one."),
    ]


def find_step(model, samples: dict, step: int) -> tuple[ComfyRun, Guided]:
    """The run of a model, and one step of it.

    Raises:
        ValueError: The model has no S-CFG, the last run was another one, or had no such step.
    """
    run = model.attachments.get(KEY)
    if run is None:
        raise ValueError("model must come from Semantic-aware CFG")
    steps = len(run.history)
    if not -steps <= step < steps:
        raise ValueError(f"step must be one of {steps} that were guided, got {step}")
    guided, latent = run.history[step], samples["samples"]
    if guided.labels.shape[-2:] != latent.shape[-2:] or len(guided.labels) != len(latent):
        raise ValueError(
            f"samples must be of the last run of the model, {len(guided.labels)} latents of "
            f"{tuple(guided.labels.shape[-2:])}, got {tuple(latent.shape)}; give each sampler a "
            "Semantic-aware CFG of its own"
        )
    return run, guided


class SemanticGuidanceView(io.ComfyNode):
    """Regions and rates of the last run of a model with S-CFG."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SemanticCFG_View",
            display_name=f"{NAME}: View Regions",
            category=CATEGORY,
            description="Regions that words own, and the rate of guidance, at one step.",
            is_experimental=True,
            inputs=ran(),
            outputs=[
                io.Image.Output(display_name="regions", tooltip="A colour for each word's region."),
                io.Image.Output(display_name="rate", tooltip="From 0, dark, to rate_max, yellow."),
            ],
            **known(io.Schema, search_aliases=["attention map", "segmentation", "S-CFG preview"]),
        )

    @classmethod
    def execute(cls, model, samples, step) -> io.NodeOutput:
        """Two images."""
        run, guided = find_step(model, samples, step)
        return io.NodeOutput(*draw(guided, run.run.config.rate_max))


class SemanticGuidanceMask(io.ComfyNode):
    """Where a phrase of the prompt is in the image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SemanticCFG_Mask",
            display_name=f"{NAME}: Mask of a Phrase",
            category=CATEGORY,
            description="The region that a phrase of the prompt owns, at one step, as a mask.",
            is_experimental=True,
            inputs=[
                *ran(),
                io.Clip.Input("clip", tooltip="Encoder of the prompt."),
                io.String.Input("prompt", multiline=True, tooltip="The prompt, as it is encoded."),
                io.String.Input("phrase", default="", tooltip="Some words of it."),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="1 where the phrase owns the image.")
            ],
            **known(
                io.Schema,
                search_aliases=["word to mask", "text to mask", "region mask", "attention mask"],
            ),
        )

    @classmethod
    def execute(cls, model, samples, step, clip, prompt, phrase) -> io.NodeOutput:
        """A mask."""
        run, guided = find_step(model, samples, step)
        if not phrase.strip():
            raise ValueError("phrase must be words of the prompt, got none")
        places = kind_of(model.model.diffusion_model).words
        text = read_prompt(clip, prompt, places, {phrase: 2.0})
        return io.NodeOutput(mask_of(guided, text.weights(run.tokens) == 2.0))


class Extension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Its nodes."""
        return [SemanticGuidance, SemanticGuidanceView, SemanticGuidanceMask]
