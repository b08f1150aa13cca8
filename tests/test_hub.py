"A model by its name on the hub: the calls fit the real library, which reads its own cache without a network."
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

from dreamer4_nb import from_pretrained
from dreamer4_nb.core import UserError, asset
from dreamer4_nb.evaluation.report import HOME, model_card
from dreamer4_nb.inputs import read_json
from dreamer4_nb.runs.hub import weights_of

LOAD = "import sys, dreamer4_nb; print(dreamer4_nb.from_pretrained(sys.argv[1]).heads.config.tasks)"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    "A cache of the hub's library, with the weights that ship as someone/cup."
    folder = tmp_path_factory.mktemp("hub")
    model = folder / "models--someone--cup"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    for name, path in weights_of(None).items():
        (snapshot / f"{name}.safetensors").symlink_to(path)
    return folder


def load(cache, name):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    return subprocess.run([sys.executable, "-c", LOAD, name], env=environment, capture_output=True, text=True)


def test_a_model_in_the_cache_is_loaded_by_its_name(cache):
    done = load(cache, "someone/cup")
    assert done.returncode == 0, done.stderr
    assert "ball_in_cup-catch" in done.stdout


def test_a_name_that_cannot_be_had_is_one_line(cache):
    last = load(cache, "someone/else").stderr.splitlines()[-1]
    assert "UserError: someone/else is no folder here, and cannot be had from the hub" in last and "check the name" in last


def test_what_is_no_folder_and_no_name_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a folder with weights, or owner/name"):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match="tokenizer|agent"):
        from_pretrained(tmp_path)


def test_the_calls_fit_the_library():
    "The notebook's hub is a folder; the real one must take the same arguments."
    inspect.signature(huggingface_hub.snapshot_download).bind("a/b", revision=None, allow_patterns=["x"])
    api = huggingface_hub.HfApi()
    inspect.signature(api.create_repo).bind("a/b", private=False, exist_ok=True)
    inspect.signature(api.upload_folder).bind(repo_id="a/b", folder_path="x", commit_message="x")
    assert "repo_url" in inspect.get_annotations(huggingface_hub.CommitInfo) | vars(huggingface_hub.CommitInfo)


def test_the_weights_that_ship_have_their_card():
    results = read_json(Path(__file__).parents[1] / "nbs" / "results" / "chain.json", "")
    assert asset("README.md").read_text(encoding="utf-8") == model_card(results)


def test_the_card_leads_home():
    settings = (Path(__file__).parents[1] / "settings.ini").read_text(encoding="utf-8")
    user, repo = (re.search(rf"(?m)^{name} = (.+)$", settings)[1] for name in ("user", "repo"))
    assert HOME == f"https://github.com/{user}/{repo}"
