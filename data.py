"""What the scripts read: images, grids of crops, class lists.

Workers decode files and nothing else: a uint8 image (3, H, W) of any size goes to the device. There
it is resized, padded, cut into crops and normalised (`student_image`, `grid_crops`), once for each
model that sees it.
"""

import hashlib
import io
import math
import os
import random
import signal
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from util import UserError
from util.distributed import Ranks
from util.files import fields_of, find, read_json
from util.names import Names, write_sorted
from util.order import WindowOrder, check_batch
from util.run import ignore_signals
from util.shards import CACHE, ShardChanged, Shards, expand, is_remote

MAX_DECODED = 100_000_000    # larger images are not decoded: a small file could fill the memory
Image.MAX_IMAGE_PIXELS = None       # PIL would warn at its own bound; ours holds before decoding
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Image files that are not read, and are named when they are left out.
OTHER_SUFFIXES = (".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".ppm", ".pgm", ".tga", ".dng",
                  ".nef", ".cr2", ".arw", ".svg", ".eps", ".psd")
# PIL chooses a decoder by a file's content, and some decoders start other programs (PostScript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_LISTED = 1_000_000     # paths that a process holds, 100 MB; longer lists are kept in a file


# --------------------------------------------------------------------------------- image files

def read_image(path: str | Path, upright: bool = False, most: int | None = None) -> Tensor:
    """An image file as RGB, uint8 (3, H, W). UserError names a file that can't be read.

    upright: turn it as its EXIF entry says. Annotations are made for images as they are stored.
    most: an image of more pixels is reduced by a whole factor while it is decoded, None for never.
    """
    with unreadable(path, "an image"):
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is no regular file")
        return open_image(path, upright, most)


def open_image(file: str | Path | BinaryIO, upright: bool, most: int | None) -> Tensor:
    """As read_image, of an opened file, too. Raises what decoders raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # of metadata that is not used here
        with Image.open(file, formats=FORMATS) as opened:
            return torch.from_numpy(decode(opened, upright, most)).permute(2, 0, 1)


@contextmanager
def unreadable(path: str | Path, what: str) -> Iterator[None]:
    """Within it, any error becomes a UserError: the file can't be read as `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:      # decoders raise anything on damaged files
        reason = " ".join((str(error) or type(error).__name__).split())
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else reason
        raise UserError(f"{path} can't be read as {what} ({reason}); replace or remove it."
                        ) from None


