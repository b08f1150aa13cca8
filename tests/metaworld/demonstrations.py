"""Demonstrations of Meta-World's scripted experts, a file of HDF5 for each task, in the layout of LIBERO.

    make metaworld                                                    # the environment, once
    .venv-metaworld/bin/python tests/metaworld/demonstrations.py runs/metaworld --episodes 40
    .venv/bin/dreamer4-nb import hdf5 runs/metaworld/training runs/metaworld/training.zarr

The folder gets `training` (43 tasks) and `held_out` (7 tasks). A file is renamed to its name when it is whole, so the
same command goes on where it was stopped, and several may run with different `--tasks`.

An expert's action is a function of the state, so a state alone would tell it. Therefore a share of the decisions of an
episode is random; what is stored is the action that was executed.
"""
import argparse
import json
import os
import time
import warnings
import zlib
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")
warnings.filterwarnings("ignore")       # of the simulator's libraries, about their own versions

import h5py
import metaworld
import mujoco
import numpy as np
from metaworld.policies import ENV_POLICY_MAP

# The five test tasks of Meta-World's ML45, and two more.
HELD_OUT = ("bin-picking", "box-close", "door-lock", "door-unlock", "hand-insert", "drawer-open", "sweep-into")
TASKS = tuple(name.removesuffix("-v3") for name in sorted(ENV_POLICY_MAP))
IMAGE = 64
# Simulator steps to a decision, of 12.5 ms each: ten decisions a second. The hand follows an action with a delay of some
# steps. With 2 steps to a decision even two true states tell little of the action between them (R² 0.2).
REPEAT = 8
SHORTEST, LONGEST = 40, 60      # decisions of an episode, which ends with success
NOISE = (0.1, 0.3, 0.5)         # shares of random decisions; episodes take them in turn
STATE = 18                      # hand (3), opening of the gripper (1), two objects (7 each): no velocities
CAMERA, PLACE = "corner2", (0.75, 0.075, 0.7)   # nearer to the table than the camera stands by itself


class Filmed:
    "A task of Meta-World, its expert, and a fixed camera that looks at the table."

    def __init__(self, task: str, seed: int):
        name = f"{task}-v3"
        benchmark = metaworld.MT1(name, seed=seed)
        self.variants = benchmark.train_tasks       # where things lie: 50 of them
        self.env = benchmark.train_classes[name]()
        self.expert = ENV_POLICY_MAP[name]()
        model = self.env.model
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        model.cam_pos[model.camera(CAMERA).id] = PLACE
        self.renderer = mujoco.Renderer(model, IMAGE, IMAGE)
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
        self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False

    def picture(self) -> np.ndarray:
        "The present frame (h, w, 3). This camera hangs upside down, and so LIBERO stores its images."
        self.renderer.update_scene(self.env.data, camera=CAMERA)
        return self.renderer.render().copy()

    def episode(self, number: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        "Frames, states, executed actions and rewards of one episode; row t of each is of decision t."
        self.env.set_task(self.variants[number % len(self.variants)])
        obs, _ = self.env.reset()
        share = NOISE[number % len(NOISE)]
        rows: dict[str, list] = {"frames": [], "states": [], "actions": [], "rewards": []}
        solved = False
        while len(rows["actions"]) < (SHORTEST if solved else LONGEST):
            action = np.clip(self.expert.get_action(obs), -1, 1)
            if random.random() < share:
                action = random.uniform(-1, 1, 4)
            rows["frames"].append(self.picture())
            rows["states"].append(obs[:STATE])
            rows["actions"].append(action)
            for _ in range(REPEAT):
                obs, _, _, _, info = self.env.step(action.astype(np.float32))
                solved = solved or info["success"] > 0
            rows["rewards"].append(float(solved))
        return {name: np.stack(values) for name, values in rows.items()}

    def close(self) -> None:
        self.renderer.close()       # an EGL context that is left open complains at exit
        self.env.close()


def write_task(path: Path, task: str, episodes: int, seed: int) -> tuple[int, float, float]:
    "Writes the file of a task. Returns the number of frames, the share of solved episodes, and the seconds."
    begun = time.perf_counter()
    filmed = Filmed(task, seed)
    part = path.with_name(f".{path.name}.part")
    frames, solved = 0, 0
    with h5py.File(part, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": task.replace("-", " ")})
        data.attrs["env_args"] = json.dumps({
            "env_name": f"{task}-v3", "metaworld": "3.1.1", "seed": seed, "noise": NOISE,
            "env_kwargs": {"control_freq": 80 / REPEAT, "camera": CAMERA, "camera_position": PLACE}})
        for number in range(episodes):
            random = np.random.default_rng([seed, zlib.crc32(task.encode()), number])
            rows = filmed.episode(number, random)
            last = np.arange(len(rows["actions"])) == len(rows["actions"]) - 1
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = rows["actions"].astype(np.float32)
            demo["states"] = rows["states"].astype(np.float32)
            demo["obs/ee_pos"] = rows["states"][:, :3].astype(np.float32)
            demo["obs/gripper_states"] = rows["states"][:, 3:4].astype(np.float32)
            demo["rewards"] = rows["rewards"].astype(np.float32)
            demo["dones"] = (last & (rows["rewards"] > 0)).astype(np.uint8)
            demo.create_dataset("obs/agentview_rgb", data=rows["frames"], compression="gzip", compression_opts=1)
            frames += len(last)
            solved += int(rows["rewards"][-1] > 0)
    filmed.close()
    part.replace(path)
    return frames, solved / episodes, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--episodes", type=int, default=40, help="of each task")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, metavar="TASK", help="default: all 50")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for task in given.tasks:
        folder = given.folder / ("held_out" if task in HELD_OUT else "training")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{task.replace('-', '_')}_demo.hdf5"
        if path.exists():
            continue
        frames, solved, seconds = write_task(path, task, given.episodes, given.seed)
        print(f"{path.name}: {frames} frames, {solved:.0%} solved, {1000 * seconds / frames:.1f} ms a frame", flush=True)


if __name__ == "__main__":
    main()
