"""What the scripts read: training images, crop grids, panoptic regions, segmentation benchmarks, class lists.

Workers decode files and nothing else: a uint8 image (3, H, W) of any size goes to the device, where it is resized,
padded, cut into crops and normalised (`student_image`, `grid_crops`), once for each model that looks at it.
"""

import json
import os
import random
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as coco_masks
from torch import Tensor
from torch.utils.data import Dataset

from settings import UserError

MAX_PIXELS = 100_000_000     # a larger image is not decoded: a small file can hold a picture that fills the memory
Image.MAX_IMAGE_PIXELS = None       # PIL's own bound, which warns first; ours holds before anything is decoded
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
VOID = 255      # label of pixels that do not count


# ---------------------------------------------------------------------------------------------------------- images

def read_image(path: str | Path, upright: bool = False) -> Tensor:
    """An image file as RGB, uint8 (3, H, W). UserError names a file that can't be read.

    upright: turned as its EXIF entry says; annotations are made for the picture as it is stored.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # of metadata that nobody asked for
            with Image.open(path) as file:
                return torch.from_numpy(decode(file, upright)).permute(2, 0, 1)
    except Exception as error:      # decoders raise anything on damaged files
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"{error or type(error).__name__}"
        raise UserError(f"{path} can't be read as an image ({' '.join(reason.split())}); replace or remove it.") from None


def decode(file: Image.Image, upright: bool) -> np.ndarray:
    """An opened image as RGB, uint8 (H, W, 3); ValueError if it is too large or has values of an unknown range."""
    if file.mode == "F":
        raise ValueError("it has floating-point values of an unknown range")
    if file.width * file.height > MAX_PIXELS:
        raise ValueError(f"it is {file.width} x {file.height}, and at most {MAX_PIXELS:,} pixels are decoded")
    if file.mode.startswith("I"):       # 16 bits, which PIL would clip instead of scaling
        values = np.array(file)
        file = Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))
    if upright:
        ImageOps.exif_transpose(file, in_place=True)
    return np.array(file if file.mode == "RGB" else file.convert("RGB"))    # each copy saved is a tenth of the time


def read_json(path: str | Path, *fields: str) -> dict:
    """A json file that must have `fields`; UserError otherwise."""
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}; set the option that names it, or put the annotations there.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not json ({error}); download it again.") from None
    missing = [field for field in fields if not isinstance(content, dict) or field not in content]
    if missing:
        raise UserError(f"{path} has no field {missing[0]!r}; a COCO-style file with {', '.join(fields)} is expected.")
    return content


@contextmanager
def fields_of(path: str | Path) -> Iterator[None]:
    """Where entries of a json are read: a field that is missing becomes a UserError that names it and the file."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"{path} has an entry without the field {error}; download it again.") from None


def list_images(images: str | Path, root: str | Path | None = None) -> list[str]:
    """The sorted image files below a folder, or those that a COCO-style json names (below `root`, else beside it).

    Raises UserError, saying what was looked at, if there are none.
    """
    images = Path(images)
    if images.suffix == ".json":
        root = Path(root or images.parent)
        with fields_of(images):
            found = [str(root / entry["file_name"]) for entry in read_json(images, "images")["images"]]
        if found and not Path(found[0]).is_file():
            raise UserError(f"{images} names {found[0]}, which is not there; set IMAGE_ROOT to the folder of its images.")
    else:
        found = sorted(walk_images(images))
    if not found:
        state = "holds no image" if images.exists() else "does not exist"
        raise UserError(f"{images.absolute()} {state}; put images there (any folder of {', '.join(IMAGE_SUFFIXES)} files, "
                        "or a COCO-style json) or set IMAGES to where they are.")
    return found


def walk_images(folder: Path) -> Iterator[str]:
    """Image files below a folder, hidden ones left out; links to folders are followed, each folder being entered once."""
    entered = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(path))
        yield from (os.path.join(path, name) for name in names
                    if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))


class Sample(NamedTuple):
    """One training image."""
    image: Tensor       # uint8 (3, H, W)
    index: int          # that was asked for
    skipped: list[tuple[str, str]]      # files that could not be read in its place, and why


