"""detect.py: what is found is drawn and written where it is, novel classes are marked, photographs
of any shape, bad input."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import draw_scene, options
from matplotlib import colors
from matplotlib import pyplot as plt
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

from downstream.detection import Detections
from downstream.fvit.model import Design, FViT
from model import DeCLIP
from tools import detect
from tools.figures import PALETTE

SMALL = Design(image_size=64, channels=16, candidates=100, proposals=20, templates="{}")
DEFAULTS = {"cache": "none", "largest": 320}
BOXES = [[8.0, 6, 30, 28], [20.0, 20, 60, 44]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A detector of discs and boxes, and of kites, which it has not seen."""
    folder = tmp_path_factory.mktemp("fvit")
    clip = DeCLIP("tiny-eva")
    clip.save(folder / "declip.safetensors")
    FViT(clip, ["disc", "box", "kite"], [True, True, False], SMALL).save(
        folder / "fvit.safetensors", {"BACKBONE": str(folder / "declip.safetensors")})
    return folder / "fvit.safetensors"


@pytest.fixture
def photo(tmp_path):
    def write(name: str = "scene.png", size: tuple = (48, 64)) -> str:
        Image.fromarray(draw_scene(1, *size)[0]).save(tmp_path / name)
        return str(tmp_path / name)
    return write


@pytest.fixture
def finds(monkeypatch):
    """Makes every detector find what is given, whatever the image."""
    def find(boxes=BOXES, labels=(0, 2), scores=(0.9, 0.6), masks=None) -> None:
        found = Detections(torch.tensor(boxes).view(-1, 4), torch.tensor(scores[:len(boxes)]),
                           torch.tensor(labels[:len(boxes)], dtype=torch.long), masks)
        monkeypatch.setattr(FViT, "detect", lambda self, images, rules: [found])
    return find


def run(checkpoint, *photos, **given) -> None:
    detect.main([*map(str, photos), *options(**DEFAULTS | {"ckpt": checkpoint} | given)])


def coloured(path, colour: str) -> np.ndarray:
    """Which pixels of a figure have a colour, almost: bool (H, W)."""
    with Image.open(path) as figure:
        pixels = np.array(figure.convert("RGB")).astype(int)
    return np.abs(pixels - 255 * np.array(colors.to_rgb(colour))).max(axis=-1) < 40


def test_numbers_are_coco_results(checkpoint, photo, finds, tmp_path):
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[10:20, 12:25] = True
    finds(masks=[mask, ~mask])
    run(checkpoint, photo("000000000139.png"), json="true")
    results = json.loads((tmp_path / "000000000139.detection.json").read_text())
    assert [result["category_id"] for result in results] == [1, 3]
    assert [result["category"] for result in results] == ["disc", "kite"]
    assert {result["image_id"] for result in results} == {139}
    assert {result["file_name"] for result in results} == {"000000000139.png"}
    assert results[0]["bbox"] == [8, 6, 22, 22] and results[0]["score"] == pytest.approx(0.9)
    assert np.array_equal(coco_masks.decode(results[0]["segmentation"]), mask.numpy())


def test_numbers_have_the_ids_of_a_json(checkpoint, photo, finds, tmp_path):
    """So that pycocotools scores them with it; photographs that it does not list are refused."""
    images = [{"id": 40, "file_name": "scene.png", "height": 48, "width": 64},
              {"id": 7, "file_name": "val/scene.png", "height": 48, "width": 64}]
    categories = [{"id": 90, "name": "kite"}, {"id": 3, "name": "box"}]
    truth = tmp_path / "instances.json"
    truth.write_text(json.dumps({"images": images, "categories": categories}))
    (tmp_path / "val").mkdir()
    finds(labels=(0, 1))
    run(checkpoint, photo("val/scene.png"), classes=truth, json="true")
    results = json.loads((tmp_path / "val/scene.detection.json").read_text())
    assert [(each["category_id"], each["category"]) for each in results] == [(3, "box"),
                                                                             (90, "kite")]
    assert {(each["image_id"], each["file_name"]) for each in results} == {(7, "val/scene.png")}
    reference = COCO()
    reference.dataset = json.loads(truth.read_text()) | {"annotations": []}
    reference.createIndex()
    assert reference.loadRes(results).getAnnIds(imgIds=[7], catIds=[90])
    with pytest.raises(SystemExit, match="instances.json does not list .*other.png"):
        run(checkpoint, photo("other.png"), classes=truth, json="true")


