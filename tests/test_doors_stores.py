"What comes through the doors of a store: strangers' files, damage, second writers, addresses, odd arguments."
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import torch
import zarr
from helpers.toy_stores import make

from dreamer4_nb.core import UserError, to_float
from dreamer4_nb.data.arrays import atomic_store, resumable_store
from dreamer4_nb.data.latents import encode_latents
from dreamer4_nb.data.mixtures import Mixture
from dreamer4_nb.data.stores import Episode, EpisodeStore, verify
from dreamer4_nb.data.windows import Windows

COLUMNS = ("frames", "actions", "intended", "rewards", "continues", "states")


def short(n=5, number=0, **changes):
    "An episode of n frames that are filled with a number."
    rng = np.random.default_rng(number)
    actions = rng.uniform(-1, 1, (n, 1))
    actions[0] = 0
    columns = {"actions": actions, "rewards": rng.normal(size=n), "states": rng.normal(size=(n, 1)),
               "frames": np.full((n, 4, 4, 3), number, np.uint8), "seed": number}
    return Episode(**(columns | changes))


def small(path, n=4):
    "A finished store of n episodes of 40 frames: three chunks of frames."
    store = EpisodeStore.create(path, "a", 1, (4, 4, 3), 1)
    store.extend([short(40, number) for number in range(n)])
    return store.finish()


def refuse(f, *args, match=".", **kwargs):
    "What the `UserError` says that a call must raise: one line that holds `match`."
    with pytest.raises(UserError, match=match) as told:
        f(*args, **kwargs)
    assert "\n" not in str(told.value)
    return str(told.value)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def change_attributes(path, **changes):
    "Changes what a store says about itself, and takes its seal away, as a stranger would."
    group = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    group["attributes"] = {k: v for k, v in (group["attributes"] | {"seal": None} | changes).items() if v != "gone"}
    (path / "zarr.json").write_text(json.dumps(group), encoding="utf-8")


# 1. A stranger's store

class Code:
    "Unpickled, it makes the folder `ran`."
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_format_2_store_with_a_pickle_codec_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(numcodecs.pickles, "ALLOW_UNSAFE_PICKLE_DECODE", True, raising=False)  # as before 0.16.6
    new = small(tmp_path / "new.zarr")
    attributes = {k: v for k, v in new.attributes.items() if k != "seal"}
    path = tmp_path / "old.zarr"
    zarr.open_group(str(path), mode="w", zarr_format=2, attributes=attributes)
    for name in (*COLUMNS, "task", "quality", "labelled", "seed", "lengths"):
        array = new.arrays.zarrs[name]
        (path / name).mkdir()
        about = {"zarr_format": 2, "shape": array.shape, "chunks": array.shape, "dtype": array.dtype.str, "fill_value": 0,
                 "order": "C", "filters": None, "compressor": {"id": "pickle", "protocol": 2}}
        (path / name / ".zarray").write_text(json.dumps(about), encoding="utf-8")
        (path / name / ".".join("0" * array.ndim)).write_bytes(pickle.dumps(Code(str(tmp_path / "ran"))))
    refuse(EpisodeStore.open, path, match="not a dreamer4_nb store")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("codecs", [[{"name": "bytes"}, {"name": "gzip", "configuration": {"level": 1}}],
                                    [{"name": "bytes"}], [{"name": "no_such_codec"}], [{"name": "bytes"}, {"name": "numcodecs.pickle"}]])
def test_other_codecs_are_refused_before_a_byte_is_decoded(tmp_path, monkeypatch, codecs):
    small(tmp_path / "a.zarr")
    change_attributes(tmp_path / "a.zarr")
    change_json(tmp_path / "a.zarr" / "frames" / "zarr.json", codecs=codecs)
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda *_: pytest.fail("decoded"))
    assert "odec" in refuse(EpisodeStore.open, tmp_path / "a.zarr")


def test_the_installed_numcodecs_does_not_unpickle():
    wants = next(word for word in (Path(__file__).parents[1] / "settings.ini").read_text(encoding="utf-8").split() if word.startswith("numcodecs"))
    assert wants == "numcodecs>=0.16.6"  # the first whose Pickle asks before it decodes
    with pytest.raises(numcodecs.errors.UnsafeDecodeError):
        numcodecs.Pickle().decode(pickle.dumps(1))


# 2. Metadata and values

