"""Figures of photographs and the classes on them: colours, regions with names, legends, fonts."""

import math
import textwrap
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import font_manager, ft2font, patches, patheffects
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from data import Classes, fitted_size, resize
from util import settings
from util.files import atomic_write

matplotlib.use("agg")       # writes files, on machines without a screen too

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
    opacity = np.array([0 if name in ("", "background") else OPACITY for name in classes.names])
    grey = photo.float().mean(dim=0, keepdim=True).permute(1, 2, 0).numpy() / 255
    over = opacity[prediction.numpy()][..., None]
    axis.imshow(((1 - over) * grey + over * palette[prediction.numpy()]).clip(0, 1), aspect="auto")
    border = torch.zeros_like(prediction, dtype=torch.bool)
    border[1:] |= prediction[1:] != prediction[:-1]
    border[:, 1:] |= prediction[:, 1:] != prediction[:, :-1]
    thick = F.max_pool2d(border[None].float(), 3, 1, 1)[0].numpy()
    axis.imshow(np.zeros((*thick.shape, 4)) + thick[..., None] * [0, 0, 0, 0.55], aspect="auto")
    write_names(axis, prediction, classes, letter=9 / 72 / inches * prediction.shape[1])


def regions(photo: Tensor, prediction: Tensor, classes: Classes, shown: Collection[str],
            largest: int) -> Image.Image:
    """A photograph in grey under the colours and names of some of its classes, as draw's panels."""
    colour_of = colours({"": prediction}, classes)
    photo, drawn = resized(photo, {"": prediction}, largest)
    hidden = torch.tensor([name not in shown for name in classes.names])[drawn[""]]
    # What is hidden is one more class, without name and colour.
    prediction, classes = (drawn[""] + 1).masked_fill(hidden, 0), Classes(["", *classes.names],
                                                                         [], [])
    (H, W), dpi = photo.shape[-2:], largest / 4       # a small one, so that names are large
    figure = plt.figure(figsize=(W / dpi, H / dpi), dpi=dpi)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    paint(axis, photo, prediction, classes, colour_of, W / dpi)
    figure.canvas.draw()
    out = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    return out


def heat(photo: Tensor, values: Tensor, brightest: float) -> Image.Image:
    """A photograph (3, H, W) in grey under values of its patches (h, w)."""
    # The root, so that small values are seen, too.
    shown = F.interpolate((values / brightest).sqrt()[None, None], photo.shape[-2:],
                          mode="nearest-exact")[0, 0].clamp(max=1)
    grey = photo.float().mean(dim=0).numpy()[..., None] / 255
    colour = matplotlib.colormaps["inferno"](shown.numpy())[..., :3]
    return Image.fromarray(((0.3 * grey + 0.7 * colour) * 255).round().astype(np.uint8))


def mark(picture: Image.Image, place: tuple[float, float]) -> Image.Image:
    """The same with a red cross at (x, y), each from 0 to 1, that has a white rim."""
    x, y = (at * side for at, side in zip(place, picture.size))
    arm, pen = max(picture.size) / 40, ImageDraw.Draw(picture)
    for rim, colour in ((0.25, "white"), (0, "red")):
        long, wide = arm * (1 + rim), arm * (0.3 + rim)
        pen.rectangle((x - long, y - wide, x + long, y + wide), fill=colour)
        pen.rectangle((x - wide, y - long, x + wide, y + long), fill=colour)
    return picture


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
