"The chain in a folder and studies on top of it: which data, weights, settings and seeds each part is given."
import json
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import same_weights

from dreamer4_nb.runs import chain, judge
from dreamer4_nb.runs import study
from dreamer4_nb.evaluation import closed_loop as evaluation
from dreamer4_nb.method.agent import AgentConfig, Policy
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.runs.chain import Run, TaskView, by_task
from dreamer4_nb.runs.folder import ORDER
from dreamer4_nb.runs.judge import closed_loop, finish, measured, policies
from dreamer4_nb.core import UserError, autocast, inference_dtype, load_checkpoint, save_checkpoint, write_json
from dreamer4_nb.inputs import FORMER_NAMES, from_dict
from dreamer4_nb.method.dynamics import DynamicsConfig
from dreamer4_nb.method.imagination import ImaginationConfig
from dreamer4_nb.runs.presets import (AgentPhase, DynamicsPhase, EvaluationPhase, ImaginationPhase, Preset,
                                      TokenizerPhase)
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.runs.study import branch, dream_study, dreamed_return, keep_rows, seeded, with_setting
from dreamer4_nb.method.tokenizer import TokenizerConfig
from dreamer4_nb.training.loop import fit
from dreamer4_nb.training.optimizers import TrainConfig

THIN = TransformerConfig(width=32, depth=2, heads=2, kv_heads=1, time_every=2, context=6)
SHORT = TrainConfig(steps=1, lr=1e-2, warmup=0, dtype="float32", device="cpu", log_every=1, save_every=1)
TASK = "ball_in_cup-catch"
LENGTH = 14


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    "Every number that a phase has of its own is another one."
    path, rng = tmp_path_factory.mktemp("data") / "frames.zarr", np.random.default_rng(0)
    store = EpisodeStore.create(path, TASK, 2, (16, 16, 3))
    for k in range(8):
        actions, intended = (rng.uniform(-1, 1, (LENGTH, 2)).astype(np.float32) for _ in range(2))
        actions[0], intended[0] = 0, 0
        rewards = np.where(np.arange(LENGTH) < 8, -k, 1.0)
        store.append(Episode(actions=actions, intended=intended, rewards=rewards, task=TASK, quality="expert",
                             frames=rng.integers(0, 256, (LENGTH, 16, 16, 3), dtype=np.uint8)))
    store.finish()
    frames = TokenizerConfig(image=16, n_latents=4, d_latent=6, transformer=THIN)
    agent, imagination = AgentConfig(hidden=16, mtp=2), ImaginationConfig(context=3, horizon=2)
    return Preset(
        tasks=(TASK,), data=str(path), held_out=0.25, threads=1, workers=1, seed=3,
        tokenizer=TokenizerPhase(frames, SHORT, batch=7, length=2, focus=0.1, perceptual=0.0, slow_steps=2),
        dynamics=DynamicsPhase(DynamicsConfig(transformer=THIN), SHORT, batch=3, length=4, focus=0.2),
        agent=AgentPhase(agent, SHORT, batch=4, length=5, focus=0.3),
        imagination=ImaginationPhase(imagination, SHORT, batch=5, focus=0.4),
        evaluation=EvaluationPhase(episodes=3, decisions=4, readouts=("sample", "mean"), first_seed=70,
                                   demonstrator=0, dreams=2, videos=0))


class Room:
    "A stand-in for the real environment: a position that actions move, and a reward right of the middle."

    def __init__(self, task, seeds, workers, image):
        self.x, self.image = np.array(seeds) % 3 / 3 - 0.3, image

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def frames(self):
        shades = (127 + 100 * np.clip(self.x, -1, 1)).astype(np.uint8)
        return np.broadcast_to(shades[:, None, None, None], (len(self.x), 16, 16, 3)).copy()

    def reset(self):
        return self.frames()

    def step(self, actions):
        self.x = self.x + 0.3 * actions[:, 0]
        return self.frames(), (self.x > 0).astype(float), np.ones(len(self.x)), np.zeros(len(self.x), bool)


@pytest.fixture(autouse=True)
def room(monkeypatch):
    monkeypatch.setattr(evaluation, "VectorEnv", Room)


def watch(monkeypatch, module, *names):
    "The arguments of every call of functions that a module uses: (name, arguments, keywords)."
    calls = []
    for name in names:
        def noted(*args, name=name, real=getattr(module, name), **kwargs):
            calls.append((name, args, kwargs))
            return real(*args, **kwargs)
        monkeypatch.setattr(module, name, noted)
    return calls