@pytest.mark.parametrize("changes", [
    {"tasks": None}, {"tasks": []}, {"tasks": "a"}, {"tasks": [1]}, {"tasks": ["a", "a"]}, {"qualities": {}},
    {"qualities": ["expert"]}, {"tasks": "gone"}, {"action_dims": [1]}, {"action_dims": {"a": 2}}, {"action_dims": {"a": "1"}},
    {"action_dims": {"b": 1}}, {"state_dims": {"a": -1}}, {"observation": "latents"}, {"observation": 3}, {"observation": "gone"},
    {"complete": "yes"}, {"complete": "gone"}, {"version": "gone"}, {"version": "2"}, {"version": True}, {"version": 9}, {"format": None},
    {"mean": [1.0]}, {"std": "much"}])
def test_attributes_of_other_types_are_one_line(tmp_path, changes):
    small(tmp_path / "a.zarr")
    change_attributes(tmp_path / "a.zarr", **changes)
    refuse(EpisodeStore.open, tmp_path / "a.zarr")


@pytest.mark.parametrize("mean", [[[1.0, float("nan")]], [[1.0]], [["x", "y"]], 1.0])
def test_the_mean_of_latents_is_finite_and_of_their_shape(tmp_path, mean):
    store = EpisodeStore.create(tmp_path / "a.zarr", "a", 1, (1, 2), 0, "latents", "float16", mean=[[0.0, 0.0]], std=[[1.0, 1.0]])
    store.append(short(frames=None, states=None, latents=np.ones((5, 1, 2))))
    assert torch.equal(store.finish().std, torch.ones(1, 2))
    change_attributes(tmp_path / "a.zarr", mean=mean)
    refuse(EpisodeStore.open, tmp_path / "a.zarr", match="mean")


@pytest.mark.parametrize("name, changes", [
    ("lengths", {"shape": [2]}), ("lengths", {"data_type": "uint32"}), ("rewards", {"data_type": "int32"}),
    ("frames", {"data_type": "int8"}), ("frames", {"shape": [160, 4, 3, 4]}), ("actions", {"shape": [160, 0]}),
    ("actions", {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}})])
def test_a_store_that_says_another_size_or_dtype_is_refused(tmp_path, name, changes):
    small(tmp_path / "a.zarr")
    change_json(tmp_path / "a.zarr" / name / "zarr.json", **changes)
    refuse(lambda: EpisodeStore.open(tmp_path / "a.zarr").column(name))


@pytest.mark.parametrize("name, row, value", [
    ("lengths", 1, -40), ("lengths", 0, 41), ("lengths", 2, 0), ("task", 0, 1), ("task", 3, -1), ("quality", 1, 5), ("labelled", 0, 2), ("seed", 0, -2),
    ("rewards", 7, np.nan), ("rewards", 7, np.inf), ("actions", 7, 3), ("intended", 7, -1.5), ("continues", 7, 2), ("states", 7, np.nan)])
def test_values_that_no_episode_may_have_are_refused_at_the_door(tmp_path, name, row, value):
    small(tmp_path / "a.zarr")
    change_attributes(tmp_path / "a.zarr")
    zarr.open_group(str(tmp_path / "a.zarr"), mode="r+")[name][row] = value
    told = refuse(lambda: Windows(EpisodeStore.open(tmp_path / "a.zarr"), 4, 2).at(0))
    assert name in told or "truncated" in told


@pytest.mark.parametrize("name", ["frames", "rewards"])
def test_chunks_that_changed_places_are_found(tmp_path, name):
    path = tmp_path / "a.zarr"
    small(path, n=210)  # three chunks of rewards
    chunks = sorted(file for file in (path / name / "c").rglob("*") if file.is_file())[:2]
    first, second = (chunk.read_bytes() for chunk in chunks)
    chunks[0].write_bytes(second)
    chunks[1].write_bytes(first)
    refuse(EpisodeStore.open, path, match=f"{name} changed")


def test_verify_compares_a_store_behind_an_address_with_its_seal(tmp_path):
    small(tmp_path / "a.zarr", n=210)
    address = f"file://{tmp_path}/a.zarr"
    verify(EpisodeStore.open(address))
    first, second = (tmp_path / "a.zarr" / "rewards" / "c" / name for name in "01")
    shutil.copy(first, second)
    refuse(verify, EpisodeStore.open(address), match="rewards changed")


