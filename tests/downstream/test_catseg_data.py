"""CAT-Seg's data: the six sets as they are downloaded, augmentation, bad files."""

import colorsys
import random
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
from PIL import Image

from data import read_classes
from downstream.catseg import data
from downstream.catseg.data import BENCHMARKS, LabelledImages, find_evaluation
from util.labels import VOID, MissingData

# An image of 4 x 6: value and class of its first pixels, the rest is void.
VALUES = {
    "ade847": {2977: 0, 1310: 1, 3055: 2, 0: VOID, 2000: VOID},
    "context459": {1: 0, 258: 257, 459: 458, 0: VOID, 460: VOID},
    "ade150": {1: 0, 150: 149, 0: VOID},
    "context59": {1: 0, 59: 58, 0: VOID},
    "voc20": {1: 0, 20: 19, 0: VOID, 255: VOID},
    "voc20b": {0: 0, 1: 1, 20: 20, 255: VOID},
}
FILES = {       # image, label
    "ade847": ("ADE20K_2021_17_01/images/ADE/validation/urban/street/ADE_val_00000001.jpg",
               "ADE20K_2021_17_01/images/ADE/validation/urban/street/ADE_val_00000001_seg.png"),
    "context459": ("VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg",
                   "VOCdevkit/VOC2010/trainval/2008_000002.mat"),
    "ade150": ("ADEChallengeData2016/images/validation/ADE_val_00000001.jpg",
               "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"),
    "context59": ("VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg",
                  "VOCdevkit/VOC2010/SegmentationClassContext/2008_000002.png"),
    "voc20": ("VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg",
              "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png"),
}
FILES["voc20b"] = FILES["voc20"]
LISTS = {"context459": "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt",
         "voc20": "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"}
LISTS |= {"context59": LISTS["context459"], "voc20b": LISTS["voc20"]}


@pytest.fixture(autouse=True)
def few(monkeypatch) -> None:
    """A-847 of the four classes that `write` lists."""
    monkeypatch.setattr(data, "ADE_CLASSES", 4)