TRAIN = ("train_tokenizer", "train_dynamics", "train_agent", "train_imagination")


@pytest.fixture(scope="module")
def made(preset, tmp_path_factory):
    "A finished run, and what its training functions were given."
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = watch(monkeypatch, chain, *TRAIN)
        run = Run(tmp_path_factory.mktemp("run"), preset)
        run.train("imagination")
    return SimpleNamespace(run=run, view=by_task(run)[0], given={name: (args, kwargs) for name, args, kwargs in calls})


def weights(folder, name):
    return (folder / f"{name}.safetensors").read_bytes()


# The chain

def test_each_phase_gets_what_those_before_it_made(made, preset):
    run, given = made.run, made.given
    assert list(given) == list(TRAIN)
    train, held = (set(part.index.tolist()) for part in run.split)
    assert len(held) == 2 and train | held == set(range(8)) and not train & held
    store, = given["train_tokenizer"][0]
    assert set(store.index.tolist()) == train and store.observation == "frames"
    for name in TRAIN[1:]:
        assert set(given[name][0][0].index.tolist()) == train and given[name][0][0].observation == "latents"
    assert set(run.latents[1].index.tolist()) == held
    assert given["train_agent"][0][1] is run.dynamics
    world, heads = given["train_imagination"][0][1:]
    assert world.tokenizer is run.tokenizer and world.dynamics is run.agent[0] and heads is run.agent[1]


def test_each_phase_gets_its_own_settings(made, preset):
    for name, (_, kwargs) in made.given.items():
        phase = getattr(preset, name.removeprefix("train_"))
        assert kwargs["run_dir"] == made.run.folder
        assert kwargs["batch"] == phase.batch and kwargs["focus"] == phase.focus
        assert kwargs["train"].seed == phase.train.seed + 3 and type(kwargs["config"]) is type(phase.model)
    assert made.given["train_tokenizer"][1]["slow_steps"] == 2 and made.given["train_dynamics"][1]["length"] == 4
    last = made.given["train_imagination"][1]
    assert last["config"].horizon == 2 and "length" not in last


def test_what_is_there_is_loaded_and_not_made_again(made, preset, monkeypatch):
    for name in TRAIN:
        monkeypatch.setattr(chain, name, None)
    again = Run(made.run.folder, preset)
    again.train("imagination")
    parts = lambda run: (run.tokenizer, run.dynamics, *run.agent, run.imagination)
    pairs = list(zip(parts(again), parts(made.run)))
    assert all(same_weights(*pair) for pair in pairs) and not same_weights(again.imagination, again.agent[1])
    noted = json.loads((made.run.folder / "phases.json").read_text(encoding="utf-8"))
    assert all(entry["seconds"] > 0 for entry in noted.values())


CHANGES = [
    ("tokenizer.model.d_latent", 5, "tokenizer"), ("dynamics.train.lr", 0.5, "dynamics"),
    ("agent.labels", "executed", "agent"), ("imagination.model.beta", 1.0, "imagination"),
    ("held_out", 0.5, "tokenizer"), ("seed", 4, "tokenizer"), ("evaluation.episodes", 9, None),
    ("agent.train.log_every", 7, None), ("dynamics.train.device", "auto", None)]


@pytest.mark.parametrize("setting, value, refused", CHANGES)
def test_other_settings_are_refused_from_their_phase_on(made, preset, tmp_path, setting, value, refused):
    other = with_setting(preset, setting, value)
    if refused is None:
        Run(made.run.folder, other)
        return
    with pytest.raises(UserError, match="made with other settings"):
        Run(made.run.folder, other)
    shared = ORDER[:ORDER.index(refused)]       # a branch that ends there may go on with them
    assert set(branch(made.run, tmp_path, shared[-1], other).phases) == set(shared)


def test_only_the_phase_that_was_asked_for_is_trained(preset, made, tmp_path):
    with pytest.raises(UserError, match="train tokenizer"):
        Run(tmp_path / "a", preset, only="dynamics").train("dynamics")
    trunk = branch(made.run, tmp_path / "b", "latents", preset).folder
    Run(trunk, preset, only="dynamics").train("dynamics")
    with pytest.raises(UserError, match="train agent"):
        Run(trunk, preset, only="imagination").train("imagination")


