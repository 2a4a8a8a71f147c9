"""Names what is where in your own photographs.

    python -m tools.segment photo.jpg --classes "cat, wooden chair, grass" --ckpt ...
    python -m tools.segment photo.jpg --classes "dog | puppy, grass"     # synonyms; no checkpoint
    python -m tools.segment photos/ --classes names.txt --background --threshold 0.4    # and a rest
    python -m tools.segment photo.jpg --classes "cat, sofa" --attention clip --ckpt ...
    python -m tools.segment photo.jpg --classes "cat, sofa" --ckpt out/catseg/catseg.safetensors

Writes photo.segmentation.png beside each photograph (or into OUT): every class in its own colour,
named on its regions and in a legend with its share of the image. --attention adds a panel of the
CLIP that the model was made from. --json writes photo.segmentation.json with the numbers, --labels
photo.labels.png, the number of each pixel's class, and photo.labels.json with their names. Nothing
that lists images takes these files for photographs (util/images.py, OWN_ENDINGS).
"""

import errno
import math
import os
import re
import sys
import textwrap
import unicodedata
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import font_manager, ft2font, patches, patheffects
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import Classes, first_twice, fitted_size, make_classes, read_classes, resize
from downstream.catseg import eval as catseg_eval
from downstream.catseg.model import CATSeg, is_catseg, open_catseg
from eval_region import open_model
from eval_seg import Protocol, Segmenter, predict
from model import DECOUPLED, DeCLIP
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
LARGEST = 1280                      # longest side of each picture in the figure, in pixels
JSON = False                        # the numbers too
LABELS = False                      # a label map too, of the photograph's own size
OUT: str | None = None              # folder of all files; None: that of each photograph

matplotlib.use("agg")       # writes files, on machines without a screen too


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
                                 "side of each picture in the figure in pixels"))
    classes, outputs = find_classes(cfg), find_photos(cfg.PHOTOS, cfg.OUT)
    use_fonts([*classes.names, *(printable(path.name) for path in outputs)])

    def segment_one(panels: dict[str, Segmenter], photo: Tensor, path: Path, out: Path) -> str:
        found = {title: segment([photo.to(device)])[0].cpu() for title, segment in panels.items()}
        of_model = next(iter(found.values()))
        title = printable(path.name)
        atomic_write(out, partial(draw, photo, found, classes, title, cfg.LARGEST))
        if cfg.LABELS:
            write_labels(of_model, classes, out.with_name(
                out.name.removesuffix(SUFFIX) + LABELS_SUFFIX))
        if cfg.JSON:
            write_json(out.with_suffix(".json"), {title: shares(prediction, classes)
                                                  for title, prediction in found.items()})
        return f"{out}: {describe(of_model, classes)}"

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
    classes = typed_classes(cfg.CLASSES)
    if not classes.names:
        raise UserError('CLASSES names no class; say what to look for, such as --classes "cat, '
                        'wooden chair, grass", or give a class file.')
    settings.refuse_unused(
        cfg, THRESHOLD=not cfg.BACKGROUND and
        "is for --background, which gets what no class is sure of and was not given",
        LOGIT_SCALE=cfg.THRESHOLD is None and "makes the probability that --background gets its "
        "pixels by (give --background and --threshold too)")
    return with_background(classes) if cfg.BACKGROUND else classes


def typed_classes(text: str) -> Classes:
    """Names with commas between, their synonyms with |, or those of a .txt file.

    Raises UserError for a name twice, in capitals or not.
    """
    if text.endswith(".txt"):
        classes = read_classes(text)
    else:
        classes = make_classes([entry.replace("|", ",") for entry in text.split(",")
                                if entry.replace("|", " ").strip()])
    twice = first_twice(classes.prompts)
    if twice:
        raise UserError(f"CLASSES names {twice!r} twice; remove one.")
    return classes


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

