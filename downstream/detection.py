"""Open-vocabulary detection: data sets and their splits, augmentation, average precision.

    annotations = find_annotations("ovcoco", "train")   # or "val"; checked before a model is loaded
    dataset = DetectionData(annotations, masks=False)   # for data.training_batches
    objects = augment(dataset.read(0), "seed-epoch-index", side=640)

OV-COCO and OV-LVIS are derived from the official jsons as they are read (paper, section 4.3): a
class is seen in training or novel; training gets the annotations of seen classes alone. Nothing
here knows of a detector.

Letters: K classes, k objects of an image, n detections. Boxes are x0 y0 x1 y1 in pixels.
"""

import difflib
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, count
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_masks
from torch import Tensor
from torch.utils.data import Dataset

from data import read_classes, resize
from util import UserError
from util.coco import (
    UNKNOWN,
    Coco,
    check_masks,
    files_below,
    instance_mask,
    read_coco,
    read_unknown,
)
from util.distributed import is_main
from util.files import atomic_write, find
from util.images import read_image
from util.labels import CLASS_FILES, check_sizes
from util.results import told_apart
from util.samples import TrainingData
from util.windows import resized_size


class Objects(NamedTuple):
    """An image and its labelled objects."""
    image: Tensor       # uint8 (3, H, W); float [0, 1] once it is augmented
    boxes: Tensor       # float (k, 4), inside the image
    labels: Tensor      # long (k,), places in the list of classes; K: of no class, unknown
    masks: Tensor       # bool (k, H, W), or (k, 0, 0) where masks were not asked for
    weights: Tensor     # float (k,) in [0, 1], how sure an unknown one is an object; 1 of others

    def only(self, kept: Tensor) -> "Objects":
        """Those of the objects that are kept, (k,) bool or places."""
        return self._replace(**{name: getattr(self, name)[kept] for name in self._fields[1:]})


class Detections(NamedTuple):
    """What a detector found on an image, the best first."""
    boxes: Tensor       # float (n, 4), in pixels of the original image
    scores: Tensor      # (n,) in [0, 1]
    labels: Tensor      # long (n,), places in the detector's classes
    masks: list[Tensor] | None      # bool (H, W) each; None of a detector without masks


# ------------------------------------------------------------------------------------ benchmarks

RARE = "rare"       # the novel classes are those of LVIS's frequency r


@dataclass(frozen=True)
class DetectionBenchmark:
    """A data set's files in their original layout, and its split.

    train, val: a COCO-style json and the folder of its images, below DATA.
    """
    train: tuple[str, str] | None = None
    val: tuple[str, str] | None = None
    base: str | None = None         # class file of the seen classes; None: all that are not novel
    novel: str | None = None        # class file of the novel ones, or RARE; None: there are none
    is_lvis: bool = False           # not every class is annotated on every image: LVIS's rules
    most: int = 100                 # detections of an image that count


COCO_TRAIN = ("coco/annotations/instances_train2017.json", "coco/train2017")
COCO_VAL = ("coco/annotations/instances_val2017.json", "coco/val2017")

KNOWN_BENCHMARKS = {
    "ovcoco": DetectionBenchmark(COCO_TRAIN, COCO_VAL, "ovcoco_base.txt", "ovcoco_novel.txt"),
    "ovlvis": DetectionBenchmark(("lvis/lvis_v1_train.json", "coco"),
                                 ("lvis/lvis_v1_val.json", "coco"),
                                 novel=RARE, is_lvis=True, most=300),
    # Of transfer: nothing is seen or novel but by the detector's own training.
    "coco": DetectionBenchmark(COCO_TRAIN, COCO_VAL),
    "objects365": DetectionBenchmark(val=("objects365/annotations/objects365_val.json",
                                          "objects365/val")),
}


