"""Study 74: how exactly must cartpole be seen? Clones without pictures, and writes nbs/results/online.json, "precision".

    python tests/studies/precision.py --seeds 0 1 2

A small network clones the planner's intended actions from 30 demonstrations of 250 decisions. It sees the whole state, or only
positions of the last frames, as a picture shows them, with noise on each. Returns are means over fresh seeds, 250 decisions.
Rows that the results hold are not made again. Three seeds took 20 minutes of a core that other work shared.
"""
import argparse

import numpy as np
import torch
from torch import Tensor, nn

from dreamer4_nb.data.envs import make_env
from dreamer4_nb.data.planner import Planner, collect_episodes
from rows import RESULTS, Table

TABLE = Table(RESULTS / "online.json", "precision")
TASK = "cartpole-swingup"
DECISIONS = 250
DEMONSTRATIONS, FIRST = 40, 50_000      # of mixed quality; the expert and medium ones are cloned
JUDGE = range(10_000, 10_050)
STEPS, BATCH, RATE = 4000, 256, 2e-3
CHANGE = 10.0       # a position changes little in a frame: changes are made as large as positions
WAYS = [{"sees": "state", "frames": 1, "noise": 0.0},
        {"sees": "state and its last action", "frames": 1, "noise": 0.0},
        *({"sees": "positions", "frames": 4, "noise": noise} for noise in (0.0, 0.003, 0.01, 0.03, 0.1)),
        *({"sees": "positions", "frames": 16, "noise": noise} for noise in (0.01, 0.03))]


def seen(states: np.ndarray, way: dict, random: np.random.Generator) -> np.ndarray:
    "What a frame shows: the cart's place (in units of 2 m), cos and sin of the angle; speeds in a state. (..., 4) -> (..., 3 or 5)."
    x, angle, speed, turn = np.moveaxis(np.asarray(states, float), -1, 0)
    positions = [x / 2, np.cos(angle), np.sin(angle)]
    if way["sees"] != "positions":
        return np.stack([*positions, speed / 3, turn / 5], -1)
    shown = np.stack(positions, -1)
    return shown + way["noise"] * random.standard_normal(shown.shape)


def inputs(frames: list[np.ndarray], action: np.ndarray, way: dict) -> np.ndarray:
    "What the network gets: the newest frame, the changes between the last ones, and perhaps the action that led to it."
    last = [frames[max(len(frames) - 1 - k, 0)] for k in range(way["frames"])]
    changes = [CHANGE * (new - old) for new, old in zip(last, last[1:])]
    action = [action] if "action" in way["sees"] else []
    return np.concatenate([last[0], *changes, *action], -1)


def cloned(episodes: list[dict], way: dict, seed: int) -> tuple[nn.Module, float]:
    "A network that clones the demonstrations, and its R² for their intended actions."
    random = np.random.default_rng(seed)
    rows, wanted = [], []
    for episode in episodes:
        frames = list(seen(episode["states"], way, random))
        rows += [inputs(frames[:t + 1], episode["actions"][t], way) for t in range(len(frames) - 1)]
        wanted.append(episode["intended"][1:])
    x, y = torch.tensor(np.stack(rows)).float(), torch.tensor(np.concatenate(wanted)).float()

    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(x.shape[1], 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1), nn.Tanh())
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-3)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)

    def error(row: Tensor) -> Tensor:
        return (network(x[row]) - y[row]).square().mean()

    for _ in range(STEPS):
        optimizer.zero_grad()
        error(torch.randint(len(x), (BATCH,))).backward()
        optimizer.step()
        falling.step()
    with torch.no_grad():
        return network, float(1 - error(torch.arange(len(x))) / y.var())


def returns(network: nn.Module, way: dict, seed: int) -> np.ndarray:
    "The return of each episode of the judge."
    random = np.random.default_rng([seed, 1])
    envs = [make_env(TASK, own, None, time_limit_decisions=DECISIONS) for own in JUDGE]
    for env in envs:
        env.reset()
    total = np.zeros(len(envs))
    actions = np.zeros((len(envs), 1))
    frames: list[np.ndarray] = []
    for _ in range(DECISIONS):
        frames.append(seen(np.stack([env.state() for env in envs]), way, random))
        with torch.no_grad():
            actions = network(torch.tensor(inputs(frames, actions, way)).float()).numpy()
        total += [env.step(action)[1] for env, action in zip(envs, actions)]
    return total


def demonstrations() -> list[dict]:
    "Those that are cloned."
    planner = Planner(TASK, seed=FIRST, threads=1)
    episodes = collect_episodes(TASK, DEMONSTRATIONS, DECISIONS, FIRST, planner=planner)
    return [episode for episode in episodes if episode["quality"] in ("expert", "medium")]


def study(seeds: list[int]) -> None:
    episodes = demonstrations()
    expert = [float(episode["rewards"].sum()) for episode in episodes if episode["quality"] == "expert"]
    for seed in seeds:
        for way in WAYS:
            if TABLE.has(**way, seed=seed):
                continue
            network, r2 = cloned(episodes, way, seed)
            row = way | {"seed": seed, "r2": r2, "return": float(returns(network, way, seed).mean())}
            TABLE.add({"command": "python tests/studies/precision.py", "task": TASK, "episodes": len(JUDGE),
                       "demonstrations": len(episodes), "expert": float(np.mean(expert))}, rows=[row])
            print(f"{way}, seed {seed}: R² {r2:.2f}, return {row['return']:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    torch.set_num_threads(1)
    study(parser.parse_args().seeds)


if __name__ == "__main__":
    main()
