"""Five hundred malformed inputs of fifteen kinds, and what became of each. By hand, in about half an hour:

    python tests/malformed.py [--kind NAME] [--seed 0] [--json FILE] [--list]

Each case says first what is expected: "refused" (one line, exit status 2, nothing written), "answers" (the command
does its work in spite of it), or "right or refused" (a random flip of a bit may hit what nobody reads; then the
data must be the same). A traceback, a wrong outcome, a hang of a minute and a changed file that was not the
command's own are failures. A hundred cases and more are real processes.
"""
import argparse
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch

from dreamer4_nb.core import UserError, load_checkpoint, save_checkpoint
from dreamer4_nb.data import demonstrations
from dreamer4_nb.data.envs import VectorEnv, make_env, render_states
from dreamer4_nb.data.planner import Planner, collect_episodes
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.evaluation.closed_loop import RandomPolicy, evaluate_policy
from dreamer4_nb.evaluation.statistics import Records
from dreamer4_nb.inputs import from_dict, to_dict
from dreamer4_nb.method.checkpoints import load_agent, load_dynamics, load_imagination, load_tokenizer
from dreamer4_nb.method.generation import rollout
from dreamer4_nb.runs.cli import main
from dreamer4_nb.runs.judge import ship
from dreamer4_nb.runs.presets import PRESETS, Preset
from dreamer4_nb.training.loop import fit
from helpers.toy_training import loss_fn, make_batch, make_config, make_modules
from test_inputs import numeric_fields

BALL = "ball_in_cup-catch"
LIMIT = 60      # seconds
REFUSED, ANSWERS, EITHER = "refused", "answers", "right or refused"


@dataclass
class Case:
    kind: str
    name: str
    expected: str
    run: Callable[[Path], Any] = field(repr=False)      # in a fresh folder; returns an exit status or nothing
    outcome: str = ""
    said: str = ""
    seconds: float = 0.0


class Parts:
    "What the cases damage copies of: a finished run, a store, a toy training that stopped half way."

    def __init__(self, folder: Path):
        self.run = folder / "run"
        arguments = ["demo", "--preset", "micro", "--run", str(self.run), "--workers", "1", "--threads", "1"]
        if main(arguments) != 0:
            raise SystemExit("the micro run could not be made")
        self.store = folder / "store.zarr"
        episodes = collect_episodes(BALL, 4, 20, seed=7, quality="mixed", planner=Planner(BALL, candidates=2))
        store = EpisodeStore.create(self.store, BALL, 2, (16, 16, 3), episodes[0]["states"].shape[1])
        store.extend([Episode(frames=render_states(BALL, e["states"], 16, 0), task=BALL, **e) for e in episodes])
        store.finish()
        self.training = folder / "training"
        train_toy(self.training, stop_at=6)


def train_toy(folder: Path, stop_at: int | None = None) -> list[dict[str, float]]:
    "Ten steps of the toy; with `stop_at` it ends there as after a crash."
    def batches(i: int) -> torch.Tensor:
        if i == stop_at:
            raise ZeroDivisionError
        return make_batch(i)

    config = make_config(steps=10, log_every=1, save_every=2)
    with contextlib.suppress(ZeroDivisionError):
        return fit("toy", make_modules(), loss_fn, batches, config, folder, progress=False)
    return []


def copied(part: Path, folder: Path) -> Path:
    "A copy of a part, to be damaged."
    target = folder / part.name
    if part.is_dir():
        shutil.copytree(part, target)
    else:
        shutil.copy(part, target)
    return target


def same_store(path: Path, original: Path) -> None:
    "AssertionError if a store that opens holds other data than the original."
    there, here = EpisodeStore.open(path), EpisodeStore.open(original)
    assert there.n_episodes == here.n_episodes and there.tasks == here.tasks
    for name in ("frames", "actions", "intended", "rewards", "continues", "states"):
        assert np.array_equal(there.column(name), here.column(name)), name
    assert np.array_equal(there.seeds, here.seeds) and np.array_equal(there.qualities, here.qualities)


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


# -- the kinds -------------------------------------------------------------------------------------------------------

def settings_cases(rng: random.Random) -> Iterator[tuple[str, list[str]]]:
    names = [name for name, _ in numeric_fields(Preset) if "slowness" not in name and "action_dims" not in name]
    for name in rng.sample(names, 55):
        value = rng.choice(["nan", "-1", "-inf", "many", "1e400", ""])
        yield f"{name}={value!r}", ["demo", "--preset", "micro", "--run", "r", f"{option(name)}={value}"]


