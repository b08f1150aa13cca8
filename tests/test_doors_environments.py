"What comes in from outside to environments, planner, demonstrations and the report: right, or refused in one line."
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from helpers.models import make_world

from dreamer4_nb.core import UserError, asset, step_generator
from dreamer4_nb.data import demonstrations, envs
from dreamer4_nb.data.envs import VectorEnv, make_env, object_pixels, render_states
from dreamer4_nb.data.planner import Planner, collect_episodes
from dreamer4_nb.data.stores import EpisodeStore
from dreamer4_nb.data.tasks import TASKS
from dreamer4_nb.evaluation.closed_loop import RandomPolicy, evaluate_policy
from dreamer4_nb.evaluation.report import report
from dreamer4_nb.evaluation.statistics import Records
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.method.dynamics import DynamicsConfig
from dreamer4_nb.method.generation import rollout
from dreamer4_nb.method.tokenizer import TokenizerConfig
from dreamer4_nb.runs.cli import main

BALL = "ball_in_cup-catch"
ROOT = str(Path(envs.__file__).parents[2])


def child(code, folder=None, **variables):
    "A fresh Python that runs `code` in a folder, with more environment variables."
    variables = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, timeout=100)


def one_line(capsys, *words):
    "The one line of an error, with these words."
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "Traceback" not in error, error
    for word in words:
        assert word in error, error


# collecting

def collect_arguments(out):
    return ["collect", "--out", str(out), "--episodes", "56", "--decisions", "5", "--candidates", "2", "--image", "16",
            "--workers", "0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "What the command makes when nothing stops it."
    folder = tmp_path_factory.mktemp("whole")
    for name in ("demos.zarr", "demos.npz"):
        assert main(collect_arguments(folder / name)) == 0
    return folder


def content(path):
    "Every file at a path, by name."
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize("name, kill", [("demos.zarr", signal.SIGINT), ("demos.zarr", signal.SIGKILL), ("demos.npz", signal.SIGTERM)])
def test_collecting_that_is_stopped_goes_on_and_ends_as_if_it_had_not_been(whole, tmp_path, name, kill, capsys):
    out = tmp_path / name
    unfinished = tmp_path / f".{name}.unfinished"
    begun = unfinished / "lengths" / "c" / "0" if out.suffix == ".zarr" else unfinished
    process = subprocess.Popen([sys.executable, "-m", "dreamer4_nb", *collect_arguments(out)],
                               env=os.environ | {"PYTHONPATH": ROOT}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while process.poll() is None and not begun.exists():
        time.sleep(0.01)
    process.send_signal(kill)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not out.exists() and unfinished.exists()
    other = [*collect_arguments(out), "--quality", "expert"]
    assert main(other) == 2
    one_line(capsys, "quality mixed there, expert here")
    made = []
    make_piece = demonstrations.collect_episodes

    def counted(task, episodes, *rest):
        made.append(episodes)
        return make_piece(task, episodes, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstrations, "collect_episodes", counted)
        assert main(collect_arguments(out)) == 0
    assert sum(made) < 56
    assert content(out) == content(whole / name)


def test_collecting_where_home_and_addresses_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    small = ["--episodes", "2", "--decisions", "3", "--candidates", "2", "--image", "16", "--workers", "0"]
    assert main(["collect", "--out", "~/here.zarr", *small]) == 0
    assert len(EpisodeStore.open(tmp_path / "here.zarr")) == 2
    assert main(["collect", "--out", "memory://bucket/there.zarr", *small]) == 0
    assert len(EpisodeStore.open("memory://bucket/there.zarr")) == 2 and not (tmp_path / "memory:").exists()
    assert main(["collect", "--out", "memory://bucket/there.zarr", *small]) == 2
    fsspec.filesystem("memory").rm("/bucket", recursive=True)
    capsys.readouterr()
    for address in ("s3://bucket/x.npz", "memory://bucket/x.npz"):
        assert main(["collect", "--out", address, *small]) == 2
        one_line(capsys, address, "on this machine")
    assert main(["collect", "--out", "nothing://bucket/x.zarr", *small]) == 2
    one_line(capsys, "nothing://bucket/x.zarr")
    assert not list(tmp_path.glob("*:"))


@pytest.mark.parametrize("option, value", [("image", 0), ("image", -1), ("image", 100000), ("workers", -1), ("candidates", 0), ("decisions", 0),
                                           ("episodes", 0), ("seed", -1), ("seed", 2**32 - 1), ("task", "fly"), ("shard", "2/2"), ("shard", "0/3")])
def test_what_cannot_be_collected_is_refused_before_anything_is_made(tmp_path, option, value, capsys):
    assert main(["collect", "--out", str(tmp_path / "x.zarr"), "--episodes", "2", f"--{option}={value}"]) == 2
    one_line(capsys)
    assert not list(tmp_path.iterdir())


# numbers

@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "a", None, float("nan")])
def test_seeds_are_32_bits_everywhere(seed):
    env = make_env(BALL, 0, image=None)
    with VectorEnv(BALL, [0], image=None) as vector:
        calls = [lambda: make_env(BALL, seed), lambda: VectorEnv(BALL, [seed]), lambda: vector.reset([seed]),
                 lambda: Planner(BALL, seed=seed), lambda: collect_episodes(BALL, 1, 1, seed),
                 lambda: evaluate_policy(RandomPolicy(2), BALL, [seed], 1)]
        if seed is not None:
            calls.append(lambda: env.reset(seed))
        for call in calls:
            with pytest.raises(UserError, match="seed"):
                call()
        assert vector.reset([2**32 - 1]).shape == (1,)
    with pytest.raises(UserError, match="seed"):
        collect_episodes(BALL, 2, 1, 2**32 - 1)


