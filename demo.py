"""The end of `make demo`: one table of what its evaluations found, and one picture of what changed.

    ./demo.sh                           # everything; `make demo` sets up the environment first
    python demo.py                      # the table and the picture again
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps, patches
from matplotlib import pyplot as plt
from torch import Tensor

import evaluation
import settings
import toy
from data import BENCHMARKS, SegmentationImages, read_classes, student_image
from model import DeCLIP
from segment import deepest
from settings import UserError
from visualize import decoupled_attention, recorded_attention, token_of

RESULTS = "out/toy"                 # folder of the evaluations' json, the trained model's in declip/ below it
DATA = "data"                       # folder that holds toy/
CKPT = "out/toy/declip/declip.safetensors"      # the trained model
SCENES = (5, 0, 9)                  # scenes of data/toy/val that the picture shows
PICTURE = "out/toy/demo.png"        # where the picture goes

METHODS = {"CLIP": "{}.clip.json", "decoupled block, untrained": "{}.q.json", "DeCLIP": "declip/{}.json"}


def main(argv: list[str] | None = None) -> None:
    """Prints the table and draws the picture, as the command line (or `argv`) says."""
    cfg = settings.parse(argv, sys.modules[__name__])
    try:
        print(table(read_results(cfg)))
        draw(cfg)
    except (UserError, OSError) as error:
        raise SystemExit(f"demo.py: {error}") from None
    print(f"\nThe picture is {cfg.PICTURE}. Next, with real data: unpack COCO into data/ as README.md says, then\n"
          "torchrun --nproc_per_node 8 train.py")


def read_results(cfg: SimpleNamespace) -> dict[str, dict[str, dict]]:
    """For each method what eval_region.py and eval_seg.py wrote."""
    results = {}
    for method, pattern in METHODS.items():
        files = {name: Path(cfg.RESULTS) / pattern.format(name) for name in ("region", "seg")}
        missing = next((file for file in files.values() if not file.is_file()), None)
        if missing:
            raise UserError(f"There is no {missing}; run ./demo.sh, which evaluates first.")
        results[method] = {name: json.loads(file.read_text()) for name, file in files.items()}
    return results


def table(results: dict[str, dict[str, dict]]) -> str:
    """The comparison for a screen, in per cent."""
    def of_regions(method: str, way: str) -> str:
        means = results[method]["region"]["sizes"]["128"]["mAcc"]
        return "".join(f"{means[f'{way} {kind}']['top1']:8.1f}" for kind in ("thing", "stuff"))

    lines = ["", f"{'':36}{'mAcc by box':>16}{'mAcc by mask':>16}", f"{'%':36}{'thing   stuff   thing   stuff    mIoU':>40}"]
    for method, result in results.items():
        miou = result["seg"]["benchmarks"]["toy"]["mIoU"]
        lines.append(f"{method:36}{of_regions(method, 'box')}{of_regions(method, 'mask')}{miou:8.1f}")
    return "\n".join([*lines, f"{'CLIP on crops cut out of the scenes':36}{of_regions('CLIP', 'crop')}"])


# ------------------------------------------------------------------------------------------------------- the picture

@torch.inference_mode()
def draw(cfg: SimpleNamespace) -> None:
    """Scene, ground truth, segmentation and attention of one anchor before and after training, a row for each scene."""
    after = DeCLIP(pretrained=cfg.CKPT)
    before = DeCLIP(after.model_name, "own")
    classes = read_classes("classes/toy.txt")
    text = before.encode_text(classes.prompts, evaluation.TEMPLATES["imagenet"])
    scenes = SegmentationImages(BENCHMARKS["toy"], cfg.DATA)
    titles = ["scene and anchor", "ground truth", "CLIP", "DeCLIP", "CLIP's attention", "DeCLIP's attention"]
    matplotlib.use("agg")
    shape = len(cfg.SCENES), len(titles)
    figure, axes = plt.subplots(*shape, figsize=(2 * shape[1], 2.1 * shape[0] + 0.9), squeeze=False)
    seen = set()
    for row, number in zip(axes, cfg.SCENES):
        image, label = scenes[number]
        anchor = find_anchor(label)
        picture = student_image(image, 128, before.mean, before.std)[None]
        found = [best_class(clip.encode_dense(picture, attention)[0], text, label.shape)
                 for clip, attention in ((before, "clip"), (after, None))]
        seen.update(label.unique().tolist(), *(each.unique().tolist() for each in found))
        h, w = picture.shape[-2] // before.patch_size, picture.shape[-1] // before.patch_size
        token = token_of(anchor, image, (h, w))
        with recorded_attention(before.visual) as of_blocks:
            before.encode_image(picture)
        rows = [each[0, 1 + token, 1:] for each in (of_blocks[-1].mean(dim=1), decoupled_attention(after, picture))]
        maps = [F.interpolate(each.view(1, 1, h, w), label.shape, mode="nearest")[0, 0] for each in rows]
        row[0].imshow(image.permute(1, 2, 0))
        for axis, classes_of_pixels in zip(row[1:4], (label, *found)):
            axis.imshow(PALETTE[classes_of_pixels], interpolation="nearest")
        for axis, values in zip(row[4:], maps):
            axis.imshow(values, cmap="magma", vmin=0, vmax=max(float(each.max()) for each in maps))
        for axis in (row[0], *row[4:]):
            axis.plot(*anchor, "P", color="white", markeredgecolor="black", markersize=9)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=11)
    for axis in axes.flat:
        axis.set_axis_off()
    handles = [patches.Patch(color=PALETTE[index], label=classes.names[index]) for index in sorted(seen)]
    figure.legend(handles=handles, loc="lower center", ncols=9, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.7 / figure.get_figheight(), 1, 1), pad=0.5)
    Path(cfg.PICTURE).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(cfg.PICTURE, dpi=110)
    plt.close(figure)


PALETTE = np.concatenate([colormaps["tab10"].colors, colormaps["Set2"].colors])     # things strong, stuff pale


def find_anchor(label: Tensor) -> tuple[int, int]:
    """The pixel (x, y) that is deepest inside a thing, or the middle of a scene without one."""
    x, y, _ = deepest(label < len(toy.THINGS))
    return int(x), int(y)


def best_class(content: Tensor, text: Tensor, size: tuple[int, int]) -> Tensor:
    """Content (1, C, h, w) and text (K, C) -> the nearest class of each pixel, (H, W)."""
    scores = torch.einsum("chw,kc->khw", F.normalize(content[0], dim=0), text)
    return F.interpolate(scores[None], size, mode="bilinear")[0].argmax(dim=0)


if __name__ == "__main__":
    main()
