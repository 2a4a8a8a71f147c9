"""COCO-style jsons: one reader, which checks all entries once, at the start.

    content = read_coco("instances.json", {"boxes", "masks"})
    content.images, content.categories, content.annotations     # entries that can be trusted
    print(content.report())                                     # how many are used, and why not all

A reader says what it needs: boxes, masks, segments (of a panoptic json), lvis, or names alone.
What is of a wrong type or refers to what is not there is refused, with the json, the entry's id and
the field; an annotation that is only empty is left out and counted. Whole columns are looked at
first, one by one only to name a wrong entry: COCO has 860,000 annotations.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_masks

from util import UserError
from util.distributed import is_main
from util.files import is_name, is_text, read_json

NUMBERS = {int, float}
REQUIRED = object()         # default of a field that every entry must have
MAX_OUTSIDE = 1.0           # of an image's longer side; a polygon that lies farther out is no mask


@dataclass
class Coco:
    """A json's entries, checked. Categories are in the order of their ids; annotations are those
    that are used; left_out counts the others by reason, examples has the first one's id."""
    path: Path
    images: list[dict]
    categories: list[dict] = field(default_factory=list)
    annotations: list[dict] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, object] = field(default_factory=dict)

    def report(self) -> str:
        """One line: how many annotations are used and left out, and why."""
        used = len(self.annotations)
        text = f"{self.path}: {len(self.images):,} images, {used:,} annotations"
        if self.left_out:
            reasons = (f"{count:,} {reason} (such as {self.examples[reason]})"
                       for reason, count in self.left_out.most_common())
            text += f" of {used + self.left_out.total():,}; left out: {', '.join(reasons)}"
        return text

    def leave_out(self, is_used: np.ndarray, reason: str) -> None:
        """Keeps the annotations that are used and counts the others."""
        gone = [self.annotations[place] for place in np.flatnonzero(~is_used)]
        if gone:
            self.annotations = [self.annotations[place] for place in np.flatnonzero(is_used)]
            self.left_out[reason] += len(gone)
            self.examples.setdefault(reason, gone[0].get("id"))


def read_coco(path: str | Path, needs: Collection[str]) -> Coco:
    """The content of a COCO-style json, all entries checked. Paths in it are only texts here.

    needs: any of boxes, masks, segments, lvis; {"names"}: images and categories, without
    annotations, which test sets lack; without one of them only images are read.
    Raises UserError that names the json, the entry's id and the field.
    """
    needs, path = set(needs), Path(path)
    count = 3 if needs - {"names"} else 2 if needs else 1
    sections = ("images", "categories", "annotations")[:count]
    content = read_json(path, *sections)
    for section in sections:
        if not isinstance(content[section], list) or not all(
                isinstance(entry, dict) for entry in content[section]):
            raise UserError(f"{path} has {section!r} that are no list of entries in braces; a "
                            "COCO-style json has one for each.")
    coco = Coco(path, content["images"])
    check_images(coco, needs)
    if needs:
        coco.categories = check_categories(path, content["categories"], needs)
        coco.annotations = content["annotations"] if count == 3 else []
        if "segments" in needs:
            check_segments(coco)
        else:
            check_annotations(coco, needs)
        if coco.left_out and not coco.annotations:
            raise UserError(f"{coco.report()}; none is left, so correct them or give another json.")
    return coco


UNKNOWN = -1        # the category of objects that are of no class


