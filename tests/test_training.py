"The training loop keeps what it has: resume, kills, full disks, bad losses."
import builtins
import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers.processes import ENVIRONMENT, HELPERS
from helpers.toy_training import gradients, loss_fn, make_batch, make_config, make_modules, plain_loss_fn

from dreamer4_nb import core
from dreamer4_nb.core import UserError, load_checkpoint
from dreamer4_nb.training.loop import fit

TOY = HELPERS / "toy_training.py"


def train(run_dir, batches=make_batch, loss=loss_fn, modules=None, trainable=None, **changes):
    return fit("toy", modules or make_modules(), loss, batches, make_config(**changes), run_dir, trainable=trainable, progress=False)


def same_tensors(one, other):
    "Two checkpoint files hold the same bits under the same names."
    (a, config_a), (b, config_b) = load_checkpoint(one), load_checkpoint(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) and config_a == config_b


def without_speed(history):
    return [{key: value for key, value in record.items() if key != "frames_per_s"} for record in history]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_interrupted_run_equals_unbroken_one_bit_for_bit(tmp_path, capsys, accumulate):
    unbroken = train(tmp_path / "unbroken", accumulate=accumulate)

    def batches(i):  # Ctrl-C at step 12, which is neither a log step nor a save step
        if i == 11 * accumulate:
            os.kill(os.getpid(), signal.SIGINT)
        return make_batch(i)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", batches, accumulate=accumulate)
    said = capsys.readouterr().out
    assert "stopped at step 12 of 40" in said and "run the same command again" in said
    resumed = train(tmp_path / "broken", accumulate=accumulate)
    for name in ("toy.train.safetensors", "toy.safetensors"):
        assert same_tensors(tmp_path / "unbroken" / name, tmp_path / "broken" / name)
    at = lambda history: [record for record in without_speed(history) if record["step"] > 15]  # step 12 split one mean in two
    assert at(resumed) == at(unbroken)
    assert (tmp_path / "broken" / "toy.safetensors").read_bytes() == (tmp_path / "unbroken" / "toy.safetensors").read_bytes()


def test_crash_goes_back_to_the_last_save(tmp_path):
    def crash(i):
        if i == 13:
            raise RuntimeError("crash")
        return make_batch(i)

    unbroken = train(tmp_path / "unbroken")
    with pytest.raises(RuntimeError, match="crash"):
        train(tmp_path / "broken", crash)
    assert load_checkpoint(tmp_path / "broken" / "toy.train.safetensors")[1]["step"] == 10
    assert without_speed(train(tmp_path / "broken")) == without_speed(unbroken)
    assert same_tensors(tmp_path / "unbroken" / "toy.train.safetensors", tmp_path / "broken" / "toy.train.safetensors")


def test_kill_at_any_moment_leaves_a_usable_checkpoint(tmp_path):
    command = [sys.executable, str(TOY), str(tmp_path / "killed"), "--rounds", "5"]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=900)
    torch.set_num_threads(1)
    train(tmp_path / "unbroken", steps=80, save_every=1)
    assert same_tensors(tmp_path / "unbroken" / "toy.train.safetensors", tmp_path / "killed" / "toy.train.safetensors")
    assert not list((tmp_path / "killed").glob(".*part*"))


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    train(tmp_path, steps=40, save_every=5, batches=make_batch)
    path = tmp_path / "toy.train.safetensors"
    before = path.read_bytes()

    class FullDisk:
        def __init__(self, file): self.file = file
        def __enter__(self): return self
        def __exit__(self, *args): self.file.close()
        def write(self, data):
            self.file.write(data[:len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(core, "open", lambda *args: FullDisk(builtins.open(*args)), raising=False)
    with pytest.raises(UserError, match="No space left on device.*untouched"):
        core.save_checkpoint(path, {"x": torch.zeros(1000)}, {})
    assert path.read_bytes() == before
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match="No space left"):
        train(tmp_path / "new")
    assert not [name for name in os.listdir(tmp_path / "new") if "safetensors" in name]


def test_bad_loss_names_term_and_step_and_saves_nothing(tmp_path):
    def poisoned(i):
        return make_batch(i) * float("nan") if i == 17 else make_batch(i)

    with pytest.raises(UserError, match="'flip' is nan at step 18"):
        train(tmp_path, poisoned)
    state, saved = load_checkpoint(tmp_path / "toy.train.safetensors")
    assert saved["step"] == 15 and all(value.isfinite().all() for value in state.values())
    assert not (tmp_path / "toy.safetensors").exists()


def test_checkpoint_of_another_run_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match=r"training.lr was 0.01, now 0.02"):
        train(tmp_path, lr=0.02)
    with pytest.raises(UserError, match="another config.*head.weight"):
        train(tmp_path, modules=make_modules() | {"head": torch.nn.Linear(16, 4)})
    path = tmp_path / "toy.train.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut short"):
        train(tmp_path)


def test_accumulated_batches_equal_one_large_batch():
    parts, whole = make_modules(), make_modules()
    double = lambda i: torch.cat([make_batch(2 * i), make_batch(2 * i + 1)])
    train(None, make_batch, plain_loss_fn, parts, steps=1, accumulate=2, normalize=False)
    train(None, double, plain_loss_fn, whole, steps=1, normalize=False)
    for key, wanted in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[key], wanted, rtol=1e-5, atol=1e-6)


def test_frozen_parts_get_no_gradient_and_do_not_move():
    modules, start = make_modules(), make_modules()
    train(None, modules=modules, trainable=["head.weight"], steps=5)
    for key, p in modules["body"].named_parameters():
        assert p.grad is None and torch.equal(p, dict(start["body"].named_parameters())[key])
    assert modules["head"].bias.grad is None and not torch.equal(modules["head"].weight, start["head"].weight)
    with pytest.raises(UserError, match="trainable names 'tail'"):
        train(None, trainable=["tail"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_pass_leaves_the_student_its_gradient(dtype):
    "PyTorch's autocast may keep weights cast under no_grad and hand them, without history, to the pass that needs it."
    def bootstrap_loss(modules, batch, generator):
        run = lambda x: modules["head"](modules["body"](x))
        with torch.no_grad():
            target = run(batch)
        return {"loss": (run(batch + 1) - target).square().mean()}, {}

    modules = make_modules()
    train(None, loss=bootstrap_loss, modules=modules, steps=1, dtype=dtype)
    assert all(value.abs().sum() > 0 for value in gradients(modules).values())
