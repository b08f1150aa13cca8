"""The page of play in a real Chromium, and the server without one."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from dreamer4_nb.core import UserError
from dreamer4_nb.runs import page

ROOT = Path(__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium; on Debian or Ubuntu type: sudo apt-get install chromium")


@contextmanager
def serving(folder, *more):
    "The command, in a folder, with more arguments; its address and process."
    command = [sys.executable, "-m", "dreamer4_nb", "play", "--port", "0", "--no-show", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})
    address = None
    while address is None:
        line = process.stdout.readline()
        assert line, "the server ended"
        address = re.search(r"http://127\.0\.0\.1:\d+/\S+/", line)
    yield address.group(0), process
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "The command, with what ships; its address and process."
    with serving(tmp_path_factory.mktemp("play")) as address_and_process:
        yield address_and_process


def workers_of(process):
    "The numbers of the processes that the server started for games."
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # Without a sandbox, because tests may run as root.
        with driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as opened:
            yield opened


@pytest.fixture
def opened(server, browser):
    "Opens the page and waits for its first frame; after the test no page may have complained."
    complaints, pages = [], []

    def open_page(width=1280, bypass_csp=True):  # waiting for a function needs eval
        tab = browser.new_page(viewport={"width": width, "height": 800}, bypass_csp=bypass_csp)
        tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.goto(server[0])
        tab.wait_for_selector("[data-t]", timeout=60_000)
        pages.append(tab)
        return tab

    yield open_page
    for tab in pages:
        tab.close()
    assert complaints == []


def wait_until_played(tab, decisions):
    tab.wait_for_function(f"Number(document.querySelector('.d4').dataset.t) >= {decisions}", timeout=60_000)


def played(tab):
    return int(tab.get_attribute(".d4", "data-t"))


def picture(tab, name):
    return tab.evaluate(f"document.querySelector('[data-part={name}]').toDataURL()")


def pause(tab):
    "Pauses and waits until nothing has come for a second: an answer may be under way, and takes long on a busy machine."
    if tab.text_content("[data-part=pause]") == "Pause":
        tab.click("[data-part=pause]")
    for _ in range(30):
        stood = played(tab)
        tab.wait_for_timeout(1000)
        if played(tab) == stood:
            break


@needs_browser
def test_keys_steer_both_pictures(opened):
    tab = opened()
    before = {name: picture(tab, name) for name in ("dream", "simulator")}
    tab.keyboard.down("ArrowRight")
    wait_until_played(tab, 12)
    tab.keyboard.up("ArrowRight")
    assert all(picture(tab, name) != shown for name, shown in before.items())
    assert "frames since reality" in tab.text_content("[data-part=since]")
    assert float(tab.evaluate("document.querySelector('[data-part=disagreement]').value")) > 0
    left = tab.evaluate("parseFloat(document.querySelector('.d4-pad i').style.left)")
    assert 95 <= left <= 100         # the key that began the game also steers


@needs_browser
def test_the_page_needs_nothing_that_its_policy_forbids(opened):
    tab = opened(bypass_csp=False)
    tab.keyboard.press("Space")
    tab.wait_for_timeout(1500)
    pause(tab)
    assert played(tab) > 0


@needs_browser
def test_pause_back_to_reality_and_reset(opened):
    tab = opened()
    tab.keyboard.press("Space")
    wait_until_played(tab, 5)
    pause(tab)
    stood = played(tab)
    tab.wait_for_timeout(600)
    assert played(tab) == stood      # nothing is asked for while it is paused
    tab.click("[data-part=return]")
    tab.wait_for_function("document.querySelector('[data-part=since]').textContent.startsWith('0 ')")
    assert played(tab) == stood
    tab.fill("[data-part=number]", "3")
    tab.click("[data-part=reset]")
    tab.wait_for_function("document.querySelector('.d4').dataset.t === '0'")
    one = picture(tab, "simulator")
    tab.select_option("[data-part=from]", "simulator")
    tab.click("[data-part=reset]")
    tab.wait_for_function(f"document.querySelector('[data-part=simulator]').toDataURL() !== '{one}'")


@needs_browser
def test_hand_over_and_take_back(opened):
    tab = opened()
    assert tab.eval_on_selector_all("[data-actor]", "all => all.map(one => one.dataset.actor)") == [
        "you", "cloned", "imagined", "planner"]
    for actor in ("imagined", "planner", "cloned"):
        reached = played(tab)
        tab.click(f"[data-actor={actor}]")
        tab.wait_for_selector(f"[data-actor={actor}][aria-pressed=true]")
        wait_until_played(tab, reached + 4)
    tab.keyboard.press("h")
    tab.wait_for_selector("[data-actor=you][aria-pressed=true]")
    tab.select_option("[data-part=futures]", "1")
    tab.select_option("[data-part=steps]", "2")
    reached = played(tab)
    wait_until_played(tab, reached + 3)
    pause(tab)


@needs_browser
def test_a_bad_setting_is_one_line_and_the_game_goes_on(opened):
    tab = opened()
    tab.fill("[data-part=number]", "100000")
    tab.click("[data-part=reset]")
    tab.wait_for_selector(".d4-bad")
    assert "episode" in tab.text_content("[data-part=status]")
    tab.keyboard.press("Space")
    wait_until_played(tab, 3)
    pause(tab)


@needs_browser
def test_save_film_and_episode(opened):
    tab = opened()
    tab.keyboard.press("Space")
    wait_until_played(tab, 5)
    pause(tab)
    with tab.expect_download() as film:
        tab.click("[data-part=film]")
    assert film.value.suggested_filename.endswith(".mp4") and Path(film.value.path()).stat().st_size > 1000
    tab.click("[data-part=episode]")
    tab.wait_for_function("document.querySelector('[data-part=status]').textContent.includes('.zarr')")


@needs_browser
def test_two_visitors_have_games_of_their_own_and_leaving_frees_them(opened, server):
    one, other = opened(), opened()
    one.keyboard.press("Space")
    wait_until_played(one, 5)
    assert played(other) == 0
    other.keyboard.press("Space")
    wait_until_played(other, 3)
    pause(one)
    pause(other)
    workers = workers_of(server[1])
    assert 1 <= len(workers) <= 2
    other.close()
    third = opened()
    assert len(workers_of(server[1])) <= 2 and played(third) == 0


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_sideways_scrolling(opened, dark):
    tab = opened(width=375)
    tab.emulate_media(color_scheme="dark" if dark else "light")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    box = tab.locator(".d4-pad").bounding_box()
    assert box["y"] + box["height"] < 800       # the pad is on the first screen
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(*middle)
    tab.mouse.down()
    tab.mouse.move(middle[0] + 60, middle[1] - 40)
    wait_until_played(tab, 4)
    tab.mouse.up()
    pause(tab)


@needs_browser
def test_a_dead_process_is_one_line_and_the_next_visitor_gets_a_new_one(opened, server):
    tab = opened()
    for worker in workers_of(server[1]):
        os.kill(worker, signal.SIGKILL)
    tab.keyboard.press("Space")
    tab.wait_for_selector(".d4-bad")
    assert "reload the page" in tab.text_content("[data-part=status]")
    again = opened()
    again.keyboard.press("Space")
    wait_until_played(again, 2)
    pause(again)


def test_no_page_without_the_key_and_no_other_file(server):
    address, _ = server
    root = address.rsplit("/", 2)[0]
    for path in (f"{root}/", f"{root}/wrong/", f"{address}tiny_dynamics.safetensors", f"{address}../cli.py"):
        with pytest.raises(HTTPError) as refused:
            urlopen(path)
        assert refused.value.code == 404
    assert "player.css" in urlopen(address).read().decode()


def test_a_socket_from_another_origin_is_refused(server):
    address, _ = server
    port, key = re.search(r":(\d+)/(\S+)/", address).groups()
    request = (f"GET /{key}/socket HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
               "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\nOrigin: http://elsewhere.org\r\n\r\n")
    with socket.create_connection(("127.0.0.1", int(port))) as connection:
        connection.sendall(request.encode())
        assert b" 403 " in connection.recv(1000).splitlines()[0]


def test_a_taken_port_is_one_line(server, tmp_path, capsys):
    port = int(re.search(r":(\d+)/", server[0]).group(1))
    with pytest.raises(UserError, match=f"port {port} .*--port"):
        page.serve(None, None, tmp_path, port, show=False)


def test_a_run_that_cannot_be_played_is_one_line_before_the_page(tmp_path):
    with pytest.raises(UserError, match="nothing"):
        page.serve(tmp_path / "nothing", None, tmp_path, 0, show=False)


def test_messages_that_are_none_and_a_dropped_player():
    page._open_desk(None, None, Path("runs/play"))
    for text in ("{", "[1]", "null", '{"do": "step", "action": [NaN, 0]}', '{"do": "eval"}'):
        packed = page._answer(7, text)
        answer = json.loads(packed[4:4 + int.from_bytes(packed[:4], "little")])["answer"]
        assert answer["kind"] == "error" and "\n" not in answer["error"], text
    assert page._leave(7) == 0


def test_workers_end_when_the_server_is_killed(tmp_path):
    command = [sys.executable, "-m", "dreamer4_nb", "play", "--port", "0", "--no-show"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while "can be played" not in process.stdout.readline():
        assert process.poll() is None
    workers = workers_of(process)
    assert workers
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < end, "a worker goes on without its server"
        time.sleep(0.1)