def read_unknown(path: str | Path, images: list[dict]) -> Coco:
    """A json of unknown objects: a list of image_id, bbox and weight, in [0, 1].

    images: the entries that they are of; objects of other images are left out.
    Raises UserError as read_coco does, and if no object of these images is left.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no {path}; python -m downstream.ov_dquo.unknown finds unknown "
                        "objects, or train without them: --unknown none.")
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise UserError(f"{path} is no list of unknown objects; each has image_id, bbox and weight "
                        "in braces.")
    coco = Coco(path, images, [{"id": UNKNOWN, "name": "object"}],
                [entry | {"category_id": UNKNOWN, "iscrowd": 0} for entry in content])
    known = {image["id"] for image in images}
    of_images = Column(path, "objects", content, "image_id").of_types({int, str}, "an image's id")
    coco.leave_out(np.array([id in known for id in of_images], dtype=bool), "of other images")
    Column(path, "objects", coco.annotations, "weight").must(
        lambda value: type(value) in NUMBERS and 0 <= value <= 1, "a number from 0 to 1")
    check_boxes(coco, Column(path, "objects", coco.annotations, "bbox"))
    if not coco.annotations:
        raise UserError(f"{coco.report()}; give the file of these images, or --unknown none.")
    return coco


class Column:
    """A field of all entries of a section: it refuses the first entry that does not fit."""

    def __init__(self, path: Path, section: str, entries: list[dict], name: str,
                 default: object = REQUIRED):
        self.path, self.section, self.entries, self.name = path, section, entries, name
        self.values = [entry.get(name, default) for entry in entries]

    def must(self, fits: Callable[[object], bool], what: str) -> list:
        """The values, each of which must fit; `what` says what the field must be."""
        wrong = next((place for place, value in enumerate(self.values) if not fits(value)), None)
        if wrong is not None:
            self.refuse(wrong, what)
        return self.values

    def of_types(self, types: set[type], what: str) -> list:
        """The values, each of one of some types."""
        return self.values if set(map(type, self.values)) <= types else self.must(
            lambda value: type(value) in types, what)

    def one_of(self, known: Collection, what: str) -> list:
        """The values, numbers or texts, each among those known."""
        self.of_types({int, str, bool}, what)
        return self.values if set(self.values) <= set(known) else self.must(
            lambda value: value in known, what)

    def refuse(self, place: int, what: str) -> None:
        """Raises UserError about the entry at a place."""
        entry, value = self.entries[place], self.values[place]
        which = f"id {entry['id']!r}" if "id" in entry else f"number {place + 1}"
        shown = "no" if value is REQUIRED else f"{json.dumps(value, default=str)[:60]} as"
        raise UserError(f"{self.path}: the entry of {self.section!r} with {which} has {shown} "
                        f"{self.name!r}; it must be {what}; correct or remove the entry.")


def unique(column: Column) -> list:
    """Ids, whole numbers or texts, each of which occurs once."""
    values = column.of_types({int, str}, "a whole number or a text")
    if len(set(values)) < len(values):
        counts = Counter(values)
        column.refuse(next(place for place, value in enumerate(values) if counts[value] > 1),
                      "an id that no other entry has")
    return values


def check_images(coco: Coco, needs: set[str]) -> None:
    """Ids, names and, if needed, sizes of images. One without a name has LVIS's address."""
    column = partial(Column, coco.path, "images", coco.images)
    if needs:
        unique(column("id"))
    for place, image in enumerate(coco.images):
        # LVIS has no names: an image of COCO's is where its address says, split/number.jpg.
        if "file_name" not in image and is_text(image.get("coco_url")):
            coco.images[place] = image | {"file_name": "/".join(image["coco_url"].split("/")[-2:])}
    column("file_name").must(is_name, "the name of a file")
    if needs & {"boxes", "masks"}:
        for side in ("height", "width"):
            column(side).must(lambda value: type(value) is int and 1 <= value < 2**20,
                              "a number of pixels")
    if "lvis" in needs:
        for name in ("neg_category_ids", "not_exhaustive_category_ids"):
            column(name).must(lambda value: isinstance(value, list) and all(
                type(number) is int for number in value), "a list of ids of categories, as LVIS's")


