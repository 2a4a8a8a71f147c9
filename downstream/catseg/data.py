"""CAT-Seg's data: labelled images to train with and their augmentation, and the evaluation sets.

Workers decode image and label and nothing else; `augment` makes the rest on the device, random by a
key. Sets are read in their original layouts (docs/data.md).
"""

import random
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import adjust_hue

from data import Classes, make_classes, read_classes, resize
from eval_seg import KNOWN_BENCHMARKS, find_set
from util import UserError
from util.files import find
from util.images import MAX_DECODED
from util.labels import CLASS_FILES, VOID, MissingData, SegmentationBenchmark, SegmentationImages
from util.samples import TrainingData
from util.windows import resized_size

# --------------------------------------------------------------------------- images to train with

class Labelled(NamedTuple):
    """An image and the class of each of its pixels."""
    image: Tensor       # uint8 (3, H, W)
    label: Tensor       # int16 (H, W), VOID where there is none


class LabelledImages(TrainingData):
    """The images of a set with their labels: what training reads."""

    def __init__(self, scenes: SegmentationImages, read_timeout: float = 60.0):
        self.scenes, image = scenes, scenes.benchmark.image
        super().__init__([str(scenes.root / image.format(name)) for name in scenes.names],
                         read_timeout)
        self.sources = [CLASS_FILES / scenes.benchmark.classes, *(
            [scenes.instances.content.path] if scenes.instances else [])]

    def read(self, index: int) -> Labelled:
        return Labelled(*self.scenes[index])

    def look(self, most: int = 16) -> None:
        """Raises UserError if a label is not this set's, or the first ones are void throughout."""
        count = min(most, len(self))
        if not any((self.read(index).label != VOID).any() for index in range(count)):
            raise UserError(f"The labels of the first {count} of {len(self):,} images, such as "
                            f"{self.paths[0]}, are void at every pixel, so nothing can be learned "
                            "from them; take the labels of this data set.")


def find_training(name: str, data: str | Path) -> tuple[SegmentationImages, list[str]]:
    """COCO-Stuff's train set or that of a user's own json -> it, and a name for each class.

    Raises UserError if there is no such set or file.
    """
    if name == "coco_stuff":
        benchmark = replace(KNOWN_BENCHMARKS[name], image="train2017/{}.jpg",
                            label="stuffthingmaps/train2017/{}.png")
        return SegmentationImages(benchmark, data), read_classes("classes/coco_stuff.txt").names
    if not name.endswith(".json"):
        raise UserError(f"There are no training images {name!r}; choose coco_stuff, or a json file "
                        "of your own.")
    scenes, classes = find_set(name, data)
    return scenes, classes.names


MAX_SIDE = 1333     # of an image that is resized for training (published)


def augment(sample: Labelled, size: int, key: str, how: str = "pil") -> Labelled:
    """A random crop, in colours of its own and perhaps flipped, the same for the same `key`: float
    [0, 1] (3, size, size) and labels int64 (size, size).

    The shorter side is resized to `size`, `how` as data.resize says; what an image lacks then,
    because its longer side would be more than MAX_SIDE, is grey, and void.
    """
    rng, (image, label) = random.Random(key), sample
    H, W = label.shape
    h, w = resized_size(image, size, MAX_SIDE)
    top, left = rng.randint(0, max(0, h - size)), rng.randint(0, max(0, w - size))
    image = resize(image, h, w, how)[:, top:top + size, left:left + size]
    label = label[nearest(top, image.shape[1], h, H, label.device)]
    label = label[:, nearest(left, image.shape[2], w, W, label.device)].long()
    image = jitter(image, rng)
    if rng.random() < 0.5:
        image, label = image.flip(-1), label.flip(-1)
    missing = (0, size - image.shape[2], 0, size - image.shape[1])
    pad = torch.nn.functional.pad
    return Labelled(pad(image, missing, value=128 / 255), pad(label, missing, value=VOID))


def nearest(start: int, count: int, length: int, original: int, device: torch.device) -> Tensor:
    """For pixels `start` ... of a side resized to `length`, what OpenCV and torch call the nearest
    ones of the original: rounded down."""
    return torch.arange(start, start + count, device=device) * original // length


