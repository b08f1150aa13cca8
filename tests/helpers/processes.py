"Toy runs in processes of their own, on one rank or on several."
import os
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun_command(script: Path, ranks: int, *options: object, restarts: int = 0) -> list[str]:
    "The command that runs a script on so many ranks of this machine."
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            "--max-restarts", str(restarts), "--monitor-interval", "0.1", str(script), *map(str, options)]


def start_torchrun(script: Path, ranks: int, *options: object) -> subprocess.Popen:
    "Starts a script on so many ranks, in a session of its own, which a test can stop."
    return subprocess.Popen(torchrun_command(script, ranks, *options), env=ENVIRONMENT, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def torchrun(script: Path, ranks: int, *options: object, restarts: int = 0,
             limit: float = 600) -> tuple[int, str]:
    "Exit status and output of a script on so many ranks."
    done = subprocess.run(torchrun_command(script, ranks, *options, restarts=restarts), env=ENVIRONMENT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
    return done.returncode, done.stdout
