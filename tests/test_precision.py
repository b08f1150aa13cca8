"The script of study 74 that clones cartpole without pictures: what a network sees, and that its rows are made once."
import numpy as np
import precision as study
import pytest
from rows import Table

from dreamer4_nb.data.envs import make_env


def test_a_network_sees_the_newest_frame_and_changes_of_the_ones_before():
    states = np.stack([np.arange(4.0), np.full(4, np.pi / 2), np.full(4, 3.0), np.full(4, 5.0)], -1)     # x grows by one
    way = {"sees": "positions", "frames": 3, "noise": 0.0}
    frames = list(study.seen(states, way, np.random.default_rng(0)))
    np.testing.assert_allclose(frames[2], [1, 0, 1], atol=1e-12)
    np.testing.assert_allclose(study.inputs(frames, np.zeros(1), way), [1.5, 0, 1, 5, 0, 0, 5, 0, 0], atol=1e-12)
    np.testing.assert_allclose(study.inputs(frames[:1], np.zeros(1), way)[3:], 0)      # nothing was before
    whole = {"sees": "state and its last action", "frames": 1, "noise": 0.0}
    frames = list(study.seen(states, whole, np.random.default_rng(0)))
    np.testing.assert_allclose(study.inputs(frames, np.array([0.7]), whole), [1.5, 0, 1, 1, 1, 0.7], atol=1e-12)


def test_a_noise_of_a_hundredth_is_a_fifth_of_a_pixel_at_the_tip_and_two_fifths_at_the_cart():
    env = make_env(study.TASK, 0, 64)
    env.reset()

    def middle(x, angle):
        "Where the middle of the pole is on the frame, its x."
        env.set_state(np.array([x, angle, 0.0, 0.0]))
        return env.object_pixel()[0]

    upright = middle(0, 0)
    assert 2 * (middle(0, np.arcsin(0.01)) - upright) == pytest.approx(0.2, abs=0.02)     # the tip is twice as far out
    assert middle(2 * 0.01, 0) - upright == pytest.approx(0.4, abs=0.02)
    env.close()


def test_rows_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TABLE", Table(tmp_path / "online.json", "precision"))
    for name, value in {"STEPS": 2, "DECISIONS": 4, "DEMONSTRATIONS": 4, "JUDGE": range(2), "WAYS": study.WAYS[1:3]}.items():
        monkeypatch.setattr(study, name, value)
    study.study([0])
    rows = study.TABLE.read()["rows"]
    assert [row["sees"] for row in rows] == ["state and its last action", "positions"]
    assert all(0 <= row["return"] <= 2 * 4 for row in rows)
    study.study([0, 1])
    assert study.TABLE.read()["rows"][:2] == rows and len(study.TABLE.read()["rows"]) == 4
