"""Open-vocabulary detection: data sets and their splits, augmentation, average precision.

    annotations = find_annotations(cfg, "train")        # or "val"; checked before a model is loaded
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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as coco_masks
from torch import Tensor
from torch.utils.data import Dataset

from data import TrainingData, first_outside, fitted_size, read_classes, read_image, resize
from eval_seg import instance_mask
from util import UserError
from util.files import fields_of, find, read_json


class Objects(NamedTuple):
    """An image and its labelled objects."""
    image: Tensor       # uint8 (3, H, W); float [0, 1] once it is augmented
    boxes: Tensor       # float (k, 4), inside the image
    labels: Tensor      # long (k,), places in the list of classes
    masks: Tensor       # bool (k, H, W), or (k, 0, 0) where masks were not asked for


class Detections(NamedTuple):
    """What a detector found on an image, the best first."""
    boxes: Tensor       # float (n, 4), in pixels of the original image
    scores: Tensor      # (n,) in [0, 1]
    labels: Tensor      # long (n,), places in the detector's classes
    masks: list[Tensor] | None      # bool (H, W) each; None of a detector without masks


# ------------------------------------------------------------------------------------ benchmarks

RARE = "rare"       # the novel classes are those of LVIS's frequency r


@dataclass(frozen=True)
class Benchmark:
    """A data set's files in their original layout, and its split.

    train, val: a COCO-style json and the folder of its images, below DATA.
    """
    train: tuple[str, str] | None
    val: tuple[str, str]
    base: str | None = None         # class file of the seen classes; None: all that are not novel
    novel: str | None = None        # class file of the novel ones, or RARE; None: there are none
    is_lvis: bool = False           # not every class is annotated on every image: LVIS's rules
    most: int = 100                 # detections of an image that count


COCO_TRAIN = ("coco/annotations/instances_train2017.json", "coco/train2017")
COCO_VAL = ("coco/annotations/instances_val2017.json", "coco/val2017")
TOY_TRAIN = ("toy/train/instances.json", "toy/train")

KNOWN_BENCHMARKS = {
    "ovcoco": Benchmark(COCO_TRAIN, COCO_VAL, "ovcoco_base.txt", "ovcoco_novel.txt"),
    "ovlvis": Benchmark(("lvis/lvis_v1_train.json", "coco"), ("lvis/lvis_v1_val.json", "coco"),
                        novel=RARE, is_lvis=True, most=300),
    # Of transfer: nothing is seen or novel but by the detector's own training.
    "coco": Benchmark(COCO_TRAIN, COCO_VAL),
    "objects365": Benchmark(None, ("objects365/annotations/objects365_val.json",
                                   "objects365/val")),
    "toy": Benchmark(TOY_TRAIN, ("toy/val/instances.json", "toy/val/images")),
    "toy_dev": Benchmark(TOY_TRAIN, ("toy/dev/instances.json", "toy/dev/images")),
}


class Annotations(NamedTuple):
    """A json as a benchmark wants it: images, and the objects of its classes."""
    path: Path                  # the json, for messages
    benchmark: Benchmark
    images: list[dict]          # the json's entries: id, height, width ...
    files: list[str]            # and their files
    objects: list[dict]         # the json's entries, crowds too
    ids: list[int]              # the json's id of each class
    classes: list[str]          # (K,) names
    seen: list[bool]            # (K,) whether training may see a class
    frequencies: list[str]      # (K,) LVIS's r, c or f; "" elsewhere


def find_annotations(cfg: SimpleNamespace, split: str) -> Annotations:
    """The annotations of DATASET to train with ("train") or to evaluate with ("val").

    Settings: DATASET, a name of KNOWN_BENCHMARKS or a COCO-style json of one's own; DATA, the
    folder that holds the data sets; ANNOTATIONS and IMAGES, a json and a folder instead of the
    data set's (zero-shot files made for other code will do); NOVEL, names with commas between,
    instead of the data set's novel classes.
    Raises UserError if files are missing or not as they should be, and if nothing is left.
    """
    raise NotImplementedError


class DetectionData(TrainingData):
    """Images with at least one object of a seen class. `read` returns Objects, crowds left out.

    masks: whether Objects have masks. classes, seen: see Annotations.
    """

    def __init__(self, annotations: Annotations, masks: bool, read_timeout: float = 60.0):
        raise NotImplementedError


def augment(objects: Objects, key: str, side: int, scales: tuple[float, float] = (0.1, 2.0),
            flip: float = 0.5) -> Objects:
    """Resized, cropped and flipped at random (published): float image in [0, 1], at most `side`
    high and wide, without padding; the boxes that are left of its objects.

    key: what is random depends on this text alone. scales: the longest side becomes `side` times
    one of this range. flip: the share that is mirrored.
    """
    raise NotImplementedError
