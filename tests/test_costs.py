"Shapes, counts, and predicted memory and time. Nothing is timed."
import itertools
import weakref
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from helpers.shapes import MICRO, THIN

from dreamer4_nb.method import attention
from dreamer4_nb.method.agent import AgentConfig, Policy
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.method.blocks import empty_cache
from dreamer4_nb.method.streams import inference_bytes
from dreamer4_nb.core import UserError, autocast
from dreamer4_nb.runs.costs import (LOSSES, SHAPES, Shape, build, costs, count_flops, count_parameters,
                                    forward_flops, pick_shape, random_batches, teacher_share, training_step,
                                    transformers)
from dreamer4_nb.runs.memory import (MACHINES, Machine, activations, best_way, inference, predict, saved_bytes,
                                     stream_bound)
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig, dynamics_loss
from dreamer4_nb.method.forcing import draw_levels
from dreamer4_nb.method.generation import WorldModel
from dreamer4_nb.method.tokenizer import TokenizerConfig
from dreamer4_nb.training.optimizers import TrainConfig

CPU, META = torch.device("cpu"), torch.device("meta")


# Shapes

def test_peers_is_the_shape_of_the_table():
    s = SHAPES["peers"]
    t, d = s.tokenizer, s.dynamics
    assert (t.image, t.patch, t.n_latents, t.d_latent, t.mask_max) == (64, 8, 32, 128, 0.9)
    assert (d.n_latents, d.d_latent, d.pack, d.n_tokens, d.bootstrap_share) == (32, 128, 1, 32, 0.25)
    assert (d.schedule.k_max, d.schedule.steps) == (64, 4)
    for c in (t.transformer, d.transformer):
        assert (c.width, c.depth, c.heads, c.head_dim, c.time_every) == (256, 4, 4, 64, 4)
    assert d.transformer.kv_heads == 2 and d.transformer.context == 17            # one more frame sees 16 before it
    assert (s.batch, s.length, s.context, s.generated) == (4, 16, 4, 12) and s.tokenizer_clips == (4, 16)


def test_paper_has_the_papers_sizes():
    s = SHAPES["paper"]
    tokenizer, dynamics = (count_parameters(m) for m in build(s, META).values())
    assert abs(tokenizer / 400e6 - 1) < 0.05 and abs(dynamics / 1.6e9 - 1) < 0.05
    assert (s.dynamics.n_tokens, s.dynamics.d_token, s.dynamics.transformer.context) == (256, 32, 192)


@pytest.mark.parametrize("name", SHAPES)
def test_the_bootstrap_of_every_shape_is_trained(name):
    "The share of rows that `costs` gives a teacher is that of `draw_levels`: the share asked for, rounded up to a row."
    s, c = SHAPES[name], SHAPES[name].dynamics
    rows = draw_levels((s.batch, 1), c.schedule, torch.Generator().manual_seed(0), c.bootstrap_share)[2]
    assert rows / s.batch == teacher_share(s) >= c.bootstrap_share > 0
    assert s.batch % 4 or teacher_share(s) == c.bootstrap_share


def layer_parameters(c):
    attention = c.width * (c.heads + 2 * c.kv_heads) * c.head_dim + (c.heads + c.kv_heads) * c.head_dim + c.width ** 2
    return attention + 3 * c.width * c.hidden + 2 * c.width


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_on_the_meta_device(name):
    tokenizer, dynamics = build(SHAPES[name], META).values()
    assert all(x.is_meta for module in (tokenizer, dynamics) for x in itertools.chain(module.parameters(), module.buffers()))
    for part in (tokenizer.encoder, tokenizer.decoder, dynamics.transformer):
        assert count_parameters(part) == part.config.depth * layer_parameters(part.config) + part.config.width


