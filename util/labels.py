"""Label images as files: the benchmarks that have them, and one's own, described in a json."""

import os
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from util import UserError
from util.coco import Instances, files_below, read_coco
from util.distributed import is_main
from util.files import ROOT, find, is_list, is_name, is_number, is_of, read_json
from util.images import MAX_DECODED, lies, own_ending, read_image, unreadable

CLASS_FILES = ROOT / "classes"
VOID = -1       # label of pixels that do not count
# Why DATA has no effect where all that is read are jsons of one's own.
NOT_IN_DATA = "holds the known data sets, but files of one's own are beside their json"
UNKNOWN = -2    # label of pixels of a value that a benchmark does not have
# VOC's colours, (256, 3): the bits of a value, from the last on, are the colours' first.
VOC_PALETTE = np.stack([sum((np.arange(256) >> 3 * place + channel & 1) << 7 - place
                            for place in range(8)) for channel in range(3)], axis=1)


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
    palette: str = ""                   # voc: colours that a label with a palette must have
    origin: str = "unpack the data set there in its original layout"    # how to get the files


def read_benchmark(path: str | Path) -> SegmentationBenchmark:
    """The benchmark that a user's json describes (docs/data.md); its paths are relative to it.

    Raises UserError if there is no such file, or for wrong fields.
    """
    path = find(path)
    content = read_json(path, "image", "label", "classes")
    wrong = next((key for key, value in content.items() if not is_field(key, value)), None)
    if wrong:
        raise UserError(f"{path} has {wrong!r}: {reprlib.repr(content[wrong])}, which is no "
                        "field of a benchmark or has a wrong value; docs/data.md shows a whole "
                        "file.")
    home = Path(os.path.abspath(path)).parent
    folder = os.path.normpath(home / content.get("folder", ""))
    classes = next((place / content["classes"] for place in (home, CLASS_FILES)
                    if os.path.isfile(place / content["classes"])), home / content["classes"])
    for file, places in ((folder, (home.parent, ROOT)), (classes, (home, folder, CLASS_FILES))):
        if not any(is_below(file, place) for place in places):
            raise UserError(f"{path} names {os.path.normpath(file)}, which is not below "
                            f"{places[0]}; a benchmark's files lie below the folder of its json "
                            "or beside that, and its class file there or in classes/.")
    return SegmentationBenchmark(**{"names": "*", "values": None} | content | {
        "folder": folder, "classes": str(classes)})


def is_below(file: str | Path, folder: str | Path) -> bool:
    """Whether a path is a folder or in it, as it is spelled."""
    file, folder = os.path.abspath(file), os.path.abspath(folder)
    return os.path.commonpath([file, folder]) == folder


def is_field(key: str, value: object) -> bool:
    """Whether a user's json may have a field of SegmentationBenchmark with this value."""
    if key in ("values", "void"):
        return is_list(value, partial(is_of, int)) and (
            key == "void" or len(set(value)) == len(value) > 0)
    if key == "protocol":
        return isinstance(value, dict) and all(
            side in ("short_side", "long_side", "window", "stride") and is_of(int, pixels)
            for side, pixels in value.items())
    if key in ("threshold", "logit_scale"):
        return is_number(value)
    if key in ("image", "label"):
        has_instances = key == "label" and str(value).endswith(".json")
        pattern = r"[^{}]*" if has_instances else r"[^{}]*\{\}[^{}]*"
        return is_inner(value) and re.fullmatch(pattern, value) is not None
    if key == "names":
        return is_inner(value)
    return key in ("folder", "classes", "origin") and (is_name(value) or value == "")


def is_inner(path: object) -> bool:
    """Whether a value is a relative path that never goes up."""
    return is_name(path) and not path.startswith("/") and ".." not in path.split("/")


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
            files_below(Path(benchmark.names), self.root, [
                pattern.format(name) for name in self.names], "DATA")
        for pattern in (benchmark.image, benchmark.label):
            first = self.root / pattern.format(self.names[0])
            if not first.is_file():
                raise MissingData(f"There is no {first.absolute()}; unpack all of the data set, "
                                  "images and labels.")
        has_instances = benchmark.label.endswith(".json")
        self.instances = Instances(self.root / benchmark.label) if has_instances else None
        self.read_label = benchmark.read or partial(read_label, palette=benchmark.palette)
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
            try:
                names = [line.strip() for line in place.read_text("utf-8-sig").splitlines()
                         if line.strip()]
                if not all(map(is_name, names)):
                    raise ValueError
            except ValueError:
                raise UserError(f"{place} is not text in UTF-8 that files can be "
                                "called by; it must be the images' names, one a line.") from None
        elif not is_listed:
            before, after = os.path.normpath(self.benchmark.image).split("{}")
            found = {*self.root.glob(pattern)}
            ours = {path for path in found if own_ending(path.name)}
            if own_ending(os.path.basename(pattern)):       # named by the user
                ours = set()
            if ours and is_main():
                print(f"left out of {self.root}: {len(ours)} images that our tools drew")
            paths = sorted(path.relative_to(self.root).as_posix() for path in found - ours)
            names = [path[len(before):len(path) - len(after)] for path in paths]
        if not names:
            raise MissingData(f"There is no {place.absolute()}, or it names no image; "
                              f"{self.benchmark.origin}, or set DATA to the folder that holds "
                              f"{self.benchmark.folder}.")
        return names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        file = self.root / self.benchmark.image.format(self.names[index])
        image = read_image(file)
        path = self.root / self.benchmark.label.format(self.names[index])
        with unreadable(path, "a label image"):
            if path.exists() and not path.is_file():
                raise ValueError("it is no regular file")
            values = (self.instances.render(file, *image.shape[1:]) if self.instances
                      else self.read_label(path))
        label = self.lookup[values]
        unknown = values[label == UNKNOWN]
        if unknown.size:
            some = ", ".join(map(str, np.unique(unknown)[:5]))
            raise UserError(f"{path} has {unknown.size} pixels of values that are no class and not "
                            f"void ({some}); take the labels of this benchmark.")
        check_sizes(path, label.shape, file, image.shape[1:])
        return image, torch.from_numpy(label)


