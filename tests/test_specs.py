"""A store says what a model needs to know of its tasks; what it does not say has its default."""
import ast
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dreamer4_nb.core import UserError
from dreamer4_nb.data.arrays import open_group, stored_specs
from dreamer4_nb.data.demonstrations import data_specs
from dreamer4_nb.data.envs import load_task
from dreamer4_nb.data.latents import encode_latents
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.data.tasks import PROVIDERS, TASKS, TaskSpec, built_in_spec, known_spec, solved
from dreamer4_nb.inputs import from_dict, to_dict
from dreamer4_nb.runs.presets import MICRO, resolve

ROOT = Path(__file__).parent.parent

ARM = TaskSpec(2, low=(-0.5, 0.0), high=(0.5, 2.0), frame_rate=20, solved_at=0.5, description="stack the cups", source="arms.hdf5")
KEYS = TaskSpec(5, kind="discrete", choices=(3, 2), frame_rate=60, scored=False)
ARM, KEYS = (replace(spec, image=(8, 8)) for spec in (ARM, KEYS))


def make_store(path, specs, width=None, seed=0, finish=True):
    "Four episodes of each task, 8 x 8 pixels."
    rng = np.random.default_rng(seed)
    names = list(specs)
    width = width or max(spec.action_dim for spec in specs.values())
    store = EpisodeStore.create(path, names[0], width, (8, 8, 3))
    for task, spec in specs.items():
        store.describe(task, spec)
        for _ in range(4):
            actions = np.zeros((6, width), np.float32)
            actions[1:, :spec.action_dim] = rng.uniform(-1, 1, (5, spec.action_dim))
            store.append(Episode(actions, rng.uniform(size=6), rng.integers(0, 255, (6, 8, 8, 3), dtype=np.uint8), task=task))
    return store.finish() if finish else store


@pytest.mark.parametrize("spec", [ARM, KEYS, TaskSpec()])
def test_a_spec_survives_json(spec):
    assert from_dict(TaskSpec, to_dict(spec)) == spec
    assert from_dict(TaskSpec, {}) == TaskSpec()            # a missing key means its default


@pytest.mark.parametrize("wrong", [
    dict(action_dim=-1), dict(action_dim=2, kind="keys"), dict(action_dim=3, choices=(3,)), dict(action_dim=3, kind="discrete"),
    dict(action_dim=3, kind="discrete", choices=(2,)), dict(action_dim=1, low=(0.0,)), dict(action_dim=2, low=(0.0,), high=(1.0,)),
    dict(action_dim=1, low=(1.0,), high=(1.0,)), dict(frame_rate=0.0), dict(image=(64,)), dict(image=(0, 64)), dict(solved_at="much"),
    dict(action_dim=1, low=(float("nan"),), high=(1.0,)), dict(scored=1)])
def test_a_spec_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(UserError, match="TaskSpec"):
        TaskSpec(**wrong)


def test_a_store_keeps_the_spec_of_each_task(tmp_path):
    store = make_store(tmp_path / "two.zarr", {"arm": ARM, "keys": KEYS})
    again = EpisodeStore.open(tmp_path / "two.zarr")
    for one in (store, again, again.subset([0]), again.of_task("keys")):
        assert one.spec("arm") == ARM and one.spec("keys") == KEYS and one.action_dims == {"arm": 2, "keys": 5}
    with pytest.raises(UserError, match="holds no other"):
        again.spec("other")
    with pytest.raises(UserError, match="open for reading"):
        again.describe("arm", KEYS)


def test_a_spec_wider_than_the_rows_is_refused_and_changes_nothing(tmp_path):
    store = make_store(tmp_path / "a.zarr", {"arm": ARM}, finish=False)
    with pytest.raises(UserError, match="5 numbers, the rows have 2"):
        store.describe("keys", KEYS)
    assert store.tasks == ["arm"]


def test_latents_inherit_the_specs(tmp_path):
    frames = make_store(tmp_path / "two.zarr", {"arm": ARM, "keys": KEYS})
    latents = encode_latents(frames, lambda x: torch.zeros(*x.shape[:2], 2, 3), tmp_path / "latents.zarr", progress=False)
    assert latents.spec("arm") == ARM and latents.spec("keys") == KEYS


def test_an_old_store_has_the_defaults_and_what_providers_know(tmp_path):
    for task, width in (("a", 3), ("cartpole-swingup", 1), ("reacher-easy", 3)):
        path = tmp_path / f"{task}.zarr"
        make_store(path, {task: TaskSpec(width)})
        group = open_group(path, "r+")
        kept = {key: value for key, value in group.attrs.asdict().items() if key not in ("specs", "seal", "action_dims")}
        group.attrs.put(kept)
        found = EpisodeStore.open(path).spec(task)
        expected = built_in_spec(task) if task == "cartpole-swingup" else TaskSpec(width)      # reacher's actions have two numbers
        assert found == replace(expected, image=(8, 8))


@pytest.mark.parametrize("damage", [[], {"other": {}}, {"arm": 3}, {"arm": {"action_dim": "2"}}, {"arm": {"width": 2}}, {"arm": {"kind": ["a"]}},
                                    {"arm": {"low": [[1]]}}, {"arm": {"choices": [2]}}, {"arm": None}])