class TrainingImages(Dataset):
    """Unlabelled images. Item i is a Sample of image i or, if that can't be read, of the next one that can."""

    TRIES = 100         # files in a row that may be unreadable

    def __init__(self, images: str | Path, root: str | Path | None = None):
        self.paths = list_images(images, root)

    @cached_property
    def fingerprint(self) -> str:
        """Tells whether two lists have the same images in the same order, wherever their folders are."""
        root = os.path.commonpath(self.paths)
        names = "\n".join(os.path.relpath(path, root) for path in self.paths)
        return f"{len(self)} images, {zlib.crc32(names.encode()):08x}"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        skipped = []
        for place in range(index, index + min(self.TRIES, len(self))):
            path = self.paths[place % len(self)]
            try:
                return Sample(read_image(path, upright=True), index, skipped)
            except UserError as error:
                skipped.append((path, str(error)))
        raise UserError(f"{len(skipped)} files in a row can't be read; the last sentence about them: {skipped[-1][1]}")


def epoch_order(images: int, batch: int, epoch: int, seed: int) -> Tensor:
    """The image indices of every step of an epoch, (steps, batch), shuffled; the incomplete last batch is left out.

    The order depends on nothing else, so a run can go on in the middle of an epoch, on another number of GPUs too.
    Raises UserError if there are fewer images than a batch has.
    """
    if images < batch:
        raise UserError(f"There are {images} images, fewer than BATCH_SIZE, {batch}; add images, or set BATCH_SIZE to "
                        f"{images} or less.")
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[:images // batch * batch].view(-1, batch)


def rank_batches(order: Tensor, rank: int, world: int, micro_batch: int, first_step: int = 0) -> list[list[int]]:
    """One rank's share of `order` (steps, batch) from `first_step` on, as consecutive batches of `micro_batch` images."""
    return order[first_step:].view(-1, world, order.shape[1] // world)[:, rank].reshape(-1, micro_batch).tolist()


def workers(wanted: int) -> int:
    """How many processes decode images: as many as wanted, and no more than the machine has cores."""
    return min(wanted, os.cpu_count() or 1)


# ------------------------------------------------------------------------------------------- pictures on the device

def resize(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 or float [0, 1] (3, H, W) -> float [0, 1] (3, height, width), bicubic with antialiasing."""
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float [0, 1] (..., 3, H, W) -> (x - mean) / std of each channel."""
    mean, std = (constant(tuple(values), torch.float, images.device).view(3, 1, 1) for values in (mean, std))
    return (images - mean) / std


@lru_cache
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, sent to the device once: a GPU would be waited for each time."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def fitted_size(image: Tensor, size: int) -> tuple[int, int]:
    """Height and width of an image (..., H, W) with its longest side resized to `size`."""
    H, W = image.shape[-2:]
    return max(1, round(size * H / max(H, W))), max(1, round(size * W / max(H, W)))


def padded(image: Tensor, height: int, width: int) -> Tensor:
    """(..., h, w) -> (..., height, width), zeros to the right and below."""
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))


def student_image(image: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (3, H, W) -> (3, size, size): longest side to `size`, padded with black right and below, normalised."""
    return normalize(padded(resize(image, *fitted_size(image, size)), size, size), mean, std)


def prefetched(batches: Iterable[tuple], device: torch.device) -> Iterator[tuple]:
    """Batches (images, ...) with the images on `device`; a GPU copies the next batch while it computes on the present one."""
    if device.type != "cuda":
        yield from batches
        return
    stream, sent = torch.cuda.Stream(device), None
    for images, *rest in batches:
        with torch.cuda.stream(stream):
            images = [image.to(device, non_blocking=True) for image in images]
            copied = torch.cuda.Event()
            copied.record()
        if sent:
            yield arrived(*sent)
        sent = images, rest, copied
    if sent:
        yield arrived(*sent)


def arrived(images: list[Tensor], rest: list, copied: torch.cuda.Event) -> tuple:
    """A batch whose copy the present stream now waits for, and whose memory it keeps while it works."""
    torch.cuda.current_stream().wait_event(copied)
    for image in images:
        image.record_stream(torch.cuda.current_stream())
    return images, *rest


class Grid(NamedTuple):
    """A division of an image into rows x columns cells, of which `cells` (row-major numbers) are cropped."""
    rows: int
    columns: int
    cells: list[int]


def draw_grid(key: str, sides: tuple[int, int] = (1, 6), aspect: float = 0, most: int = 0) -> Grid:
    """Rows and columns drawn from sides[0] ... sides[1] (section 9.2), the same for the same `key`.

    aspect: the largest ratio of rows to columns or the reverse, 0 for any; most: cells kept, 0 for all.
    """
    draw = random.Random(key)
    lengths = range(sides[0], sides[1] + 1)
    choices = [(m, n) for m in lengths for n in lengths if not aspect or max(m, n) <= aspect * min(m, n)]
    rows, columns = draw.choice(choices)
    cells = list(range(rows * columns))
    return Grid(rows, columns, sorted(draw.sample(cells, most)) if 0 < most < len(cells) else cells)


def grid_crops(image: Tensor, grid: Grid, size: int, mean: Sequence[float], std: Sequence[float],
               keep_aspect: bool = False) -> Tensor:
    """The cells of a grid, each resized to size x size and normalised: uint8 (3, H, W) -> (k, 3, size, size).

    All cells have one shape, so this is one resize of the image and a reshape. keep_aspect: the longest side of a
    cell is resized to `size` and the rest padded, as the published code does.
    """
    H, W = image.shape[-2:]
    cell = (size, size)
    if keep_aspect:
        sides = H / grid.rows, W / grid.columns
        cell = tuple(max(1, round(size * side / max(sides))) for side in sides)
    whole = resize(image, cell[0] * grid.rows, cell[1] * grid.columns)
    crops = whole.unflatten(2, (grid.columns, cell[1])).unflatten(1, (grid.rows, cell[0]))
    crops = crops.permute(1, 3, 0, 2, 4).flatten(0, 1)
    if len(grid.cells) < len(crops):
        crops = torch.stack([crops[cell] for cell in grid.cells])       # a list as an index would have to be sent to a GPU
    return normalize(padded(crops, size, size), mean, std)


def grid_boxes(image: Tensor, grid: Grid, size: int) -> Tensor:
    """The cells' boxes in the student's padded picture: (k, 4), x0 y0 x1 y1 in [0, 1]."""
    h, w = fitted_size(image, size)
    rows, columns = torch.meshgrid(torch.arange(grid.rows), torch.arange(grid.columns), indexing="ij")
    corners = torch.stack([columns, rows, columns + 1, rows + 1], dim=-1).flatten(0, 1)[grid.cells]
    steps = torch.tensor([w / size / grid.columns, h / size / grid.rows])
    return (corners * steps.repeat(2)).to(image.device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------- class lists

@dataclass(frozen=True)
class Classes:
    """Class names with synonyms: `names` has the first of each class, `prompts` all, `owner` the class of each prompt."""
    names: list[str]
    prompts: list[str]
    owner: list[int]

    def __len__(self) -> int:
        return len(self.names)

    def best(self, scores: Tensor) -> Tensor:
        """Scores of all prompts (prompts, ...) -> of the classes (K, ...): a class has the best of its synonyms'."""
        if len(self.prompts) == len(self.names):
            return scores
        owner = constant(tuple(self.owner), torch.long, scores.device).view(-1, *[1] * (scores.ndim - 1)).expand_as(scores)
        out = scores.new_full((len(self), *scores.shape[1:]), float("-inf"))
        return out.scatter_reduce(0, owner, scores, "amax")


def make_classes(lines: Sequence[str]) -> Classes:
    """One class a line, synonyms after commas."""
    synonyms = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
    owner = [index for index, names in enumerate(synonyms) for _ in names]
    return Classes([names[0] for names in synonyms], [name for names in synonyms for name in names], owner)


def read_classes(path: str | Path) -> Classes:
    """A class file: one class a line, synonyms after commas; empty lines and lines with # do not count.

    Raises UserError if there is no such file or it names no class, or one twice.
    """
    path = Path(path) if Path(path).exists() else Path(__file__).parent / path
    if not path.is_file():
        raise UserError(f"There is no class file {path}; write one, a class a line, synonyms after commas.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"The class file {path} is not text in UTF-8; write one class a line.") from None
    lines = [line for line in text.splitlines() if line.strip(" ,\t") and not line.startswith("#")]
    if not lines:
        raise UserError(f"The class file {path} names no class; write one a line.")
    classes = make_classes(lines)
    twice = next((name for name in classes.names if classes.names.count(name) > 1), None)
    if twice:
        raise UserError(f"The class file {path} has the class {twice!r} twice; remove one.")
    return classes


# -------------------------------------------------------------------------------------------------- panoptic regions

class Regions(NamedTuple):
    """An image and its labelled regions."""
    image: Tensor       # uint8 (3, H, W)
    segments: Tensor    # int16 (H, W): the region that a pixel belongs to, -1 for none
    boxes: Tensor       # (k, 4) x0 y0 x1 y1 in pixels
    labels: Tensor      # (k,) class


class PanopticRegions(Dataset):
    """The regions of a COCO-panoptic json, its folder of PNGs and its folder of images.

    crowd: regions marked iscrowd too (groups of things under one box). min_area: of the box, in pixels.
    """

    def __init__(self, annotations: str | Path, pngs: str | Path, images: str | Path, crowd: bool = False,
                 min_area: int = 0):
        content = read_json(annotations, "images", "annotations", "categories")
        self.pngs, self.images, self.crowd, self.min_area = Path(pngs), Path(images), crowd, min_area
        with fields_of(annotations):
            categories = sorted(content["categories"], key=lambda category: category["id"])
            self.names = [category["name"] for category in categories]
            self.is_thing = [bool(category["isthing"]) for category in categories]
            self.class_of = {category["id"]: index for index, category in enumerate(categories)}
            self.file_names = {image["id"]: image["file_name"] for image in content["images"]}
        self.annotations, self.path = content["annotations"], annotations
        if not self.annotations:
            raise UserError(f"{annotations} has no annotations; give a COCO-panoptic json.")
        if "segments_info" not in self.annotations[0]:
            raise UserError(f"{annotations} has no field 'segments_info' in its annotations; give the panoptic json, "
                            "such as panoptic_val2017.json, not instances or captions.")

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, index: int) -> Regions:
        with fields_of(self.path):
            return self._read(index)

    def _read(self, index: int) -> Regions:
        annotation = self.annotations[index]
        png = self.pngs / annotation["file_name"]
        if annotation["image_id"] not in self.file_names:
            raise UserError(f"{self.path} has the image_id {annotation['image_id']} for {png.name}, but no such image in "
                            "'images'; download the json again.")
        image = read_image(self.images / self.file_names[annotation["image_id"]])
        rgb = read_image(png).int()
        if rgb.shape != image.shape:
            raise UserError(f"{png} is {tuple(rgb.shape[1:])}, but its image {tuple(image.shape[1:])}; "
                            "they must be of one size.")
        ids = (rgb[0] + 256 * rgb[1] + 65536 * rgb[2]).numpy()
        kept = sorted((segment for segment in annotation["segments_info"] if self._counts(segment)),
                      key=lambda segment: segment["id"])
        self._check(png, kept, set(np.unique(ids).tolist()))
        known = np.array([segment["id"] for segment in kept] or [0])
        place = np.searchsorted(known, ids).clip(max=len(known) - 1)
        segments = np.where((known[place] == ids) & bool(kept), place, -1).astype(np.int16)
        boxes = torch.tensor([segment["bbox"] for segment in kept], dtype=torch.float).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self.class_of[segment["category_id"]] for segment in kept], dtype=torch.long)
        return Regions(image, torch.from_numpy(segments), boxes, labels)

    def _check(self, png: Path, kept: list[dict], ids: set[int]) -> None:
        """Raises UserError on a segment of an unknown category, or one that the PNG does not have."""
        for segment in kept:
            if segment["category_id"] not in self.class_of:
                raise UserError(f"{self.path} has the category_id {segment['category_id']} in a segment of {png.name}, but no "
                                "such category in 'categories'; download the json again.")
            if segment["id"] not in ids:
                raise UserError(f"{self.path} has the segment id {segment['id']} for {png.name}, but the PNG has no pixel of "
                                "it; take the json and the PNGs of one release.")

    def _counts(self, segment: dict) -> bool:
        width, height = segment["bbox"][2:]
        return (self.crowd or not segment.get("iscrowd", 0)) and width * height >= max(1, self.min_area)


