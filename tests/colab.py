"""By hand: a lesson as Colab runs it. Type it with the Python of an environment that has only torch, numpy, matplotlib and
ipykernel (and nbclient to drive it): python tests/colab.py dist/dreamer4_nb-….whl [nbs/01_flow.ipynb …]

The lesson is copied alone into an empty folder; its first cell installs the wheel instead of the repository's address, and
nothing can be drawn. Without notebooks: 01_flow and 07_tokenizer, whose frames must be those that ship.
"""
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SKIPPED = r"(?m)^#\| *(slow|cuda|eval: *false)"
# In Colab this module is loaded; and a person is at the kernel, who would answer questions.
PRETEND = "import sys, types; sys.modules['google.colab'] = types.ModuleType('google.colab')"


def run(path: Path, wheel: Path, folder: Path) -> None:
    "Runs a lesson in a folder, with the wheel in the place of the address."
    notebook = nbformat.read(path, 4)
    for cell in notebook.cells:
        cell.source = re.sub(r"https://\S+\.zip", wheel.resolve().as_uri(), cell.source)
        if cell.cell_type == "code" and re.search(SKIPPED, cell.source):
            cell.source = ""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(PRETEND))
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    print(f"{path.name}: {len(notebook.cells)} cells ran")


if __name__ == "__main__":
    os.environ |= {"MUJOCO_GL": "disable"}
    names = sys.argv[2:] or [ROOT / "nbs" / "01_flow.ipynb", ROOT / "nbs" / "07_tokenizer.ipynb"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DREAMER4_CACHE"] = str(Path(folder) / "cache")
        for name in names:
            run(Path(name), Path(sys.argv[1]), Path(folder))
