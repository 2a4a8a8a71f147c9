"""The end of `make demo`: a table of what its evaluations found, and a figure of what changed.

    toy/demo.sh                         # everything; `make demo` sets up the environment first
    python -m toy.demo                  # the table and the figure again
"""

import math
import sys
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colors, patches
from matplotlib import pyplot as plt
from torch import Tensor

import eval_region
import eval_seg
from data import Classes, student_image
from eval_seg import Protocol, find_benchmark, find_set
from model import DeCLIP
from tools import figures
from tools.figures import LEGEND, OPACITY, PALETTE, balanced, deepest, seen_classes
from tools.visualize import Shown, token_of
from toy.world import THINGS
from util import UserError, distributed, settings
from util.results import as_written, options_of, read_results
from util.text import find_templates
from util.weights import read_clip_record

RESULTS = "out/toy"                 # folder of the evaluations' json, declip/ below it
CKPT = "out/toy/declip/declip.safetensors"      # the trained model
SCENES = (5, 0, 9)                  # scenes of toy/benchmark.json that the figure shows
FIGURE = "out/toy/demo.png"         # where the figure goes

# Each method's folder in RESULTS and its attention, None for the trained model's own.
METHODS = {"CLIP": ("", "clip"), "decoupled block, untrained": ("", "q"),
           "DeCLIP": ("declip", None)}


