"""What other implementations got wrong in the tokenizer, in RoPE and in the alignment of actions.

Each test fails on a planted fault: a decoder or encoder that looks ahead, positions that do not cancel, actions off by one.
"""
import numpy as np
import pytest
import torch

from dreamer4_nb.blocks import BlockCausalTransformer, TokenLayout, TransformerConfig, apply_rope
from dreamer4_nb.core import UserError
from dreamer4_nb.data import Episode, EpisodeStore, Windows, building
from dreamer4_nb.tokenizer import Tokenizer, TokenizerConfig

SHAPE = TransformerConfig(width=32, depth=4, heads=2, kv_heads=1, time_every=2, context=3)


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    model = Tokenizer(TokenizerConfig(image=16, patch=8, n_latents=2, d_latent=4, transformer=SHAPE))
    torch.nn.init.normal_(model.to_patch.weight, std=0.2)     # it starts at zero, which would hide every dependence
    return model.eval()


def clip(b=2, t=6):
    return torch.rand(b, t, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("side", ["encode", "decode"])
def test_no_frame_sees_a_later_one(tokenizer, side):
    run, x = getattr(tokenizer, side), clip()
    x = x if side == "encode" else tokenizer.encode(x).detach()
    changed = x.clone()
    changed[:, 4:] = 1 - changed[:, 4:]
    before, after = run(x), run(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-4
    past = x.clone()
    past[:, 3] = 1 - past[:, 3]
    assert (run(past)[:, 4] - before[:, 4]).abs().max() > 1e-5, "frames must see their past"


@pytest.mark.parametrize("side", ["encode", "decode"])
def test_a_longer_clip_changes_nothing(tokenizer, side):
    run, x = getattr(tokenizer, side), clip()
    x = x if side == "encode" else tokenizer.encode(x).detach()
    torch.testing.assert_close(run(x)[:, :3], run(x[:, :3]), atol=1e-5, rtol=0)


def test_streaming_is_the_window(tokenizer):
    x = clip(t=8)                                             # longer than the attention window: the cache rolls
    encoder, decoder = tokenizer.init_cache(len(x))
    z = torch.cat([tokenizer.encode(x[:, t:t + 1], cache=encoder) for t in range(8)], 1)
    torch.testing.assert_close(z, tokenizer.encode(x), atol=1e-5, rtol=0)
    y = torch.cat([tokenizer.decode(z[:, t:t + 1], cache=decoder) for t in range(8)], 1)
    torch.testing.assert_close(y, tokenizer.decode(z), atol=1e-5, rtol=0)


def test_a_masked_patch_is_not_seen(tokenizer):
    x, mask = clip(), torch.zeros(2, 6, 4, dtype=torch.bool)
    mask[..., 0] = True                                       # the upper left patch of every frame
    hidden = x.clone()
    hidden[..., :8, :8] = 0
    assert torch.equal(tokenizer.encode(x, mask=mask), tokenizer.encode(hidden, mask=mask))
    assert not torch.equal(tokenizer.encode(x), tokenizer.encode(hidden))


@pytest.mark.parametrize("shape", [(2, 6, 3, 16, 8), (2, 3, 16, 16), (2, 6, 1, 16, 16)])
def test_a_wrong_shape_is_one_clear_line(tokenizer, shape):
    with pytest.raises(UserError, match="frames") as error:
        tokenizer.encode(torch.zeros(shape))
    assert "\n" not in str(error.value)


def test_rope_depends_on_the_distance_alone():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 16, generator=g), torch.randn(1, 16, generator=g)
    score = lambda i, j: (apply_rope(q, torch.tensor([i])) * apply_rope(k, torch.tensor([j]))).sum()
    for shift in (1, 7, 500):
        torch.testing.assert_close(score(5, 3), score(5 + shift, 3 + shift), atol=1e-4, rtol=0)
    assert (score(5, 3) - score(5, 1)).abs() > 1e-3


def test_a_stream_does_not_know_when_it_began():
    torch.manual_seed(0)
    layout = TokenLayout((("token", 3),), (("token", ("token",)),))
    model = BlockCausalTransformer(SHAPE, layout).eval()
    reach = 2 * (SHAPE.context - 1)                           # two time layers
    x = torch.randn(1, 12, 3, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[:, 4 + reach:], model(x[:, 4:])[:, reach:], atol=1e-5, rtol=0)


def test_actions_led_to_their_frame(tmp_path):
    "A world whose frame shows the running sum of its actions: each frame must move by its own action, not the next one's."
    g = np.random.default_rng(0)
    actions = g.integers(-1, 2, (12, 1)).astype(np.float32)
    actions[0] = 0
    level = 128 + 10 * np.cumsum(actions[:, 0])
    frames = np.broadcast_to(level[:, None, None, None], (12, 4, 4, 3)).astype(np.uint8)
    zeros = np.zeros(12, np.float32)
    with building(tmp_path / "store.zarr") as beside:
        store = EpisodeStore.create(beside, "toy", action_dim=1, frame_shape=(4, 4, 3))
        store.append(Episode(frames=frames, actions=actions, rewards=zeros))
        store.finish()
    windows = Windows(EpisodeStore.open(tmp_path / "store.zarr"), length=6, batch=16, seed=0)
    batch = windows(0)
    moved = batch.frames[:, 1:, 0, 0, 0] - batch.frames[:, :-1, 0, 0, 0]
    torch.testing.assert_close(moved * 255 / 10, batch.actions[:, 1:, 0], atol=1e-4, rtol=0)
    first = torch.from_numpy(windows.offset[windows.draw(0)[0]] == 0)
    assert torch.equal(~batch.action_known[:, 0], first) and batch.action_known[:, 1:].all()
