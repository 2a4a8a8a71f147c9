"""Names what is where in your own photographs.

    python -m tools.segment photo.jpg --classes "cat, wooden chair, grass" --ckpt ...
    python -m tools.segment photo.jpg --classes "dog | puppy, grass"     # synonyms; no checkpoint
    python -m tools.segment photos/ --classes names.txt --background --threshold 0.4    # and a rest
    python -m tools.segment photo.jpg --classes "cat, sofa" --attention clip --ckpt ...
    python -m tools.segment photo.jpg --classes "cat, sofa" --ckpt out/catseg/catseg.safetensors

Writes photo.segmentation.png beside each photograph (or into OUT): every class in its own colour,
named on its regions and in a legend with its share of the image. --attention adds a panel of the
CLIP that the model was made from. --json writes photo.segmentation.json with the numbers, --labels
photo.labels.png, the number of each pixel's class, and photo.labels.json with their names;
--figure false leaves the drawing out, which takes most of the time. Nothing that lists images takes
these files for photographs (util/images.py, OWN_ENDINGS).
"""

import errno
import os
import re
import sys
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import Classes, read_classes
from downstream.catseg import eval as catseg_eval
from downstream.catseg.model import CATSeg, is_catseg, open_catseg
from eval_region import open_model
from eval_seg import Protocol, Segmenter, predict
from model import DECOUPLED, DeCLIP
from tools import figures
from tools.names import check_classes, typed_classes
from util import UserError, distributed, printable, settings
from util.files import MAX_NAME, atomic_write, write_json
from util.images import OWN_ENDINGS, counted, list_images, read_image
from util.text import find_templates
from util.towers import locate
from util.weights import read_record, used_record

SHARED = {"eval_region": ["The model", "Names and numbers"], "eval_seg": ["The windows"]}

# What is named
CLASSES = ""                        # names with commas between, synonyms with | ; or a .txt file
BACKGROUND = False                  # a class for everything else, named as in classes/voc21.txt

# What is written
FIGURE = True                       # false for programs, with JSON or LABELS: most of the time
LARGEST = 1280                      # longest side of each picture in the figure, in pixels
JSON = False                        # the numbers too
LABELS = False                      # a label map too, of the photograph's own size
OUT: str | None = None              # folder of all files; None: that of each photograph


def main(argv: list[str] | None = None) -> None:
    """Segments the photographs that the command line (or `argv`) names."""
    cfg = settings.parse(argv, sys.modules[__name__], positional="PHOTOS")
    with distributed.session(__file__) as ranks:
        run(cfg, ranks.device)


@torch.inference_mode()
def run(cfg: SimpleNamespace, device: torch.device) -> None:
    """Segments every photograph; those that fail are named at the end."""
    Protocol.of(cfg)        # UserError for a setting out of its range
    settings.check(cfg, LARGEST=(100 <= cfg.LARGEST <= 10_000, "from 100 to 10000, the longest "
                                 "side of each picture in the figure in pixels"),
                   FIGURE=(cfg.FIGURE or cfg.JSON or cfg.LABELS, "true unless JSON or LABELS is "
                           "given, or nothing is written"))
    settings.refuse_unused(
        cfg, LARGEST=not cfg.FIGURE and "is of a figure, and FIGURE is false",
        ATTENTION=not (cfg.FIGURE or cfg.JSON) and "is shown in the figure and in JSON's numbers")
    classes, outputs = find_classes(cfg), find_photos(cfg.PHOTOS, cfg.OUT)
    if cfg.FIGURE:
        figures.use_fonts([*classes.names, *(printable(path.name) for path in outputs)])

    def segment_one(panels: dict[str, Segmenter], photo: Tensor, path: Path, out: Path) -> str:
        found = {title: segment([photo.to(device)])[0].cpu() for title, segment in panels.items()}
        of_model, written = next(iter(found.values())), []
        if cfg.LABELS:
            written.append(out.with_name(out.name.removesuffix(SUFFIX) + LABELS_SUFFIX))
            write_labels(of_model, classes, written[-1])
        if cfg.JSON:
            written.append(out.with_suffix(".json"))
            write_json(written[-1], {title: figures.shares(prediction, classes)
                                     for title, prediction in found.items()})
        if cfg.FIGURE:
            written.append(out)
            title = printable(path.name)
            atomic_write(out, partial(figures.draw, photo, found, classes, title, cfg.LARGEST))
        return f"{written[-1]}: {describe(of_model, classes)}"

    say_failed(each_photo(outputs, partial(panels_of, cfg, classes, device), segment_one))


