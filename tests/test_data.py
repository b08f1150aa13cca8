"Corners of windows and latents that the notebook has no room for; what they are for is tested there."
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from helpers.models import same_batches
from helpers.toy_stores import make, make_joined

from dreamer4_nb.core import UserError, to_float
from dreamer4_nb.data.demonstrations import _shipped, load_demonstrations
from dreamer4_nb.data.latents import encode_latents
from dreamer4_nb.data.mixtures import Mixture, concatenate
from dreamer4_nb.data.windows import Windows, window_index
from dreamer4_nb.data.envs import make_env
from dreamer4_nb.data.stores import Episode, EpisodeStore


def pool(frames):
    "Bytes (b, t, h, w, c) to latents (b, t, c, 1): the mean of each color."
    return to_float(frames).mean((-2, -1)).unsqueeze(-1)


def counting(path, lengths, task="a"):
    "Episodes with actions, intended actions, rewards and states of t / 256 in row t; the last continue is 0."
    store, episodes = EpisodeStore.create(path, task, 1, (1, 1, 1), 1), []
    for n in lengths:
        rows = np.arange(n) / 256
        wide = dict.fromkeys(("actions", "intended", "states"), rows[:, None])
        frames = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
        episodes.append(Episode(**wide, rewards=rows, frames=frames, continues=np.arange(n) < n - 1))
    store.extend(episodes)
    return store.finish()


def test_windows_of_joined_views_are_their_own_episodes(tmp_path):
    windows = Windows(make_joined(tmp_path)[0], 8, 4, memory=0)
    for number in range(windows.n_windows):
        one = windows.at(number)
        assert (one.frames * 255 == [2, 0, 1, 0, 1, 2][windows.episode_index[number]]).all() and one.rewards[0, 0] == windows.first_frame[number]


def test_latents_are_split_as_their_frames(tmp_path):
    store = make(tmp_path / "a.zarr", "a", [5] * 40)
    latents = encode_latents(store, pool, tmp_path / "z.zarr", progress=False)
    assert np.array_equal(latents.split(0.1, seed=0)[1].index, store.split(0.1, seed=0)[1].index)


@pytest.mark.parametrize("batch", [1, 3, 7, 16])
def test_draws_before_the_first_step_and_from_few_windows(tmp_path, batch):
    windows = Windows(make(tmp_path / "a.zarr", "a", [12]), 6, batch)                   # 7 windows
    for number in (-2, -1, 0, 1):
        drawn = np.concatenate([windows.draw(step)[0] for step in range(number * windows.steps, (number + 1) * windows.steps)])
        counts = np.bincount(drawn, minlength=7)
        assert len(drawn) == windows.steps * batch and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("batch", [1, 3, 7, 16])
