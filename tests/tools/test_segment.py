"""segment.py: classes as a person types them, shares that are the prediction's, photographs of any
shape, bad input."""

import json

import numpy as np
import pytest
import torch
from conftest import options
from PIL import Image
from tiny import ROOT

from data import make_classes
from model import DeCLIP
from tools import segment
from toy.world import NAMES, draw_scene

TOY = {"model": f"local-dir:{ROOT / 'toy/clip'}", "templates": "a photo of a {}.",
       "short_side": 128, "window": 128, "stride": 64}
EVERYTHING = ", ".join(NAMES)


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy CLIP's tokenizer is named as seen from the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def photo(tmp_path):
    """Draws a scene as a file -> (path, scene)."""
    def write(number: int = 1, name: str = "scene.png", size: int = 128, crop: tuple = ()) -> tuple:
        scene = draw_scene(number, size)
        image = Image.fromarray(scene.image)
        (image.crop(crop) if crop else image).save(tmp_path / name)
        return tmp_path / name, scene
    return write


def run(*photos, **given) -> None:
    segment.main([*map(str, photos), *options(**TOY | given)])


def found_shares(folder) -> dict[str, float]:
    """The shares of the model's own panel."""
    panels = json.loads((folder / "scene.segmentation.json").read_text())
    return next(iter(panels.values()))


def test_numbers_are_those_of_the_scene(photo, tmp_path):
    """Every class that is well visible in the scene is found; shares sum to one."""
    path, scene = photo()
    run(path, classes=EVERYTHING, json="true", scale=0.7)
    found, = json.loads((tmp_path / "scene.segmentation.json").read_text()).values()
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    truth = np.bincount(np.array(scene.classes)[scene.regions].ravel(),
                        minlength=len(NAMES)) / scene.regions.size
    for name, share in zip(NAMES, truth):
        if share > 0.15:
            assert abs(found.get(name, 0) - share) < 0.5 * share, name


@pytest.mark.parametrize("crop", [(0, 0, 128, 40), (0, 0, 30, 128), (5, 5, 105, 69)],
                         ids=["wide", "tall", "odd"])
def test_photographs_of_any_shape(photo, tmp_path, crop):
    path, _ = photo(crop=crop)
    run(path, classes="stripes, star", attention="clip")
    with Image.open(tmp_path / "scene.segmentation.png") as figure:
        assert min(figure.size) > 100 and figure.format == "PNG"


