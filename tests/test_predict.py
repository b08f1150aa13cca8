"`predict`: the answer unlocks figure and reason; where nobody can answer, all is there."
import matplotlib.pyplot as plt
import pytest
from IPython.display import Markdown

from dreamer4_nb import notebook
from dreamer4_nb.notebook import predict


class Handle:
    "A place on the page, as `display` gives one."

    def __init__(self, content):
        self.content = content

    def update(self, content):
        self.content = content


@pytest.fixture
def places(monkeypatch):
    "What is on the page, in order."
    page = []

    def display(*objects, display_id=False):
        page.extend(Handle(shown) for shown in objects)
        return page[-1] if display_id else None

    monkeypatch.setattr(notebook, "display", display)
    return page


def ask(drawn):
    def draw():
        drawn.append(plt.figure())
        return drawn[-1]
    return predict("More?", ["more", "less"], "less", "It shrinks.", draw)


def words(places):
    return [place.content.data for place in places if isinstance(place.content, Markdown)]


def figures(places):
    return [place.content for place in places if isinstance(place.content, plt.Figure)]


@pytest.mark.parametrize("choice, verdict", [("less", "Right. **less.** It shrinks."), ("more", "Wrong. **less.** It shrinks.")])
def test_the_answer_unlocks_the_figure(places, monkeypatch, choice, verdict):
    monkeypatch.setattr(notebook, "_somebody_is_here", lambda: True)
    drawn = []
    buttons = ask(drawn)
    assert not drawn and not figures(places) and "It shrinks." not in "".join(words(places))
    next(button for button in buttons if button.description == choice).click()
    assert figures(places) == drawn and len(drawn) == 1 and verdict in words(places)
    assert all(button.disabled for button in buttons)
    assert not plt.fignum_exists(drawn[0].number)       # or it would be shown twice


def test_a_line_says_that_a_slow_figure_is_being_drawn(places, monkeypatch):
    monkeypatch.setattr(notebook, "_somebody_is_here", lambda: True)
    meanwhile = []

    def draw():
        meanwhile.extend(words(places))
        return plt.figure()

    predict("More?", ["more", "less"], "less", "It shrinks.", draw)[0].click()
    assert meanwhile[-2:] == ["Wrong. **less.** It shrinks.", "*drawing …*"]
    assert "*drawing …*" not in words(places) and figures(places)


def test_where_nobody_is_there_all_is_shown(places):
    drawn = []
    ask(drawn)
    assert figures(places) == drawn and len(drawn) == 1
    assert words(places) == ["**Predict.** More?", "- more\n- less", "**less.** It shrinks."]