def shares(prediction: Tensor, classes: Classes) -> dict[str, float]:
    """The share of the image of each class that occurs, the largest first."""
    counts = prediction.flatten().bincount(minlength=len(classes)) / prediction.numel()
    return {classes.names[k]: counts[k].item() for k in counts.argsort(descending=True).tolist()
            if counts[k] > 0}


def seen_classes(predictions: Iterable[Tensor], classes: Classes) -> list[str]:
    """The names of those that cover enough of a prediction to be in a legend."""
    return [*dict.fromkeys(name for prediction in predictions
                           for name, share in shares(prediction, classes).items()
                           if share >= MIN_NAMED)]


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
    largest = list(shares(prediction, classes).items())[:8]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in largest if share >= 0.005)


# -------------------------------------------------------------------------------- the figure

# Laid over grey, any two differ by at least 19 in CIELAB, and by 13 to eyes that lack one kind of
# cone; the first ones differ most.
PALETTE = ("#005ba1", "#ff8700", "#4aff94", "#d90012", "#b702ff", "#90c9ff", "#bd674e", "#f5e547",
           "#f800b8", "#eeaf50", "#7b00ba", "#a859ff", "#9697ff", "#0000ff", "#8d0066", "#175d14",
           "#47c98b", "#aff800", "#e74b00", "#fe6fc6")
OPACITY = 0.6       # of a colour over the photograph in grey
NEUTRAL = "#9a9a9a"         # of the background in legends; in pictures it has no tint
MAX_NAMED = 24     # entries of a legend
MIN_NAMED = 0.0005        # the share of an image from which on a class is in the legend: 0.1 %
INCHES = 5.5        # the longest side of a picture
matplotlib.rcParams["text.parse_math"] = False      # a $ is a $


def colours(panels: dict[str, Tensor], classes: Classes) -> dict[str, str]:
    """A colour for each class, always the same; of many classes, for those that occur most."""
    order = [name for name in classes.names if name != "background"]
    if len(order) > len(PALETTE):
        total = Counter()
        for prediction in panels.values():
            total.update(shares(prediction, classes))
        order = sorted(total.keys() - {"background"}, key=lambda name: (-total[name], name))
    colour_of = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(order)}
    return colour_of | {name: NEUTRAL for name in classes.names if name == "background"}


def draw(photo: Tensor, panels: dict[str, Tensor], classes: Classes, name: str, largest: int,
         path: str) -> None:
    """The photograph and, for each title, its regions in colour with names, and a legend.

    name: of the photograph, its title. largest: the longest side of each picture, in pixels.
    """
    colour_of = colours(panels, classes)
    photo, drawn = resized(photo, panels, largest)
    H, W = photo.shape[-2:]
    width, height = INCHES * W / max(H, W), max(INCHES * H / max(H, W), 0.1)
    column = max(width, 3.0)        # what a title and a legend need
    titles = [textwrap.fill(title, int(column / 0.085)) for title in (name, *panels)]
    entries = {title: named(prediction, classes, colour_of)
               for title, prediction in panels.items()}
    ncols = {title: legend_columns(labels, column) for title, labels in entries.items()}
    above = 0.12 + 0.17 * max(1 + title.count("\n") for title in titles)
    below = 0.1 + 0.175 * max(math.ceil(len(entries[title]) / ncols[title]) for title in panels)
    whole = above + height + below, column * len(titles) + 0.15 * len(panels)
    figure = plt.figure(figsize=whole[::-1], dpi=largest / INCHES)
    for place, (title, heading) in enumerate(zip((None, *panels), titles)):
        left = (column + 0.15) * place + (column - width) / 2
        axis = figure.add_axes((left / whole[1], below / whole[0], width / whole[1],
                                height / whole[0]))
        axis.set_axis_off()
        axis.set_title(heading, fontsize=10.5, pad=4)
        if title is None:
            axis.imshow(photo.permute(1, 2, 0), aspect="auto")
        else:
            paint(axis, photo, drawn[title], classes, colour_of, width)
            axis.legend(handles=entries[title], ncols=ncols[title], **BELOW)
    figure.savefig(path, format="png")
    plt.close(figure)


