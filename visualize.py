"""Pictures of what a model attends to and what it has learned (Figures 2, 3 and 7 to 11 of the paper).

    python visualize.py attention photo.jpg --anchor 320,200 --ckpt out/declip/declip.safetensors   # Figures 2, 7, 11
    python visualize.py cls photo.jpg --ckpt ...                 # what [CLS] attends to, layer by layer: Figure 8
    python visualize.py correlation photo.jpg --ckpt ...         # how like the anchor every token is: Figure 9
    python visualize.py segmentation photos/ --classes "cat, grass" --ckpt ...      # methods side by side: Figure 10
    python visualize.py proxy photos/ --ckpt ...                 # Figure 3 as a number: the attention that few tokens draw
    python visualize.py curves out/declip out/other              # losses and learning rate of runs

CLIP, the trained model (without --ckpt: the same CLIP, its last block decoupled) and a vision foundation model are shown
side by side, with the same scale. Each call writes one picture, out/KIND.png or what --picture names.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import matplotlib.patches
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed
import evaluation
import settings
from data import PanopticRegions, fitted_size, normalize, read_image, resize
from eval_seg import check_windows, predict
from model import DECOUPLED, VFM, DeCLIP, load_vfm, write_whole
from segment import colours, find_classes, find_photos, for_display, paint
from settings import UserError

matplotlib.use("agg")       # pictures go to files, on machines without a screen too
from matplotlib import pyplot as plt  # noqa: E402

# Besides these, the settings of evaluation.py: which model, where the result goes.
ANCHOR: str | None = None           # x,y of the anchor in pixels of the photograph; None: a place drawn by SEED
LAYERS = 5                          # how many layers are shown, the last among them
SIZE = 448                          # longest side of the picture that the models see
VFM_MODEL: str | None = "vit_base_patch14_dinov2.lvd142m"       # timm ViT shown beside; None: none
VFM_PRETRAINED = True               # False: random weights
PICTURE: str | None = None          # file to write; None: out/KIND.png
SEED = 0                            # of the anchor

PROXIES = 0.02                      # share of the tokens that count as proxies, the most attended ones
ANNOTATIONS: str | None = None      # COCO-panoptic json of the photographs: proxies are looked for in stuff alone
PNGS: str | None = None             # folder of its PNGs

CLASSES = ""                        # of the segmentation: names with commas between them, or a class file
BACKGROUND = False                  # as in segment.py
THRESHOLD: float | None = None      # as in segment.py
LOGIT_SCALE = 40.0                  # as in segment.py
METHODS = ("clip", "maskclip", "sclip", "clearclip")            # shown beside the trained model
SHORT_SIDE = 448                    # of the segmented picture
WINDOW = 336                        # side of a window; a multiple of the patch size
STRIDE = 112                        # from window to window
WINDOW_BATCH = 16                   # windows of one forward pass


def main(argv: list[str] | None = None) -> None:
    """Draws the picture that the command line (or `argv`) asks for."""
    cfg = settings.parse(argv, sys.modules[__name__], evaluation, positional="KIND_AND_FILES")
    with distributed.session(__file__) as ranks, torch.inference_mode():
        kind, *files = cfg.KIND_AND_FILES
        if kind not in KINDS or not files:
            problem = "needs files after it" if kind in KINDS else "is no kind of picture"
            raise UserError(f"{kind!r} {problem}; say visualize.py KIND FILES, with KIND one of {', '.join(KINDS)}.")
        settings.check_least(cfg, LAYERS=1, SIZE=1)
        if not 0 < cfg.PROXIES <= 1:
            raise UserError(f"PROXIES is {cfg.PROXIES}; it is a share of the patches, such as 0.02.")
        figure = KINDS[kind](cfg, files, ranks.device)
        path = Path(cfg.PICTURE or Path(cfg.OUT or "out") / f"{kind}.png")
        write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png", bbox_inches="tight"))
        plt.close(figure)
        print(f"the picture is {path}")


# -------------------------------------------------------------------------------------------------- models and pictures

class Shown:
    """A model as a row of a picture: its title, what it sees, and what its blocks do with it."""

    def __init__(self, title: str, model: DeCLIP | VFM, decoupled: bool = False):
        self.title, self.model, self.decoupled = title, model, decoupled
        self.trunk = model.visual if isinstance(model, DeCLIP) else model.trunk
        if not hasattr(self.trunk.blocks[0].attn, "fused_attn") or not hasattr(self.trunk, "num_prefix_tokens"):
            raise UserError(f"{title.splitlines()[-1]} attends within windows, so it has no attention from one token to all; "
                            "choose another VFM_MODEL, such as vit_base_patch14_dinov2.lvd142m, or none.")

    def picture(self, photo: Tensor, grid: tuple[int, int]) -> Tensor:
        """The photograph as this model sees it with `grid` tokens, (1, 3, H, W)."""
        h, w = (side * self.model.patch_size for side in grid)
        return normalize(resize(photo, h, w), self.model.mean, self.model.std)[None]

    def attention(self, photo: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """For each block its attention, the mean over heads: (tokens, tokens), [CLS] and registers first, rows sum to 1."""
        with recorded_attention(self.trunk) as rows:
            self._run(self.picture(photo, grid))
        rows = [each[0].mean(dim=0) for each in rows]
        if self.decoupled:
            rows[-1] = decoupled_attention(self.model, self.picture(photo, grid))[0]
        return rows

    def tokens(self, photo: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """The patch tokens after each block, (N, D); of a decoupled block its content."""
        outputs, picture = [], self.picture(photo, grid)
        handles = [block.register_forward_hook(lambda _, given, out: outputs.append(out[0, -grid[0] * grid[1]:]))
                   for block in self.trunk.blocks]
        self._run(picture)
        for handle in handles:
            handle.remove()
        if self.decoupled:
            outputs[-1] = self.model.encode_dense(picture)[0][0].flatten(1).T
        return outputs

    def _run(self, picture: Tensor) -> None:
        self.model.encode_image(picture) if isinstance(self.model, DeCLIP) else self.model(picture)


@contextmanager
def recorded_attention(trunk: nn.Module) -> Iterator[list[Tensor]]:
    """Collects softmax(QKᵀ/√d) of every block of a timm ViT that runs inside: (B, heads, tokens, tokens) each."""
    rows, handles = [], []
    fused = [block.attn.fused_attn for block in trunk.blocks]
    for block in trunk.blocks:
        block.attn.fused_attn = False       # the plain form has the matrix, and hands it to a dropout
        handles.append(block.attn.attn_drop.register_forward_pre_hook(lambda _, given: rows.append(given[0])))
    try:
        yield rows
    finally:
        for block, was_fused in zip(trunk.blocks, fused):
            block.attn.fused_attn = was_fused
        for handle in handles:
            handle.remove()


def decoupled_attention(clip: DeCLIP, images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1 + N, 1 + N): the last block's attention by X_context, mean over heads (equation 6)."""
    x, extra, _ = clip.embed(images)
    for block in clip.visual.blocks[:-1]:
        x = block(x, **extra)
    heads = [clip.heads(name, clip.visual.blocks[-1].norm1(x)) for name in clip.context]
    scale = heads[0].shape[-1]**-0.5 if clip.scale is None else clip.scale
    return torch.stack([(each @ each.mT * scale).softmax(dim=-1) for each in heads]).mean(dim=(0, 2))


