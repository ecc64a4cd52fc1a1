"""Every Python block of README and docs runs, on what its page says; the README stays short.

A block is a script by itself, or goes on where the blocks of its page before it ended; a comment
``<!-- on: NAME -->`` before it names what of `STAND_INS` plays the reader's network or pipeline.
"""

import re
from pathlib import Path

import pytest
import torch
from adapter_hosts import UNET, diffusers, sd, sdxl_parts
from tiny import tiny_unet
from transformer_hosts import randn
from transformer_pipes import pipeline

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:<!-- on: ([\w ]+) -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = {
    str(page.relative_to(ROOT)): BLOCK.findall(page.read_text())
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
RUNNABLE = [name for name, blocks in PAGES.items() if blocks]


class Eps(torch.nn.Module):
    """A model as k-diffusion has them: denoised = x - sigma eps."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, sigma, cond):
        scale = sigma[:, None, None, None]
        return x - scale * self.unet(x / (scale**2 + 1).sqrt(), 400 * sigma, cond)


def heun(model, x, sigmas, extra_args):
    """A sampler that calls the model as those of k-diffusion do."""
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        if after == 0:
            return model(x, sigma.expand(len(x)), **extra_args)
        d = (x - model(x, sigma.expand(len(x)), **extra_args)) / sigma
        second = (x + (after - sigma) * d - model(x, after.expand(len(x)), **extra_args)) / after
        x = x + (after - sigma) * (d + second) / 2


def latents(width):
    """x, noise, t and contexts of a U-Net with text features of a width."""
    noise, uncond, cond = (
        randn(1, 4, 24, 40),
        randn(1, 7, width, seed=1),
        randn(1, 7, width, seed=2),
    )
    context = torch.cat([uncond, cond])
    return dict(
        x=noise, noise=noise, t=torch.tensor(500), uncond=uncond, cond=cond, context=context
    )


def any_unet(folder):
    return {"any_unet": tiny_unet(), **latents(24)}


def diffusers_unet(folder):
    torch.manual_seed(0)
    return {"diffusers_unet": diffusers.UNet2DConditionModel(**UNET).eval(), **latents(32)}


def k_diffusion(folder):
    sigmas = torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.0])
    return {"model": Eps(tiny_unet()), "sample_heun": heun, "sigmas": sigmas, **latents(24)}


def maps(folder):
    self_maps, cross_maps = (randn(2, 15, m).softmax(-1) for m in (15, 7))
    eps_uncond, eps_text = randn(1, 4, 12, 20), randn(1, 4, 12, 20, seed=1)
    return dict(
        self_maps=[self_maps], cross_maps=[cross_maps], eps_uncond=eps_uncond, eps_text=eps_text
    )


def sdxl_modular(folder):
    modular = pytest.importorskip("diffusers.modular_pipelines")
    pipe = modular.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**sdxl_parts(folder))
    pipe.set_progress_bar_config(disable=True)
    return {"pipe": pipe}


def transformer(name):
    """A pipeline whose text encoders, which the tiny ones lack, are embeddings made beforehand."""

    def make(folder):
        pipe, call, _ = pipeline(name)
        names = ("prompt_embeds", "pooled_prompt_embeds")
        prompt, negative = ([call[sign + key] for key in names] for sign in ("", "negative_"))

        def encode_prompt(prompt_=None, **given):
            text = given.get("prompt", prompt_)
            if name == "sd3":
                return prompt[0], negative[0], prompt[1], negative[1]
            return *(negative if text == " " else prompt), torch.zeros(12, 3)

        pipe.encode_prompt, pipe.default_sample_size = encode_prompt, 12
        return {"pipe": pipe}

    return make


def joint(folder):
    from test_replay import Own

    return {"model": Own()}


def comfyui(folder):
    return {}


STAND_INS = {
    "": lambda folder: {},
    "nothing": lambda folder: {},
    "any_unet": any_unet,
    "diffusers unet": diffusers_unet,
    "k_diffusion": k_diffusion,
    "maps": maps,
    "sd": lambda folder: {"pipe": sd(folder)},
    "sdxl modular": sdxl_modular,
    "sd3": transformer("sd3"),
    "flux": transformer("flux"),
    "joint": joint,
    "comfyui": comfyui,
}


def run(page, folder):
    """Names after all blocks of a page, and those that each block left."""
    names, left = {"__name__": "a page"}, []
    for number, (standing_in, code) in enumerate(PAGES[page]):
        if "--8<--" in code:  # one of the examples, which test_examples runs
            assert (ROOT / code.split('"')[1]).is_file()
            continue
        names |= STAND_INS[standing_in](folder)
        exec(compile(code, f"{page}, block {number}", "exec"), names)
        left.append(dict(names))
    return left


@pytest.mark.parametrize("page", RUNNABLE)
def test_blocks_run_and_what_they_make_is_finite(page, tmp_path, monkeypatch):
    def from_pretrained(name, **options):
        return sd(tmp_path)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for names in run(page, tmp_path):
        for name in ("x", "eps", "latents"):
            assert name not in names or names[name].isfinite().all(), name
        if "image" in names:
            assert len(set(names["image"].convert("L").tobytes())) > 1


def test_pages_with_code_are_all_here():
    assert {"README.md", "docs/index.md", "docs/server.md", "docs/extending.md"} < set(RUNNABLE)
    hosts = {path.stem for path in (ROOT / "docs/hosts").glob("*.md")}
    assert hosts == {"diffusers", "k_diffusion", "comfyui", "own_loop", "transformers"}
    assert {f"docs/hosts/{name}.md" for name in hosts} <= set(RUNNABLE)


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"[\w/]+\.md", menu)) == pages


def test_the_readme_is_read_in_a_minute():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 90
    assert len(text.split()) <= 900
    cells = [
        cell.strip() for row in re.findall(r"^\|.*", text, re.MULTILINE) for cell in row.split("|")
    ]
    assert cells and max(map(len, cells)) <= 80
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / link).exists(), link
