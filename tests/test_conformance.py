"What other implementations got wrong in RoPE and in the alignment of actions; the tests beside this one have the rest."
import numpy as np
import pytest
import torch

from dreamer4_nb.method.attention import TransformerConfig, apply_rope
from dreamer4_nb.method.blocks import BlockCausalTransformer, TokenLayout, empty_cache, mask_rectangles
from dreamer4_nb.core import UserError
from dreamer4_nb.data.arrays import atomic_store
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.method.pruned import prune

SHAPE = TransformerConfig(width=32, depth=4, heads=2, kv_heads=1, time_every=2, context=3)


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
    with atomic_store(tmp_path / "store.zarr") as beside:
        store = EpisodeStore.create(beside, "toy", action_dim=1, frame_shape=(4, 4, 3))
        store.append(Episode(frames=frames, actions=actions, rewards=zeros))
        store.finish()
    windows = Windows(EpisodeStore.open(tmp_path / "store.zarr"), length=6, batch=16, seed=0)
    batch = windows(0)
    moved = batch.frames[:, 1:, 0, 0, 0] - batch.frames[:, :-1, 0, 0, 0]
    torch.testing.assert_close(moved * 255 / 10, batch.actions[:, 1:, 0], atol=1e-4, rtol=0)
    first = torch.from_numpy(windows.first_frame[windows.draw(0)[0]] == 0)
    assert torch.equal(~batch.action_known[:, 0], first) and batch.action_known[:, 1:].all()


LAYOUT = TokenLayout((("read", 3), ("seen", 5), ("other", 2)), (("read", ("read", "seen", "other")), ("seen", ("seen",)), ("other", ("read", "other"))))


@pytest.mark.parametrize("depth, time_every", [(4, 2), (3, 3), (4, 4), (5, 2), (2, 3), (2, 1)])
def test_leaving_out_what_nobody_reads_changes_nothing(depth, time_every):
    "Outputs, gradients and streams, wherever the time layers stand; `other` sees groups that are not neighbours."
    torch.manual_seed(0)
    config = TransformerConfig(width=16, depth=depth, heads=2, kv_heads=1, time_every=time_every, context=3)
    whole, pruned = BlockCausalTransformer(config, LAYOUT), BlockCausalTransformer(config, LAYOUT)
    prune(pruned, 3)
    pruned.load_state_dict(whole.state_dict())
    x = torch.randn(2, 7, LAYOUT.size, 16, requires_grad=True)
    wish, grads = torch.randn(2, 7, 3, 16), []
    for f in (whole, pruned):
        y = f(x)[:, :, :3]
        grads.append(torch.autograd.grad((y * wish).sum(), x)[0])
    torch.testing.assert_close(pruned(x)[:, :, :3], whole(x)[:, :, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        cache = empty_cache(pruned, 2)
        streamed = torch.cat([pruned(frame, cache) for frame in x.split(1, dim=1)], 1)
    torch.testing.assert_close(streamed, pruned(x), atol=1e-5, rtol=1e-5)


def test_rectangles_cover_the_visibility_table_once():
    covered = torch.zeros(LAYOUT.size, LAYOUT.size, dtype=torch.int)
    for rows, columns in mask_rectangles(LAYOUT):
        covered[rows, columns] += 1
    assert torch.equal(covered, LAYOUT.mask().int())
    with pytest.raises(UserError, match="first"):
        BlockCausalTransformer(TransformerConfig(width=16, heads=2, kv_heads=1), LAYOUT, queries=("other",))
