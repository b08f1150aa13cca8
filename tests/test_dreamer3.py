"Dreamer 3 as it is wired: frozen parts under autocast, acting alone or in company, stopped and continued, judged."
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from dreamer4_nb.core import (Batch, UserError, autocast, load_checkpoint, save_checkpoint, seed_everything,
                              step_generator)
from dreamer4_nb.data.stores import EpisodeStore
from dreamer4_nb.inputs import from_dict, to_dict
from dreamer4_nb.method.dreamer3 import (TRAINED, Dreamer3Config, Dreamer3Policy, behavior_loss, dreamer3_loss, new_agent,
                                         rollout, world_loss)
from dreamer4_nb.runs import dreamer3_runs as runs
from dreamer4_nb.runs.cli import EvaluateDreamer3, main, parse
from dreamer4_nb.runs.presets import DREAMER3_PRESETS, Dreamer3Preset

MICRO = DREAMER3_PRESETS["micro"]
FRAME = (16, 16, 3)


def agent(**changes):
    "An agent whose heads do not begin at zero, so that every path carries a gradient."
    seed_everything(0)
    modules = new_agent(replace(MICRO.model, **changes))
    for module in modules.values():
        for weight in module.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.2)
    return modules


def clip(b=2, t=5, valid=None, a=6):
    g = step_generator(1)
    return Batch(frames=torch.rand(b, t, 3, 16, 16, generator=g), latents=None,
                 actions=torch.rand(b, t, a, generator=g) * 2 - 1, action_known=torch.ones(b, t, dtype=torch.bool),
                 intended=torch.zeros(b, t, a), rewards=torch.rand(b, t, generator=g), continues=torch.ones(b, t),
                 task=torch.zeros(b, dtype=torch.long), relevant=torch.zeros(b, dtype=torch.bool), valid=valid)