def segment_masks(segments: Tensor, count: int, size: int, patch_size: int) -> Tensor:
    """Regions' shares of each patch of the student's padded picture: int (H, W) -> (count, size/patch, size/patch)."""
    if not count:
        return torch.zeros(0, size // patch_size, size // patch_size, device=segments.device)
    masks = (segments == torch.arange(count, device=segments.device)[:, None, None]).float()
    masks = F.interpolate(masks[None], fitted_size(segments, size), mode="bilinear", antialias=True)[0]
    return F.avg_pool2d(padded(masks, size, size), patch_size)


# -------------------------------------------------------------------------------------------- segmentation benchmarks

@dataclass(frozen=True)
class Benchmark:
    """Where a segmentation benchmark's files are in its original layout, what its label values mean, and how it is evaluated.

    `{}` in a path stands for an image's name.
    """
    folder: str                         # below the data folder
    names: str                          # file that lists the images, a name a line; or a pattern of names: * or */*
    image: str                          # path of an image
    label: str                          # path of its label PNG, or of a COCO-instances json to render it from
    classes: str                        # file in classes/
    values: Sequence[int]               # label value of each class, in the order of `classes`; all others are void
    threshold: float | None = None      # with a background class (the first): it gets pixels of a lower probability
    logit_scale: float = 40.0           # factor of the similarities before that probability's softmax
    short_side: int = 448               # of the image that the model sees


_VOC = ("VOCdevkit/VOC2012", "ImageSets/Segmentation/val.txt", "JPEGImages/{}.jpg", "SegmentationClass/{}.png")
_CONTEXT = ("VOCdevkit/VOC2010", "ImageSets/SegmentationContext/val.txt", "JPEGImages/{}.jpg",
            "SegmentationClassContext/{}.png")
_TOY = ("names.txt", "images/{}.png", "labels/{}.png")
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_NOT_IN_COCO_STUFF = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}       # ids that COCO has no annotation of

