"""Where the time goes on this machine, and how near its limit that is.

    python -m tools.bench                                       # the defaults of train.py
    python -m tools.bench --baseline                            # beside the plain forms
    python -m tools.bench --image_size 1024 --micro_batch 4 --compile --parts train

Measures reading images, a training step, segmentation, and training steps of F-ViT and CAT-Seg.
--baseline measures the plain forms (tools/reference.py and others) by turns; a ratio above 1 is in
favour of this code. Nothing is downloaded: images are made up, weights random. A time is the median
of REPEATS measurements after a warm-up; a GPU is waited for before a clock is read. On a CPU sizes
are small, unless they are given. A step is that of one micro batch, without the log.
"""

import copy
import os
import re
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode

import eval_seg
import train
from data import (
    Grid,
    TrainingData,
    TrainingImages,
    TrainingShards,
    grid_boxes,
    grid_crops,
    make_classes,
    num_workers,
    read_image,
    student_image,
)
from downstream.catseg import train as catseg_train
from downstream.catseg.model import CATSeg, Design
from downstream.detection import Objects
from downstream.fvit import train as fvit_train
from downstream.fvit.model import FViT
from downstream.fvit.train import CHANNELS, REGIONS  # noqa: F401 - settings shared with it
from eval_seg import (  # noqa: F401 - settings shared with eval_seg.py
    LONG_SIDE,
    SHORT_SIDE,
    STRIDE,
    WINDOW,
    WINDOW_BATCH,
    SegmentationBenchmark,
)
from model import VFM, VisionTower, context_loss
from tools import reference, reference_catseg
from train import (  # noqa: F401 - settings shared with train.py
    CHECKPOINTING,
    COMPILE,
    CONTEXT,
    CROP_SIZE,
    MODEL,
    PRECISION,
    VFM_MODEL,
)
from util import UserError, distributed, settings
from util.order import WindowOrder
from util.precision import DTYPES, autocast, find_precision
from util.shards import Shards

IMAGE_SIZE: int | None = None       # of the student; None: train.py's on a GPU, 448 on a CPU
CROPS = 12                          # crops of an image; the mean of the paper's grids is 12.25
MICRO_BATCH: int | None = None      # images of a forward pass; None: train.py's on a GPU, else 1
PROMPTS = 171                       # of the segmentation; COCO-Stuff has 171 classes
SEGMENT_BATCH: int | None = None    # images segmented together; None: eval_seg.py's, 2 on a CPU
FVIT_SIZE: int | None = None        # of F-ViT's images; None: its train.py's on a GPU, 320 on a CPU
FVIT_BATCH: int | None = None       # of F-ViT's forward pass; None: its train.py's on a GPU, else 1
CATSEG_SIZE: int | None = None      # of CAT-Seg's images; None: 384 on a GPU, 192 on a CPU
CATSEG_CLASSES: int | None = None   # None: COCO-Stuff's 171 on a GPU, 32 on a CPU
WORKER_COUNTS = (1, 2, 4, 8, 16)    # numbers of worker processes to try, up to the cores
IMAGES: str | None = None           # folder of photographs to read; None: made-up ones of 640x480
PARTS = ("input", "operations", "train", "context", "segment")  # also: fvit, catseg, shards
BASELINE = False                    # the plain forms too
REPEATS: int | None = None          # measurements of each time; None: 10 on a GPU, 3 on a CPU