def with_gradient(modules):
    return {name for name, module in modules.items() if any(x.grad is not None and x.grad.any() for x in module.parameters())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_loss_reaches_its_own_modules_only(dtype):
    for which, expected in (("behavior", {"actor", "critic"}), ("world", {"world"})):
        modules = agent()
        with autocast(torch.device("cpu"), dtype):
            of_world, _, seen = world_loss(modules["world"], clip(), step_generator(0))
            of_behavior, _ = behavior_loss(modules, seen, torch.ones(2, 5), step_generator(0))
        sum((of_behavior if which == "behavior" else of_world).values()).backward()
        assert with_gradient(modules) == expected


def test_padding_counts_in_no_loss():
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[:, 3:] = False
    modules, ours = agent(), clip(valid=valid)
    losses, _, _ = world_loss(modules["world"], ours, step_generator(0))
    ours.rewards[:, 3:] = 7
    ours.frames[:, 3:] = 0
    again, _, _ = world_loss(modules["world"], ours, step_generator(0))
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    ours.rewards[:, 2] = 7
    assert not torch.equal(losses["reward"], world_loss(modules["world"], ours, step_generator(0))[0]["reward"])


def test_a_dream_after_the_end_counts_nothing():
    modules = agent()
    _, _, seen = world_loss(modules["world"], clip(), step_generator(0))
    losses, _ = behavior_loss(modules, seen, torch.zeros(2, 5), step_generator(0))
    assert losses["actor"] == 0 and losses["critic"] == 0


def test_all_sizes_fit():
    for stem, image, groups, classes in ((2, 32, 3, 4), (4, 16, 1, 2), (2, 8, 2, 2)):
        modules = new_agent(replace(MICRO.model, stem=stem, image=image, groups=groups, classes=classes, action_dim=2))
        batch = replace(clip(a=2), frames=torch.rand(2, 5, 3, image, image))
        losses, _ = dreamer3_loss(modules, batch, step_generator(0))
        assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("readout", ["sample", "mean"])
def test_an_environment_acts_the_same_whatever_runs_beside_it(readout):
    modules = agent()
    frames = np.random.default_rng(0).integers(0, 256, (4, 3, *FRAME), np.uint8)
    policy = Dreamer3Policy(modules, readout, seed=3)
    policy.reset(3)
    together = [policy.act(step) for step in frames]
    policy.reset(1, first=1)
    alone = [policy.act(step[1:2]) for step in frames]
    assert np.allclose([step[1] for step in together], [step[0] for step in alone], atol=1e-5)
    assert np.abs(together).max() <= 1
    policy.reset(3)
    assert np.allclose(policy.act(frames[0]), together[0])        # nothing of the episode before is left


def test_an_action_is_remembered():
    "The next state depends on the action that was chosen."
    modules = agent()
    frames = np.zeros((1, *FRAME), np.uint8)
    states = []
    for move in (-1.0, 1.0):
        policy = Dreamer3Policy(modules, "mean")
        policy.reset(1)
        policy.act(frames)
        policy.action[:] = move
        policy.act(frames)
        states.append(policy.h)
    assert not torch.allclose(*states)


def test_an_unknown_readout_is_refused():
    with pytest.raises(UserError, match="choose sample or mean"):
        Dreamer3Policy(agent(), "mode")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    runs.train_dreamer3(folder, MICRO)
    return folder


def weights(folder):
    return load_checkpoint(folder / "dreamer3.safetensors")[0]


def test_rounds_play_their_seeds_and_count_their_steps(whole):
    stores = [EpisodeStore.open(whole / f"episodes-000{k}.zarr") for k in range(3)]
    assert not (whole / "episodes-0003.zarr").exists()
    assert [store.seeds.tolist() for store in stores] == [[1_000_000, 1_000_001], [1_000_002], [1_000_003]]
    rows = runs.curve(MICRO, whole)
    assert [row["steps"] for row in rows] == [24, 36, 48]              # 2, 3 and 4 episodes of 6 decisions of 2 steps
    assert rows[1]["return"] == pytest.approx(float(stores[1].column("rewards").sum()))
    assert load_checkpoint(whole / "dreamer3.train.safetensors")[1]["step"] == 6
    uniform = stores[0].column("actions")
    assert np.abs(uniform).max() > 0.9 and not stores[1].column("actions")[0].any()


@pytest.mark.parametrize("name, call", [("act_episodes", 1), ("fit", 0), ("fit", 1), ("save_checkpoint", 1), ("demonstrate", 1)])
def test_stopped_and_continued_bit_for_bit(whole, tmp_path, monkeypatch, name, call):
    "Before the call with this number the process dies."
    true, calls = getattr(runs, name), []

    def dying(*arguments, **options):
        calls.append(name)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        return true(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runs, name, dying)
        with pytest.raises(KeyboardInterrupt):
            runs.train_dreamer3(tmp_path / "run", MICRO)
    runs.train_dreamer3(tmp_path / "run", MICRO)
    ours, theirs = weights(tmp_path / "run"), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_averaged_weights_are_judged_and_the_others_go_on(whole, tmp_path):
    settings = replace(MICRO, train=replace(MICRO.train, ema=0.5))
    folder = tmp_path / "run"
    runs.train_dreamer3(folder, settings)
    state = load_checkpoint(folder / "dreamer3.train.safetensors")[0]
    live, plain = ({key: x for key, x in found.items() if key.startswith("weights.")}
                   for found in (state, load_checkpoint(whole / "dreamer3.train.safetensors")[0]))
    assert all(torch.equal(x, plain[key]) for key, x in live.items())      # an average changes no step and no episode
    policy = runs.load_dreamer3(folder)[0]["actor"].state_dict()
    for key, x in policy.items():
        assert torch.equal(x, state[f"average.actor.{key}"])
    assert any(not torch.equal(x, live[f"weights.actor.{key}"]) for key, x in policy.items())


def test_weights_that_do_not_say_their_step_are_written_anew(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    save_checkpoint(folder / "dreamer3.safetensors", weights(folder), {"dreamer3": {}})
    with pytest.raises(UserError, match="again"):
        runs.whole_rounds(MICRO, folder)
    runs.train_dreamer3(folder, MICRO)
    assert runs.whole_rounds(MICRO, folder) == 3


def test_stopped_within_a_round_bit_for_bit(whole, tmp_path, monkeypatch):
    true, calls = runs.dreamer3_loss, []

    def dying(modules, batch, generator):
        calls.append(1)
        if len(calls) == 4:                                                # the second step of the second round
            raise RuntimeError("power cut")
        return true(modules, batch, generator)

    settings = replace(MICRO, train=replace(MICRO.train, save_every=1))    # which does not change the result
    with monkeypatch.context() as patch:
        patch.setattr(runs, "dreamer3_loss", dying)
        with pytest.raises(RuntimeError):
            runs.train_dreamer3(tmp_path / "run", settings)
    assert load_checkpoint(tmp_path / "run" / "dreamer3.train.safetensors")[1]["step"] == 3
    report = runs.evaluate_dreamer3(tmp_path / "run", 1)                   # of the first round, the last whole one
    assert report["updates"] == 2 and report["environment_steps"] == 24 and len(report["curve"]) == 2
    runs.train_dreamer3(tmp_path / "run", settings)
    assert all(torch.equal(x, weights(whole)[key]) for key, x in weights(tmp_path / "run").items())


def test_another_seed_is_another_run(whole, tmp_path):
    runs.train_dreamer3(tmp_path / "run", replace(MICRO, train=replace(MICRO.train, seed=1)))
    assert any(not torch.equal(x, weights(whole)[key]) for key, x in weights(tmp_path / "run").items())


def test_only_what_can_be_is_begun(whole, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="batch is 2 there, 3 here; choose another --run"):
        runs.train_dreamer3(whole, replace(MICRO, batch=3))
    with pytest.raises(UserError, match="discrete actions"):
        runs.train_dreamer3(tmp_path / "cart", replace(MICRO, task="gymnasium:CartPole-v1"))
    with pytest.raises(UserError, match="leave it out"):
        replace(MICRO, train=replace(MICRO.train, steps=5))
    with pytest.raises(UserError, match="choose another --first-seed"):
        runs.evaluate_dreamer3(whole, 2, first_seed=1_000_003)
    with pytest.raises(UserError, match="no run in"):
        runs.load_dreamer3(tmp_path / "nothing")
    assert not list(tmp_path.glob("*/episodes*"))


def test_the_evaluation_measures_what_the_policy_does(whole):
    report = runs.evaluate_dreamer3(whole, 3)
    kept = json.loads((whole / "evaluation.json").read_text())
    assert kept == json.loads(json.dumps(report))
    assert report["return"] == runs.evaluate_dreamer3(whole, 3)["return"]  # deterministic
    assert report["return"] != runs.evaluate_dreamer3(whole, 3, 60_000)["return"]
    assert report["return"]["min"] <= report["return"]["median"] <= report["return"]["max"]
    assert report["images"]["mean_frame"]["psnr"] > report["images"]["reconstruction"]["psnr"]  # it learned nothing
    assert report["environment_steps"] == 48 and report["updates"] == 6 and runs.dream_table(report) == []
    assert (whole / "episode.webp").stat().st_size > 0 and (whole / "curve.png").exists()


def test_the_spread_of_returns():
    found = runs.spread(np.array([1.0, 2.0, 6.0]))
    assert (found["mean"], found["median"], found["min"], found["max"]) == (3.0, 2.0, 1.0, 6.0)
    assert found["std"] == pytest.approx(7**0.5) and 1 <= found["low"] < 3 < found["high"] <= 6


def test_reconstruction_shows_the_mean_frame_floor():
    "A world that draws the truth has no error; the mean frame of two pictures does."
    class Perfect:
        def observe(self, frames, actions, generator):
            assert not actions[:, 0].any() and actions[:, 1:].all() and actions.shape[:2] == frames.shape[:2]
            return type("Seen", (), {"features": frames})

        def decoder(self, features):
            return features

    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 4, *FRAME), np.uint8)
    played = type("Records", (), {"frames": frames, "actions": np.ones((5, 3, 2), np.float32)})
    report = runs.image_report(Perfect(), played, every=2)
    true = torch.from_numpy(frames[:, ::2] / 255.0).flatten(0, 1)
    error = (true - true.mean(0)).square().mean()
    assert report["reconstruction"]["psnr"] > 60 and report["reconstruction"]["ssim"] == pytest.approx(1)
    assert report["mean_frame"]["psnr"] == pytest.approx(float(-10 * error.log10()), abs=1e-3)


