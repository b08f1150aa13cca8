"The clock, the benchmark's bookkeeping, and predictions against stored runs. No test asserts a speed."
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.shapes import MICRO, THIN

from dreamer4_nb.runs import bench as scaling
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.core import UserError, autocast, cast_linear
from dreamer4_nb.inputs import from_dict
from dreamer4_nb.runs.costs import Shape, build, count_parameters, random_batches
from dreamer4_nb.runs.memory import MACHINES, predict
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig, dynamics_loss
from dreamer4_nb.evaluation.closed_loop import text_table
from dreamer4_nb.method.generation import WorldModel, compile_world, rollout
from dreamer4_nb.runs.bench import Timing, bench, bench_table, exponent, growth, matmul_peak, measure
from dreamer4_nb.method.tokenizer import Tokenizer, TokenizerConfig
from dreamer4_nb.training.loop import fit
from dreamer4_nb.training.optimizers import TrainConfig

CPU = torch.device("cpu")
KEYS = {"tokenizer_train_fps", "encode_fps", "decode_fps", "dynamics_train_fps", "generate_fps", "frame_ms", "frame_decoded_ms", "peak_gflops_fp32",
        "peak_gflops_bf16", "tokenizer_train_share", "dynamics_train_share", "peak_memory_mb", "versions", "spread", "calls", "gflops", "parameters",
        "shape", "dtype", "compile", "recompute", "seconds", "device", "cpu", "threads", "date"}


@pytest.fixture(scope="module")
def result():
    return bench(MICRO, seconds=0.05, device="cpu", dtype="float32")


# Timing

class FakeTime:
    "A clock that only moves when `work` is called."
    def __init__(self, durations):
        self.now, self.durations, self.calls = 0.0, iter(durations), 0

    def clock(self):
        return self.now

    def work(self):
        self.now, self.calls = self.now + next(self.durations), self.calls + 1


def test_measure_takes_median_and_quartiles_without_warmup():
    fake = FakeTime([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 100.0])
    timing = measure(fake.work, seconds=50, warmup=2, clock=fake.clock)
    assert (timing.low, timing.median, timing.high, timing.calls) == (2.0, 3.0, 4.0, 5) and fake.calls == 7


def test_measure_calls_three_times_at_least():
    fake = FakeTime(itertools.repeat(10.0))
    assert measure(fake.work, seconds=0, warmup=0, clock=fake.clock).calls == 3


def test_rates_turn_quartiles_round():
    assert Timing(2.0, 1.0, 4.0, 5).rate(8) == (4.0, [2.0, 8.0])


def test_matmul_peak_is_a_rate():
    assert matmul_peak(torch.float32, CPU, seconds=0.0, n=32) > 0


# The benchmark

def test_bench_has_all_keys_and_fits_json(result):
    assert result.keys() == KEYS
    assert json.loads(json.dumps(result)) == result
    assert set(result["spread"]) == {k for k in KEYS if k.endswith(("_fps", "_ms"))}
    for key, (low, high) in result["spread"].items():
        assert 0 < low <= result[key] <= high
    assert result["versions"].keys() == {"python", "torch", "dreamer4_nb"} and min(result["calls"].values()) >= 3
    assert result["parameters"] == {name: count_parameters(m) for name, m in build(MICRO, CPU).items()}


def test_share_is_work_over_time_over_peak(result):
    seconds = MICRO.batch * MICRO.length / result["dynamics_train_fps"]
    assert result["dynamics_train_share"] == pytest.approx(result["gflops"]["dynamics_train"] / seconds / result["peak_gflops_fp32"])


def test_bfloat16_is_measured_against_its_own_peak(monkeypatch):
    monkeypatch.setattr(scaling, "matmul_peak", lambda dtype, device, seconds: {torch.float32: 100.0, torch.bfloat16: 1000.0}[dtype])
    r = bench(MICRO, seconds=0.0, device="cpu", dtype="bfloat16")
    seconds = MICRO.batch * MICRO.length / r["tokenizer_train_fps"]
    assert r["dtype"] == "bfloat16" and r["tokenizer_train_share"] == pytest.approx(r["gflops"]["tokenizer_train"] / seconds / 1000)


def test_operations_that_are_run_again_do_not_count(result):
    again = bench(MICRO, seconds=0.0, device="cpu", dtype="float32", recompute=True)
    assert again["recompute"] and not result["recompute"]
    for name in ("tokenizer_train", "dynamics_train"):
        assert again["gflops"][name] == pytest.approx(result["gflops"][name], rel=0.03)


@pytest.mark.parametrize("name", ["base", "paper"])
def test_too_large_for_a_cpu_is_said_at_once(name):
    with pytest.raises(UserError, match="use a CUDA device, or a smaller shape"):
        bench(name, device="cpu")


@pytest.mark.parametrize("wrong", [dict(shape="huge"), dict(shape=MICRO, dtype="float8"), dict(shape=MICRO, device="abacus")])
def test_what_a_user_may_get_wrong(wrong):
    with pytest.raises(UserError):
        bench(**wrong)


def test_table_has_a_column_a_result(result):
    rows = bench_table([result, result | {"dtype": "bfloat16"}, result])
    assert all(len(row) == 4 for row in rows) and "one more frame, ms" in text_table(rows)