def main(argv: list[str] | None = None) -> dict[str, list["Row"]]:
    """Measures what the command line (or `argv`) asks for, and prints a table -> rows by part."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__) as ranks, tempfile.TemporaryDirectory() as folder:
        if ranks.world_size > 1:
            raise UserError(f"torchrun started {ranks.world_size} processes, which would disturb "
                            "each other; start one, by python.")
        return run(cfg, ranks.device, Path(folder))


def run(cfg: SimpleNamespace, device: torch.device, folder: Path) -> dict[str, list["Row"]]:
    """Every part, each printed as soon as it is measured."""
    check(cfg)
    for name, size in (SMALL if device.type == "cpu" else LARGE).items():
        setattr(cfg, name, size if getattr(cfg, name) is None else getattr(cfg, name))
    bench = Bench(cfg, device, TrainingImages(cfg.IMAGES or make_photos(folder, 16)))
    print(describe(bench))
    rows = {}
    for part in cfg.PARTS:
        title, measure = MEASURES[part]
        rows[part] = list(measure(bench))
        is_compared = any(row.ratio is not None for row in rows[part])
        heads = ("this code", "plain", "ratio") if is_compared else ("this code",)
        title = title.format(**vars(cfg) | {"PRECISION": bench.precision})
        print(f"\n{title:{WIDTH}}" + "".join(f"{head:>12}" for head in heads))
        print("\n".join(map(str, rows[part])), flush=True)
    return rows


# Sizes where none are given: those of train.py and eval_seg.py on a GPU, and such that a CPU needs
# some minutes.
LARGE = {"IMAGE_SIZE": train.IMAGE_SIZE, "MICRO_BATCH": train.MICRO_BATCH,
         "SEGMENT_BATCH": eval_seg.BATCH_SIZE, "REPEATS": 10,
         "FVIT_SIZE": fvit_train.IMAGE_SIZE, "FVIT_BATCH": fvit_train.MICRO_BATCH,
         "CATSEG_SIZE": 384, "CATSEG_CLASSES": 171}
SMALL = {"IMAGE_SIZE": 448, "MICRO_BATCH": 1, "SEGMENT_BATCH": 2, "REPEATS": 3, "FVIT_SIZE": 320,
         "FVIT_BATCH": 1, "CATSEG_SIZE": 192, "CATSEG_CLASSES": 32}
WIDTH = 56      # of the table's first column


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting out of its range, before anything is loaded."""
    settings.check_min(cfg, REPEATS=1, PROMPTS=1, CROPS=1, MICRO_BATCH=1, SEGMENT_BATCH=1,
                         FVIT_SIZE=1, FVIT_BATCH=1, CATSEG_SIZE=1, CATSEG_CLASSES=1)
    unknown = [part for part in cfg.PARTS if part not in MEASURES]
    if unknown:
        raise UserError(f"There is no part {unknown[0]!r} to measure; choose among "
                        f"{', '.join(MEASURES)}.")
    if min(cfg.WORKER_COUNTS) < 1:
        raise UserError(f"WORKER_COUNTS has {min(cfg.WORKER_COUNTS)}; it must be numbers of "
                        "processes, at least 1.")


class Row(NamedTuple):
    """A line of the table."""
    name: str
    values: dict[str, float]        # of this code, of the plain version
    more_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        """How much better this code is than the plain version."""
        if len(self.values) < 2:
            return None
        ours, others = self.values.values()
        return ours / others if self.more_is_better else others / ours

    def __str__(self) -> str:
        numbers = [*self.values.values(), *([] if self.ratio is None else [self.ratio])]
        shown = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in numbers)
        return f"  {self.name:{WIDTH - 2}}" + "".join(f"{number:>12}" for number in shown)


class Bench:
    """What is measured: settings as the scripts take them, random models, images, their grids."""

    def __init__(self, cfg: SimpleNamespace, device: torch.device, dataset: TrainingImages):
        own = vars(cfg) | {"PRETRAINED": None, "VFM_PRETRAINED": False}
        self.training = SimpleNamespace(**vars(settings.parse([], train)) | own)
        of_evaluation = SimpleNamespace(**vars(settings.parse([], eval_seg)) | own)
        self.evaluation = eval_seg.protocol(of_evaluation, SegmentationBenchmark.logit_scale, None)
        train.check(self.training)
        eval_seg.check_windows(self.evaluation)
        self.cfg, self.device, self.dataset = cfg, device, dataset
        self.precision = find_precision(cfg.PRECISION, device)
        self.clip, self.teacher, self.vfm = train.build(self.training, device)
        self.student = self.clip.visual
        self.models = self.student, self.teacher, self.vfm
        self.evaluation = eval_seg.fit_windows(self.evaluation, self.clip)
        self.grids = self.find_grids()

    def find_grids(self) -> list[Grid]:
        """Grids of the first epoch that have the wanted number of cells, one for each image."""
        grids = (grid for index in range(10_000)
                 for grid in train.sample_grids(self.training, 0, [index]))
        chosen = list(islice((grid for grid in grids if len(grid.cells) == self.cfg.CROPS),
                             self.cfg.MICRO_BATCH))
        if not chosen:
            raise UserError(f"CROPS is {self.cfg.CROPS}, but no grid of {self.training.GRID[0]} to "
                            f"{self.training.GRID[1]} rows and columns has as many cells; take a "
                            "product of two such numbers, such as 12.")
        return list(islice(cycle(chosen), self.cfg.MICRO_BATCH))

    def files(self) -> list[str]:
        """An image file for each image of a step."""
        return [self.dataset.paths[place % len(self.dataset)]
                for place in range(self.cfg.MICRO_BATCH)]

    def versions(self, ours: object, others: Callable[[], object]) -> dict[str, object]:
        """What is compared; the plain version's is made only with BASELINE."""
        return {"this code": ours} | ({"plain": others()} if self.cfg.BASELINE else {})

    def around(self, version: str) -> AbstractContextManager:
        """The context in which a version runs."""
        return reference.whole_attention(*self.models) if version == "plain" else nullcontext()

    def seconds(self, works: dict[str, Callable[[], object]]) -> dict[str, float]:
        """The median time of each version's work, in turns."""
        times = {version: [] for version in works}
        for _ in range(self.cfg.REPEATS + 1):
            for version, work in works.items():
                with self.around(version):
                    wait(self.device)
                    start = time.perf_counter()
                    work()
                    wait(self.device)
                    times[version].append(time.perf_counter() - start)
        return {version: statistics.median(after_warm_up)
                for version, (_, *after_warm_up) in times.items()}

    def peaks(self, works: dict[str, Callable[[], object]]) -> dict[str, float]:
        """The most memory that the tensors made by each version's work take at once, in MB."""
        peaks = {}
        for version, work in works.items():
            with self.around(version):
                peaks[version] = peak_bytes(work, self.device) / 1e6
        return peaks


