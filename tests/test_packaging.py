"What is built and installed: wheel, sdist, extras, the command's name."
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from dreamer4_nb.core import UserError
from dreamer4_nb.method.tokenizer import TRUNK, PerceptualLoss

ROOT = Path(__file__).parents[1]
SETTINGS = ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
VERSION = SETTINGS["DEFAULT"]["version"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "An sdist of this folder without its history, and the wheel that is built from that sdist."
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "dreamer4_nb", source / "dreamer4_nb", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source],
                   check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_the_package_and_nothing_else(built):
    wheel, sdist = built
    assert wheel.name == f"dreamer4_nb-{VERSION}-py3-none-any.whl" and wheel.stat().st_size < 25e6
    with zipfile.ZipFile(wheel) as file:
        inside = {name for name in file.namelist() if ".dist-info/" not in name}
        metadata = file.read(f"dreamer4_nb-{VERSION}.dist-info/METADATA").decode()
    here = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dreamer4_nb").rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}
    assert inside == here and "dreamer4_nb/py.typed" in inside
    for line in ("License: MIT", "Requires-Python: >=3.11", "Classifier: Typing :: Typed"):
        assert line in metadata.splitlines()
    for extra in ("notebooks", "import", "perceptual", "gym", "hub", "docs", "dev"):
        assert f"Provides-Extra: {extra}" in metadata.splitlines()
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert here | {"setup.py", "settings.ini", "LICENSE", "README.md"} <= names


def test_the_command_overwrites_no_file_of_the_other_package_called_dreamer4(built):
    "That package installs a command `dreamer4` and modules dreamer4/."
    with zipfile.ZipFile(built[0]) as file:
        points = ConfigParser()
        points.read_string(file.read(f"dreamer4_nb-{VERSION}.dist-info/entry_points.txt").decode())
        assert not any(name.startswith("dreamer4/") for name in file.namelist())
    assert dict(points["console_scripts"]) == {"dreamer4-nb": "dreamer4_nb.__main__:main"}


def test_the_version_is_said_the_same_everywhere():
    import dreamer4_nb
    assert dreamer4_nb.__version__ == VERSION
    assert f"\n## {VERSION}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


# Refuses the libraries of the extras, as where only the base is installed; then imports every module.
BASE_ONLY = """
import importlib, pkgutil, sys
from importlib.abc import MetaPathFinder
EXTRAS = {"IPython", "ipywidgets", "anywidget", "av", "h5py", "minari", "pyarrow", "lpips", "torchvision", "pygame",
          "huggingface_hub", "sphinx", "myst_nb", "nbdev", "fastcore", "execnb", "minigrid"}
class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import dreamer4_nb
from dreamer4_nb.core import UserError
for module in pkgutil.walk_packages(dreamer4_nb.__path__, "dreamer4_nb."):
    if module.name.endswith(("__main__", "_modidx")):
        continue
    try:
        importlib.import_module(module.name)
    except UserError as error:
        print(module.name, error)
"""


def test_the_base_imports_everything_but_the_tools_of_notebooks():
    found = subprocess.run([sys.executable, "-c", BASE_ONLY], capture_output=True, text=True, check=True).stdout
    lines = found.splitlines()
    assert lines and all("type: pip install 'dreamer4_nb[notebooks]'" in line for line in lines)
    assert {line.split()[0].split(".")[1] for line in lines} <= {"notebook", "exercises"}


def test_lpips_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", None)
    trunk = tmp_path / "hub" / "checkpoints" / TRUNK
    trunk.parent.mkdir(parents=True)
    trunk.touch()
    with pytest.raises(UserError, match=r"pip install 'dreamer4_nb\[perceptual\]'"):
        PerceptualLoss("lpips")


COMMANDS = "demo|collect|import|train|evaluate|online|play|study|bench|ship|doctor"


def test_every_page_types_the_command_by_its_name():
    "The changelog speaks of older versions too."
    files = [path for folder in ("dreamer4_nb", "nbs", "tests", "docs", ".ci") for path in (ROOT / folder).rglob("*")
             if path.suffix in (".py", ".ipynb", ".html", ".js") and "__pycache__" not in path.parts]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")]
    old = re.compile(rf"(?<![\w./-])dreamer4 ({COMMANDS}|--help)\b")
    assert not [path.name for path in files if old.search(path.read_text(encoding="utf-8"))]
