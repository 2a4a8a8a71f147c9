"""Trains CAT-Seg over a DeCLIP or CLIP with labelled images -> catseg.safetensors (Tables 4, 9).

Four GPUs:      torchrun --nproc_per_node 4 -m downstream.catseg.train \\
                    --ckpt out/declip/declip.safetensors
One:            python -m downstream.catseg.train --ckpt out/declip/declip.safetensors
Another CLIP:   python -m downstream.catseg.train @presets/catseg_openai.txt
Resume:         the same command with --resume

Every constant below is an option. The defaults are the published system's, over an EVA02-B/16. The
total batch is BATCH_SIZE on any number of GPUs. What is trained is written to catseg.safetensors,
which needs no other file: evaluate it with python -m downstream.catseg.eval.
"""

import math
import shlex
import sys
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from data import normalize, training_batches
from downstream.catseg.data import Labelled, LabelledImages, augment, find_training
from downstream.catseg.model import CATSeg, Design
from eval_seg import (  # noqa: F401 - settings shared with eval_seg.py
    ATTENTION,
    CKPT,
    CONTEXT,
    MODEL,
    PRETRAINED,
    SCALE,
)
from model import open_model
from train import (  # noqa: F401 - settings shared with train.py
    KEEP,
    LOG_EVERY,
    MAX_BAD_FILES,
    MAX_BAD_STEPS,
    NUM_WORKERS,
    READ_TIMEOUT,
    TIMEOUT,
)
from util import UserError, distributed, settings
from util.precision import autocast, check_precision, grad_scaler
from util.run import Run

# What is read and written
IMAGES = "coco_stuff"               # labelled images: coco_stuff, toy, or a json (docs/data.md)
DATA = "data"                       # folder that holds the data sets in their original layouts
OUT = "out/catseg"                  # folder of the run: catseg.safetensors, log.jsonl, checkpoints
RESUME = False                      # go on with the run in OUT from its last checkpoint

# The model, besides its CLIP: CKPT, or MODEL with PRETRAINED
IMAGE_SIZE: int | None = None       # side of a crop; None: 24 patches (384 for B/16, 336 for L/14)
NORMALIZE = True                    # guide by L2-normalised content (published: not for OpenAI's)
WIDTH = 128                         # of the aggregator; smaller is faster
HEADS = 4                           # of its attention
LAYERS = 2                          # of its aggregation
MAX_CLASSES = 256                  # fewer are padded; of more, the most similar ones are kept
TEMPLATE = "A photo of a {} in the scene"       # the sentence that names a class

# The optimisation
BATCH_SIZE = 4                      # images of one optimiser step, over all GPUs
MICRO_BATCH = 1                     # most images of a forward pass; raise it as memory permits
ITERATIONS = 80_000                 # optimiser steps of the whole training
STEPS: int | None = None            # stop here, to go on with --resume; None: after ITERATIONS
LR = 2e-4                           # learning rate at the first step; then cosine to 0
CLIP_LR = 0.01                      # share of it that the weights inside CLIP have
WEIGHT_DECAY = 1e-4                 # of all weights but norms'
CLIP_NORM = 0.01                    # most that the gradient's norm may be; longer ones are cut
PRECISION = "fp32"                  # bf16, fp16: faster, but published as fp32 with TF32's products
TF32 = True                         # fp32 products with 10 bits on a GPU
SEED = 0                            # of the first weights, of the images' order and augmentation

# The machinery
CHECKPOINTING = False               # compute CLIP's blocks again in backward: less memory
SAVE_EVERY = 5000                   # steps between checkpoints


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
    benchmark, names = find_training(cfg.IMAGES)
    dataset = LabelledImages(benchmark, cfg.DATA, cfg.READ_TIMEOUT)
    steps_per_epoch = plan(cfg, dataset)
    with Run(cfg, ranks, dataset, steps_per_epoch, "catseg.safetensors", MAY_CHANGE_ON_RESUME) as run:
        segmenter = build(cfg, names, ranks.device)
        optimizer = build_optimizer(cfg, segmenter)
        scaler = grad_scaler(cfg.PRECISION, ranks.device)
        run.begin(segmenter, optimizer, scaler, segmenter.save)
        student = distributed.wrap(segmenter, ranks)
        batches = training_batches(cfg, dataset, micro_batch, run.step, ranks)

        for step in range(run.step, run.last):
            epoch, lr = step // steps_per_epoch, set_learning_rate(cfg, optimizer, step)
            # 1. Loss and gradients, one micro batch after the other
            for micro_step in range(accumulate):
                samples, indices, skipped = next(batches)
                images, labels = make_views(cfg, segmenter, samples, indices, epoch)
                with distributed.synchronized(student, micro_step == accumulate - 1):
                    with autocast(cfg.PRECISION, ranks.device):
                        loss = student(images, labels)
                    scaler.scale(loss / accumulate).backward()
                run.record({"loss": loss}, indices, skipped)
            # 2. The optimiser's step; the scaler leaves it out if the gradient is not finite
            run.check_gradient()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained(segmenter), cfg.CLIP_NORM)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            # 3. Log, checkpoint, signals
            if run.end_step(lr):
                break
        run.finish()
    if ranks.is_main:
        print(f"{run.model_path} holds the segmenter after {run.step} steps; evaluate it with "
              f"python -m downstream.catseg.eval --ckpt {shlex.quote(str(run.model_path))}")


