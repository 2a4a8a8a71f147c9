"""Figures of what a model attends to and what it has learned (Figures 2, 3 and 6 to 11).

    python -m tools.visualize attention photo.jpg --anchor 320,200 --ckpt ...   # 2, 3, 7, 8, 11
    python -m tools.visualize cls photo.jpg --ckpt ...          # of [CLS]: first rows of 3 and 8
    python -m tools.visualize correlation photo.jpg --ckpt ...  # cosines with the anchor: Figure 9
    python -m tools.visualize segmentation photos/ --classes "cat, grass" --ckpt ...    # Figure 10
    python -m tools.visualize sizes out/declip/region.json      # eval_region.py's: Figure 6
    python -m tools.visualize curves out/declip out/other       # losses and learning rate of runs

CLIP, the trained model (without --ckpt: the same CLIP, its last block decoupled) and a vision
foundation model are shown one above the other on the same scale; of the paper's, SAM has no maps,
because it attends within windows. Each call writes one figure, out/KIND.png or what --figure names.
"""

import json
import random
import re
import sys
from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib import patches
from matplotlib import pyplot as plt
from torch import Tensor

from data import fitted_size, normalize, resize
from eval_seg import Protocol
from model import DECOUPLED, VFM, VisionTower, load_vfm
from tools import figures, segment
from util import UserError, distributed, printable, settings
from util.images import read_image
from util.precision import autocast, check_precision
from util.results import as_written, read_results
from util.run import LOG_FIELDS
from util.towers import SAM

SHARED = {"eval_region": ["The model", "Names and numbers"], "eval_seg": ["The windows"],
          "tools.segment": ["What is named"]}

# What is shown
ANCHOR: str | None = None           # x,y of the anchor in pixels; None: a place chosen by SEED
SEED = 0                            # of the anchor
LAYERS = 5                          # how many layers are shown, the last among them
SIZE: int | None = None             # longest side of what the models see; None: 448, or less
VFM_MODEL: str | None = "vit_base_patch14_dinov2.lvd142m"       # timm ViT beside; None: none
VFM_PRETRAINED = True               # False: random weights
METHODS = ("clip", "maskclip", "sclip", "clearclip")            # shown beside the trained model

# What is written
FIGURE: str | None = None           # file to write; None: OUT/KIND.png
OUT: str | None = None              # folder of the figure; None: out


def main(argv: list[str] | None = None) -> None:
    """Draws the figure that the command line (or `argv`) asks for."""
    cfg = settings.parse(argv, sys.modules[__name__], positional="KIND_AND_FILES")
    with distributed.session(__file__) as ranks, torch.inference_mode():
        kind, *files = cfg.KIND_AND_FILES
        if kind not in KINDS or not files:
            problem = "needs files after it" if kind in KINDS else "is no kind of figure"
            raise UserError(f"{kind!r} {problem}; say python -m tools.visualize KIND FILES, with "
                            f"KIND one of {', '.join(KINDS)}.")
        settings.check_min(cfg, LAYERS=1, SIZE=1)
        check_precision(cfg.PRECISION)
        figures.check_figure(cfg)
        settings.refuse_unread(cfg, sys.modules[__name__], [kind], READ_BY)
        settings.refuse_unused(cfg, OUT=cfg.FIGURE and "is for a figure without a name of its own",
                               SEED=cfg.ANCHOR and "chooses the anchor if ANCHOR does not",
                               VFM_PRETRAINED=not cfg.VFM_MODEL and "is of the VFM, but none is")
        figure, failed = KINDS[kind](cfg, files, ranks.device), []
        if isinstance(figure, tuple):       # the photographs that it shows, and those that failed
            figure, failed = figure
        path = Path(cfg.FIGURE or Path(cfg.OUT or "out") / f"{kind}.png")
        figures.save_figure(figure, path, bbox_inches="tight")
        print(f"the figure is {printable(str(path))}")
        segment.say_failed(failed)


# Which kinds of figure read a setting, or a block of them; others are read by all.
LAYERWISE = "attention cls correlation"
READ_BY = {"The model": f"{LAYERWISE} segmentation", "ATTENTION": "", "What is shown": LAYERWISE,
           "ANCHOR": "attention correlation", "SEED": "attention correlation",
           "PRECISION": f"{LAYERWISE} segmentation", **dict.fromkeys((
               "TEMPLATES", "CACHE", "The windows", "What is named", "METHODS"), "segmentation")}