def test_frames_are_where_objects_are(checkpoint, photo, finds, tmp_path):
    """In the colour of its class; the figure is as wide as the photograph, less a rim."""
    finds(boxes=BOXES[1:], labels=(0,))
    run(checkpoint, photo(), largest=640)
    where = coloured(tmp_path / "scene.detection.png", PALETTE[0])
    factor, rim = 10, 0.05 * 640 / detect.INCHES
    x0, y0, x1, y1 = (factor * side + rim for side in BOXES[1])
    on_frame = np.zeros_like(where)
    for x in (x0, x1):
        on_frame[int(y0):int(y1), int(x) - 2:int(x) + 3] = True
    for y in (y0, y1):
        on_frame[int(y) - 2:int(y) + 3, int(x0):int(x1)] = True
    assert where[on_frame].mean() > 0.4
    inside = where[int(y0) + 8:int(y1) - 8, int(x0) + 8:int(x1) - 8]
    assert inside.mean() < 0.02


def test_novel_classes_are_marked(checkpoint, photo, finds, tmp_path, capsys):
    """By a dashed frame, which has fewer coloured pixels, and by an asterisk."""
    shares = {}
    for label, name in ((0, "seen"), (2, "novel")):
        finds(boxes=BOXES[1:], labels=(label,))
        run(checkpoint, photo(), out=tmp_path / name, largest=640)
        where = coloured(tmp_path / name / "scene.detection.png", PALETTE[0])
        shares[name] = where[250:380].mean()         # without chip and legend
    assert 0.2 * shares["seen"] < shares["novel"] < 0.85 * shares["seen"], shares
    printed = capsys.readouterr().out
    assert "1 disc\n" in printed and "1 kite*" in printed


def test_masks_are_tinted(checkpoint, photo, finds, tmp_path):
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[24:40, 24:56] = True
    figures = []
    for number, masks in enumerate((None, [mask])):
        finds(boxes=BOXES[1:], labels=(0,), masks=masks)
        run(checkpoint, photo(), out=tmp_path / str(number), largest=640)
        with Image.open(tmp_path / str(number) / "scene.detection.png") as figure:
            figures.append(np.array(figure.convert("RGB")).astype(int))
    changed = (np.abs(figures[0] - figures[1]).max(axis=-1) > 3)[:460]
    assert changed[270:380, 260:540].mean() > 0.95      # the mask, and next to nothing else
    assert changed.sum() < 1.1 * 160 * 320


def test_ones_own_vocabulary(checkpoint, photo, monkeypatch, tmp_path):
    """Names in any capitals are seen or novel as the training was; rules are the detector's."""
    asked = {}
    monkeypatch.setattr(FViT, "detect", lambda self, images, rules: asked.update(
        classes=self.classes, seen=self.seen, rules=rules) or [Detections(
            torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), None)])
    run(checkpoint, photo(), classes=" red kite, Disc ,", least=0.2, b=0.5)
    assert asked["classes"] == ["red kite", "Disc"] and asked["seen"] == [False, True]
    assert (asked["rules"].least, asked["rules"].b, asked["rules"].a) == (0.2, 0.5, 0.1)
    (tmp_path / "names.txt").write_text("kite\nbox\n")
    run(checkpoint, photo(), classes=tmp_path / "names.txt")
    assert asked["classes"] == ["kite", "box"]