COMMANDS = [
    ["demo", "--preset", "giant"], ["dream"], [], ["train", "everything"], ["demo", "--run", "s3://bucket/run"],
    ["demo", "--run", ""], ["demo", "--run", "file:///tmp/x"], ["demo", "--run", "a\0b"], ["demo", "--data", "zip://x"],
    ["demo", "--data", "nothing.zarr"], ["demo", "--data", "none-*.zarr"], ["demo", "--data", "s3x://bucket"],
    ["demo", "--tasks", "cartpole"], ["demo", "--tasks"], ["demo", "--tasks", BALL, BALL],
    ["demo", "--agent.labels", "wished"], ["demo", "--agent.model.policy", "bernoulli"],
    ["demo", "--agent.model.policy", "beta"], ["demo", "--evaluation.readouts"], ["demo", "--evaluation.readouts", "guess"],
    ["demo", "--evaluation.dreams", "0"], ["demo", "--held-out", "0"],
    ["demo", "--held-out", "1"], ["demo", "--held-out", "-0.1"], ["demo", "--episodes", "1"],
    ["demo", "--tokenizer.model.patch", "7"], ["demo", "--tokenizer.model.transformer.heads", "3"],
    ["demo", "--dynamics.model.schedule.k-max", "6"], ["demo", "--dynamics.model.schedule.steps", "3"],
    ["demo", "--dynamics.model.pack", "3"], ["demo", "--dynamics.train.device", "tpu"],
    ["demo", "--evaluation.first-seed", "0"], ["demo", "--seed", "4294967296"],
    ["train", "agent", "--run", "empty"], ["evaluate", "--run", "empty"], ["evaluate", "--workers", "0"],
    ["evaluate", "--episodes", "0"], ["evaluate", "--decisions", "0"], ["evaluate", "--first-seed", "-1"],
    ["study", "--run", "empty"], ["study", "--setting", "imagination.model.horizon"], ["study", "--values", "1"],
    ["ship", "--run", "empty"], ["bench", "--seconds", "nan"], ["bench", "--seconds", "-1"], ["bench", "--threads", "-1"],
    ["bench", "--device", "tpu"], ["collect"], ["collect", "--out", "x.txt"], ["collect", "--out", "s3://bucket/x.npz"],
    ["collect", "--out", "x.zarr", "--task", "fly"], ["collect", "--out", "x.zarr", "--workers", "-1"],
    ["collect", "--out", "x.zarr", "--episodes", "0"], ["collect", "--out", "x.zarr", "--decisions", "0"],
    ["collect", "--out", "x.zarr", "--image", "-1"], ["collect", "--out", "x.zarr", "--seed", "-1"],
    ["collect", "--out", "x.zarr", "--candidates", "0"], ["collect", "--out", "x.zarr", "--shard", "4/4"],
    ["collect", "--out", "x.zarr", "--seed", "4294967290", "--episodes", "100"]]


def in_process(arguments: list[str]) -> Callable[[Path], int]:
    "The command in this process, in the case's folder."
    def run(folder: Path) -> int:
        micro = ["--preset", "micro"] if arguments[:1] == ["demo"] and "--preset" not in arguments else []
        with contextlib.chdir(folder):
            return main([*arguments, *micro])
    return run


def as_process(arguments: list[str], shown: str = "", **variables: str) -> Callable[[Path], int]:
    "The command as a process of its own. `shown` must be in what it prints; a variable that is empty is taken away."
    def run(folder: Path) -> int:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
        environment = {key: value for key, value in environment.items() if value}
        micro = ["--preset", "micro"] if arguments[:1] == ["demo"] and "--preset" not in arguments else []
        command = [sys.executable, "-m", "dreamer4_nb", *arguments, *micro]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=LIMIT)
        text = (done.stdout + done.stderr).decode("utf-8", "replace")
        print(text[-600:], file=sys.stderr)
        assert "Traceback" not in text, text[-300:]
        assert shown in text, f"{shown!r} is not in the output"
        return done.returncode
    return run


