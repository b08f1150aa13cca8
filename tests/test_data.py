"Corners of windows and latents that the notebook has no room for; what they are for is tested there."
import numpy as np
import pytest
from toy_stores import make, make_joined

from dreamer4_nb.core import UserError
from dreamer4_nb.data import LatentStore, Windows, _shipped, load_demonstrations
from dreamer4_nb.stores import EpisodeStore


def test_windows_of_joined_views_are_their_own_episodes(tmp_path):
    windows = Windows(make_joined(tmp_path)[0], 8, 4, memory=0)
    for number in range(windows.n_windows):
        one = windows.at(number)
        assert (one.frames * 255 == [2, 0, 1, 0, 1, 2][windows.owner[number]]).all() and one.rewards[0, 0] == windows.offset[number]


def test_latents_are_split_as_their_frames(tmp_path):
    store = make(tmp_path / "a.zarr", "a", [5] * 40)
    latents = LatentStore.encode(store, lambda x: x.flatten(2, 3).mean(-1, keepdim=True), tmp_path / "z.zarr", progress=False)
    assert np.array_equal(latents.split(0.1, seed=0)[1].index, store.split(0.1, seed=0)[1].index)


@pytest.mark.parametrize("batch", [1, 3, 7, 16])
def test_draws_before_the_first_step_and_from_few_windows(tmp_path, batch):
    windows = Windows(make(tmp_path / "a.zarr", "a", [12]), 6, batch)                   # 7 windows
    for number in (-2, -1, 0, 1):
        drawn = np.concatenate([windows.draw(step)[0] for step in range(number * windows.steps, (number + 1) * windows.steps)])
        counts = np.bincount(drawn, minlength=7)
        assert len(drawn) == windows.steps * batch and counts.max() - counts.min() <= 1


def test_rare_windows_come_as_often_as_they_should(tmp_path):
    windows = Windows(make(tmp_path / "a.zarr", "a", [40, 40, 40]), 6, 5, weights=[1, 0, 0.1])
    drawn = np.concatenate([windows.draw(step)[0] for step in range(200 * windows.steps)])
    seen = np.bincount(windows.owner[drawn], minlength=3) / len(drawn)
    assert seen[1] == 0 and abs(seen[2] - 0.1 / 1.1) < 0.004


def test_tasks_have_the_same_share_however_much_there_is_of_each(tmp_path):
    store = EpisodeStore.join([make(tmp_path / "a.zarr", "a", [90] * 4), make(tmp_path / "b.zarr", "b", [20])])
    windows = Windows(store, 6, 8)
    of_b = store.task_ids[windows.owner] == 1
    assert of_b.mean() < 0.05 and np.isclose(windows.probabilities[of_b].sum(), 0.5)
    drawn = np.concatenate([windows.draw(step)[0] for step in range(windows.steps)])
    assert abs(of_b[drawn].mean() - 0.5) < 0.01


def test_where_fewer_demonstrations_ship_than_asked_all_are_taken(tmp_path, monkeypatch):
    data, _ = _shipped("cartpole-swingup")
    episodes, frames = len(data["lengths"]), int(data["lengths"][:2].sum())
    few = {name: values if not values.ndim else values[:2] if len(values) == episodes else values[:frames] for name, values in data.items()}
    monkeypatch.setattr("dreamer4_nb.data._shipped", lambda task: (few, "few"))
    monkeypatch.setenv("DREAMER4_CACHE", str(tmp_path))
    assert list(load_demonstrations("cartpole-swingup", episodes=400, progress=False).lengths) == list(few["lengths"])
    with pytest.raises(UserError, match="2 ship for cartpole-swingup"):
        load_demonstrations("cartpole-swingup", episodes=0)
