"""util/coco.py: label images of instances, regions of panoptic jsons, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks

from eval_region import PanopticRegions
from util.coco import Instances

HEIGHT, WIDTH = 10, 12
CATEGORIES = [{"id": 90, "name": "brush"}, {"id": 3, "name": "car"}]
BIG, SMALL = [[0, 0, 8, 0, 8, 8, 0, 8]], [[2, 2, 4, 2, 4, 6, 2, 6]]


def write(folder: Path, shapes: list[tuple], **changes) -> Path:
    """A json of one image, a.jpg; shapes: (category, segmentation) of its objects."""
    content = {"images": [{"id": 5, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
               "categories": CATEGORIES,
               "annotations": [{"id": number, "image_id": 5, "category_id": category,
                                "iscrowd": 0, "segmentation": shape}
                               for number, (category, shape) in enumerate(shapes)]}
    (folder / "instances.json").write_text(json.dumps(content | changes))
    return folder / "instances.json"


def rendered(path: Path) -> np.ndarray:
    return Instances(path).render(Path("a.jpg"), HEIGHT, WIDTH)


def test_smaller_objects_are_on_top(tmp_path):
    """The smaller of two objects that overlap is seen, in whichever order they are listed; values
    are in the order of the categories' ids."""
    for shapes in ([(3, BIG), (90, SMALL)], [(90, SMALL), (3, BIG)]):
        label = rendered(write(tmp_path, shapes))
        assert (label[2:6, 2:4] == 2).all() and (label == 2).sum() == 8
        assert (label == 1).sum() == 64 - 8


def test_every_form_of_a_mask_is_the_same(tmp_path):
    """Polygons, of several parts too, and run lengths, compressed or not."""
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[2:6, 2:4] = expected[7:9, 6:11] = True
    packed = coco_masks.encode(np.asfortranarray(expected.astype(np.uint8)))
    column = expected.flatten(order="F").astype(int)
    ends = [0, *(np.flatnonzero(np.diff(column)) + 1).tolist(), column.size]
    plain = {"size": [HEIGHT, WIDTH], "counts": np.diff(ends).tolist()}
    forms = [[SMALL[0], [6, 7, 11, 7, 11, 9, 6, 9]], plain,
             {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()}]
    for shape in forms:
        assert np.array_equal(rendered(write(tmp_path, [(3, shape)])), expected)


