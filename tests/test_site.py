"The site of the course: a few pages are built and looked at in a browser; the texts of all pictures and all links are checked."
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("site_build", ROOT / "docs" / "build.py")
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)
NOTEBOOKS = [*sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb")), ROOT / "nbs" / "index.ipynb"]
NAMES = {path.name for path in NOTEBOOKS}
BUILT = [path for path in NOTEBOOKS if path.stem in ("01_flow", "20_core", "70_ablations")]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    assert site.build(BUILT, out, jobs="1") == 0        # a warning is an error
    return out / "html"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def opened(browser, file, **options):
    "A page of a browser, and the addresses it asked a network for."
    page = browser.new_context(**options).new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url) if request.url.startswith("http") else None)
    page.goto(file.as_uri())
    return page, asked


def test_pages_load_nothing_from_elsewhere(built):
    for file in built.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r'<(script|img|iframe)[^>]* src="(https?:)?//', text), file
        assert not re.search(r'<link[^>]*rel="(stylesheet|preload)"[^>]*href="(https?:)?//', text), file


def test_every_picture_of_a_page_has_a_text(built):
    pictures = [tag for file in built.rglob("*.html") for tag in re.findall(r"<img [^>]*>", file.read_text(encoding="utf-8"))]
    assert len(pictures) > 10
    assert all(re.search(r'alt="[^"]{8,}"', tag) for tag in pictures)


def test_a_page_leads_to_its_notebook_to_colab_and_to_the_api(built):
    text = (built / "01_flow.html").read_text(encoding="utf-8")
    assert "https://colab.research.google.com/github/" in text and "/blob/main/nbs/01_flow.ipynb" in text
    api = (built / "api" / "method.flow.html").read_text(encoding="utf-8")
    assert 'id="dreamer4_nb.method.flow.interpolate"' in api and 'href="../01_flow.html"' in api


def test_a_knob_moves_without_a_kernel_and_equations_are_set(built, browser):
    page, asked = opened(browser, built / "01_flow.html")
    page.wait_for_selector("mjx-container")
    assert page.locator("mjx-container").count() > 10 and page.locator("mjx-merror").count() == 0
    knob = page.locator("div[data-frames]").first
    slider, picture = knob.locator("input").first, knob.locator("img")
    before, label = picture.get_attribute("src"), knob.locator("output").first.inner_text()
    slider.evaluate("s => { s.value = s.value == s.max ? s.min : s.max; s.dispatchEvent(new Event('input')); }")
    assert picture.get_attribute("src") != before and knob.locator("output").first.inner_text() != label
    assert not knob.locator("em").is_visible()          # the note for pages where scripts do not run
    assert not asked


def test_a_phone_scrolls_down_only_and_search_finds(built, browser):
    page, _ = opened(browser, built / "01_flow.html", viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.wait_for_selector("mjx-container")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page, asked = opened(browser, built / "search.html")
    page.goto((built / "search.html").as_uri() + "?q=velocity")
    page.wait_for_selector("ul.search li a[href*='01_flow']")
    assert not asked


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_has_a_caption_or_names_what_it_shows(path):
    page = site.page_of(path, NAMES)
    for cell in page["cells"]:
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert len(cell["metadata"]["mystnb"]["image"]["alt"]) >= 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    for target in re.findall(r"\]\((?!https?:|#)([\w./-]+(?:#[^)\s]*)?)\)", "\n".join(texts)):
        file, _, anchor = target.partition("#")
        found = path.parent / file
        assert found.is_file(), target
        if anchor:
            there = json.loads(found.read_text(encoding="utf-8"))["cells"]
            headings = re.findall(r"(?m)^#+ (.*)$", "\n".join("".join(c["source"]) for c in there if c["cell_type"] == "markdown"))
            assert anchor in map(site.slug, headings), target
