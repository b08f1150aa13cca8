"Corners of stores and windows that the notebook has no room for; what they are for is tested there."
import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dreamer4_nb.core import UserError
from dreamer4_nb.data import Episode, EpisodeStore, LatentStore, Windows, building


def make(path, task, lengths, width=1, image=4):
    "A store whose frames are filled with the number of their episode."
    with building(path) as beside:
        store = EpisodeStore.create(beside, task, width, (image, image, 3), width)
        store.extend([Episode(actions=np.zeros((n, width)), rewards=np.arange(n), frames=np.full((n, image, image, 3), k, np.uint8),
                              states=np.full((n, width), k)) for k, n in enumerate(lengths)])
        store.finish()
    return EpisodeStore.open(path)


def test_views_join_and_joined_stores_join(tmp_path):
    a, b, c = (make(tmp_path / f"{name}.zarr", name, [70, 9, 12], width) for name, width in (("a", 1), ("b", 3), ("c", 2)))
    joined = EpisodeStore.join([EpisodeStore.join([a.subset([2, 0]), b.subset([1])]), c])
    assert joined.lengths.tolist() == [12, 70, 9, 70, 9, 12] and [joined.tasks[k] for k in joined.task_ids] == list("aabccc")
    assert [int(joined.episode(k).frames.max()) for k in range(6)] == [2, 0, 1, 0, 1, 2]
    assert [joined.episode(k).states.shape[1] for k in range(6)] == [1, 1, 3, 2, 2, 2]
    assert [joined.of_task(name).state_dim for name in "abc"] == [1, 3, 2] and joined.of_task("b").column("states").shape == (9, 3)
    windows = Windows(joined, 8, 4, memory=0)
    for number in range(windows.n_windows):
        one = windows.at(number)
        assert (one.frames * 255 == [2, 0, 1, 0, 1, 2][windows.owner[number]]).all() and one.rewards[0, 0] == windows.offset[number]
    with pytest.raises(UserError, match="given twice"):
        EpisodeStore.join([joined, a])
    with pytest.raises(UserError, match="view"):
        joined.finish()


def test_one_store_is_split_as_it_always_was(tmp_path):
    "Trained weights were chosen on these episodes; others held out would be measured on what they saw."
    store = make(tmp_path / "a.zarr", "a", [5] * 40)
    expected = np.sort(np.random.default_rng(0).permutation(40)[:4])
    assert np.array_equal(store.split(0.1, seed=0)[1].index, expected)
    latents = LatentStore.encode(store, lambda x: x.flatten(2, 3).mean(-1, keepdim=True), tmp_path / "z.zarr", progress=False)
    assert np.array_equal(latents.split(0.1, seed=0)[1].index, expected)


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


class Locked(MemoryFileSystem):
    protocol = "locked"

    def _refuse(self, *args, **kwargs):
        raise RuntimeError("no credentials")

    exists = find = cat_file = _cat_file = info = _refuse


def test_a_bucket_without_access_is_one_line(tmp_path):
    fsspec.register_implementation("locked", Locked, clobber=True)
    for attempt in (EpisodeStore.open, EpisodeStore.create):
        with pytest.raises(UserError, match="access") as told:
            attempt("locked://bucket/a.zarr")
        assert "\n" not in str(told.value)