def test_numbers_that_cannot_be_are_named():
    states = np.zeros((40, 8))
    for name, call in (
            ("image", lambda: make_env(BALL, 0, image=0)), ("image", lambda: make_env(BALL, 0, image=-1)),
            ("image", lambda: make_env(BALL, 0, image=100_000)), ("image", lambda: render_states(BALL, states, image=0)),
            ("image", lambda: object_pixels(BALL, states, image=0)), ("repeat", lambda: make_env(BALL, 0, repeat=0)),
            ("time_limit_decisions", lambda: make_env(BALL, 0, time_limit_decisions=0)),
            ("workers", lambda: VectorEnv(BALL, [0], workers=0)), ("workers", lambda: render_states(BALL, states, workers=-1)),
            ("workers", lambda: evaluate_policy(RandomPolicy(2), BALL, [0], 1, workers=0)),
            ("keep", lambda: evaluate_policy(RandomPolicy(2), BALL, [0], 1, keep=-1)),
            ("decisions", lambda: evaluate_policy(RandomPolicy(2), BALL, [0], 0)),
            *((name, lambda name=name: Planner(BALL, **{name: 0})) for name in ("candidates", "horizon", "knots", "top", "temperature", "threads")),
            ("decisions", lambda: collect_episodes(BALL, 1, 0, 0)), ("episodes", lambda: collect_episodes(BALL, 0, 1, 0))):
        with pytest.raises(UserError, match=f"^{name}"):
            call()


def test_frames_larger_than_mujocos_own_buffer():
    assert make_env(BALL, 0, image=64).reset().shape == (64, 64, 3)
    large = make_env(BALL, 0, image=700).reset()
    assert large.shape == (700, 700, 3) and large.std() > 10


# how to draw

@pytest.mark.parametrize("value", ["bogus", "disable", "osmesa" if envs.setup_gl() == "egl" else "egl"])
def test_a_bad_way_to_draw_is_said_when_something_is_drawn(value, tmp_path):
    code = ("from dreamer4_nb.data.envs import make_env, UserError; e = make_env('ball_in_cup-catch', 0, None); e.reset(); e.step([0, 0])\n"
            "try: make_env('ball_in_cup-catch', 0).reset()\nexcept UserError as error: print(error)")
    empty = str(tmp_path)                       # `find_library` finds nothing there
    result = child(code, MUJOCO_GL=value, PATH=empty)
    said = result.stdout.decode().splitlines()
    assert result.returncode == 0 and (said == [] or f"MUJOCO_GL={value}" in said[0] and "unset MUJOCO_GL" in said[0]), result
    assert said or value in ("osmesa", "egl")


