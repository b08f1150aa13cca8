"""Builds the site of the course from stored outputs: python docs/build.py, then open _docs/html/index.html.

Nothing is executed and nothing is fetched: the notebooks become pages as they are stored, the modules' docstrings
become the pages of the API, and MathJax is copied from an installed package.
"""
import argparse
import ast
import html
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
_config = ConfigParser(delimiters=["="])
_config.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = _config["DEFAULT"]
BLOB = f"{SETTINGS['git_url']}/blob/{SETTINGS['branch']}"
COLAB = f"https://colab.research.google.com/github/{SETTINGS['user']}/{SETTINGS['repo']}/blob/{SETTINGS['branch']}"
SECTIONS = {"The Dream": range(20), "The Machine": range(20, 70), "Studies": range(70, 80),
            "Checks of the exercises": range(80, 100)}
PACKAGE = ROOT / SETTINGS["lib_path"]

# Cells of notebooks


def slug(title: str) -> str:
    "The anchor that Jupyter gives a heading."
    return title.replace(" ", "-")


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def flags(cell: dict) -> list[str]:
    "The words of a code cell's flags, `#| export` for instance."
    return re.findall(r"(?m)^#\|\s*(.+?)\s*$", source_of(cell)) if cell["cell_type"] == "code" else []


def is_shown(cell: dict) -> bool:
    "Whether a cell becomes a part of the page."
    own = flags(cell)
    tags = cell["metadata"].get("tags", [])
    return "hide" not in own and "colab" not in tags and not any(flag.startswith("default_exp") for flag in own)


def plain(text: str) -> str:
    "Markdown as the text of an attribute."
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(?m)^#+ .*$|^- |[*`$]", "", text)
    return " ".join(text.split())


def caption_below(below: dict | None) -> str:
    "The paragraph in italics below a figure."
    text = source_of(below).split("\n\n")[0] if below and below["cell_type"] == "markdown" else ""
    return plain(text) if re.match(r"\*[^*]", text) else ""


def caption_shown(cell: dict) -> str:
    "What a cell displays as Markdown: the caption of a figure with sliders, or a question and its answer."
    texts = ["".join(output["data"]["text/markdown"]) for output in cell["outputs"]
             if "text/markdown" in output.get("data", {})]
    return plain("\n".join(texts))


def axes_of(source: str) -> str:
    "The titles and the axes that a figure's code names."
    found = re.findall(r"\b(title|xlabel|ylabel|suptitle|set_title|set_xlabel|set_ylabel)\s*[=(]\s*f?\"([^\"]+)\"", source)
    names = {"title": "", "suptitle": "", "xlabel": "horizontal: ", "ylabel": "vertical: "}
    parts = dict.fromkeys(names[kind.removeprefix("set_")] + re.sub(r"\{[^}]*\}", "…", text) for kind, text in found)
    return "; ".join(parts)


def alt_text(cell: dict, above: dict | None, below: dict | None) -> str:
    "What a cell's pictures show: their caption, else their axes, else the sentence that announces them."
    axes = axes_of(source_of(cell))
    before = plain(source_of(above)) if above and above["cell_type"] == "markdown" else ""
    sentence = re.split(r"(?<=[.:?]) ", before)[-1]
    comment = re.findall(r"#\s+(.*)", source_of(cell))
    found = (caption_below(below) or caption_shown(cell) or (f"Figure. {axes}." if axes else "") or sentence
             or plain((comment or ["A figure; the text beside it says what it shows."])[0]))
    return found[:500].replace("\\", " ")


def with_alt(page: str, alt: str) -> str:
    "HTML whose pictures have a text."
    return re.sub(r"<img (?![^>]*\balt=)", f'<img alt="{html.escape(alt)}" ', page)


def links_moved(text: str) -> str:
    "Markdown whose links to files that are no pages lead to the repository."
    text = re.sub(r"\]\(\.\./([\w./-]+)\)", rf"]({BLOB}/\1)", text)
    return re.sub(r"\]\((results/[\w./-]+)\)", rf"]({BLOB}/{SETTINGS['nbs_path']}/\1)", text)


def page_cell(cell: dict, above: dict | None, below: dict | None) -> dict:
    "A cell as the page has it."
    if cell["cell_type"] == "markdown":
        return {"cell_type": "markdown", "metadata": {}, "source": links_moved(source_of(cell))}
    alt = alt_text(cell, above, below)
    tags = []
    if cell["metadata"].get("jupyter", {}).get("source_hidden"):
        tags.append("hide-input")
    if "echo: false" in flags(cell):
        tags.append("remove-input")
    outputs = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "text/html" in data:
            data = data | {"text/html": with_alt("".join(data["text/html"]), alt)}
        if "text/markdown" in data:
            data = data | {"text/markdown": links_moved("".join(data["text/markdown"]))}
        outputs.append(output | ({"data": data} if data else {}))
    source = re.sub(r"(?m)^#\|.*\n?", "", source_of(cell)).strip("\n")
    return {"cell_type": "code", "execution_count": None, "source": source, "outputs": outputs,
            "metadata": {"tags": tags, "mystnb": {"image": {"alt": alt}}}}


def neighbor(cells: list[dict], place: int) -> dict | None:
    return cells[place] if 0 <= place < len(cells) else None


