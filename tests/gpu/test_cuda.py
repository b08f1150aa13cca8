"What differs on a GPU: fused attention, bfloat16, compiled training, generators, and memory that is bounded."
import contextlib
from dataclasses import replace

import pytest
import torch

from dreamer4_nb.method.agent import Categorical
from dreamer4_nb.method.attention import TransformerConfig, attend
from dreamer4_nb.core import RowGenerators, autocast, step_generator
from dreamer4_nb.method.blocks import empty_cache
from dreamer4_nb.runs.costs import Shape, random_batches
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig, draw_segments, dynamics_loss
from dreamer4_nb.method.flow import noise_like
from dreamer4_nb.method.forcing import draw_levels
from dreamer4_nb.method.generation import WorldModel, rollout
from dreamer4_nb.method.streams import decode_stream, encode_stream
from dreamer4_nb.method.tokenizer import Tokenizer, TokenizerConfig
from dreamer4_nb.training.loop import fit
from dreamer4_nb.training.optimizers import TrainConfig

pytestmark = pytest.mark.cuda
CUDA = torch.device("cuda")
BLOCKS = TransformerConfig(width=64, depth=4, heads=4, kv_heads=2, time_every=2, context=5)
TOKENIZER = TokenizerConfig(image=32, n_latents=4, d_latent=8, transformer=BLOCKS)
DYNAMICS = DynamicsConfig(n_latents=4, d_latent=8, pack=1, transformer=BLOCKS)


def make_world(blocks: TransformerConfig = BLOCKS, image: int = 32) -> WorldModel:
    torch.manual_seed(0)
    tokenizer = Tokenizer(replace(TOKENIZER, image=image, transformer=blocks))
    world = WorldModel(tokenizer, Dynamics(replace(DYNAMICS, transformer=blocks)))
    for layer in (world.dynamics.to_latent, world.tokenizer.to_patch):      # near zero at the start
        torch.nn.init.normal_(layer.weight, std=0.2)
    return world.eval().to(CUDA)


# Attention

def draw_heads(*lead: int, n: int = 6, m: int = 6) -> list[torch.Tensor]:
    "Queries of four heads, keys and values of two."
    g = step_generator(0)
    return [torch.randn(*lead, heads, length, 32, generator=g) for heads, length in ((4, n), (2, m), (2, m))]


def masks() -> dict[str, dict]:
    "Arguments of `attend`, by what they are called here. Everybody sees itself."
    itself = torch.eye(6, dtype=torch.bool)
    of_all = torch.rand(6, 6, generator=step_generator(1)) < 0.5
    of_rows = torch.rand(2, 1, 1, 6, 6, generator=step_generator(2)) < 0.5
    return {"none": {}, "causal": {"causal": True}, "mask": {"mask": of_all | itself},
            "mask of rows": {"mask": of_rows | itself}}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("kind", masks())