def wait(device: torch.device) -> None:
    """Waits until the device has finished all work that was sent to it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that the tensors made by `work` take at once; earlier ones do not count."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with TensorMemory() as memory:
        work()
    return memory.peak


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, until they are freed.

    PyTorch has no such count for a CPU.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        # Inputs that no operation here has made are older, and count nothing.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage(), 0)
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def note(self, storage: torch.UntypedStorage, size: int) -> None:
        """Adds a storage that is not known yet, until it is freed."""
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += size
            weakref.finalize(storage, self.forget, storage._cdata, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def describe(bench: Bench) -> str:
    """What is measured, and on what."""
    cfg, device = bench.cfg, bench.device
    place = f"a CPU with {torch.get_num_threads()} threads"
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else place
    extras = [name.lower() for name in ("COMPILE", "CHECKPOINTING") if getattr(cfg, name)]
    lines = [f"{cfg.MODEL}, context {cfg.CONTEXT}, and {cfg.VFM_MODEL}, random weights",
             f"{', '.join([bench.precision, *extras])} on {place}, torch {torch.__version__}"]
    if device.type == "cpu" and (cfg.IMAGE_SIZE, cfg.MICRO_BATCH) == (SMALL["IMAGE_SIZE"],
                                                                      SMALL["MICRO_BATCH"]):
        lines.append("Sizes are small, for a CPU: train.py's are larger.")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- the input

def make_photos(folder: Path, count: int) -> Path:
    """Writes JPEG files of 640x480 with the spectrum of photographs -> the folder.

    Each has about 170 KB, as COCO's have.
    """
    across, down = np.fft.rfftfreq(640)[None], np.fft.fftfreq(480)[:, None]
    frequency = np.hypot(down, across).clip(1 / 640)
    for index in range(count):
        rng = np.random.default_rng(index)
        noise = np.fft.rfft2(rng.standard_normal((4, 480, 640)))
        layers = np.fft.irfft2(noise / frequency ** np.array([1, 1.5, 1.5, 1.5])[:, None, None])
        grey, *colours = (layer / layer.std() for layer in layers)
        image = 128 + 45 * grey[..., None] + 20 * np.stack(colours, axis=-1)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{index:03}.jpg",
                                                                  quality=90)
    return folder


def measure_input(bench: Bench) -> Iterator[Row]:
    """Reading images: CPU time and bytes of each, and images a second by the number of workers."""
    paths = bench.dataset.paths[:32]
    grids = [bench.grids[place % len(bench.grids)] for place in range(len(paths))]
    data = bench.versions(Subset(bench.dataset, range(len(paths))),
                          lambda: reference.Samples(paths, grids, bench.training, bench.teacher,
                                                    bench.vfm))
    yield Row("CPU time, ms", {version: 1e3 * cpu_seconds(each) for version, each in data.items()})
    yield Row("to the device, MB",
              {version: sent_bytes(each) / 1e6 for version, each in data.items()})
    for count in sorted({num_workers(wanted) for wanted in bench.cfg.WORKER_COUNTS}):
        speeds = {version: statistics.median(images_per_second(each, count)
                                             for _ in range(bench.cfg.REPEATS))
                  for version, each in data.items()}
        yield Row(f"images/s with {count} worker{'s' if count > 1 else ''}", speeds,
                  more_is_better=True)


def cpu_seconds(dataset: Dataset) -> float:
    """The median CPU time of an item in this process, with one thread, as a worker has it."""
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for index in (0, *range(len(dataset))):     # the first one twice, as a warm-up
        start = time.process_time()
        dataset[index]
        times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return statistics.median(times[1:])


def sent_bytes(dataset: Dataset) -> float:
    """The median bytes of an item's tensors."""
    return statistics.median(sum(part.nbytes for part in dataset[index] if isinstance(part, Tensor))
                             for index in range(len(dataset)))


