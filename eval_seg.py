"""Open-vocabulary segmentation: each pixel gets the class whose text is nearest (Tables 5, 10).

    python eval_seg.py --ckpt out/declip/declip.safetensors
    python eval_seg.py --benchmarks all --ckpt ...          # of the paper's eight those at hand
    python eval_seg.py --attention clearclip                # a baseline, no checkpoint
    torchrun --nproc_per_node 8 eval_seg.py --ckpt ...      # images divided among GPUs

The paper's protocol (section 9.2): shorter side 448, windows of 336 with a stride of 112, ImageNet
templates. Prints mIoU, pixel accuracy and each class's IoU; writes them to seg.json beside the
checkpoint.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_masks
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data import (
    Classes,
    constant,
    load_share,
    normalize,
    pad_to,
    read_classes,
    read_image,
    resize,
    unreadable,
)
from model import DeCLIP, encode_classes, open_model, title
from util import UserError, distributed, settings
from util.files import fields_of, find, read_json, write_result
from util.precision import autocast, check_precision

# The model
CKPT: str | None = None             # checkpoint of train.py, or a published .pt; None: MODEL's CLIP
MODEL: str | None = None            # open_clip model; None: the checkpoint's, else EVA02-B-16
PRETRAINED: str | None = "merged2b_s8b_b131k"   # MODEL's weights, unless CKPT names its own model
CONTEXT: str | None = None          # of train.py, such as q or qk; None: the checkpoint's, else q
SCALE: float | None = None          # factor of the last block's logits; None: the checkpoint's
ATTENTION: str | None = None        # clip, maskclip, sclip, clearclip: a baseline; None: CONTEXT's
TEMPLATES = "imagenet"              # imagenet: 80 templates (paper); simple: 7; or one with {}
PRECISION = "fp32"                  # bf16, fp16: faster on a GPU, but rounded; auto: as train.py

# The data
BENCHMARKS = ("voc20", "voc21")     # which to evaluate; all: the paper's eight; my.json: your own
DATA = "data"                       # folder that holds the data sets in their original layouts
CLASSES: str | None = None          # class file instead of the benchmark's own in classes/

# The protocol
SHORT_SIDE: int | None = None       # of the image, in pixels; None: 448, less for small models
LONG_SIDE = 2048                    # most that the longer side may have; the authors' limit
WINDOW: int | None = None           # side, a multiple of the patch size; None: 336, or less
STRIDE: int | None = None           # from window to window; None: a third of WINDOW
LOGIT_SCALE: float | None = None    # factor of the cosines before the softmax; None: 40 (VOC21: 80)
THRESHOLD: float | None = None      # background where no class is more probable; None: benchmark's
PAMR = 0                            # steps that fit scores to the image's colours (docs/beyond.md)
WINDOW_BATCH = 16                   # windows of one forward pass
BATCH_SIZE = 8                      # images whose windows share forward passes
NUM_WORKERS = 4                     # processes that decode images, for each GPU
CACHE: str | None = "out/cache"     # folder that keeps embeddings of class names; None: none
OUT: str | None = None              # folder of the result; None: the checkpoint's, else out/


def main(argv: list[str] | None = None) -> dict:
    """Evaluates as the command line (or `argv`) says; returns what seg.json holds."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__) as ranks:
        return run(cfg, ranks)


def run(cfg: SimpleNamespace, ranks: distributed.Ranks) -> dict:
    """Segments every benchmark; prints and writes each one's figures."""
    check(cfg)
    sets, missing = find_data(cfg)
    clip = open_model(cfg).to(ranks.device)
    result = {}
    for name, (dataset, classes) in sets.items():
        rules = fit_windows(dataset.benchmark.rules(cfg), clip)
        text = encode_classes(clip, classes, cfg.TEMPLATES, cfg.CACHE)
        segmenter = partial(predict, rules, clip, classes, text)
        confusion = evaluate(cfg, segmenter, dataset, len(classes), ranks, name)
        result[name] = summarize(confusion, classes) | {"protocol": {
            key.lower(): getattr(rules, key) for key in PROTOCOL}}
        if ranks.is_main:
            print(f"\n{name}: {title(cfg, clip)}, {len(dataset)} images\n{table(result[name])}")
            write_result(cfg, "seg", {"benchmarks": result} | clip.describe())
    if ranks.is_main and (len(result) > 1 or missing):
        print(overview(result, missing))
    return result


