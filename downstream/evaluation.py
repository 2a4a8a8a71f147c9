"""What evaluations of detectors share, whatever the kind: the data set, its names, the figures.

Novel is only what the detector's training has not seen.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

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
from downstream.detector import Detector, open_detector
from downstream.fvit.model import FViT
from downstream.ov_dquo.model import OVDQUO
from util import UserError, distributed, settings
from util.labels import NOT_IN_DATA
from util.precision import autocast, check_precision
from util.results import identity, result_path, write_result
from util.weights import read_record


def run(cfg: SimpleNamespace, ranks: distributed.Ranks, kind: type[Detector]) -> dict:
    """Detects on all images; prints and writes the figures. {} on ranks that are not the first."""
    settings.check_min(cfg, BATCH_SIZE=1, NUM_WORKERS=0)
    check_precision(cfg.PRECISION)
    cfg.DATASET = cfg.DATASET or trained_with(cfg.CKPT)
    settings.check(cfg, DETECTIONS=(not Path(cfg.DETECTIONS or "").is_file(),
                                    "a file that is not there yet"))
    rules = score_rules(cfg, kind, cfg.DATASET)
    settings.refuse_unused(cfg, DATA=cfg.DATASET.endswith(".json") and NOT_IN_DATA)
    annotations = find_annotations(cfg.DATASET, "val", cfg.DATA, cfg.ANNOTATIONS, cfg.IMAGES,
                                   cfg.NOVEL)
    images = EvaluationImages(annotations)
    images[0]       # a wrong folder is found before a model is loaded
    detector = open_detector(cfg.CKPT, cfg.BACKBONE, [kind]).to(ranks.device)
    of = identity(cfg, detector, [annotations.classes, len(images)], **detector.backbone.describe()
                  | detector.design._asdict() | rules._asdict())
    has_names = annotations.classes == detector.classes
    if not has_names:
        detector.set_classes(annotations.classes, cache=cfg.CACHE)
    check_novel(cfg, annotations, detector)
    refuse_unused_rules(cfg, detector, rules, has_names)
    masked = (with_masks(annotations) if detector.gives_masks(rules)
              else annotations._replace(objects=[]))
    results = evaluate(cfg, partial(detector.detect, rules=rules), images, ranks,
                       len(detector.classes))
    if not ranks.is_main:
        return {}
    figures = score(annotations, masked, results, detector)
    print(f"\n{cfg.DATASET}: {detector.backbone.model_name}, {len(images)} images, % of\n"
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
    """The settings of a detector's training; {} if the file has none, which open_detector refuses.
    """
    return read_record(path).get("settings", {})


KINDS = FViT, OVDQUO


def score_rules(cfg: SimpleNamespace, kind: type[Detector], dataset: str) -> NamedTuple:
    """What a kind's RULES have for a data set, but for the settings that say something else.

    Raises UserError on one that is out of its range, or that is of another kind.
    """
    default = rules_of(kind, dataset)
    names = {name.upper() for name in default._fields if name != "masks"}
    settings.refuse_unused(cfg, **{name: f"is of other detectors than {cfg.CKPT}"
                                   for name in {*SCORES} - names if hasattr(cfg, name)})
    return check_rules(default, {name.lower(): getattr(cfg, name) for name in names})


def check_rules(default: NamedTuple, asked: dict[str, object]) -> NamedTuple:
    """A kind's rules with some others, None for its own; UserError on one that it has not, or out
    of its range."""
    unknown = next((name for name in asked if name not in default._fields), None)
    if unknown:
        raise UserError(f"There is no rule {unknown!r}; choose among {', '.join(default._fields)}.")
    asked = {name: value for name, value in asked.items() if value is not None}
    ranges = {name.upper(): (value, *SCORES[name.upper()]) for name, value in asked.items()
              if name.upper() in SCORES}
    settings.check(SimpleNamespace(**{name: found[0] for name, found in ranges.items()}), **{
        name: (least <= value <= most, words)
        for name, (value, least, most, words) in ranges.items()})
    return default._replace(**asked)


def rules_of(kind: type[Detector], dataset: str | None) -> NamedTuple:
    """What a kind's RULES have for a data set."""
    return kind.RULES.get(dataset, kind.RULES["ovcoco"])


# The settings of scores, of all kinds: the least and the largest value.
SHARE, POSITIVE = (0, 1, "from 0 to 1"), (0, float("inf"), "at least 0")
SCORES = {"A": SHARE, "B": SHARE, "TEMPERATURE": POSITIVE, "TAU": POSITIVE, "FACTOR": POSITIVE,
          "EXPONENT": POSITIVE, "LEAST": SHARE, "NMS": SHARE, "MOST": (1, 2**31, "at least 1"),
          "AT_BOXES": (0, 1, "true or false")}


def check_novel(cfg: SimpleNamespace, annotations: Annotations, detector: Detector) -> None:
    """Says which of the data set's novel classes training has seen; UserError if NOVEL names one.
    """
    known = [name for name, is_base, is_seen in zip(annotations.classes, annotations.seen,
                                                    detector.seen) if is_seen and not is_base]
    shown = ", ".join(known[:5]) + (f" and {len(known) - 5} more" if len(known) > 5 else "")
    if known and cfg.NOVEL is not None:
        raise UserError(f"NOVEL names {shown}, but {cfg.CKPT} has seen that in training; name only "
                        "what it has not seen, or leave NOVEL out.")
    if known and distributed.is_main():
        print(f"{cfg.CKPT} has seen {shown} in training: novel in {cfg.DATASET}, but not to it")


def refuse_unused_rules(cfg: SimpleNamespace, detector: Detector, rules: NamedTuple,
                        has_names: bool) -> None:
    """Raises UserError on an option of the scores that changes nothing for a detector's classes.

    has_names: whether they are those that its file has embeddings of.
    """
    why = {name: words for name, words in detector.unused(rules).items() if hasattr(cfg, name)}
    settings.refuse_unused(cfg, **why, CACHE=has_names and (
        f"keeps embeddings of new names, but {cfg.CKPT} has those of its own"))


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


def score(annotations: Annotations, masked: Annotations, results: Results, detector: Detector
          ) -> dict:
    """The figures of boxes, and of masks where detector and data have them (see summarize).

    masked: the annotations that have masks, none if the detector has none.
    """
    truths = {"boxes": annotations} | ({"masks": masked} if masked.objects else {})
    found = [[precisions(truth, part, way == "masks", classes) for way, truth in truths.items()]
             for classes, part in results.parts()]
    groups = groups_of(annotations, detector.seen)
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