def images_per_second(dataset: Dataset, count: int) -> float:
    """What `count` workers deliver, without the images that are ready when the first one comes."""
    ready, images = 3 * count, 64 + 16 * count
    repeated = Subset(dataset, [index % len(dataset) for index in range(ready + images)])
    delivered = iter(DataLoader(repeated, batch_size=None, num_workers=count))
    for _ in islice(delivered, ready):
        pass
    start = time.perf_counter()
    for _ in delivered:
        pass
    return images / (time.perf_counter() - start)


# ------------------------------------------------------------------------------------------ shards

SHARDS, IN_SHARD = 4, 256       # that are written for the measurement, of the photographs in turn


def measure_shards(bench: Bench) -> Iterator[Row]:
    """The same images from tar shards and from a folder: CPU, images a second, the disk."""
    with tempfile.TemporaryDirectory() as folder:
        sources = write_shards(bench.dataset.paths, Path(folder))
        for place, data in sources.items():
            some = Subset(data, range(min(64, len(data))))
            yield Row(f"CPU time from {place}, ms", {"this code": 1e3 * cpu_seconds(some)})
        for count in sorted({num_workers(wanted) for wanted in bench.cfg.WORKER_COUNTS}):
            speeds = {place: [] for place in sources}
            for _, (place, data) in product(range(bench.cfg.REPEATS), sources.items()):
                speeds[place].append(images_per_second(data, count))
            for place, found in speeds.items():
                yield Row(f"images/s from {place} with {count} worker{'s' if count > 1 else ''}",
                          {"this code": statistics.median(found)}, more_is_better=True)
        shards = sources["shards"].paths
        order = [index for step in shards_order(shards) for index in step]
        read, waits = read_from_disk(shards, order)
        yield Row("bytes from the disk for each byte used", {"this code": read})
        yield Row("waits for the disk for each image", {"this code": waits})


def write_shards(photos: Sequence[str], folder: Path) -> dict[str, TrainingData]:
    """The photographs in turn, in shards with captions and in a folder -> what reads them."""
    for number, index in product(range(SHARDS), range(IN_SHARD)):
        name, photo = f"{number:02}{index:06}", photos[index % len(photos)]
        (folder / "folder").mkdir(exist_ok=True)
        shutil.copy(photo, folder / "folder" / f"{name}{Path(photo).suffix}")
        (folder / "caption").write_text("a photograph, made up")
        with tarfile.open(folder / f"{number:02}.tar", "a") as tar:
            tar.add(photo, f"{name}{Path(photo).suffix}")
            tar.add(folder / "caption", f"{name}.txt")
    return {"shards": TrainingShards(f"{folder}/*.tar"),
            "a folder": TrainingImages(folder / "folder")}


def shards_order(shards: Shards) -> WindowOrder:
    return WindowOrder(shards.counts, batch_size=16, epoch=0, seed=0)


