"""Study 78 (labels), and the paper's ingredients on a problem of ours. Trains, measures, and writes results.

    python tests/studies/ingredients.py ladder runs/ingredients --seeds 0 1 2    # nbs/results/ablations.json, "ingredients"
    python tests/studies/ingredients.py labels runs/ingredients --seeds 0 1 2    # nbs/results/labels.json
    python tests/studies/ingredients.py tokenizers runs/ingredients --task ball_in_cup-catch --seeds 0 1 2    # perceptual.json
    python tests/studies/ingredients.py speed runs/ingredients                   # of the ladder, on an idle machine

Ladder and labels begin with the tokenizer that ships and all demonstrations; the tokenizers are trained on 400. A row
that the results hold is not made again, and a training that was stopped goes on, so the same command continues. Two
processes may share the work, with other --seeds.
"""
import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamer4_nb.core import JsonDict, RowGenerators, autocast, inference_dtype, step_generator
from dreamer4_nb.data.stores import EpisodeStore
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.evaluation.frechet import dream_distances
from dreamer4_nb.evaluation.metrics import encode_episodes, rollout_report
from dreamer4_nb.method.dynamics import Dynamics, dynamics_loss
from dreamer4_nb.method.forcing import Schedule
from dreamer4_nb.method.generation import WorldModel
from dreamer4_nb.method.tokenizer import PLAIN_OBJECTIVE, PerceptualLoss
from dreamer4_nb.runs.chain import Run, by_task
from dreamer4_nb.runs.presets import LONG, TINY, Preset
from dreamer4_nb.runs.study import branch, dream_row, seeded, with_setting
from rows import RESULTS, Table, copy_shipped

TABLES = {"ladder": Table(RESULTS / "ablations.json", "ingredients"),
          "speed": Table(RESULTS / "ablations.json", "ingredients_speed"),
          "labels": Table(RESULTS / "labels.json", "labels"),
          "tokenizers": Table(RESULTS / "perceptual.json", "tokenizers")}
TOKENIZER_BASE = replace(TINY, threads=1, evaluation=replace(TINY.evaluation, dreams=128))
PREFIX, LENGTH, WINDOWS = 8, 32, 128    # frames that a dream begins with, frames in all, held-out windows

# The tokenizer that ships, its split of the demonstrations, and the dynamics of `make demo`.
SHIPPED = replace(TINY, episodes=None, threads=1, tokenizer=LONG.tokenizer)

# The paper's table 2, in its order: each row changes these settings of the row before. Attention was factorised into space and
# time from the first row on.
START = {"schedule.k_max": 64, "schedule.steps": 64, "bootstrap_share": 0.0, "prediction": "v", "weighting": "v",
         "train_on_context": False, "transformer.time_every": 1, "transformer.kv_heads": 4, "pack": 4, "n_registers": 0}
LADDER: dict[str, dict[str, Any]] = {
    "diffusion forcing, 64 steps": START,
    "4 steps": {"schedule.steps": 4},
    "+ shortcut": {"bootstrap_share": 0.25},
    "+ x-prediction": {"prediction": "x"},
    "+ loss in x-space": {"weighting": "x"},
    "+ ramp weight": {"weighting": "ramp"},
    "+ alternating lengths": {"short_clip_length": 8},
    "+ time attention every 4 layers": {"transformer.time_every": 4},
    "+ GQA": {"transformer.kv_heads": 1},
    "+ registers": {"n_registers": 4},
    "+ 4 latent tokens": {"pack": 2},
    "+ 8 latent tokens": {"pack": 1},
    "+ committed context": {"train_on_context": True},    # ours
}
# Rows that sample with the weights of another one: only the schedule differs.
SAMPLED = {"4 steps": "diffusion forcing, 64 steps", "context without noise": "+ ramp weight"}
INHERITED = ("tasks", "qualities", "state_dims", "action_dims", "specs", "mean", "std")     # by a copy of a store
SHARES = (0.0, 0.02, 0.1, 0.5, 1.0)     # of the training episodes, whose actions are known
# Tokenizers of `make demo`: each row changes these settings of the row before. The last one has the paper's loss alone.
TOKENIZERS: dict[str, dict[str, Any]] = {
    "ours": {},
    "+ 0.2 ST-LPIPS": {"perceptual": 0.2, "distance": "stlpips"},
    "+ masked patches": {"model.mask_max": 0.9},
    "the paper's loss": {f"model.{name}": value for name, value in PLAIN_OBJECTIVE.items()} | {"slow_steps": 0},
}


