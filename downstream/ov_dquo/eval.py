"""Evaluates OV-DQUO: average precision of classes that training has seen, and of novel ones.

    python -m downstream.ov_dquo.eval --ckpt out/ov_dquo/ov_dquo.safetensors
    python -m downstream.ov_dquo.eval --dataset my.json --images my/photos --ckpt ...
    torchrun --nproc_per_node 8 -m downstream.ov_dquo.eval --ckpt ...   # images divided among GPUs

All but the scores is as in downstream/fvit/eval.py. AP is of boxes, OV-LVIS's too, so that it can't
be compared with F-ViT's there, which is of masks.
"""

import sys

from downstream import evaluation
from downstream.ov_dquo.model import OVDQUO
from util import distributed, settings

SHARED = {"downstream.fvit.train": ["The data"],
          "downstream.fvit.eval": ["The detector", "What is evaluated", "The detections"],
          "eval_region": ["The evaluation"]}

CKPT = "out/ov_dquo/ov_dquo.safetensors"    # checkpoint of downstream/ov_dquo/train.py
DATASET: str | None = None          # None: that of the training; or coco, objects365, my.json ...

# The scores of queries; None: what RULES in model.py have for the data set
FACTOR: float | None = None         # of novel classes' probabilities when queries are named
EXPONENT: float | None = None       # of the objectness in the score


def main(argv: list[str] | None = None) -> dict:
    """Evaluates as the command line (or `argv`) says; returns the figures."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__) as ranks:
        return evaluation.run(cfg, ranks, OVDQUO)


if __name__ == "__main__":
    main()