def check_categories(path: Path, categories: list[dict], needs: set[str]) -> list[dict]:
    """The categories in the order of their ids."""
    column = partial(Column, path, "categories", categories)
    column("id").of_types({int}, "a whole number")
    unique(column("id"))
    column("name").must(is_text, "the name of a class")
    if "segments" in needs:
        column("isthing").must(lambda value: value in (0, 1), "0 or 1")
    if "lvis" in needs:
        column("frequency").must(lambda value: value in ("r", "c", "f"), "r, c or f, as LVIS's")
    return sorted(categories, key=lambda category: category["id"])


def check_annotations(coco: Coco, needs: set[str]) -> None:
    """Annotations of instances: what they refer to, their boxes, areas and masks."""
    column = partial(Column, coco.path, "annotations", coco.annotations)
    if any("id" in annotation for annotation in coco.annotations):
        unique(column("id"))
    if len(coco.annotations) > 200_000 and is_main():
        print(f"checking the {len(coco.annotations):,} annotations of {coco.path}")
    check_references(coco, column("image_id"), column("category_id"))
    column("iscrowd", 0).one_of({0, 1}, "0 or 1")
    if "boxes" in needs:
        check_boxes(coco, column("bbox"))
    if "masks" in needs:
        check_masks(coco)


def check_references(coco: Coco, images: Column, categories: Column) -> None:
    """Raises UserError on an id of an image or a category that the json does not have."""
    images.one_of({image["id"] for image in coco.images}, "the id of one of 'images'")
    categories.one_of({category["id"] for category in coco.categories},
                      "the id of one of 'categories'")


def four_numbers(column: Column) -> np.ndarray:
    """Boxes x, y, width, height -> (n, 4); UserError for anything but finite numbers."""
    what = "four finite numbers: x, y, width and height in pixels"
    column.of_types({list}, what)
    if {*map(len, column.values)} - {4} or (
            {*map(type, chain.from_iterable(column.values))} - NUMBERS):
        column.must(lambda box: len(box) == 4 and {*map(type, box)} <= NUMBERS, what)
    try:
        boxes = np.array(column.values, dtype=np.float64).reshape(-1, 4)
    except OverflowError:
        column.must(lambda box: max(map(abs, box)) < 1e300, what)
    is_right = np.isfinite(boxes).all(axis=1)
    if not is_right.all():
        column.refuse(int(np.flatnonzero(~is_right)[0]), what)
    return boxes


def check_boxes(coco: Coco, column: Column) -> None:
    """Boxes in pixels. One without a pixel in its image is left out; an area that is none becomes
    the box's."""
    boxes = four_numbers(column)
    corners = boxes[:, :2] + boxes[:, 2:]
    if len(boxes) and corners.max() <= 1 and boxes[:, 2:].any():
        column.refuse(0, "in pixels, but all boxes lie within 1 x 1: they seem to be shares of "
                      "their images")
    for annotation in coco.annotations:
        area = annotation.get("area")
        if type(area) not in NUMBERS or not 0 < area < 1e300:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    ends = sizes_of(coco)[:, ::-1]
    is_shown = ((boxes[:, 2:] > 0) & (corners > 0) & (boxes[:, :2] < ends)).all(axis=1)
    coco.leave_out(is_shown, "boxes without a pixel in their image")


def sizes_of(coco: Coco) -> np.ndarray:
    """The height and width of each annotation's image, (n, 2)."""
    size_of = {image["id"]: (image["height"], image["width"]) for image in coco.images}
    return np.array([size_of[annotation["image_id"]] for annotation in coco.annotations],
                    dtype=np.int64).reshape(-1, 2)


def check_masks(coco: Coco) -> None:
    """Polygons and run lengths; an annotation whose mask is empty is left out."""
    sizes = sizes_of(coco)
    column = Column(coco.path, "annotations", coco.annotations, "segmentation", None)
    column.of_types({list, dict, type(None)}, "a list of polygons or a run-length code")
    for place, shape in enumerate(column.values):
        if isinstance(shape, dict) and not is_run_length(shape, *sizes[place].tolist()):
            height, width = sizes[place]
            column.refuse(place, f"a run-length code of {height} x {width} pixels")
    check_polygons(column, sizes.max(axis=1, initial=0))
    for annotation, shape in zip(coco.annotations, column.values):
        if isinstance(shape, list) and any(len(part) < 6 for part in shape):
            annotation["segmentation"] = [part for part in shape if len(part) >= 6]
    is_full = [bool(annotation.get("segmentation")) for annotation in coco.annotations]
    coco.leave_out(np.array(is_full, dtype=bool), "masks of less than three points")


