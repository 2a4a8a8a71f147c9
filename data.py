"""What the models see: training batches, student images and crop grids, class lists.

Workers decode files and nothing else: a uint8 image (3, H, W) of any size goes to the device. There
it is resized, padded, cut into crops and normalised (`student_image`, `grid_crops`), once for each
model that sees it.
"""

import math
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from util import UserError
from util.distributed import Ranks
from util.files import find
from util.images import read_image as read_image
from util.order import rank_batches
from util.run import Run, ignore_signals
from util.samples import Batch, TrainingData, collate

# --------------------------------------------------------------------------------------- batches

def training_batches(dataset: TrainingData, run: Run) -> Iterator[Batch]:
    """This rank's micro batches from the run's present step to its last, on the rank's device."""
    cfg, device = run.cfg, run.ranks.device

    def indices() -> Iterator[list[int]]:
        first_epoch, skip = divmod(run.step, run.steps_per_epoch)
        for epoch in range(first_epoch, math.ceil(run.total / run.steps_per_epoch)):
            order = dataset.order(cfg.BATCH_SIZE, epoch, cfg.SEED)
            yield from rank_batches(order, run.ranks, run.micro_batch,
                                    skip if epoch == first_epoch else 0)

    # One loader for all epochs: it forks its workers once, beside as few threads as possible.
    loader = DataLoader(dataset, batch_sampler=indices(), collate_fn=collate,
                        num_workers=num_workers(cfg.NUM_WORKERS), worker_init_fn=ignore_signals,
                        pin_memory=device.type == "cuda")
    for batch in loader:
        yield batch._replace(data=to_device(batch.data, device))


def to_device(data: Tensor | list | tuple, device: torch.device) -> Tensor | list | tuple:
    """Tensors, and lists and named tuples of them, on a device, without waiting for the copies."""
    if isinstance(data, Tensor):
        return data.to(device, non_blocking=True)
    parts = [to_device(part, device) for part in data]
    return parts if isinstance(data, list) else type(data)(*parts)


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
RESIZES = ("bicubic", "pil", "cv2")     # what `how` may be


def resize(image: Tensor, height: int, width: int, how: str = "bicubic") -> Tensor:
    """uint8 or float [0, 1] (3, H, W) -> float [0, 1] (3, height, width), antialiased bicubic; or
    bilinear, as applications have it: pil, PIL's, antialiased, or cv2, OpenCV's, which skips
    pixels. These two make whole levels of bytes, as the originals do."""
    levels = 255 if image.dtype == torch.uint8 else 1
    image, (H, W), size = image.float(), image.shape[-2:], (height, width)
    if how != "cv2" and (H > MAX_REDUCED * height or W > MAX_REDUCED * width):
        # The filter of so large a step does not fit into a GPU's shared memory: two steps.
        image = F.adaptive_avg_pool2d(image, (min(H, MAX_REDUCED // 2 * height),
                                              min(W, MAX_REDUCED // 2 * width)))
    if how == "bicubic":
        return F.interpolate(image[None] / levels, size, mode=how, antialias=True)[0].clamp(0, 1)
    # PIL resizes along rows first, and rounds after each side.
    for step in {"pil": [(image.shape[1], width), size], "cv2": [size]}[how]:
        image = F.interpolate(image[None], step, mode="bilinear", antialias=how == "pil")[0]
        image = (image + 0.5).floor() if levels == 255 else image
    return image / levels


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
    # Every pair of numbers is as likely as another.
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
    # 1. The size of a cell
    H, W = image.shape[-2:]
    cell = (size, size)
    if keep_aspect:
        sides = H / grid.rows, W / grid.columns
        cell = tuple(max(1, round(size * side / max(sides))) for side in sides)
    # 2. One resize of the image, cut into rows and columns
    whole = resize(image, cell[0] * grid.rows, cell[1] * grid.columns)
    crops = whole.unflatten(2, (grid.columns, cell[1])).unflatten(1, (grid.rows, cell[0]))
    crops = crops.permute(1, 3, 0, 2, 4).flatten(0, 1)
    # 3. Padding, if aspects are kept; the published code pads both sides alike
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


def in_order(classes: Classes, names: Sequence[str], path: str | Path, source: str | Path
             ) -> Classes:
    """A class file's classes in the order of a json's category names, where both have them.

    Raises UserError if numbers differ, or if only some names can be put in that order.
    """
    if len(classes) != len(names):
        raise UserError(f"{path} has {len(classes)} classes, but {source} {len(names)} categories, "
                        "background included where it is a class; give a file of as many lines.")
    place = {name.casefold(): k for name, k in zip(classes.prompts, classes.class_of_prompt)}
    found = [place.get(name.casefold()) for name in names]
    moved = [name for number, (name, k) in enumerate(zip(names, found)) if k not in (None, number)]
    if moved and (None in found or len(set(found)) < len(found)):
        raise UserError(f"{path} has {moved[0]!r} at another place than {source}; give the classes "
                        "in the order of the categories' ids.")
    prompts = [[name for name, k in zip(classes.prompts, classes.class_of_prompt) if k == wanted]
               for wanted in found]
    return make_classes([", ".join(names) for names in prompts]) if moved else classes
