"""Every segmentation benchmark in its original layout: label values against tables written by hand,
and the script's mIoU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import options
from PIL import Image
from test_eval_seg import OF_CHECKPOINT, WINDOWS, slow_iou, slow_logits

import eval_seg
from data import read_classes
from eval_seg import KNOWN_BENCHMARKS, PAPER_BENCHMARKS, Protocol
from model import DeCLIP
from util.images import read_image
from util.labels import VOID, MissingData, SegmentationImages

# What label values mean, from the data sets' own documentation: the first, the last, and those
# beside a gap. None is void.
MEANING = {
    "voc20": {0: None, 1: "aeroplane", 15: "person", 20: "television monitor", 255: None},
    "voc21": {0: "background", 1: "aeroplane", 15: "person", 20: "television monitor", 255: None},
    "context59": {0: None, 1: "aeroplane", 2: "bag", 58: "window", 59: "wood", 255: None},
    "context60": {0: "background", 1: "aeroplane", 2: "bag", 58: "window", 59: "wood",
                  255: None},
    "ade150": {0: None, 1: "wall", 2: "building", 13: "person", 150: "flag"},
    "cityscapes": {0: None, 4: None, 6: None, 7: "road", 8: "sidewalk", 9: None, 11: "building",
                   12: "wall", 13: "fence",
                   14: None, 17: "pole", 18: None, 19: "traffic light", 20: "traffic sign",
                   23: "sky", 24: "person",
                   26: "car", 28: "bus", 29: None, 30: None, 31: "train", 32: "motorcycle",
                   33: "bicycle", 255: None},
    # A PNG has the id less one: id 1 is the person, 11 the fire hydrant, 13 the stop sign, 182
    # wood.
    "coco_stuff": {0: "person", 10: "fire hydrant", 11: None, 12: "stop sign", 24: "giraffe",
                   25: None, 26: "backpack",
                   28: None, 29: None, 89: "toothbrush", 90: None, 91: "banner", 176: "wood wall",
                   181: "wood",
                   255: None},
    # COCO-Object's are the categories in the order of their ids, which have gaps too.
    "coco_object": {0: "background", 1: "person", 11: "fire hydrant", 12: "stop sign",
                    80: "toothbrush"},
}
CATEGORY = {"person": 1, "fire hydrant": 11, "stop sign": 13, "toothbrush": 90}
# Where the k-th image of a set and its label are, as they are unpacked, and the file that lists the
# images.
PLACES = {
    "voc20": ("VOCdevkit/VOC2012/JPEGImages/2007_{}.jpg",
              "VOCdevkit/VOC2012/SegmentationClass/2007_{}.png",
              "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"),
    "context59": ("VOCdevkit/VOC2010/JPEGImages/2008_{}.jpg",
                  "VOCdevkit/VOC2010/SegmentationClassContext/2008_{}.png",
                  "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt"),
    "ade150": ("ADEChallengeData2016/images/validation/ADE_val_0000000{}.jpg",
               "ADEChallengeData2016/annotations/validation/ADE_val_0000000{}.png", None),
    "cityscapes": ("cityscapes/leftImg8bit/val/lindau/lindau_00000{}_000019_leftImg8bit.png",
                   "cityscapes/gtFine/val/lindau/lindau_00000{}_000019_gtFine_labelIds.png", None),
    "coco_stuff": ("coco/val2017/00000000000{}.jpg",
                   "coco/stuffthingmaps/val2017/00000000000{}.png", None),
    "coco_object": ("coco/val2017/00000000000{}.jpg", "coco/annotations/instances_val2017.json",
                    None),
}
PLACES |= {"voc21": PLACES["voc20"], "context60": PLACES["context59"]}
HEIGHT, WIDTH, IMAGES = 40, 6, 2        # of the stripe of one label value; images of a set


def stripes(name: str, index: int) -> np.ndarray:
    """A label image of all values of MEANING side by side, in another order in each image, all
    sets' of one size."""
    values = np.roll(np.resize(np.array(list(MEANING[name]), np.uint8), 24), index)
    return np.tile(values.repeat(WIDTH), (HEIGHT, 1))


def write(name: str, root: Path) -> None:
    """A benchmark of IMAGES noisy pictures in its original layout."""
    image_path, label_path, listing = (root / place if place else None for place in PLACES[name])
    for path in filter(None, (image_path, label_path, listing)):
        path.parent.mkdir(parents=True, exist_ok=True)
    for index in range(IMAGES):
        label = stripes(name, index)
        noise = np.random.default_rng(index).normal(label[..., None] % 7 * 30, 20,
                                                    (*label.shape, 3))
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(str(image_path).format(index))
        if name != "coco_object":
            Image.fromarray(label).save(str(label_path).format(index))
    if listing:
        listing.write_text("".join(f"{image_path.stem.format(index)}\n" for index in range(IMAGES)))
    if name == "coco_object":
        label_path.write_text(json.dumps(instances()))