def test_a_random_detector_on_photographs_of_any_shape(checkpoint, photo, tmp_path):
    """Detections lie in the photograph; a folder goes on after a broken file, and its figures are
    no photographs."""
    photo("wide.png", (33, 120)), photo("tall.png", (150, 40))
    (tmp_path / "broken.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(SystemExit, match="broken.png can't be read as an image"):
            run(checkpoint, tmp_path, json="true", least=0, most=8)
    figures = sorted(path.name for path in tmp_path.glob("*.detection.png"))
    assert figures == ["tall.detection.png", "wide.detection.png"]
    for result in json.loads((tmp_path / "wide.detection.json").read_text()):
        x, y, width, height = result["bbox"]
        assert x >= 0 and y >= 0 and x + width <= 120.01 and y + height <= 33.01


def test_names_cover_no_others_and_stay_inside():
    """Six objects one upon the other, at the photograph's edge too."""
    boxes = torch.tensor([[10.0 + 2 * n, 200 + 2 * n, 300, 400] for n in range(4)]
                         + [[0, 0, 30, 30], [610, 440, 640, 480]])
    found = Detections(boxes, torch.linspace(0.9, 0.4, 6), torch.zeros(6, dtype=torch.long), None)
    figure = plt.figure(figsize=(detect.INCHES, detect.INCHES * 0.75))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(np.zeros((480, 640, 3)), extent=(0, 640, 480, 0))
    detect.write_names(axis, found, ["a thing"], {0: PALETTE[0]})
    figure.canvas.draw()
    chips = [text.get_bbox_patch().get_window_extent() for text in axis.texts]
    assert len(chips) == 6
    for number, chip in enumerate(chips):
        assert chip.x0 > -5 and chip.y0 > -5
        assert chip.x1 < figure.bbox.x1 + 5 and chip.y1 < figure.bbox.y1 + 5
        for other in chips[:number]:
            across = min(chip.x1, other.x1) - max(chip.x0, other.x0)
            along = min(chip.y1, other.y1) - max(chip.y0, other.y0)
            assert across < 3 or along < 3
    plt.close(figure)


def test_a_failure_of_one_photograph_is_its_own(checkpoint, photo, finds, tmp_path, monkeypatch):
    """And one of a name that is no text, or too long for a suffix, is done."""
    photo("a.png"), photo("b.png"), photo(f"{'n' * 250}.png")
    os.rename(tmp_path / "b.png", os.fsencode(tmp_path) + b"/b\xff.png")
    finds()
    draw = detect.draw
    monkeypatch.setattr(detect, "draw", lambda photo, *more: draw(photo, *more) if "a.detection" not
                        in more[-1] else json.loads("no figure"))
    with pytest.raises(SystemExit, match="a.png failed"):
        run(checkpoint, tmp_path, json="true")
    assert [len([*tmp_path.glob(f"*.detection.{kind}")]) for kind in ("png", "json")] == [2, 2]


@pytest.mark.parametrize("given, words", [
    ({"a": 0, "b": 0, "temperature": 50}, "TEMPERATURE is of the VLM's scores"),
    ({"cache": "x"}, "CACHE keeps embeddings of new names, but"),
    ({"classes": "disc", "b": 0.5}, "B is of novel classes, and none is"),
    ({"classes": "kite", "a": 0.5}, "A is of seen classes, and none is")])
def test_an_option_without_effect_is_refused(checkpoint, photo, given, words):
    with pytest.raises(SystemExit, match=words):
        run(checkpoint, photo(), **given)


@pytest.mark.parametrize("photos, given, words", [
    (["nothing.jpg"], {}, "There is no photograph nothing.jpg"),
    (["README.md"], {}, "README.md can't be read as an image"),
    (["README.md"], {"classes": "cat, dog, Cat"}, "CLASSES names 'cat' twice"),
    (["README.md"], {"classes": "no.txt"}, "There is no class file no.txt"),
    (["README.md"], {"least": 2}, "LEAST is 2.0"), (["README.md"], {"most": 0}, "MOST is 0"),
    (["README.md"], {"ckpt": "no.safetensors"}, "There is no weights file no.safetensors")])
def test_bad_input_is_one_sentence(checkpoint, photos, given, words):
    with pytest.raises(SystemExit) as error:
        run(given.pop("ckpt", checkpoint), *photos, **given)
    assert words in str(error.value) and "\n" not in str(error.value)
