"""Two hundred kills: what was being made ends as if nothing had happened. By hand, in about half an hour:

    python tests/kills.py [--kind NAME] [--seed 0] [--json FILE]

Each kind makes something once without a break, and again with signals at random moments, each time started anew by
the same command. SIGKILL stands for a power cut, SIGTERM and SIGINT for a person or a cluster. The end must be the
same bit for bit. After a graceful stop of a training, the run must go on at the step where it stopped.
"""
import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from safetensors.torch import load_file

from dreamer4_nb.data.adapters import JOURNAL, Contents, ImportSettings, Recording, import_dataset
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.data.tasks import TaskSpec
from dreamer4_nb.training.loop import fit
from helpers.processes import ENVIRONMENT, HELPERS, torchrun_command
from helpers.toy_training import loss_fn, make_batch, make_config, make_modules

COMMAND = [sys.executable, "-m", "dreamer4_nb"]
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@dataclass
class Tally:
    kind: str
    kills: int = 0          # signals that met a living process
    gone: int = 0           # signals that came after the end
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def same_tensors(a: Path, b: Path) -> bool:
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same_stores(a: Path, b: Path) -> bool:
    one, other = EpisodeStore.open(a), EpisodeStore.open(b)
    names = ("frames", "actions", "intended", "rewards", "continues", "states")
    return (one.n_episodes == other.n_episodes and all(np.array_equal(one.column(name), other.column(name)) for name in names)
            and np.array_equal(one.seeds, other.seeds))


def start(command: list[str]) -> subprocess.Popen:
    "A process with a session of its own, whose output goes to a file of its own."
    output = tempfile.TemporaryFile()
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    process.output = output
    return process


def said(process: subprocess.Popen) -> str:
    process.output.seek(0)
    return process.output.read().decode("utf-8", "replace")


def hit(process: subprocess.Popen, number: int, after: float, tally: Tally) -> str:
    "Send a signal after some seconds, wait for the end, and return what was said."
    try:
        process.wait(after)
        tally.gone += 1
    except subprocess.TimeoutExpired:
        tally.kills += 1
        # A cluster tells torchrun or the command; a power cut takes all processes.
        (os.killpg if number == KILL else os.kill)(process.pid, number)
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            tally.wrong.append(f"still there 90 s after signal {number}")
            os.killpg(process.pid, KILL)
            process.wait()
    text = said(process)
    of_torchrun = text.count("SignalException: Process")     # it ends so itself, and says it once
    if number != KILL and text.count("Traceback") > of_torchrun:
        tally.wrong.append("a traceback: " + text[-300:])
    return text


def finish(command: list[str], tally: Tally) -> None:
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tally.wrong.append(f"the last start failed: {done.stdout[-400:]}")


def forked(work: Callable[[], None], number: int, after: float, tally: Tally) -> int:
    "Do some work in a fork of this process, which gets a signal after some seconds. Returns its exit status."
    child = os.fork()
    if child == 0:
        status = 1
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            work()
            status = 0
        except KeyboardInterrupt:
            status = 130
        finally:
            os._exit(status)
    time.sleep(after)
    if os.waitpid(child, os.WNOHANG)[0]:
        tally.gone += 1
        return 0
    tally.kills += 1
    os.kill(child, number)
    return os.waitpid(child, 0)[1]


def trainings(folder: Path, rng: random.Random, tally: Tally) -> None:
    "A toy training of 60 steps, which saves every second one, in forks of this process."
    config = make_config(steps=60, save_every=2, log_every=1)

    def train(where: Path) -> None:
        fit("toy", make_modules(), loss_fn, lambda i: time.sleep(0.01) or make_batch(i), config, where, progress=False)

    train(folder / "unbroken")
    for number in range(10):
        broken = folder / f"broken-{number}"
        for _ in range(8):
            forked(lambda: train(broken), rng.choice([KILL, KILL, TERM, INT]), rng.uniform(0.05, 0.35), tally)
        train(broken)
        if not same_tensors(folder / "unbroken/toy.safetensors", broken / "toy.safetensors"):
            tally.wrong.append(f"training {number} ended with other weights")
        steps = [json.loads(line)["step"] for line in (broken / "toy.log.jsonl").read_text(encoding="utf-8").splitlines()]
        if steps != list(range(1, 61)):
            tally.wrong.append(f"training {number} has lost records: {steps}")
        if list(broken.glob(".*part*")):
            tally.wrong.append(f"training {number} left parts behind")


