"Play: the simulator beside the dream is the real one, the dream is the one that its noise makes, and no message can break either."
import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from dreamer4_nb.core import RowGenerators, UserError, to_uint8, write_json
from dreamer4_nb.data.envs import make_env
from dreamer4_nb.data.stores import EpisodeStore, pick_held_out, verify
from dreamer4_nb.evaluation.dream_env import DreamFilm
from dreamer4_nb.inputs import to_dict
from dreamer4_nb.method.agent import AgentConfig, AgentHeads
from dreamer4_nb.method.streams import encode_stream
from dreamer4_nb.runs import play
from dreamer4_nb.runs.cli import main, parse, shipped_run
from dreamer4_nb.runs.play import CONTEXT, FUTURES, KEPT, Game, Player, open_game, true_context, uncertainty
from dreamer4_nb.runs.presets import LONG, MICRO
from dreamer4_nb.training.phases import check_trainable
from tests.helpers.models import make_world, output_layers, spread_weights

EPISODE = 3
STEPS = 6


@pytest.fixture(scope="module")
def game():
    return open_game()


@pytest.fixture
def player(game, tmp_path):
    "A game that begins with a demonstration, of one future, for speed."
    player = Player(game, tmp_path, seed=5)
    player.handle({"do": "set", "futures": 1, "steps": 1})
    ask(player, do="reset", **{"from": "demonstration", "episode": EPISODE})
    return player


def ask(player, **message):
    "The answer, which is no error; it can be sent as JSON."
    answer, buffers = player.handle(message)
    assert answer["kind"] != "error", answer
    json.dumps(answer, allow_nan=False)
    return answer, buffers


def pixels(buffer):
    return np.frombuffer(buffer, np.uint8).reshape(64, 64, 3)


def off(one, other):
    "Mean squared difference of two pictures in [0, 1]."
    return np.square(pixels(one) / 255. - pixels(other) / 255.).mean()


def actions_of(n, width=2, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, width)).astype(np.float32)


def present(player):
    "All that a bad message must leave alone: settings, pictures, states, counters."
    pair = player.pair
    moment = pair.truth.moments[-1]
    return (player.settings, pair.t, pair.since, pair.start, len(pair.truth.moments), pair.film.frame.tobytes(), moment.frame.tobytes(),
            pair.truth.env.state().tobytes(), pair.film.latents.numpy().tobytes())


def test_the_simulator_beside_equals_one_that_is_stepped_alone(game, player):
    start = game.demonstrations["lengths"][:EPISODE].sum() + CONTEXT - 1
    alone = make_env(game.task, 0)
    alone.reset()
    alone.set_state(game.demonstrations["states"][start])
    assert np.array_equal(pixels(player.handle({"do": "hello"})[1][1]), alone.render())
    for action in actions_of(STEPS):
        frame, reward, _, _ = alone.step(action)
        answer, buffers = ask(player, do="step", action=action.tolist())
        assert np.array_equal(pixels(buffers[1]), frame) and answer["reward"] == reward


def test_a_simulator_s_own_reset(game, player):
    answer, buffers = ask(player, do="reset", **{"from": "simulator", "seed": 123})
    alone = make_env(game.task, 123)
    frames = [alone.reset(123)] + [alone.step([0, 0])[0] for _ in range(CONTEXT - 1)]
    assert np.array_equal(np.stack(frames), true_context(player.pair.truth)[0][0])
    assert np.array_equal(pixels(buffers[1]), frames[-1]) and answer["t"] == answer["since"] == 0
    seeds = set()
    for _ in range(3):
        ask(player, do="reset", **{"from": "simulator", "seed": None})
        seeds.add(player.pair.truth.seed)
    assert len(seeds) == 3 and min(seeds) >= 2**31 > game.demonstrations["seeds"].max()