def check_polygons(column: Column, longest: np.ndarray) -> None:
    """Raises UserError on polygons that are no pairs of finite numbers, or far outside an image.

    longest: the longer side of each annotation's image, (n,).
    """
    what = "polygons of finite numbers x, y, x, y ... in pixels of its image"
    lists = [place for place, shape in enumerate(column.values) if isinstance(shape, list)]
    if {type(part) for place in lists for part in column.values[place]} - {list}:
        column.must(lambda shape: not isinstance(shape, list)
                    or {*map(type, shape)} <= {list}, what)
    parts = list(chain.from_iterable(column.values[place] for place in lists))
    entry = np.repeat(np.array(lists, dtype=np.int64),
                      [len(column.values[place]) for place in lists])     # of each polygon
    if {type(number) for number in chain.from_iterable(parts)} - NUMBERS:
        column.must(lambda shape: not isinstance(shape, list)
                    or {*map(type, chain.from_iterable(shape))} <= NUMBERS, what)
    lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
    try:
        number = np.fromiter(chain.from_iterable(parts), dtype=np.float64, count=lengths.sum())
    except OverflowError:
        column.must(lambda shape: not isinstance(shape, list) or max(
            map(abs, chain.from_iterable(shape)), default=0) < 1e300, what)
    of_image = np.repeat(longest[entry], lengths)
    is_near = (number >= -MAX_OUTSIDE * of_image) & (number <= (1 + MAX_OUTSIDE) * of_image)
    wrong = np.concatenate([entry[lengths % 2 == 1], np.repeat(entry, lengths)[~is_near]])
    if len(wrong):
        column.refuse(int(wrong.min()), what)


def is_run_length(shape: dict, height: int, width: int) -> bool:
    """Whether a run-length code, of either form, is of an image's size and fills it."""
    counts = shape.get("counts")
    if shape.get("size") != [height, width]:
        return False
    if isinstance(counts, str):
        return counts.isascii() and decodes(shape)
    return (isinstance(counts, list) and {*map(type, counts)} <= {int}
            and all(0 <= count for count in counts) and sum(counts) == height * width)


def decodes(code: dict) -> bool:
    """Whether the runs of a compressed code fill its image."""
    runs, place, counts = [], 0, code["counts"].encode()
    while place < len(counts):
        run, shift, more = 0, 0, True
        while more:
            if place == len(counts) or not 48 <= counts[place] < 112:
                return False
            value = counts[place] - 48
            run |= (value & 31) << shift
            more, shift, place = bool(value & 32), shift + 5, place + 1
        if value & 16:
            run -= 1 << shift
        runs.append(run + runs[-2] if len(runs) > 2 else run)
        if runs[-1] < 0:
            return False
    return sum(runs) == code["size"][0] * code["size"][1]


def check_segments(coco: Coco) -> None:
    """Annotations of a panoptic json: their image and PNG, and the segments in it."""
    if not coco.annotations:
        raise UserError(f"{coco.path} has no annotations; give a COCO-panoptic json.")
    if "segments_info" not in coco.annotations[0]:
        raise UserError(f"{coco.path} has no field 'segments_info' in its annotations; give the "
                        "panoptic json, such as panoptic_val2017.json, not instances or captions.")
    column = partial(Column, coco.path, "annotations", coco.annotations)
    column("file_name").must(is_name, "the name of a PNG")
    column("segments_info").must(lambda value: isinstance(value, list) and all(
        isinstance(segment, dict) for segment in value), "a list of segments")
    segments = list(chain.from_iterable(annotation["segments_info"]
                                        for annotation in coco.annotations))
    of_segments = partial(Column, coco.path, "segments_info", segments)
    of_segments("id").must(lambda value: type(value) is int and 0 <= value < 2**24,
                           "a colour's number")
    check_references(coco, column("image_id"), of_segments("category_id"))
    four_numbers(of_segments("bbox"))
    of_segments("iscrowd", 0).one_of({0, 1}, "0 or 1")