def open_models(cfg: SimpleNamespace, device: torch.device) -> list[Shown]:
    """CLIP, the trained model and the VFM, as far as there are weights for them."""
    trained = evaluation.open_model(cfg).to(device)
    shown = [Shown(f"CLIP\n{trained.model_name}", evaluation.open_original(cfg, trained))]
    title = "DeCLIP" if cfg.CKPT else "decoupled, untrained"
    shown.append(Shown(f"{title}\ncontext {trained.context}", trained, trained.context in DECOUPLED))
    if cfg.VFM_MODEL:
        shown.append(Shown(f"VFM\n{cfg.VFM_MODEL.split('.')[0]}", load_vfm(cfg.VFM_MODEL, cfg.VFM_PRETRAINED).to(device)))
    return shown


def one_photo(cfg: SimpleNamespace, files: list[str], shown: list[Shown]) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """The first photograph (3, H, W), its grid of tokens, and the anchor in its pixels."""
    photos = find_photos(files)
    if len(photos) > 1:
        raise UserError(f"{len(photos)} photographs were given, but this picture is of one; name one.")
    photo = read_image(photos[0], upright=True)
    H, W = photo.shape[-2:]
    grid = grid_of(photo, cfg.SIZE, shown[0].model.patch_size)
    if cfg.ANCHOR is None:
        draw = random.Random(cfg.SEED)
        return photo, grid, (draw.randrange(W), draw.randrange(H))
    try:
        x, y = (int(word) for word in cfg.ANCHOR.split(","))
    except ValueError:
        raise UserError(f"ANCHOR is {cfg.ANCHOR!r}; give two whole numbers, x,y in pixels.") from None
    if not (0 <= x < W and 0 <= y < H):
        raise UserError(f"ANCHOR {x},{y} is outside the photograph, which is {W} x {H}; choose x below {W} and y below {H}.")
    return photo, grid, (x, y)