def test_both_sides_begin_with_the_same_picture(game, player):
    "Up to the tokenizer's error: on one side it is the frame, on the other its reconstruction."
    for episode in (int(game.held_out[0]), int(game.held_out[7])):
        _, (dream, truth) = ask(player, do="reset", **{"from": "demonstration", "episode": episode})
        frames = true_context(player.pair.truth)[0]
        with torch.no_grad():
            coded = game.world.tokenizer.decode(encode_stream(game.world.tokenizer, frames))
        assert np.array_equal(pixels(truth), frames[0, -1])
        assert abs(pixels(dream).astype(int) - to_uint8(coded[0])[-1]).max() <= 1
        assert off(dream, truth) < 2e-3
        other = ask(player, do="reset", **{"from": "demonstration", "episode": EPISODE})[1][1]
        assert off(dream, truth) < off(other, truth)


def test_the_first_of_many_futures_is_the_dream_that_its_noise_makes(game, player):
    ask(player, do="set", futures=4, steps=2)
    ask(player, do="reset", **{"from": "demonstration", "episode": EPISODE})
    pair = player.pair
    frames, led_to, known, _ = true_context(pair.truth)
    latents = encode_stream(game.world.tokenizer, frames)

    def alone(row):
        "A film of one future, with the noise of a row of a new player with the same seed and the same messages."
        noise = RowGenerators.seeded(5, range(FUTURES[-1]))
        for futures in (2, 1):      # the context noise of `Player(...)` and of the fixture's reset
            DreamFilm(pair.world, latents, led_to, known, noise.select(torch.arange(futures)), pair.tokens)
        four = noise.select(torch.arange(4)).generators
        return DreamFilm(pair.world, latents, led_to, known, RowGenerators([four[row]]), pair.tokens)

    films = [alone(row) for row in range(4)]
    for action in actions_of(STEPS):
        answer, (dream, _) = ask(player, do="step", action=action.tolist())
        drawn = [film.step(action) for film in films]
        assert abs(pixels(dream).astype(int) - drawn[0]).max() <= 3
        expected = torch.stack([film.latents[0] for film in films])
        assert torch.allclose(pair.film.latents, expected, atol=2e-3)
        assert answer["disagreement"] == pytest.approx(uncertainty(expected, game.world.dynamics.latent_std), rel=0.05)
    assert answer["disagreement"] > 0


def test_futures_part_when_they_are_added_and_the_first_goes_on(game, tmp_path):
    one, more = Player(game, tmp_path, seed=1), Player(game, tmp_path, seed=1)
    for player in (one, more):
        ask(player, do="set", futures=1, steps=1)
        ask(player, do="step", action=[0, 0])
    ask(more, do="set", futures=4)
    assert one.pair.film.latents.shape[0] == 1 and more.pair.film.latents.shape[0] == 4
    for action in actions_of(3).tolist():
        alone, (dream, _) = ask(one, do="step", action=action)
        among, (first, _) = ask(more, do="step", action=action)
        assert abs(pixels(dream).astype(int) - pixels(first)).max() <= 3
        assert alone["disagreement"] is None and among["disagreement"] > 0
    ask(more, do="set", futures=2)
    assert ask(more, do="step", action=[0, 0])[0]["disagreement"] > 0 and more.pair.film.latents.shape[0] == 2


def test_since_counts_the_frames_after_the_last_true_one(player):
    for k in range(1, 4):
        answer, _ = ask(player, do="step", action=[0, 0])
        assert (answer["t"], answer["since"]) == (k, k)
    assert ask(player, do="return")[0]["since"] == 0
    answer, _ = ask(player, do="step", action=[0, 0])
    assert (answer["t"], answer["since"]) == (4, 1)
    answer, _ = ask(player, do="reset", **{"from": "demonstration", "episode": EPISODE})
    assert (answer["t"], answer["since"]) == (0, 0)


def test_a_return_shows_the_truth(game, player):
    for action in actions_of(12, seed=3).tolist():
        _, (dream, truth) = ask(player, do="step", action=action)
    drifted = off(dream, truth)
    _, (dream, same) = ask(player, do="return")
    assert same == truth
    assert off(dream, truth) < min(2e-3, drifted)
    known = true_context(player.pair.truth)[2]
    assert known.all()      # the first of the eight frames has a known action, unlike an episode's first


