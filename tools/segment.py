"""Names what is where in your own photographs.

    python -m tools.segment photo.jpg --classes "cat, wooden chair, grass" --ckpt ...
    python -m tools.segment photo.jpg --classes "dog | puppy, grass"     # synonyms; no checkpoint
    python -m tools.segment photos/ --classes names.txt --background --threshold 0.4    # and a rest
    python -m tools.segment photo.jpg --classes "cat, sofa" --attention clip --ckpt ...

Writes photo.segmentation.png beside each photograph (or into OUT): every class in its own colour,
named on its regions and in a legend with its share of the image. --attention adds a panel of the
CLIP that the model was made from. --json writes photo.segmentation.json with the numbers.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import Classes, fitted_size, list_images, make_classes, read_classes, read_image, resize
from eval_seg import (  # noqa: F401 - settings shared with eval_seg.py
    ATTENTION,
    CACHE,
    CKPT,
    CONTEXT,
    LOGIT_SCALE,
    LONG_SIDE,
    MODEL,
    OUT,
    PRECISION,
    PRETRAINED,
    SCALE,
    SHORT_SIDE,
    STRIDE,
    TEMPLATES,
    THRESHOLD,
    WINDOW,
    WINDOW_BATCH,
    Benchmark,
    check_patches,
    check_windows,
    predict,
    protocol,
)
from model import DeCLIP, encode_classes, open_model, open_original
from util import UserError, distributed, settings
from util.files import atomic_write, write_json

matplotlib.use("agg")       # writes files, on machines without a screen too
from matplotlib import patches, patheffects  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

CLASSES = ""                        # names with commas between, synonyms with | ; or a .txt file
BACKGROUND = False                  # a class for everything else, named as in classes/voc21.txt
JSON = False                        # write the numbers too
LARGEST = 1280                      # longest side of the written image


def main(argv: list[str] | None = None) -> None:
    """Segments the photographs that the command line (or `argv`) names."""
    cfg = settings.parse(argv, sys.modules[__name__], positional="PHOTOS")
    with distributed.session(__file__) as ranks:
        run(cfg, ranks.device)


@torch.inference_mode()
def run(cfg: SimpleNamespace, device: torch.device) -> None:
    """Segments every photograph; one that can't be read is named at the end."""
    check_windows(cfg)
    classes, photos = find_classes(cfg), find_photos(cfg.PHOTOS)
    clip = open_model(cfg).to(device)
    panels = panels_of(cfg, clip)
    check_patches(cfg, clip)
    text = encode_classes(clip, classes, cfg.TEMPLATES, cfg.CACHE)
    failed, outputs = [], outputs_of(photos, cfg.PHOTOS, cfg.OUT)
    for path in tqdm(photos, unit="photo", disable=len(photos) == 1):
        try:
            photo = read_image(path, upright=True)
        except UserError as error:
            failed.append(str(error))
            continue
        photo = for_display(photo, cfg.LARGEST)
        found = {title: predict(rules, model, classes, text, [photo.to(device)])[0].cpu()
                 for title, (model, rules) in panels.items()}
        out = outputs[path]
        atomic_write(out, partial(draw, photo, found, classes))
        if cfg.JSON:
            write_json(out.with_suffix(".json"), {title: shares(prediction, classes)
                                                  for title, prediction in found.items()})
        tqdm.write(f"{out}: {describe(next(iter(found.values())), classes)}")
    if failed:
        raise UserError(" ".join(failed))


def rules_of(cfg: SimpleNamespace, attention: str | None) -> SimpleNamespace:
    """The settings of segmentation with one attention; a threshold only where it was given."""
    rules = protocol(cfg, Benchmark.logit_scale, cfg.THRESHOLD)
    return SimpleNamespace(**vars(rules) | {"ATTENTION": attention})


def for_display(photo: Tensor, largest: int) -> Tensor:
    """A photograph uint8 (3, H, W), its longest side at most `largest` and at least 640.

    Smaller ones are enlarged, for smooth borders.
    """
    side = min(max(*photo.shape[-2:], 640), largest)
    if side == max(photo.shape[-2:]):
        return photo
    return (resize(photo, *fitted_size(photo, side)) * 255).round().byte()