def panels_of(cfg: SimpleNamespace, classes: Classes, device: torch.device
              ) -> dict[str, Segmenter]:
    """Titles -> segmenters: the model, and with ATTENTION the CLIP that it was made from."""
    if is_catseg(cfg.CKPT):
        catseg = open_catseg(cfg.CKPT).to(device)
        clip = catseg.clip
        refuse_unused_by_catseg(cfg, clip)
        panels = {f"CAT-Seg ({readable(clip.model_name)})": by_catseg(cfg, catseg, classes)}
    else:
        clip = open_shown(cfg).to(device)
        name = "DeCLIP" if cfg.CKPT else "decoupled, untrained"
        panels = {f"{name} ({readable(clip.model_name)}, context {clip.context})":
                  by_clip(cfg, clip, classes, None)}
    if cfg.ATTENTION:
        panels[f"{METHOD_NAMES[cfg.ATTENTION]} ({readable(clip.model_name)})"] = (
            by_clip(cfg, open_original(cfg, clip), classes, cfg.ATTENTION))
    return panels


def open_shown(cfg: SimpleNamespace) -> DeCLIP:
    """The model of the settings, whose own context is shown whatever ATTENTION is shown beside."""
    used_record(cfg, cfg.CKPT, None, DECOUPLED)
    settings.check(cfg, ATTENTION=(cfg.ATTENTION in (None, *METHOD_NAMES),
                                   f"one of {', '.join(METHOD_NAMES)}"))
    return open_model(SimpleNamespace(**vars(cfg) | {"ATTENTION": None}))


def open_original(cfg: SimpleNamespace, clip: DeCLIP) -> DeCLIP:
    """The CLIP that CKPT was made from, on the same device; `clip` itself without a CKPT."""
    if not cfg.CKPT:
        return clip
    trained = read_record(cfg.CKPT).get("settings", {})
    pretrained = trained.get("PRETRAINED", cfg.PRETRAINED)
    return DeCLIP(clip.source, pretrained).to(clip.visual.trunk.pos_embed.device)


def by_clip(cfg: SimpleNamespace, clip: DeCLIP, classes: Classes, attention: str | None
            ) -> Segmenter:
    """What eval_seg.py makes of a CLIP with one attention."""
    protocol = replace(Protocol.of(cfg), attention=attention).fit(clip)
    text = clip.encode_text(classes.prompts, find_templates(cfg.TEMPLATES), cfg.CACHE)
    return partial(predict, protocol, clip, classes, text)


def by_catseg(cfg: SimpleNamespace, catseg: CATSeg, classes: Classes) -> Segmenter:
    """What downstream.catseg.eval makes of a CAT-Seg, by its own windows."""
    protocol = catseg_eval.Protocol.of(catseg, window_batch=cfg.WINDOW_BATCH,
                                       precision=cfg.PRECISION)
    return partial(catseg_eval.predict, protocol, catseg, classes,
                   catseg_eval.encode(catseg, classes))


def refuse_unused_by_catseg(cfg: SimpleNamespace, clip: DeCLIP) -> None:
    """Raises UserError on options that say what a CAT-Seg's file says, or that only a CLIP has."""
    of_file = f"is said by {cfg.CKPT}, a CAT-Seg"
    of_clip = not cfg.ATTENTION and f"is for a CLIP, and {cfg.CKPT}, a CAT-Seg, has its own"
    is_other = cfg.MODEL and locate(cfg.MODEL, None) != clip.source
    settings.refuse_unused(
        cfg, MODEL=is_other and of_file, PRETRAINED=of_file, CONTEXT=of_file, SCALE=of_file,
        TEMPLATES=of_clip, SHORT_SIDE=of_clip, LONG_SIDE=of_clip, WINDOW=of_clip, STRIDE=of_clip,
        CACHE=of_clip,
        PAMR=f"refines cosines, and {cfg.CKPT}, a CAT-Seg, has none",
        THRESHOLD=f"is for cosines, and background is a class like others of {cfg.CKPT}, a CAT-Seg",
        LOGIT_SCALE=f"is for a threshold, which {cfg.CKPT}, a CAT-Seg, has not")


# Rows of model.ATTENTIONS as titles have them.
METHOD_NAMES = {"clip": "CLIP", "maskclip": "MaskCLIP", "catseg": "MaskCLIP by CAT-Seg",
                "sclip": "SCLIP", "clearclip": "ClearCLIP", "q": "CLIP, last block by q",
                "k": "CLIP, last block by k", "qk": "CLIP, last block by q and k",
                "values": "CLIP, values of three blocks"}


def readable(name: str) -> str:
    """A model's name for a title: a folder's last two parts; DINOv2 ViT-B/14 instead of timm's."""
    if name.startswith("local-dir:"):
        return "/".join(Path(name.removeprefix("local-dir:")).parts[-2:])
    shape, family = re.match(r"vit_(\w)[a-z]+_patch(\d+)", name), re.search(r"dino(v\d)?", name)
    if shape and family:
        return f"DINO{family[1] or ''} ViT-{shape[1].upper()}/{shape[2]}"
    return name.split(".")[0]


def find_classes(cfg: SimpleNamespace) -> Classes:
    """CLASSES, and background in front of them.

    Raises UserError if there is none, and for settings of the background without one.
    """
    classes = check_classes(typed_classes(cfg.CLASSES))
    settings.refuse_unused(
        cfg, THRESHOLD=not cfg.BACKGROUND and
        "is for --background, which gets what no class is sure of and was not given",
        LOGIT_SCALE=cfg.THRESHOLD is None and "makes the probability that --background gets its "
        "pixels by (give --background and --threshold too)")
    return with_background(classes) if cfg.BACKGROUND else classes