@pytest.mark.parametrize("actor", ["cloned", "imagined", "planner"])
def test_handing_over_changes_who_acts(player, actor):
    assert ask(player, do="step", action=[0.5, -0.5])[0]["action"] == [0.5, -0.5]
    assert ask(player, do="set", actor=actor)[0]["settings"]["actor"] == actor
    given = [ask(player, do="step", action=[0.5, -0.5])[0] for _ in range(4)]
    assert all(answer["actor"] == actor for answer in given) and len({tuple(answer["action"]) for answer in given}) > 1
    assert [0.5, -0.5] not in [answer["action"] for answer in given]
    ask(player, do="set", actor="you")
    assert ask(player, do="step", action=[0.5, -0.5])[0]["action"] == [0.5, -0.5]


def test_a_policy_acts_on_the_dream_and_the_planner_on_the_simulator(game, tmp_path):
    "Two games with one noise, whose simulators differ: the policy does not notice. Two whose dreams differ: the planner does not."
    def acted(actor, seed, shift):
        player = Player(game, tmp_path, seed=seed)
        ask(player, do="set", futures=1, steps=1)
        ask(player, do="reset", **{"from": "demonstration", "episode": EPISODE})
        truth = player.pair.truth
        truth.moments[-1].state[:2] += shift
        player.pair.planner.search.random = np.random.default_rng(0)
        player.pair.sampling.manual_seed(0)
        return play.chosen_action(player.pair, actor)

    assert np.array_equal(acted("cloned", 1, 0), acted("cloned", 1, 0.2))
    assert not np.array_equal(acted("planner", 1, 0), acted("planner", 1, 0.2))
    assert np.array_equal(acted("planner", 1, 0), acted("planner", 2, 0))


def test_the_planner_follows_its_plan_between_plans(player):
    pair = player.pair
    planned, plan = [], pair.planner.plan
    pair.planner.plan = lambda states: planned.append(pair.t) or plan(states)
    ask(player, do="set", actor="planner")
    for _ in range(2 * play.REPLAN):
        ask(player, do="step")
    assert planned == [0, play.REPLAN]
    ask(player, do="set", actor="you")
    ask(player, do="step", action=[0, 0])
    ask(player, do="set", actor="planner")
    ask(player, do="step")
    assert planned[-1] == pair.t - 1


def test_predictions_are_those_of_the_heads(game, player):
    for action in actions_of(3).tolist():
        answer, _ = ask(player, do="step", action=action)
    with torch.no_grad():
        h = player.pair.film.h[:1]
        assert answer["predicted"] == pytest.approx(float(game.heads["cloned"].reward(h)), rel=1e-4)
        assert answer["value"] == pytest.approx(float(game.heads["imagined"].value(h)), rel=1e-4)


def test_a_saved_episode_reads_back_equal(game, player):
    actions = actions_of(STEPS)
    truths = [pixels(ask(player, do="step", action=action.tolist())[1][1]) for action in actions]
    rewards = [moment.reward for moment in player.pair.truth.moments]
    saved, buffers = ask(player, do="save", **{"as": "episode"})
    store = EpisodeStore.open(saved["path"])
    verify(store)
    episode = store.episode(0)
    assert not buffers and len(episode) == CONTEXT + STEPS and episode.task == game.task
    assert np.array_equal(episode.frames[CONTEXT:], truths) and np.array_equal(episode.rewards, np.float32(rewards))
    assert np.array_equal(episode.actions[CONTEXT:], actions) and not episode.actions[0].any()
    assert episode.seed == game.demonstrations["seeds"][EPISODE]
    start = game.demonstrations["lengths"][:EPISODE].sum()
    assert np.array_equal(episode.states[:CONTEXT], game.demonstrations["states"][start:start + CONTEXT])
    replay = make_env(game.task, 0)
    replay.reset()
    replay.set_state(episode.states[CONTEXT - 1])
    for frame, action in zip(episode.frames[CONTEXT:], episode.actions[CONTEXT:]):
        assert np.array_equal(replay.step(action)[0], frame)


