"""Where the time goes on this machine, and how near its limit that is.

    python -m tools.bench                                       # the defaults of train.py
    python -m tools.bench --baseline                            # beside the plain forms
    python -m tools.bench --image_size 1024 --micro_batch 4 --compile --parts train
    python -m tools.bench --image_size 1024 --gpu_gb 24 --parts fits    # before a GPU is rented

--baseline measures the plain forms (tools/reference.py and others) by turns; a ratio above 1 is in
favour of this code. Nothing is downloaded: images are made up, weights random. A figure is the
median of REPEATS measurements after a warm-up; a GPU is waited for before a clock is read. On a CPU
sizes are small, unless they are given. A step is that of one micro batch, without clipping and log.
"""

import copy
import statistics
import sys
import tarfile
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import cycle, islice
from math import isqrt
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode

import eval_region
import eval_seg
import train
from data import Grid, constant, make_classes, num_workers, to_device
from downstream.catseg import train as catseg_train
from downstream.catseg.model import CATSeg, Design
from downstream.detection import Objects
from downstream.fvit import train as fvit_train
from downstream.fvit.model import FViT
from tools import reference
from util import UserError, distributed, settings
from util.precision import DTYPES, autocast, find_precision
from util.samples import ImageFiles, ImageShards
from util.windows import side_weights

SHARED = {"train": ["The model"], "eval_seg": ["The windows"],
          "downstream.fvit.train": ["The detector", "What it is trained with"]}

# What is measured, and how
PARTS = ("input", "operations", "train", "segment")     # also: fits, fvit, catseg, shards
BASELINE = False                    # the plain forms too
REPEATS: int | None = None          # measurements of a figure; None: 10 on a GPU, 3 on a CPU
IMAGES: str | None = None           # folder of photographs to read; None: made-up ones of 640x480
WORKER_COUNTS = (1, 2, 4, 8, 16)    # numbers of worker processes to try, up to the cores
PRETRAINED: str | None = None       # MODEL's weights; None: random ones, which are as fast
VFM_PRETRAINED = False              # False: random weights of the VFM, too
PRECISION = "auto"                  # bf16, fp16, fp32; auto: bf16 or fp16 on a GPU, fp32 on a CPU
COMPILE = False                     # torch.compile of every block in train.py's step
CHECKPOINTING = False               # compute blocks again in backward: less memory, 1/3 more time

GPU_GB: float | None = None         # memory of the GPU for `fits`; None: this one's, else 24

# Sizes
IMAGE_SIZE: int | None = None       # of the student; None: train.py's on a GPU, 448 on a CPU
CROP_SIZE = train.CROP_SIZE         # side of a crop for the teacher
CROPS = 12                          # crops of an image; the mean of the paper's grids is 12.25
MICRO_BATCH: int | None = None      # images of a forward pass; None: train.py's on a GPU, else 1
PROMPTS = 171                       # of the segmentation; COCO-Stuff has 171 classes
SEGMENT_BATCH: int | None = None    # images segmented together; None: eval_seg.py's, 2 on a CPU
FVIT_SIZE: int | None = None        # of F-ViT's images; None: its train.py's on a GPU, 320 on a CPU
FVIT_BATCH: int | None = None       # of F-ViT's forward pass; None: its train.py's on a GPU, else 1
CATSEG_SIZE: int | None = None      # of CAT-Seg's images; None: 384 on a GPU, 192 on a CPU
CATSEG_CLASSES: int | None = None   # None: COCO-Stuff's 171 on a GPU, 32 on a CPU


def main(argv: list[str] | None = None) -> dict[str, list["Row"]]:
    """Measures what the command line (or `argv`) asks for, and prints tables -> rows by part."""
    cfg, rows = settings.parse(argv, sys.modules[__name__]), {}
    with distributed.session(__file__) as ranks, tempfile.TemporaryDirectory() as folder:
        if ranks.world_size > 1:
            raise UserError(f"torchrun started {ranks.world_size} processes, which would disturb "
                            "each other; start one, by python.")
        bench = Bench(cfg, ranks, ImageFiles(cfg.IMAGES or make_photos(Path(folder), 16)))
        is_gpu = ranks.device.type == "cuda"
        place = torch.cuda.get_device_name() if is_gpu else f"{torch.get_num_threads()} CPU threads"
        print(f"{settings.show(bench.cfg)}\n{place}, torch {torch.__version__}\n{len(cfg.PARTS)} "
              f"parts; each takes {'about a minute' if is_gpu else 'one to five minutes'}, twice "
              "that with --baseline, and more with more REPEATS", flush=True)
        for part in cfg.PARTS:
            start = time.perf_counter()
            rows[part] = list(MEASURES[part](bench))
            title = MEASURES[part].__doc__.splitlines()[0]
            print(table(f"{title} ({time.perf_counter() - start:.0f} s)", rows[part]), flush=True)
    return rows