def test_equally_likely_windows_come_in_shuffled_epochs(tmp_path, batch):
    windows = Windows(make(tmp_path / "a.zarr", "a", [12, 15]), 6, batch, seed=1)       # 17 windows
    orders = [np.concatenate([windows.draw(epoch * windows.steps + step)[0] for step in range(windows.steps)])
              for epoch in range(12)]
    assert all(len(set(order)) == len(order) == 17 // batch * batch for order in orders)
    assert len({tuple(order) for order in orders}) == 12 and len(set(np.concatenate(orders))) == 17


def test_what_a_step_draws_does_not_depend_on_the_steps_before(tmp_path):
    store = make(tmp_path / "a.zarr", "a", [12, 15])
    for options in ({}, {"weights": [1, 3]}):
        there = Windows(store, 6, 4, unlabelled=0.5, **options)
        back = Windows(store, 6, 4, unlabelled=0.5, **options)
        forward = [there.draw(step) for step in range(12)]
        for step in reversed(range(12)):
            for mine, other in zip(back.draw(step), forward[step]):
                assert np.array_equal(mine, other)


def test_in_an_epoch_each_window_comes_as_often_as_its_chance_says(tmp_path):
    "Rounded up or down, whatever makes the chances unequal; and the rows of a batch are spread over the epoch."
    store = make(tmp_path / "a.zarr", "a", [20, 20, 4])
    for options in ({"weights": [1, 3, 2]}, {"focus": 0.6}, {"pad": True}):
        windows = Windows(store, 6, 5, **options)
        expected = windows.probabilities * windows.steps * 5
        for epoch in (0, 1, 7):
            steps = range(epoch * windows.steps, (epoch + 1) * windows.steps)
            seen = np.bincount(np.concatenate([windows.draw(step)[0] for step in steps]), minlength=windows.n_windows)
            assert (np.floor(expected - 1e-9) <= seen).all() and (seen <= np.ceil(expected + 1e-9)).all()
    windows = Windows(store, 6, 10, weights=[1, 3, 0])
    rows = [(windows.episode_index[windows.draw(step)[0]] == 0).sum() for step in range(2000)]
    assert abs(np.mean(rows) - 2.5) < 0.1 and 1 < np.var(rows) < 10 * 0.25 * 0.75


def test_rare_windows_come_as_often_as_they_should(tmp_path):
    windows = Windows(make(tmp_path / "a.zarr", "a", [40, 40, 40]), 6, 5, weights=[1, 0, 0.1])
    drawn = np.concatenate([windows.draw(step)[0] for step in range(200 * windows.steps)])
    seen = np.bincount(windows.episode_index[drawn], minlength=3) / len(drawn)
    assert seen[1] == 0 and abs(seen[2] - 0.1 / 1.1) < 0.004


def test_tasks_have_the_same_share_however_much_there_is_of_each(tmp_path):
    store = EpisodeStore.join([make(tmp_path / "a.zarr", "a", [90] * 4), make(tmp_path / "b.zarr", "b", [20])])
    windows = Windows(store, 6, 8)
    of_b = store.task_ids[windows.episode_index] == 1
    assert of_b.mean() < 0.05 and np.isclose(windows.probabilities[of_b].sum(), 0.5)
    drawn = np.concatenate([windows.draw(step)[0] for step in range(20 * windows.steps)])
    assert abs(of_b[drawn].mean() - 0.5) < 0.02               # of 7040 rows


def test_where_fewer_demonstrations_ship_than_asked_all_are_taken(tmp_path, monkeypatch):
    data, _ = _shipped("cartpole-swingup")
    episodes, frames = len(data["lengths"]), int(data["lengths"][:2].sum())
    few = {name: values if not values.ndim else values[:2] if len(values) == episodes else values[:frames] for name, values in data.items()}
    monkeypatch.setattr("dreamer4_nb.data.demonstrations._shipped", lambda task: (few, "few"))
    monkeypatch.setenv("DREAMER4_CACHE", str(tmp_path))
    assert list(load_demonstrations("cartpole-swingup", episodes=400, progress=False).lengths) == list(few["lengths"])
    with pytest.raises(UserError, match="2 ship for cartpole-swingup"):
        load_demonstrations("cartpole-swingup", episodes=0)


def test_each_shipped_demonstration_knows_the_seed_that_it_began_with():
    store = load_demonstrations(episodes=12, progress=False)
    assert store.seeds.tolist() == list(range(12)) == _shipped("ball_in_cup-catch")[0]["seeds"][:12].tolist()
    for k in (0, 11):
        env = make_env("ball_in_cup-catch", int(store.seeds[k]), image=None)
        env.reset()
        assert np.array_equal(np.float32(env.state()), store.episode(k).states[0])
    assert store.column("continues").all()                    # the file says nothing of continues


def test_latents_keep_seeds_and_the_widths_of_actions(tmp_path):
    a, b = tmp_path / "a.zarr", tmp_path / "b.zarr"
    for path, task, width, seeds in ((a, "a", 1, [5, 6]), (b, "b", 3, [5, -1])):
        store = EpisodeStore.create(path, task, width, (4, 4, 3))
        frames = np.zeros((4, 4, 4, 3), np.uint8)
        actions, rewards = np.zeros((4, width)), np.zeros(4)
        store.extend([Episode(actions=actions, rewards=rewards, frames=frames, seed=seed) for seed in seeds])
        store.finish()
    latents = encode_latents(EpisodeStore.open([a, b]), pool, tmp_path / "z.zarr", progress=False)
    assert latents.seeds.tolist() == [5, 6, 5, -1] and latents.split(0.5)[0].seeds.shape == (2,)
    assert latents.action_dims == latents.of_task("b").action_dims == {"a": 1, "b": 3}


def test_encode_gets_whole_episodes_as_bytes_and_no_more_than_fit(tmp_path, monkeypatch):
    store, given_to_encode = make(tmp_path / "a.zarr", "a", [10] * 7 + [40] * 2 + [10]), []

    def encode(frames):
        assert frames.dtype == torch.uint8 and frames.device.type == "cpu"
        given_to_encode.append(frames)
        return pool(frames)
    monkeypatch.setattr("dreamer4_nb.data.latents.GROUP_BYTES", 3 * 10 * 4 * 4 * 3)     # three episodes of ten frames
    latents = encode_latents(store, encode, tmp_path / "z.zarr", progress=False)
    assert [x.shape[:2] for x in given_to_encode] == [(3, 10), (3, 10), (1, 10), (1, 40), (1, 40), (1, 10)]
    frames = store.column("frames")
    assert torch.equal(torch.cat([x.flatten(0, 1) for x in given_to_encode]), torch.from_numpy(frames))
    assert np.allclose(latents.column("latents")[..., 0], frames.mean((1, 2)) / 255, atol=1e-3)


def test_windows_where_all_episodes_are_long_enough_are_as_they_were(tmp_path):
    "With nothing to pad, padding changes no bit of a batch. What a seed draws is pinned: runs are repeated by it."
    store = make(tmp_path / "a.zarr", "a", [12, 30, 9])
    for weights, drawn in ((None, [[11, 10, 0, 9, 12], [33, 32, 19, 26, 28]]), ([3, 1, 2], [[5, 5, 0, 4, 6], [34, 33, 15, 26, 29]])):
        plain, padding = (Windows(store, 6, 5, seed=3, weights=weights, pad=pad) for pad in (False, True))
        assert [plain.draw(step)[0].tolist() for step in range(2)] == drawn
        assert np.array_equal(plain.probabilities, padding.probabilities) and padding(7).valid is None
        assert all(same_batches(plain(s), padding(s)) for s in range(9))


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=5), length=st.integers(1, 24),
       memory=st.sampled_from([0, 2**30]))