def test_stream_has_a_full_cache():
    "One more frame at batch 1 sees context - 1 frames, before and after it."
    tokenizer, dynamics = build(MICRO, CPU).values()
    world, seen = scaling.WorldModel(tokenizer, dynamics).eval(), []
    dynamics.register_forward_pre_hook(lambda m, args, kwargs: seen.append(getattr(kwargs["cache"], "cache", kwargs["cache"]).past), with_kwargs=True)
    latents, actions = torch.zeros(2, 4, 4, 8), torch.zeros(2, 4, 2)
    with torch.no_grad():
        calls = scaling.streaming_calls(MICRO, world, latents, actions, CPU)
        seen.clear()
        for call in (calls["frame"], calls["frame"], calls["frame_decoded"]):
            call()
    assert seen and set(seen) == {THIN.context - 1}


# Growth

def test_exponent_of_a_power():
    n = np.array([1, 2, 4, 8])
    assert exponent(n, 5 * n ** 1.5) == pytest.approx(1.5)


@pytest.mark.parametrize("axis,values,slope", [("context", (8, 32), 1.0), ("tokens", (8, 32), 0.9), ("width", (32, 128), 1.7), ("batch", (4, 16), 1.0)])
def test_flops_grow_as_expected(axis, values, slope):
    rows = growth(axis, values, MICRO.dynamics, seconds=0, device="cpu", dtype="float32")
    assert [r["value"] for r in rows] == list(values) and rows[0].keys() == {"value", "ms", "low", "high", "gflops", "saved_mb"}
    assert exponent(values, [r["gflops"] for r in rows]) == pytest.approx(slope, abs=0.25)
    assert rows[1]["saved_mb"] > rows[0]["saved_mb"]


def test_growth_along_an_unknown_axis():
    with pytest.raises(UserError, match="context, tokens, width, batch"):
        growth("height", (1, 2))


# Ways to compute

@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_compiled_and_half_precision_streams_are_the_plain_one(dtype, tolerance):
    "A dream of unit scale, float32 and eager, against compiled layers and weights cast once; the ring is filled and rolls."
    torch.manual_seed(0)
    transformer = TransformerConfig(width=32, depth=2, heads=2, kv_heads=1, time_every=2, context=4)
    world = WorldModel(Tokenizer(TokenizerConfig(image=16, n_latents=4, d_latent=6, transformer=transformer)),
                       Dynamics(DynamicsConfig(n_latents=4, d_latent=6, transformer=transformer))).eval()
    torch.nn.init.normal_(world.dynamics.to_latent.weight, std=0.2)
    latents, actions = torch.rand(2, 8, 4, 6) * 2 - 1, torch.rand(2, 8, 2) * 2 - 1
    with torch.no_grad():
        plain = rollout(world, latents, actions, 3, torch.Generator().manual_seed(0))
        compile_world(world)
        with autocast(torch.device("cpu"), dtype):
            fast = rollout(cast_linear(world, dtype), latents, actions, 3, torch.Generator().manual_seed(0))
    assert world.dynamics.transformer.compiled is not None
    torch.testing.assert_close(fast, plain, atol=tolerance, rtol=0)
    assert (fast[:, 3:] - latents[:, 3:]).abs().max() > 2 * tolerance


@pytest.mark.parametrize("way", ["compile", "recompute"])
def test_compiled_or_recomputed_training_is_plain_training(way):
    "Three steps from the same weights, and nothing is left behind on the model."
    transformer = TransformerConfig(width=32, depth=2, heads=2, kv_heads=1, time_every=2, context=4)
    config, losses = DynamicsConfig(n_latents=4, d_latent=6, transformer=transformer), []
    shape = Shape(TokenizerConfig(image=16, n_latents=4, d_latent=6, transformer=transformer), config, 4, 6, 2, 2)
    for on in (False, True):
        torch.manual_seed(0)
        model, batch = Dynamics(config), random_batches(shape, torch.device("cpu"))["dynamics"]
        train = TrainConfig(steps=3, warmup=1, log_every=1, dtype="float32", device="cpu", **{way: on})
        losses.append([row["dynamics"] for row in fit("toy", {"dynamics": model}, dynamics_loss, lambda i: batch, train, progress=False)])
        assert model.transformer.compiled is None and not model.transformer.recompute
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][2]


# Predicted and measured

@pytest.mark.parametrize("file", ["peers", "peers_compiled", "peers_float32", "tiny", "tiny_float32"])
def test_predicted_steps_against_measured_ones(file):
    "With the constants that all these files gave; the notebook leaves each out in turn."
    r = json.loads((Path(__file__).parent.parent / "nbs" / "results" / f"bench_{file}.json").read_text(encoding="utf-8"))
    machine = replace(MACHINES["2 CPU cores"], peak_bf16=r["peak_gflops_bf16"] / 1e3, peak_fp32=r["peak_gflops_fp32"] / 1e3)
    for name, row in predict(r["shape"], machine, dtype=r["dtype"]).items():
        assert 0.65 < row["step"] / (row["frames"] / r[f"{name}_train_fps"]) < 1.35


def test_full_size_runs_are_compared_in_the_sizes_that_ran():
    """SHAPES may have other sizes by now. What a process holds beside the model at work, libraries and the other
    model of the pair, is 0.5 to 2.5 GB."""
    path = Path(__file__).parent.parent / "nbs" / "results" / "full_size_cpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    ran = {(r["shape"], r["what"]): from_dict(Shape, r["sizes"]) for r in rows}
    assert ran["base", "tokenizer"].tokenizer_clips == (4, 64)
    assert ran["paper", "frame"].tokenizer.transformer.context == 192
    for r in rows:
        if r["what"] != "frame":
            found = predict(ran[r["shape"], r["what"]], "2 CPU cores", recompute=True)[r["what"]]
            assert 0.5 < r["memory_gb"] - found["memory"] - found["weights"] < 2.5
