"The agent: who sees whom, which action and reward h predicts, which rows train what, two-hot codes, policy families."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers.models import output_layers, spread_weights

from dreamer4_nb.method.agent import (AgentConfig, AgentHeads, Bernoulli, BinaryHead, Categorical, Gaussian, Policy,
                                      agent_loss, multi_step_targets, masked_mean, only_live, symexp, symlog, two_hot)
from dreamer4_nb.method.checkpoints import load_agent
from dreamer4_nb.training.phases import train_agent
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.core import Batch, UserError, asset, load_checkpoint, save_checkpoint
from dreamer4_nb.inputs import to_dict
from dreamer4_nb.data.stores import EpisodeStore
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig
from dreamer4_nb.method.generation import WorldModel
from dreamer4_nb.data.arrays import atomic_store
from dreamer4_nb.data.stores import Episode
from dreamer4_nb.method.tokenizer import Tokenizer, TokenizerConfig
from dreamer4_nb.training.optimizers import TrainConfig

B, T = 6, 7
WORLD = DynamicsConfig(n_latents=4, d_latent=6, n_agent=1, transformer=TransformerConfig(width=32, depth=4, heads=2, kv_heads=1, time_every=2, context=8))
AGENT = AgentConfig(width=32, hidden=32, mtp=3, tasks=("one", "two"))


def make_modules(seed=0):
    "A small world and heads whose output layers are not near zero, so that what could matter does."
    torch.manual_seed(seed)
    dynamics, heads = Dynamics(WORLD), AgentHeads(AGENT)
    spread_weights([dynamics.to_latent, *output_layers(heads)])
    return {"dynamics": dynamics, "heads": heads}


