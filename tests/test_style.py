"What a linter does not see of the style: lines that nbdev did not make, and cells that fit on a screen."
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for path in (ROOT / "dreamer4_nb").rglob("*.py") if path.name != "_modidx.py")
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_of_a_module_have_110_characters_at_most(path):
    "All but the first, which is the notebook's promise, and `__all__`, which nbdev breaks at lengths of its own."
    source = re.sub(r"^__all__ = \[.*?\]$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in source.splitlines()[1:] if len(line) > 110] == []


# They keep many short accessors together, which the other rooms read.
TALL = {"EpisodeStore", "Windows"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_exported_cell_has_60_lines_at_most(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    long = [source for source in sources if re.match(r"#\|\s*export\b", source) and source.count("\n") > 60]
    names = {getattr(node, "name", "") for source in long for node in ast.parse(source).body}
    assert names <= TALL
