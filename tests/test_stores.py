"Corners of stores that the notebook has no room for; what they are for is tested there."
import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from toy_stores import make, make_joined

from dreamer4_nb.core import UserError
from dreamer4_nb.stores import EpisodeStore


def test_views_join_and_joined_stores_join(tmp_path):
    joined, a = make_joined(tmp_path)
    assert joined.lengths.tolist() == [12, 70, 9, 70, 9, 12] and [joined.tasks[k] for k in joined.task_ids] == list("aabccc")
    assert [int(joined.episode(k).frames.max()) for k in range(6)] == [2, 0, 1, 0, 1, 2]
    assert [joined.episode(k).states.shape[1] for k in range(6)] == [1, 1, 3, 2, 2, 2]
    assert [joined.of_task(name).state_dim for name in "abc"] == [1, 3, 2] and joined.of_task("b").column("states").shape == (9, 3)
    with pytest.raises(UserError, match="given twice"):
        EpisodeStore.join([joined, a])
    with pytest.raises(UserError, match="view"):
        joined.finish()


def test_one_store_is_split_as_it_always_was(tmp_path):
    "Trained weights were chosen on these episodes; others held out would be measured on what they saw."
    expected = np.sort(np.random.default_rng(0).permutation(40)[:4])
    assert np.array_equal(make(tmp_path / "a.zarr", "a", [5] * 40).split(0.1, seed=0)[1].index, expected)


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
