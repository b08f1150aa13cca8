"""Recordings of other programs become stores; what does not fit is refused by name, and nothing of it is run."""
import json
import os
import shutil
import tracemalloc
import zipfile
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import sources

from dreamer4_nb import core
from dreamer4_nb.core import UserError
from dreamer4_nb.data.adapters import (JOURNAL, Contents, ImportSettings, Recording, align_rows, alignment_warning, check_times, fit_frame,
                                       frame_pieces, import_dataset, lag_r2, choice_rows, scale_actions)
from dreamer4_nb.data.arrays import LOCK
from dreamer4_nb.data.stores import EpisodeStore, verify
from dreamer4_nb.data.tasks import TaskSpec
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.method.generation import WorldModel, rollout
from dreamer4_nb.runs import chain
from dreamer4_nb.runs.chain import Run
from dreamer4_nb.runs.cli import main
from dreamer4_nb.runs.presets import MICRO

for library in ("av", "h5py", "minari", "pyarrow"):
    pytest.importorskip(library)

from dreamer4_nb.data import formats, robots
from dreamer4_nb.data.robots import FORMATS, open_adapter

WRITERS = {"videos": sources.videos, "hdf5": sources.hdf5, "npz": sources.npz, "minari": sources.minari, "lerobot": sources.lerobot}
SMALL = ImportSettings(image=16)
PUSH = TaskSpec(2, frame_rate=20, scored=False)


class Films:
    "Recordings in memory: name -> Recording, or what reading it raises."
    def __init__(self, specs, films):
        self.specs, self.films = specs, films

    def contents(self):
        return Contents(self.specs, list(self.films))

    def read(self, episode):
        film = self.films[episode]
        if isinstance(film, BaseException):
            raise film
        return film() if callable(film) else replace(film)


def moving(seed=0, n=12, **changes):
    frames, pushes = sources.film(seed, n)
    return Recording(**(dict(frames=frames[:-1], actions=pushes, task="push") | changes))


def bring(tmp_path, films, specs=None, settings=SMALL, name="x.zarr"):
    return import_dataset(Films(specs or {"push": PUSH}, films), tmp_path / name, settings, progress=False)


# Every format: import, train, dream.

def test_every_format_is_tested():
    assert set(WRITERS) == set(FORMATS)


@pytest.mark.parametrize("kind, labels", [*((kind, "npy") for kind in FORMATS), ("videos", "none")])
def test_import_train_dream(kind, labels, tmp_path, capfd):
    source = sources.videos(tmp_path, labels) if kind == "videos" else WRITERS[kind](tmp_path)
    store = tmp_path / "imported.zarr"
    assert main(["import", kind, source, "--out", str(store), "--task", "dots"]) == 0
    said = capfd.readouterr().out
    assert f"{store}: " in said and "refused" not in said
    verify(EpisodeStore.open(store))
    preset = replace(MICRO, tasks=(), data=str(store), threads=1)
    run = Run(tmp_path / "run", preset)
    run.train("dynamics")
    world = WorldModel(run.tokenizer, run.dynamics).eval()
    batch = Windows(run.latents[1], 10, 2)(0)
    assert batch.action_known.any() == (labels != "none")
    dreamed = rollout(world, batch.latents, batch.actions, 4, torch.Generator().manual_seed(0), action_known=batch.action_known)
    assert dreamed.shape == batch.latents.shape and torch.isfinite(dreamed).all()
    assert run.store.spec("dots").image == (64, 64)


# What each format says.

def test_videos_with_csv_labels(tmp_path):
    adapter = open_adapter("videos", sources.videos(tmp_path, "csv"))
    report = import_dataset(adapter, tmp_path / "x.zarr", SMALL, progress=False)
    store = EpisodeStore.open(tmp_path / "x.zarr")
    frames, pushes = sources.film(0)
    assert report.episodes == {"push": 6} and not report.warnings and store.spec("push").frame_rate == 20
    first = store.episode(0)
    assert np.allclose(first.actions[1:], pushes[:23], atol=1e-6) and first.rewards.tolist() == [0] * 23 + [1]
    near = np.abs(first.frames[5].astype(int) - fit_frame(frames[5], 16)).mean()
    far = np.abs(first.frames[5].astype(int) - fit_frame(frames[20], 16)).mean()
    assert near < 6 and near < far / 2          # what the codec left of it


def test_videos_of_whole_numbers_are_choices_and_ranges_are_found(tmp_path):
    folder = tmp_path / "keys"
    folder.mkdir()
    for seed in range(2):
        sources.write_video(folder / f"{seed}.mp4", sources.film(seed)[0][:-1])
        np.save(folder / f"{seed}.npy", np.arange(24) % 3)
    assert open_adapter("videos", str(folder)).contents().specs["keys"].choices == (3,)
    for seed in range(2):
        np.save(folder / f"{seed}.npy", np.linspace(-seed, 90, 24)[:, None])
    spec = open_adapter("videos", str(folder)).contents().specs["keys"]
    assert (spec.low, spec.high) == ((-1.0,), (90.0,))