def test_an_append_to_a_finished_store_breaks_its_seal_and_finish_makes_it_anew(tmp_path):
    path = tmp_path / "a.zarr"
    small(path)
    EpisodeStore.open(path, "a").append(short(number=4))
    assert len(EpisodeStore.open(path)) == 5 and EpisodeStore.open(path).attributes["seal"] is None
    store = EpisodeStore.open(path, "a").finish()
    assert set(store.attributes["seal"]) == {"attributes", *store.arrays.zarrs} and len(EpisodeStore.open(path)) == 5
    refuse(store.append, short(), match="open for reading")


def test_latents_that_float16_cannot_hold_are_refused(tmp_path):
    store = EpisodeStore.create(tmp_path / "a.zarr", "a", 1, (1, 2), 0, "latents", "float16")
    refuse(store.append, short(frames=None, states=None, latents=np.full((5, 1, 2), 1e6)), match="latents reach")


# 3. One writer

WRITER = """
import sys
from test_doors_stores import short
from dreamer4_nb.data.stores import EpisodeStore
from pathlib import Path
path = Path(sys.argv[1])
store = EpisodeStore.open(path, "a") if path.exists() else EpisodeStore.create(path, "a", 1, (4, 4, 3), 1)
store.append(short())
print(len(store), flush=True)
sys.stdin.read()
"""


def start(code, *args):
    "Another process that runs `code`, when it has said its first line."
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parent)
    process.first_line = process.stdout.readline()
    return process


def end(process, how=signal.SIGKILL):
    process.send_signal(how)
    process.wait(20)
    process.stdin.close()
    process.stdout.close()


def test_a_second_writer_is_refused_until_the_first_one_ends_however_it_ends(tmp_path):
    path = tmp_path / "a.zarr"
    other = start(WRITER, path)
    refuse(EpisodeStore.open, path, "a", match="another process writes")
    refuse(EpisodeStore.open, path, match="unfinished")  # a reader is not locked out
    end(other)
    store = EpisodeStore.open(path, "a")
    assert len(store) == 1
    store.append(short(number=1))
    refuse(EpisodeStore.open, path, "a", match="another process writes")
    refuse(EpisodeStore.create, path, match="exists")
    store.finish()
    assert len(EpisodeStore.open(path, "a")) == len(EpisodeStore.open(path)) == 2
    assert not list(path.glob(".*")) and list(tmp_path.iterdir()) == [path]


def test_a_store_that_is_no_longer_used_is_free(tmp_path):
    store = EpisodeStore.create(tmp_path / "a.zarr", "a", 1, (4, 4, 3), 1)
    store.append(short())
    del store
    assert not list((tmp_path / "a.zarr").glob(".*"))
    assert len(EpisodeStore.open(tmp_path / "a.zarr", "a")) == 1


# 4. Leftovers

def test_the_next_build_removes_what_dead_processes_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(20)
    host = socket.gethostname()
    names = {"dead": f".a.zarr.{host}-{dead.pid}-0123abcd", "alive": f".a.zarr.{host}-{os.getppid()}-0123abcd", "elsewhere": ".a.zarr.far-host-1-0123abcd",
             "long ago": ".a.zarr.far-host-2-0123abcd", "another store's": ".aa.zarr.far-host-2-0123abcd", "to be continued": ".a.zarr.unfinished"}
    for name in names.values():
        (tmp_path / name).mkdir()
        if name in (names["long ago"], names["another store's"], names["to be continued"]):
            os.utime(tmp_path / name, (0, 0))
    make(tmp_path / "a.zarr", "a", [5])
    assert {path.name for path in tmp_path.iterdir()} == {"a.zarr", *names.values()} - {names["dead"], names["long ago"]}


# 5. Addresses and paths

