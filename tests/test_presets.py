"A preset is tested as a run: on paper against its data and machine; with small models for two steps of each phase."
import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.shrunk_presets import noise_store, shrunk

from dreamer4_nb.runs import chain, presets
from dreamer4_nb.method.agent import AgentHeads
from dreamer4_nb.core import asset
from dreamer4_nb.inputs import current_names, to_dict
from dreamer4_nb.runs.costs import SHAPES, count_parameters
from dreamer4_nb.runs.memory import MACHINES
from dreamer4_nb.data.stores import EpisodeStore
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.method.dynamics import Dynamics
from dreamer4_nb.method.forcing import draw_levels
from dreamer4_nb.method.generation import WorldModel
from dreamer4_nb.runs.presets import PRESETS, resolve
from dreamer4_nb.data.arrays import atomic_store
from dreamer4_nb.data.stores import Episode
from dreamer4_nb.method.tokenizer import Tokenizer
from dreamer4_nb.training import phases
from dreamer4_nb.training.phases import (encode_store, train_agent, train_dynamics, train_imagination,
                                         train_tokenizer)

META = torch.device("meta")
RESULTS = Path(__file__).parents[1] / "nbs" / "results"
every_preset = pytest.mark.parametrize("name", PRESETS)


def shipped():
    "Lengths (E,) and rewards, an array for each episode, of the demonstrations that ship for ball_in_cup-catch."
    with np.load(asset("demos_ball_in_cup-catch.npz")) as data:
        lengths, rewards = data["lengths"].astype(int), data["rewards"].astype(float)
    return lengths, np.split(rewards, np.cumsum(lengths)[:-1])


# On paper

MILLIONS = {"tiny": (0.88, 0.77, 0.66), "long": (0.88, 1.51, 0.66), "small": (19.7, 23.3, 2.6),
            "base": (114, 308, 10.2), "paper": (407, 1589, 37), "micro": (0.10, 0.026, 0.042)}


@every_preset
def test_sizes_are_those_that_are_meant(name):
    "Of tokenizer, dynamics with agent tokens, and heads."
    p = resolve(PRESETS[name])
    acting = replace(p.dynamics.model, n_agent=p.agent.model.n_agent)
    with META:
        parts = Tokenizer(p.tokenizer.model), Dynamics(acting), AgentHeads(p.agent.model)
    assert [count_parameters(part) / 1e6 for part in parts] == pytest.approx(MILLIONS[name], rel=0.02)


def levels(config, rows, frames):
    "Rows with a teacher, and the share of coarse frames over many batches of so many rows."
    generator, coarse = torch.Generator().manual_seed(0), []
    for _ in range(200):
        _, j, n = draw_levels((rows, frames), config.schedule, generator, config.bootstrap_share,
                              config.p_context, mixed=not config.train_on_context)
        coarse.append((j < config.schedule.grid.j_min).float().mean())
    return n, float(torch.stack(coarse).mean())


@every_preset
@pytest.mark.parametrize("phase", ["dynamics", "agent"])
def test_every_batch_trains_the_large_steps(name, phase):
    """In phase 2 the world loss has the uniform half of the batch. Frames with a target of the teacher's are as
    many as asked for, less those whose own step is the smallest or that are put at the level of the context."""
    p = resolve(PRESETS[name])
    batch, length = getattr(p, phase).batch, getattr(p, phase).length
    rows = batch if phase == "dynamics" else batch // 2
    n, coarse = levels(p.dynamics.model, rows, length)
    assert n >= 1
    assert 0.65 * p.dynamics.model.bootstrap_share < coarse < 1.05 * p.dynamics.model.bootstrap_share
    if name != "paper":      # 80 GB do not hold four of its windows
        assert n / rows == pytest.approx(p.dynamics.model.bootstrap_share, abs=0.1)


@every_preset
def test_dreams_begin_in_every_episode(name):
    assert PRESETS[name].imagination.model.context <= shipped()[0].min()


@every_preset
def test_contexts_are_filled_in_training(name):
    "In use a stream fills the context; a past that no training window had would be strange to the model."
    p = PRESETS[name]
    tokens, world = p.tokenizer.model.transformer.context, p.dynamics.model.transformer.context
    assert tokens <= p.tokenizer.length or p.tokenizer.slow_steps      # the slow part has clips of one frame more
    assert world < p.dynamics.length and world <= p.agent.length and p.imagination.model.context <= world