# Sizes where none are given: those of the scripts on a GPU, and such that a CPU needs some minutes.
SIZES = {"IMAGE_SIZE": (train.IMAGE_SIZE, 448), "MICRO_BATCH": (train.MICRO_BATCH, 1),
         "SEGMENT_BATCH": (eval_region.BATCH_SIZE, 2), "REPEATS": (10, 3),
         "FVIT_SIZE": (fvit_train.IMAGE_SIZE, 320), "FVIT_BATCH": (fvit_train.MICRO_BATCH, 1),
         "CATSEG_SIZE": (384, 192), "CATSEG_CLASSES": (171, 32)}


# Which parts read a setting, or a block of them; others are read by all.
READ_BY = {"WORKER_COUNTS": "input shards", "COMPILE": "train fvit catseg",
           "CHECKPOINTING": "train catseg", "MICRO_BATCH": "train", "GPU_GB": "fits",
           **dict.fromkeys(("The windows", "PROMPTS", "SEGMENT_BATCH"), "segment"),
           **dict.fromkeys(("The detector", "What it is trained with", "FVIT_SIZE", "FVIT_BATCH"),
                           "fvit"), "CATSEG_SIZE": "catseg", "CATSEG_CLASSES": "catseg"}


def settings_of(script: ModuleType, cfg: SimpleNamespace, **own: object) -> SimpleNamespace:
    """The settings of another script: its defaults, changed by the bench's."""
    return SimpleNamespace(**vars(settings.parse([], script)) | vars(cfg) | own)


class Row(NamedTuple):
    """A line of a table: a value of this code and, beside it, of what it is compared with."""
    name: str
    values: dict[str, float]

    @property
    def ratio(self) -> float | None:
        """How much better the first value is than the second: ms and MB are better if small."""
        if len(self.values) < 2:
            return None
        first, second = self.values.values()
        return second / first if self.name.endswith(("ms", "MB")) else first / second


def table(title: str, rows: list[Row]) -> str:
    """The rows of a part under its title."""
    forms = max((row.values for row in rows), key=len)
    heads = [*forms, "ratio"] if len(forms) > 1 else forms
    lines = [f"\n{title:56}" + "".join(f"{head:>12}" for head in heads)]
    for row in rows:
        numbers = [x for x in (*row.values.values(), row.ratio) if x is not None]
        shown = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in numbers)
        lines.append(f"  {row.name:54}" + "".join(f"{number:>12}" for number in shown))
    return "\n".join(lines)


# -------------------------------------------------------------------------------- the measurement

