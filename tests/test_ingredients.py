"""The script of study 78: its arms are what their names say, and its rows are made once, at a size that learns nothing."""
from dataclasses import replace

import ingredients as study
import numpy as np
import pytest
import torch
from rows import Table

from dreamer4_nb.method.dynamics import Dynamics
from dreamer4_nb.runs.presets import resolve


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "The script with 20 episodes, 2 steps and few windows, whose results go to a folder of their own; and a base run."
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("ingredients")
    shipped = study.SHIPPED
    dynamics = replace(shipped.dynamics, train=replace(shipped.dynamics.train, steps=2, warmup=1), batch=2)
    patch.setattr(study, "SHIPPED", replace(shipped, episodes=20, dynamics=dynamics))
    patch.setattr(study, "TABLES", {part: Table(folder / "results.json", part) for part in study.TABLES})
    patch.setattr(study, "WINDOWS", 8)
    yield study.base_run(folder / "runs")
    patch.undo()


def test_every_arm_is_a_preset_that_builds_and_differs_by_its_name_only():
    presets = study.presets_of_ladder()
    models = {name: resolve(preset).dynamics.model for name, preset in presets.items()}
    with torch.device("meta"):
        for model in models.values():
            Dynamics(model)
    first, last = models["diffusion forcing, 64 steps"], models["+ committed context"]
    assert (first.schedule.steps, first.bootstrap_share, first.prediction, first.weighting) == (64, 0, "v", "v")
    assert models["4 steps"] == replace(first, schedule=replace(first.schedule, steps=4))
    assert (last.schedule.steps, last.n_tokens, last.n_registers, last.prediction, last.weighting) == (4, 8, 4, "x", "ramp")
    assert last.train_on_context and not models["+ 8 latent tokens"].train_on_context
    ramp, noiseless = models["+ ramp weight"], models["context without noise"]
    assert noiseless == replace(ramp, schedule=replace(ramp.schedule, tau_ctx=63 / 64)) and ramp.schedule.ctx_index == 57
    for name, weights in study.SAMPLED.items():     # the same weights: only the schedule may differ
        assert replace(models[name], schedule=models[weights].schedule) == models[weights]


def test_rows_are_stored_once_and_arms_of_the_same_weights_share_a_training(small, tmp_path, monkeypatch):
    arms = {name: study.LADDER[name] for name in ("diffusion forcing, 64 steps", "4 steps")}
    arms["diffusion forcing, 64 steps"] = study.START | {"schedule.steps": 8}      # a short time to sample
    monkeypatch.setattr(study, "LADDER", arms)
    monkeypatch.setattr(study, "presets_of_ladder", lambda: {
        "diffusion forcing, 64 steps": study.with_dynamics(study.SHIPPED, arms["diffusion forcing, 64 steps"]),
        "4 steps": study.with_dynamics(study.SHIPPED, arms["diffusion forcing, 64 steps"] | arms["4 steps"])})
    study.ladder(small, tmp_path, [3], "command")
    found = study.TABLES["ladder"].read()
    assert [(row["arm"], row["seed"]) for row in found["rows"]] == [(name, 3) for name in arms]
    assert [path.name for path in (tmp_path / "ladder").iterdir()] == ["diffusion_forcing,_64_steps"]
    assert found["rows"][0]["mean"]["dream"] != found["rows"][1]["mean"]["dream"]
    assert found["rows"][0]["mean"]["copy_last"] == found["rows"][1]["mean"]["copy_last"]
    monkeypatch.setattr(study, "trained", None)     # nothing is made again
    study.ladder(small, tmp_path, [3], "command")
    assert study.TABLES["ladder"].read()["rows"] == found["rows"]


def test_hidden_actions_are_hidden_from_the_training_and_a_share_of_none_from_the_dream(small, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "SHARES", (0.0, 0.5, 1.0))
    study.labels(small, tmp_path, [0], "command")
    none, half, every = study.TABLES["labels"].read()["rows"]
    assert [row["labelled"] for row in (none, half, every)] == [0, 9, 18]
    assert none["action_shuffle_ratio"] == none["frame_shuffle_ratio"] == pytest.approx(1)
    assert half["action_shuffle_ratio"] != 1 and half["mean"]["dream"] != every["mean"]["dream"]
    stores = [study.EpisodeStore.open(tmp_path / "labels" / share / "seed0" / "latents.zarr") for share in ("0", "0.5", "1")]
    assert [int(store.labelled.sum()) for store in stores] == [0, 11, 20]      # two are held out
    assert np.array_equal(stores[0].column("actions"), stores[2].column("actions"))


def test_without_a_teacher_every_step_size_is_the_smallest():
    model = resolve(study.presets_of_ladder()["4 steps"]).dynamics.model
    dynamics = study.as_trained(Dynamics(model))
    assert dynamics.embed_d.weight.unique(dim=0).shape[0] == 1
    with_teacher = Dynamics(replace(model, bootstrap_share=0.25))
    assert study.as_trained(with_teacher).embed_d.weight.unique(dim=0).shape[0] == with_teacher.embed_d.num_embeddings


def test_tokenizers_add_one_ingredient_after_another(small, tmp_path, monkeypatch):
    base = study.TOKENIZER_BASE
    quick = {name: replace(phase, train=replace(phase.train, steps=1, warmup=1))
             for name, phase in (("tokenizer", replace(base.tokenizer, slow_steps=1)), ("dynamics", base.dynamics))}
    monkeypatch.setattr(study, "TOKENIZER_BASE", replace(base, episodes=20, evaluation=replace(base.evaluation, dreams=8), **quick))
    built = []
    monkeypatch.setattr(study, "Run", lambda folder, preset, made=study.Run: built.append(preset) or made(folder, preset))
    study.tokenizers("ball_in_cup-catch", tmp_path, [1], "command")
    rows = study.TABLES["tokenizers"].read()["rows"]
    assert [row["arm"].partition(": ")[2] for row in rows] == list(study.TOKENIZERS)
    assert len({row["stlpips"] for row in rows}) == len(rows)
    ours, perceptual, masked, paper = (preset.tokenizer for preset in built)
    assert (ours.perceptual, perceptual.perceptual, perceptual.distance) == (0, 0.2, "stlpips")
    assert replace(perceptual, model=replace(perceptual.model, mask_max=0.9)) == masked
    assert (paper.model.gain, paper.model.slowness, paper.model.latent_noise, paper.slow_steps) == (0, (0, 0), 0, 0)
    assert paper.model.mask_max == 0.9 and paper.perceptual == 0.2


def test_speeds_are_of_all_arms(small, tmp_path, monkeypatch):
    arms = {"+ shortcut": study.with_dynamics(study.SHIPPED, study.START | {"schedule.steps": 4, "bootstrap_share": 0.25})}
    monkeypatch.setattr(study, "presets_of_ladder", lambda: arms)
    monkeypatch.setattr(study, "seconds_of", lambda call, repeats=7: call() or 0.5)
    study.speed(small, tmp_path, [0], "command")
    (row,) = study.TABLES["speed"].read()["rows"]
    assert row == {"arm": "+ shortcut", "seed": 0, "step_seconds": 0.5, "frames_per_second": 16.0}
