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
SCENE = 20_000_005      # has several classes
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
    for name, number, size in (("a", SCENE, 128), ("large", 2, 300), ("examples/b", 3, 128)):
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
    webdriver = pytest.importorskip("selenium.webdriver")
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


@pytest.mark.parametrize("name, words", [
    ("broken.png", "broken.png can't be read as an image (cannot identify image file 'broken.png'"),
    ("notes.txt", "Only image/* allowed"), ("heavy.png", "exceed the maximum allowed size of 1.0")])
def test_files_that_are_no_photographs(visitor, folder, name, words):
    """One says why, and may drop another one at once."""
    visitor.drop(folder / name)
    visitor.says(words)
    visitor.drop(folder / "a.png")
    visitor.until(visitor.legend, "a legend")


def test_sentences_in_the_page(visitor, folder, page, monkeypatch):
    visitor.one("#segment").click()
    visitor.says("There is no photograph; drop one first.")
    visitor.drop(folder / "large.png")
    visitor.says("The photograph has 90,000 pixels, more than 20,000; it was reduced to 100 x 100.")
    visitor.until(visitor.legend, "a legend")
    before = visitor.picture("regions")
    visitor.name(" , |")
    visitor.one("#segment").click()
    visitor.says("No class is named; type words")
    assert visitor.picture("regions") == before
    monkeypatch.setattr(answers.figures, "use_fonts", lambda names: 1 / 0)
    visitor.name("star")
    visitor.one("#segment").click()
    visitor.says("The program failed (ZeroDivisionError); its terminal")


