"What comes in by the command and by the folder of a run: one line and an exit code, and nothing is damaged."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from dreamer4_nb.core import UserError, load_checkpoint, save_checkpoint, write_json
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.evaluation.statistics import Records
from dreamer4_nb.inputs import FORMER_NAMES, to_dict
from dreamer4_nb.runs import chain, cli
from dreamer4_nb.runs.chain import Run, by_task
from dreamer4_nb.runs.cli import main
from dreamer4_nb.runs.presets import MICRO, Preset
from dreamer4_nb.training.loop import describe_run
from dreamer4_nb.training.optimizers import TrainConfig

TASK = "ball_in_cup-catch"
PARTS = ("tokenizer", "dynamics", "agent", "imagination")
ROOT = Path(__file__).parents[1]


def one_line(capsys, *words):
    "The last thing said was one line on stderr that contains these words; it is returned."
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dreamer4-nb: ")]
    assert len(error) == 1, error
    for word in words:
        assert word in error[0], error[0]
    return error[0]


def make_store(path, task=TASK, qualities=("expert",), length=20, rewards=None, image=32, episodes=8, width=2, seed=-1):
    "A store of random frames whose episodes are solved after their middle."
    rng = np.random.default_rng(0)
    store = EpisodeStore.create(path, task, width, (image, image, 3))
    for k in range(episodes):
        actions = rng.uniform(-1, 1, (length, width)).astype(np.float32)
        actions[0] = 0
        reward = np.where(np.arange(length) < length // 2, 0, 1.0) if rewards is None else np.full(length, rewards)
        frames = rng.integers(0, 256, (length, image, image, 3), dtype=np.uint8)
        store.append(Episode(actions=actions, rewards=reward, frames=frames, task=task,
                             quality=qualities[k % len(qualities)], seed=seed))
    store.finish()
    return path


def words(data, *more):
    "Flags of the smallest preset on a store of 32 x 32 frames."
    return ["--preset", "micro", "--data", str(data), "--tokenizer.model.image", "32", "--workers", "1", *more]


def small(data, **changes):
    "The same as a preset."
    tokenizer = replace(MICRO.tokenizer, model=replace(MICRO.tokenizer.model, image=32))
    return replace(MICRO, data=str(data), tokenizer=tokenizer, workers=1, **changes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "whole.zarr")


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    "A run in which every phase was trained."
    run = Run(tmp_path_factory.mktemp("runs") / "made", small(data))
    run.train("imagination")
    return run.folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def listing(folder):
    "What a folder holds, and when it was written."
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# The folder of a run

def test_a_refused_command_writes_nothing(copy, data, tmp_path, capsys):
    before = listing(copy)
    with FileLock(copy / ".lock"):        # stands for the run that works there
        assert main(["demo", "--run", str(copy), *words(data, "--evaluation.episodes", "3")]) == 2
        one_line(capsys, "another process")
        assert listing(copy) == before
    assert main(["demo", "--run", str(copy), *words(data, "--agent.batch", "4")]) == 2
    one_line(capsys, "made with other settings", "agent.batch")
    assert listing(copy) == before
    new = tmp_path / "new"
    Run(new, small(data))
    assert not new.exists()


def test_whoever_reads_needs_no_lock_and_leaves_the_run_as_it_is(copy, capsys):
    before = listing(copy)
    with FileLock(copy / ".lock"):
        few = ["--episodes", "1", "--decisions", "2", "--readouts", "mean", "--demonstrator", "0", "--workers", "1"]
        assert main(["evaluate", "--run", str(copy), *few]) == 0
    assert "PMPO, mean" in capsys.readouterr().out
    after = listing(copy)
    assert {path: after[path] for path in before} == before
    assert {path.relative_to(copy).parts[0] for path in after.keys() - before.keys()} == {"episodes"}


def test_the_lock_is_held_from_the_first_phase_to_the_last(data, tmp_path, monkeypatch):
    held = []
    run = Run(tmp_path / "run", small(data))
    monkeypatch.setattr(chain, "make_part", lambda run, name: held.append((name, run.notes.lock.is_locked)))
    monkeypatch.setattr(Run, "load", lambda run, name: None)
    monkeypatch.setattr(chain, "check_run", lambda run, name: held.append(("check", run.notes.lock.is_locked)))
    run.train("dynamics")
    assert held == [("check", True), ("tokenizer", True), ("latents", True), ("dynamics", True)]
    assert not run.notes.lock.is_locked


def test_what_killed_processes_left_is_cleared(data, tmp_path):
    run = Run(tmp_path / "run", small(data))
    run.folder.mkdir()
    (run.folder / ".agent.host-99999999.part.safetensors").write_text("", encoding="utf-8")
    (run.folder / ".latents.zarr.99-abc" / "c").mkdir(parents=True)
    with chain.alone_in(run):
        assert {path.name for path in run.folder.iterdir()} == {".lock", "config.json"}


def test_an_encoding_that_was_interrupted_is_kept_and_continued(data, tmp_path):
    run = Run(tmp_path / "run", small(data))
    unfinished = run.folder / ".latents.zarr.unfinished"
    (unfinished / "c").mkdir(parents=True)
    with chain.alone_in(run):
        assert (unfinished / "c").is_dir()


def former(settings, names={new: old for old, new in FORMER_NAMES.items()}):
    "Settings, at any depth, under the names of an earlier version, and without what has been added since."
    if not isinstance(settings, dict):
        return settings
    added = {"muon", "rms_floor", "clip", "reward_range", "held_out", "seed"}
    return {names.get(key, key): former(value) for key, value in settings.items() if key not in added}


def test_a_run_of_an_earlier_version_goes_on(data, copy, tmp_path, monkeypatch, capsys):
    "Its files lack settings, at any depth, and have former names; a setting that is missing had its default."
    kept = small(data, held_out=0.1)
    seed_free = json.loads((copy / "phases.json").read_text(encoding="utf-8"))
    for name in ("phases.json", "config.json"):
        text = (copy / name).read_text(encoding="utf-8").replace('"held_out": 0.25', '"held_out": 0.1')
        write_json(copy / name, former(json.loads(text)))
    for path in copy.glob("*.safetensors"):
        state, header = load_checkpoint(path)
        save_checkpoint(path, state, former(header))
    assert "held_out" not in json.loads((copy / "phases.json").read_text(encoding="utf-8"))["agent"]["made_with"]
    for name in PARTS:
        monkeypatch.setattr(chain, f"train_{name}", None)           # is not called
    Run(copy, kept).train("imagination")
    assert seed_free.keys() >= {"tokenizer", "agent"}
    for changed in (replace(kept, held_out=0.25), replace(kept, seed=3),
                    replace(kept, agent=replace(kept.agent, train=replace(kept.agent.train, muon=7.0)))):
        with pytest.raises(UserError, match="made with other settings"):
            Run(copy, changed)


def test_weights_of_another_model_or_training_are_not_taken_though_notes_are_lost(copy, data):
    wider = small(data, agent=replace(MICRO.agent, model=replace(MICRO.agent.model, hidden=48)))
    longer = small(data, dynamics=replace(MICRO.dynamics, train=replace(MICRO.dynamics.train, steps=5)))
    (copy / "phases.json").unlink()
    with pytest.raises(UserError, match="steps is 4 there, 5 here"):
        Run(copy, longer)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match="agent.safetensors is of another model: heads.hidden is 32 there, 48 here"):
        Run(copy, wider)
    Run(copy, small(data))


