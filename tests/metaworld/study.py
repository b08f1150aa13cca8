"""Study 77: what does a world model know about actions? Trains, probes, and writes nbs/results/probes.json.

    python tests/metaworld/study.py runs/metaworld --setting small

The folder holds `training` and `held_out`, with demonstrations in the layout of LIBERO (see demonstrations.py, or LIBERO's
own files). What is done is not done again, so the same command goes on where it was stopped. Two processes may share the
work: first `--prepare`, then one with `--seeds 0 2` and one with `--seeds 1`.
"""
import argparse
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from dreamer4_nb.core import JsonDict, seed_everything, step_generator, write_json
from dreamer4_nb.data.adapters import import_dataset, read_notes
from dreamer4_nb.data.robots import Hdf5Demonstrations
from dreamer4_nb.data.stores import EpisodeStore
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.evaluation.metrics import rollout_report, tokenizer_report
from dreamer4_nb.evaluation.probes import (InverseHead, disjoint_windows, inverse_loss, isolate_agent, mean_predictor,
                                           one_frame, probe, token_features, two_frames)
from dreamer4_nb.inputs import read_json, to_dict
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.method.checkpoints import load_dynamics, load_tokenizer
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig, dynamics_loss, set_latent_statistics
from dreamer4_nb.method.generation import WorldModel
from dreamer4_nb.method.tokenizer import Tokenizer, tokenizer_loss
from dreamer4_nb.runs.presets import TINY
from dreamer4_nb.training.loop import fit
from dreamer4_nb.training.optimizers import TrainConfig
from dreamer4_nb.training.phases import encode_store, set_backgrounds, train_tokenizer, with_agent_tokens

RESULTS = Path(__file__).parents[2] / "nbs" / "results" / "probes.json"
HELD_BACK = 0.2         # of the training tasks' episodes: no model trains on them, they choose a probe's strength
UNLABELLED = 0.25       # of the rows of a batch: a hidden action is nothing new to the model
LAMBDA = 0.05           # weight of the inverse-dynamics loss; `fit` divides each loss by its own size first
LEVELS = (0, 4, 7)      # signal indices of 8: noise, half, the context level
LENGTH = 16             # frames of a probed window
COMPONENTS = 64         # of the pixels
VARIANTS = (("scratch", "none"), ("scratch", "hidden"), ("scratch", "shown"),     # start, inverse head
            ("dm_control", "none"), ("dm_control", "hidden"))


@dataclass(frozen=True)
class Setting:
    "Sizes and steps of a study."
    width: int
    depth: int
    tokenizer_steps: tuple[int, int]    # of its two parts
    steps: int                          # of the dynamics
    batch: int
    seeds: tuple[int, ...]
    variants: tuple[tuple[str, str], ...]
    episodes: tuple[int, int, int]      # that fit the probe, choose its strength, test it, at most
    dreams: int = 8                     # windows of each held-out task


SETTINGS = {
    "pilot": Setting(64, 2, (600, 0), 300, 8, (0,), VARIANTS[:3], (60, 20, 32), 6),
    "small": Setting(128, 8, (6000, 4000), 4000, 8, (0, 1, 2), VARIANTS, (400, 200, 200)),
    "large": Setting(256, 8, (6000, 4000), 4000, 8, (0,), VARIANTS[:2], (400, 200, 200)),
}


# Data

def imported(folder: Path, part: str) -> EpisodeStore:
    "The store of `training` or `held_out`, made from its files of HDF5 if it is not there."
    path = folder / f"{part}.zarr"
    if not path.exists():
        print("\n".join(import_dataset(Hdf5Demonstrations(folder / part), path).lines()), flush=True)
    return EpisodeStore.open(path)


Truth = dict[str, list[np.ndarray]]


def truth(folder: Path, part: str) -> Truth:
    "Of the episodes of a store, (t, F) each: the simulator's states, and where the hand is and how far it is open."
    names = [note["episode"] for note in read_notes(folder / f"{part}.zarr") if note["pieces"] == 1]
    found: Truth = {"true state": [], "true hand": []}
    for name in names:
        file, _, demo = name.rpartition("/")
        with h5py.File(folder / file, "r") as opened:
            own = opened[f"data/{demo}"]
            found["true state"].append(own["states"][:])
            found["true hand"].append(np.concatenate([own["obs/ee_pos"][:], own["obs/gripper_states"][:]], 1))
    return found