@every_preset
def test_own_terms_of_the_tokenizer_compare_clips_or_are_off(name):
    "Spread and change are measured over a batch; one clip alone says nothing about them."
    p = PRESETS[name].tokenizer
    slow = p.model.transformer.context + 1
    off = getattr(p.model, "latent_std_weight", 3) == 0 and p.model.slowness == (0, 0)
    assert off or p.batch >= 2 and (not p.slow_steps or p.batch * p.length // slow >= 2)


@every_preset
def test_all_fits_into_the_memory_it_is_meant_for(name):
    "Training leaves a tenth free. On a laptop the libraries (1 GB) and the frames are in the same memory."
    p, (machine, devices, gb) = PRESETS[name], presets.MEANT_FOR[name]
    machine = replace(MACHINES[machine], memory=gb)
    frames = shipped()[0][:p.episodes].sum() * p.tokenizer.model.image ** 2 * 3 / 1e9
    beside = 0.0 if machine.gpu else 1 + frames
    longest = shipped()[0].max() if p.data == "shipped" else p.evaluation.decisions + 1
    for dtype in ("bfloat16",) if machine.gpu else ("bfloat16", "float32"):
        found = presets.predict_phases(p, machine, devices, int(longest), dtype)
        assert found.keys() - {"slow"} == {"tokenizer", "dynamics", "agent", "imagination", "encode", "act"}
        too_large = {phase: row["memory"] for phase, row in found.items() if row["memory"] + beside > 0.9 * gb}
        assert too_large == {}
        assert p.evaluation.episodes / found["act"]["rows"] <= 100


@pytest.mark.parametrize("name", sorted(PRESETS.keys() & SHAPES.keys()))
def test_printed_costs_are_those_of_the_preset(name):
    "Notebook 50 counts shapes; what it says holds for the preset, but for actions and scenes of several tasks."
    shape, tokens = SHAPES[name], PRESETS[name].tokenizer
    found = presets.phase_shapes(PRESETS[name])
    assert found["tokenizer"].tokenizer_clips == shape.tokenizer_clips == (tokens.batch, tokens.length)
    assert (found["dynamics"].batch, found["dynamics"].length) == (shape.batch, shape.length)
    assert found["tokenizer"].tokenizer == replace(shape.tokenizer, n_backgrounds=len(PRESETS[name].tasks))
    assert replace(found["dynamics"].dynamics, action_dim=2, mixed_widths=False) == shape.dynamics


@pytest.mark.parametrize("name, file", [("tiny", "demo"), ("long", "chain")])
def test_what_shipped_was_trained_so(name, file):
    "The settings of the four phases are those of the stored results, but for how they are computed."
    kept = current_names(json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))["preset"])

    def same(old, new):
        if not isinstance(old, dict):
            return old == new
        return all(same(value, new[key]) for key, value in old.items() if key not in ("compile", "device"))

    now = to_dict(resolve(PRESETS[name]))
    assert all(same(kept[phase], now[phase]) for phase in ("tokenizer", "dynamics", "agent", "imagination"))


# Two steps of every phase

@pytest.fixture
def fits(monkeypatch):
    "Every call of `fit` by a phase: its name, the (rows, frames) of its batches, and its history."
    seen = []

    def recording(real):
        def fit(name, modules, loss, batches, *args, **options):
            history = real(name, modules, loss, batches, *args, **options)
            seen.append((name, tuple(batches(0).actions.shape[:2]), history))
            return history
        return fit

    monkeypatch.setattr(phases, "fit", recording(phases.fit))
    return seen


def run_phases(preset, store, folder, latents=None):
    "All phases as notebook 55 calls them; with `latents` nothing is encoded."
    def settings(name):
        phase = getattr(preset, name)
        rest = {k: v for k, v in vars(phase).items() if k not in ("model", "train")}
        return dict(config=phase.model, train=phase.train, run_dir=folder) | rest

    tokens = train_tokenizer(store, **settings("tokenizer"))
    latents = latents or encode_store(store, tokens, folder / "latents.zarr")
    world = train_dynamics(latents, **settings("dynamics"))
    world, heads = train_agent(latents, world, **settings("agent"))
    heads = train_imagination(latents, WorldModel(tokens, world).eval(), heads, **settings("imagination"))
    return tokens, world, heads


@pytest.fixture(scope="module")
def as_long_as_shipped(tmp_path_factory):
    "Stores of tiny frames and of tiny latents with the lengths, rewards and qualities of what ships."
    folder, (lengths, rewards) = tmp_path_factory.mktemp("shipped"), shipped()
    with np.load(asset("demos_ball_in_cup-catch.npz")) as data:
        qualities = data["quality"].astype(str)
    stores, statistics = [], {"mean": np.zeros((8, 8)).tolist(), "std": np.ones((8, 8)).tolist()}
    for kind, shape, dtype, more in (("frames", (8, 8, 3), "uint8", {}), ("latents", (8, 8), "float16", statistics)):
        with atomic_store(folder / kind) as beside:
            store = EpisodeStore.create(beside, "ball_in_cup-catch", 2, shape, 0, kind, dtype, **more)
            store.extend([Episode(actions=np.zeros((n, 2)), rewards=r, quality=str(q),
                                  **{kind: np.zeros((n, *shape), dtype)})
                          for n, r, q in zip(lengths, rewards, qualities)])
            store.finish()
        stores.append(EpisodeStore.open(folder / kind))
    return stores[0], stores[1]


