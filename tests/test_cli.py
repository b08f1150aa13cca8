"The command line: one run of the whole chain with models too small to learn, and what happens when something is wrong."
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from dreamer4_nb.method.checkpoints import load_agent
from dreamer4_nb.runs.judge import ship
from dreamer4_nb.runs.presets import PRESETS
from dreamer4_nb.runs import cli
from dreamer4_nb.runs.cli import main, parse
from dreamer4_nb import from_pretrained
from dreamer4_nb.core import UserError, asset
from dreamer4_nb.method.checkpoints import load_tokenizer


def one_line(capsys, *words):
    "The last thing said was one line on stderr that contains these words."
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dreamer4-nb: ")]
    assert len(error) == 1, error
    for word in words:
        assert word in error[0]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    "Where `--data` points to: the shipped demonstrations, or a few made on the spot."
    try:
        asset("demos_ball_in_cup-catch.npz")
        return "shipped"
    except UserError:
        path = tmp_path_factory.mktemp("data") / "episodes.zarr"
        assert main(["collect", "--out", str(path), "--episodes", "12", "--decisions", "40", "--candidates", "8"]) == 0
        return str(path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, data):
    "A run folder after `dreamer4-nb demo --preset micro`."
    run = tmp_path_factory.mktemp("runs") / "micro"
    assert main(["demo", "--preset", "micro", "--data", data, "--run", str(run)]) == 0
    return run


def test_help():
    found = subprocess.run([sys.executable, "-m", "dreamer4_nb", "--help"], capture_output=True, text=True)
    assert found.returncode == 0
    for command in ("demo", "collect", "train", "evaluate", "online", "play", "bench", "ship", "doctor"):
        assert command in found.stdout


def test_help_shows_the_preset_s_own_defaults(capsys):
    for preset in PRESETS:
        with pytest.raises(SystemExit) as stop:
            parse(["demo", "--preset", preset, "--help"])
        assert stop.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert f"optimizer steps (default: {PRESETS[preset].tokenizer.train.steps})" in shown


def test_any_field_can_be_overridden():
    command = parse(["train", "dynamics", "--preset", "small", "--dynamics.train.steps", "7", "--tokenizer.model.transformer.width", "96"])
    assert command.phase == "dynamics" and command.settings.dynamics.train.steps == 7
    assert command.settings.tokenizer.model.transformer.width == 96
    assert command.settings.agent == PRESETS["small"].agent
    assert parse(["demo", "--preset=micro"]).settings == PRESETS["micro"]


@pytest.mark.parametrize("arguments", [["fly"], ["demo", "--preset", "huge"], ["demo", "--dynamics.train.steps", "many"], ["train"]])
def test_what_cannot_be_parsed_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and capsys.readouterr().err


def test_doctor(capsys):
    code = main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert code in (0, 2) and (code == 2) == any(line.startswith("NOT") for line in lines)
    for name in ("torch", "mujoco", "device", "bfloat16", "drawing", "asset", "disk here"):
        assert any(name in line for line in lines), name
    assert all("->" in line for line in lines if line.startswith("NOT"))


def test_unknown_task(tmp_path, capsys):
    assert main(["demo", "--tasks", "ball_in_cup-throw", "--run", str(tmp_path)]) == 2
    one_line(capsys, "ball_in_cup-throw", "ball_in_cup-catch")
    assert not list(tmp_path.iterdir())


def test_impossible_settings(tmp_path, capsys):
    assert main(["demo", "--run", str(tmp_path), "--tokenizer.train.steps", "0"]) == 2
    one_line(capsys, "steps")
    assert main(["demo", "--run", str(tmp_path), "--tokenizer.model.patch", "7"]) == 2
    one_line(capsys, "patch")


def test_missing_data_and_missing_runs(tmp_path, capsys):
    assert main(["demo", "--preset", "micro", "--data", str(tmp_path / "none.zarr"), "--run", str(tmp_path / "a")]) == 2
    one_line(capsys, "none.zarr")
    assert main(["train", "dynamics", "--preset", "micro", "--run", str(tmp_path / "b")]) == 2
    one_line(capsys, "dreamer4-nb train tokenizer")
    assert main(["evaluate", "--run", str(tmp_path / "c")]) == 2
    one_line(capsys, "dreamer4-nb demo")
    assert main(["collect", "--out", str(tmp_path / "file.txt")]) == 2
    one_line(capsys, ".npz")


def test_demo_makes_everything(finished):
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert {"tokenizer", "latents", "dynamics", "agent", "imagination", "evaluation"} <= results["phases"].keys()
    policies = [row["policy"] for row in results["closed_loop"]]
    assert policies == ["random", "cloning, sample", "PMPO, sample", "demonstrator"]
    assert all(0 <= row["success"] <= 1 for row in results["closed_loop"])
    assert results["dream"]["mean"]["dream"]["psnr"] and results["tokenizer"]["mean_frame"]["psnr"]
    page = (finished / "report.html").read_text(encoding="utf-8")
    for name in ("policy-0.webp", "dream-steps.png", "dream-rollouts.webp", "tokenizer-frames.png", "training-curves.png"):
        assert (finished / "figures" / name).exists(), name
    assert page.count("data:image/") >= 6 and "http" not in page and len(page) < 20e6


def test_demo_again_trains_nothing(finished, data):
    files = sorted(finished.glob("*.safetensors")) + sorted((finished / "episodes").rglob("*.json"))
    before = [f.stat().st_mtime_ns for f in files]
    assert main(["demo", "--preset", "micro", "--data", data, "--run", str(finished)]) == 0
    assert before == [f.stat().st_mtime_ns for f in files]