def test_training_takes_saved_episodes_beside_those_worth_cloning(game, player, tmp_path):
    for _ in range(2):
        for action in actions_of(STEPS).tolist():
            ask(player, do="step", action=action)
        ask(player, do="save", **{"as": "episode"})
        ask(player, do="reset", **{"from": "demonstration", "episode": EPISODE + 1})
    played = EpisodeStore.open(f"{tmp_path}/*.zarr")
    assert played.n_episodes == 2 and set(played.qualities) == {"unknown"} and played.tasks == [game.task]
    with pytest.raises(UserError, match="expert or medium"):
        check_trainable(played, clip_lengths={}, policy="categorical", labels="intended", gamma=0.95)
    columns = play.demonstrations_of(replace(MICRO, data=f"{tmp_path}/*.zarr"), game.task, played)
    again = Player(replace(game, demonstrations=columns, held_out=np.array([1])), tmp_path)
    assert again.pair.start == "demonstration 1"
    assert np.array_equal(true_context(again.pair.truth)[0][0], played.episode(1).frames[:CONTEXT])


def test_a_long_game_keeps_its_last_minute(player, monkeypatch):
    truth = player.pair.truth
    truth.moments = type(truth.moments)(truth.moments, maxlen=CONTEXT + 2)
    assert KEPT == 60 * player.game.fps
    for action in actions_of(4).tolist():
        ask(player, do="step", action=action)
    episode = play.played_episode(truth)
    assert len(episode) == CONTEXT + 2 and episode.seed == -1 and not episode.actions[0].any()
    assert np.array_equal(episode.actions[-4:], actions_of(4))