class Annotations(NamedTuple):
    """A json as a benchmark wants it: images, and the objects of its classes."""
    path: Path                  # the json, for messages
    benchmark: DetectionBenchmark
    images: list[dict]          # the json's entries: id, height, width ...
    files: list[str]            # and their files
    objects: list[dict]         # the json's entries, crowds too
    ids: list[int | None]       # (K,) the json's id of each class; None: it lacks the class
    classes: list[str]          # (K,) names
    seen: list[bool]            # (K,) whether training may see a class
    frequencies: list[str]      # (K,) LVIS's r, c or f; "" elsewhere


def find_annotations(dataset: str, split: str, data: str | Path = "data",
                     annotations: str | None = None, images: str | None = None,
                     novel: str | None = None) -> Annotations:
    """The annotations of a data set to train with ("train") or to evaluate with ("val").

    dataset: a name of KNOWN_BENCHMARKS, or a COCO-style json of one's own beside its images. data:
    the folder that holds the data sets. annotations, images: a json and a folder instead of the
    data set's (zero-shot files made for other code will do). novel: names with commas between,
    instead of the data set's novel classes.
    Raises UserError if files are missing or not as they should be, and if nothing is left.
    """
    benchmark, path, folder = find_files(dataset, split, data)
    if annotations:
        path = find(annotations)
    elif path is None:
        raise UserError(f"{dataset} is only to evaluate with; train with another DATASET.")
    if not path.is_file():
        raise UserError(f"There is no {path.absolute()}; unpack the data set there as docs/data.md "
                        "says, or set DATA or ANNOTATIONS to where it is.")
    coco = read_coco(path, {"boxes", "lvis"} if benchmark.is_lvis else {"boxes"})
    ids, *classes = split_classes(path, coco.categories, benchmark, novel)
    kept = {id for id, seen in zip(ids, classes[1]) if seen or split == "val"}
    objects = [entry for entry in coco.annotations if entry["category_id"] in kept]
    entries = coco.images
    if split == "train" or benchmark.novel and not benchmark.is_lvis:
        with_objects = {entry["image_id"] for entry in objects}
        entries = [image for image in entries if image["id"] in with_objects]
    files = files_below(path, find(images or folder),
                        [image["file_name"] for image in entries], "IMAGES")
    if is_main():
        print(coco.report())
    if not objects:
        what = "that training may see" if split == "train" else f"of {dataset}"
        raise UserError(f"{path} has no object of a class {what}; give another json, or other "
                        "NOVEL classes.")
    if not Path(files[0]).is_file():
        raise UserError(f"{path} names {files[0]}, which is not there; unpack the images there, or "
                        "set IMAGES to the folder that holds them.")
    return Annotations(path, benchmark, entries, files, objects, ids, *classes)


def find_files(dataset: str, split: str, data: str | Path
               ) -> tuple[DetectionBenchmark, Path | None, Path]:
    """The benchmark, its json for a split, None if it has none, and the folder of its images."""
    if dataset.endswith(".json"):
        path = find(dataset)
        return DetectionBenchmark(), path, path.parent
    if dataset not in KNOWN_BENCHMARKS:
        raise UserError(f"There is no data set {dataset!r}; choose among "
                        f"{', '.join(KNOWN_BENCHMARKS)}, or a COCO-style json of your own.")
    benchmark = KNOWN_BENCHMARKS[dataset]
    path, folder = getattr(benchmark, split) or (None, "")
    return benchmark, path and find(Path(data) / path), find(Path(data) / folder)


def val_images(cfg: SimpleNamespace) -> Path | None:
    """The folder of the val images of a training's DATASET; None for a json, which has none."""
    is_own = cfg.DATASET.endswith(".json")
    return None if is_own else find_files(cfg.DATASET, "val", cfg.DATA)[1]