def test_a_rollout_watches_and_then_dreams():
    "The given frames are watched as by `observe`; after them each state comes from the one before, its action and the prior."
    world, prefix = agent()["world"], 3
    frames, actions = torch.rand(2, 5, 3, 16, 16), torch.rand(2, 5, 6)
    features = rollout(world, frames[:, :prefix], actions, step_generator(4))
    own = step_generator(4)
    seen = world.observe(frames[:, :prefix], actions[:, :prefix], own)
    assert torch.equal(features[:, :prefix], seen.features)
    noise = world.noise((2, 2), own)
    h, z = seen.h[:, -1], seen.z[:, -1]
    for k in range(2):
        h = world.advance(h, z, actions[:, prefix + k])
        z = world.guess(h, noise[:, k])
        assert torch.allclose(features[:, prefix + k], torch.cat([h, z], -1))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    "Ten recorded episodes of 20 random decisions, and settings that learn from them alone."
    path = tmp_path_factory.mktemp("recorded") / "walks.zarr"
    assert main(f"collect --task walker-walk --by random --image 16 --episodes 10 --decisions 20 --out {path}".split()) == 0
    return replace(MICRO, data=str(path), rounds=1)


def test_it_learns_from_recordings_alone(recorded, tmp_path, monkeypatch, capsys):
    drawn = []

    class Spy(runs.Windows):
        def __init__(self, store, *arguments):
            drawn.append(store.seeds.tolist())
            super().__init__(store, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "Windows", Spy)
        runs.train_dreamer3(tmp_path / "run", recorded)
    train, held = runs.recordings(runs.fitted(recorded))
    assert drawn == [train.seeds.tolist()] and not set(drawn[0]) & set(held.seeds.tolist()) and len(held) == 1
    assert not list((tmp_path / "run").glob("episodes*"))
    (row,) = runs.curve(recorded, tmp_path / "run")
    assert row["steps"] == 0 and row["return"] == pytest.approx(float(train.column("rewards").sum()) / 9)

    with monkeypatch.context() as patch:                                   # stopped and continued
        calls = []
        true = runs.dreamer3_loss
        patch.setattr(runs, "dreamer3_loss", lambda *given: calls.append(1) or (true(*given) if len(calls) < 2 else 1 / 0))
        with pytest.raises(ZeroDivisionError):
            runs.train_dreamer3(tmp_path / "again", replace(recorded, train=replace(recorded.train, save_every=1)))
    runs.train_dreamer3(tmp_path / "again", replace(recorded, train=replace(recorded.train, save_every=1)))
    assert all(torch.equal(x, weights(tmp_path / "run")[key]) for key, x in weights(tmp_path / "again").items())

    report = runs.evaluate_dreamer3(tmp_path / "run", 2)
    assert report["environment_steps"] == 0 and report["updates"] == 2 and report["dream"]["windows"] == 1
    assert set(report["dream"]["mean"]) == {"dream", "reconstruction", "copy_last", "mean_frame"}
    assert [row[""] for row in runs.dream_table(report)] == list(report["dream"]["mean"])
    assert main(f"dreamer3-evaluate --run {tmp_path / 'run'} --episodes 2".split()) == 0
    assert "copy_last" in capsys.readouterr().out
    with pytest.raises(UserError, match="not fresh"):
        runs.evaluate_dreamer3(tmp_path / "run", 2, first_seed=0)

    runs.train_dreamer3(tmp_path / "run", replace(recorded, rounds=2))       # and then goes on online
    assert [store.name for store in (tmp_path / "run").glob("episodes*")] == ["episodes-0001.zarr"]
    assert [row["steps"] for row in runs.curve(recorded, tmp_path / "run")] == [0, 12]


