"Online rounds: what is played and kept, who is cloned, and a round that is stopped goes on bit for bit."
from dataclasses import replace

import numpy as np
import pytest
import torch

from dreamer4_nb.core import UserError, load_checkpoint
from dreamer4_nb.data import acting
from dreamer4_nb.data.acting import act_episodes
from dreamer4_nb.data.envs import make_env
from dreamer4_nb.data.planner import Planner
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.data.tasks import TaskSpec
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.inputs import read_json
from dreamer4_nb.runs import online as module
from dreamer4_nb.runs.chain import Run
from dreamer4_nb.runs.online import gather, mark_better, online, round_preset, round_row, train_round
from dreamer4_nb.runs.presets import MICRO, TINY, Rounds
from dreamer4_nb.runs.study import branch
from dreamer4_nb.training import phases
from dreamer4_nb.training.optimizers import learning_rate
from dreamer4_nb.training.phases import agent_batches

TASK = "ball_in_cup-catch"
TWO = Rounds(rounds=2, episodes=4, decisions=12, replay=2.0)


class Drift:
    "Acts by its number among the episodes of the round and by the time, not by what it sees."

    def reset(self, n, first=0):
        self.rows = np.arange(first, first + n)
        self.t = 0

    def act(self, frames):
        assert frames.shape == (len(self.rows), 32, 32, 3) and frames.dtype == np.uint8
        self.t += 1
        return np.stack([np.sin(self.rows + self.t), np.cos(2.0 * self.rows - self.t)], -1).astype(np.float32)


@pytest.fixture(scope="module")
def acted():
    return act_episodes(Drift(), TASK, range(50, 53), 4, 9, workers=1, image=32)


def test_an_episode_is_led_to_aligned_and_can_be_replayed(acted):
    for episode, seed in zip(acted, range(50, 53)):
        env = make_env(TASK, seed, image=32)
        assert np.array_equal(env.reset(), episode.frames[0]) and not episode.actions[0].any()
        assert len(episode) == 10 and episode.seed == seed
        for t in range(1, 10):
            frame, reward, goes_on, _ = env.step(episode.actions[t])
            assert np.array_equal(frame, episode.frames[t])
            assert np.allclose(env.state(), episode.states[t])
            assert (reward, goes_on) == (episode.rewards[t], episode.continues[t])


def test_a_seed_plays_the_same_episode_whatever_runs_beside_it(acted):
    (alone,) = act_episodes(Drift(), TASK, range(52, 53), 6, 9, workers=1, image=32)
    assert np.array_equal(alone.frames, acted[2].frames) and np.array_equal(alone.actions, acted[2].actions)


def test_without_a_teacher_the_played_actions_are_the_intended_ones(acted):
    assert all(np.array_equal(episode.actions, episode.intended) for episode in acted)


def test_a_teacher_says_what_it_would_have_done_in_the_states_that_were_reached():
    (episode,) = act_episodes(Drift(), TASK, range(50, 51), 0, 6, Planner(TASK, candidates=4, seed=3), 1, 32)
    teacher = Planner(TASK, candidates=4, seed=3)
    teacher.reset(1)
    for t in range(6):      # led-to: what is intended in state t stands in row t + 1
        assert np.allclose(teacher.plan(episode.states[None, t])[0], episode.intended[t + 1], atol=1e-5)
    assert not np.allclose(episode.intended, episode.actions, atol=0.1)


def test_an_episode_that_ended_gets_no_more_rows(monkeypatch):
    class Ends:
        "A stand-in of two environments; the first one ends truly with its second step."
        spec = TaskSpec(1)

        def __init__(self, *asked, **more):
            self.t = 0

        __enter__ = lambda self: self
        __exit__ = lambda self, *exception: None
        reset = lambda self: np.zeros((2, 8, 8, 3), np.uint8)
        states = lambda self: np.full((2, 1), float(self.t))

        def step(self, actions):
            self.t += 1
            ended = np.array([self.t >= 2, False])
            return self.reset(), np.ones(2), np.array([float(self.t != 2), 1.0]), ended

    monkeypatch.setattr(acting, "VectorEnv", Ends)
    policy = type("Still", (), {"reset": lambda self, n, first: None, "act": lambda self, frames: np.zeros((2, 1))})
    first, second = act_episodes(policy(), "any", range(2), 0, 4)
    assert (len(first), len(second)) == (3, 5)
    assert first.continues.tolist() == [1, 1, 0] and second.continues.tolist() == [1] * 5


def test_cloned_are_the_episodes_above_the_mean_return():
    episodes = [Episode(np.zeros((3, 1)), np.array([0, r, r])) for r in (0.0, 0.4, 2.0)]
    assert [episode.quality for episode in mark_better(episodes)] == ["poor", "poor", "expert"]
    assert [episode.quality for episode in mark_better(episodes[:1] * 3)] == ["poor"] * 3


