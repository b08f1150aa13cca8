"The Fréchet distance: against scipy, against closed forms, and that it ranks films that are worse."
from dataclasses import replace

import numpy as np
import pytest
import torch

from dreamer4_nb.core import UserError, step_generator
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.evaluation.frechet import clip_features, dream_distances, frechet_distance
from dreamer4_nb.evaluation.metrics import dream_windows, pick_windows, shuffle_actions
from dreamer4_nb.method.streams import decode_stream
from dreamer4_nb.training.phases import encode_store
from helpers.models import make_world
from helpers.shapes import MICRO
from helpers.toy_stores import make_moving

linalg = pytest.importorskip("scipy.linalg")


def clouds(n, m, d):
    g = step_generator(0)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    first = torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + 0.3
    return first, torch.randn(m, d, generator=g, dtype=torch.float64) @ mix.T


@pytest.mark.parametrize("n, m", [(400, 400), (60, 300)])
def test_in_all_directions_it_is_the_formula(n, m):
    found, reference = clouds(n, m, 5)
    a, b = ((x / reference.std(0)).numpy() for x in (found, reference))
    covariances = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(found, reference, 5) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(found.float(), reference.float(), 5) == pytest.approx(expected, rel=1e-4)


def test_fewer_components_are_the_reference_s_largest():
    g = step_generator(1)
    wide = torch.randn(300, 2, generator=g, dtype=torch.float64)
    reference = wide @ torch.tensor([[1.0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)  # three go together
    shifted = reference + torch.tensor([1.0, 1, 1, 0]) * reference.std(0)
    assert frechet_distance(shifted, reference, 2) == pytest.approx(3, rel=1e-6)
    across = reference + torch.tensor([1.0, -1, 0, 0]) * reference.std(0)                 # where it never goes
    assert frechet_distance(across, reference, 2) == pytest.approx(0, abs=1e-6)


def test_a_feature_that_never_moves_does_not_count():
    found, reference = clouds(100, 100, 4)
    dead = lambda x, value: torch.cat([x, torch.full((len(x), 1), value, dtype=x.dtype)], 1)
    assert frechet_distance(dead(found, 9.0), dead(reference, 0.0), 4) == pytest.approx(
        frechet_distance(found, reference, 4), rel=1e-9)


def test_bad_clouds_are_named():
    found, reference = clouds(10, 30, 4)
    for bad in (lambda: frechet_distance(found[:4], reference, 4), lambda: frechet_distance(found, reference, 1),
                lambda: frechet_distance(found[:, :3], reference, 2), lambda: frechet_distance(found, reference, 5)):
        with pytest.raises(UserError, match="expected"):
            bad()


def disc_films(n, speed, seen=True, jumps=False):
    "Films (n, 8, 3, 32, 32) of a disc that moves."
    g = step_generator(2)
    start, way = torch.rand(n, 1, 2, generator=g) * 16 + 8, torch.randn(n, 1, 2, generator=g)
    place = start + speed * torch.arange(8.0)[:, None] * way / way.norm(dim=-1, keepdim=True)
    if jumps:
        place = torch.rand(n, 8, 2, generator=g) * 16 + 8
    grid = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"), -1)
    inside = (3 - (grid - place[:, :, None, None]).norm(dim=-1)).clamp(0, 1) * seen
    return inside[:, :, None].expand(-1, -1, 3, -1, -1) * 0.8 + 0.1


def test_films_that_are_worse_are_farther_away():
    pytest.importorskip("stlpips_pytorch")
    reference, same = clip_features(disc_films(40, 1.0)).split(20)
    distances = [frechet_distance(own, reference, 8) for own in (
        same, clip_features(disc_films(20, 1.0, jumps=True)), clip_features(disc_films(20, 1.0, seen=False)))]
    assert 0 < 4 * distances[0] < distances[1] and 4 * distances[0] < distances[2]


def test_only_whole_clips_count():
    pytest.importorskip("stlpips_pytorch")
    films = torch.rand(2, 7, 3, 32, 32, generator=step_generator(3))
    features = clip_features(films, 3)
    torch.testing.assert_close(features[:2], clip_features(films[:1, :6], 3))
    torch.testing.assert_close(features[2:], clip_features(films[1:, :6], 3))
    with pytest.raises(UserError, match="length"):
        clip_features(films, 8)


def test_dreams_are_compared_with_the_reconstructions_of_their_windows(tmp_path):
    pytest.importorskip("stlpips_pytorch")
    world = make_world(replace(MICRO.tokenizer, image=64), replace(MICRO.dynamics, action_dim=2))
    store = make_moving(tmp_path / "frames.zarr", "pushing", 2, episodes=6, length=30)
    latents = encode_store(store, world.tokenizer, tmp_path / "latents.zarr", progress=False)
    numbers = pick_windows(latents, 3, 19, 9, 5)
    data = Windows(latents, 19, 1).at(numbers)

    def features(z):
        return clip_features(decode_stream(world.tokenizer, z)[:, 3:])

    found = dream_distances(world, latents, prefix=3, length=19, windows=9, seed=5)
    films = {"dream": dream_windows(world, data, data.actions, 3, 5),
             "shuffled": dream_windows(world, data, shuffle_actions(data.actions, 3), 3, 5),
             "copy_last": data.latents[:, 2:3].expand_as(data.latents)}
    reference = features(data.latents)
    assert len(reference) == 2 * len(numbers) >= 18
    assert found == {name: pytest.approx(frechet_distance(features(z), reference)) for name, z in films.items()}
    assert min(found.values()) > 0
