"""The page in a real browser; where there is none, these tests are skipped."""

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from cluster.app.api import Run
from cluster.app.graph import Graph
from cluster.app.serve.app import make_app

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
HOSTILE = "<img src=x onerror=alert(1)>.jpg"


@pytest.fixture(scope="module")
def address(finished: Graph) -> Iterator[str]:
    shutil.rmtree(Path(finished.root) / "labels", ignore_errors=True)
    bound = socket.create_server(("127.0.0.1", 0))
    app = make_app(Run(finished), ["supervised.s0", "semi.s0"], {"127.0.0.1"})
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, opened; any error on its console or against its policy fails the test."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.goto(address)
    page.locator("#gallery button").first.wait_for()
    yield page
    page.context.close()
    assert not wrong


def search(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.locator("#answers button").first.wait_for()
    page.locator("#go:enabled").wait_for()


def test_a_chain_by_keyboard_survives_reload_and_goes_back(page: Any) -> None:
    page.locator("#gallery button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    search(page, "make it <b>red</b>/~ größer")
    assert page.locator("#answers article").count() == 2
    page.locator("#answers article:last-child .hit").nth(1).click()
    search(page, "smaller")
    assert page.locator("#chain li").all_text_contents() == ["make it <b>red</b>/~ größer", "smaller"]
    hits = page.locator("#answers figcaption").all_text_contents()
    page.reload()
    page.locator("#answers button").first.wait_for()
    assert page.locator("#answers figcaption").all_text_contents() == hits
    page.go_back()
    page.locator("#chain li").nth(1).wait_for(state="detached")
    assert page.input_value("#text") == "make it <b>red</b>/~ größer"


def test_a_result_is_called_right_and_taken_back(page: Any) -> None:
    page.locator("#gallery .hit").first.click()
    search(page, "make it <i>red</i>~")
    page.locator("#answers article:last-child .hit").first.focus()
    page.keyboard.press("r")
    right = page.locator("#answers article:last-child .right[aria-pressed=true]")
    right.wait_for()
    assert "Kept: “make it <i>red</i>~” leads to" in page.text_content("#status")
    page.reload()
    right.click()
    right.wait_for(state="detached")
    page.reload()
    page.locator("#answers .hit").first.wait_for()
    assert right.count() == 0


def test_the_generator_is_asked(page: Any) -> None:
    page.locator("#gallery .hit").nth(1).click()
    search(page, "smaller")
    page.locator("#answers .hit").first.focus()
    page.keyboard.press("w")
    page.locator("#answers .why", has_text="likelihood 0.").first.wait_for()


def test_a_photo_of_ones_own_with_a_hostile_name(page: Any, world: Path) -> None:
    content = sorted((world / "photos").iterdir())[2].read_bytes() + b"\0"  # the very file may be in the gallery
    page.set_input_files("#file", {"name": HOSTILE, "mimeType": "image/jpeg", "buffer": content})
    page.locator("#reference").wait_for()
    search(page, "make it green")
    page.reload()
    page.locator("#answers button").first.wait_for()
    assert page.get_attribute("#reference", "src").startswith("data:image/jpeg")


def test_what_is_missing_is_said(page: Any) -> None:
    page.click("#go")
    assert "Give a photo first" in page.text_content("#status")


def test_pairs_are_judged_by_keyboard(page: Any) -> None:
    page.click("#tab")
    page.locator("#deltas button").first.wait_for()
    for count, key in enumerate("1nwx", 1):
        page.keyboard.press(key)
        page.locator("#progress", has_text=f"{count} of").wait_for()
    page.keyboard.press("z")
    page.locator("#progress", has_text="3 of").wait_for()
    page.keyboard.press("e")
    page.keyboard.type("n1 bigger")
    page.keyboard.press("Enter")
    page.locator("#progress", has_text="4 of").wait_for()


def test_a_narrow_window_does_not_scroll_sideways(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 800})
    page.locator("#gallery button").first.click()
    search(page, "red")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