PROTOCOL = ("SHORT_SIDE", "LONG_SIDE", "WINDOW", "STRIDE", "LOGIT_SCALE", "THRESHOLD", "PAMR")


def protocol(cfg: SimpleNamespace, logit_scale: float, threshold: float | None
             ) -> SimpleNamespace:
    """The settings with a benchmark's LOGIT_SCALE and THRESHOLD where none were given.

    threshold: None where background is no class; then THRESHOLD has no effect.
    """
    own = vars(cfg).copy()
    own["LOGIT_SCALE"] = logit_scale if cfg.LOGIT_SCALE is None else cfg.LOGIT_SCALE
    is_given = cfg.THRESHOLD is not None and threshold is not None
    own["THRESHOLD"] = cfg.THRESHOLD if is_given else threshold
    return SimpleNamespace(**own)


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting out of its range, before anything is loaded."""
    settings.check_min(cfg, BATCH_SIZE=1, NUM_WORKERS=0)
    check_windows(cfg)
    names = PAPER_BENCHMARKS if cfg.BENCHMARKS == ("all",) else cfg.BENCHMARKS
    benchmarks = [find_benchmark(name) for name in names]
    for benchmark in benchmarks:
        check_windows(benchmark.rules(cfg))
    idle = [name for name in ("THRESHOLD", "LOGIT_SCALE") if getattr(cfg, name) is not None]
    if idle and all(benchmark.threshold is None for benchmark in benchmarks):
        raise UserError(f"{idle[0]} is for background, which gets what no class is sure of, but "
                        f"{', '.join(names)} has none; leave it out.")


def check_windows(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting of the sliding window that is out of its range."""
    check_precision(cfg.PRECISION)
    settings.check_min(cfg, SHORT_SIDE=1, LONG_SIDE=1, WINDOW=1, STRIDE=1, WINDOW_BATCH=1,
                         LOGIT_SCALE=1, PAMR=0)
    if not 0 <= (cfg.THRESHOLD or 0) <= 1:
        raise UserError(f"THRESHOLD is {cfg.THRESHOLD}; it is a probability, from 0 to 1.")
    if None not in (cfg.STRIDE, cfg.WINDOW) and not 0 < cfg.STRIDE <= cfg.WINDOW:
        raise UserError(f"STRIDE is {cfg.STRIDE}; it must be from 1 to WINDOW, {cfg.WINDOW}, or "
                        "pixels are left out.")


