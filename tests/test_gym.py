"Any environment by its name: actions as rows, ends and time limits, discrete policies, demonstrations by a rule."
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from dreamer4_nb.core import UserError
from dreamer4_nb.data.acting import act_episodes, as_row, choose_randomly, demonstrate, find_chooser
from dreamer4_nb.data.demonstrations import Collection, collect
from dreamer4_nb.data.envs import VectorEnv, env_spec, make_env
from dreamer4_nb.data.gym_env import as_played, chosen_of, gym_spec, one_hot, shrink, to_native, to_row
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.data.tasks import TaskSpec, known_spec
from dreamer4_nb.evaluation.closed_loop import RandomPolicy, evaluate_policy
from dreamer4_nb.evaluation.metrics import pick_windows
from dreamer4_nb.method.agent import AgentConfig, AgentHeads, Discrete
from dreamer4_nb.runs.chain import Run
from dreamer4_nb.runs.presets import MICRO, TINY, resolve
from dreamer4_nb.training.phases import check_measurable

CARTPOLE = "gymnasium:CartPole-v1"


class Corridor(gymnasium.Env):
    "A walker on five cells; the right end is a goal that ends the task. It draws its cell in red."
    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    observation_space = spaces.Discrete(5)

    def __init__(self, render_mode=None, actions=None):
        self.render_mode = render_mode
        self.action_space = actions or spaces.Discrete(2, start=3)      # 3: left, 4: right

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = int(self.np_random.integers(0, 3))
        return self.cell, {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.cell = int(np.clip(self.cell + (1 if action == 4 else -1), 0, 4))
        return self.cell, float(self.cell == 4), self.cell == 4, False, {}

    def render(self):
        frame = np.zeros((20, 50, 3), np.uint8)
        frame[:, 10 * self.cell:10 * self.cell + 10, 0] = 255
        return frame


class Blind(Corridor):
    metadata = {"render_modes": []}


gymnasium.register("Corridor-v0", entry_point=Corridor, max_episode_steps=6)
gymnasium.register("Blind-v0", entry_point=Blind)
for name, space in {"Endless": spaces.Box(-np.inf, np.inf, (2,)), "Dict": spaces.Dict(a=spaces.Discrete(2))}.items():
    gymnasium.register(f"{name}-v0", entry_point=Corridor, kwargs={"actions": space})
CORRIDOR = "gymnasium:Corridor-v0"
LEFT, RIGHT = np.eye(2, dtype=np.float32)


@pytest.mark.parametrize("space, width", [
    (spaces.Discrete(4), 4), (spaces.Discrete(3, start=-1), 3), (spaces.MultiDiscrete([2, 5]), 7),
    (spaces.MultiDiscrete([[2, 3], [4, 2]]), 11), (spaces.MultiBinary(3), 6), (spaces.MultiBinary([2, 2]), 8),
    (spaces.Box(np.array([-2.0, 0.0]), np.array([2.0, 10.0])), 2), (spaces.Box(-3, 5, (2, 2), np.float64), 4),
    (spaces.Box(0, 255, (3,), np.uint8), 3)], ids=str)
def test_an_action_survives_the_way_to_a_row_and_back(space, width):
    space.seed(0)
    for _ in range(30):
        action = space.sample()
        row = to_row(space, action)
        assert row.shape == (width,) and row.dtype == np.float32 and np.abs(row).max() <= 1 + 1e-6
        again = to_native(space, row)
        assert space.contains(again)
        assert np.allclose(again, action, atol=1e-4 if space.dtype.kind == "f" else 1.01)
        assert space.dtype.kind != "i" or np.array_equal(again, action)


def test_a_box_is_scaled_by_its_bounds():
    box = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))
    assert to_native(box, np.array([-1, -1])).tolist() == [-2, 0]
    assert to_native(box, np.array([0, 0.5])).tolist() == [0, 7.5]
    assert to_row(box, np.array([1.0, 10.0], np.float32)).tolist() == [0.5, 1]


def test_rows_of_choices():
    assert one_hot((2, 3), [1, 2]).tolist() == [0, 1, 0, 0, 1]
    assert chosen_of((2, 3), np.array([0.1, 0.0, -1, -2, -0.5])).tolist() == [0, 2]
    played = as_played(TaskSpec(5, "discrete", (2, 3)), np.array([[0.1, 0.0, -1, -2, -0.5]]))
    assert played.tolist() == [[1, 0, 0, 0, 1]]
    assert as_played(TaskSpec(2), np.array([[1.5, -0.2]])).tolist() == [[1, np.float32(-0.2)]]


