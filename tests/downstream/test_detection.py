"""downstream/detection.py: splits of the official jsons, objects as they are labelled, augmentation
against a direct computation, average precision against pycocotools, bad input."""

import contextlib
import copy
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import read_classes, resize
from downstream import detection
from downstream.detection import (
    Annotations,
    DetectionBenchmark,
    DetectionData,
    Detections,
    EvaluationImages,
    Objects,
    Results,
    augment,
    encode_detections,
    find_annotations,
    groups_of,
    precisions,
    summarize,
)
from util import UserError

# COCO's 80 names under numbers of our own: the split goes by names.
COCO_NAMES = read_classes("classes/coco_object.txt").names[1:]


def polygon(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def annotation(image: int, name: str, *bbox: float, names=COCO_NAMES, **more) -> dict:
    return {"image_id": image, "category_id": 10 * names.index(name), "bbox": list(bbox),
            "area": bbox[2] * bbox[3], "iscrowd": 0, "segmentation": polygon(*bbox)} | more


OBJECTS = [annotation(40, "person", 10, 12, 20, 30), annotation(40, "cat", 3, 4, 20, 10),
           annotation(30, "cat", 5, 5, 30, 30),                     # nothing but a novel class
           annotation(20, "parking meter", 5, 5, 20, 20),           # a class that the split lacks
           annotation(10, "person", 5, 5, 30, 50, iscrowd=1),       # nothing but a crowd
           annotation(40, "dog", 30, 30, 20, 20, iscrowd=1)]
# Image 0 has no annotation; ids are in another order than files.
IDS = [40, 30, 20, 10, 0]
LVIS_NAMES = ["ant", "bag_of_chips", "cup"]


@pytest.fixture
def coco(tmp_path, scenes) -> Path:
    """The scenes as COCO 2017, the same images to train and to evaluate with."""
    images = [{"id": id, "file_name": f"{number:012}.png", "height": image.shape[0],
               "width": image.shape[1]} for number, (id, (image, _)) in enumerate(zip(IDS, scenes))]
    categories = [{"id": 10 * number, "name": name} for number, name in enumerate(COCO_NAMES)]
    (tmp_path / "coco/annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (tmp_path / "coco" / split).mkdir()
        for entry, (image, _) in zip(images, scenes):
            Image.fromarray(image).save(tmp_path / "coco" / split / entry["file_name"])
        write(tmp_path / f"coco/annotations/instances_{split}.json", images, OBJECTS, categories)
    return tmp_path


def write(path: Path, images: list, annotations: list, categories: list) -> None:
    path.write_text(json.dumps({"images": images, "annotations": annotations,
                                "categories": categories}))


def change(path: Path, changed) -> None:
    """Writes a json again as a function leaves its content."""
    content = json.loads(path.read_text())
    changed(content)
    path.write_text(json.dumps(content))


def numbers(files: list[str]) -> list[int]:
    return [int(Path(file).stem) for file in files]


# ------------------------------------------------------------------------------------ the splits

def test_ov_coco_is_derived_from_the_official_files(coco):
    """48 base and 17 novel classes; crowds stay; images without any of their annotations go."""
    train = find_annotations("ovcoco", "train", coco)
    val = find_annotations("ovcoco", "val", coco)
    for annotations in (train, val):
        names = np.array(annotations.classes)
        assert (len(names), sum(annotations.seen)) == (65, 48)
        assert {"cat", "dog", "tie"} < {*names[~np.array(annotations.seen)]}
        assert "parking meter" not in names and "person" in names[annotations.seen]
    assert numbers(train.files) == [0, 3]           # a base annotation each, the latter's a crowd
    assert numbers(val.files) == [0, 1, 3] and len(val.objects) == 5
    data = DetectionData(train, masks=False)
    assert [len(data.read(index).boxes) for index in (0, 1)] == [1, 0]
    assert data.classes[data.read(0).labels[0]] == "person"
    assert groups_of(val, val.seen)["novel"] == [not seen for seen in val.seen]


@pytest.mark.parametrize("categories", ["all", "seen"])
def test_zero_shot_files_of_other_code_give_the_same(coco, categories):
    """instances_train2017_seen_2.json: base annotations alone, whatever categories it lists."""
    base = read_classes("classes/ovcoco_base.txt").names
    own = coco / "instances_train2017_seen_2.json"
    own.write_text((coco / "coco/annotations/instances_train2017.json").read_text())

    def only_seen(content):
        seen = [each["id"] for each in content["categories"] if each["name"] in base]
        content["annotations"] = [each for each in content["annotations"]
                                  if each["category_id"] in seen]
        if categories == "seen":
            content["categories"] = [each for each in content["categories"] if each["id"] in seen]
    change(own, only_seen)
    official, given = (find_annotations("ovcoco", "train", coco, annotations=path)
                       for path in (None, own))
    assert sorted(given.classes) == sorted(official.classes) and sum(given.seen) == 48
    official, given = DetectionData(official, False), DetectionData(given, False)
    assert official.paths == given.paths
    assert [official.classes[k] for k in official.labels] == [given.classes[k]
                                                              for k in given.labels]


@pytest.fixture
def lvis(coco) -> Path:
    """The scenes as LVIS, below the folder of the data sets."""
    (coco / "lvis").mkdir()
    images = [{"id": id, "coco_url": f"http://images.example/val2017/{number:012}.png",
               "height": 64, "width": 64, "neg_category_ids": [20],
               "not_exhaustive_category_ids": []} for number, id in enumerate((40, 30, 20))]
    objects = [annotation(40, "ant", 5, 5, 20, 20, names=LVIS_NAMES),
               annotation(40, "cup", 5, 5, 20, 20, names=LVIS_NAMES),
               annotation(30, "ant", 5, 5, 20, 20, names=LVIS_NAMES)]
    categories = [{"id": 10 * number, "name": name, "frequency": letter}
                  for number, (name, letter) in enumerate(zip(LVIS_NAMES, "rfc"))]
    for split in ("train", "val"):
        write(coco / f"lvis/lvis_v1_{split}.json", images, objects, categories)
    return coco


def test_ov_lvis_is_derived_from_the_official_files(lvis):
    """Rare classes are novel; images have no names but addresses; all images are evaluated."""
    coco, names = lvis, LVIS_NAMES
    train, val = (find_annotations("ovlvis", split, coco)
                  for split in ("train", "val"))
    assert (train.classes, train.seen) == (names, [False, True, True])
    assert train.files == [str(coco / "coco/val2017/000000000000.png")] and len(train.objects) == 1
    assert numbers(val.files) == [0, 1, 2] and len(val.objects) == 3
    assert groups_of(val, val.seen) == {"r": [True, False, False], "c": [False, False, True],
                                        "f": [False, True, False]}


LIST = "a list of ids of categories, as LVIS's"


@pytest.mark.parametrize("section, field, values, words", [
    ("images", "neg_category_ids", ["absent", None, {}, 20, "20", [None], ["20"], [2.0], [True]],
     LIST),
    ("images", "not_exhaustive_category_ids", ["absent", None, 0, [[20]]], LIST),
    ("categories", "frequency", ["absent", None, "", "R", "rare", 1, ["r"]], "r, c or f")])
def test_a_field_of_lvis_that_is_none_is_refused(lvis, section, field, values, words):
    """Before anything else: without it, all that is found would count in another way."""
    path = lvis / "lvis/lvis_v1_val.json"
    content = json.loads(path.read_text())
    for value in values:
        wrong = copy.deepcopy(content)
        wrong[section][1].pop(field)
        wrong[section][1] |= {} if value == "absent" else {field: value}
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError) as error:
            find_annotations("ovlvis", "val", lvis)
        assert f"{field!r}; it must be {words}" in str(error.value), value


def test_ones_own_json_is_split_by_names(coco):
    own = coco / "coco/val2017/own.json"        # beside its images
    own.write_text((coco / "coco/annotations/instances_val2017.json").read_text())
    train, val = (find_annotations(str(own), split, "no such folder", novel="cat, parking meter")
                  for split in ("train", "val"))
    assert train.classes == val.classes == COCO_NAMES
    assert [name for name, seen in zip(train.classes, train.seen) if not seen] == [
        "parking meter", "cat"]
    # Images without annotations count when they are evaluated: what is found there is wrong.
    assert numbers(train.files) == [0, 3] and numbers(val.files) == [0, 1, 2, 3, 4]
    assert sum(find_annotations(str(own), "train").seen) == 80
    assert groups_of(find_annotations(str(own), "val"), [True] * 80) == {}


# --------------------------------------------------------------------------------------- objects

def test_objects_are_as_they_are_labelled(coco):
    train = find_annotations("coco", "train", coco)
    objects = DetectionData(train, masks=True).read(0)
    assert objects.boxes.tolist() == [[10, 12, 30, 42], [3, 4, 23, 14]]
    for (x0, y0, x1, y1), mask in zip(objects.boxes.int().tolist(), objects.masks):
        expected = torch.zeros_like(mask)
        expected[y0:y1, x0:x1] = True
        assert torch.equal(mask, expected)
    assert objects.masks.shape == (2, *objects.image.shape[-2:])
    assert DetectionData(train, masks=False).read(0).masks.shape == (2, 0, 0)


@pytest.mark.parametrize("bbox, more, expected", [
    ((50, 50, 30, 30), {}, [50, 50, 64, 64]),           # beyond the border
    ((-9, -5, 20, 30), {}, [0, 0, 11, 25]),
    ((70, 10, 20, 30), {}, None),                       # outside the image
    ((10, 10, 0, 30), {}, None),                        # of zero width
    ((10, 10, 20, -4), {}, None), ((10, 10, 20, 0.5), {}, None),
    ((10, 10, 20, 30), {"area": 0}, [10, 10, 30, 40])])     # an area of 0 is no answer
def test_only_boxes_inside_the_image_are_trained_with(coco, bbox, more, expected):
    path = coco / "coco/annotations/instances_train2017.json"
    change(path, lambda content: content.update(annotations=[
        annotation(40, "car", 1, 2, 10, 10), annotation(40, "person", *bbox, **more)]))
    data = DetectionData(find_annotations("ovcoco", "train", coco), masks=False)
    found = [box.tolist() for box, label in zip(*data.read(0)[1:3])
             if data.classes[label] == "person"]
    assert found == ([expected] if expected else [])


@pytest.mark.parametrize("area", [None, "600", 0, -1, math.nan, True, [600], "absent"])
def test_an_annotation_that_says_no_area_has_its_box_s(coco, area):
    def changed(content):
        for each in content["annotations"]:
            each.pop("area") if area == "absent" else each.update(area=area)
    change(coco / "coco/annotations/instances_val2017.json", changed)
    assert len(DetectionData(find_annotations("ovcoco", "train", coco), masks=False).boxes) == 1
    val = find_annotations("ovcoco", "val", coco)
    perfect = [encode_detections(0, Detections(torch.tensor([[10.0, 12, 30, 42]]),
                                               torch.tensor([0.9]), torch.tensor([0]), None))]
    result = summarize(precisions(val, sum(perfect, [])), val.classes, {})
    assert result["classes"]["person"] == pytest.approx(100)
    assert result["APs"] is not None and result["APl"] is None      # 600 pixels are small


def test_the_fingerprint_is_that_of_the_objects(coco):
    path = coco / "coco/annotations/instances_train2017.json"
    first, again = (DetectionData(find_annotations("ovcoco", "train", coco), False).fingerprint
                    for _ in range(2))
    change(path, lambda content: content["annotations"][0].update(bbox=[11, 12, 20, 30]))
    moved = DetectionData(find_annotations("ovcoco", "train", coco), False).fingerprint
    assert first == again != moved


# --------------------------------------------------------------------------------- augmentation

@pytest.mark.parametrize("key, mirrored", [("a", False), ("b", True), ("c", True)])
def test_a_view_is_a_part_of_the_resized_image(coco, key, mirrored):
    """Against a direct search: the view is found in the image resized as OpenCV does (published),
    mirrored or not, and boxes and masks are where it is."""
    objects = DetectionData(find_annotations("coco", "train", coco),
                            masks=True).read(0)
    with_masks, view = (augment(each, key, side=48, scales=(1.5, 1.5), flip=float(mirrored))
                        for each in (objects, objects._replace(masks=torch.zeros(2, 0, 0))))
    whole = resize(objects.image, 72, 72, "cv2")
    assert view.image.shape == (3, 48, 48)
    as_it_is = view.image, view.image.flip(-1)
    places = [(top, left, flipped) for top in range(25) for left in range(25)
              for flipped in (False, True) if torch.allclose(
                  whole[:, top:top + 48, left:left + 48], as_it_is[flipped], atol=1e-6)]
    (top, left, flipped), = places
    assert flipped == mirrored
    boxes = objects.boxes * 72 / 64 - torch.tensor([left, top, left, top])
    boxes = boxes.clamp(0, 48)
    boxes = torch.stack([48 - boxes[:, 2], boxes[:, 1], 48 - boxes[:, 0], boxes[:, 3]],
                        dim=1) if flipped else boxes
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    torch.testing.assert_close(view.boxes, boxes[kept])
    assert torch.equal(view.image, with_masks.image)
    assert torch.equal(view.labels, objects.labels[kept])
    assert torch.equal(with_masks.labels, objects.labels[kept])
    masks = F.interpolate(objects.masks[None].float(), (72, 72))[0, kept, top:top + 48,
                                                                 left:left + 48]
    assert torch.equal(with_masks.masks.float(), masks.flip(-1) if flipped else masks)
    for box, cut, mask in zip(with_masks.boxes.tolist(), view.boxes.numpy(), with_masks.masks):
        assert box == box_around(mask)
        assert np.abs(np.array(box) - cut).max() < 1        # of a mask that fills its box
    otherwise = augment(objects, key, 48, (1.5, 1.5), float(mirrored), "bicubic").image
    assert 0.01 < (otherwise - view.image).abs().max() < 0.3


@pytest.mark.parametrize("size, expected", [((30, 60), (7, 13)), ((64, 48), (13, 10))])
def test_sizes_are_rounded_as_published(size, expected):
    """The longest side down, here from 13.9; of the other, halves up: 6.5 to 7, 9.75 to 10."""
    objects = Objects(torch.zeros(3, *size).byte(), torch.zeros(0, 4), torch.zeros(0).long(),
                      torch.zeros(0, 0, 0), torch.zeros(0))
    assert augment(objects, "a", 20, (0.695, 0.695)).image.shape[1:] == expected


def test_views_are_random_and_repeatable(coco):
    """Sizes cover the range, half are mirrored; a key alone decides."""
    objects = DetectionData(find_annotations("ovcoco", "train", coco), False).read(0)
    views = [augment(objects, f"0-0-{number}", side=32) for number in range(120)]
    again = augment(objects, "0-0-7", side=32)
    assert all(torch.equal(one, other) for one, other in zip(views[7], again))
    sides = [max(view.image.shape[-2:]) for view in views]
    assert min(sides) < 6 and max(sides) == 32
    assert 0.4 < np.mean([side == 32 for side in sides]) < 0.65         # 1 of (0.1, 2.0): 53 %
    whole = [augment(objects, str(number), side=64, scales=(1, 1)) for number in range(120)]
    mirrored = [not torch.allclose(view.boxes, objects.boxes) for view in whole]
    assert 0.35 < np.mean(mirrored) < 0.65
    never = [augment(objects, str(number), side=64, scales=(1, 1), flip=0) for number in range(20)]
    assert all(torch.allclose(view.boxes, objects.boxes) for view in never)


def test_a_view_need_not_show_an_object(coco):
    """A small object in a large image is missed by most crops, which show background."""
    objects = DetectionData(find_annotations("ovcoco", "train", coco), False).read(0)
    corner = objects._replace(boxes=torch.tensor([[0.0, 0, 16, 16]]))
    views = [augment(corner, str(number), side=24, scales=(2, 2)) for number in range(200)]
    shown = np.mean([len(view.boxes) == len(view.labels) == 1 for view in views])
    assert abs(shown - (12 / 25)**2) < 0.08      # 12 of 25 places in either direction reach it
    assert all(view.image.shape == (3, 24, 24) for view in views)
    empty = objects.only(torch.zeros(len(objects.boxes), dtype=torch.bool))
    assert augment(empty, "0", side=24).boxes.shape == (0, 4)


def box_around(mask: torch.Tensor) -> list[int]:
    """x0 y0 x1 y1 around the pixels of a mask (h, w), one by one."""
    ys, xs = zip(*mask.nonzero().tolist())
    return [min(xs), min(ys), max(xs) + 1, max(ys) + 1]


@pytest.mark.parametrize("flip", [0, 1])
def test_boxes_are_those_of_the_cropped_masks(flip):
    """An arch, whose box is larger than its part in most crops, a bar at the edge, and a corner of
    a box that fills the image. A mask that the crop leaves empty is no object."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    masks = torch.stack([(y < 6) | (x < 6) | (x >= 58), x >= 61, (x < 9) & (y < 9)])
    places = torch.stack([x, y, 0 * x]).byte()      # each pixel tells where it is
    boxes = torch.tensor([[0.0, 0, 64, 64], [61, 0, 64, 64], [0, 0, 64, 64]])
    objects = Objects(places, boxes, torch.arange(3), masks, torch.ones(3))
    found = set()
    for number in range(60):
        view = augment(objects, str(number), side=32, scales=(2, 2), flip=flip)
        x, y, _ = (255 * view.image).round().long()
        expected = masks[:, y, x]       # the crop of the masks
        shown = expected.flatten(1).any(dim=1)
        assert view.labels.tolist() == shown.nonzero().flatten().tolist()
        assert torch.equal(view.masks, expected[shown])
        assert view.boxes.tolist() == [box_around(mask) for mask in view.masks]
        assert view.boxes.dtype == torch.float32
        found.add(tuple(view.labels.tolist()))
    assert {(), (0,), (2,), (0, 1), (0, 2)} <= found
    whole = augment(objects, "0", side=64, scales=(1, 1), flip=0)
    assert whole.boxes.tolist() == [[0, 0, 64, 64], [61, 0, 64, 64], [0, 0, 9, 9]]


def test_the_smallest_objects_of_a_view():
    """Boxes from a hundredth of a pixel on are trained with; of masks, those with a pixel."""
    boxes = torch.tensor([[10.0, 16, 40, 16.5], [10, 16, 40, 16.05], [36, 36, 37, 37]])
    masks = torch.zeros(3, 64, 64, dtype=torch.bool)
    masks[0, 10:22, 10:40] = masks[2, 36, 36] = True
    objects = Objects(torch.zeros(3, 64, 64, dtype=torch.uint8), boxes, torch.arange(3), masks,
                      torch.ones(3))
    tenth = {"key": "0", "side": 6, "scales": (1, 1)}       # 64 pixels are 6
    assert augment(objects._replace(masks=masks[:, :0, :0]), **tenth).labels.tolist() == [0, 2]
    assert augment(objects, **tenth).labels.tolist() == [0]     # the other masks have none left


# ---------------------------------------------------------------------------- average precision

def synthetic(seed: int = 0) -> tuple[Annotations, list[dict], dict]:
    """Random truth of 4 classes on 12 images, with crowds and all sizes, and found objects near
    it -> annotations, results, and the truth as pycocotools reads it."""
    draw = np.random.default_rng(seed)
    images = [{"id": id, "height": 200, "width": 240} for id in range(12)]
    truth, found = [], []
    for image in range(12):
        for _ in range(draw.integers(0, 7)):
            size = draw.uniform(8, 140, 2)
            corner = draw.uniform(0, [240, 200] - np.minimum(size, 190))
            label = int(draw.integers(4))
            bbox = [*corner.tolist(), *size.tolist()]
            truth.append({"image_id": image, "category_id": label, "bbox": bbox, "iscrowd": int(
                draw.random() < 0.15), "segmentation": polygon(*bbox), "area": bbox[2] * bbox[3]})
            for _ in range(draw.integers(0, 4)):
                moved = np.array(bbox) + draw.normal(0, 4, 4)
                guess = label if draw.random() < 0.8 else int(draw.integers(4))
                found.append((image, guess, moved.tolist(), draw.random()))
    annotations = Annotations(Path("x.json"), DetectionBenchmark(), images, [], truth,
                              list(range(4)), list("abcd"), [True] * 4, [""] * 4)
    results = []
    for image, label, (x, y, width, height), score in found:
        mask = torch.from_numpy(coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(
            polygon(x, y, width, height), 200, 240))).astype(bool))
        results += encode_detections(image, Detections(
            torch.tensor([[x, y, x + width, y + height]]), torch.tensor([score]),
            torch.tensor([label]), [mask]))
    categories = [{"id": label + 1, "name": name} for label, name in enumerate("abcd")]
    numbered = [each | {"id": number + 1, "category_id": each["category_id"] + 1}
                for number, each in enumerate(truth)]
    return annotations, results, {"images": images, "annotations": numbered,
                                  "categories": categories}


def official(truth: dict, results: list[dict], kind: str) -> COCOeval:
    """pycocotools' evaluation."""
    results = copy.deepcopy(results)
    if kind == "segm":
        [each.pop("bbox") for each in results]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_average_precision_is_pycocotools(kind):
    annotations, results, truth = synthetic()
    evaluation = official(truth, results, kind)
    found = precisions(annotations, results, masks=kind == "segm")
    assert np.allclose(found, evaluation.eval["precision"][..., -1])
    result = summarize(found, [*"abad"], {"novel": [True, False, True, False]})
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [result[name] for name in names] == pytest.approx(list(100 * evaluation.stats[:6]))
    assert 10 < result["AP50"] < 90
    # The mean of the classes' own, two of one name; no class is counted twice.
    of_classes = list(result["classes"].values())
    assert result["groups"]["novel"]["AP50"] == pytest.approx(np.mean(of_classes[::2]))
    assert result["AP50"] == pytest.approx(np.mean(of_classes))


@pytest.mark.parametrize("is_lvis", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_classes_scored_apart_have_the_same_precision(monkeypatch, is_lvis, masks):
    """Bit for bit, from the disk; also where LVIS looked for nothing that was found on an image."""
    monkeypatch.setattr(detection, "AT_ONCE", 3)
    annotations, found, _ = synthetic()
    images = [image | {"neg_category_ids": [image["id"] % 4] * (image["id"] < 9),
                       "not_exhaustive_category_ids": [2]} for image in annotations.images]
    objects = [each for each in annotations.objects if each["image_id"] < 9]
    annotations = annotations._replace(images=images, objects=objects,
                                       benchmark=DetectionBenchmark(is_lvis=is_lvis))
    results = Results(4)
    results.add(found)
    parts = [precisions(annotations, part, masks, classes) for classes, part in results.parts()]
    assert [part.shape[2] for part in parts] == [3, 1]
    assert np.array_equal(np.concatenate(parts, axis=2), precisions(annotations, found, masks))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_written_detections_are_scored_by_pycocotools(kind, tmp_path):
    """Against the json that was given, under its ids of images and classes."""
    annotations, found, _ = synthetic()
    images = [image | {"id": 7 * image["id"] + 40, "file_name": f"{image['id']}.jpg"}
              for image in annotations.images]
    objects = [each | {"id": number, "image_id": 7 * each["image_id"] + 40,
                       "category_id": 90 - each["category_id"]}
               for number, each in enumerate(annotations.objects, 1)]
    annotations = annotations._replace(images=images, objects=objects, ids=[90, 89, 88, 87])
    results = Results(4)
    results.add(found)
    results.write(tmp_path / "found.json", annotations)
    written = json.loads((tmp_path / "found.json").read_text())
    assert len(written) == len(found) and all(
        (each["file_name"], each["category"]) == (f"{(each['image_id'] - 40) // 7}.jpg",
                                                  "abcd"[90 - each["category_id"]])
        for each in written)
    truth = {"images": images, "annotations": objects, "categories": [
        {"id": id, "name": name} for id, name in zip(annotations.ids, "abcd")]}
    ours = summarize(precisions(annotations, found, kind == "segm"), [*"abcd"], {})
    assert [ours[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")] == pytest.approx(
        list(100 * official(truth, written, kind).stats[:6]))
    results = Results(4)
    results.write(tmp_path / "found.json", annotations)
    assert json.loads((tmp_path / "found.json").read_text()) == []


def test_nothing_found_is_zero_and_no_object_is_none():
    annotations, _, _ = synthetic()
    three = annotations._replace(objects=[each for each in annotations.objects
                                          if each["category_id"] != 3])
    result = summarize(precisions(three, []), three.classes, {"novel": [False] * 3 + [True]})
    assert result["AP"] == 0 and result["classes"]["d"] is None
    assert result["groups"]["novel"] == {"AP": None, "AP50": None}


def test_lvis_counts_what_was_looked_for():
    """A detection of a class that nobody looked for on an image is not wrong, nor is one of a class
    that was not labelled everywhere."""
    box, other = [10.0, 10, 40, 40], [100.0, 100, 40, 40]
    images = [{"id": id, "height": 200, "width": 200, "neg_category_ids": negative,
               "not_exhaustive_category_ids": partly}
              for id, (negative, partly) in enumerate([([], []), ([7], []), ([], []), ([], [7])])]
    truth = [{"image_id": image, "category_id": 7, "bbox": box, "area": 1600,
              "segmentation": polygon(*box)} for image in (0, 3)]
    annotations = Annotations(Path("x.json"), DetectionBenchmark(is_lvis=True, most=300),
                              images, [], truth, [7, 9], ["a", "b"], [False, True], ["r", "f"])

    def ap(*wrong: int) -> float:
        """AP50 of a with both objects found, and before them something on some images."""
        found = [(image, other, 0.9) for image in wrong] + [(0, box, 0.5), (3, box, 0.4)]
        results = [{"image_id": image, "category_id": 1, "bbox": bbox, "score": score}
                   for image, bbox, score in found]
        result = summarize(precisions(annotations, results), ["a", "b"],
                           groups_of(annotations, annotations.seen))
        assert result["groups"]["r"]["AP50"] == result["classes"]["a"]
        assert result["groups"]["c"]["AP"] is None and result["classes"]["b"] is None
        return result["classes"]["a"]
    assert ap() == ap(2) == ap(3) == pytest.approx(100)
    assert ap(0) == pytest.approx(100 * 2 / 3, abs=0.5)     # a second one where there is one
    assert ap(1) == pytest.approx(100 * 2 / 3, abs=0.5)     # looked for and not there


# ------------------------------------------------------------------------------------- bad input

def without(field: str, of: str = "annotations"):
    return lambda content: content[of][0].pop(field)


def put(field: str, value: object, of: str = "annotations"):
    return lambda content: content[of][0].update({field: value})


@pytest.mark.parametrize("changed, words", [
    (put("category_id", 5000), "5000 as 'category_id'; it must be the id of one of 'categories'"),
    (put("image_id", 5000), "5000 as 'image_id'; it must be the id of one of 'images'"),
    (put("bbox", [1, 2, 3]), "four finite numbers"),
    (put("bbox", [1, 2, "x", 4]), "four finite numbers"),
    (put("bbox", [1, 2, math.nan, 4]), "four finite numbers"),
    (without("bbox"), "has no 'bbox'"),
    (without("height", "images"), "has no 'height'"),
    (put("file_name", "../../x.png", "images"), "which is not below"),
    (put("file_name", "x.png", "images"), "x.png, which is not there"),
    (lambda content: content.update(annotations=[]), "has no object of a class that training may"),
    (lambda content: content["categories"][0].update(name="persons"), "has no category 'person'"),
    (put("iscrowd", "0"), '"0" as \'iscrowd\'; it must be 0 or 1'),
    (lambda content: [entry.update(bbox=[0.1, 0.2, 0.5, 0.5]) for entry in content["annotations"]],
     "they seem to be shares of their images"),
    (lambda content: content.pop("images"), "has no field 'images'")])
def test_a_wrong_json_is_one_sentence(coco, changed, words):
    change(coco / "coco/annotations/instances_train2017.json", changed)
    with pytest.raises(UserError) as error:
        find_annotations("ovcoco", "train", coco)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("given, words", [
    ({"dataset": "cocoo"}, "There is no data set 'cocoo'"),
    ({"dataset": "objects365"}, "is only to evaluate with"),
    ({"dataset": "ovlvis"}, "lvis_v1_train.json; unpack"),
    ({"annotations": "no.json"}, "no.json; unpack"),
    ({"novel": "cat, dogg"}, "has no category 'dogg'; did you mean 'dog'?"),
    ({"novel": "person"}, "has no object of a class that training may see")])
def test_a_wrong_setting_is_one_sentence(coco, given, words):
    change(coco / "coco/annotations/instances_train2017.json", lambda content: content.update(
        annotations=content["annotations"][:1]))
    with pytest.raises(UserError) as error:
        find_annotations(**{"dataset": "ovcoco", "split": "train", "data": coco} | given)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_all_classes_novel_is_one_sentence(coco):
    own = coco / "coco/val2017/own.json"
    write(own, [], [], [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}])
    with pytest.raises(UserError, match="All 2 classes of"):
        find_annotations(str(own), "train", novel="dog, cat")


def test_an_image_of_another_size_is_left_out_and_named(coco):
    train = find_annotations("ovcoco", "train", coco)
    Image.new("RGB", (9, 9)).save(train.files[0])
    sample = DetectionData(train, masks=False)[0]
    (path, reason), = sample.skipped
    assert path == train.files[0] and f"(64, 64), but its image {path} (9, 9); they" in reason
    with pytest.raises(UserError, match="they must be of one size"):
        EvaluationImages(train)[0]


@pytest.mark.parametrize("shape", [[[1, 2]], [[1, 2, 3, 4]], [], None])
def test_an_empty_mask_leaves_its_object_out(coco, capsys, shape):
    """The other objects of its image stay, and it is said how many have none."""
    path = coco / "coco/annotations/instances_train2017.json"
    more = annotation(40, "car", 1, 2, 10, 10, segmentation=[[1, 2, 11, 2, 11, 12]])
    change(path, lambda content: content["annotations"].append(more))
    whole = DetectionData(find_annotations("ovcoco", "train", coco), masks=True)
    change(path, put("segmentation", shape))
    data = DetectionData(find_annotations("ovcoco", "train", coco), masks=True)
    assert len(data.boxes) == len(whole.boxes) - 1
    assert "left out: 1 masks of less than three points" in capsys.readouterr().out
    # Without masks it is an object like others.
    assert len(DetectionData(find_annotations("ovcoco", "train", coco), False).boxes) == len(
        whole.boxes)


@pytest.mark.parametrize("shape", [
    [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, math.nan, 6]], [[1, 2, 3, 4, 2e8, 6]], [[1, 2, "x", 4, 5, 6]],
    {"size": [9, 9], "counts": [81]}, {"size": [64, 64], "counts": [1, 2]}, "polygon"])
def test_a_mask_that_is_none_is_refused(coco, shape):
    change(coco / "coco/annotations/instances_train2017.json", put("segmentation", shape))
    train = find_annotations("ovcoco", "train", coco)
    with pytest.raises(UserError, match="as 'segmentation'; it must be"):
        DetectionData(train, masks=True)