def test_meta_models_have_the_parameters_of_real_ones():
    for bare, real in zip(build(MICRO, META).values(), build(MICRO, CPU).values()):
        assert {k: p.shape for k, p in bare.named_parameters()} == {k: p.shape for k, p in real.named_parameters()}


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="make them equal"):
        replace(MICRO, dynamics=replace(MICRO.dynamics, n_latents=8))
    with pytest.raises(UserError, match="1 or more"):
        replace(MICRO, length=0)
    with pytest.raises(UserError, match="choose one of peers, tiny, small, base, paper"):
        pick_shape("huge")
    assert pick_shape("tiny") is SHAPES["tiny"] and pick_shape(MICRO) is MICRO


# FLOPs and memory

def counted(shape, name):
    module = build(shape, CPU)[name]
    return count_flops(training_step(name, module, random_batches(shape, CPU)[name], TrainConfig(), CPU, torch.float32))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_flops_of_a_dynamics_step_are_those_on_paper(share):
    "Every linear layer and both attention products, three times; the teacher's two forwards on its rows."
    c = replace(MICRO.dynamics, n_latents=24, bootstrap_share=share)
    s = replace(MICRO, tokenizer=replace(MICRO.tokenizer, n_latents=24), dynamics=c)
    w, tokens, t = THIN.width, 24 + c.n_registers + 2, s.length
    asked, asking = w * 2 * 16, w * 2 * 16 + w * w + 3 * w * THIN.hidden    # two heads, one for keys and values; 16 channels each
    inside = 2 * tokens * (asked + asking) + 4 * w * tokens * tokens        # layers 0, 1 and 2
    along = tokens * (2 * (asked + asking) + 4 * w * t)                     # layer 3
    expected = (3 + 2 * share) * (3 * inside + along + 4 * 24 * 8 * w) * s.batch * t
    assert counted(s, "dynamics") == pytest.approx(expected, rel=0.05)
    assert costs(s)["dynamics"]["step_gflops"] * 1e9 == pytest.approx(expected, rel=0.01)


def test_tokenizer_step_needs_no_more_than_on_paper():
    assert 0.97 < counted(MICRO, "tokenizer") / (costs(MICRO)["tokenizer"]["step_gflops"] * 1e9) < 1.03


def test_costs_of_state_and_cache():
    row = costs(MICRO)["dynamics"]
    assert row["state_mb"] == 16 * row["parameters"] / 1e6
    tracks = 4 + MICRO.dynamics.n_registers + 2
    assert row["cache_mb"] == 2 * 2 * 1 * tracks * 1 * 5 * 16 / 1e6              # keys and values, 2 bytes, one time layer, one key-value head


def test_saved_bytes_counts_a_storage_once_and_no_weights():
    layer, x = torch.nn.Linear(5, 4, bias=False), torch.randn(3, 5)
    assert saved_bytes(lambda: layer(x) + layer(x), layer) == 4 * 3 * 5


def test_recomputed_layers_keep_less_and_give_the_same_gradient():
    model, batch, found = Dynamics(replace(MICRO.dynamics, bootstrap_share=0.0)), random_batches(MICRO, CPU)["dynamics"], []
    torch.nn.init.normal_(model.to_latent.weight, std=0.2)
    loss = lambda: dynamics_loss({"dynamics": model}, batch, torch.Generator().manual_seed(0))[0]["dynamics"]
    for recompute in (False, True):
        model.transformer.recompute = recompute
        found.append((saved_bytes(loss, model), torch.autograd.grad(loss(), list(model.transformer.parameters()))))
    (kept, plain), (kept_again, recomputed) = found
    assert kept_again < 0.4 * kept
    for a, b in zip(plain, recomputed):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# Memory and time predicted

