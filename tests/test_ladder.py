"The ladder: NN_name.ipynb exports dreamer4_nb/name.py and uses only modules of lower numbers."
import ast, json, re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem[3:]: path for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))}
RUNG = {name: int(path.stem[:2]) for name, path in NOTEBOOKS.items()}


def imported_modules(source: str) -> set[str]:
    "Names of the package's modules that a source imports."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = f"dreamer4_nb.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            names = [alias.name for alias in node.names]
            assert "*" not in names or not module.startswith("dreamer4_nb"), f"import * of {module}"
            found |= {f"dreamer4_nb.{name}" for name in names} if module == "dreamer4_nb" else {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("dreamer4_nb.")}


def too_high(name: str, source: str) -> set[str]:
    "Modules that `name` may not import, and does."
    return {other for other in imported_modules(source) if RUNG.get(other, 99) >= RUNG[name]}


def code_cells(path: Path) -> list[str]:
    "Sources of a notebook's code cells, without magics."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [re.sub(r"(?m)^\s*[%!].*$", "", "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", RUNG)
def test_module_imports_only_lower_ones(name):
    assert not too_high(name, (ROOT / "dreamer4_nb" / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RUNG)
def test_notebook_needs_only_lower_ones_and_itself(name):
    cells = code_cells(NOTEBOOKS[name])
    assert [re.findall(r"#\|\s*default_exp\s+(\S+)", cell) for cell in cells[:1]] == [[name]]
    for cell in cells:
        assert too_high(name, cell) <= {name}, cell


def test_every_module_has_its_notebook():
    modules = {path.stem for path in (ROOT / "dreamer4_nb").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == set(RUNG)


@pytest.mark.parametrize("page", [*sorted((ROOT / "nbs").glob("*.ipynb")), ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_to_the_notebook_that_they_name(page):
    text = page.read_text(encoding="utf-8")
    numbers = {f"{rung:02}" for rung in RUNG.values()}
    for said, target in re.findall(r"\[([^\]\[]*)\]\(([^()\s]*\.ipynb)\)", text):
        assert ((ROOT if page.stem == "index" else page.parent) / target).is_file(), target     # the index becomes README.md
        if number := re.match(r"\d\d", said):
            assert Path(target).name.startswith(number[0]), f"[{said}]({target})"
    for said in re.findall(r"[Nn]otebooks? (\d\d)", text):
        assert said in numbers, f"notebook {said}"


@pytest.mark.parametrize("name", RUNG)
def test_no_widget_is_stored(name):
    "Without its kernel a widget is an error message; `explore` leaves the figure. Run the notebook by `jupyter nbconvert --execute --inplace`."
    assert "widget-view" not in NOTEBOOKS[name].read_text(encoding="utf-8")


def test_evaluation_does_not_need_the_training_loop():
    seen, todo = set(), {"evaluation"} & set(RUNG)
    while todo:
        seen |= todo
        todo = set().union(*(imported_modules((ROOT / "dreamer4_nb" / f"{name}.py").read_text(encoding="utf-8")) for name in todo)) - seen
    assert "training" not in seen


@pytest.mark.parametrize("source", ["from .training import fit", "from dreamer4_nb.training import fit", "from . import training",
                                    "import dreamer4_nb.training", "def f():\n    from .training import fit", "from .core import UserError"])
def test_the_check_can_fail(source):
    assert too_high("core", source)
