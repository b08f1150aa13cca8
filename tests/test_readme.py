"README.md is what notebook index says, short, and its links lead somewhere."
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_the_index_notebook():
    made = subprocess.run([sys.executable, ROOT / ".ci" / "readme"], capture_output=True, text=True, check=True).stdout
    assert made.strip() == README.strip(), "README.md is not made from nbs/index.ipynb; type: make readme"


def test_readme_has_under_900_words_and_begins_with_a_picture():
    assert len(README.split()) < 900
    assert README.index("](nbs/images/") < README.index("## ")


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file(), target
