"""segment.py: classes as a person types them, shares that are the prediction's, photographs of any
shape, bad input."""

import errno
import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from conftest import options
from matplotlib import font_manager
from matplotlib.colors import to_rgba_array
from PIL import Image
from tiny import ROOT

from data import make_classes
from downstream.catseg import eval as catseg_eval
from downstream.catseg.model import CATSeg, Design
from model import DeCLIP
from tools import figures, segment
from toy.world import NAMES, draw_scene
from util.images import list_images, read_image
from util.labels import SegmentationBenchmark, SegmentationImages, read_label
from util.samples import ImageShards

TOY = {"model": f"local-dir:{ROOT / 'toy/clip'}", "templates": "a photo of a {}.", "largest": 300}
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
    run(path, classes=EVERYTHING, json="true", scale=0.7, short_side=128, window=128)
    found, = json.loads((tmp_path / "scene.segmentation.json").read_text()).values()
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    truth = np.bincount(np.array(scene.classes)[scene.regions].ravel(),
                        minlength=len(NAMES)) / scene.regions.size
    for name, share in zip(NAMES, truth):
        if share > 0.15:
            assert abs(found.get(name, 0) - share) < 0.5 * share, name


def test_programs_do_without_the_figure(photo, tmp_path):
    """The same labels and numbers, and nothing else; an option that has no effect is refused."""
    path, _ = photo()
    given = {"classes": "stripes, star", "labels": "true", "json": "true"}
    run(path, **given, out=tmp_path / "drawn")
    given |= {"model": TOY["model"], "templates": TOY["templates"], "figure": "false"}
    segment.main([str(path), *options(**given, out=tmp_path / "plain")])
    drawn, plain = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
                    for name in ("drawn", "plain"))
    assert drawn.keys() - plain.keys() == {"scene.segmentation.png"}
    assert plain == {name: drawn[name] for name in plain}
    for wrong, words in (({}, "FIGURE is False; it must be true unless JSON or LABELS"),
                         ({"labels": "true", "largest": 200}, "LARGEST is of a figure"),
                         ({"labels": "true", "attention": "clip"}, "ATTENTION is shown in the")):
        with pytest.raises(SystemExit, match=words):
            segment.main([str(path), *options(classes="star", figure="false", **wrong)])


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
    assert list(panels) == ["DeCLIP (toy/clip, context q)", "CLIP (toy/clip)"]
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


def test_photographs_of_one_name_of_several_folders(photo, tmp_path):
    """Nor do capitals, cut names and photographs themselves cost one its figure."""
    for folder in ("one", "two", "Two", "three"):
        (tmp_path / folder).mkdir()
        photo(1, f"{folder}/a.png")
    photo(1, "one/A.PNG"), photo(1, "one/a.segmentation.png")
    photo(1, f"one/{'ä' * 120}1.png"), photo(1, f"one/{'ä' * 120}2.png")
    asked = [*(str(tmp_path / name) for name in ("one", "two", "Two", "three")),
             str(tmp_path / "one/a.segmentation.png")]
    for out in (None, str(tmp_path / "out")):
        figures = segment.find_photos(asked, out)
        assert len(figures) == 8
        drawn = {str(path).casefold() for path in figures.values()}
        assert len(drawn) == 8 and drawn.isdisjoint(str(path).casefold() for path in figures)
        assert all(len(os.fsencode(path.name)) < 255 for path in figures.values())
        assert segment.find_photos(asked, out) == figures
    assert figures[tmp_path / "three/a.png"].name == "three-a.png.segmentation.png"