def test_doctor_and_help_answer_whatever_mujoco_gl_is():
    code = ("from dreamer4_nb.runs.cli import main; import contextlib\n"
            "with contextlib.suppress(SystemExit): main(['--help'])\nprint('code', main(['doctor']))")
    result = child(code, MUJOCO_GL="bogus")
    said = result.stdout.decode()
    assert "Traceback" not in result.stderr.decode() and "code 2" in said and "collect" in said
    assert [line for line in said.splitlines() if line.startswith("NOT") and "MUJOCO_GL=bogus" in line]


def film(seed):
    own = make_env(BALL, seed)
    return np.array([own.reset(), *(own.step([0.5, -0.5])[0] for _ in range(15))])


def test_environments_are_drawn_in_any_thread():
    alone = [film(seed) for seed in range(6)]
    states = np.concatenate([make_env(BALL, seed, None).state()[None] + 0.01 * seed for seed in range(6)])
    one_by_one = [render_states(BALL, states[[i]], workers=0) for i in range(6)]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(film, range(6)))
        drawn = list(threads.map(lambda i: render_states(BALL, states[[i]], workers=0), list(range(6)) * 5))
    assert all(map(np.array_equal, alone, together))
    assert all(map(np.array_equal, one_by_one * 5, drawn))


def states_of_episodes(seed):
    own = make_env(BALL, seed, None)
    states = []
    for _ in range(3):
        own.reset(seed)
        for _ in range(40):
            own.step([0.5, -0.5])
            states.append(own.state())
    return np.array(states)


def test_threads_do_not_change_each_others_physics():
    "They share a model, which dm_control changes while it resets."
    alone = list(map(states_of_episodes, range(16)))
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(states_of_episodes, range(16)))
    assert all(map(np.array_equal, alone, together))


def test_two_threads_may_draw_first_and_the_way_to_draw_may_be_in_capitals():
    code = ("from concurrent.futures import ThreadPoolExecutor; from dreamer4_nb.data.envs import make_env\n"
            "with ThreadPoolExecutor(4) as threads:\n"
            "    print(len(list(threads.map(lambda s: make_env('ball_in_cup-catch', s).reset(), range(8)))))")
    result = child(code, MUJOCO_GL=envs.setup_gl().upper())
    assert (result.returncode, result.stdout, result.stderr) == (0, b"8\n", b"")


def in_child(channel):
    "In a forked process: what drawing, planning and asking workers come to."
    try:
        make_env(BALL, 0).reset()
        channel.send("drawn")
    except UserError as error:
        channel.send(str(error))
    actions = Planner(BALL, candidates=2, threads=2).plan(make_env(BALL, 0, None).state()[None])
    with VectorEnv(BALL, [0, 1], image=None) as pair:
        channel.send((actions.shape, pair.reset().shape))


def test_a_forked_process_does_not_hang():
    make_env(BALL, 0).reset()
    Planner(BALL, candidates=2, threads=2).plan(make_env(BALL, 0, None).state()[None])
    with VectorEnv(BALL, [0, 1], image=None):
        pass
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=in_child, args=(there,))
    process.start()
    answers = [here.recv() if here.poll(30) else None for _ in range(2)]
    process.join(30)
    hangs = process.is_alive()
    process.kill()
    assert not hangs and process.exitcode == 0
    assert "spawn" in answers[0] and answers[1] == ((1, 2), (2,))
    with VectorEnv(BALL, [0, 1], image=None) as pair:
        assert pair.reset().shape == (2,)


# workers

