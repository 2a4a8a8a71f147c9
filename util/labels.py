"""Label images as files: the benchmarks that have them, and one's own, described in a json."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from util import UserError
from util.coco import Instances
from util.files import ROOT, find, read_json
from util.images import read_image, unreadable

CLASS_FILES = ROOT / "classes"
VOID = -1       # label of pixels that do not count
UNKNOWN = -2    # label of pixels of a value that a benchmark does not have


@dataclass(frozen=True)
class SegmentationBenchmark:
    """A benchmark's files in their original layout, its label values, and how it is evaluated.

    `{}` in a path stands for an image's name.
    """
    folder: str                         # below DATA
    names: str                          # file of the images' names, one a line; or * or */*
    image: str                          # path of an image
    label: str                          # path of its label file, or of a COCO-instances json
    classes: str                        # class file, by default in classes/
    values: Sequence[int] | None        # label value of each class; None: 0, 1, ... for all of them
    void: Sequence[int] = ()            # label values of pixels that do not count
    threshold: float | None = None      # background is the first class, where none is more probable
    logit_scale: float = 40.0           # factor of the cosines before that probability's softmax
    protocol: dict[str, int] = field(default_factory=dict)      # short_side, window ... if its own
    read: Callable[[Path], np.ndarray] | None = None    # a label file's values; None: read_label
    origin: str = "unpack the data set there in its original layout"    # how to get the files


def read_benchmark(path: str | Path) -> SegmentationBenchmark:
    """The benchmark that a user's json describes (docs/data.md); its paths are relative to it.

    Raises UserError if there is no such file, or for wrong fields.
    """
    path = find(path)
    content = read_json(path, "image", "label", "classes")
    wrong = next((key for key, value in content.items() if not is_field(key, value)), None)
    if wrong:
        raise UserError(f"{path} has {wrong!r}: {json.dumps(content[wrong])[:60]}, which is no "
                        "field of a benchmark or has a wrong value; docs/data.md shows a whole "
                        "file.")
    folder = path.absolute().parent
    classes = folder / content["classes"]
    if not classes.is_file() and (CLASS_FILES / content["classes"]).is_file():
        classes = CLASS_FILES / content["classes"]
    return SegmentationBenchmark(**{"names": "*", "values": None} | content | {
        "folder": str(folder / content.get("folder", "")), "classes": str(classes)})


def is_field(key: str, value: object) -> bool:
    """Whether a user's json may have a field of SegmentationBenchmark with this value."""
    if key in ("values", "void"):
        return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**16
                                               for number in value)
    if key == "protocol":
        return isinstance(value, dict) and all(
            side in ("short_side", "long_side", "window", "stride") and type(pixels) is int
            for side, pixels in value.items())
    if key in ("threshold", "logit_scale"):
        return type(value) in (int, float)
    if key in ("image", "label"):
        has_instances = key == "label" and str(value).endswith(".json")
        pattern = r"[^{}]*" if has_instances else r"[^{}]*\{\}[^{}]*"
        return isinstance(value, str) and re.fullmatch(pattern, value) is not None
    return key in ("folder", "names", "classes", "origin") and isinstance(value, str)


class MissingData(UserError):
    """A benchmark's files are not where they should be."""


class SegmentationImages(Dataset):
    """A benchmark: item i is (uint8 image (3, H, W), int16 label (H, W) of classes or VOID).

    Its label values must be known.
    """

    def __init__(self, benchmark: SegmentationBenchmark, data: str | Path):
        self.root = find(Path(data) / benchmark.folder)
        self.benchmark = benchmark
        self.names = self._list()
        for pattern in (benchmark.image, benchmark.label):
            first = self.root / pattern.format(self.names[0])
            if not first.is_file():
                raise MissingData(f"There is no {first.absolute()}; unpack all of the data set, "
                                  "images and labels.")
        has_instances = benchmark.label.endswith(".json")
        self.instances = Instances(self.root / benchmark.label) if has_instances else None
        # The class of each label value.
        self.lookup = np.full(65536, UNKNOWN, dtype=np.int16)
        self.lookup[list(benchmark.void)] = VOID
        self.lookup[list(benchmark.values)] = np.arange(len(benchmark.values))

    def _list(self) -> list[str]:
        """The images' names; MissingData if there are none."""
        pattern = self.benchmark.image.format(self.benchmark.names)
        is_listed = "*" not in self.benchmark.names
        place = self.root / (self.benchmark.names if is_listed else pattern)
        names = []
        if is_listed and place.is_file():
            lines = place.read_text(encoding="utf-8-sig").splitlines()
            names = [line.strip() for line in lines if line.strip()]
        elif not is_listed:
            before, after = self.benchmark.image.split("{}")
            paths = sorted(path.relative_to(self.root).as_posix()
                           for path in self.root.glob(pattern))
            names = [path[len(before):len(path) - len(after)] for path in paths]
        if not names:
            raise MissingData(f"There is no {place.absolute()}, or it names no image; "
                              f"{self.benchmark.origin}, or set DATA to the folder that holds "
                              f"{self.benchmark.folder}.")
        return names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = read_image(self.root / self.benchmark.image.format(self.names[index]))
        path = self.root / self.benchmark.label.format(self.names[index])
        with unreadable(path, "a label image"):
            if self.instances:
                file_name = Path(self.benchmark.image.format(self.names[index])).name
                values = self.instances.render(file_name, *image.shape[1:])
            else:
                values = (self.benchmark.read or read_label)(path)
        label = self.lookup[values]
        unknown = values[label == UNKNOWN]
        if unknown.size:
            some = ", ".join(map(str, np.unique(unknown)[:5]))
            raise UserError(f"{path} has {unknown.size} pixels of values that are no class and not "
                            f"void ({some}); take the labels of this benchmark.")
        if label.shape != tuple(image.shape[1:]):
            raise UserError(f"{path} is {label.shape}, but its image {tuple(image.shape[1:])}; "
                            "they must be of one size.")
        return image, torch.from_numpy(label)


def read_label(path: Path) -> np.ndarray:
    """A label PNG -> its values, 0 to 65535, (H, W); UserError for colours or a mask of two."""
    with Image.open(path, formats=("PNG",)) as file:
        values = np.array(file)
    if values.ndim != 2 or values.dtype == bool or values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path} is an image of mode {file.mode}, but a label image has one class "
                        "number for each pixel, in a PNG of 8 or 16 bits; take the labels of this "
                        "benchmark.")
    return values


def find_data(names: Sequence[str], of_paper: Sequence[str], data: str, find_set: Callable
              ) -> tuple[dict[str, tuple], dict[str, str]]:
    """The images and classes of each benchmark; of `all`, those missing and where they should be.

    of_paper: what `all` names. find_set: makes (images, classes) of a name and the folder `data`.
    Raises UserError if a benchmark that was named is missing, or all are.
    """
    sets, missing, wants_all = {}, {}, tuple(names) == ("all",)
    for name in of_paper if wants_all else names:
        try:
            sets[name] = find_set(name, data)
            sets[name][0][0]        # a label of another data set is found before a model is loaded
        except MissingData as error:
            if not wants_all:
                raise
            missing[name] = str(error)
    if not sets:
        raise UserError(f"None of the benchmarks is in {Path(data).absolute()}; docs/data.md says "
                        f"how each is unpacked: {' '.join(missing.values())}")
    return sets, missing