@pytest.mark.parametrize("text", ["[]", "{", "", '{"agent": 3}', '{"agent": {"made_with": []}}'])
@pytest.mark.parametrize("name", ["phases.json", "config.json"])
def test_a_damaged_file_of_a_run_is_one_line(copy, name, text, capsys):
    if name == "config.json" and "made_with" in text:
        return
    (copy / name).write_text(text, encoding="utf-8")
    assert main(["evaluate", "--run", str(copy)]) == 2
    said = one_line(capsys, *([name] if "agent" not in text or name == "phases.json" else []))
    assert "delete" not in said


def test_free_settings_are_one_list():
    training = set(to_dict(TrainConfig()))
    from dreamer4_nb.inputs import FREE_SETTINGS
    assert training - describe_run(TrainConfig(), {})["training"].keys() - {"accumulate"} == set(FREE_SETTINGS)
    assert training - chain.phase_settings(Preset(), "agent")["agent"]["train"].keys() == set(FREE_SETTINGS)


# Data that does not suit

UNFIT = [
    (dict(qualities=("poor", "random")), [], "expert or medium", "poor"),
    (dict(qualities=("unknown",)), [], "expert or medium", "8 unknown|6 unknown"),
    ({}, ["--agent.model.policy", "bernoulli"], "bernoulli", "actions"),
    (dict(length=8), [], "8 frames", "longer episodes"),
    (dict(length=9), ["--imagination.model.context", "12"], "has 9", "longer episodes"),
    (dict(episodes=1), [], "held_out", ""),
    (dict(image=64), [], "64, 64, 3", "--tokenizer.model.image"),
    (dict(width=3), [], "actions of 3 numbers", "2"),
    (dict(seed=10_001), [], "not fresh", "--first-seed"),
    ({}, ["--held-out", "0"], "held_out", "above 0"),
    ({}, ["--held-out", "-0.1"], "held_out", "above 0"),
    ({}, ["--agent.batch", "1"], "batch is 1", "from 2"),
    ({}, ["--evaluation.dreams", "0"], "dreams is 0", "from 1"),
    ({}, ["--evaluation.readouts"], "readouts", "one or more"),
    ({}, ["--evaluation.first-seed", "4294967295"], "last seed", "4294967295"),
    ({}, ["--tasks", "ball_in_cup-catch", "ball_in_cup-catch"], "tasks", "each once"),
    ({}, ["--dynamics.model.pack", "3"], "pack", ""),
]