def jitter(image: Tensor, rng: random.Random) -> Tensor:
    """SSD's colours: brightness, contrast, saturation and hue, each with a probability of 1/2.

    Contrast comes before or after saturation and hue. float [0, 1] (3, H, W) -> the same.
    """
    def coin() -> bool:
        return rng.random() < 0.5

    if coin():
        image = (image + rng.uniform(-32, 32) / 255).clamp(0, 1)
    contrast = rng.uniform(0.5, 1.5) if coin() else None
    comes_first = coin()
    if contrast and comes_first:
        image = (image * contrast).clamp(0, 1)
    if coin():
        image = saturate(image, rng.uniform(0.5, 1.5))
    if coin():
        image = adjust_hue(image, rng.uniform(-0.1, 0.1))
    if contrast and not comes_first:
        image = (image * contrast).clamp(0, 1)
    return image


def saturate(image: Tensor, factor: float) -> Tensor:
    """HSV's saturation times a factor, at most 1, at the same hue and value."""
    value, least = image.amax(dim=0), image.amin(dim=0)
    most = value / (value - least).clamp(min=1e-6)      # of the factor: saturation 1
    return value - (value - image) * most.clamp(max=factor)


# ------------------------------------------------------------------------------- evaluation sets

LabelledSet = tuple[SegmentationImages, Classes]

ADE_OBJECTS, ADE_CLASSES = 3688, 847        # label values of ADE20K_2021_17_01, and of A-847
CONTEXT_OBJECTS = 459


def read_table(path: Path, most: int, origin: str, void: Sequence[int] = ()
               ) -> tuple[list[int], list[str]]:
    """The label values and first names of a table's lines `12: name, synonym`, the colon optional.

    most: the largest label value. origin: where the file comes from. void: values that lines may
    name, too, and that are no class. Raises UserError if there is
    no such file, or if a line is none of these, a value is too large, or occurs twice.
    """
    path = find(path)
    if not path.is_file():
        raise MissingData(f"There is no label table {path.absolute()}; {origin}.")
    table = {}
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        value = re.match(r"\d{1,9}(?=[\s:])", line.strip())
        rest = line.strip()[value.end():].lstrip().removeprefix(":") if value else ""
        name = rest.partition(",")[0].strip()
        if name and int(value[0]) in void:
            continue
        if line.strip() and not (name and 1 <= int(value[0]) <= most):
            raise UserError(f"{path}, line {number}, is {line.strip()[:60]!r}; it must be a label "
                            f"value from 1 to {most}, and a name.")
        if name and int(value[0]) in table:
            raise UserError(f"{path} names label value {value[0]} twice; write one class a line.")
        if name:
            table[int(value[0])] = name
    if not table:
        raise UserError(f"{path} names no class; write one class a line.")
    return [*table], [*table.values()]


def read_ade(path: Path) -> np.ndarray:
    """ADE20K's label PNG, whose red and green are the object's number -> numbers (H, W)."""
    with Image.open(path, formats=("PNG",)) as file:
        if file.mode != "RGB":
            raise UserError(f"{path} is an image of mode {file.mode}, but ADE20K's labels are "
                            "colours; take the _seg.png files of ADE20K_2021_17_01.")
        red, green = (np.array(file.getchannel(name)).astype(np.uint16) for name in "RG")
    return red // 10 * 256 + green


# How numbers are stored in a MATLAB file, by type. Arrays of classes 6 to 15 hold numbers.
MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8",
             13: "u8"}
MATRIX, COMPRESSED = 14, 15


def read_mat(path: Path) -> np.ndarray:
    """PASCAL-Context's .mat file -> its label map, values 0 to 65535 (H, W).

    Its own reader: scipy's ends the process on some damaged files. Raises whatever on those.
    """
    content = path.read_bytes()
    order = {b"\0\1IM": "<", b"\1\0MI": ">"}[content[124:128]]      # format 5, of MATLAB 5 to 7
    label = None
    for kind, element in mat_elements(content[128:], order):
        if kind == COMPRESSED:
            inflated = zlib.decompressobj()
            element = inflated.decompress(element, 8 * MAX_DECODED + 4096)
            if not inflated.eof:
                raise ValueError("it is cut off, damaged or too large")
            (kind, element), = mat_elements(element, order)
        if kind == MATRIX:
            (_, flags), (_, shape), (_, name), *numbers = mat_elements(element, order)
            if name == b"LabelMap":
                label = flags[0 if order == "<" else 3], np.frombuffer(shape, order + "i4"), numbers
    if label is None:
        raise UserError(f"{path} has no LabelMap; take trainval/*.mat of PASCAL-Context.")
    kind, shape, numbers = label
    values = None
    if 6 <= kind <= 15 and len(shape) == 2 and len(numbers) == 1:
        (stored, content), = numbers
        values = np.frombuffer(content, order + MAT_TYPES[stored]).reshape(shape, order="F")
    if (values is None or not values.size or (values != np.floor(values)).any()
            or values.min() < 0 or values.max() > 65535):
        raise UserError(f"{path} has a LabelMap of {' x '.join(map(str, shape))}, but it must be a "
                        "class number for each pixel; take trainval/*.mat of PASCAL-Context.")
    return values.astype(np.uint16)