def test_recordings_that_do_not_suit_are_refused(recorded, tmp_path):
    with pytest.raises(UserError, match="holds frames of shape .16, 16, 3.; expected frames of .32, 32, 3."):
        runs.train_dreamer3(tmp_path / "run", replace(recorded, model=replace(recorded.model, image=32)))
    with pytest.raises(UserError, match="holds walker-walk, not cheetah-run"):
        runs.train_dreamer3(tmp_path / "run", replace(recorded, task="cheetah-run"))
    assert not (tmp_path / "run" / "dreamer3.safetensors").exists()


def test_the_dream_report_measures_dreams(recorded, monkeypatch):
    "A world that draws the truth while it watches and gray afterwards has the errors of gray; actions that do nothing have ratio 1."
    _, held = runs.recordings(runs.fitted(recorded))

    class Gray:
        config = recorded.model

        def observe(self, frames, actions, generator):
            return type("Seen", (), {"features": frames})

        def decoder(self, features):
            return features

    def gray_after(world, frames, actions, generator):
        assert frames.shape[1] == 8
        return torch.cat([frames, torch.full((len(frames), actions.shape[1] - 8, *frames.shape[2:]), 0.5)], 1)

    monkeypatch.setattr(runs, "rollout", gray_after)
    report = runs.dream_report(Gray(), held, length=21)
    frames = torch.from_numpy(held.episode(0).frames[8:21] / 255.0).float()
    error = (frames - 0.5).square().mean((1, 2, 3))
    assert report["per_step"]["dream"]["psnr"] == pytest.approx((-10 * error.log10()).tolist(), abs=1e-3)
    assert report["mean"]["reconstruction"]["psnr"] > 60 and report["frame_shuffle_ratio"] == 1


