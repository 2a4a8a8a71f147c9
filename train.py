"""Trains DeCLIP: a CLIP, a vision foundation model (VFM) and a folder of unlabelled images -> declip.safetensors.

One GPU (or a CPU):           python train.py --images data/coco/train2017
Eight GPUs:                   torchrun --nproc_per_node 8 train.py --images data/coco/train2017
Two machines of eight GPUs:   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py
Go on after an interruption:  the same command with --resume

Every constant below is an option: `--lr 2e-5`. Defaults are the paper's; `@presets/published.txt` is what the
published scripts do instead. The total batch is BATCH_SIZE on any number of GPUs.
"""

import copy
import fcntl
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
import settings
from data import (
    Grid,
    TrainingImages,
    draw_grid,
    epoch_order,
    grid_boxes,
    grid_crops,
    prefetched,
    rank_batches,
    student_image,
    workers,
)
from model import (
    CONTEXTS,
    PRECISIONS,
    VFM,
    DeCLIP,
    autocast,
    content_loss,
    context_loss,
    find_precision,
    load_vfm,
    read_record,
    write_whole,
)
from settings import UserError

# What is read and written
IMAGES = "data/coco/train2017"      # folder of images, searched through all its folders, or a COCO-style json
IMAGE_ROOT: str | None = None       # folder of the json's images; None: the json's own
OUT = "out/declip"                  # folder of the run: declip.safetensors, resume-STEP.pt, log.jsonl
RESUME = False                      # go on with the run in OUT from its last checkpoint

# The model
MODEL = "EVA02-B-16"                # open_clip model that is student and teacher; EVA02-L-14-336, ViT-B-16-quickgelu ...
PRETRAINED: str | None = "merged2b_s8b_b131k"           # its weights: a tag or a file; None: random; local-dir: has its own
CONTEXT = "q"                       # projections that make X_context: q, k, qk; clip, maskclip: not decoupled (Table 1)
SCALE: float | None = None          # factor of the last block's logits; None: 1/√d (paper); 1 (published scripts)
UNLOCKED_BLOCKS: int | None = None  # attention blocks trained, counted from the end; None: all of them (paper)
ENSEMBLE = 1.0                      # share of the student in the saved weights, the rest is CLIP; 0.7 published for B/16
VFM_MODEL = "vit_base_patch14_dinov2.lvd142m"           # any timm ViT; vit_large_patch14_dinov2.lvd142m for ViT-L
VFM_PRETRAINED = True               # False: random weights, to try the machinery without a download

# The views
IMAGE_SIZE = 560                    # student's picture, longest side padded to a square; more is better and slower
GRID = (1, 6)                       # rows and columns of the crop grid are drawn from this range
GRID_ASPECT = 0.0                   # largest ratio of rows to columns or the reverse; 0: any (paper); 2 published
MAX_CROPS = 0                       # crops kept of a grid; 0: all (paper); 20 published; lower it to save memory
CROP_SIZE = 224                     # side of a crop as the teacher sees it; a multiple of its patch size
KEEP_ASPECT = False                 # pad crops instead of stretching them to a square; True published

# The optimisation
LAMBDA = 0.25                       # weight of the context loss, λ of equation 10; 0 is self-distillation, without a VFM
BATCH_SIZE = 16                     # images of one optimiser step, over all GPUs
MICRO_BATCH = 4                     # most images of one forward pass on one GPU; lower it if memory runs out
EPOCHS = 6                          # passes over the images
STEPS = 0                           # stop at this step, to go on with --resume later; 0: at the end of EPOCHS
LR = 1e-5                           # peak learning rate
WARMUP = 1000                       # steps of linear warm-up, then cosine to 0; shortened to a tenth of a short run
WEIGHT_DECAY = 0.1                  # of matrices; biases and norms have none
BETAS = (0.9, 0.98)                 # of AdamW
EPS = 1e-6                          # of AdamW
PRECISION = "auto"                  # auto: bf16 on a GPU that has it, else fp16 there, fp32 on a CPU; or one of them
SEED = 0                            # of the order of images and of their grids