def page_of(path: Path) -> dict:
    "A notebook as Sphinx gets it: without flags and hidden cells, with links to itself, and a text for each picture."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if is_shown(cell)]
    made = [page_cell(cell, neighbor(cells, k - 1), neighbor(cells, k + 1)) for k, cell in enumerate(cells)]
    file = f"{SETTINGS['nbs_path']}/{path.name}"
    links = f"[Open in Colab]({COLAB}/{file}) · [The notebook on GitHub]({BLOB}/{file})"
    title, _, rest = made[0]["source"].partition("\n")
    made[0]["source"] = f"{title}\n\n{links}\n{rest}"
    for k, cell in enumerate(made):
        cell["id"] = f"cell-{k}"
    return {"cells": made, "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"},
                                        "language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}


# Pages of the API


def markdown_of(text: str) -> str:
    "A docstring as Markdown: what is no code is text, and each argument an item of a list."
    lines = []
    for line in text.splitlines():
        parts = re.split(r"(`[^`]+`)", line)
        shown = "".join(part if part.startswith("`") and len(part) > 1 else re.sub(r"([\\*_<\[\]${}|~^#`])", r"\\\1", part)
                        for part in parts)
        argument = re.match(r"([\w\\, ]{1,60}): (.*)", shown)
        lines.append(f"- **{argument[1].strip()}**: {argument[2]}" if argument else shown)
    return "\n".join(lines)


def signature(node: ast.FunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        init = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        if not init:
            return node.name
        arguments = re.sub(r"^self(, )?", "", ast.unparse(init[0].args))
        return f"{node.name}({arguments})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{node.name}({ast.unparse(node.args)}){returns}"


def entry(node: ast.FunctionDef | ast.ClassDef, fences: str) -> list[str]:
    "A function or class with its docstring, and a class's public methods in it."
    kind = "class" if isinstance(node, ast.ClassDef) else "method" if fences == "```" else "function"
    lines = [f"{fences}{{py:{kind}}} {signature(node)}", "", markdown_of(ast.get_docstring(node) or ""), ""]
    if isinstance(node, ast.ClassDef):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and ast.get_docstring(item):
                lines += entry(item, "```")
    return [*lines, fences, ""]


def api_page(path: Path) -> str:
    "A module's public functions and classes, in the order of its notebook."
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    lines = [f"# {name}", "", markdown_of(ast.get_docstring(tree) or ""), ""]
    notebook = re.search(r"File to edit: [./]*nbs/(\w+\.ipynb)", text)
    if notebook:
        lines += [f"Derived and tested in [{Path(notebook[1]).stem}](../{notebook[1]}).", ""]
    lines += [f"```{{py:module}} {name}", "```", ""]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            lines += entry(node, "`````")
    return "\n".join(lines)


def api_modules(notebooks: list[Path]) -> list[Path]:
    "The top of the package, and the modules that these notebooks export."
    found = [PACKAGE / "__init__.py"]
    for path in notebooks:
        for exported in re.findall(r"#\|\s*default_exp (\S+?)[\"\\]", path.read_text(encoding="utf-8")):
            found.append(PACKAGE / (exported.replace(".", "/") + ".py"))
    return found


# The site


def toctree(caption: str, pages: list[str]) -> str:
    lines = ["```{toctree}", f":caption: {caption}", ":maxdepth: 1", ":hidden:", "", *pages, "```"]
    return "\n".join(lines)


def front_page(notebooks: list[Path], modules: list[str]) -> dict:
    "Notebook index, with the contents of the site."
    page = page_of(ROOT / SETTINGS["nbs_path"] / "index.ipynb")
    trees = []
    for section, numbers in SECTIONS.items():
        own = [path.stem for path in notebooks if int(path.stem[:2]) in numbers]
        if own:
            trees.append(toctree(section, own))
    trees.append(toctree("The package", [f"api/{name}" for name in modules]))
    page["cells"].append({"cell_type": "markdown", "metadata": {}, "source": "\n\n".join(trees), "id": "contents"})
    return page


def stage(notebooks: list[Path], folder: Path) -> None:
    "Writes the sources of the site."
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "api").mkdir(parents=True)
    shutil.copytree(ROOT / SETTINGS["nbs_path"] / "images", folder / "images")
    shutil.copytree(ROOT / "docs" / "static", folder / "_static")
    mathjax = Path(find_spec("mathjax").submodule_search_locations[0]) / "static" / "mathjax" / "es5"
    fonts = Path("output") / "chtml" / "fonts" / "woff-v2"
    shutil.copytree(mathjax / fonts, folder / "_static" / "mathjax" / fonts)
    shutil.copy(mathjax / "tex-chtml-full.js", folder / "_static" / "mathjax")
    for path in notebooks:
        (folder / path.name).write_text(json.dumps(page_of(path)), encoding="utf-8")
    names = []
    for path in api_modules(notebooks):
        names.append(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        (folder / "api" / f"{names[-1]}.md").write_text(api_page(path), encoding="utf-8")
    (folder / "index.ipynb").write_text(json.dumps(front_page(notebooks, names)), encoding="utf-8")


def build(notebooks: list[Path], out: Path, jobs: str = "auto") -> int:
    "Builds the pages of some notebooks into out/html; a warning is an error. Returns the exit code."
    stage(notebooks, out / "source")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", jobs, "-b", "html",
               "-c", str(ROOT / "docs"), "-D", f"html_static_path={out / 'source' / '_static'}", "-d", str(out / "doctrees"), str(out / "source"), str(out / "html")]
    return subprocess.run(command).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the site of the course from stored outputs.")
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder for the site (default: _docs)")
    arguments = parser.parse_args()
    notebooks = sorted((ROOT / SETTINGS["nbs_path"]).glob("[0-9][0-9]_*.ipynb"))
    code = build(notebooks, arguments.out.resolve())
    if code == 0:
        print(f"open {arguments.out / 'html' / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
