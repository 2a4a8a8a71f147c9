"""app.py in a real browser: photographs, words, the legend, attention, sentences; and what nobody
may reach through the page."""

import json
import os
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import options
from PIL import Image
from tiny import ROOT

from downstream.catseg.model import CATSeg, Design
from downstream.fvit import model as fvit
from model import DeCLIP
from tools import answers, app, segment, visualize
from toy.world import NAMES, draw_scene
from util import UserError
from util.images import read_image

TOY = {"model": f"local-dir:{ROOT / 'toy/clip'}", "templates": "a photo of a {}.", "cache": "none",
       "short_side": 128, "window": 128, "stride": 128}
WAIT = 20       # seconds for what the page does at most


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy CLIP's tokenizer is named as seen from the repository."""
    monkeypatch.chdir(ROOT)


def parse(**given):
    return app.settings.parse(options(**TOY | given), app)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs, one of them too large, and files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "examples").mkdir()
    for name, number, size in (("a", 1, 128), ("large", 2, 300), ("examples/b", 3, 128)):
        Image.fromarray(draw_scene(number, size).image).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no photograph")
    (folder / "broken.png").write_bytes(b"no image")
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    Image.fromarray(noise).save(folder / "heavy.png")
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Iterator:
    """The page of the toy CLIP, untrained, on a free port."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cfg = parse(port=port, examples=folder / "examples", classes="star | comet, dots",
                max_pixels=20_000, max_file_mb=1)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.chdir(ROOT)
        for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
            patch.setenv(name, "")
        page = app.start(cfg, torch.device("cpu"), cache)
        yield page
        page.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """A Chromium without a window, 1280 x 900."""
    driver, browser = shutil.which("chromedriver"), shutil.which("chromium")
    if not driver or not browser:
        assert os.environ.get("CI") != "true", "chromium and chromedriver are missing"
        pytest.skip("chromium and chromedriver are missing; apt-get install chromium-driver")
    from selenium import webdriver
    chosen = webdriver.ChromeOptions()
    chosen.binary_location = browser
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1280,900"):
        chosen.add_argument(f"--{word}")
    chosen.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    window = webdriver.Chrome(chosen, webdriver.ChromeService(driver))
    yield window
    window.quit()


class Page:
    """What a person does with the page."""

    def __init__(self, window, url: str):
        self.window = window
        window.get(url)
        self.one("#words textarea")

    def all(self, css: str) -> list:
        return self.window.find_elements("css selector", css)

    def until(self, condition, what: str):
        from selenium.common.exceptions import StaleElementReferenceException as Stale
        from selenium.webdriver.support.ui import WebDriverWait
        wait = WebDriverWait(self.window, WAIT, 0.1, ignored_exceptions=[Stale])
        return wait.until(lambda _: condition(), what)

    def one(self, css: str):
        return self.until(lambda: self.all(css), css)[0]

    def text(self, css: str) -> str:
        return self.one(css).text

    def drop(self, path) -> None:
        self.one("#photo input[type=file]").send_keys(str(path))

    def name(self, words: str) -> None:
        self.one("#words textarea").clear()
        self.one("#words textarea").send_keys(words)

    def legend(self) -> list[str]:
        return [label.text.rsplit(maxsplit=2)[0] for label in self.all("#legend label")]

    def picture(self, part: str) -> str:
        """The address of what a part shows, which is another one for another picture."""
        return self.one(f"#{part} img").get_attribute("src")

    def click(self, x: float, y: float) -> None:
        """Clicks a place in the photograph, from 0 to 1."""
        from selenium.webdriver import ActionChains
        photo = self.one("#photo img")
        places = (round((at - 0.5) * photo.rect[side]) for at, side in ((x, "width"),
                                                                        (y, "height")))
        ActionChains(self.window).move_to_element_with_offset(photo, *places).click().perform()

    def says(self, words: str) -> bool:
        """Waits for a sentence with these words, and puts it away."""
        self.until(lambda: any(words in toast.text for toast in self.all(".toast-body")), words)
        for close in self.all(".toast-close"):
            self.window.execute_script("arguments[0].click()", close)
        self.until(lambda: not self.all(".toast-body"), "no sentence")
        return True


@pytest.fixture
def visitor(chromium, page) -> Page:
    return Page(chromium, page.local_url)


# ------------------------------------------------------------------------------ in the browser

def test_words_on_a_photograph(visitor, folder):
    """What was dropped is segmented into the words; the legend hides a class and shows it."""
    visitor.drop(folder / "a.png")
    visitor.until(visitor.legend, "a legend")
    assert set(visitor.legend()) <= {"star", "dots"}
    before = visitor.picture("regions")
    visitor.name(", ".join(f"{name} | {name}s" for name in NAMES))
    visitor.one("#segment").click()
    visitor.until(lambda: {*visitor.legend()} - {"star", "dots"}, "other classes")
    assert len(visitor.legend()) > 1 and {*visitor.legend()} < {*NAMES}
    visitor.until(lambda: visitor.picture("regions") != before, "another picture")
    whole = visitor.picture("regions")
    visitor.all("#legend input")[0].click()
    visitor.until(lambda: visitor.picture("regions") != whole, "a picture with a class less")
    assert len(visitor.legend()) > 1
    less = visitor.picture("regions")
    visitor.all("#legend input")[0].click()
    visitor.until(lambda: visitor.picture("regions") not in (less, before), "all classes again")


def test_a_place_on_a_photograph(visitor, folder):
    """Its attention appears for both models and changes with the place, which is marked."""
    visitor.drop(folder / "a.png")
    visitor.until(visitor.legend, "a legend")
    unmarked = visitor.picture("photo")
    visitor.click(0.25, 0.25)
    first = [visitor.picture(f"attention-{model}") for model in range(2)]
    visitor.until(lambda: visitor.picture("photo") != unmarked, "a mark")
    assert first[0] != first[1]
    visitor.click(0.8, 0.7)
    for model in range(2):
        visitor.until(lambda model=model: visitor.picture(f"attention-{model}") != first[model],
                      "another place's attention")


def test_an_example(visitor):
    visitor.one("#examples .grid-container button").click()
    visitor.until(visitor.legend, "a legend")
    assert visitor.picture("photo") and visitor.picture("regions")


def test_errors_are_sentences_in_the_page(visitor, folder, capfd):
    visitor.one("#segment").click()
    assert visitor.says("There is no photograph; drop one first.")
    for name, words in (("broken.png", "broken.png can't be read as an image"),
                        ("notes.txt", "notes.txt"), ("heavy.png", "1")):
        visitor.drop(folder / name)
        import time; time.sleep(3)
        print(name, [toast.text for toast in visitor.all(".toast-body")], visitor.one("#photo").text)
        visitor.window.get(visitor.window.current_url)
    assert 0