def test_a_saved_film(player):
    imageio = pytest.importorskip("imageio.v3")
    refused, _ = player.handle({"do": "save", "as": "film"})
    assert refused["kind"] == "error" and "play first" in refused["error"]
    shown = [ask(player, do="step", action=action.tolist())[1] for action in actions_of(STEPS)]
    saved, (film,) = ask(player, do="save", **{"as": "film"})
    frames = imageio.imread(film, extension=".mp4")
    assert frames.shape == (STEPS, 64 * play.SCALE, 2 * 64 * play.SCALE, 3)
    small = frames[-1, play.SCALE // 2::play.SCALE, play.SCALE // 2::play.SCALE].astype(float)
    both = np.concatenate([pixels(shown[-1][0]), pixels(shown[-1][1])], 1)
    assert abs(small - both).mean() < 8 and saved["name"].endswith(".mp4")


BAD = [
    None, [], "step", 7, {}, {"do": None}, {"do": ["step"]}, {"do": "fly"}, {"do": "step"},
    {"do": "step", "action": [float("nan"), 0]}, {"do": "step", "action": [float("inf"), 0]}, {"do": "step", "action": [2, 0]},
    {"do": "step", "action": [0]}, {"do": "step", "action": "left"}, {"do": "step", "action": {"x": 1}}, {"do": "step", "action": [10**400, 0]},
    {"do": "step", "action": [[0, 0]]}, {"do": "reset"}, {"do": "reset", "from": "memory"}, {"do": "reset", "from": ["simulator"]},
    {"do": "reset", "from": "demonstration", "episode": -1}, {"do": "reset", "from": "demonstration", "episode": 10**400},
    {"do": "reset", "from": "demonstration", "episode": 1.5}, {"do": "reset", "from": "demonstration", "episode": "3"},
    {"do": "reset", "from": "simulator", "seed": -1}, {"do": "reset", "from": "simulator", "seed": 2**32},
    {"do": "reset", "from": "simulator", "seed": True}, {"do": "set", "steps": 3}, {"do": "set", "steps": 16}, {"do": "set", "steps": 0},
    {"do": "set", "steps": "4"}, {"do": "set", "context": 1}, {"do": "set", "context": -0.1}, {"do": "set", "context": float("nan")},
    {"do": "set", "futures": 3}, {"do": "set", "futures": 1.0}, {"do": "set", "futures": True}, {"do": "set", "futures": 10**9},
    {"do": "set", "actor": "nobody"}, {"do": "set", "actor": ["you"]}, {"do": "set", "speed": 2},
    {"do": "set", "steps": 4, "context": 0.5, "futures": 4, "actor": "nobody"}, {"do": "save"}, {"do": "save", "as": "../../film"},
]


@pytest.mark.parametrize("message", BAD, ids=lambda message: repr(message)[:60])
def test_a_bad_message_gives_one_line_and_changes_nothing(player, message):
    ask(player, do="step", action=[0.1, 0.2])
    before = present(player)
    answer, buffers = player.handle(message)
    assert answer["kind"] == "error" and buffers == []
    assert answer["error"] and "\n" not in answer["error"] and len(answer["error"]) < 700
    assert present(player) == before and not list(player.folder.glob("*"))
    assert ask(player, do="step", action=[0, 0])[0]["t"] == 2


def test_settings_are_taken_and_reported(player):
    hello, _ = ask(player, do="hello")
    assert hello["steps"] == [1, 2, 4, 8] and hello["contexts"][0] == 0 and hello["fps"] == 25
    assert (hello["action_dim"], hello["image"], hello["episodes"]) == (2, 64, 1800)
    wanted = {"steps": 8, "context": 0.6, "futures": 2, "actor": "imagined"}
    answer, _ = ask(player, do="set", **wanted)
    assert answer["settings"] == wanted | {"context": 0.5}      # of the grid of eighths, as it is used
    assert player.pair.film.world.schedule.sampling_indices()[1] == (1, 3)
    assert ask(player, do="set", steps=1)[0]["settings"]["context"] == 0.5
    assert ask(player, do="hello")[0]["settings"]["steps"] == 1


def test_players_of_one_game_do_not_touch_each_other(game, tmp_path):
    one, other = Player(game, tmp_path, seed=1), Player(game, tmp_path, seed=2)
    ask(one, do="step", action=[1, 1])
    before = present(other)
    ask(one, do="set", steps=1, futures=8, context=0, actor="cloned")
    ask(one, do="step")
    assert present(other) == before and game.world.schedule == LONG.dynamics.model.schedule


def test_a_player_that_is_dropped_leaves_nothing(game, tmp_path):
    player = Player(game, tmp_path)
    ask(player, do="step", action=[0, 0])
    parts = [weakref.ref(part) for part in (player, player.pair, player.pair.film, player.pair.truth, player.pair.planner)]
    del player
    gc.collect()
    assert [part() for part in parts] == [None] * len(parts)


def test_the_same_seed_and_messages_give_the_same_game(game, tmp_path):
    def played(seed):
        player = Player(game, tmp_path, seed)
        ask(player, do="set", actor="imagined", futures=2, steps=1)
        return [ask(player, do="step")[1] for _ in range(3)]

    assert played(3) == played(3) != played(4)


def test_the_first_game_begins_with_a_held_out_demonstration(game, tmp_path):
    starts = {Player(game, tmp_path, seed).pair.start for seed in range(3)}
    assert len(starts) > 1
    assert {int(start.split()[1]) for start in starts} <= set(game.held_out.tolist())
    own = np.flatnonzero(pick_held_out(np.zeros(1800, int), LONG.held_out, 0))
    assert np.array_equal(game.held_out, own)


@pytest.fixture
def two_tasks():
    "Networks that learned nothing, of two tasks whose actions have 1 and 2 numbers."
    tasks = ("cartpole-swingup", "ball_in_cup-catch")
    tokenizer, dynamics = MICRO.tokenizer.model, MICRO.dynamics.model
    world = make_world(tokenizer, replace(dynamics, n_latents=tokenizer.n_latents, d_latent=tokenizer.d_latent, n_agent=1))
    config = AgentConfig(width=dynamics.transformer.width, hidden=32, tasks=tasks, action_dims=(1, 2))
    heads = AgentHeads(config).eval()
    spread_weights(output_layers(heads))
    return world, heads


def test_a_task_with_narrower_actions_than_the_world(two_tasks, tmp_path):
    world, heads = two_tasks
    demonstrations = play.demonstrations_of(LONG, "cartpole-swingup", None)
    game = Game(world, {"cloned": heads}, "cartpole-swingup", demonstrations, np.array([2]))
    player = Player(game, tmp_path)
    hello, _ = ask(player, do="hello")
    assert hello["action_dim"] == 1 and hello["actors"] == ["you", "cloned", "planner"] and hello["frame"]["value"] is None
    assert ask(player, do="step", action=[0.5])[0]["action"] == [0.5]
    for actor in ("cloned", "planner"):
        ask(player, do="set", actor=actor)
        assert len(ask(player, do="step")[0]["action"]) == 1
    assert torch.equal(game.tokens, heads.tokens(torch.tensor([0])))
    saved, _ = ask(player, do="save", **{"as": "episode"})
    assert EpisodeStore.open(saved["path"]).action_dims == {"cartpole-swingup": 1}


def test_a_world_without_an_agent_and_data_without_states(tmp_path):
    tokenizer, dynamics = MICRO.tokenizer.model, MICRO.dynamics.model
    world = make_world(tokenizer, replace(dynamics, n_latents=tokenizer.n_latents, d_latent=tokenizer.d_latent))
    columns = {"states": np.zeros((20, 0)), "actions": np.zeros((20, 2)), "rewards": np.zeros(20), "lengths": np.array([20]), "seeds": np.array([-1])}
    player = Player(Game(world, {}, "ball_in_cup-catch", columns, np.array([0])), tmp_path)
    hello, _ = ask(player, do="hello")
    assert hello["actors"] == ["you", "planner"] and hello["frame"]["predicted"] is None
    assert player.pair.start.startswith("seed")
    ask(player, do="step", action=[0, 1])
    refused, _ = player.handle({"do": "reset", "from": "demonstration", "episode": 0})
    assert refused["kind"] == "error" and "reset from the simulator" in refused["error"]


def test_games_of_a_run_folder(game, tmp_path):
    with pytest.raises(UserError, match="no run in"):
        open_game(tmp_path / "none")
    run = tmp_path / "run"
    shipped_run(run)
    write_json(run / "config.json", to_dict(LONG))
    opened = open_game(run)
    assert opened.actors == game.actors and torch.equal(opened.tokens, game.tokens)
    with pytest.raises(UserError, match="no task of this run"):
        open_game(run, "cartpole-swingup")
    (run / "imagination.safetensors").unlink()
    assert open_game(run).actors == ["you", "cloned", "planner"]
    (run / "agent.safetensors").unlink()
    assert open_game(run).actors == ["you", "planner"]
    (run / "dynamics.safetensors").unlink()
    with pytest.raises(UserError, match="train dynamics"):
        open_game(run)


def test_disagreement_has_a_unit():
    std = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    unrelated = torch.randn(4000, 4, 8, generator=torch.Generator().manual_seed(1)) * std
    assert uncertainty(unrelated / 4, std) == pytest.approx(0.25, abs=0.01)
    assert uncertainty(10 * unrelated, std) == 1
    assert uncertainty(unrelated[:1], std) is None


def test_the_command(tmp_path, monkeypatch, capsys):
    command = parse("play --run runs/mine --task cartpole-swingup --port 0 --no-show".split())
    assert (command.port, command.show, command.task) == (0, False, "cartpole-swingup")
    assert main(["play", "--port", "70000"]) == 2
    assert "65535" in capsys.readouterr().err