def write(root, name: str, label: np.ndarray | None = None) -> np.ndarray:
    """A set of one image in its original layout, with its table -> its label values (H, W)."""
    if label is None:
        label = np.full((4, 6), [*VALUES[name]][-1])
        label.ravel()[:len(VALUES[name])] = [*VALUES[name]]
    image, place = (root / path for path in FILES[name])
    for path in (image, place):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", label.shape[::-1], (90, 120, 30)).save(image)
    if name == "ade847":
        rgb = np.stack([label // 256 * 10 + 3, label % 256, label * 0 + 7], axis=-1)
        Image.fromarray(rgb.astype(np.uint8)).save(place)
        (root / "ADE20K_2021_17_01/ade847.txt").write_text(
            "2977 wall\n1310 building, edifice\n3055 screen, silver screen\n1551 screen\n")
    elif name == "context459":
        scipy.io.savemat(place, {"LabelMap": label.astype(np.uint16)})
        (root / "VOCdevkit/VOC2010/labels.txt").write_text(
            "".join(f"{number}: thing {number}\n" for number in range(1, 460)))
    else:
        Image.fromarray(label.astype(np.uint8)).save(place)
    if name in LISTS:
        (root / LISTS[name]).parent.mkdir(parents=True, exist_ok=True)
        (root / LISTS[name]).write_text(image.stem + "\n")
    return label


@pytest.mark.parametrize("name", BENCHMARKS)
def test_sets_in_their_original_layouts(name, tmp_path):
    label = write(tmp_path, name)
    images, classes = find_evaluation(name, tmp_path)
    (image, found), = images
    assert image.shape == (3, 4, 6) and len(images) == 1
    assert found.tolist() == np.vectorize(VALUES[name].get)(label).tolist()
    assert len(classes) == {"ade847": 4, "context459": 459, "ade150": 150, "context59": 59,
                            "voc20": 20, "voc20b": 21}[name]
    if name != "voc20b":        # the first name of each class alone
        assert classes.names == classes.prompts and "," not in "".join(classes.names)


def test_classes_of_ade_may_share_their_first_name(tmp_path):
    write(tmp_path, "ade847")
    assert find_evaluation("ade847", tmp_path)[1].names == ["wall", "building", "screen", "screen"]


def test_background_of_pas_20b_is_the_39_other_names_of_pc_59(tmp_path):
    write(tmp_path, "voc20b")
    _, classes = find_evaluation("voc20b", tmp_path)
    background = classes.prompts[:39]
    assert classes.class_of_prompt[:40] == 39 * [0] + [1] and classes.names[0] == "background"
    assert {"sky", "wood", "bag"} < {*background} and not {"sofa", "table", "tv monitor"} & {
        *background}
    assert classes.prompts[39:] == read_classes("classes/voc20.txt").names
    assert classes.class_of_prompt[39:] == [*range(1, 21)]


def test_large_images_of_ade_are_reduced(tmp_path):
    """The shorter side to 512 where both are longer; labels are taken, never mixed."""
    label = np.zeros((600, 900), int)
    label[:, 450:] = 2977
    for shape, expected in (((600, 900), (512, 768)), ((512, 900), (512, 900))):
        write(tmp_path, "ade847", label[:shape[0]])
        image, found = find_evaluation("ade847", tmp_path)[0][0]
        assert found.shape == expected == image.shape[1:] and image.dtype == torch.uint8
        assert (found[:, :expected[1] // 2] == VOID).all() and (found[:, expected[1] // 2:] == 0
                                                                ).all()


# --------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("name, value, sentence", [
    ("ade847", 3689, r"values that are no class and not void \(3689\)"),
    ("context459", 461, r"values that are no class and not void \(461\)"),
    ("ade150", 151, r"values that are no class and not void \(151\)"),
    ("voc20b", 21, r"values that are no class and not void \(21\)")])
def test_label_values_beyond_the_table(tmp_path, name, value, sentence):
    write(tmp_path, name, np.full((4, 6), value))
    with pytest.raises(ValueError, match=sentence):
        find_evaluation(name, tmp_path)[0][0]


@pytest.mark.parametrize("name, table, origin", [
    ("ade847", "ADE20K_2021_17_01/ade847.txt", "docs/data.md makes it from a list"),
    ("context459", "VOCdevkit/VOC2010/labels.txt", "PASCAL-Context's page has it")])
def test_a_missing_table_says_where_it_comes_from(tmp_path, name, table, origin):
    write(tmp_path, name)
    (tmp_path / table).unlink()
    with pytest.raises(MissingData, match=f"no label table {tmp_path / table}; .*{origin}"):
        find_evaluation(name, tmp_path)


@pytest.mark.parametrize("text, sentence", [
    ("wall\n", "line 1, is 'wall'; it must be a label value from 1 to 3688, and a name"),
    ("12 wall\n9999 sky\n", "line 2, is '9999 sky'"), ("0 void\n", "line 1, is '0 void'"),
    ("1 a\n1 b\n", "names label value 1 twice"), ("\n", "names no class"),
    ("\x00\xff", "line 1, is"), ("1" + " " * 20_000 + "\n", "line 1, is '1'"),
    ("9" * 5000 + ": a\n", "line 1, is")])
def test_tables_of_another_form(tmp_path, text, sentence):
    write(tmp_path, "ade847")
    (tmp_path / "ADE20K_2021_17_01/ade847.txt").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError) as error:
        find_evaluation("ade847", tmp_path)
    assert sentence in str(error.value)


def test_the_table_of_pascal_context_may_name_what_is_no_class(tmp_path):
    """0 and 460, which are void."""
    write(tmp_path, "context459")
    table = tmp_path / "VOCdevkit/VOC2010/labels.txt"
    table.write_text(f"0: empty\n{table.read_text()}460: unknown\n")
    images, classes = find_evaluation("context459", tmp_path)
    assert len(classes) == 459 and classes.names[0] == "thing 1" and images[0][1].max() == 458


def test_labels_that_are_void_throughout_are_refused_before_a_model_is_loaded(tmp_path):
    for values in ([[0, 255]], [[65, 255]]):
        coco(tmp_path, np.array(values))
        dataset = LabelledImages(data.find_training("coco_stuff", tmp_path)[0])
        if values == [[0, 255]]:
            dataset.look()
    with pytest.raises(ValueError, match="labels of the first 1 of 1 images, such as .* are void"):
        dataset.look()


@pytest.mark.parametrize("content, sentence", [
    ({"LabelMap": np.zeros((4, 6, 3))}, "has a LabelMap of 4 x 6 x 3"),
    ({"LabelMap": np.full((4, 6), 1.5)}, "must be a class number for each pixel"),
    ({"LabelMap": np.full((4, 6), -1)}, "must be a class number"),
    ({"LabelMap": np.array(["a"], dtype=object)}, "must be a class number"),
    ({"Other": np.zeros((4, 6))}, "has no LabelMap"), (b"no mat", "can't be read as a label image"),
    (None, "can't be read as a label image|There is no")])
def test_mat_files_that_are_no_label_maps(tmp_path, content, sentence):
    write(tmp_path, "context459")
    path = tmp_path / FILES["context459"][1]
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        scipy.io.savemat(path, content)
    with pytest.raises(ValueError, match=sentence):
        find_evaluation("context459", tmp_path)[0][0]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("compressed", [False, True])
