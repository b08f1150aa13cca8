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


def is_class(source: str) -> bool:
    "Whether a cell is one class, whose methods are short by themselves."
    definitions = [node for node in ast.parse(source).body if not isinstance(node, ast.Assign)]
    return len(definitions) == 1 and isinstance(definitions[0], ast.ClassDef)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_exported_cell_fits_on_a_screen_or_is_one_class(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    exported = [source for source in sources if re.match(r"#\|\s*export\b", source)]
    long = [source for source in exported if source.count("\n") > 75 and not is_class(source)]
    assert [source.splitlines()[1] for source in long] == []