def test_workers_import_nothing_from_the_current_folder(tmp_path):
    (tmp_path / "numpy.py").write_text("raise SystemExit('a stranger')", encoding="utf-8")
    (tmp_path / "dreamer4_nb.py").write_text("raise SystemExit('a stranger')", encoding="utf-8")
    code = (f"import sys; sys.path[:] = [path for path in sys.path if path not in ('', {str(tmp_path)!r})]\n"
            "from dreamer4_nb.data.envs import VectorEnv\n"
            "with VectorEnv('ball_in_cup-catch', [0], image=None) as env: print(env.reset().shape)")
    result = child(code, tmp_path, PYTHONSAFEPATH="")
    assert result.stdout == b"(1,)\n", result.stderr


def test_a_task_of_ones_own_is_known_in_workers(monkeypatch):
    monkeypatch.setitem(TASKS, "mine", replace(TASKS[BALL], score=lambda states: states[..., 0], action_repeat=5))
    with VectorEnv("mine", [3], image=16) as pair:
        alone = make_env("mine", 3, image=16)
        assert np.array_equal(pair.reset()[0], alone.reset())
        assert np.array_equal(pair.step([[0.5, 0.5]])[0][0], alone.step([0.5, 0.5])[0])
    states = np.repeat(alone.state()[None], 40, 0)
    assert np.array_equal(render_states("mine", states, 16, 2), render_states("mine", states, 16, 0))
    monkeypatch.setitem(TASKS, "mine", TASKS["cartpole-swingup"])       # now another one of this name
    with VectorEnv("mine", [3], image=16) as pair:
        assert np.array_equal(pair.reset()[0], make_env("cartpole-swingup", 3, image=16).reset())


@pytest.mark.parametrize("size", [3, 100_000])
def test_a_killed_worker_gives_one_line_and_the_others_are_stopped(size):
    env = VectorEnv(BALL, range(4), workers=2, image=None)
    env.reset()
    first, second = env.workers
    second.process.kill()
    second.process.wait()
    with pytest.raises(UserError, match="an environment process ended"):
        envs._ask(env.workers, "draw", [(BALL, TASKS["cartpole-swingup"], np.zeros((size, 8)), 16)] * 2)
    assert not first.is_alive() and not second.is_alive()
    with pytest.raises(UserError, match="an environment process ended"):
        env.states()
    env.close()
    assert first not in envs._idle and second not in envs._idle
    with VectorEnv(BALL, [0, 1]) as fresh:
        assert fresh.reset().shape == (2, 64, 64, 3)


def test_no_worker_waits_with_an_answer_of_before(monkeypatch):
    env = VectorEnv(BALL, [0, 1], workers=2, image=None)
    env.reset()
    second = env.workers[1]

    def interrupted():
        raise KeyboardInterrupt
    monkeypatch.setattr(second, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt), env:
        env.states()
    assert second not in envs._idle
    refused = envs._take_workers(2)
    envs._return_workers(refused)
    with pytest.raises(UserError), VectorEnv(BALL, [0, 1], image=None) as pair:
        pair.step(np.zeros((2, 2)))                             # before the reset: an answer, not an accident
    assert all(worker in envs._idle for worker in refused if worker.is_alive())
    with VectorEnv(BALL, [5, 6], image=None) as pair:
        assert pair.reset().shape == (2,) and pair.states().shape == (2, 8)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_the_planner_uses_the_cores_it_may():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert Planner(BALL).search.simulator.threads == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert Planner(BALL, threads=2).search.simulator.threads == 2


# dreams

def test_rollouts_that_cannot_be_are_refused():
    thin = TransformerConfig(width=16, depth=2, heads=2, kv_heads=1, time_every=2, context=4)
    config = DynamicsConfig(n_latents=4, d_latent=6, n_agent=0, transformer=thin)
    world = make_world(TokenizerConfig(image=16, n_latents=4, d_latent=6, transformer=thin), config)
    latents = torch.zeros(2, 4, config.n_latents, config.d_latent)
    actions = torch.zeros(2, 6, config.action_dim)
    assert rollout(world, latents, actions, 4, step_generator(0)).shape[:2] == (2, 6)
    nan = torch.full_like(latents, torch.nan)
    for words, arguments in (("prefix is -1", (latents, actions, -1)), ("prefix is 0", (latents, actions, 0)), ("prefix is 2.0", (latents, actions, 2.0)),
                             ("latents of 4 frames", (latents, actions, 5)), ("actions of 4 frames", (latents, actions[:, :4], 4)),
                             ("actions of 0 frames", (latents, actions[:, :0], 4)), ("latents have NaN", (nan, actions, 4)),
                             ("actions have NaN", (latents, actions / 0, 4)), ("actions has shape", (latents, actions[:1], 4))):
        with pytest.raises(UserError, match=words):
            rollout(world, *arguments, step_generator(0))
    with pytest.raises(UserError, match="action_known"):
        rollout(world, latents, actions, 4, step_generator(0), None, torch.ones(2, 4, dtype=torch.bool))