class Bench:
    """What is measured, models and images with their grids, and the one way of measuring."""

    def __init__(self, cfg: SimpleNamespace, ranks: distributed.Ranks, dataset: ImageFiles):
        settings.check_min(cfg, PROMPTS=1, CROPS=1, **dict.fromkeys(SIZES, 1))
        settings.check(cfg, PARTS=({*cfg.PARTS} <= {*MEASURES}, f"some of {', '.join(MEASURES)}"),
                       WORKER_COUNTS=(min(cfg.WORKER_COUNTS) >= 1, "from 1"),
                       GPU_GB=(cfg.GPU_GB is None or cfg.GPU_GB > 0, "more than 0"))
        settings.refuse_unread(cfg, sys.modules[__name__], cfg.PARTS, READ_BY)
        self.given, self.device, self.dataset = cfg, ranks.device, dataset
        sizes = {name: of_devices[self.device.type == "cpu"] for name, of_devices in SIZES.items()
                 if getattr(cfg, name) is None}
        precision = find_precision(cfg.PRECISION, self.device)
        self.cfg = SimpleNamespace(**vars(cfg) | sizes | {"PRECISION": precision})
        self.training = settings_of(train, self.cfg)
        train.check(self.training)
        rows = max(n for n in range(1, isqrt(cfg.CROPS) + 1) if cfg.CROPS % n == 0)
        self.grid = Grid(rows, cfg.CROPS // rows, list(range(cfg.CROPS)))
        if {*cfg.PARTS} == {"fits"}:        # it takes no memory, and has models of its own
            return
        self.clip, teacher, vfm = train.build(self.training, ranks)
        self.models = self.clip.visual, teacher, vfm
        self.protocol = eval_seg.Protocol.of(settings_of(eval_seg, self.cfg)).fit(self.clip)

    def photos(self, count: int) -> list[Tensor]:
        """So many images on the device, uint8 (3, H, W) each; few ones in turn."""
        return [self.dataset.read(number % len(self.dataset)).to(self.device)
                for number in range(count)]

    def forms(self, own: object, plain: object) -> dict[str, object]:
        """What is compared: this code's form and, with BASELINE, the plain one."""
        return {"this code": own} | ({"plain": plain} if self.cfg.BASELINE else {})

    def rows(self, forms: dict[str, object], meter: Callable[[object], dict[str, float]],
             is_steady: bool = False) -> list[Row]:
        """Medians of what `meter` says of each form, by turns after a warm-up; once if steady."""
        def turn() -> dict[str, dict[str, float]]:
            found = {}
            for form, work in forms.items():
                with reference.whole_attention(*self.models) if form == "plain" else nullcontext():
                    found[form] = meter(work)
            return found

        # After one step a GPU is not yet as fast as it will be: twice as slow, an H200 was.
        end = time.perf_counter() + 2 * (self.device.type == "cuda")
        first = turn()
        while not is_steady and time.perf_counter() < end:
            turn()
        turns = [first] if is_steady else [turn() for _ in range(self.cfg.REPEATS)]
        return [Row(name, {form: statistics.median(found[form][name] for found in turns)
                           for form in forms}) for name in first["this code"]]

    def costs(self, forms: dict[str, object], work: Callable[[object], object], images: int,
              name: str = "") -> list[Row]:
        """Speed and memory of `work` with each form, for so many images."""
        def speed(form: object) -> dict[str, float]:
            clock = Clock(self.device)
            clock.time("work")(work)(form)
            return {f"{name}images/s": 1e3 * images / clock.ms["work"]}

        def memory(form: object) -> dict[str, float]:
            peak = peak_bytes(partial(work, form), self.device)
            return {f"{name}peak memory beyond weights, MB": peak / 1e6}

        return self.rows(forms, speed) + self.rows(forms, memory, is_steady=True)


class Clock:
    """Milliseconds by name, each until the device has finished what was sent to it."""

    def __init__(self, device: torch.device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.ms: dict[str, float] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Within it, time counts under a name. It also decorates functions."""
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.ms[name] = self.ms.get(name, 0.0) + 1e3 * (time.perf_counter() - start)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that the tensors made by `work` take at once; earlier ones do not count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with TensorMemory() as memory:
        work()
    return memory.peak


class TensorMemory(TorchDispatchMode):
    """The most bytes of living tensors that operations made; PyTorch does not count on a CPU."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0       # of storages that live

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        # Inputs that no operation here has made are older, and count nothing.
        for values, counts in (((args, kwargs), False), (out, True)):
            for tensor in filter(torch.is_tensor, tree_leaves(values)):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes() if counts else 0
                    weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


# --------------------------------------------------------------------------------- reading images

def make_photos(folder: Path, count: int) -> Path:
    """Writes JPEG files of 640x480 and about 170 KB, such as COCO's -> the folder."""
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (240, 320, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(folder / f"{number:03}.jpg", quality=82)
    return folder


def measure_input(bench: Bench) -> Iterator[Row]:
    """Reading images"""
    samples = reference.Samples(bench.dataset.paths, [bench.grid] * len(bench.dataset),
                                bench.training, *bench.models[1:])
    return reading_rows(bench, bench.forms(bench.dataset, samples))


def reading_rows(bench: Bench, forms: dict[str, Dataset]) -> Iterator[Row]:
    """CPU time and bytes of an image, and images a second by the number of workers."""
    yield from bench.rows(forms, reading)
    for count in sorted({num_workers(wanted) for wanted in bench.cfg.WORKER_COUNTS}):
        yield from bench.rows(forms, partial(delivery, count))


def reading(dataset: Dataset) -> dict[str, float]:
    """CPU time of an item in this process, with one thread, as a worker has it; and its bytes."""
    threads, start = torch.get_num_threads(), time.process_time()
    torch.set_num_threads(1)
    items = [dataset[index] for index in range(min(32, len(dataset)))]
    seconds = time.process_time() - start
    torch.set_num_threads(threads)
    sent = sum(part.nbytes for item in items for part in item if torch.is_tensor(part))
    return {"CPU time, ms": 1e3 * seconds / len(items),
            "to the device, MB": sent / 1e6 / len(items)}


def delivery(count: int, dataset: Dataset) -> dict[str, float]:
    """What `count` workers deliver, without the images that are ready when the first one comes."""
    ready, images = 3 * count, 64 + 16 * count
    repeated = Subset(dataset, [index % len(dataset) for index in range(ready + images)])
    delivered = iter(DataLoader(repeated, batch_size=None, num_workers=count))
    list(islice(delivered, ready))
    start = time.perf_counter()
    for _ in delivered:
        pass
    return {f"images/s, workers: {count}": images / (time.perf_counter() - start)}


def measure_shards(bench: Bench) -> Iterator[Row]:
    """Reading images from a shard and from files"""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(f"{folder}/0.tar", "w") as tar:
            for number, photo in zip(range(256), cycle(bench.dataset.paths)):
                tar.add(photo, f"{number:08}{Path(photo).suffix}")
        forms = {"this code": ImageShards(f"{folder}/0.tar"), "files": bench.dataset}
        yield from reading_rows(bench, forms)


# -------------------------------------------------------------------------------- training steps

def training_rows(bench: Bench, losses: dict[str, Callable], optimizer: torch.optim.Optimizer,
                  parts: dict[str, tuple[object, str]], modules: Sequence[nn.Module], images: int
                  ) -> Iterator[Row]:
    """Speed of a training step, where its time goes, and its memory.

    losses: each form's, which return scalars by name. parts: objects and those of their methods
    that have a row of their own. modules: those in memory. images: of the step.
    """
    scaler = torch.amp.GradScaler(bench.device.type, init_scale=1.0)    # leaves no step out

    def step(form: Callable, part: Callable = nullcontext) -> None:
        with part("forward and losses, ms"), autocast(bench.cfg.PRECISION, bench.device):
            loss = sum(form().values())
        with part("backward, ms"):      # costs the same whatever the weights of the losses are
            scaler.scale(loss).backward()
        with part("optimiser, ms"):
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

    def times(form: Callable) -> dict[str, float]:
        clock = Clock(bench.device)
        with ExitStack() as stack:
            for name, (owner, method) in parts.items():
                timed = clock.time(f"{name}, ms")(getattr(owner, method))
                stack.enter_context(patch.object(owner, method, timed))
            step(form, clock.time)
        return clock.ms

    speed, peak = bench.costs(losses, step, images)
    held = held_bytes(modules) / 1e6
    yield from (speed, *bench.rows(losses, times), peak)
    yield Row("weights and moments, MB", {"this code": held})
    yield Row("peak memory with these, MB", {form: held + x for form, x in peak.values.items()})


def held_bytes(modules: Sequence[nn.Module]) -> int:
    """Of weights and of AdamW's two moments of those that are trained."""
    return sum(weight.nbytes * (3 if weight.requires_grad else 1)
               for module in modules for weight in module.parameters())


def measure_training(bench: Bench) -> Iterator[Row]:
    """Training step of train.py"""
    cfg, (student, teacher, vfm), samples = bench.training, bench.models, []
    grids, photos = [bench.grid] * cfg.MICRO_BATCH, bench.photos(cfg.MICRO_BATCH)
    if cfg.BASELINE:
        paths = list(islice(cycle(bench.dataset.paths), cfg.MICRO_BATCH))
        samples = [to_device(list(sample), bench.device)
                   for sample in reference.Samples(paths, grids, cfg, teacher, vfm)]
    losses = bench.forms(partial(train.distill, cfg, *bench.models, photos, grids),
                         partial(reference.distill, *bench.models, samples))
    parts = {"crops, by the teacher": (teacher, "encode_image"), "VFM": (vfm, "forward"),
             "student forward": (student, "forward")}
    speeds, *others = training_rows(bench, losses, train.build_optimizer(cfg, student), parts,
                                    bench.models, cfg.MICRO_BATCH)
    yield from (speeds, *others)
    side = 8192 if bench.device.type == "cuda" else 2048
    square = torch.randn(side, side, device=bench.device, dtype=DTYPES[cfg.PRECISION])
    products, _ = bench.costs({"this code": square}, lambda matrix: matrix @ matrix, images=1)
    rate = 2e-12 * side**3 * products.values["this code"]
    yield Row(f"a large matrix product in {cfg.PRECISION}, TFLOP/s", {"this code": rate})
    *_, operations = (row.values["this code"] for row in measure_operations(bench))
    yield Row("the step's share of that rate, %", {
        form: speed * operations / 10 / rate for form, speed in speeds.values.items()})


def measure_operations(bench: Bench) -> Iterator[Row]:
    """Operations of an image (a multiply-add is two)"""
    student, teacher, vfm = (copy.deepcopy(model).to("meta") for model in bench.models)
    size, crop = bench.cfg.IMAGE_SIZE, bench.cfg.CROP_SIZE
    of_vfm, blank = train.vfm_size(size, student, vfm), partial(torch.empty, device="meta")
    # As whole matrices, because the count of a fused backward has those that it computes again.
    with reference.whole_attention(student, teacher, vfm):
        with torch.no_grad():
            crops, _ = counted(teacher.encode_image, blank(bench.cfg.CROPS, 3, crop, crop))
        tokens, _ = counted(vfm, blank(1, 3, of_vfm, of_vfm))
        forward, (content, context) = counted(student.encode_dense, blank(1, 3, size, size))
        backward, _ = counted((content.sum() + context.sum()).backward)
    counts = {"crops": crops, "VFM": tokens, "student forward": forward,
              "student backward": backward, "together": crops + tokens + forward + backward}
    for name, count in counts.items():
        yield Row(f"{name}, GFLOP", {"this code": count / 1e9})


def counted(work: Callable, *inputs: Tensor) -> tuple[int, object]:
    """The operations of `work`, and what it returns."""
    with FlopCounterMode(display=False) as counter:
        found = work(*inputs)
    return counter.get_total_flops(), found


# ------------------------------------------------------------------------ memory, without a GPU

MAX_SHARE = 0.9     # of a GPU: CUDA's context, libraries' workspaces and fragments take the rest
MAX_DOUBLINGS = 11  # of the micro batches that are tried


def measure_fits(bench: Bench) -> Iterator[Row]:
    """Memory of a GPU for a training step, all included"""
    given, gpu_gb = bench.given, bench.given.GPU_GB or 24
    if given.GPU_GB is None and bench.device.type == "cuda":
        gpu_gb = torch.cuda.get_device_properties(bench.device).total_memory / 1e9
    limit = MAX_SHARE * gpu_gb * 1e9
    cfg = settings_of(train, given, PRETRAINED=None, VFM_PRETRAINED=False, COMPILE=False,
                      IMAGE_SIZE=given.IMAGE_SIZE or train.IMAGE_SIZE,
                      PRECISION="bf16" if given.PRECISION == "auto" else given.PRECISION)
    yield Row(f"of a GPU of {gpu_gb:.4g} GB, a tenth left, MB", {"this code": limit / 1e6})
    for cfg.CHECKPOINTING in (False, True):
        form, most, used = "--checkpointing: " * cfg.CHECKPOINTING, 0, 0    # images that fit
        for count in (2**power for power in range(MAX_DOUBLINGS)):
            needed = step_bytes(cfg, [bench.grid] * count)
            fits = needed <= limit
            yield Row(f"{form}micro_batch {count}{'' if fits else ', does not fit'}, MB",
                      {"this code": needed / 1e6})
            if not fits:    # memory is convex in the number of images: between two, below a line
                most += int((limit - used) / (needed - used) * (count - most)) if most else 0
                break
            most, used = count, needed
        yield Row(f"{form}largest micro_batch", {"this code": most})


def step_bytes(cfg: SimpleNamespace, grids: list[Grid]) -> int:
    """The most bytes that a GPU holds in a step of train.py, weights and moments included, with
    images of these grids."""
    device = torch.device("cpu")        # CUDA's backward asks for a GPU
    with torch.device("meta"), patch.object(nn.Module, "to", lambda module, *_, **__: module):
        clip, *teachers = train.build(cfg, distributed.Ranks(0, 1, device))
    with without_numbers(), patch.object(F, "layer_norm", partial(fp32_norm, F.layer_norm)):
        models = [hollow(model, device) for model in (clip.visual, *teachers)]
        photos = [torch.empty(3, 480, 640, dtype=torch.uint8) for _ in grids]
        with TensorMemory() as memory:
            with autocast(cfg.PRECISION, device):
                loss = sum(train.distill(cfg, *models, photos, grids).values())
            loss.backward()
        return memory.peak + held_bytes(models)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Within it, tensors have shapes alone: nothing is allocated or computed."""
    with FakeTensorMode(), ExitStack() as stack:
        for cache in (constant, side_weights):      # which keep tensors for later
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        yield


def hollow(module: nn.Module, device: torch.device) -> nn.Module:
    """The module itself, with new weights and buffers, empty ones on a device."""
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, value in own.items():
                if value is not None:
                    empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                    is_weight = isinstance(value, nn.Parameter)
                    own[name] = nn.Parameter(empty, value.requires_grad) if is_weight else empty
    return module


def fp32_norm(own: Callable, x: Tensor, shape: Sequence[int], *weights: object) -> Tensor:
    """F.layer_norm (`own`) in fp32, as CUDA's autocast has it, not the CPU's."""
    return own(x.float(), shape, *weights)


def measure_fvit(bench: Bench) -> Iterator[Row]:
    """Training step of F-ViT"""
    cfg = settings_of(fvit_train, bench.cfg, IMAGE_SIZE=bench.cfg.FVIT_SIZE)
    clip = copy.deepcopy(bench.clip)        # the other parts train this one
    clip.visual.checkpointing = False
    text = F.normalize(torch.randn(66, clip.visual.embed_dim), dim=-1)
    fvit = FViT(clip, [f"class {number}" for number in range(65)], [True] * 48 + [False] * 17,
                fvit_train.design_of(cfg), text).to(bench.device).train()
    data = []       # 7 objects in every image, which is COCO's mean
    for image in bench.photos(bench.cfg.FVIT_BATCH):
        corners = torch.rand(7, 2, 2).sort(dim=1).values
        boxes = (corners * torch.tensor([image.shape[2], image.shape[1]])).flatten(1)
        masks = torch.ones(7, *(image.shape[1:] if cfg.MASKS else (0, 0)), dtype=torch.bool)
        labels = torch.randint(48, (7,))
        objects = Objects(image, boxes, labels, masks, torch.ones(len(boxes)))
        data.append(to_device(objects, bench.device))
    views = partial(fvit_train.views, cfg, data, 0, list(range(len(data))))
    losses = {"this code": lambda: fvit(*views())}
    optimizer = fvit_train.build_optimizer(cfg, fvit)
    parts = {"frozen backbone": (fvit, "look")}
    return training_rows(bench, losses, optimizer, parts, [fvit], len(data))


def measure_catseg(bench: Bench) -> Iterator[Row]:
    """Training step and test view of CAT-Seg"""
    cfg, size = settings_of(catseg_train, bench.cfg), bench.cfg.CATSEG_SIZE
    segmenter = CATSeg(copy.deepcopy(bench.clip), Design(size))     # other parts train this CLIP
    segmenter.set_classes([f"class {number}" for number in range(bench.cfg.CATSEG_CLASSES)])
    segmenter.freeze()
    segmenter.to(bench.device).train()
    images = torch.randn(1, 3, size, size, device=bench.device)
    labels = torch.randint(bench.cfg.CATSEG_CLASSES, (1, size, size), device=bench.device)
    losses = {"this code": lambda: {"loss": segmenter(images, labels)}}
    yield from training_rows(bench, losses, catseg_train.build_optimizer(cfg, segmenter), {},
                             [segmenter], 1)
    segmenter.eval()
    with torch.no_grad(), autocast(bench.cfg.PRECISION, bench.device):
        text = segmenter.encode_classes()
        forms = {"this code": partial(segmenter.logits, images, text)}
        yield from bench.costs(forms, lambda view: view(), 1, "test, a view: ")


def measure_segmentation(bench: Bench) -> Iterator[Row]:
    """Segmentation, from images to classes of pixels"""
    images, width = bench.photos(bench.cfg.SEGMENT_BATCH), bench.clip.visual.embed_dim
    text = F.normalize(torch.randn(bench.cfg.PROMPTS, width, device=bench.device), dim=-1)
    classes = make_classes([f"class {number}" for number in range(len(text))])
    how = bench.protocol, bench.clip, classes, text
    forms = bench.forms(lambda: eval_seg.predict(*how, images),
                        lambda: [reference.predict(*how, image) for image in images])
    with torch.compiler.set_stance("force_eager"):      # evaluation compiles no blocks
        yield from bench.costs(forms, lambda predict: predict(), len(images))


MEASURES = {"input": measure_input, "operations": measure_operations, "train": measure_training,
            "segment": measure_segmentation, "shards": measure_shards, "catseg": measure_catseg,
            "fvit": measure_fvit, "fits": measure_fits}


if __name__ == "__main__":
    main()
