"The dream as an environment: Gymnasium accepts it, a batch of dreams equals single ones, and dreams begin anew as Gymnasium's own vectors do."
import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers import models

from dreamer4_nb.core import RowGenerators, UserError
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.data.tasks import TaskSpec
from dreamer4_nb.evaluation.dream_env import DreamEnv, DreamFilm, DreamVectorEnv
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig
from dreamer4_nb.method.generation import WorldModel
from dreamer4_nb.method.tokenizer import TokenizerConfig
from dreamer4_nb.training.phases import encode_store

PREFIX = 4
THIN = TransformerConfig(width=32, depth=4, heads=2, kv_heads=1, time_every=2, context=5)
AGENT = torch.ones(1, 1, 32)
DISCRETE = {"one choice": (3,), "two choices": (3, 2)}


def make_world(n_agent=0, action_dim=2):
    tokenizer = TokenizerConfig(image=16, n_latents=4, d_latent=6, transformer=replace(THIN, depth=2))
    dynamics = DynamicsConfig(n_latents=4, d_latent=6, n_agent=n_agent, action_dim=action_dim, transformer=THIN)
    return models.make_world(tokenizer, dynamics)


def latents_of(folder, name, spec):
    "Latents of three episodes of a moving square, of a task with this spec."
    rng = np.random.default_rng(0)
    with_frames = EpisodeStore.create(folder / f"{name}.zarr", name, spec.action_dim, (16, 16, 3))
    with_frames.describe(name, spec)
    for k in range(3):
        frames = np.zeros((20, 16, 16, 3), np.uint8)
        for t in range(20):
            frames[t, (2 * k + t) % 12:][:4, 3:7] = 255
        actions = rng.uniform(-1, 1, (20, spec.action_dim)).astype(np.float32)
        actions[0] = 0
        with_frames.append(Episode(actions=actions, rewards=np.zeros(20), frames=frames, task=name, quality="random"))
    return encode_store(with_frames.finish(), make_world().tokenizer, folder / f"{name}_latents.zarr", progress=False)


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    specs = {"push": TaskSpec(2, frame_rate=12.0)}
    specs |= {name: TaskSpec(sum(choices), "discrete", choices) for name, choices in DISCRETE.items()}
    return {name: latents_of(folder, name, spec) for name, spec in specs.items()}


def reward(h):
    return h.mean((1, 2))


def sometimes(h):
    "A probability of going on that is below one half in about every third frame."
    return torch.sigmoid(20 * (h[:, 0, 31] + 0.75))


def close(one, other):
    "Whether observations agree up to the rounding of larger products."
    far = np.abs(np.asarray(one, np.float64) - other).max()
    return far <= (2 if np.asarray(other).dtype == np.uint8 else 2e-4)


@pytest.mark.parametrize("task", ["push", *DISCRETE])
@pytest.mark.parametrize("observe", ["frames", "latents", "features"])
def test_gymnasium_accepts_it_without_a_warning(codes, task, observe):
    width = codes[task].spec(task).action_dim
    given = {"world": make_world(1, width), "contexts": codes[task], "prefix": PREFIX, "agent": AGENT, "observe": observe,
             "reward": reward, "continues": sometimes}
    gymnasium.register("Dreamed-v0", entry_point=DreamEnv)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make("Dreamed-v0", disable_env_checker=True, **given).unwrapped)
    del gymnasium.registry["Dreamed-v0"]


def test_the_frame_rate_is_that_of_the_task(codes):
    env = DreamEnv(make_world(), codes["push"], prefix=PREFIX)
    assert env.metadata["render_fps"] == 12 and env.render() is None
    assert DreamEnv(make_world(action_dim=3), codes["one choice"], prefix=PREFIX).metadata["render_fps"] == 25
    drawn = DreamEnv(make_world(1), codes["push"], "rgb_array", prefix=PREFIX, agent=AGENT, observe="latents")
    drawn.reset(seed=0)
    before = drawn.render()
    drawn.step(np.zeros(2, np.float32))
    assert before.shape == (16, 16, 3) and not np.array_equal(drawn.render(), before)