def test_policies_differ_in_their_heads_and_share_their_seeds(made):
    found = policies(made.view)
    assert list(found) == ["random", "cloning, sample", "PMPO, sample", "cloning, mean", "PMPO, mean"]
    assert all(list(seeds) == [70, 71, 72] for _, seeds in found.values())
    for name, (policy, _) in found.items():
        kind, _, readout = name.partition(", ")
        if readout:
            assert policy.heads is {"cloning": made.run.agent[1], "PMPO": made.run.imagination}[kind]
            assert policy.readout == readout and policy.task == 0
            assert policy.world.dynamics is made.run.agent[0]


def test_records_are_read_until_the_weights_are_others(made, monkeypatch):
    first = closed_loop(made.view)
    assert [r.policy for r in first] == list(policies(made.view))
    assert all(r.seed.tolist() == [70, 71, 72] and r.decisions == 4 for r in first)
    assert len({tuple(r.returns) for r in first}) > 1
    calls = watch(monkeypatch, judge, "evaluate_policy")
    again = closed_loop(made.view)
    assert not calls and [r.returns.tolist() for r in again] == [r.returns.tolist() for r in first]
    assert [r.policy for r in closed_loop(made.view, ("PMPO",))] == ["PMPO, sample", "PMPO, mean"]
    path = made.run.folder / "agent.safetensors"
    before = path.read_bytes()
    state, header = load_checkpoint(path)
    save_checkpoint(path, {key: value + 1 for key, value in state.items()}, header)
    try:
        closed_loop(made.view)
    finally:
        path.write_bytes(before)
    assert len(calls) == 4
    assert all(isinstance(args[0], Policy) for _, args, _ in calls)     # nothing else depends on it


def test_measures_are_of_held_out_episodes_and_read_until_the_weights_are_others(made, monkeypatch):
    run, path = made.run, made.run.folder / "metrics.json"
    path.unlink(missing_ok=True)
    calls = watch(monkeypatch, judge, "tokenizer_report", "rollout_report")
    found = measured(made.view)
    (_, of_tokenizer, _), (_, of_dream, sizes) = calls
    held, train = (list(part.index) for part in run.split[::-1])
    assert of_tokenizer[0] is run.tokenizer
    assert [list(store.index) for store in of_tokenizer[1:]] == [held, train]
    assert of_dream[0].tokenizer is run.tokenizer and of_dream[0].dynamics is run.dynamics      # of phase 1
    assert [list(store.index) for store in of_dream[1:3]] == [held, held]
    assert sizes["windows"] == 2 and sizes["length"] == LENGTH and found["dreams"] == 2
    assert measured(made.view) == json.loads(path.read_text(encoding="utf-8")) and len(calls) == 2
    more, = by_task(Run(run.folder, with_setting(run.asked, "evaluation.dreams", 1)))
    assert measured(more)["dreams"] == 1 and len(calls) == 4
    weights = run.folder / "dynamics.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before + b" ")
    measured(more)
    weights.write_bytes(before)
    assert len(calls) == 6


def test_the_dream_in_use_is_that_of_the_world_after_phase_2(made, monkeypatch):
    run = Run(made.run.folder, made.run.asked)
    view, = by_task(run)
    (made.run.folder / "metrics.json").unlink(missing_ok=True)
    calls = watch(monkeypatch, judge, "rollout_report")
    found = measured(view, in_use=True)
    before, after = (args[0] for _, args, _ in calls)
    assert before.dynamics is run.dynamics and after is run.world and not same_weights(before.dynamics, after.dynamics)
    assert found["dream"]["mean"] != found["dream_in_use"]["mean"]
    assert measured(view, in_use=True) == found == measured(view) and len(calls) == 2
    monkeypatch.setattr(judge, "figures", lambda view, dream: {})
    page, = finish(run)
    assert json.loads((run.folder / "results.json").read_text(encoding="utf-8"))["dream_in_use"] == found["dream_in_use"]
    assert "after phase 2" in page.read_text(encoding="utf-8")


def test_seeds_of_the_data_are_refused_before_anything_is_trained(preset, tmp_path, monkeypatch):
    real = EpisodeStore.open(preset.data)
    monkeypatch.setattr(EpisodeStore, "seeds", property(lambda store: np.arange(len(store.lengths)) + 70))
    run = Run(tmp_path / "run", preset)
    with pytest.raises(UserError, match="3 of 3 seeds .* choose --first-seed 78"):
        run.train("imagination")
    assert not list(run.folder.glob("*.safetensors")) and real.n_episodes == 8


