"""Figures of what a model attends to and what it has learned (Figures 2, 3 and 7 to 11).

    python -m tools.visualize attention photo.jpg --anchor 320,200 --ckpt ...   # 2, 3, 7, 8, 11
    python -m tools.visualize cls photo.jpg --ckpt ...          # of [CLS]: first rows of 3 and 8
    python -m tools.visualize correlation photo.jpg --ckpt ...  # cosines with the anchor: Figure 9
    python -m tools.visualize segmentation photos/ --classes "cat, grass" --ckpt ...    # Figure 10
    python -m tools.visualize proxy photos/ --ckpt ...  # Figure 3's proxies, as numbers
    python -m tools.visualize curves out/declip out/other       # losses and learning rate of runs

CLIP, the trained model (without --ckpt: the same CLIP, its last block decoupled) and a vision
foundation model are shown one above the other on the same scale; of the paper's, SAM has no maps,
because it attends within windows. Each call writes one figure, out/KIND.png or what --figure names.
"""

import json
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import matplotlib.patches
import torch
import torch.nn.functional as F
from torch import Tensor

from data import fitted_size, normalize, read_image, resize
from eval_region import PanopticRegions
from eval_seg import (  # noqa: F401 - settings shared with eval_seg.py
    ATTENTION,
    CACHE,
    CKPT,
    CONTEXT,
    LOGIT_SCALE,
    LONG_SIDE,
    MODEL,
    OUT,
    PAMR,
    PRECISION,
    PRETRAINED,
    SCALE,
    SHORT_SIDE,
    STRIDE,
    TEMPLATES,
    THRESHOLD,
    WINDOW,
    WINDOW_BATCH,
    check_windows,
    predict,
)
from model import DECOUPLED, VFM, VisionTower, encode_classes, load_vfm, open_model, open_original
from tools.segment import (  # noqa: F401 - settings shared with segment.py
    BACKGROUND,
    CLASSES,
    MIN_NAMED,
    LEGEND,
    METHOD_NAMES,
    balanced,
    colours,
    find_classes,
    find_photos,
    paint,
    readable,
    resized,
    rules_of,
    shares,
    use_fonts,
)
from util import UserError, distributed, settings
from util.files import atomic_write
from util.precision import autocast, check_precision
from util.run import LOG_FIELDS

matplotlib.use("agg")       # writes files, on machines without a screen too
from matplotlib import pyplot as plt  # noqa: E402

ANCHOR: str | None = None           # x,y of the anchor in pixels; None: a place chosen by SEED
LAYERS = 5                          # how many layers are shown, the last among them
SIZE: int | None = None             # longest side of what the models see; None: 448, or less
VFM_MODEL: str | None = "vit_base_patch14_dinov2.lvd142m"       # timm ViT beside; None: none
VFM_PRETRAINED = True               # False: random weights
FIGURE: str | None = None           # file to write; None: out/KIND.png
SEED = 0                            # of the anchor
PROXIES = 0.02                      # share of the tokens that count as proxies, the most attended
ANNOTATIONS: str | None = None      # COCO-panoptic json: proxies are looked for in stuff only
PNGS: str | None = None             # folder of its PNGs
METHODS = ("clip", "maskclip", "sclip", "clearclip")            # shown beside the trained model


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
        if not 0 < cfg.PROXIES <= 1:
            raise UserError(f"PROXIES is {cfg.PROXIES}; it is a share of the patches, such as "
                            "0.02.")
        figure = KINDS[kind](cfg, files, ranks.device)
        path = Path(cfg.FIGURE or Path(cfg.OUT or "out") / f"{kind}.png")
        atomic_write(path, lambda file: figure.savefig(file, dpi=110, format="png",
                                                       bbox_inches="tight"))
        plt.close(figure)
        print(f"the figure is {path}")


# --------------------------------------------------------------------------- models and images