def test_hdf5_is_turned_and_its_last_reward_kept(tmp_path):
    for camera, flip in (("agentview_rgb", True), ("agentview_image", False)):
        path = sources.hdf5(tmp_path, 2, camera, flip)
        adapter = open_adapter("hdf5", path)
        recording = adapter.read(adapter.contents().episodes[1])
        assert np.array_equal(np.stack(list(recording.frames)), sources.film(1)[0][:24]) and recording.terminated
        spec = adapter.contents().specs["push"]
        assert (spec.description, spec.frame_rate, spec.scored) == ("push the block", 20, True)
    other = open_adapter("hdf5", path, camera="eye_in_hand_rgb")
    assert not np.stack(list(other.read("push_demo.hdf5/demo_0").frames)).any()
    with pytest.raises(UserError, match="no camera 'left'; there are agentview_image, eye_in_hand_rgb"):
        open_adapter("hdf5", path, camera="left").read("push_demo.hdf5/demo_0")


@pytest.mark.parametrize("discrete", [True, False])
def test_minari_tells_terminated_from_truncated(tmp_path, discrete):
    adapter = open_adapter("minari", sources.minari(tmp_path, 4, discrete))
    import_dataset(adapter, tmp_path / "x.zarr", SMALL, progress=False)
    store = EpisodeStore.open(tmp_path / "x.zarr")
    assert store.lengths.tolist() == [25] * 4 and [store.episode(i).continues[-1] for i in range(4)] == [0, 1, 0, 1]
    spec = store.spec("toy-push-v0")
    assert (spec.choices, spec.low) == (((4,), ()) if discrete else ((), (-5, -5)))
    pushes = sources.film(2)[1]
    expected = np.eye(4)[(np.abs(pushes[:, 0]) * 3.99).astype(int)] if discrete else pushes
    assert np.allclose(store.episode(2).actions[1:], expected, atol=1e-6)


@pytest.mark.parametrize("folder", ["lerobot_v3", "lerobot_v3_images"])
def test_lerobot_v3(tmp_path, folder):
    adapter = open_adapter("lerobot", str(sources.FIXTURES / folder), camera="side")
    import_dataset(adapter, tmp_path / "x.zarr", SMALL, progress=False)
    store = EpisodeStore.open(tmp_path / "x.zarr")
    assert store.tasks == ["pull-the-dot", "push-the-dot"] and store.lengths.tolist() == [16, 17, 18, 19, 20]
    spec = store.spec("push-the-dot")
    assert spec.frame_rate == 10 and spec.description == "push the dot" and len(spec.low) == 2
    rng = np.random.default_rng(0)
    actions = np.stack([rng.uniform(-3, 3, 2) for _ in range(16)])
    scaled = 2 * (actions - spec.low) / (np.array(spec.high) - spec.low) - 1
    first = store.episode(0)
    assert np.allclose(first.actions[1:], scaled[:-1], atol=1e-5) and first.rewards[-1] == 1 and first.continues[-1] == 0
    assert first.frames[0].reshape(-1, 3).max(0).argmax() == 2          # the side camera paints it blue


def test_one_codec_or_another_gives_the_same_recording(tmp_path):
    one, other = (open_adapter("lerobot", str(sources.FIXTURES / name), camera="top") for name in ("lerobot_v3", "lerobot_v3_images"))
    one.contents(), other.contents()
    for episode in ("episode 0", "episode 3"):
        a, b = (np.stack(list(adapter.read(episode).frames)).astype(int) for adapter in (one, other))
        assert a.shape == b.shape and np.abs(a - b).mean() < 3


def test_the_spaces_of_gymnasium_become_specs():
    spec, rows = robots.spec_of_space(spaces.Box(-np.inf, np.inf, (2, 2)))
    assert (spec.action_dim, spec.low) == (4, ()) and rows(np.zeros((5, 2, 2))).shape == (5, 4)
    assert robots.spec_of_space(spaces.Box(-1, 1, (3,)))[0] == TaskSpec(3)
    spec, rows = robots.spec_of_space(spaces.MultiDiscrete([3, 2], start=[1, 0]))
    assert spec.choices == (3, 2) and choice_rows(rows(np.array([[3, 0], [1, 1]])), spec.choices).tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 1]]
    spec, rows = robots.spec_of_space(spaces.MultiBinary(2))
    assert spec.choices == (2, 2) and choice_rows(rows(np.array([[1, 0]])), spec.choices).tolist() == [[0, 1, 1, 0]]
    with pytest.raises(UserError, match="space Text"):
        robots.spec_of_space(spaces.Text(3))


