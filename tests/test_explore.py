"`explore`: live where drawing is quick, errors in the figure's place; and its frames on a page without a kernel."
import html
import json
import re
import shutil
import time

import matplotlib.pyplot as plt
import pytest
from IPython.display import HTML, Markdown

from dreamer4_nb import notebook
from dreamer4_nb.core import UserError
from dreamer4_nb.notebook import explore

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Place:
    "What `display` returns: a place on the page, which keeps all that it showed."

    def __init__(self, content):
        self.shown = [content]

    def update(self, content):
        self.shown.append(content)


@pytest.fixture
def page(monkeypatch):
    places = []

    def display(*objects, display_id=False):
        places.extend(Place(shown) for shown in objects)
        return places[-1] if display_id else None

    monkeypatch.setattr(notebook, "display", display)
    return places


@pytest.fixture
def person(monkeypatch):
    monkeypatch.setattr(notebook, "_somebody_is_here", lambda: True)


def dot(x=1, name="a"):
    figure, ax = plt.subplots(figsize=(1, 1))
    ax.plot([x], [len(name)], "o")
    return figure


def test_a_quick_figure_follows_the_hand_and_a_slow_one_waits_and_says_so(page, person, monkeypatch):
    seconds, busy = [0.0], []

    def draw(x=1):
        time.sleep(seconds[0])
        busy.append(page[0].shown[0].children[-1].value)
        return dot(x)

    monkeypatch.setattr(notebook, "_CHEAP_SECONDS", 0.4)
    slider = explore(draw, x=(0, 3))["x"]
    slider.value = 2                    # the first figure may be slow
    assert slider.continuous_update
    seconds[0] = 0.5
    slider.value = 3
    assert not slider.continuous_update
    slider.value = 0
    assert busy == ["", busy[1], "", "drawing …"]
    assert page[0].shown[0].children[-1].value == ""


def test_an_error_is_shown_in_the_figures_place_until_the_next_change(page, person):
    def draw(x=1):
        if x == 2:
            raise ValueError("two is <too> many")
        return dot(x)

    slider = explore(draw, "Move x.", x=(0, 3))["x"]
    assert isinstance(page[0].shown[0], Markdown)
    slider.value = 2
    slider.value = 3
    first, error, last = page[-1].shown
    assert isinstance(first, plt.Figure) and isinstance(last, plt.Figure)
    assert "ValueError: two is &lt;too&gt; many" in error.data


def still(page):
    (content,) = page[-1].shown
    assert isinstance(content, HTML)
    return content.data


def test_frames_are_there_for_each_combination_and_need_no_other_file(page):
    explore(dot, still=["x", "name"], x=(0, 3), name={"short": "a", "long": "abc"})
    text = still(page)
    frames = json.loads(html.unescape(re.search(r'data-frames="(.*?)"', text)[1]))
    assert frames.keys() == {f"{x},{name}" for x in range(4) for name in range(2)}
    assert len(set(frames.values())) == 8
    assert re.search(r'<img src="(.*?)"', text)[1] == frames["1,0"]      # the defaults
    assert not re.search(r"(src|href)=\"(?!data:)", text)


def test_too_many_frames_are_refused(page, monkeypatch):
    monkeypatch.setattr(notebook, "_STILL_BYTES", 3000)
    with pytest.raises(UserError, match="11 frames take .* KB, more than 3 KB; .* fewer positions"):
        explore(dot, still=["x"], x=(0.0, 1.0, 0.1))


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; on Debian or Ubuntu type: sudo apt-get install chromium")
def test_the_sliders_move_without_a_kernel(page):
    playwright = pytest.importorskip("playwright.sync_api")
    explore(dot, still=["x", "name"], x=(0, 3), name={"short": "a", "long": "abc"})
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
        tab = browser.new_page()
        complaints = []
        tab.on("pageerror", lambda error: complaints.append(error))
        tab.set_content(still(page))
        frames = json.loads(tab.locator("div").get_attribute("data-frames"))
        tab.locator("input").nth(0).press("ArrowRight")
        tab.locator("input").nth(1).press("ArrowRight")
        assert tab.locator("img").get_attribute("src") == frames["2,1"]
        assert tab.locator("output").all_text_contents() == ["2", "long"]
        assert tab.evaluate("document.querySelector('img').naturalWidth") > 0
        assert not tab.get_by_text("trust the notebook").is_visible()
        assert not complaints


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; on Debian or Ubuntu type: sudo apt-get install chromium")
def test_where_scripts_are_removed_a_note_says_how_to_move_the_sliders(page):
    playwright = pytest.importorskip("playwright.sync_api")
    explore(dot, still=["x"], x=(0, 3))
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
        tab = browser.new_context(java_script_enabled=False).new_page()
        tab.set_content(still(page))
        assert tab.get_by_text("run this cell or trust the notebook").is_visible()