# Models

def with_settings(preset: Preset, phase: str, settings: dict[str, Any]) -> Preset:
    "The preset with other settings of a phase."
    for name, value in settings.items():
        preset = with_setting(preset, f"{phase}.{name}", value)
    return preset


def with_dynamics(preset: Preset, settings: dict[str, Any]) -> Preset:
    "The preset with other settings of its dynamics' model."
    return with_settings(preset, "dynamics.model", settings)


def presets_of_ladder() -> dict[str, Preset]:
    "The preset of each row of the ladder."
    preset, found = SHIPPED, {}
    for name, settings in LADDER.items():
        preset = with_dynamics(preset, settings)
        found[name] = preset
    found["context without noise"] = with_dynamics(found["+ ramp weight"], {"schedule.tau_ctx": 63 / 64})
    return found


def base_run(folder: Path) -> Run:
    "The run that all others branch from: the tokenizer that ships, and the latents of all demonstrations."
    copy_shipped(folder / "base", "tokenizer")
    run = Run(folder / "base", SHIPPED)
    run.train("latents")
    return run


def with_labels(latents: EpisodeStore, labelled: np.ndarray, path: Path) -> None:
    "A copy of a store of latents at `path`. labelled (E,): of each episode, whether its actions are known."
    if path.exists():
        return
    beside = path.with_name(".labels.zarr")
    shutil.rmtree(beside, ignore_errors=True)
    known = {key: value for key, value in latents.attributes.items() if key in INHERITED}
    copy = EpisodeStore.create(beside, latents.tasks[0], latents.action_dim, latents.shape, latents.state_dim, "latents",
                               "float16", **known)
    copy.extend(replace(latents.episode(i), labelled=bool(labelled[i])) for i in range(len(latents)))
    copy.finish()
    beside.rename(path)


def trained(base: Run, folder: Path, preset: Preset, seed: int) -> Run:
    "A run with dynamics of this preset and seed; if the folder holds latents, it trains on these."
    run = branch(base, folder, "latents", seeded(preset, dynamics=seed))
    run.train("dynamics")
    return run


def as_trained(dynamics: Dynamics) -> Dynamics:
    """Dynamics without a teacher know the smallest step size only; larger ones take its embedding.

    Such steps are then Euler's, with the velocity that flow matching learned."""
    if dynamics.config.bootstrap_share == 0:
        with torch.no_grad():
            dynamics.embed_d.weight[:] = dynamics.embed_d.weight[-1].clone()
    return dynamics


def measure(base: Run, dynamics: Dynamics, latents: EpisodeStore, schedule: Schedule) -> JsonDict:
    "Dreams on held-out windows: what `rollout_report` and `dream_distances` find."
    world = WorldModel(base.tokenizer, as_trained(dynamics), schedule).eval()
    report = rollout_report(world, base.split[1], latents, PREFIX, LENGTH, WINDOWS)
    distances = dream_distances(world, latents, PREFIX, LENGTH, WINDOWS)
    return {"mean": report["mean"], "action_shuffle_ratio": report["action_shuffle_ratio"],
            "frame_shuffle_ratio": report["frame_shuffle_ratio"], "frechet": distances, "windows": report["windows"]}


# Parts

def ladder(base: Run, folder: Path, seeds: list[int], command: str) -> None:
    presets = presets_of_ladder()
    for seed in seeds:
        for arm, preset in presets.items():
            if TABLES["ladder"].has(arm=arm, seed=seed):
                continue
            weights = SAMPLED.get(arm, arm)
            own = trained(base, folder / "ladder" / weights.replace(" ", "_") / f"seed{seed}", presets[weights], seed)
            found = measure(base, own.dynamics, base.latents[1], preset.dynamics.model.schedule)
            row = {"arm": arm, "seed": seed, "minutes": own.phases["dynamics"]["seconds"] / 60} | found
            TABLES["ladder"].add({"command": command, "settings": LADDER}, rows=[row])
            print(f"{arm}, seed {seed}: {row['mean']['dream']}", flush=True)


