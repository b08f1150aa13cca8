"Play of any task: choices instead of numbers, the task's own frame rate, an end, a dream without a simulator, and the dream as an environment."
import json
import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from dreamer4_nb.core import UserError
from dreamer4_nb.data.demonstrations import Collection, collect
from dreamer4_nb.data.envs import make_env
from dreamer4_nb.data.gym_env import one_hot
from dreamer4_nb.data.stores import EpisodeStore
from dreamer4_nb.data.tasks import TaskSpec
from dreamer4_nb.runs.chain import Run
from dreamer4_nb.runs.play import Player, open_game, true_context
from dreamer4_nb.runs.presets import MICRO
from tests.test_page import browser, needs_browser, serving, wait_until_played

assert browser      # a fixture
CARTPOLE = "gymnasium:CartPole-v1"
MAZE = "gymnasium:minigrid:MiniGrid-Empty-5x5-v0"
PULL = np.eye(2, dtype=np.float32)


def balance(env, random):
    return int(env.env.unwrapped.state[2] > 0)


def trained(folder, task, by, last, data=None):
    "A run of `micro` on a few episodes of a task."
    if data is None:
        data = folder / "data.zarr"
        collect(data, Collection(task, episodes=12, decisions=20, by=by), 0, False)
    run = Run(folder / "run", replace(MICRO, tasks=(task,), data=str(data), threads=1))
    run.train(last)
    return folder / "run"


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("cartpole"), CARTPOLE, f"{__name__}:balance", "imagination")


@pytest.fixture(scope="module")
def maze(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("maze"), MAZE, "random", "dynamics")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, maze):
    "A world of recordings: the same frames, of a task for which there is no environment."
    folder = tmp_path_factory.mktemp("recorded")
    source = EpisodeStore.open(maze.parent / "data.zarr")
    store = EpisodeStore.create(folder / "data.zarr", "kitchen", 7, (64, 64, 3))
    store.describe("kitchen", TaskSpec(7, "discrete", (4, 3), frame_rate=5.0))
    for k in range(len(source)):
        store.append(replace(source.episode(k), task="kitchen", states=None))
    store.finish()
    return trained(folder, "kitchen", None, "dynamics", folder / "data.zarr")


def ask(player, **message):
    answer, pictures = player.handle(message)
    assert answer["kind"] != "error", answer
    json.dumps(answer, allow_nan=False)
    return answer, pictures


def test_choices_are_played_in_both(cartpole, tmp_path):
    player = Player(open_game(cartpole), tmp_path, seed=1)
    hello, _ = ask(player, do="hello")
    assert (hello["choices"], hello["fps"], hello["starts"], hello["missing"]) == ([2], 50, ["simulator"], "")
    assert hello["actors"] == ["you", "cloned", "imagined"]
    ask(player, do="reset", **{"from": "simulator", "seed": 5})
    assert true_context(player.pair.truth)[0].shape[1] == 1         # choices have no zero
    alone = make_env(CARTPOLE, 5)
    assert np.array_equal(alone.reset(5), player.pair.truth.moments[-1].frame)
    for row in (PULL[1], PULL[0], PULL[1]):
        answer, (_, truth) = ask(player, do="step", action=row.tolist())
        assert truth == alone.step(row)[0].tobytes() and answer["action"] == row.tolist()
    answer, _ = ask(player, do="step", action=[0.4, 0.6])           # the largest number counts, in both
    assert answer["action"] == [0, 1]
    ask(player, do="set", actor="imagined")
    assert sorted(ask(player, do="step")[0]["action"]) == [0, 1]


def test_an_end_is_said_and_another_episode_begins(cartpole, tmp_path):
    player = Player(open_game(cartpole), tmp_path, seed=1)
    answer = {"over": False}
    for _ in range(30):
        if answer["over"]:
            break
        answer, _ = ask(player, do="step", action=[0, 1])
    assert answer["over"]
    refused, _ = player.handle({"do": "step", "action": [0, 1]})
    assert refused["kind"] == "error" and "over" in refused["error"] and "reset" in refused["error"]
    saved, _ = ask(player, do="save", **{"as": "episode"})
    store = EpisodeStore.open(saved["path"])
    assert store.spec(CARTPOLE).choices == (2,) and store.episode(0).continues[-1] == 0
    answer, _ = ask(player, do="reset", **{"from": "simulator", "seed": None})
    assert not answer["over"]
    ask(player, do="step", action=[0, 1])


