"""Finds what you name on your own photographs: boxes, and masks if the detector has them.

    python -m tools.detect photo.jpg --classes "person, red kite" --ckpt out/fvit/fvit.safetensors
    python -m tools.detect photos/ --classes names.txt --json --ckpt ...    # numbers, too
    python -m tools.detect photo.jpg --ckpt out/ov_dquo/ov_dquo.safetensors     # its own classes

Writes photo.detection.png beside each photograph (or into OUT). Classes that training has not seen
have a dashed frame and an asterisk. --json writes photo.detection.json: COCO results with names of
file and class, whose category_id counts the classes from 1. Of `--classes instances.json`, a
COCO-style json that lists the photographs, they have the ids, so that they can be scored with it.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from matplotlib import patches
from matplotlib import pyplot as plt
from torch import Tensor

from downstream.detection import Detections, encode_detections, name_results
from downstream.detector import Detector, kind_of, open_detector
from downstream.evaluation import KINDS, refuse_unused_rules, score_rules
from tools import figures, segment
from tools.names import typed_classes
from util import UserError, distributed, settings
from util.coco import Coco, read_coco
from util.files import atomic_write, write_json
from util.precision import autocast, check_precision
from util.weights import read_record

SHARED = {"downstream.fvit.eval": ["The detector", "The scores", "The detections"],
          "downstream.ov_dquo.eval": ["The scores of queries"]}

# What is looked for
CLASSES = ""                        # names with commas between, a .txt or .json file; none: its own
LEAST = 0.3                         # score from which a detection is shown
CACHE: str | None = "out/cache"     # folder that keeps embeddings of class names; None: none

# What is written
LARGEST = 1280                      # longest side of the picture in pixels
JSON = False                        # the numbers too
OUT: str | None = None              # folder of all files; None: that of each photograph


def main(argv: list[str] | None = None) -> None:
    """Looks at the photographs that the command line (or `argv`) names."""
    cfg = settings.parse(argv, sys.modules[__name__], positional="PHOTOS")
    with distributed.session(__file__) as ranks:
        run(cfg, ranks.device)


def run(cfg: SimpleNamespace, device: torch.device) -> None:
    """Finds and draws on every photograph; those that fail are named at the end."""
    check_precision(cfg.PRECISION)
    record = read_record(cfg.CKPT)
    kind = kind_of(record, KINDS) or KINDS[0]       # a file of none is refused by open_detector
    rules = score_rules(cfg, kind, record.get("settings", {}).get("DATASET", ""))
    coco = read_coco(cfg.CLASSES, {"names"}) if cfg.CLASSES.endswith(".json") else None
    categories = ([(category["id"], category["name"]) for category in coco.categories] if coco
                  else [*enumerate(typed_classes(cfg.CLASSES).names, 1)])
    outputs = segment.find_photos(cfg.PHOTOS, cfg.OUT, ".detection.png")
    detector = open_detector(cfg.CKPT, cfg.BACKBONE, KINDS).to(device)
    if categories:
        detector.set_classes([name for _, name in categories], cache=cfg.CACHE)
    refuse_unused_rules(cfg, detector, rules, not categories)
    titles = [name if seen else f"{name}*" for name, seen in zip(detector.classes, detector.seen)]

    def detect_one(detector: Detector, photo: Tensor, path: Path, out: Path) -> str:
        with autocast(cfg.PRECISION, device):
            found, = detector.detect([photo.to(device)], rules)
        atomic_write(out, partial(draw, photo, found, titles, cfg.LARGEST))
        if cfg.JSON:
            write_json(out.with_suffix(".json"), name_results(
                encode_detections(0, found), find_image(path, coco),
                categories or [*enumerate(detector.classes, 1)]))
        return f"{out}: {describe(found, titles)}"

    segment.say_failed(segment.each_photo(outputs, lambda: detector, detect_one))


# ------------------------------------------------------------------------------- the numbers

def find_image(path: Path, coco: Coco | None) -> dict:
    """A photograph's entry in a json, found by its file's name, with or without folders.

    Without a json its id is the name, as COCO's the number. UserError if the json lacks it.
    """
    if coco is None:
        return {"id": int(path.stem) if path.stem.isdecimal() else path.stem,
                "file_name": path.name}
    parts = path.absolute().parts
    names = {"/".join(parts[start:]) for start in range(len(parts))}
    images = [image for image in coco.images if image["file_name"] in names]
    if not images:
        raise UserError(f"{coco.path} does not list {path}; give its photographs, or other "
                        "CLASSES.")
    return max(images, key=lambda image: len(image["file_name"]))


def describe(found: Detections, titles: Sequence[str]) -> str:
    """One line for a screen: what was found and how often, the surest first."""
    counts = Counter(found.labels.tolist())
    return ", ".join(f"{count} {titles[label]}" for label, count in counts.items()) or "nothing"


# -------------------------------------------------------------------------------- the figure

INCHES = 9.0        # longest side of the photograph in the figure
LETTER = 8.0        # size of a letter in points


def draw(photo: Tensor, found: Detections, titles: Sequence[str], largest: int, path: str) -> None:
    """The photograph (3, H, W) with frames, masks, names and scores, and a legend below.

    titles: a class's name, with an asterisk if training has not seen it.
    """
    H, W = photo.shape[-2:]
    shown, _ = figures.resized(photo, {}, largest)
    counts = Counter(found.labels.tolist())
    colour_of = dict(zip(counts, cycle(figures.PALETTE)))
    inches = INCHES / max(H, W)
    figure = plt.figure(figsize=(W * inches, H * inches))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.imshow(shown.permute(1, 2, 0), extent=(0, W, H, 0))
    if found.masks:
        axis.imshow(tint(found, colour_of, (H, W)), extent=(0, W, H, 0), interpolation="nearest")
    frame(axis, found, titles, colour_of)
    write_names(axis, found, titles, colour_of)
    add_legend(axis, counts, titles, colour_of)
    axis.set(xlim=(0, W), ylim=(H, 0))
    axis.set_axis_off()
    figure.savefig(path, dpi=largest / INCHES, format="png", bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


def tint(found: Detections, colour_of: dict[int, str], size: tuple[int, int]) -> np.ndarray:
    """The masks in their classes' colours, the surer ones on top: RGBA (H, W, 4)."""
    colours = np.zeros((*size, 4))
    for label, mask in reversed(list(zip(found.labels.tolist(), found.masks))):
        colours[mask.cpu().numpy()] = matplotlib.colors.to_rgba(colour_of[label], 0.45)
    return colours


