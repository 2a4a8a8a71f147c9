"""Trains OV-DQUO: a DeCLIP, labelled boxes of some classes, unknown boxes -> a detector of any.

    python -m downstream.ov_dquo.unknown --ckpt out/fvit/fvit.safetensors   # the unknown boxes
OV-COCO:    torchrun --nproc_per_node 8 -m downstream.ov_dquo.train
OV-LVIS:    torchrun ... -m downstream.ov_dquo.train @presets/ov_dquo_ovlvis.txt
Your own:   python -m downstream.ov_dquo.train --dataset my.json --images my/photos \\
                --novel "cat, dog" --unknown none --batch_size 4
Resume:     the same command with --resume

The backbone is frozen and never saved, as F-ViT's. Defaults are the published ones where they were
published: for OV-LVIS. OV-COCO's with a ViT never were; they are our reading (docs/reproduce.md).
"""

import sys
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from data import training_batches
from downstream.detection import (
    Crops,
    DetectionData,
    Objects,
    augment_crop,
    find_annotations,
    val_images,
)
from downstream.detector import check_design, encode_names, open_backbone
from downstream.ov_dquo.model import OVDQUO, RANGES, Design, Target
from util import distributed, settings
from util.run import Run, check_training

SHARED = {"downstream.fvit.train": ["The data", "The backbone"], "util.run": ["The machinery"]}

# The run
OUT = "out/ov_dquo"                 # its folder: ov_dquo.safetensors, log.jsonl, checkpoints
RESUME = False                      # go on with the run in OUT from its last checkpoint

# Names
TEMPLATES = "imagenet"              # imagenet: 80 sentences (published); vild, simple, or one of {}

# What it is trained with
UNKNOWN: str | None = "out/unknown.json"    # boxes of unknown objects, of unknown.py; None: without
FLIP = 0.5                          # share of images that are mirrored
CROP = 0.5                          # share of images that are cropped
SHORT_SIDES = (400, 500, 600)       # one of them is an image's short side before it is cropped
CROP_SIDES = (384, 600)             # range of a crop's width and of its height
TEXT_QUERIES: int | None = None     # classes that an image is trained with; OV-LVIS: 100
REPEAT: float | None = None         # images of classes that a smaller share has come more often
DENOISING = 100                     # noised boxes of an image, in groups of all its unknown ones

# The detector
IMAGE_SIZE = 1024                   # side of the square; L/14: 896
RESIZE = "pil"                      # how images are resized: pil (published), cv2, bicubic
MAP_ONLY = False                    # DeCLIP's block makes the dense map alone, none of the taps
WIDTH = 256                         # of the transformer
HEADS = 8                           # of its attention
POINTS = 4                          # that a head looks at on each level
LAYERS = 6                          # of the encoder, and of the decoder
FFN = 2048                          # width of the feed-forward networks
QUERIES = 1000                      # boxes that the decoder refines

# The optimisation
BATCH_SIZE = 32                     # images of one optimiser step, over all GPUs
MICRO_BATCH = 4                     # most images of a forward pass
EPOCHS = 30                         # passes over the images; OV-LVIS: 35
STEPS: int | None = None            # stop here, to go on with --resume; None: after EPOCHS
LR = 1e-4                           # learning rate, constant
NECK_SHARE = 0.1                    # of it, for the transposed convolution
CLIP_NORM = 0.1                     # longest gradient
WEIGHT_DECAY = 1e-4                 # of all weights
BETAS = (0.9, 0.999)                # of AdamW
EPS = 1e-8                          # of AdamW; published with fp16: 1e-6
AVERAGE = 0.99996                   # decay of the weights' moving average, which is saved; 0: none
PRECISION = "auto"                  # bf16, fp16, fp32; auto: bf16 or fp16 on a GPU, fp32 on a CPU
TF32 = False                        # fp32 products with 10 bits on a GPU: faster, the losses' too
SEED = 0                            # of the order of images, their crops, and what is drawn