def test_a_store_with_a_foreign_spec_is_refused_by_name(tmp_path, damage):
    make_store(tmp_path / "a.zarr", {"arm": ARM})
    open_group(tmp_path / "a.zarr", "r+").attrs.update({"specs": damage, "seal": None})
    with pytest.raises(UserError, match="a.zarr") as error:
        EpisodeStore.open(tmp_path / "a.zarr")
    assert "\n" not in str(error.value)


def test_joined_stores_complete_each_other(tmp_path):
    video = replace(TaskSpec(), frame_rate=20.0, description="stack the cups", scored=False)
    a = make_store(tmp_path / "a.zarr", {"arm": replace(ARM, frame_rate=None, description="")})
    b = make_store(tmp_path / "b.zarr", {"arm": video, "keys": KEYS}, width=5)
    for joined in (EpisodeStore.join([a, b]), EpisodeStore.join([b, a])):
        assert joined.spec("arm") == replace(ARM, scored=False) and joined.spec("keys") == KEYS


@pytest.mark.parametrize("changes", [dict(low=(-1.0, 0.0)), dict(frame_rate=10.0), dict(low=(), high=()),
                                     dict(kind="discrete", choices=(2,), low=(), high=())])
def test_stores_that_mean_other_things_by_an_action_are_not_joined(tmp_path, changes):
    a = make_store(tmp_path / "a.zarr", {"arm": ARM})
    b = make_store(tmp_path / "b.zarr", {"arm": replace(ARM, **changes)})
    with pytest.raises(UserError, match=r"arm has .* in .*b.zarr"):
        EpisodeStore.join([a, b])


def test_solved_reads_the_threshold_of_the_data():
    rewards = [0, 0.4, 0.6]
    assert solved(ARM, rewards).tolist() == [False, False, True] and solved("no such task", rewards).tolist() == [False, True, True]


@pytest.mark.parametrize("task", TASKS)
def test_the_built_in_tasks_run_at_the_noted_rate(task):
    rate = 1 / (load_task(task, 0).control_timestep() * TASKS[task].action_repeat)
    assert built_in_spec(task).frame_rate == pytest.approx(rate)


def test_a_provider_may_be_added(monkeypatch):
    monkeypatch.setitem(TASKS, "spare", TASKS["reacher-easy"])
    PROVIDERS.append({"mine": ARM}.get)
    try:
        assert known_spec("mine") == ARM and known_spec("spare").action_dim == 2 and known_spec("neither") is None
    finally:
        PROVIDERS.pop()


def test_a_run_asks_its_data_what_the_tasks_need(tmp_path):
    make_store(tmp_path / "a.zarr", {"arm": ARM})
    make_store(tmp_path / "b.zarr", {"keys": KEYS, "film": TaskSpec()})
    preset = resolve(replace(MICRO, tasks=(), data=str(tmp_path / "*.zarr")))
    assert preset.tasks == ("arm", "keys", "film") and preset.agent.model.action_dims == (2, 5, 1)
    assert (preset.dynamics.model.action_dim, preset.tokenizer.model.n_backgrounds) == (5, 3)
    assert resolve(replace(MICRO, tasks=("keys",), data=str(tmp_path / "b.zarr"))).dynamics.model.action_dim == 5
    with pytest.raises(UserError, match="holds arm, not pull; give --tasks so"):
        resolve(replace(MICRO, tasks=("pull",), data=str(tmp_path / "a.zarr")))
    with pytest.raises(UserError, match="no store at .*gone.zarr, and nothing else is known of pull"):
        resolve(replace(MICRO, tasks=("pull",), data=str(tmp_path / "gone.zarr")))


def test_latents_answer_where_the_data_are_gone(tmp_path):
    frames = make_store(tmp_path / "a.zarr", {"arm": ARM})
    encode_latents(frames, lambda x: torch.zeros(*x.shape[:2], 2, 3), tmp_path / "latents.zarr", progress=False)
    assert data_specs(tmp_path / "gone.zarr", (), [tmp_path / "latents.zarr"]) == {"arm": ARM}


def test_specs_are_read_without_rows(tmp_path):
    paths = [tmp_path / name for name in ("a.zarr", "b.zarr")]
    for path, task in zip(paths, ("arm", "keys")):
        make_store(path, {task: {"arm": ARM, "keys": KEYS}[task]})
    joined = EpisodeStore.open(paths)
    for chunk in tmp_path.glob("*.zarr/frames/c"):
        shutil.rmtree(chunk)
    assert stored_specs(paths) == {task: joined.spec(task) for task in joined.tasks}
    with pytest.raises(UserError, match="truncated"):
        EpisodeStore.open(paths)


def test_no_room_above_the_data_asks_the_table_of_built_in_tasks():
    "`training` and `runs` learn widths, rates and thresholds from the data."
    for room in ("training", "runs"):
        for path in (ROOT / "dreamer4_nb" / room).glob("*.py"):
            names = {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
            assert not names & {"TASKS", "task_info", "built_in_spec"}, path


def test_data_that_do_not_fit_the_environment_of_their_name_are_refused_at_the_door(tmp_path):
    make_store(tmp_path / "a.zarr", {"reacher-easy": TaskSpec(3)})
    with pytest.raises(UserError, match="actions of 3 numbers in the data, and of 2 where"):
        resolve(replace(MICRO, tasks=(), data=str(tmp_path / "a.zarr")))
