"Two ranks under torchrun: equal gradients, the last step saved, every rank exits."
import os
import signal
import subprocess
import time

import pytest
import torch
from helpers.processes import HELPERS, start_torchrun
from helpers.toy_training import gradients, make_batch, make_config, make_modules, plain_loss_fn

from dreamer4_nb.core import load_checkpoint
from dreamer4_nb.training.loop import fit

TOY = HELPERS / "toy_training.py"
LIMIT = 600  # seconds, on a busy machine


def finish(process):
    "Output of a process that must end by itself within the limit."
    try:
        return process.communicate(timeout=LIMIT)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the ranks did not exit within {LIMIT} s")


@pytest.mark.parametrize("normalize", [0, 1])
def test_gradients_equal_those_of_one_process(tmp_path, normalize):
    "Of one with the double batch, or, where the first batch's loss is a divisor, of one that accumulates the two batches."
    steps = 1 if normalize == 0 else 12
    process = start_torchrun(TOY, 2, tmp_path, "--steps", steps, "--normalize", normalize)
    output = finish(process)
    assert process.returncode == 0, output
    alone = make_modules()
    double = lambda i: torch.cat([make_batch(2 * i), make_batch(2 * i + 1)])
    batches, accumulate = (make_batch, 2) if normalize else (double, 1)
    fit("alone", alone, plain_loss_fn, batches, make_config(steps=steps, normalize=bool(normalize), accumulate=accumulate), tmp_path, progress=False)
    ranks = [load_checkpoint(tmp_path / f"gradients{rank}.safetensors")[0] for rank in range(2)]
    for key, wanted in gradients(alone).items():
        torch.testing.assert_close(ranks[0][key], ranks[1][key], rtol=0, atol=0)
        torch.testing.assert_close(ranks[0][key], wanted, rtol=1e-5, atol=1e-6)
    state, saved = load_checkpoint(tmp_path / "toy.train.safetensors")
    assert saved["step"] == steps
    for key, value in load_checkpoint(tmp_path / "toy.safetensors")[0].items():
        torch.testing.assert_close(value, load_checkpoint(tmp_path / "alone.safetensors")[0][key], rtol=1e-4, atol=1e-5)
    assert (tmp_path / "second.safetensors").exists()


def test_interrupted_ranks_save_the_same_step_and_exit(tmp_path):
    process = start_torchrun(TOY, 2, tmp_path, "--steps", "1000000")
    deadline = time.time() + LIMIT
    while not (tmp_path / "toy.train.safetensors").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process)
    assert process.returncode != 0
    assert "stopped at step" in output and "run the same command again" in output, output
    assert load_checkpoint(tmp_path / "toy.train.safetensors")[1]["step"] < 1000000
