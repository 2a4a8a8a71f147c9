"""Finds unknown objects to train OV-DQUO with: what a detector takes for objects that no label has.

    python -m downstream.ov_dquo.unknown --ckpt out/fvit/fvit.safetensors           # a first round
    python -m downstream.ov_dquo.unknown --ckpt out/ov_dquo/ov_dquo.safetensors     # a second one
    torchrun --nproc_per_node 8 -m downstream.ov_dquo.unknown --ckpt ...

The detector looks at the images that it was trained with. Boxes that overlap a labelled one or a
surer one, or are long or small, are left out; the surest few of an image remain. Writes the
published format, which downstream/ov_dquo/train.py reads from any proposer: a list of image_id,
bbox (x y width height in pixels), weight (0 to 1, how sure), category_id (-1) and id.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torchvision import ops
from tqdm import tqdm

from data import load_share
from downstream.detection import DetectionData, find_annotations
from downstream.detector import Detector, open_detector
from downstream.evaluation import KINDS, detector_settings
from util import UserError, distributed, settings
from util.files import atomic_write
from util.precision import autocast, check_precision

SHARED = {"downstream.fvit.eval": ["The detector"], "eval_region": ["The evaluation"]}

# The data; None: that of the detector's training
DATASET: str | None = None          # ovcoco, ovlvis, or a COCO-style json of your own
DATA: str | None = None             # folder that holds the data sets
ANNOTATIONS: str | None = None      # json instead of the data set's
IMAGES: str | None = None           # folder of its images instead of the data set's
NOVEL: str | None = None            # names that training may not see

# What is kept
KNOWN = 0.3                         # largest IoU with a labelled box
NMS = 0.3                           # and with a surer one
ASPECT = 4.0                        # largest ratio of the sides
MIN_AREA = 2000.0                   # in pixels
MAX_AREA = 0.98                     # share of the image
MOST = 5                            # boxes of an image
BEST = 1.0                          # share of all boxes, the surest ones; MEPU's later rounds: 0.3

# What is written
OUT = "out/unknown.json"            # a json file


def main(argv: list[str] | None = None) -> None:
    """Looks as the command line (or `argv`) says."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__) as ranks:
        run(cfg, ranks)


def run(cfg: SimpleNamespace, ranks: distributed.Ranks) -> None:
    """Writes the unknown objects of all images; UserError if there are none."""
    settings.check_min(cfg, ASPECT=1, MIN_AREA=0, MOST=1, BATCH_SIZE=1, NUM_WORKERS=0)
    settings.check(cfg, **{name: (0 <= getattr(cfg, name) <= 1, "from 0 to 1")
                           for name in ("KNOWN", "NMS", "MAX_AREA", "BEST")})
    check_precision(cfg.PRECISION)
    trained = detector_settings(cfg.CKPT)
    dataset, data, *more = (getattr(cfg, name) or trained.get(name) for name in (
        "DATASET", "DATA", "ANNOTATIONS", "IMAGES", "NOVEL"))
    annotations = find_annotations(dataset, "train", data, *more)
    images = DetectionData(annotations, masks=False)
    detector = open_detector(cfg.CKPT, cfg.BACKBONE, KINDS).to(ranks.device)
    found = [{"image_id": annotations.images[index]["id"], "bbox": box, "weight": objectness}
             for index, box, objectness in look(cfg, detector, images, ranks)]
    found = [entry for share in distributed.gather(found) for entry in share]
    if ranks.is_main:
        write(cfg, found, len(images))


def look(cfg: SimpleNamespace, detector: Detector, images: DetectionData, ranks: distributed.Ranks
         ) -> Iterator[tuple[int, list[float], float]]:
    """The unknown objects of this rank's images: number of the image, box, objectness."""
    loader = load_share(images, ranks, cfg.BATCH_SIZE, cfg.NUM_WORKERS)
    for samples in tqdm(loader, desc="objects", unit="batch", disable=not ranks.is_main):
        samples = [sample for sample in samples if not sample.skipped]
        with autocast(cfg.PRECISION, ranks.device):
            objects = detector.objects([sample.data.image.to(ranks.device) for sample in samples])
        for sample, (boxes, objectness) in zip(samples, objects):
            boxes, objectness = boxes.cpu(), objectness.cpu()
            kept = choose_unknown(cfg, boxes, objectness, sample.data.boxes,
                                  sample.data.image.shape[-2:])
            boxes = ops.box_convert(boxes[kept], "xyxy", "xywh")
            for box, value in zip(boxes.tolist(), objectness[kept].tolist()):
                yield sample.index, [round(side, 2) for side in box], value


def choose_unknown(cfg: SimpleNamespace, boxes: Tensor, objectness: Tensor, known: Tensor,
                   size: tuple[int, int]) -> Tensor:
    """The places of the unknown objects among boxes x0 y0 x1 y1 (n, 4), the surest first.

    known: labelled boxes (k, 4). size: of the image, in pixels.
    """
    sides, area = boxes[:, 2:] - boxes[:, :2], ops.box_area(boxes)
    is_kept = (sides.amax(1) <= cfg.ASPECT * sides.amin(1)) & (area >= cfg.MIN_AREA)
    is_kept &= (area <= cfg.MAX_AREA * size[0] * size[1]) & (sides > 0).all(1)
    if len(known):
        is_kept &= ops.box_iou(boxes, known).amax(1) <= cfg.KNOWN
    kept = is_kept.nonzero().flatten()
    return kept[ops.nms(boxes[kept], objectness[kept], cfg.NMS)[:cfg.MOST]]


def write(cfg: SimpleNamespace, found: list[dict], images: int) -> None:
    """The file, with weights from 0, the least objectness of all, to 1, the largest."""
    if not found:
        raise UserError(f"No unknown object was found in {images} images; lower MIN_AREA, "
                        f"{cfg.MIN_AREA:g} pixels, for small images, or give another CKPT.")
    found = sorted(found, key=lambda entry: entry["weight"], reverse=True)
    found = found[:max(1, round(cfg.BEST * len(found)))]
    values = torch.tensor([entry["weight"] for entry in found], dtype=torch.double)
    weights = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-9)
    for number, (entry, weight) in enumerate(zip(found, weights.tolist()), 1):
        entry |= {"weight": round(weight, 4), "category_id": -1, "pseudo": 1, "id": number}
    atomic_write(cfg.OUT, lambda file: Path(file).write_text(json.dumps(found)))
    print(f"{cfg.OUT} has {len(found)} unknown objects of {images} images; train with "
          f"python -m downstream.ov_dquo.train --unknown {cfg.OUT}")


if __name__ == "__main__":
    main()
