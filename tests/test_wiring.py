"Wires between parts that are tested by themselves: what each phase, dream and policy hands to the next."
import copy
import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import models
from helpers.models import output_layers, same_weights, spread_weights
from torch import nn

from dreamer4_nb.evaluation import metrics
from dreamer4_nb.method import attention, dynamics, forcing
from dreamer4_nb.method.blocks import empty_cache
from dreamer4_nb.training import phases
from dreamer4_nb.method.agent import AgentConfig, AgentHeads, Policy, only_live
from dreamer4_nb.method.checkpoints import load_agent
from dreamer4_nb.training.phases import train_agent
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.core import load_checkpoint, step_generator
from dreamer4_nb.data.mixtures import Mixture
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.method.checkpoints import load_dynamics
from dreamer4_nb.method.dynamics import (Dynamics, DynamicsConfig, dynamics_layout, set_latent_statistics,
                                         video_loss)
from dreamer4_nb.training.phases import train_dynamics
from dreamer4_nb.evaluation.report import beside_dream, dreams
from dreamer4_nb.method.forcing import Schedule
from dreamer4_nb.evaluation.dream_env import DreamEnv
from dreamer4_nb.evaluation.metrics import rollout_report
from dreamer4_nb.method.generation import WorldModel, rollout
from dreamer4_nb.method.checkpoints import load_imagination
from dreamer4_nb.method.imagination import ImaginationConfig, imagine
from dreamer4_nb.training.phases import train_imagination
from dreamer4_nb.method.shortcut import Grid, bootstrap_target
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.method.checkpoints import load_tokenizer
from dreamer4_nb.method.tokenizer import Tokenizer, TokenizerConfig
from dreamer4_nb.training.phases import encode_store, train_tokenizer
from dreamer4_nb.training.loop import fit
from dreamer4_nb.training.optimizers import TrainConfig

THIN = TransformerConfig(width=32, depth=2, heads=2, kv_heads=1, time_every=2, context=8)
FRAMES = TokenizerConfig(image=16, n_latents=4, d_latent=6, transformer=THIN)
WORLD = DynamicsConfig(n_latents=4, d_latent=6, transformer=THIN)
AGENT = AgentConfig(width=32, hidden=16, mtp=2, tasks=("one", "two"))
SHORT = TrainConfig(steps=2, lr=1e-2, warmup=0, dtype="float32", device="cpu", log_every=1, save_every=1)
EPISODES, LENGTH = 8, 12


def make_world(seed=0, n_agent=1, action_dim=2):
    "A small world whose output layers are not near zero, and whose latents have statistics of their own."
    world = models.make_world(FRAMES, replace(WORLD, n_agent=n_agent, action_dim=action_dim), seed)
    set_latent_statistics(world.dynamics, torch.rand(4, 6) - 0.5, torch.rand(4, 6) + 0.5)
    return world