def test_mat_files_of_any_numbers(tmp_path, kind, compressed):
    """As scipy, and so MATLAB, writes them: small numbers may be stored as another type."""
    for most in (3, 250):
        label = np.random.default_rng(0).integers(0, most, (5, 7))
        names = np.array(["a", "bc"], dtype=object)
        scipy.io.savemat(tmp_path / "x.mat", {"names": names, "LabelMap": label.astype(kind)},
                         do_compression=compressed)
        assert np.array_equal(data.read_mat(tmp_path / "x.mat"), label)


@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_mat_files_neither_end_the_process_nor_hang(tmp_path, compressed):
    """Bits that flip, ends that are missing: an error of Python's, or some label."""
    label = np.arange(24, dtype=np.uint16).reshape(4, 6)
    scipy.io.savemat(tmp_path / "x.mat", {"LabelMap": label}, do_compression=compressed)
    whole = (tmp_path / "x.mat").read_bytes()[120:]
    for place in range(0, 8 * len(whole), 17):
        mutant = bytearray(whole)
        mutant[place // 8] ^= 1 << place % 8
        for content in (mutant, whole[:place // 8]):
            (tmp_path / "x.mat").write_bytes(bytes(120) + content)
            with suppress(ValueError, LookupError, TypeError, struct.error, zlib.error):
                found = data.read_mat(tmp_path / "x.mat")
                assert found.dtype == np.uint16
                assert not compressed or found.tolist() == label.tolist()       # by a checksum


def test_a_label_map_without_colours_is_not_ades(tmp_path):
    write(tmp_path, "ade847")
    Image.new("L", (6, 4)).save(tmp_path / FILES["ade847"][1])
    with pytest.raises(ValueError, match="is an image of mode L, but ADE20K's labels are colours"):
        find_evaluation("ade847", tmp_path)[0][0]


# --------------------------------------------------------------------------- images to train with

def coco(root, values: np.ndarray, mode: type = np.uint8) -> None:
    """A COCO-Stuff train set of one image."""
    for folder in ("train2017", "stuffthingmaps/train2017"):
        (root / "coco" / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", values.shape[::-1]).save(root / "coco/train2017/000000000009.jpg")
    Image.fromarray(values.astype(mode)).save(
        root / "coco/stuffthingmaps/train2017/000000000009.png")


def test_coco_stuff_as_it_is_downloaded(tmp_path):
    """The PNGs have a class's id less one: person 0, mirror (66, without a class) 65, wood 181."""
    values = np.array([[0, 181, 255, 65]])
    for mode in (np.uint8, np.uint16):      # PNGs of 16 bits are read as well
        coco(tmp_path, values, mode)
        scenes, names = data.find_training("coco_stuff", tmp_path)
        image, label = LabelledImages(scenes).read(0)
        assert image.shape == (3, 1, 4) and label.tolist() == [[0, 170, VOID, VOID]]
    assert len(names) == 171 and names[0] == "person" and "," not in "".join(names)


@pytest.mark.parametrize("value, mode", [(182, np.uint8), (300, np.uint16)])
def test_training_labels_beyond_the_classes(tmp_path, value, mode):
    coco(tmp_path, np.full((2, 2), value), mode)
    with pytest.raises(ValueError, match=f"no class and not void \\({value}\\)"):
        LabelledImages(data.find_training("coco_stuff", tmp_path)[0]).read(0)


def test_damaged_labels_are_a_sentence(tmp_path):
    coco(tmp_path, np.random.default_rng(0).integers(0, 11, (64, 64)))
    path = tmp_path / "coco/stuffthingmaps/train2017/000000000009.png"
    content = bytearray(path.read_bytes())
    scenes, _ = data.find_training("coco_stuff", tmp_path)
    for damaged in (content[:200], content[:60] + bytes(50) + content[110:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="can't be read as a label image"):
            LabelledImages(scenes).read(0)


def test_unknown_training_images():
    with pytest.raises(ValueError, match="are no training images 'coco'; choose coco_stuff"):
        data.find_training("coco", "data")


# ----------------------------------------------------------------------------------- augmentation

def scene(height: int, width: int) -> data.Labelled:
    """An image whose red and green tell a pixel's row and column, and so does its label."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([255 * y / height, 255 * x / width, 0 * x]).round().byte()
    return data.Labelled(image, (y * width + x).short())


@pytest.mark.parametrize("height, width", [(40, 60), (90, 30), (32, 32), (20, 25)])
def test_labels_stay_with_their_pixels(monkeypatch, height, width):
    """Whatever the crop and the flip, a pixel's label is that of its place in the image."""
    monkeypatch.setattr(data, "jitter", lambda image, rng: image)
    sample, seen = scene(height, width), set()
    for key in map(str, range(12)):
        image, label = data.augment(sample, 32, key)
        assert image.shape == (3, 32, 32) and label.shape == (32, 32) and label.dtype == torch.long
        inside = (slice(2, -2), slice(2, -2))       # borders have no neighbours to mix
        assert (image[0] - (label // width) / height)[inside].abs().max() < 1.7 / height
        assert (image[1] - (label % width) / width)[inside].abs().max() < 1.7 / width
        seen.add((bool(label[0, 0] > label[0, -1]), label.min().item()))
    assert len({flipped for flipped, _ in seen}) == 2
    assert height == width or len({corner for _, corner in seen}) > 2


@pytest.mark.parametrize("size, side, seen", [
    ((90, 140), 32, (32, 50)), ((61, 40), 32, (49, 32)), ((20, 200), 384, (133, 1333)),
    ((2, 1600), 8, (2, 1333)), ((64, 65), 32, (32, 33))])
def test_views_are_those_of_pil_and_torch(monkeypatch, size, side, seen):
    """As detectron2 resizes: images by PIL, labels by torch's nearest, halves up, 1333 at most."""
    monkeypatch.setattr(data, "jitter", lambda image, rng: image)
    sample = scene(*size)
    image = torch.from_numpy(np.array(Image.fromarray(sample.image.permute(1, 2, 0).numpy()).resize(
        seen[::-1], Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    label = F.interpolate(sample.label[None, None].double(), seen)[0, 0]
    h, w = min(side, seen[0]), min(side, seen[1])
    for key in map(str, range(4)):
        found = data.augment(sample, side, key)
        inside = found.label != VOID
        shown, picture = found.label[inside].view(h, w), found.image[:, inside].view(3, h, w)
        if shown[0, 0] > shown[0, -1]:
            shown, picture = shown.flip(1), picture.flip(2)
        places = [(slice(top, top + h), slice(left, left + w))
                  for top, left in (label == shown[0, 0]).nonzero().tolist()]
        there, = [place for place in places if torch.equal(label[place].long(), shown)]
        assert (image[(slice(None), *there)] - picture).abs().max() < 1.01 / 255


def test_views_are_functions_of_their_keys():
    sample = scene(40, 60)
    first, again, other = (data.augment(sample, 32, key) for key in "aab")
    assert torch.equal(first.image, again.image) and torch.equal(first.label, again.label)
    assert not torch.equal(first.image, other.image)


def test_what_a_strip_lacks_is_grey_and_void(monkeypatch):
    """Its longer side may have 1333."""
    monkeypatch.setattr(data, "jitter", lambda image, rng: image)
    image, label = data.augment(scene(2, 1600), 8, "a")
    void = label == VOID
    assert void.float().mean() == 0.75 and (image[:, void] == 128 / 255).all()
    assert (label[~void] >= 0).all()


def test_saturation_is_that_of_hsv():
    image = torch.rand(3, 5, 5)
    for factor in (0.5, 1.4):
        found = data.saturate(image, factor)
        for pixel, changed in zip(image.flatten(1).T.tolist(), found.flatten(1).T.tolist()):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            assert changed == pytest.approx(colorsys.hsv_to_rgb(h, min(1, s * factor), v), abs=1e-5)
    assert torch.equal(data.saturate(torch.zeros(3, 2, 2), 1.5), torch.zeros(3, 2, 2))


def test_jitter_changes_half_of_what_it_can():
    """Brightness by up to 32, contrast and saturation by up to half, hue by up to a tenth turn."""
    grey, colour = torch.full((3, 1, 1), 0.4), torch.tensor([0.6, 0.4, 0.4]).view(3, 1, 1)
    greys = torch.stack([data.jitter(grey, random.Random(key)) for key in range(400)])[:, 0, 0, 0]
    assert 0.15 < (greys == 0.4).float().mean() < 0.35      # neither brightness nor contrast
    assert 0.13 < greys.min() < 0.2 and 0.7 < greys.max() < 0.8
    hues = [colorsys.rgb_to_hsv(*data.jitter(colour, random.Random(key)).flatten().tolist())[0]
            for key in range(400)]
    hues = np.array([hue - (hue > 0.5) for hue in hues])
    assert 0.4 < (abs(hues) < 1e-4).mean() < 0.6 and 0.09 < abs(hues).max() < 0.101


def test_a_list_that_lost_classes_is_refused(tmp_path, monkeypatch):
    """As one that was made line by line does, whose entries may run over two: 830 of 847."""
    write(tmp_path, "ade847")
    monkeypatch.setattr(data, "ADE_CLASSES", 847)
    with pytest.raises(ValueError, match="names 4 classes, but A-847 has 847; make it as docs"):
        find_evaluation("ade847", tmp_path)