# files

def few_demonstrations():
    "The first three shipped episodes, as their file has them."
    with np.load(asset(f"demos_{BALL}.npz")) as file:
        data = dict(file)
    rows = data["lengths"][:3].sum()
    return {name: values if not values.ndim else values[:3] if len(values) == 1800 else values[:rows] for name, values in data.items()}


def bad_demonstrations():
    "Damaged files: what each changes."
    data = few_demonstrations()
    nan, wide = data["states"].copy(), data["actions"].copy()
    nan[5, 2] = np.nan
    wide[7] = 1.5
    return {
        "shorter rewards": {"rewards": data["rewards"][:-1]}, "lengths too long": {"lengths": data["lengths"] + 1},
        "a length of 0": {"lengths": data["lengths"] * [1, 1, 0]}, "a negative length": {"lengths": data["lengths"] * [1, -1, 1]},
        "float lengths": {"lengths": data["lengths"].astype(float)}, "no episodes": {name: data[name][:0] for name in ("lengths", "seeds", "quality")},
        "NaN": {"states": nan}, "actions beyond 1": {"actions": wide}, "flat actions": {"actions": data["actions"][:, 0]},
        "wider actions": {"actions": np.repeat(data["actions"], 2, 1), "intended": np.repeat(data["intended"], 2, 1)},
        "other intended": {"intended": data["intended"][:, :1]}, "unknown quality": {"quality": np.array(["good"] * 3)},
        "numbers for quality": {"quality": np.zeros(3)}, "objects": {"quality": np.array([{}, {}, {}])}, "a seed below": {"seeds": np.array([0, 1, -5])},
        "a seed beyond": {"seeds": np.array([0, 1, 2**32])}, "float seeds": {"seeds": np.zeros(3)}, "text": {"rewards": data["rewards"].astype(str)},
        "continues of 2": {"continues": np.full(len(data["rewards"]), 2.0)}, "infinite rewards": {"rewards": data["rewards"] + np.float16(np.inf)},
        "complex states": {"states": data["states"].astype(complex)}, "few seeds": {"seeds": np.arange(2)},
    }


