"""A toy run in a process of its own: alone, under torchrun, or killed again and again.

    toy_training.py RUN_DIR [--steps 40] [--normalize 0] [--rounds N]    (N > 0: kill it N times with SIGKILL)"""
import argparse
import os
import random
import signal
import time
from pathlib import Path

import torch
from torch import nn

from dreamer4_nb import core
from dreamer4_nb.core import save_checkpoint, step_generator
from dreamer4_nb.training.ranks import leave_ranks
from dreamer4_nb.training.loop import fit
from dreamer4_nb.training.optimizers import TrainConfig


def make_modules(seed=0):
    torch.manual_seed(seed)
    return {"body": nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 16)), "head": nn.Linear(16, 8)}


def make_batch(i, rows=4):
    return torch.randn(rows, 8, generator=step_generator(11, i))


def loss_fn(modules, batch, generator):
    "Undo a flip; the noise in the second term makes the run depend on the generator it is given."
    out = modules["head"](modules["body"](batch))
    noise = torch.randn(out.shape, generator=generator, device=out.device)
    return {"flip": (out - batch.flip(-1)).square().mean(), "noise": (out - noise).square().mean()}, {"size": out.abs().mean()}


def plain_loss_fn(modules, batch, generator):
    out = modules["head"](modules["body"](batch))
    return {"flip": (out - batch.flip(-1)).square().mean(), "size": out.abs().mean()}, {}


def make_config(**changes):
    defaults = dict(steps=40, lr=1e-2, warmup=5, ema=0.9, dtype="float32", device="cpu", log_every=5, save_every=5)
    return TrainConfig(**defaults | changes)


def gradients(modules):
    return {f"{name}.{key}": p.grad.clone() for name, module in modules.items() for key, p in module.named_parameters()}


class SlowFile:
    "A file whose writes take 16 ms, so that a kill is likely to fall into one."

    def __init__(self, *args):
        self.file = open(*args, buffering=0)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def write(self, data):
        for start in range(0, len(data), len(data) // 16 + 1):
            self.file.write(data[start:start + len(data) // 16 + 1])
            time.sleep(1e-3)


def train_until_killed(run_dir, rounds):
    "Start the same run `rounds` times, each time killing it a moment after it began to save; then let it finish."
    rng = random.Random(0)
    part = run_dir / "toy.train.safetensors"
    for round in range(rounds + 1):
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            core.open = SlowFile
            fit("toy", make_modules(), loss_fn, make_batch, make_config(steps=80, save_every=1), run_dir, progress=False)
            os._exit(0)
        before = part.stat().st_mtime_ns if part.exists() else 0
        while round < rounds and (not part.exists() or part.stat().st_mtime_ns == before):
            assert os.waitpid(child, os.WNOHANG)[0] == 0, "the run ended by itself"
            time.sleep(1e-3)
        if round < rounds:
            time.sleep(rng.random() * 0.1)
            os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == (signal.SIGKILL if round < rounds else 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--normalize", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=0)
    args = parser.parse_args()
    if args.rounds:
        train_until_killed(args.run_dir, args.rounds)
    else:
        torch.set_num_threads(1)
        modules = make_modules(seed=int(os.environ.get("RANK", 0)))  # ranks start from different weights: rank 0's must win
        config = make_config(steps=args.steps, normalize=bool(args.normalize))
        fit("toy", modules, plain_loss_fn, make_batch, config, args.run_dir, progress=False)
        save_checkpoint(args.run_dir / f"gradients{os.environ.get('RANK', 0)}.safetensors", gradients(modules), {})
        fit("second", modules, plain_loss_fn, make_batch, config, args.run_dir, progress=False)  # the ranks are joined once
        leave_ranks()
        os._exit(0)  # as the command does: the interpreter's own end may abort beside gloo's threads