def toy_store(path, actions, intended, quality="expert"):
    store = EpisodeStore.create(path, TASK, 1, (2, 3), 0, "latents", "float16")
    for _ in range(4):
        rows = [np.full((9, 1), value, np.float32) for value in (actions, intended)]
        for row in rows:
            row[0] = 0
        store.append(Episode(rows[0], np.zeros(9), intended=rows[1], latents=np.zeros((9, 2, 3)), quality=quality))
    return store.finish() and EpisodeStore.open(path)


def test_rows_are_shared_and_each_source_keeps_its_labels(tmp_path):
    "Old data clones executed actions if it is told so; what was played clones its own `intended`."
    old, new = toy_store(tmp_path / "old.zarr", 0.1, 0.2), toy_store(tmp_path / "new.zarr", 0.3, 0.4)
    batch = agent_batches(old, new, 8, 4, 0.0, "executed", 0.25, seed=0)(0)
    assert batch.actions.shape == (16, 4, 1) and batch.relevant.tolist() == [True] * 8 + [False] * 8
    last = batch.intended[:, -1, 0]
    assert torch.allclose(last[:6], torch.tensor(0.1)) and torch.allclose(last[6:8], torch.tensor(0.4))
    assert torch.allclose(batch.actions[8:14, -1, 0], torch.tensor(0.1))
    assert torch.allclose(batch.actions[14:, -1, 0], torch.tensor(0.3))


def test_played_episodes_of_which_none_is_good_are_not_cloned(tmp_path):
    old, new = toy_store(tmp_path / "old.zarr", 0.1, 0.2), toy_store(tmp_path / "new.zarr", 0.3, 0.4, "poor")
    batch = agent_batches(old, new, 8, 4, 0.0, "intended", 0.5, seed=0)(0)
    assert torch.allclose(batch.intended[:8, -1, 0], torch.tensor(0.2))
    assert torch.allclose(batch.actions[8:, -1, 0], torch.tensor([0.1] * 4 + [0.3] * 4))


def test_windows_clone_executed_actions_when_told_so(tmp_path):
    store = toy_store(tmp_path / "old.zarr", 0.1, 0.2)
    intended, executed = (Windows(store, 4, 2, labels=labels)(0) for labels in ("intended", "executed"))
    assert torch.equal(executed.actions, intended.actions)
    assert torch.allclose(executed.intended[:, -1], torch.tensor(0.1))
    assert torch.allclose(intended.intended[:, -1], torch.tensor(0.2))
    with pytest.raises(UserError, match="'intended' or 'executed'"):
        Windows(store, 4, 2, labels="wished")


def test_the_replay_ratio_decides_the_steps():
    "Frames on which phase 2 trains, for each frame played; phase 3 keeps its share."
    settings = Rounds(episodes=50, decisions=80, replay=40.0)
    preset = round_preset(TINY, settings, 2)
    trained = preset.agent.train.steps * preset.agent.batch * preset.agent.length
    assert abs(trained / (50 * 80) - 40) < 0.1
    share = preset.imagination.train.steps / preset.agent.train.steps
    assert abs(share - TINY.imagination.train.steps / TINY.agent.train.steps) < 0.01
    assert preset.agent.train.seed != round_preset(TINY, settings, 1).agent.train.seed
    for train in (preset.agent.train, preset.imagination.train):           # most of a round has the full rate
        rates = [learning_rate(train, step) for step in range(train.steps)]
        assert np.mean(np.array(rates) == train.lr) > 0.6


def test_phase_3_may_have_a_share_of_its_own():
    settings = Rounds(episodes=50, decisions=80, replay=10.0, imagination=0.7)
    own = round_preset(TINY, settings, 1)
    assert own.agent.train == round_preset(TINY, replace(settings, imagination=None), 1).agent.train
    assert own.imagination.train.steps == round(0.7 * own.agent.train.steps)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("base") / "base", replace(MICRO, threads=1))
    run.train("imagination")
    return run


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    "Two rounds without a stop: their folder."
    folder = tmp_path_factory.mktemp("whole") / "online"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(module, "PIECE", 2)
        monkeypatch.setattr(module, "finish", lambda run: [])
        online(base, folder, TWO)
    return folder


def weights(folder, number):
    return [load_checkpoint(folder / f"round-{number}" / f"{name}.safetensors")[0] for name in ("agent", "imagination")]


