"""Study 74: what online rounds add, by arm and training seed. Trains, plays, and writes nbs/results/online.json, "seeds".

    python tests/studies/rounds.py runs/rounds --seeds 0 1 2
    python tests/studies/rounds.py runs/rounds --task cartpole-swingup --arms dagger --seeds 0 1 2

An agent is cloned from demonstrations; then arms of four rounds go on from it. Every policy is judged on 100 seeds that nothing
has played. For ball in cup the world is the one that ships, and actions are those executed, noise included; 500 decisions. For
other tasks the world is trained first, actions are those intended, and an episode of 250 decisions takes its whole time;
where no demonstrations ship, the planner plays 120 such episodes first. Rows that the results hold are not made again; two
processes may share the seeds.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from dreamer4_nb.core import JsonDict, UserError, asset
from dreamer4_nb.data.demonstrations import Collection, collect
from dreamer4_nb.data.stores import EpisodeStore
from dreamer4_nb.evaluation.statistics import interval
from dreamer4_nb.inputs import read_json, to_dict
from dreamer4_nb.method.agent import Policy
from dreamer4_nb.runs.chain import Run, by_task
from dreamer4_nb.runs.judge import closed_loop
from dreamer4_nb.runs.online import online, round_preset
from dreamer4_nb.runs.presets import LONG, TINY, Preset, Rounds
from dreamer4_nb.runs.study import copy_once, seeded
from rows import RESULTS, Table, copy_shipped

TABLE = Table(RESULTS / "online.json", "seeds")
SHIPPED = "ball_in_cup-catch"
JUDGE = {"episodes": 100, "decisions": 500, "readouts": ("mean",), "demonstrator": 0, "videos": 0}
ROUNDS = Rounds(readout="mean", recent=1.0)      # a batch of played episodes only: no noisy label comes back
WHOLE = {"judge": JUDGE | {"decisions": 250, "readouts": ("sample", "mean")},
         "rounds": {"episodes": 40, "decisions": 250, "recent": 0.5}}
COLLECTED = {"episodes": 120, "decisions": 250, "seed": 60_000}
EARLY = 125     # decisions within which `make demo` counts successes
ARMS = {"own_actions": ROUNDS, "dagger": replace(ROUNDS, teacher="planner"), "planner": replace(ROUNDS, actor="planner")}


def data_of(folder: Path, task: str) -> str:
    "The demonstrations of a task, as `Preset.data`: those that ship, or those that the planner makes here, once."
    try:
        asset(f"demos_{task}.npz")
    except UserError:
        path = folder / task / "demonstrations.zarr"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".demonstrations.lock")):
            if not path.exists():
                collect(path, Collection(task, **COLLECTED), workers=1)
        return str(path)
    return "shipped"


def preset_of(task: str, seed: int, data: str = "shipped") -> Preset:
    "The base run's preset, whose agent has a training seed of its own. data: demonstrations, see `data_of`."
    if task == SHIPPED:
        preset = replace(LONG, episodes=400, agent=replace(LONG.agent, labels="executed"))
        judge = JUDGE
    else:
        preset = replace(TINY, tasks=(task,), data=data)
        judge = WHOLE["judge"]
    preset = replace(preset, threads=1, workers=1, evaluation=replace(preset.evaluation, **judge))
    return seeded(preset, agent=seed, imagination=seed)


def rounds_of(task: str, arm: str, seed: int) -> Rounds:
    "The settings of an arm; every seed plays episodes of its own."
    settings = replace(ARMS[arm], first_seed=ROUNDS.first_seed + 10_000 * seed)
    return settings if task == SHIPPED else replace(settings, **WHOLE["rounds"])


def base_run(folder: Path, task: str, seed: int) -> Run:
    "The cloned agent before any round, in the world that ships or in one that all seeds share."
    own = folder / task / f"base{seed}"
    data = data_of(folder, task)
    if task == SHIPPED:
        copy_shipped(own, "tokenizer", "dynamics")
    else:
        shared = Run(folder / task / "world", preset_of(task, 0, data))
        with FileLock(folder / task / ".world.lock"):
            shared.train("dynamics")
        for name in ("tokenizer", "dynamics"):
            copy_once(shared.path(name), own)
    run = Run(own, preset_of(task, seed, data))
    run.train("imagination")
    return run


def rows_of(run: Run, arm: str, seed: int) -> list[JsonDict]:
    "How a run's policies do in the real environment, and the minutes of its phases."
    minutes = {name: note["seconds"] / 60 for name, note in run.phases.items()}
    rows = []
    for view in by_task(run):
        for records in closed_loop(view):
            about = {"task": view.task, "arm": arm, "seed": seed, "minutes": minutes}
            early = (0 <= records.first_success) & (records.first_success < EARLY)
            within = {"decisions": EARLY, "success": float(early.mean()), "success_interval": interval(early)}
            rows.append(about | records.summary() | {"within": within})
    return rows


def follows(run: Run, store: EpisodeStore, index: np.ndarray, past: str) -> float:
    """R² of the clone's mean for the intended actions, in episodes that it watches as far as the shortest goes.

    past: what it takes for its own past actions, a column of the store: those executed, or those intended."""
    policy = Policy(run.world, run.agent[1], "mean")
    episodes = [store.episode(i) for i in index]
    shortest = min(len(episode) for episode in episodes)
    frames, seen, intended = (np.stack([getattr(episode, name)[:shortest] for episode in episodes])
                              for name in ("frames", past, "intended"))
    policy.reset(len(episodes))
    chosen = []
    for t in range(frames.shape[1] - 1):
        policy.action = torch.as_tensor(seen[:, t])
        chosen.append(policy.act(frames[:, t]))
    errors = np.square(np.stack(chosen, 1) - intended[:, 1:])
    return float(1 - errors.mean() / intended[:, 1:].var())


def copying(runs: list[Run]) -> list[JsonDict]:
    """Whether a clone reads the state or repeats the past: what its R² is in demonstrations, and in the episodes of each round.

    runs: the base run, and that of each round."""
    held = runs[0].split[1]
    expert = np.flatnonzero(held.qualities == "expert")[:16]
    rows = [{"round": 0} | {past: follows(runs[0], held, expert, past) for past in ("actions", "intended")}]
    for number, (before, after) in enumerate(zip(runs, runs[1:]), 1):
        played = EpisodeStore.open(after.folder / "episodes.zarr")
        first = np.arange(min(16, len(played)))
        rows.append({"round": number} | {past: follows(before, played, first, past) for past in ("actions", "intended")}
                    | {"trained": follows(after, played, first, "actions")})
    return rows


def keep(rows: list[JsonDict], rounds: list[JsonDict], copied: list[JsonDict]) -> None:
    "Adds to the table what an arm came to."
    TABLE.add({"command": "python tests/studies/rounds.py runs/rounds", "other_tasks": WHOLE["rounds"],
               "settings": {name: to_dict(arm) for name, arm in ARMS.items()}},
              rows=rows, rounds=rounds, copying=copied)
    for row in rows:
        print(f"{row['task']}, {row['arm']}, seed {row['seed']}: {row['policy']} success {row['success']:.2f}, "
              f"within {row['within']['decisions']} {row['within']['success']:.2f}, "
              f"held {row['final_success']:.2f}, return {row['return']:.0f}", flush=True)


def study(folder: Path, task: str, arms: list[str], seeds: list[int]) -> None:
    for seed in seeds:
        base = base_run(folder, task, seed)
        if not TABLE.has(task=task, arm="base", seed=seed):
            keep(rows_of(base, "base", seed), [], [])
        for arm in arms:
            about = {"task": task, "arm": arm, "seed": seed}
            if TABLE.has(**about):
                continue
            settings = rounds_of(task, arm, seed)
            place = folder / task / f"{arm}{seed}"
            online(base, place, settings)
            played = read_json(place / "rounds.json", "remove the folder")["rounds"]
            numbers = range(1, settings.rounds + 1)
            runs = [base, *(Run(place / f"round-{number}", round_preset(base.asked, settings, number)) for number in numbers)]
            copied = copying(runs) if settings.teacher == "planner" else []
            keep(rows_of(runs[-1], arm, seed), [about | row for row in played], [about | row for row in copied])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--task", default=SHIPPED)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    study(given.folder, given.task, given.arms, given.seeds)


if __name__ == "__main__":
    main()