def panels_of(cfg: SimpleNamespace, clip: DeCLIP) -> dict[str, tuple[DeCLIP, SimpleNamespace]]:
    """Titles -> (model, its settings): the model, and with ATTENTION the CLIP it was made from."""
    name = "DeCLIP" if cfg.CKPT else "decoupled"
    panels = {f"{name} ({clip.model_name}, context {clip.context})": (clip, rules_of(cfg, None))}
    if cfg.ATTENTION:
        original = open_original(cfg, clip)
        panels[f"{clip.model_name}, attention {cfg.ATTENTION}"] = (
            original, rules_of(cfg, cfg.ATTENTION))
    return panels


def outputs_of(photos: Sequence[Path], given: Sequence[str], out: str | None) -> dict[Path, Path]:
    """Where each photograph's figure goes: beside it, or below `out` in the same subfolder."""
    folders = [Path(each) for each in given if Path(each).is_dir()]
    places = {}
    for path in photos:
        root = next((folder for folder in folders if path.is_relative_to(folder)), path.parent)
        place = Path(out) / path.parent.relative_to(root) if out else path.parent
        figure = place / f"{path.stem}.segmentation.png"
        if figure in places.values():       # a.jpg and a.png are two photographs
            figure = place / f"{path.name}.segmentation.png"
        places[path] = figure
    return places


def find_classes(cfg: SimpleNamespace) -> Classes:
    """CLASSES, and background in front of them; UserError if there is none, or one twice."""
    if cfg.CLASSES.endswith(".txt"):
        classes = read_classes(cfg.CLASSES)
        lines = [line_of(classes, k) for k in range(len(classes))]
    else:
        lines = [", ".join(name.strip() for name in entry.split("|") if name.strip())
                 for entry in cfg.CLASSES.split(",")]
        lines = [line for line in lines if line]
    if not lines:
        raise UserError('CLASSES names no class; say what to look for, such as --classes "cat, '
                        'wooden chair, grass", or give a class file.')
    if cfg.BACKGROUND:      # less what is asked for by name
        wanted = {name for line in lines for name in line.split(", ")}
        rest = [name for name in line_of(read_classes("classes/voc21.txt"), 0).split(", ")
                if name not in wanted]
        lines.insert(0, ", ".join(rest))
    elif cfg.THRESHOLD is not None:
        raise UserError("THRESHOLD is for --background, which gets what no class is sure of; add "
                        "it, or leave --threshold out.")
    classes = make_classes(lines)
    twice = next((name for name in classes.prompts if classes.prompts.count(name) > 1), None)
    if twice:
        raise UserError(f"CLASSES names {twice!r} twice; remove one.")
    return classes


def line_of(classes: Classes, k: int) -> str:
    """A class with its synonyms, as a class file has it."""
    return ", ".join(name for name, owner in zip(classes.prompts, classes.owner) if owner == k)


def find_photos(given: Sequence[str]) -> list[Path]:
    """Files as they are named, folders with all images below them except earlier figures.

    Raises UserError if there is none.
    """
    found = []
    for path in map(Path, given):
        if not path.exists():
            raise UserError(f"There is no photograph {path}; give an image file or a folder of "
                            "them.")
        below = [] if path.is_file() else [Path(each) for each in list_images(path)
                                           if not each.endswith(".segmentation.png")]
        found += [path] if path.is_file() else below
    if not found:
        raise UserError(f"{' '.join(given)} holds no photograph but figures of an earlier run; "
                        "give an image file or a folder.")
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------- the numbers

def shares(prediction: Tensor, classes: Classes) -> dict[str, float]:
    """The share of the image of each class that occurs, the largest first."""
    counts = prediction.flatten().bincount(minlength=len(classes)) / prediction.numel()
    return {classes.names[k]: counts[k].item() for k in counts.argsort(descending=True).tolist()
            if counts[k] > 0}


def describe(prediction: Tensor, classes: Classes) -> str:
    """One line for a screen: the classes with the largest shares."""
    largest = list(shares(prediction, classes).items())[:8]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in largest)


# -------------------------------------------------------------------------------- the figure

# Okabe and Ito's colours, which differ for colour-blind eyes, then lighter and darker ones.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#f0e442",
           "#332288", "#999933", "#882255", "#44aa99", "#aa4499", "#117733", "#ddcc77",
           "#6699cc", "#661100", "#88ccee", "#cc6677", "#bbbbbb", "#4d4d4d")
MOST_NAMED = 24     # classes in a legend