def test_fused_attention_is_the_plain_one_and_so_are_its_gradients(kind, dtype, tolerance):
    "Heads 0 and 1 share the first keys, 2 and 3 the second; the plain products are the CPU's, in float32."
    found = []
    for device, precision in ((torch.device("cpu"), torch.float32), (CUDA, dtype)):
        given = [x.to(device, precision).requires_grad_() for x in draw_heads(2, 3)]
        options = {key: x.to(device) if key == "mask" else x for key, x in masks()[kind].items()}
        out = attend(*given, **options)
        out.float().square().sum().backward()
        found.append([x.detach().float().cpu() for x in (out, *(x.grad for x in given))])
    for plain, fused in zip(*found):
        torch.testing.assert_close(fused, plain, atol=tolerance * max(1.0, plain.abs().max().item()), rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_along_more_tracks_than_a_grid_has_blocks(masked):
    "A closed loop of hundreds of episodes looks along more than 65,535 tracks, CUDA's limit for a launch."
    q, k, v = draw_heads(70_000, n=1, m=5)
    mask = torch.tensor([[True, True, False, True, True]]) if masked else None
    plain = attend(q[-50:], k[-50:], v[-50:], mask)
    fused = attend(*(x.to(CUDA, torch.bfloat16) for x in (q, k, v)), None if mask is None else mask.to(CUDA))
    torch.testing.assert_close(fused[-50:].float().cpu(), plain, atol=4e-2, rtol=0)


# Streams

@torch.no_grad()
def test_a_stream_in_bfloat16_equals_its_window():
    "Twelve frames one by one, with a cache of five that fills and rolls, against all at once; and float32."
    model, g = make_world().dynamics, step_generator(0)
    z = torch.randn(3, 12, 4, 8, generator=g).to(CUDA)
    actions = (torch.rand(3, 12, 2, generator=g) * 2 - 1).to(CUDA)
    i, j = (torch.full((3, 12), index, device=CUDA) for index in (4, 3))
    given = z, i, j, actions, torch.ones(3, 12, dtype=torch.bool, device=CUDA)
    exact = model(*given)[0]
    with autocast(CUDA, torch.bfloat16):
        window, cache = model(*given)[0], empty_cache(model.transformer, 3)
        frames = [[x[:, t:t + 1] for x in given] for t in range(12)]
        stream = torch.cat([model(*frame, cache=cache)[0] for frame in frames], 1)
    assert exact.std() > 0.3
    torch.testing.assert_close(stream, window, atol=0.1, rtol=0)
    torch.testing.assert_close(window, exact, atol=0.1, rtol=0)


# Generators

def test_draws_come_from_the_generator_where_it_is():
    "A GPU's generator draws on the GPU; a CPU's, or one for each row, the same numbers for every device."
    config = replace(DYNAMICS, image_rows=0.3, short_clip_length=3)
    on_gpu = [draw_segments(config, 64, 6, step_generator(7, device=CUDA)) for _ in range(2)]
    for first, second in zip(*on_gpu):
        assert first.is_cuda and torch.equal(first, second)
    assert draw_levels((8, 6), DYNAMICS.schedule, step_generator(7, device=CUDA))[0].is_cuda
    x, logits = torch.zeros(4, 5), torch.randn(4, 2, 21, generator=step_generator(1))
    for make in (lambda: step_generator(3), lambda: RowGenerators.seeded(3, range(4))):
        assert torch.equal(noise_like(x.to(CUDA), make()).cpu(), noise_like(x, make()))
        there, here = (Categorical(x).sample(make()).cpu() for x in (logits.to(CUDA), logits))
        torch.testing.assert_close(there, here)


# Memory

def peak(function) -> tuple[int, torch.Tensor]:
    "Bytes that `function()` takes at most beside what was there and what it returns on the GPU; and that."
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = function()
    kept = out.nbytes if out.is_cuda else 0
    return torch.cuda.max_memory_allocated() - before - kept, out


def check_bounded(function, tolerance: float) -> None:
    "`function(budget)` keeps to its budget where it would take several times as much, and returns the same."
    budget = 100 * 10**6
    free, whole = peak(lambda: function(10**12))
    bounded, in_pieces = peak(lambda: function(budget))
    found = f"{bounded / 1e6:.0f} MB of {budget / 1e6:.0f}; without a bound {free / 1e6:.0f} MB"
    assert bounded < budget < free / 3, found
    torch.testing.assert_close(in_pieces, whole, atol=tolerance, rtol=0)


WIDE = replace(BLOCKS, width=256, context=16)


def test_episodes_are_encoded_and_decoded_within_the_budget():
    tokenizer = make_world(WIDE, image=64).tokenizer
    frames = torch.randint(256, (32, 64, 64, 64, 3), dtype=torch.uint8, generator=step_generator(0))
    latents = encode_stream(tokenizer, frames)
    check_bounded(lambda budget: encode_stream(tokenizer, frames, budget), 0.1)
    check_bounded(lambda budget: decode_stream(tokenizer, latents, budget), 0.1)


@torch.no_grad()
def test_many_dreams_stay_within_the_budget():
    world, rows = make_world(WIDE), 2000
    latents, actions = torch.zeros(rows, 8, 4, 8, device=CUDA), torch.zeros(rows, 10, 2, device=CUDA)
    generators = lambda: RowGenerators.seeded(0, range(rows))
    with autocast(CUDA, torch.bfloat16):
        check_bounded(lambda budget: rollout(world, latents, actions, 8, generators(), budget=budget), 0.3)


# Training, last: compiling takes longer than all the rest

def train(batches, run_dir=None, **changes) -> list[dict]:
    torch.manual_seed(0)
    config = TrainConfig(steps=30, lr=3e-3, warmup=1, log_every=1, save_every=10, ema=0.9, dtype="bfloat16",
                         device="cuda", **changes)
    modules = {"dynamics": Dynamics(DYNAMICS)}
    return fit("toy", modules, dynamics_loss, batches, config, run_dir, progress=False)


def test_compiled_training_in_bfloat16_goes_on_where_it_broke_off_and_learns(tmp_path):
    batch = random_batches(Shape(TOKENIZER, DYNAMICS, 8, 6, 2, 2), CUDA)["dynamics"]

    def broken(step):
        if step == 15:
            raise EOFError
        return batch

    with contextlib.suppress(EOFError):
        train(broken, tmp_path, compile=True)
    resumed, eager = train(lambda step: batch, tmp_path, compile=True), train(lambda step: batch)
    assert [row["step"] for row in resumed] == list(range(1, 31))
    mean = lambda rows: sum(row["dynamics"] for row in rows) / len(rows)
    assert mean(resumed[-5:]) == pytest.approx(mean(eager[-5:]), rel=0.05)
    assert mean(resumed[-5:]) < 0.9 * mean(resumed[:5])
