"An episode that the task ends is told from one that runs out of time, from dm_control to the batch."
import numpy as np
import pytest

from dreamer4_nb.data import envs        # before dm_control: it chooses how to draw
from dreamer4_nb.core import UserError
from dreamer4_nb.data.demonstrations import _shipped, load_demonstrations
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.data.envs import VectorEnv, make_env, render_states
from dreamer4_nb.data.planner import Planner, collect_episodes, save_demonstrations
from dreamer4_nb.runs.presets import PAPER
from dreamer4_nb.data.stores import Episode, EpisodeStore

from dm_control.suite.ball_in_cup import BallInCup

BALL = "ball_in_cup-catch"
ENDS_SOON = """
from dreamer4_nb.data.envs import _serve
from dm_control.suite.ball_in_cup import BallInCup
BallInCup.get_termination = lambda self, physics: 0.0 if physics.time() > 0.1 else None
"""


def soon(self, physics):
    "An end without future after a tenth of a second."
    return 0.0 if physics.time() > 0.1 else None


def far_right(self, physics):
    "An end without future when the ball is more than 20 cm to the right."
    return 0.0 if physics.named.data.qpos["ball_x"] > 0.2 else None


def test_a_true_end_has_continue_0_once_and_time_that_runs_out_1(monkeypatch):
    monkeypatch.setattr(BallInCup, "get_termination", soon)
    env = make_env(BALL, 0, image=None)
    env.reset()
    assert [env.step([0, 0])[2:] for _ in range(3)] == [(1.0, False), (1.0, False), (0.0, True)]
    with pytest.raises(UserError, match="over"):
        env.step([0, 0])
    env.reset()
    assert env.step([0, 0])[2:] == (1.0, False)
    short = make_env(BALL, 0, image=None, time_limit_decisions=2)
    short.reset()
    assert [short.step([0, 0])[2:] for _ in range(2)] == [(1.0, False), (1.0, True)]


def test_a_true_end_comes_through_from_another_process_once(monkeypatch):
    popen = envs.subprocess.Popen

    def popen_mortal(command, **options):
        python, option, code = command
        return popen([python, option, ENDS_SOON + code], **options)
    monkeypatch.setattr(envs, "_idle", [])
    monkeypatch.setattr(envs.subprocess, "Popen", popen_mortal)
    with VectorEnv(BALL, [0, 1], workers=1, image=None) as both:
        worker = both.workers[0]
        both.reset()
        answers = [both.step(np.zeros((2, 2)))[1:] for _ in range(5)]
    envs._idle.remove(worker)                                 # its task is not everybody's
    worker.stop()
    assert [continues.tolist() for _, continues, _ in answers] == [[1, 1], [1, 1], [0, 0], [1, 1], [1, 1]]
    assert [lasts.tolist() for _, _, lasts in answers] == [[False] * 2] * 2 + [[True] * 2] * 3


@pytest.fixture(scope="module")
def lives():
    "Six episodes of 30 random decisions at most; some end far to the right."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BallInCup, "get_termination", far_right)
        return collect_episodes(BALL, 6, 30, seed=40, quality="random", planner=Planner(BALL, candidates=2))


def test_the_collector_keeps_what_ended_and_where_it_began(lives):
    ended = [e["states"][-1, 2] > 0.2 for e in lives]
    assert 0 < sum(ended) < 6 and [e["seed"] for e in lives] == list(range(40, 46))
    for e, over in zip(lives, ended):
        assert e["continues"][:-1].all() and e["continues"][-1] == (0 if over else 1)
        assert over or len(e["continues"]) == 31
        env = make_env(BALL, e["seed"], image=None)
        env.reset()
        assert np.array_equal(np.float32(env.state()), e["states"][0])


def test_an_end_goes_from_the_collector_to_the_batch(lives, tmp_path, monkeypatch):
    save_demonstrations(tmp_path / "lives.npz", BALL, lives)
    monkeypatch.setattr("dreamer4_nb.data.demonstrations.asset", lambda name: tmp_path / "lives.npz")
    monkeypatch.setenv("DREAMER4_CACHE", str(tmp_path / "cache"))
    assert _shipped(BALL)[0]["seeds"].tolist() == list(range(40, 46))
    loaded = load_demonstrations(BALL, image=16, workers=0, progress=False)
    stored = EpisodeStore.create(tmp_path / "stored.zarr", BALL, 2, (16, 16, 3), 8)
    for e in lives:                                           # as `dreamer4-nb collect` does
        stored.append(Episode(frames=render_states(BALL, e["states"], 16, 0), task=BALL, **e))
    ends = [len(e["rewards"]) - 1 if e["states"][-1, 2] > 0.2 else None for e in lives]
    for store in (loaded, stored.finish()):
        assert store.seeds.tolist() == list(range(40, 46))
        for length in (3, 31):                                # longer than those that ended: padded
            windows = Windows(store, length, 4, pad=True)
            batch = windows.at(range(windows.n_windows))
            for row, owner, first in zip(batch.continues, windows.episode_index, windows.first_frame):
                expected = [t for t in range(length) if first + t == ends[owner]]
                assert np.flatnonzero(row == 0).tolist() == expected
        assert sorted(set(windows.episode_index)) == list(range(6))


def test_frames_can_be_as_large_as_the_largest_preset_asks_for():
    image = PAPER.tokenizer.model.image
    env = make_env("ball_in_cup-catch", 0, image)
    frame = env.reset(0)
    small = make_env("ball_in_cup-catch", 0, 64).reset(0)
    coarse = frame.reshape(64, image // 64, 64, image // 64, 3).mean((1, 3))
    assert image > 480 and frame.shape == (image, image, 3)
    assert np.abs(coarse - small).mean() < 6                     # the same picture