def test_evaluate(finished, capsys):
    assert main(["evaluate", "--run", str(finished), "--episodes", "3", "--decisions", "6", "--readouts", "mode", "--demonstrator", "0"]) == 0
    assert "PMPO, mode" in capsys.readouterr().out
    kept = json.loads((finished / "episodes" / "50000-3x6" / "PMPO-mode.json").read_text(encoding="utf-8"))
    assert [row["seed"] for row in kept["episodes"]] == [50000, 50001, 50002]


def test_other_settings_are_refused(finished, data, capsys):
    arguments = ["demo", "--preset", "micro", "--data", data, "--run", str(finished), "--dynamics.train.lr", "0.01"]
    before = {f: f.read_bytes() for f in finished.glob("*.json")}
    assert main(arguments) == 2
    one_line(capsys, "dynamics.train.lr", "0.01", "--run")
    assert before == {f: f.read_bytes() for f in finished.glob("*.json")}


def test_truncated_checkpoint(finished, data, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("figures", "latents.zarr"))
    whole = (run / "tokenizer.safetensors").read_bytes()
    (run / "tokenizer.safetensors").write_bytes(whole[:len(whole) // 2])
    assert main(["evaluate", "--run", str(run), "--episodes", "1", "--decisions", "2", "--first-seed", "70000"]) == 2
    one_line(capsys, "tokenizer.safetensors", "cut short")


def test_checkpoint_of_another_model(finished, data, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("figures", "latents.zarr"))
    shutil.copy(run / "tokenizer.safetensors", run / "agent.safetensors")
    assert main(["evaluate", "--run", str(run), "--episodes", "1", "--decisions", "2", "--first-seed", "70000"]) == 2
    one_line(capsys, "agent.safetensors")


def test_stop_and_go_on(data, tmp_path):
    arguments = ["train", "tokenizer", "--preset", "micro", "--data", data, "--run", str(tmp_path), "--tokenizer.train.steps", "60"]
    log = tmp_path / "tokenizer.draft.log.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "dreamer4_nb", *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and (not log.exists() or log.read_text(encoding="utf-8").count("\n") < 3):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "-m dreamer4_nb train tokenizer" in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "tokenizer.safetensors").exists()
    assert main(arguments) == 0
    assert [json.loads(line)["step"] for line in log.read_text(encoding="utf-8").splitlines()] == list(range(1, 61))


def test_shipping_a_run_keeps_its_weights_to_half_precision(finished, tmp_path):
    written = ship(finished, tmp_path, tmp_path / "chain.json")
    assert [path.name for path in written] == [*(f"tiny_{name}.safetensors" for name in ("tokenizer", "dynamics", "agent", "imagination")), "README.md", "chain.json"]
    for made, kept in ((load_tokenizer(finished / "tokenizer.safetensors"), load_tokenizer(written[0])),
                       (load_agent(finished / "agent.safetensors")[0], load_agent(written[2])[0])):
        for a, b in zip(made.state_dict().values(), kept.state_dict().values()):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert json.loads(written[-1].read_text(encoding="utf-8"))["preset"]["tasks"] == ["ball_in_cup-catch"]


def test_a_packed_run_says_what_it_is_and_is_loaded_by_its_folder(finished, tmp_path, capsys):
    out = tmp_path / "packed"
    assert main(["ship", "--run", str(finished), "--out", str(out)]) == 0
    weights = [f"{name}.safetensors" for name in ("agent", "dynamics", "imagination", "tokenizer")]
    assert sorted(path.name for path in out.iterdir()) == sorted(["README.md", *weights, "results.json"])
    card = (out / "README.md").read_text(encoding="utf-8")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    for said in ("license: mit", "## Limits", "Training seed 0.", "random: success", f"| {results['preset']['dynamics']['train']['steps']} |"):
        assert said in card
    policy = from_pretrained(out)
    for a, b in zip(policy.world.tokenizer.state_dict().values(), load_tokenizer(finished / "tokenizer.safetensors").state_dict().values()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert main(["ship", "--run", str(finished), "--out", str(finished)]) == 2
    one_line(capsys, "the run's own folder")


def test_an_unfinished_run_cannot_be_shipped(tmp_path, capsys):
    assert main(["ship", "--run", str(tmp_path), "--results", str(tmp_path / "chain.json")]) == 2
    one_line(capsys, "results.json", "dreamer4-nb demo")
    assert not (tmp_path / "chain.json").exists()


def test_bench_writes_json_and_refuses_what_is_too_large(tmp_path, capsys):
    assert main(["bench", "--shape", "tiny", "--seconds", "0.01", "--threads", "1", "--json", str(tmp_path / "bench.json")]) == 0
    assert {"tokenizer_train_fps", "frame_ms", "peak_gflops_fp32", "versions"} <= json.loads((tmp_path / "bench.json").read_text(encoding="utf-8")).keys()
    assert main(["bench", "--shape", "paper", "--device", "cpu"]) == 2
    one_line(capsys, "too many to time on a CPU")


def test_the_commands_that_a_help_text_shows_can_be_typed():
    shown = []
    for command in vars(cli).values():
        lines = (getattr(command, "__doc__", None) or "").splitlines() if isinstance(command, type) else []
        shown += [line.split()[1:] for line in lines if line.strip().startswith("dreamer4-nb ") and line.strip().count(" ") > 1 and ". " not in line]
    assert ["collect", "--out"] in [words[:2] for words in shown]
    for words in shown:
        parse(words)