ENVIRONMENTS = [{"MUJOCO_GL": name} for name in ("bogus", "EGL", "wgl", "disable", "cgl")]
ENVIRONMENTS += [{"OMP_NUM_THREADS": name} for name in ("auto", "0", "-1", "2,1", "1e9")]
ENVIRONMENTS += [{"MPLBACKEND": "nonsense"}, {"HOME": ""}, {"HOME": "/nowhere"}, {"WORLD_SIZE": "2"}, {"RANK": "1"},
                 {"WORLD_SIZE": "2", "RANK": "5"}, {"RANK": "x"}, {"LOCAL_RANK": "y"}, {"PYTHONIOENCODING": "ascii"},
                 {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "ja_JP.EUC-JP"}, {"LANG": "nonsense"},
                 {"DREAMER4_CACHE": "/proc/nothing"}, {"DREAMER4_CACHE": "/dev/null"}, {"TMPDIR": "/nowhere"},
                 {"PYTHONHASHSEED": "1"}, {"CUDA_VISIBLE_DEVICES": "9"}, {"TERM": "dumb"}]
DAMAGES = {"empty": b"", "cut": None, "list": b"[]", "null": b"null", "number": b"3", "bytes": b"\xff\xfe\x00",
           "text": b'"run"', "other keys": b'{"a": {"b": 1}}'}


def damaged_json(parts: Parts, name: str, damage: str, command: str) -> Callable[[Path], int | None]:
    "A file of the run replaced or cut, and a command that reads it."
    def run(folder: Path) -> int | None:
        run = copied(parts.run, folder)
        path = run / name
        content = DAMAGES[damage]
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2] if content is None else content)
        if command == "ship":
            ship(run, folder / "assets", folder / "chain.json")
            return 0
        settings = ["--preset", "micro", "--workers", "1", "--threads", "1"] if command == "demo" else []
        return main([command, "--run", str(run), *settings])
    return run


def change_weights(state: dict, config: dict, how: str, rng: random.Random) -> tuple[dict, dict]:
    "Tensors and config of a checkpoint with one change."
    state, config = dict(state), copy.deepcopy(config)
    key = rng.choice([key for key in sorted(state) if state[key].numel() > 1 and state[key].is_floating_point()])
    if how == "nan":
        state[key] = torch.full_like(state[key], float("nan"))
    elif how == "infinite":
        state[key] = state[key].clone().index_fill_(0, torch.tensor([0]), float("inf"))
    elif how == "missing":
        del state[key]
    elif how == "unknown":
        state[key + ".more"] = state[key].clone()
    elif how == "shape":
        state[key] = state[key].flatten()[:-1].clone()
    elif how in ("int8", "bool", "complex64"):
        state[key] = state[key].to(getattr(torch, how))
    elif how == "config":
        part = rng.choice(sorted(config))
        name = rng.choice(sorted(config[part]))
        config[part][name] = rng.choice([-1, "x", None, [[]], 10**9])
    elif how == "no config":
        config = {}
    return state, config


LOADERS = {"tokenizer": load_tokenizer, "dynamics": load_dynamics, "agent": load_agent,
           "imagination": lambda path: load_imagination(path, load_agent(path.with_name("agent.safetensors"))[1])}
WEIGHTS = ["nan", "infinite", "missing", "unknown", "shape", "int8", "bool", "complex64", "config", "no config"]


def damaged_weights(parts: Parts, name: str, how: str, seed: int) -> Callable[[Path], None]:
    "A checkpoint with one change, saved well."
    def run(folder: Path) -> None:
        path = copied(parts.run / f"{name}.safetensors", folder)
        shutil.copy(parts.run / "agent.safetensors", folder / "agent.safetensors") if name != "agent" else None
        state, config = change_weights(*load_checkpoint(path), how, random.Random(seed))
        save_checkpoint(path, state, config)
        LOADERS[name](path)
    return run


def flipped(path: Path, rng: random.Random, how: str = "flip") -> None:
    "A bit of a file turned, or its end cut off."
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[rng.randrange(len(data)):]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def flipped_weights(parts: Parts, name: str, seed: int) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        path = copied(parts.run / f"{name}.safetensors", folder)
        shutil.copy(parts.run / "agent.safetensors", folder / "agent.safetensors") if name != "agent" else None
        rng = random.Random(seed)
        flipped(path, rng, rng.choice(["flip", "flip", "flip", "cut"]))
        LOADERS[name](path)
    return run