def mat_elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """The types and contents of the elements of a MATLAB file. ValueError if it is cut off."""
    place = 0
    while place < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, place)
        start = place + 8
        if kind >> 16:      # a small element: both numbers in one, its content in the other
            kind, size, start = kind & 0xffff, kind >> 16, place + 4
        if start + size > len(content):
            raise ValueError("it is cut off or damaged")
        yield kind, content[start:start + size]
        place = start + size
        place += 0 if kind == COMPRESSED else -place % 8


def ade847(data: str | Path) -> LabelledSet:
    """A-847: the most frequent of ADE20K's objects; all others are void."""
    values, names = read_table(
        Path(data) / "ADE20K_2021_17_01/ade847.txt", ADE_OBJECTS, "the data set's own index is a "
        "pickle, which is never read, so docs/data.md makes it from a list of MaskFormer's")
    if len(values) != ADE_CLASSES:
        raise UserError(f"ade847.txt names {len(values)} classes, but A-847 has {ADE_CLASSES}; "
                        "make it as docs/data.md says, since an entry may run over two lines.")
    void = sorted({*range(ADE_OBJECTS + 1)} - {*values})
    benchmark = SegmentationBenchmark(
        "ADE20K_2021_17_01", "**/ADE_val_*", "images/ADE/validation/{}.jpg",
        "images/ADE/validation/{}_seg.png", "", values, void, read=read_ade)
    return Reduced(benchmark, data), make_classes(names)


def context459(data: str | Path) -> LabelledSet:
    """PC-459: all objects of PASCAL-Context."""
    void = 0, CONTEXT_OBJECTS + 1
    values, names = read_table(
        Path(data) / "VOCdevkit/VOC2010/labels.txt", CONTEXT_OBJECTS,
        "PASCAL-Context's page has it beside trainval.tar.gz", void)
    benchmark = replace(KNOWN_BENCHMARKS["context59"], label="trainval/{}.mat", values=values,
                        void=void, read=read_mat)
    return SegmentationImages(benchmark, data), make_classes(names)


def voc20b(data: str | Path) -> LabelledSet:
    """PAS-20b, the paper's VOC21: background is what PC-59's other 39 names get."""
    voc, context = (read_classes(f"classes/{name}.txt") for name in ("voc20", "context59"))
    of_voc = {number for name, number in zip(context.prompts, context.class_of_prompt)
              if name in voc.prompts}
    others = [name for number, name in enumerate(context.names) if number not in of_voc]
    classes = Classes(["background", *voc.names], [*others, *voc.names],
                      [0] * len(others) + [*range(1, len(voc) + 1)])
    benchmark = replace(KNOWN_BENCHMARKS["voc20"], values=range(len(classes)), void=(255,))
    return SegmentationImages(benchmark, data), classes


BENCHMARKS = ("ade847", "context459", "ade150", "context59", "voc20", "voc20b")     # Table 4's
OWN = {"ade847": ade847, "context459": context459, "voc20b": voc20b}    # not eval_seg.py's


def find_evaluation(name: str, data: str | Path) -> LabelledSet:
    """The images and classes of a set of BENCHMARKS, of eval_seg.py or of a user's json.

    A class is called by its first name alone, as published. UserError if files are missing.
    """
    if name in OWN:
        return OWN[name](data)
    images, classes = find_set(name, data)
    return images, make_classes(classes.names)


class Reduced(SegmentationImages):
    """Images and labels whose shorter side is at most 512 (published for A-847)."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = super().__getitem__(index)
        if min(label.shape) <= 512:
            return image, label
        (H, W), (h, w) = label.shape, resized_size(image, 512, max(label.shape))
        rows, columns = (nearest(0, side, side, original, label.device)
                         for side, original in ((h, H), (w, W)))
        return (resize(image, h, w, "cv2") * 255).round().byte(), label[rows][:, columns]