def main(argv: list[str] | None = None) -> None:
    """Trains as the command line (or `argv`) says."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__, cfg.TF32) as ranks:
        train(cfg, ranks)


def train(cfg: SimpleNamespace, ranks: distributed.Ranks) -> None:
    """The whole of training: one loop for one process and many."""
    check(cfg)
    annotations = find_annotations(cfg.DATASET, "train", cfg.DATA, cfg.ANNOTATIONS, cfg.IMAGES,
                                   cfg.NOVEL)
    dataset = DetectionData(annotations, False, cfg.READ_TIMEOUT, cfg.UNKNOWN, cfg.REPEAT)
    with Run(cfg, ranks, dataset, "ov_dquo.safetensors", MAY_CHANGE_ON_RESUME) as run:
        model = build(cfg, dataset).to(ranks.device)
        detector = run.begin(model, build_optimizer(cfg, model), model.save)
        batches = training_batches(dataset, run)

        for _ in run.steps():
            # 1. Losses and gradients, one micro batch after the other
            for batch in run.micro_batches(batches):
                images, targets = views(cfg, batch.data, run.epoch, batch.indices)
                with run.forward():
                    losses = detector(images, targets)
                run.backward(sum(losses.values()), losses, batch)
            # 2. The optimiser's step, the average, log, checkpoint, signals
            run.end_step(cfg.LR, cfg.CLIP_NORM)
    run.say_end("python -m downstream.ov_dquo.eval --ckpt", val_images(cfg), "tools.detect")


def views(cfg: SimpleNamespace, data: list[Objects], epoch: int, indices: list[int]
          ) -> tuple[list[Tensor], list[Target]]:
    """Images with their objects, cropped, resized and flipped as SEED, epoch and index say."""
    keys = [f"{cfg.SEED}-{epoch}-{index}" for index in indices]
    crops = Crops(cfg.CROP, cfg.SHORT_SIDES, cfg.CROP_SIDES)
    shown = [augment_crop(objects, key, cfg.IMAGE_SIZE, crops, cfg.FLIP, cfg.RESIZE)
             for objects, key in zip(data, keys)]
    return [view.image for view in shown], [Target(view.boxes, view.labels, view.weights, key)
                                            for view, key in zip(shown, keys)]


# ---------------------------------------------------------------------------------- the set-up

# Settings that may differ when a run is resumed, besides those of util/run.py.
MAY_CHANGE_ON_RESUME = ("DATA", "ANNOTATIONS", "IMAGES", "CACHE", "UNKNOWN")


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting out of its range, before anything is loaded."""
    check_training(cfg)
    check_design(design_of(cfg), None, {}, RANGES)
    settings.check_min(cfg, REPEAT=0, NECK_SHARE=0, TEXT_QUERIES=1)
    least = min(cfg.CROP_SIDES)
    settings.check(cfg, FLIP=(0 <= cfg.FLIP <= 1, "a share, from 0 to 1"),
                   CROP=(0 <= cfg.CROP <= 1, "a share, from 0 to 1"),
                   AVERAGE=(0 <= cfg.AVERAGE < 1, "at least 0 and less than 1"),
                   CROP_SIDES=(len(cfg.CROP_SIDES) == 2 and 1 <= least == cfg.CROP_SIDES[0],
                               "two numbers, 1 <= least <= most"),
                   SHORT_SIDES=(min(cfg.SHORT_SIDES) >= least,
                                f"at least the least of CROP_SIDES, {least}"))


def design_of(cfg: SimpleNamespace) -> Design:
    """The settings that say what a detector is."""
    return Design(**{name: getattr(cfg, name.upper()) for name in Design._fields})


def build(cfg: SimpleNamespace, dataset: DetectionData) -> OVDQUO:
    """The detector on its frozen backbone, in training mode."""
    clip = open_backbone(vars(cfg))
    text = encode_names(clip, [*dataset.classes, OVDQUO.OTHER], cfg.TEMPLATES, cfg.CACHE)
    torch.manual_seed(cfg.SEED)     # of the first weights
    model = OVDQUO(clip, dataset.classes, dataset.seen, design_of(cfg), text)
    if cfg.AVERAGE:
        model.start_average()
    return model.train()


def build_optimizer(cfg: SimpleNamespace, model: OVDQUO) -> torch.optim.AdamW:
    """AdamW, all weights decayed; the transposed convolution learns by its share of LR. After each
    of its steps the average moves."""
    slow = [*model.neck.finer.parameters()]
    fast = [weight for weight in model.parameters() if weight.requires_grad
            and all(weight is not other for other in slow)]
    groups = [{"params": fast}, {"params": slow, "share": cfg.NECK_SHARE}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.LR, betas=cfg.BETAS, eps=cfg.EPS,
                                  weight_decay=cfg.WEIGHT_DECAY, fused=True)
    move = partial(model.update_average, cfg.AVERAGE)
    optimizer.register_step_post_hook(lambda *_: move())
    return optimizer


if __name__ == "__main__":
    main()