def make_batch(relevant=B // 2, seed=1):
    g = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(*shape, generator=g) * 2 - 1
    return Batch(frames=None, latents=uniform(B, T, 4, 6), actions=uniform(B, T, 2), action_known=torch.ones(B, T, dtype=torch.bool),
                 intended=uniform(B, T, 2), rewards=uniform(B, T) + 1, continues=torch.ones(B, T), task=torch.arange(B) % 2,
                 relevant=torch.arange(B) < relevant)


def look(modules, batch):
    "(x_hat, h) of a batch at the level of context."
    dynamics, heads = modules["dynamics"], modules["heads"]
    s = dynamics.config.schedule
    index = torch.full((B, T), s.ctx_index), torch.full((B, T), s.ctx_j)
    return dynamics(dynamics.normalize(batch.latents), *index, batch.actions, batch.action_known, heads.tokens(batch.task))


def reach(output, source):
    "Gradient of a random projection of `output` on `source`. (Not of its squares: h leaves an RMSNorm, their sum is constant.)"
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (found,) = torch.autograd.grad((output * direction).sum(), source, retain_graph=True, allow_unused=True)
    return torch.zeros_like(source) if found is None else found


def losses_of(modules, batch):
    return agent_loss(modules, batch, torch.Generator().manual_seed(0))[0]


def test_firewall_both_ways():
    modules, batch = make_modules(), make_batch()
    batch.latents.requires_grad_(), batch.actions.requires_grad_()
    x_hat, h = look(modules, batch)
    task = modules["heads"].task.weight
    assert reach(x_hat, task).abs().max() == 0 and reach(h, task).abs().max() > 1e-3
    for source in (batch.latents, batch.actions):
        assert reach(h, source).abs().max() > 1e-3


def test_another_task_is_the_same_world_for_ever():
    modules, batch = make_modules(), make_batch()
    with torch.no_grad():
        x_hat, h = look(modules, batch)
        batch.task = 1 - batch.task
        x_other, h_other = look(modules, batch)
    assert torch.equal(x_hat, x_other) and (h - h_other).abs().amax((0, 2, 3)).min() > 1e-2


@pytest.mark.parametrize("name", ["actions", "latents"])
def test_h_sees_what_led_to_its_frame_and_nothing_later(name):
    modules, batch = make_modules(), make_batch()
    source = getattr(batch, name).requires_grad_()
    _, h = look(modules, batch)
    for t in range(T):
        sizes = reach(h[:, t], source).flatten(2).abs().amax((0, 2))
        assert sizes[:t + 1].min() > 1e-4 and (t == T - 1 or sizes[t + 1:].max() == 0)   # actions[t + 1] is the one chosen at h_t


def test_h_predicts_the_next_intended_action_and_the_reward_that_arrived():
    "Which entries of intended, rewards and continues are targets of which h, found by changing one frame at a time."
    modules = make_modules()
    for name, loss, first in (("intended", "cloning", 1), ("rewards", "reward", 0), ("continues", "continue", 0)):
        for t in range(T):
            batch = make_batch(relevant=B)
            base = losses_of(modules, batch)[loss]
            getattr(batch, name)[:, t] = 0.3
            changed = (losses_of(modules, batch)[loss] - base).abs() > 1e-6
            assert changed == (t >= first), (name, t)                                     # intended[0] belongs to no h of the window
    x = torch.arange(T)[None]
    for first in (0, 1):
        table, inside = multi_step_targets(x, 4, first)
        for t in range(T):
            for n in range(4):
                assert inside[t, n] == (t + first + n < T)
                assert not inside[t, n] or table[0, t, n] == t + first + n


def test_the_first_prediction_pairs_h_with_the_action_it_chooses():
    "With the loss at distance 0 alone, h_t's target is intended[t + 1]: a policy that knows it has the least loss."
    batch, config = make_batch(relevant=B), replace(AGENT, mtp=0)
    right, _ = multi_step_targets(batch.intended, config.mtp + 1, first=1)
    assert torch.equal(right[:, :-1, 0], batch.intended[:, 1:])


def test_executed_actions_are_not_cloned():
    modules, batch = make_modules(), make_batch(relevant=B)
    intended, actions = batch.intended.requires_grad_(), batch.actions.requires_grad_()
    cloning = losses_of(modules, batch)["cloning"]
    assert reach(cloning, intended)[:, 1:].abs().amax((0, 2)).min() > 0
    last = reach(cloning, actions)[:, -1]
    assert last.abs().max() == 0                                     # the last action leads to the last frame, whose h has no target


def test_each_loss_reads_its_own_rows():
    modules, batch = make_modules(), make_batch(relevant=2)
    batch.latents.requires_grad_()
    losses = losses_of(modules, batch)
    rows = {name: reach(loss, batch.latents).flatten(1).abs().amax(1) > 0 for name, loss in losses.items()}
    assert rows["cloning"].tolist() == batch.relevant.tolist()
    assert rows["dynamics"].tolist() == (~batch.relevant).tolist()
    assert rows["reward"].all() and rows["continue"].all()


def test_the_agent_losses_train_the_transformer_and_the_world_loss_not_the_heads():
    modules = make_modules()
    losses = losses_of(modules, make_batch())
    trunk = modules["dynamics"].embed_latent.weight
    for name in ("cloning", "reward", "continue", "dynamics"):
        assert reach(losses[name], trunk).abs().max() > 0
    for p in modules["heads"].parameters():
        assert reach(losses["dynamics"], p).abs().max() == 0
    assert all(reach(losses[name], p).abs().max() == 0 for name in losses for p in modules["heads"].value.parameters())


def test_batches_of_one_kind_give_no_nan():
    modules = make_modules()
    only_world, only_cloning = losses_of(modules, make_batch(relevant=0)), losses_of(modules, make_batch(relevant=B))
    assert only_world["cloning"] == 0 and "dynamics" not in only_cloning
    assert all(torch.isfinite(x) for x in [*only_world.values(), *only_cloning.values()])
    assert masked_mean(torch.ones(3), torch.zeros(3, dtype=torch.bool)) == 0


def test_two_hot_keeps_the_number():
    bins = symexp(torch.linspace(-6, 6, 63, dtype=torch.float64))
    x = torch.cat([torch.linspace(-402, 402, 501, dtype=torch.float64), torch.linspace(-3, 3, 501, dtype=torch.float64), bins])
    weights = two_hot(x, bins)
    torch.testing.assert_close(weights @ bins, x)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(x))
    assert (weights >= 0).all() and (weights > 0).sum(-1).max() == 2
    used = weights > 0
    assert (used[:, 1:] & used[:, :-1]).any(-1)[used.sum(-1) == 2].all()                  # two neighbours
    assert two_hot(torch.tensor([1e9, -1e9], dtype=torch.float64), bins)[[0, 1], [-1, 0]].tolist() == [1, 1]
    torch.testing.assert_close(symlog(symexp(x / 100)), x / 100)
    assert torch.isfinite(two_hot(x.half(), bins.float())).all()