def damaged_training(parts: Parts, how: str, seed: int) -> Callable[[Path], None]:
    "The state of a training with one change; going on must refuse it."
    def run(folder: Path) -> None:
        there = copied(parts.training, folder)
        path = there / "toy.train.safetensors"
        rng = random.Random(seed)
        if how in ("flip", "cut"):
            flipped(path, rng, how)
        else:
            state, config = load_checkpoint(path)
            if how == "moment shape":
                key = rng.choice([key for key in sorted(state) if key.startswith("optimiser") and state[key].numel() > 1])
                state[key] = state[key].flatten()[:1].clone()
            elif how == "moment gone":
                del state[rng.choice([key for key in sorted(state) if key.startswith("optimiser")])]
            elif how == "scale gone":
                state = {key: value for key, value in state.items() if not key.startswith("scale")}
            elif how == "average gone":
                del state[rng.choice([key for key in sorted(state) if key.startswith("average")])]
            elif how == "step":
                config["step"] = rng.choice([-1, "x", None, 10**9])
            elif how == "no step":
                del config["step"]
            else:
                state, config = change_weights(state, config, how, rng)
            save_checkpoint(path, state, config)
        train_toy(there)
    return run


def damaged_store(parts: Parts, change: Callable[[Path, random.Random], None], seed: int) -> Callable[[Path], None]:
    "A store with one change: it is refused, or holds what it held."
    def run(folder: Path) -> None:
        path = copied(parts.store, folder)
        change(path, random.Random(seed))
        same_store(path, parts.store)
    return run


def change_metadata(path: Path, rng: random.Random) -> None:
    "One value in one zarr.json replaced, taken away, or the file cut."
    file = rng.choice(sorted(path.rglob("zarr.json")))
    if rng.random() < 0.15:
        flipped(file, rng, rng.choice(["cut", "flip"]))
        return
    meta = json.loads(file.read_text(encoding="utf-8"))
    holder = meta
    for _ in range(rng.randrange(3)):
        inner = [key for key, value in holder.items() if isinstance(value, dict) and value]
        if not inner:
            break
        holder = holder[rng.choice(inner)]
    key = rng.choice(sorted(holder))
    if rng.random() < 0.3:
        del holder[key]
    else:
        holder[key] = rng.choice([None, -1, 0, 10**12, "x", [], {}, [1, 2], {"id": "pickle"}, True, 1.5])
    file.write_text(json.dumps(meta), encoding="utf-8")


def change_chunk(path: Path, rng: random.Random) -> None:
    "One chunk flipped, cut, emptied, taken away, or put in the place of another."
    chunks = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json")
    file = rng.choice(chunks)
    how = rng.choice(["flip", "cut", "empty", "gone", "folder"])
    if how in ("flip", "cut"):
        flipped(file, rng, how)
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
        if how == "folder":
            file.mkdir()


def change_demonstrations(data: dict[str, np.ndarray], rng: random.Random) -> tuple[str, dict[str, np.ndarray]]:
    "What ships, with one change that makes no sense."
    data = dict(data)
    how = rng.choice(["gone", "short", "nan", "text", "object", "flat", "lengths", "range"])
    key = rng.choice(["states", "actions", "intended", "rewards", "lengths", "quality", "seeds"])
    if how == "nan":
        key = rng.choice(["states", "actions", "intended", "rewards"])
        data[key] = data[key].astype(np.float64)
        data[key].reshape(-1)[rng.randrange(data[key].size)] = np.nan
    elif how == "lengths":
        key, data["lengths"] = "lengths", data["lengths"].astype(np.int64)
        data["lengths"][rng.randrange(len(data["lengths"]))] = rng.choice([0, -5, 10**6])
    elif how == "range":
        key = rng.choice(["actions", "quality", "seeds"])
        data[key] = {"actions": data["actions"] * 7, "quality": np.full(len(data["quality"]), "splendid"),
                     "seeds": data["seeds"].astype(np.int64) - 10**6}[key]
    elif how == "gone":
        key = rng.choice(["states", "actions", "rewards", "lengths", "quality", "seeds"])
        del data[key]
    else:
        change = {"short": lambda x: x[:-1], "text": lambda x: np.full(x.shape, "x"), "flat": lambda x: x.reshape(-1, 1, 1)[:3],
                  "object": lambda x: np.array([{}] * len(x), dtype=object)}[how]
        data[key] = change(data[key])
    return f"{key} {how}", data


def bad_demonstrations(data: dict[str, np.ndarray], raw: bytes | None) -> Callable[[Path], None]:
    "The shipped file replaced by another, which is loaded into an empty cache."
    def run(folder: Path) -> None:
        path = folder / f"demos_{BALL}.npz"
        if raw is None:
            np.savez(path, **data)
        else:
            path.write_bytes(raw)
        before, os.environ["DREAMER4_CACHE"] = os.environ.get("DREAMER4_CACHE"), str(folder / "cache")
        found, demonstrations.asset = demonstrations.asset, lambda name: path
        try:
            demonstrations.load_demonstrations(BALL, 3, 16, 1, progress=False)
        finally:
            demonstrations.asset = found
            os.environ.pop("DREAMER4_CACHE") if before is None else os.environ.update(DREAMER4_CACHE=before)
    return run