# Thresholds, scales and sides are the authors' (configs/ of their code); the paper does not give them.
BENCHMARKS = {
    "voc21": Benchmark(*_VOC, "voc21.txt", range(21), threshold=0.4, logit_scale=80.0),
    "context60": Benchmark(*_CONTEXT, "context60.txt", range(60), threshold=0.15),
    "coco_object": Benchmark("coco", "*", "val2017/{}.jpg", "annotations/instances_val2017.json", "coco_object.txt", range(81),
                             threshold=0.2),
    "voc20": Benchmark(*_VOC, "voc20.txt", range(1, 21)),
    "context59": Benchmark(*_CONTEXT, "context59.txt", range(1, 60)),
    "coco_stuff": Benchmark("coco", "*", "val2017/{}.jpg", "stuffthingmaps/val2017/{}.png", "coco_stuff.txt",
                            [id - 1 for id in range(1, 183) if id not in _NOT_IN_COCO_STUFF]),
    "cityscapes": Benchmark("cityscapes", "*/*", "leftImg8bit/val/{}_leftImg8bit.png", "gtFine/val/{}_gtFine_labelIds.png",
                            "cityscapes.txt", _CITYSCAPES_IDS, short_side=560),
    "ade150": Benchmark("ADEChallengeData2016", "*", "images/validation/{}.jpg", "annotations/validation/{}.png", "ade150.txt",
                        range(1, 151)),
    "toy": Benchmark("toy/val", *_TOY, "toy.txt", range(18)),
    "toy_dev": Benchmark("toy/dev", *_TOY, "toy.txt", range(18)),       # to choose settings with
}
PAPERS = tuple(name for name in BENCHMARKS if not name.startswith("toy"))       # Table 5, Table 10


