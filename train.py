"""Trains DeCLIP: a CLIP, a vision foundation model (VFM), unlabelled images -> declip.safetensors.

One GPU (or a CPU):           python train.py --images data/coco/train2017
Eight GPUs:                   torchrun --nproc_per_node 8 train.py --images data/coco/train2017
Two machines of eight GPUs:   torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d \\
                                  --rdzv_endpoint HOST:29500 train.py
Resume an interrupted run:    the same command with --resume

Every constant below is an option: `--lr 2e-5`. Defaults are the paper's; `@presets/published.txt`
has what the published scripts do instead. The total batch is BATCH_SIZE on any number of GPUs.
"""

import copy
import math
import sys
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from data import (
    Grid,
    grid_boxes,
    grid_crops,
    image_tokens,
    sample_grid,
    student_image,
    training_batches,
)
from model import (
    CONTEXTS,
    DECOUPLED,
    VFM,
    DeCLIP,
    VisionTower,
    content_loss,
    context_loss,
    load_vfm,
)
from util import UserError, distributed, hub, settings
from util.run import Run, check_training
from util.samples import find_images
from util.sharding import shard
from util.weights import read_record, used_record

# What is read and written
IMAGES = "data/coco/train2017"      # folder of images, a json, or tar shards, "x/{000..123}.tar"
IMAGE_ROOT: str | None = None       # folder of a COCO-style json's images; None: the json's own
OUTSIDE_ROOT = False                # a json may name images that are not below that folder
OUT = "out/declip"                  # folder of the run: declip.safetensors, log.jsonl, checkpoints
RESUME = False                      # go on with the run in OUT from its last checkpoint

# The model
MODEL = "EVA02-B-16"                # open_clip model of student and teacher (docs/backbones.md)
PRETRAINED: str | None = "merged2b_s8b_b131k"   # its weights: a tag or a file; None: random
CONTEXT = "q"                       # of X_context: q, k, qk; not decoupled: clip, maskclip, values
SCALE: float | None = None          # factor of the last block's logits; None: 1/√d; published: 1
UNLOCKED_BLOCKS: int | None = None  # attention blocks trained, from the end; None: all (paper)
ENSEMBLE = 1.0                      # share of the student in the saved weights, the rest is CLIP
VFM_MODEL = "vit_base_patch14_dinov2.lvd142m"   # any timm ViT (docs/backbones.md)
VFM_PRETRAINED = True               # False: random weights, to try the machinery offline

# The views
IMAGE_SIZE = 560                    # of the student, longest side; larger is better and slower
GRID = (1, 6)                       # range of the numbers of rows and columns of the crop grid
GRID_ASPECT: float | None = None    # largest ratio of rows and columns; None: any; published: 2
MAX_CROPS: int | None = None        # crops of an image; None: all; published: 20; less saves memory
CROP_SIZE = 224                     # side of a crop for the teacher; a multiple of its patch size
KEEP_ASPECT = False                 # pad crops instead of stretching them to a square (published)
MAX_PIXELS: int | None = 16_000_000     # larger images are reduced as they are decoded; None: never

# The optimisation
LAMBDA = 0.25                       # weight of the context loss; 0: self-distillation, no VFM
PADDING = True                      # black padding counts in the context loss, as published
BATCH_SIZE = 16                     # images of one optimiser step, over all GPUs
MICRO_BATCH = 4                     # most images of a forward pass; lower it if memory runs out
EPOCHS = 6                          # passes over the images
STEPS: int | None = None            # stop here, to go on with --resume; None: after EPOCHS
LR = 1e-5                           # peak learning rate
WARMUP = 1000                       # steps of linear warm-up, at most a tenth; then cosine to 0
WEIGHT_DECAY = 0.1                  # of matrices; biases and norms have none
BETAS = (0.9, 0.98)                 # of AdamW
EPS = 1e-6                          # of AdamW
PRECISION = "auto"                  # bf16, fp16, fp32; auto: bf16 or fp16 on a GPU, fp32 on a CPU
TF32 = False                        # fp32 products with 10 bits on a GPU: faster, the losses' too
SEED = 0                            # of the order of images and of their grids

# The machinery of this training; that of every training, from workers to checkpoints, is at the top
# of util/run.py
SHARED = {"util.run": ["The machinery"]}
COMPILE = False                     # torch.compile of every block; tools.bench shows what it gives
CHECKPOINTING = False               # compute blocks again in backward: less memory, 1/3 more time
FSDP = False                        # divide weights over the GPUs: for models too large for one


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line (or `argv`) says."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__, cfg.TF32) as ranks:
        train(cfg, ranks)