def test_what_the_tools_draw_is_no_photograph(photo, tmp_path, capsys):
    """By one rule, for folders and shards and benchmarks; what is named one by one is read."""
    path, _ = photo()
    for name in ("scene.labels.png", "scene.detection.png", "attention.png", "my attention.png"):
        photo(2, name)
    paths, left_out = list_images(tmp_path)
    assert [Path(file).name for file in paths] == ["my attention.png", "scene.png"]
    assert left_out == {".labels.png": 1, ".detection.png": 1, "/attention.png": 1}
    assert [*segment.find_photos([str(tmp_path / "scene.labels.png")])]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for file in tmp_path.glob("*.png"):
            tar.add(file, file.name)
    shards = ImageShards(str(tmp_path / "x.tar"))
    assert len(shards) == 2 and shards.others == left_out
    given = {"folder": str(tmp_path), "names": "*", "label": "{}.png", "classes": "",
             "values": range(99)}
    assert SegmentationImages(SegmentationBenchmark(image="{}.png", **given), "").names == [
        "my attention", "scene"]
    assert SegmentationImages(SegmentationBenchmark(image="{}.labels.png", **given), "").names == [
        "scene"]
    assert f"left out of {tmp_path}: 3 images that our tools drew" in capsys.readouterr().out
    segment.find_photos([str(tmp_path)])
    assert f"left out of {tmp_path}: 1 .labels.png" in capsys.readouterr().out.replace(
        "1 .detection.png, ", "")


def test_a_failure_of_one_photograph_is_its_own(photo, tmp_path, monkeypatch):
    """Reading, drawing, writing: others are done, it is named, and the status is not 0; a name that
    is no text, or too long for a suffix, is none. A full disk ends the run."""
    for name in ("a.png", "b.png", "c.png", f"{'n' * 250}.png"):
        photo(1, name, size=64)
    os.rename(tmp_path / "c.png", os.fsencode(tmp_path) + b"/c\xff.png")
    draw = figures.draw

    def fail(photo, panels, classes, name, *more):
        if name == "a.png":
            raise error
        draw(photo, panels, classes, name, *more)

    monkeypatch.setattr(figures, "draw", fail)
    error = ValueError("of this photograph")
    with pytest.raises(SystemExit, match=r"a.png failed \(of this photograph\)"):
        run(tmp_path, classes="star, dots")
    assert len([*tmp_path.glob("*.segmentation.png")]) == 3
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(SystemExit, match="No space left on device; make room"):
        run(tmp_path, classes="star, dots", out=tmp_path / "out")
    assert not [*tmp_path.glob("out/*.png")]


def test_labels_of_ones_own_are_not_replaced(photo, tmp_path):
    path, _ = photo(size=64)
    (tmp_path / "scene.labels.png").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="scene.labels.png is there and not of this tool"):
        run(path, classes="star, dots", labels="true")
    assert (tmp_path / "scene.labels.png").read_bytes() == b"mine"


@pytest.mark.parametrize("names", ["background, cat", "dog | Background"])
def test_background_is_one_class(names):
    cfg = SimpleNamespace(CLASSES=names, BACKGROUND=True, THRESHOLD=None, LOGIT_SCALE=None)
    with pytest.raises(ValueError, match="CLASSES names background, which is the class that"):
        segment.find_classes(cfg)
    cfg.BACKGROUND = False
    assert len(segment.find_classes(cfg)) == names.count(",") + 1