@pytest.mark.parametrize("address", ["s3://bucket/a.zarr", Path("s3://bucket/a.zarr"), "zip://x", "http://localhost:1/a.zarr", "nowhere://a", "~nobody-here/a", "a\0b", ""])
def test_addresses_that_cannot_be_reached_are_one_line_and_leave_nothing_here(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    for attempt in (EpisodeStore.open, EpisodeStore.create, lambda path: atomic_store(path).__enter__()):
        refuse(attempt, address)
    assert not list(tmp_path.iterdir())


def test_a_home_folder_and_a_file_address_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in ("~/a.zarr", f"file://{tmp_path}/home/b.zarr"):
        make(path, "a", [5, 6])
        assert len(EpisodeStore.open(path)) == 2
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["a.zarr", "b.zarr"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_what_is_no_store_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    zarr.open_group(str(tmp_path / "foreign"), mode="w", zarr_format=3)
    for name in ("file", "empty", "foreign", "nothing", "file/inside"):
        for mode in ("r", "a"):
            refuse(EpisodeStore.open, tmp_path / name, mode, match="store")
    for name in ("file", "empty", "file/inside", "x" * 300):
        refuse(EpisodeStore.create, tmp_path / name)
        refuse(lambda path: make(path, "a", [5]), tmp_path / name)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "empty", "foreign"}

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(zarr, "open_group", full)
    refuse(EpisodeStore.create, tmp_path / "new", match="no space left")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes", [{"action_dim": -1}, {"action_dim": 1.5}, {"frame_shape": (4, 4)}, {"frame_shape": (4, 0, 3)}, {"state_dim": -1},
                                     {"observation": "sound"}, {"dtype": "float32"}, {"task": None}, {"note": {1, 2}}])
def test_a_store_that_cannot_be_is_not_made(tmp_path, changes):
    refuse(EpisodeStore.create, tmp_path / "a.zarr", **changes)
    assert not list(tmp_path.iterdir())


COLLECTOR = """
import sys
from test_doors_stores import short
from dreamer4_nb.data.arrays import resumable_store
from dreamer4_nb.data.stores import EpisodeStore
with resumable_store(sys.argv[1]) as beside:
    store = EpisodeStore.open(beside, "a") if beside.exists() else EpisodeStore.create(beside, "a", 1, (4, 4, 3), 1)
    begun = len(store)
    for number in range(begun, 6):
        store.append(short(number=number))
        if number == int(sys.argv[2]):
            print(begun, flush=True)
            sys.stdin.read()
    store.finish()
print(begun, flush=True)
"""


def test_an_unfinished_store_is_kept_after_a_kill_and_continued(tmp_path):
    path = tmp_path / "a.zarr"
    first = start(COLLECTOR, path, 2)
    refuse(resumable_store(path).__enter__, match="another process writes")
    end(first)
    second = start(COLLECTOR, path, 4)
    end(second, signal.SIGINT)
    assert not path.exists() and (tmp_path / ".a.zarr.unfinished").is_dir()
    make(tmp_path / "a.zarr.b", "a", [5])  # another build removes it not
    third = start(COLLECTOR, path, -1)
    end(third)
    assert [process.first_line for process in (first, second, third)] == ["0\n", "3\n", "5\n"]
    store = EpisodeStore.open(path)
    assert store.seeds.tolist() == list(range(6))
    assert all(np.array_equal(store.episode(k).frames, short(number=k).frames) for k in range(6))
    assert {file.name for file in tmp_path.iterdir()} == {"a.zarr", "a.zarr.b"} and not list(path.glob(".*"))
    refuse(resumable_store(path).__enter__, match="exists")


def test_encoding_goes_on_where_it_stopped_and_begins_anew_with_another_tokenizer(tmp_path):
    store = small(tmp_path / "a.zarr", 7)
    calls = []

    def encode(frames, factor=1.0, stop=99):
        calls.append(len(frames))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return factor * to_float(frames).mean((-2, -1))[:, :, None] / 3

    def run(name, **changes):
        calls.clear()
        return encode_latents(store, lambda frames: encode(frames, **changes), tmp_path / name, batch=2, progress=False)

    whole = run("whole.zarr")
    for factor, n_calls in ((1.0, 1 + 2), (0.5, 1 + 4)):  # the first group is a check
        with pytest.raises(KeyboardInterrupt):
            run(f"{factor}.zarr", stop=3)
        resumed = run(f"{factor}.zarr")
        assert len(calls) == (3 if factor == 1 else n_calls - 2)
        assert np.array_equal(resumed.column("latents"), whole.column("latents"))
        assert torch.equal(resumed.mean, whole.mean) and torch.equal(resumed.std, whole.std)
    with pytest.raises(KeyboardInterrupt):
        run("other.zarr", stop=3)
    other = run("other.zarr", factor=0.5)
    assert len(calls) == 1 + 4 and torch.allclose(other.mean, whole.mean / 2, atol=1e-3)
    refuse(encode_latents, whole, encode, tmp_path / "twice.zarr", match="expected frames")
    refuse(encode_latents, store, encode, tmp_path / "none.zarr", batch=0, match="batch")


# 6. Arguments