def fit_windows(cfg: SimpleNamespace, clip: DeCLIP) -> SimpleNamespace:
    """The settings with SHORT_SIDE, WINDOW and STRIDE where none were given: 448, 336 and 112.

    Those are the paper's, for a CLIP that learned from images of 224 px; one that learned from
    smaller images has them in proportion, because in larger ones it recognises little.
    Raises UserError if the model's patches don't fill a window, or if windows leave out pixels.
    """
    share, p = min(1.0, clip.image_size / 224), clip.patch_size
    fitted = SimpleNamespace(**vars(cfg))
    if cfg.SHORT_SIDE is None:
        fitted.SHORT_SIDE = round(448 * share)
    if cfg.WINDOW is None:
        fitted.WINDOW = max(1, int(336 * share) // p) * p
    if cfg.STRIDE is None:
        fitted.STRIDE = max(1, round(fitted.WINDOW / 3))
    if fitted.WINDOW % p:
        fits = fitted.WINDOW // p * p or p
        raise UserError(f"WINDOW {fitted.WINDOW} is no multiple of {clip.model_name}'s patch size; "
                        f"set it to {fits}.")
    check_windows(fitted)
    return fitted


# ---------------------------------------------------------------------------------- benchmarks

CLASS_FILES = Path(__file__).parent / "classes"
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
    values: Sequence[int]               # label value of each class in `classes`
    void: Sequence[int] = ()            # label values of pixels that do not count
    threshold: float | None = None      # background is the first class, where none is more probable
    logit_scale: float = 40.0           # factor of the cosines before that probability's softmax
    protocol: dict[str, int] = field(default_factory=dict)      # short_side, window ... if its own
    read: Callable[[Path], np.ndarray] | None = None    # a label file's values; None: read_label

    def rules(self, cfg: SimpleNamespace) -> SimpleNamespace:
        """The settings with this benchmark's protocol."""
        own = {name.upper(): value for name, value in self.protocol.items()}
        return protocol(SimpleNamespace(**vars(cfg) | own), self.logit_scale, self.threshold)


VOC = ("VOCdevkit/VOC2012", "ImageSets/Segmentation/val.txt", "JPEGImages/{}.jpg",
       "SegmentationClass/{}.png")
CONTEXT_LAYOUT = ("VOCdevkit/VOC2010", "ImageSets/SegmentationContext/val.txt",
                  "JPEGImages/{}.jpg", "SegmentationClassContext/{}.png")
CITYSCAPES = ("cityscapes", "*/*", "leftImg8bit/val/{}_leftImg8bit.png",
              "gtFine/val/{}_gtFine_labelIds.png")
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_VOID = (*(id for id in range(34) if id not in CITYSCAPES_IDS), 255)
ADE = ("ADEChallengeData2016", "*", "images/validation/{}.jpg", "annotations/validation/{}.png")
OBJECT = ("coco", "*", "val2017/{}.jpg", "annotations/instances_val2017.json")
STUFF = ("coco", "*", "val2017/{}.jpg", "stuffthingmaps/val2017/{}.png")
# COCO-Stuff's PNGs have the id less one; these ids have no class.
NOT_IN_STUFF = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
STUFF_VALUES = [id - 1 for id in range(1, 183) if id not in NOT_IN_STUFF]
STUFF_VOID = (*(id - 1 for id in NOT_IN_STUFF), 255)
TOY = ("names.txt", "images/{}.png", "labels/{}.png", "toy.txt", range(18))

# Thresholds and scales are the authors' (configs/ of their code); the paper has none.
KNOWN_BENCHMARKS = {
    "voc21": SegmentationBenchmark(*VOC, "voc21.txt", range(21), (255,), 0.4, 80.0),
    "context60": SegmentationBenchmark(*CONTEXT_LAYOUT, "context60.txt", range(60), (255,), 0.15),
    "coco_object": SegmentationBenchmark(*OBJECT, "coco_object.txt", range(81), threshold=0.2),
    "voc20": SegmentationBenchmark(*VOC, "voc20.txt", range(1, 21), (0, 255)),
    "context59": SegmentationBenchmark(*CONTEXT_LAYOUT, "context59.txt", range(1, 60), (0, 255)),
    "coco_stuff": SegmentationBenchmark(*STUFF, "coco_stuff.txt", STUFF_VALUES, STUFF_VOID),
    "cityscapes": SegmentationBenchmark(*CITYSCAPES, "cityscapes.txt", CITYSCAPES_IDS, CITYSCAPES_VOID),
    "ade150": SegmentationBenchmark(*ADE, "ade150.txt", range(1, 151), (0,)),
    "toy": SegmentationBenchmark("toy/val", *TOY),
    "toy_dev": SegmentationBenchmark("toy/dev", *TOY),      # to choose settings with
}
# Those of Tables 5 and 10.
PAPER_BENCHMARKS = tuple(name for name in KNOWN_BENCHMARKS if not name.startswith("toy"))


def find_benchmark(name: str) -> SegmentationBenchmark:
    """The benchmark of a name, or the one that a user's json file describes (docs/data.md).

    Paths in the json are relative to it. Raises UserError if there is none, or for wrong fields.
    """
    if name in KNOWN_BENCHMARKS:
        return KNOWN_BENCHMARKS[name]
    if not name.endswith(".json"):
        raise UserError(f"There is no benchmark {name!r}; choose among "
                        f"{', '.join(KNOWN_BENCHMARKS)}, all alone, or a json file of your own.")
    content = read_json(name, "image", "label", "classes")
    wrong = next((key for key, value in content.items() if not is_field(key, value)), None)
    if wrong:
        raise UserError(f"{name} has {wrong!r}: {json.dumps(content[wrong])[:60]}, which is no "
                        "field of a benchmark or has a wrong value; docs/data.md shows a whole "
                        "file.")
    folder = Path(name).absolute().parent
    classes = folder / content["classes"]
    if not classes.is_file() and (CLASS_FILES / content["classes"]).is_file():
        classes = CLASS_FILES / content["classes"]
    content = {"names": "*", "values": range(len(read_classes(classes)))} | content
    return SegmentationBenchmark(**content | {"folder": str(folder / content.get("folder", "")),
                                  "classes": str(classes)})


def is_field(key: str, value: object) -> bool:
    """Whether a user's json may have a field of SegmentationBenchmark with this value."""
    if key in ("values", "void"):
        return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**16
                                               for each in value)
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
    return key in ("folder", "names", "classes") and isinstance(value, str)


