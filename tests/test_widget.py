"Play in a notebook: the widget's messages reach a `Player`, and where nobody is there a picture stays."
import json

import ipywidgets
import matplotlib.pyplot as plt
import pytest

from dreamer4_nb import notebook
from dreamer4_nb.core import asset
from dreamer4_nb.notebook import PlayWidget
from dreamer4_nb.runs.play import Player, open_game


@pytest.fixture(scope="module")
def game():
    return open_game()


@pytest.fixture
def widget(game, tmp_path, monkeypatch):
    "A widget whose messages are kept instead of sent."
    widget = PlayWidget(Player(game, tmp_path))
    widget.sent = []
    monkeypatch.setattr(PlayWidget, "send", lambda self, *message: self.sent.append(message))
    return widget


@pytest.fixture
def displayed(game, monkeypatch):
    "What `play` displays; it opens the game of this file."
    shown = []
    monkeypatch.setattr(notebook, "open_game", lambda run, task: game)
    monkeypatch.setattr(notebook, "display", shown.append)
    return shown


def asked(widget, **message):
    "What the widget sends after a message of its front end."
    widget._handle_custom_msg(message, [])
    return widget.sent[-1]


def test_each_message_is_answered_once_with_both_pictures(widget):
    answer, pictures = asked(widget, do="hello")
    assert answer["kind"] == "hello" and [len(picture) for picture in pictures] == [64 * 64 * 3] * 2
    answer, moved = asked(widget, do="step", action=[1.0, 0.0])
    assert answer["since"] == 1 and moved[0] != pictures[0] and moved[1] != pictures[1]
    answer, none = asked(widget, do="fly")
    assert answer["kind"] == "error" and not none
    assert len(widget.sent) == 3
    json.dumps([answer for answer, _ in widget.sent], allow_nan=False)


def test_widgets_have_games_of_their_own(widget, game, tmp_path):
    other = PlayWidget(Player(game, tmp_path))
    other.sent = []
    asked(widget, do="step", action=[1.0, 0.0])
    assert asked(other, do="step", action=[0.0, 0.0])[0]["since"] == 1


def test_the_front_end_is_that_of_the_page(widget):
    assert widget._esm == asset("player.js").read_text(encoding="utf-8")
    assert widget._css == asset("player.css").read_text(encoding="utf-8")


def test_a_person_gets_the_widget(displayed, monkeypatch, tmp_path):
    monkeypatch.setattr(notebook, "_somebody_is_here", lambda: True)
    notebook.play(folder=tmp_path)
    (shown,) = displayed
    assert isinstance(shown, PlayWidget)


def test_where_nobody_is_there_a_picture_stays_and_no_widget(displayed, tmp_path):
    notebook.play(folder=tmp_path)
    (figure,) = displayed
    assert isinstance(figure, plt.Figure) and not isinstance(figure, ipywidgets.Widget)
    picture = figure.axes[0].images[0].get_array()
    width = (picture.shape[1] + 2) // 6
    first, last = picture[:64, :64], picture[:64, 5 * width:5 * width + 64]
    assert abs(first - last).max() > 0.2     # something moved
    assert not list(tmp_path.iterdir())
