"""The script of study 74: every arm goes on from the same agent, and its rows are made once, at a size that learns nothing."""
from dataclasses import replace

import numpy as np
import pytest
import rounds as study
from rows import Table

from dreamer4_nb.data.acting import act_episodes
from dreamer4_nb.method.agent import Policy
from dreamer4_nb.runs.chain import Run
from dreamer4_nb.runs.online import gather
from dreamer4_nb.runs.presets import MICRO


def test_arms_go_on_from_one_agent_and_rows_are_stored_once(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TABLE", Table(tmp_path / "online.json", "seeds"))
    monkeypatch.setattr(study, "SHIPPED", "")       # the micro preset has a world of its own
    monkeypatch.setattr(study, "TINY", MICRO)
    judge = {"episodes": 2, "decisions": 6, "readouts": ("mean",), "demonstrator": 0, "videos": 0}
    monkeypatch.setattr(study, "WHOLE", {"judge": judge, "rounds": {"episodes": 2, "decisions": 6}})
    arms = {name: replace(arm, rounds=1) for name, arm in study.ARMS.items()}
    monkeypatch.setattr(study, "ARMS", arms)
    monkeypatch.setattr(study, "preset_of", lambda *asked, made=study.preset_of: replace(made(*asked), episodes=12))
    study.study(tmp_path / "runs", "ball_in_cup-catch", list(arms), [1])
    part = study.TABLE.read()
    names = {row["policy"] for row in part["rows"]}
    assert names == {"random", "cloning, mean", "PMPO, mean"}
    assert [row["arm"] for row in part["rows"] if row["policy"] == "PMPO, mean"] == ["base", *arms]
    assert [row["arm"] for row in part["rounds"]] == list(arms) and part["rounds"][0]["n"] == 2
    assert [row["round"] for row in part["copying"]] == [0, 1] and part["copying"][1]["arm"] == "dagger"
    randoms = [row["return"] for row in part["rows"] if row["policy"] == "random"]
    assert randoms == pytest.approx([randoms[0]] * len(randoms))       # the same seeds for all
    base = study.base_run(tmp_path / "runs", "ball_in_cup-catch", 1)        # who watches its own episodes says what it did
    watcher = Policy(base.world, base.agent[1], "mean")
    played = gather(tmp_path / "played.zarr",
                    lambda seeds, first: act_episodes(watcher, "ball_in_cup-catch", seeds, first, 6, workers=1), range(900, 902))
    assert study.follows(base, played, np.arange(2), "actions") == pytest.approx(1, abs=1e-3)
    monkeypatch.setattr(study, "online", None)      # nothing is made again
    study.study(tmp_path / "runs", "ball_in_cup-catch", list(arms), [1])
    assert study.TABLE.read()["rows"] == part["rows"]


def test_the_base_is_the_world_that_ships_with_executed_labels():
    preset = study.preset_of(study.SHIPPED, 2)
    assert preset.agent.labels == "executed" and preset.dynamics.model.transformer.depth == 8
    other = study.preset_of(study.SHIPPED, 0)
    assert (preset.agent.train.seed, preset.imagination.train.seed) == (other.agent.train.seed + 2, other.imagination.train.seed + 2)
    assert preset.dynamics == other.dynamics


def test_a_task_whose_demonstrations_do_not_ship_gets_them_once(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "COLLECTED", {"episodes": 4, "decisions": 6, "seed": 60_000})
    data = study.data_of(tmp_path, "reacher-easy")
    monkeypatch.setattr(study, "collect", None)     # nothing is made again
    assert study.data_of(tmp_path, "reacher-easy") == data
    run = Run(tmp_path / "run", replace(MICRO, tasks=("reacher-easy",), data=study.preset_of("reacher-easy", 0, data).data))
    assert sorted(part.n_episodes for part in run.split) == [1, 3] and run.split[0].tasks == ["reacher-easy"]
    assert study.data_of(tmp_path, "cartpole-swingup") == "shipped"