# ------------------------------------------------------------------------------ attention maps

@torch.no_grad()
def attention_maps(model: VisionTower | VFM, images: Tensor, attention: str | None = None,
                   of_cls: bool = False) -> list[Tensor]:
    """(B, 3, H, W) -> for each block its attention, the mean over heads: (B, T, T).

    T are the prefix tokens, [CLS] first, then the N patches; rows sum to 1. attention: the row of
    ATTENTIONS that the last block of a CLIP computes (equation 6), None for its context. of_cls:
    where a probe attends for the image's embedding, the last map is the probe's, (B, 1, T).
    Raises UserError for SAM, which attends within windows.
    """
    if isinstance(model.trunk, SAM):
        raise UserError(f"{model.name} attends within windows, so it has no attention from one "
                        "token to all; choose another VFM_MODEL, such as "
                        "vit_base_patch14_dinov2.lvd142m, or none.")
    model, maps = deepcopy(model), []
    for block in model.trunk.blocks:
        # Only the plain form has the matrix; it passes it to a dropout.
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(
            lambda _, inputs: maps.append(inputs[0].mean(dim=1)))
    if isinstance(model, VFM):
        model(images)
        return maps

    probe = model.family.probe() if of_cls else None
    if probe is not None:
        attention = "clip"      # a probe meets the keys, not what makes X_context

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        q = q if probe is None else probe
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        maps.append((q @ k.mT * scale).softmax(dim=-1).mean(dim=1))
        return v        # what the block makes of it is not looked at

    model.attend, last = attend, model.num_layers - 1
    model.encode_layers(images, [last], attention)
    # Without any projection each token attends to itself.
    of_last = maps[last:] or [torch.eye(maps[0].shape[-1], device=images.device).expand_as(maps[0])]
    return [*maps[:last], torch.stack(of_last).mean(dim=0)]


# --------------------------------------------------------------------------- models and images

