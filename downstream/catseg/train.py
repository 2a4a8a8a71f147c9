"""Trains CAT-Seg over a DeCLIP or CLIP with labelled images -> catseg.safetensors (Tables 4, 9).

Four GPUs:      torchrun --nproc_per_node 4 -m downstream.catseg.train \\
                    --ckpt out/declip/declip.safetensors
One:            python -m downstream.catseg.train --ckpt out/declip/declip.safetensors
Another CLIP:   python -m downstream.catseg.train @presets/catseg_openai.txt
Resume:         the same command with --resume

Every constant below is an option, and so are those of the blocks that SHARED names. The defaults
are the published system's, over an EVA02-B/16. The total batch is BATCH_SIZE on any number of GPUs.
What is trained is written to catseg.safetensors, which needs no other file: evaluate it with
python -m downstream.catseg.eval.
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from data import normalize, training_batches
from downstream.catseg.data import LabelledImages, augment, find_training
from downstream.catseg.model import CATSeg, Design
from eval_region import open_model
from util import distributed, settings
from util.labels import NOT_IN_DATA
from util.run import Run, check_training
from util.samples import Batch

SHARED = {"eval_region": ["The model"], "util.run": ["The machinery"]}

# What is read and written
IMAGES = "coco_stuff"               # labelled images: coco_stuff, or a json (docs/data.md)
DATA = "data"                       # folder that holds the data sets in their original layouts
OUT = "out/catseg"                  # folder of the run: catseg.safetensors, log.jsonl, checkpoints
RESUME = False                      # go on with the run in OUT from its last checkpoint

# The aggregator
IMAGE_SIZE: int | None = None       # side of a crop; None: 24 patches (384 for B/16, 336 for L/14)
RESIZE = "pil"                      # how images are resized: pil (published), cv2, bicubic
NORMALIZE = True                    # guide by L2-normalised content (published: not for OpenAI's)
WIDTH = 128                         # of the aggregator; smaller is faster
HEADS = 4                           # of its attention
LAYERS = 2                          # of its aggregation
MAX_CLASSES = 256                   # fewer are padded; of more, the most similar ones are kept
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
    settings.refuse_unused(cfg, DATA=cfg.IMAGES.endswith(".json") and NOT_IN_DATA)
    scenes, names = find_training(cfg.IMAGES, cfg.DATA)
    dataset = LabelledImages(scenes, cfg.READ_TIMEOUT)
    dataset.look()      # a label of another data set is found before a model is loaded
    with Run(cfg, ranks, dataset, "catseg.safetensors", MAY_CHANGE_ON_RESUME,
             total=cfg.ITERATIONS) as run:
        model = build(cfg, names).to(ranks.device)
        loss_of = run.begin(model, build_optimizer(cfg, model), model.save)
        batches = training_batches(dataset, run)

        for step in run.steps():
            # 1. Loss and gradients, one micro batch after the other
            for batch in run.micro_batches(batches):
                images, labels = make_views(model, batch, f"{cfg.SEED}-{run.epoch}")
                with run.forward():
                    loss = loss_of(images, labels)
                run.backward(loss, {}, batch)
            # 2. The optimiser's step, by a learning rate that falls from LR to 0 as a cosine
            run.end_step(learning_rate(cfg, step), cfg.CLIP_NORM)
    run.say_end("python -m downstream.catseg.eval --ckpt", Path(cfg.DATA) / "VOCdevkit/VOC2012",
                "tools.segment")


def make_views(model: CATSeg, batch: Batch, key: str) -> tuple[Tensor, Tensor]:
    """Normalised crops (B, 3, S, S) and their labels (B, S, S), by `key` and the images' indices.
    """
    views = [augment(sample, model.design.image_size, f"{key}-{index}", model.design.resize)
             for sample, index in zip(batch.data, batch.indices)]
    images, labels = map(torch.stack, zip(*views))
    return normalize(images, model.clip.mean, model.clip.std), labels


# ---------------------------------------------------------------------------------- the set-up

MAY_CHANGE_ON_RESUME = ("DATA", "CHECKPOINTING")        # besides those of util/run.py


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting out of its range, before anything is loaded."""
    check_training(cfg)
    settings.check_min(cfg, WIDTH=16, HEADS=1, LAYERS=1, MAX_CLASSES=1, CLIP_LR=0)
    settings.check(cfg, CLIP_NORM=(cfg.CLIP_NORM > 0, "above 0"))


def build(cfg: SimpleNamespace, names: list[str]) -> CATSeg:
    """The model of the settings for these classes, with what trains left trainable."""
    clip = open_model(cfg)
    clip.visual.checkpointing = cfg.CHECKPOINTING
    size = cfg.IMAGE_SIZE or 24 * clip.patch_size
    torch.manual_seed(cfg.SEED)
    model = CATSeg(clip, Design(size, cfg.ATTENTION, cfg.NORMALIZE, cfg.WIDTH, cfg.HEADS,
                                cfg.LAYERS, cfg.MAX_CLASSES, cfg.TEMPLATE, cfg.RESIZE))
    model.set_classes(names)
    model.freeze()
    return model.train()


def build_optimizer(cfg: SimpleNamespace, model: CATSeg) -> torch.optim.AdamW:
    """AdamW; norms without weight decay, the weights inside CLIP at a share CLIP_LR of the rate."""
    of_clip = {*model.clip.parameters()}
    of_norms = {parameter for module in model.modules()
                if isinstance(module, nn.LayerNorm | nn.GroupNorm)
                for parameter in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = [parameter for parameter in trained if parameter not in of_clip]
    groups = [{"params": [p for p in own if p not in of_norms]},
              {"params": [p for p in own if p in of_norms], "weight_decay": 0.0},
              {"params": [p for p in trained if p in of_clip], "share": cfg.CLIP_LR}]
    return torch.optim.AdamW(groups, lr=cfg.LR, weight_decay=cfg.WEIGHT_DECAY, fused=True)


def learning_rate(cfg: SimpleNamespace, step: int) -> float:
    """The aggregator's rate of a step, a cosine from LR to 0."""
    return cfg.LR / 2 * (1 + math.cos(math.pi * step / cfg.ITERATIONS))


if __name__ == "__main__":
    main()
