"Corners of stores that the notebook has no room for; what they are for is tested there."
import shutil

import fsspec
import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from helpers.toy_stores import make, make_joined

from dreamer4_nb.core import UserError
from dreamer4_nb.data.stores import Episode, EpisodeStore, seeds_of


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


def black(n, width=1, **fields):
    "An episode of n black frames."
    frames = np.zeros((n, 4, 4, 3), np.uint8)
    return Episode(actions=np.zeros((n, width)), rewards=np.zeros(n), frames=frames, **fields)


def make_seeded(path, task, seeds, width=1):
    store = EpisodeStore.create(path, task, width, (4, 4, 3))
    store.extend([black(5 + k, width, seed=seed) for k, seed in enumerate(seeds)])
    return store.finish()


def as_version_1(path):
    "Makes the store at `path` what layout version 1 was: no array of seeds, no note of how wide actions are."
    shutil.rmtree(path / "seed")
    attributes = zarr.open_group(str(path), mode="r+").attrs
    attributes.put({k: v for k, v in attributes.asdict().items() if k not in ("action_dims", "seal")} | {"version": 1})
    return EpisodeStore.open(path)


def test_seeds_go_with_views_joined_stores_and_copied_episodes(tmp_path):
    a = make_seeded(tmp_path / "a.zarr", "a", [7, 2**40, -1, 7])
    b = make_seeded(tmp_path / "b.zarr", "b", [8])
    joined = EpisodeStore.join([a.subset([3, 1]), b])
    assert a.seeds.tolist() == [7, 2**40, -1, 7] and a.seeds.dtype == np.int64
    assert joined.seeds.tolist() == [7, 2**40, 8] and joined.of_task("b").seeds.tolist() == [8]
    copied = EpisodeStore.create(tmp_path / "c.zarr", "a", 1, (4, 4, 3))
    copied.extend([joined.episode(k) for k in range(2)] + [black(3)])
    assert copied.finish().seeds.tolist() == [7, 2**40, -1]


def test_seeds_that_are_taken_are_told_for_each_task_once(tmp_path):
    a = make_seeded(tmp_path / "a.zarr", "a", [7, 3, -1, 7])
    joined = EpisodeStore.join([a, make_seeded(tmp_path / "b.zarr", "b", [8])])
    assert seeds_of(joined, "a").tolist() == [3, 7] and seeds_of(joined, "b").tolist() == [8]
    assert not len(seeds_of(joined, "c")) and not len(seeds_of(a.subset([2]), "a"))


@pytest.mark.parametrize("seed", [None, 1.0, -2, 2**63])
def test_a_seed_that_is_none_is_refused_in_one_line(tmp_path, seed):
    store = EpisodeStore.create(tmp_path / "a.zarr", "a", 1, (4, 4, 3))
    with pytest.raises(UserError, match="seed is .*; expected"):
        store.append(black(5, seed=seed))
    assert not len(store)


def test_version_1_is_read_with_unknown_seeds_and_not_appended_to(tmp_path):
    new = make(tmp_path / "a.zarr", "a", [70, 9, 12])
    shutil.copytree(tmp_path / "a.zarr", tmp_path / "old.zarr")
    old = as_version_1(tmp_path / "old.zarr")
    assert np.array_equal(old.column("frames"), new.column("frames")) and old.seeds.tolist() == [-1] * 3
    assert old.episode(1).seed == -1 and old.action_dims == {"a": 1}
    joined = EpisodeStore.join([old, make_seeded(tmp_path / "b.zarr", "b", [8])])
    assert joined.seeds.tolist() == [-1, -1, -1, 8]
    with pytest.raises(UserError, match="version 1"):
        EpisodeStore.open(tmp_path / "old.zarr", "a").append(black(5))
    assert len(EpisodeStore.open(tmp_path / "old.zarr")) == 3


def test_a_seed_array_that_is_cut_off_is_damage_and_not_an_old_store(tmp_path):
    make_seeded(tmp_path / "a.zarr", "a", [1])
    shutil.rmtree(tmp_path / "a.zarr" / "seed")
    with pytest.raises(UserError, match="lacks its array"):
        EpisodeStore.open(tmp_path / "a.zarr")


def test_each_task_keeps_the_width_of_its_actions(tmp_path):
    joined, a = make_joined(tmp_path)
    assert a.action_dims == {"a": 1}
    assert joined.action_dims == {"a": 1, "b": 3, "c": 2} and list(joined.action_dims) == joined.tasks
    assert joined.of_task("c").action_dims == joined.action_dims


def test_the_width_of_actions_is_the_own_stores_where_it_is_not_noted(tmp_path):
    for name, width in (("a", 1), ("b", 3)):
        make_seeded(tmp_path / f"{name}.zarr", name, [1], width)
    old = [as_version_1(tmp_path / f"{name}.zarr") for name in "ab"]
    assert EpisodeStore.join(old).action_dims == {"a": 1, "b": 3}
    store = EpisodeStore.create(tmp_path / "c.zarr", "c", 2, (4, 4, 3))
    store.extend([black(5, 2), black(5, 2, task="d")])
    assert store.action_dims == {"c": 2, "d": 2}
