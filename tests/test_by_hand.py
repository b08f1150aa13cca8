"Formulas worked out again, slowly: objectives, draws and samplers, attention, the steps of the optimiser."
import copy
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import generator, output_layers, spread_weights
from torch import nn

from dreamer4_nb.method.agent import AgentConfig, AgentHeads, agent_loss, read_agent, two_hot
from dreamer4_nb.method.attention import (RMSNorm, SwiGLU, TransformerConfig, apply_rope, attend, rms_norm,
                                          segment_mask, time_mask)
from dreamer4_nb.core import UserError, pick_device
from dreamer4_nb.core import Batch
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig
from dreamer4_nb.method.flow import expand_as, interpolate, noise_like, velocity_from_x
from dreamer4_nb.method.forcing import Schedule, draw_levels, forcing_loss, noise_context, sample_sequence
from dreamer4_nb.method.generation import WorldModel
from dreamer4_nb.method.imagination import ImaginationConfig, imagination_loss, imagine
from dreamer4_nb.method.shortcut import WEIGHTINGS, Grid, sample_tau_d, shortcut_loss, shortcut_step
from dreamer4_nb.method.tokenizer import (Tokenizer, TokenizerConfig, deviation_weight, gradient_difference,
                                          latent_std_loss, reconstruct, slowness_loss, tokenizer_loss)
from dreamer4_nb.training import optimizers
from dreamer4_nb.training.loop import summarize
from dreamer4_nb.training.optimizers import (LossScale, TrainConfig, learning_rate, make_optimizer,
                                             pick_trainable, training_only)


# Noise, data and velocity

def test_a_path_goes_from_noise_to_data_with_a_level_for_each_frame():
    z0, z1 = (torch.randn(2, 3, 4, generator=generator(k)) for k in (0, 1))
    tau = torch.tensor([[0.0, 0.25, 1.0], [0.5, 1.0, 0.0]])
    z = interpolate(z0, z1, tau)
    for b, t in itertools.product(range(2), range(3)):
        torch.testing.assert_close(z[b, t], (1 - tau[b, t]) * z0[b, t] + tau[b, t] * z1[b, t])
    torch.testing.assert_close(interpolate(z0, z1, 0.25), 0.75 * z0 + 0.25 * z1)
    velocity = velocity_from_x(z1, z, tau.clamp(max=0.5))
    for b, t in itertools.product(range(2), range(3)):
        torch.testing.assert_close(velocity[b, t], (z1[b, t] - z[b, t]) / (1 - min(tau[b, t].item(), 0.5)))
    assert expand_as(tau, z).shape == (2, 3, 1) and expand_as(0.5, z).ndim == 0


def test_noise_is_standard_normal_and_its_generator_s():
    x = torch.zeros(40, 50, dtype=torch.float64)
    noise = noise_like(x, generator(3))
    assert noise.dtype == x.dtype and noise.shape == x.shape
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05
    assert torch.equal(noise, noise_like(x, generator(3)))
    assert not torch.equal(noise, noise_like(x, generator(4)))


def test_a_step_goes_straight_to_the_estimate_and_the_last_one_lands_on_it():
    z, x_hat = (torch.randn(2, 3, 4, generator=generator(k)) for k in (0, 1))
    tau = torch.tensor([[0.0, 0.25, 0.5], [0.75, 0.0, 0.5]])
    d = torch.tensor([[0.5, 0.25, 0.25], [0.25, 1.0, 0.5]])
    stepped = shortcut_step(z, x_hat, tau, d)
    for b, t in itertools.product(range(2), range(3)):
        wanted = z[b, t] + d[b, t] * (x_hat[b, t] - z[b, t]) / (1 - tau[b, t])
        torch.testing.assert_close(stepped[b, t], wanted)
    assert torch.equal(shortcut_step(z, x_hat, 0.75, 0.25), x_hat)
    torch.testing.assert_close(shortcut_step(z, x_hat, 0.5, 0.125), z + 0.25 * (x_hat - z))