class MissingData(UserError):
    """A benchmark's files are not where they should be."""


class SegmentationImages(Dataset):
    """A benchmark: item i is (uint8 image (3, H, W), int16 label (H, W) of classes or VOID)."""

    def __init__(self, benchmark: SegmentationBenchmark, data: str | Path):
        self.root = find(Path(data) / benchmark.folder)
        self.benchmark = benchmark
        self.names = self._list()
        has_instances = benchmark.label.endswith(".json")
        self.instances = Instances(self.root / benchmark.label) if has_instances else None
        for path in (benchmark.image, benchmark.label):
            first = self.root / path.format(self.names[0])
            if not first.is_file():
                raise MissingData(f"There is no {first.absolute()}; unpack all of the data set, "
                                  "images and labels.")
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
            raise MissingData(f"There is no {place.absolute()}, or it names no image; unpack the "
                              "data set there in its original layout (python -m toy.world draws "
                              "the toy scenes), or set DATA to the folder that holds "
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


class Instances:
    """A COCO-instances json, rendered to label images.

    0 is background, 1 ... are the categories in the order of their ids.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise MissingData(f"There is no {path.absolute()}; unpack COCO's annotations there, or "
                              "set DATA to the folder that holds coco.")
        self.path, content = path, read_json(path, "images", "annotations", "categories")
        with fields_of(path):
            ids = sorted(category["id"] for category in content["categories"])
            self.value = {id: place + 1 for place, id in enumerate(ids)}
            self.image_of = {image["file_name"]: image["id"] for image in content["images"]}
            self.of_image: dict[int, list[tuple]] = {}
            for annotation in content["annotations"]:
                kept = annotation["category_id"], annotation["segmentation"]
                self.of_image.setdefault(annotation["image_id"], []).append(kept)

    def render(self, file_name: str, height: int, width: int) -> np.ndarray:
        """The label image (height, width); of overlapping objects the smaller one is on top.

        Raises UserError for an image that the json does not list.
        """
        if file_name not in self.image_of:
            raise UserError(f"{self.path} says nothing of {file_name}; give the json and the "
                            "images of one split.")
        label = np.zeros((height, width), np.uint16)
        with fields_of(self.path):
            objects = [(instance_mask(shape, height, width), self.value[category])
                       for category, shape in self.of_image.get(self.image_of[file_name], [])]
            for mask, value in sorted(objects, key=lambda each: -int(each[0].sum())):
                label[mask] = value
        return label


def instance_mask(shape: list | dict, height: int, width: int) -> np.ndarray:
    """Polygons, or a run-length code in either of COCO's forms -> bool (height, width).

    Raises TypeError if it is neither, or of another size.
    """
    if isinstance(shape, dict) and list(shape["size"]) != [height, width]:
        raise TypeError(f"a mask of {shape['size']} for an image of {[height, width]}")
    try:
        is_compressed = isinstance(shape, dict) and isinstance(shape["counts"], str)
        codes = shape if is_compressed else coco_masks.frPyObjects(shape, height, width)
        codes = coco_masks.merge(codes) if isinstance(codes, list) else codes
        return coco_masks.decode(codes).astype(bool)
    except Exception as error:      # pycocotools raises anything
        raise TypeError(error) from None


def find_data(cfg: SimpleNamespace) -> tuple[dict[str, tuple[SegmentationImages, Classes]],
                                             dict[str, str]]:
    """The images and classes of each benchmark; of `all`, those missing and where they should be.
    """
    sets, missing = {}, {}
    wants_all = cfg.BENCHMARKS == ("all",)
    for name in PAPER_BENCHMARKS if wants_all else cfg.BENCHMARKS:
        try:
            dataset = SegmentationImages(find_benchmark(name), cfg.DATA)
            sets[name] = dataset, benchmark_classes(cfg, name)
            dataset[0]      # a label of another data set is found before a model is loaded
        except MissingData as error:
            if not wants_all:
                raise
            missing[name] = str(error)
    if not sets:
        raise UserError(f"None of the benchmarks is in {Path(cfg.DATA).absolute()}; docs/data.md "
                        f"says how each is unpacked: {' '.join(missing.values())}")
    return sets, missing


def benchmark_classes(cfg: SimpleNamespace, name: str) -> Classes:
    """A benchmark's class list; UserError if a user's own has another number of lines."""
    benchmark = find_benchmark(name)
    path = cfg.CLASSES or CLASS_FILES / benchmark.classes
    classes = read_classes(path)
    if len(classes) != len(benchmark.values):
        raise UserError(f"{path} has {len(classes)} classes, but {name} has "
                        f"{len(benchmark.values)}; give as many lines.")
    return classes


# -------------------------------------------------------------------------------- segmentation

Segmenter = Callable[[list[Tensor]], list[Tensor]]     # uint8 (3, H, W) each -> classes (H, W) each


def evaluate(cfg: SimpleNamespace, predict: Segmenter, dataset: Dataset, num_classes: int,
             ranks: distributed.Ranks, name: str) -> Tensor:
    """The confusion matrix (K, K) of any segmenter, rows true, columns predicted, over all ranks.

    dataset: items as of SegmentationImages.
    """
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.long, device=ranks.device)
    loader = load_share(dataset, ranks, cfg.BATCH_SIZE, cfg.NUM_WORKERS)
    # Nothing below waits for a GPU: files are read and results counted while it works.
    with tqdm(total=len(loader.dataset), desc=name, unit="image",
              disable=not ranks.is_main) as progress:
        for samples in loader:
            images = [image.to(ranks.device, non_blocking=True) for image, _ in samples]
            for (_, label), prediction in zip(samples, predict(images)):
                label = label.to(ranks.device, non_blocking=True)
                confusion += confusion_matrix(label, prediction, num_classes)
            progress.update(len(samples))
    confusion = distributed.sum_over_ranks(confusion).cpu()
    if not confusion.any():
        raise UserError(f"The labels of {name} are void at every pixel, so nothing can be scored; "
                        "take the labels of this benchmark.")
    return confusion


@torch.inference_mode()
def predict(cfg: SimpleNamespace, clip: DeCLIP, classes: Classes, text: Tensor,
            images: Sequence[Tensor]) -> list[Tensor]:
    """Images uint8 (3, H, W) and all names' embeddings (P, C) -> the class of each pixel, (H, W).
    """
    return [torch.cat([decide(rows, classes, cfg.LOGIT_SCALE, cfg.THRESHOLD)
                       for rows in (refined(scores, image, cfg.PAMR) if cfg.PAMR
                                    else scores.of_pixels())])
            for scores, image in zip(score_images(cfg, clip, images, text), images)]


class Scores(NamedTuple):
    """An image's cosines, one for each patch of each window, and how they become pixels.

    Enlarging a window's patches to its pixels, averaging where windows overlap and resizing to the
    original image are linear, and act on rows and columns alike. So together they are one matrix
    for each. Scores of pixels, many times as many numbers, exist for some rows at a time only.
    """
    patches: Tensor     # (P, p, q): p rows and q columns of patches, window by window
    down: Tensor        # (H, p)
    across: Tensor      # (W, q)

    def of_pixels(self, most: int = 2**24) -> Iterator[Tensor]:
        """Scores of the pixels, (P, rows, W), about `most` numbers at a time."""
        wide = self.patches @ self.across.T
        for some in self.down.split(max(1, most // wide[:, 0].numel())):
            yield some @ wide


@torch.inference_mode()
def score_images(cfg: SimpleNamespace, clip: DeCLIP, images: Sequence[Tensor], text: Tensor
                 ) -> list[Scores]:
    """Images uint8 (3, H, W) and text (P, C) -> their scores by a sliding window.

    Windows of all images together fill the batches.
    """
    # 1. Resize; an image smaller than a window is one window, padded
    sizes = [resized_size(image, cfg.SHORT_SIDE, cfg.LONG_SIDE) for image in images]
    resized = [pad_to(resize(image, *size), *(max(side, cfg.WINDOW) for side in size))
               for image, size in zip(images, sizes)]
    resized = [normalize(image, clip.mean, clip.std) for image in resized]
    # 2. Windows
    places = [[window_starts(side, cfg.WINDOW, cfg.STRIDE) for side in image.shape[-2:]]
              for image in resized]
    windows = [image[:, y:y + cfg.WINDOW, x:x + cfg.WINDOW]
               for image, (ys, xs) in zip(resized, places) for y in ys for x in xs]
    # 3. Cosine of each patch and each text
    scores = torch.cat([
        window_scores(cfg, clip, torch.stack(windows[start:start + cfg.WINDOW_BATCH]), text)
        for start in range(0, len(windows), cfg.WINDOW_BATCH)])
    of_image = scores.split([len(ys) * len(xs) for ys, xs in places])
    # 4. Rows and columns of each image's patches
    out = []
    for each, image, size, (ys, xs) in zip(of_image, images, sizes, places):
        patches = each.unflatten(0, (len(ys), len(xs))).permute(2, 0, 3, 1, 4)
        weights = [side_weights(*sides, cfg.WINDOW, cfg.STRIDE, each.shape[-1], each.device)
                   for sides in zip(size, image.shape[-2:])]
        out.append(Scores(patches.flatten(3).flatten(1, 2), *weights))
    return out


# Distances of the pixels that PAMR compares, as published.
DILATIONS = (1, 2, 4, 8, 12, 24)


def refined(scores: Scores, image: Tensor, steps: int) -> Iterator[Tensor]:
    """As Scores.of_pixels, after PAMR (Araslanov and Roth, CVPR 2020); not in the paper.

    In every step a pixel's scores become a mean of those of its neighbours, 8 in each of DILATIONS,
    that weighs those of a like colour most. image: uint8 (3, H, W). All scores of an image are in
    memory at once, (P, H, W).
    """
    weights = colour_weights(image)
    found = torch.cat(list(scores.of_pixels()), dim=1)
    for some in found.split(16):        # scores of one text do not depend on those of others
        for _ in range(steps):
            seen = neighbours(some)     # of a copy
            some.zero_()
            for weight, other in zip(weights, seen):
                some.addcmul_(weight, other)
    yield found


def colour_weights(image: Tensor) -> Tensor:
    """uint8 (3, H, W) -> what each of a pixel's neighbours weighs, (8 * dilations, H, W), sum 1.

    The softmax of the negative difference of colours, in tenths of the standard deviation among the
    neighbours and, once for each dilation, the pixel itself.
    """
    image = image.float() / 255
    differences = [other - image for other in neighbours(image)]
    count = len(differences) + len(DILATIONS)
    mean = sum(differences) / count
    variance = (sum(each.square() for each in differences) - count * mean.square()) / (count - 1)
    unit = 0.1 * variance.clamp(min=0).sqrt() + 1e-8
    return torch.stack([-(each.abs() / unit).mean(dim=0) for each in differences]).softmax(dim=0)


def neighbours(maps: Tensor) -> list[Tensor]:
    """(C, H, W) -> for each neighbour a view of a copy with repeated borders, (C, H, W)."""
    H, W, m = *maps.shape[-2:], max(DILATIONS)
    padded = F.pad(maps[None], (m, m, m, m), mode="replicate")[0]
    return [padded[:, y:y + H, x:x + W] for d in DILATIONS
            for y, x in product((m - d, m, m + d), repeat=2) if (y, x) != (m, m)]


def resized_size(image: Tensor, short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width of an image (..., H, W) with its shorter side resized to `short_side`, or
    its longer one to `long_side` if that would be exceeded."""
    factor = min(short_side / min(image.shape[-2:]), long_side / max(image.shape[-2:]))
    return tuple(max(1, round(side * factor)) for side in image.shape[-2:])


def window_scores(cfg: SimpleNamespace, clip: DeCLIP, windows: Tensor, text: Tensor) -> Tensor:
    """Windows (n, 3, S, S) -> float32 cosines of patches and texts, (n, P, S/patch, S/patch)."""
    with autocast(cfg.PRECISION, windows.device):
        content = clip.encode_dense(windows, cfg.ATTENTION)[0].float()
    return torch.einsum("nchw,pc->nphw", F.normalize(content, dim=1), text)


@lru_cache(maxsize=256)
def side_weights(length: int, side: int, window: int, stride: int, patches: int,
                 device: torch.device) -> Tensor:
    """What rows of patches of all windows add to rows of pixels, (side, windows * patches).

    length: of the side as the model sees it, covered by windows of `window` pixels and `patches`
    patches. The same serves columns.
    """
    starts = window_starts(max(length, window), window, stride)
    eye = torch.eye(patches, device=device)[None]
    enlarged = F.interpolate(eye, window, mode="linear")[0].T       # (window, patches)
    total = torch.zeros(max(length, window), len(starts), patches, device=device)
    for number, start in enumerate(starts):
        total[start:start + window, number] = enlarged
    # A row's weights of one window sum to 1, so this is the number of windows that cover it.
    covered = total.sum(dim=(1, 2))
    mean = total.flatten(1) / covered[:, None]
    # Without the padding, to the original size.
    return F.interpolate(mean[:length].T[None], side, mode="linear")[0].T.contiguous()


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: every `stride`, the last one so that it ends with it."""
    return [min(start, length - window) for start in range(0, length - window + stride, stride)]


def decide(scores: Tensor, classes: Classes, logit_scale: float, threshold: float | None) -> Tensor:
    """Cosines of all prompts (P, H, W) -> class of each pixel (H, W).

    A class has the probability of its most probable synonym. With a threshold, a pixel where no
    class is that probable is class 0, the background.
    """
    best, prompt = scores.max(dim=0)
    prediction = constant(tuple(classes.class_of_prompt), torch.long, scores.device)[prompt]
    if threshold is None:
        return prediction
    total = torch.logsumexp(logit_scale * scores, dim=0)
    probability = (logit_scale * best - total).exp()
    return prediction.masked_fill(probability < threshold, 0)


# ------------------------------------------------------------------------------------- figures

def confusion_matrix(label: Tensor, prediction: Tensor, num_classes: int) -> Tensor:
    """Pixels of each true (row) and predicted (column) class, (K, K); VOID does not count."""
    pair = label.long() * num_classes + prediction
    pair = torch.where(label == VOID, num_classes**2, pair).flatten()
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.long, device=label.device)
    counts.index_add_(0, pair, torch.ones_like(pair))
    return counts[:-1].view(num_classes, num_classes)


def summarize(confusion: Tensor, classes: Classes, absent_count: bool = True) -> dict:
    """mIoU, pixel accuracy and each class's IoU in per cent.

    A class that neither occurs nor is predicted has no IoU (None) and does not enter the mean; one
    that is predicted but does not occur has 0, as is usual. absent_count: False leaves that one
    out, too.
    """
    right = confusion.diag()
    union = confusion.sum(0) + confusion.sum(1) - right
    iou = 100 * right.double() / union
    present = (union if absent_count else confusion.sum(1)) > 0
    return {"mIoU": iou[present].mean().item(),
            "pixel accuracy": (100 * right.sum().double() / confusion.sum()).item(),
            "pixels": int(confusion.sum()),
            "IoU": {name: round(iou[index].item(), 2) if present[index] else None
                    for index, name in enumerate(classes.names)}}


def table(result: dict) -> str:
    """Per-class IoU in columns, then the means, for a screen."""
    cells = [f"{name[:20]:20}{'-' if iou is None else f'{iou:.1f}':>6}"
             for name, iou in result["IoU"].items()]
    lines = ["   ".join(cells[start:start + 4]) for start in range(0, len(cells), 4)]
    return "\n".join([*lines, f"mIoU {result['mIoU']:.1f} %   "
                              f"pixel accuracy {result['pixel accuracy']:.1f} %"])


def overview(result: dict[str, dict], missing: dict[str, str]) -> str:
    """mIoU of each benchmark, their mean, and what was missing, for a screen."""
    of_paper = [result[name]["mIoU"] for name in result if name in PAPER_BENCHMARKS]
    lines = ["", *(f"{name:16}{each['mIoU']:6.1f}" for name, each in result.items())]
    if len(of_paper) > 1:
        mean = sum(of_paper) / len(of_paper)
        lines.append(f"{'mean':16}{mean:6.1f}   of {len(of_paper)} of the paper's "
                     f"{len(PAPER_BENCHMARKS)}, mIoU in %")
    return "\n".join([*lines, *(f"{name:16}     -   {reason}" for name, reason in missing.items())])


if __name__ == "__main__":
    main()