def test_the_same_seed_gives_the_same_film(codes):
    env = DreamEnv(make_world(), codes["push"], prefix=PREFIX, length=5)

    def episode(seed):
        frames, done = [env.reset(seed=seed)[0]], False
        while not done:
            frame, reward, terminated, done, _ = env.step(np.array([0.5, -0.5], np.float32))
            frames.append(frame)
            assert reward == 0 and not terminated
        return np.stack(frames)

    first = episode(7)
    assert first.shape == (6, 16, 16, 3) and first.dtype == np.uint8
    assert np.array_equal(first, episode(7)) and not np.array_equal(first, episode(8))
    assert env.reset(options={"context": (2, 3)})[1]["context"].tolist() == [2, 3]


def test_a_single_dream_is_the_film_of_its_noise(codes):
    world = make_world(1)
    env = DreamEnv(world, codes["push"], "rgb_array", prefix=PREFIX, agent=AGENT, observe="features")
    env.reset(seed=3, options={"context": (1, 6)})
    episode = codes["push"].episode(1)
    random = np.random.default_rng(np.random.SeedSequence(3))       # as Gymnasium seeds it
    noise = RowGenerators([torch.Generator().manual_seed(int(random.integers(2 ** 62)))])
    window = slice(6, 6 + PREFIX)
    film = DreamFilm(world, torch.as_tensor(episode.latents).float()[None, window], torch.as_tensor(episode.actions)[None, window],
                     torch.ones(1, PREFIX, dtype=torch.bool), noise, AGENT)
    for action in np.random.default_rng(0).uniform(-1, 1, (9, 2)).astype(np.float32):
        features = env.step(action)[0]
        assert np.array_equal(env.render(), film.step(action)) and np.array_equal(features, film.h[0].flatten().numpy())


@pytest.mark.parametrize("task, observe", [("push", "frames"), ("push", "latents"), ("one choice", "features"), ("two choices", "features")])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_a_batch_equals_single_dreams_in_gymnasium_s_own_vector(codes, task, observe, mode):
    "Through several ends of each row, which come at different times: what Gymnasium does with single dreams is the reference."
    world = make_world(1, codes[task].spec(task).action_dim)
    given = {"prefix": PREFIX, "length": 6, "agent": AGENT, "observe": observe, "reward": reward, "continues": sometimes}
    many = DreamVectorEnv(world, codes[task], 3, autoreset_mode=mode, **given)
    singles = SyncVectorEnv([lambda: DreamEnv(world, codes[task], **given)] * 3, autoreset_mode=mode)
    assert many.single_action_space == singles.single_action_space and many.action_space == singles.action_space
    assert many.observation_space == singles.observation_space
    (seen, info), (wanted, other) = many.reset(seed=4), singles.reset(seed=4)
    assert close(seen, wanted) and np.array_equal(info["context"], other["context"])
    many.action_space.seed(0)
    ends = np.zeros((2, 3), int)
    for _ in range(40):
        actions = many.action_space.sample()
        seen, rewards, terminated, truncated, info = many.step(actions)
        wanted, other_rewards, other_terminated, other_truncated, other = singles.step(actions)
        assert close(seen, wanted) and np.allclose(rewards, other_rewards, atol=1e-4)
        assert np.array_equal(terminated, other_terminated) and np.array_equal(truncated, other_truncated)
        assert many.observation_space.contains(seen)
        assert {name for name in other if name in ("final_obs", "context")} == {name for name in info if name in ("final_obs", "context")}
        for name in ("final_obs", "context"):
            for row in np.flatnonzero(info.get(f"_{name}", ())):
                assert other[f"_{name}"][row] and close(info[name][row], other[name][row])
        ends += [terminated, truncated]
    assert (ends.sum(1) > 1).all() and len(set(ends[0])) > 1       # of both kinds, and not at the same times