@pytest.mark.parametrize("coarse", [False, True])
def test_levels_are_drawn_on_the_grid_each_as_often(coarse):
    grid, n = Grid(8), 24_000
    i, j = sample_tau_d(grid, (n // 4, 4), generator(), coarse=coarse)
    assert i.shape == j.shape == (n // 4, 4)
    sizes = range(3 if coarse else 4)
    found = Counter(zip(i.flatten().tolist(), j.flatten().tolist()))
    expected = {(k * 8 // 2 ** b, b): n / len(sizes) / 2 ** b for b in sizes for k in range(2 ** b)}
    assert found.keys() == expected.keys()
    assert all(abs(found[pair] - share) < 5 * math.sqrt(share) for pair, share in expected.items())


def test_levels_go_to_the_device_that_is_asked_for():
    "A generator of the CPU draws for any device; without a device they stay with the generator."
    for draw in (lambda **kw: sample_tau_d(Grid(8), (2, 3), generator(), **kw),
                 lambda **kw: draw_levels((2, 3), Schedule(), generator(), 0.5, 0.5, **kw)):
        assert [x.device.type for x in draw(device="meta")[:2]] == ["meta", "meta"]
        assert [x.device.type for x in draw()[:2]] == ["cpu", "cpu"]


def test_the_grid_in_numbers():
    grid = Grid(16)
    assert (grid.n_d, grid.j_min, grid.d_min) == (5, 4, 1 / 16)
    js = torch.arange(5)
    assert [grid.stride(j) for j in range(5)] == grid.stride(js).tolist() == [16, 8, 4, 2, 1]
    sizes = [1, 0.5, 0.25, 0.125, 0.0625]
    assert grid.d(js).tolist() == sizes and [grid.j_of(d) for d in sizes] == list(range(5))
    assert grid.tau(torch.tensor([0, 4, 15])).tolist() == [0, 0.25, 0.9375]
    schedule = Schedule(k_max=16, steps=4, tau_ctx=0.9)
    assert schedule.sampling_indices() == [(0, 2), (4, 2), (8, 2), (12, 2)]
    assert (schedule.ctx_index, schedule.ctx_j, schedule.ctx_tau) == (14, 4, 14 / 16)
    assert schedule.used_indices() == schedule.sampling_indices() + [(14, 4)]
    assert Schedule(k_max=4, steps=4, tau_ctx=0.999).ctx_index == 3


# The objective

WEIGHTS = {"ramp": lambda tau: 0.9 * tau + 0.1, "x": lambda tau: 1.0, "v": lambda tau: 1 / (1 - tau) ** 2}


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_a_squared_error_counts_by_its_level(weighting):
    x_hat, target = (torch.randn(2, 3, 4, 5, generator=generator(k)) for k in (0, 1))
    tau = torch.tensor([[0.0, 0.25, 0.5], [0.75, 0.875, 0.125]])
    loss = shortcut_loss(x_hat, target, tau, WEIGHTINGS[weighting])
    for b, t in itertools.product(range(2), range(3)):
        pairs = zip(x_hat[b, t].flatten().tolist(), target[b, t].flatten().tolist())
        squares = [(p - q) ** 2 for p, q in pairs]
        wanted = WEIGHTS[weighting](tau[b, t].item()) * sum(squares) / len(squares)
        assert loss[b, t].item() == pytest.approx(wanted, rel=1e-5)
    if weighting == "ramp":
        assert torch.equal(loss, shortcut_loss(x_hat, target, tau))


def toy_answer(z, i, j):
    "What stands for the network: of each frame alone, and of its indices."
    return 0.4 * z.flip(-1) + (0.05 * i - 0.2 * j + 0.3)[(...,) + (None,) * (z.ndim - 2)]


@pytest.mark.parametrize("share, p_context, weighting", [
    (0.5, 0.0, "ramp"), (0.0, 0.0, "ramp"), (1.0, 0.0, "ramp"), (0.5, 0.4, "ramp"), (0.5, 0.0, "x"), (0.5, 0.0, "v")])
def test_the_objective_is_that_of_every_frame_as_it_was_seen(share, p_context, weighting):
    """From what the network is shown: noise and data at the level it is told. A frame at d_min is scored
    against the data, every other against two half steps, clipped. Each group's mean and plain errors."""
    schedule, clip = Schedule(k_max=8, steps=4, tau_ctx=0.8), 0.9
    z1, calls = torch.randn(8, 6, 3, 4, generator=generator(1)), []

    def f(z, i, j, rows):
        calls.append((z.detach(), i, j))
        return toy_answer(z, i, j)

    losses, metrics = forcing_loss(f, z1, schedule, generator(2), share, p_context, clip, weighting=weighting)
    z, i, j = calls[-1]                                         # the student, which sees all rows
    assert z.shape == z1.shape
    tau = i / 8
    noise = (z - tau[..., None, None] * z1) / (1 - tau)[..., None, None]
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    found = {"flow": [], "bootstrap": [], "flow_mse": [], "bootstrap_mse": []}
    for b, t in itertools.product(range(8), range(6)):
        answer = lambda x, i, j: toy_answer(x[None, None], torch.tensor([[i]]), torch.tensor([[j]]))[0, 0]
        now, level, own_j, target = z[b, t], tau[b, t].item(), j[b, t].item(), z1[b, t]
        half = 2.0 ** -(own_j + 1)
        if own_j < 3:
            first = (answer(now, 8 * level, own_j + 1) - now) / (1 - level)
            middle = now + first * half
            second = (answer(middle, 8 * (level + half), own_j + 1) - middle) / (1 - level - half)
            target = (now + (1 - level) * (first + second) / 2).clamp(-clip, clip)
        error = (answer(now, 8 * level, own_j) - target).square().mean().item()
        kind = "bootstrap" if own_j < 3 else "flow"
        found[kind].append(WEIGHTS[weighting](level) * error)
        found[f"{kind}_mse"].append(error)
    for kind, values in found.items():
        value = losses[kind] if kind in losses else metrics[kind]
        assert value.item() == pytest.approx(sum(values) / max(len(values), 1), rel=1e-4), kind
    assert metrics["bootstrap_share"].item() == pytest.approx(len(found["bootstrap"]) / 48)
    at_context = (i == schedule.ctx_index) & (j == schedule.ctx_j)
    assert not p_context or 0.25 < at_context.float().mean() < 0.7
    assert bool(found["bootstrap"]) == (share > 0) and (share == 1 or found["flow"])


def test_a_sequence_is_continued_frame_by_frame_on_noised_context():
    schedule, calls = Schedule(k_max=8, steps=2, tau_ctx=0.75), []
    prefix = torch.randn(2, 3, 4, generator=generator(1))

    def f(z, i, j):
        calls.append((z.clone(), i.clone(), j.clone()))
        return toy_answer(z, i, j)

    out = sample_sequence(f, prefix, 2, schedule, generator(2))
    assert out.shape == (2, 5, 4) and torch.equal(out[:, :3], prefix)
    assert [z.shape[1] for z, _, _ in calls] == [4, 4, 5, 5]
    for z, i, j in calls:
        assert (i[:, :-1] == 6).all() and (j[:, :-1] == 3).all() and torch.equal(z[:, :3], calls[0][0][:, :3])
    assert [(int(i[0, -1]), int(j[0, -1])) for _, i, j in calls] == 2 * [(0, 1), (4, 1)]
    for frame in (3, 4):
        (first, i, j), (second, i2, j2) = calls[2 * (frame - 3):2 * (frame - 3) + 2]
        x_hat = toy_answer(first, i, j)[:, -1]
        torch.testing.assert_close(second[:, -1], first[:, -1] + 0.5 * (x_hat - first[:, -1]))
        last = toy_answer(second, i2, j2)[:, -1]                # the last step lands on it
        torch.testing.assert_close(out[:, frame], last)
    past, kept = calls[2][0][:, 3], 0.75 * out[:, 3]
    assert 0.05 < (past - kept).std() < 0.5                     # a quarter of noise on what became past
    many = torch.ones(4000, 1)
    context = noise_context(many, schedule, generator(3))
    assert abs(context.mean() - 0.75) < 0.02 and abs(context.std() - 0.25) < 0.02


# Attention

@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("look", ["all", "mask", "causal"])
def test_attention_is_a_weighted_mean_head_by_head(look, softcap):
    q, k, v = (torch.randn(2, heads, 5, 6, generator=generator(heads)) for heads in (4, 2, 2))
    mask = torch.rand(2, 1, 5, 5, generator=generator(9)) < 0.6
    mask = mask | torch.eye(5, dtype=torch.bool)
    found = attend(q, k, v, mask if look == "mask" else None, softcap, look == "causal")
    for b, head, n in itertools.product(range(2), range(4), range(5)):
        logits = [float(q[b, head, n] @ k[b, head // 2, m]) / math.sqrt(6) for m in range(5)]
        if softcap:
            logits = [softcap * math.tanh(x / softcap) for x in logits]
        allowed = {"all": [True] * 5, "causal": [m <= n for m in range(5)], "mask": mask[b, 0, n].tolist()}
        seen = [m for m in range(5) if allowed[look][m]]
        shares = [math.exp(logits[m]) for m in seen]
        wanted = sum(share * v[b, head // 2, m] for share, m in zip(shares, seen)) / sum(shares)
        torch.testing.assert_close(found[b, head, n], wanted, atol=1e-5, rtol=1e-5)


def test_a_norm_and_its_gradient():
    x, gain = torch.randn(3, 4, 6, generator=generator()) * 3, torch.rand(4, 6, generator=generator(1)) + 0.5
    x.requires_grad_(), gain.requires_grad_()
    plain = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    wish = torch.randn(x.shape, generator=generator(2))
    both = rms_norm(x, gain), plain
    gradients = [torch.autograd.grad((y * wish).sum(), (x, gain), retain_graph=True) for y in both]
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rms_norm(x, gain), plain, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, gain), plain, atol=1e-5, rtol=1e-5)
        assert torch.equal(rms_norm(0 * x, gain), 0 * x)
        layer = RMSNorm(4, 6)
        layer.gain.copy_(gain.flatten())
        torch.testing.assert_close(layer(x), plain, atol=1e-5, rtol=1e-5)


def test_a_gated_mlp():
    torch.manual_seed(0)
    layer, x = SwiGLU(4, 6), torch.randn(3, 4)
    gate, up = x @ layer.gate.weight.T, x @ layer.up.weight.T
    torch.testing.assert_close(layer(x), (gate * torch.sigmoid(gate) * up) @ layer.down.weight.T)
    config = TransformerConfig(width=96, heads=4, mlp_ratio=2.67, time_every=3)
    assert config.head_dim == 24 and config.hidden == 256
    assert [config.is_time(l) for l in range(6)] == [False, False, True] * 2


def test_positions_turn_pairs_of_channels():
    x, positions = torch.randn(3, 6, generator=generator()), torch.tensor([0, 1, 40])
    turned = apply_rope(x, positions)
    for row, position in enumerate(positions.tolist()):
        for pair in range(3):
            angle = position * 10_000 ** (-2 * pair / 6)
            a, b = x[row, pair].item(), x[row, pair + 3].item()
            wanted = (a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle))
            assert (turned[row, pair].item(), turned[row, pair + 3].item()) == pytest.approx(wanted, abs=1e-5)


def test_who_sees_whom_along_time():
    for t, past, context in ((4, 0, 2), (3, 5, 4), (5, 0, 9), (1, 3, 3)):
        mask = time_mask(t, past, context)
        assert mask.shape == (t, past + t)
        for i, m in itertools.product(range(t), range(past + t)):
            assert mask[i, m] == (0 <= past + i - m < context)
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 3, 4]])
    mask = segment_mask(segments, 2)
    for b, i, m in itertools.product(range(2), range(5), range(5)):
        assert mask[b, i, m] == (0 <= i - m < 2 and bool(segments[b, i] == segments[b, m]))


# The steps of the optimiser

def test_the_learning_rate_rises_stays_and_falls():
    config = TrainConfig(steps=100, lr=2.0, warmup=10, decay_share=0.25)
    found = [learning_rate(config, step) for step in range(100)]
    wanted = [2 * min(1, (step + 1) / 10, (100 - step) / 25) for step in range(100)]
    assert found == pytest.approx(wanted)
    plain = TrainConfig(steps=4, lr=2.0, warmup=0, decay_share=0.0)
    assert [learning_rate(plain, step) for step in range(4)] == [2.0] * 4


def test_vectors_are_not_decayed_and_muon_takes_matrices_of_layers():
    shapes = {"a.layers.0.w": (3, 3), "a.layers.0.norm": (3,), "a.embed": (3, 3), "bias": (3,)}
    parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    name_of = {id(p): name for name, p in parameters.items()}

    def found(config):
        groups = make_optimizer(parameters, config).param_groups
        return {name_of[id(p)]: (g.get("times", 1), g["weight_decay"]) for g in groups for p in g["params"]}

    plain = {"a.layers.0.w": (1, 0.3), "a.embed": (1, 0.3), "a.layers.0.norm": (1, 0.0), "bias": (1, 0.0)}
    assert found(TrainConfig(weight_decay=0.3)) == plain
    assert found(TrainConfig(weight_decay=0.3, muon=20.0)) == plain | {"a.layers.0.w": (20.0, 0.3)}


def test_muon_multiplies_in_the_dtype_that_the_hardware_is_fast_in(monkeypatch):
    def orthogonal(g):
        "Five rounds of the polynomial on the singular values, in float64."
        u, sigma, vh = torch.linalg.svd(g.double(), full_matrices=False)
        sigma = sigma / sigma.norm()
        for _ in range(5):
            sigma = 3.4445 * sigma - 4.7750 * sigma ** 3 + 2.0315 * sigma ** 5
        return u * sigma @ vh

    for shape in ((6, 9), (9, 6), (7, 7)):
        start, gradient = (torch.randn(shape, generator=generator(k)) for k in (0, 1))
        weights = {dtype: nn.Parameter(start.clone()) for dtype in (torch.float32, torch.bfloat16, None)}
        for dtype, weight in weights.items():
            monkeypatch.setattr(optimizers, "pick_dtype", lambda device, dtype=dtype: dtype)
            weight.grad = gradient.clone()
            if dtype is None:
                torch.optim.Muon([weight], lr=0.02, weight_decay=0.1).step()
                continue
            optimizer = make_optimizer({"a.layers.0.w": weight}, TrainConfig(lr=0.001, muon=20.0, weight_decay=0.1))
            for group in optimizer.param_groups:
                group["lr"] = 0.02
            optimizer.step()
        rate = 0.02 * max(1, shape[0] / shape[1]) ** 0.5
        mean = 0.05 * gradient                                          # momentum 0.95, from zero
        ahead = gradient + 0.95 * (mean - gradient)
        wanted = start.double() * (1 - 0.002) - rate * orthogonal(ahead)
        torch.testing.assert_close(weights[torch.float32].double(), wanted, rtol=0, atol=1e-6)
        assert torch.equal(weights[torch.bfloat16], weights[None])      # PyTorch's own is in bfloat16 always
        assert (weights[None].double() - wanted).abs().max() > 1e-5


def test_a_loss_is_divided_by_the_root_mean_square_of_those_before_it():
    scale, seen = LossScale(decay=0.75, floor=0.5), []
    assert [scale.divisor("x", torch.tensor(loss)).item() for loss in (-3.0, 7.0)] == [3, 3]
    square = None
    for count, loss in enumerate([3.0, 1.0, 4.0, 1.0, 5.0, 0.1] + 15 * [0.0]):
        scale.update("x", torch.tensor(loss))
        keep = min(0.75, count / (count + 1))
        square = loss ** 2 if square is None else keep * square + (1 - keep) * loss ** 2
        seen.append(scale.divisor("x", torch.tensor(9.0)).item())
        assert seen[-1] == pytest.approx(max(0.5, math.sqrt(square)), rel=1e-5)
    assert seen[-1] == 0.5


def test_only_what_was_chosen_is_trained():
    head = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    parts = nn.ModuleDict({"body": nn.Linear(2, 2), "head": head}).eval()
    parts["body"].bias.requires_grad_(False)
    assert set(pick_trainable(parts, None)) == {"body.weight", "head.0.weight", "head.0.bias"}
    assert set(pick_trainable(parts, ["head", "body.bias"])) == {"head.0.weight", "head.0.bias", "body.bias"}
    chosen = pick_trainable(parts, ["head.0.bias"])
    with training_only(parts, chosen):
        assert {name for name, p in parts.named_parameters() if p.requires_grad} == {"head.0.bias"}
        assert parts["head"].training and parts["head"][1].training and not parts["body"].training
    assert not any(module.training for module in parts.modules())
    assert {name for name, p in parts.named_parameters() if not p.requires_grad} == {"body.bias"}


def test_what_is_logged_is_the_mean_over_the_steps_since():
    sizes = ({"size": torch.tensor(2.0)}, {"size": torch.tensor(4.0)}, {})
    measured = [({"loss": torch.tensor(x)}, size) for x, size in zip((1.0, 2.0, 6.0), sizes)]
    assert summarize("toy", measured, 3) == {"loss": 3.0, "size": 3.0}
    assert np.isclose(summarize("toy", measured[:1], 1)["size"], 2)


# The tokenizer's terms

def test_pixels_that_deviate_count_more():
    frames, mean, std = torch.tensor([[0.2, 0.5, 0.9], [0.2, 0.4, 0.1], [0.1, 0.02, 0.0]])
    wanted = [1.0, 1 + 3 * 0.1 / 0.05, 1 + 3 * 7.0]
    assert deviation_weight(frames, mean, std, gain=3.0, cap=7.0).tolist() == pytest.approx(wanted)


def frames_that_count(x, valid):
    return [x[b, t].flatten().tolist() for b in range(len(x)) for t in range(x.shape[1]) if valid[b, t]]


def spread(values):
    "The standard deviation of numbers, with n - 1."
    mean = sum(values) / len(values)
    return math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


def test_spread_and_change_of_latents():
    z = torch.randn(3, 5, 2, 2, generator=generator()) * torch.tensor([[0.1, 1.0], [2.0, 0.5]])
    cut = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    for valid in (torch.ones(3, 5, dtype=torch.bool), cut):
        rows = frames_that_count(z, valid)
        spreads = [spread(channel) for channel in zip(*rows)]
        given = None if valid.all() else valid
        wanted = sum(abs(s - 0.4) for s in spreads) / 4
        assert latent_std_loss(z, 0.4, given).item() == pytest.approx(wanted, rel=1e-5)
        steps = [x for b in range(3) for t in range(1, 5) if valid[b, t] and valid[b, t - 1]
                 for x in (z[b, t] - z[b, t - 1]).flatten().tolist()]
        variance = sum(s * s for s in spreads) / 4
        wanted = sum(x * x for x in steps) / len(steps) / (2 * variance)
        assert slowness_loss(z, given).item() == pytest.approx(wanted, rel=1e-4)
    assert slowness_loss(z[:, :1]) == 0 and slowness_loss(z[:, :1].expand(3, 5, 2, 2)) == 0


def test_images_differ_in_their_gradients():
    x = torch.rand(2, 3, 8, 8, generator=generator())
    total = []
    for size in (8, 4):
        pixels = x.reshape(2, 3, size, 8 // size, size, 8 // size).mean((3, 5)).numpy()
        total.append((np.diff(pixels, axis=3) ** 2).mean() + (np.diff(pixels, axis=2) ** 2).mean())
    found = gradient_difference(x + 0.3, torch.full((2, 3, 8, 8), 0.1))
    assert found.item() == pytest.approx(sum(total) / 4, rel=1e-4)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("padded", [False, True])
def test_the_tokenizers_loss_is_the_sum_of_its_terms(part, padded):
    torch.manual_seed(0)
    thin = TransformerConfig(width=32, depth=2, heads=2, kv_heads=1, time_every=2, context=3)
    config = TokenizerConfig(image=16, n_latents=2, d_latent=4, slowness=(0.2, 0.7), gain=2.0,
                             output_weight=0.3, latent_std=0.4, transformer=thin)
    model = Tokenizer(config)
    nn.init.normal_(model.to_patch.weight, std=0.3)
    model.mean_frame.uniform_()
    model.std_frame.uniform_()
    frames, valid = torch.rand(3, 6, 3, 16, 16, generator=generator(1)), torch.ones(3, 6, dtype=torch.bool)
    valid[1:, 4:] = not padded
    batch = SimpleNamespace(frames=frames, valid=valid if padded else None)
    losses, metrics = tokenizer_loss({"tokenizer": model}, batch, generator(2), gradient_difference, 4, part)
    g = generator(2)
    recon, latents = reconstruct(model, frames, g)
    mean, std = model.mean_frame[0], model.std_frame[0]
    error = (recon - frames).square()
    alarm = deviation_weight(recon, mean, std, 2.0) - 1
    squared = ((deviation_weight(frames, mean, std, 2.0) + 0.3 * alarm) * error)[valid].mean().item()
    own = 3 * latent_std_loss(latents, 0.4, valid) + config.slowness[part] * slowness_loss(latents[:, 2:], valid[:, 2:])
    assert losses["mse"].item() == pytest.approx(squared * (1 + own.item()), rel=1e-4)
    rows = torch.randperm(int(valid.sum()), generator=g)[:4]
    wanted = gradient_difference(recon[valid][rows], frames[valid][rows]).item()
    assert losses["perceptual"].item() == pytest.approx(wanted, rel=1e-4)
    assert metrics["psnr"].item() == pytest.approx(-10 * math.log10(error[valid].mean().item()), rel=1e-4)


# Phases 2 and 3

def make_agent():
    "A small world and heads whose outputs are not near zero."
    torch.manual_seed(2)
    thin = TransformerConfig(width=32, depth=2, heads=2, kv_heads=1, time_every=2, context=8)
    world = Dynamics(DynamicsConfig(n_latents=4, d_latent=6, n_agent=1, transformer=thin))
    heads = AgentHeads(AgentConfig(width=32, hidden=16, mtp=2, tasks=("one", "two")))
    spread_weights([world.to_latent, *output_layers(heads)])
    return world, heads.eval()


def make_batch(b=4, t=5):
    g = generator(1)
    uniform = lambda *shape: torch.rand(*shape, generator=g) * 2 - 1
    return Batch(frames=None, latents=uniform(b, t, 4, 6), actions=uniform(b, t, 2),
                 action_known=torch.ones(b, t, dtype=torch.bool), intended=uniform(b, t, 2),
                 rewards=uniform(b, t), continues=torch.rand(b, t, generator=g).round(),
                 task=torch.arange(b) % 2, relevant=torch.arange(b) < b // 2)


def test_phase_2_scores_every_head_at_its_distances():
    world, heads = make_agent()
    batch, modules = make_batch(), {"dynamics": world, "heads": heads}
    with torch.no_grad():
        losses, metrics = agent_loss(modules, batch, generator(2))
        h, _, _ = read_agent(world, heads, batch, generator(2))
    assert h.shape == (4, 5, 1, 32)
    found = {"cloning": [], "reward": [], "continue": [], "cloning_next": []}
    for b, t, n in itertools.product(range(4), range(5), range(3)):
        now = h[b, t]
        if t + n < 5:
            shares = two_hot(batch.rewards[b, t + n], heads.reward.bins)
            logits = heads.reward.logits(now)[n]
            found["reward"].append(-(shares * logits.log_softmax(-1)).sum().item())
            chance = heads.continues.net(now.flatten(-2))[n].sigmoid().item()
            found["continue"].append(-math.log(chance if batch.continues[b, t + n] else 1 - chance))
        if t + 1 + n < 5 and batch.relevant[b]:
            logits = heads.policy.parameters_of(now)[n].log_softmax(-1)
            shares = two_hot(batch.intended[b, t + 1 + n], torch.linspace(-1, 1, 21))
            found["cloning"].append(-(shares * logits).sum().item())
            if n == 0:
                found["cloning_next"].append(found["cloning"][-1])
    for name, values in found.items():
        value = metrics[name] if name == "cloning_next" else losses[name]
        assert value.item() == pytest.approx(sum(values) / len(values), rel=1e-4), name


def test_phase_3_scores_every_step_of_its_dreams():
    "A step counts by the chance that the episode still goes on there."
    dynamics, heads = make_agent()
    frames = TokenizerConfig(image=16, n_latents=4, d_latent=6, transformer=dynamics.config.transformer)
    world = WorldModel(Tokenizer(frames), dynamics).eval()
    modules = {"policy": copy.deepcopy(heads.policy), "value": copy.deepcopy(heads.value)}
    with torch.no_grad():
        for p in itertools.chain(*(module.parameters() for module in modules.values())):
            p.add_(0.1 * torch.randn(p.shape, generator=generator(p.numel())))
    config = ImaginationConfig(context=3, horizon=4, gamma=0.9, lam=0.8, alpha=0.4, beta=0.6)
    batch = make_batch()
    with torch.no_grad():
        losses, metrics = imagination_loss(world, heads, config)(modules, batch, generator(2))
        dream = imagine(world, heads, modules["policy"], batch, config, generator(2))
        h, value, policy = dream["h"], modules["value"], modules["policy"]
        returns, good, bad, pulls, values = [], [], [], [], []
        for b in range(4):
            after, backwards = value(h[b, 4]).item(), []
            for t in reversed(range(4)):
                goes_on, v = dream["continues"][b, t].item(), value(h[b, t + 1]).item()
                after = dream["rewards"][b, t].item() + 0.9 * goes_on * (0.2 * v + 0.8 * after)
                backwards.append(after)
            weight = batch.continues[b, 2].item()
            for t, result in enumerate(reversed(backwards)):
                now, before = (p.parameters_of(h[b, t])[0].log_softmax(-1) for p in (policy, heads.policy))
                shares = two_hot(dream["actions"][b, t], torch.linspace(-1, 1, 21))
                score = (shares * now).sum().item()
                (good if result >= value(h[b, t]).item() else bad).append((weight, score))
                pulls.append((weight, (now.exp() * (now - before)).sum().item()))
                own = two_hot(torch.tensor(result), value.bins)
                values.append((weight, -(own * value.logits(h[b, t])[0].log_softmax(-1)).sum().item()))
                returns.append(result)
                weight *= dream["continues"][b, t].item()
    mean = lambda pairs: sum(w * x for w, x in pairs) / max(1, sum(w for w, _ in pairs))
    assert good and bad
    wanted = 0.6 * mean(bad) - 0.4 * mean(good) + 0.6 * mean(pulls)
    assert losses["policy"].item() == pytest.approx(wanted, rel=1e-3)
    assert losses["value"].item() == pytest.approx(mean(values), rel=1e-4)
    assert metrics["return"].item() == pytest.approx(sum(returns) / 16, rel=1e-4, abs=1e-5)
    assert metrics["positive"].item() == pytest.approx(len(good) / 16)


def test_each_local_rank_has_a_gpu_of_its_own(monkeypatch):
    "Also where nothing has chosen a device before: `cuda` alone is the first GPU to all processes."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:3") and pick_device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(UserError, match="8 usable GPUs"):
        pick_device("auto")