@dataclass
class Probed:
    "Windows of some episodes: what there is to probe besides the model. Tensors (w, t, ...)."
    latents: Tensor
    frames: Tensor      # (w, t, p) of all pixels, in [0, 1]
    truth: dict[str, Tensor]
    actions: Tensor

    def rows(self, features: Tensor, frames: str) -> tuple[Tensor, Tensor]:
        "Features and actions as a probe takes them; frames: one or two."
        return {"one": one_frame, "two": two_frames}[frames](features), one_frame(self.actions)


def with_step(x: Tensor) -> Tensor:
    "Features (w, t, F) and how far they are from those of the frame before (0 in a window's first): (w, t, 2 F)."
    return torch.cat([x, x - torch.cat([x[:, :1], x[:, :-1]], 1)], -1)


def probed(store: EpisodeStore, latents: EpisodeStore, known: Truth, most: int) -> Probed:
    "The windows of at most so many episodes, drawn at random, the same for every model."
    picked = np.sort(np.random.default_rng(0).permutation(len(store))[:most])
    windows = Windows(latents.subset(picked), LENGTH, 1)
    numbers = disjoint_windows(windows)
    batch = windows.at(numbers)
    films = Windows(store.subset(picked), LENGTH, 1, memory=0).at(numbers).frames
    own = store.index[picked]
    spans = [(own[windows.episode_index[n]], windows.first_frame[n]) for n in numbers]
    true = {name: torch.from_numpy(np.stack([rows[episode][first:first + LENGTH] for episode, first in spans]))
            for name, rows in known.items()}
    true["true hand and its step"] = with_step(true["true hand"])
    return Probed(batch.latents, films.flatten(2), true, batch.actions)


def components(frames: Tensor) -> tuple[Tensor, Tensor]:
    "Mean and principal components (p, COMPONENTS) of at most 2000 frames (w, t, p)."
    rows = frames.flatten(0, 1)
    rows = rows[torch.randperm(len(rows), generator=step_generator(0))[:2000]]
    seed_everything(0)
    return rows.mean(0), torch.pca_lowrank(rows, COMPONENTS)[2]


# Models

def tokenizer_of(folder: Path, setting: Setting, start: str, store: EpisodeStore) -> Tokenizer:
    "The tokenizer, trained on the training tasks; `start`: scratch, or dm_control for the weights that ship."
    path = folder / f"tokenizer_{start}"
    phase = TINY.tokenizer
    first, slow = setting.tokenizer_steps
    train = replace(phase.train, steps=first)
    if not (path / "tokenizer.safetensors").exists() and start == "scratch":
        train_tokenizer(store, phase.model, train, path, phase.batch, phase.length, focus=0.0, perceptual=0.0, slow_steps=slow)
    if not (path / "tokenizer.safetensors").exists():
        tokenizer = load_tokenizer().train()
        windows = Windows(store, phase.length, phase.batch, train.seed, pad=True)
        set_backgrounds(tokenizer, [windows])
        fit("tokenizer", {"tokenizer": tokenizer}, tokenizer_loss, windows, train, path,
            model_config={"tokenizer": to_dict(tokenizer.config)})
    return load_tokenizer(path / "tokenizer.safetensors")


def new_dynamics(setting: Setting, start: str, seed: int, latents: EpisodeStore) -> Dynamics:
    "Dynamics before training. From dm_control come all weights but those of the actions and registers."
    seed_everything(seed)
    blocks: TransformerConfig = replace(TINY.dynamics.model.transformer, width=setting.width, depth=setting.depth)
    config: DynamicsConfig = replace(TINY.dynamics.model, action_dim=latents.action_dim, n_registers=2, transformer=blocks)
    dynamics = Dynamics(config)
    if start == "dm_control":
        shipped = load_dynamics().state_dict()
        own = dynamics.state_dict()
        for name in own:
            if own[name].shape == shipped[name].shape:
                own[name].copy_(shipped[name])
        dynamics.tokens.data[:config.n_tokens] = shipped["tokens"][:config.n_tokens]
        dynamics.tokens.data[-2:] = shipped["tokens"][-2:]          # signal and action
    set_latent_statistics(dynamics, latents.mean, latents.std)
    return dynamics


