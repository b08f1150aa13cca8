"Study 77 does not rot: two training tasks and a held-out one, made up, go the whole way in the smallest size."
import importlib.util
import sys
from pathlib import Path

import h5py
import numpy as np

from dreamer4_nb.inputs import read_json

SCRIPT = Path(__file__).parent / "metaworld" / "study.py"


def script():
    "The script as a module."
    spec = importlib.util.spec_from_file_location("metaworld_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_task(path, episodes, length=34):
    "A square that goes where the actions push it, in the layout of LIBERO."
    rng = np.random.default_rng(len(path.stem))
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for k in range(episodes):
            actions = rng.uniform(-1, 1, (length, 4)).astype(np.float32)
            states = np.cumsum(actions, 0) - actions            # the state before each action
            frames = np.full((length, 64, 64, 3), 40, np.uint8)
            for t, (x, y) in enumerate(np.clip(28 + 3 * states[:, :2], 0, 55).astype(int)):
                frames[t, y:y + 9, x:x + 9] = 200
            demo = file.create_group(f"data/demo_{k}")
            demo["actions"], demo["states"] = actions, states
            demo["rewards"], demo["dones"] = np.zeros(length), np.arange(length) == length - 1
            demo["obs/ee_pos"], demo["obs/gripper_states"] = states[:, :3], states[:, 3:]
            demo["obs/agentview_rgb"] = frames


def test_the_study_of_probes_goes_the_whole_way(tmp_path, monkeypatch):
    study = script()
    smallest = study.Setting(32, 2, (2, 0), 2, 2, (0,), (("scratch", "none"), ("scratch", "shown")), (8, 4, 4), 2)
    monkeypatch.setitem(study.SETTINGS, "smallest", smallest)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "probes.json")
    for task, episodes in (("training/push_a", 8), ("training/push_b", 8), ("held_out/push_c", 4)):
        write_task(tmp_path / "data" / f"{task}_demo.hdf5", episodes)
    monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path / "data"), "--setting", "smallest"])
    study.main()

    found = read_json(tmp_path / "probes.json", "")["smallest"]
    (base,) = found["baselines"]
    for name in ("true state", "true hand"):                           # two states tell the action between them
        state = base["without_model"][name]
        assert state["two"][0] > 0.999 and state["one"][0] < 0.3
    assert base["without_model"]["true hand and its step"]["one"][0] > 0.999
    assert [model["inverse"] for model in found["models"]] == ["none", "shown"]
    constant = base["without_model"]["constant"]["one"]
    assert constant[0] < 0
    for model in found["models"]:
        layers = model["layers"]
        assert set(layers) == {"latent", "register", "agent", "isolated agent"}
        assert all(pair == constant for by_level in layers["isolated agent"].values()
                   for by_layer in by_level.values() for pair in by_layer)
        assert any(pair != constant for pair in layers["agent"]["two"]["0.875"])
        assert len(layers["latent"]["one"]["0.5"]) == smallest.depth + 2
        assert {"dream", "reconstruction", "copy_last", "mean_frame"} <= set(model["dreams"])
    assert "inverse" in found["models"][1]["losses"][0]

    before = (tmp_path / "probes.json").read_bytes()
    study.main()                                                        # nothing is done again
    assert (tmp_path / "probes.json").read_bytes() == before