def test_the_environment_says_what_a_model_needs_to_know():
    assert gym_spec(CORRIDOR) == TaskSpec(2, "discrete", (2,), frame_rate=4.0, source=f"gymnasium {CORRIDOR}")
    assert gym_spec("ball_in_cup-catch") is None and known_spec(CORRIDOR) == env_spec(CORRIDOR)
    pendulum = env_spec("gymnasium:Pendulum-v1")
    assert (pendulum.kind, pendulum.low, pendulum.high) == ("continuous", (-2.0,), (2.0,))


@pytest.mark.parametrize("task, words", [
    ("gymnasium:Nowhere-v0", "Gymnasium cannot make Nowhere-v0"), ("gymnasium:nopackage:X-v0", "gymnasium:PACKAGE:ID"),
    ("gymnasium:Endless-v0", "no finite bounds"), ("gymnasium:Dict-v0", "expected Box, Discrete"),
    ("dm_control:walker-fly", "no task walker-fly"), ("walker", "gymnasium:ID")])
def test_what_cannot_be_acted_in_is_said_in_one_line(task, words):
    with pytest.raises(UserError, match=words) as found:
        env_spec(task)
    assert "\n" not in str(found.value)


def test_an_environment_that_cannot_draw_is_refused():
    with pytest.raises(UserError, match="cannot draw|render"):
        make_env("gymnasium:Blind-v0", 0).reset()


def test_the_same_steps_as_gymnasium_itself():
    ours, theirs = make_env(CARTPOLE, 7, image=16), gymnasium.make("CartPole-v1", render_mode="rgb_array")
    theirs.reset(seed=7)
    assert np.array_equal(ours.reset(), shrink(theirs.render(), 16))
    for k in range(40):
        frame, reward, goes_on, last = ours.step(one_hot((2,), [k % 2]))
        _, wanted, terminated, truncated, _ = theirs.step(k % 2)
        assert np.array_equal(frame, shrink(theirs.render(), 16))
        assert (reward, goes_on, last) == (wanted, float(not terminated), terminated or truncated)
        if last:
            break


def test_a_true_end_is_not_a_time_limit():
    env = make_env(CORRIDOR, 0, image=8)
    env.reset()
    ends = []
    while not env.over:
        ends.append(env.step(RIGHT)[1:])
    assert ends[-1] == (1.0, 0.0, True) and all(end == (0.0, 1.0, False) for end in ends[:-1])
    env.reset()
    ends = [env.step(LEFT)[2:] for _ in range(6)]               # Gymnasium's own limit
    assert ends == [(1.0, False)] * 5 + [(1.0, True)]
    short = make_env(CORRIDOR, 0, image=8, time_limit_decisions=3)
    short.reset()
    assert [short.step(LEFT)[2:] for _ in range(3)] == [(1.0, False)] * 2 + [(1.0, True)]
    with pytest.raises(UserError, match="reset"):
        short.step(LEFT)


def test_a_decision_may_repeat_its_action():
    twice = make_env(CORRIDOR, 0, image=8, repeat=2)
    twice.reset()
    cell = twice.env.unwrapped.cell
    twice.step(RIGHT)
    assert twice.env.unwrapped.cell == min(cell + 2, 4)


def test_a_seed_decides_the_first_episode_and_the_next_one_goes_on():
    first, second = make_env(CORRIDOR, 5, image=8), make_env(CORRIDOR, 5, image=8)
    for _ in range(5):
        assert np.array_equal(first.reset(), second.reset())
    cells = {make_env(CORRIDOR, seed, image=8).reset().tobytes() for seed in range(12)}
    assert len(cells) == 3


def test_frames_are_squares_with_antialiasing():
    frame = np.zeros((40, 80, 3), np.uint8)
    frame[:, 40:41] = 200
    small = shrink(frame, 8)
    assert small.shape == (8, 8, 3) and small.dtype == np.uint8
    assert 0 < small.max() < 60                                  # a thin line turns pale, it does not vanish
    assert np.array_equal(shrink(frame[:8, :8], 8), frame[:8, :8])


def test_many_environments_equal_one():
    rows = [one_hot((2,), [k % 2]) for k in range(5)]
    with VectorEnv(CARTPOLE, [3, 4], workers=2, image=16) as pair:
        frames = [pair.reset()]
        frames += [pair.step(np.stack([row, row]))[0] for row in rows]
        assert pair.states().shape == (2, 0)
    for k, seed in enumerate((3, 4)):
        alone = make_env(CARTPOLE, seed, image=16)
        assert np.array_equal(alone.reset(), frames[0][k])
        for row, together in zip(rows, frames[1:]):
            assert np.array_equal(alone.step(row)[0], together[k])


def test_any_task_of_the_suite_by_its_name():
    env = make_env("dm_control:pendulum-swingup", 0, image=None)
    env.reset()
    assert env.spec.action_dim == 1 and env.spec.source == "dm_control"
    assert env.step([0.5])[1] >= 0