def trained_dynamics(folder: Path, setting: Setting, start: str, inverse: str, seed: int,
                     latents: EpisodeStore) -> tuple[Dynamics, list[dict[str, float]]]:
    "Dynamics and the history of their training; inverse: none, hidden or shown, see `inverse_loss`."
    dynamics = new_dynamics(setting, start, seed, latents)
    modules: dict[str, torch.nn.Module] = {"dynamics": dynamics}
    loss = dynamics_loss
    if inverse != "none":
        modules["inverse"] = InverseHead(dynamics)
        loss = partial(inverse_loss, shown=inverse == "shown")
    train: TrainConfig = replace(TINY.dynamics.train, steps=setting.steps, seed=seed)
    windows = Windows(latents, TINY.dynamics.length, setting.batch, seed, unlabelled=UNLABELLED, pad=True, labels="executed")
    history = fit("dynamics", modules, loss, windows, train, folder, weights={"inverse": LAMBDA},
                  model_config={"dynamics": to_dict(dynamics.config)})
    return dynamics.eval(), history


# Probes

Parts = tuple[Probed, Probed, Probed]       # fit, choose, test


def short(found: JsonDict) -> list[float]:
    "R² on held-out tasks, on other episodes of the training tasks, and on held-out tasks without the gripper."
    return [round(value, 5) for value in (found["r2"], found["r2_seen"], float(np.mean(found["r2_each"][:-1])))]


def without_model(parts: Parts) -> dict[str, dict[str, list[float]]]:
    "Floors and ceiling: what can be read from other things than the world model, from one frame or two."
    mean, axes = components(parts[0].frames)
    sources = {"pixels": [(part.frames - mean) @ axes for part in parts],
               "tokenizer latents": [part.latents.flatten(2) for part in parts]}
    sources |= {name: [part.truth[name] for part in parts] for name in parts[0].truth}
    table = {"constant": {"one": short(mean_predictor(*(part.rows(part.latents.flatten(2), "one") for part in parts)))}}
    for name, features in sources.items():
        table[name] = {frames: short(probe(*(part.rows(x, frames) for part, x in zip(parts, features))))
                       for frames in ("one", "two")}
    return table


def layer_table(dynamics: Dynamics, parts: Parts, kinds: tuple[str, ...]) -> dict:
    "table[kind][frames][tau]: R² of each layer, as `short` gives them."
    table: dict = {kind: {"one": {}, "two": {}} for kind in kinds}
    for i in LEVELS:
        features = [token_features(dynamics, part.latents, i, number) for number, part in enumerate(parts)]
        for kind in kinds:
            for frames in ("one", "two"):
                by_layer = zip(*(own[kind] for own in features))
                table[kind][frames][f"{i / 8:g}"] = [
                    short(probe(*(part.rows(x, frames) for part, x in zip(parts, layer)))) for layer in by_layer]
    return table


def model_tables(dynamics: Dynamics, parts: Parts) -> dict:
    "The layers of a model, and its agent token, which sees everything, or only itself."
    seeing = with_agent_tokens(dynamics, 1).eval()
    table = layer_table(seeing, parts, ("latent", "register", "agent"))
    return table | {"isolated agent": layer_table(isolate_agent(seeing), parts, ("agent",))["agent"]}


def dreams(world: WorldModel, store: EpisodeStore, latents: EpisodeStore, windows: int) -> dict[str, float]:
    "PSNR in dB over 24 frames after 8, the mean over tasks: the dream, its ceiling and its floors."
    found = []
    for task in store.tasks:
        report = rollout_report(world, store.of_task(task), latents.of_task(task), 8, 32, windows)
        row = {name: values["psnr"] for name, values in report["mean"].items()}
        found.append(row | {"action_shuffle_ratio": report["action_shuffle_ratio"]})
    return {name: round(float(np.mean([row[name] for row in found])), 3) for name in found[0]}


