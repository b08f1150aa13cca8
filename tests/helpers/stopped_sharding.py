"""A slow micro run on several ranks under torchrun, to be stopped: it leaves at once when it is told to.

    stopped_sharding.py RUN_DIR"""
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from dreamer4_nb.method.dynamics import Dynamics, dynamics_loss
from dreamer4_nb.training.loop import fit
from dreamer4_nb.training.ranks import leave_ranks
from helpers.toy_sharding import CONFIG, make_batch, make_config


def slow_batch(i):
    time.sleep(0.1)
    return make_batch(i)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(int(os.environ["RANK"]))
    config = make_config(steps=120, shard=0, accumulate=1, save_every=10)
    try:
        fit("toy", {"dynamics": Dynamics(CONFIG)}, dynamics_loss, slow_batch, config, Path(sys.argv[1]), progress=False)
    except KeyboardInterrupt:
        os._exit(130)   # no thread gets the time to do what was left undone
    leave_ranks()
    os._exit(0)
