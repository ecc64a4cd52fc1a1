"""Two gloo ranks with a branch each against one process with both."""

import subprocess
import sys
from pathlib import Path

import torch
from branch_worker import first, networks
from safetensors.torch import load_file

import scfg

WORKER = Path(__file__).parent / "branch_worker.py"


def test_two_ranks_guide_as_one_process_does_to_the_last_bit(tmp_path):
    outs = [tmp_path / f"{rank}.safetensors" for rank in (0, 1)]
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(tmp_path / "store"), str(outs[rank])],
            cwd=WORKER.parent,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    torch.set_num_threads(1)
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    one, other = (load_file(out) for out in outs)
    assert one.keys() == other.keys() and len(one) == 4 * 4
    assert all(one[key].equal(other[key]) for key in one)
    for name, model, config, uncond, text in networks():
        options = {} if name == "unet" else {"return_dict": False}
        with scfg.Recorder(model, config) as network, torch.no_grad():
            eps = [first(network(*args, **kwargs, **options)) for args, kwargs in (uncond, text)]
            expected = network.guide(*eps, 4.0)
        for key in ("eps", "rate", "labels"):
            assert one[f"{name} {key}"].equal(getattr(expected, key)), f"{name} {key}"
        assert one[f"{name} refused"]
