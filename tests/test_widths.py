"""Tasks of different action widths in one model: what a task lacks is masked, never read as an action of zero."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from dreamer4_nb.core import RowGenerators, UserError
from dreamer4_nb.data.mixtures import Mixture
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.data.tasks import TaskSpec
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.method.agent import AgentConfig, AgentHeads, Policy, agent_loss
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig, dynamics_loss
from dreamer4_nb.method.generation import rollout
from dreamer4_nb.method.imagination import ImaginationConfig, imagine
from dreamer4_nb.method.tokenizer import TokenizerConfig
from dreamer4_nb.runs.chain import Run
from dreamer4_nb.runs.presets import MICRO
from helpers import models

BLOCKS = TransformerConfig(width=32, depth=2, heads=2, kv_heads=1, time_every=2, context=8)
FRAMES = TokenizerConfig(image=16, patch=8, n_latents=2, d_latent=4, transformer=replace(BLOCKS, context=3))
WORLD = DynamicsConfig(n_latents=2, d_latent=4, action_dim=3, mixed_widths=True, n_agent=1, transformer=BLOCKS)
HEADS = AgentConfig(width=32, hidden=16, action_dim=3, action_dims=(3, 1), tasks=("wide", "narrow"), mtp=1)
NARROW = torch.tensor([True, False, False])


@pytest.fixture
def world():
    return models.make_world(FRAMES, WORLD)


@pytest.fixture
def batch():
    "Tasks 0 (three numbers) and 1 (one) in turn; what stands in the padding is not zero."
    batch = models.make_batch(WORLD, rows=4, length=6, relevant=2)
    return replace(batch, live=torch.where(batch.task[:, None] == 1, NARROW, True))


def repadded(batch):
    "The same batch with other numbers in the padding."
    def other(x):
        return torch.where(batch.live[:, None], x, torch.full_like(x, 0.77))
    return replace(batch, actions=other(batch.actions), intended=other(batch.intended))


def heads_that_show():
    torch.manual_seed(0)
    heads = AgentHeads(HEADS)
    models.spread_weights(models.output_layers(heads))
    return heads


def x_hat(world, batch, **changes):
    d = world.dynamics
    given = dict(z=d.normalize(batch.latents), i=torch.full((4, 6), 6), j=torch.full((4, 6), 3), actions=batch.actions,
                 action_known=batch.action_known, agent=torch.zeros(4, 1, 32), live=batch.live) | changes
    return d(**given)[0]


def test_padding_has_no_effect_on_any_loss(world, batch):
    modules = {"dynamics": world.dynamics, "heads": heads_that_show()}
    for loss in (dynamics_loss, agent_loss):
        one, other = (loss(modules, own, torch.Generator().manual_seed(0))[0] for own in (batch, repadded(batch)))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_a_task_lacks_is_not_an_action_of_zero(world, batch):
    zero = torch.where(batch.live[:, None], batch.actions, 0.0)
    masked, as_zero = x_hat(world, batch, actions=zero), x_hat(world, batch, actions=zero, live=torch.ones_like(batch.live))
    narrow = batch.task == 1
    assert torch.equal(masked[~narrow], as_zero[~narrow]) and (masked[narrow] - as_zero[narrow]).abs().max() > 1e-3


def test_unknown_actions_stay_unknown_whatever_the_task_has(world, batch):
    unknown = torch.zeros_like(batch.action_known)
    assert torch.equal(x_hat(world, batch, action_known=unknown), x_hat(world, batch, action_known=unknown, live=~batch.live))


def test_a_model_of_mixed_widths_asks_for_the_mask(world, batch):
    with pytest.raises(UserError, match="pass live"):
        x_hat(world, batch, live=None)
    with pytest.raises(UserError, match="live"):
        x_hat(world, batch, live=batch.live[:, :2])
    plain = Dynamics(replace(WORLD, mixed_widths=False))
    assert "embed_absent.weight" not in plain.state_dict() and "embed_absent.weight" in world.dynamics.state_dict()


def test_dreams_carry_the_mask(world, batch):
    def dreamed(own, live):
        generator = RowGenerators.seeded(0, range(4))
        return rollout(world, own.latents, own.actions, 3, generator, torch.zeros(4, 1, 32), own.action_known, live=live)

    whole = dreamed(batch, batch.live)
    assert torch.equal(whole, dreamed(repadded(batch), batch.live))
    assert not torch.equal(whole[1], dreamed(batch, torch.ones_like(batch.live))[1])
    generator = RowGenerators.seeded(0, range(4))
    small = rollout(world, batch.latents, batch.actions, 3, generator, torch.zeros(4, 1, 32), batch.action_known, budget=1, live=batch.live)
    torch.testing.assert_close(small, whole, atol=1e-5, rtol=1e-5)


def test_imagination_and_the_policy_pass_the_mask(world, batch, monkeypatch):
    heads, seen = heads_that_show(), []
    forward = Dynamics.forward
    monkeypatch.setattr(Dynamics, "forward", lambda self, *args, **kwargs: seen.append(kwargs["live"]) or forward(self, *args, **kwargs))
    imagine(world, heads, heads.policy, batch, ImaginationConfig(context=2, horizon=2), torch.Generator().manual_seed(0))
    policy = Policy(world, heads, task=1)
    policy.reset(2)
    assert policy.act(np.zeros((2, 16, 16, 3), np.uint8)).shape == (2, 1)
    policy.dream.fork(torch.tensor([0]))
    assert len(seen) > 4 and all(live is not None for live in seen)
    assert torch.equal(seen[0], batch.live) and torch.equal(seen[-1], NARROW.expand(2, 3))


def make_store(path, task, width, columns=None, labelled=True, size=64, seed=0):
    rng, store = np.random.default_rng(seed), None
    store = EpisodeStore.create(path, task, columns or max(width, 1), (size, size, 3))
    store.describe(task, TaskSpec(width, frame_rate=20))
    for i in range(8):
        actions = np.zeros((14, columns or max(width, 1)), np.float32)
        actions[1:, :width] = rng.uniform(-1, 1, (13, width))
        frames = rng.integers(0, 255, (14, size, size, 3), dtype=np.uint8)
        store.append(Episode(actions, rng.uniform(size=14), frames, quality="expert", labelled=labelled))
    return store.finish()


def test_windows_and_mixtures_say_what_each_row_has(tmp_path):
    wide, narrow = make_store(tmp_path / "w.zarr", "wide", 3, size=8), make_store(tmp_path / "n.zarr", "narrow", 1, size=8)
    film = make_store(tmp_path / "f.zarr", "film", 0, labelled=False, size=8)
    assert Windows(wide, 6, 4)(0).live is None and Windows(film, 6, 4)(0).live is None
    joined = EpisodeStore.join([wide, narrow, film])
    expected = torch.tensor([[True, True, True], [True, False, False], [True, False, False]])
    for batch in (Windows(joined, 6, 16)(0), Windows(joined.of_task("narrow"), 6, 4)(0), Windows(joined.of_task("wide"), 6, 4)(0)):
        assert torch.equal(batch.live, expected[batch.task]) and not batch.actions[~batch.live[:, None].expand_as(batch.actions)].any()
        assert not batch.action_known[batch.task == 2].any() and batch.to("cpu")[:2].live.shape == (2, 3)
    parts = [(Windows(store, 6, 2), 2, False) for store in (narrow, wide)]
    mixed = Mixture(parts)(0)
    assert torch.equal(mixed.live, torch.tensor([[True, False, False]] * 2 + [[True] * 3] * 2))
    only_wide = Mixture([(Windows(joined.of_task("wide"), 6, 2), 2, True), (Windows(joined.of_task("wide"), 6, 2), 2, False)])(0)
    assert only_wide.live.all()     # and not None: the model asks for it


def test_one_model_learns_a_mixture_of_stores_of_different_widths(tmp_path):
    "Every phase of preset micro, on two stores: three numbers to an action, and one."
    make_store(tmp_path / "a-wide.zarr", "wide", 3)
    make_store(tmp_path / "b-narrow.zarr", "narrow", 1)
    preset = replace(MICRO, tasks=(), data=str(tmp_path / "*-*.zarr"), episodes=None, threads=1)
    run = Run(tmp_path / "run", preset)
    run.train("imagination")
    dynamics, heads = run.agent
    assert run.preset.tasks == ("wide", "narrow") and dynamics.config.mixed_widths and heads.config.action_dims == (3, 1)
    absent = dynamics.embed_absent.weight
    before = run.dynamics.embed_absent.weight
    assert not torch.equal(absent[:, 1:], before[:, 1:])        # it is trained
    again = Run(tmp_path / "run", preset)
    assert torch.equal(again.agent[0].embed_absent.weight.cpu(), absent.cpu())