def bad_episodes() -> Iterator[tuple[str, dict[str, Any]]]:
    n = 5
    good = {"actions": np.zeros((n, 2)), "rewards": np.zeros(n), "frames": np.zeros((n, 16, 16, 3), np.uint8), "states": np.zeros((n, 8))}
    nan = np.full((n, 2), np.nan)
    late = np.zeros((n, 2))
    late[0] = 0.5
    changes = {
        "actions": [nan, late, 2 * np.ones((n, 2)), np.zeros((n, 3)), np.zeros(n), np.zeros((n - 1, 2)), "left", None, np.zeros((n, 2), complex)],
        "rewards": [np.full(n, np.inf), np.zeros((n, 1)), np.zeros(n - 1), ["x"] * n, np.zeros(1), np.zeros(0)],
        "frames": [np.zeros((n, 16, 16, 3)), np.zeros((n, 8, 16, 3), np.uint8), None, np.zeros((n, 3, 16, 16), np.uint8), np.zeros((n, 16, 16, 3), np.int64)],
        "states": [np.full((n, 8), np.nan), np.zeros((n, 7)), None, "x"],
        "continues": [2 * np.ones(n), -np.ones(n), np.full(n, np.nan), np.ones(n + 1)],
        "intended": [nan, 2 * np.ones((n, 2)), np.zeros((n, 1))],
        "seed": [-2, 2**63, 1.5, "x", None], "task": [3], "quality": [3]}
    for key, values in changes.items():
        for k, value in enumerate(values):
            yield f"{key} {k}", good | {key: value}


def append_bad(parts: Parts, values: dict[str, Any]) -> Callable[[Path], None]:
    "An episode that does not fit, appended between good ones: nothing of the three is written."
    def run(folder: Path) -> None:
        path = copied(parts.store, folder)
        before = EpisodeStore.open(path).n_episodes
        store = EpisodeStore.open(path, "a")
        try:
            store.extend([Episode(**values)])
        finally:
            same = EpisodeStore.open(path).n_episodes == before
            assert same, "something was appended"
    return run


def calls(parts: Parts) -> Iterator[tuple[str, Callable[[], Any]]]:
    "Functions of the package called with what they cannot use."
    store = lambda: EpisodeStore.open(parts.store)
    for seed in (-1, 2**32, 1.5, "x", None):
        yield f"make_env seed {seed}", lambda seed=seed: make_env(BALL, seed).reset(seed)
        yield f"VectorEnv seed {seed}", lambda seed=seed: VectorEnv(BALL, [seed], 1)
        yield f"evaluate_policy seed {seed}", lambda seed=seed: evaluate_policy(RandomPolicy(2), BALL, [seed], 2, 1)
    for image in (0, -1, 1.5, 100_000, "x"):
        yield f"make_env image {image}", lambda image=image: make_env(BALL, 0, image).reset()
    for repeat in (-1, 1.5):
        yield f"make_env repeat {repeat}", lambda repeat=repeat: make_env(BALL, 0, None, repeat)
    for workers in (0, -1, 1.5):
        yield f"VectorEnv workers {workers}", lambda workers=workers: VectorEnv(BALL, [0, 1], workers)
    for workers in (-1, 1.5):
        yield f"render_states workers {workers}", lambda workers=workers: render_states(BALL, store().column("states"), 16, workers)
    yield "make_env task", lambda: make_env("fly", 0)
    yield "make_env task None", lambda: make_env(None, 0)
    for candidates in (0, -1, 2.5):
        yield f"Planner candidates {candidates}", lambda n=candidates: Planner(BALL, candidates=n).plan(store().column("states")[:1])
    for action in ([0, 0, 0], [np.nan, 0], [2, 0], "up", None, [[0, 0]]):
        yield f"step {action}", lambda action=action: step_once(action)
    for decisions in (0, -1):
        yield f"evaluate_policy decisions {decisions}", lambda n=decisions: evaluate_policy(RandomPolicy(2), BALL, [0], n, 1)
    for name, value in (("length", 0), ("length", -1), ("batch", 0), ("batch", -2), ("focus", np.nan), ("focus", 2), ("seed", -1), ("length", 500)):
        yield f"Windows {name} {value}", lambda name=name, value=value: Windows(store(), **{"length": 4, "batch": 2, "seed": 0} | {name: value})(0)
    for share in (0, 1, -0.1, 2, np.nan, "x"):
        yield f"split {share}", lambda share=share: store().split(share)
    for number in (4, -5, 100):
        yield f"episode {number}", lambda number=number: store().episode(number)
    yield "subset", lambda: store().subset([9]).lengths
    yield "of_task", lambda: store().of_task("fly")
    yield "mean of frames", lambda: store().mean


