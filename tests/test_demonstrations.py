"""The script of the ladder of demonstrations: its rows are made once, at a size that learns nothing."""
from dataclasses import replace

import demonstrations as study
from rows import Table


def test_a_row_holds_both_policies_and_is_made_once(tmp_path, monkeypatch):
    def quick(rung, labels, seed, made=study.preset_of):
        preset = made(rung, labels, seed)
        phases = {name: replace(phase, train=replace(phase.train, steps=1, warmup=1), batch=4)
                  for name, phase in (("agent", preset.agent), ("imagination", preset.imagination))}
        return replace(preset, evaluation=replace(preset.evaluation, episodes=2, decisions=3, readouts=("sample",)), **phases)

    monkeypatch.setattr(study, "TABLE", Table(tmp_path / "ladder.json"))
    monkeypatch.setattr(study, "preset_of", quick)
    monkeypatch.setattr(study, "dreamed_return", lambda view, heads: 0.0)
    study.study(tmp_path / "runs", [20], ["executed"], [5])
    (row,) = study.TABLE.read()["rows"]
    assert row["policies"].keys() == {"cloning, sample", "PMPO, sample"}
    assert (row["rung"], row["labels"], row["seed"]) == (20, "executed", 5)
    monkeypatch.setattr(study, "trained", None)
    study.study(tmp_path / "runs", [20], ["executed"], [5])
    assert study.TABLE.read()["rows"] == [row]


def test_rungs_differ_by_their_episodes_labels_and_seeds_only():
    first, second = study.preset_of(25, "executed", 1), study.preset_of(400, "intended", 3)
    assert (first.episodes, second.episodes, first.agent.labels, second.agent.labels) == (25, 400, "executed", "intended")
    for name in ("agent", "imagination"):
        assert getattr(second, name).train.seed == getattr(first, name).train.seed + 2
    assert first.dynamics == second.dynamics and first.dynamics.model.transformer.depth == 8
    assert replace(second, episodes=25, agent=first.agent, imagination=first.imagination) == first