@pytest.mark.parametrize("reset", [False, True])
def test_a_round_goes_on_with_the_weights_of_the_one_before(base, tmp_path, monkeypatch, reset):
    asked = {}

    class Enough(Exception):
        pass

    def noted(latents, dynamics, heads, gathered, recent, **settings):
        asked.update(dynamics=dynamics, heads=heads, gathered=gathered, recent=recent, **settings)
        raise Enough

    monkeypatch.setattr(module, "train_agent", noted)
    settings = replace(TWO, reset=reset, recent=0.3)
    own = branch(base, tmp_path / "round-1", "dynamics", round_preset(base.asked, settings, 1))
    with pytest.raises(Enough):
        train_round(base, own, "what was played", settings)
    assert asked["dynamics"] is base.agent[0] and asked["heads"] is (None if reset else base.imagination)
    assert (asked["gathered"], asked["recent"]) == ("what was played", 0.3)
    assert asked["train"].steps == own.preset.agent.train.steps == round(2 * 4 * 12 / (8 * 12))


def test_a_round_is_a_run_folder(base, whole):
    config = read_json(whole / "round-2" / "config.json", "")
    assert config["agent"]["train"]["steps"] == round_preset(MICRO, TWO, 2).agent.train.steps
    run = Run(whole / "round-2", replace(round_preset(base.asked, TWO, 2)), only="evaluation")
    assert run.imagination.config.tasks == (TASK,)


def test_the_rows_say_what_was_played(whole):
    rows = read_json(whole / "rounds.json", "")["rounds"]
    for row in rows:
        store = EpisodeStore.open(whole / f"round-{row['round']}" / "episodes.zarr")
        assert row["frames"] == store.lengths.sum() == 4 * 13
        assert row["return"] == pytest.approx(store.column("rewards").sum() / 4)
        assert store.attributes["tasks"] == [TASK]
    seeds = [EpisodeStore.open(whole / f"round-{k}" / "episodes.zarr").episode(0).seed for k in (1, 2)]
    assert seeds == [200_000, 200_004]


def stop_at(monkeypatch, owner, name, call):
    "The function is interrupted the `call`-th time, after its work."
    real, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        made = real(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return made
    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("owner, name, call", [
    (EpisodeStore, "extend", 1),              # after a piece of the first round's episodes
    (module, "encode_store", 2),              # the second round is encoded, but not trained
    (phases, "fit", 1), (phases, "fit", 4),   # a phase has ended, but is not noted
    (module, "train_round", 1)], ids=str)
def test_stopped_and_continued_bit_for_bit(base, whole, tmp_path, monkeypatch, owner, name, call):
    monkeypatch.setattr(module, "PIECE", 2)
    monkeypatch.setattr(module, "finish", lambda run: [])
    with monkeypatch.context() as during:
        stop_at(during, owner, name, call)
        with pytest.raises(KeyboardInterrupt):
            online(base, tmp_path / "online", TWO)
    online(base, tmp_path / "online", TWO)
    for number in (1, 2):
        for ours, theirs in zip(weights(tmp_path / "online", number), weights(whole, number)):
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert round_row(2, EpisodeStore.open(tmp_path / "online" / "round-2" / "episodes.zarr"), TWO, {}) == round_row(
        2, EpisodeStore.open(whole / "round-2" / "episodes.zarr"), TWO, {})


def test_more_rounds_may_follow_but_no_others(base, whole, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 2)
    monkeypatch.setattr(module, "play_rounds", lambda *given: given)
    assert online(base, whole, replace(TWO, rounds=3))
    with pytest.raises(UserError, match="replay is 2.0 there, 3.0 here"):
        online(base, whole, replace(TWO, replay=3.0))


def test_what_cannot_be_is_said_before_anything_is_played(base, tmp_path, monkeypatch):
    monkeypatch.setattr(acting, "VectorEnv", None)
    for settings, words in ((replace(TWO, first_seed=9_998), "the evaluation"),
                            (replace(TWO, first_seed=int(base.store.episode(0).seed)), "begins an episode of the data")):
        with pytest.raises(UserError, match=words):
            online(base, tmp_path / "online", settings)
    with pytest.raises(UserError, match="its own teacher"):
        Rounds(actor="planner", teacher="planner")
    assert not (tmp_path / "online" / "online.json").exists()


def test_a_piece_is_never_played_twice(tmp_path, acted, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1)
    asked = []

    def play(seeds, first):
        asked.append(first)
        if first == 2 and asked.count(2) == 1:
            raise KeyboardInterrupt
        return [replace(acted[first], seed=seeds[0])]

    with pytest.raises(KeyboardInterrupt):
        gather(tmp_path / "a.zarr", play, range(10, 13))
    store = gather(tmp_path / "a.zarr", play, range(10, 13))
    assert asked == [0, 1, 2, 2] and [store.episode(i).seed for i in range(3)] == [10, 11, 12]