def appends(folder: Path, rng: random.Random, tally: Tally) -> None:
    "Episodes appended to a store: those that count are whole, none is lost or doubled."
    def write(path: Path) -> None:
        store = EpisodeStore.open(path, "a")
        for number in range(len(store), 40):
            frames = np.full((9, 16, 16, 3), number, np.uint8)
            store.append(Episode(np.zeros((9, 2)), np.full(9, float(number)), frames, seed=number))

    for number in range(6):
        path = folder / f"{number}.zarr"
        EpisodeStore.create(path, "toy", 2, (16, 16, 3))
        for _ in range(7):
            forked(lambda: write(path), rng.choice([KILL, KILL, TERM]), rng.uniform(0.02, 0.25), tally)
        write(path)
        store = EpisodeStore.open(path, "a").finish()
        found = store.column("rewards")[::9]
        if not np.array_equal(found, np.arange(40)) or not (store.column("frames")[::9, 0, 0, 0] == np.arange(40)).all():
            tally.wrong.append(f"store {number} holds {found.tolist()}")


def collections(folder: Path, rng: random.Random, tally: Tally) -> None:
    "`dreamer4-nb collect`: what is on the disk is kept, and the same command goes on."
    def command(name: str) -> list[str]:
        return [*COMMAND, "collect", "--out", str(folder / name), "--episodes", "60", "--decisions", "40", "--candidates", "8",
                "--image", "32", "--workers", "1", "--seed", "5"]

    finish(command("unbroken.zarr"), tally)
    finish(command("unbroken.npz"), tally)
    for ending in ("zarr", "npz"):
        for number in range(3):
            name = f"broken-{number}.{ending}"
            for _ in range(6):
                if not (folder / name).exists():
                    hit(start(command(name)), rng.choice([KILL, TERM, INT]), rng.uniform(5, 14), tally)
            if not (folder / name).exists():
                finish(command(name), tally)
            if ending == "zarr":
                same = same_stores(folder / name, folder / "unbroken.zarr")
            else:
                one, other = np.load(folder / name), np.load(folder / "unbroken.npz")
                same = all(np.array_equal(one[key], other[key]) for key in other.files)
            if not same:
                tally.wrong.append(f"{name} differs")


class SlowFilms:
    "Forty recordings of 3 to 32 frames, every eighth of which cannot be read."
    def contents(self) -> Contents:
        return Contents({task: TaskSpec(2, scored=False) for task in ("push", "pull")}, [str(n) for n in range(40)])

    def read(self, episode: str) -> Recording:
        number = int(episode)
        if number % 8 == 5:
            raise RuntimeError("damaged")
        n = 3 + 7 * number % 30
        def frames():
            for t in range(n):
                time.sleep(0.001)
                yield np.full((12, 16, 3), number + t, np.uint8)
        actions = np.random.default_rng(number).uniform(-1, 1, (n, 2))
        return Recording(frames(), n, actions, task="push" if number % 3 else "pull")


def same_imports(a: Path, b: Path) -> bool:
    return same_stores(a, b) and (a / JOURNAL).read_bytes() == (b / JOURNAL).read_bytes()


def imports(folder: Path, rng: random.Random, tally: Tally) -> None:
    "Imports in forks of this process, and `dreamer4-nb import` of an .npz: each goes on in the middle of a recording."
    def bring(path: Path) -> None:
        import_dataset(SlowFilms(), path, ImportSettings(image=16, longest=10), progress=False)

    bring(folder / "unbroken.zarr")
    for number in range(8):
        path = folder / f"forked-{number}.zarr"
        for _ in range(8):
            if not path.exists():
                forked(lambda path=path: bring(path), rng.choice([KILL, KILL, TERM]), rng.uniform(0.02, 0.6), tally)
        if not path.exists():
            bring(path)
        if not same_imports(folder / "unbroken.zarr", path):
            tally.wrong.append(f"{path.name} differs")

    films = np.random.default_rng(0).integers(0, 256, (60, 60, 96, 96, 3), dtype=np.uint8)
    np.savez_compressed(folder / "films.npz", frames=films, actions=np.zeros((60, 60, 2), np.float32))

    def command(name: str) -> list[str]:
        return [*COMMAND, "import", "npz", str(folder / "films.npz"), "--out", str(folder / name), "--longest", "25"]

    finish(command("whole.zarr"), tally)
    for number in range(3):
        name = f"killed-{number}.zarr"
        for _ in range(6):
            if not (folder / name).exists():
                hit(start(command(name)), rng.choice([KILL, TERM, INT]), rng.uniform(4, 12), tally)
        if not (folder / name).exists():
            finish(command(name), tally)
        if not same_imports(folder / "whole.zarr", folder / name):
            tally.wrong.append(f"{name} differs")
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    if left:
        tally.wrong.append(f"left behind: {left}")


