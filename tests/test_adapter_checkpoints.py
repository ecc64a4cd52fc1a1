"""load and generate: a tiny pipeline saved to disk as a folder and as one file, then drawn with."""

import re

import diffusers
import pytest
import torch
from adapter_hosts import NEGATIVE, PROMPT, latents, sd, sdxl, spy
from conftest import assert_close
from safetensors.torch import save_file
from tiny import generate_with

from scfg.adapters.checkpoints import load
from scfg.adapters.diffusers import attach
from scfg.adapters.generate import prompt_words


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline and the folder it is saved in."""
    pipe = sd(tmp_path_factory.mktemp("tokenizer"))
    folder = tmp_path_factory.mktemp("checkpoint")
    pipe.save_pretrained(folder)
    return pipe, folder


def test_folder_gives_the_pipeline_that_was_saved(saved):
    pipe, folder = saved
    loaded = load(folder)
    assert latents(loaded).equal(latents(pipe))
    assert loaded.unet.dtype == torch.float32  # no GPU, or it would be half precision
    assert load(folder, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_PARTS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.attentions.0.to_": "mid.attn_1.",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    ".resnets.": ".block.",
    "down_blocks": "down",
}


def replaced(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def original_unet_name(name, layers=1):
    """Name in a Stable Diffusion checkpoint of a parameter of diffusers' U-Net."""
    block = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name)
    if block is None:
        name = replaced(name, UNET_ENDS)
        return replaced(name, RESNET) if name[:14] in ("middle_block.0", "middle_block.2") else name
    side, i, kind, j, rest = block.groups()
    first = int(i) * (layers + 1)
    if kind.endswith("samplers"):
        inner = {"down": "0.op", "up": "1.conv" if i == "0" else "2.conv"}[side]
        rest, j = rest.removeprefix("conv."), layers
    else:
        inner = "0" if kind == "resnets" else "1"
        rest = replaced(rest, RESNET) if kind == "resnets" else rest
    number = first + int(j) + (1 if side == "down" else 0)
    return f"{'input' if side == 'down' else 'output'}_blocks.{number}.{inner}.{rest}"


def original_vae_name(name):
    """The same for the VAE."""
    name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", name)
    return replaced(name, VAE_PARTS)


def single_file(pipe):
    """All weights of a pipeline under the names of the original releases."""
    weights = {}
    for name, value in pipe.unet.state_dict().items():
        weights["model.diffusion_model." + original_unet_name(name)] = value
    for name, value in pipe.vae.state_dict().items():
        weights["first_stage_model." + original_vae_name(name)] = value
    for name, value in pipe.text_encoder.state_dict().items():
        name = "text_model." + name.removeprefix("text_model.")
        weights["cond_stage_model.transformer." + name] = value
    return {name: value.contiguous() for name, value in weights.items()}


def test_single_file_gives_the_same_with_a_folder_that_has_no_weights(saved, tmp_path):
    pipe, folder = saved
    file, config = tmp_path / "model.safetensors", tmp_path / "config"
    save_file(single_file(pipe), file)
    pipe.save_pretrained(config)
    for part in config.rglob("*.safetensors"):
        part.unlink()
    loaded = load(file, config=config)
    assert latents(loaded).equal(latents(pipe))
    x = torch.randn(1, 4, 6, 5)
    with torch.no_grad():
        assert loaded.vae.decode(x).sample.equal(pipe.vae.decode(x).sample)
    with pytest.raises(RuntimeError, match="give config"):
        load(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be loaded as a "):
        load(file, config=config)


def test_nothing_is_fetched_and_no_pickle_read(saved, monkeypatch):
    given = {}

    def from_pretrained(path, **options):
        given.update(options)
        return saved[0].unet

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="holds a UNet2DConditionModel, which has no U-Net"):
        load(saved[1])
    assert given["local_files_only"] is True and given["use_safetensors"] is True


def test_pickles_are_refused_unless_asked_for(saved, tmp_path):
    pipe, _ = saved
    file = tmp_path / "model.ckpt"
    torch.save(pipe.unet.state_dict(), file)
    with pytest.raises(ValueError, match="allow_pickle"):
        load(file)
    folder = tmp_path / "pickled"
    pipe.save_pretrained(folder, safe_serialization=False)
    assert (folder / "unet" / "diffusion_pytorch_model.bin").is_file()
    with pytest.raises(ValueError, match="cannot be loaded from safetensors"):
        load(folder)
    assert latents(load(folder, allow_pickle=True)).equal(latents(pipe))