def rewarded(windows):
    "Share of frames with a reward among those that are drawn without focus, over that in the store."
    even = Windows(windows.store, windows.length, 1, pad=True)
    before = np.concatenate([[0], np.cumsum(even.store.column("rewards") > 0)])
    first = (np.cumsum(even.store.lengths) - even.store.lengths)[even.episode_index] + even.first_frame
    real = even.real[even.episode_index]
    drawn = even.probabilities @ (before[first + real] - before[first]) / (even.probabilities @ real)
    return drawn / (before[-1] / even.store.n_frames)


@every_preset
def test_windows_of_every_phase_reach_all_that_ships(name, as_long_as_shipped, tmp_path, monkeypatch):
    """Every episode and all reward, in windows as long as the preset's; and what is drawn has not much less reward
    than the data. Nothing is trained."""
    true, small = PRESETS[name], shrunk(PRESETS[name])
    model = replace(small.tokenizer.model, image=8)
    preset = replace(small, tasks=("ball_in_cup-catch",),
                     tokenizer=replace(small.tokenizer, length=true.tokenizer.length, model=model),
                     dynamics=replace(small.dynamics, length=true.dynamics.length),
                     agent=replace(small.agent, length=true.agent.length),
                     imagination=replace(small.imagination, model=true.imagination.model))
    sources = {}

    def fit(called, modules, loss, batches, *args, **options):
        sources[called] = batches
        return []

    monkeypatch.setattr(phases, "fit", fit)
    frames, latents = as_long_as_shipped
    run_phases(resolve(preset), frames, tmp_path, latents)
    assert len(sources) == 4 + (preset.tokenizer.slow_steps > 0)
    assert sources["dynamics"].length == true.dynamics.length
    assert sources["imagination"].length == true.imagination.model.context
    for called, source in sources.items():
        for windows in [part for part, _ in source.parts] if called == "agent" else [source]:
            assert windows.coverage() == {"episodes": 1, "frames": 1, "reward": 1}, called
            assert rewarded(windows) > 0.75, called


@every_preset
def test_every_phase_takes_two_steps(name, tmp_path, fits):
    preset = shrunk(PRESETS[name])
    store = noise_store(tmp_path, preset)
    models = run_phases(resolve(preset), store, tmp_path)
    assert all(p.isfinite().all() for model in models for p in model.parameters())
    histories = {called: history for called, _, history in fits}
    for history in histories.values():
        assert [row["step"] for row in history] == [1, 2]
        assert all(np.isfinite(value) for row in history for value in row.values())
    for phase in ("dynamics", "agent"):
        assert max(row["bootstrap_share"] for row in histories[phase]) > 0
    shapes = presets.phase_shapes(preset)
    sizes = [shapes[phase].tokenizer_clips for phase in ("tokenizer", "slow") if phase in shapes]
    sizes += [(shapes[phase].batch, shapes[phase].length) for phase in ("dynamics", "agent", "imagination")]
    assert [size for _, size, _ in fits] == sizes


def test_the_cost_table_counts_the_batches_of_the_presets():
    "Notebook 48 comes before the presets, so it says their steps itself."
    text = (Path(__file__).parents[1] / "nbs" / "51_memory.ipynb").read_text(encoding="utf-8")
    sources = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
    cell = next(source for source in sources if "BATCHES = " in source)
    said = ast.literal_eval(re.search(r"BATCHES = (\{.*?\})", cell)[1])
    for name, counts in said.items():
        p, devices = PRESETS[name], 8 if name == "base" else 1
        tokenizer = p.tokenizer.train.steps * p.tokenizer.train.accumulate + p.tokenizer.slow_steps
        dynamics = p.dynamics.train.steps * p.dynamics.train.accumulate
        assert counts == (devices * tokenizer, devices * dynamics)


def test_a_phase_says_how_long_it_takes_with_and_without_bfloat16(monkeypatch):
    tiny, long = (resolve(PRESETS[name]) for name in ("tiny", "long"))
    for dtype, minutes in ((torch.bfloat16, 5), (torch.float32, 10)):
        monkeypatch.setattr(chain, "pick_dtype", lambda device, dtype=dtype: dtype)
        assert chain.expected_time(tiny, "tokenizer") == f" (about {minutes} minutes on two cores)"
        assert chain.expected_time(long, "tokenizer") == ""