def test_dreams_that_end_together_stay_one_batch(codes):
    many = DreamVectorEnv(make_world(), codes["push"], 4, prefix=PREFIX, length=3)
    many.reset(seed=0)
    calls = []
    many.dreams.world.dynamics.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for _ in range(8):
        many.step(np.zeros((4, 2), np.float32))
    assert set(calls) == {4} and len(many.dreams.batches) == 1


def test_an_episode_of_the_dream_can_end(codes):
    chance = iter([0.9, 0.6, 0.4])
    env = DreamEnv(make_world(1), codes["push"], prefix=PREFIX, length=9, agent=AGENT, continues=lambda h: torch.tensor([next(chance)]))
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (True, False)]
    with pytest.raises(UserError, match="reset"):
        env.step(np.zeros(2, np.float32))


def test_actions_of_the_environment_are_those_of_its_tasks(codes):
    "A world of wider actions gets zeros in the dimensions that the contexts' task lacks; choices become one-hot rows."
    for task, action, row in [("push", [0.5, -0.5], [0.5, -0.5, 0, 0, 0]), ("one choice", 2, [0, 0, 1, 0, 0]), ("two choices", [2, 0], [0, 0, 1, 1, 0])]:
        wide = make_world()
        world = WorldModel(wide.tokenizer, Dynamics(replace(wide.dynamics.config, action_dim=5))).eval()
        env = DreamEnv(world, codes[task], prefix=PREFIX)
        at = env.dreams.windows.at
        env.dreams.windows.at = lambda number, at=at: widened(at(number), 5)
        env.reset(seed=0)
        given = []
        world.dynamics.register_forward_pre_hook(lambda module, args, kwargs, given=given: given.append(args[3]), with_kwargs=True)
        env.step(np.array(action, np.float32) if task == "push" else np.array(action))
        assert given[-1][0, 0].tolist() == row


def widened(batch, width):
    "A batch as from a store joined with one of wider actions."
    return replace(batch, actions=torch.nn.functional.pad(batch.actions, (0, width - batch.actions.shape[-1])))


def test_the_environment_names_what_is_wrong(codes):
    world = make_world(1)
    env = DreamEnv(world, codes["push"], prefix=PREFIX, reward=reward, agent=AGENT)
    many = DreamVectorEnv(world, codes["push"], 2, prefix=PREFIX)
    for one in (env, many):
        with pytest.raises(UserError, match="reset"):
            one.step(one.action_space.sample())
    env.reset(seed=0)
    assert env.step(np.zeros(2, np.float32))[1] != 0
    for wrong in (np.zeros(3, np.float32), np.array([0.0, 1.5], np.float32), np.array([np.nan, 0], np.float32)):
        with pytest.raises(UserError, match="action"):
            env.step(wrong)
    discrete = DreamEnv(make_world(action_dim=5), codes["two choices"], prefix=PREFIX)
    discrete.reset(seed=0)
    for wrong in ([3, 0], [0, -1], [0], 0, [0.0, 1.0], "ab"):
        with pytest.raises(UserError, match="whole numbers"):
            discrete.step(wrong)
    with pytest.raises(UserError, match="no context"):
        env.reset(options={"context": (99, 0)})
    for wrong in ({"reward": reward}, {"continues": sometimes}, {"observe": "features"}):
        with pytest.raises(UserError, match="agent"):
            DreamEnv(make_world(), codes["push"], **wrong)
    with pytest.raises(UserError, match="frames, latents or features"):
        DreamEnv(world, codes["push"], observe="pixels")
    with pytest.raises(UserError, match="autoreset_mode"):
        DreamVectorEnv(world, codes["push"], autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(UserError, match="of_task"):
        DreamEnv(make_world(action_dim=3), EpisodeStore.join([codes["push"], codes["one choice"]]))
