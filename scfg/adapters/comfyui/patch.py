"""Put S-CFG on a clone of a ModelPatcher."""

from comfy.model_patcher import PatcherInjection
from comfy.patcher_extension import CallbacksMP, WrappersMP

from scfg.adapters.comfyui.guide import KEY, Guide
from scfg.recording.hooks import find_blocks

PRE_CFG = "sampler_pre_cfg_function"


def patch(model, guide: Guide):
    """A clone of a model that samples with S-CFG, in place of any it had.

    Args:
        model: A ModelPatcher of a model with a U-Net.
        guide: Not to be given to two models.

    Returns:
        ModelPatcher.

    Raises:
        ValueError: The model has no transformer block, see `scfg.recording.hooks`.
    """
    find_blocks(model.model.diffusion_model)
    model = model.clone()

    def predict(executor, inner, conds, x, sigma, model_options):
        told = guide.begin_step(conds, sigma, model_options.get("transformer_options", {}))
        return executor(inner, told, x, sigma, model_options)

    def unet(executor, x, timesteps, context, *args, **kwargs):
        options = next((a for a in args if isinstance(a, dict) and "uuids" in a), {})
        options = kwargs.get("transformer_options", options)

        def call():
            return executor(x, timesteps, context, *args, **kwargs)

        return guide.record(executor.class_obj, call, x, context, options)

    def combine(args):
        predictions = args["conds_out"]
        return guide.combine(
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
    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda patcher: guide.begin_run())
    model.set_injections(KEY, [PatcherInjection(guide.inject, guide.eject)])
    model.set_model_sampler_pre_cfg_function(combine)
    model.set_attachments(KEY, guide)
    return model