def step_once(action: Any) -> None:
    env = make_env(BALL, 0, None)
    env.reset()
    env.step(action)


def bad_rollouts(parts: Parts) -> Iterator[tuple[str, Callable[[], Any]]]:
    "Dreams asked for with too little."
    from dreamer4_nb.method.checkpoints import load_world
    world = load_world(parts.run / "tokenizer.safetensors", parts.run / "dynamics.safetensors")
    config = world.dynamics.config
    latents, actions = torch.zeros(1, 4, config.n_latents, config.d_latent), torch.zeros(1, 8, config.action_dim)
    for name, changes in (("few actions", {"actions": actions[:, :2]}), ("no frames", {"latents": latents[:, :0]}),
                          ("wide actions", {"actions": torch.zeros(1, 8, 5)}), ("nan actions", {"actions": actions * float("nan")}),
                          ("another batch", {"actions": actions.repeat(3, 1, 1)}), ("no prefix", {"prefix": 0}),
                          ("a negative prefix", {"prefix": -2}), ("a prefix beyond", {"prefix": 5}), ("flat latents", {"latents": latents[0]}),
                          ("nan latents", {"latents": latents * float("nan")})):
        values = {"latents": latents, "actions": actions, "prefix": 4, "generator": torch.Generator().manual_seed(0)} | changes
        yield name, lambda values=values: rollout(world, **values)


def bad_configs(rng: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    "Settings as JSON, with one change."
    for number in range(40):
        values = to_dict(PRESETS[rng.choice(sorted(PRESETS))])
        holder, where = values, []
        while True:
            key = rng.choice(sorted(holder))
            where.append(key)
            if not isinstance(holder[key], dict):
                break
            holder = holder[key]
        old = holder[key]
        how = rng.choice(["type", "type", "unknown"])
        if how == "unknown":
            holder[key + "s"] = old
        else:
            holder[key] = {bool: "yes", int: "x", float: "x", str: 3, list: 3, type(None): []}[type(old)]
        yield f"{number} {'.'.join(where)} {how}", values


def torn_log(parts: Parts, how: str) -> Callable[[Path], None]:
    "A log with a torn record: going on keeps all others."
    def run(folder: Path) -> None:
        there = copied(parts.training, folder)
        log = there / "toy.log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        torn = {"last": lines[:-1] + [lines[-1][:-15]], "first": [lines[0][:9] + "\n"] + lines[1:],
                "middle": lines[:2] + [lines[2][:9] + "\n"] + lines[3:], "bytes": lines[:2] + ["\x00\x00\n"] + lines[2:],
                "list": lines[:2] + ["[]\n"] + lines[2:], "no step": lines[:2] + ['{"flip": 1}\n'] + lines[2:],
                "empty lines": ["\n\n"] + lines, "text step": ['{"step": "x"}\n'] + lines}[how]
        log.write_text("".join(torn), encoding="utf-8")
        history = train_toy(there)
        lost = {"last": 1, "first": 1, "middle": 1}.get(how, 0)
        assert len(history) == 10 - lost, [record["step"] for record in history]
        assert sorted(record["step"] for record in history)[-4:] == [7, 8, 9, 10]
    return run


def unfit_data(parts: Parts, name: str, change: Callable[[Episode], None], options: list[str]) -> Callable[[Path], int]:
    "A run on data that a later phase cannot use: refused before its first step."
    def run(folder: Path) -> int:
        path = folder / "data.zarr"
        original = EpisodeStore.open(parts.store)
        store = EpisodeStore.create(path, BALL, 2, (64, 64, 3), original.state_dim)
        for number in range(8):
            episode = original.episode(number % 4)
            episode.frames = np.zeros((len(episode), 64, 64, 3), np.uint8)
            episode.quality = "expert"
            change(episode)
            store.append(episode)
        store.finish()
        status = main(["demo", "--preset", "micro", "--run", str(folder / "r"), "--data", str(path), *options])
        assert not list((folder / "r").glob("*.log.jsonl")), "a phase was trained first"
        return status
    return run


