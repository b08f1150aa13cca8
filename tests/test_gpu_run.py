"The script for a GPU does not rot: its smallest trial runs here, and what goes wrong costs only itself."
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = Path(__file__).parent / "gpu" / "run.py"
BROKEN = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from apart import noted

def raises(note):
    note(begun=True)
    raise ValueError("as planned")

def dies(note):
    note(begun=True)
    os.kill(os.getpid(), 9)

def hangs(note):
    note(begun=True)
    time.sleep(60)

for work in (raises, dies, hangs):
    begun, end = noted(work, 2)
    print(begun["begun"], end["error"].strip().splitlines()[-1])
"""


def python(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True)


def test_the_smallest_trial_runs_on_a_cpu(tmp_path):
    "With stand-ins for all that draws and simulates: what is missing on a bare machine is missing here."
    out = tmp_path / "gpu.json"
    parts = "machine", "chain", "steps small", "bench paper"
    ran = python(RUN, "--device", "cpu", "--small", "--out", out, "--only", *parts)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert not {name: record["error"] for name, record in found.items() if "error" in record}
    assert found["chain use"]["finite"] and found["machine"]["peak_gflops_bf16"] > 0
    steps = {name: record for name, record in found.items() if name.startswith("steps")}
    assert steps.pop("steps small predicted")["dynamics"]["memory_gb"] > 0
    assert len(steps) == 5 and all(step["seconds"] > 0 and step["memory_gb"] > 0 for step in steps.values())
    assert steps["steps small dynamics"]["batch"] == steps["steps small dynamics"]["asked"]
    timed = found["bench paper"]
    assert timed["decoded_fps"] > 0 and timed["predicted"]["dynamics"]["memory_gb"] > 0


def test_what_has_no_time_left_is_said(tmp_path):
    out = tmp_path / "gpu.json"
    assert python(RUN, "--device", "cpu", "--small", "--out", out, "--minutes", "0").returncode == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found.pop("asked") == {"device": "cpu", "small": True}
    assert {name.partition(" ")[0] for name in found} == {"machine", "tests", "chain", "steps", "bench"}
    assert {record["error"] for record in found.values()} == {"not begun: no time was left"}


def test_errors_deaths_and_hangs_stay_in_their_child():
    said = python("-c", BROKEN, RUN.parent).stdout.splitlines()
    assert said == ["True ValueError: as planned", "True the process died with exit code -9",
                    "True stopped after 2 seconds"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(tmp_path):
    ran = python(RUN, "--out", tmp_path / "gpu.json")
    assert ran.returncode == 2 and len(ran.stderr.splitlines()) == 1 and "needs an NVIDIA GPU" in ran.stderr