@pytest.mark.parametrize("store, flags, what, remedy", UNFIT)
def test_what_does_not_suit_is_refused_before_anything_is_trained(store, flags, what, remedy, data, tmp_path, capsys, monkeypatch):
    for name in PARTS:
        monkeypatch.setattr(chain, f"train_{name}", None)           # is not called
    path = make_store(tmp_path / "store.zarr", **store) if store else data
    assert main(["demo", "--run", str(tmp_path / "run"), *words(path, *flags)]) == 2
    assert re.search(remedy, one_line(capsys, what))


def test_every_task_needs_episodes_on_both_sides(tmp_path):
    for task, episodes, width in ((TASK, 8, 2), ("cartpole-swingup", 1, 1)):
        make_store(tmp_path / f"{task}.zarr", task, episodes=episodes, width=width)
    both = small(tmp_path / "*.zarr", tasks=(TASK, "cartpole-swingup"), episodes=None)
    with pytest.raises(UserError, match="cartpole-swingup has no episode held out with held_out=0.25"):
        Run(tmp_path / "run", both).train("tokenizer")


def test_a_study_looks_at_all_its_values_first(copy, capsys, monkeypatch):
    before = listing(copy)
    for setting, value in (("imagination.model.horizon", "many"), ("imagination.model.horizon", "-3"),
                           ("evaluation.episodes", "3"), ("held_out", "0.3"), ("agent.model.width", "48"),
                           ("agent.labels", "best"), ("tokenizer.model", "3"), ("imagination.model.none", "3")):
        values = ["--values", "3", value] if setting.endswith("horizon") else ["--values", value]
        arguments = ["study", "--run", str(copy), "--json", str(copy.parent / "rows.json"), "--setting", setting]
        assert main([*arguments, *values]) == 2
        one_line(capsys, setting.split(".")[-1])
    assert main(["study", "--run", str(copy), "--judge", "dreams", "--setting", "agent.batch", "--values", "4"]) == 2
    one_line(capsys, "agent.batch", "dynamics")
    (copy.parent / "rows.json").write_text("[]", encoding="utf-8")
    assert main(["study", "--run", str(copy), "--json", str(copy.parent / "rows.json")]) == 2
    one_line(capsys, "rows.json")
    assert listing(copy) == before


# Records

