"README.md is what notebook index says."
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]


def test_readme_is_the_index_notebook():
    text, _ = MarkdownExporter(exclude_input=True).from_filename(str(ROOT / "nbs" / "index.ipynb"))
    assert text.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip(), "README.md is not made from nbs/index.ipynb; type: make readme"