def test_a_video_whose_time_jumps_is_refused(tmp_path):
    import av
    folder = tmp_path / "push"
    folder.mkdir()
    with av.open(str(folder / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.height, stream.width, stream.pix_fmt = 40, 48, "yuv420p"
        for t, picture in enumerate(sources.film(0)[0]):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = t if t < 9 else t + 30, Fraction(1, 20)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="a.mp4, because time jumps from 0.400 to 1.950 s before frame 9"):
        import_dataset(open_adapter("videos", str(folder)), tmp_path / "x.zarr", SMALL, progress=False)


# Frames, actions, times.

@pytest.mark.parametrize("frame, what", [(np.zeros((4, 5, 2), np.uint8), "shape"), (np.zeros((4, 5, 3), np.int32), "int32"), (np.zeros((0, 5, 3), np.uint8), "shape"),
                                         (np.full((4, 5, 3), 1.5), "reaches"), (np.full((4, 5, 3), np.nan), "reaches"), (np.zeros(4, np.uint8), "shape"),
                                         (np.array([["a"]]), "dtype")])
def test_frames_that_are_none_are_refused(frame, what):
    with pytest.raises(UserError, match=what):
        fit_frame(frame, 8)


def test_frames_of_every_kind_fit():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 255, (30, 20, 3), dtype=np.uint8)
    assert np.array_equal(fit_frame(frame / 255, 16), fit_frame(frame, 16)) and fit_frame(frame, 16).shape == (16, 16, 3)
    alpha = np.concatenate([frame, frame[..., :1]], 2)
    assert np.array_equal(fit_frame(alpha, 16), fit_frame(frame, 16))
    gray = fit_frame(frame[..., 0], 16)
    assert np.array_equal(gray[..., 0], gray[..., 2]) and np.array_equal(gray, fit_frame(frame[..., :1], 16))
    assert np.array_equal(fit_frame(frame, 20, "crop"), frame[5:25])
    assert abs(fit_frame(frame, 4).mean() - frame.mean()) < 3       # an average, not a pick


def test_recordings_down_to_two_frames_of_any_size_come_in(tmp_path):
    films = {"two": moving(n=2), "wide": moving(1, frames=np.zeros((12, 9, 90, 3))), "gray": moving(2, frames=np.zeros((12, 50, 7), np.uint8))}
    report = bring(tmp_path, films)
    assert report.episodes == {"push": 3} and EpisodeStore.open(tmp_path / "x.zarr").lengths.tolist() == [2, 12, 12]


@pytest.mark.parametrize("changes, why", [
    (dict(frames=np.zeros((1, 8, 8, 3), np.uint8), actions=np.zeros((1, 2))), "recording of 1 frames; expected at least 2"),
    (dict(actions=np.full((12, 2), np.nan)), "NaN or infinity in row 0"), (dict(actions=np.full((12, 2), np.inf)), "NaN or infinity"),
    (dict(actions=np.zeros((9, 2))), "9 actions for 12 frames"), (dict(actions=np.zeros((12, 3))), "have 3 numbers; expected 2"),
    (dict(actions=np.full((12, 2), 1.5)), "leaves its range"), (dict(actions=np.array([["a", "b"]] * 12)), "expected numbers"),
    (dict(rewards=np.zeros(7)), "7 rewards for 12 frames"), (dict(rewards=np.full(12, np.nan)), "rewards has NaN"),
    (dict(times=np.r_[0:6, 9:15] / 20), "time jumps from 0.250 to 0.450 s after frame 5"), (dict(times=np.zeros(12)), "time jumps"),
    (dict(times=np.r_[0:5, np.nan, 6:12]), "finite"), (dict(task="pull"), "no spec"),
    (dict(frames=iter(np.zeros((12, 8, 8, 3), np.uint8))), "give its length"), (dict(length=13, actions=np.zeros((13, 2))), "12 frames came where 13"),
    (dict(length=11, actions=np.zeros((11, 2))), "12 frames came where 11"), (RuntimeError("broken\ndisk"), "RuntimeError: broken disk"),
    (UserError("no such\nthing"), "no such thing")])
def test_what_does_not_fit_is_refused_by_name_and_the_rest_comes_in(tmp_path, changes, why):
    bad = changes if isinstance(changes, Exception) else moving(**changes)
    report = bring(tmp_path, {"good": moving(), "bad": bad, "last": moving(3)})
    assert list(report.refused) == ["bad"] and why in report.refused["bad"] and "\n" not in report.refused["bad"]
    assert EpisodeStore.open(tmp_path / "x.zarr").lengths.tolist() == [12, 12]
    assert any("bad: " in line for line in report.lines())


