"Dreaming: the stream equals the window, context is noised and labelled as it was trained, K + 1 forwards a frame."
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import models

from dreamer4_nb.core import RowGenerators, UserError
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.evaluation.metrics import pick_windows, rollout_report
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.method.dynamics import DynamicsConfig, set_latent_statistics
from dreamer4_nb.method.forcing import Schedule, sample_sequence
from dreamer4_nb.method.generation import WorldModel, rollout
from dreamer4_nb.method.streams import inference_bytes
from dreamer4_nb.method.tokenizer import TokenizerConfig
from dreamer4_nb.training.phases import encode_store

B, PREFIX, LENGTH = 3, 4, 14                # longer than twice the context of 5: the window rolls
THIN = TransformerConfig(width=32, depth=4, heads=2, kv_heads=1, time_every=2, context=5)


def make_world(seed=0, schedule=Schedule(), n_agent=0):
    tokenizer = TokenizerConfig(image=16, n_latents=4, d_latent=6, transformer=replace(THIN, depth=2))
    dynamics = DynamicsConfig(n_latents=4, d_latent=6, n_agent=n_agent, schedule=schedule, transformer=THIN)
    return models.make_world(tokenizer, dynamics, seed)


def make_context(seed=1, b=B, t=LENGTH):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(b, t, 4, 6, generator=g) * 2 - 1, torch.rand(b, t, 2, generator=g) * 2 - 1


def noise(seed=3):
    return models.generator(seed)


def record_calls(world):
    calls = []

    def hook(module, args, kwargs):
        cache = getattr(kwargs["cache"], "cache", kwargs["cache"])   # a place in a cache, or the cache
        calls.append({"z": args[0].clone(), "i": args[1], "j": args[2], "commit": kwargs.get("commit", True), "length": cache.length})

    world.dynamics.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


def by_window(world, latents, actions, prefix):
    "The same dream without a cache: the whole past runs through the model at every step."
    known = torch.ones(actions.shape[:2], dtype=torch.bool)
    known[:, 0] = False
    agent = torch.zeros(len(actions), world.dynamics.config.n_agent, 32)
    f = lambda z, i, j: world.dynamics(z, i, j, actions[:, :z.shape[1]], known[:, :z.shape[1]], agent)[0]
    with torch.no_grad():
        z = sample_sequence(f, world.dynamics.normalize(latents[:, :prefix]), actions.shape[1] - prefix, world.schedule, noise())
    return world.dynamics.denormalize(z)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_stream_equals_the_window_also_when_it_rolls(steps):
    world = make_world(schedule=Schedule(steps=steps), n_agent=1)
    latents, actions = make_context()
    stream = rollout(world, latents, actions, PREFIX, noise(), torch.zeros(B, 1, 32))
    torch.testing.assert_close(stream[:, :PREFIX], latents[:, :PREFIX], atol=0, rtol=0)
    torch.testing.assert_close(stream, by_window(world, latents, actions, PREFIX), atol=2e-4, rtol=1e-4)
    assert stream[:, PREFIX:].std() > 0.1


def test_a_frame_costs_k_steps_and_one_commit():
    for steps in (1, 4):
        world = make_world(schedule=Schedule(steps=steps))
        latents, actions = make_context()
        dream = world.start(B, noise())
        world.observe(dream, latents[:, :PREFIX], actions[:, :PREFIX])
        calls = record_calls(world)
        for t in range(PREFIX, PREFIX + 2):
            world.imagine(dream, actions[:, t])
        assert [call["commit"] for call in calls] == ([False] * steps + [True]) * 2
        assert [call["length"] for call in calls] == [PREFIX] * (steps + 1) + [PREFIX + 1] * (steps + 1)
        assert dream.cache.length == PREFIX + 2
        labels = [(int(call["i"][0, 0]), int(call["j"][0, 0])) for call in calls[:steps + 1]]
        assert labels == world.schedule.used_indices()