def split_classes(path: Path, categories: list[dict], benchmark: DetectionBenchmark,
                  novel: str | None) -> tuple[list[int], list[str], list[bool], list[str]]:
    """The json's id, name, whether seen, and frequency of each class, in the order of ids.

    Of a benchmark with class files, those that neither names are left out.
    """
    unseen = []
    if benchmark.base:
        base, unseen = (read_classes(CLASS_FILES / name).names
                        for name in (benchmark.base, benchmark.novel))
        categories = [category for category in categories
                      if category["name"] in {*base, *unseen}]
        listed = [category["name"] for category in categories]
        check_category_names(path, base, listed)
        # Files of the seen classes alone lack the novel ones, which are classes all the same.
        categories += [{"id": None, "name": name} for name in unseen if name not in listed]
    elif benchmark.novel == RARE:
        unseen = [category["name"] for category in categories if category["frequency"] == "r"]
    names = [category["name"] for category in categories]
    if novel is not None:
        unseen = [name.strip() for name in novel.split(",") if name.strip()]
        check_category_names(path, unseen, names)
    if not set(names) - set(unseen):
        raise UserError(f"All {len(names)} classes of {path} are novel; leave some for training.")
    return ([category["id"] for category in categories], names,
            [name not in unseen for name in names],
            [category.get("frequency", "") for category in categories])