# The machinery
COMPILE = False                     # torch.compile of every block; it takes a minute first, bench.py tells what it gives
CHECKPOINTING = False               # compute blocks again in backward: a third more time, for a large model or picture
WORKERS = 4                         # processes that decode images, for each GPU
LOG_EVERY = 20                      # steps between lines of log.jsonl
SAVE_EVERY = 1000                   # steps between checkpoints, besides each epoch's end
KEEP = 2                            # checkpoints kept to go on from, should the last one be damaged
MAX_BAD_FILES = 0.01                # share of the image files that may be unreadable before the run stops
MAX_BAD_STEPS = 20                  # steps in a row whose gradient is not finite before the run stops


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line (or `argv`) says."""
    cfg = settings.parse(argv, sys.modules[__name__])
    # torchrun --max_restarts starts the same command again after a crash.
    cfg.RESUME = cfg.RESUME or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    with distributed.session(__file__) as ranks, signals_restored():
        run(cfg, ranks)


def run(cfg: SimpleNamespace, ranks: distributed.Ranks) -> None:
    """The whole of training: one loop for one process and many."""
    check(cfg)
    micro_batch, accumulate = divide_batch(cfg, ranks.world)
    dataset = TrainingImages(cfg.IMAGES, cfg.IMAGE_ROOT)
    steps_per_epoch = len(epoch_order(len(dataset), cfg.BATCH_SIZE, 0, cfg.SEED))
    lock = hold_folder(cfg) if ranks.is_main else None      # noqa: F841 - let go when this function ends
    resumed = find_resume(cfg, dataset)
    if ranks.is_main:
        prepare_folder(cfg, resumed)
    student, teacher, vfm = build(cfg, ranks.device)
    if ranks.is_main:
        check_disk(cfg, student)
    optimizer = build_optimizer(cfg, student)
    if cfg.COMPILE:
        compile_blocks(student, teacher, vfm)
    amp, scaler = precision(cfg.PRECISION, ranks.device)
    step = restore(resumed, student, optimizer, scaler) if resumed else 0
    if not distributed.all_equal(step, ranks.device):
        raise UserError(f"The processes found different checkpoints in {cfg.OUT}; put OUT on a disk that all machines share.")
    wrapped = distribute(student, ranks)

    total = cfg.EPOCHS * steps_per_epoch
    last = min(cfg.STEPS or total, total)
    log, guard = Log(cfg, ranks, dataset, step), Guard(cfg, ranks, resumed["bad_steps"] if resumed else 0)
    is_saved = True
    progress = tqdm(initial=step, total=last, desc="train", unit="step", disable=not ranks.is_main)
    batches = prefetched(load(cfg, dataset, step, micro_batch, ranks), ranks.device)
    while step < last:
        epoch = step // steps_per_epoch
        lr = learning_rate(cfg, step, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = list(islice(batches, accumulate))
        losses_of_step = accumulate_gradients(cfg, wrapped, teacher, vfm, batch, epoch, amp, scaler)
        step += 1
        guard.watch(step, optimizer, [dataset.paths[index] for _, indices, _ in batch for index in indices])
        log.add(losses_of_step, [failure for _, _, skipped in batch for failures in skipped for failure in failures])
        scaler.step(optimizer)      # leaves the weights as they are if the gradient is not finite
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        progress.update()
        guard.look()
        saves = step % steps_per_epoch == 0 or step == last or step % cfg.SAVE_EVERY == 0 or guard.stops
        if saves:
            guard.look(last=True)
        if saves or step == 1 or step % cfg.LOG_EVERY == 0:
            log.write(step, epoch, lr, guard.bad_steps)
        if saves and ranks.is_main:
            is_saved = save(cfg, step, guard.bad_steps, dataset, student, teacher, optimizer, scaler)
        if guard.stops:
            progress.close()
            distributed.barrier()
            raise SystemExit(guard.leave(step))
    progress.close()
    distributed.barrier()
    if not is_saved:
        raise UserError(f"The last checkpoint could not be written to {cfg.OUT}; make room, and repeat the end with --resume.")
    if ranks.is_main:
        model = Path(cfg.OUT) / "declip.safetensors"
        print(f"{model} holds the model after {step} steps; evaluate it with python eval_seg.py --ckpt {model}")


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting out of its range, before anything is loaded."""
    settings.check_least(cfg, BATCH_SIZE=1, MICRO_BATCH=1, EPOCHS=1, LOG_EVERY=1, SAVE_EVERY=1, IMAGE_SIZE=1, CROP_SIZE=1,
                         KEEP=1, MAX_BAD_STEPS=1, MAX_BAD_FILES=0, UNLOCKED_BLOCKS=1, STEPS=0,
                         WARMUP=0, MAX_CROPS=0, WORKERS=0, LR=0, LAMBDA=0, WEIGHT_DECAY=0)
    if cfg.PRETRAINED and Path(cfg.PRETRAINED).is_file() and read_record(cfg.PRETRAINED):
        raise UserError(f"{cfg.PRETRAINED} is a model that train.py made, whose [CLS] has changed and can teach no more; "
                        "give the weights of a CLIP.")
    expected = {"CONTEXT": (cfg.CONTEXT in CONTEXTS, f"one of {', '.join(CONTEXTS)}"),
                "GRID": (len(cfg.GRID) == 2 and 1 <= cfg.GRID[0] <= cfg.GRID[1], "two numbers, 1 <= least <= most"),
                "GRID_ASPECT": (cfg.GRID_ASPECT == 0 or cfg.GRID_ASPECT >= 1, "0, or at least 1"),
                "ENSEMBLE": (0 <= cfg.ENSEMBLE <= 1, "a share, from 0 to 1"),
                "BETAS": (len(cfg.BETAS) == 2 and all(0 <= beta < 1 for beta in cfg.BETAS), "two numbers from 0 to 1"),
                "PRECISION": (cfg.PRECISION in PRECISIONS, f"one of {', '.join(PRECISIONS)}")}
    for name, (fits, what) in expected.items():
        if not fits:
            raise UserError(f"{name} is {getattr(cfg, name)!r}; it must be {what}.")