class Shown(NamedTuple):
    """A model as a row of a figure: its title, what it sees, and what its blocks do with it."""
    title: str
    model: VisionTower | VFM
    attention: str | None = None        # row of ATTENTIONS for the last block; None for a VFM
    precision: str = "fp32"             # the setting PRECISION

    def image(self, photo: Tensor, grid: tuple[int, int]) -> Tensor:
        """The photograph as this model sees it with `grid` tokens, (1, 3, H, W)."""
        h, w = (side * self.model.patch_size for side in grid)
        return normalize(resize(photo, h, w), self.model.mean, self.model.std)[None]

    def maps(self, photo: Tensor, grid: tuple[int, int], of_cls: bool = False) -> list[Tensor]:
        """For each block its attention, the mean over heads: (tokens, tokens), rows sum to 1.

        of_cls: as in attention_maps.
        """
        with autocast(self.precision, photo.device):
            maps = attention_maps(self.model, self.image(photo, grid), self.attention, of_cls)
        return [rows[0].float() for rows in maps]

    def tokens(self, photo: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The patch tokens after each block, (N, D); of a decoupled block its content."""
        image, model = self.image(photo, grid), self.model
        with autocast(self.precision, photo.device):
            if isinstance(model, VFM):
                outputs = model.trunk.forward_intermediates(image, intermediates_only=True)
            else:
                outputs = model.encode_layers(image, range(model.num_layers), self.attention)
            if self.attention in DECOUPLED:
                outputs[-1] = model.encode_dense(image)[0]
        return [output[0].flatten(1).T.float() for output in outputs]


def open_models(cfg: SimpleNamespace, device: torch.device) -> list[Shown]:
    """CLIP, the trained model and the VFM, as far as there are weights for them."""
    trained = segment.open_shown(cfg).to(device)
    clip = segment.open_original(cfg, trained)
    name = "DeCLIP" if cfg.CKPT else "decoupled, untrained"
    rows = [(f"CLIP\n{segment.readable(trained.model_name)}", clip.visual, "clip"),
            (f"{name}\ncontext {trained.context}", trained.visual, trained.context)]
    if cfg.VFM_MODEL:
        vfm = load_vfm(cfg.VFM_MODEL, cfg.VFM_PRETRAINED).to(device)
        rows.append((f"VFM\n{segment.readable(cfg.VFM_MODEL)}", vfm, None))
    return [Shown(*row, cfg.PRECISION) for row in rows]


class Subject(NamedTuple):
    """The photograph of a figure, and the pixel (x, y) of its anchor, None if there is none."""
    name: str
    photo: Tensor       # uint8 (3, H, W)
    anchor: tuple[int, int] | None


def one_photo(cfg: SimpleNamespace, files: list[str]) -> Subject:
    """The photograph and its anchor.

    Raises UserError if there are several or none, and for an anchor that is not in it.
    """
    photos = [*segment.find_photos(files)]
    if len(photos) > 1:
        raise UserError(f"{len(photos)} photographs were given, but this figure is of one; name "
                        "one.")
    photo = read_image(photos[0], upright=True)
    figures.use_fonts([printable(photos[0].name)])
    H, W = photo.shape[-2:]
    rng = random.Random(cfg.SEED)
    anchor = rng.randrange(W), rng.randrange(H)
    if cfg.ANCHOR is not None:
        found = re.fullmatch(r" *(\d+) *, *(\d+) *", cfg.ANCHOR)
        anchor = (int(found[1]), int(found[2])) if found else (W, H)
        settings.check(cfg, ANCHOR=(anchor[0] < W and anchor[1] < H, "two whole numbers, x,y in "
                                    f"pixels of the photograph, which is {W} x {H}"))
    return Subject(printable(photos[0].name), photo, anchor)


def grid_of(photo: Tensor, size: int | None, clip: VisionTower) -> tuple[int, int]:
    """Rows and columns of tokens of a photograph whose longest side is resized to about `size`.

    None: to 448, as segmentation does, or twice the side that CLIP learned from if that is less.
    """
    h, w = fitted_size(photo, size or min(448, 2 * clip.image_size))
    return max(1, round(h / clip.patch_size)), max(1, round(w / clip.patch_size))


def token_of(anchor: tuple[int, int], photo: Tensor, grid: tuple[int, int]) -> int:
    """The number of the token that a pixel (x, y) lies in."""
    return anchor[1] * grid[0] // photo.shape[1] * grid[1] + anchor[0] * grid[1] // photo.shape[2]


def chosen_layers(depth: int, count: int) -> list[int]:
    """`count` layers spread over a tower, the last among them, counted from 0."""
    return sorted({round((place + 1) * depth / min(count, depth)) - 1
                   for place in range(min(count, depth))})


def panels(subject: Subject, rows: list[tuple[str, list[tuple[int, Tensor]]]], title: str,
           unit: str, extend: str = "max", **scale: str | float) -> plt.Figure:
    """The photograph and, in a row for each model, maps (h, w) of its layers on one scale.

    Where a model has fewer layers than another, its last one stands under the other's last.
    extend: the end of the colour bar beyond which values are cut. scale: arguments of imshow.
    """
    H, W = subject.photo.shape[-2:]
    columns = max(len(maps) for _, maps in rows)
    # Of a map; the area is the same for every shape.
    width, height = 2.3 * (W / H) ** 0.5, 2.3 * (H / W) ** 0.5 + 0.2
    larger = 1.5        # the photograph's width in maps
    figure = plt.figure(layout="constrained", figsize=(
        width * (columns + larger) + 1.1, height * max(len(rows), larger) + 0.4))
    places = figure.add_gridspec(len(rows), columns + 1, width_ratios=[larger] + [1] * columns)
    first = figure.add_subplot(places[:, 0])
    first.imshow(subject.photo.permute(1, 2, 0))
    first.set_title(subject.name, fontsize=10)
    for row, (name, maps) in enumerate(rows):
        line = [figure.add_subplot(places[row, 1 + column]) for column in range(columns)]
        line[0].set_ylabel(name, fontsize=10)
        for axis, (layer, values) in zip(line[columns - len(maps):], maps):
            drawn = axis.imshow(values, extent=(0, W, H, 0), interpolation="nearest", **scale)
            axis.set_title(f"layer {layer + 1}", fontsize=9)
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if subject.anchor and axis.images:
            axis.plot(*subject.anchor, "P", color="red", markeredgecolor="white", markersize=9)
    figure.suptitle(title, fontsize=12)
    figure.colorbar(drawn, ax=figure.axes[1:], shrink=0.8, label=unit, extend=extend)
    return figure


# ------------------------------------------------------------------------------- the figures

MAX_ROWS = 40       # photographs of one figure


def attention(cfg: SimpleNamespace, files: list[str], device: torch.device,
              of_cls: bool = False) -> plt.Figure:
    """What the anchor's token attends to, or [CLS], in some layers of each model; in a head that
    pools, the probe that stands for [CLS]: all there is of a tower without that token."""
    subject, shown = one_photo(cfg, files), open_models(cfg, device)
    grid = grid_of(subject.photo, cfg.SIZE, shown[0].model)
    if of_cls:
        subject = subject._replace(anchor=None)
        shown = [row for row in shown if row.model.num_prefix_tokens or row.attention]
    rows, N = [], grid[0] * grid[1]
    for row in shown:
        prefix = row.model.num_prefix_tokens
        maps = row.maps(subject.photo.to(device), grid, of_cls)
        layers = chosen_layers(len(maps), cfg.LAYERS if prefix or not of_cls else 1)
        token = 0 if of_cls else prefix + token_of(subject.anchor, subject.photo, grid)
        rows.append((row.title, [(layer, maps[layer][token, prefix:].view(grid).cpu() * N)
                                 for layer in layers]))
    values = torch.cat([values.flatten() for _, maps in rows for _, values in maps])
    has_probe = shown[0].model.family.probe() is not None
    cls = "[CLS], and of the probe that pools in the last layer" if has_probe else "[CLS]"
    title = f"Attention of {cls if of_cls else 'the marked patch'}, mean over heads"
    return panels(subject, rows, title, "times the mean over patches", vmin=0,
                  vmax=values.quantile(0.995).item())


def correlation(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """The cosine of the anchor's token with all others, after some layers (Figure 9)."""
    subject, shown = one_photo(cfg, files), open_models(cfg, device)
    grid, rows = grid_of(subject.photo, cfg.SIZE, shown[0].model), []
    anchor = token_of(subject.anchor, subject.photo, grid)
    for row in shown:
        tokens = [F.normalize(part, dim=-1) for part in row.tokens(subject.photo.to(device), grid)]
        rows.append((row.title, [(layer, (tokens[layer] @ tokens[layer][anchor]).view(grid).cpu())
                                 for layer in chosen_layers(len(tokens), cfg.LAYERS)]))
    title = "Cosine of the marked patch's token with all others"
    return panels(subject, rows, title, "cosine", "min", cmap="magma", vmin=-0.2, vmax=1)


def segmentation(cfg: SimpleNamespace, files: list[str], device: torch.device
                 ) -> tuple[plt.Figure, list[str]]:
    """Photographs, each by several methods (Figure 10); and why others could not be shown.

    Raises UserError if there are too many for a figure, or none can be read.
    """
    Protocol.of(cfg)        # UserError for a setting out of its range
    classes, photos = segment.find_classes(cfg), segment.find_photos(files)
    if len(photos) > MAX_ROWS:
        raise UserError(f"{len(photos)} photographs were given, but a figure has room for "
                        f"{MAX_ROWS}; name fewer, or take tools.segment, which draws each.")
    figures.use_fonts([*classes.names, *(printable(path.name) for path in photos)])
    rows = {}       # by name: the picture, and each method's classes of its pixels

    # 1. Every method's classes of pixels, as large as they are drawn
    def load() -> dict[str, segment.Segmenter]:
        trained = segment.open_shown(cfg).to(device)
        clip = segment.open_original(cfg, trained)
        columns = {segment.METHOD_NAMES.get(name, name): (clip, name) for name in cfg.METHODS}
        columns["decoupled, untrained" if clip is trained else "DeCLIP"] = trained, None
        return {title: segment.by_clip(cfg, model, classes, attention)
                for title, (model, attention) in columns.items()}

    def segment_one(columns: dict, photo: Tensor, path: Path, _: Path) -> str:
        found = {title: by([photo.to(device)])[0].cpu() for title, by in columns.items()}
        rows[path] = figures.resized(photo, found, 640)
        return str(path)

    failed = segment.each_photo(photos, load, segment_one)
    if not rows:
        segment.say_failed(failed)
    # 2. A row for each photograph
    columns = [*next(iter(rows.values()))[1]]
    found = {(path, title): drawn[title] for path, (_, drawn) in rows.items() for title in columns}
    heights = [2.6 * picture.shape[1] / picture.shape[2] for picture, _ in rows.values()]
    figure, axes = plt.subplots(len(rows), 1 + len(columns), squeeze=False, layout="constrained",
                                figsize=(2.7 * (1 + len(columns)), sum(heights) + 1),
                                height_ratios=heights)
    colour_of = figures.colours(found, classes)
    for line, (path, (picture, drawn)) in zip(axes, rows.items()):
        line[0].imshow(picture.permute(1, 2, 0), aspect="auto")
        line[0].set_ylabel(printable(path.name), fontsize=9)
        for axis, title in zip(line[1:], columns):
            figures.paint(axis, picture, drawn[title], classes, colour_of, inches=2.6)
    for axis, title in zip(axes[0], ["photograph", *columns]):
        axis.set_title(title, fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    # 3. One legend
    handles = [patches.Patch(color=colour_of[name], label=name) for name in
               figures.seen_classes(found.values(), classes)[:figures.MAX_NAMED]]
    figure.legend(handles=handles, loc="outside lower center",
                  ncols=figures.balanced(len(handles), 8), **figures.LEGEND | {"fontsize": 9.5})
    return figure, failed


def sizes(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """Top-1 mAcc over the image's size, for things and for stuff, from a region.json (Figure 6):
    its newest evaluation, or that of CKPT, MODEL and ATTENTION."""
    if len(files) > 1:
        raise UserError(f"{len(files)} files were given, but this figure is of one; name one.")
    asked = {name: getattr(cfg, name.upper()) for name in ("ckpt", "model", "attention")}
    found = read_results(files[0], **{name: value for name, value in asked.items() if value})
    with as_written(files[0]):
        if not found:
            raise ValueError("no result of this CKPT, MODEL and ATTENTION")
        of = found[-1]["of"]        # the newest, with the other sizes of the same evaluation
        means = dict(sorted((result["of"]["size"], result["mAcc"]) for result in found
                            if result["of"] | {"size": 0} == of | {"size": 0}))
        lines = {kind: {label: [of_size[f"{way} {kind}"]["top1"] for of_size in means.values()]
                        for way, label in (("box", "boxes"), ("mask", "masks"),
                                           ("crop", "[CLS] of crops"))}
                 for kind in ("thing", "stuff")}
        title = found[-1]["title"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axis, kind in zip(axes, lines):
        for label, values in lines[kind].items():
            if None not in values:
                axis.plot([*means], values, marker="o", label=label)
        axis.set(title={"thing": "things", "stuff": "stuff"}[kind], xticks=[*means],
                 xlabel="longest side of the image, px")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 mAcc, %")
    axes[1].legend()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    return figure


def curves(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """Every loss and the learning rate over steps, from the log.jsonl of one run or several."""
    paths = [Path(file) / "log.jsonl" if Path(file).is_dir() else Path(file) for file in files]
    runs = [(str(path.parent), read_log(path)) for path in paths]
    names = [*losses_of(line for _, lines in runs for line in lines), "lr"]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.6), layout="constrained")
    for axis, name in zip(axes, names):
        for label, lines in runs:
            axis.plot([line["step"] for line in lines], [line.get(name) for line in lines],
                      label=label)
        axis.set(title=TITLES.get(name, name), xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


TITLES = {"content": "content loss (equation 7)", "context": "context loss (equation 9)",
          "lr": "learning rate"}


def losses_of(lines: Iterable[dict]) -> list[str]:
    """The names of all losses in lines of a log, in the order in which they first appear."""
    return [name for name in dict.fromkeys(name for line in lines for name in line)
            if name not in LOG_FIELDS]


def read_log(path: Path) -> list[dict]:
    """The lines of a run's log.jsonl; UserError if it is none."""
    if not path.is_file():
        raise UserError(f"There is no {path}; give folders that train.py wrote, or their "
                        "log.jsonl.")
    try:
        lines = [dict(json.loads(line)) for line in path.read_text().splitlines()]
        has = {name: all(name in line for line in lines) for name in ("step", "lr")}
        has = {"line": bool(lines), **has, "loss": bool(losses_of(lines))}
        if not all(has.values()):
            raise ValueError(f"it has no {next(name for name in has if not has[name])}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no log of train.py ({error}); give a log.jsonl of one."
                        ) from None
    return lines


KINDS = {"attention": attention, "cls": partial(attention, of_cls=True),
         "correlation": correlation, "segmentation": segmentation, "sizes": sizes, "curves": curves}

if __name__ == "__main__":
    main()