FORMATS = (".png", ".pdf", ".svg")


def check_figure(cfg: SimpleNamespace) -> None:
    """Raises UserError unless the setting FIGURE, if any, ends in a format of figures."""
    fits = cfg.FIGURE is None or Path(cfg.FIGURE).suffix.lower() in FORMATS
    settings.check(cfg, FIGURE=(fits, f"a file of a kind that can be drawn, {', '.join(FORMATS)}"))


def save_figure(figure: plt.Figure, path: str | Path, **how: object) -> None:
    """Writes a figure in the format that the path's suffix names, and closes it."""
    form = Path(path).suffix[1:].lower()
    atomic_write(path, lambda file: figure.savefig(file, dpi=110, format=form, **how))
    plt.close(figure)


LEGEND = {"fontsize": 8.5, "frameon": False, "handlelength": 1.3, "handletextpad": 0.5,
          "columnspacing": 1.2, "labelspacing": 0.35, "borderaxespad": 0.3, "borderpad": 0.2}
BELOW = LEGEND | {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}        # a picture


def resized(photo: Tensor, panels: dict, largest: int) -> tuple[Tensor, dict]:
    """A photograph uint8 (3, H, W) and classes of its pixels (H, W), longest side to `largest`."""
    size = fitted_size(photo, largest)
    drawn = {key: F.interpolate(prediction[None, None].float(), size, mode="nearest-exact")[0, 0]
             for key, prediction in panels.items()}
    picture = (resize(photo, *size) * 255).round().byte()
    return picture, {key: prediction.long() for key, prediction in drawn.items()}


def paint(axis: plt.Axes, photo: Tensor, prediction: Tensor, classes: Classes,
          colour_of: dict[str, str], inches: float) -> None:
    """The photograph in grey under its regions' colours, with dark borders and names.

    inches: about the width of the panel, so that no name covers another.
    """
    palette = np.array([matplotlib.colors.to_rgb(colour_of.get(name, NEUTRAL))
                        for name in classes.names])
    opacity = np.array([0 if name == "background" else OPACITY for name in classes.names])
    grey = photo.float().mean(dim=0, keepdim=True).permute(1, 2, 0).numpy() / 255
    over = opacity[prediction.numpy()][..., None]
    axis.imshow(((1 - over) * grey + over * palette[prediction.numpy()]).clip(0, 1), aspect="auto")
    border = torch.zeros_like(prediction, dtype=torch.bool)
    border[1:] |= prediction[1:] != prediction[:-1]
    border[:, 1:] |= prediction[:, 1:] != prediction[:, :-1]
    thick = F.max_pool2d(border[None].float(), 3, 1, 1)[0].numpy()
    axis.imshow(np.zeros((*thick.shape, 4)) + thick[..., None] * [0, 0, 0, 0.55], aspect="auto")
    write_names(axis, prediction, classes, letter=9 / 72 / inches * prediction.shape[1])


def write_names(axis: plt.Axes, prediction: Tensor, classes: Classes, letter: float) -> None:
    """Each class's name at the deepest point of its regions, unless it would cover another.

    letter: the height of a letter in pixels of the image; bold ones are about 0.7 of that wide.
    """
    H, W = prediction.shape
    taken: list[tuple[float, ...]] = []
    for name in shares(prediction, classes):
        x, y, depth = deepest(prediction == classes.names.index(name))
        half, tall = 0.37 * letter * len(name), 0.7 * letter
        # inside the image
        x, y = min(max(x, half), max(half, W - half)), min(max(y, tall), max(tall, H - tall))
        box = (x - half, y - tall, x + half, y + tall)
        if depth > 0.6 * letter and is_free(box, taken):
            taken.append(box)
            axis.text(x, y, name, ha="center", va="center", fontsize=9, color="white",
                      weight="bold",
                      path_effects=[patheffects.withStroke(linewidth=2.5, foreground="black")])