def test_paths_that_are_no_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a file or a folder"):
        load(tmp_path)
    with pytest.raises(ValueError, match="must be a file or a folder"):
        load(tmp_path / "missing.safetensors")


CALL = dict(guidance_scale=6.0, steps=3, negative_prompt=NEGATIVE, height=128, width=192)


@pytest.mark.parametrize("make", [sd, sdxl])
def test_generated_images_are_those_of_the_pipeline(make, tmp_path):
    pipe = make(tmp_path)
    result = generate_with(pipe, [PROMPT], [3], sampler=None, **CALL)
    plain = generate_with(pipe, [PROMPT], [3], sampler=None, method="cfg", **CALL)

    def direct():
        call = dict(num_inference_steps=3, guidance_scale=6.0, height=128, width=192)
        generator = torch.Generator().manual_seed(3)
        call |= dict(negative_prompt=NEGATIVE, generator=generator, output_type="pt")
        return pipe(PROMPT, **call).images * 2 - 1

    assert_close(actual=plain.images, expected=direct(), share=1e-6)
    with attach(pipe):
        assert_close(actual=result.images, expected=direct(), share=1e-6)
    assert result.images.shape == (1, 3, 128, 192) and result.trace == ()


@pytest.mark.parametrize("method", ["cfg", "scfg"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler"])
def test_trace_holds_what_guidance_did_and_changes_nothing(saved, method, sampler):
    pipe, _ = saved
    own, calls = pipe.scheduler, []
    prompts, seeds = [PROMPT, "a dog"], [0, 1]
    options = dict(method=method, sampler=sampler, **CALL)
    bare = generate_with(pipe, prompts, seeds, **options)
    result = generate_with(
        pipe, prompts, seeds, **options, trace=True, callback=lambda: calls.append(1)
    )
    assert result.images.equal(bare.images)
    assert pipe.scheduler is own and len(calls) == len(result.trace) == 3
    first, *_, last = result.trace
    assert first.t > last.t
    assert first.labels.shape == first.foreground.shape == (2, 4, 6)
    assert first.rate.shape == (2, 16, 24) and first.x0.shape == (2, 3, 85, 128)
    alone = generate_with(pipe, prompts[1:], seeds[1:], **options)
    assert_close(actual=alone.images, expected=result.images[1:], share=1e-3)


def test_last_x0_of_ddim_is_the_image(saved):
    pipe, _ = saved
    scheduler = pipe.scheduler
    pipe.scheduler = scheduler.from_config(scheduler.config, set_alpha_to_one=True)
    result = generate_with(pipe, [PROMPT], [0], trace=True, sampler=None, **CALL)
    pipe.scheduler = scheduler
    small = torch.nn.functional.interpolate(result.images, (85, 128), mode="area")
    assert (result.trace[-1].x0 - small).abs().mean() < 0.05


def test_steps_outside_the_window_have_rate_1(saved):
    pipe, _ = saved
    raw, stepped, end = spy(pipe)
    result = generate_with(pipe, [PROMPT], [0], trace=True, sampler=None, stop=0.7, **CALL)
    end()
    assert (result.trace[0].rate != 1).any() and (result.trace[2].rate == 1).all()
    with pytest.raises(ValueError, match="have a step of 3 between them"):
        generate_with(pipe, [PROMPT], [0], trace=True, start=0.9, stop=0.95, **CALL)


def test_words_are_those_of_the_prompt(saved):
    words = prompt_words(saved[0].tokenizer, "a red circle")
    assert words[:9] == (None, "a", "red", *["circle"] * 6)
    assert len(words) == 77 and not any(words[9:])


def test_bad_arguments_are_refused(saved):
    pipe, _ = saved
    for options, message in (
        (dict(seeds=[1, 2]), "one per prompt"),
        (dict(guidance_scale=1.0), "guidance_scale"),
        (dict(method="none"), "method"),
        (dict(sampler="none"), "sampler"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_with(pipe, [PROMPT], **{"seeds": [0], **options})