WIDE = TransformerConfig(width=64, depth=4, heads=4, kv_heads=2, time_every=4, context=8)
PREDICTED = {
    "plain": Shape(TokenizerConfig(image=32, n_latents=8, d_latent=8, transformer=WIDE), DynamicsConfig(n_latents=8, d_latent=8, pack=1, transformer=WIDE), 4, 8, 1, 1),
    "clips longer than the context": Shape(TokenizerConfig(image=32, n_latents=8, d_latent=8, transformer=replace(WIDE, time_every=2)),
                                           DynamicsConfig(n_latents=8, d_latent=8, pack=2, image_rows=0.3, transformer=WIDE), 2, 12, 1, 1),
    "committed": Shape(TokenizerConfig(image=32, n_latents=8, d_latent=8, mask_max=0.0, transformer=replace(WIDE, depth=2, time_every=2)),
                       DynamicsConfig(n_latents=8, d_latent=8, pack=4, train_on_context=True, transformer=replace(WIDE, time_every=2)), 4, 8, 1, 1, clips=(6, 2)),
    "soft cap": Shape(TokenizerConfig(image=32, n_latents=8, d_latent=8, transformer=replace(WIDE, softcap=10.0)),
                      DynamicsConfig(n_latents=8, d_latent=8, pack=1, n_registers=7, transformer=replace(WIDE, softcap=10.0)), 4, 8, 1, 1)}


def kept(shape, dtype, recompute):
    "What autograd really keeps of one loss of each model."
    data, out = random_batches(shape, CPU), {}
    for name, module in build(shape, CPU).items():
        for part in transformers(module):
            part.recompute = recompute
        with autocast(CPU, dtype):
            out[name] = saved_bytes(lambda: LOSSES[name]({name: module}, data[name], torch.Generator().manual_seed(0)), module)
    return out


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PREDICTED)
def test_activations_are_what_autograd_keeps(name, dtype, recompute):
    found, measured = activations(PREDICTED[name], dtype == torch.bfloat16, recompute=recompute), kept(PREDICTED[name], dtype, recompute)
    assert found["tokenizer"][0] == pytest.approx(measured["tokenizer"], rel=0.04)
    assert found["dynamics"][0] == pytest.approx(measured["dynamics"], rel=0.01)


@pytest.mark.parametrize("dtype, recompute", [(torch.float32, False), (torch.bfloat16, True)])
def test_activations_of_the_papers_shape(monkeypatch, dtype, recompute):
    "Fake tensors: the true loss of the true models, 500 GB of activations, none of them stored."
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda *args, **kwargs: None)     # looks at values
    with FakeTensorMode():
        measured = kept(SHAPES["paper"], dtype, recompute)
    found = activations("paper", dtype == torch.bfloat16, recompute=recompute)
    assert {k: found[k][0] / measured[k] for k in measured} == pytest.approx(dict.fromkeys(measured, 1), abs=0.02)


# Phase 2, several batches in a step, and what keeps nothing

def acting(batch, length, transformer=WIDE, **changes):
    "A shape with an agent."
    config = DynamicsConfig(n_latents=8, d_latent=8, pack=1, n_agent=1, transformer=transformer, **changes)
    tokens = TokenizerConfig(image=32, n_latents=8, d_latent=8, transformer=WIDE)
    return Shape(tokens, config, batch, length, 4, 2, clips=(1, 2), agent=AgentConfig(width=transformer.width, hidden=32))


AGENTS = {"plain": acting(8, 8), "longer than the context, single images": acting(4, 12, image_rows=0.3),
          "committed": acting(8, 8, replace(WIDE, time_every=2), train_on_context=True),
          "one row of each half": acting(2, 12, short_clip_length=4)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AGENTS)
def test_phase_two_keeps_what_its_two_passes_keep(name, dtype, recompute):
    "The video loss of half of the rows, and h of all, or of the other half where the first pass gives it."
    shape = AGENTS[name]
    module, batch = build(shape, CPU)["agent"], random_batches(shape, CPU)["agent"]
    assert int(batch.relevant.sum()) == shape.batch - shape.video_rows
    for part in transformers(module):
        part.recompute = recompute
    with autocast(CPU, dtype):
        loss = lambda: LOSSES["agent"]({"agent": module}, batch, torch.Generator().manual_seed(0))
        measured = saved_bytes(loss, module)
    found = activations(shape, dtype == torch.bfloat16, recompute=recompute)["agent"][0]
    assert found == pytest.approx(measured, rel=0.06 if recompute else 0.01)


