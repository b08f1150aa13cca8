"""The lessons in Colab: a badge, and a first cell that installs the package there and does nothing elsewhere.

By hand, in an environment that has only what Colab has: python tests/colab.py (see there).
"""
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LESSONS = sorted((ROOT / "nbs").glob("[01][0-9]_*.ipynb"))
SETTINGS = dict(re.findall(r"(?m)^(\w+) = (.+)$", (ROOT / "settings.ini").read_text(encoding="utf-8")))
HOME = f"{SETTINGS['user']}/{SETTINGS['repo']}"


def tagged(path, kind):
    "The cells of a notebook that are for Colab, with their places among all code cells."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    own = [cell for cell in cells if cell["cell_type"] == kind]
    return [(k, "".join(cell["source"])) for k, cell in enumerate(own) if "colab" in cell["metadata"].get("tags", [])]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_has_its_badge_and_its_first_cell(path):
    ((_, badge),) = tagged(path, "markdown")
    assert f"https://colab.research.google.com/github/{HOME}/blob/{SETTINGS['branch']}/nbs/{path.name})" in badge
    ((place, cell),) = tagged(path, "code")
    first = json.loads(path.read_text(encoding="utf-8"))["cells"]
    before = ["".join(c["source"]) for c in first if c["cell_type"] == "code"][:place]
    assert all("default_exp" in source for source in before)
    assert f"https://github.com/{HOME}/archive/refs/heads/{SETTINGS['branch']}.zip" in cell


def test_the_cell_acts_in_colab_only(monkeypatch):
    import subprocess
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda arguments, **options: calls.append(arguments))
    ((_, cell),) = tagged(LESSONS[0], "code")
    exec(cell, {})
    assert not calls
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    exec(cell, {})
    assert len(calls) == 2 and calls[0][:4] == [sys.executable, "-m", "pip", "install"]