def test_padded_windows_reach_every_frame_and_each_row_is_the_frame_it_led_to(lengths, length, memory):
    with TemporaryDirectory() as folder:
        windows = Windows(counting(f"{folder}/a.zarr", lengths), length, 3, memory=memory, pad=True)
        batch, reached = windows.at(np.arange(windows.n_windows)), set()
        valid = torch.ones_like(batch.action_known) if batch.valid is None else batch.valid
        assert (batch.valid is None) == (min(lengths) >= length)
        for k, (owner, first) in enumerate(zip(windows.episode_index, windows.first_frame)):
            n = min(length, lengths[owner])
            row = torch.arange(first, first + length).clamp(max=lengths[owner] - 1)
            assert valid[k].tolist() == [True] * n + [False] * (length - n)
            assert torch.equal((255 * batch.frames[k]).round().flatten(), row.float())
            assert torch.equal(batch.states[k, :, 0], row / 256)
            for column in (batch.actions[k, :, 0], batch.intended[k, :, 0], batch.rewards[k]):
                assert torch.equal(column, row / 256 * valid[k])
            assert torch.equal(batch.continues[k] == 0, valid[k] & (row == lengths[owner] - 1))
            assert torch.equal(batch.action_known[k], valid[k] & (row > 0))
            reached |= {(owner, int(t)) for t in row}
        assert len(reached) == sum(lengths)
        assert windows.coverage() == {"episodes": 1, "frames": 1, "reward": 1}
        assert np.array_equal(windows.episode_index, window_index(lengths, length, True)[0])


def test_padding_reaches_no_sum_of_rewards(tmp_path):
    store = counting(tmp_path / "a.zarr", [5, 9, 7])
    batch = Windows(store, 9, 3, pad=True).at(range(3))
    assert batch.rewards.sum().item() == store.column("rewards").sum()
    assert (~batch.valid).sum() == 6 and not batch.rewards[~batch.valid].any()
    assert (batch.continues.prod(1) == 0).all() and (batch.continues == 0).sum() == 3