def test_background_is_not_what_was_asked_for():
    """Grass is among the background's names; who asks for it gets it."""
    cfg = segment.settings.parse(["x", "--classes", "dog, meadow | Grass", "--background"], segment,
                                 positional="PHOTOS")
    classes = segment.find_classes(cfg)
    assert "grass" not in classes.prompts
    assert classes.class_of_prompt[classes.prompts.index("Grass")] == 2
    assert "sky" in classes.prompts and classes.class_of_prompt[classes.prompts.index("sky")] == 0


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
    x, y, depth = figures.deepest(mask)
    assert mask[int(y), int(x)] and abs(y - (5 + shape[0] // 2) / 2) < 3 and 5 < x < 45
    assert depth == pytest.approx(min(30, shape[0] // 2 - 5) / 2, abs=2)


def lab(colours: np.ndarray) -> np.ndarray:
    """Linear RGB (..., 3) -> CIELAB, white D65."""
    xyz = colours @ np.array([[0.4124564, 0.2126729, 0.0193339], [0.3575761, 0.7151522, 0.1191920],
                              [0.1804375, 0.0721750, 0.9503041]])
    x, y, z = np.moveaxis(xyz / [0.95047, 1, 1.08883], -1, 0)
    x, y, z = (np.where(v > 0.008856, np.cbrt(v), 7.787 * v + 16 / 116) for v in (x, y, z))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


# What eyes without one kind of cone see, in linear RGB (Machado et al. 2009, severity 1).
EYES = {"all cones": np.eye(3),
        "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                       [-0.003882, -0.048116, 1.051998]],
        "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                         [-0.011820, 0.042940, 0.968881]],
        "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                       [0.004733, 0.691367, 0.303900]]}


@pytest.mark.parametrize("eyes, least", [("all cones", 19), ("protanopia", 13),
                                         ("deuteranopia", 13), ("tritanopia", 13)])
def test_colours_differ_as_they_are_drawn(eyes, least):
    """The smallest CIELAB distance of two of the 20 colours over grey, and of one and plain greys,
    which are the background."""
    greys = np.array([0.3, 0.5, 0.7, 0.85])[:, None].repeat(3, axis=1)
    over_grey = figures.OPACITY * to_rgba_array(figures.PALETTE)[:, :3] + (1 - figures.OPACITY) / 2
    shown = np.concatenate([over_grey, greys])
    linear = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    found = lab((linear @ np.transpose(EYES[eyes])).clip(0, 1))
    distance = np.linalg.norm(found[:20, None] - found, axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert len(figures.PALETTE) == 20 and distance.min() > least


def test_labels_are_of_the_photographs_own_size(photo, tmp_path):
    """Pixels are numbers of classes, whose names the json has; LARGEST changes the figure alone."""
    path, _ = photo(crop=(0, 0, 128, 70))
    maps, widths = [], []
    for largest in (200, 400):
        run(path, classes="dots, star, waves", labels="true", json="true", largest=largest)
        with Image.open(tmp_path / "scene.labels.png") as file:
            assert (file.size, file.mode) == ((128, 70), "L")
            maps.append(np.array(file))
        with Image.open(tmp_path / "scene.segmentation.png") as figure:
            widths.append(figure.width)
    assert np.array_equal(*maps) and widths[1] == pytest.approx(2 * widths[0], abs=2)
    names = json.loads((tmp_path / "scene.labels.json").read_text())["names"]
    assert names == ["dots", "star", "waves"]
    for name, share in found_shares(tmp_path).items():
        assert (maps[0] == names.index(name)).mean() == pytest.approx(share, abs=1e-6)
    assert [*segment.find_photos([str(tmp_path)])] == [path]        # what it wrote is no photograph


def test_many_classes_have_16_bits(tmp_path):
    prediction = torch.arange(300).view(10, 30)
    classes = make_classes([f"n{k}" for k in range(300)])
    segment.write_labels(prediction, classes, tmp_path / "a.labels.png")
    assert np.array_equal(read_label(tmp_path / "a.labels.png"), prediction.numpy())
    assert json.loads((tmp_path / "a.labels.json").read_text())["names"][299] == "n299"


@pytest.mark.parametrize("shape", [(60, 90), (90, 40)], ids=["landscape", "portrait"])
@pytest.mark.parametrize("count", [1, 25])
def test_nothing_hangs_over_the_edge_of_a_figure(tmp_path, monkeypatch, shape, count):
    """Titles, pictures and legends lie within the figure, a title close to its upper edge; pictures
    have the size that was asked for."""
    drawn = []
    monkeypatch.setattr(segment.plt, "close", drawn.append)
    classes = make_classes(["background", *(f"some thing {k}" for k in range(count))])
    found = torch.arange(shape[0] * shape[1]).view(shape) % len(classes)
    figures.draw(torch.zeros(3, *shape).byte(), {"DeCLIP (EVA02-B-16, context q)": found}, classes,
                 "a photograph of a very long name, at dusk.jpg", 200, str(tmp_path / "a.png"))
    figure, = drawn
    whole = figure.bbox.bounds
    for axis in figure.axes:
        picture = axis.get_window_extent()
        assert max(picture.width, picture.height) == pytest.approx(200, abs=1)
        boxes = [axis.title.get_window_extent()]
        boxes += [axis.get_legend().get_window_extent()] if axis.get_legend() else []
        for box in boxes:
            assert 0 <= box.x0 and box.x1 <= whole[2] and 0 <= box.y0 and box.y1 <= whole[3]
    tops = [axis.title.get_window_extent().y1 for axis in figure.axes]
    assert whole[3] - max(tops) < 0.15 * figure.dpi
    segment.plt.figure(figure)
    monkeypatch.undo()
    segment.plt.close(figure)


def test_the_background_has_no_tint():
    """Its pixels are the photograph in grey; its legend is neutral, and a colour of no class."""
    classes = make_classes(["background, wall", "cat"])
    colour_of = figures.colours({}, classes)
    assert colour_of == {"background": figures.NEUTRAL, "cat": figures.PALETTE[0]}
    figure, axis = segment.plt.subplots()
    photo = torch.full((3, 8, 8), 102, dtype=torch.uint8)
    found = torch.zeros(8, 8, dtype=torch.long)
    found[:, 4:] = 1
    figures.paint(axis, photo, found, classes, colour_of, 2)
    shown = axis.images[0].get_array()
    assert np.allclose(shown[:, :4], 0.4) and np.ptp(shown[0, 7]) > 0.2
    segment.plt.close(figure)


def test_a_legend_names_what_is_seen():
    """No entry of 0.0 %; of more classes than it has room for, the rest is one entry."""
    classes = make_classes([f"n{k}" for k in range(40)])
    found = torch.zeros(100, 100, dtype=torch.long)
    found[0, :4] = 1        # 0.04 %
    found[1:3, :3] = 2      # 0.06 %
    entries = figures.named(found, classes, figures.colours({"x": found}, classes))
    assert [entry.get_label() for entry in entries] == ["n0  99.9 %", "n2  0.1 %"]
    found = torch.arange(40).repeat_interleave(100).view(40, 100)
    entries = figures.named(found, classes, figures.colours({"x": found}, classes))
    assert len(entries) == 24 and entries[-1].get_label() == "17 more  42.5 %"


@pytest.mark.parametrize("count, most, columns", [(4, 3, 2), (25, 8, 7), (5, 4, 3), (1, 4, 1),
                                                  (9, 4, 3), (24, 4, 4), (7, 2, 2),
                                                  (17, 4, 3)])
def test_no_entry_of_a_legend_is_alone_in_its_row(count, most, columns):
    assert figures.balanced(count, most) == columns


def test_letters_that_no_font_has_are_named(capsys, monkeypatch):
    """Another installed font is taken for letters that the usual one lacks; a sentence names those
    that none has. The last resort, which has boxes for all, does not count."""
    usual = figures.letters_in(font_manager.findfont("DejaVu Sans"))
    other = next(font for font in font_manager.fontManager.ttflist if font.name == "STIXNonUnicode")
    letter = min(figures.letters_in(other.fname) - usual)
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["sans-serif"])
    figures.use_fonts(["cat", letter])
    assert matplotlib.rcParams["font.family"][0] == "sans-serif"
    assert len(matplotlib.rcParams["font.family"]) > 1
    assert "no installed font" not in capsys.readouterr().out
    unassigned = chr(0x378)
    figures.use_fonts([f"cat {unassigned}"])
    assert f"no installed font has the letters {unassigned}," in capsys.readouterr().out
    assert matplotlib.rcParams["font.family"] == ["sans-serif"]


@pytest.mark.parametrize("name, title", [
    ("EVA02-B-16", "EVA02-B-16"), ("local-dir:/a/b/toy/clip", "toy/clip"),
    ("vit_base_patch14_dinov2.lvd142m", "DINOv2 ViT-B/14"),
    ("vit_large_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-L/14"),
    ("vit_base_patch16_224.dino", "DINO ViT-B/16"),
    ("samvit_base_patch16.sa1b", "samvit_base_patch16")])
def test_names_of_models_are_readable(name, title):
    assert segment.readable(name) == title


def test_data_are_checked_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(segment, "open_model", None)
    with pytest.raises(SystemExit, match="README.md can't be read"):
        run("README.md", classes="cat")


def test_colours_stay_with_their_classes():
    classes = make_classes(["a", "b", "c"])
    one, other = torch.zeros(4, 4, dtype=torch.long), torch.full((4, 4), 2)
    assert figures.colours({"x": one}, classes) == figures.colours({"x": other}, classes)
    many = make_classes([f"n{k}" for k in range(100)])
    few = torch.arange(20).view(4, 5) * 5
    # of many classes, those that occur differ
    assert len(set(figures.colours({"x": few}, many).values())) == 20


@pytest.mark.parametrize("photos, given, words", [
    (["nothing.jpg"], {"classes": "cat"}, "There is no photograph nothing.jpg"),
    (["README.md"], {"classes": "cat"}, "README.md can't be read as an image"),
    (["presets"], {"classes": "cat"}, "presets holds no image"),
    (["README.md"], {}, "CLASSES names no class"),
    (["README.md"], {"classes": " , |"}, "CLASSES names no class"),
    (["README.md"], {"classes": "cat, dog, cat"}, "names 'cat' twice"),
    (["README.md"], {"classes": "cat, dog | Cat"}, "names 'cat' twice"),
    (["README.md"], {"classes": "cat", "threshold": 0.5}, "THRESHOLD is for --background"),
    (["README.md"], {"classes": "cat", "logit_scale": 9}, "LOGIT_SCALE makes the probability"),
    (["README.md"], {"classes": "cat", "background": 1, "logit_scale": 9}, "give --background and"),
    (["toy/demo.png"], {"classes": "cat", "window": 30, "stride": 30}, "WINDOW 30 is no multiple"),
    (["toy/demo.png"], {"classes": "cat", "attention": "mean"}, "ATTENTION is 'mean'"),
    (["toy/demo.png"], {"classes": "a" * 80}, "is longer than the 32 tokens that"),
    (["README.md"], {"classes": "cat", "largest": -1}, "LARGEST is -1"),
    (["README.md"], {"classes": "cat", "largest": 0}, "LARGEST is 0"),
    (["README.md"], {"classes": "cat", "short_side": 0}, "SHORT_SIDE is 0"),
    (["README.md"], {"classes": "cat", "window": 128, "stride": 200}, "STRIDE is 200")])
def test_bad_input_is_one_sentence(photos, given, words):
    with pytest.raises(SystemExit) as error:
        run(*photos, **given)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.cpu
def test_a_segmenter_is_used_like_any_checkpoint(photo, tmp_path):
    """CAT-Seg's own windows and names; with ATTENTION beside the CLIP that it was made from."""
    segmenter = CATSeg(DeCLIP(TOY["model"], "own"), Design(32, width=16))
    segmenter.save(tmp_path / "catseg.safetensors")
    path, _ = photo(size=64)
    given = {"classes": "star, dots | spots, noise", "json": "true"}
    run(path, **given, attention="clip")
    plain = json.loads((tmp_path / "scene.segmentation.json").read_text())
    run(path, **given, attention="clip", ckpt=tmp_path / "catseg.safetensors")
    panels = json.loads((tmp_path / "scene.segmentation.json").read_text())
    assert [*panels][0] == "CAT-Seg (toy/clip)" and [*panels.values()][1] == [*plain.values()][1]
    classes = make_classes(["star", "dots, spots", "noise"])
    segmenter.eval()
    found, = catseg_eval.predict(catseg_eval.Protocol.of(segmenter), segmenter, classes,
                                 catseg_eval.encode(segmenter, classes), [read_image(path)])
    assert panels["CAT-Seg (toy/clip)"] == figures.shares(found, classes)
    file = ["--ckpt", str(tmp_path / "catseg.safetensors")]
    with pytest.raises(SystemExit, match="is longer than the 32 tokens"):
        segment.main([str(path), "--classes", "a " * 50, *file])
    for option in ("threshold 0.5 --background", "pamr 10", "templates simple", "window 64",
                   "stride 8", "short_side 64", "long_side 64", "scale 1", "context qk",
                   "model ViT-B-16", "pretrained openai", "attention clip --scale 1"):
        name = option.split(" --")[-1 if "attention" in option else 0].split()[0].upper()
        with pytest.raises(SystemExit, match=f"{name} .* a CAT-Seg.*, so it has no effect; leave"):
            segment.main([str(path), "--classes", "star", *file, *f"--{option}".split()])