def read_from_disk(shards: Shards, order: Sequence[int]) -> tuple[float, float]:
    """Reads images that no memory holds -> bytes that came from the disk for each byte of an image,
    and the share of images that were not in memory when they were asked for.

    A millisecond passes between images, as when they are decoded. A file system in memory, such as
    some machines' /tmp, gives 0.
    """
    def from_disk() -> int:
        return int(re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[1])

    os.sync()
    for path in shards.paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin, used, waits = from_disk(), 0, 0
    for index in order:
        number, place = shards.place(index)
        shard = shards.open(number)
        block, headers, size, _ = shard.entries[place].item()
        try:
            os.preadv(shard.file.handle, [bytearray(size)], (block + headers) * 512, os.RWF_NOWAIT)
        except BlockingIOError:
            waits += 1
        used += len(shards.read(index))
        time.sleep(1e-3)
    return (from_disk() - begin) / used, waits / len(order)


# -------------------------------------------------------------------------------- the training step

class Step(NamedTuple):
    """The parts of a training step, each to be called alone, and all of it."""
    crops: Callable[[], object]
    tokens: Callable[[], object]
    forward: Callable[[], object]
    gradients: Callable[[], object]     # the three above, the losses and backward
    update: Callable[[], object]
    whole: Callable[[], object]


def measure_training(bench: Bench) -> Iterator[Row]:
    """A step's parts, its operations as a share of what the device can do, and its memory."""
    operations, images = sum(count_flops(bench).values()), bench.cfg.MICRO_BATCH
    if bench.cfg.COMPILE:
        train.compile_blocks(*bench.models)
    optimizer = train.build_optimizer(bench.training, bench.student)
    steps = bench.versions(own_step(bench, optimizer), lambda: plain_step(bench, optimizer))
    times = {part: bench.seconds({version: getattr(step, part) for version, step in steps.items()})
             for part in Step._fields}
    forwards = ("crops", "tokens", "forward")
    times["backward"] = {
        version: times["gradients"][version] - sum(times[part][version] for part in forwards)
        for version in steps}
    speeds = {version: images / seconds for version, seconds in times["whole"].items()}
    yield Row("images/s", speeds, more_is_better=True)
    for part, name in {"crops": "crops, by the teacher", "tokens": "VFM",
                       "forward": "student forward", "backward": "losses and backward",
                       "update": "optimiser"}.items():
        yield Row(f"{name}, ms",
                  {version: 1e3 * seconds for version, seconds in times[part].items()})
    limit = matmul_rate(bench)
    shares = {version: 100 * speed * operations / limit for version, speed in speeds.items()}
    yield Row(f"a large matrix product in {bench.precision}, TFLOP/s", {"this code": limit / 1e12})
    yield Row("the step's share of that rate, %", shares, more_is_better=True)
    held = sum(p.nbytes * (3 if p.requires_grad else 1)
               for model in bench.models for p in model.parameters()) / 1e6

    def gradients(step: Step) -> None:
        step.gradients()
        optimizer.zero_grad(set_to_none=True)       # each version begins without gradients

    optimizer.zero_grad(set_to_none=True)
    peaks = bench.peaks({version: partial(gradients, step) for version, step in steps.items()})
    yield Row("weights and moments, MB", {"this code": held})
    yield Row("peak memory with these, MB",
              {version: held + peak for version, peak in peaks.items()})


def measure_operations(bench: Bench) -> Iterator[Row]:
    """What the towers must compute for an image, which is the same on every machine."""
    counts = count_flops(bench)
    for name, count in (counts | {"together": sum(counts.values())}).items():
        yield Row(f"{name}, GFLOP", {"this code": count / 1e9})


def make_step(bench: Bench, optimizer: torch.optim.Optimizer, forwards: dict[str, Callable],
              distill: Callable[[], dict[str, Tensor]]) -> Step:
    """A step of either version: its forward passes, and all of it up to the losses."""
    amp = partial(autocast, bench.cfg.PRECISION, bench.device)
    # A scaler that leaves no step out
    scaler = torch.amp.GradScaler(bench.device.type, init_scale=1.0)

    def within(work: Callable) -> object:
        with amp():
            return work()

    def gradients() -> None:
        optimizer.zero_grad(set_to_none=True)
        # Backward costs the same whatever the weights of the losses are.
        scaler.scale(sum(within(distill).values())).backward()

    def update() -> None:
        scaler.step(optimizer)
        scaler.update()

    def whole() -> None:
        gradients()
        update()

    parts = {name: partial(within, work) for name, work in forwards.items()}
    return Step(**parts, gradients=gradients, update=update, whole=whole)