def check_category_names(path: Path, wanted: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError on a wanted name that is none of a json's names."""
    missing = next((name for name in wanted if name not in names), None)
    if missing is not None:
        near = difflib.get_close_matches(missing, names, n=1)
        advice = f"did you mean {near[0]!r}?" if near else "take a name of its 'categories'."
        raise UserError(f"{path} has no category {missing!r}; {advice}")


def with_masks(annotations: Annotations) -> Annotations:
    """The same with the objects that have a mask; UserError for a mask that is none."""
    coco = Coco(annotations.path, annotations.images, annotations=annotations.objects)
    check_masks(coco)
    if coco.left_out and is_main():
        print(f"of objects with masks: {coco.report()}")
    return annotations._replace(objects=coco.annotations)


def with_unknown(annotations: Annotations, path: str) -> Annotations:
    """The same with the unknown objects of a json, said how many."""
    unknown = read_unknown(path, annotations.images)
    if is_main():
        print(unknown.report())
    return annotations._replace(objects=annotations.objects + unknown.annotations)


# -------------------------------------------------------------------------------------- the data

class DetectionData(TrainingData):
    """Images with at least one object of a seen class. `read` returns Objects, crowds left out.

    masks: whether Objects have masks. classes, seen: see Annotations. unknown: a json of unknown
    objects (util.coco.read_unknown). repeat: images of classes that fewer than this share of the
    images have come more often (LVIS's repeat factor). Objects of less than a pixel inside the
    image are left out.
    Raises UserError if none is left.
    """

    def __init__(self, annotations: Annotations, masks: bool, read_timeout: float = 60.0,
                 unknown: str | None = None, repeat: float | None = None):
        super().__init__(annotations.files, read_timeout)
        annotations = with_masks(annotations) if masks else annotations
        if unknown:
            annotations = with_unknown(annotations, unknown)
        self.path, self.classes, self.seen = annotations.path, annotations.classes, annotations.seen
        self.sources = [self.path]
        self.sizes = [(image["height"], image["width"]) for image in annotations.images]
        place = {image["id"]: number for number, image in enumerate(annotations.images)}
        objects = sorted((entry for entry in annotations.objects if not entry.get("iscrowd", 0)),
                         key=lambda entry: place[entry["image_id"]])
        class_of = {id: number for number, id in enumerate(annotations.ids)}
        class_of[UNKNOWN] = len(self.classes)
        # Arrays: a million dictionaries would be copied into every worker, little by little.
        image = np.array([place[entry["image_id"]] for entry in objects], dtype=np.int64)
        boxes = np.array([entry["bbox"] for entry in objects], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]        # x0 y0 x1 y1, cut at the borders
        sizes = np.array(self.sizes, dtype=np.float32)[image]
        boxes = boxes.clip(0, np.tile(sizes[:, ::-1], 2))
        shown = is_shown(boxes, 1)
        if not shown.any():
            raise UserError(f"{self.path} has no object to train with that is no crowd and at "
                            f"least a pixel large: {len(annotations.objects) - len(objects):,} of "
                            f"{len(annotations.objects):,} are crowds, {len(objects):,} smaller; "
                            "give another json.")
        self.first = np.searchsorted(image[shown], np.arange(len(self) + 1))
        self.boxes, objects = boxes[shown], list(compress(objects, shown))
        self.labels = np.array([class_of[entry["category_id"]] for entry in objects], np.int64)
        self.weights = np.array([entry["weight"] if entry["category_id"] == UNKNOWN else 1
                                 for entry in objects], np.float32)
        self.factors = repeat and self.repeat_factors(repeat)
        self.shapes = masks and [json.dumps(entry["segmentation"]).encode() for entry in objects]

    @cached_property
    def fingerprint(self) -> str:
        """As TrainingData's; other objects give another one."""
        crc = 0
        is_unknown = self.labels == len(self.classes)
        for array in (self.first, self.boxes, self.labels, self.weights[is_unknown]):
            crc = zlib.crc32(array.tobytes(), crc)
        return f"{super().fingerprint}, {len(self.boxes)} objects, {crc:08x}"

    def read(self, index: int) -> Objects:
        """Image `index` and its objects. UserError if it can't be read, or has another size."""
        image = read_sized(self.paths[index], self.sizes[index])
        these = slice(*self.first[index:index + 2].tolist())
        masks = torch.zeros(len(self.boxes[these]), 0, 0, dtype=torch.bool)
        if self.shapes:
            size = self.sizes[index]
            found = [instance_mask(json.loads(shape), *size) for shape in self.shapes[these]]
            masks = torch.from_numpy(np.array(found, dtype=bool).reshape(-1, *size))
        boxes, labels, weights = (torch.from_numpy(array[these])
                                  for array in (self.boxes, self.labels, self.weights))
        return Objects(image, boxes, labels, masks, weights)

    def repeat_factors(self, threshold: float) -> np.ndarray:
        """How often an image should come (images,): sqrt(threshold / share) of its rarest class,
        at least once. A class's share is that of the images that have it."""
        image = np.repeat(np.arange(len(self)), np.diff(self.first))
        known = self.labels < len(self.classes)
        pairs = np.unique(np.stack([image[known], self.labels[known]]), axis=1)
        shares = np.bincount(pairs[1], minlength=len(self.classes)) / len(self)
        factors = np.ones(len(self))
        np.maximum.at(factors, pairs[0], np.sqrt(threshold / shares[pairs[1]]))
        return factors

    def order(self, batch_size: int, epoch: int, seed: int) -> Sequence:
        """See TrainingData.order; with repeat factors, as many images drawn by them, with
        replacement."""
        order = super().order(batch_size, epoch, seed)
        if self.factors is None:
            return order
        generator = np.random.default_rng([seed, epoch])
        drawn = generator.choice(len(self), order.shape, p=self.factors / self.factors.sum())
        return torch.from_numpy(drawn)


class EvaluationImages(Dataset):
    """The images of annotations: item i is (i, uint8 (3, H, W))."""

    def __init__(self, annotations: Annotations):
        self.paths = annotations.files
        self.sizes = [(image["height"], image["width"]) for image in annotations.images]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, read_sized(self.paths[index], self.sizes[index])


def read_sized(path: str, size: tuple[int, int]) -> Tensor:
    """An image uint8 (3, H, W); UserError if its height and width are not the json's."""
    image = read_image(path)
    check_sizes("The json's entry", size, path, image.shape[-2:])
    return image


# ----------------------------------------------------------------------------------- augmentation

class View(NamedTuple):
    """A part of a resized image."""
    size: tuple[int, int]       # height and width of the whole, resized image
    rows: slice
    columns: slice
    is_flipped: bool

    def place(self, boxes: Tensor, of_image: tuple[int, int]) -> Tensor:
        """Boxes (k, 4) of an image of this height and width -> in the view, cut at its borders."""
        y, x = ((boxes[:, axis::2] * (resized / side) - part.start).clamp(0, part.stop - part.start)
                for axis, resized, side, part in zip((1, 0), self.size, of_image,
                                                     (self.rows, self.columns)))
        x = self.columns.stop - self.columns.start - x.flip(-1) if self.is_flipped else x
        return torch.stack([x, y], dim=-1).flatten(1)


def augment(objects: Objects, key: str, side: int, scales: tuple[float, float] = (0.1, 2.0),
            flip: float = 0.5, how: str = "cv2") -> Objects:
    """Resized, cropped and flipped at random (published): float image in [0, 1], at most `side`
    high and wide, without padding, and those of its objects that it shows, which may be none.
    Where there are masks, the boxes are those of the cropped masks, else the boxes are cropped.

    key: what is random depends on this text alone. scales: the longest side becomes `side` times
    a number of this range. flip: the share that is mirrored. how: of data.resize.
    """
    return show(objects, draw_view(objects.image, key, side, scales, flip), how)


class Crops(NamedTuple):
    """How a DETR's images are cropped."""
    share: float                    # of the images
    short_sides: Sequence[int]      # one of them is the image's, before it
    sides: Sequence[int]            # range of a crop's width and of its height


def augment_crop(objects: Objects, key: str, side: int, crops: Crops, flip: float, how: str
                 ) -> Objects:
    """The same as a DETR has it: flipped or not; then some cropped; then the longest side to
    `side`."""
    rng, image = random.Random(key), objects.image
    size, is_flipped = tuple(image.shape[-2:]), rng.random() < flip
    parts = [slice(0, whole) for whole in size]
    if rng.random() < crops.share:
        short = rng.choice(crops.short_sides)
        size = tuple(max(1, round(whole * short / min(size))) for whole in size)
        least, most = crops.sides
        sides = [rng.randint(min(least, whole), min(most, whole)) for whole in size]
        starts = [rng.randint(0, whole - part) for whole, part in zip(size, sides)]
        parts = [slice(start, start + part) for start, part in zip(starts, sides)]
    shown = show(objects, View(size, *parts, is_flipped), how)
    h, w = resized_size(shown.image, side, side)
    factors = shown.boxes.new_tensor([w / shown.image.shape[-1], h / shown.image.shape[-2]] * 2)
    return shown._replace(image=resize(shown.image, h, w, how), boxes=shown.boxes * factors)


def show(objects: Objects, view: View, how: str) -> Objects:
    """The view, and those of the objects that are in it; see augment."""
    of_image = tuple(objects.image.shape[-2:])
    image = resize(objects.image, *view.size, how)[:, view.rows, view.columns]
    image = image.flip(-1) if view.is_flipped else image
    boxes, masks = view.place(objects.boxes, of_image), objects.masks
    is_left = is_shown(boxes, 0.01)
    if masks.shape[-1]:
        # OpenCV's "nearest" pixel
        y, x = ((torch.arange(resized, device=masks.device) * side // resized)[part]
                for resized, side, part in zip(view.size, of_image, view[1:3]))
        masks = masks[:, y][:, :, x.flip(0) if view.is_flipped else x]
        boxes = boxes_of(masks)
        is_left &= is_shown(boxes, 1)
    return objects._replace(image=image, boxes=boxes, masks=masks).only(is_left)


def is_shown(boxes: Tensor | np.ndarray, least: float) -> Tensor | np.ndarray:
    """Which boxes (k, 4) are at least so many pixels high and wide: bool (k,)."""
    return (boxes[:, 2:] - boxes[:, :2] >= least).all(axis=1)


def boxes_of(masks: Tensor) -> Tensor:
    """The boxes (k, 4) that masks (k, h, w) fill; of no side for a mask without a pixel."""
    ends = []
    for is_filled in (masks.any(dim=1), masks.any(dim=2)):      # columns, then rows
        before, behind = (order.byte().argmax(dim=1) for order in (is_filled, is_filled.flip(1)))
        ends.append(torch.stack([before, is_filled.shape[1] - behind], dim=1)
                    * is_filled.any(dim=1, keepdim=True))
    return torch.stack(ends, dim=-1).flatten(1).float()


def draw_view(image: Tensor, key: str, side: int, scales: tuple[float, float], flip: float) -> View:
    """A random view of an image (3, H, W), whether it shows an object or not (published)."""
    rng = random.Random(key)
    size = resized_size(image, *2 * [max(1, int(side * rng.uniform(*scales)))])
    starts = [rng.randint(0, max(0, whole - side)) for whole in size]
    parts = [slice(start, min(start + side, whole)) for start, whole in zip(starts, size)]
    return View(size, *parts, rng.random() < flip)


# ------------------------------------------------------------------------------ average precision

def encode_detections(number: int, detections: Detections) -> list[dict]:
    """Detections on image `number` as COCO results; of masks the run-length codes.

    image_id is the image's number, category_id the class's number + 1.
    """
    boxes = detections.boxes.clone()
    boxes[:, 2:] -= boxes[:, :2]
    found = [{"image_id": number, "category_id": label + 1, "bbox": box, "score": score}
             for box, score, label in zip(boxes.tolist(), detections.scores.tolist(),
                                          detections.labels.tolist())]
    for result, mask in zip(found, detections.masks or ()):
        code = coco_masks.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
        result["segmentation"] = code | {"counts": code["counts"].decode()}     # json has no bytes
    return found


AT_ONCE = 40        # classes that are scored at once


class Results:
    """COCO results of encode_detections on the disk, where temporary files go (TMPDIR): OV-LVIS has
    six million, with masks. A file has those of AT_ONCE classes, a line each."""

    def __init__(self, num_classes: int):
        self.files = [TemporaryFile() for _ in range(0, num_classes, AT_ONCE)]

    def add(self, results: list[dict]) -> None:
        """Appends results."""
        for result in results:
            file = self.files[(result["category_id"] - 1) // AT_ONCE]
            file.write(json.dumps(result).encode() + b"\n")

    def parts(self) -> Iterator[tuple[slice, list[dict]]]:
        """Some classes and all their results, until there are no more classes."""
        for number, file in enumerate(self.files):
            file.seek(0)
            yield slice(number * AT_ONCE, (number + 1) * AT_ONCE), [*map(json.loads, file)]

    def write(self, path: str, annotations: Annotations) -> None:
        """Writes all as one json, with the names and under the ids of the annotations' json."""
        categories = [*zip(annotations.ids, annotations.classes)]
        lines = (json.dumps(named) for _, results in self.parts() for result in results
                 for named in name_results([result], annotations.images[result["image_id"]],
                                           categories))

        def write_to(temporary: str) -> None:
            with open(temporary, "w") as file:
                file.write("[" + next(lines, ""))
                file.writelines(f",\n{line}" for line in lines)
                file.write("]\n")
        atomic_write(path, write_to)


def name_results(results: list[dict], image: dict, categories: Sequence[tuple[int | None, str]]
                 ) -> list[dict]:
    """Results on an image, with the names and under the ids of a json: its entry of the image, and
    (id, name) of each class; no results of those whose id is None."""
    return [result | {"image_id": image["id"], "file_name": image["file_name"], "category_id": id,
                      "category": name} for result in results
            for id, name in [categories[result["category_id"] - 1]] if id is not None]


def truth_of(annotations: Annotations, classes: slice = slice(None)) -> dict:
    """The annotations of some classes as a COCO json under the numbers of encode_detections.

    Numbers of objects begin with 1: COCO's evaluation takes 0 for none.
    """
    place = {image["id"]: number for number, image in enumerate(annotations.images)}
    rows = [*zip(count(1), annotations.ids, annotations.classes, annotations.frequencies)][classes]
    class_of = {id: number for number, id, *_ in rows}
    images = [image | {"id": number} | {
        field: [class_of[id] for id in image[field] if id in class_of]
        for field in ("neg_category_ids", "not_exhaustive_category_ids") if field in image}
        for number, image in enumerate(annotations.images)]
    objects = [{"iscrowd": 0} | entry | {"id": number, "image_id": place[entry["image_id"]],
                                         "category_id": class_of[entry["category_id"]]}
               for number, entry in enumerate(annotations.objects, 1)
               if entry["category_id"] in class_of]
    categories = [{"id": number, "name": name, "frequency": frequency or "f"}
                  for number, _, name, frequency in rows]
    return {"images": images, "annotations": objects, "categories": categories}


def precisions(annotations: Annotations, results: list[dict], masks: bool = False,
               classes: slice = slice(None)) -> np.ndarray:
    """Precision at 10 IoUs, 101 recalls, of K classes and 4 areas: (10, 101, K, 4), -1 where there
    is no object. COCO's rules, or LVIS's.

    results: of encode_detections, of all images. masks: whether overlaps are those of masks.
    classes: those to score, as each is by itself; results are of no others.
    """
    content = truth_of(annotations, classes)
    if annotations.benchmark.is_lvis:
        # Others don't count, and COCOeval_faster fails where an image has masks of none but these.
        counted = {(image["id"], number) for image in content["images"]
                   for number in image["neg_category_ids"]}
        counted |= {(entry["image_id"], entry["category_id"]) for entry in content["annotations"]}
        results = [result for result in results
                   if (result["image_id"], result["category_id"]) in counted]
    if masks:       # areas are those of masks then, not of boxes
        results = [{name: value for name, value in result.items() if name != "bbox"}
                   for result in results]
    truth = COCO(content)
    evaluation = COCOeval_faster(truth, truth.loadRes(results), "segm" if masks else "bbox",
                                 lvis_style=annotations.benchmark.is_lvis)
    evaluation.params.maxDets = [annotations.benchmark.most]
    evaluation.evaluate()
    evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[..., -1]


def summarize(precision: np.ndarray, classes: Sequence[str], groups: dict[str, Sequence[bool]]
              ) -> dict:
    """AP, AP50, AP75 and AP of small, medium and large objects in %, of all classes; AP and AP50
    of each group of classes; each class's AP50. None where there is no object.

    precision: of `precisions`. groups: name -> (K,) which classes are in it.
    """
    result = {"AP": mean(precision[..., 0]), "AP50": mean(precision[0, ..., 0]),
              "AP75": mean(precision[5, ..., 0])}
    result |= {f"AP{size}": mean(precision[..., place + 1]) for place, size in enumerate("sml")}
    of_groups = {name: precision[:, :, np.array(group, dtype=bool), 0]
                 for name, group in groups.items()}
    result["groups"] = {name: {"AP": mean(part), "AP50": mean(part[0])}
                        for name, part in of_groups.items()}
    result["classes"] = {name: mean(precision[0, :, number, 0])
                         for number, name in enumerate(told_apart(classes))}
    return result


def mean(precision: np.ndarray) -> float | None:
    """The mean of precisions in %, of those that there are."""
    counted = precision[precision > -1]
    return 100 * float(counted.mean()) if counted.size else None


def groups_of(annotations: Annotations, seen: Sequence[bool]) -> dict[str, list[bool]]:
    """The groups of classes that a table tells apart: LVIS's frequencies, else novel and base.

    seen: (K,) what the detector's training has seen: novel is only what it has not, and of that
    what the data set calls novel, if it has a split.
    """
    if annotations.benchmark.is_lvis:
        return {letter: [frequency == letter for frequency in annotations.frequencies]
                for letter in "rcf"}
    has_split = not all(annotations.seen)
    novel = [not (is_seen or has_split and is_base)
             for is_seen, is_base in zip(seen, annotations.seen)]
    return {"novel": novel, "base": list(seen)} if any(novel) else {}
