"""Trains F-ViT: a DeCLIP, labelled boxes of some classes -> fvit.safetensors, a detector of any.

OV-COCO on eight GPUs:      torchrun --nproc_per_node 8 -m downstream.fvit.train
OV-LVIS:                    torchrun ... -m downstream.fvit.train @presets/fvit_train_ovlvis.txt
Your own COCO-style json:   python -m downstream.fvit.train --dataset my.json --images my/photos \\
                                --novel "cat, dog" --batch_size 8
Plain CLIP's detector:      ... --backbone none --attention clip
Resume:                     the same command with --resume

The backbone is frozen and never saved: fvit.safetensors has its checksum, and evaluation
(`python -m downstream.fvit.eval`) refuses another. Defaults are the published ones for OV-COCO and
B/16. Every constant below is an option.
"""

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from data import training_batches
from downstream.detection import DetectionData, Objects, augment, find_annotations
from downstream.fvit.model import Design, FViT, Target, check_design, encode_names, open_backbone
from train import (  # noqa: F401 - settings shared with train.py
    KEEP,
    LOG_EVERY,
    MAX_BAD_FILES,
    MAX_BAD_STEPS,
    NUM_WORKERS,
    READ_TIMEOUT,
    SAVE_EVERY,
    TIMEOUT,
    build_optimizer,
)
from util import UserError, distributed, settings
from util.precision import autocast, check_precision, grad_scaler
from util.run import Run

# What is read and written
DATASET = "ovcoco"                  # ovcoco, ovlvis, toy, or a COCO-style json of your own
DATA = "data"                       # folder that holds the data sets
ANNOTATIONS: str | None = None      # json instead of the data set's, such as instances_..._seen_2
IMAGES: str | None = None           # folder of its images instead of the data set's
NOVEL: str | None = None            # names that training may not see, instead of the data set's
OUT = "out/fvit"                    # folder of the run: fvit.safetensors, log.jsonl, checkpoints
RESUME = False                      # go on with the run in OUT from its last checkpoint

# The backbone, which stays as it is
BACKBONE: str | None = "out/declip/declip.safetensors"  # checkpoint of train.py, or a published .pt
MODEL: str | None = None            # open_clip model; None: the checkpoint's, else EVA02-B-16
PRETRAINED: str | None = "merged2b_s8b_b131k"   # MODEL's weights, unless BACKBONE names its model
CONTEXT: str | None = None          # of train.py, such as q or qk; None: the checkpoint's, else q
SCALE: float | None = None          # factor of the last block's logits; None: the checkpoint's
ATTENTION: str | None = None        # clip, maskclip, sclip, clearclip: a baseline; None: CONTEXT's
NORMALIZATION = "imagenet"          # mean and std of the input: imagenet (published), clip: MODEL's
TEMPLATES = "vild"                  # vild: 63 sentences (published); imagenet, simple, or one of {}
CACHE: str | None = "out/cache"     # folder that keeps embeddings of class names; None: none

# The detector
IMAGE_SIZE = 640                    # side of the square; OV-LVIS: 1024; L/14: 896
CHANNELS = 256                      # of the pyramid and the heads
MASKS = False                       # a mask head; OV-LVIS
NORM = "batch"                      # batch: statistics over all GPUs' images; group: of each image
RPN_NORM = False                    # norms in the proposals' head; OV-LVIS

# What it is trained with
SCALES = (0.1, 2.0)                 # range of the longest side, in sides of the square
FLIP = 0.5                          # share of images that are mirrored
CANDIDATES = 2000                   # best anchors of a level, before NMS
PROPOSALS = 1000                    # proposals of an image, after it
ANCHORS = 256                       # anchors of an image that are trained with
REGIONS = 512                       # regions of an image that are trained with
KEEP_BEST = False                   # the best region of an object is always positive; OV-LVIS
BACKGROUND = 0.6                    # weight of background regions; OV-LVIS: 0.9