def test_names_may_lie_in_folders(tmp_path):
    """On the disk, in the json, or in both; of two images with one name the folders decide."""
    def found(json_names: list[str], file: str) -> int:
        images = [{"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH}
                  for number, name in enumerate(json_names)]
        path = write(tmp_path, [], images=images, annotations=[
            {"id": 1, "image_id": 0, "category_id": 3, "segmentation": BIG}])
        return int(Instances(path).render(Path(file), HEIGHT, WIDTH).max())

    for names, file in ((["a.jpg"], "/data/val/a.jpg"), (["val/a.jpg"], "/data/val/a.jpg"),
                        (["old/a.jpg"], "/data/val/a.jpg"),
                        (["x/a.jpg", "y/a.jpg"], "/data/x/a.jpg")):
        assert found(names, file) == 1
    assert found(["x/a.jpg", "y/a.jpg"], "/data/y/a.jpg") == 0
    with pytest.raises(ValueError, match="says nothing of a.jpg"):
        found(["x/a.jpg", "y/a.jpg"], "/data/z/a.jpg")


@pytest.mark.parametrize("shape", [7, [[1]], {"size": [4, 6]}, {"size": [9, 9], "counts": "0"},
                                   {"size": [HEIGHT, WIDTH], "counts": "oooo1"}, [["a", "b"]],
                                   [[0, 0, 10**400, 0, 9, 9]], [[0, 0, 1e8, 0, 9, 9]]])
def test_a_segmentation_of_another_form_is_one_sentence(tmp_path, shape):
    with pytest.raises(ValueError, match="instances.json") as error:
        rendered(write(tmp_path, [(3, shape)]))
    assert "\n" not in str(error.value)


def test_two_images_of_one_name_are_refused(tmp_path):
    images = [{"id": number, "file_name": "a.jpg", "height": 9, "width": 9} for number in (5, 6)]
    with pytest.raises(ValueError, match="has 2 images with the name 'a.jpg'; leave one of each"):
        rendered(write(tmp_path, [(3, BIG)], images=images))


@pytest.mark.parametrize("field, value", [("images", 3), ("categories", [3]),
                                          ("annotations", [None])])
def test_a_json_of_wrong_types_is_one_sentence(tmp_path, field, value):
    with pytest.raises(ValueError, match="instances.json") as error:
        rendered(write(tmp_path, [(3, BIG)], **{field: value}))
    assert "\n" not in str(error.value)


def test_an_image_without_objects_is_background_and_one_of_another_split_is_refused(tmp_path):
    instances = Instances(write(tmp_path, []))
    assert not instances.render(Path("a.jpg"), HEIGHT, WIDTH).any()
    with pytest.raises(ValueError, match="says nothing of other.jpg"):
        instances.render(Path("x/other.jpg"), HEIGHT, WIDTH)


# --------------------------------------------------------------------------------- panoptic jsons

def test_panoptic_ids_are_r_256g_65536b(panoptic, scenes):
    dataset = PanopticRegions(**panoptic)
    assert dataset.names == ["disc", "box", "sea", "ground-other"]
    assert dataset.is_thing == [True, True, False, False]
    for sample, (_, label) in zip((dataset[index] for index in range(5)), scenes):
        classes = np.array([3, 0, 1])[label]        # ground, disc, box
        assert np.array_equal(sample.labels[sample.region_ids.long()], classes)
        disc = (sample.labels == 0).nonzero().item()
        ys, xs = np.nonzero(label == 1)
        assert sample.boxes[disc].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def lose_segments(content: dict) -> None:
    del content["annotations"][0]["segments_info"]


def segment(content: dict) -> dict:
    return content["annotations"][0]["segments_info"][0]


@pytest.mark.parametrize("change, sentence", [
    (lose_segments, "no field 'segments_info'"),
    (lambda content: content["annotations"].clear(), "has no annotations"),
    (lambda content: content["categories"].pop(0), "category_id"),
    (lambda content: content["images"].pop(0), "image_id"),
    (lambda content: segment(content).update(bbox=3), "x.json"),
    (lambda content: segment(content).update(bbox=[3]), "x.json"),
    (lambda content: segment(content).pop("bbox"), "'bbox'"),
    (lambda content: segment(content).update(bbox=[10**400, 0, 1, 1]), "'bbox'"),
    (lambda content: segment(content).update(iscrowd="yes"), "'iscrowd'"),
    (lambda content: content["annotations"][0].update(file_name="../x.png"), "is not below"),
    (lambda content: content["annotations"][0].update(file_name="/etc/x.png"), "is not below"),
    (lambda content: content["annotations"][0].update(file_name="\ud800.png"), "'file_name'"),
    (lambda content: content["images"][0].update(file_name="x" * 300), "'file_name'"),
    (lambda content: content["categories"][0].pop("isthing"), "'isthing'"),
    (lambda content: content["annotations"][0].update(file_name="no.png"),
     "no.png can't be read as an image"),
    (lambda content: content["images"][0].update(file_name="no.jpg"),
     "no.jpg can't be read as an image"),
    (lambda content: content["images"][0].update(file_name="1.jpg"),
     "they must be of one size"),
])
def test_refusals_say_what_is_wrong(panoptic, tmp_path, change, sentence):
    content = json.loads(Path(panoptic["annotations"]).read_text())
    change(content)
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        PanopticRegions(**panoptic | {"annotations": tmp_path / "x.json"})[0]
    assert "\n" not in str(error.value)


def test_a_png_of_another_json_has_no_regions(panoptic, tmp_path):
    """Its pixels belong to no region, and the json's regions are counted as left out."""
    folder = Path(panoptic["pngs"])
    for path in folder.glob("*.png"):
        Image.new("RGB", Image.open(path).size, (1, 2, 3)).save(tmp_path / path.name)
    sample = PanopticRegions(**panoptic | {"pngs": tmp_path})[0]
    assert (sample.region_ids == -1).all() and (len(sample.labels), sample.left_out) == (0, 3)