def main(argv: list[str] | None = None) -> None:
    """Prints the table and draws the figure, as the command line (or `argv`) says."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__):
        figures.check_figure(cfg)
        results = find_results(cfg)
        with as_written(cfg.RESULTS):
            print(table(results))
        draw(cfg)
    print(f"\nThe figure is {cfg.FIGURE}. Next, with real data: unpack COCO into data/ as "
          "README.md says, then\ntorchrun --nproc_per_node 8 train.py")


def find_results(cfg: SimpleNamespace) -> dict[str, dict[str, dict]]:
    """For each method the newest results of eval_region.py and eval_seg.py with the presets."""
    region, seg = (settings.parse([f"@presets/toy_{name}.txt"], script)
                   for name, script in (("region", eval_region), ("seg", eval_seg)))
    protocol, results = Protocol.of(seg, find_benchmark("toy")).recorded(), {}
    for method, (folder, attention) in METHODS.items():
        record = {"context": "q", "scale": None} if attention else read_clip_record(cfg.CKPT)
        model = {"attention": attention or record["context"], "context": record["context"],
                 "scale": record["scale"], "ckpt": None if attention else cfg.CKPT}
        for name, of in (("region", options_of(region) | {"size": 128}),
                         ("seg", options_of(seg) | protocol | {"benchmark": "toy"})):
            path = Path(cfg.RESULTS) / folder / f"{name}.json"
            found = read_results(path, **of | model) if path.is_file() else []
            if not found:
                raise UserError(f"{path} has no result of {method} with the demo's settings; run "
                                "toy/demo.sh, which evaluates first.")
            results.setdefault(method, {})[name] = found[-1]
    return results


def table(results: dict[str, dict[str, dict]]) -> str:
    """The comparison for a screen, in per cent."""
    def of_regions(method: str, way: str) -> str:
        means = results[method]["region"]["mAcc"]
        return "".join(f"{means[f'{way} {kind}']['top1']:8.1f}" for kind in ("thing", "stuff"))

    lines = ["", f"{'':36}{'mAcc by box':>16}{'mAcc by mask':>16}",
             f"{'%':36}{'thing   stuff   thing   stuff    mIoU':>40}"]
    for method, result in results.items():
        regions = of_regions(method, "box") + of_regions(method, "mask")
        lines.append(f"{method:36}{regions}{result['seg']['mIoU']:8.1f}")
    return "\n".join([*lines,
                      f"{'CLIP on crops cut out of the scenes':36}{of_regions('CLIP', 'crop')}"])


# ----------------------------------------------------------------------------------- the figure

TITLES = ("scene and anchor", "ground truth", "CLIP", "DeCLIP", "CLIP's attention",
          "DeCLIP's attention")
# As tools/segment.py draws them, over a light grey.
COLOURS = OPACITY * colors.to_rgba_array(PALETTE)[:, :3] + (1 - OPACITY) * 0.85


@torch.inference_mode()
def draw(cfg: SimpleNamespace) -> None:
    """A row for each scene: ground truth, segmentation and attention before and after training."""
    after = DeCLIP(pretrained=cfg.CKPT)
    before = DeCLIP(after.model_name, "own")
    scenes, classes = find_set("toy", "data")
    text = before.encode_text(classes.prompts, find_templates("imagenet"))
    figure, axes = plt.subplots(len(cfg.SCENES), len(TITLES), squeeze=False,
                                figsize=(2 * len(TITLES), 2.02 * len(cfg.SCENES) + 0.8))
    labels = []
    for row, number in zip(axes, cfg.SCENES):
        image, label = scenes[number]
        # The anchor lies deepest inside a thing, or in the middle of a scene without one.
        x, y, _ = deepest(label < len(THINGS))
        anchor, labels, maps = (int(x), int(y)), [*labels, label], []
        for clip, attention in ((before, "clip"), (after, None)):
            labels.append(segment_scene(clip, image, attention, text))
            maps.append(attention_of(Shown("", clip.visual, attention), image, anchor))
        draw_row(row, image, labels[-3:], maps, anchor)
    for axis, title in zip(axes[0], TITLES):
        axis.set_title(title, fontsize=11)
    add_legend(figure, classes, seen_classes(labels, classes))
    figures.save_figure(figure, cfg.FIGURE)


def draw_row(row: np.ndarray, image: Tensor, labels: list[Tensor], maps: list[Tensor],
             anchor: tuple[int, int]) -> None:
    """A scene (3, H, W) with its anchor, classes of its pixels (H, W), and attention (H, W)."""
    row[0].imshow(image.permute(1, 2, 0))
    for axis, label in zip(row[1:], labels):
        axis.imshow(COLOURS[label], interpolation="nearest")
    most = max(float(values.max()) for values in maps)
    for axis, values in zip(row[-len(maps):], maps):
        # The root, so that small values are seen, too.
        axis.imshow(values.sqrt(), cmap="magma", vmin=0, vmax=most ** 0.5)
    for axis in (row[0], *row[-len(maps):]):
        axis.plot(*anchor, "P", color="white", markeredgecolor="black", markersize=9)
    for axis in row:
        axis.set_axis_off()


def add_legend(figure: plt.Figure, classes: Classes, seen: Collection[str]) -> None:
    """The colours of the classes that were seen, below all rows."""
    handles = [patches.Patch(color=colour, label=name)
               for colour, name in zip(COLOURS, classes.names) if name in seen]
    columns = balanced(len(handles), 9)
    figure.legend(handles=handles, loc="lower center", ncols=columns, **LEGEND | {"fontsize": 10})
    band = 0.1 + 0.22 * math.ceil(len(handles) / columns)
    figure.tight_layout(rect=(0, band / figure.get_figheight(), 1, 1), pad=0.4)


def segment_scene(clip: DeCLIP, image: Tensor, attention: str | None, text: Tensor) -> Tensor:
    """uint8 (3, H, W) and text (K, C) -> the nearest class of each pixel, (H, W)."""
    content = clip.encode_dense(student_image(image, 128, clip.mean, clip.std)[None], attention)[0]
    scores = torch.einsum("bchw,kc->bkhw", F.normalize(content, dim=1), text)
    return F.interpolate(scores, image.shape[-2:], mode="bilinear")[0].argmax(dim=0)


def attention_of(shown: Shown, image: Tensor, anchor: tuple[int, int]) -> Tensor:
    """What the anchor's patch attends to in the last block, on the pixels of the scene, (H, W)."""
    grid = (128 // shown.model.patch_size,) * 2
    rows = shown.maps(image, grid)[-1][1:, 1:]
    values = rows[token_of(anchor, image, grid)].view(1, 1, *grid)
    return F.interpolate(values, image.shape[-2:], mode="nearest")[0, 0]


if __name__ == "__main__":
    main()