def test_a_run_of_an_older_package_goes_on(made, monkeypatch):
    "Settings that it did not know have had their defaults."
    path = made.run.folder / "phases.json"
    kept = path.read_text(encoding="utf-8")
    phases = json.loads(kept)
    for entry in phases.values():
        for phase, setting in (("agent", "reward_range"), ("agent", "action_dims"), ("tokenizer", "latent_std_weight")):
            entry["made_with"].get(phase, {}).get("model", {}).pop(setting, None)
    path.write_text(json.dumps(phases), encoding="utf-8")
    try:
        monkeypatch.setattr(chain, "train_agent", None)          # is not called
        assert same_weights(Run(made.run.folder, made.run.asked).agent[1], made.run.agent[1])
    finally:
        path.write_text(kept, encoding="utf-8")


def former(settings, names={new: old for old, new in FORMER_NAMES.items()}):
    "Settings, at any depth, under the names that they had in a former version."
    if not isinstance(settings, dict):
        return settings
    return {names.get(key, key): former(value) for key, value in settings.items()}


def test_a_run_of_a_former_version_goes_on(made, preset, tmp_path, monkeypatch):
    "Settings that were kept under former names, in phases.json, config.json and the headers of the checkpoints."
    folder = tmp_path / "run"
    shutil.copytree(made.run.folder, folder)
    for name in ("phases.json", "config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        settings = former(json.loads(text))
        assert json.dumps(settings) != json.dumps(json.loads(text))
        write_json(folder / name, settings)
    for path in folder.glob("*.safetensors"):
        state, header = load_checkpoint(path)
        save_checkpoint(path, state, former(header))
    for name in TRAIN:
        monkeypatch.setattr(chain, name, None)                   # is not called
    asked = from_dict(Preset, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    run = Run(folder, asked)
    assert asked == preset and same_weights(run.train("imagination"), made.run.imagination)
    assert same_weights(run.tokenizer, made.run.tokenizer) and same_weights(run.agent[0], made.run.agent[0])


def test_a_training_of_a_former_version_goes_on(preset, tmp_path):
    "The state of a phase that was interrupted, whose settings it kept under former names."
    class Stop(Exception):
        pass

    def stopping(step):
        if step == 1:
            raise Stop
        return torch.ones(2, 3)

    def train(batches):
        modules = {"net": torch.nn.Linear(3, 1)}
        config = {"net": {"n_backgrounds": 2, "slow_steps": 3}}
        loss = lambda modules, batch, generator: ({"loss": modules["net"](batch).square().mean()}, {})
        return fit("toy", modules, loss, batches, replace(SHORT, steps=2), tmp_path, model_config=config, progress=False)

    with pytest.raises(Stop):
        train(stopping)
    path = tmp_path / "toy.train.safetensors"
    state, metadata = load_checkpoint(path)
    kept = former(metadata)
    assert kept["model"]["net"] == {"scenes": 2, "settle": 3} and "normalise" in kept["training"]
    save_checkpoint(path, state, kept)
    assert [row["step"] for row in train(lambda step: torch.ones(2, 3))] == [1, 2]


def test_a_finished_run_says_what_pmpo_adds_to_cloning(made, monkeypatch):
    monkeypatch.setattr(judge, "figures", lambda view, dream: {})
    page, = finish(made.run)
    results = json.loads((made.run.folder / "results.json").read_text(encoding="utf-8"))
    assert page.exists() and results["task"] == TASK
    pairs = [(f"PMPO, {readout}", f"cloning, {readout}") for readout in ("sample", "mean")]
    compared = [(r["a"], r["b"], r["measure"]) for r in results["pmpo_minus_cloning"]]
    assert compared == [(*pair, measure) for measure in ("success", "returns") for pair in pairs]
    assert [row["policy"] for row in results["closed_loop"]] == list(policies(made.view))
    assert results["tokenizer"] == measured(made.view)["tokenizer"] and results["dream"]["windows"] == 2


def test_a_policy_of_phase_3_says_how_far_it_moved(made):
    "KL(policy || cloned policy), summed over action dimensions, by float64 softmax at the h that both read."
    policy = policies(made.view)["PMPO, sample"][0]
    size = made.run.preset.tokenizer.model.image
    frames = np.random.default_rng(0).integers(0, 256, (3, 2, size, size, 3), dtype=np.uint8)

    def kl_after(policy):
        policy.reset(2)
        for each in frames:
            policy.act(each)
        return policy.kl

    found = kl_after(policy)
    with torch.no_grad(), autocast(policy.device, inference_dtype(policy.device)):
        own, prior = (heads.policy.parameters_of(policy.dream.h)[:, 0].double().log_softmax(-1)
                      for heads in (policy.heads, policy.cloned))
    expected = (own.exp() * (own - prior)).sum((-1, -2))
    assert found.shape == (2,) and (found > 0).all() and np.allclose(found, expected, rtol=1e-3)
    same = judge.Imagined(policy.world, policy.cloned, policy.cloned, "sample", 0, 0)
    assert (kl_after(same) == 0).all()
    assert closed_loop(made.view, ("PMPO",))[0].info["kl"] > 0


def test_each_task_is_judged_on_its_own_episodes(tmp_path):
    for name in "ab":
        store = EpisodeStore.create(tmp_path / f"{name}.zarr", name, 1, (4, 4, 3))
        frames = np.zeros((3, 4, 4, 3), np.uint8)
        store.extend([Episode(actions=np.zeros((3, 1)), rewards=np.zeros(3), frames=frames)] * 4)
        store.finish()
    split = EpisodeStore.open(str(tmp_path / "*.zarr")).split(0.5)
    run = SimpleNamespace(preset=SimpleNamespace(tasks=("a", "b")), folder=tmp_path, split=split, latents=split[::-1])
    views = by_task(run)
    assert [(view.task, view.results_dir) for view in views] == [("a", tmp_path / "a"), ("b", tmp_path / "b")]
    for view in views:
        for parts, whole in ((view.split, split), (view.latents, split[::-1])):
            own = [part.of_task(view.task) for part in whole]
            assert [list(part.index) for part in parts] == [list(part.index) for part in own]
    alone = SimpleNamespace(preset=SimpleNamespace(tasks=("a",)), folder=tmp_path, split=split)
    assert by_task(alone) == [TaskView(alone, "a", tmp_path)] and by_task(alone)[0].split is split


# Studies

def test_a_setting_and_seeds_are_changed_by_name(preset):
    tried = seeded(with_setting(preset, "imagination.model.beta", 1.0), agent=2, dynamics=5)
    assert tried.imagination == replace(preset.imagination, model=replace(preset.imagination.model, beta=1.0))
    assert tried.agent.train == replace(SHORT, seed=2) and tried.dynamics.train == replace(SHORT, seed=5)
    assert seeded(tried, agent=1).agent.train.seed == 3 and tried.tokenizer == preset.tokenizer
    for wrong in ("imagination.model.temperature", "held_out.share", "tokenizers"):
        with pytest.raises(UserError, match="no setting"):
            with_setting(preset, wrong, 1)


def test_a_branch_shares_the_parts_up_to_a_phase(made, preset, tmp_path):
    found = branch(made.run, tmp_path / "b", "dynamics", preset)
    assert set(found.phases) == {"data", "tokenizer", "latents", "dynamics"}
    there = {path.name for path in (tmp_path / "b").glob("*.safetensors")}
    assert there >= {"tokenizer.safetensors", "dynamics.safetensors"}
    assert found.folder == tmp_path / "b" and not list(found.folder.glob("agent*"))
    assert list(found.latents[0].index) == list(made.run.latents[0].index)
    assert weights(found.folder, "dynamics") == weights(made.run.folder, "dynamics")
    with pytest.raises(UserError, match="dreamer4-nb train agent --run"):
        found.agent                                             # reading trains nothing
    assert branch(made.run, tmp_path / "b", "dynamics", preset).dynamics.config == made.run.dynamics.config


SIZE = dict(episodes=2, decisions=3, readouts=("sample",), first_seed=40)


@pytest.fixture(scope="module")
def studied(made):
    "A study of two agents with two policies each, and one of a setting of phase 3."
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(evaluation, "VectorEnv", Room)
        monkeypatch.setattr(study, "dreamed_return", partial(dreamed_return, dreams=3, horizon=2))
        calls = watch(monkeypatch, judge, "evaluate_policy")
        rows = study.study(made.run, agents=2, policies=2, **SIZE)
        one = dict(policies=1, **SIZE)
        strict = study.study(made.run, agents=2, setting="imagination.model.beta", value=1.0, **one)
        executed = study.study(made.run, agents=1, setting="agent.labels", value="executed", **one)
    root = made.run.folder / "study"
    return SimpleNamespace(rows=rows, strict=strict, executed=executed, calls=calls, root=root)


def test_a_study_trains_agents_and_policies_with_seeds_of_their_own(studied, made):
    root = studied.root
    of = lambda part, a, b: weights(root / f"agent{a}-policy{b}", part)
    assert of("agent", 0, 0) == of("agent", 0, 1) == weights(made.run.folder, "agent")
    assert of("agent", 0, 0) != of("agent", 1, 0) == of("agent", 1, 1)
    assert of("imagination", 0, 0) == weights(made.run.folder, "imagination")
    assert len({of("imagination", a, b) for a in (0, 1) for b in (0, 1)}) == 4
    assert {of("dynamics", a, b) for a in (0, 1) for b in (0, 1)} == {weights(made.run.folder, "dynamics")}


def test_the_rows_of_a_study_say_what_stands_behind_them(studied):
    rows = [(r["policy"], r["agent_seed"], r["policy_seed"], r["readout"]) for r in studied.rows]
    wanted = [("random", None, None, None)]
    for a in (0, 1):
        wanted.append(("cloning", a, None, "sample"))
        wanted += [("PMPO", a, b, "sample") for b in (0, 1)]
    assert rows == wanted
    for r in studied.rows:
        assert (r["setting"], r["n"], r["decisions"], r["task"]) == (None, 2, 3, TASK)
        assert (r["dreamed"] is None) == (r["readout"] is None) and r["low"] <= r["success"] <= r["high"]
    assert all(list(args[2]) == [40, 41] and args[3] == 3 for _, args, _ in studied.calls)


def test_a_changed_setting_is_trained_from_its_phase_on(studied, made):
    assert [(r["policy"], r["agent_seed"], r["setting"], r["value"]) for r in studied.strict] == [
        ("PMPO", a, "imagination.model.beta", 1.0) for a in (0, 1)]
    root, strict = studied.root, studied.root / "imagination.model.beta=1.0"
    for a in (0, 1):
        own = strict / f"agent{a}-policy0"
        assert weights(own, "agent") == weights(root / f"agent{a}", "agent")
        assert weights(own, "imagination") != weights(root / f"agent{a}-policy0", "imagination")
    executed = [(r["policy"], r["setting"], r["value"]) for r in studied.executed]
    assert executed == [(policy, "agent.labels", "executed") for policy in ("cloning", "PMPO")]
    other = root / "agent.labels=executed" / "agent0"
    assert weights(other, "dynamics") == weights(made.run.folder, "dynamics")
    assert weights(other, "agent") != weights(made.run.folder, "agent")


def test_the_dreamed_return_is_of_held_out_starts_that_are_not_solved(made, monkeypatch):
    given = []

    def noted(world, heads, policy, batch, config, generator):
        given.append((world, heads, policy, batch, config))
        return {"rewards": torch.arange(21.0).reshape(7, 3)}

    monkeypatch.setattr(study, "imagine", noted)
    heads = made.run.imagination
    assert dreamed_return(made.view, heads, dreams=7, horizon=9) == sum(range(21)) / 7
    world, read, policy, batch, config = given[0]
    assert world is made.run.world and read is heads and policy is heads.policy
    assert config == replace(made.run.preset.imagination.model, horizon=9) and batch.rewards.shape == (7, 3)
    assert {int(-r) for r in batch.rewards[:, 1]} <= set(made.run.latents[1].index.tolist())


def test_dreams_are_studied_from_the_phase_of_the_setting_on(made):
    plain, = dream_study(made.run, seeds=1)
    packed, again = dream_study(made.run, seeds=2, setting="dynamics.model.pack", value=4)
    assert [(r["setting"], r["value"], r["seed"]) for r in (plain, packed, again)] == [
        (None, None, 0), ("dynamics.model.pack", 4, 0), ("dynamics.model.pack", 4, 1)]
    assert plain["tokenizer"] == packed["tokenizer"] == again["tokenizer"]
    assert plain["dream"] == measured(made.view)["dream"]["mean"]
    assert plain["dream"] != packed["dream"] != again["dream"]
    narrow, = dream_study(made.run, seeds=1, setting="tokenizer.model.d_latent", value=4)
    assert narrow["tokenizer"] != plain["tokenizer"]
    assert set(narrow["seconds"]) >= {"tokenizer", "latents", "dynamics"}


def test_rows_take_the_place_of_those_they_repeat(tmp_path):
    row = dict(run="r", task="t", setting=None, value=None, policy="PMPO", agent_seed=0, policy_seed=0,
               readout="mean", decisions=5)
    old, path = [row | {"success": 0.1}, row | {"policy_seed": 1, "success": 0.2}], tmp_path / "rows.json"
    keep_rows(path, old)
    new = [row | {"success": 0.9}, row | {"decisions": 6, "success": 0.3}]
    keep_rows(path, new)
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == [old[1], *new]
