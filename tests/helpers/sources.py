"Recordings in each format that can be imported, written by the format's own library."
import json
import os
import warnings
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent.parent / "fixtures"


def film(seed: int, n: int = 24, height: int = 40, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    "A square that is pushed about: frames (n + 1, h, w, 3), and n pushes (n, 2) in [-1, 1], taken at the frames."
    rng = np.random.default_rng(seed)
    pushes = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
    frames = np.full((n + 1, height, width, 3), 30, np.uint8)
    place = np.array([width / 2, height / 2])
    for t in range(n + 1):
        x, y = place.astype(int)
        frames[t, y - 4:y + 4, x - 4:x + 4] = 220, 120, 40
        place = np.clip(place + 4 * pushes[min(t, n - 1)], 5, [width - 5, height - 5])
    return frames, pushes


def write_video(path: Path, frames: np.ndarray, rate: int = 20, codec: str = "mpeg4") -> None:
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def videos(folder: Path, labels: str = "npy", episodes: int = 6) -> str:
    "A folder `push` of videos with actions in .npy or .csv, or without."
    where = folder / "push"
    where.mkdir()
    for seed in range(episodes):
        frames, pushes = film(seed)
        write_video(where / f"{seed}.mp4", frames[:-1])
        if labels == "npy":
            np.save(where / f"{seed}.npy", pushes)
        if labels == "csv":
            rows = [f"{x},{y},{int(t == 23)}" for t, (x, y) in enumerate(pushes.tolist())]
            (where / f"{seed}.csv").write_text("\n".join(["dx,dy,reward", *rows]), encoding="utf-8")
    return str(where)


def hdf5(folder: Path, episodes: int = 6, camera: str = "agentview_rgb", flip: bool = True) -> str:
    import h5py
    path = folder / "push_demo.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "push the block"})
        data.attrs["env_args"] = json.dumps({"env_name": "Push", "env_kwargs": {"control_freq": 20}})
        for seed in range(episodes):
            frames, pushes = film(seed)
            demo = data.create_group(f"demo_{seed}")
            demo["actions"] = pushes
            demo["rewards"] = demo["dones"] = (np.arange(24) == 23).astype(np.uint8)
            demo[f"obs/{camera}"] = frames[:24, ::-1] if flip else frames[:24]
            demo["obs/eye_in_hand_rgb"] = 0 * frames[:24]
            demo["obs/joint_states"] = np.zeros((24, 7))
    return str(path)


def npz(folder: Path, episodes: int = 6) -> str:
    made = [film(seed) for seed in range(episodes)]
    dones = np.zeros((episodes, 24), np.float32)
    dones[:, -1] = 1
    path = folder / "push.npz"
    np.savez_compressed(path, frames=np.stack([frames[:24] for frames, _ in made]), dones=dones,
                        actions=np.stack([pushes for _, pushes in made]), rewards=dones)
    return str(path)


def minari(folder: Path, episodes: int = 6, discrete: bool = True) -> str:
    import minari
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer
    buffers = []
    for seed in range(episodes):
        frames, pushes = film(seed)
        actions = (np.abs(pushes[:, 0]) * 3.99).astype(int) + 1 if discrete else 5 * pushes.astype(np.float64)
        ends = np.arange(24) == 23
        won = seed % 2 == 0
        buffers.append(EpisodeBuffer(id=seed, seed=seed, observations=list(frames), actions=list(actions), infos={},
                                     rewards=[float(end and won) for end in ends], terminations=[bool(end and won) for end in ends],
                                     truncations=[bool(end and not won) for end in ends]))
    space = spaces.Discrete(4, start=1) if discrete else spaces.Box(-5, 5, (2,), np.float64)
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            minari.create_dataset_from_buffers("toy/push-v0", buffers, action_space=space, algorithm_name="random",
                                               observation_space=spaces.Box(0, 255, (40, 48, 3), np.uint8))
    finally:
        del os.environ["MINARI_DATASETS_PATH"]
    return str(folder / "minari/toy/push-v0")


def lerobot(folder: Path) -> str:
    "Written by LeRobot itself: see fixtures/README.md."
    return str(FIXTURES / "lerobot_v3")
