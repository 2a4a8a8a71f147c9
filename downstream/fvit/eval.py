"""Evaluates F-ViT: average precision of classes that training has seen, and of novel ones.

    python -m downstream.fvit.eval --ckpt out/fvit/fvit.safetensors
    python -m downstream.fvit.eval --dataset coco --ckpt ...            # transfer (Tables 3, 14)
    python -m downstream.fvit.eval --dataset my.json --images my/photos --ckpt ...
    torchrun --nproc_per_node 8 -m downstream.fvit.eval --ckpt ...      # images divided among GPUs

The data set is that of the training unless another one is named; classes that the detector does not
know get their names' embeddings, without training. Prints AP of boxes, and of masks if it has
them: OV-COCO's figure is AP50, OV-LVIS's that of masks. Writes them beside the checkpoint. Novel
is only what the detector's training has not seen.
"""

import sys

from downstream import evaluation
from downstream.fvit.model import FViT
from util import distributed, settings

SHARED = {"downstream.fvit.train": ["The data"], "eval_region": ["The evaluation"]}

# The detector
CKPT = "out/fvit/fvit.safetensors"  # checkpoint of downstream/fvit/train.py
BACKBONE: str | None = None         # its backbone; None: the file that it was trained on
PRECISION = "fp32"                  # bf16, fp16: faster on a GPU, but rounded; auto: as train.py

# What is evaluated
DATASET: str | None = None          # None: that of the training; or coco, objects365, my.json ...
DETECTIONS: str | None = None       # file for what is found, as COCO results; None: none is written

# The scores; None: what RULES in model.py have for the data set
A: float | None = None              # share of the VLM in the scores of seen classes
B: float | None = None              # and of novel ones; published for OV-LVIS and L/14: 0.4
TAU: float | None = None            # factor of the detector's cosines, instead of the learned one
AT_BOXES: bool | None = None        # the VLM sees the final boxes instead of the proposals

# The detections; None: likewise
TEMPERATURE: float | None = None    # factor of CLIP's cosines; CLIPSelf's F-ViT: 75, OV-LVIS 50
LEAST: float | None = None          # score below which a detection is left out
NMS: float | None = None            # IoU from which the lower of two boxes of a class is left out
MOST: int | None = None             # detections of an image


def main(argv: list[str] | None = None) -> dict:
    """Evaluates as the command line (or `argv`) says; returns the figures."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__) as ranks:
        return evaluation.run(cfg, ranks, FViT)


if __name__ == "__main__":
    main()