def test_the_context_is_noised_as_its_label_says():
    world = make_world()
    latents, actions = make_context(b=64)
    calls = record_calls(world)
    dream = world.start(64, noise())
    world.observe(dream, latents[:, :PREFIX], actions[:, :PREFIX])
    tau = world.schedule.ctx_index / world.schedule.k_max
    assert (calls[0]["i"] == world.schedule.ctx_index).all() and (calls[0]["j"] == world.schedule.ctx_j).all()
    added = calls[0]["z"] - tau * world.dynamics.normalize(latents[:, :PREFIX])
    assert abs(added.std().item() - (1 - tau)) < 0.01 and tau > 0.5
    new = world.imagine(dream, actions[:, PREFIX])
    added = calls[-1]["z"][:, 0] - tau * world.dynamics.normalize(new[:, None])[:, 0]
    inside = new.abs() < 1                                       # latents are kept in [-1, 1] after the commit
    inside = world.dynamics.normalize(inside.float()[:, None])[:, 0] > 0.5
    assert calls[-1]["commit"] and abs(added[inside].std().item() - (1 - tau)) < 0.02


def test_context_noise_changes_what_follows_with_the_cache_on():
    latents, actions = make_context()
    world = make_world()
    dreams = []
    for seed in (3, 4):
        dream = world.start(B, noise(seed))
        world.observe(dream, latents[:, :PREFIX], actions[:, :PREFIX])
        dream.generator = noise(9)                               # from here on both draw the same noise
        dreams.append(world.imagine(dream, actions[:, PREFIX]))
    assert (dreams[0] - dreams[1]).abs().max() > 1e-3


def test_actions_move_the_dream_and_a_hidden_first_action_does_not():
    world = make_world()
    latents, actions = make_context()
    base = rollout(world, latents, actions, PREFIX, noise())
    other = actions.clone()
    other[:, PREFIX] *= -1
    assert (rollout(world, latents, other, PREFIX, noise())[:, PREFIX] - base[:, PREFIX]).abs().max() > 1e-3
    first = actions.clone()
    first[:, 0] *= -1
    torch.testing.assert_close(rollout(world, latents, first, PREFIX, noise()), base, atol=0, rtol=0)


def test_h_of_the_stream_is_h_of_the_window():
    world = make_world(n_agent=1, schedule=Schedule(tau_ctx=0.9))
    latents, actions = make_context()
    agent, known = torch.randn(B, 1, 32, generator=noise(5)), torch.ones(B, LENGTH, dtype=torch.bool)
    calls = record_calls(world)
    dream, hs = world.start(B, noise(), agent), []
    for t in range(LENGTH):
        world.observe(dream, latents[:, t:t + 1], actions[:, t:t + 1], known[:, t:t + 1])
        hs.append(dream.h)
    seen = {k: torch.cat([call[k] for call in calls], 1) for k in ("z", "i", "j")}
    world.dynamics._forward_pre_hooks.clear()
    with torch.no_grad():
        _, h = world.dynamics(*seen.values(), actions, known, agent)
    torch.testing.assert_close(torch.stack(hs, 1), h, atol=1e-4, rtol=1e-4)


def test_a_fork_goes_its_own_way():
    world = make_world()
    latents, actions = make_context()
    dream = world.start(B, noise())
    world.observe(dream, latents[:, :PREFIX], actions[:, :PREFIX])
    fork = dream.fork(torch.tensor([1, 1]))
    before = fork.cache.clone()
    world.imagine(dream, actions[:, PREFIX])
    assert fork.cache.length == PREFIX and all(map(torch.equal, fork.cache.keys, before.keys))
    assert all(torch.equal(ring[0], ring[1]) for ring in fork.cache.keys)
    assert world.imagine(fork, actions[:2, PREFIX]).shape == (2, 4, 6)