def frame(axis: plt.Axes, found: Detections, titles: Sequence[str], colour_of: dict[int, str]
          ) -> None:
    """A frame around each detection with a rim that it stands out from, dashed for novel classes.
    """
    for (x0, y0, x1, y1), label in reversed(list(zip(found.boxes.tolist(),
                                                     found.labels.tolist()))):
        style = (0, (4, 2)) if titles[label].endswith("*") else "-"
        rim = letters_on(colour_of[label])
        for colour, width, dashes in ((rim, 3.6, "-"), (colour_of[label], 2.0, style)):
            axis.add_patch(patches.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, lw=width,
                                             ec=colour, ls=dashes, alpha=0.9))


def write_names(axis: plt.Axes, found: Detections, titles: Sequence[str],
                colour_of: dict[int, str]) -> None:
    """Name and score at a corner of each frame, where they cover no surer one's."""
    W, H = axis.images[0].get_extent()[1:3]
    points = max(H, W) / INCHES / 72        # pixels of a point
    tall, taken = 1.7 * LETTER * points, []
    for (x0, y0, x1, y1), score, label in zip(found.boxes.tolist(), found.scores.tolist(),
                                              found.labels.tolist()):
        text = f"{titles[label]} {score:.2f}"
        wide = (0.62 * len(text) + 0.8) * LETTER * points
        places = [(x, y) for y in (y0 - tall, y0, y1 - tall, y1) for x in (x0, x1 - wide)]
        places = [(min(max(x, 0), max(W - wide, 0)), min(max(y, 0), H - tall)) for x, y in places]
        boxes = [(x, y, x + wide, y + tall) for x, y in places]
        taken.append(next((box for box in boxes if figures.is_free(box, taken)), boxes[0]))
        x, y = taken[-1][:2]
        axis.text(x + 0.4 * LETTER * points, y + tall / 2, text, va="center", fontsize=LETTER,
                  color=letters_on(colour_of[label]), zorder=5,
                  bbox={"facecolor": colour_of[label], "edgecolor": "none", "pad": 2.5})


def letters_on(colour: str) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def add_legend(axis: plt.Axes, counts: dict[int, int], titles: Sequence[str],
               colour_of: dict[int, str]) -> None:
    """Below the photograph: colour, name and number of each class, and what an asterisk says."""
    entries = [patches.Patch(color=colour_of[label], label=f"{titles[label]}  {count}")
               for label, count in list(counts.items())[:figures.MAX_NAMED]]
    if len(counts) > figures.MAX_NAMED:
        entries.append(patches.Patch(color="none", label=f"{len(counts) - figures.MAX_NAMED} more"))
    title = None if entries else "nothing found"
    if any(titles[label].endswith("*") for label in counts):
        title = "* not seen in training"
    columns = figures.legend_columns(entries, axis.figure.get_figwidth()) if entries else 1
    axis.legend(handles=entries, ncols=columns, title=title, title_fontsize=LETTER, **figures.BELOW)


if __name__ == "__main__":
    main()