# --------------------------------------------------------------------------- what is made of them

class Instances:
    """A COCO-instances json, rendered to label images: 0 is background, 1 ... are the categories in
    the order of their ids."""

    def __init__(self, path: Path):
        self.content = read_coco(path, {"masks"})
        if self.content.left_out and is_main():
            print(self.content.report())
        self.names = [category["name"] for category in self.content.categories]
        value = {category["id"]: place + 1
                 for place, category in enumerate(self.content.categories)}
        self.image_of = {image["file_name"]: image["id"] for image in self.content.images}
        if len(self.image_of) < len(self.content.images):
            twice = Counter(image["file_name"] for image in self.content.images).most_common(1)
            raise UserError(f"{path} has {twice[0][1]} images with the name {twice[0][0]!r}; leave "
                            "one of each.")
        names = Counter(name.rsplit("/", 1)[-1] for name in self.image_of)
        # By the name alone, too, where it is one image's: names may lie in folders.
        self.image_of = {name.rsplit("/", 1)[-1]: id for name, id in self.image_of.items()
                         if names[name.rsplit("/", 1)[-1]] == 1} | self.image_of
        self.of_image: dict[int, list[tuple]] = {}
        for annotation in self.content.annotations:
            shape = annotation["segmentation"], value[annotation["category_id"]]
            self.of_image.setdefault(annotation["image_id"], []).append(shape)

    def render(self, file: Path, height: int, width: int) -> np.ndarray:
        """The label image (height, width); of overlapping objects the smaller one is on top.

        Raises UserError for an image that the json does not list: neither its name nor, with some
        of the folders that it lies in, its path.
        """
        places = ("/".join(file.parts[start:]) for start in range(len(file.parts)))
        name = next((place for place in places if place in self.image_of), None)
        if name is None:
            raise UserError(f"{self.content.path} says nothing of {file.name}; give the json and "
                            "the images of one split.")
        objects = [(instance_mask(shape, height, width), value)
                   for shape, value in self.of_image.get(self.image_of[name], [])]
        label = np.zeros((height, width), np.uint16)
        for mask, value in sorted(objects, key=lambda found: -int(found[0].sum())):
            label[mask] = value
        return label


def instance_mask(shape: list | dict, height: int, width: int) -> np.ndarray:
    """Polygons, or a run-length code in either of COCO's forms -> bool (height, width)."""
    is_compressed = isinstance(shape, dict) and isinstance(shape["counts"], str)
    codes = shape if is_compressed else coco_masks.frPyObjects(shape, height, width)
    codes = coco_masks.merge(codes) if isinstance(codes, list) else codes
    return coco_masks.decode(codes).astype(bool)


def files_below(path: Path, folder: Path, names: Sequence[str], setting: str,
                or_else: str = "") -> list[str]:
    """The files that a json names in a folder; UserError if one is not below it.

    setting: what names the folder. or_else: what else can be done.
    """
    files, base = [str(folder / name) for name in names], os.path.join(os.path.abspath(folder), "")
    alien = next((file for file in files if not os.path.abspath(file).startswith(base)), None)
    if alien:
        raise UserError(f"{path} names {alien}, which is not below {folder.absolute()}; set "
                        f"{setting} to the folder that holds its images{or_else}.")
    return files


def is_inside(bbox: list[float], height: int, width: int) -> bool:
    """Whether a box x, y, width, height has a part in an image."""
    x, y, w, h = bbox
    return w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0