def read_label(path: Path, palette: str = "") -> np.ndarray:
    """A label PNG -> its values, 0 to 65535, (H, W).

    palette: voc, if a PNG with a palette must have VOC's colours, or greys of its values.
    Raises UserError for colours, a mask of two, and another palette.
    """
    with Image.open(path, formats=("PNG",)) as file:
        if file.width * file.height > MAX_DECODED:
            raise ValueError(f"it is {file.width} x {file.height}, and at most {MAX_DECODED:,} "
                             "pixels are decoded")
        values, colours = np.array(file), file.getpalette("RGB")
    if values.ndim != 2 or values.dtype == bool or values.min() < 0 or values.max() > 65535:
        raise UserError(f"{path} is an image of mode {file.mode}, but a label image has one class "
                        "number for each pixel, in a PNG of 8 or 16 bits; take the labels of this "
                        "benchmark.")
    if palette == "voc" and colours:
        used = np.unique(values)
        colours = np.array(colours + [0] * (768 - len(colours))).reshape(-1, 3)[used]
        if not ((colours == VOC_PALETTE[used]).all() or (colours == used[:, None]).all()):
            raise UserError(f"{path} has another palette than VOC's, so its values may be other "
                            "classes; take the labels as they are downloaded.")
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
            missing[name] = str(error).split(", or ")[0].split("; ")[0]
    if not sets:
        reasons = "".join(f"\n{name:16}{reason}" for name, reason in missing.items())
        raise UserError(f"None of the benchmarks is in {Path(data).absolute()}; docs/data.md says "
                        f"how each is unpacked.{reasons}")
    return sets, missing


def overview(result: dict[str, dict], missing: dict[str, str], of_paper: Sequence[str]) -> str:
    """mIoU of each benchmark, the mean of the paper's, and what was missing, for a screen."""
    lines = ["", *(f"{name:16}{found['mIoU']:6.1f}" for name, found in result.items())]
    means = [found["mIoU"] for name, found in result.items() if name in of_paper]
    if len(means) > 1:
        lines.append(f"{'mean':16}{sum(means) / len(means):6.1f}   of {len(means)} of the paper's "
                     f"{len(of_paper)}, mIoU in %")
    return "\n".join([*lines, *(f"{name:16}     -   {reason}" for name, reason in missing.items())])


class Panoptic:
    """A COCO-panoptic json, its folder of PNGs and its folder of images.

    names, is_thing: of each category, in the order of ids. class_of: its place there, by its id.
    segments: of each image, the json's entries.
    Raises UserError for entries that are not right, and for names outside the folders.
    """

    def __init__(self, path: str | Path, pngs: str | Path, images: str | Path):
        coco = read_coco(find(path), {"segments"})
        self.names = [category["name"] for category in coco.categories]
        self.is_thing = [bool(category["isthing"]) for category in coco.categories]
        self.class_of = {category["id"]: place for place, category in enumerate(coco.categories)}
        self.segments = [annotation["segments_info"] for annotation in coco.annotations]
        name_of = {image["id"]: image["file_name"] for image in coco.images}
        of_images = [name_of[annotation["image_id"]] for annotation in coco.annotations]
        self.images = files_below(coco.path, find(images), of_images, "IMAGES")
        self.pngs = files_below(coco.path, find(pngs), [
            annotation["file_name"] for annotation in coco.annotations], "PNGS")

    def read(self, index: int) -> tuple[Tensor, np.ndarray]:
        """The image of an annotation, uint8 (3, H, W), and the ids of its pixels' regions, (H, W).

        Raises UserError for files that can't be read or are of two sizes.
        """
        image, rgb = read_image(self.images[index]), read_image(self.pngs[index]).int()
        check_sizes(self.pngs[index], rgb.shape[1:], self.images[index], image.shape[1:])
        return image, (rgb[0] + 256 * rgb[1] + 65536 * rgb[2]).numpy()


def check_sizes(label: str | Path, of_label: Sequence[int], image: str | Path,
                of_image: Sequence[int]) -> None:
    """Raises UserError unless a label has its image's height and width."""
    if tuple(of_label) != tuple(of_image):
        turned = tuple(of_label) == tuple(of_image)[::-1] and lies(image)
        advice = ("its EXIF entry turns the image, which is read as it is stored: store it upright"
                  if turned else "they must be of one size")
        raise UserError(f"{label} is {tuple(of_label)}, but its image {image} {tuple(of_image)}; "
                        f"{advice}.")
