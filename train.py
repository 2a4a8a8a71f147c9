"""Trains DeCLIP: a CLIP, a vision foundation model (VFM) and a folder of unlabelled images -> declip.safetensors.

One GPU (or a CPU):           python train.py --images data/coco/train2017
Eight GPUs:                   torchrun --nproc_per_node 8 train.py --images data/coco/train2017
Two machines of eight GPUs:   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py
Go on after an interruption:  the same command with --resume

Every constant below is an option: `--lr 2e-5`. Defaults are the paper's; `@presets/published.txt` is what the
published scripts do instead. The total batch is BATCH_SIZE on any number of GPUs.
"""

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
import settings
from data import TrainingImages, draw_grid, epoch_order, grid_boxes, grid_crops, rank_batches, student_image, workers
from model import CONTEXTS, VFM, DeCLIP, content_loss, context_loss, load_vfm, read_record, write_whole
from settings import UserError

# What is read and written
IMAGES = "data/coco/train2017"      # folder of images, searched through all its folders, or a COCO-style json
IMAGE_ROOT: str | None = None       # folder of the json's images; None: the json's own
OUT = "out/declip"                  # folder of the run: declip.safetensors, resume.pt, log.jsonl
RESUME = False                      # go on with the run in OUT from its last checkpoint

# The model
MODEL = "EVA02-B-16"                # open_clip model that is student and teacher; EVA02-L-14-336, ViT-B-16-quickgelu ...
PRETRAINED: str | None = "merged2b_s8b_b131k"           # its weights: an open_clip tag or a file; None: random
CONTEXT = "q"                       # projections that make X_context: q, k or qk
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
MICRO_BATCH = 2                     # most images of one forward pass on one GPU; lower it if memory runs out
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
WORKERS = 4                         # processes that decode images, for each GPU
LOG_EVERY = 20                      # steps between lines of log.jsonl
SAVE_EVERY = 1000                   # steps between checkpoints, besides each epoch's end


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line (or `argv`) says."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__) as ranks:
        run(cfg, ranks)


def run(cfg: SimpleNamespace, ranks: distributed.Ranks) -> None:
    """The whole of training: one loop for one process and many."""
    check(cfg)
    micro_batch, accumulate = divide_batch(cfg, ranks.world)
    dataset = TrainingImages(cfg.IMAGES, cfg.IMAGE_ROOT)
    resumed = find_resume(cfg, dataset)
    Path(cfg.OUT).mkdir(parents=True, exist_ok=True)
    if ranks.is_main:
        print(settings.show(cfg))
        if cfg.RESUME:
            print(f"going on at step {resumed['step']}" if resumed else f"{cfg.OUT} has no resume.pt, so the run begins")
    student, teacher, vfm = build(cfg, ranks.device)
    optimizer = build_optimizer(cfg, student)
    amp, scaler = precision(cfg.PRECISION, ranks.device)
    step = restore(resumed, student, optimizer, scaler) if resumed else 0
    if not distributed.all_equal(step, ranks.device):
        raise UserError(f"The processes found different checkpoints in {cfg.OUT}; put OUT on a disk that all machines share.")
    wrapped = distribute(student, ranks)

    steps_per_epoch = len(epoch_order(len(dataset), cfg.BATCH_SIZE, 0, cfg.SEED))
    total = cfg.EPOCHS * steps_per_epoch
    last = min(cfg.STEPS or total, total)
    log = Log(cfg, ranks, step)
    progress = tqdm(initial=step, total=last, desc="train", unit="step", disable=not ranks.is_main)
    while step < last:
        epoch, first_step = divmod(step, steps_per_epoch)
        batches = load_epoch(cfg, dataset, epoch, first_step, micro_batch, ranks)
        for _ in range(first_step, min(steps_per_epoch, first_step + last - step)):
            lr = learning_rate(cfg, step, total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            log.add(accumulate_gradients(cfg, wrapped, teacher, vfm, islice(batches, accumulate), accumulate, epoch,
                                         amp, scaler))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            progress.update()
            saves = step % steps_per_epoch == 0 or step == last or step % cfg.SAVE_EVERY == 0
            if saves or step == 1 or step % cfg.LOG_EVERY == 0:
                log.write(step, epoch, lr)      # refuses to go on with losses that are no numbers, so before saving
            if saves and ranks.is_main:
                save(cfg, step, dataset, student, teacher, optimizer, scaler)
    progress.close()
    distributed.barrier()
    if ranks.is_main:
        model = Path(cfg.OUT) / "declip.safetensors"
        print(f"{model} holds the model after {step} steps; evaluate it with python eval_seg.py --ckpt {model}")


PRECISIONS = ("auto", "bf16", "fp16", "fp32")


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting out of its range, before anything is loaded."""
    settings.check_least(cfg, BATCH_SIZE=1, MICRO_BATCH=1, EPOCHS=1, LOG_EVERY=1, SAVE_EVERY=1, IMAGE_SIZE=1, CROP_SIZE=1,
                         UNLOCKED_BLOCKS=1, STEPS=0, WARMUP=0, MAX_CROPS=0, WORKERS=0, LR=0, LAMBDA=0, WEIGHT_DECAY=0)
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
    """The student, its frozen first self (the teacher of content), and the VFM (of context; None if λ is 0)."""
    torch.manual_seed(cfg.SEED)
    student = DeCLIP(cfg.MODEL, cfg.PRETRAINED, cfg.CONTEXT, cfg.SCALE)
    for name in ("IMAGE_SIZE", "CROP_SIZE"):
        if getattr(cfg, name) % student.patch_size:
            nearest = max(1, round(getattr(cfg, name) / student.patch_size)) * student.patch_size
            raise UserError(f"{name} {getattr(cfg, name)} is no multiple of {cfg.MODEL}'s patch size, {student.patch_size}; "
                            f"the nearest that is is {nearest}.")
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.freeze(len(student.visual.blocks) if cfg.UNLOCKED_BLOCKS is None else cfg.UNLOCKED_BLOCKS)
    vfm = load_vfm(cfg.VFM_MODEL, cfg.VFM_PRETRAINED) if cfg.LAMBDA else None
    return student.to(device), teacher.to(device), vfm and vfm.to(device)


def distribute(student: DeCLIP, ranks: distributed.Ranks) -> nn.Module:
    """The student under DDP, whose forward every training step must call; itself in a single process."""
    if ranks.world == 1:
        return student
    return DistributedDataParallel(student, gradient_as_bucket_view=True)


def build_optimizer(cfg: SimpleNamespace, student: nn.Module) -> torch.optim.AdamW:
    """AdamW over what is trained; biases and norms without weight decay."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.WEIGHT_DECAY},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.LR, betas=tuple(cfg.BETAS), eps=cfg.EPS, fused=trained[0].is_cuda)


def precision(name: str, device: torch.device) -> tuple:
    """(a function that opens the autocast context, a GradScaler that does nothing unless fp16 needs it)."""
    if name == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "fp32" if device.type == "cpu" else "bf16" if has_bf16 else "fp16"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]
    scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
    return lambda: torch.autocast(device.type, dtype, enabled=dtype is not None), scaler


