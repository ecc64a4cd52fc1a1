"""attach on U-Nets that were changed: LoRA, IP-Adapter, other attention, offloaded, compiled."""

import pytest
import torch
from adapter_hosts import PROMPT, sd
from conftest import assert_close
from diffusers_runs import check_by_hand, guided, run

import scfg
from scfg.adapters.around import around
from scfg.adapters.diffusers import attach


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


def alike(actual, expected):
    """Latents and rates of two runs."""
    for x, y in zip(actual, expected, strict=True):
        assert_close(actual=x, expected=y, share=1e-4)


def add_lora(pipe):
    """Random LoRA on every attention of the U-Net, large enough to move the maps."""
    from peft import LoraConfig

    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v"]
    lora = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=targets)
    pipe.unet.add_adapter(lora)


def test_lora_counts_whether_loaded_before_or_inside_the_block(folder):
    before, after, fused = (sd(folder) for _ in range(3))
    add_lora(before)
    expected = guided(before)
    torch.testing.assert_close(guided(after, inside=add_lora), expected, rtol=0, atol=0)
    add_lora(fused)
    fused.fuse_lora()
    alike(guided(fused), expected)
    assert (guided(sd(folder))[1] - expected[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("do", "undo"),
    [
        ("enable_attention_slicing", "disable_attention_slicing"),
        ("fuse_qkv_projections", "unfuse_qkv_projections"),
    ],
)
def test_other_attention_of_the_host_gives_the_same(do, undo, folder):
    pipe = sd(folder)
    expected = guided(pipe)
    inside = guided(pipe, inside=lambda pipe: getattr(pipe, do)())
    alike(inside, expected)
    alike(guided(pipe), expected)
    getattr(pipe, undo)()
    torch.testing.assert_close(guided(pipe), expected, rtol=0, atol=0)


def add_ip_adapter(pipe):
    torch.manual_seed(4)
    names = pipe.unet.attn_processors
    cross = [i for i, name in enumerate(names) if name.endswith("attn2.processor")]
    width = {
        name: pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for name in names
    }
    weights = {
        f"{i}.to_{kind}_ip.weight": torch.randn(width[list(names)[i]], 32) * 0.3
        for i in cross
        for kind in "kv"
    }
    projection = {
        "proj.weight": torch.randn(4 * 32, 16),
        "proj.bias": torch.zeros(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    state = {"image_proj": projection, "ip_adapter": weights}
    pipe.unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)


def test_ip_adapter_is_kept_and_the_text_alone_makes_regions(folder):
    image = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(6))
    call = dict(ip_adapter_image_embeds=[image])
    pipe = sd(folder)
    add_ip_adapter(pipe)
    plain = run(pipe, **call)
    check_by_hand(pipe, **call)
    expected = guided(pipe, **call)
    torch.testing.assert_close(
        guided(sd(folder), inside=add_ip_adapter, **call), expected, rtol=0, atol=0
    )
    assert (run(sd(folder)) - plain).abs().max() > 1e-3  # the adapter does something
    assert run(pipe, **call).equal(plain)


def test_weights_offloaded_leaf_by_leaf_are_used_where_they_are(folder):
    from accelerate import cpu_offload

    pipe = sd(folder)
    expected = guided(pipe)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    torch.testing.assert_close(guided(pipe), expected, rtol=0, atol=0)


def test_whole_models_offloaded_and_a_tiled_decoder_change_nothing(folder):
    from accelerate import cpu_offload_with_hook

    pipe = sd(folder)
    expected = guided(pipe)
    _, hook = cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    pipe.vae.enable_tiling()
    torch.testing.assert_close(guided(pipe), expected, rtol=0, atol=0)
    with attach(pipe):
        assert pipe(PROMPT, num_inference_steps=1, height=64, width=72).images[0].size == (72, 64)
    hook.remove()


def compile_outside(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)


def compile_blocks(pipe):
    pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)


@pytest.mark.parametrize("compile_unet", [compile_outside, compile_blocks])
def test_compiled_unets_are_guided_or_say_what_to_do(compile_unet, folder):
    torch._dynamo.reset()
    pipe = sd(
        folder,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    config = scfg.SCFGConfig(map_reduction=1, coarsest_reduction=2)
    with attach(pipe, config=config):
        expected = run(pipe)
    plain = run(pipe)
    compile_unet(pipe)
    with attach(pipe, config=config):
        inside = run(pipe)
    assert_close(actual=inside, expected=expected, share=1e-4)
    assert_close(actual=run(pipe), expected=plain, share=1e-5)
    with pytest.raises(RuntimeError, match=r"torch\._dynamo\.reset"):
        with attach(pipe, config=config):
            run(pipe)
    torch._dynamo.reset()


def test_module_compiled_in_place_has_its_calls_wrapped_and_not_traced():
    class Sum(torch.nn.Module):
        def forward(self, x):
            return x @ torch.ones(3, 2)

    torch._dynamo.reset()
    module, seen = Sum(), []
    module.compile(backend="eager", fullgraph=True)
    compiled, x = module._compiled_call_impl, torch.ones(1, 3)
    plain = module(x)

    def after(output):
        return output + float(seen[-1])  # would break a graph

    undo = around(module, lambda args, kwargs: seen.append(args[0].sum().item()), after, seen.clear)
    assert module(x).equal(plain + 3) and seen == [3.0]
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 4))
    assert not seen
    undo()
    assert module._compiled_call_impl is compiled and module(x).equal(plain)
    torch._dynamo.reset()