def test_heads_start_uniform_and_learn_the_mean():
    torch.manual_seed(0)
    heads = AgentHeads(AGENT)
    h = torch.randn(4, 1, 32)
    assert heads.reward(h).abs().max() < 1e-3 and heads.value(h).abs().max() < 1e-3
    torch.testing.assert_close(heads.policy(h).log_prob(torch.zeros(4, 2)), torch.full((4,), -2 * math.log(21)))
    optimizer = torch.optim.Adam(heads.value.parameters(), lr=0.02)
    rewards = torch.tensor([0.0, 0.0, 0.0, 40.0])                                         # for one and the same h: mean 10
    for _ in range(200):
        optimizer.zero_grad()
        heads.value.loss(h[:1].expand(4, 1, 32), rewards[:, None]).mean().backward()
        optimizer.step()
    assert abs(heads.value(h[:1]).item() - 10) < 0.5


@pytest.mark.parametrize("family, n", [(Categorical, 21), (Gaussian, 2), (Bernoulli, 1)])
def test_an_action_dimension_that_a_task_lacks_is_dead(family, n):
    g = torch.Generator().manual_seed(0)
    numbers, other = torch.randn(5, 3, n, generator=g), torch.randn(5, 3, n, generator=g)
    live = torch.tensor([True, True, False]).expand(5, 3)
    numbers.requires_grad_()
    choice, narrow = family(numbers, live), family(numbers[:, :2])
    action = only_live(narrow_to_three(narrow.sample(torch.Generator().manual_seed(1))), live)
    for wide, thin in ((choice.log_prob(action), narrow.log_prob(action[:, :2])),
                       (choice.kl(family(other, live)), narrow.kl(family(other[:, :2])))):
        torch.testing.assert_close(wide, thin, atol=1e-5, rtol=1e-5)
        assert torch.autograd.grad(wide.sum(), numbers, retain_graph=True)[0][:, 2].abs().max() == 0
    for found in (choice.sample(torch.Generator().manual_seed(1)), choice.mean(), choice.mode()):
        assert found.shape == (5, 3) and found[:, 2].abs().max() == 0 < found[:, :2].abs().max()


def narrow_to_three(action):
    return torch.cat([action, torch.full((len(action), 1), 0.5)], 1)


def test_dead_dimensions_are_in_no_loss_and_in_no_action():
    torch.manual_seed(0)
    config = replace(AGENT, action_dims=(2, 1))
    modules = make_modules()
    modules["heads"] = AgentHeads(config)
    torch.nn.init.normal_(modules["heads"].policy.net[-1].weight, std=0.3)
    batch = make_batch(relevant=B)                              # tasks 0, 1, 0, 1, ...
    base = losses_of(modules, batch)["cloning"]
    batch.intended[1::2, :, 1] *= -1
    assert losses_of(modules, batch)["cloning"] == base
    batch.intended[0::2, :, 1] *= -1
    assert losses_of(modules, batch)["cloning"] != base
    policy = Policy(make_policy().world, modules["heads"], task=1)
    policy.reset(3)
    assert policy.act(torch.zeros(3, 16, 16, 3, dtype=torch.uint8)).shape == (3, 1)
    assert policy.action[:, 1].abs().max() == 0
    for wrong in ((2,), (2, 3), (2, 0)):
        with pytest.raises(UserError, match="action_dims"):
            replace(AGENT, action_dims=wrong)