def learning_rate(cfg: SimpleNamespace, step: int, total: int) -> float:
    """Linear warm-up to LR, then cosine to 0 at the last of `total` steps."""
    warmup = min(cfg.WARMUP, total // 10)
    if step < warmup:
        return cfg.LR * (step + 1) / warmup
    return cfg.LR / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def load_epoch(cfg: SimpleNamespace, dataset: TrainingImages, epoch: int, first_step: int, micro_batch: int,
               ranks: distributed.Ranks) -> Iterator[tuple[list[Tensor], list[int]]]:
    """This rank's micro batches of an epoch from `first_step` on: uint8 images, and their indices."""
    order = epoch_order(len(dataset), cfg.BATCH_SIZE, epoch, cfg.SEED)
    batches = rank_batches(order, ranks.rank, ranks.world, micro_batch, first_step)
    return iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers(cfg.WORKERS), collate_fn=transposed,
                           pin_memory=ranks.device.type == "cuda"))


def transposed(samples: list[tuple]) -> tuple[list, ...]:
    """[(a, b), (c, d)] -> ([a, c], [b, d]): a batch whose images keep their own sizes."""
    return tuple(map(list, zip(*samples)))


def accumulate_gradients(cfg: SimpleNamespace, student: nn.Module, teacher: DeCLIP, vfm: VFM | None, batches: Iterable,
                         accumulate: int, epoch: int, amp: Callable, scaler: torch.amp.GradScaler) -> Tensor:
    """Adds the gradients of one step, equation 10 over `accumulate` micro batches -> (2,) its content and context loss."""
    total = torch.zeros(2, device=teacher.visual.pos_embed.device)
    for micro_step, (images, indices) in enumerate(batches):
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

    images: uint8 (3, H, W) each. The grid of an image depends on SEED, epoch and its index alone.
    """
    device = teacher.visual.pos_embed.device
    images = [image.to(device, non_blocking=True) for image in images]
    grids = [draw_grid(f"{cfg.SEED}-{epoch}-{index}", cfg.GRID, cfg.GRID_ASPECT, cfg.MAX_CROPS) for index in indices]
    inputs = torch.stack([student_image(image, cfg.IMAGE_SIZE, teacher.mean, teacher.std) for image in images])
    boxes = [grid_boxes(image, grid, cfg.IMAGE_SIZE) for image, grid in zip(images, grids)]
    regions, context = student(inputs, boxes)
    with torch.no_grad():
        crops = teacher.encode_image(torch.cat([
            grid_crops(image, grid, cfg.CROP_SIZE, teacher.mean, teacher.std, cfg.KEEP_ASPECT)
            for image, grid in zip(images, grids)]))
    content = content_loss(regions, crops, [len(grid.cells) for grid in grids])
    if vfm is None:
        return content, torch.zeros_like(content)
    vfm_size = cfg.IMAGE_SIZE // teacher.patch_size * vfm.patch_size
    vfm_inputs = torch.stack([student_image(image, vfm_size, vfm.mean, vfm.std) for image in images])
    return content, context_loss(context, vfm(vfm_inputs))


class Log:
    """Means over some steps and all ranks, a line of json each, without a device synchronisation in between."""

    def __init__(self, cfg: SimpleNamespace, ranks: distributed.Ranks, first_step: int):
        self.cfg, self.ranks = cfg, ranks
        self.sums, self.steps, self.since = torch.zeros(2, device=ranks.device), 0, time.perf_counter()
        self.path = Path(cfg.OUT) / "log.jsonl"
        if ranks.is_main:
            # Steps after the checkpoint that a run goes on from are made again.
            lines = self.path.read_text().splitlines(keepends=True) if first_step and self.path.exists() else []
            whole = [line for line in lines if line.endswith("\n")]      # a killed run may leave half a line
            self.path.write_text("".join(line for line in whole if json.loads(line)["step"] <= first_step))

    def add(self, content_and_context: Tensor) -> None:
        """Takes one step's losses, (2,)."""
        self.sums += content_and_context
        self.steps += 1

    def write(self, step: int, epoch: int, lr: float) -> None:
        """Writes a line on the steps since the last one; UserError if their losses are not finite."""
        content, context = (distributed.sum_over_ranks(self.sums) / self.steps / self.ranks.world).tolist()
        if not math.isfinite(content + context):
            raise UserError(f"The losses are {content} and {context} at step {step}; {self.cfg.OUT} keeps the last "
                            "checkpoint before that, so lower LR, or look at the images, and go on from there.")
        seconds = time.perf_counter() - self.since
        line = {"step": step, "epoch": epoch, "loss": content + self.cfg.LAMBDA * context, "content": content,
                "context": context, "lr": lr, "images_per_second": round(self.steps * self.cfg.BATCH_SIZE / seconds, 2),
                "memory_mb": peak_memory(self.ranks.device)}
        if self.ranks.is_main:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
            tqdm.write("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                                 for key, value in line.items()))
        self.sums, self.steps, self.since = torch.zeros_like(self.sums), 0, time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """The most memory used so far in MB: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    import resource  # here, because Windows has none
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


def save(cfg: SimpleNamespace, step: int, dataset: TrainingImages, student: DeCLIP, teacher: DeCLIP,
         optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Writes the model (declip.safetensors) and all that resuming needs (resume.pt), each whole or not at all."""
    student.save(Path(cfg.OUT) / "declip.safetensors", vars(cfg) | {"step": step}, teacher, cfg.ENSEMBLE)
    trained = {name: parameter.detach() for name, parameter in student.named_parameters() if parameter.requires_grad}
    state = {"step": step, "settings": vars(cfg), "images": dataset.fingerprint, "student": trained,
             "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    write_whole(Path(cfg.OUT) / "resume.pt", lambda file: torch.save(state, file))


# Settings that may differ when a run is resumed: the rest would make it another run.
HARMLESS = ("OUT", "RESUME", "MICRO_BATCH", "WORKERS", "LOG_EVERY", "SAVE_EVERY", "STEPS", "IMAGES", "IMAGE_ROOT")


def find_resume(cfg: SimpleNamespace, dataset: TrainingImages) -> dict | None:
    """The state to go on from, None for a new run.

    Raises UserError if OUT holds a run that is not to be resumed, or one with other settings or images.
    """
    path = Path(cfg.OUT) / "resume.pt"
    if not path.exists():
        return None
    if not cfg.RESUME:
        raise UserError(f"{cfg.OUT} already holds a run; go on with it by --resume, or set OUT to another folder.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        raise UserError(f"{path} is damaged; remove it, and begin anew in another OUT.") from None
    now, then = vars(cfg), state["settings"]
    changed = next((name for name in now if name not in HARMLESS and now[name] != then.get(name)), None)
    if changed:
        raise UserError(f"The run in {cfg.OUT} was begun with {changed} {then.get(changed)}, but now it is {now[changed]}; "
                         "resume with the old value, or set OUT to another folder.")
    if state["images"] != dataset.fingerprint:
        raise UserError(f"The run in {cfg.OUT} was begun with {state['images']} (number, checksum of names), but {cfg.IMAGES} "
                        f"has {dataset.fingerprint}; resume with the same images, or set OUT to another folder.")
    return state


def restore(state: dict, student: DeCLIP, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """Puts a saved state back and returns its step."""
    student.load_state_dict(state["student"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] and scaler.is_enabled():     # another GPU may compute in another precision
        scaler.load_state_dict(state["scaler"])
    return state["step"]


if __name__ == "__main__":
    main()