class NotThere(UserError):
    """A benchmark's files are not where they were looked for."""


class SegmentationImages(Dataset):
    """A benchmark's images and labels: item i is (uint8 image (3, H, W), uint8 label (H, W), classes or VOID)."""

    def __init__(self, benchmark: Benchmark, data: str | Path):
        self.root = Path(data) / benchmark.folder
        self.benchmark = benchmark
        self.names = self._list()
        self.instances = Instances(self.root / benchmark.label) if benchmark.label.endswith(".json") else None
        for path in (benchmark.image, benchmark.label):
            first = self.root / path.format(self.names[0])
            if not first.is_file():
                raise NotThere(f"There is no {first.absolute()}; unpack all of the data set, images and labels.")
        self.lookup = np.full(65536, VOID, dtype=np.uint8)
        self.lookup[list(benchmark.values)] = np.arange(len(benchmark.values))

    def _list(self) -> list[str]:
        """The images' names; NotThere if there are none."""
        pattern = self.benchmark.image.format(self.benchmark.names)
        is_listed = "*" not in self.benchmark.names
        looked_at = self.root / (self.benchmark.names if is_listed else pattern)
        if is_listed and looked_at.is_file():
            names = looked_at.read_text(encoding="utf-8-sig").split()
        else:
            before, after = self.benchmark.image.split("{}")
            found = sorted(path.relative_to(self.root).as_posix() for path in self.root.glob(pattern)) if not is_listed else []
            names = [path[len(before):len(path) - len(after)] for path in found]
        if not names:
            raise NotThere(f"There is no {looked_at.absolute()}, or it names no image; unpack the data set there in its "
                           "original layout (toy.py draws the toy scenes), or set DATA to the folder that holds "
                           f"{self.benchmark.folder}.")
        return names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = read_image(self.root / self.benchmark.image.format(self.names[index]))
        path = self.root / self.benchmark.label.format(self.names[index])
        try:
            if self.instances:
                values = self.instances.render(f"{Path(self.names[index]).name}.jpg", *image.shape[1:])
            else:
                with Image.open(path) as file:
                    values = np.array(file)
            label = self.lookup[values]
        except (OSError, IndexError) as error:
            raise UserError(f"{path} can't be read as a label image ({error}); download it again.") from None
        if label.shape != tuple(image.shape[1:]):
            raise UserError(f"{path} is {label.shape}, but its image {tuple(image.shape[1:])}; they must be of one size.")
        return image, torch.from_numpy(label)