@pytest.mark.parametrize("name", bad_demonstrations())
def test_damaged_demonstrations_are_refused(name, tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", **few_demonstrations() | bad_demonstrations()[name])
    monkeypatch.setattr("dreamer4_nb.data.demonstrations.asset", lambda _: tmp_path / "x.npz")
    monkeypatch.setenv("DREAMER4_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="install the package again"):
        demonstrations.load_demonstrations(BALL, workers=0, image=16, progress=False)


@pytest.mark.parametrize("missing", ["lengths", "seeds", "quality", "states", "actions", "rewards"])
def test_demonstrations_that_lack_a_column_are_refused(missing, tmp_path, monkeypatch):
    columns = few_demonstrations()
    del columns[missing]
    np.savez(tmp_path / "x.npz", **columns)
    monkeypatch.setattr("dreamer4_nb.data.demonstrations.asset", lambda _: tmp_path / "x.npz")
    with pytest.raises(UserError, match=f"it lacks {missing}"):
        demonstrations.load_demonstrations(BALL, workers=0, image=16, progress=False)


def saved_records(path):
    "The text of records of two episodes, written to a path."
    Records.of_rewards("random", BALL, [3, 4], np.zeros((2, 5))).save(path)
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("change", [{"episodes": []}, {"episodes": 5}, {"episodes": [3]}, {"policy": 3}, {"task": None}, {"decisions": "many"},
                                    {"decisions": 0}, {"info": []}, "seed", "success", "return", "first_success", "final_success"])
def test_damaged_records_are_refused_in_one_line(change, tmp_path):
    saved = saved_records(tmp_path / "r.json")
    assert len(Records.load(tmp_path / "r.json")) == 2
    if isinstance(change, str):
        saved["episodes"][1][change] = "no"
    else:
        saved |= change
    (tmp_path / "r.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(UserError, match="dreamer4-nb evaluate"):
        Records.load(tmp_path / "r.json")


def test_records_that_are_no_json_are_refused(tmp_path):
    for bytes_ in (b"", b"[]", b"5", b"\xff\xfe", b"{", b"[" * 100_000, b'{"episodes": {}}'):
        (tmp_path / "r.json").write_bytes(bytes_)
        with pytest.raises(UserError, match="dreamer4-nb evaluate"):
            Records.load(tmp_path / "r.json")


RESULTS = {
    "task": "<b>", "closed_loop": [Records.of_rewards("<i>", BALL, [3, 4], np.zeros((2, 5))).summary()],
    "dream": {"<script>": 1.0, "prefix": 2, "length": 5, "mean": {"dream": {"<u>": 1.0}}, "<a>": {"x": 1}},
    "tokenizer": {"<tokenizer>": {"<p>": 1.0}}, "phases": {"<h1>": {"order": 1, "seconds": 3.0}}, "machine": {"<em>": "<s>"},
    "captions": {"policy-0": "<q>"}, "preset": {"<pre>": "</pre>"},
}


def test_whatever_is_in_results_is_text_on_the_page(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    page = report(tmp_path).read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    for tag in ("<b>", "<i>", "<script>", "<u>", "<a>", "<tokenizer>", "<p>", "<h1>1", "<s>", "<q>", "<pre>\"", "\"</pre>"):
        assert tag not in page


@pytest.mark.parametrize("results", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, *(json.dumps(RESULTS | {key: value}).encode() for key in RESULTS if key != "task"
                                     for value in (5, [5], "text", {"x": 5}) if not (key in ("machine", "preset", "captions") or (key, value) == ("dream", {"x": 5})))])
def test_damaged_results_are_refused_in_one_line(results, tmp_path):
    (tmp_path / "results.json").write_bytes(results)
    with pytest.raises(UserError, match="results.json.*dreamer4-nb demo") as problem:
        report(tmp_path)
    assert "\n" not in str(problem.value) and not (tmp_path / "report.html").exists()


def test_wide_tables_scroll_on_the_page(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    page = report(tmp_path).read_text(encoding="utf-8")
    assert page.count("<table>") == page.count("<div class=wide><table>") and ".wide{overflow-x:auto}" in page


LOCALES = [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}, {"LC_ALL": "ja_JP.EUC-JP", "PYTHONUTF8": "0"}]


@pytest.mark.parametrize("variables", LOCALES, ids=["ascii", "euc-jp"])
def test_files_are_utf8_in_every_locale(variables, tmp_path):
    installed = subprocess.run(["locale", "-a"], capture_output=True, text=True).stdout.lower().replace("-", "").split()
    if variables["LC_ALL"].lower().replace("-", "") not in installed:
        pytest.skip("no such locale here")
    results = RESULTS | {"captions": {"x": "π, ü, −"}, "preset": {"x": "π, ü, −"}}
    results["closed_loop"][0] |= {"policy": "π, ü, −"}
    (tmp_path / "results.json").write_text(json.dumps(results, ensure_ascii=False), encoding="utf-8")
    code = ("import sys, numpy as np; from dreamer4_nb.evaluation.report import report; from dreamer4_nb.evaluation.statistics import Records\n"
            "report(sys.argv[1] if len(sys.argv) > 1 else '.')\n"
            "Records.of_rewards('\\u03c0', 'ball_in_cup-catch', [3], np.zeros((1, 5))).save('r.json')")
    result = child(code, tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    assert "π, ü, −" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert Records.load(tmp_path / "r.json").policy == "π"