def decode(file: Image.Image, upright: bool, most: int | None = None) -> np.ndarray:
    """An opened image as RGB, uint8 (H, W, 3).

    Raises ValueError if it is too large or has values of an unknown range.
    """
    if file.mode == "F":
        raise ValueError("it has floating-point values of an unknown range")
    factor = reduction(file, most)
    if factor > 1:      # a JPEG can be decoded at a half, a quarter or an eighth
        file.draft(None, (max(1, file.width // factor), max(1, file.height // factor)))
        factor = reduction(file, most)
    if file.width * file.height > MAX_DECODED:
        raise ValueError(f"it is {file.width} x {file.height}, and at most {MAX_DECODED:,} pixels "
                         "are decoded")
    if upright:
        ImageOps.exif_transpose(file, in_place=True)
    shift = 8 if file.mode.startswith("I") and file.getextrema()[1] > 255 else 0
    if factor == 1:
        return to_rgb(file, shift)
    # In strips: a copy of the whole image in RGB takes more memory than many files.
    step = 32 * factor
    strips = [file.crop((0, top, file.width, min(top + step, file.height)))
              for top in range(0, file.height, step)]
    return np.concatenate([np.array(Image.fromarray(to_rgb(strip, shift)).reduce(factor))
                           for strip in strips])


def reduction(file: Image.Image, most: int | None) -> int:
    """The least factor by which both sides are divided to have at most `most` pixels."""
    return math.ceil((file.width * file.height / most) ** 0.5) if most else 1


def to_rgb(file: Image.Image, shift: int) -> np.ndarray:
    """RGB, uint8 (H, W, 3). shift: bits by which values of 16 bits are scaled."""
    if file.mode.startswith("I"):       # PIL would clip them
        file = Image.fromarray((np.array(file) >> shift).astype(np.uint8))
    # A needless copy would cost a tenth of the time.
    return np.array(file if file.mode == "RGB" else file.convert("RGB"))


def list_images(images: str | Path, root: str | Path | None = None, outside: bool = False,
                others: Counter[str] | None = None) -> Sequence[str]:
    """The sorted image files below a folder, or those that a COCO-style json names.

    A folder of more than MAX_LISTED is listed once into a file of CACHE, and again when it has
    changed; no process then holds all the paths.
    root: folder of the json's images, by default the json's own. outside: a json may name images
    that are not below it. others: gets the number of image files of each suffix that is not read.
    Raises UserError that says where it looked if there are none.
    """
    images, others = find(images), Counter() if others is None else others
    if images.suffix == ".json":
        root = find(root or images.parent)
        with fields_of(images):
            entries = read_json(images, "images")["images"]
            found = [str(root / entry["file_name"]) for entry in entries]
        alien = first_outside(found, root)
        if alien and not outside:
            raise UserError(f"{images} names {alien}, which is not below {root.absolute()}; set "
                            "IMAGE_ROOT to the folder of its images, or OUTSIDE_ROOT if you trust "
                            "the json.")
        if found and not Path(found[0]).is_file():
            raise UserError(f"{images} names {found[0]}, which is not there; set IMAGE_ROOT to the "
                            "folder of its images.")
    else:
        found = list_folder(images, others)
    if not found:
        state = "holds no image" if images.exists() else "does not exist"
        state += f" but {counted(others)}, which are not read" if others else ""
        if images.is_dir() and any(images.glob("*.tar")):
            raise UserError(f"{images.absolute()} {state}; for its shards, set IMAGES to "
                            f"{images}/*.tar.")
        raise UserError(f"{images.absolute()} {state}; put images there (any folder of "
                        f"{', '.join(IMAGE_SUFFIXES)} files, or a COCO-style json) or set IMAGES "
                        "to where they are.")
    return found


def first_outside(paths: list[str], folder: Path) -> str | None:
    """The first path that is not below a folder once its `..` are resolved, None if all are."""
    base = os.path.join(os.path.abspath(folder), "")
    return next((path for path in paths if not os.path.abspath(path).startswith(base)), None)


def counted(others: Counter[str]) -> str:
    """Numbers of files by suffix, for a sentence."""
    return ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common())


def list_folder(folder: Path, others: Counter[str]) -> Sequence[str]:
    """The sorted image files below a folder: a list, or the Names in CACHE."""
    place = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()[:16]
    listed = Path(CACHE) / f"{folder.name}.{place}.names"
    with suppress(OSError, ValueError, KeyError):
        names = Names(listed, str(folder))
        times, counts = names.about["times"], names.about["others"]
        if all(os.stat(path).st_mtime_ns == time for path, time in times.items()):
            others.update(counts)
            return names
    times: dict[str, int] = {}
    found = walk_images(folder, others, times)
    first = list(islice(found, MAX_LISTED + 1))
    if len(first) <= MAX_LISTED:
        return sorted(first)
    print(f"{folder} holds more than {MAX_LISTED:,} images; listing them into {listed}")
    names = (os.path.relpath(path, folder) for path in chain(first, found))
    write_sorted(listed, names, {"times": times, "others": others})
    return Names(listed, str(folder))


def walk_images(folder: Path, others: Counter[str], times: dict[str, int]) -> Iterator[str]:
    """Image files below a folder except hidden ones; follows links, enters each folder once.

    others: gets the numbers of other image files by suffix. times: gets when each folder changed.
    """
    entered = set()
    for path, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(path) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(path))
        times[path] = os.stat(path).st_mtime_ns
        names = [name for name in names if not name.startswith(".")]
        suffixes = [os.path.splitext(name)[1].lower() for name in names]
        others.update(suffix for suffix in suffixes if suffix in OTHER_SUFFIXES)
        yield from (os.path.join(path, name) for name, suffix in zip(names, suffixes)
                    if suffix in IMAGE_SUFFIXES)


class Sample(NamedTuple):
    """What one training image gives."""
    data: Tensor | tuple    # uint8 (3, H, W), or a named tuple of it and its labels
    index: int              # of the image asked for
    skipped: list[tuple[str, str]]      # files that could not be read in its place, and why


class Batch(NamedTuple):
    """A micro batch of a rank: the samples' fields, a list of each. Images keep their sizes."""
    data: list
    indices: list[int]
    skipped: list[list[tuple[str, str]]]


def collate(samples: list[Sample]) -> Batch:
    """Samples -> a batch."""
    return Batch(*map(list, zip(*samples)))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within it, a TimeoutError is raised after so many seconds, also out of a read that blocks."""
    def expire(*_: object) -> None:
        raise TimeoutError(f"it was not read within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class TrainingData(Dataset):
    """Images to train with. Item i is that of image i or, if it can't be read, of the next one.

    paths: the image files. read_timeout: seconds after which one counts as unreadable. A subclass
    says what `read` returns: a tensor or a named tuple of tensors, for the device.
    """

    TRIES = 100         # files in a row that may be unreadable

    def __init__(self, paths: Sequence[str], read_timeout: float = 60.0):
        self.paths, self.read_timeout = paths, read_timeout

    def read(self, index: int) -> Tensor | tuple:
        """What image `index` gives. Raises UserError if it can't be read."""
        raise NotImplementedError

    def order(self, batch_size: int, epoch: int, seed: int) -> Sequence:
        """The image indices of every step of an epoch, (steps, batch_size); see epoch_order."""
        return epoch_order(len(self), batch_size, epoch, seed)

    @cached_property
    def fingerprint(self) -> str:
        """The same for two lists of the same images in the same order, wherever they lie."""
        paths = [os.path.abspath(path) for path in self.paths]      # a json may mix both kinds
        root = os.path.commonpath(paths)
        names = "\n".join(os.path.relpath(path, root) for path in paths)
        return f"{len(self)} images, {zlib.crc32(os.fsencode(names)):08x}"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        skipped = []
        for place in range(index, index + min(self.TRIES, len(self))):
            try:
                with time_limit(self.read_timeout):
                    return Sample(self.read(place % len(self)), index, skipped)
            except ShardChanged:
                raise
            except UserError as error:
                skipped.append((self.paths[place % len(self)], str(error)))
        raise UserError(f"{len(skipped)} files in a row can't be read; the last "
                        f"reason: {skipped[-1][1]}")


class TrainingImages(TrainingData):
    """Unlabelled images, uint8 (3, H, W). most_pixels: of an image; a larger one is reduced."""

    def __init__(self, images: str | Path, root: str | Path | None = None, outside: bool = False,
                 read_timeout: float = 60.0, most_pixels: int | None = None):
        self.others: Counter[str] = Counter()       # image files that are left out, by suffix
        super().__init__(list_images(images, root, outside, self.others), read_timeout)
        self.most_pixels = most_pixels
        if isinstance(self.paths, Names):
            self.fingerprint = self.paths.fingerprint

    def order(self, batch_size: int, epoch: int, seed: int) -> Sequence:
        if isinstance(self.paths, Names):
            return WindowOrder(np.array([len(self)]), batch_size, epoch, seed)
        return super().order(batch_size, epoch, seed)

    def read(self, index: int) -> Tensor:
        return read_image(self.paths[index], True, self.most_pixels)


class TrainingShards(TrainingData):
    """As TrainingImages, of the images in tar shards. Members of other kinds are left out.

    pattern: the shards, as util.shards.expand takes it. ranks: those that share the work if the
    shards have no index yet.
    """

    def __init__(self, pattern: str, read_timeout: float = 60.0, most_pixels: int | None = None,
                 ranks: Ranks | None = None):
        shards = Shards(expand(pattern), IMAGE_SUFFIXES, ranks=ranks)
        super().__init__(shards, read_timeout)
        self.most_pixels, self.fingerprint = most_pixels, shards.fingerprint
        self.others = Counter({suffix: count for suffix, count in shards.ignored.items()
                               if suffix in OTHER_SUFFIXES})

    def order(self, batch_size: int, epoch: int, seed: int) -> WindowOrder:
        return WindowOrder(self.paths.counts, batch_size, epoch, seed)

    def read(self, index: int) -> Tensor:
        try:
            return open_image(io.BytesIO(self.paths.read(index)), True, self.most_pixels)
        except ShardChanged:
            raise
        except Exception:       # its name takes a look into the shard, so it is not found before
            with unreadable(self.paths[index], "an image"):
                raise


def training_images(cfg: SimpleNamespace, ranks: Ranks) -> TrainingImages | TrainingShards:
    """The unlabelled images that IMAGES names: of shards, or of a folder or a json."""
    if cfg.IMAGES.endswith(".tar") or is_remote(cfg.IMAGES):
        return TrainingShards(cfg.IMAGES, cfg.READ_TIMEOUT, cfg.MAX_PIXELS, ranks)
    return TrainingImages(cfg.IMAGES, cfg.IMAGE_ROOT, cfg.OUTSIDE_ROOT, cfg.READ_TIMEOUT,
                          cfg.MAX_PIXELS)


# --------------------------------------------------------------------------- batches and ranks

def epoch_order(images: int, batch_size: int, epoch: int, seed: int) -> Tensor:
    """The image indices of every step of an epoch, (steps, batch_size), shuffled.

    The incomplete last batch is left out. The order depends on the arguments only, so a run can
    resume in the middle of an epoch, on another number of GPUs too.
    Raises UserError if there are fewer images than a batch has.
    """
    check_batch(images, batch_size)
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(images, generator=rng)
    return order[:images // batch_size * batch_size].view(-1, batch_size)


def rank_batches(order: Sequence, ranks: Ranks, micro_batch: int, first_step: int = 0
                 ) -> Iterator[list[int]]:
    """One rank's share of `order` (steps, batch_size) from a step on, in micro batches."""
    for step in range(first_step, len(order)):
        share = order[step].reshape(ranks.world_size, -1)[ranks.rank]
        yield from share.reshape(-1, micro_batch).tolist()


def training_batches(cfg: SimpleNamespace, dataset: TrainingData, micro_batch: int,
                     first_step: int, ranks: Ranks) -> Iterator[Batch]:
    """This rank's micro batches from a step to the end of EPOCHS, data on the rank's device."""
    def all_batches() -> Iterator[list[int]]:
        first_epoch, skip = divmod(first_step, len(dataset) // cfg.BATCH_SIZE)
        for epoch in range(first_epoch, cfg.EPOCHS):
            order = dataset.order(cfg.BATCH_SIZE, epoch, cfg.SEED)
            yield from rank_batches(order, ranks, micro_batch, skip if epoch == first_epoch else 0)

    # One loader for all epochs: it forks its workers once, beside as few threads as possible.
    loader = DataLoader(dataset, batch_sampler=all_batches(), collate_fn=collate,
                        num_workers=num_workers(cfg.NUM_WORKERS), worker_init_fn=ignore_signals,
                        pin_memory=ranks.device.type == "cuda")
    return prefetched(iter(loader), ranks.device)


def prefetched(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches with data on `device`; a GPU copies the next ones while it computes on these."""
    if device.type != "cuda":
        yield from batches
        return
    stream, sent = torch.cuda.Stream(device), None
    for batch in batches:
        with torch.cuda.stream(stream):
            data = each_tensor(lambda tensor: tensor.to(device, non_blocking=True), batch.data)
            copied = torch.cuda.Event()
            copied.record()
        if sent:
            yield arrived(*sent)
        sent = batch._replace(data=data), copied
    if sent:
        yield arrived(*sent)


def arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """A batch whose copy the current stream waits for, and whose memory it keeps while it works."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    each_tensor(lambda tensor: tensor.record_stream(stream), batch.data)
    return batch


def each_tensor(function: Callable[[Tensor], object], data: Tensor | list | tuple) -> object:
    """The same lists and named tuples with what a function makes of each tensor."""
    if isinstance(data, Tensor):
        return function(data)
    made = [each_tensor(function, part) for part in data]
    return made if isinstance(data, list) else type(data)(*made)


def load_share(dataset: Dataset, ranks: Ranks, batch_size: int, wanted_workers: int) -> DataLoader:
    """This rank's share of a data set to evaluate on, in lists of samples."""
    share = Subset(dataset, range(ranks.rank, len(dataset), ranks.world_size))
    return DataLoader(share, batch_size, num_workers=num_workers(wanted_workers), collate_fn=list,
                      pin_memory=ranks.device.type == "cuda")


def num_workers(wanted: int) -> int:
    """How many processes decode images: as many as wanted, at most the number of cores."""
    return min(wanted, os.cpu_count() or 1)


# ------------------------------------------------------------------------ images on the device

MAX_REDUCED = 32       # factor that CUDA's antialiased resize surely takes; it fails beyond 47


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 or float [0, 1] (3, H, W) -> float [0, 1] (3, height, width), antialiased bicubic."""
    image = image.float() / 255 if image.dtype == torch.uint8 else image
    H, W = image.shape[-2:]
    if H > MAX_REDUCED * height or W > MAX_REDUCED * width:
        # The filter of so large a step does not fit into a GPU's shared memory: two steps.
        image = F.adaptive_avg_pool2d(image, (min(H, MAX_REDUCED // 2 * height),
                                              min(W, MAX_REDUCED // 2 * width)))
    size = (height, width)
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float [0, 1] (..., 3, H, W) -> (x - mean) / std of each channel."""
    mean, std = (constant(tuple(values), torch.float, images.device).view(3, 1, 1)
                 for values in (mean, std))
    return (images - mean) / std


@lru_cache
def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor, sent to the device once: each copy would wait for a GPU."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def fitted_size(image: Tensor, size: int) -> tuple[int, int]:
    """Height and width of an image (..., H, W) with its longest side resized to `size`."""
    H, W = image.shape[-2:]
    return max(1, round(size * H / max(H, W))), max(1, round(size * W / max(H, W)))


def pad_to(image: Tensor, height: int, width: int) -> Tensor:
    """(..., h, w) -> (..., height, width), zeros to the right and below."""
    return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))


def student_image(image: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (3, H, W) -> normalised (3, size, size): longest side to `size`, the rest black."""
    return normalize(pad_to(resize(image, *fitted_size(image, size)), size, size), mean, std)


def image_tokens(image: Tensor, size: int, patch_size: int) -> Tensor:
    """Which patches of student_image(image, size, …) show some of the image: bool (N,)."""
    rows, columns = (math.ceil(side / patch_size) for side in fitted_size(image, size))
    shown = torch.zeros(size // patch_size, size // patch_size, dtype=torch.bool)
    shown[:rows, :columns] = True
    return shown.flatten()


class Grid(NamedTuple):
    """A division of an image into rows x columns cells.

    cells: those that are cropped, by row-major number.
    """
    rows: int
    columns: int
    cells: list[int]


def sample_grid(key: str, sides: tuple[int, int] = (1, 6), aspect: float | None = None,
                most: int | None = None) -> Grid:
    """Rows and columns from sides[0] ... sides[1] (section 9.2), the same for the same `key`.

    aspect: the largest ratio of rows to columns or the reverse, None for any. most: cells that are
    cropped, None for all.
    """
    rng = random.Random(key)
    lengths = range(sides[0], sides[1] + 1)
    choices = [(m, n) for m in lengths for n in lengths
               if aspect is None or max(m, n) <= aspect * min(m, n)]
    rows, columns = rng.choice(choices)
    cells = list(range(rows * columns))
    if most is not None and most < len(cells):
        cells = sorted(rng.sample(cells, most))
    return Grid(rows, columns, cells)


def grid_crops(image: Tensor, grid: Grid, size: int, mean: Sequence[float], std: Sequence[float],
               keep_aspect: bool = False) -> Tensor:
    """The cells of a grid, resized to size x size and normalised: uint8 -> (k, 3, size, size).

    All cells have one shape, so this is one resize of the image and a reshape. keep_aspect: the
    longest side of a cell is resized to `size`, the other padded on both sides (published code).
    """
    H, W = image.shape[-2:]
    cell = (size, size)
    if keep_aspect:
        sides = H / grid.rows, W / grid.columns
        cell = tuple(max(1, round(size * side / max(sides))) for side in sides)
    whole = resize(image, cell[0] * grid.rows, cell[1] * grid.columns)
    crops = whole.unflatten(2, (grid.columns, cell[1])).unflatten(1, (grid.rows, cell[0]))
    crops = crops.permute(1, 3, 0, 2, 4).flatten(0, 1)
    # The published code pads both sides alike.
    above, before = (size - cell[0]) // 2, (size - cell[1]) // 2
    crops = F.pad(crops, (before, size - cell[1] - before, above, size - cell[0] - above))
    if len(grid.cells) < len(crops):
        # A list as an index would be copied to the GPU, which waits for it.
        crops = torch.stack([crops[number] for number in grid.cells])
    return normalize(crops, mean, std)


def grid_boxes(image: Tensor, grid: Grid, size: int) -> Tensor:
    """The cells' boxes in the student's padded image: (k, 4), x0 y0 x1 y1 in [0, 1]."""
    h, w = fitted_size(image, size)
    rows, columns = torch.meshgrid(torch.arange(grid.rows), torch.arange(grid.columns),
                                   indexing="ij")
    corners = torch.stack([columns, rows, columns + 1, rows + 1], dim=-1).flatten(0, 1)
    steps = torch.tensor([w / size / grid.columns, h / size / grid.rows])
    return (corners[grid.cells] * steps.repeat(2)).to(image.device, non_blocking=True)


# --------------------------------------------------------------------------------- class lists

@dataclass(frozen=True)
class Classes:
    """Class names with synonyms: `names` has the first of each class, `prompts` all of them."""
    names: list[str]
    prompts: list[str]
    class_of_prompt: list[int]        # the class of each prompt

    def __len__(self) -> int:
        return len(self.names)

    def best(self, scores: Tensor) -> Tensor:
        """Scores (prompts, ...) -> (K, ...): a class has the best score of its synonyms."""
        if len(self.prompts) == len(self.names):
            return scores
        class_of_prompt = constant(tuple(self.class_of_prompt), torch.long, scores.device)
        class_of_prompt = class_of_prompt.view(-1, *[1] * (scores.ndim - 1)).expand_as(scores)
        out = scores.new_full((len(self), *scores.shape[1:]), float("-inf"))
        return out.scatter_reduce(0, class_of_prompt, scores, "amax")


def make_classes(lines: Sequence[str]) -> Classes:
    """One class a line, synonyms after commas."""
    synonyms = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
    class_of_prompt = [index for index, names in enumerate(synonyms) for _ in names]
    return Classes([names[0] for names in synonyms],
                   [name for names in synonyms for name in names], class_of_prompt)


def first_twice(names: Sequence[str]) -> str | None:
    """The first name that occurs twice, None if none does. A tokenizer sees no capitals."""
    counts = Counter(name.casefold() for name in names)
    return next((name for name in names if counts[name.casefold()] > 1), None)


def read_classes(path: str | Path) -> Classes:
    """A class file: one class a line, synonyms after commas. Empty and # lines do not count.

    A relative path is looked for in the present folder, then in the repository. Raises UserError if
    there is no such file, if it names no class, or a name twice, in capitals or not.
    """
    path = find(path)
    if not path.is_file():
        raise UserError(f"There is no class file {path}; write one, a class a line, synonyms after "
                        "commas.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"The class file {path} is not text in UTF-8; write one class a line."
                        ) from None
    lines = [line for line in text.splitlines()
             if line.strip(" ,\t") and not line.lstrip().startswith("#")]
    if not lines:
        raise UserError(f"The class file {path} names no class; write one a line.")
    classes = make_classes(lines)
    twice = first_twice(classes.prompts)
    if twice:
        raise UserError(f"The class file {path} has the name {twice!r} twice; remove one, or tell "
                        "them apart, such as \"star (sky)\".")
    return classes