def test_a_world_of_recordings_is_dreamed_alone(recorded, tmp_path):
    game = open_game(recorded)
    player = Player(game, tmp_path)
    hello, pictures = ask(player, do="hello")
    assert (hello["choices"], hello["fps"], hello["starts"]) == ([4, 3], 5, ["demonstration"]) and "kitchen" in hello["missing"]
    assert len(pictures) == 1 and hello["frame"]["reward"] is None and hello["actors"] == ["you"]
    ask(player, do="reset", **{"from": "demonstration", "episode": 3})
    recorded_frames = game.store.episode(3).frames[:8]
    first = true_context(player.pair.truth)[0][0].numpy()
    assert np.array_equal(first, recorded_frames)
    for option in range(4):
        answer, pictures = ask(player, do="step", action=one_hot((4, 3), [option, 1]).tolist())
    assert answer["since"] == 4 and len(pictures) == 1
    ask(player, do="return")
    assert np.array_equal(true_context(player.pair.truth)[0][0].numpy(), recorded_frames)
    ask(player, do="step", action=[1, 0, 0, 0, 1, 0, 0])
    ask(player, do="save", **{"as": "film"})
    for message, words in (({"do": "save", "as": "episode"}, "no true frames"), ({"do": "reset", "from": "simulator"}, "no simulator")):
        refused, _ = player.handle(message)
        assert refused["kind"] == "error" and words in refused["error"]


def test_the_dream_of_a_run_is_registered(cartpole, maze):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gymnasium.make("dreamer4_nb/Dream-v0", run=str(cartpole), prefix=3, disable_env_checker=True)
        check_env(env.unwrapped)
        assert env.action_space == spaces.Discrete(2) and env.metadata["render_fps"] == 50
        env.reset(seed=1)
        assert env.step(1)[1] != 0                      # the run's reward head
        many = gymnasium.make_vec("dreamer4_nb/Dream-v0", num_envs=3, run=str(cartpole), prefix=3, observe="features")
        seen, _ = many.reset(seed=1)
        assert many.observation_space.contains(seen) and many.spec.id == "dreamer4_nb/Dream-v0"
        world_only = gymnasium.make("dreamer4_nb/Dream-v0", run=str(maze), prefix=3)
        world_only.reset(seed=0)
        assert world_only.step(2)[1] == 0
    with pytest.raises(UserError, match="no run in"):
        gymnasium.make("dreamer4_nb/Dream-v0", run="nowhere")


@pytest.fixture
def opened(browser, tmp_path):
    "Opens the page of a run; afterwards no page may have complained."
    complaints, ended = [], []

    def open_page(run):
        context = serving(tmp_path, "--run", str(run))
        address, _ = context.__enter__()
        tab = browser.new_page(bypass_csp=True)  # waiting for a function needs eval
        tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(address)
        tab.wait_for_selector("[data-t]", timeout=60_000)
        ended.append((tab, context))
        return tab

    yield open_page
    for tab, context in ended:
        tab.close()
        context.__exit__(None, None, None)
    assert complaints == []


def played(tab):
    return int(tab.get_attribute(".d4", "data-t"))


def pressed(tab):
    return tab.eval_on_selector_all("[data-option][aria-pressed=true]", "all => all.map(one => one.dataset.option)")


@needs_browser
def test_keys_are_choices_and_time_stands_still_without_one(opened, maze):
    tab = opened(maze)
    labels = tab.eval_on_selector_all("[data-option]", "all => all.map(one => one.textContent)")
    assert labels == [f"action {k} {k + 1}" for k in range(7)]
    assert tab.eval_on_selector_all("[data-part=from] option", "all => all.map(one => one.value)") == ["simulator"]
    tab.keyboard.press("3")                             # one tap, one decision: forward
    wait_until_played(tab, 1)
    tab.wait_for_timeout(700)
    assert played(tab) == 1 and pressed(tab) == ["2"]
    tab.keyboard.down("2")
    wait_until_played(tab, 6)
    tab.keyboard.up("2")
    tab.wait_for_timeout(700)
    stood = played(tab)
    assert pressed(tab) == ["1"]
    tab.wait_for_timeout(500)
    assert played(tab) == stood
    tab.click("[data-option='0']")                      # a button is as good as its key
    wait_until_played(tab, stood + 1)
    assert pressed(tab) == ["0"]


@needs_browser
def test_a_policy_plays_on_and_an_end_stops_the_page(opened, cartpole):
    tab = opened(cartpole)
    tab.keyboard.press("h")
    wait_until_played(tab, 3)
    tab.keyboard.press("h")
    tab.wait_for_selector("[data-actor=you][aria-pressed=true]")
    tab.keyboard.down("2")
    tab.wait_for_function("document.querySelector('[data-part=status]').textContent.includes('over')", timeout=60_000)
    tab.keyboard.up("2")
    tab.wait_for_timeout(300)
    ended = played(tab)
    assert tab.text_content("[data-part=pause]") == "Play" and tab.is_visible("[data-part=simulator]")
    tab.keyboard.press("r")
    tab.wait_for_function("document.querySelector('.d4').dataset.t === '0'")
    assert ended > 3


@needs_browser
def test_without_a_simulator_the_dream_is_alone_on_the_page(opened, recorded):
    tab = opened(recorded)
    assert not tab.is_visible("[data-part=simulator]") and "no simulator" in tab.text_content("[data-part=status]").lower()
    labels = tab.eval_on_selector_all("[data-option]", "all => all.map(one => one.textContent)")
    assert labels[0] == "0: 0 1" and labels[-1] == "1: 2 7"
    tab.keyboard.down("2")
    tab.keyboard.down("6")
    wait_until_played(tab, 3)
    assert pressed(tab) == ["1", "5"]
    tab.keyboard.up("2")
    tab.keyboard.up("6")
