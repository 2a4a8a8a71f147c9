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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from torch import Tensor
from tqdm import tqdm

from data import load_share
from downstream.detection import (
    Annotations,
    Detections,
    EvaluationImages,
    Results,
    encode_detections,
    find_annotations,
    groups_of,
    precisions,
    summarize,
    with_masks,
)
from downstream.fvit.model import FViT, ScoreRules, open_fvit
from util import UserError, distributed, settings
from util.labels import NOT_IN_DATA
from util.precision import autocast, check_precision
from util.results import identity, result_path, write_result
from util.weights import read_record

SHARED = {"downstream.fvit.train": ["The data"], "eval_region": ["The evaluation"]}

# The detector
CKPT = "out/fvit/fvit.safetensors"  # checkpoint of downstream/fvit/train.py
BACKBONE: str | None = None         # its backbone; None: the file that it was trained on
PRECISION = "fp32"                  # bf16, fp16: faster on a GPU, but rounded; auto: as train.py

# What is evaluated
DATASET: str | None = None          # None: that of the training; or coco, objects365, my.json ...
DETECTIONS: str | None = None       # file for what is found, as COCO results; None: none is written

# The scores; None: what SCORE_RULES has for the data set
A: float | None = None              # share of the VLM in the scores of seen classes
B: float | None = None              # and of novel ones; published for OV-LVIS and L/14: 0.4
TEMPERATURE: float | None = None    # factor of the VLM's cosines; CLIPSelf's: 75, OV-LVIS 50
TAU: float | None = None            # factor of the detector's cosines, instead of the learned one
LEAST: float | None = None          # score below which a detection is left out
NMS: float | None = None            # IoU from which the lower of two boxes of a class is left out
MOST: int | None = None             # detections of an image
AT_BOXES: bool | None = None        # the VLM sees the final boxes instead of the proposals

# Of every other data set: OV-COCO's, which are the defaults.
SCORE_RULES = {
    "ovcoco": ScoreRules(),
    "ovlvis": ScoreRules(b=0.6, temperature=90.0, least=1e-4, nms=0.5, most=300),
    "coco": ScoreRules(0.2, 0.2, 120.0, 1e-4, 0.5, 300, tau=50.0, masks=False),
    "objects365": ScoreRules(0.3, 0.3, 120.0, 1e-4, 0.5, 300, tau=50.0, masks=False),
}


def main(argv: list[str] | None = None) -> dict:
    """Evaluates as the command line (or `argv`) says; returns the figures."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__) as ranks:
        return run(cfg, ranks)


def run(cfg: SimpleNamespace, ranks: distributed.Ranks) -> dict:
    """Detects on all images; prints and writes the figures. {} on ranks that are not the first."""
    settings.check_min(cfg, BATCH_SIZE=1, NUM_WORKERS=0)
    check_precision(cfg.PRECISION)
    cfg.DATASET = cfg.DATASET or trained_with(cfg.CKPT)
    settings.check(cfg, DETECTIONS=(not Path(cfg.DETECTIONS or "").is_file(),
                                    "a file that is not there yet"))
    rules = score_rules(cfg, cfg.DATASET)
    settings.refuse_unused(cfg, DATA=cfg.DATASET.endswith(".json") and NOT_IN_DATA)
    annotations = find_annotations(cfg.DATASET, "val", cfg.DATA, cfg.ANNOTATIONS, cfg.IMAGES,
                                   cfg.NOVEL)
    images = EvaluationImages(annotations)
    images[0]       # a wrong folder is found before a model is loaded
    fvit = open_fvit(cfg.CKPT, cfg.BACKBONE).to(ranks.device)
    of = identity(cfg, fvit, [annotations.classes, len(images)], **fvit.backbone.describe()
                  | fvit.design._asdict() | rules._asdict())
    has_names = annotations.classes == fvit.classes
    if not has_names:
        fvit.set_classes(annotations.classes, cache=cfg.CACHE)
    check_novel(cfg, annotations, fvit)
    refuse_unused_rules(cfg, fvit, rules, has_names)
    masked = (with_masks(annotations) if rules.masks and fvit.mask_head
              else annotations._replace(objects=[]))
    results = evaluate(cfg, partial(fvit.detect, rules=rules), images, ranks, len(fvit.classes))
    if not ranks.is_main:
        return {}
    figures = score(annotations, masked, results, fvit)
    print(f"\n{cfg.DATASET}: {fvit.backbone.model_name}, {len(images)} images, % of\n"
          f"{table(figures)}")
    write_result(cfg, result_name(cfg), of, figures)
    if cfg.DETECTIONS:
        results.write(cfg.DETECTIONS, annotations)
    return figures


def result_name(cfg: SimpleNamespace) -> str:
    """The data set's, in a name that does not take the place of its own json."""
    name = Path(cfg.DATASET).stem
    is_taken = result_path(cfg, name).resolve() == Path(cfg.DATASET).resolve()
    return f"{name}.results" if is_taken else name