def train(cfg: SimpleNamespace, ranks: distributed.Ranks) -> None:
    """The whole of training: one loop for one process and many."""
    check(cfg)
    # Images in an order that depends on SEED alone; a folder of the run that can be gone on with
    images = find_images(cfg.IMAGES, cfg.IMAGE_ROOT, cfg.OUTSIDE_ROOT, cfg.READ_TIMEOUT,
                         cfg.MAX_PIXELS, ranks)
    with Run(cfg, ranks, images, "declip.safetensors", MAY_CHANGE_ON_RESUME) as run:
        # CLIP, whose vision tower is the student; its frozen first self; DINOv2 or another VFM
        clip, teacher, vfm = build(cfg, ranks)
        optimizer = build_optimizer(cfg, clip.visual)
        student = run.begin(clip, optimizer, trained=clip.visual, save=lambda path, about:
                            clip.save(path, about, teacher, cfg.ENSEMBLE))
        batches = training_batches(images, run)

        for step in run.steps():
            # 1. Losses and gradients, one micro batch after the other
            for batch in run.micro_batches(batches):
                grids = sample_grids(cfg, run.epoch, batch.indices)
                with run.forward():
                    losses = distill(cfg, student, teacher, vfm, batch.data, grids)
                    # Equation 10
                    loss = losses["content"] + cfg.LAMBDA * losses["context"]
                run.backward(loss, losses, batch)
            # 2. The optimiser's step, log, checkpoint, signals
            run.end_step(learning_rate(cfg, step, run.total))
    run.say_end("python eval_seg.py --ckpt", "data/VOCdevkit/VOC2012", "tools.segment")


def distill(cfg: SimpleNamespace, student: nn.Module, teacher: VisionTower, vfm: VFM | None,
            images: list[Tensor], grids: list[Grid]) -> dict[str, Tensor]:
    """The losses of a micro batch, scalars: content (equation 7) and context (equation 9).

    student: a VisionTower, also in DDP. images: uint8 (3, H, W) each, on the models' device.
    """
    # 1. The teachers first: the memory they need is free again when the student runs
    with torch.inference_mode():
        cls = teacher.encode_image(torch.cat([
            grid_crops(image, grid, cfg.CROP_SIZE, teacher.mean, teacher.std, cfg.KEEP_ASPECT)
            for image, grid in zip(images, grids)]))                            # (K, C)
        if vfm:
            size = vfm_size(cfg.IMAGE_SIZE, teacher, vfm)
            tokens = vfm(torch.stack([student_image(image, size, vfm.mean, vfm.std)
                                      for image in images]))                    # (B, N, D')
    # 2. The student: RoIAlign of its content at the crops' boxes, and X_context
    inputs = torch.stack([student_image(image, cfg.IMAGE_SIZE, teacher.mean, teacher.std)
                          for image in images])
    boxes = [grid_boxes(image, grid, cfg.IMAGE_SIZE) for image, grid in zip(images, grids)]
    regions, context = student(inputs, boxes)                           # (K, C), (B, N, D)
    # 3. Content distillation and context distillation
    content = content_loss(regions, cls, [len(grid.cells) for grid in grids])
    shown = None if cfg.PADDING else torch.stack([
        image_tokens(image, cfg.IMAGE_SIZE, teacher.patch_size) for image in images])   # (B, N)
    return {"content": content,
            "context": context_loss(context, tokens, shown) if vfm else torch.zeros_like(content)}


def sample_grids(cfg: SimpleNamespace, epoch: int, indices: list[int]) -> list[Grid]:
    """The crop grids of images in an epoch; they depend on SEED, epoch and index alone."""
    return [sample_grid(f"{cfg.SEED}-{epoch}-{index}", cfg.GRID, cfg.GRID_ASPECT, cfg.MAX_CROPS)
            for index in indices]


def vfm_size(image_size: int, clip: VisionTower, vfm: VFM) -> int:
    """The side of the VFM's image that gives it as many tokens as the student has."""
    return image_size // clip.patch_size * vfm.patch_size


# ---------------------------------------------------------------------------------- the set-up