@pytest.mark.parametrize("name", ["plain", "longer than the context, single images"])
def test_flops_of_phase_two(name):
    on_paper = 1e9 * costs(AGENTS[name])["agent"]["step_gflops"]
    assert counted(AGENTS[name], "agent") == pytest.approx(on_paper, rel=0.02)


def test_an_agent_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="make them equal"):
        replace(AGENTS["plain"], agent=AgentConfig(width=32))
    with pytest.raises(UserError, match="even number"):
        replace(AGENTS["plain"], batch=3)
    with pytest.raises(UserError, match="no agent"):
        inference(MICRO, "H100", 10, 10)


class Live(TorchDispatchMode):
    "Counts the bytes of all storages that are alive while it is on, and their peak."
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.alive = 0, 0, {}

    def add(self, x):
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def gone(_):
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.add(x)
        return out


LARGER = replace(WIDE, width=128, heads=4, kv_heads=2)
STEPS = {"tokenizer": Shape(TokenizerConfig(image=32, n_latents=8, d_latent=8, transformer=LARGER),
                            DynamicsConfig(n_latents=8, d_latent=8), 1, 1, 1, 1, clips=(4, 12)),
         "dynamics": replace(acting(16, 8, LARGER), agent=None),
         "agent": acting(8, 12, LARGER)}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", STEPS)
def test_peak_of_a_step_is_foretold(name, accumulate):
    "Of the second step, as the first makes the moments. A second batch comes while gradients of the first are there."
    shape = STEPS[name]
    module, batch = build(shape, CPU)[name], random_batches(shape, CPU)[name]
    step = training_step(name, module, batch, TrainConfig(accumulate=accumulate), CPU, torch.float32)
    with Live() as live:
        for p in module.parameters():
            live.add(p.data)
        step()
        live.peak = live.now
        step()
    found = predict(shape, "2 CPU cores", dtype="float32", accumulate=accumulate)[name]
    assert 1e9 * found["memory"] == pytest.approx(live.peak, rel=0.02)


def test_accumulated_batches_cost_time_and_keep_gradients_beside_activations():
    one, two = (predict("paper", "H100", 8, 0, recompute=True, accumulate=n)["dynamics"] for n in (1, 2))
    assert two["products"] == pytest.approx(2 * one["products"]) and two["frames"] == 2 * one["frames"]
    n = costs(SHAPES["paper"])["dynamics"]["parameters"]
    assert two["memory"] - one["memory"] == pytest.approx((4 + 4 / 8) * n / 1e9)     # FSDP keeps whole gradients
    small = [predict("small", "RTX 4090", accumulate=n)["dynamics"] for n in (1, 2)]
    assert small[1]["memory"] - small[0]["memory"] == pytest.approx(small[0]["gradients"])


@pytest.mark.parametrize("name", ["small", "base", "paper"])
def test_a_row_of_dreams_takes_what_is_foretold(monkeypatch, name):
    "Rings made, a context shown, one frame more; on fake tensors, with a GPU's attention."
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda *args, **kwargs: None)
    monkeypatch.setattr(attention, "attend", gpu_attend)
    d, rows, frames = SHAPES[name].dynamics, 4, 24
    with FakeTensorMode(), torch.no_grad(), autocast(CPU, torch.bfloat16):
        world = WorldModel(*build(SHAPES[name], CPU).values()).eval()
        latents = torch.rand(rows, frames, d.n_latents, d.d_latent)
        actions = torch.rand(rows, frames, d.action_dim)
        with Live() as live:
            dream = world.start(rows, torch.Generator())
            world.observe(dream, latents, actions)
            world.imagine(dream, actions[:, 0])
    assert 0.9 < inference_bytes(world.dynamics.transformer, frames, 2) / (live.peak / rows) < 1.5