def episodes_of(folder, name):
    path, = folder.rglob(f"{name}.json")
    return Records.load(path), path


def evaluate(folder, *flags):
    few = ["--episodes", "2", "--decisions", "2", "--readouts", "mean", "--workers", "1"]
    assert main(["evaluate", "--run", str(folder), *few, *flags]) == 0


def test_records_are_read_where_all_that_makes_them_is_the_same(copy):
    evaluate(copy, "--demonstrator", "1")
    assert len(episodes_of(copy, "demonstrator")[0]) == 1
    evaluate(copy, "--demonstrator", "2")
    assert len(episodes_of(copy, "demonstrator")[0]) == 2
    stamps = {path: path.stat().st_mtime_ns for path in copy.rglob("episodes/**/*.json")}
    weights = copy / "imagination.safetensors"
    state, header = load_checkpoint(weights)
    stamp = weights.stat().st_mtime - 1000
    save_checkpoint(weights, {key: value + 0.01 for key, value in state.items()}, header)
    os.utime(weights, (stamp, stamp))                               # older than the records
    os.utime(copy / "agent.safetensors")                            # younger, and the same
    random = episodes_of(copy, "random")[1]
    random.write_text(random.read_text(encoding="utf-8")[:50], encoding="utf-8")
    stamps[random] = random.stat().st_mtime_ns
    evaluate(copy, "--demonstrator", "2")
    played = {path.stem for path, before in stamps.items() if path.stat().st_mtime_ns != before}
    assert played == {"PMPO-mean", "random"}
    record, _ = episodes_of(copy, "PMPO-mean")
    assert record.info["made_by"]["weights"].keys() == {"tokenizer", "agent", "imagination"}
    planner = episodes_of(copy, "demonstrator")[0].info["made_by"]["planner"]
    assert planner["candidates"] == 24


def test_measures_are_read_where_all_that_makes_them_is_the_same(copy, data, monkeypatch):
    from dreamer4_nb.runs import judge
    calls = []
    monkeypatch.setattr(judge, "tokenizer_report", lambda *stores: calls.append(stores) or {})
    monkeypatch.setattr(judge, "rollout_report", lambda *stores, **sizes: {"sizes": sizes})

    def measured():
        view, = by_task(Run(copy, small(data), only="evaluation"))
        return judge.measured(view)

    assert measured() == measured() and len(calls) == 1
    path = copy / "dynamics.safetensors"
    state, header = load_checkpoint(path)
    save_checkpoint(path, {key: value + 0.01 for key, value in state.items()}, header)
    os.utime(path, (1, 1))
    measured()
    assert len(calls) == 2
    (copy / "metrics.json").write_text("{", encoding="utf-8")
    measured()
    assert len(calls) == 3


# Shipping

def test_ship_checks_everything_before_it_replaces_anything(copy, tmp_path, monkeypatch, capsys):
    assets = tmp_path / "assets"
    assets.mkdir()
    (assets / "demos_ball_in_cup-catch.npz").touch()
    monkeypatch.setattr(cli, "asset", lambda name: assets / name)
    arguments = ["ship", "--run", str(copy), "--results", str(tmp_path / "chain.json")]
    whole = {"preset": {}, "closed_loop": [], "tokenizer": {}, "dream": {}}    # the card says what is not noted
    for text in ("[]", "{", "{}"):
        (copy / "results.json").write_text(text, encoding="utf-8")
        assert main(arguments) == 2
        one_line(capsys, "results.json")
    write_json(copy / "results.json", whole)
    good = (copy / "imagination.safetensors").read_bytes()
    (copy / "imagination.safetensors").write_bytes(good[:-100])
    assert main(arguments) == 2
    one_line(capsys, "imagination.safetensors")
    assert [path.name for path in assets.iterdir()] == ["demos_ball_in_cup-catch.npz"]
    (copy / "imagination.safetensors").write_bytes(good)
    assert main(arguments) == 0
    assert len(list(assets.glob("tiny_*.safetensors"))) == 4 and not list(assets.glob(".*"))
    assert json.loads((tmp_path / "chain.json").read_text(encoding="utf-8")) == whole


