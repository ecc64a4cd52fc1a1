"""Two nodes: S-CFG for a model, and a look at what it did; and how the first patches a model."""

from comfy.model_patcher import PatcherInjection
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy_api.latest import ComfyExtension, io

from scfg.adapters.comfyui.regions import clip_weights, draw, parse_phrases
from scfg.adapters.comfyui.run import KEY, ComfyRun, check_unet
from scfg.config import PROPAGATIONS, SCFGConfig

PRE_CFG = "sampler_pre_cfg_function"


def patch(model, run: ComfyRun):
    """A clone of a model that samples with S-CFG, in place of any it had.

    Args:
        model: A ModelPatcher of a model with a U-Net.
        run: Not to be given to two models.

    Returns:
        ModelPatcher.

    Raises:
        ValueError: The model is no U-Net, or has no transformer block.
    """
    check_unet(model.model.diffusion_model)
    model = model.clone()

    def predict(executor, inner, conds, x, sigma, model_options):
        told = run.begin_step(conds, sigma, model_options.get("transformer_options", {}))
        return executor(inner, told, x, sigma, model_options)

    def unet(executor, x, timesteps, context, *args, **kwargs):
        options = next((a for a in args if isinstance(a, dict) and "uuids" in a), {})
        options = kwargs.get("transformer_options", options)

        def call():
            return executor(x, timesteps, context, *args, **kwargs)

        return run.record(executor.class_obj, call, x, context, options)

    def combine(args):
        predictions = args["conds_out"]
        return run.combine(
            args["conds"], predictions, args["input"], args["cond_scale"], args["sigma"]
        )

    combine.semantic_cfg = True  # to be told from those of other nodes
    for kind in (WrappersMP.CALC_COND_BATCH, WrappersMP.DIFFUSION_MODEL):
        model.remove_wrappers_with_key(kind, KEY)
    model.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)
    others = model.model_options.get(PRE_CFG, [])
    model.model_options[PRE_CFG] = [f for f in others if not getattr(f, "semantic_cfg", False)]
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, predict)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, unet)
    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda patcher: run.begin_run())
    model.set_injections(KEY, [PatcherInjection(run.inject, run.eject)])
    model.set_model_sampler_pre_cfg_function(combine)
    model.set_attachments(KEY, run)
    return model


class SemanticGuidance(io.ComfyNode):
    """S-CFG for everything sampled with the model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        part = dict(min=0.0, max=1.0, step=0.01)
        return io.Schema(
            node_id="SemanticGuidance",
            display_name="Semantic-aware CFG",
            category="model_patches/unet",
            description="Guides every region of the image as strongly as its words need (S-CFG).",
            inputs=[
                io.Model.Input("model"),
                io.Float.Input("rate_min", default=0.8, min=0.01, max=10.0, step=0.05),
                io.Float.Input("rate_max", default=3.0, min=0.01, max=10.0, step=0.05),
                io.Float.Input(
                    "max_scale",
                    default=15.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="Cap on cfg times rate; 0 is no cap.",
                ),
                io.Float.Input("start", default=0.0, **part, tooltip="Fraction of the steps."),
                io.Float.Input("stop", default=1.0, **part, tooltip="Fraction of the steps."),
                io.Int.Input(
                    "every",
                    default=1,
                    min=1,
                    max=100,
                    tooltip="Find regions on every so many steps, and keep them in between.",
                ),
                io.Combo.Input("propagation", options=list(PROPAGATIONS)),
                io.Int.Input(
                    "map_reduction",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Finest attention maps, in latent pixels; a power of two.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Only for phrases."),
                io.String.Input(
                    "prompt", optional=True, multiline=True, tooltip="The positive prompt."
                ),
                io.String.Input(
                    "phrases",
                    optional=True,
                    multiline=True,
                    tooltip="Lines such as 'blue square: 1.5' multiply the rate of a phrase.",
                ),
            ],
            outputs=[io.Model.Output()],
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
        weights = None
        if (phrases or "").strip():
            if clip is None:
                raise ValueError("phrases need clip, the CLIP that encodes the prompt")
            weights = clip_weights(clip, prompt or "", parse_phrases(phrases))
        run = ComfyRun(config, start=start, stop=stop, every=every, token_weights=weights)
        return io.NodeOutput(patch(model, run))


class SemanticGuidanceView(io.ComfyNode):
    """Regions and rates of the last run of a model with S-CFG."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="SemanticGuidanceView",
            display_name="Semantic-aware CFG: regions and rate",
            category="model_patches/unet",
            description="Regions that words own, and the rate of guidance, at one step.",
            inputs=[
                io.Model.Input("model", tooltip="From Semantic-aware CFG."),
                io.Latent.Input("samples", tooltip="From the sampler, so that it has run."),
                io.Int.Input(
                    "step", default=-1, min=-10000, max=10000, tooltip="-1 is the last one."
                ),
            ],
            outputs=[io.Image.Output("regions"), io.Image.Output("rate")],
        )

    @classmethod
    def execute(cls, model, samples, step) -> io.NodeOutput:
        """Two images."""
        run = model.attachments.get(KEY)
        if run is None:
            raise ValueError("model must come from Semantic-aware CFG")
        steps = len(run.history)
        if not -steps <= step < steps:
            raise ValueError(f"step must be one of {steps} that were guided, got {step}")
        return io.NodeOutput(*draw(run.history[step], run.run.config.rate_max))


class Extension(ComfyExtension):
    """The pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Its nodes."""
        return [SemanticGuidance, SemanticGuidanceView]