class Shown:
    """A model as a row of a figure: its title, what it sees, and what its blocks do with it.

    attention: a row of model.ATTENTIONS for the last block of a CLIP; None for a VFM.
    precision: the setting PRECISION.
    """

    def __init__(self, title: str, model: VisionTower | VFM, attention: str | None = None,
                 precision: str = "fp32"):
        self.title, self.model, self.attention = title, model, attention
        self.precision = precision
        self.options = (attention,) if attention else ()

    def image(self, photo: Tensor, grid: tuple[int, int]) -> Tensor:
        """The photograph as this model sees it with `grid` tokens, (1, 3, H, W)."""
        h, w = (side * self.model.patch_size for side in grid)
        return normalize(resize(photo, h, w), self.model.mean, self.model.std)[None]

    def attention_maps(self, photo: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """For each block its attention, the mean over heads: (tokens, tokens), rows sum to 1."""
        with autocast(self.precision, photo.device):
            maps = self.model.attention_maps(self.image(photo, grid), *self.options)
        return [rows[0].float() for rows in maps]

    def tokens(self, photo: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The patch tokens after each block, (N, D); of a decoupled block its content."""
        image, layers = self.image(photo, grid), range(self.model.num_layers)
        with autocast(self.precision, photo.device):
            outputs = self.model.encode_layers(image, layers, *self.options)
            if self.attention in DECOUPLED:
                outputs[-1] = self.model.encode_dense(image)[0]
        return [output[0].flatten(1).T.float() for output in outputs]


def open_models(cfg: SimpleNamespace, device: torch.device) -> list[Shown]:
    """CLIP, the trained model and the VFM, as far as there are weights for them."""
    trained = open_model(cfg).to(device)
    clip = open_original(cfg, trained)
    shown = [Shown(f"CLIP\n{readable(trained.model_name)}", clip.visual, "clip", cfg.PRECISION)]
    title = "DeCLIP" if cfg.CKPT else "decoupled, untrained"
    shown.append(Shown(f"{title}\ncontext {trained.context}", trained.visual, trained.context,
                       cfg.PRECISION))
    if cfg.VFM_MODEL:
        shown.append(Shown(f"VFM\n{readable(cfg.VFM_MODEL)}",
                           load_vfm(cfg.VFM_MODEL, cfg.VFM_PRETRAINED).to(device), None,
                           cfg.PRECISION))
    return shown


class Subject(NamedTuple):
    """The photograph of a figure, and the pixel (x, y) of its anchor, None if there is none."""
    name: str
    photo: Tensor       # uint8 (3, H, W)
    anchor: tuple[int, int] | None


def one_photo(cfg: SimpleNamespace, files: list[str]) -> Subject:
    """The photograph and its anchor.

    Raises UserError if there are several or none, and for an anchor that is not in it.
    """
    photos = find_photos(files)
    if len(photos) > 1:
        raise UserError(f"{len(photos)} photographs were given, but this figure is of one; name "
                        "one.")
    photo = read_image(photos[0], upright=True)
    use_fonts([photos[0].name])
    H, W = photo.shape[-2:]
    if cfg.ANCHOR is None:
        rng = random.Random(cfg.SEED)
        return Subject(photos[0].name, photo, (rng.randrange(W), rng.randrange(H)))
    try:
        x, y = (int(word) for word in cfg.ANCHOR.split(","))
    except ValueError:
        raise UserError(f"ANCHOR is {cfg.ANCHOR!r}; give two whole numbers, x,y in pixels."
                        ) from None
    if not (0 <= x < W and 0 <= y < H):
        raise UserError(f"ANCHOR {x},{y} is outside the photograph, which is {W} x {H}; choose x "
                        f"below {W} and y below {H}.")
    return Subject(photos[0].name, photo, (x, y))


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


class Scale(NamedTuple):
    """The colour scale that all maps of a figure share."""
    unit: str
    limits: tuple[float, float]
    cmap: str = "viridis"
    extend: str = "max"     # the end of the colour bar beyond which values are cut


def panels(subject: Subject, rows: list[tuple[str, list[tuple[int, Tensor]]]], title: str,
           scale: Scale) -> plt.Figure:
    """The photograph and, in a row for each model, maps (h, w) of its layers on one scale.

    Where a model has fewer layers than another, its last one stands under the other's last.
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
    axes = [[figure.add_subplot(places[row, 1 + column]) for column in range(columns)]
            for row in range(len(rows))]
    for line, (name, maps) in zip(axes, rows):
        line[0].set_ylabel(name, fontsize=10)
        for axis, (layer, values) in zip(line[columns - len(maps):], maps):
            drawn = axis.imshow(values, extent=(0, W, H, 0), cmap=scale.cmap,
                                vmin=scale.limits[0], vmax=scale.limits[1],
                                interpolation="nearest")
            axis.set_title(f"layer {layer + 1}", fontsize=9)
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        if subject.anchor and axis.images:
            axis.plot(*subject.anchor, "P", color="red", markeredgecolor="white", markersize=9)
    figure.suptitle(title, fontsize=12)
    every = [axis for line in axes for axis in line]
    figure.colorbar(drawn, ax=every, shrink=0.8, label=scale.unit, extend=scale.extend)
    return figure


# ------------------------------------------------------------------------------- the figures

def attention(cfg: SimpleNamespace, files: list[str], device: torch.device,
              of_cls: bool = False) -> plt.Figure:
    """What the anchor's token attends to, or [CLS], in some layers of each model."""
    subject = one_photo(cfg, files)
    shown, photo = open_models(cfg, device), subject.photo
    grid = grid_of(photo, cfg.SIZE, shown[0].model)
    if of_cls:
        subject = subject._replace(anchor=None)
        shown = [each for each in shown if each.model.num_prefix_tokens]
    rows, N = [], grid[0] * grid[1]
    for each in shown:
        maps, prefix = each.attention_maps(photo.to(device), grid), each.model.num_prefix_tokens
        token = 0 if of_cls else prefix + token_of(subject.anchor, photo, grid)
        layers = chosen_layers(len(maps), cfg.LAYERS)
        rows.append((each.title, [(layer, maps[layer][token, prefix:].view(grid).cpu() * N)
                                  for layer in layers]))
    values = torch.cat([values.flatten() for _, maps in rows for _, values in maps])
    title = f"Attention of {'[CLS]' if of_cls else 'the marked patch'}, mean over heads"
    scale = Scale("times the mean over patches", (0, values.quantile(0.995).item()))
    return panels(subject, rows, title, scale)


def cls(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """What [CLS] attends to (Figure 8)."""
    return attention(cfg, files, device, of_cls=True)


def correlation(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """The cosine of the anchor's token with all others, after some layers (Figure 9)."""
    subject = one_photo(cfg, files)
    shown, photo = open_models(cfg, device), subject.photo
    grid, rows = grid_of(photo, cfg.SIZE, shown[0].model), []
    for each in shown:
        tokens = [F.normalize(part, dim=-1) for part in each.tokens(photo.to(device), grid)]
        token = token_of(subject.anchor, photo, grid)
        maps = [(part @ part[token]).view(grid).cpu() for part in tokens]
        rows.append((each.title,
                     [(layer, maps[layer]) for layer in chosen_layers(len(maps), cfg.LAYERS)]))
    title = "Cosine of the marked patch's token with all others"
    return panels(subject, rows, title, Scale("cosine", (-0.2, 1), "magma", "min"))


def proxy(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """How much of all attention the few most attended patches get, by layer.

    The proxy tokens that Figure 3 shows, as numbers (section 3.1).
    """
    photos, stuff = find_photos(files), stuff_of(cfg)
    shown = open_models(cfg, device)
    shares_of = {each.title: [] for each in shown}
    for path in photos:
        photo = read_image(path, upright=stuff is None)
        grid = grid_of(photo, cfg.SIZE, shown[0].model)
        allowed = stuff(path, grid) if stuff else torch.ones(grid[0] * grid[1], dtype=torch.bool)
        for each in shown:
            maps, prefix = each.attention_maps(photo.to(device), grid), each.model.num_prefix_tokens
            shares_of[each.title].append([proxy_share(rows[prefix:, prefix:].cpu(), allowed,
                                                      cfg.PROXIES) for rows in maps])
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    depth = max(each.model.num_layers for each in shown)
    print(f"{'% of attention, layer':34}" + "".join(f"{n + 1:7}" for n in range(depth)))
    for title, of_photos in shares_of.items():
        mean = 100 * torch.tensor(of_photos).mean(dim=0)
        axis.plot(range(1, len(mean) + 1), mean, marker="o", label=title.replace("\n", ", "))
        print(f"{title.replace(chr(10), ', '):34}" + "".join(f"{value:7.1f}" for value in mean))
    axis.axhline(100 * cfg.PROXIES, color="grey", linestyle=":",
                 label="if all were attended equally")
    where = "background patches" if stuff else "patches"
    axis.set(xlabel="layer", ylabel="% of all patches' attention", ylim=(0, None),
             xticks=range(1, 1 + depth),
             title=f"Attention drawn by the {100 * cfg.PROXIES:g} % most attended {where}, "
                   f"{len(photos)} photographs")
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)
    return figure


def proxy_share(rows: Tensor, allowed: Tensor, share: float) -> float:
    """Attention (N, N) among patches -> what the most attended of the `allowed` (N,) get of it.

    share: how many of the N patches those are.
    """
    count = max(1, round(share * len(rows)))
    received = (rows / rows.sum(dim=1, keepdim=True)).mean(dim=0)
    received = received[allowed]
    return received.topk(min(count, len(received))).values.sum().item() if len(received) else 0.0


def stuff_of(cfg: SimpleNamespace) -> Callable[[Path, tuple[int, int]], Tensor] | None:
    """With ANNOTATIONS: a function of a photo's path and a grid -> bool (h * w,), is background."""
    if cfg.ANNOTATIONS is None:
        return None
    regions = PanopticRegions(cfg.ANNOTATIONS, cfg.PNGS or Path(cfg.ANNOTATIONS).with_suffix(""),
                              "", crowd=True)
    place = {Path(regions.file_names[each["image_id"]]).name: index
             for index, each in enumerate(regions.annotations)}

    def find(path: Path, grid: tuple[int, int]) -> Tensor:
        if path.name not in place:
            raise UserError(f"{cfg.ANNOTATIONS} says nothing of {path.name}; give the photographs "
                            "that it is about.")
        regions.images = path.parent
        sample = regions[place[path.name]]
        # The last entry is for pixels without a region, -1.
        is_stuff = torch.tensor([not regions.is_thing[label] for label in sample.labels] + [False])
        is_stuff = is_stuff[sample.region_ids.long()][None].float()
        return F.adaptive_avg_pool2d(is_stuff, grid)[0].flatten() > 0.5
    return find


def segmentation(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """Photographs, each by several methods (Figure 10)."""
    check_windows(cfg)
    classes, photos = find_classes(cfg), find_photos(files)[:6]
    use_fonts([*classes.names, *(path.name for path in photos)])
    images = [read_image(path, upright=True) for path in photos]
    # 1. Every method's classes of pixels
    trained = open_model(cfg).to(device)
    clip = open_original(cfg, trained)
    text = encode_classes(clip, classes, cfg.TEMPLATES, cfg.CACHE)
    columns = {METHOD_NAMES.get(name, name): (clip, name) for name in cfg.METHODS}
    columns["decoupled, untrained" if clip is trained else "DeCLIP"] = trained, None
    on_device = [image.to(device) for image in images]
    found = {(row, title): prediction.cpu() for title, (model, attention) in columns.items()
             for row, prediction in enumerate(predict(rules_of(cfg, model, attention), model,
                                                      classes, text, on_device))}
    # 2. A row for each photograph
    heights = [2.6 * image.shape[1] / image.shape[2] for image in images]
    figure, axes = plt.subplots(len(photos), 1 + len(columns), squeeze=False, layout="constrained",
                                figsize=(2.7 * (1 + len(columns)), sum(heights) + 1),
                                height_ratios=heights)
    colour_of = colours(found, classes)
    for row, (line, image) in enumerate(zip(axes, images)):
        picture, drawn = resized(image, {title: found[row, title] for title in columns}, 640)
        line[0].imshow(picture.permute(1, 2, 0), aspect="auto")
        line[0].set_ylabel(photos[row].name, fontsize=9)
        for axis, title in zip(line[1:], columns):
            paint(axis, picture, drawn[title], classes, colour_of, inches=2.6)
    for axis, title in zip(axes[0], ["photograph", *columns]):
        axis.set_title(title, fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    # 3. One legend
    seen = dict.fromkeys(name for each in found.values()
                         for name, share in shares(each, classes).items() if share >= MIN_NAMED)
    handles = [matplotlib.patches.Patch(color=colour_of[name], label=name)
               for name in list(seen)[:24]]
    figure.legend(handles=handles, loc="outside lower center", ncols=balanced(len(handles), 8),
                  **LEGEND | {"fontsize": 9.5})
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
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        wrong = next((name for name in ("step", "lr") for line in lines if name not in dict(line)),
                     None if losses_of(lines) or not lines else "loss")
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no log of train.py ({error}); give a log.jsonl of one."
                        ) from None
    if wrong or not lines:
        raise UserError(f"{path} is no log of train.py (it has no {wrong or 'line'}); give a "
                        "log.jsonl of one.")
    return lines


KINDS = {"attention": attention, "cls": cls, "correlation": correlation, "proxy": proxy,
         "segmentation": segmentation, "curves": curves}

if __name__ == "__main__":
    main()
