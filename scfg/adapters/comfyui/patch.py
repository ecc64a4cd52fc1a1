"""How a ModelPatcher of ComfyUI comes to sample with S-CFG."""

from comfy.model_patcher import PatcherInjection
from comfy.patcher_extension import CallbacksMP, WrappersMP

from scfg.adapters.comfyui.layouts import kind_of
from scfg.adapters.comfyui.run import KEY, ComfyRun

PRE_CFG = "sampler_pre_cfg_function"


def patch(model, run: ComfyRun):
    """A clone of a model that samples with S-CFG, in place of any it had.

    Args:
        model: A ModelPatcher.
        run: Not to be given to two models.

    Returns:
        ModelPatcher.

    Raises:
        ValueError: The attention of the model cannot be recorded.
    """
    kind_of(model.model.diffusion_model)
    model = model.clone()

    def predict(executor, inner, conds, x, sigma, model_options):
        told = run.begin_step(conds, sigma, model_options.get("transformer_options", {}))
        return executor(inner, told, x, sigma, model_options)

    def apply(executor, x, t, concat, context, control, options, **conds):
        def call(options):
            return executor(x, t, concat, context, control, options, **conds)

        network = executor.class_obj.diffusion_model
        network = getattr(network, "_orig_mod", network)  # another node may compile it
        return run.record(network, call, x, context, options)

    def combine(args):
        predictions = args["conds_out"]
        return run.combine(
            args["conds"], predictions, args["input"], args["cond_scale"], args["sigma"]
        )

    combine.semantic_cfg = True  # to be told from those of other nodes
    for wrapper in (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL):
        model.remove_wrappers_with_key(wrapper, KEY)
    model.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)
    others = model.model_options.get(PRE_CFG, [])
    model.model_options[PRE_CFG] = [f for f in others if not getattr(f, "semantic_cfg", False)]
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, predict)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, apply)
    model.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, lambda patcher: run.begin_run())
    model.set_injections(KEY, [PatcherInjection(run.inject, run.eject)])
    model.set_model_sampler_pre_cfg_function(combine)
    model.set_attachments(KEY, run)
    return model