# Numbers and paths at the door

REFUSED = [
    ["evaluate", "--workers", "0"], ["evaluate", "--episodes", "0"], ["evaluate", "--first-seed", "-1"],
    ["evaluate", "--demonstrator", "-1"], ["study", "--agents", "0"], ["study", "--decisions", "0"],
    ["bench", "--seconds", "nan"], ["bench", "--seconds", "0"], ["bench", "--seconds", "inf"], ["bench", "--threads", "-1"],
    ["demo", "--threads", "-1"], ["demo", "--workers", "0"], ["demo", "--seed", "4294967296"], ["demo", "--episodes", "0"],
    ["demo", "--run", "s3://bucket/run"], ["evaluate", "--run", "s3://bucket/run"], ["evaluate", "--run", "nothing"],
    ["demo", "--run", "FILE"], ["evaluate", "--run", "FILE"], ["train", "tokenizer", "--run", "FILE/inside"],
    ["bench", "--json", "."], ["bench", "--json", "FILE/bench.json"], ["ship", "--run", "nothing"],
    ["ship", "--run", "FILE"],
]


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_cannot_be_meant_is_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("not a folder", encoding="utf-8")
    assert main(arguments) == 2
    one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_a_home_folder_is_expanded(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(made, tmp_path / "mine")
    assert main(["evaluate", "--run=~/mine", "--episodes", "1", "--decisions", "1", "--readouts", "mode", "--demonstrator", "0", "--workers", "1"]) == 0
    assert (tmp_path / "mine" / "episodes").is_dir() and not Path("~").exists()


def test_help_shows_ranges(capsys):
    for arguments, shown in ((["demo"], ("--held-out 0<FLOAT<1", "--dynamics.train.steps INT>=1", "--agent.train.ema 0<=FLOAT<1",
                                         "--seed 0<=INT<=4294967295", "--episodes {None}|INT>=1")),
                             (["bench"], ("--seconds FLOAT>0", "--threads INT>=0")), (["evaluate"], ("--workers INT>=1",))):
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        text = capsys.readouterr().out
        assert all(flag in text for flag in shown), text


def test_the_weights_that_ship_are_judged_where_there_is_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chain, "open_episodes", lambda preset: EpisodeStore.open(make_store(tmp_path / "drawn.zarr")))
    few = ["--episodes", "1", "--decisions", "2", "--readouts", "mean", "--demonstrator", "0", "--workers", "1"]
    assert main(["evaluate", *few]) == 0
    said = capsys.readouterr().out
    assert "weights that ship" in said and "PMPO, mean" in said


# How a command ends

def failing(error):
    def call(*arguments, **keywords):
        raise error
    return call


def test_an_error_that_nobody_foresaw_says_during_what_and_keeps_its_traceback(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(chain, "train_tokenizer", failing(ZeroDivisionError("float division\nby zero")))
    assert main(["demo", "--run", str(tmp_path / "run"), *words(data)]) == 1
    said = one_line(capsys, "tokenizer", "frames to latents", "ZeroDivisionError: float division")
    path, = tmp_path.glob("dreamer4-*.txt")
    assert str(path) in said and "Traceback" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied", "/x"),
                                   NotADirectoryError(20, "Not a directory", "/x/y")])
def test_an_error_of_the_system_is_one_line(error, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chain, "train_tokenizer", failing(error))
    assert main(["demo", "--run", str(tmp_path / "run"), *words(data)]) == 2
    one_line(capsys, error.strerror)


@pytest.mark.parametrize("stop, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_what_was_typed(stop, code, data, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments, **keywords):
        os.kill(os.getpid(), stop)
        time.sleep(5)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chain, "train_tokenizer", interrupted)
    arguments = ["demo", "--run", "my run", *words(data)]
    for program, typed in ((str(tmp_path / ".venv/bin/dreamer4-nb"), ".venv/bin/dreamer4-nb demo --run 'my run'"),
                           (str(ROOT / "dreamer4_nb/__main__.py"), "-m dreamer4_nb demo --run 'my run'"), ("pytest", "dreamer4-nb demo --run 'my run'")):
        monkeypatch.setattr(sys, "argv", [program])
        assert main(arguments) == code
        assert f"{typed} " in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setenv("DREAMER4_COMMAND", "make demo ARGS='--seed 3'")
    assert main(arguments) == code
    assert capsys.readouterr().err.splitlines()[-1].endswith("to go on: make demo ARGS='--seed 3'")