class Instances:
    """A COCO-instances json, rendered to label images: 0 background, 1 ... the categories in the order of their ids."""

    def __init__(self, path: Path):
        if not path.is_file():
            raise NotThere(f"There is no {path.absolute()}; unpack COCO's annotations there, or set DATA to the folder that "
                           "holds coco.")
        self.path, content = path, read_json(path, "images", "annotations", "categories")
        with fields_of(path):
            self.value = {id: place + 1 for place, id in enumerate(sorted(each["id"] for each in content["categories"]))}
            self.image_of = {image["file_name"]: image["id"] for image in content["images"]}
            self.of_image: dict[int, list[dict]] = {}
            for annotation in content["annotations"]:
                kept = {name: annotation[name] for name in ("category_id", "segmentation")}
                self.of_image.setdefault(annotation["image_id"], []).append(kept)

    def render(self, file_name: str, height: int, width: int) -> np.ndarray:
        """The label image (height, width) of an image; of overlapping objects the smaller one is on top.

        Raises UserError for an image that the json does not list.
        """
        if file_name not in self.image_of:
            raise UserError(f"{self.path} says nothing of {file_name}; give the json and the images of one split.")
        label = np.zeros((height, width), np.uint8)
        objects = [(self._mask(each["segmentation"], height, width), self.value[each["category_id"]])
                   for each in self.of_image.get(self.image_of[file_name], [])]
        for mask, value in sorted(objects, key=lambda each: -int(each[0].sum())):
            label[mask] = value
        return label

    @staticmethod
    def _mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
        """Polygons, or a run-length code in either of COCO's forms -> bool (height, width)."""
        if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
            return coco_masks.decode(segmentation).astype(bool)
        codes = coco_masks.frPyObjects(segmentation, height, width)
        return coco_masks.decode(coco_masks.merge(codes) if isinstance(codes, list) else codes).astype(bool)