# The optimisation
BATCH_SIZE = 64                     # images of one optimiser step, over all GPUs
MICRO_BATCH = 8                     # most images of a forward pass; fewer: norms know fewer images
EPOCHS = 3                          # passes over the images; OV-LVIS: 48
STEPS: int | None = None            # stop here, to go on with --resume; None: after EPOCHS
LR = 1e-4                           # peak learning rate
WARMUP = 250                        # steps of linear warm-up, from a thousandth of LR
LR_DROPS: tuple[int, ...] = ()      # epochs after which LR falls to a tenth; OV-LVIS: 32 44
CLIP_NORM = 1.0                     # longest gradient
WEIGHT_DECAY = 0.1                  # of matrices; biases, norms and tau have none
BETAS = (0.9, 0.999)                # of AdamW
EPS = 1e-8                          # of AdamW
PRECISION = "auto"                  # bf16, fp16, fp32; auto: bf16 or fp16 on a GPU, fp32 on a CPU
TF32 = False                        # fp32 products with 10 bits on a GPU: faster, the losses' too
SEED = 0                            # of the order of images, their crops, and what is sampled


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line (or `argv`) says."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__, cfg.TF32) as ranks:
        train(cfg, ranks)


def train(cfg: SimpleNamespace, ranks: distributed.Ranks) -> None:
    """The whole of training: one loop for one process and many."""
    check(cfg)
    micro_batch, accumulate = distributed.divide_batch(cfg.BATCH_SIZE, cfg.MICRO_BATCH,
                                                       ranks.world_size)
    dataset = DetectionData(find_annotations(cfg, "train"), cfg.MASKS, cfg.READ_TIMEOUT)
    steps_per_epoch = len(dataset.order(cfg.BATCH_SIZE, 0, cfg.SEED))
    with Run(cfg, ranks, dataset, steps_per_epoch, "fvit.safetensors", MAY_CHANGE_ON_RESUME) as run:
        fvit = build(cfg, dataset, ranks)
        optimizer = build_optimizer(cfg, fvit)
        scaler = grad_scaler(cfg.PRECISION, ranks.device)
        run.begin(fvit, optimizer, scaler, fvit.save)
        detector = distributed.wrap(fvit, ranks)
        batches = training_batches(cfg, dataset, micro_batch, run.step, ranks)

        for step in range(run.step, run.last):
            lr = set_learning_rate(cfg, optimizer, step, steps_per_epoch)
            # 1. Losses and gradients, one micro batch after the other
            for micro_step in range(accumulate):
                data, indices, skipped = next(batches)
                images, targets = views(cfg, data, step // steps_per_epoch, indices)
                with distributed.synchronized(detector, micro_step == accumulate - 1):
                    with autocast(cfg.PRECISION, ranks.device):
                        losses = detector(images, targets)
                    loss = sum(losses.values())
                    scaler.scale(loss / accumulate).backward()
                run.record({"loss": loss, **losses}, indices, skipped)
            # 2. The optimiser's step; the scaler leaves it out if the gradient is not finite
            run.check_gradient()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(fvit.parameters(), cfg.CLIP_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            # 3. Log, checkpoint, signals
            if run.end_step(lr):
                break
        run.finish()
    if ranks.is_main:
        print(f"{run.model_path} holds the detector after {run.step} steps; evaluate it with "
              f"python -m downstream.fvit.eval --ckpt {shlex.quote(str(run.model_path))}")


def views(cfg: SimpleNamespace, data: list[Objects], epoch: int, indices: list[int]
          ) -> tuple[list[Tensor], list[Target]]:
    """Images with their objects, resized, cropped and flipped as SEED, epoch and index say."""
    keys = [f"{cfg.SEED}-{epoch}-{index}" for index in indices]
    seen = [augment(objects, key, cfg.IMAGE_SIZE, cfg.SCALES, cfg.FLIP)
            for objects, key in zip(data, keys)]
    return [each.image for each in seen], [Target(each.boxes, each.labels, each.masks, key)
                                           for each, key in zip(seen, keys)]


# ---------------------------------------------------------------------------------- the set-up

# Settings that may differ when a run is resumed, besides those of util/run.py.
MAY_CHANGE_ON_RESUME = ("DATA", "ANNOTATIONS", "IMAGES", "CACHE", "READ_TIMEOUT")


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting out of its range, before anything is loaded."""
    settings.check_min(cfg, BATCH_SIZE=1, MICRO_BATCH=1, EPOCHS=1, STEPS=1, LOG_EVERY=1,
                         SAVE_EVERY=1, KEEP=1, MAX_BAD_STEPS=1, MAX_BAD_FILES=0, IMAGE_SIZE=1,
                         CHANNELS=1, CANDIDATES=1, PROPOSALS=1, ANCHORS=2, REGIONS=4,
                         BACKGROUND=0, WARMUP=0, NUM_WORKERS=0, READ_TIMEOUT=0.001, TIMEOUT=1,
                         LR=0, CLIP_NORM=0, WEIGHT_DECAY=0, EPS=0)
    check_precision(cfg.PRECISION)
    check_design(design_of(cfg))
    has_betas = len(cfg.BETAS) == 2 and all(0 <= beta < 1 for beta in cfg.BETAS)
    has_scales = len(cfg.SCALES) == 2 and 0 < cfg.SCALES[0] <= cfg.SCALES[1] <= 10
    expected = {"SCALES": (has_scales, "two numbers, 0 < least <= most <= 10"),
                "FLIP": (0 <= cfg.FLIP <= 1, "a share, from 0 to 1"),
                "SEED": (0 <= cfg.SEED < 2**40, "from 0 to 2**40"),
                "LR_DROPS": (all(epoch >= 1 for epoch in cfg.LR_DROPS), "epochs, from 1"),
                "BETAS": (has_betas, "two numbers from 0 to 1")}
    for name, (fits, what) in expected.items():
        if not fits:
            raise UserError(f"{name} is {getattr(cfg, name)!r}; it must be {what}.")


def design_of(cfg: SimpleNamespace) -> Design:
    """The settings that say what a detector is."""
    return Design(**{name: getattr(cfg, name.upper()) for name in Design._fields})


def build(cfg: SimpleNamespace, dataset: DetectionData, ranks: distributed.Ranks) -> FViT:
    """The detector on its frozen backbone, in training mode; with several GPUs its norms share
    their statistics. On CPUs they don't: PyTorch has no such norm there."""
    if cfg.BACKBONE and not Path(cfg.BACKBONE).is_file():
        raise UserError(f"There is no backbone {cfg.BACKBONE}; train.py writes declip.safetensors, "
                        "or say --backbone none --attention clip for plain CLIP.")
    clip = open_backbone(vars(cfg)).to(ranks.device)
    text = encode_names(clip, dataset.classes, cfg.TEMPLATES, cfg.CACHE)
    torch.manual_seed(cfg.SEED)     # of the first weights
    fvit = FViT(clip, dataset.classes, dataset.seen, design_of(cfg), text).to(ranks.device)
    if ranks.world_size > 1 and ranks.device.type == "cuda":
        fvit = nn.SyncBatchNorm.convert_sync_batchnorm(fvit)
    return fvit.train()


def set_learning_rate(cfg: SimpleNamespace, optimizer: torch.optim.Optimizer, step: int,
                      steps_per_epoch: int) -> float:
    """Sets the optimiser's learning rate for a step, and returns it."""
    lr = learning_rate(cfg, step, steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def learning_rate(cfg: SimpleNamespace, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up from LR / 1000 to LR, then a tenth after each epoch of LR_DROPS."""
    share = min(1.0, 0.001 + 0.999 * step / cfg.WARMUP) if cfg.WARMUP else 1.0
    drops = sum(step >= epoch * steps_per_epoch for epoch in cfg.LR_DROPS)
    return cfg.LR * share * 0.1**drops


if __name__ == "__main__":
    main()
