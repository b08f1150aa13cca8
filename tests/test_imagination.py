"Imagination training: λ-returns, PMPO, whose reward a dreamed action gets, what learns and what stays frozen, a chain with a known best policy."
import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers.models import generator, output_layers, spread_weights

from dreamer4_nb.method import imagination
from dreamer4_nb.training import phases
from dreamer4_nb.method.agent import (AgentConfig, AgentHeads, Bernoulli, Categorical, PolicyHead,
                                      ScalarHead, covering_range)
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.core import UserError, save_checkpoint, step_generator
from dreamer4_nb.inputs import to_dict
from dreamer4_nb.core import Batch
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig
from dreamer4_nb.method.generation import WorldModel
from dreamer4_nb.method.checkpoints import load_imagination
from dreamer4_nb.method.imagination import (ImaginationConfig, imagination_loss, imagine, lambda_returns,
                                            pmpo_loss)
from dreamer4_nb.training.phases import largest_return, train_imagination
from dreamer4_nb.method.tokenizer import Tokenizer, TokenizerConfig
from dreamer4_nb.training.optimizers import TrainConfig

SHORT = ImaginationConfig(context=3, horizon=4)


def make_agent(seed=0):
    "A real but small world and heads whose outputs are not near zero."
    torch.manual_seed(seed)
    t = TransformerConfig(width=32, depth=2, heads=2, kv_heads=1, time_every=2, context=8)
    world = WorldModel(Tokenizer(TokenizerConfig(image=16, n_latents=4, d_latent=6, transformer=t)), Dynamics(DynamicsConfig(n_latents=4, d_latent=6, n_agent=1, transformer=t)))
    heads = AgentHeads(AgentConfig(width=32, hidden=32, mtp=2))
    spread_weights([*output_layers(heads), world.dynamics.to_latent])
    return world.eval(), heads.eval()