def labels(base: Run, folder: Path, seeds: list[int], command: str) -> None:
    train, held = base.latents
    order = np.random.default_rng(0).permutation(train.index)
    for seed in seeds:
        for share in SHARES:
            if TABLES["labels"].has(arm=share, seed=seed):
                continue
            known = np.zeros(base.store.n_episodes, bool)
            known[order[:round(share * len(order))]] = True
            known[held.index] = share > 0           # a model that never saw an action dreams without them
            place = folder / "labels" / f"{share:g}" / f"seed{seed}"
            with_labels(EpisodeStore.open(base.path("latents")), known, place / "latents.zarr")
            own = trained(base, place, SHIPPED, seed)
            found = measure(base, own.dynamics, own.latents[1], own.preset.dynamics.model.schedule)
            labelled = int(own.latents[0].labelled.sum())
            row = {"arm": share, "seed": seed, "labelled": labelled, "episodes": len(train)} | found
            TABLES["labels"].add({"command": command}, rows=[row])
            print(f"{share:g} of the actions ({labelled} episodes), seed {seed}: {found['mean']['dream']}", flush=True)


def perceptual_distance(run: Run) -> float:
    "Mean ST-LPIPS of the reconstructions of held-out frames."
    frames, made = encode_episodes(run.tokenizer, run.split[1], 500, 0)[:2]
    distance = PerceptualLoss("stlpips")
    parts = [distance(a, b).item() * len(a) for a, b in zip(made.clamp(0, 1).split(50), frames.split(50))]
    return sum(parts) / len(frames)


def tokenizers(task: str, folder: Path, seeds: list[int], command: str) -> None:
    for seed in seeds:
        preset = replace(seeded(TOKENIZER_BASE, tokenizer=seed, dynamics=seed), tasks=(task,))
        for name, settings in TOKENIZERS.items():
            preset = with_settings(preset, "tokenizer", settings)
            arm = f"{task}: {name}"
            if TABLES["tokenizers"].has(arm=arm, seed=seed):
                continue
            run = Run(folder / "tokenizers" / task / f"{list(TOKENIZERS).index(name)}-seed{seed}", preset)
            run.train("dynamics")
            (view,) = by_task(run)
            row = {"arm": arm, "seed": seed, "stlpips": perceptual_distance(run)} | dream_row(view, seed, "", None)
            TABLES["tokenizers"].add({"command": command, "settings": TOKENIZERS}, rows=[row])
            print(f"{arm}, seed {seed}: {row['tokenizer']['tokenizer']}, dream {row['dream']['dream']}", flush=True)


def seconds_of(call: Any, repeats: int = 7) -> float:
    "The median time of a call, after one that does not count."
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def speed(base: Run, folder: Path, seeds: list[int], command: str) -> None:
    "Seconds of a training step, and dreamed frames a second for one viewer; both with random weights."
    rows = []
    for arm, preset in presets_of_ladder().items():
        phase = Run(folder / "speed", preset).preset.dynamics
        batch = Windows(base.latents[0], phase.length, phase.batch)(0)
        dynamics = Dynamics(phase.model)
        world = WorldModel(base.tokenizer, dynamics, phase.model.schedule).eval()
        modules = {"dynamics": dynamics}
        dtype = inference_dtype(world.device)

        def step() -> None:
            with autocast(world.device, dtype):
                losses, _ = dynamics_loss(modules, batch, step_generator(0))
            sum(losses.values()).backward()

        def dream() -> None:
            with autocast(world.device, dtype):
                dreaming = world.start(1, RowGenerators.seeded(0, range(1)))
                world.observe(dreaming, batch.latents[:1, :PREFIX], batch.actions[:1, :PREFIX])
                for t in range(PREFIX, PREFIX + 8):
                    world.imagine(dreaming, batch.actions[:1, t])

        row = {"arm": arm, "seed": 0, "step_seconds": seconds_of(step), "frames_per_second": 8 / seconds_of(dream, 3)}
        rows.append(row)
        print(row, flush=True)
    TABLES["speed"].add({"command": command, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("ladder", "labels", "tokenizers", "speed"))
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--task", default="ball_in_cup-catch", help="of the tokenizers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python tests/studies/ingredients.py {given.part} runs/ingredients"
    if given.part == "tokenizers":
        tokenizers(given.task, given.folder, given.seeds, command)
        return
    parts = {"ladder": ladder, "labels": labels, "speed": speed}
    parts[given.part](base_run(given.folder), given.folder, given.seeds, command)


if __name__ == "__main__":
    main()
