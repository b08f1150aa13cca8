"""Builds the site of the course from stored outputs: python docs/build.py, then open _docs/html/index.html.

Nothing is executed and nothing is fetched: the notebooks become pages as they are stored, the docstrings
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
    hidden = "hide" in own or any(flag.startswith("default_exp") for flag in own)
    return not hidden and "colab" not in cell["metadata"].get("tags", [])


def plain(text: str) -> str:
    "Markdown as the text of an attribute."
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(?m)^#+ .*$|^- |[*`$]", "", text)
    return " ".join(text.split())


def plain_heading(text: str) -> str:
    "The last heading in a Markdown text; empty if there is none."
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    return plain(headings[-1]) if headings else ""


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
    names = {"title": "", "suptitle": "", "supxlabel": "", "xlabel": "horizontal: ",
             "ylabel": "vertical: "}
    found = re.findall(rf"(?:\b|_)({'|'.join(names)})\s*[=(]\s*f?\"([^\"]+)\"", source)
    texts = [names[kind] + re.sub(r"\{[^}]*\}", "…", text) for kind, text in found]
    return "; ".join(dict.fromkeys(texts))


def alt_text(cell: dict, section: str, above: dict | None, below: dict | None) -> str:
    """What a cell's pictures show: their caption, else their axes or the sentence that announces them.

    section: the heading under which they stand."""
    caption = caption_below(below) or caption_shown(cell)
    before = plain(source_of(above)) if above and above["cell_type"] == "markdown" else ""
    rest = axes_of(source_of(cell)) or re.split(r"(?<=[.:?]) ", before)[-1]
    return (caption or f"{section}. {rest}").strip()[:500].replace("\\", " ")


def with_alt(page: str, alt: str) -> str:
    "HTML whose pictures have a text."
    return re.sub(r"<img (?![^>]*\balt=)", f'<img alt="{html.escape(alt)}" ', page)


def links_moved(text: str, pages: set[str]) -> str:
    "Markdown whose links to files that are none of the pages lead to the repository."
    def moved(found: re.Match) -> str:
        file = found[1]
        if file in pages or file.startswith("images/"):
            return found[0]
        path = file.removeprefix("../") if file.startswith("../") else f"{SETTINGS['nbs_path']}/{file}"
        return f"]({BLOB}/{path}{found[2]})"

    return re.sub(r"\]\((?!https?:)([\w./-]+)((?:#[^)\s]*)?)\)", moved, text)


def page_cell(cell: dict, alt: str, pages: set[str]) -> dict:
    """A cell as the page has it.

    alt: the text of its pictures. pages: the names of all notebooks that become pages."""
    if cell["cell_type"] == "markdown":
        return {"cell_type": "markdown", "metadata": {}, "source": links_moved(source_of(cell), pages)}
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
            data = data | {"text/markdown": links_moved("".join(data["text/markdown"]), pages)}
        outputs.append(output | ({"data": data} if data else {}))
    source = re.sub(r"(?m)^#\|.*\n?", "", source_of(cell)).strip("\n")
    return {"cell_type": "code", "execution_count": None, "source": source, "outputs": outputs,
            "metadata": {"tags": tags, "mystnb": {"image": {"alt": alt}}}}


def short_title(path: Path) -> str:
    "The title of a notebook without the name of its track."
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    title = source_of(first).splitlines()[0].removeprefix("# ")
    short = re.sub(r"^(The Dream|The Machine|Study|Checks)[ ,]+", "", title)
    return short[:1].upper() + short[1:]


def page_of(path: Path, pages: set[str]) -> dict:
    """A notebook as Sphinx gets it: no flags, no hidden cells, links to itself, a text for each picture.

    pages: the names of all notebooks that become pages."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if is_shown(cell)]
    made, section = [], ""
    for above, cell, below in zip([None, *cells], cells, [*cells[1:], None]):
        alt = ""
        if cell["cell_type"] == "markdown":
            section = plain_heading(source_of(cell)) or section
        else:
            alt = alt_text(cell, f"{short_title(path)}: {section}", above, below)
        made.append(page_cell(cell, alt, pages))
    file = f"{SETTINGS['nbs_path']}/{path.name}"
    links = f"[Open in Colab]({COLAB}/{file}) · [The notebook on GitHub]({BLOB}/{file})"
    title, _, rest = made[0]["source"].partition("\n")
    made[0]["source"] = f"{title}\n\n{links}\n{rest}"
    for k, cell in enumerate(made):
        cell["id"] = f"cell-{k}"
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    return {"cells": made, "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
            "nbformat": 4, "nbformat_minor": 5}


# Pages of the API


def markdown_of(text: str) -> str:
    "A docstring as Markdown: what is no code is text, and each argument an item of a list."
    lines = []
    for line in text.splitlines():
        parts = re.split(r"(`[^`]+`)", line)                  # text, code, text …
        parts[::2] = [re.sub(r"([\\*_<\[\]${}|~^#`])", r"\\\1", part) for part in parts[::2]]
        shown = "".join(parts)
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
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        for method in methods:
            if not method.name.startswith("_") and ast.get_docstring(method):
                lines += entry(method, "```")
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
    page = page_of(ROOT / SETTINGS["nbs_path"] / "index.ipynb", {path.name for path in notebooks})
    trees = []
    for section, numbers in SECTIONS.items():
        own = [f"{short_title(path)} <{path.stem}>" for path in notebooks if int(path.stem[:2]) in numbers]
        if own:
            trees.append(toctree(section, own))
    trees.append(toctree("The package", [f"api/{name}" for name in modules]))
    contents = "\n\n".join(trees)
    page["cells"].append({"cell_type": "markdown", "metadata": {}, "source": contents, "id": "contents"})
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
    pages = {path.name for path in notebooks}
    for path in notebooks:
        (folder / path.name).write_text(json.dumps(page_of(path, pages)), encoding="utf-8")
    names = []
    for path in api_modules(notebooks):
        names.append(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        (folder / "api" / f"{names[-1]}.md").write_text(api_page(path), encoding="utf-8")
    (folder / "index.ipynb").write_text(json.dumps(front_page(notebooks, names)), encoding="utf-8")


def build(notebooks: list[Path], out: Path, jobs: str = "auto") -> int:
    "Builds the pages of some notebooks into out/html; a warning is an error. Returns the exit code."
    stage(notebooks, out / "source")
    source = out / "source"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-j", jobs, "-b", "html",
               "-c", str(ROOT / "docs"), "-D", f"html_static_path={source / '_static'}",
               "-d", str(out / "doctrees"), str(source), str(out / "html")]
    return subprocess.run(command).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the site of the course from stored outputs.")
    parser.add_argument("--out", type=Path, default=ROOT / SETTINGS["doc_path"], help="folder for the site")
    arguments = parser.parse_args()
    notebooks = sorted((ROOT / SETTINGS["nbs_path"]).glob("[0-9][0-9]_*.ipynb"))
    code = build(notebooks, arguments.out.resolve())
    if code == 0:
        print(f"open {arguments.out / 'html' / 'index.html'}")
    return code


if __name__ == "__main__":
    sys.exit(main())
