"""SemanticGuidance in a real modular SDXL pipeline, tiny and random."""

import pytest
import torch
from adapter_hosts import CONFIG, NEGATIVE, PLAIN, PROMPT, latents, sdxl, sdxl_parts, spy
from conftest import assert_close

import scfg
from scfg.adapters.diffusers import attach

modular = pytest.importorskip("diffusers.modular_pipelines")
from diffusers.guiders import ClassifierFreeGuidance  # noqa: E402
from diffusers.guiders.guider_utils import rescale_noise_cfg  # noqa: E402

from scfg.adapters.modular import SemanticGuidance  # noqa: E402


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    pipe = modular.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**sdxl_parts(folder))
    pipe.set_progress_bar_config(disable=True)
    pipe.folder = folder
    return pipe


def run(pipe, guider, steps=3, **call):
    pipe.update_components(guider=guider)
    return pipe(
        **{"prompt": PROMPT, "negative_prompt": NEGATIVE, **call},
        num_inference_steps=steps,
        height=128,
        width=192,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        output="images",
    )


def hooks(pipe):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.components["unet"].modules()
    )


def by_hand(raw, step, guidance_scale=6.0, maps_of=None, **options):
    """`scfg.semantic_cfg` on the two calls of a step, text first."""
    (text, _), (uncond, _) = raw[2 * step : 2 * step + 2]
    found = step if maps_of is None else maps_of
    pairs = list(zip(raw[2 * found][1], raw[2 * found + 1][1], strict=True))
    self_maps = [torch.cat([u.self_map, t.self_map]) for t, u in pairs]
    cross_maps = [torch.cat([u.cross_map, t.cross_map]) for t, u in pairs]
    maps = self_maps, cross_maps
    return scfg.semantic_cfg(uncond, text, *maps, guidance_scale, CONFIG, **options), text


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_scheduler_gets_what_semantic_cfg_makes_by_hand(pipe, rescale):
    seen = []
    raw, stepped, end = spy(pipe)
    guider = SemanticGuidance(guidance_scale=6.0, guidance_rescale=rescale, callback=seen.append)
    run(pipe, guider, prompt=[PROMPT, "a dog"], negative_prompt=None)
    end()
    assert len(raw) == 2 * len(stepped) == 2 * len(seen) == 6
    for step, eps in enumerate(stepped):
        expected, text = by_hand(raw, step)
        goal = rescale_noise_cfg(expected.eps, text, rescale) if rescale else expected.eps
        assert_close(actual=eps, expected=goal, share=1e-4, what="prediction")
        assert seen[step].labels.equal(expected.labels)
    assert hooks(pipe) == 0


def test_guider_agrees_with_the_classic_pipeline(pipe):
    classic = sdxl(pipe.folder)
    with attach(classic):
        expected = latents(classic, steps=3)
    guided = run(pipe, SemanticGuidance(guidance_scale=6.0))
    assert_close(actual=guided, expected=expected, share=1e-4)


def test_rate_of_1_is_the_hosts_own_guidance_which_is_left_as_found(pipe):
    plain = run(pipe, ClassifierFreeGuidance(guidance_scale=6.0))
    one = run(pipe, SemanticGuidance(guidance_scale=6.0, scfg_config=PLAIN))
    assert_close(actual=one, expected=plain, share=1e-5)
    assert (run(pipe, SemanticGuidance(guidance_scale=6.0)) - plain).abs().max() > 1e-2
    assert run(pipe, ClassifierFreeGuidance(guidance_scale=6.0)).equal(plain)
    original = SemanticGuidance(5.0, use_original_formulation=True, scfg_config=PLAIN)
    assert_close(actual=run(pipe, original), expected=plain, share=1e-4)


def test_outside_the_window_only_the_text_pass_runs(pipe):
    seen = []
    raw, stepped, end = spy(pipe, keep=False)
    guider = SemanticGuidance(6.0, start=0.25, stop=0.75, callback=seen.append)
    run(pipe, guider, steps=4)
    end()
    assert len(raw) == 1 + 2 + 2 + 1 and len(seen) == 2
    assert stepped[0].equal(raw[0][0]) and stepped[3].equal(raw[5][0])
    assert hooks(pipe) == 0


def test_regions_are_kept_between_searches(pipe):
    seen = []
    raw, stepped, end = spy(pipe)
    guider = SemanticGuidance(6.0, every=2, callback=seen.append)
    run(pipe, guider, steps=4)
    for step in range(4):
        expected, _ = by_hand(raw, step, maps_of=step - step % 2)
        assert_close(actual=stepped[step], expected=expected.eps, share=1e-4)
    again = seen.copy()
    seen.clear()
    run(pipe, guider, steps=4)
    end()
    assert all(a.rate.equal(b.rate) for a, b in zip(again, seen, strict=True))


@pytest.mark.parametrize("as_list", [True, False])
def test_tokens_are_weighted(pipe, as_list):
    weights = torch.linspace(0.5, 2.0, 60)  # the rest keep theirs
    raw, stepped, end = spy(pipe)
    run(pipe, SemanticGuidance(6.0, token_weights=weights.tolist() if as_list else weights), 1)
    end()
    table = torch.cat([weights, torch.ones(17)])
    expected, _ = by_hand(raw, 0, token_weights=table)
    assert_close(actual=stepped[0], expected=expected.eps, share=1e-4)
    assert not torch.allclose(expected.rate, by_hand(raw, 0)[0].rate)


def test_saved_guider_is_the_same_when_loaded(pipe, tmp_path):
    config = scfg.SCFGConfig(propagation="none", rate_max=2.0)
    guider = SemanticGuidance(6.0, scfg_config=config, every=2, token_weights=[1.0, 2.0])
    guider.save_pretrained(tmp_path)
    loaded = SemanticGuidance.from_pretrained(tmp_path)
    assert loaded.config == guider.config
    assert run(pipe, loaded).equal(run(pipe, guider))
    assert guider.new(guidance_scale=3.0).config["scfg_config"]["rate_max"] == 2.0


def test_unet_is_left_as_found_after_errors(pipe):
    plain = run(pipe, ClassifierFreeGuidance(6.0))

    def fail(*_):
        raise OSError

    hook = pipe.unet.mid_block.register_forward_hook(fail)
    with pytest.raises(OSError):
        run(pipe, SemanticGuidance(6.0))
    hook.remove()
    assert hooks(pipe) == 0
    with pytest.raises(OSError):
        run(pipe, SemanticGuidance(6.0, callback=fail))
    assert hooks(pipe) == 0
    assert run(pipe, ClassifierFreeGuidance(6.0)).equal(plain)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="rate_min"):
        SemanticGuidance(scfg_config={"rate_min": -1})
    with pytest.raises(ValueError, match="every"):
        SemanticGuidance(every=0)
