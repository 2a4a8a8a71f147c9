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

import sys
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from data import training_batches
from downstream.detection import DetectionData, Objects, augment, find_annotations, val_images
from downstream.detector import check_design, encode_names, open_backbone
from downstream.fvit.model import NORMS, RANGES, Design, FViT, Target
from model import DECOUPLED
from util import distributed, settings
from util.labels import NOT_IN_DATA
from util.run import Run, check_training
from util.weights import used_record

SHARED = {"util.run": ["The machinery"]}

# The data
DATASET = "ovcoco"                  # ovcoco, ovlvis, or a COCO-style json of your own
DATA = "data"                       # folder that holds the data sets
ANNOTATIONS: str | None = None      # json instead of the data set's, such as instances_..._seen_2
IMAGES: str | None = None           # folder of its images instead of the data set's
NOVEL: str | None = None            # names that training may not see, instead of the data set's
CACHE: str | None = "out/cache"     # folder that keeps embeddings of class names; None: none

# The run
OUT = "out/fvit"                    # its folder: fvit.safetensors, log.jsonl, checkpoints
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

# The detector
IMAGE_SIZE = 640                    # side of the square; OV-LVIS: 1024; L/14: 896
RESIZE = "cv2"                      # how images are resized: cv2 (published), pil, bicubic
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
MICRO_BATCH = 8                     # images of a forward pass; fewer give batch norm fewer samples
EPOCHS = 3                          # passes over the images; OV-LVIS: 48
STEPS: int | None = None            # stop here, to go on with --resume; None: after EPOCHS
LR = 1e-4                           # peak learning rate
WARMUP = 250                        # steps of linear warm-up, from a thousandth of LR
LR_DROPS: tuple[int, ...] = ()      # epochs after which LR falls to a tenth; OV-LVIS: 32 44
CLIP_NORM = 1.0                     # longest gradient
WEIGHT_DECAY = 0.1                  # of all that is trained: biases, norms and tau, too (published)
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
    annotations = find_annotations(cfg.DATASET, "train", cfg.DATA, cfg.ANNOTATIONS, cfg.IMAGES,
                                   cfg.NOVEL)
    dataset = DetectionData(annotations, cfg.MASKS, cfg.READ_TIMEOUT)
    with Run(cfg, ranks, dataset, "fvit.safetensors", MAY_CHANGE_ON_RESUME) as run:
        fvit = build(cfg, dataset, ranks)
        detector = run.begin(fvit, build_optimizer(cfg, fvit), fvit.save)
        batches = training_batches(dataset, run)

        for step in run.steps():
            # 1. Losses and gradients, one micro batch after the other
            for batch in run.micro_batches(batches):
                images, targets = views(cfg, batch.data, run.epoch, batch.indices)
                with run.forward():
                    losses = detector(images, targets)
                run.backward(sum(losses.values()), losses, batch)
            # 2. The optimiser's step, log, checkpoint, signals
            run.end_step(learning_rate(cfg, step, run.steps_per_epoch), cfg.CLIP_NORM)
    run.say_end("python -m downstream.fvit.eval --ckpt", val_images(cfg), "tools.detect")


def views(cfg: SimpleNamespace, data: list[Objects], epoch: int, indices: list[int]
          ) -> tuple[list[Tensor], list[Target]]:
    """Images with their objects, resized, cropped and flipped as SEED, epoch and index say."""
    keys = [f"{cfg.SEED}-{epoch}-{index}" for index in indices]
    shown = [augment(objects, key, cfg.IMAGE_SIZE, cfg.SCALES, cfg.FLIP, cfg.RESIZE)
             for objects, key in zip(data, keys)]
    return [view.image for view in shown], [Target(view.boxes, view.labels, view.masks, key)
                                            for view, key in zip(shown, keys)]


# ---------------------------------------------------------------------------------- the set-up

# Settings that may differ when a run is resumed, besides those of util/run.py.
MAY_CHANGE_ON_RESUME = ("DATA", "ANNOTATIONS", "IMAGES", "CACHE")


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError on a setting out of its range, before anything is loaded."""
    check_training(cfg)
    check_design(design_of(cfg), None, {"norm": NORMS}, RANGES)
    settings.refuse_unused(cfg, DATA=cfg.DATASET.endswith(".json") and NOT_IN_DATA)
    has_scales = len(cfg.SCALES) == 2 and 0 < cfg.SCALES[0] <= cfg.SCALES[1] <= 10
    settings.check(cfg, SCALES=(has_scales, "two numbers, 0 < least <= most <= 10"),
                   FLIP=(0 <= cfg.FLIP <= 1, "a share, from 0 to 1"),
                   LR_DROPS=(all(epoch >= 1 for epoch in cfg.LR_DROPS), "epochs, from 1"))


def design_of(cfg: SimpleNamespace) -> Design:
    """The settings that say what a detector is."""
    return Design(**{name: getattr(cfg, name.upper()) for name in Design._fields})


def build(cfg: SimpleNamespace, dataset: DetectionData, ranks: distributed.Ranks) -> FViT:
    """The detector on its frozen backbone, in training mode; with several GPUs its norms share
    their statistics. On CPUs they don't: PyTorch has no such norm there."""
    clip = open_backbone(vars(cfg)).to(ranks.device)
    used_record(cfg, cfg.BACKBONE, cfg.ATTENTION, DECOUPLED)
    text = encode_names(clip, [*dataset.classes, FViT.OTHER], cfg.TEMPLATES, cfg.CACHE)
    torch.manual_seed(cfg.SEED)     # of the first weights
    fvit = FViT(clip, dataset.classes, dataset.seen, design_of(cfg), text).to(ranks.device)
    if ranks.world_size > 1 and ranks.device.type == "cuda":
        fvit = nn.SyncBatchNorm.convert_sync_batchnorm(fvit)
    return fvit.train()


def build_optimizer(cfg: SimpleNamespace, fvit: FViT) -> torch.optim.AdamW:
    """AdamW over what is trained, in one group: weight decay spares nothing."""
    trained = [parameter for parameter in fvit.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=cfg.LR, betas=cfg.BETAS, eps=cfg.EPS,
                             weight_decay=cfg.WEIGHT_DECAY, fused=True)


def learning_rate(cfg: SimpleNamespace, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up from LR / 1000 to LR, then a tenth after each epoch of LR_DROPS."""
    share = min(1.0, 0.001 + 0.999 * step / cfg.WARMUP) if cfg.WARMUP else 1.0
    drops = sum(step >= epoch * steps_per_epoch for epoch in cfg.LR_DROPS)
    return cfg.LR * share * 0.1**drops


if __name__ == "__main__":
    main()