def divide_batch(cfg: SimpleNamespace, world: int) -> tuple[int, int]:
    """(images of one forward pass on one rank, forward passes of one step) that make BATCH_SIZE over `world` ranks."""
    if cfg.BATCH_SIZE % world:
        fits = -(-cfg.BATCH_SIZE // world) * world
        raise UserError(f"BATCH_SIZE {cfg.BATCH_SIZE} can't be divided over {world} processes; set it to {fits}, or "
                        "choose another --nproc_per_node.")
    share = cfg.BATCH_SIZE // world
    micro_batch = max(size for size in range(1, min(share, cfg.MICRO_BATCH) + 1) if share % size == 0)
    return micro_batch, share // micro_batch


def build(cfg: SimpleNamespace, device: torch.device) -> tuple[DeCLIP, DeCLIP, VFM | None]:
    """The student, its frozen first self (the teacher of content), and the VFM (of context; None if λ is 0).

    Training reads no text: the student's text tower stays on the CPU, for its checkpoints, and the teacher has none.
    """
    torch.manual_seed(cfg.SEED)
    student = DeCLIP(cfg.MODEL, cfg.PRETRAINED, cfg.CONTEXT, cfg.SCALE)
    for name in ("IMAGE_SIZE", "CROP_SIZE"):
        if getattr(cfg, name) % student.patch_size:
            nearest = max(1, round(getattr(cfg, name) / student.patch_size)) * student.patch_size
            raise UserError(f"{name} {getattr(cfg, name)} is no multiple of {cfg.MODEL}'s patch size, {student.patch_size}; "
                            f"the nearest that is is {nearest}.")
    text, student.clip.text = student.clip.text, None
    teacher = copy.deepcopy(student).requires_grad_(False)
    teacher.has_text = False
    student.freeze(len(student.visual.blocks) if cfg.UNLOCKED_BLOCKS is None else cfg.UNLOCKED_BLOCKS)
    student.checkpointing = cfg.CHECKPOINTING
    vfm = load_vfm(cfg.VFM_MODEL, cfg.VFM_PRETRAINED) if cfg.LAMBDA else None
    student.to(device).clip.text = text.requires_grad_(False)
    return student, teacher.to(device), vfm and vfm.to(device)


def compile_blocks(student: DeCLIP, teacher: DeCLIP, vfm: VFM | None) -> None:
    """torch.compile of each block in place; the teacher's for any number of crops, which is another at every step."""
    torch._dynamo.config.recompile_limit = 32       # counted over all blocks of a class: of three models, trained and not
    torch._dynamo.config.optimize_ddp = False       # splits graphs so that gradients go early; blocks are small enough
    for block in (*student.visual.blocks, *(vfm.trunk.blocks if vfm else ())):
        block.compile()
    for block in teacher.visual.blocks:
        block.compile(dynamic=True)


def distribute(student: DeCLIP, ranks: distributed.Ranks) -> nn.Module:
    """The student under DDP, whose forward every training step must call; itself in a single process."""
    if ranks.world == 1:
        return student
    # The text tower, on the CPU, is none of DDP's business.
    names = [*dict(student.named_parameters()), *dict(student.named_buffers())]
    text = [name for name in names if name.startswith("clip.text.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(student, text)
    return DistributedDataParallel(student, gradient_as_bucket_view=True)


def build_optimizer(cfg: SimpleNamespace, student: nn.Module) -> torch.optim.AdamW:
    """AdamW over what is trained; biases and norms without weight decay."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.WEIGHT_DECAY},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.LR, betas=cfg.BETAS, eps=cfg.EPS, fused=True)


def precision(name: str, device: torch.device) -> tuple:
    """(a function that opens the autocast context, a GradScaler).

    The scaler leaves out steps whose gradient is not finite, on the device; only in fp16 it scales the loss, too.
    """
    rules = {} if find_precision(name, device) == "fp16" else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
    scaler = torch.amp.GradScaler(device.type, **rules)
    return partial(autocast, name, device), scaler


def learning_rate(cfg: SimpleNamespace, step: int, total: int) -> float:
    """Linear warm-up to LR, then cosine to 0 at the last of `total` steps."""
    warmup = min(cfg.WARMUP, total // 10)
    if step < warmup:
        return cfg.LR * (step + 1) / warmup
    return cfg.LR / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def load(cfg: SimpleNamespace, dataset: TrainingImages, step: int, micro_batch: int,
         ranks: distributed.Ranks) -> Iterator[tuple[list[Tensor], list[int], list[list[tuple[str, str]]]]]:
    """This rank's micro batches from `step` on, to the last epoch: uint8 images, their indices, the files skipped for each."""
    def all_batches() -> Iterator[list[int]]:
        first_epoch, first_step = divmod(step, len(dataset) // cfg.BATCH_SIZE)
        for epoch in range(first_epoch, cfg.EPOCHS):
            order = epoch_order(len(dataset), cfg.BATCH_SIZE, epoch, cfg.SEED)
            yield from rank_batches(order, ranks.rank, ranks.world, micro_batch, first_step if epoch == first_epoch else 0)

    # One loader for all epochs: its processes are forked once, beside as few threads as may be.
    return iter(DataLoader(dataset, batch_sampler=all_batches(), num_workers=workers(cfg.WORKERS), collate_fn=transposed,
                           worker_init_fn=leave_signals_to_the_trainer, pin_memory=ranks.device.type == "cuda"))


def transposed(samples: list[tuple]) -> tuple[list, ...]:
    """[(a, b), (c, d)] -> ([a, c], [b, d]): a batch whose images keep their own sizes."""
    return tuple(map(list, zip(*samples)))


def accumulate_gradients(cfg: SimpleNamespace, student: nn.Module, teacher: DeCLIP, vfm: VFM | None, batches: list[tuple],
                         epoch: int, amp: Callable, scaler: torch.amp.GradScaler) -> Tensor:
    """Adds the gradients of one step, equation 10 over its micro batches -> (2,) its content and context loss."""
    total, accumulate = torch.zeros(2, device=teacher.visual.pos_embed.device), len(batches)
    for micro_step, (images, indices, _) in enumerate(batches):
        # Ranks average their gradients once a step, in the last backward.
        waits = isinstance(student, DistributedDataParallel) and micro_step < accumulate - 1
        with student.no_sync() if waits else nullcontext():
            with amp():
                content, context = losses(cfg, student, teacher, vfm, images, indices, epoch)
            scaler.scale((content + cfg.LAMBDA * context) / accumulate).backward()
        total += torch.stack([content.detach(), context.detach()]) / accumulate
    return total


def losses(cfg: SimpleNamespace, student: nn.Module, teacher: DeCLIP, vfm: VFM | None, images: list[Tensor],
           indices: list[int], epoch: int) -> tuple[Tensor, Tensor]:
    """Content loss (equation 7) and context loss (equation 9) of a micro batch; `student` may be wrapped in DDP.

    images: uint8 (3, H, W) each, on the models' device. The grid of an image depends on SEED, epoch and its index alone.
    """
    grids = [crop_grid(cfg, epoch, index) for index in indices]
    # The teachers first: what they need of memory is free again when the student fills it for backward.
    crops = encode_crops(cfg, teacher, images, grids)
    tokens = encode_tokens(cfg, teacher, vfm, images) if vfm else None
    inputs = torch.stack([student_image(image, cfg.IMAGE_SIZE, teacher.mean, teacher.std) for image in images])
    boxes = [grid_boxes(image, grid, cfg.IMAGE_SIZE) for image, grid in zip(images, grids)]
    regions, context = student(inputs, boxes)
    content = content_loss(regions, crops, [len(grid.cells) for grid in grids])
    return content, torch.zeros_like(content) if tokens is None else context_loss(context, tokens)


def crop_grid(cfg: SimpleNamespace, epoch: int, index: int) -> Grid:
    """The crop grid of an image in an epoch."""
    return draw_grid(f"{cfg.SEED}-{epoch}-{index}", cfg.GRID, cfg.GRID_ASPECT, cfg.MAX_CROPS)


@torch.inference_mode()
def encode_crops(cfg: SimpleNamespace, teacher: DeCLIP, images: list[Tensor], grids: list[Grid]) -> Tensor:
    """The teacher's [CLS] of all cells of all grids, (sum k, C)."""
    return teacher.encode_image(torch.cat([grid_crops(image, grid, cfg.CROP_SIZE, teacher.mean, teacher.std, cfg.KEEP_ASPECT)
                                           for image, grid in zip(images, grids)]))


@torch.inference_mode()
def encode_tokens(cfg: SimpleNamespace, teacher: DeCLIP, vfm: VFM, images: list[Tensor]) -> Tensor:
    """The VFM's tokens (B, N, D'), as many as the student's."""
    size = vfm_size(cfg, teacher, vfm)
    return vfm(torch.stack([student_image(image, size, vfm.mean, vfm.std) for image in images]))


def vfm_size(cfg: SimpleNamespace, clip: DeCLIP, vfm: VFM) -> int:
    """The side of the VFM's picture that gives it as many tokens as the student has."""
    return cfg.IMAGE_SIZE // clip.patch_size * vfm.patch_size


SIGNALS = (signal.SIGTERM, signal.SIGINT)      # what a scheduler sends before it takes a machine, and Ctrl-C


@contextmanager
def signals_restored() -> Iterator[None]:
    """Leaves the handling of SIGNALS as it was before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_trainer(_: int) -> None:
    """In a worker: SIGNALS go to all processes of a group, but the trainer still wants images for its last steps."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))      # ends the worker, should the trainer forget it


class Guard:
    """What ranks must agree on at every step: whether its gradient was finite, and whether a signal asked to stop.

    The answer about a step is read after the next one was sent to the device, so that the device never waits for it.
    """

    def __init__(self, cfg: SimpleNamespace, ranks: distributed.Ranks, bad_steps: int = 0):
        self.cfg, self.ranks = cfg, ranks
        self.signal, self.stops = 0, False      # the signal that came; whether all ranks know of one
        self.bad_steps, self.in_a_row = bad_steps, 0
        self.pending: list[tuple[int, Callable[[], list], list[str]]] = []
        for number in SIGNALS:
            signal.signal(number, self.note)

    def note(self, number: int, _) -> None:
        """Remembers a signal. A second Ctrl-C ends the process at once; SIGTERM may be repeated by launchers."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch(self, step: int, optimizer: torch.optim.Optimizer, files: list[str]) -> None:
        """Asks all ranks about a step whose gradients are there; `files` are this rank's images of it."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        is_bad = ~nn.utils.get_total_norm(gradients, math.inf).isfinite()     # the largest of all, in few kernels
        # Averaged by DDP, a gradient is finite on all ranks or on none; but a signal may have come to one alone.
        flags = torch.stack([is_bad.float(), torch.full((), float(self.signal), device=self.ranks.device)])
        self.pending.append((step, distributed.fetch(distributed.max_over_ranks(flags)), files))

    def look(self, last: bool = False) -> None:
        """Reads the answers but for the newest (all of them when `last`); UserError after MAX_BAD_STEPS in a row."""
        while len(self.pending) > (0 if last else 1):
            step, read, files = self.pending.pop(0)
            is_bad, number = read()
            self.stops, self.signal = self.stops or number > 0, self.signal or int(number)
            self.in_a_row = self.in_a_row + 1 if is_bad else 0
            if is_bad:
                self.bad_steps += 1
                files = [file for share in distributed.gather(files) for file in share]
                if self.ranks.is_main:
                    with open(Path(self.cfg.OUT) / "bad_steps.jsonl", "a") as out:
                        out.write(json.dumps({"step": step, "files": files}) + "\n")
                    tqdm.write(f"step {step} was left out, its gradient is not finite; its images are in bad_steps.jsonl")
            if self.in_a_row >= self.cfg.MAX_BAD_STEPS:
                raise UserError(f"The gradient was not finite in {self.in_a_row} steps in a row, up to step {step}; lower LR "
                                f"or look at the images in bad_steps.jsonl; {self.cfg.OUT} keeps the last good checkpoint.")

    def leave(self, step: int) -> int:
        """Says what a signal has led to, and gives the exit status that is usual for it (143 for SIGTERM, 130 for Ctrl-C)."""
        if self.ranks.is_main:
            print(f"stopped by {signal.Signals(self.signal).name} after step {step}, which is saved; go on with --resume")
        return 128 + self.signal


class Log:
    """Means over some steps and all ranks, a line of json each, without a device synchronisation in between."""

    def __init__(self, cfg: SimpleNamespace, ranks: distributed.Ranks, dataset: TrainingImages, first_step: int):
        self.cfg, self.ranks, self.files = cfg, ranks, len(dataset)
        self.sums, self.steps, self.since = torch.zeros(3, device=ranks.device), 0, time.perf_counter()
        self.path, self.skipped_path = Path(cfg.OUT) / "log.jsonl", Path(cfg.OUT) / "skipped.txt"
        self.new_failures: dict[str, str] = {}
        listed = self.skipped_path.read_text().splitlines() if first_step and self.skipped_path.exists() else []
        self.failures = {line.split("\t")[0] for line in listed}
        if ranks.is_main:
            # Steps after the checkpoint that a run goes on from are made again.
            lines = self.path.read_text().splitlines(keepends=True) if first_step and self.path.exists() else []
            whole = [line for line in lines if line.endswith("\n")]      # a killed run may leave half a line
            kept = "".join(line for line in whole if json.loads(line)["step"] <= first_step)
            write_whole(self.path, lambda file: Path(file).write_text(kept))

    def add(self, content_and_context: Tensor, failures: list[tuple[str, str]]) -> None:
        """Takes one step's losses, (2,), and the files that could not be read for it, with the reasons."""
        finite = content_and_context.isfinite().all()
        self.sums += torch.cat([content_and_context.where(finite, 0), finite.float()[None]])
        self.steps += 1
        self.new_failures.update(failures)

    def write(self, step: int, epoch: int, lr: float, bad_steps: int) -> None:
        """Writes a line on the steps since the last one, and new failures; UserError if there are too many of those."""
        content, context, counted = distributed.sum_over_ranks(self.sums).tolist()
        content, context = (total / counted if counted else None for total in (content, context))
        self.write_failures()
        seconds = time.perf_counter() - self.since
        line = {"step": step, "epoch": epoch, "loss": content + self.cfg.LAMBDA * context if counted else None,
                "content": content, "context": context, "lr": lr,
                "images_per_second": round(self.steps * self.cfg.BATCH_SIZE / seconds, 2),
                "memory_mb": peak_memory(self.ranks.device), "bad_steps": bad_steps, "bad_files": len(self.failures)}
        if self.ranks.is_main:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            tqdm.write("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                                 for key, value in line.items()))
        self.sums, self.steps, self.since = torch.zeros_like(self.sums), 0, time.perf_counter()

    def write_failures(self) -> None:
        """Lists files that no rank could read so far in skipped.txt, each once; UserError if their share is too large."""
        found = {path: reason for share in distributed.gather(self.new_failures) for path, reason in share.items()}
        new = {path: reason for path, reason in found.items() if path not in self.failures}
        self.failures.update(new)
        self.new_failures = {}
        if new and self.ranks.is_main:
            with open(self.skipped_path, "a") as file:
                file.writelines(f"{path}\t{reason}\n" for path, reason in sorted(new.items()))
        if len(self.failures) > self.cfg.MAX_BAD_FILES * self.files:
            raise UserError(f"{len(self.failures)} of {self.files} image files can't be read, more than MAX_BAD_FILES, "
                            f"{self.cfg.MAX_BAD_FILES:.2%}; they are listed in {self.skipped_path}, so look whether these are "
                            "the data that you meant.")


def peak_memory(device: torch.device) -> int:
    """The most memory used so far in MB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


def save(cfg: SimpleNamespace, step: int, bad_steps: int, dataset: TrainingImages, student: DeCLIP, teacher: DeCLIP,
         optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> bool:
    """Writes the model (declip.safetensors) and all that going on needs (resume-STEP.pt), each whole or not at all.

    If the disk is full it says so, returns False, and what was there before stays.
    """
    out = Path(cfg.OUT)
    trained = {name: parameter.detach() for name, parameter in student.named_parameters() if parameter.requires_grad}
    state = {"step": step, "settings": vars(cfg), "images": dataset.fingerprint, "student": trained,
             "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "bad_steps": bad_steps}
    try:
        write_whole(out / f"resume-{step:08}.pt", lambda file: torch.save(state, file))
        student.save(out / "declip.safetensors", vars(cfg) | {"step": step}, teacher, cfg.ENSEMBLE)
    except OSError as error:
        tqdm.write(f"the checkpoint of step {step} could not be written ({error}); make room: the one before it is kept")
        return False
    for old in resume_files(cfg)[cfg.KEEP:]:
        old.unlink(missing_ok=True)
    return True


def resume_files(cfg: SimpleNamespace) -> list[Path]:
    """The checkpoints that OUT has to go on from, the newest first."""
    return sorted(Path(cfg.OUT).glob("resume-*.pt"), reverse=True)


def hold_folder(cfg: SimpleNamespace) -> IO:
    """Makes OUT and locks it as long as the returned file is open and this process lives, however it may end.

    Raises UserError if another process writes there, such as one that a scheduler has not ended yet.
    """
    Path(cfg.OUT).mkdir(parents=True, exist_ok=True)
    lock = open(Path(cfg.OUT) / ".lock", "a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"Another process is training into {cfg.OUT}; wait for its end or stop it, or set OUT to another "
                        "folder.") from None
    return lock


def prepare_folder(cfg: SimpleNamespace, resumed: dict | None) -> None:
    """Removes what a killed run left half-written in OUT, and prints the settings."""
    for half in Path(cfg.OUT).glob("*.tmp"):
        half.unlink()
    print(settings.show(cfg))
    if cfg.RESUME:
        print(f"going on at step {resumed['step']}" if resumed else f"{cfg.OUT} has no checkpoint, so the run begins")


def check_disk(cfg: SimpleNamespace, student: DeCLIP) -> None:
    """Raises UserError if the checkpoints of this run will not fit beside each other on OUT's disk."""
    trained = sum(p.numel() * 4 for p in student.parameters() if p.requires_grad)
    everything = sum(p.numel() * 4 for p in student.parameters())
    # Each checkpoint has weights and two moments; while the newest is written there is one more than is kept.
    needed = 2 * everything + (cfg.KEEP + 1) * 3 * trained
    there = sum(file.stat().st_size for file in (*resume_files(cfg), Path(cfg.OUT) / "declip.safetensors") if file.exists())
    free = shutil.disk_usage(cfg.OUT).free
    if free + there < needed:
        raise UserError(f"{Path(cfg.OUT).absolute()} has {free / 1e9:.1f} GB free, but the run's checkpoints take "
                        f"{needed / 1e9:.1f} GB; make room, set OUT to another disk, or lower KEEP.")


# Settings that may differ when a run is resumed: the rest would make it another run.
HARMLESS = ("OUT", "RESUME", "MICRO_BATCH", "WORKERS", "LOG_EVERY", "SAVE_EVERY", "STEPS", "KEEP", "MAX_BAD_FILES",
            "MAX_BAD_STEPS", "IMAGES", "IMAGE_ROOT", "COMPILE", "CHECKPOINTING")


def find_resume(cfg: SimpleNamespace, dataset: TrainingImages) -> dict | None:
    """The state to go on from, None for a new run.

    Raises UserError if OUT holds a run that is not to be resumed, or one with other settings or images.
    """
    paths = resume_files(cfg)
    if not paths:
        return None
    if not cfg.RESUME:
        raise UserError(f"{cfg.OUT} already holds a run; go on with it by --resume, or set OUT to another folder.")
    state = next(filter(None, map(read_state, paths)), None)
    if state is None:
        raise UserError(f"All checkpoints in {cfg.OUT} are damaged; remove them, or begin anew in another OUT.")
    now, then = vars(cfg), state["settings"]
    changed = next((name for name in now if name not in HARMLESS and now[name] != then.get(name)), None)
    if changed:
        raise UserError(f"The run in {cfg.OUT} was begun with {changed} {then.get(changed)}, but now it is {now[changed]}; "
                        "resume with the old value, or set OUT to another folder.")
    if state["images"] != dataset.fingerprint:
        raise UserError(f"The run in {cfg.OUT} was begun with {state['images']} (number, checksum of names), but {cfg.IMAGES} "
                        f"has {dataset.fingerprint}; resume with the same images, or set OUT to another folder.")
    return state


def read_state(path: Path) -> dict | None:
    """A checkpoint, None if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:       # whatever a damaged file leads to
        print(f"{path} is damaged, so the one before it is taken")
        return None


def restore(state: dict, student: DeCLIP, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """Puts a saved state back and returns its step."""
    student.load_state_dict(state["student"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    # Another GPU may compute in another precision, whose scaler goes by other rules.
    if state["scaler"] and state["scaler"].get("growth_interval") == scaler.get_growth_interval():
        scaler.load_state_dict(state["scaler"])
    return state["step"]


if __name__ == "__main__":
    main()