def started(*arguments, python=(), **options):
    "A command in a process of its own."
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options.pop("env", {})
    for name in options.pop("unset", ()):
        environment.pop(name, None)
    return subprocess.run([sys.executable, *python, "-m", "dreamer4_nb", *arguments], capture_output=True, text=True,
                          env=environment, timeout=100, **options)


def test_ctrl_c_while_pytorch_is_imported():
    process = subprocess.Popen([sys.executable, "-m", "dreamer4_nb", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and (out, error) == ("", "")


BROKEN = [
    ({"OMP_NUM_THREADS": "auto", "RANK": "1"}, (), "threads"), ({"OMP_NUM_THREADS": "2,1", "MPLBACKEND": "nonsense"}, (), ""),
    ({"WORLD_SIZE": "2", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}, (), "ranks"),
    ({"DREAMER4_CACHE": "/proc/none", "MUJOCO_GL": "bogus"}, (), "disk, cache"),
]


@pytest.mark.parametrize("env, unset, bad", BROKEN)
def test_doctor_and_help_answer_whatever_is_broken(env, unset, bad, tmp_path):
    found = started("doctor", env=env, unset=unset, cwd=tmp_path)
    lines = found.stdout.splitlines()
    assert found.returncode == (2 if bad else 0) or "NOT" in found.stdout, found.stderr
    assert "Traceback" not in found.stderr and any(line.split()[1] == "torch" for line in lines), found.stderr
    if bad:
        assert any(line.startswith(f"NOT  {bad}") and "->" in line for line in lines), lines
    help = started("--help", env=env, unset=unset, cwd=tmp_path)
    assert help.returncode == 0 and "evaluate" in help.stdout, help.stderr


def test_each_check_of_the_doctor_that_fails_is_a_line(monkeypatch, capsys):
    from dreamer4_nb.runs import bench, doctor
    monkeypatch.setattr(bench, "matmul_peak", failing(RuntimeError("CUDA error: unknown error\nmore")))
    monkeypatch.setattr(doctor, "cache_dir", failing(RuntimeError("Could not determine home directory.")))
    assert main(["doctor"]) == 2
    lines = capsys.readouterr().out.splitlines()
    for name in ("device", "disk, cache"):
        assert any(line.startswith(f"NOT  {name}") and "->" in line for line in lines), lines
    assert any(line.startswith("ok   disk here") for line in lines)


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} -m dreamer4_nb doctor | head -1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=100,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert found.stdout.count("\n") == 1 and not found.stderr


def test_sigterm_before_training_says_how_to_go_on(data, tmp_path):
    "While episodes are opened, and not inside `fit`, which catches it itself."
    code = ("import sys, time; from dreamer4_nb.runs import chain, cli; chain.open_episodes = lambda preset: time.sleep(60);"
            f"sys.exit(cli.main(['demo', '--run', {str(tmp_path / 'run')!r}, '--preset', 'micro']))")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    while process.stdout.readline() and not (tmp_path / "run" / "phases.json").exists():
        pass
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "to go on" in error.splitlines()[-1] and "Traceback" not in error


def test_a_lone_rank_does_not_wait_for_others(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(chain, "encode_store", lambda store, tokenizer, path: path.mkdir())
    run = Run(tmp_path / "run", MICRO)
    run.parts |= {"data": None, "tokenizer": None}
    chain.encode_episodes(run)
    assert run.path("latents").exists()
    with pytest.raises(UserError, match="waited 0 s for .*first rank"):
        chain.wait_until((tmp_path / "none").exists, "the latents of the first rank", 0)


def test_an_empty_argument_is_refused_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--preset", "micro", "--run", ""]) == 2
    assert "an argument is empty" in capsys.readouterr().err and not list(tmp_path.iterdir())