def test_dreams_in_chunks_are_the_same_dreams():
    world = make_world(n_agent=1)
    latents, actions = make_context(b=7)
    agent, known = torch.randn(7, 1, 32, generator=noise(5)), torch.ones(7, LENGTH, dtype=torch.bool)
    dream = lambda budget: rollout(world, latents, actions, PREFIX, RowGenerators.seeded(0, range(7)), agent, known, budget)
    whole = dream(None)
    for rows in (1, 3):
        torch.testing.assert_close(dream(rows * inference_bytes(world.dynamics.transformer, PREFIX)), whole, atol=2e-4, rtol=1e-4)
    assert whole[:, PREFIX:].std() > 0.1
    assert len({tuple(row.flatten().tolist()) for row in whole[:, PREFIX:]}) == 7


def test_a_fork_of_rows_with_their_own_noise():
    world = make_world()
    latents, actions = make_context()
    dream = world.start(B, RowGenerators.seeded(0, range(B)))
    world.observe(dream, latents[:, :PREFIX], actions[:, :PREFIX])
    fork = dream.fork(torch.tensor([1, 1]))
    a, b = world.imagine(fork, actions[[1, 1], PREFIX])
    assert (a - b).abs().max() > 1e-3                            # the same past, two futures


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    "Four episodes of a moving square, and their latents."
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    store = EpisodeStore.create(folder / "frames.zarr", "squares", 2, (16, 16, 3))
    for k in range(4):
        frames, actions = np.zeros((20, 16, 16, 3), np.uint8), rng.uniform(-1, 1, (20, 2)).astype(np.float32)
        actions[0] = 0
        for t in range(20):
            frames[t, (2 * k + t) % 12:][:4, 3:7] = 255
        rewards = np.zeros(20, np.float32)
        rewards[12:] = k == 0
        store.append(Episode(actions=actions, rewards=rewards, frames=frames, task="squares", quality="random"))
    store = store.finish()
    return store, encode_store(store, make_world().tokenizer, folder / "latents.zarr")


def test_the_report_has_floors_and_ceiling(stores):
    world = make_world()
    set_latent_statistics(world.dynamics, stores[1].mean, stores[1].std)
    report = rollout_report(world, *stores, prefix=PREFIX, length=12, windows=6, seed=0)
    assert report["windows"] == 6 and report["per_step"].keys() == {"dream", "reconstruction", "copy_last", "mean_frame"}
    for rows in report["per_step"].values():
        assert all(len(values) == 12 - PREFIX and np.isfinite(values).all() for values in rows.values())
    mean = report["mean"]
    assert mean["reconstruction"]["latent_error"] == 0 and mean["dream"]["latent_error"] > 0
    assert abs(mean["mean_frame"]["latent_error"] - 1) < 0.5     # z is standardised
    assert report["action_shuffle_ratio"] > 0 and report["action_shuffle_ratio"] != 1
    assert rollout_report(world, *stores, prefix=PREFIX, length=12, windows=6, seed=0) == report
    in_chunks = rollout_report(world, *stores, prefix=PREFIX, length=12, windows=6, seed=0, budget=1)
    assert in_chunks["mean"]["dream"] == pytest.approx(mean["dream"], rel=1e-4)
    with pytest.raises(UserError, match="lengths"):
        rollout_report(world, stores[0].subset([0, 1]), stores[1], windows=2)


def test_windows_of_a_report_begin_before_the_reward(stores):
    numbers = pick_windows(stores[1], prefix=PREFIX, length=6, windows=1000, seed=0)
    per_episode = 20 - 6 + 1
    first = [n for n in numbers if n < per_episode]              # windows of the episode that is rewarded from frame 12 on
    assert sorted(first) == list(range(12 - PREFIX + 1)) and len(numbers) == 3 * per_episode + len(first)
    assert len({n // per_episode for n in numbers[:4]}) == 4     # spread over the episodes
    with pytest.raises(UserError, match="not solved"):
        pick_windows(stores[1].subset([0]), prefix=14, length=16, windows=3, seed=0)


def test_a_schedule_of_another_k_max_is_refused():
    world = make_world()
    with pytest.raises(UserError, match="k_max"):
        WorldModel(world.tokenizer, world.dynamics, Schedule(k_max=16))
