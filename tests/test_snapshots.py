"What a training shows at every save: images that TensorBoard reads, and nothing else about the run changes."
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers.toy_training import loss_fn, make_batch, make_config, make_modules
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dreamer4_nb.data.demonstrations import load_demonstrations
from dreamer4_nb.method.checkpoints import load_dynamics
from dreamer4_nb.runs.chain import Run
from dreamer4_nb.runs.presets import MICRO
from dreamer4_nb.training import loop
from dreamer4_nb.training.loop import fit, uncompiled
from dreamer4_nb.training.snapshots import DREAMED, GIVEN, first_frames

FRAME = 64 + 2                              # with its frame of a pixel
STRIP = (GIVEN + 1 + DREAMED) * FRAME       # one place is empty
SHAPES = {"tokenizer.draft": ("reconstruction", 8 * FRAME, 8 * FRAME), "tokenizer": ("reconstruction", 8 * FRAME, 8 * FRAME),
          "dynamics": ("dream", STRIP, 4 * FRAME), "agent": ("policy", STRIP, 2 * FRAME),
          "imagination": ("policy", STRIP, 2 * FRAME)}


def images(folder, name):
    "{tag: [(step, width, height), ...]} as TensorBoard's own reader finds them."
    found = EventAccumulator(str(folder / "tensorboard" / name), size_guidance={"images": 0})
    found.Reload()
    return {tag: [(event.step, event.width, event.height) for event in found.Images(tag)]
            for tag in found.Tags()["images"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Two runs of one preset: the second shows nothing."
    shown, hidden = (tmp_path_factory.mktemp(name) for name in ("shown", "hidden"))
    Run(shown, MICRO).train("imagination")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(loop.RunLog, "show", lambda *args: None)
        Run(hidden, MICRO).train("imagination")
    return shown, hidden


@pytest.mark.parametrize("name", SHAPES)
def test_every_phase_shows_itself_at_every_save(runs, name):
    tag, width, height = SHAPES[name]
    steps = (2, 3) if name == "tokenizer" else (2, 4)
    assert images(runs[0], name) == {tag: [(step, width, height) for step in steps]}


@pytest.mark.parametrize("name", SHAPES)
def test_a_run_that_shows_itself_ends_with_the_same_bits(runs, name):
    shown, hidden = runs
    assert images(hidden, name) == {}
    for file in (f"{name}.safetensors", f"{name}.train.safetensors"):
        assert (shown / file).read_bytes() == (hidden / file).read_bytes()


def test_the_frames_are_those_of_the_first_and_the_last_episode():
    store = load_demonstrations(episodes=3, progress=False)
    frames = first_frames(store).frames
    for row, number in enumerate((0, 2)):
        wanted = torch.as_tensor(store.episode(number).frames[:GIVEN + DREAMED]).movedim(-1, 1) / 255
        torch.testing.assert_close(frames[row], wanted)
    assert len(first_frames(store.subset([1])).frames) == 1


# The loop

def square(modules):
    return {"square": torch.full((3, 4, 5), 0.5)}


def train(run_dir, batches=make_batch, snapshots=square, **changes):
    return fit("toy", make_modules(), loss_fn, batches, make_config(steps=20, **changes), run_dir, progress=False,
               snapshots=snapshots)


def test_a_failure_is_said_once_and_stops_nothing(tmp_path, capsys):
    def broken(modules):
        raise RuntimeError("no paint")

    quiet = train(tmp_path / "quiet", snapshots=None)
    loud = train(tmp_path / "loud", snapshots=broken)
    said = capsys.readouterr()
    assert (said.out + said.err).count("toy: no snapshots from step 5 on (RuntimeError: no paint)") == 1
    assert [record["flip"] for record in loud] == [record["flip"] for record in quiet]
    name = "toy.train.safetensors"
    assert (tmp_path / "loud" / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()


def test_an_interrupted_run_shows_what_an_unbroken_one_shows(tmp_path):
    def interrupting(i):
        if i == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return make_batch(i)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", interrupting)
    train(tmp_path / "broken")
    train(tmp_path / "whole")
    name = "toy.train.safetensors"
    assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert images(tmp_path / "whole", "toy") == {"square": [(step, 5, 4) for step in (5, 10, 15, 20)]}
    assert images(tmp_path / "broken", "toy") == {"square": [(step, 5, 4) for step in (5, 10, 12, 15, 20)]}


def test_without_a_folder_and_on_other_ranks_nothing_is_drawn():
    loop.RunLog("toy", None, 0, pytest.fail).show(5)
    train(None, snapshots=pytest.fail)


@pytest.mark.parametrize("mesh", [None, "a mesh"])
def test_weights_that_are_spread_over_ranks_are_not_shown(tmp_path, monkeypatch, mesh):
    given = []

    def noted(name, run_dir, first_step, draw):
        given.append(draw)
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "RunLog", noted)
    monkeypatch.setattr(loop, "rank_mesh", lambda *args: mesh)
    monkeypatch.setattr(loop, "prepare", lambda modules, loss_fn, *args: loop.LossModule(modules, loss_fn))
    monkeypatch.setattr(loop, "Checkpoints", lambda *args: SimpleNamespace(last=lambda: None))
    with pytest.raises(ZeroDivisionError):
        train(tmp_path)
    assert (given[0] is None) == (mesh is not None)


def test_snapshots_run_uncompiled():
    dynamics = load_dynamics()
    dynamics.transformer.compiled = square
    with pytest.raises(ZeroDivisionError), uncompiled(dynamics):
        assert dynamics.transformer.compiled is None
        raise ZeroDivisionError
    assert dynamics.transformer.compiled is square