def chains(folder: Path, rng: random.Random, tally: Tally) -> None:
    "`dreamer4-nb demo`, killed in any phase."
    def command(name: str) -> list[str]:
        return [*COMMAND, "demo", "--preset", "micro", "--run", str(folder / name), "--workers", "1", "--threads", "1"]

    finish(command("unbroken"), tally)
    for number in range(5):
        name = f"broken-{number}"
        for _ in range(9):
            if not (folder / name / "report.html").exists():
                hit(start(command(name)), rng.choice([KILL, KILL, TERM, INT]), rng.uniform(5, 14), tally)
        finish(command(name), tally)
        for part in ("tokenizer", "dynamics", "agent", "imagination"):
            file = f"{part}.safetensors"
            if not same_tensors(folder / "unbroken" / file, folder / name / file):
                tally.wrong.append(f"chain {number}: other weights in {file}")
        results = [json.loads((folder / run / "results.json").read_text(encoding="utf-8")) for run in ("unbroken", name)]
        returns = [[row["return"] for row in one["closed_loop"]] for one in results]
        if returns[0] != returns[1]:
            tally.wrong.append(f"chain {number}: other returns {returns}")
        left = [path.name for path in (folder / name).rglob("*") if ".part" in path.name]
        if left:
            tally.wrong.append(f"chain {number}: left {left}")


def sharded_stops(folder: Path, rng: random.Random, tally: Tally) -> None:
    "A run with weights spread over two ranks: a graceful stop saves where it stops, a kill loses one interval at most."
    script = HELPERS / "stopped_sharding.py"

    def command(name: str) -> list[str]:
        return torchrun_command(script, 2, folder / name)

    finish(command("unbroken"), tally)
    for number in range(4):
        name = f"broken-{number}"
        for _ in range(8):
            if (folder / name / "toy.safetensors").exists():
                break
            text = hit(start(command(name)), rng.choice([TERM, INT, KILL]), rng.uniform(9, 16), tally)
            if "saved in None" in text:
                tally.wrong.append(f"sharded run {number}: saved in None")
            for stopped, where in re.findall(r"stopped at step (\d+) of \d+; saved in (\S+)\. To go on", text):
                about = Path(where) / "about.json"
                if not about.exists() or json.loads(about.read_text(encoding="utf-8"))["step"] != int(stopped):
                    tally.wrong.append(f"sharded run {number}: stopped at step {stopped}, but {about} is not of it")
        if not (folder / name / "toy.safetensors").exists():
            finish(command(name), tally)
        if not same_tensors(folder / "unbroken/toy.safetensors", folder / name / "toy.safetensors"):
            tally.wrong.append(f"sharded run {number} ended with other weights")


KINDS = {"training": trainings, "appending": appends, "collecting": collections, "importing": imports, "chain": chains, "sharded": sharded_stops}


def run_all() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=list(KINDS), help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tallies = []
    for kind, make in KINDS.items():
        if arguments.kind not in (None, kind):
            continue
        tally = Tally(kind)
        folder = Path(tempfile.mkdtemp(prefix=f"kills-{kind}-"))
        began = time.perf_counter()
        make(folder, random.Random(arguments.seed), tally)
        tally.seconds = round(time.perf_counter() - began)
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{kind:12} {tally.kills:4} signals, {tally.gone} came too late, {len(tally.wrong)} wrong, {tally.seconds} s", flush=True)
        for fault in tally.wrong:
            print(f"    {fault}", flush=True)
        tallies.append(tally)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(tally) for tally in tallies], indent=1), encoding="utf-8")
    return int(any(tally.wrong for tally in tallies))


if __name__ == "__main__":
    sys.exit(run_all())
