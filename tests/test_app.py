"""The page of `ms-diffusion app`, used in a real browser: Debian's Chromium, led by Playwright."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import assert_refused, call

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs chromium: apt-get install chromium")]
TIMEOUT = 240_000  # milliseconds, for a machine that does other things too


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The page of the bundled model, served by the command; it ends at a signal and leaves no file."""
    folder, port = tmp_path_factory.mktemp("app"), free_port()
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(folder)}
    words = [sys.executable, "-m", "ms_diffusion", "app", "fashion-mnist-large", "--port", str(port)]
    with subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout.readline().startswith(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def opened(browser, url):
    """opened(width) -> the page, loaded. No page asks anything of another machine."""
    contexts, asked = [], []

    def load(width=1200):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.wait_for_selector("#draw")
        return page

    yield load
    for context in contexts:
        context.close()
    assert asked and all(each.startswith((url, "data:", "blob:")) for each in asked)


def fill(page, name, value):
    page.locator(f"#{name} input").first.fill(str(value))


def settle(page, seed=0, num=2, steps=2):
    page.get_by_text("Sampler", exact=True).first.click()
    page.wait_for_function("document.querySelector('#steps input')?.value == '15'")  # what the page sets for the run
    for name, value in {"seed": seed, "num": num, "steps": steps}.items():
        fill(page, name, value)
    page.keyboard.press("Tab")


def wait_for(page, text, element="status"):
    page.wait_for_function(
        "([id, text]) => document.getElementById(id)?.innerText.includes(text)", arg=[element, text], timeout=TIMEOUT
    )


def downloaded(page, tmp_path) -> np.ndarray:
    with page.expect_download() as found:
        page.click("#npz")
    path = tmp_path / "x.npz"
    found.value.save_as(path)
    return np.load(path)["images"]


def test_a_seed_is_a_picture(opened, tmp_path):
    """Another seed gives other pictures, the same seed the same; two users at once get what they asked for."""
    first, second = opened(), opened(390)
    for page, seed in ((first, 1), (second, 2)):
        settle(page, seed)
    first.click("#draw")
    second.click("#draw")
    wait_for(second, "seed 2")
    wait_for(first, "seed 1")
    one, two = downloaded(first, tmp_path), downloaded(second, tmp_path)
    assert one.shape == two.shape == (2, 28, 28, 1) and (one != two).any()
    fill(first, "seed", 2)
    first.click("#draw")
    wait_for(first, "seed 2")
    np.testing.assert_array_equal(downloaded(first, tmp_path), two)
    with first.expect_download() as found:
        first.click("#png")
    assert found.value.suggested_filename.endswith(".png")
    assert second.evaluate("document.documentElement.scrollWidth") <= 390  # nothing is cut off on a phone


def test_painting_over_a_picture(opened, tmp_path):
    """What the mouse has painted over is drawn anew, the rest is the test image."""
    page = opened()
    settle(page)
    page.get_by_role("tab", name="Inpaint").click()
    page.click("#inpaint")
    page.get_by_text("choose a picture first").wait_for()
    page.click("#take")
    page.wait_for_timeout(3000)
    page.mouse.move(0, 0)
    box = page.locator("#paint canvas").first.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle[0] - 60, middle[1])
    page.mouse.down()
    page.mouse.move(middle[0] + 60, middle[1], steps=12)
    page.mouse.up()
    page.wait_for_timeout(1000)
    page.click("#inpaint")
    wait_for(page, "seed 0")
    from ms_diffusion.training.pipeline import load

    drawn, original = downloaded(page, tmp_path)[..., 0], load("fashion-mnist-large").task.test_images()[0, ..., 0]
    changed = abs(drawn.astype(int) - original).max(0) > 2
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert 10 < changed.sum() < 250 and 8 <= rows.min() and rows.max() <= 19  # a stripe through the middle
    assert columns.min() < 12 and columns.max() > 15


def test_interpolation(opened, tmp_path):
    page = opened()
    settle(page, num=3, steps=3)
    page.get_by_role("tab", name="Interpolate").click()
    page.click("#both")
    page.wait_for_timeout(3000)
    page.click("#interpolate")
    wait_for(page, "seed 0")
    assert len(downloaded(page, tmp_path)) == 3


def test_stop_really_stops(opened):
    """Within seconds, not after 900 steps: the next picture is drawn at once."""
    page = opened()
    settle(page, num=64, steps=900)
    page.click("#draw")
    wait_for(page, "step ")
    page.click("#stop")
    wait_for(page, "stopped")
    settle_again = {"num": 1, "steps": 2, "seed": 5}
    for name, value in settle_again.items():
        fill(page, name, value)
    page.keyboard.press("Tab")
    clock = time.monotonic()
    page.click("#draw")
    wait_for(page, "seed 5")
    assert time.monotonic() - clock < 60


def test_bad_values_are_refused_in_the_page(opened):
    page = opened()
    settle(page, steps=5000)
    page.click("#draw")
    page.get_by_text("choose from 1 to 1000").first.wait_for()


def test_the_plane(opened):
    page = opened()
    page.get_by_role("tab", name="Plane").click()
    page.click("#plane-draw")
    wait_for(page, "the denoiser is exact", "plane-status")
    for name in ("plane", "arrows", "paths"):
        page.wait_for_function("id => document.querySelector(`#${id} img`)?.naturalWidth > 300", arg=name)


def test_what_is_refused(tmp_path):
    assert_refused(call("app", tmp_path / "nowhere"), "nowhere")
    assert_refused(call("app", "--port", 0), "--port is 0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert_refused(call("app", "fashion-mnist-large", "--port", taken.getsockname()[1]), "--port")