def make_contexts(b=4, t=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Batch(frames=None, latents=torch.rand(b, t, 4, 6, generator=g) * 2 - 1, actions=torch.zeros(b, t, 2), action_known=torch.ones(b, t, dtype=torch.bool),
                 intended=torch.zeros(b, t, 2), rewards=torch.zeros(b, t), continues=torch.ones(b, t), task=torch.zeros(b, dtype=torch.long),
                 relevant=torch.zeros(b, dtype=torch.bool))


def always(value):
    "A policy that always does the same."
    return lambda h, live: SimpleNamespace(sample=lambda generator: torch.full((len(h), 2), value))


def slow_returns(r, c, v, gamma, lam):
    "The definition: a weighted sum of n-step returns, in Python floats."
    out = []
    for t in range(len(r)):
        total, steps = 0.0, len(r) - t
        for n in range(1, steps + 1):
            g_n, discount = 0.0, 1.0
            for k in range(t, t + n):
                g_n += discount * r[k]
                discount *= gamma * c[k]
            total += lam ** (n - 1) * (1 if n == steps else 1 - lam) * (g_n + discount * v[t + n])
        out.append(total)
    return out


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_lambda_returns_are_weighted_n_step_returns(lam):
    r, c, v = (torch.rand(3, n, generator=generator(n), dtype=torch.float64) for n in (8, 8, 9))
    slow = torch.tensor([slow_returns(*(x[i].tolist() for x in (r, c, v)), 0.9, lam) for i in range(3)], dtype=torch.float64)
    torch.testing.assert_close(lambda_returns(r, c, v, 0.9, lam), slow, atol=1e-12, rtol=0)


def test_lambda_returns_bootstrap_from_the_state_after_the_last_action():
    "A walk straight to a goal, exact values: right returns are the values; the last value used is v_H."
    exact = 0.9 ** torch.arange(12, -1, -1, dtype=torch.float64)[None]
    zero, one = torch.zeros(1, 8, dtype=torch.float64), torch.ones(1, 8, dtype=torch.float64)
    for lam in (0.0, 0.95, 1.0):
        torch.testing.assert_close(lambda_returns(zero, one, exact[:, :9], 0.9, lam), exact[:, :8])
    with pytest.raises(UserError, match="values"):
        lambda_returns(zero, one, exact[:, :8], 0.9, 0.95)


def test_an_end_cuts_the_return():
    r, c, v = torch.rand(2, 6, generator=generator()), torch.ones(2, 6), torch.rand(2, 7, generator=generator())
    c[:, 3] = 0
    later, values = r.clone(), v.clone()
    later[:, 4:] += 100
    values[:, 4:] += 100
    torch.testing.assert_close(lambda_returns(later, c, values, 0.9, 0.95)[:, :4], lambda_returns(r, c, v, 0.9, 0.95)[:, :4])


@pytest.mark.parametrize("shift", [0.0, 9.0, -9.0])
@pytest.mark.parametrize("alpha, beta", [(0.5, 0.3), (0.9, 0.0), (0.0, 1.0)])
def test_pmpo_is_its_formula_also_with_an_empty_set(shift, alpha, beta):
    l, a, kl = (f(6, 5, generator=generator(k), dtype=torch.float64) for k, f in enumerate((torch.rand, torch.randn, torch.rand)))
    l, a = (-l).requires_grad_(), a + shift
    good, bad = [x for x, y in zip(l.flatten().tolist(), a.flatten().tolist()) if y >= 0], [x for x, y in zip(l.flatten().tolist(), a.flatten().tolist()) if y < 0]
    expected = beta * kl.mean().item() + ((1 - alpha) * sum(bad) / len(bad) if bad else 0) - (alpha * sum(good) / len(good) if good else 0)
    loss = pmpo_loss(l, a, kl, alpha, beta)
    assert abs(loss.item() - expected) < 1e-12
    (push,) = torch.autograd.grad(loss, l)
    assert torch.isfinite(push).all() and (push[a >= 0] <= 0).all() and (push[a < 0] >= 0).all()


def test_pmpo_needs_only_the_sign_and_zero_counts_as_good():
    l, a, kl = torch.rand(20, generator=generator()), torch.randn(20, generator=generator(1)), torch.zeros(20)
    torch.testing.assert_close(pmpo_loss(l, a, kl), pmpo_loss(l, a * 1000, kl))
    torch.testing.assert_close(pmpo_loss(l, torch.zeros(20), kl), -0.5 * l.mean())


def test_weighted_pmpo_is_that_of_steps_that_come_as_often():
    l, a, kl = (f(40, generator=generator(k), dtype=torch.float64) for k, f in enumerate((torch.rand, torch.randn, torch.rand)))
    often = torch.randint(0, 3, (40,), generator=generator(3))
    repeated = pmpo_loss(*(x.repeat_interleave(often) for x in (l, a, kl)))
    torch.testing.assert_close(pmpo_loss(l, a, kl, weight=often), repeated, atol=1e-12, rtol=0)


def test_what_comes_after_an_end_teaches_nothing():
    world, heads = make_agent()
    learners, seen = make_learners(heads), {}
    real = learners["policy"].forward

    def watched(h, live=None):
        choice = real(h, live)
        if h.ndim == 4:                                           # the loss, not the dream
            choice.logits.retain_grad()
            seen["logits"] = choice.logits
        return choice

    learners["policy"].forward = watched
    heads.continues.forward = lambda h: torch.tensor([1.0, 0.0, 1.0, 1.0]).expand(h.shape[:2]) if h.shape[1] == 4 else torch.ones(h.shape[:2])
    loss_fn = imagination_loss(world, heads, SHORT)
    batch = make_contexts()
    batch.continues[3, -1] = 0                                    # the last real frame of row 3 is an end already
    losses, _ = loss_fn(learners, batch, generator())
    losses["policy"].backward()
    taught = seen["logits"].grad.abs().amax((-2, -1)) > 0
    assert taught.tolist() == [[True, True, False, False]] * 3 + [[False] * 4]


def test_dead_action_dimensions_stay_zero_in_dreams():
    world, heads = make_agent()
    wide = AgentHeads(replace(heads.config, tasks=("two", "one"), action_dims=(2, 1)))
    nn.init.normal_(wide.policy.net[-1].weight, std=0.3)
    batch = make_contexts()
    batch.task = torch.tensor([0, 1, 0, 1])
    actions = imagine(world, wide, wide.policy, batch, SHORT, generator())["actions"]
    assert actions[1::2, :, 1].abs().max() == 0 < min(actions[0::2].abs().max(), actions[1::2, :, 0].abs().max())


def test_compiling_reaches_the_world_that_dreams(monkeypatch):
    world, heads = make_agent()
    compiled = []
    monkeypatch.setattr(imagination, "compile_world", compiled.append)
    imagination_loss(world, heads, SHORT)
    assert not compiled
    imagination_loss(world, heads, SHORT, compile=True)
    assert len(compiled) == 1 and compiled[0] is not world


def bandit(reach, steps=800):
    "Two actions that pay 1.4 or 1.9 for ever, γ = 0.997: chance of the better one after training, and the value."
    torch.manual_seed(0)
    config = AgentConfig(width=4, hidden=64, mtp=0, action_dim=1, policy="bernoulli")
    policy, value = PolicyHead(config), ScalarHead(config, 1, reach)
    optimizer = torch.optim.Adam([{"params": policy.parameters(), "lr": 1e-3}, {"params": value.parameters(), "lr": 1e-2}])
    h, prior = torch.ones(64, 16, 1, 4), Bernoulli(torch.zeros(64, 15, 1, 1))
    for step in range(steps):
        values, now = value(h).detach(), policy(h[:, :-1])
        actions = now.sample(step_generator(0, step))
        returns = lambda_returns(1.4 + 0.5 * actions[..., 0], torch.ones(64, 15), values, 0.997, 0.95)
        loss = pmpo_loss(now.log_prob(actions), returns - values[:, :-1], now.kl(prior)) + value.loss(h[:, :-1], returns[..., None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy(h[:1, :1]).mean().item(), values.mean().item()


def test_a_value_that_can_be_expressed_finds_the_better_action():
    reach = covering_range(2 / (1 - 0.997), 6.0)
    assert math.expm1(reach) == pytest.approx(2 / 0.003) and covering_range(10, 6.0) == 6.0
    better, value = bandit(reach)
    assert better > 0.95 and value == pytest.approx(1.9 / 0.003, rel=0.02)


def test_the_value_head_reaches_the_largest_return_of_the_data(tmp_path, monkeypatch, capsys):
    "Rewards of 2 a decision at the paper's γ: 667, where the default bins end at 402."
    world, heads = make_agent()
    latents = SimpleNamespace(column=lambda name: torch.tensor([0.0, -2.0, 1.0]).numpy())
    assert largest_return(latents, 0.997) == pytest.approx(667, abs=1) and largest_return(latents, 1.0) == 20_000

    class Contexts:
        def __init__(self, *args, **options): pass
        def __call__(self, step): return make_contexts(seed=step)
        def describe(self): return "made up"

    monkeypatch.setattr(phases, "Windows", Contexts)
    few = TrainConfig(steps=2, warmup=1, log_every=1, save_every=1, dtype="float32", device="cpu")
    trained = train_imagination(latents, world, heads, replace(SHORT, gamma=0.997), few, tmp_path, batch=4)
    assert heads.value.bins[-1] < 403 < 666 < trained.value.bins[-1] < 668 and trained.value.clamped(torch.tensor(660.0)) == 0
    assert "667" in capsys.readouterr().out
    loaded = load_imagination(tmp_path / "imagination.safetensors", heads)
    assert torch.equal(loaded.value.bins, trained.value.bins) and loaded.config == trained.config
    same = train_imagination(latents, world, heads, replace(SHORT, gamma=0.95), few, None, batch=4)
    assert same.config == heads.config                            # 40: the bins reach it


def test_the_dream_costs_k_plus_one_forwards_a_frame_and_repeats():
    world, heads = make_agent()
    calls = []
    hook = world.dynamics.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    dream = imagine(world, heads, heads.policy, make_contexts(), SHORT, generator())
    hook.remove()
    assert calls == [3] + 4 * (world.schedule.steps + 1) * [1]
    assert {k: tuple(v.shape) for k, v in dream.items()} == {"h": (4, 5, 1, 32), "actions": (4, 4, 2), "latents": (4, 4, 4, 6), "rewards": (4, 4), "continues": (4, 4)}
    again = imagine(world, heads, heads.policy, make_contexts(), SHORT, generator())
    assert all(torch.equal(again[k], dream[k]) for k in dream)


def test_the_dream_starts_in_its_context():
    world, heads = make_agent()
    first, other = (imagine(world, heads, always(0.0), make_contexts(seed=s), SHORT, generator()) for s in (0, 1))
    assert (first["h"][:, 0] - other["h"][:, 0]).abs().amax((1, 2)).min() > 1e-3


def test_the_reward_of_an_action_is_read_at_the_frame_it_led_to():
    world, heads = make_agent()
    there, back = (imagine(world, heads, always(x), make_contexts(), SHORT, generator()) for x in (1.0, -1.0))
    assert torch.equal(there["h"][:, 0], back["h"][:, 0])
    assert (there["rewards"][:, 0] - back["rewards"][:, 0]).abs().min() > 1e-6
    assert (there["continues"][:, 0] - back["continues"][:, 0]).abs().min() > 1e-8
    torch.testing.assert_close(there["rewards"], heads.reward(there["h"][:, 1:]))


def make_learners(heads): return {"policy": copy.deepcopy(heads.policy), "value": copy.deepcopy(heads.value)}


def test_only_policy_and_value_learn_each_from_its_own_loss():
    world, heads = make_agent()
    learners = make_learners(heads)
    before = [p.clone() for m in (world, heads) for p in m.parameters()]
    losses, _ = imagination_loss(world, heads, SHORT)(learners, make_contexts(), generator())
    pairs = [(loss, name) for loss in losses for name in learners]
    for loss, name in pairs:
        found = torch.autograd.grad(losses[loss], list(learners[name].parameters()), retain_graph=True, allow_unused=True)
        size = sum(0 if x is None else x.abs().sum() for x in found)
        assert (size > 0) == (loss == name), (loss, name)
    sum(losses.values()).backward()
    assert all(p.grad is None for m in (world, heads) for p in m.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, [p for m in (world, heads) for p in m.parameters()]))


def test_the_prior_stays_and_its_kl_pulls():
    world, heads = make_agent()
    learners, loss_fn = make_learners(heads), imagination_loss(world, heads, SHORT)
    assert loss_fn(learners, make_contexts(), generator())[1]["kl"] < 1e-6
    for policy in (learners["policy"], heads.policy):                 # even the caller's own policy may move on
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.1)
    assert loss_fn(learners, make_contexts(), generator())[1]["kl"] > 1e-3
    with_kl, without = (torch.autograd.grad(imagination_loss(*make_agent(), ImaginationConfig(context=3, horizon=4, beta=b))(learners, make_contexts(), generator())[0]["policy"],
                                            learners["policy"].net[-1].weight)[0] for b in (1.0, 0.0))
    assert (with_kl - without).abs().max() > 1e-4                     # a KL to the sampling policy would give exactly none


def test_the_kl_points_from_the_policy_to_the_prior():
    world, heads = make_agent()
    learners = make_learners(heads)
    with torch.no_grad():
        for p in learners["policy"].parameters():
            p.add_(0.2)
    metrics = imagination_loss(world, heads, SHORT)(learners, make_contexts(), generator())[1]
    h = imagine(world, heads, learners["policy"], make_contexts(), SHORT, generator())["h"][:, :-1]
    now, prior = learners["policy"](h), heads.policy(h)
    by_torch = [torch.distributions.Categorical(logits=x.logits) for x in (now, prior)]
    reverse, forward = (torch.distributions.kl_divergence(*pair).sum(-1).mean() for pair in (by_torch, by_torch[::-1]))
    torch.testing.assert_close(metrics["kl"], reverse, atol=1e-4, rtol=1e-4)
    assert abs(reverse - forward) > 1e-3
    assert isinstance(now, Categorical)


N, GAMMA, SLIP = 7, 0.8, 0.1
PAY = torch.tensor([0.5, 0, 0, 0, 0, 0, 1.0])
GOES_ON = torch.tensor([0.0, 1, 1, 1, 1, 1, 0])
BEST = torch.tensor([0.49, 0.45, 0.57, 0.74, 0.96])                   # values of the inner places, by value iteration (notebook 17)
place = lambda s: F.one_hot(s, N).float()[:, None]


class Chain(nn.Module):
    "Both ends pay: from place 1 the best is the near end, from all others the far one. One step in ten slips."
    def start(self, b, source, agent, live=None): return SimpleNamespace(source=source, h=None)
    def observe(self, dream, latents, actions, known): dream.h = place(latents[:, -1, 0, 0].long())
    def imagine(self, dream, action):
        s, slips = dream.h[:, 0].argmax(-1), torch.rand(len(action), generator=dream.source) < SLIP
        dream.h = place(torch.where(GOES_ON[s] > 0, s + torch.where((action[:, 0] > 0) ^ slips, 1, -1), N // 2))
        return dream.h


def test_pmpo_finds_the_known_best_policy():
    torch.manual_seed(0)
    heads = AgentHeads(AgentConfig(width=N, hidden=32, mtp=0, action_dim=1, policy="bernoulli"))
    heads.policy.net[-1].bias.data.fill_(-0.847)                      # a prior that goes left with 70%
    heads.reward.forward = lambda h: h[..., 0, :] @ PAY
    heads.continues.forward = lambda h: h[..., 0, :] @ GOES_ON
    learners = make_learners(heads)
    loss_fn = imagination_loss(Chain(), heads, ImaginationConfig(context=1, horizon=8, gamma=GAMMA))
    optimizer = torch.optim.Adam([p for m in learners.values() for p in m.parameters()], lr=1e-2)
    for step in range(120):
        g = step_generator(0, step)
        batch = make_contexts(32, 1)
        batch.latents = torch.randint(1, N - 1, (32, 1, 1, 1), generator=g).float()
        losses, _ = loss_fn(learners, batch, g)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    inner = place(torch.arange(1, N - 1))
    chance, value = learners["policy"](inner).mean()[:, 0], learners["value"](inner)
    assert (chance > 0.5).tolist() == [False, True, True, True, True]
    torch.testing.assert_close(value, BEST, atol=0.15, rtol=0)


def test_wrong_input_is_named(tmp_path):
    for wrong in ({"gamma": 1.2}, {"lam": -1}, {"alpha": 2}, {"horizon": 0}, {"context": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ImaginationConfig(**wrong)
    _, heads = make_agent()
    config = {"heads": to_dict(heads.config), "imagination": to_dict(SHORT)}
    state = {f"policy.{k}": v + 1 for k, v in heads.policy.state_dict().items()} | {f"value.{k}": v for k, v in heads.value.state_dict().items()}
    save_checkpoint(tmp_path / "ours.safetensors", state, config)
    loaded = load_imagination(tmp_path / "ours.safetensors", heads)
    assert torch.equal(loaded.policy.net[0].weight, heads.policy.net[0].weight + 1) and torch.equal(loaded.reward.net[0].weight, heads.reward.net[0].weight)
    other = AgentHeads(AgentConfig(width=32, hidden=16, mtp=2))
    with pytest.raises(UserError, match="phase 3"):
        load_imagination(tmp_path / "ours.safetensors", other)
    save_checkpoint(tmp_path / "agent.safetensors", state, {"heads": to_dict(heads.config)})
    with pytest.raises(UserError, match="phase 3"):
        load_imagination(tmp_path / "agent.safetensors", heads)