def test_missing_rewards_are_refused_where_others_have_them_and_noted_where_none_has(tmp_path):
    scored = {"push": replace(PUSH, scored=True)}
    report = bring(tmp_path, {"a": moving(rewards=np.ones(12)), "b": moving(1)}, scored)
    assert "no rewards" in report.refused["b"] and EpisodeStore.open(tmp_path / "x.zarr").spec("push").scored
    bring(tmp_path, {"b": moving(1)}, name="y.zarr")
    assert not EpisodeStore.open(tmp_path / "y.zarr").spec("push").scored


def test_clip_is_a_choice(tmp_path):
    bring(tmp_path, {"a": moving(actions=np.full((12, 2), 1.5))}, settings=replace(SMALL, clip=True))
    assert EpisodeStore.open(tmp_path / "x.zarr").column("actions").max() == 1


def test_led_to_rows_may_begin_with_nothing(tmp_path):
    actions = np.full((12, 2), 0.5)
    actions[0] = np.nan
    bring(tmp_path, {"a": moving(actions=actions)}, settings=replace(SMALL, alignment="led_to"))
    assert EpisodeStore.open(tmp_path / "x.zarr").column("actions").tolist() == [[0, 0]] + [[0.5, 0.5]] * 11


def test_several_choices_and_their_bounds():
    assert choice_rows(np.array([[1, 0]]), (2, 3)).tolist() == [[0, 1, 1, 0, 0]]
    for wrong in ([[2, 0]], [[-1, 0]], [[0.5, 0]], [[0]]):
        with pytest.raises(UserError):
            choice_rows(np.array(wrong), (2, 3))
    spec = TaskSpec(2, low=(0, 10), high=(1, 20))
    assert scale_actions([[0.5, 20]], spec, SMALL).tolist() == [[0, 1]]


@pytest.mark.parametrize("alignment, n", [("led_to", 4), ("at", 3), ("at", 6), ("led_to", 6)])
def test_rows_of_another_number_are_refused(alignment, n):
    with pytest.raises(UserError, match=f"{n} actions for 5 frames"):
        align_rows("actions", np.zeros((n, 2)), 5, alignment)


def test_even_times_pass():
    check_times(np.arange(20) / 29.97 + 7, 20)


# Long recordings, and memory.

def test_long_recordings_become_several_episodes_without_loss(tmp_path):
    frames, pushes = sources.film(0, 40)
    rewards = np.arange(40.0)
    film = Recording(frames[:40], actions=pushes, rewards=rewards, terminated=True, task="push", seed=5)
    bring(tmp_path, {"a": film}, {"push": replace(PUSH, scored=True)}, replace(SMALL, longest=13))
    store = EpisodeStore.open(tmp_path / "x.zarr")
    assert store.lengths.tolist() == [13, 13, 14] and store.seeds.tolist() == [5, -1, -1]
    assert np.array_equal(store.column("frames"), np.stack([fit_frame(frame, 16) for frame in frames[:40]]))
    assert store.column("continues").tolist() == [1.0] * 39 + [0.0]
    starts = [0, 13, 26]
    expected = np.concatenate([np.zeros((1, 2)), pushes[:39]])
    expected[starts] = 0
    assert np.allclose(store.column("actions"), expected) and np.array_equal(store.column("rewards")[:39], np.r_[0, rewards[:38]])
    assert store.column("rewards")[39] == 38 + 39       # the last action's reward is not lost


@pytest.mark.parametrize("n", [2, 13, 14, 15, 26, 27, 28])
def test_no_piece_is_too_short(n):
    pieces = [(len(piece), last) for piece, last in frame_pieces(np.zeros((n, 4, 4, 3), np.uint8), replace(SMALL, image=4, longest=13))]
    assert sum(length for length, _ in pieces) == n and min(length for length, _ in pieces) >= 2
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]


def test_memory_is_bounded_whatever_the_size(tmp_path):
    "A film of 1.2 GB, drawn as it is read, in well under a tenth of that."
    frame = np.random.default_rng(0).integers(0, 255, (400, 500, 3), dtype=np.uint8)
    film = Recording((np.roll(frame, t, 0) for t in range(2000)), length=2000, task="push")
    tracemalloc.start()
    bring(tmp_path, {"a": film}, settings=replace(SMALL, longest=500))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert EpisodeStore.open(tmp_path / "x.zarr").n_frames == 2000 and peak < 60e6