def test_frames_that_do_not_count_are_in_no_agent_loss():
    modules, batch = make_modules(), make_batch()
    batch.valid = torch.arange(T) < torch.tensor([7, 4, 5, 7, 3, 6])[:, None]
    base = losses_of(modules, batch)
    for name, value in (("intended", 0.9), ("rewards", 5.0), ("continues", 0.0)):
        x = getattr(batch, name)
        x[~batch.valid] = value
    found = losses_of(modules, batch)
    for name in ("cloning", "reward", "continue"):
        assert found[name] == base[name], name
    batch.valid = None
    assert all(losses_of(modules, batch)[name] != base[name] for name in ("cloning", "reward", "continue"))


@pytest.fixture(scope="module")
def rich_latents(tmp_path_factory):
    "Twelve episodes of latents in which a step may bring 3,000, more than the default bins reach."
    folder, rng = tmp_path_factory.mktemp("rich"), np.random.default_rng(0)
    with atomic_store(folder / "latents.zarr") as beside:
        store = EpisodeStore.create(beside, "one", 2, (4, 6), 0, "latents", "float16")
        for k in range(12):
            actions = rng.uniform(-1, 1, (9, 2)).astype(np.float32)
            actions[0] = 0
            rewards = np.zeros(9, np.float32)
            rewards[-1] = 3000
            store.append(Episode(actions=actions, rewards=rewards, latents=rng.uniform(-1, 1, (9, 4, 6)), task="one", quality="expert"))
        store.arrays.group.attrs.update({"mean": np.zeros((4, 6)).tolist(), "std": np.ones((4, 6)).tolist()})
        store.finish()
    return EpisodeStore.open(folder / "latents.zarr")


@pytest.fixture(scope="module")
def ending_latents(tmp_path_factory):
    "Twelve episodes that truly end with their last frame, whose latents are all high; and twelve that are cut off before."
    folder, rng = tmp_path_factory.mktemp("ending"), np.random.default_rng(0)
    with atomic_store(folder / "latents.zarr") as beside:
        store = EpisodeStore.create(beside, "one", 2, (4, 6), 0, "latents", "float16")
        for k in range(24):
            actions = rng.uniform(-1, 1, (9, 2)).astype(np.float32)
            actions[0] = 0
            latents, continues = rng.uniform(-0.9, 0.3, (9, 4, 6)), np.ones(9, np.float32)
            if k % 2:
                latents[-1], continues[-1] = 0.9, 0
            store.append(Episode(actions=actions, rewards=np.zeros(9), latents=latents, continues=continues, task="one", quality="expert"))
        store.arrays.group.attrs.update({"mean": np.full((4, 6), -0.25).tolist(), "std": np.full((4, 6), 0.4).tolist()})
        store.finish()
    return EpisodeStore.open(folder / "latents.zarr")


def test_the_continue_head_learns_real_ends_and_not_truncations(ending_latents):
    train = TrainConfig(steps=60, lr=3e-3, warmup=5, log_every=20, dtype="float32", device="cpu")
    config = replace(AGENT, tasks=("one",))
    dynamics, heads = train_agent(ending_latents, Dynamics(replace(WORLD, n_agent=0)), config, train, None, batch=16, length=12)
    batch = Windows(ending_latents, 9, 24).at(np.arange(24))
    s, shape = dynamics.config.schedule, batch.actions.shape[:2]
    index = torch.full(shape, s.ctx_index), torch.full(shape, s.ctx_j)
    with torch.no_grad():
        _, h = dynamics(dynamics.normalize(batch.latents), *index, batch.actions, batch.action_known, heads.tokens(batch.task))
        chance = heads.continues(h)
    ends = batch.continues == 0
    assert ends.sum() == 12 and ends[1::2, -1].all()
    assert chance[ends].max() < 0.5 < chance[~ends].min()