def cut_to(n: int) -> Callable[[Episode], None]:
    def change(episode: Episode) -> None:
        for key in ("actions", "rewards", "frames", "intended", "continues", "states"):
            setattr(episode, key, getattr(episode, key)[:n])
    return change


UNFIT = [
    ("all poor", lambda episode: setattr(episode, "quality", "poor"), []),
    ("all unknown", lambda episode: setattr(episode, "quality", "unknown"), []),
    ("too short", cut_to(3), []),
    ("shorter than a window", cut_to(8), []),
    ("solved from the start", lambda episode: setattr(episode, "rewards", np.full(len(episode), 2.0)), []),
    ("keys wanted", lambda episode: None, ["--agent.model.policy", "bernoulli"]),
    ("another task", lambda episode: None, ["--tasks", "reacher-easy"]),
    ("another size", lambda episode: None, ["--tokenizer.model.image", "32"]),
    ("few episodes", lambda episode: None, ["--episodes", "1"]),
    ("no labels", lambda episode: setattr(episode, "labelled", False), []),
    ("seeds of the evaluation", lambda episode: None, ["--evaluation.first-seed", "7"]),
    ("no read-outs", lambda episode: None, ["--evaluation.readouts"])]


def records_cases(parts: Parts) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    "Damaged records of episodes."
    original = next(iter(sorted(parts.run.rglob("episodes/**/*.json"))))
    for name, content in DAMAGES.items():
        def run(folder: Path, content: bytes | None = content) -> None:
            path = copied(original, folder)
            path.write_bytes(path.read_bytes()[:40] if content is None else content)
            Records.load(path)
        yield name, run


def all_cases(parts: Parts, seed: int) -> list[Case]:
    "The cases, with what is expected of each."
    rng = random.Random(seed)
    cases = [Case("settings", name, REFUSED, in_process(words)) for name, words in settings_cases(rng)]
    cases += [Case("commands", " ".join(words)[:70], REFUSED, in_process(words)) for words in COMMANDS]
    cases += [Case("commands as processes", " ".join(words)[:70], REFUSED, as_process(words)) for words in rng.sample([words for words in COMMANDS if "a\0b" not in words], 50)]
    for variables in ENVIRONMENTS:
        name = " ".join(f"{key}={value}" for key, value in variables.items())
        cases.append(Case("environment, doctor", name, ANSWERS, as_process(["doctor"], "drawing", **variables)))
        cases.append(Case("environment, help", name, ANSWERS, as_process(["demo", "--help"], "tokenizer", **variables)))
    for damage in DAMAGES:
        for name, command in (("config.json", "evaluate"), ("phases.json", "demo"), ("results.json", "ship"), ("metrics.json", "demo")):
            expected = EITHER if name == "metrics.json" else REFUSED
            cases.append(Case("JSON of a run", f"{name} {damage}, {command}", expected, damaged_json(parts, name, damage, command)))
    for number, how in enumerate(WEIGHTS * 4):
        name = list(LOADERS)[number % 4]
        cases.append(Case("weights", f"{number} {name} {how}", REFUSED, damaged_weights(parts, name, how, number)))
    cases += [Case("weights, bits", f"{number} {name}", REFUSED, flipped_weights(parts, name, number))
              for number in range(10) for name in LOADERS]
    for how in ("flip", "cut", "moment shape", "moment gone", "scale gone", "average gone", "step", "no step", "nan", "missing", "shape", "int8"):
        cases += [Case("training state", f"{how} {number}", REFUSED, damaged_training(parts, how, number)) for number in range(3)]
    cases += [Case("store, metadata", str(number), EITHER, damaged_store(parts, change_metadata, number)) for number in range(60)]
    cases += [Case("store, chunks", str(number), EITHER, damaged_store(parts, change_chunk, number)) for number in range(30)]
    shipped = dict(np.load(ROOT / "dreamer4_nb/assets" / f"demos_{BALL}.npz"))
    for number in range(35):
        name, data = change_demonstrations(shipped, rng)
        cases.append(Case("demonstrations", f"{number} {name}", REFUSED, bad_demonstrations(data, None)))
    for name, raw in (("empty", b""), ("text", b"hello"), ("half", (ROOT / "dreamer4_nb/assets" / f"demos_{BALL}.npz").read_bytes()[:1000])):
        cases.append(Case("demonstrations", name, REFUSED, bad_demonstrations({}, raw)))
    cases += [Case("episodes", name, REFUSED, append_bad(parts, values)) for name, values in bad_episodes()]
    cases += [Case("calls", name, REFUSED, lambda folder, call=call: call()) for name, call in calls(parts)]
    cases += [Case("rollouts", name, REFUSED, lambda folder, call=call: call()) for name, call in bad_rollouts(parts)]
    cases += [Case("settings as JSON", name, REFUSED, lambda folder, values=values: from_dict(Preset, values))
              for name, values in bad_configs(rng)]
    cases += [Case("logs", how, ANSWERS, torn_log(parts, how))
              for how in ("last", "first", "middle", "bytes", "list", "no step", "empty lines", "text step")]
    cases += [Case("unfit data", name, REFUSED, unfit_data(parts, name, change, options)) for name, change, options in UNFIT]
    cases += [Case("records", name, REFUSED, run) for name, run in records_cases(parts)]
    return cases