def test_an_npz_is_read_on_and_not_again_and_again(tmp_path, monkeypatch):
    adapter = open_adapter("npz", sources.npz(tmp_path, 8))
    opened = []
    real = formats.open_array
    monkeypatch.setattr(formats, "open_array", lambda path, name: opened.append(name) or real(path, name))
    import_dataset(adapter, tmp_path / "x.zarr", SMALL, progress=False)
    assert opened.count("frames") == 2          # its header, then all of it once
    assert np.array_equal(EpisodeStore.open(tmp_path / "x.zarr").episode(6).frames[3], fit_frame(sources.film(6)[0][3], 16))


# The lag test.

def test_wrong_alignment_is_warned_of(tmp_path):
    films = {str(seed): moving(seed, 60) for seed in range(14)}
    assert not bring(tmp_path, films, name="right.zarr").warnings
    (warning,) = bring(tmp_path, films, settings=replace(SMALL, alignment="led_to"), name="wrong.zarr").warnings
    assert "import with alignment at" in warning
    led = {name: replace(film, actions=np.concatenate([np.zeros((1, 2)), film.actions[:-1]])) for name, film in films.items()}
    (warning,) = bring(tmp_path, led, name="twice.zarr").warnings
    assert "import with alignment led_to" in warning
    assert not bring(tmp_path, led, settings=replace(SMALL, alignment="led_to"), name="led.zarr").warnings
    r2 = lag_r2(EpisodeStore.open(tmp_path / "right.zarr"))
    assert max(r2, key=r2.get) == 0 and r2[0] > 0.3 > 0.1 > max(r2[-1], r2[1])


def test_where_pixels_do_not_tell_nothing_is_said(tmp_path):
    rng = np.random.default_rng(0)
    films = {str(seed): moving(seed, 60, actions=rng.uniform(-1, 1, (60, 2))) for seed in range(6)}
    assert not bring(tmp_path, films, name="noise.zarr").warnings
    assert not bring(tmp_path, {"a": moving()}, name="short.zarr").warnings
    assert alignment_warning("a", {}) == "" and lag_r2(EpisodeStore.open(tmp_path / "short.zarr")) == {}


# Damaged and hostile files.