def test_the_presets_are_what_they_say():
    large = DREAMER3_PRESETS["large"]
    assert large.seeds(large.rounds - 1)[-1] + 1 - large.first_seed == 1000
    c = large.model
    assert (c.deter, c.groups, c.classes, c.embedding, large.batch, large.length) == (512, 32, 32, 1024, 16, 64)
    with torch.device("meta"):
        sizes = {name: sum(x.numel() for x in module.parameters()) for name, module in new_agent(c).items()}
    assert 10e6 < sum(sizes[name] for name in TRAINED) < 30e6
    assert from_dict(Dreamer3Preset, to_dict(large)) == large


def test_the_command(whole, tmp_path, capsys):
    command = parse("dreamer3 --preset large --rounds 7 --model.gamma 0.9 --run there".split())
    assert (command.settings.batch, command.settings.rounds, command.settings.model.gamma) == (16, 7, 0.9)
    assert isinstance(parse(["dreamer3-evaluate"]), EvaluateDreamer3)
    assert main(f"dreamer3 --preset micro --rounds 1 --run {tmp_path / 'run'}".split()) == 0
    assert main(f"dreamer3 --preset micro --rounds 2 --batch 3 --run {tmp_path / 'run'}".split()) == 2
    assert main(f"dreamer3-evaluate --run {tmp_path / 'run'} --episodes 2".split()) == 0
    said = capsys.readouterr()
    assert "choose another --run" in said.err and "SSIM" in said.out and "floor" in said.out
    with pytest.raises(UserError, match="expected 8 times a power of 2"):
        Dreamer3Config(stem=2, image=24)