class Study:
    "One setting on one folder of demonstrations."

    def __init__(self, folder: Path, name: str):
        self.name = name
        self.setting = SETTINGS[name]
        self.folder = folder / name
        self.stores = {part: imported(folder, part) for part in ("training", "held_out")}
        self.truth = {part: truth(folder, part) for part in self.stores}
        self.begun = time.perf_counter()

    def minutes(self) -> float:
        "Since the last call."
        now = time.perf_counter()
        passed, self.begun = now - self.begun, now
        return round(passed / 60, 2)

    def world_of(self, start: str) -> tuple[Tokenizer, dict[str, EpisodeStore], Parts]:
        "Tokenizer, latents (seen, other, held_out) and what is probed."
        seen, other = self.stores["training"].split(HELD_BACK)
        tokenizer = tokenizer_of(self.folder, self.setting, start, seen)
        latents = {}
        for part, store in self.stores.items():
            path = self.folder / f"{part}_{start}.zarr"
            latents[part] = EpisodeStore.open(path) if path.exists() else encode_store(store, tokenizer, path)
        seen_latents, other_latents = latents["training"].split(HELD_BACK)
        fits, chooses, tests = self.setting.episodes
        parts = (probed(seen, seen_latents, self.truth["training"], fits),
                 probed(other, other_latents, self.truth["training"], chooses),
                 probed(self.stores["held_out"], latents["held_out"], self.truth["held_out"], tests))
        return tokenizer, {"seen": seen_latents, "other": other_latents, "held_out": latents["held_out"]}, parts

    def baselines(self, start: str) -> None:
        "What needs no trained dynamics: tokenizer, floors, ceiling, untrained networks."
        path = self.folder / f"baselines_{start}.json"
        if path.exists():
            return
        tokenizer, latents, parts = self.world_of(start)
        row = {"start": start, "minutes": {"tokenizer": self.minutes()}}
        row["tokenizer"] = tokenizer_report(tokenizer, self.stores["held_out"])
        row["rows"] = [part.actions[:, 1:].shape[:2].numel() for part in parts]
        row["without_model"] = without_model(parts)
        row["untrained"] = [model_tables(new_dynamics(self.setting, "scratch", seed, latents["seen"]).eval(), parts)
                            for seed in self.setting.seeds] if start == "scratch" else []
        row["minutes"]["probes"] = self.minutes()
        write_json(path, row)

    def model(self, start: str, inverse: str, seed: int) -> None:
        "Trains one model, probes it and lets it dream."
        path = self.folder / f"model_{start}_{inverse}_{seed}.json"
        if path.exists():
            return
        tokenizer, latents, parts = self.world_of(start)
        self.minutes()
        dynamics, history = trained_dynamics(path.with_suffix(""), self.setting, start, inverse, seed, latents["seen"])
        row = {"start": start, "inverse": inverse, "seed": seed, "minutes": {"training": self.minutes()},
               "losses": [{name: round(record[name], 5) for name in ("step", "dynamics", "inverse") if name in record}
                          for record in (history[0], history[-1])]}
        row["layers"] = model_tables(dynamics, parts)
        row["minutes"]["probes"] = self.minutes()
        world = WorldModel(tokenizer, dynamics).eval()
        row["dreams"] = dreams(world, self.stores["held_out"], latents["held_out"], self.setting.dreams)
        row["minutes"]["dreams"] = self.minutes()
        write_json(path, row)
        print(f"{path.name}: {row['minutes']}", flush=True)

    def collect(self, command: str) -> None:
        "Everything that is there, into the file of results."
        stored = read_json(RESULTS, "remove it") if RESULTS.exists() else {}
        data = {part: {"tasks": store.tasks, "episodes": len(store), "frames": store.n_frames}
                for part, store in self.stores.items()}
        stored[self.name] = {
            "command": command, "setting": asdict(self.setting), "data": data, "levels": [i / 8 for i in LEVELS],
            "baselines": [read_json(path, "") for path in sorted(self.folder.glob("baselines_*.json"))],
            "models": [read_json(path, "") for path in sorted(self.folder.glob("model_*.json"))]}
        write_json(RESULTS, stored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--setting", choices=SETTINGS, default="pilot")
    parser.add_argument("--prepare", action="store_true", help="stores, tokenizers and baselines only")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the models; default: all of the setting")
    given = parser.parse_args()
    study = Study(given.folder, given.setting)
    for start in dict.fromkeys(start for start, _ in study.setting.variants):
        study.baselines(start)
    for seed in () if given.prepare else given.seeds or study.setting.seeds:
        for start, inverse in study.setting.variants:
            study.model(start, inverse, seed)
    study.collect(f"python tests/metaworld/study.py {given.folder} --setting {given.setting}")


if __name__ == "__main__":
    main()
