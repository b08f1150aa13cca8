"""Nothing that a GPU is asked to do mixes devices or draws from a foreign generator: all on a pretend one.

The device holds for a whole process, so all scenarios run in one of their own, once; each is a test here."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dreamer4_nb
from pretend_gpu.load import COMPILER
from pretend_gpu.scenarios import SCENARIOS

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the pretend GPU needs a C++ compiler, such as g++")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    "What went wrong in each scenario, by its name; None where nothing did."
    folder = tmp_path_factory.mktemp("pretend_gpu")
    paths = [Path(__file__).parent, Path(dreamer4_nb.__file__).parents[1], os.environ.get("PYTHONPATH", "")]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "pretend_gpu.scenarios"]
    ran = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    written = folder / "outcomes.jsonl"
    lines = written.read_text(encoding="utf-8").splitlines() if written.exists() else []
    found = {line["name"]: line["error"] for line in map(json.loads, lines)}
    return dict.fromkeys(SCENARIOS, f"did not run: {ran.stderr[-2000:]}") | found


@pytest.mark.parametrize("name", SCENARIOS)
def test_on_the_pretend_gpu(outcomes, name):
    assert outcomes[name] is None, outcomes[name]
