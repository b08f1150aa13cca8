"Which noise levels training shows together: those that few-step sampling meets, for every size of a batch."
from dataclasses import replace

import pytest
import torch

from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.core import Batch
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig, draw_segments, video_loss
from dreamer4_nb.method.forcing import Schedule, draw_levels, forcing_loss


def shares(b, t, schedule, draws=400, **options):
    "Share of frames above d_min, of frames at d = 1/4 after one at d_min, of those after one at the context's level; teacher rows."
    g, rows = torch.Generator().manual_seed(0), set()
    coarse = beside = context = total = 0
    present = schedule.grid.j_of(1 / schedule.steps)
    for _ in range(draws):
        i, j, n = draw_levels((b, t), schedule, g, **options)
        rows.add(n)
        coarse += (j < schedule.grid.j_min).float().mean().item() / draws
        now, before = j[:, 1:] == present, j[:, :-1] == schedule.grid.j_min
        at_context = before & (i[:, :-1] == schedule.ctx_index)
        total += now.sum().item()
        beside += (now & before).sum().item()
        context += (now & at_context).sum().item()
    return coarse, beside / max(total, 1), context, rows


@pytest.mark.parametrize("b", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("k_max", [8, 64])
def test_every_batch_trains_the_larger_steps_by_the_same_share(b, k_max):
    schedule = Schedule(k_max)
    coarse, _, _, rows = shares(b, 256 // b, schedule)
    n_d = schedule.grid.n_d
    assert min(rows) >= 1 and abs(coarse - 0.25 * (n_d - 1) / n_d) < 0.012
    coarse, _, _, rows = shares(b, 256 // b, schedule, mixed=False)
    assert min(rows) >= 1 and abs(coarse - 0.25) < 0.015


@pytest.mark.parametrize("k_max", [8, 64])
def test_a_long_step_stands_beside_the_smallest_and_beside_the_context(k_max):
    schedule = Schedule(k_max)
    _, beside, context, _ = shares(4, 64, schedule, draws=2000)
    assert abs(beside - 1 / schedule.grid.n_d) < 0.02           # the paper draws d anew for each frame
    assert context > 0


def test_of_the_paper_s_own_draws_each_size_gets_the_same_share():
    g = torch.Generator().manual_seed(0)
    _, j, n = draw_levels((64, 200), Schedule(64), g, bootstrap_share=1.0)
    assert n == 64
    assert ((j.flatten().bincount() / j.numel()) - 1 / 7).abs().max() < 0.01


def test_frames_that_do_not_see_each_other_are_drawn_apart():
    g = torch.Generator().manual_seed(0)
    i, j, n = draw_levels((8, 50), Schedule(), g, mixed=False)
    assert n == 2 and (j[:2] < 3).all() and (j[2:] == 3).all()


def test_frames_that_do_not_count_are_in_no_loss():
    schedule, valid = Schedule(), torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    z = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
    other = torch.where(valid[..., None], z, 7.0)
    f = lambda z, i, j, rows=slice(None): 0.5 * z
    draw = lambda x: forcing_loss(f, x, schedule, torch.Generator().manual_seed(0), 0.5, valid=valid)
    for name in ("flow", "bootstrap"):
        assert draw(z)[0][name] == draw(other)[0][name] > 0
    assert draw(z)[0]["flow"] != forcing_loss(f, other, schedule, torch.Generator().manual_seed(0), 0.5)[0]["flow"]


def padded_batch(config, fill):
    g = torch.Generator().manual_seed(2)
    valid = torch.arange(7) < torch.tensor([[7], [3], [5], [4]])
    latents = torch.rand(4, 7, config.n_latents, config.d_latent, generator=g) * 2 - 1
    ones = torch.ones(4, 7)
    return Batch(frames=None, latents=torch.where(valid[..., None, None], latents, fill), actions=torch.zeros(4, 7, 2),
                 action_known=ones.bool(), intended=torch.zeros(4, 7, 2), rewards=0 * ones, continues=ones,
                 task=torch.zeros(4, dtype=torch.long), relevant=torch.zeros(4, dtype=torch.bool), valid=valid)


@pytest.mark.parametrize("options", [{}, {"train_on_context": True}, {"image_rows": 0.3, "short_clip_length": 3}])
def test_the_world_does_not_learn_from_padding(options):
    config = DynamicsConfig(n_latents=4, d_latent=6, transformer=TransformerConfig(width=32, depth=2, heads=2, kv_heads=1, context=5))
    torch.manual_seed(0)
    model = Dynamics(replace(config, **options))
    torch.nn.init.normal_(model.to_latent.weight, std=0.3)
    losses = [video_loss(model, padded_batch(config, fill), torch.Generator().manual_seed(0))[0] for fill in (0.0, 0.9)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)


def test_clips_are_drawn_where_the_generator_is(monkeypatch):
    "What is drawn without a device is drawn on the CPU, and refused with a GPU's generator."
    real, seen = torch.rand, []

    def watched(*size, **options):
        seen.append(options.get("device"))
        return real(*size, **options)

    monkeypatch.setattr(torch, "rand", watched)
    g = torch.Generator().manual_seed(0)
    draw_segments(DynamicsConfig(image_rows=0.3, short_clip_length=3), 4, 6, g)
    assert seen == [g.device]