def make_views(cfg: SimpleNamespace, segmenter: CATSeg, samples: list[Labelled],
               indices: list[int], epoch: int) -> tuple[Tensor, Tensor]:
    """Normalised crops (B, 3, S, S) and their labels (B, S, S), from SEED, epoch and index."""
    clip, size = segmenter.clip, segmenter.design.image_size
    views = [augment(sample, size, f"{cfg.SEED}-{epoch}-{index}")
             for sample, index in zip(samples, indices)]
    images, labels = map(torch.stack, zip(*views))
    return normalize(images, clip.mean, clip.std), labels


# ---------------------------------------------------------------------------------- the set-up

# Settings that may differ when a run is resumed, besides those of util/run.py.
MAY_CHANGE_ON_RESUME = ("DATA", "READ_TIMEOUT", "CHECKPOINTING")


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting out of its range, before anything is loaded."""
    settings.check_min(cfg, BATCH_SIZE=1, MICRO_BATCH=1, ITERATIONS=1, STEPS=1, LOG_EVERY=1,
                         SAVE_EVERY=1, KEEP=1, MAX_BAD_STEPS=1, MAX_BAD_FILES=0, IMAGE_SIZE=1,
                         WIDTH=16, HEADS=1, LAYERS=1, MAX_CLASSES=1, NUM_WORKERS=0,
                         READ_TIMEOUT=0.001, TIMEOUT=1, LR=0, CLIP_LR=0, WEIGHT_DECAY=0)
    check_precision(cfg.PRECISION)
    if not cfg.CLIP_NORM > 0:
        raise UserError(f"CLIP_NORM is {cfg.CLIP_NORM}; it must be above 0.")
    if not 0 <= cfg.SEED < 2**40:
        raise UserError(f"SEED is {cfg.SEED}; it must be from 0 to 2**40.")


def plan(cfg: SimpleNamespace, dataset: LabelledImages) -> int:
    """Sets EPOCHS and STEPS, which the run's machinery counts in -> the steps of an epoch.

    Raises UserError if a label is of another data set, or if there are too few images.
    """
    dataset.read(0)
    steps_per_epoch = len(dataset.order(cfg.BATCH_SIZE, 0, cfg.SEED))
    cfg.EPOCHS = math.ceil(cfg.ITERATIONS / steps_per_epoch)
    cfg.STEPS = min(cfg.STEPS or cfg.ITERATIONS, cfg.ITERATIONS)
    return steps_per_epoch


def build(cfg: SimpleNamespace, names: list[str], device: torch.device) -> CATSeg:
    """The segmenter of the settings, on the device, with what trains left trainable."""
    clip = open_model(cfg)
    size = cfg.IMAGE_SIZE or 24 * clip.patch_size
    torch.manual_seed(cfg.SEED)
    segmenter = CATSeg(clip, Design(size, cfg.ATTENTION, cfg.NORMALIZE, cfg.WIDTH, cfg.HEADS,
                                    cfg.LAYERS, cfg.MAX_CLASSES, cfg.TEMPLATE))
    segmenter.set_classes(names)
    segmenter.freeze()
    clip.visual.checkpointing = cfg.CHECKPOINTING
    return segmenter.to(device).train()


def trained(segmenter: CATSeg) -> list[nn.Parameter]:
    """The weights that training changes."""
    return [parameter for parameter in segmenter.parameters() if parameter.requires_grad]


def build_optimizer(cfg: SimpleNamespace, segmenter: CATSeg) -> torch.optim.AdamW:
    """AdamW; norms without weight decay, the weights inside CLIP at CLIP_LR of the rate."""
    of_clip = {*segmenter.clip.parameters()}
    of_norms = {parameter for module in segmenter.modules()
                if isinstance(module, nn.LayerNorm | nn.GroupNorm)
                for parameter in module.parameters()}
    own = [parameter for parameter in trained(segmenter) if parameter not in of_clip]
    groups = [{"params": [p for p in own if p not in of_norms]},
              {"params": [p for p in own if p in of_norms], "weight_decay": 0.0},
              {"params": [p for p in trained(segmenter) if p in of_clip], "share": cfg.CLIP_LR}]
    for group in groups:
        group.setdefault("share", 1.0)
    return torch.optim.AdamW(groups, lr=cfg.LR, weight_decay=cfg.WEIGHT_DECAY, fused=True)


def set_learning_rate(cfg: SimpleNamespace, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Sets the learning rates of a step, a cosine from LR to 0, and returns the aggregator's."""
    lr = cfg.LR / 2 * (1 + math.cos(math.pi * step / cfg.ITERATIONS))
    for group in optimizer.param_groups:
        group["lr"] = lr * group["share"]
    return lr


if __name__ == "__main__":
    main()
