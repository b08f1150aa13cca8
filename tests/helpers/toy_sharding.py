"""A micro world model trained in a process of its own: alone, or with its weights spread over ranks under torchrun.

    toy_sharding.py RUN_DIR [--shard 0] [--accumulate 4] [--dies 5]    (the last rank kills itself once, in the middle of that step)"""
import argparse
import os
import signal
from pathlib import Path

import torch

from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.core import step_generator
from dreamer4_nb.core import Batch
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig, dynamics_loss
from dreamer4_nb.training.ranks import leave_ranks
from dreamer4_nb.training.loop import fit
from dreamer4_nb.training.optimizers import TrainConfig

CONFIG = DynamicsConfig(n_latents=4, d_latent=8, pack=2, train_on_context=True,
                        transformer=TransformerConfig(width=32, depth=4, heads=2, kv_heads=1, time_every=2, context=8))


def make_batch(i, b=4, t=6):
    generator = step_generator(11, i)
    latents, actions = (torch.rand(b, t, *size, generator=generator) * 2 - 1 for size in ((4, 8), (2,)))
    return Batch(frames=None, latents=latents, actions=actions, action_known=torch.ones(b, t, dtype=torch.bool), intended=actions,
                 rewards=torch.zeros(b, t), continues=torch.ones(b, t), task=torch.zeros(b).long(), relevant=torch.zeros(b).bool())


def make_config(**changes):
    return TrainConfig(**dict(steps=8, lr=1e-2, warmup=2, ema=0.9, dtype="float32", device="cpu", log_every=1, save_every=2) | changes)


def dying(step, config, marker):
    "`dynamics_loss`, in which the last rank kills itself in the middle of `step`, unless it has done so before."
    calls, last = [0], int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1

    def loss(modules, batch, generator):
        calls[0] += 1
        if last and calls[0] == step * config.accumulate and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return dynamics_loss(modules, batch, generator)

    return loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    for name, value in dict(shard=1, accumulate=1, compile=0, recompute=0, muon=0, dies=0, steps=8).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ.get("RANK", 0)))     # ranks start from different weights: rank 0's must win
    config = make_config(steps=args.steps, shard=args.shard, accumulate=args.accumulate, compile=bool(args.compile), recompute=bool(args.recompute), muon=args.muon)
    loss = dying(args.dies, config, args.run_dir / "died") if args.dies else dynamics_loss
    args.run_dir.mkdir(parents=True, exist_ok=True)
    fit("toy", {"dynamics": Dynamics(CONFIG)}, loss, make_batch, config, args.run_dir, progress=False)
    leave_ranks()
    os._exit(0)  # as the command does: the interpreter's own end may abort beside gloo's threads