def hostile_videos(folder):
    good = open(sources.videos(folder, "npy", 2) + "/0.mp4", "rb").read()
    where = folder / "push"
    (where / "cut.mp4").write_bytes(good[:len(good) // 2])
    (where / "empty.mp4").write_bytes(b"")
    (where / "playlist.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", encoding="utf-8")
    (where / "concat.mkv").write_text("ffconcat version 1.0\nfile 0.mp4\n", encoding="utf-8")
    shutil.copy(where / "0.mp4", where / "pickle.mp4")
    np.save(where / "pickle.npy", np.array([{"run": "me"}]), allow_pickle=True)
    shutil.copy(where / "0.mp4", where / "words.mp4")
    (where / "words.csv").write_text("a,b\n1,x\n", encoding="utf-8")
    shutil.copy(where / "0.mp4", where / "ragged.mp4")
    (where / "ragged.csv").write_text("1,2\n3\n", encoding="utf-8")
    return str(where), {"cut.mp4", "empty.mp4", "playlist.mp4", "concat.mkv", "pickle.mp4", "words.mp4", "ragged.mp4"}


class Evil:
    "Unpickled, it makes a folder."
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_nothing_is_unpickled(tmp_path, capfd):
    trace = tmp_path / "it ran"
    where = sources.videos(tmp_path, episodes=2)
    np.save(where + "/1.npy", np.array([Evil(trace)], dtype=object), allow_pickle=True)
    report = import_dataset(open_adapter("videos", where), tmp_path / "x.zarr", SMALL, progress=False)
    assert set(report.refused) == {"1.mp4"} and not trace.exists()
    for name in ("frames", "actions"):
        columns = {"frames": np.zeros((2, 5, 8, 8, 3), np.uint8), "actions": np.zeros((2, 5, 1))}
        np.savez(tmp_path / f"{name}.npz", **columns | {name: np.array([Evil(trace)], dtype=object)})
        assert main(["import", "npz", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / "y.zarr")]) == 2
        assert not trace.exists()
    with pytest.raises(FileExistsError):        # the test can fail: unpickled twice, it fails itself
        for _ in range(2):
            np.load(where + "/1.npy", allow_pickle=True)


def hostile_hdf5(folder):
    import h5py
    path = sources.hdf5(folder, 10)
    shutil.copy(path, folder / "other.hdf5")
    with h5py.File(path, "a") as file:
        data = file["data"]
        del data["demo_7"], data["demo_8/obs"], data["demo_9"]
        data["demo_7"] = h5py.ExternalLink("other.hdf5", "/data/demo_7")
        data["demo_8/obs"] = h5py.ExternalLink("other.hdf5", "/data/demo_8/obs")
        data["demo_9"] = h5py.SoftLink("/data/gone")
        del data["demo_1/obs/agentview_rgb"], data["demo_1/obs/eye_in_hand_rgb"]
        data["demo_1/obs/agentview_rgb"] = h5py.ExternalLink("/etc/passwd", "/x")
        del data["demo_2/actions"]
        data["demo_2/actions"] = np.array([b"run me"] * 24, dtype="S6")
        del data["demo_3/actions"]
        data["demo_3/actions"] = h5py.ExternalLink("other.hdf5", "/x")
        del data["demo_4/actions"]
        data["demo_4"].create_dataset("actions", shape=(10**9, 10**3), dtype="f4", chunks=(1, 10**3))     # declared, not there
        del data["demo_5/obs"]
        layout = h5py.VirtualLayout(shape=(24, 2), dtype="f4")
        layout[:] = h5py.VirtualSource("other.hdf5", "x", shape=(24, 2))
        del data["demo_6/actions"]
        data["demo_6"].create_virtual_dataset("actions", layout)
    return path, {f"push_demo.hdf5/demo_{k}" for k in range(1, 10)}


def hostile_lerobot(folder):
    root = folder / "robot"
    shutil.copytree(sources.FIXTURES / "lerobot_v3", root)
    film = root / "videos/observation.images.top/chunk-000/file-000.mp4"
    film.write_bytes(film.read_bytes()[:300])
    return str(root), {f"episode {k}" for k in range(5)}


@pytest.mark.parametrize("kind, make", [("videos", hostile_videos), ("hdf5", hostile_hdf5)])
def test_damaged_and_hostile_parts_are_refused_by_name(kind, make, tmp_path):
    source, bad = make(tmp_path)
    report = import_dataset(open_adapter(kind, source), tmp_path / "x.zarr", SMALL, progress=False)
    assert set(report.refused) == bad and all("\n" not in why for why in report.refused.values())
    assert sum(report.episodes.values()) == (2 if kind == "videos" else 1)


def refused_line(capfd, kind, source, tmp_path):
    assert main(["import", kind, str(source), "--out", str(tmp_path / "x.zarr")]) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert not (tmp_path / "x.zarr").exists()
    return line


def test_sources_that_are_none_are_one_line(tmp_path, capfd):
    noise = tmp_path / "noise.bin"
    noise.write_bytes(np.random.default_rng(0).bytes(4000))
    for kind in ("hdf5", "npz"):
        assert "noise.bin" in refused_line(capfd, kind, noise, tmp_path)
        assert "gone" in refused_line(capfd, kind, tmp_path / "gone", tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    for kind in ("videos", "lerobot", "minari", "hdf5"):
        assert str(empty) in refused_line(capfd, kind, empty, tmp_path)
    assert "unknown format 'rlds'" in refused_line(capfd, "rlds", empty, tmp_path)
    assert ".zarr" in (main(["import", "npz", "x", "--out", str(tmp_path / "x.h5")]) == 2 and capfd.readouterr().err)
    source, bad = hostile_lerobot(tmp_path)
    assert "nothing of lerobot" in refused_line(capfd, "lerobot", source, tmp_path)


def test_an_npz_is_never_unpickled(tmp_path, capfd):
    frames = np.zeros((2, 5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "a.npz", frames=np.array([{"run": "me"}]), actions=np.zeros((2, 5, 1)))
    assert "never loaded" in refused_line(capfd, "npz", tmp_path / "a.npz", tmp_path)
    np.savez(tmp_path / "b.npz", frames=frames, actions=np.array([{"run": "me"}]))
    assert "never loaded" in refused_line(capfd, "npz", tmp_path / "b.npz", tmp_path)
    np.savez(tmp_path / "c.npz", frames=frames, actions=np.zeros((2, 4, 1)))
    assert "actions of shape (2, 4, 1)" in refused_line(capfd, "npz", tmp_path / "c.npz", tmp_path)


def test_an_array_that_claims_more_than_its_file_can_hold_is_refused(tmp_path, capfd):
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 50, 64, 64, 3), }".ljust(117) + "\n"
    with zipfile.ZipFile(tmp_path / "big.npz", "w") as file:
        file.writestr("frames.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 99)
    assert "cannot be in a file of this size" in refused_line(capfd, "npz", tmp_path / "big.npz", tmp_path)


@pytest.mark.parametrize("changes", [dict(data_path="/etc/{chunk_index:03d}"), dict(data_path="../{file_index:03d}.parquet"), dict(data_path="{chunk_index.__class__}"),
                                     dict(codebase_version="v2.1"), dict(fps="ten"), dict(fps=0), dict(features=[]), dict(features={})])
def test_paths_out_of_a_data_set_and_other_versions_are_refused(tmp_path, capfd, changes):
    root = tmp_path / "robot"
    shutil.copytree(sources.FIXTURES / "lerobot_v3", root)
    info = json.loads((root / "meta/info.json").read_text(encoding="utf-8"))
    (root / "meta/info.json").write_text(json.dumps(info | changes), encoding="utf-8")
    line = refused_line(capfd, "lerobot", root, tmp_path)
    assert "path" in line if "data_path" in changes else "robot" in line or "camera" in line


def test_a_table_and_a_video_that_drifted_apart_are_refused(tmp_path):
    import pyarrow.parquet as pq
    root = tmp_path / "robot"
    shutil.copytree(sources.FIXTURES / "lerobot_v3", root)
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    name = "videos/observation.images.top/from_timestamp"
    column = table.column_names.index(name)
    pq.write_table(table.set_column(column, name, [[x + 0.06 for x in table[name].to_pylist()]]), path)
    adapter = open_adapter("lerobot", str(root), camera="top")
    report_of = Films(adapter.contents().specs, {name: (lambda name=name: adapter.read(name)) for name in adapter.contents().episodes})
    with pytest.raises(UserError, match="table and video are apart"):
        import_dataset(report_of, tmp_path / "x.zarr", SMALL, progress=False)


def test_a_missing_reader_says_what_to_install(tmp_path, monkeypatch, capfd):
    real = core.importlib.import_module
    def without(name):
        if name in ("h5py", "av", "minari", "pyarrow.parquet"):
            raise ImportError(f"No module named '{name}'")
        return real(name)
    monkeypatch.setattr(core.importlib, "import_module", without)
    (tmp_path / "push").mkdir()
    for kind, source in (("hdf5", tmp_path / "x.hdf5"), ("videos", tmp_path / "push"), ("minari", "x/y-v0"),
                         ("lerobot", sources.FIXTURES / "lerobot_v3")):
        assert "dreamer4_nb[import]" in refused_line(capfd, kind, source, tmp_path)


# Stopped and continued.

class Stops(Films):
    "Raises KeyboardInterrupt when frame `at` of everything is read; at -1 never."
    def __init__(self, films, at):
        super().__init__({"push": PUSH, "pull": PUSH}, films)
        self.left = at

    def read(self, episode):
        recording = super().read(episode)
        recording.length, frames = len(recording.frames), recording.frames
        def counted():
            for frame in frames:
                self.left -= 1
                if self.left == -1:
                    raise KeyboardInterrupt
                yield frame
        recording.frames = counted()
        return recording


FILMS = {"a": UserError("bad from the start"), "b": moving(0, 25), "c": moving(1, 12, task="pull"), "d": moving(2, actions=np.zeros((3, 2))),
         "e": moving(3, 25), "f": UserError("bad at the end")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "x.zarr"
    import_dataset(Stops(FILMS, -1), path, replace(SMALL, longest=10), progress=False)
    return path


@pytest.mark.parametrize("at", [0, 9, 11, 13, 24, 26, 38, 45, 60])
def test_an_import_goes_on_where_it_was_stopped(at, tmp_path, unbroken):
    settings = replace(SMALL, longest=10)
    for stop in (at, 7, 15):
        try:
            import_dataset(Stops(FILMS, stop), tmp_path / "x.zarr", settings, progress=False)
            break
        except KeyboardInterrupt:
            continue
    else:
        report = import_dataset(Stops(FILMS, -1), tmp_path / "x.zarr", settings, progress=False)
        assert set(report.refused) == {"a", "d", "f"}
    one, other = EpisodeStore.open(unbroken), EpisodeStore.open(tmp_path / "x.zarr")
    assert all(np.array_equal(one.column(name), other.column(name)) for name in ("frames", "actions", "rewards", "continues"))
    assert np.array_equal(one.task_ids, other.task_ids) and one.attributes["specs"] == other.attributes["specs"]
    assert (unbroken / JOURNAL).read_bytes() == (tmp_path / "x.zarr" / JOURNAL).read_bytes()
    assert not (tmp_path / ".x.zarr.unfinished").exists()


def stopped(tmp_path, settings=SMALL, at=30):
    with pytest.raises(KeyboardInterrupt):
        import_dataset(Stops(FILMS, at), tmp_path / "x.zarr", settings, "films", progress=False)
    return tmp_path / ".x.zarr.unfinished"


def test_a_torn_journal_is_mended(tmp_path, unbroken):
    settings = replace(SMALL, longest=10)
    journal = stopped(tmp_path, settings) / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-9])
    import_dataset(Stops(FILMS, -1), tmp_path / "x.zarr", settings, "films", progress=False)
    assert (tmp_path / "x.zarr" / JOURNAL).read_bytes() == (unbroken / JOURNAL).read_bytes()
    assert np.array_equal(EpisodeStore.open(tmp_path / "x.zarr").column("frames"), EpisodeStore.open(unbroken).column("frames"))


def test_another_source_or_setting_does_not_go_on(tmp_path):
    unfinished = stopped(tmp_path)
    for films, settings, source, why in ((FILMS, replace(SMALL, fit="crop"), "films", "other settings"), (FILMS, SMALL, "others", "another source"),
                                         ({"z": moving(), **FILMS}, SMALL, "films", "other episodes")):
        with pytest.raises(UserError, match=why):
            import_dataset(Stops(films, -1), tmp_path / "x.zarr", settings, source, progress=False)
    assert unfinished.exists() and not (unfinished / LOCK).exists()


def test_a_full_disk_is_no_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(EpisodeStore, "extend", lambda *args: (_ for _ in ()).throw(UserError("no space left")))
    with pytest.raises(UserError, match="no space left"):
        bring(tmp_path, {"a": moving()})


def test_nothing_is_made_of_nothing(tmp_path):
    for films, why in (({}, "holds no episode"), ({"a": UserError("broken"), "b": RuntimeError("too")}, "2 recordings were refused, the first, a, because broken")):
        with pytest.raises(UserError, match=why):
            bring(tmp_path, films)
    assert not list(tmp_path.glob("*.zarr")) and not list(tmp_path.glob(".*"))


def test_an_adapter_of_ones_own_by_name(tmp_path, monkeypatch, capfd):
    (tmp_path / "my_adapter.py").write_text(
        "import numpy as np\n"
        "from dreamer4_nb.data.adapters import Contents, Recording\n"
        "from dreamer4_nb.data.tasks import TaskSpec\n"
        "class Noise:\n"
        "    def __init__(self, source): self.n = int(source)\n"
        "    def contents(self): return Contents({'noise': TaskSpec(scored=False)}, [str(i) for i in range(self.n)])\n"
        "    def read(self, episode): return Recording(np.zeros((5, 9, 9), np.uint8), task='noise')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["import", "my_adapter:Noise", "3", "--out", str(tmp_path / "x.zarr"), "--image", "8"]) == 0
    assert "3 episodes, 15 frames" in capfd.readouterr().out
    assert robots.own_adapter("my_adapter:Noise", "3").n == 3


# From an import to a run.

@pytest.fixture
def untrained(monkeypatch):
    "Trainings that must not be called."
    for part in ("tokenizer", "dynamics", "agent", "imagination"):
        monkeypatch.setattr(chain, f"train_{part}", None)


def test_a_demo_without_an_environment_is_refused_at_the_door(tmp_path, capfd, untrained):
    store = str(tmp_path / "x.zarr")
    assert main(["import", "npz", sources.npz(tmp_path), "--out", store, "--quality", "expert"]) == 0
    assert main(["demo", "--preset", "micro", "--run", str(tmp_path / "run"), "--data", store, "--tasks"]) == 2
    assert "no policy of push can act" in capfd.readouterr().err


def test_imagination_asks_for_recorded_rewards_and_cloning_for_a_quality(tmp_path, capfd, untrained):
    source = sources.videos(tmp_path)
    for quality, why in (("unknown", "import with --quality expert"), ("expert", "the rewards of push in")):
        store = str(tmp_path / f"{quality}.zarr")
        assert main(["import", "videos", source, "--out", store, "--quality", quality]) == 0
        preset = replace(MICRO, tasks=(), data=store)
        with pytest.raises(UserError, match=why):
            Run(tmp_path / quality, preset).train("imagination")


def test_one_model_learns_imports_of_different_widths(tmp_path):
    "Two numbers to an action, four choices, and films without any, imported and trained as one."
    plain = tmp_path / "plain"
    plain.mkdir()
    for kind, source, task in (("npz", sources.npz(tmp_path), "arm"), ("minari", sources.minari(tmp_path), "keys"),
                               ("videos", sources.videos(plain, "none"), "film")):
        assert main(["import", kind, source, "--out", str(tmp_path / f"{task}.zarr"), "--task", task]) == 0
    run = Run(tmp_path / "run", replace(MICRO, tasks=(), data=str(tmp_path / "*.zarr"), episodes=None, threads=1))
    run.train("dynamics")
    assert run.preset.tasks == ("arm", "film", "keys") and run.dynamics.config.mixed_widths
    batch = Windows(run.latents[1], 8, 24)(0)
    widths = dict(zip(batch.task.tolist(), batch.live.sum(1).tolist()))
    assert widths == {0: 2, 1: 1, 2: 4} and not batch.action_known[batch.task == 1].any()
    world = WorldModel(run.tokenizer, run.dynamics).eval()
    dreamed = rollout(world, batch.latents, batch.actions, 4, torch.Generator().manual_seed(0), action_known=batch.action_known, live=batch.live)
    assert torch.isfinite(dreamed).all()
