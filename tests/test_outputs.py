"Stored outputs come from the code beside them: three quick notebooks, drawn by the day, say what they said."
import importlib.machinery
import importlib.util
import random
from datetime import date
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
loader = importlib.machinery.SourceFileLoader("execute", str(ROOT / ".ci" / "execute"))
execute = importlib.util.module_from_spec(importlib.util.spec_from_loader("execute", loader))
loader.exec_module(execute)

# Each takes seconds, most of them for imports.
QUICK = ("20", "21", "22", "24", "25", "33", "54", "80", "81", "82", "83")
DRAWN = random.Random(date.today().toordinal()).sample(QUICK, 3)


@pytest.mark.parametrize("number", DRAWN)
def test_a_notebook_says_what_is_stored(number, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)      # the command sets it, and a kernel would draw nothing
    (path,) = (ROOT / "nbs").glob(f"{number}_*.ipynb")
    new = execute.executed(path, execute.Client.flagged)
    assert not execute.differences(nbformat.read(path, 4), new)


@pytest.mark.parametrize("old, new, same", [
    ("loss 0.512", "loss 0.513", True), ("loss 0.512", "loss 0.712", False), ("loss 0.5", "error 0.5", False),
    ("12 steps in 3.1 s", "12 steps in 9.9 s", True), ("shape (2, 3)", "shape (2, 4)", False), ("1,000 frames", "1,000 frames", True)])
def test_what_counts_as_the_same(old, new, same):
    assert execute.alike(old, new) is same


def test_a_changed_output_is_noticed():
    path = ROOT / "nbs" / "22_pruned.ipynb"
    old, new = nbformat.read(path, 4), nbformat.read(path, 4)
    assert not execute.differences(old, new)
    cell = next(cell for cell in new.cells if execute.text_of(cell))
    cell.outputs = []
    assert len(execute.differences(old, new)) >= 1
