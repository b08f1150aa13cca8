"The script about what phase 3 adds to `make demo`: recipes share what they do not change, at a size that learns nothing."
import pytest
import recipes as study
from helpers.models import same_weights
from rows import Table

from dreamer4_nb.runs.chain import Run
from dreamer4_nb.runs.presets import MICRO, TINY


def test_recipes_share_what_they_do_not_change(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TABLE", Table(tmp_path / "ladder.json", "recipes"))
    monkeypatch.setattr(study, "TINY", MICRO)
    monkeypatch.setitem(study.RECIPES, "dynamics of 5000 steps", ("latents", {"dynamics.train.steps": 5}))
    study.study(tmp_path / "runs", list(study.RECIPES), [1])
    rows = study.TABLE.read()["rows"]
    assert [(row["recipe"], row["seed"]) for row in rows] == [(recipe, 1) for recipe in study.RECIPES]
    for row in rows:
        assert set(row["policies"]) == {"cloning, sample", "PMPO, sample"} and "psnr" in row["dream"]
        assert row["policies"]["cloning, sample"]["kl"] is None and row["policies"]["PMPO, sample"]["kl"] >= 0
    runs = {name: Run(tmp_path / "runs" / f"{name.replace(' ', '-')}-1", study.preset_of(name, 1)) for name in study.RECIPES}
    demo = runs[study.DEMO]
    assert same_weights(runs["beta 1"].agent[1], demo.agent[1])
    assert same_weights(runs["executed labels"].dynamics, demo.dynamics)
    assert not same_weights(runs["executed labels"].agent[1], demo.agent[1])
    assert same_weights(runs["dynamics of 5000 steps"].tokenizer, demo.tokenizer)
    assert not same_weights(runs["dynamics of 5000 steps"].dynamics, demo.dynamics)
    monkeypatch.setattr(study, "trained", None)     # nothing is made again
    study.study(tmp_path / "runs", list(study.RECIPES), [1])
    assert study.TABLE.read()["rows"] == rows


def test_nothing_is_judged_on_the_seeds_of_make_demo():
    preset = study.preset_of("executed labels", 2)
    assert not set(preset.evaluation.seeds) & set(TINY.evaluation.seeds)
    assert preset.seed == 2 and preset.agent.labels == "executed"
    with pytest.raises(KeyError):
        study.preset_of("none", 0)