@pytest.mark.parametrize("machine, dtype", [("H100", "bfloat16"), ("2 CPU cores", "float32")])
def test_rows_of_the_closed_loop_are_those_of_the_policy(machine, dtype):
    "As many at a time as `Policy.rows` says, in about equal parts; dreams of phase 3 all at once."
    machine, shape = replace(MACHINES[machine], memory=0.01), AGENTS["plain"]
    found = inference(shape, machine, frames=20, episodes=500, dtype=dtype)
    for row in found.values():
        assert row["memory"] == pytest.approx(row["weights"] + row["rows"] * row["row"]) and row["row"] > 0
    assert found["imagine"]["rows"] == shape.batch and (found["encode"]["rows"] == 8) == (not machine.gpu)
    tokenizer, acting = build(shape, META).values()
    policy = Policy(WorldModel(tokenizer, acting["dynamics"]), acting["heads"])
    budget = 2e9 if not machine.gpu else (1e9 * machine.memory - 1e9 * found["act"]["weights"]) / 2
    parts = -(-500 // policy.rows(budget))
    assert found["act"]["rows"] == -(-500 // parts) and (parts == 1) == (not machine.gpu)


def gpu_attend(q, k, v, mask=None, softcap=0.0, causal=False):
    "`attend` with the operations that a GPU would run, on fake tensors."
    flat = [x.flatten(0, -4) for x in (q, k, v)]
    if mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(*flat, 0.0, causal, False)[0].view(q.shape)
    flat[1:] = [x.repeat_interleave(q.shape[-3] // k.shape[-3], 1) for x in flat[1:]]
    mask = mask.expand(*q.shape[:-3], 1, q.shape[-2], k.shape[-2]).flatten(0, -4)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf).expand(-1, flat[0].shape[1], -1, -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(*flat, bias, True)[0].view(q.shape)


@pytest.mark.parametrize("name", ["peers", "paper"])
def test_activations_with_a_gpus_attention(monkeypatch, name):
    "With and without a mask along time (image rows), with heads that share keys and values and without."
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda *args, **kwargs: None)
    monkeypatch.setattr(attention, "attend", gpu_attend)
    with FakeTensorMode():
        measured = kept(SHAPES[name], torch.bfloat16, False)
    found = activations(name, half=True, fused=True)
    assert {k: found[k][0] / measured[k] for k in measured} == pytest.approx(dict.fromkeys(measured, 1), abs=0.02)


@pytest.mark.parametrize("name, numbers", [("base", [114_135_008, 307_635_744]), ("paper", [406_492_944, 1_588_796_448])])
def test_parameters_to_the_last_one(name, numbers):
    assert [count_parameters(m) for m in build(SHAPES[name], META).values()] == numbers


def test_state_is_16_bytes_a_parameter_and_shared_evenly():
    whole = predict("paper", "H100")
    for n in (2, 8, 64):
        part = predict("paper", "H100", n, n, ema=True)
        for k, module in build(SHAPES["paper"], META).items():
            state = sum(part[k][key] for key in ("weights", "gradients", "moments"))
            assert state == pytest.approx(16e-9 * count_parameters(module) / n)
            assert state == pytest.approx(sum(whole[k][key] for key in ("weights", "gradients", "moments")) / n)
            assert part[k]["average"] == pytest.approx(4e-9 * count_parameters(module) / n) and whole[k]["average"] == 0


def test_sharing_over_a_node_is_hsdp():
    "The state depends on the shard only; gradients of the groups are added up through the network."
    node, many = predict("paper", "H100", 8, 8), predict("paper", "H100", 64, 8)
    n = count_parameters(build(SHAPES["paper"], META)["dynamics"])
    assert many["dynamics"]["memory"] == node["dynamics"]["memory"]
    assert node["dynamics"]["exchange"] == pytest.approx(12 * n * 7 / 8 / 450e9)           # two bytes gathered four times, twice for the teacher, four added up once
    assert many["dynamics"]["exchange"] - node["dynamics"]["exchange"] == pytest.approx(2 * 4 * n / 8 * 7 / 8 / 50e9)
    assert predict("paper", "H100", 8, 0) == node


def test_ddp_adds_up_all_gradients():
    alone, both = predict(MICRO, "H100"), predict(MICRO, "H100", 2)
    for k, module in build(MICRO, META).items():
        n = count_parameters(module)
        assert both[k]["exchange"] == pytest.approx(2 * 4 * n / 2 / 450e9) and alone[k]["exchange"] == 0
        assert both[k]["gathered"] == pytest.approx(4e-9 * n) and both[k]["frames"] == 2 * alone[k]["frames"]


def test_the_teacher_gathers_weights_as_well():
    n = count_parameters(build(MICRO, META)["dynamics"])
    assert predict(MICRO, "H100", 4, 4)["dynamics"]["exchange"] == pytest.approx((4 * 2 + 4) * n * 3 / 4 / 450e9)


def test_products_take_flops_over_what_is_reached():
    machine = Machine("of a test", peak_bf16=2.0, peak_fp32=1.0, memory=1, bandwidth=1, link=1, network=1, matmul_efficiency=0.5, traffic_factor=0,
                      launch_overhead=0)
    row = costs(MICRO)["dynamics"]
    plain, again = predict(MICRO, machine), predict(MICRO, machine, recompute=True)
    assert plain["dynamics"]["products"] == pytest.approx(row["step_gflops"] / 1e3)
    assert again["dynamics"]["products"] == pytest.approx(row["step_gflops"] / 1e3 * (4 + 0.5) / (3 + 0.5))      # a quarter of the rows has a teacher
    assert plain["dynamics"]["traffic"] == pytest.approx(28e-9 * row["parameters"])
    assert predict(MICRO, machine, dtype="float32")["dynamics"]["products"] == pytest.approx(2 * row["step_gflops"] / 1e3)


@pytest.mark.parametrize("wrong", [dict(devices=8, shard=3), dict(devices=0), dict(machine="abacus"), dict(shape="huge"), dict(dtype="float8")])
def test_what_cannot_be_predicted_is_said(wrong):
    with pytest.raises(UserError):
        predict(**(dict(shape="tiny", machine="H100") | wrong))


def test_best_way_fits_and_is_the_plainest():
    found = best_way("paper", "H100", 8)
    assert found["tokenizer"]["way"] == "recompute" and found["dynamics"]["way"] == "recompute, shard 8"
    assert best_way("paper", "H100")["dynamics"] is None
    assert best_way("paper", "RTX 4090") == {"tokenizer": None, "dynamics": None}
    assert {r["way"] for r in best_way("tiny", "H100", 8).values()} == {"plain"}
    tight = replace(MACHINES["H100"], memory=found["dynamics"]["memory"] / 0.9 * 0.99)
    assert best_way("paper", tight, 8)["dynamics"] is None


def test_one_more_frame_reads_weights_and_cache_in_every_pass():
    machine = Machine("slow memory", peak_bf16=1e9, peak_fp32=1e9, memory=1, bandwidth=2, link=1, network=1)
    transformer, found = build(MICRO, META)["dynamics"].transformer, stream_bound(MICRO, machine)
    read = 2 * count_parameters(transformer) + empty_cache(transformer, 1, META, torch.bfloat16).nbytes
    assert found["frame"] == pytest.approx(1e3 * 5 * read / 2e9)                            # four denoising steps and the commit
    assert stream_bound(MICRO, replace(machine, bandwidth=1e9, peak_bf16=1e-3, matmul_efficiency=0.5))["frame"] == pytest.approx(
        1e3 * 5 * forward_flops(transformer, 5) / 0.5e9)