def with_background(classes: Classes) -> Classes:
    """Classes behind that of everything else, whose names are VOC's less those of the others.

    Raises UserError if one of them is called background, too.
    """
    wanted = {name.casefold() for name in classes.prompts}
    if "background" in wanted:
        raise UserError("CLASSES names background, which is the class that --background adds; "
                        "leave one of the two out.")
    voc = read_classes("classes/voc21.txt")
    rest = [name for name, k in zip(voc.prompts, voc.class_of_prompt)
            if k == 0 and name.casefold() not in wanted]
    return Classes([rest[0], *classes.names], [*rest, *classes.prompts],
                   [0] * len(rest) + [k + 1 for k in classes.class_of_prompt])


# ---------------------------------------------------------------------------- the photographs

SUFFIX, LABELS_SUFFIX = OWN_ENDINGS[:2]


def find_photos(asked: Sequence[str], out: str | None = None, suffix: str = SUFFIX
                ) -> dict[Path, Path]:
    """Files as they are named, folders with all images below them -> where the figure of each goes:
    beside it, or below `out` in the same subfolder. No two have one, nor that of a photograph.

    Raises UserError if there is no photograph.
    """
    roots: dict[Path, Path] = {}
    for place in map(Path, asked):
        if not place.exists():
            raise UserError(f"There is no photograph {place}; give an image file or a folder of "
                            "them.")
        files, left_out = ([place], {}) if place.is_file() else list_images(place)
        if left_out:
            print(f"left out of {place}: {counted(left_out)}")
        for path in map(Path, files):
            roots.setdefault(path, place.parent if place.is_file() else place)
    taken, figures = {unfolded(path) for path in roots}, {}
    is_one = len({*roots.values()}) == 1        # folder
    for path, root in roots.items():
        folder = Path(out) / path.parent.relative_to(root) if out else path.parent
        # a.jpg and a.png are two photographs, and so are those of one name from several folders
        clear = path.name if is_one else f"{path.absolute().parent.name}-{path.name}"
        names = chain((path.stem, clear), (f"{clear}-{number}" for number in count(2)))
        figures[path] = next(figure for name in names if unfolded(
            figure := folder / fitting(name, suffix)) not in taken)
        taken.add(unfolded(figures[path]))
    return figures


def unfolded(path: Path) -> str:
    """The same for two paths that some disks take for one: of other capitals or accents."""
    return unicodedata.normalize("NFC", os.path.abspath(path)).casefold()


def fitting(name: str, suffix: str) -> str:
    """A name and a suffix; one too long for a file is cut and has a checksum of the whole name."""
    room = MAX_NAME - len(suffix) - 1       # .json is longer than .png
    whole = os.fsencode(name)
    if len(whole) > room:
        name = f"{whole[:room - 9].decode(errors='ignore')}-{zlib.crc32(whole):08x}"
    return name + suffix


def each_photo(figures: dict[Path, Path], load: Callable[[], object],
               work: Callable[[object, Tensor, Path, Path], str]) -> list[str]:
    """Prints work(load(), photo, path, figure) for every photograph -> why others failed.

    No model is loaded before a photograph is read. Of a full disk the whole ends, by an OSError.
    """
    model, failed = None, []
    for path, figure in tqdm(figures.items(), unit="photo", disable=len(figures) == 1):
        try:
            photo = read_image(path, upright=True)
        except UserError as error:
            failed.append(str(error))
            continue
        model = model or load()
        try:
            line = work(model, photo, path, figure)
        except Exception as error:      # a photograph's failure is its own
            plt.close("all")
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            failed.append(f"{path} failed ({' '.join(str(error).split())}).")
        else:
            tqdm.write(printable(line))
    return failed


def say_failed(failed: Sequence[str]) -> None:
    """Raises UserError if any photograph has failed."""
    if failed:
        raise UserError(" ".join(failed))


# ------------------------------------------------------------------------------- the numbers

def write_labels(prediction: Tensor, classes: Classes, path: Path) -> None:
    """Classes of pixels (H, W) -> a PNG of their numbers, of 16 bits for more than 256 classes.

    Beside it a json has `names`: that of class 0, 1, and so on. The label is that of an upright
    photograph, as its EXIF entry says. UserError if such a PNG without a json is there: a label of
    the user's own.
    """
    if path.exists() and not path.with_suffix(".json").exists():
        raise UserError(f"{path} is there and not of this tool; choose another OUT.")
    values = prediction.numpy().astype(np.uint8 if len(classes) <= 256 else np.uint16)
    write_json(path.with_suffix(".json"), {"names": classes.names})
    atomic_write(path, lambda file: Image.fromarray(values).save(file, format="PNG"))


def describe(prediction: Tensor, classes: Classes) -> str:
    """One line for a screen: the classes with the largest shares."""
    largest = list(figures.shares(prediction, classes).items())[:8]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in largest if share >= 0.005)


if __name__ == "__main__":
    main()