def instances() -> dict:
    """The stripes of COCO-Object as polygons of annotations, one of them as a run-length code."""
    annotations = []
    for index in range(IMAGES):
        for column, value in enumerate(stripes("coco_object", index)[0, ::WIDTH].tolist()):
            name, left, right = MEANING["coco_object"][value], column * WIDTH, (column + 1) * WIDTH
            shape = [[left, 0, right, 0, right, HEIGHT, left, HEIGHT]]
            if name == "stop sign":     # column by column: zeros, ones, zeros
                columns = stripes("coco_object", index).shape[1]
                shape = {"size": [HEIGHT, columns],
                         "counts": [left * HEIGHT, WIDTH * HEIGHT, (columns - right) * HEIGHT]}
            if value:
                annotations.append({"image_id": 70 + index, "category_id": CATEGORY[name],
                                    "iscrowd": 0, "segmentation": shape})
    names = read_classes("classes/coco_object.txt").names[1:]
    gaps = [id for id in range(1, 91) if id not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    width = stripes("coco_object", 0).shape[1]
    return {"images": [{"id": 70 + index, "file_name": f"00000000000{index}.jpg",
                        "height": HEIGHT, "width": width} for index in range(IMAGES)],
            "annotations": annotations,
            "categories": [{"id": id, "name": name} for id, name in zip(gaps, names)]}


def expected_label(name: str, index: int) -> np.ndarray:
    """The label image in classes, by the table."""
    names = read_classes(f"classes/{KNOWN_BENCHMARKS[name].classes}").names
    lookup = np.full(256, -1)
    for value, meaning in MEANING[name].items():
        lookup[value] = VOID if meaning is None else names.index(meaning)
    return lookup[stripes(name, index)]


@pytest.mark.parametrize("name", PAPER_BENCHMARKS)
def test_labels_mean_what_the_data_set_says(tmp_path, name):
    write(name, tmp_path)
    dataset = SegmentationImages(KNOWN_BENCHMARKS[name], tmp_path)
    assert len(dataset) == IMAGES
    for index, (image, label) in enumerate(dataset):
        assert image.shape == (3, *label.shape)
        assert np.array_equal(label, expected_label(name, index))


@pytest.mark.parametrize("name", PAPER_BENCHMARKS)
def test_a_perfect_prediction_is_100_and_one_shifted_by_a_class_is_not(tmp_path, name):
    write(name, tmp_path)
    classes = read_classes(f"classes/{KNOWN_BENCHMARKS[name].classes}")
    for shift, best in ((0, True), (1, False)):
        confusion = 0
        for index, (_, label) in enumerate(SegmentationImages(KNOWN_BENCHMARKS[name], tmp_path)):
            prediction = (torch.from_numpy(expected_label(name, index)) + shift) % len(classes)
            confusion = confusion + eval_seg.confusion_matrix(label, prediction, len(classes))
        assert (eval_seg.summarize(confusion, classes)["mIoU"] == 100.0) == best


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "declip.safetensors"
    torch.manual_seed(0)
    DeCLIP("tiny-eva").save(path)
    return str(path)


def test_all_benchmarks_against_a_direct_computation(tmp_path, checkpoint, capsys):
    """`--benchmarks all`: each set's mIoU is that of its predictions on the labels written by hand;
    one table, one mean."""
    for name in PAPER_BENCHMARKS:
        if name != "ade150":
            write(name, tmp_path)
    windows = {"window_batch": 8, "stride": 32}
    result = eval_seg.main(options(**OF_CHECKPOINT | windows, ckpt=checkpoint, data=tmp_path,
                                   out=tmp_path, benchmarks="all"))
    printed = capsys.readouterr().out
    clip = DeCLIP("tiny-eva", checkpoint)
    assert set(result) == set(PAPER_BENCHMARKS) - {"ade150"}
    for name in result:
        benchmark = KNOWN_BENCHMARKS[name]
        classes = read_classes(f"classes/{benchmark.classes}")
        text, labels, predictions = clip.encode_text(classes.prompts, ["a {}."]), [], []
        for index in range(IMAGES):
            image = read_image(tmp_path / PLACES[name][0].format(index))
            with torch.inference_mode():
                logits = slow_logits(Protocol(**WINDOWS | windows), clip, image, text)
            predictions.append(eval_seg.decide([logits], classes, benchmark.logit_scale,
                                               benchmark.threshold).flatten())
            labels.append(expected_label(name, index).flatten())
        expected = slow_iou(np.concatenate(labels), np.concatenate(predictions), len(classes))
        assert result[name]["mIoU"] == pytest.approx(np.mean([iou for iou in expected
                                                              if iou is not None]), abs=0.05)
    mean = np.mean([of_set["mIoU"] for of_set in result.values()])
    assert f"{mean:6.1f}   of 7 of the paper's 8" in printed
    assert f"{tmp_path}/ADEChallengeData2016/images/validation/*.jpg" in printed


@pytest.mark.parametrize("name", PAPER_BENCHMARKS)
def test_images_without_labels_are_a_missing_set(tmp_path, name):
    """A set that was unpacked in part is missing, so that --benchmarks all goes on with the
    others."""
    write(name, tmp_path)
    for path in (tmp_path / PLACES[name][1]).parent.iterdir():
        path.unlink()
    with pytest.raises(MissingData, match="There is no"):
        SegmentationImages(KNOWN_BENCHMARKS[name], tmp_path)


def test_all_without_any_data_has_a_line_for_each(tmp_path, checkpoint):
    with pytest.raises(SystemExit, match="None of the benchmarks is in") as error:
        eval_seg.main(options(**OF_CHECKPOINT, ckpt=checkpoint, data=tmp_path, benchmarks="all"))
    first, *lines = str(error.value).splitlines()
    assert [line.split()[0] for line in lines] == [*PAPER_BENCHMARKS]
    longest = len(str(tmp_path)) + 100
    assert all("There is no /" in line and len(line) < longest for line in lines) and first


@pytest.mark.parametrize("name", PAPER_BENCHMARKS)
def test_a_missing_set_says_where_it_was_looked_for(tmp_path, name):
    with pytest.raises(MissingData, match=str(tmp_path / KNOWN_BENCHMARKS[name].folder)):
        SegmentationImages(KNOWN_BENCHMARKS[name], tmp_path)


# VOC's colours of background, aeroplane, television and the void border.
VOC_COLOURS = {0: (0, 0, 0), 1: (128, 0, 0), 20: (0, 64, 128), 255: (224, 224, 192)}


@pytest.mark.parametrize("name, expected",
                         [("voc20", [VOID, 0, 19, VOID]), ("voc21", [0, 1, 20, VOID])])
def test_voc_labels(tmp_path, name, expected):
    """Label values as the palette PNGs have them; in other colours they may mean other classes."""
    root = tmp_path / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("x\n")
    Image.new("RGB", (4, 1)).save(root / "JPEGImages/x.jpg")

    def read(colours: dict[int, tuple]) -> list:
        palette = np.zeros((256, 3), np.uint8)
        for value, colour in colours.items():
            palette[value] = colour
        label = Image.new("P", (4, 1))
        label.putpalette(palette.flatten().tolist())
        label.putdata(list(VOC_COLOURS))
        label.save(root / "SegmentationClass/x.png")
        return SegmentationImages(KNOWN_BENCHMARKS[name], tmp_path)[0][1].tolist()

    assert read(VOC_COLOURS) == [expected]
    with pytest.raises(ValueError, match="has another palette than VOC's"):
        read(VOC_COLOURS | {20: (128, 0, 0)})


def test_class_files_have_a_line_for_each_class():
    for benchmark in KNOWN_BENCHMARKS.values():
        assert len(read_classes(f"classes/{benchmark.classes}")) == len(benchmark.values)
    voc = read_classes("classes/voc20.txt")
    assert [voc.names[k] for k in (0, 14, 19)] == ["aeroplane", "person", "television monitor"]
    assert len(read_classes("classes/coco_panoptic.txt")) == 133


@pytest.mark.parametrize("name, value", [("voc20", 21), ("context60", 60), ("ade150", 151),
                                         ("cityscapes", 34), ("coco_stuff", 182)])
def test_unknown_label_values_are_counted_and_refused(tmp_path, name, value):
    """Else a benchmark with another numbering would be scored on the rest of its pixels."""
    write(name, tmp_path)
    path = str(tmp_path / PLACES[name][1]).format(0)
    label = np.asarray(Image.open(path)).copy()
    label[3, 4:9] = value
    Image.fromarray(label).save(path)
    with pytest.raises(ValueError, match=rf"has 5 pixels of values .* not void \({value}\); take"):
        SegmentationImages(KNOWN_BENCHMARKS[name], tmp_path)[0]


def test_labels_that_are_all_void_are_no_score(tmp_path, checkpoint):
    write("voc20", tmp_path)
    for index in range(IMAGES):
        path = str(tmp_path / PLACES["voc20"][1]).format(index)
        Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    with pytest.raises(SystemExit, match="The labels of voc20 are void at every pixel"):
        eval_seg.main(options(**OF_CHECKPOINT, ckpt=checkpoint, data=tmp_path, out=tmp_path,
                              benchmarks="voc20"))
