"""Every Python block of the README runs, in order, on small random models."""

import re
from pathlib import Path

import torch
from adapter_hosts import sd

import scfg
from scfg.unet import UNet, UNetConfig

README = Path(__file__).parents[1] / "README.md"


def test_every_block_runs(tmp_path):
    torch.manual_seed(0)
    config = UNetConfig(4, 4, (16, 32, 32, 32), (1, 1, 1, 1), 1, (2,) * 4, 1, 24, norm_groups=8)
    noise, uncond, cond = (torch.randn(size) for size in ((1, 4, 24, 40), (1, 7, 24), (1, 7, 24)))
    names = {
        "torch": torch, "scfg": scfg, "any_unet": UNet(config).eval(), "pipe": sd(tmp_path),
        "x": noise, "t": torch.tensor(500), "context": torch.cat([uncond, cond]),
        "noise": noise, "uncond": uncond, "cond": cond,
    }  # fmt: skip
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    with torch.no_grad():
        for block in blocks:
            exec(block, names)
    assert names["eps"].shape == noise.shape and names["eps"].isfinite().all()
    assert not names["x"].equal(noise) and names["x"].isfinite().all()
    assert names["image"].size == (128, 128)