class Uncertain:
    "A policy whose rows are no one-hot rows."

    def reset(self, n, first=0):
        self.n = n

    def act(self, frames):
        return np.tile([0.4, 0.6], (self.n, 1)).astype(np.float32)


def test_stored_are_the_rows_that_were_played():
    (episode,) = act_episodes(Uncertain(), CARTPOLE, range(1), 0, 6, workers=1, image=16)
    assert not episode.actions[0].any()
    assert np.array_equal(episode.actions[1:], np.tile([0, 1], (len(episode) - 1, 1)))
    assert np.array_equal(episode.intended, episode.actions)


def go_right(env, random):
    return 4


def test_a_rule_demonstrates_with_as_much_noise_as_asked():
    perfect = demonstrate(CORRIDOR, 0, 20, go_right, image=8)
    assert perfect.quality == "expert" and perfect.rewards[-1] == 1 and perfect.continues[-1] == 0
    assert np.array_equal(perfect.actions[1:], np.tile(RIGHT, (len(perfect) - 1, 1)))
    noisy = [demonstrate(CARTPOLE, seed, 30, lambda env, random: 1, 0.5, 8) for seed in range(12)]
    differs = np.concatenate([(one.actions != one.intended).any(1)[1:] for one in noisy])
    assert 0.15 < differs.mean() < 0.35 and noisy[0].quality == "medium"    # half of the random ones agree
    assert all((one.intended[1:] == [0, 1]).all() for one in noisy)


def test_a_rule_may_answer_with_an_action_or_with_a_row():
    env = make_env("gymnasium:Pendulum-v1", 0, image=8)
    assert as_row(env, np.array([1.0], np.float32)).tolist() == [1]         # a row: in [-1, 1]
    assert as_row(env, np.array([0.5])).tolist() == [0.5]
    assert np.abs(as_row(env, choose_randomly(env, np.random.default_rng(0)))).max() <= 1
    discrete = make_env(CORRIDOR, 0, image=8)
    assert as_row(discrete, 4).tolist() == [0, 1] and as_row(discrete, np.int64(3)).tolist() == [1, 0]
    with pytest.raises(UserError, match="no action of"):
        as_row(discrete, 7)


@pytest.mark.parametrize("name", ["nowhere:f", "math:nothing", "math:pi", "math", ""])
def test_a_function_that_is_not_there_is_said(name):
    with pytest.raises(UserError, match="MODULE:FUNCTION|no function"):
        find_chooser(name)


def test_collected_by_a_rule_and_continued(tmp_path, monkeypatch):
    wanted = Collection(CORRIDOR, episodes=5, decisions=8, by=f"{__name__}:go_right", noise=(0.0, 1.0), image=8)
    import dreamer4_nb.data.demonstrations as module
    monkeypatch.setattr(module, "PIECE", 2)
    real, calls = module.demonstrate, []

    def stopped(task, seed, *more):
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(task, seed, *more)

    monkeypatch.setattr(module, "find_chooser", lambda name: go_right)
    monkeypatch.setattr(module, "demonstrate", stopped)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "a.zarr", wanted, 0, False)
    collect(tmp_path / "a.zarr", wanted, 0, False)
    monkeypatch.setattr(module, "demonstrate", real)
    collect(tmp_path / "b.zarr", wanted, 0, False)
    one, other = EpisodeStore.open(tmp_path / "a.zarr"), EpisodeStore.open(tmp_path / "b.zarr")
    assert len(one) == 5 and all(np.array_equal(one.column(name), other.column(name)) for name in ("frames", "actions"))
    assert calls[:6] == [0, 1, 2, 3, 2, 3] and one.spec(CORRIDOR).kind == "discrete"
    assert set(one.qualities) == {"expert", "random"}


def test_who_demonstrates_is_asked_at_the_door(tmp_path):
    with pytest.raises(UserError, match="no score to plan by"):
        Collection(CORRIDOR)
    with pytest.raises(UserError, match="keeps states and no frames"):
        collect(tmp_path / "a.npz", Collection(CORRIDOR, by="random"))
    with pytest.raises(UserError, match="noise"):
        Collection(CORRIDOR, by="random", noise=())