def test_the_page_asks_no_other_machine(visitor):
    """Chromium's own log of all that it fetched for the tests so far."""
    visitor.one("#photo")
    events = [json.loads(line["message"])["message"]
              for line in visitor.window.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events
            if event["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 5
    assert not [url for url in urls if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]


# --------------------------------------------------------------------------- without a browser

def ask(page, data: list, number: int) -> str:
    """What the page's function of a number answers to a program: all events as text."""
    body = json.dumps({"data": data, "fn_index": number, "session_hash": "program"}).encode()
    address = f"{page.local_url}gradio_api/queue"
    urllib.request.urlopen(urllib.request.Request(
        f"{address}/join", body, {"Content-Type": "application/json"}))
    return urllib.request.urlopen(f"{address}/data?session_hash=program").read().decode()


@pytest.mark.parametrize("path", ["/etc/hostname", "README.md", str(ROOT / "README.md"),
                                  "../README.md", "toy/clip/../../README.md",
                                  str(ROOT / "toy/app.png"), "EXAMPLES/b.png"])
def test_no_file_of_the_machine_is_served(page, folder, path):
    """By its address, and as a photograph that a program says it has dropped."""
    path = path.replace("EXAMPLES", str(folder / "examples"))
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{page.local_url}gradio_api/file={path}")
    assert refused.value.code in (403, 404)
    upload = next(number for number, event in page.fns.items() if event.name == "drop")
    # Gradio itself looks only at what says that it is a file.
    for meta in ({"meta": {"_type": "gradio.FileData"}}, {"meta": {}}, {}):
        events = ask(page, [{"path": path} | meta], upload)
        assert '"process_completed"' in events and '"url"' not in events
    assert '"url"' not in ask(page, [None], upload)


def test_words_name_no_file(page):
    assert answers.typed("classes/voc21.txt", 9).names == ["classes/voc21.txt"]


@pytest.mark.parametrize("words, names, prompts", [
    ("cat, wooden chair,grass ,", ["cat", "wooden chair", "grass"],
     ["cat", "wooden chair", "grass"]),
    ("dog | puppy, grass", ["dog", "grass"], ["dog", "puppy", "grass"]),
    ("dog, puppy\n\ngrass\n", ["dog", "grass"], ["dog", "puppy", "grass"]),
    ("dog, puppy\n", ["dog", "puppy"], ["dog", "puppy"])])
def test_words_as_they_are_typed(words, names, prompts):
    found = answers.typed(words, 9)
    assert (found.names, found.prompts) == (names, prompts)


@pytest.mark.parametrize("words, sentence", [
    ("", "No class is named"), (" ,\n|", "No class is named"), ("cat, Cat", "'cat' is named twice"),
    (",".join("abcdefghij"), "There are 10 names, more than 9")])
def test_words_that_name_nothing(words, sentence):
    with pytest.raises(UserError, match=sentence):
        answers.typed(words, 9)


def test_words_of_a_class_file(tmp_path):
    (tmp_path / "names.txt").write_text("cat, kitten\nsofa\n")
    assert answers.as_typed(str(tmp_path / "names.txt")) == "cat | kitten, sofa"


def test_answers_are_those_of_the_other_tools(folder):
    """Classes of tools.segment, attention of tools.visualize; a place's patch is the marked one."""
    cfg, device = parse(background="true", threshold=0.3), torch.device("cpu")
    asked = answers.Answers(cfg, device)
    scene = answers.Scene(read_image(folder / "a.png"))
    found = asked.attend(asked.segment(scene, "star, dots"))
    cfg.CLASSES = "star, dots"
    panels = segment.panels_of(cfg, segment.find_classes(cfg), device)
    expected, = next(iter(panels.values()))([scene.photo])
    assert torch.equal(found.found, expected)
    cfg.VFM_MODEL = None
    rows = visualize.open_models(cfg, device)
    grid = visualize.grid_of(scene.photo, None, rows[0].model)
    for row, maps in zip(rows, found.attention, strict=True):
        assert torch.equal(row.maps(scene.photo, grid)[-1][1:, 1:], maps.flatten(1))
    drawn = answers.draw_attention(found, [899.9, 0])
    for picture in drawn:
        red = (np.array(picture) == (255, 0, 0)).all(axis=-1).nonzero()
        assert red[0].min() == 0 and red[1].max() == 899 and red[1].min() > 850


def test_a_hidden_class_has_no_colour(folder):
    """Its pixels are grey, those of others as before."""
    photo = read_image(folder / "a.png")
    found = (torch.arange(128) > 63).long().expand(128, 128)
    classes = answers.typed("star, dots", 9)
    in_grey = photo.float().mean(dim=0).numpy()[..., None]
    for shown, hidden in ((["star", "dots"], (0, 0)), (["dots"], (1, 0)), ([], (1, 1))):
        pixels = np.array(answers.figures.regions(photo, found, classes, shown, 128)).astype(float)
        is_grey = np.abs(pixels - in_grey).max(axis=-1) < 4
        halves = is_grey[:, :60].mean(), is_grey[:, -60:].mean()
        assert tuple(half > 0.95 for half in halves) == hidden, halves


def test_a_detector_and_a_segmenter(folder, tmp_path):
    """Boxes of a detector, scored as its data set asks for, and CAT-Seg as a checkpoint."""
    clip = DeCLIP(TOY["model"], "own")
    clip.save(tmp_path / "declip.safetensors")
    design = fvit.Design(image_size=64, channels=16, candidates=100, proposals=20, templates="{}")
    fvit.FViT(clip, ["star", "dots"], [True, False], design).save(
        tmp_path / "fvit.safetensors", {"BACKBONE": str(tmp_path / "declip.safetensors"),
                                        "DATASET": "ovlvis"})
    CATSeg(clip, Design(32, width=16)).save(tmp_path / "catseg.safetensors")
    own = {name: TOY.get(name, "none") for name in ("model", "cache")}
    cfg = app.settings.parse(options(ckpt=tmp_path / "catseg.safetensors", least=0,
                                     detector=tmp_path / "fvit.safetensors", **own), app)
    cfg.given = {}
    asked = answers.Answers(cfg, torch.device("cpu"))
    scene = asked.segment(answers.Scene(read_image(folder / "a.png")), "star, dots, noise")
    assert scene.found.shape == (128, 128) and asked.rows[1].title == "CAT-Seg"
    assert asked.boxes(scene).width > 100
    assert asked.detector.rules == fvit.RULES["ovlvis"] != fvit.RULES["ovcoco"]
    assert len(asked.attend(scene).attention) == 2


@pytest.mark.parametrize("given, words", [
    ({"attention": "clip"}, "ATTENTION is of one evaluation"),
    ({"least": 0.5}, "LEAST is of a DETECTOR"), ({"port": 0}, "PORT is 0; it must be from 1"),
    ({"threshold": 0.5}, "THRESHOLD is for --background"), ({"max_names": 0}, "MAX_NAMES is 0"),
    ({"logit_scale": 9}, "LOGIT_SCALE is for a THRESHOLD"), ({"short_side": 0}, "SHORT_SIDE is 0"),
    ({"examples": "presets"}, "presets holds no image"),
    ({"ckpt": "no.safetensors"}, "There is no checkpoint no.safetensors")])
def test_bad_settings_are_one_sentence(monkeypatch, given, words):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    with pytest.raises(SystemExit) as error:
        app.main(options(**TOY | given))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_port_that_is_taken(page, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    with pytest.raises(UserError, match="can't be served at 127.0.0.1, port .*another PORT"):
        app.start(parse(port=page.server_port), torch.device("cpu"), "")


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    with pytest.raises(SystemExit, match="needs the package gradio, .* by pip install gradio"):
        app.main(options(**TOY))
