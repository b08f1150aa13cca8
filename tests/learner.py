"""A learner in a browser: each knob, prediction, exercise and quiz of a lesson in JupyterLab. By hand, minutes a lesson:

    python tests/learner.py 04_attention [05_blocks …] [--out FOLDER]

It starts a JupyterLab of its own and drives a copy of the lesson in Chromium, without its slow cells. Knobs go to both
ends, the middle and each choice of a menu; predictions get a wrong and the right answer; exercises get the folded
solution. A line for each; one that begins with `!!` is a fault. FOLDER gets a picture of each place: look at them.
"""
import argparse
import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SLOW = re.compile(r"^#\|\s*(slow|cuda)", re.MULTILINE)
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def serve(home: Path) -> tuple[subprocess.Popen, str]:
    "A JupyterLab whose settings keep all cells of a notebook on the page, and its address."
    tracker = home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--ServerApp.token=", "--ServerApp.disable_check_xsrf=True",
               f"--ServerApp.root_dir={ROOT / 'nbs'}", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    names = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_CONFIG_DIR": "config"}
    folders = {name: str(home / folder) for name, folder in names.items()}
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=os.environ | folders | paths,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return server, f"http://127.0.0.1:{port}"


class Lesson:
    "A lesson on the page of a browser."

    def __init__(self, page: Page, name: str, cells: list[dict], out: Path):
        self.page, self.name, self.cells, self.out = page, name, cells, out

    def source(self, i: int) -> str:
        return "".join(self.cells[i]["source"])

    def cell(self, i: int) -> Locator:
        return self.page.locator(".jp-Notebook .jp-Cell").nth(i)

    def output(self, i: int) -> Locator:
        return self.cell(i).locator(".jp-Cell-outputArea")

    def figure(self, i: int) -> list[str]:
        return self.output(i).evaluate("area => [...area.querySelectorAll('img')].map(image => image.src)")

    def say(self, i: int, what: str, faults: list[str]) -> None:
        "One line about a place, and its picture."
        print(f"{'!! ' if faults else ''}{self.name} [{i}] {'; '.join([what, *faults])}", flush=True)
        label = re.sub(r"\W+", "_", what)[:50]
        self.cell(i).screenshot(path=self.out / f"{self.name[:2]}_{i}_{label}.png")

    def wait(self, done, seconds: float = 60) -> bool:
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            time.sleep(0.1)
        return done()

    def idle(self, seconds: float = 1200) -> None:
        "Waits until no cell waits or runs."
        stars = "[...document.querySelectorAll('.jp-InputPrompt')].filter(p => p.textContent.includes('*')).length"
        time.sleep(1)
        assert self.wait(lambda: self.page.evaluate(stars) == 0, seconds), f"cells still run after {seconds:.0f} s"

    def drawn(self, i: int, old: list[str]) -> list[str]:
        "Waits for another figure; what is wrong with it."
        changed = self.wait(lambda: self.figure(i) != old, 30)
        self.wait(lambda: "drawing …" not in self.output(i).inner_text())
        time.sleep(0.5)                     # a drag draws more than once
        faults = [] if changed else ["the figure does not change"]
        return faults + ["an error is shown"] * ("Error:" in self.output(i).inner_text())

    def drag(self, slider: Locator, fraction: float) -> None:
        slider.scroll_into_view_if_needed()
        base, handle = slider.locator(".noUi-base").bounding_box(), slider.locator(".noUi-handle").bounding_box()
        self.page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
        self.page.mouse.down()
        self.page.mouse.move(base["x"] + fraction * base["width"], base["y"] + base["height"] / 2, steps=4)
        self.page.mouse.up()

    def explore(self, i: int) -> None:
        for knob in self.output(i).locator(".widget-hslider, .widget-dropdown").all():
            name, menu = knob.locator("label").inner_text(), knob.locator("select")
            readout = menu.locator("option:checked") if menu.count() else knob.locator(".widget-readout")
            choices = menu.locator("option").all_text_contents() if menu.count() else [0.0, 1.0, 0.5]
            for choice in choices:
                before, old = readout.text_content(), self.figure(i)
                if menu.count():
                    menu.select_option(label=choice)
                else:
                    self.drag(knob, choice)
                after = readout.text_content()
                if after != before:
                    self.say(i, f"{name} {after}", self.drawn(i, old))

    def predict(self, i: int) -> None:
        calls = [node for node in ast.walk(ast.parse(self.source(i))) if isinstance(node, ast.Call)]
        call = next(node for node in calls if getattr(node.func, "id", "") == "predict")
        choices, answer, why = map(ast.literal_eval, call.args[1:4])
        for choice in (next(c for c in choices if c != answer), answer):
            faults = ["the figure is there before the answer"] * bool(self.figure(i))
            faults += ["the reason is there before the answer"] * (why[:20] in self.output(i).inner_text())
            self.output(i).locator("button").nth(choices.index(choice)).click()
            faults += [] if self.wait(lambda: bool(self.figure(i))) else ["no figure after the answer"]
            verdict = "Right" if choice == answer else "Wrong"
            faults += [] if f"{verdict}. {answer}." in self.output(i).inner_text() else ["no verdict"]
            self.say(i, f"predict {choice}", faults)
            self.cell(i).locator(".jp-InputPrompt").click()
            self.page.keyboard.press("Control+Enter")
            self.idle()

    def exercise(self, i: int) -> None:
        before = self.output(i + 2).inner_text().strip()
        self.cell(i + 3).locator("summary").first.click()
        self.cell(i + 1).locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(FENCE.search(self.source(i + 3))[1].rstrip())
        for _ in range(2):                  # the learner's function, its check
            self.page.keyboard.press("Shift+Enter")
            time.sleep(0.3)
        self.idle()
        after = self.output(i + 2).inner_text().strip()
        self.say(i + 2, "exercise", [said for said, due in ((before, "· not solved yet"), (after, "✓ solved")) if said != due])

    def question(self, i: int) -> None:
        folded = self.cell(i).locator("details")
        faults = ["the answer is open"] * folded.evaluate("details => details.open")
        folded.locator("summary").click()
        faults += [] if folded.evaluate("details => details.open") else ["the answer does not open"]
        self.say(i, "question", faults + ["raw Markdown"] * bool(re.search(r"[$`]|\*\*", folded.inner_text())))

    def drive(self) -> None:
        self.page.locator(".jp-Notebook .jp-Cell").first.click()
        self.page.get_by_text("Run", exact=True).first.click()
        self.page.get_by_text("Run All Cells", exact=True).first.click()
        self.idle()
        for error in self.page.locator('[data-mime-type="application/vnd.jupyter.error"]').all():
            print(f"!! {self.name} {error.inner_text()[-200:]}")
        acts = {r"^explore\(": self.explore, r"^predict\(": self.predict, r"^### Exercise": self.exercise,
                r"^\*\*Question": self.question}
        for i in range(len(self.cells)):
            for begin, act in acts.items():
                if re.search(begin, self.source(i), re.MULTILINE):
                    act(i)


def visit(browser, address: str, name: str, out: Path) -> None:
    "Drives a copy of the lesson, whose kernel and file are gone afterwards."
    book = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
            if SLOW.search("".join(cell["source"])):
                cell["source"] = "pass"
    copy = ROOT / "nbs" / f"_learner_{name}.ipynb"          # nbdev leaves out names that begin so
    copy.write_text(json.dumps(book), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(120_000)
    try:
        page.goto(f"{address}/doc/tree/{copy.name}")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
        Lesson(page, name, book["cells"], out).drive()
    finally:
        page.close()
        with urllib.request.urlopen(f"{address}/api/sessions") as sessions:
            for session in json.load(sessions):
                urllib.request.urlopen(urllib.request.Request(f"{address}/api/sessions/{session['id']}", method="DELETE"))
        copy.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", nargs="+", help="name of a notebook, without .ipynb")
    parser.add_argument("--out", type=Path, default=Path("learner"), help="folder for the pictures")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        server, address = serve(Path(home))
        try:
            time.sleep(15)
            with sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
                for name in asked.lesson:
                    visit(browser, address, name, asked.out)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