def is_free(box: Sequence[float], taken: Sequence[Sequence[float]]) -> bool:
    """Whether a box (left, top, right, bottom) covers none of those that are taken."""
    x0, y0, x1, y1 = box
    return not any(x0 < right and left < x1 and y0 < bottom and top < y1
                   for left, top, right, bottom in taken)


def deepest(mask: Tensor) -> tuple[float, float, float]:
    """The point (x, y) of a bool mask (H, W) that is farthest from its border, and how far."""
    factor = max(1, max(mask.shape) // 200)
    inside = F.max_pool2d(mask[None].float(), factor, ceil_mode=True)[0]
    depth, layer = torch.zeros_like(inside), F.pad(inside, (1, 1, 1, 1))[None]
    while layer.any():
        depth += layer[0, 1:-1, 1:-1]
        layer = -F.max_pool2d(-layer, 3, 1, 1)
        layer[:, [0, -1]] = layer[:, :, [0, -1]] = 0        # beyond the image is outside
    ridge = (depth == depth.max()).nonzero().float()        # the middle one of the deepest points
    y, x = ridge[(ridge - ridge.mean(dim=0)).norm(dim=1).argmin()].tolist()
    return (x + 0.5) * factor, (y + 0.5) * factor, depth.max().item() * factor


def named(prediction: Tensor, classes: Classes, colour_of: dict[str, str]) -> list[patches.Patch]:
    """Legend entries: colour, name and share of the classes that are seen, the largest first."""
    found, seen = shares(prediction, classes), seen_classes([prediction], classes)
    shown = seen if len(seen) <= MAX_NAMED else seen[:MAX_NAMED - 1]
    entries = [patches.Patch(color=colour_of[name], label=f"{name}  {100 * found[name]:.1f} %")
               for name in shown]
    if len(shown) < len(seen):
        rest = 100 * sum(found[name] for name in seen[len(shown):])
        entries.append(patches.Patch(color="none",
                                     label=f"{len(seen) - len(shown)} more  {rest:.1f} %"))
    return entries


def legend_columns(entries: Sequence[patches.Patch], inches: float) -> int:
    """How many columns a legend has, at most 4 and so many inches, with no entry alone in a row."""
    longest = max(len(entry.get_label()) for entry in entries)
    # a letter is about 0.062 inches wide
    return balanced(len(entries), max(1, min(4, int(inches / (0.062 * longest + 0.36)))))


def balanced(count: int, most: int) -> int:
    """Columns, at most `most`, in as few rows as that gives; another number if one were alone."""
    rows = math.ceil(count / most)
    columns = math.ceil(count / rows)
    fitting = [number for number in range(columns, 1, -1) if count % number != 1]
    return fitting[0] if fitting else columns


def use_fonts(names: Sequence[str]) -> None:
    """Takes installed fonts for letters that the usual one lacks; says which letters none has.

    Matplotlib would draw empty boxes without a word.
    """
    usual = letters_in(font_manager.findfont(font_manager.FontProperties()))
    missing = {letter for name in names for letter in name if not letter.isspace()} - usual
    families = ["sans-serif"]
    for font in font_manager.fontManager.ttflist if missing else []:
        found = missing & letters_in(font.fname)
        if found and not font.name.startswith("Last Resort"):       # that has boxes for all letters
            families.append(font.name)
            missing -= found
    matplotlib.rcParams["font.family"] = families
    if missing:
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        tqdm.write(f"no installed font has the letters {''.join(sorted(missing))}, so the figure "
                   "shows boxes; install one that has them, such as Noto Sans")


def letters_in(font: str) -> frozenset[str]:
    """The letters that a font file has."""
    return frozenset(map(chr, ft2font.FT2Font(font).get_charmap()))


if __name__ == "__main__":
    main()