def test_a_folder_goes_on_after_a_broken_file(photo, tmp_path):
    photo(1, "a.png"), photo(2, "c.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    for _ in range(2):          # the second time there are figures, which are no photographs
        with pytest.raises(SystemExit, match="b.png can't be read as an image"):
            run(tmp_path, classes="star, dots")
        figures = sorted(path.name for path in tmp_path.glob("*.segmentation.png"))
        assert figures == ["a.segmentation.png", "c.segmentation.png"]


def test_attention_adds_a_panel_of_the_clip_that_was_trained(photo, tmp_path):
    """With a checkpoint the second panel is of the CLIP that it was made from, not of the trained
    weights."""
    path, _ = photo()
    given = {"classes": EVERYTHING, "attention": "clip", "json": "true"}
    run(path, **given)
    plain = json.loads((tmp_path / "scene.segmentation.json").read_text())
    trained = DeCLIP(TOY["model"], "own")
    with torch.no_grad():
        for parameter in trained.visual.trunk.blocks.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trained.save(tmp_path / "declip.safetensors")
    run(path, **given, ckpt=tmp_path / "declip.safetensors")
    panels = json.loads((tmp_path / "scene.segmentation.json").read_text())
    assert [title.split(" ")[0] for title in panels] == ["DeCLIP", TOY["model"] + ","]
    (own, clip), (untrained, same_clip) = panels.values(), plain.values()
    assert clip == same_clip and own != untrained


def test_photographs_of_one_name_have_figures_of_their_own(photo, tmp_path):
    photo(1, "a.png"), photo(2, "a.bmp")
    (tmp_path / "more").mkdir()
    photo(3, "more/a.png")
    run(tmp_path, classes="star, dots", out=tmp_path / "out")
    figures = {path.relative_to(tmp_path / "out").as_posix()
               for path in (tmp_path / "out").rglob("*.png")}
    assert figures == {"a.segmentation.png", "a.png.segmentation.png", "more/a.segmentation.png"}


def test_background_is_not_what_was_asked_for():
    """Grass is among the background's names; who asks for it gets it."""
    cfg = segment.settings.parse(["x", "--classes", "dog, meadow | grass", "--background"], segment,
                                 positional="PHOTOS")
    classes = segment.find_classes(cfg)
    assert classes.prompts.count("grass") == 1
    assert classes.owner[classes.prompts.index("grass")] == 2
    assert "sky" in classes.prompts and classes.owner[classes.prompts.index("sky")] == 0


def test_classes_as_they_are_typed(tmp_path):
    cfg = segment.settings.parse(["x", "--classes", " dog | puppy,wooden chair , ,grass"], segment,
                                 positional="PHOTOS")
    classes = segment.find_classes(cfg)
    assert (classes.names, classes.prompts) == (["dog", "wooden chair", "grass"],
                                                ["dog", "puppy", "wooden chair", "grass"])
    cfg.BACKGROUND = True
    assert segment.find_classes(cfg).names == ["background", "dog", "wooden chair", "grass"]
    (tmp_path / "names.txt").write_text("cat, kitten\nsofa\n")
    cfg.CLASSES, cfg.BACKGROUND = str(tmp_path / "names.txt"), False
    assert segment.find_classes(cfg) == make_classes(["cat, kitten", "sofa"])


def test_one_class_and_500(photo, tmp_path):
    """A single class fills the image; of many, those that occur are named."""
    path, _ = photo(size=64)
    run(path, classes="dots", json="true")
    assert list(found_shares(tmp_path)) == ["dots"]
    run(path, classes=", ".join(f"thing {n}" for n in range(500)), window_batch=4)
    assert (tmp_path / "scene.segmentation.png").exists()


def test_threshold_gives_what_is_unsure_to_the_background(photo, tmp_path):
    """The share of the background grows with the threshold, from what is background anyhow."""
    path, _ = photo()
    shares = []
    for threshold in (0, 0.5, 0.9):
        run(path, classes=EVERYTHING, background="true", threshold=threshold, logit_scale=10,
            json="true")
        shares.append(found_shares(tmp_path).get("background", 0))
    assert shares == sorted(shares) and shares[0] < shares[2] - 0.1, shares


@pytest.mark.parametrize("shape", [(60, 60), (40, 90), (300, 50)])
def test_names_stand_inside_their_regions(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[5:shape[0] // 2, 10:40] = True
    x, y, depth = segment.deepest(mask)
    assert mask[int(y), int(x)] and abs(y - (5 + shape[0] // 2) / 2) < 3 and 5 < x < 45
    assert depth == pytest.approx(min(30, shape[0] // 2 - 5) / 2, abs=2)


def test_colours_stay_with_their_classes():
    classes = make_classes(["a", "b", "c"])
    one, other = torch.zeros(4, 4, dtype=torch.long), torch.full((4, 4), 2)
    assert segment.colours({"x": one}, classes) == segment.colours({"x": other}, classes)
    many = make_classes([f"n{k}" for k in range(100)])
    few = torch.arange(20).view(4, 5) * 5
    # of many classes, those that occur differ
    assert len(set(segment.colours({"x": few}, many).values())) == 20


@pytest.mark.parametrize("photos, given, words", [
    (["nothing.jpg"], {"classes": "cat"}, "There is no photograph nothing.jpg"),
    (["README.md"], {"classes": "cat"}, "README.md can't be read as an image"),
    (["presets"], {"classes": "cat"}, "presets holds no image"),
    (["README.md"], {}, "CLASSES names no class"),
    (["README.md"], {"classes": " , |"}, "CLASSES names no class"),
    (["README.md"], {"classes": "cat, dog, cat"}, "names 'cat' twice"),
    (["README.md"], {"classes": "cat, dog | cat"}, "names 'cat' twice"),
    (["README.md"], {"classes": "cat", "threshold": 0.5}, "THRESHOLD is for --background"),
    (["README.md"], {"classes": "cat", "window": 30, "stride": 30}, "WINDOW 30 is no multiple"),
    (["README.md"], {"classes": "cat", "attention": "mean"}, "ATTENTION is 'mean'"),
    (["README.md"], {"classes": "cat", "short_side": 0}, "SHORT_SIDE is 0"),
    (["README.md"], {"classes": "cat", "stride": 200}, "STRIDE is 200")])
def test_bad_input_is_one_sentence(photos, given, words):
    with pytest.raises(SystemExit) as error:
        run(*photos, **given)
    assert words in str(error.value) and "\n" not in str(error.value)
