"Notebook 00: the whole method stays on one page, and its stored table fulfills what the page claims."
import json
import re
from pathlib import Path

import pytest

from dreamer4_nb.evaluation.statistics import runs_interval

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "nbs" / "00_dreamer4.ipynb"
CELLS = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
PROSE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
STORED = json.loads((ROOT / "nbs" / "results" / "one_page.json").read_text(encoding="utf-8"))
TRUE, SHUFFLED = ([row for row in STORED["rows"] if row["rewards"] == kind] for kind in ("true", "shuffled"))


def gains(rows: list[dict]) -> list[float]:
    "What training in dreams added, in the real world: one number a seed."
    return [row["pmpo"] - row["cloning"] for row in rows]


def is_method(source: str) -> bool:
    "Whether a cell defines a part of the method: not the toy world, its players, exercises, or what measures."
    defines = re.search(r"(?m)^(def|class) ", source)
    around = re.search(r"(?m)^(class World|def (lazy|state|errors|interval|run_seed))\b", source)
    hands_on = "\npredict(" in source or "raise NotImplementedError" in source
    return bool(defines) and not around and not hands_on


def test_the_method_stays_on_one_page():
    lines = [line for source in CODE if is_method(source) for line in source.splitlines() if line.strip()]
    assert 150 < len(lines) < 260


def test_cells_are_narrow_and_short():
    assert [line for source in CODE for line in source.splitlines() if len(line) > 110] == []
    assert [source for source in PROSE if len(source.split()) > 200] == []


def test_the_method_is_written_out():
    "It takes nothing of ours but the looks of figures."
    ours = re.findall(r"(?m)^\s*(?:from|import)\s+(dreamer4_nb\S*)", "\n".join(CODE))
    assert set(ours) <= {"dreamer4_nb.evaluation.pictures", "dreamer4_nb.notebook", "dreamer4_nb.exercises.one_page"}


def test_all_five_seeds_are_stored():
    assert [row["seed"] for row in TRUE] == [row["seed"] for row in SHUFFLED] == list(range(10, 15))
    assert all(row["seconds"] > 0 for row in STORED["rows"])


def test_dreams_make_the_agent_better():
    low, _ = runs_interval(gains(TRUE))
    assert low > 0


def test_shuffled_rewards_remove_the_gain():
    low, _ = runs_interval(gains(SHUFFLED))
    assert low <= 0


def test_cloning_reaches_its_demonstrator():
    "In each of five seeds that were not used to choose the recipe."
    reached = [row["cloning"] / row["demonstrator"] for row in TRUE]
    assert all(share >= 0.9 for share in reached)
    assert sum(row["cloning"] for row in TRUE) >= 0.5 * sum(row["optimum"] for row in TRUE)


WORDS = ["1a", "1b", "tokenizer", "dynamics", "agent", "imagination", "micro", "tiny", "long", "small", "base",
         "paper", "latent", "register", "context", "signal level", "led-to", "dream", "rollout"]


@pytest.mark.parametrize("word", WORDS)
def test_the_glossary_has_the_words_of_the_course(word):
    glossary = "\n".join(PROSE).split("## Words and symbols")[1]
    assert word in glossary