def make_heads(seed=0, **changes):
    torch.manual_seed(seed)
    heads = AgentHeads(replace(AGENT, **changes))
    spread_weights(output_layers(heads))
    return heads.eval()


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Frames and latents of eight episodes, every other one expert. A reward is the negative number of its
    frame, or 1 where the second half of an odd episode is solved."""
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    store = EpisodeStore.create(folder / "frames.zarr", "squares", 2, (16, 16, 3))
    for k in range(EPISODES):
        actions, intended = (rng.uniform(-1, 1, (LENGTH, 2)).astype(np.float32) for _ in range(2))
        actions[0], intended[0] = 0, 0
        rewards = -(100.0 * k + 1 + np.arange(LENGTH))
        rewards[LENGTH // 2:] = np.where(k % 2, 1, rewards[LENGTH // 2:])
        frames = rng.integers(0, 256, (LENGTH, 16, 16, 3), dtype=np.uint8)
        store.append(Episode(actions=actions, rewards=rewards, intended=intended, frames=frames,
                             task="squares", quality="random" if k % 2 else "expert"))
    store = store.finish()
    return store, encode_store(store, make_world().tokenizer, folder / "latents.zarr")


def episode_of(batch):
    "Which episode each row is of, by the reward of its first frame (that of a window that begins unsolved)."
    return (-batch.rewards[:, 0] / 100).long()


def recorded(monkeypatch, module, name="fit"):
    "The arguments, by name, of every call of a function that a module uses; nothing is run."
    calls, signature = [], inspect.signature(getattr(module, name))

    def note(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return []

    monkeypatch.setattr(module, name, note)
    return calls


# The policy that acts and the window it was trained on

class Shows(nn.Module):
    "A policy whose actions are h."

    def forward(self, h, live):
        return SimpleNamespace(mean=lambda: only_live(torch.tanh(h.flatten(-2)), live))


@pytest.mark.parametrize("action_dim", [32, 20])
def test_the_streaming_policy_reads_the_h_of_the_window(monkeypatch, action_dim):
    """Frame by frame what one pass over the episode gives: encoded whole, as context, each frame with the
    action that was executed before it, the first with none. Context noise is drawn as zero in both."""
    world, heads = make_world(action_dim=32), make_heads(action_dim=32, action_dims=(32, action_dim))
    heads.policy = Shows()
    g = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, 10, 16, 16, 3), generator=g, dtype=torch.uint8)
    monkeypatch.setattr(torch, "randn", lambda *shape, generator=None, **rest: torch.zeros(*shape, **rest))
    policy = Policy(world, heads, "mean", task=1)

    def episode():
        policy.reset(3)
        return torch.stack([torch.as_tensor(policy.act(frames[:, t].numpy())) for t in range(10)], 1)

    chosen = episode()
    n = chosen.shape[-1]
    assert n == action_dim and torch.equal(chosen, episode())
    executed = nn.functional.pad(chosen, (0, 32 - n))           # what the environment lacks is zero
    led_to = torch.cat([torch.zeros(3, 1, 32), executed[:, :-1]], 1)
    known = torch.arange(10).expand(3, 10) > 0

    @torch.no_grad()
    def window(actions=led_to, known=known, task=1):
        s = world.schedule
        z = s.ctx_tau * world.dynamics.normalize(world.tokenizer.encode(frames.movedim(-1, 2) / 255))
        level = torch.full((3, 10), s.ctx_index), torch.full((3, 10), s.ctx_j)
        h = world.dynamics(z, *level, actions, known, heads.tokens(torch.full((3,), task)))[1]
        return torch.tanh(h.flatten(-2))[..., :n]

    torch.testing.assert_close(chosen, window(), atol=1e-5, rtol=0)
    late = torch.cat([torch.zeros(3, 1, 32), led_to[:, :-1]], 1)
    for wrong in (window(late), window(executed), window(known=torch.ones_like(known)), window(task=0)):
        assert (wrong - chosen).abs().max() > 1e-3              # what this test must be able to see


# Dreams begin as data does

def watched(world):
    "Whatever the dynamics are given from now on, by name."
    calls, signature = [], inspect.signature(world.dynamics.forward)

    def note(module, args, kwargs):
        given = signature.bind(*args, **kwargs).arguments
        calls.append({k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in given.items()})

    world.dynamics.register_forward_pre_hook(note, with_kwargs=True)
    return calls


def committed(calls, name):
    "That argument of all frames that were committed, in order, (b, t, ...)."
    return torch.cat([call[name] for call in calls if call.get("commit", True)], 1)


def by_rollout(world, store, latents, first):
    g = torch.Generator().manual_seed(0)
    z, actions = torch.rand(2, 6, 4, 6, generator=g) * 2 - 1, torch.rand(2, 6, 2, generator=g) * 2 - 1
    known = None if first else torch.ones(2, 6, dtype=torch.bool)
    rollout(world, z, actions, 3, g, torch.zeros(2, 1, 32), known)
    return actions


def by_imagine(world, store, latents, first):
    windows, heads = Windows(latents, 3, 2), make_heads()
    batch = windows.at(np.flatnonzero(windows.first_frame == 0 if first else windows.first_frame == 2)[:2])
    config, g = ImaginationConfig(context=3, horizon=3), torch.Generator().manual_seed(0)
    dream = imagine(world, heads, heads.policy, batch, config, g)
    return torch.cat([batch.actions, dream["actions"]], 1)


def by_environment(world, store, latents, first):
    env, start = DreamEnv(world, latents, prefix=3, agent=torch.zeros(1, 1, 32)), 0 if first else 4
    env.reset(seed=0, options={"context": (2, start)})
    steps = np.random.default_rng(0).uniform(-1, 1, (3, 2)).astype(np.float32)
    for action in steps:
        env.step(action)
    return torch.as_tensor(np.concatenate([latents.episode(2).actions[start:start + 3], steps]))[None]


def by_policy(world, store, latents, first):
    policy = Policy(world, make_heads())
    policy.reset(2)
    frames = np.stack([store.episode(k).frames for k in (0, 1)])
    chosen = [policy.act(frames[:, t]) for t in range(6)]
    return torch.as_tensor(np.stack([np.zeros_like(chosen[0]), *chosen[:-1]], 1))


def by_film_of_a_policy(world, store, latents, first):
    episode = store.episode(1)
    beside_dream(Policy(world, make_heads()), episode.frames[:6], episode.actions[1:6], prefix=3)
    return torch.as_tensor(episode.actions[:6])[None]


def by_film_of_a_narrow_task(world, store, latents, first):
    episode = store.episode(1)
    policy = Policy(world, make_heads(action_dims=(2, 1)), task=1)
    beside_dream(policy, episode.frames[:6], episode.actions[1:6, :1], prefix=3)
    return torch.as_tensor(episode.actions[:6] * [1, 0], dtype=torch.float32)[None]     # the rest is zero


def by_films(world, store, latents, first):
    store = store.subset([3])
    dreams(world, store, prefix=3, length=6, n=2)
    return torch.as_tensor(store.episode(0).actions[:6]).expand(2, 6, 2)


INSIDE = [by_rollout, by_imagine, by_environment]       # those that can begin inside an episode
AT_FIRST = [*INSIDE, by_policy, by_film_of_a_policy, by_film_of_a_narrow_task, by_films]
BEGINNINGS = [(f, True) for f in AT_FIRST] + [(f, False) for f in INSIDE]


@pytest.mark.parametrize("dream, first", BEGINNINGS)
def test_a_dream_begins_as_its_data_does(stores, dream, first):
    "No action led to an episode's first frame; every other has the one that led to it, as in the data."
    world = make_world()
    calls = watched(world)
    actions = dream(world, *stores, first)
    known = committed(calls, "action_known")
    assert known.shape == actions.shape[:2]
    assert known[:, 0].eq(not first).all() and known[:, 1:].all()
    given = committed(calls, "actions")
    torch.testing.assert_close(given[:, int(first):], actions[:, int(first):], atol=1e-6, rtol=0)
    tries = [call for call in calls if not call.get("commit", True)]
    assert all(call["action_known"].all() for call in tries)


def test_a_report_dreams_its_windows_and_then_under_another_windows_actions(stores):
    store, latents = stores
    world = make_world()
    calls = watched(world)
    rollout_report(world, store, latents, prefix=3, length=6, windows=3)
    windows = Windows(latents, 6, 1)
    known, actions = committed(calls, "action_known"), committed(calls, "actions")
    assert known.shape == (3, 12)
    true, shuffled = actions[:, :6], actions[:, 6:]
    everything = windows.at(np.arange(windows.n_windows)).actions[:, 1:]
    numbers = [(everything == row[1:]).all(2).all(1).nonzero()[:, 0].tolist() for row in true]
    assert [len(found) for found in numbers] == [1, 1, 1]
    assert known[:, 0].tolist() == (windows.first_frame[np.concatenate(numbers)] > 0).tolist()
    assert torch.equal(shuffled[:, :3], true[:, :3]) and torch.equal(shuffled[:, 3:], true[:, 3:].roll(1, 0))


def test_a_report_measures_the_ball_where_it_is_at_that_frame(tmp_path, monkeypatch):
    "The last frame before the dream, copied, is as far off as the ball, whose state is its pixel, has moved."
    shape = dict(transformer=THIN, image=64, patch=16, n_latents=4, d_latent=6)
    world = WorldModel(Tokenizer(TokenizerConfig(**shape)), make_world().dynamics).eval()
    at = np.stack([10 + 5.0 * np.arange(9), 50 - 3.0 * np.arange(9)], 1)
    v, u = np.mgrid[:64, :64]
    dark, orange = np.array([33, 51, 77]), np.array([242, 148, 71])
    cover = [np.clip(2 - np.hypot(u - x, v - y), 0, 1)[..., None] for x, y in at]
    frames = np.stack([dark + c * (orange - dark) for c in cover]).round().astype(np.uint8)
    task = "ball_in_cup-catch"
    store = EpisodeStore.create(tmp_path / "frames.zarr", task, 2, (64, 64, 3), state_dim=2)
    rows = dict(actions=np.zeros((9, 2)), rewards=np.zeros(9), frames=frames, states=at, task=task)
    store.extend([Episode(**rows), Episode(**rows)])
    store = store.finish()
    latents = encode_store(store, world.tokenizer, tmp_path / "latents.zarr")
    monkeypatch.setattr(metrics, "object_pixels", lambda task, states, *image: states)
    found = rollout_report(world, store, latents, prefix=3, length=9, windows=2)["per_step"]["copy_last"]
    wanted = [np.hypot(5, 3) * (k + 1) for k in range(6)]
    for name in ("ball_error", "ball_error_median"):
        assert found[name] == pytest.approx(wanted, abs=0.4)
    assert found["ball_visible"] == [0.0] * 6 and found["ball_shown"] == [1.0] * 6


def test_what_a_stream_remembers_has_no_gradient():
    model = make_world().dynamics
    g, cache = torch.Generator().manual_seed(0), empty_cache(model.transformer, 2)
    for t in (2, 1):
        index = torch.full((2, t), 3)
        z = torch.randn(2, t, 2, 12, generator=g).requires_grad_()
        actions, known = torch.randn(2, t, 2, generator=g), torch.ones(2, t, dtype=torch.bool)
        x_hat, _ = model(z, index, index, actions, known, torch.zeros(2, 1, 32), cache=cache)
        assert x_hat.requires_grad and not any(ring.requires_grad for ring in cache.keys + cache.values)
    assert cache.length == 3


# What each phase trains on

def test_the_dynamics_get_the_statistics_of_their_latents(stores, tmp_path):
    latents = stores[1]
    trained = train_dynamics(latents, WORLD, SHORT, tmp_path, batch=2, length=4)
    expected = Dynamics(WORLD)
    set_latent_statistics(expected, torch.as_tensor(latents.mean), torch.as_tensor(latents.std))
    state, _ = load_checkpoint(tmp_path / "dynamics.safetensors")
    for name in ("latent_mean", "latent_std"):
        wanted = getattr(expected, name)
        assert torch.equal(state[f"dynamics.{name}"], wanted) and torch.equal(getattr(trained, name), wanted)
    assert latents.mean.abs().max() > 0.01


def test_the_tokenizer_gets_the_mean_frame_of_its_data(stores, tmp_path):
    frames = torch.as_tensor(stores[0].column("frames")).float().movedim(-1, 1) / 255
    trained = train_tokenizer(stores[0], FRAMES, SHORT, tmp_path, batch=9, length=2, slow_steps=1)
    assert (trained.mean_frame[0] - frames.mean(0)).abs().mean() < 0.04
    assert (trained.std_frame[0] - frames.std(0)).abs().mean() < 0.04


def train_each(stores, **given):
    "Every training function on the stores with a batch of 4 and what is `given`, by its name."
    world, heads, folder = make_world(), make_heads(), None
    of_phase_1 = make_world(n_agent=0).dynamics
    train = given.pop("train", SHORT)
    train_tokenizer(stores[0], FRAMES, train, folder, batch=4, length=5, **given)
    train_dynamics(stores[1], WORLD, train, folder, batch=4, length=5, **given)
    train_agent(stores[1], of_phase_1, AGENT, train, folder, batch=4, length=5, **given)
    config = ImaginationConfig(context=5, horizon=2)
    train_imagination(stores[1], world, heads, config, train, folder, batch=4, **given)


def test_every_phase_draws_batches_as_it_was_told(stores, monkeypatch):
    calls = recorded(monkeypatch, phases)
    train_each(stores)
    names = ["tokenizer.draft", "tokenizer", "dynamics", "agent", "imagination"]
    assert [call["name"] for call in calls] == names
    shapes = [tuple(call["batches"](0).actions.shape[:2]) for call in calls]
    assert shapes == [(4, 5), (2, 9), (4, 5), (4, 5), (4, 5)]   # after the draft: a full past, as many frames
    assert [call["config"].normalize for call in calls] == [True, True, True, True, False]
    assert calls[3]["weights"] == {"cloning": 4.0}
    assert [call["batches"](0).frames is not None for call in calls] == [True, True, False, False, False]


@pytest.mark.parametrize("focus", [0.0, 1.0])
def test_every_phase_focuses_on_what_is_not_solved(stores, monkeypatch, focus):
    calls = recorded(monkeypatch, phases)
    train_each(stores, focus=focus)
    draft, slow, world, cloning, dreamed = [call["batches"] for call in calls]
    for batches in (draft, world, dreamed):
        middle = torch.cat([batches(step).rewards[:, 2] for step in range(20)])
        assert (middle <= 0).all() == bool(focus)
    drawn = [cloning(step) for step in range(20)]
    assert any((batch.rewards[~batch.relevant, 2] > 0).any() for batch in drawn)    # that half has no focus


def test_every_phase_has_a_seed_for_weights_and_batches(stores, monkeypatch):
    calls = recorded(monkeypatch, phases)
    for seed in (0, 0, 1):
        train_each(stores, train=replace(SHORT, seed=seed))
    n = len(calls) // 3
    for *runs, name in zip(calls[:n], calls[n:2 * n], calls[2 * n:],
                           ("tokenizer", "tokenizer", "dynamics", "heads", None), strict=True):
        drawn = [torch.cat([run["batches"](step).rewards.flatten() for step in range(3)]) for run in runs]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        if name is not None:                # phase 3 begins with the heads it is given
            begun = [nn.utils.parameters_to_vector(run["modules"][name].parameters()) for run in runs]
            assert torch.equal(begun[0], begun[1]) and not torch.equal(begun[0], begun[2])


def test_the_two_parts_of_a_mixture_draw_apart(stores):
    "Windows of one store and one seed, twice in a mixture: other windows in each part, at every step."
    parts = [(Windows(stores[1], 3, 4, seed=5), 4, relevant) for relevant in (True, False)]
    batch = [Mixture(parts)(step) for step in range(6)]
    assert all(not torch.equal(b.rewards[:4], b.rewards[4:]) for b in batch)
    assert all(b.relevant.tolist() == [True] * 4 + [False] * 4 for b in batch)


def test_phase_2_clones_good_episodes_and_sees_all(stores, monkeypatch):
    calls = recorded(monkeypatch, phases)
    given = make_world(n_agent=0).dynamics
    train_agent(stores[1], given, AGENT, SHORT, None, batch=6, length=4, focus=1.0)
    drawn = [calls[0]["batches"](step) for step in range(30)]
    assert all(batch.relevant.tolist() == [True] * 3 + [False] * 3 for batch in drawn)
    good = {int(k) for batch in drawn for k in episode_of(batch[batch.relevant])}
    assert good == {0, 2, 4, 6}
    numbered = [batch[~batch.relevant & (batch.rewards[:, 0] <= 0)] for batch in drawn]
    assert {int(k) for batch in numbered for k in episode_of(batch)} == set(range(EPISODES))
    begun, heads = calls[0]["modules"]["dynamics"], calls[0]["modules"]["heads"]
    assert begun.config.n_agent == heads.config.n_agent == 1
    assert begun is not given and same_weights(begun, given)


@pytest.mark.parametrize("labels", ["intended", "executed"])
def test_phase_2_clones_the_labels_it_was_told(stores, monkeypatch, labels):
    calls, seen = recorded(monkeypatch, phases), []
    monkeypatch.setattr(phases, "agent_loss", lambda modules, batch, generator: seen.append(batch))
    given = make_world(n_agent=0).dynamics
    train_agent(stores[1], given, AGENT, SHORT, None, batch=4, length=4, labels=labels)
    batch = calls[0]["batches"](0)
    calls[0]["loss_fn"](calls[0]["modules"], batch, None)
    executed = torch.equal(seen[0].intended, batch.actions)
    assert executed == (labels == "executed") and torch.equal(seen[0].actions, batch.actions)


def test_each_part_of_the_tokenizer_has_its_own_slowness(stores, monkeypatch):
    calls = recorded(monkeypatch, phases)
    frames = Windows(stores[0], 9, 3).at([0, 5, 9])

    def losses(slowness):
        "Of one batch under the loss of the first and that of the second part."
        calls.clear()
        config = replace(FRAMES, slowness=slowness)
        train_tokenizer(stores[0], config, SHORT, None, batch=4, length=5, slow_steps=7)
        assert [call["config"].steps for call in calls] == [2, 7]
        assert calls[0]["modules"]["tokenizer"] is calls[1]["modules"]["tokenizer"]
        g = [torch.Generator().manual_seed(0) for _ in calls]
        found = [call["loss_fn"](call["modules"], frames, own)[0] for call, own in zip(calls, g)]
        return [sum(loss.item() for loss in terms.values()) for terms in found]

    slow, fast = losses((0.0, 0.5)), losses((0.5, 0.0))
    assert slow == fast[::-1] and slow[1] > slow[0] * 1.01


def test_the_perceptual_term_counts_as_it_was_told(stores, monkeypatch):
    calls = recorded(monkeypatch, phases)
    for weight in (0.0, 0.3):
        train_tokenizer(stores[0], FRAMES, SHORT, None, batch=4, length=5, perceptual=weight)
    batch = calls[0]["batches"](0)
    for call, weight in zip(calls, (0.0, 0.0, 0.3, 0.3)):
        losses, _ = call["loss_fn"](call["modules"], batch, torch.Generator().manual_seed(0))
        assert call["weights"].get("mse", 1.0) == 1 and ("perceptual" in losses) == (weight > 0)
        assert call["weights"].get("perceptual", weight) == weight


@pytest.fixture(scope="module")
def trained(stores, tmp_path_factory):
    "Two real steps of every phase, on top of each other."
    folder = tmp_path_factory.mktemp("trained")
    frames = train_tokenizer(stores[0], FRAMES, SHORT, folder, batch=6, length=3, slow_steps=2)
    first = train_dynamics(stores[1], WORLD, SHORT, folder, batch=2, length=4)
    before = copy.deepcopy(first)
    world, heads = train_agent(stores[1], first, AGENT, SHORT, folder, batch=2, length=4)
    config = ImaginationConfig(context=3, horizon=2)
    dreamer = train_imagination(stores[1], WorldModel(frames, world), heads, config, SHORT, folder, batch=2)
    return SimpleNamespace(folder=folder, tokenizer=frames, first=first, before=before, world=world,
                           heads=heads, dreamer=dreamer)


def test_what_is_loaded_is_what_was_trained(trained):
    of = lambda name: trained.folder / f"{name}.safetensors"
    world, heads = load_agent(of("agent"))
    pairs = [(trained.tokenizer, load_tokenizer(of("tokenizer"))),
             (trained.first, load_dynamics(of("dynamics"))),
             (trained.world, world),
             (trained.heads, heads),
             (trained.dreamer, load_imagination(of("imagination"), heads))]
    assert all(same_weights(*pair) and not any(module.training for module in pair) for pair in pairs)
    assert all(one.config == other.config for one, other in pairs)


def test_a_phase_trains_its_own_parts_only(trained):
    assert same_weights(trained.first, trained.before)                  # phase 2 has a copy of its own
    assert not same_weights(trained.world, trained.first) and trained.world.config.n_agent == 1
    for part in ("policy", "value"):
        assert not same_weights(getattr(trained.dreamer, part), getattr(trained.heads, part))
    for part in ("reward", "continues", "task"):
        assert same_weights(getattr(trained.dreamer, part), getattr(trained.heads, part))


# The loss of the dynamics and its settings

def make_batch(stores):
    return Windows(stores[1], 6, 1).at([0, 9, 20, 31])


def test_video_loss_hands_on_the_settings_of_its_objective(stores, monkeypatch):
    calls, real, signature = [], dynamics.forcing_loss, inspect.signature(dynamics.forcing_loss)

    def noted(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return real(*args, **kwargs)

    monkeypatch.setattr(dynamics, "forcing_loss", noted)
    schedule = Schedule(k_max=16, steps=2, tau_ctx=0.6)
    config = replace(WORLD, bootstrap_share=0.75, p_context=0.125, clip=2.5, schedule=schedule, weighting="v")
    video_loss(Dynamics(config), make_batch(stores), torch.Generator().manual_seed(0))
    given = calls[0]
    assert (given["bootstrap_share"], given["p_context"], given["clip"]) == (0.75, 0.125, 2.5)
    assert given["weighting"] == "v"
    assert config.schedule in given.values()


def test_the_bound_of_the_bootstrap_targets_is_in_effect(stores, monkeypatch):
    "Targets of the large steps are within the config's bound, those of the smallest are the data as it is."
    targets, real = [], forcing.shortcut_loss

    def noted(x_hat, target, *rest):
        targets.append(target)
        return real(x_hat, target, *rest)

    monkeypatch.setattr(forcing, "shortcut_loss", noted)
    for clip in (0.25, 50.0):
        torch.manual_seed(0)
        model = Dynamics(replace(WORLD, bootstrap_share=0.5, clip=clip))
        nn.init.normal_(model.to_latent.weight, std=1.0)
        video_loss(model, make_batch(stores), torch.Generator().manual_seed(0))
    tight, wide = targets
    bounded = (tight != wide).flatten(2).any(2)
    assert bounded.any() and not bounded.all()
    assert tight[bounded].abs().max() == 0.25 and wide[bounded].abs().max() > 1
    assert tight[~bounded].abs().max() > 0.25


def test_latents_look_at_the_action_of_their_frame():
    "With one look inside a frame there is no way around it: the action moves what is said of the frame."
    model = make_world().dynamics
    layout = dynamics_layout(model.config)
    assert layout.mask()[layout.slice("latent"), layout.slice("action")].all()
    g = torch.Generator().manual_seed(0)
    actions = torch.randn(2, 5, 2, generator=g).requires_grad_()
    indices = torch.full((2, 5), 3), torch.full((2, 5), model.config.schedule.grid.j_min)
    z, known = torch.randn(2, 5, 2, 12, generator=g), torch.ones(2, 5, dtype=torch.bool)
    x_hat, _ = model(z, *indices, actions, known, torch.zeros(2, 1, 32))
    for t in range(5):
        wish = torch.randn(x_hat[:, t].shape, generator=g)
        (found,) = torch.autograd.grad((x_hat[:, t] * wish).sum(), actions, retain_graph=True)
        sizes = found.abs().amax((0, 2))
        assert sizes[t] > 1e-3 and (t == 4 or sizes[t + 1:].max() == 0)


# Two half steps

def slow_target(f, z, i, j, k_max):
    "Eq. 7 for one number in Python floats: two half steps of d = 2**-j from level i / k_max."
    half = k_max // 2 ** (j + 1)
    tau, d = i / k_max, 2.0 ** -j
    b1 = (f(z, i, j + 1) - z) / (1 - tau)
    middle = z + b1 * d / 2
    b2 = (f(middle, i + half, j + 1) - middle) / (1 - tau - d / 2)
    return z + (1 - tau) * (b1 + b2) / 2


def test_a_target_is_two_half_steps_of_the_model():
    grid, asked = Grid(8), []
    pairs = [(i, j) for j in range(grid.n_d) for i in range(0, 8, 8 >> j)]
    i, j = (torch.tensor(x)[None] for x in zip(*pairs))
    z = torch.linspace(-1, 1, len(pairs), dtype=torch.float64)[None, :, None]
    answer = lambda z, i, j: 0.3 * z + 0.05 * i - 0.4 * j + 0.7

    def f(z, i, j):
        asked.append((i[0].tolist(), j[0].tolist()))
        return answer(z, i[..., None], j[..., None])

    found = bootstrap_target(f, z, i, j, grid)[0, :, 0]
    coarse = [b < grid.j_min for _, b in pairs]
    halves = [8 >> b + 1 for _, b in pairs]
    first = [(a, b + 1) if c else (a, b) for (a, b), c in zip(pairs, coarse)]
    second = [(a + h, b + 1) if c else (a, b) for (a, b), c, h in zip(pairs, coarse, halves)]
    assert [list(zip(*call)) for call in asked] == [first, second]
    for value, start, (a, b), c in zip(found, z[0, :, 0], pairs, coarse):
        if c:
            assert value.item() == pytest.approx(slow_target(answer, start.item(), a, b, 8), abs=1e-6)
    bounded = bootstrap_target(f, z, i, j, grid, clip=0.3)[0, :, 0]
    torch.testing.assert_close(bounded, found.clamp(-0.3, 0.3))
    assert found.max() > 0.3 and found.min() < -0.3


# The end of a training run

def test_the_averaged_weights_are_the_final_ones(tmp_path):
    "In the modules and in the checkpoint, against the average of the weights of the same run without one."
    def run(ema, folder=None):
        torch.manual_seed(0)
        module, before = nn.Linear(3, 2), []

        def batches(k):
            before.append(copy.deepcopy(module.state_dict()))       # as they are after k steps
            return torch.randn(4, 3, generator=step_generator(0, k))

        def loss(modules, batch, generator):
            return {"square": (modules["line"](batch) - 1).square().mean()}, {}

        config = replace(SHORT, steps=30, ema=ema)
        fit("line", {"line": module}, loss, batches, config, folder, progress=False)
        return module.state_dict(), before

    last, before = run(0.0)
    weights = before + [last]
    average = copy.deepcopy(weights[0])
    for step in range(1, 31):
        keep = min(0.8, (1 + step) / (10 + step))
        average = {k: keep * x + (1 - keep) * weights[step][k] for k, x in average.items()}
    final, _ = run(0.8, tmp_path)
    saved, _ = load_checkpoint(tmp_path / "line.safetensors")
    for k, wanted in average.items():
        torch.testing.assert_close(final[k], wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(saved[f"line.{k}"], wanted, atol=1e-6, rtol=1e-5)
        assert (wanted - last[k]).abs().max() > 1e-3


# The attention of a GPU, which runs on a CPU as well

MASKS = {"none": None, "of frames": torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) < 0.5,
         "of rows": torch.rand(2, 1, 1, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.5}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("look", [*MASKS, "causal"])
def test_fused_attention_is_the_plain_one(monkeypatch, look, kv_heads):
    "Also its gradients, and in pieces; heads that share keys and values are neighbors in both."
    monkeypatch.setattr(attention, "LARGEST_BATCH", 4)                          # of 6 rows
    g = torch.Generator().manual_seed(2)
    q = torch.randn(2, 3, 4, 5, 8, generator=g).requires_grad_()                # b s heads t d
    k, v = (torch.randn(2, 3, kv_heads, 5, 8, generator=g).requires_grad_() for _ in range(2))
    mask = MASKS.get(look)
    mask = mask if mask is None else mask | torch.eye(5, dtype=torch.bool)      # none is without an answer
    plain = attention.attend(q, k, v, mask, causal=look == "causal")
    fused = attention.attend_fused(q, k, v, mask, look == "causal")
    assert fused.shape == q.shape
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    wish = torch.randn(q.shape, generator=g)
    gradients = [torch.autograd.grad((x * wish).sum(), (q, k, v)) for x in (plain, fused)]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
