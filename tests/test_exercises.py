"""The exercises of the lessons: the folded solution gets the tick, a typical mistake gets a useful hint.

An exercise is four cells: a title with its task, a stub, a check, a folded solution. No notebook runs here. Imports of the
lesson and what its module exports are all that a solution may use.
"""
import ast
import contextlib
import importlib.util
import io
import json
import re
import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest

NBS = Path(__file__).parents[1] / "nbs"
PLANTED = Path(__file__).parent / "mistakes"     # lesson_01.py: `MISTAKES`, a list of (exercise, code, words of its hint)
LESSONS = sorted(path.stem.removeprefix("lesson_") for path in PLANTED.glob("lesson_*.py"))
MISTAKES = [(lesson, *mistake) for lesson in LESSONS
            for mistake in runpy.run_path(str(PLANTED / f"lesson_{lesson}.py"))["MISTAKES"]]
TITLE = re.compile(r"### Exercise (\d+) (★{1,3}) · (\d+) minutes\n")
FOLDED = re.compile(r"<details><summary>Solution</summary>\n.*?```python\n(.*?)```.*</details>", re.DOTALL)


@dataclass
class Exercise:
    number: int
    stub: str
    check: str
    said: str       # what the check printed when the lesson last ran
    solution: str


def cells_of(lesson):
    (path,) = NBS.glob(f"{lesson}_*.ipynb")
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def exercises_of(lesson):
    found, cells = [], cells_of(lesson)
    for title, stub, check, solution in zip(cells, cells[1:], cells[2:], cells[3:]):
        begins = TITLE.match("".join(title["source"]))
        if begins:
            said = "".join(text for output in check["outputs"] for text in output.get("text", []))
            folded = FOLDED.search("".join(solution["source"]))
            assert folded, f"exercise {begins[1]} has no folded solution in its fourth cell"
            found.append(Exercise(int(begins[1]), "".join(stub["source"]), "".join(check["source"]), said, folded[1]))
    return found


EXERCISES = {(lesson, exercise.number): exercise for lesson in LESSONS for exercise in exercises_of(lesson)}
each_exercise = pytest.mark.parametrize("key", EXERCISES, ids=str)


def defined_anew(name):
    "A second copy of a module: the cells of a lesson define its classes anew, so they are not those of the checks."
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_of(lesson):
    "What a solution may use: torch, math, numpy, what the lesson imports from the package, what its module exports."
    names = {}
    for cell in cells_of(lesson):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or re.match(r"%|!", source):
            continue
        for exported in re.findall(r"^#\|\s*default_exp\s+(\S+)", source):
            module = defined_anew(f"dreamer4_nb.{exported}")
            names |= {name: getattr(module, name) for name in module.__all__}
        for node in ast.parse(source).body:
            ours = isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in {"torch", "dreamer4_nb"}
            plain = isinstance(node, ast.Import) and all(alias.name in {"torch", "math", "numpy"} for alias in node.names)
            if ours or plain:
                exec(ast.unparse(node), names)
    return names


def line_for(key, code):
    "The one line that the check of an exercise prints for a learner's code."
    names = names_of(key[0])
    with contextlib.redirect_stdout(io.StringIO()) as text:
        exec(code, names)
        exec(EXERCISES[key].check, names)
    (line,) = text.getvalue().splitlines()
    return line


@each_exercise
def test_the_folded_solution_gets_the_tick(key):
    assert line_for(key, EXERCISES[key].solution) == "✓ solved"


@each_exercise
def test_the_untouched_stub_is_not_solved_yet(key):
    assert line_for(key, EXERCISES[key].stub) == "· not solved yet"
    assert EXERCISES[key].said == "· not solved yet\n"


@pytest.mark.parametrize("lesson, number, code, words", MISTAKES, ids=lambda value: str(value)[:30].split("(")[0])
def test_a_typical_mistake_gets_a_useful_hint(lesson, number, code, words):
    line = line_for((lesson, number), code)
    assert line.startswith("✗ ") and words in line


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_has_three_exercises_and_a_mistake_for_each(lesson):
    numbers = [number for its, number in EXERCISES if its == lesson]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 3
    titles = [cell for cell in cells_of(lesson) if "".join(cell["source"]).startswith("### Exercise")]
    assert len(titles) == len(numbers)       # none in another form
    assert {number for its, number, _, _ in MISTAKES if its == lesson} == set(numbers)


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_asks_for_three_predictions_and_folds_the_code_that_answers_them(lesson):
    cells = [cell for cell in cells_of(lesson) if cell["cell_type"] == "code" and "\npredict(" in "".join(cell["source"])]
    assert len(cells) >= 3
    assert all(cell["metadata"].get("jupyter") == {"source_hidden": True} for cell in cells)
    assert all(any("image/png" in output.get("data", ()) for output in cell["outputs"]) for cell in cells)


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_ends_with_five_questions_whose_answers_are_folded(lesson):
    sources = ["".join(cell["source"]) for cell in cells_of(lesson) if cell["cell_type"] == "markdown"]
    questions = [source for source in sources if source.startswith("**Question ")]
    assert len(questions) >= 5
    folded = re.compile(r"\*\*Question \d\.\*\* [^\n]+\n\n<details><summary>Answer</summary>\n\n.+\n</details>", re.DOTALL)
    assert all(folded.fullmatch(question) for question in questions)