def own_step(bench: Bench, optimizer: torch.optim.Optimizer) -> Step:
    """A step of train.py, with the images made for each model."""
    cfg, grids, (student, teacher, vfm) = bench.training, bench.grids, bench.models
    images = [read_image(path, upright=True).to(bench.device) for path in bench.files()]
    boxes = [grid_boxes(image, grid, cfg.IMAGE_SIZE) for image, grid in zip(images, grids)]

    def images_for(model: VisionTower | VFM, size: int) -> Tensor:
        return torch.stack([student_image(image, size, model.mean, model.std) for image in images])

    @torch.inference_mode()
    def crops() -> Tensor:
        return teacher.encode_image(torch.cat([
            grid_crops(image, grid, cfg.CROP_SIZE, teacher.mean, teacher.std, cfg.KEEP_ASPECT)
            for image, grid in zip(images, grids)]))

    @torch.inference_mode()
    def tokens() -> Tensor:
        return vfm(images_for(vfm, train.vfm_size(cfg.IMAGE_SIZE, teacher, vfm)))

    def forward() -> object:
        return student(images_for(student, cfg.IMAGE_SIZE), boxes)

    return make_step(bench, optimizer, {"crops": crops, "tokens": tokens, "forward": forward},
                     partial(train.distill, cfg, *bench.models, images, grids))


def plain_step(bench: Bench, optimizer: torch.optim.Optimizer) -> Step:
    """A step of reference.py, whose workers have made the images and crops."""
    student, teacher, vfm = bench.models
    samples = reference.Samples(bench.files(), bench.grids, bench.training, teacher, vfm)
    samples = [tuple(part.to(bench.device) for part in samples[place])
               for place in range(len(samples))]
    inputs, vfm_inputs, crops, boxes = zip(*samples)
    forwards = {"crops": torch.no_grad()(lambda: teacher.encode_image(torch.cat(crops))),
                "tokens": lambda: vfm(torch.stack(vfm_inputs)),
                "forward": lambda: student(torch.stack(inputs), list(boxes))}
    return make_step(bench, optimizer, forwards,
                     partial(reference.distill, *bench.models, samples))


