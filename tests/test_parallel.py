"""Two gloo ranks with a branch each against one process with both."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from branch_worker import first, main, networks
from safetensors.torch import load_file

import scfg

WORKER = Path(__file__).parent / "branch_worker.py"


pytestmark = pytest.mark.usefixtures("one_thread")  # as the other process has


def test_two_ranks_guide_as_one_process_does_to_the_last_bit(tmp_path):
    outs = [tmp_path / f"{rank}.safetensors" for rank in (0, 1)]
    command = [sys.executable, WORKER, "1", str(tmp_path / "store"), str(outs[1])]
    process = subprocess.Popen(command, cwd=WORKER.parent, stderr=subprocess.PIPE, text=True)
    main(0, tmp_path / "store", outs[0])
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
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
