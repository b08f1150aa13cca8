"The top of the package: a film and records in three lines."
import numpy as np
import pytest

import dreamer4_nb
from dreamer4_nb.data.demonstrations import load_demonstrations


@pytest.fixture(scope="module")
def episode():
    return load_demonstrations(episodes=1, progress=False).episode(0)


@pytest.fixture(scope="module")
def world():
    return dreamer4_nb.load_world()


@pytest.fixture(scope="module")
def policy():
    return dreamer4_nb.load_policy()


def test_a_film_begins_with_real_frames_and_goes_on_dreamed(world, episode):
    film = dreamer4_nb.dream(world)
    assert film.shape == (40, 64, 64, 3) and film.dtype == np.uint8
    assert np.array_equal(film[:8], episode.frames[:8])
    assert np.array_equal(film, dreamer4_nb.dream(world, episode.actions[8:40], episode))
    opposite = dreamer4_nb.dream(world, -episode.actions[8:40], episode)
    off, far_off = (np.abs(x[8:16].astype(float) - episode.frames[8:16]).mean() for x in (film, opposite))
    assert 0 < off < 0.85 * far_off


def test_the_actions_that_are_given_lead_the_film(world):
    left, right = (dreamer4_nb.dream(world, np.tile([x, 0.0], (6, 1)), context=4) for x in (-1, 1))
    assert left.shape == right.shape == (10, 64, 64, 3)
    assert np.array_equal(left[:4], right[:4]) and not np.array_equal(left[4:], right[4:])
    again = dreamer4_nb.dream(world, np.tile([1.0, 0.0], (6, 1)), context=4)
    assert np.array_equal(again, right)


def test_a_policy_dreams_in_its_own_world(policy, episode):
    films = [dreamer4_nb.dream(policy, length=16, seed=seed) for seed in (0, 0, 1)]
    assert films[0].shape == (16, 64, 64, 3) and np.array_equal(films[0][:8], episode.frames[:8])
    assert np.array_equal(films[0], films[1]) and not np.array_equal(films[0][8:], films[2][8:])
    pushed = dreamer4_nb.dream(policy, np.tile([1.0, 0.0], (8, 1)))
    assert pushed.shape == films[0].shape and not np.array_equal(pushed[8:], films[0][8:])


def test_a_policy_is_judged_in_the_real_environment(policy):
    records = dreamer4_nb.evaluate(policy, episodes=2, decisions=60)
    assert records.task == "ball_in_cup-catch" and records.seed.tolist() == [10_000, 10_001]
    assert records.success.all() and records.returns.min() > 0


def test_the_read_out_is_a_choice():
    assert dreamer4_nb.load_policy("mean").readout == "mean"