def trained_with(path: str) -> str:
    """The data set that a detector was trained with; UserError if it is one json, of training."""
    name = detector_settings(path).get("DATASET", "")
    if name.endswith(".json") or not name:
        raise UserError(f"{path} was trained with {name or 'an unknown data set'}; say what to "
                        "evaluate on: --dataset val.json.")
    return name


def detector_settings(path: str) -> dict:
    """The settings of a detector's training; {} if the file has none, which open_fvit refuses."""
    return read_record(path).get("settings", {}) if Path(path).is_file() else {}


def score_rules(cfg: SimpleNamespace, dataset: str) -> ScoreRules:
    """What SCORE_RULES has for a data set, but for the settings that say something else.

    Raises UserError on one that is out of its range.
    """
    settings.check_min(cfg, MOST=1, TEMPERATURE=0, TAU=0)
    settings.check(cfg, **{name: (0 <= (getattr(cfg, name) or 0) <= 1, "from 0 to 1")
                           for name in ("A", "B", "LEAST", "NMS")})
    asked = {name: getattr(cfg, name.upper()) for name in ScoreRules._fields if name != "masks"}
    return SCORE_RULES.get(dataset, ScoreRules())._replace(**{
        name: value for name, value in asked.items() if value is not None})


def check_novel(cfg: SimpleNamespace, annotations: Annotations, fvit: FViT) -> None:
    """Says which of the data set's novel classes training has seen; UserError if NOVEL names one.
    """
    known = [name for name, is_base, is_seen in zip(annotations.classes, annotations.seen,
                                                    fvit.seen) if is_seen and not is_base]
    shown = ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
    if known and cfg.NOVEL is not None:
        raise UserError(f"NOVEL names {shown}, but {cfg.CKPT} has seen that in training; name only "
                        "what it has not seen, or leave NOVEL out.")
    if known and distributed.is_main():
        print(f"{cfg.CKPT} has seen {shown} in training: novel in {cfg.DATASET}, but not to it")


def refuse_unused_rules(cfg: SimpleNamespace, fvit: FViT, rules: ScoreRules, has_names: bool
                        ) -> None:
    """Raises UserError on an option of the scores that changes nothing for a detector's classes.

    has_names: whether they are those that its file has embeddings of.
    """
    no_vlm = not any(rules.a if seen else rules.b for seen in fvit.seen) and (
        "is of the VLM's scores, whose share is 0")
    settings.refuse_unused(
        cfg, TEMPERATURE=no_vlm, AT_BOXES=no_vlm,
        A=not any(fvit.seen) and "is of seen classes, and none is",
        B=all(fvit.seen) and "is of novel classes, and none is",
        CACHE=has_names and f"keeps embeddings of new names, but {cfg.CKPT} has those of its own")


def evaluate(cfg: SimpleNamespace, detect: Callable[[list[Tensor]], list[Detections]],
             images: EvaluationImages, ranks: distributed.Ranks, num_classes: int) -> Results:
    """What any detector finds on all images; on rank 0 what all ranks have found."""
    results, loader = Results(num_classes), load_share(images, ranks, cfg.BATCH_SIZE,
                                                       cfg.NUM_WORKERS)
    with tqdm(total=len(loader.dataset), desc="detect", unit="image",
              disable=not ranks.is_main) as progress:
        for samples in loader:
            batch = [image.to(ranks.device, non_blocking=True) for _, image in samples]
            with autocast(cfg.PRECISION, ranks.device):
                found = detect(batch)
            for (number, _), detections in zip(samples, found):
                results.add(encode_detections(number, detections))
            progress.update(len(samples))
    for file in results.files:
        distributed.collect_lines(file)
    return results


def score(annotations: Annotations, masked: Annotations, results: Results, fvit: FViT) -> dict:
    """The figures of boxes, and of masks where detector and data have them (see summarize).

    masked: the annotations that have masks, none if the detector has none.
    """
    truths = {"boxes": annotations} | ({"masks": masked} if masked.objects else {})
    found = [[precisions(truth, part, way == "masks", classes) for way, truth in truths.items()]
             for classes, part in results.parts()]
    groups = groups_of(annotations, fvit.seen)
    return {way: summarize(np.concatenate(parts, axis=2), annotations.classes, groups)
            for way, parts in zip(truths, zip(*found))}


COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def table(figures: dict[str, dict]) -> str:
    """AP of boxes and masks, of all classes and of each group, for a screen."""
    lines = [f"{'':16}" + "".join(f"{name:>7}" for name in COLUMNS)]
    for way, result in figures.items():
        for name, row in ({"all": result} | result["groups"]).items():
            cells = (row.get(column) for column in COLUMNS)
            lines.append(f"{way + ', ' + name:16}" + "".join(
                f"{'' if cell is None else f'{cell:.1f}':>7}" for cell in cells).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