def test_the_reward_head_reaches_the_largest_reward_of_the_data(rich_latents, tmp_path):
    one_step = TrainConfig(steps=2, warmup=1, log_every=1, save_every=1, dtype="float32", device="cpu")
    config = replace(AGENT, tasks=("one",))
    narrow = AgentHeads(config)
    assert narrow.reward.clamped(torch.tensor([1.0, 3000.0])) == 0.5
    _, heads = train_agent(rich_latents, Dynamics(replace(WORLD, n_agent=0)), config, one_step, tmp_path, batch=4, length=6)
    assert heads.reward.bins[-1] >= 3000 * (1 - 1e-5) and heads.reward.clamped(torch.tensor([1.0, 3000.0])) == 0
    _, loaded = load_agent(tmp_path / "agent.safetensors")
    assert torch.equal(loaded.reward.bins, heads.reward.bins) and loaded.config == heads.config


@pytest.mark.parametrize("family, shape", [(Categorical, (2, 21)), (Gaussian, (2, 2)), (Bernoulli, (2, 1))])
def test_kl_is_that_of_samples(family, shape):
    g = torch.Generator().manual_seed(0)
    p, q = torch.randn(shape, generator=g) * 0.5, torch.randn(shape, generator=g) * 0.5
    n = 40000
    many, other = family(p.expand(n, *shape)), family(q.expand(n, *shape))
    a = many.normal.mean + many.normal.stddev * torch.randn(n, 2, generator=g) if family is Gaussian else many.sample(g)
    gap = many.log_prob(a) - other.log_prob(a)
    assert abs(gap.mean() - family(p).kl(family(q))) < 4 * gap.std() / n ** 0.5
    assert abs(family(p).kl(family(p))) < 1e-6 and abs(family(p).kl(family(q)) - family(q).kl(family(p))) > 1e-3


def test_categorical_is_torchs():
    g = torch.Generator().manual_seed(0)
    logits, k = torch.randn(5, 2, 21, generator=g), torch.randint(21, (5, 2), generator=g)
    ours, theirs = Categorical(logits), torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(ours.log_prob(ours.bins[k]), theirs.log_prob(k).sum(-1), atol=1e-4, rtol=1e-4)
    many = Categorical(logits[:1].expand(20000, 2, 21)).sample(g)
    torch.testing.assert_close(many.mean(0), ours.mean()[0], atol=0.02, rtol=0)
    assert torch.equal(ours.mode(), ours.bins[theirs.probs.argmax(-1)])


def make_policy(**changes):
    modules = make_modules()
    torch.manual_seed(0)
    tokenizer = Tokenizer(TokenizerConfig(image=16, n_latents=4, d_latent=6, transformer=TransformerConfig(width=32, depth=2, heads=2, kv_heads=2, time_every=2, context=8)))
    return Policy(WorldModel(tokenizer, modules["dynamics"]).eval(), modules["heads"], **changes)