# -- running them ----------------------------------------------------------------------------------------------------

def late(number: int, frame: object) -> None:
    raise TimeoutError(f"a hang: more than {LIMIT} s")


def fingerprint(*folders: Path) -> str:
    "Of all files in the folders."
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".lock" and path.name != ".lock":
                digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


def judge(case: Case, folder: Path) -> None:
    "Run a case in a folder and note what became of it."
    errors = io.StringIO()
    began = time.perf_counter()
    signal.alarm(LIMIT + 30)
    status: Any = None
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            status = case.run(folder)
        lines = [line for line in errors.getvalue().splitlines() if line.strip()]
        found = REFUSED if status == 2 else ANSWERS if status in (0, None) else f"status {status}"
        if case.kind == "environment, doctor" and status == 2:
            found = ANSWERS     # it said what needs attention
        if found == REFUSED and not any(line.startswith(("dreamer4-nb: ", "╭", "│", "╰")) for line in lines):
            found = "refused without a line"
    except UserError as error:
        found, lines = REFUSED, [str(error)]
    except SystemExit as stop:
        found, lines = (REFUSED if stop.code == 2 else f"exit {stop.code}"), errors.getvalue().splitlines()
    except AssertionError as error:
        found, lines = "wrong", [str(error) or traceback.format_exc().splitlines()[-2]]
    except BaseException as error:
        found, lines = f"traceback {type(error).__name__}", [str(error), *traceback.format_exc().splitlines()[-7:]]
    finally:
        signal.alarm(0)
    right = found in (ANSWERS, REFUSED) if case.expected == EITHER else found == case.expected
    case.outcome = "as expected" if right else found
    case.said = " | ".join(" ".join(lines).split("\n"))[-500:]
    case.seconds = time.perf_counter() - began


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", help="only kinds that begin so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="what became of each case")
    parser.add_argument("--list", action="store_true", help="only say what is expected")
    return parser.parse_args()


def run_all() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGALRM, late)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="malformed-") as name:
        home = Path(name)
        with contextlib.redirect_stdout(io.StringIO()):
            parts = Parts(home / "parts")
        cases = all_cases(parts, arguments.seed)
        if arguments.kind:
            cases = [case for case in cases if case.kind.startswith(arguments.kind)]
        print(f"{len(cases)} cases: {dict(Counter(case.kind for case in cases))}")
        if arguments.list:
            for case in cases:
                print(f"{case.kind}: {case.name}: {case.expected}")
            return 0
        untouched = fingerprint(home / "parts", ROOT / "dreamer4_nb")
        for number, case in enumerate(cases):
            folder = home / f"case-{number}"
            folder.mkdir()
            judge(case, folder)
            shutil.rmtree(folder, ignore_errors=True)
            if case.outcome != "as expected":
                print(f"{case.kind}: {case.name}: expected {case.expected}, {case.outcome}: {case.said}", flush=True)
        damaged = fingerprint(home / "parts", ROOT / "dreamer4_nb") != untouched
    table = Counter((case.kind, case.outcome == "as expected") for case in cases)
    for kind in dict.fromkeys(case.kind for case in cases):
        print(f"{kind:24} {table[kind, True]:4} as expected {table[kind, False]:4} not")
    print("something outside the case's own folder was changed" if damaged else "nothing else was changed")
    if arguments.json:
        rows = [{key: value for key, value in asdict(case).items() if key != "run"} for case in cases]
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return int(damaged or any(case.outcome != "as expected" for case in cases))


if __name__ == "__main__":
    sys.exit(run_all())