def shipped_balls(path):
    "The shipped demonstrations of the ball with frames of one pixel, and the share of frames with a reward."
    data, _ = _shipped("ball_in_cup-catch")
    cuts = np.cumsum(data["lengths"])[:-1]
    store = EpisodeStore.create(path, "ball_in_cup-catch", 1, (1, 1, 1))
    black = np.zeros((200, 1, 1, 1), np.uint8)
    store.extend([Episode(actions=np.zeros((len(r), 1)), rewards=r, frames=black[:len(r)])
                  for r in np.split(data["rewards"], cuts)])
    return store.finish(), (data["rewards"] > 0).mean()


def test_windows_of_80_frames_say_what_they_leave_out_and_padded_leave_out_nothing(tmp_path):
    balls, in_store = shipped_balls(tmp_path / "balls.zarr")
    plain, padded = Windows(balls, 80, 8), Windows(balls, 80, 64, pad=True)
    assert np.isclose(plain.coverage()["episodes"], 0.354, atol=0.001) and plain.coverage()["reward"] < 0.26
    assert plain.describe() == "windows of 80 frames use 35% of 1800 episodes, 52% of frames, 26% of reward"
    assert padded.describe().endswith(" use 100% of 1800 episodes, 100% of frames, 100% of reward")
    assert set(Windows(balls, 24, 8).coverage().values()) == {1.0}
    drawn = [padded(step) for step in range(60)]
    rewarded = sum((b.rewards > 0).sum() for b in drawn) / sum(b.valid.sum() for b in drawn)
    assert abs(rewarded - in_store) < 0.05  # of 0.37; 0.13 when they are left out, 0.15 when each comes once


def test_nearly_all_is_not_said_to_be_all(tmp_path):
    windows = Windows(counting(tmp_path / "a.zarr", [250, 2, 240]), 3, 1)
    assert "use 67% of 3 episodes, 99% of frames, 99% of reward" in windows.describe()
    assert "2 rows: windows of 3 frames" in Mixture([(windows, 2, False)]).describe()


def test_tasks_keep_their_share_and_weights_their_meaning_with_padding(tmp_path):
    a, b = counting(tmp_path / "a.zarr", [90] * 4 + [10], "a"), counting(tmp_path / "b.zarr", [8, 9], "b")
    store = EpisodeStore.join([a, b])
    windows = Windows(store, 16, 8, pad=True, focus=0.5)
    of_b = store.task_ids[windows.episode_index] == 1
    assert np.isclose(windows.probabilities[of_b].sum(), 0.5) and np.isclose(*windows.probabilities[of_b])
    by_hand = Windows(store, 16, 8, pad=True, weights=[0, 0, 0, 0, 1, 3, 0])
    assert by_hand.probabilities[-3:].tolist() == [0.25, 0.75, 0]


def test_focus_looks_at_the_middle_of_the_real_frames(tmp_path):
    store = EpisodeStore.create(tmp_path / "a.zarr", "a", 1, (1, 1, 1))
    for middle in (0, 1):
        rewards = middle * (np.arange(6) == 3)            # of six frames; the window's middle is padding
        frames = np.zeros((6, 1, 1, 1), np.uint8)
        store.append(Episode(actions=np.zeros((6, 1)), rewards=rewards, frames=frames))
    windows = Windows(store.finish(), 20, 4, focus=1.0, pad=True)
    assert windows.active.tolist() == [True, False] and windows.probabilities.tolist() == [1, 0]


def test_rows_that_may_be_padded_stand_beside_rows_that_are_not(tmp_path):
    long, short = make(tmp_path / "a.zarr", "a", [30]), make(tmp_path / "b.zarr", "b", [6])
    whole, padded = Windows(long, 9, 2, pad=True), Windows(short, 9, 2, pad=True)
    mixed = Mixture([(whole, 2, False), (padded, 1, True)])(0)
    assert mixed.valid.sum(1).tolist() == [9, 9, 6]
    assert mixed[2:].valid.shape == (1, 9) and mixed.to("cpu").valid.dtype == torch.bool
    assert concatenate([whole(0), whole(1)]).valid is None
    with pytest.raises(UserError, match="pad=True"):
        Windows(short, 9, 2)