@pytest.mark.parametrize("readout", ["sample", "mean", "mode"])
def test_the_streaming_policy_repeats_itself_and_looks_back_only(readout):
    policy = make_policy(readout=readout)
    video = torch.randint(0, 256, (5, 3, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()

    def run(frames):
        policy.reset(3)
        return torch.stack([torch.as_tensor(policy.act(x)) for x in frames])

    first, again = run(video), run(video)
    changed = video.copy()
    changed[3:] = 0
    other = run(changed)
    assert first.shape == (5, 3, 2) and first.abs().max() <= 1 and torch.equal(first, again)
    assert torch.equal(first[:3], other[:3]) and (readout != "mean" or not torch.equal(first[3:], other[3:]))


@pytest.mark.parametrize("family", ["categorical", "gaussian", "bernoulli"])
def test_an_environment_acts_the_same_whatever_runs_beside_it(family):
    policy = make_policy()
    torch.manual_seed(0)
    policy.heads = AgentHeads(replace(AGENT, policy=family))
    torch.nn.init.normal_(policy.heads.policy.net[-1].weight, std=0.3)
    video = torch.randint(0, 256, (5, 4, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()

    def run(rows):
        policy.reset(len(rows), rows.start)
        return np.stack([policy.act(x[rows.start:rows.stop]) for x in video], 1)

    together, apart = run(range(4)), np.concatenate([run(range(3)), run(range(3, 4))])
    np.testing.assert_allclose(apart, together, atol=1e-5)
    assert policy.rows(budget=1) == 1 < policy.rows(budget=10**9)


def test_wrong_input_is_named(tmp_path, rich_latents):
    with pytest.raises(UserError, match="categorical"):
        AgentConfig(policy="softmax")
    with pytest.raises(UserError, match="read-out"):
        make_policy(readout="best")
    with pytest.raises(UserError, match="task 7"):
        make_policy(task=7)
    policy = make_policy()
    policy.reset(3)
    with pytest.raises(UserError, match="frames"):
        policy.act(torch.zeros(2, 16, 16, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match="width"):
        train_agent(None, Dynamics(WORLD), replace(AGENT, width=64), TrainConfig(), None)
    with pytest.raises(UserError, match="for keys"):
        train_agent(rich_latents, Dynamics(replace(WORLD, n_agent=0)), replace(AGENT, tasks=("one",), policy="bernoulli"), TrainConfig(), None)
    save_checkpoint(tmp_path / "other.safetensors", {}, {"tokenizer": {}})
    with pytest.raises(UserError, match="not an agent"):
        load_agent(tmp_path / "other.safetensors")
    modules = make_modules()
    state = {f"{name}.{k}": v for name, m in modules.items() for k, v in m.state_dict().items()}
    save_checkpoint(tmp_path / "ours.safetensors", state, {"dynamics": to_dict(WORLD), "heads": to_dict(AGENT)})
    _, heads = load_agent(tmp_path / "ours.safetensors")
    assert all(torch.equal(v, heads.state_dict()[k]) for k, v in modules["heads"].state_dict().items())


def test_a_checkpoint_with_former_names_of_weights_is_read(tmp_path):
    "Of heads, which were attributes before they were entries of a table; also inside the state of a training."
    state, config = load_checkpoint(asset("tiny_agent.safetensors"))
    former = {key.replace("predicted.continue.net.", "continues.").replace("predicted.reward.", "reward."): value
              for key, value in state.items()}
    assert former.keys() != state.keys()
    save_checkpoint(tmp_path / "agent.safetensors", former, config)
    _, now = load_agent(tmp_path / "agent.safetensors")
    _, shipped = load_agent()
    for key, value in shipped.state_dict().items():
        torch.testing.assert_close(now.state_dict()[key], value, atol=0, rtol=0)
    save_checkpoint(tmp_path / "agent.train.safetensors", {f"optimiser.{key}": value for key, value in former.items()}, {})
    assert load_checkpoint(tmp_path / "agent.train.safetensors")[0].keys() == {f"optimiser.{key}" for key in state}


def test_a_new_head_is_one_entry_of_the_table():
    "It gets a loss of its own name, on the column that it names, and gradients reach it and the world."
    modules, batch = make_modules(), make_batch()
    heads = modules["heads"]
    before, _ = agent_loss(modules, batch, torch.Generator().manual_seed(0))
    heads.predicted["ends"] = BinaryHead(AGENT, AGENT.mtp + 1, target="continues")
    after, _ = agent_loss(modules, batch, torch.Generator().manual_seed(0))
    assert after.keys() - before.keys() == {"ends"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after["ends"].item() == pytest.approx(math.log(2), rel=1e-5)        # a new head says one half
    nn.init.normal_(heads.predicted["ends"].net[-1].weight)
    after, _ = agent_loss(modules, batch, torch.Generator().manual_seed(0))
    moved = torch.autograd.grad(after["ends"], [heads.predicted["ends"].net[0].weight, modules["dynamics"].embed_latent.weight])
    assert all(gradient.abs().max() > 0 for gradient in moved)