# Settings that may differ when a run is resumed, besides those of util/run.py.
MAY_CHANGE_ON_RESUME = ("IMAGES", "IMAGE_ROOT", "OUTSIDE_ROOT", "COMPILE", "CHECKPOINTING")


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting out of its range, before anything is loaded."""
    check_training(cfg)
    settings.check_min(cfg, CROP_SIZE=1, MAX_CROPS=1, MAX_PIXELS=1, GRID_ASPECT=1,
                       UNLOCKED_BLOCKS=1, LAMBDA=0)
    has_grid = len(cfg.GRID) == 2 and 1 <= cfg.GRID[0] <= cfg.GRID[1] <= 100
    settings.check(cfg, CONTEXT=(cfg.CONTEXT in CONTEXTS, f"one of {', '.join(CONTEXTS)}"),
                   GRID=(has_grid, "two numbers, 1 <= least <= most <= 100"),
                   ENSEMBLE=(0 <= cfg.ENSEMBLE <= 1, "a share, from 0 to 1"))
    no_vfm = not cfg.LAMBDA and "is of the context loss, which LAMBDA 0 leaves out"
    no_json = not str(cfg.IMAGES).endswith(".json") and "is for a json, but IMAGES is none"
    settings.refuse_unused(
        cfg, VFM_MODEL=no_vfm, VFM_PRETRAINED=no_vfm, PADDING=no_vfm, IMAGE_ROOT=no_json,
        OUTSIDE_ROOT=no_json)
    used_record(cfg, None, None, DECOUPLED)
    file = hub.chosen(cfg.MODEL, cfg.PRETRAINED)[1]
    if file and read_record(file):
        raise UserError(f"{file} is a model that train.py made, whose [CLS] has changed "
                        "and can teach no more; give the weights of a CLIP.")


def build(cfg: SimpleNamespace, ranks: distributed.Ranks
          ) -> tuple[DeCLIP, VisionTower, VFM | None]:
    """The CLIP, whose vision tower is the student; that tower's frozen first self, the teacher of
    content; and the VFM, the teacher of context, None if λ is 0.

    Training reads no text: the text tower stays on the CPU, for the checkpoints.
    """
    # 1. CLIP, and its frozen copy
    torch.manual_seed(cfg.SEED)
    clip = DeCLIP(cfg.MODEL, cfg.PRETRAINED, cfg.CONTEXT, cfg.SCALE).requires_grad_(False)
    for name in ("IMAGE_SIZE", "CROP_SIZE"):
        size, patch = getattr(cfg, name), clip.patch_size
        if size % patch:
            raise UserError(f"{name} {size} is no multiple of {cfg.MODEL}'s patch size, {patch}; "
                            f"set it to {max(1, round(size / patch)) * patch}.")
    teacher = copy.deepcopy(clip.visual)
    clip.visual.freeze(cfg.UNLOCKED_BLOCKS)
    clip.visual.checkpointing = cfg.CHECKPOINTING
    # 2. The VFM: self-distillation alone needs none
    vfm = load_vfm(cfg.VFM_MODEL, cfg.VFM_PRETRAINED) if cfg.LAMBDA else None
    # 3. To the device, or divided over all ranks' devices
    towers = [tower for tower in (clip.visual, teacher, vfm) if tower]
    if cfg.FSDP:
        # Last blocks stay whole, because a decoupled one is computed in parts.
        for tower in towers:
            parts = tower.value_blocks if tower is clip.visual else 1
            shard(tower, tower.blocks[:-parts], ranks,
                  *(["encode_image"] if tower is teacher else []))
    else:
        for tower in towers:
            tower.to(ranks.device)
    if cfg.COMPILE:
        compile_blocks(clip.visual, teacher, vfm)
    return clip, teacher, vfm


def build_optimizer(cfg: SimpleNamespace, student: nn.Module) -> torch.optim.AdamW:
    """AdamW over what is trained; biases and norms without weight decay."""
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.WEIGHT_DECAY},
              {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.LR, betas=cfg.BETAS, eps=cfg.EPS, fused=True)


def learning_rate(cfg: SimpleNamespace, step: int, total: int) -> float:
    """Linear warm-up to LR, then a cosine that is 0 only after the last of `total` steps."""
    warmup = min(cfg.WARMUP, total // 10)
    if step < warmup:
        return cfg.LR * (step + 1) / warmup
    return cfg.LR / 2 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def compile_blocks(student: VisionTower, teacher: VisionTower, vfm: VFM | None) -> None:
    """torch.compile of each block in place; of the teacher for any number of crops."""
    # The limit counts all blocks of a class: of three models, trained and not.
    torch._dynamo.config.recompile_limit = 32
    # DDP would split graphs to send gradients early; blocks are small enough.
    torch._dynamo.config.optimize_ddp = False
    # It fails with sizes that vary, on GPUs with torch 2.11: pytorch/pytorch#181563.
    torch._inductor.config.triton.coalesce_tiling_analysis = False
    for block in (*student.trunk.blocks, *(vfm.trunk.blocks if vfm else ())):
        block.compile(dynamic=False)
    for block in teacher.trunk.blocks:
        block.compile(dynamic=True)


if __name__ == "__main__":
    main()
