"""The rooms of the package, who may import whom, and the numbers of the notebooks.

Notebook NN_name.ipynb exports one module called name, in a room; 00-19 are lessons, 20-69 the machine, 70-79 studies, 80-99 the
checks of the lessons' exercises: notebook 80 + N, check_name, exports exercises.name for lesson N.
"""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem[3:]: path for path in sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))}
NUMBER = {name: int(path.stem[:2]) for name, path in NOTEBOOKS.items()}
TRACKS = {"lessons": range(0, 20), "machine": range(20, 70), "studies": range(70, 80),
          "checks": range(80, 100)}

# Room: the rooms that its modules may import, besides their own.
ROOMS = {
    "core": set(),
    "inputs": {"core"},
    "method": {"core", "inputs"},
    "data": {"core", "inputs"},
    "training": {"core", "inputs", "method", "data"},
    "evaluation": {"core", "inputs", "method", "data"},
    "runs": {"core", "inputs", "method", "data", "training", "evaluation"},
    "notebook": {"core", "inputs", "method", "data", "training", "evaluation", "runs"},
    "exercises": {"core", "inputs", "method", "data", "training", "evaluation", "runs", "notebook"},
}


def code_cells(path: Path) -> list[str]:
    "Sources of a notebook's code cells, without magics."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [re.sub(r"(?m)^\s*[%!].*$", "", source) for source in sources]


def module_of(name: str) -> str | None:
    "The module that a notebook exports, `method.flow` for instance."
    found = re.findall(r"#\|\s*default_exp\s+(\S+)", code_cells(NOTEBOOKS[name])[0])
    return found[0] if found else None


MODULES = {module_of(name): name for name in NOTEBOOKS if module_of(name)}
FILES = {module: ROOT / "dreamer4_nb" / (module.replace(".", "/") + ".py") for module in MODULES}


def imported_modules(source: str, package: str = "dreamer4_nb") -> set[str]:
    "Modules of ours that a source imports, as in `MODULES`; `package`: where its relative imports begin."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                parts = package.split(".")
                module = ".".join([*parts[:len(parts) - node.level + 1], *([module] if module else [])])
            assert not module.startswith("dreamer4_nb") or all(alias.name != "*" for alias in node.names)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("dreamer4_nb.") for name in found} & MODULES.keys()


def imports_of(module: str) -> set[str]:
    "Modules of ours that a module imports."
    package = ".".join(["dreamer4_nb", *module.split(".")[:-1]])
    return imported_modules(FILES[module].read_text(encoding="utf-8"), package)


def track_of(number: int) -> str:
    return next(track for track, numbers in TRACKS.items() if number in numbers)


def room_of(module: str) -> str:
    return module.split(".")[0]


def refused(module: str, other: str) -> bool:
    "Whether `module` may not import `other`: another room's, or a later notebook of its own track."
    here, there = NUMBER[MODULES[module]], NUMBER[MODULES[other]]
    later = track_of(here) == track_of(there) and here < there and module not in ("notebook", "runs.cli")
    foreign = room_of(module) != room_of(other) and room_of(other) not in ROOMS[room_of(module)]
    return later or foreign


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_room_and_number_allow(module):
    assert not [other for other in imports_of(module) if refused(module, other)]


def test_no_module_imports_itself_by_a_detour():
    reach = {module: imports_of(module) for module in MODULES}
    for _ in MODULES:
        reach = {module: seen.union(*(reach[other] for other in seen)) for module, seen in reach.items()}
    assert not [module for module, seen in reach.items() if module in seen]


def test_every_module_has_its_notebook():
    by_hand = ("__init__.py", "__main__.py", "_modidx.py")
    files = {path for path in (ROOT / "dreamer4_nb").rglob("*.py") if path.name not in by_hand}
    assert files == set(FILES.values())
    assert {room_of(module) for module in MODULES} == ROOMS.keys()
    assert all(module.split(".")[-1] == name.removeprefix("check_") for module, name in MODULES.items())


@pytest.mark.parametrize("room", ["method", "core"])
def test_the_method_is_read_and_used_alone(room):
    "In a fresh process all of the method loads nothing that draws, stores or simulates, and none of our other rooms."
    modules = [f"dreamer4_nb.{module}" for module in MODULES if room_of(module) == room]
    code = f"import sys, importlib; [importlib.import_module(name) for name in {modules}]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    foreign = {"matplotlib", "ipywidgets", "IPython", "imageio", "PIL", "zarr", "dm_control", "mujoco", "gymnasium", "lpips"}
    assert set(modules) <= set(loaded)
    assert not foreign & set(loaded)
    ours = {name.split(".")[1] for name in loaded if name.startswith("dreamer4_nb.")}
    assert ours <= {"core", "inputs", room}


@pytest.mark.parametrize("page", [*sorted((ROOT / "nbs").glob("*.ipynb")), ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_to_the_notebook_that_they_name(page):
    text = page.read_text(encoding="utf-8")
    numbers = {f"{number:02}" for number in NUMBER.values()}
    for said, target in re.findall(r"\[([^\]\[]*)\]\(([^()\s]*\.ipynb)\)", text):
        assert (page.parent / target).is_file(), target
        if number := re.match(r"\d\d", said):
            assert Path(target).name.startswith(number[0]), f"[{said}]({target})"
    for said in re.findall(r"[Nn]otebooks? (\d\d)", text):
        assert said in numbers, f"notebook {said}"


@pytest.mark.parametrize("name", NUMBER)
def test_no_widget_is_stored(name):
    "Without its kernel a widget is an error message; `explore` leaves the figure."
    assert "widget-view" not in NOTEBOOKS[name].read_text(encoding="utf-8")


@pytest.mark.parametrize("source", ["from ..training.loop import fit", "from dreamer4_nb.training.loop import fit",
                                    "from ..training import loop", "import dreamer4_nb.training.loop",
                                    "def f():\n    from ..training.loop import fit"])
def test_the_check_can_fail(source):
    found = imported_modules(source, "dreamer4_nb.method")
    assert found == {"training.loop"} and refused("method.flow", "training.loop")
    assert refused("method.flow", "method.shortcut") and not refused("method.shortcut", "method.flow")