def grid_of(photo: Tensor, size: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of tokens of a photograph whose longest side is resized to about `size`."""
    h, w = fitted_size(photo, size)
    return max(1, round(h / patch_size)), max(1, round(w / patch_size))


def token_of(anchor: tuple[int, int], photo: Tensor, grid: tuple[int, int]) -> int:
    """The number of the token that a pixel (x, y) lies in."""
    return anchor[1] * grid[0] // photo.shape[1] * grid[1] + anchor[0] * grid[1] // photo.shape[2]


def chosen_layers(depth: int, count: int) -> list[int]:
    """`count` layers spread over a tower, the last among them, counted from 0."""
    return sorted({round((place + 1) * depth / min(count, depth)) - 1 for place in range(min(count, depth))})


def panels(photo: Tensor, rows: list[tuple[str, list[tuple[int, Tensor]]]], anchor: tuple[int, int] | None, title: str,
           unit: str, limits: tuple[float, float], cmap: str = "viridis", extend: str = "max") -> plt.Figure:
    """The photograph, then a row of maps (h, w) for each model with their layers, all with one scale and one colour bar."""
    H, W = photo.shape[-2:]
    columns = 1 + max(len(maps) for _, maps in rows)
    width, height = 2.3 * (W / H) ** 0.5, 2.3 * (H / W) ** 0.5 + 0.2       # of a panel, whatever the photograph's shape
    figure, axes = plt.subplots(len(rows), columns, squeeze=False, layout="constrained",
                                figsize=(width * columns + 0.8, height * len(rows) + 0.6))
    for line, (name, maps) in zip(axes, rows):
        line[0].imshow(photo.permute(1, 2, 0))
        line[0].set_ylabel(name, fontsize=10)
        for axis, (layer, values) in zip(line[1:], maps):
            drawn = axis.imshow(values, extent=(0, W, H, 0), cmap=cmap, vmin=limits[0], vmax=limits[1], interpolation="nearest")
            axis.set_title(f"layer {layer + 1}", fontsize=9)
        for axis in line[1 + len(maps):]:
            axis.set_visible(False)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            for edge in axis.spines.values():
                edge.set_visible(False)
            if anchor:
                axis.plot(*anchor, "P", color="red", markeredgecolor="white", markersize=9)
    figure.suptitle(title, fontsize=11)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label=unit, extend=extend)
    return figure


# ------------------------------------------------------------------------------------------------------- the pictures

def attention(cfg: SimpleNamespace, files: list[str], device: torch.device, of_cls: bool = False) -> plt.Figure:
    """What the anchor's token attends to, or [CLS], in some layers of each model."""
    shown = open_models(cfg, device)
    photo, grid, anchor = one_photo(cfg, files, shown)
    if of_cls:
        shown = [each for each in shown if each.trunk.num_prefix_tokens]
    rows, N = [], grid[0] * grid[1]
    for each in shown:
        maps, prefix = each.attention(photo.to(device), grid), each.trunk.num_prefix_tokens
        token = 0 if of_cls else prefix + token_of(anchor, photo, grid)
        layers = chosen_layers(len(maps), cfg.LAYERS)
        rows.append((each.title, [(layer, maps[layer][token, prefix:].view(grid).cpu() * N) for layer in layers]))
    top = torch.cat([values.flatten() for _, maps in rows for _, values in maps]).quantile(0.995).item()
    title = f"Attention of {'[CLS]' if of_cls else 'the marked patch'}, mean over heads"
    return panels(photo, rows, None if of_cls else anchor, title, "times the mean over patches", (0, top))


def cls(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """What [CLS] attends to (Figure 8)."""
    return attention(cfg, files, device, of_cls=True)


def correlation(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """The cosine of the anchor's token with all tokens, after some layers of each model (Figure 9)."""
    shown = open_models(cfg, device)
    photo, grid, anchor = one_photo(cfg, files, shown)
    rows = []
    for each in shown:
        tokens = [F.normalize(part, dim=-1) for part in each.tokens(photo.to(device), grid)]
        maps = [(part @ part[token_of(anchor, photo, grid)]).view(grid).cpu() for part in tokens]
        rows.append((each.title, [(layer, maps[layer]) for layer in chosen_layers(len(maps), cfg.LAYERS)]))
    title = "Cosine of the marked patch's token with all others"
    return panels(photo, rows, anchor, title, "cosine", (-0.2, 1), "magma", extend="min")


def proxy(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """How much of all patches' attention the few most attended ones draw, layer by layer, mean over photographs (Figure 3)."""
    shown = open_models(cfg, device)
    drawn = {each.title: [] for each in shown}
    photos = find_photos(files)
    stuff = stuff_of(cfg)
    for path in photos:
        photo = read_image(path, upright=stuff is None)
        grid = grid_of(photo, cfg.SIZE, shown[0].model.patch_size)
        allowed = stuff(path, grid) if stuff else torch.ones(grid[0] * grid[1], dtype=torch.bool)
        for each in shown:
            maps, prefix = each.attention(photo.to(device), grid), each.trunk.num_prefix_tokens
            drawn[each.title].append([proxy_share(rows[prefix:, prefix:].cpu(), allowed, cfg.PROXIES) for rows in maps])
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    depth = max(len(each.trunk.blocks) for each in shown)
    print(f"{'% of attention, layer':34}" + "".join(f"{n + 1:7}" for n in range(depth)))
    for title, shares in drawn.items():
        mean = 100 * torch.tensor(shares).mean(dim=0)
        axis.plot(range(1, len(mean) + 1), mean, marker="o", label=title.replace("\n", ", "))
        print(f"{title.replace(chr(10), ', '):34}" + "".join(f"{value:7.1f}" for value in mean))
    axis.axhline(100 * cfg.PROXIES, color="grey", linestyle=":", label="if all were attended equally")
    where = "background patches" if stuff else "patches"
    axis.set(xlabel="layer", ylabel="% of all patches' attention", ylim=(0, None),
             xticks=range(1, 1 + depth),
             title=f"Attention drawn by the {100 * cfg.PROXIES:g} % most attended {where}, {len(photos)} photographs")
    axis.legend(fontsize=9)
    axis.grid(alpha=0.3)
    return figure


def proxy_share(rows: Tensor, allowed: Tensor, share: float) -> float:
    """Of attention (N, N) among patches: the part that falls on the `share` of N most attended of the allowed (N,)."""
    count = max(1, round(share * len(rows)))
    received = (rows / rows.sum(dim=1, keepdim=True)).mean(dim=0)
    received = received[allowed]
    return received.topk(min(count, len(received))).values.sum().item() if len(received) else 0.0


def stuff_of(cfg: SimpleNamespace) -> Callable[[Path, tuple[int, int]], Tensor] | None:
    """With ANNOTATIONS: a function of a photograph and a grid -> which tokens are background, (h * w,) bool."""
    if cfg.ANNOTATIONS is None:
        return None
    regions = PanopticRegions(cfg.ANNOTATIONS, cfg.PNGS or Path(cfg.ANNOTATIONS).with_suffix(""), "", crowd=True)
    place = {Path(regions.file_names[each["image_id"]]).name: index for index, each in enumerate(regions.annotations)}

    def find(path: Path, grid: tuple[int, int]) -> Tensor:
        if path.name not in place:
            raise UserError(f"{cfg.ANNOTATIONS} says nothing of {path.name}; give the photographs that it is about.")
        regions.images = path.parent
        sample = regions[place[path.name]]
        is_stuff = torch.tensor([not regions.is_thing[label] for label in sample.labels] + [False])     # the last: unlabelled
        return F.adaptive_avg_pool2d(is_stuff[sample.segments.long()][None].float(), grid)[0].flatten() > 0.5
    return find


def segmentation(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """Photographs, each by several methods (Figure 10)."""
    check_windows(cfg)
    classes, photos = find_classes(cfg), find_photos(files)[:6]
    trained = evaluation.open_model(cfg).to(device)
    clip = evaluation.open_original(cfg, trained)
    text = evaluation.encode_classes(cfg, clip, classes)
    columns = [(name, clip, name) for name in cfg.METHODS]
    columns.append(("decoupled, untrained" if clip is trained else "DeCLIP", trained, None))
    figure, axes = plt.subplots(len(photos), 1 + len(columns), squeeze=False, layout="constrained",
                                figsize=(2.6 * (1 + len(columns)), 2.2 * len(photos) + 0.6))
    pictures = [for_display(read_image(path, upright=True), 640) for path in photos]
    by_way = {way: SimpleNamespace(**vars(cfg) | {"ATTENTION": way}) for _, _, way in columns}
    on_device = [photo.to(device) for photo in pictures]
    found = {(row, title): prediction.cpu() for title, model, way in columns
             for row, prediction in enumerate(predict(by_way[way], model, on_device, text, classes))}
    colour_of = colours(found, classes)
    seen = {classes.names[k]: colour_of[classes.names[k]] for each in found.values() for k in each.unique().tolist()}
    for row, (line, photo) in enumerate(zip(axes, pictures)):
        line[0].imshow(photo.permute(1, 2, 0))
        for axis, (title, *_) in zip(line[1:], columns):
            paint(axis, photo, found[row, title], classes, colour_of, inches=2.6)
    for axis, title in zip(axes[0], ["photograph", *(title for title, *_ in columns)]):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set_axis_off()
    handles = [matplotlib.patches.Patch(color=colour, label=name) for name, colour in list(seen.items())[:24]]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=9, frameon=False)
    return figure


def curves(cfg: SimpleNamespace, files: list[str], device: torch.device) -> plt.Figure:
    """Losses and learning rate over steps, from the log.jsonl of one run or several."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for file in files:
        path = Path(file) / "log.jsonl" if Path(file).is_dir() else Path(file)
        if not path.is_file():
            raise UserError(f"There is no {path}; give folders that train.py wrote, or their log.jsonl.")
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            values = {name: [line[name] for line in lines] for name in ("step", "content", "context", "lr")}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no log of train.py ({error}); give a log.jsonl of one.") from None
        for axis, name in zip(axes, ("content", "context", "lr")):
            axis.plot(values["step"], values[name], label=str(path.parent))
    for axis, title in zip(axes, ("content loss (equation 7)", "context loss (equation 9)", "learning rate")):
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure


KINDS = {"attention": attention, "cls": cls, "correlation": correlation, "segmentation": segmentation, "proxy": proxy,
         "curves": curves}

if __name__ == "__main__":
    main()