def colours(panels: dict[str, Tensor], classes: Classes) -> dict[str, str]:
    """A colour for each class, always the same; of many classes, for those that occur most."""
    if len(classes) <= len(PALETTE):
        return dict(zip(classes.names, PALETTE))
    total: dict[str, float] = {}
    for prediction in panels.values():
        for name, share in shares(prediction, classes).items():
            total[name] = total.get(name, 0) + share
    order = sorted(total, key=lambda name: -total[name])
    return {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(order)}


def draw(photo: Tensor, panels: dict[str, Tensor], classes: Classes, path: str) -> None:
    """The photograph and, for each title, its regions in colour with names, and a legend."""
    colour_of = colours(panels, classes)
    H, W = photo.shape[-2:]
    columns = 1 + len(panels)
    inches = 5.5 if W >= H else 4.0         # of a panel
    figure, axes = plt.subplots(1, columns, figsize=(inches * columns, inches * H / W))
    # Titles and legends lie outside, so panels keep their size.
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.03)
    axes[0].imshow(photo.permute(1, 2, 0))
    axes[0].set_title("photograph", fontsize=9)
    for axis, (title, prediction) in zip(axes[1:], panels.items()):
        paint(axis, photo, prediction, classes, colour_of, inches)
        axis.set_title(title, fontsize=9, wrap=True)
        legend(axis, prediction, classes, colour_of, inches)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(path, dpi=110, format="png", bbox_inches="tight")
    plt.close(figure)


def paint(axis: plt.Axes, photo: Tensor, prediction: Tensor, classes: Classes,
          colour_of: dict[str, str], inches: float) -> None:
    """The photograph in grey under its regions' colours, with dark borders and names.

    inches: about the width of the panel, so that no name covers another.
    """
    palette = np.array([matplotlib.colors.to_rgb(colour_of.get(name, "#000000"))
                        for name in classes.names])
    grey = photo.float().mean(dim=0, keepdim=True).permute(1, 2, 0).numpy() / 255
    axis.imshow((0.4 * grey + 0.6 * palette[prediction.numpy()]).clip(0, 1))
    border = torch.zeros_like(prediction, dtype=torch.bool)
    border[1:] |= prediction[1:] != prediction[:-1]
    border[:, 1:] |= prediction[:, 1:] != prediction[:, :-1]
    thick = F.max_pool2d(border[None].float(), 3, 1, 1)[0].numpy()
    axis.imshow(np.zeros((*thick.shape, 4)) + thick[..., None] * [0, 0, 0, 0.55])
    write_names(axis, prediction, classes, letter=9 / 72 / inches * prediction.shape[1])


def write_names(axis: plt.Axes, prediction: Tensor, classes: Classes, letter: float) -> None:
    """Each class's name at the deepest point of its regions, unless it would cover another.

    letter: the height of a letter in pixels of the image; bold ones are about 0.7 of that wide.
    """
    H, W = prediction.shape
    taken: list[tuple[float, float, float, float]] = []
    for name in shares(prediction, classes):
        x, y, depth = deepest(prediction == classes.names.index(name))
        half, tall = 0.37 * letter * len(name), 0.7 * letter
        # inside the image
        x, y = min(max(x, half), max(half, W - half)), min(max(y, tall), max(tall, H - tall))
        box = (x - half, y - tall, x + half, y + tall)
        covers = any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3]
                     for b in taken)
        if depth > 0.6 * letter and not covers:
            taken.append(box)
            axis.text(x, y, name, ha="center", va="center", fontsize=9, color="white",
                      weight="bold",
                      path_effects=[patheffects.withStroke(linewidth=2.5, foreground="black")])


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


def legend(axis: plt.Axes, prediction: Tensor, classes: Classes, colour_of: dict[str, str],
           inches: float) -> None:
    """Below a panel of so many inches: colour, name and share of each class, the largest first."""
    found = shares(prediction, classes)
    handles = [patches.Patch(color=colour_of[name], label=f"{name}  {100 * share:.1f} %")
               for name, share in list(found.items())[:MOST_NAMED]]
    if len(found) > MOST_NAMED:
        rest = sum(list(found.values())[MOST_NAMED:])
        handles.append(patches.Patch(color="none",
                                     label=f"{len(found) - MOST_NAMED} more  {100 * rest:.1f} %"))
    longest = max(len(handle.get_label()) for handle in handles)
    # a letter is about 0.07 inches wide
    columns = max(1, min(3, int(inches / (0.07 * longest + 0.5))))
    axis.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=columns,
                fontsize=8, frameon=False)


if __name__ == "__main__":
    main()