def test_discrete_choices_agree_with_torch():
    logits = torch.randn(6, 5, 1, generator=torch.Generator().manual_seed(0))
    ours, theirs = Discrete(logits, None, (3, 2)), [torch.distributions.Categorical(logits=part)
                                                    for part in logits[..., 0].split((3, 2), -1)]
    drawn = ours.sample(torch.Generator().manual_seed(1))
    assert torch.equal(drawn.split((3, 2), -1)[0].sum(-1), torch.ones(6)) and drawn.shape == (6, 5)
    chosen = [part.argmax(-1) for part in drawn.split((3, 2), -1)]
    assert torch.allclose(ours.log_prob(drawn), sum(one.log_prob(which) for one, which in zip(theirs, chosen)))
    other = torch.randn(6, 5, 1, generator=torch.Generator().manual_seed(2))
    others = [torch.distributions.Categorical(logits=part) for part in other[..., 0].split((3, 2), -1)]
    wanted = sum(torch.distributions.kl_divergence(one, two) for one, two in zip(theirs, others))
    assert torch.allclose(ours.kl(Discrete(other, None, (3, 2))), wanted, atol=1e-6)
    likeliest = torch.cat([torch.nn.functional.one_hot(one.probs.argmax(-1), n) for one, n in zip(theirs, (3, 2))], -1)
    assert torch.equal(ours.mode(), likeliest.float()) and torch.equal(ours.mean(), ours.mode())


def test_a_discrete_head_starts_uniform_and_refuses_other_widths():
    config = AgentConfig(width=8, hidden=8, action_dim=5, policy="discrete", choices=(3, 2), tasks=("a",))
    heads = AgentHeads(config)
    choice = heads.policy(torch.randn(4, 1, 8))
    assert torch.allclose(choice.logits.exp()[0], torch.tensor([1 / 3] * 3 + [0.5] * 2))
    for changes in ({"choices": (3, 3)}, {"choices": ()}, {"policy": "categorical"}):
        with pytest.raises(UserError, match="discrete"):
            replace(config, **changes)


def test_a_preset_takes_its_policy_from_the_data(tmp_path):
    collect(tmp_path / "a.zarr", Collection(CORRIDOR, episodes=2, decisions=4, by="random", image=8), 0, False)
    preset = resolve(replace(TINY, tasks=(CORRIDOR,), data=str(tmp_path / "a.zarr")))
    assert (preset.agent.model.policy, preset.agent.model.choices) == ("discrete", (2,))
    collect(tmp_path / "b.zarr", Collection("gymnasium:Pendulum-v1", episodes=2, decisions=4, by="random", image=8),
            0, False)
    both = resolve(replace(TINY, tasks=(CORRIDOR, "gymnasium:Pendulum-v1"), data=str(tmp_path / "*.zarr")))
    assert (both.agent.model.policy, both.agent.model.action_dims) == ("categorical", (2, 1))


def test_the_random_policy_takes_each_option():
    policy = RandomPolicy(5)
    policy.reset(600)
    taken = as_played(TaskSpec(5, "discrete", (3, 2)), policy.act(None)).mean(0)
    assert np.abs(taken - [1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2]).max() < 0.06


def test_a_policy_is_judged_in_an_environment_of_another_package():
    "The worker processes import what the name says."
    task = "gymnasium:minigrid:MiniGrid-Empty-5x5-v0"
    records = evaluate_policy(RandomPolicy(7), task, range(2), decisions=4, workers=1)
    assert len(records) == 2 and records.returns.max() <= 1


def test_the_whole_chain_on_discrete_actions(tmp_path):
    collect(tmp_path / "a.zarr", Collection(CARTPOLE, episodes=12, decisions=20, by="random", seed=0), 0, False)
    store = EpisodeStore.open(tmp_path / "a.zarr")
    assert (store.column("actions").sum(-1)[1:20] == 1).any()
    run = Run(tmp_path / "run", replace(MICRO, tasks=(CARTPOLE,), data=str(tmp_path / "a.zarr"), threads=1))
    with pytest.raises(UserError, match="expert or medium"):
        run.train("imagination")                                # random episodes are not cloned
    collect(tmp_path / "b.zarr", Collection(CARTPOLE, episodes=12, decisions=20, by=f"{__name__}:push"), 0, False)
    run = Run(tmp_path / "run2", replace(MICRO, tasks=(CARTPOLE,), data=str(tmp_path / "b.zarr"), threads=1))
    run.train("imagination")
    assert run.imagination.policy.config.choices == (2,)


def push(env, random):
    return int(env.env.unwrapped.state[2] > 0)


def test_a_task_that_is_solved_from_the_start_can_be_measured(tmp_path):
    "Balancing begins balanced; a task that begins unsolved must have such a beginning."
    def store(name, rewards):
        kept = EpisodeStore.create(tmp_path / name, CORRIDOR, 1, (2, 3), 0, "latents", "float16")
        for row in rewards:
            kept.append(Episode(np.zeros((12, 1)), np.array(row, float), latents=np.zeros((12, 2, 3))))
        return kept.finish()

    always, never_long = store("a.zarr", [[0] + [1] * 11] * 2), store("b.zarr", [[0, 0] + [1] * 10] * 2)
    check_measurable(always, 4, 8)
    assert len(pick_windows(always, 4, 8, 5, 0)) == 5
    with pytest.raises(UserError, match="not solved"):
        check_measurable(never_long, 4, 8)