def count_flops(bench: Bench) -> dict[str, float]:
    """Operations of the towers for one image, without checkpointing.

    A multiplication with its addition counts as two.
    """
    student, teacher, vfm = (copy.deepcopy(model).to("meta") for model in bench.models)
    size, crop = bench.cfg.IMAGE_SIZE, bench.cfg.CROP_SIZE
    of_vfm = train.vfm_size(size, student, vfm)
    counts, blank = {}, partial(torch.empty, device="meta")
    student.checkpointing = False
    # As whole matrices, because the count of a fused backward has those that it computes again.
    with reference.whole_attention(student, teacher, vfm):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            teacher.encode_image(blank(bench.cfg.CROPS, 3, crop, crop))
        counts["crops"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            vfm(blank(1, 3, of_vfm, of_vfm))
        counts["VFM"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            content, context = student.encode_dense(blank(1, 3, size, size))
        counts["student forward"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            (content.sum() + context.sum()).backward()
        counts["student backward"] = counter.get_total_flops()
    return counts


def matmul_rate(bench: Bench) -> float:
    """Operations a second of a large product of random matrices in the precision of the step."""
    dtype = DTYPES[bench.precision] or torch.float32
    # CPUs may be slow with halves
    side = 8192 if bench.device.type == "cuda" else 2048 if dtype == torch.float32 else 512
    a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    return 2 * side**3 / bench.seconds({"product": lambda: a @ b})["product"]


def measure_context(bench: Bench) -> Iterator[Row]:
    """Time and peak memory of the context loss and its gradient, float32 in every precision."""
    width, wide = bench.student.trunk.embed_dim, bench.vfm.trunk.num_features
    losses = bench.versions(context_loss, lambda: reference.context_loss)

    def work(loss: Callable, context: Tensor, of_vfm: Tensor) -> None:
        torch.autograd.grad(loss(context, of_vfm), context)

    for tokens in (1024, 2304, 4096):
        context = torch.randn(1, tokens, width, device=bench.device, requires_grad=True)
        of_vfm = torch.randn(1, tokens, wide, device=bench.device)
        works = {version: partial(work, loss, context, of_vfm) for version, loss in losses.items()}
        yield Row(f"{tokens} tokens, ms",
                  {version: 1e3 * seconds for version, seconds in bench.seconds(works).items()})
        yield Row(f"{tokens} tokens, peak memory, MB", bench.peaks(works))


# ------------------------------------------------------------------------------------- segmentation

def measure_segmentation(bench: Bench) -> Iterator[Row]:
    """Images a second from the decoded image to each pixel's class."""
    cfg, clip = bench.evaluation, bench.clip
    files = [bench.dataset.paths[place % len(bench.dataset)]
             for place in range(bench.cfg.SEGMENT_BATCH)]
    images = [read_image(path).to(bench.device) for path in files]
    width = clip.visual.trunk.num_classes
    text = F.normalize(torch.randn(bench.cfg.PROMPTS, width, device=bench.device), dim=-1)
    classes = make_classes([f"class {index}" for index in range(bench.cfg.PROMPTS)])

    def plainly() -> list[Tensor]:
        return [reference.predict(cfg, clip, classes, text, image) for image in images]

    works = bench.versions(partial(eval_seg.predict, cfg, clip, classes, text, images),
                           lambda: plainly)
    with torch.compiler.set_stance("force_eager"):      # blocks that the training step compiled
        speeds = {version: len(images) / seconds
                  for version, seconds in bench.seconds(works).items()}
        yield Row("images/s", speeds, more_is_better=True)
        yield Row("peak memory beyond weights, MB", bench.peaks(works))


# ---------------------------------------------------------------------------------------- F-ViT

def measure_fvit(bench: Bench) -> Iterator[Row]:
    """A training step of F-ViT: its speed, the frozen backbone's share of it, its memory."""
    cfg = SimpleNamespace(**vars(settings.parse([], fvit_train)) | {
        "IMAGE_SIZE": bench.cfg.FVIT_SIZE, "CHANNELS": bench.cfg.CHANNELS,
        "REGIONS": bench.cfg.REGIONS})
    data = [labelled(bench, number) for number in range(bench.cfg.FVIT_BATCH)]
    views = partial(fvit_train.views, cfg, data, 0, list(range(len(data))))
    fvit = frozen_detector(bench, cfg)
    optimizer = train.build_optimizer(cfg, fvit)
    works = fvit_works(bench, fvit, optimizer, views)
    times = {name: bench.seconds({"this code": work})["this code"] for name, work in works.items()}
    yield Row("images/s", {"this code": len(data) / times["step"]}, more_is_better=True)
    parts = {"resized, cropped, with their boxes": times["views"],
             "frozen backbone": times["backbone"],
             "pyramid, heads, losses": times["losses"] - times["backbone"],
             "backward": times["gradients"] - times["losses"],
             "optimiser": times["step"] - times["gradients"] - times["views"]}
    for name, seconds in parts.items():
        yield Row(f"{name}, ms", {"this code": 1e3 * seconds})
    yield Row("the frozen backbone's share, %",
              {"this code": 100 * times["backbone"] / times["step"]})
    held = sum(p.nbytes * (3 if p.requires_grad else 1) for p in fvit.parameters()) / 1e6
    optimizer.zero_grad(set_to_none=True)
    peak = bench.peaks({"this code": works["gradients"]})["this code"]
    yield Row("weights and moments, MB", {"this code": held})
    yield Row("peak memory with these, MB", {"this code": held + peak})


def labelled(bench: Bench, number: int) -> Objects:
    """A photograph with 7 boxes, which is COCO's mean."""
    image = read_image(bench.dataset.paths[number % len(bench.dataset)]).to(bench.device)
    H, W = image.shape[-2:]
    rng = torch.Generator().manual_seed(number)
    corners = torch.rand(7, 2, 2, generator=rng).sort(dim=1).values * torch.tensor([W, H])
    return Objects(image, corners.flatten(1).to(bench.device),
                   torch.randint(48, (7,), generator=rng).to(bench.device),
                   torch.zeros(7, 0, 0, dtype=torch.bool, device=bench.device))


def frozen_detector(bench: Bench, cfg: SimpleNamespace) -> FViT:
    """F-ViT of 48 classes and 17 novel ones on the bench's CLIP, in training mode."""
    clip = copy.deepcopy(bench.clip)        # the other parts train this one
    clip.visual.checkpointing = False
    text = F.normalize(torch.randn(66, clip.visual.trunk.num_classes), dim=-1)
    names = [f"class {number}" for number in range(65)]
    fvit = FViT(clip, names, [number < 48 for number in range(65)], fvit_train.design_of(cfg), text)
    return fvit.to(bench.device).train()


def fvit_works(bench: Bench, fvit: FViT, optimizer: torch.optim.Optimizer,
               views: Callable[[], tuple[list, list]]) -> dict[str, Callable[[], object]]:
    """The parts of F-ViT's training step, each with what it needs of those before it."""
    amp = partial(autocast, bench.cfg.PRECISION, bench.device)
    images, targets = views()
    scaler = torch.amp.GradScaler(bench.device.type, init_scale=1.0)

    def backbone() -> object:
        with amp():
            return fvit.look(images)

    def losses(given: tuple[list, list] = (images, targets)) -> Tensor:
        with amp():
            return sum(fvit(*given).values())

    def gradients(given: tuple[list, list] = (images, targets)) -> None:
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(losses(given)).backward()

    def step() -> None:
        gradients(views())
        scaler.step(optimizer)
        scaler.update()

    return {"views": views, "backbone": backbone, "losses": losses, "gradients": gradients,
            "step": step}


# -------------------------------------------------------------------------------------- CAT-Seg

def measure_catseg(bench: Bench) -> Iterator[Row]:
    """A training step of CAT-Seg with one image, and its test of one view."""
    segmenter = random_segmenter(bench)
    with torch.no_grad():
        text = segmenter.encode_classes()
    step, view = catseg_works(bench, segmenter, text)
    losses = bench.versions(segmenter, lambda: partial(reference_catseg.loss, segmenter))
    logits = bench.versions(segmenter.logits, lambda: partial(reference_catseg.logits, segmenter))
    for name, work, versions in (("training step", step, losses), ("test, a view", view, logits)):
        works = {version: partial(work, each) for version, each in versions.items()}
        yield Row(f"{name}, images/s", {version: 1 / seconds for version, seconds
                                        in bench.seconds(works).items()}, more_is_better=True)
        yield Row(f"{name}, peak memory beyond weights, MB", bench.peaks(works))


def random_segmenter(bench: Bench) -> CATSeg:
    """CAT-Seg on a copy of the bench's CLIP, which the other parts train."""
    segmenter = CATSeg(copy.deepcopy(bench.clip), Design(bench.cfg.CATSEG_SIZE))
    segmenter.set_classes([f"class {number}" for number in range(bench.cfg.CATSEG_CLASSES)])
    segmenter.freeze()
    return segmenter.to(bench.device)


def catseg_works(bench: Bench, segmenter: CATSeg, text: Tensor
                 ) -> tuple[Callable[[Callable], None], Callable[[Callable], None]]:
    """A training step with any form of the loss, and a view with any form of the logits."""
    cfg, size = SimpleNamespace(**vars(settings.parse([], catseg_train))), bench.cfg.CATSEG_SIZE
    optimizer = catseg_train.build_optimizer(cfg, segmenter)
    images = torch.randn(1, 3, size, size, device=bench.device)
    labels = torch.randint(len(text), (1, size, size), device=bench.device)
    amp = partial(autocast, bench.cfg.PRECISION, bench.device)

    def step(loss: Callable) -> None:
        segmenter.train()
        with amp():
            found = loss(images, labels)
        found.backward()
        torch.nn.utils.clip_grad_norm_(catseg_train.trained(segmenter), cfg.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def view(logits: Callable) -> None:
        segmenter.eval()
        with amp():
            logits(images, text)

    return step, view


MEASURES = {
    "input": ("Input, a photograph for {IMAGE_SIZE} px, {CROPS} crops", measure_input),
    "operations": ("Operations of an image of {IMAGE_SIZE} px, {CROPS} crops", measure_operations),
    "train": ("Training step, {MICRO_BATCH} x {IMAGE_SIZE} px, {CROPS} crops each",
              measure_training),
    "context": ("Context loss of an image and its gradient", measure_context),
    "segment": ("Segmentation of {SEGMENT_BATCH} images, {PROMPTS} prompts, {PRECISION}",
                measure_segmentation),
    "shards": ("Input from shards and from a folder, the same images", measure_shards),
    "catseg": ("CAT-Seg, an image of {CATSEG_SIZE} px, {CATSEG_CLASSES} classes, {PRECISION}",
               measure_catseg),
    "fvit": ("F-ViT's training step, {FVIT_BATCH} x {FVIT_SIZE} px, {PRECISION}", measure_fvit),
}


if __name__ == "__main__":
    main()