@pytest.mark.parametrize("name, value", [("batch", 0), ("batch", -3), ("batch", 2.5), ("length", 0), ("length", "4"), ("length", True), ("focus", float("nan")), ("focus", 2),
                                         ("unlabelled", -0.1), ("memory", -1), ("memory", float("nan")), ("seed", -1), ("seed", 0.5), ("seed", None), ("readers", 0),
                                         ("weights", ["many"] * 4), ("weights", [1, 1, 1, float("nan")])])
def test_odd_arguments_of_windows_are_named(tmp_path, name, value):
    refuse(Windows, small(tmp_path / "a.zarr"), **({"length": 4, "batch": 2} | {name: value}), match=name)


def test_windows_and_mixtures_tell_the_true_cause(tmp_path):
    store = small(tmp_path / "a.zarr")
    refuse(store.of_quality, "expert", "medium", match="no episode of quality expert or medium .* there are unknown")
    refuse(Windows, store.subset([]), 4, 2, match="no episode")
    for wrong in ([4], [-5], [0.5], [True] * 3, [[0]], "all", None):
        refuse(store.subset, wrong, match="were asked for")
    assert store.subset([-1, 0]).seeds.tolist() == [3, 0] and store.subset([True] + [False] * 3).seeds.tolist() == [0]
    refuse(Windows, store, 41, 2, match="the longest has 40")
    windows = Windows(store, 4, 2)
    for numbers in (-1, windows.n_windows, 0.5, [0, 10**9]):
        refuse(windows.at, numbers, match="windows .* were asked for")
    for rows in (0, -1, 1.5):
        refuse(Mixture, [(windows, rows, True)], match="rows")
    refuse(Mixture, [(store, 1, True)], match="windows")
    other = EpisodeStore.create(tmp_path / "b.zarr", "a", 1, (2, 2, 3))
    other.append(short(frames=np.zeros((5, 2, 2, 3), np.uint8), states=None))
    refuse(Mixture, [(windows, 1, True), (Windows(other, 4, 1), 1, True)], match="one kind and shape")


@pytest.mark.parametrize("share", [float("nan"), -0.1, 1.5, "half"])
def test_a_share_to_hold_out_is_one(tmp_path, share):
    refuse(small(tmp_path / "a.zarr").split, share, match="held_out")


# 7. Random damage

def everything(store):
    "All that a store holds."
    columns = [store.column(name) for name in (*COLUMNS, "task", "quality", "labelled", "seed", "lengths")]
    return [*columns, store.lengths, store.qualities, store.tasks, sorted(store.action_dims.items())]


def damage(path, rng):
    "Damages a store in one place; says where."
    files = sorted(file for file in path.rglob("*") if file.is_file())
    victim = rng.choice(files)
    data = bytearray(victim.read_bytes())
    how = rng.choice(["flip", "flip", "cut", "delete", "empty", "replace", "key", "key"])
    if how == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[rng.randrange(len(data)):]
    elif how == "empty":
        data.clear()
    elif how == "replace":
        data = bytearray(rng.choice([file for file in files if file.suffix == victim.suffix]).read_bytes())
    elif how == "key":
        victim = rng.choice([file for file in files if file.suffix == ".json"])
        data = bytearray(json.dumps(change_key(json.loads(victim.read_text(encoding="utf-8")), rng)).encode())
    victim.unlink() if how == "delete" else victim.write_bytes(data)
    return f"{how} {victim.relative_to(path)}"


def change_key(value, rng):
    "JSON with one key, at some depth, removed or of another type."
    key = rng.choice(sorted(value))
    if isinstance(value[key], dict) and value[key] and rng.random() < 0.7:
        return value | {key: change_key(value[key], rng)}
    if rng.random() < 0.4:
        return {k: v for k, v in value.items() if k != key}
    return value | {key: rng.choice([None, 0, -1, 10**6, "text", [], {}, [None], True, 1.5])}


def test_random_damage_is_told_or_does_no_harm(tmp_path):
    expected = everything(small(tmp_path / "whole.zarr"))
    told = 0
    for number in range(80):
        rng = random.Random(number)
        path = tmp_path / "damaged.zarr"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "whole.zarr", path)
        where = damage(path, rng)
        try:
            found = everything(EpisodeStore.open(path))
        except UserError as error:
            told += 1
            assert "\n" not in str(error), where
            continue
        except Exception as error:
            pytest.fail(f"{where}: {type(error).__name__}: {error}")
        assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True)), where
    assert told > 40
