"""Region classification on COCO panoptic: does the feature of a box or a mask name what is in it? (Figure 6, Table 1)

    python eval_region.py --ckpt out/declip/declip.safetensors
    python eval_region.py --attention clip                         # plain CLIP, no checkpoint
    python eval_region.py --sizes 224 336 448 560 672 784 896 1024 --ckpt ...       # Figure 6: a table and a plot
    torchrun --nproc_per_node 8 eval_region.py --ckpt ...          # images divided among GPUs

Prints top-1 and top-5 mAcc for boxes and masks, and for the crops' [CLS], the bound of what regions can learn from the
teacher: name its weights, `--teacher merged2b_s8b_b131k`, or leave --ckpt out; otherwise it is the [CLS] of the model
itself, which training has changed. Writes them to region.json beside the checkpoint.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import distributed
import evaluation
import settings
from data import (
    Classes,
    PanopticRegions,
    Regions,
    fitted_size,
    make_classes,
    normalize,
    read_classes,
    resize,
    segment_masks,
    student_image,
)
from model import DeCLIP, autocast, mask_features, region_features
from settings import UserError

# Besides these, the settings of evaluation.py: which model, which attention, where the result goes.
ANNOTATIONS = "data/coco/annotations/panoptic_val2017.json"     # COCO-panoptic json
PNGS = "data/coco/annotations/panoptic_val2017"         # folder of its PNGs
IMAGES = "data/coco/val2017"        # folder of its images
CLASSES: str | None = "classes/coco_panoptic.txt"       # a class a line, in the order of category ids; None: json's names
CROWD = False                       # also regions marked iscrowd; CLIPSelf's evaluation has them
MIN_AREA = 64                       # smallest box in pixels; 64 is CLIPSelf's

TEACHER: str | None = None          # weights of MODEL whose [CLS] of crops is the bound; None: the evaluated model's own
SIZES = (560,)                      # longest side, one or several; the paper's ablations use 560, Table 7 1024
BATCH_SIZE = 8                      # images of one forward pass
CROP_BATCH = 64                     # crops of one forward pass


def main(argv: list[str] | None = None) -> dict:
    """Evaluates as the command line (or `argv`) says; returns what region.json holds."""
    cfg = settings.parse(argv, sys.modules[__name__], evaluation)
    with distributed.session(__file__) as ranks:
        return run(cfg, ranks)


def run(cfg: SimpleNamespace, ranks: distributed.Ranks) -> dict:
    """All images through the model, their scores summed over ranks, printed and written."""
    settings.check_least(cfg, BATCH_SIZE=1, CROP_BATCH=1)
    evaluation.check_precision(cfg)
    dataset = PanopticRegions(cfg.ANNOTATIONS, cfg.PNGS, cfg.IMAGES, cfg.CROWD, cfg.MIN_AREA)
    classes = class_names(cfg, dataset)
    clip = evaluation.open_model(cfg).to(ranks.device)
    teacher = DeCLIP(clip.model_name, cfg.TEACHER).to(ranks.device) if cfg.TEACHER else clip
    check_sizes(cfg, clip)
    text = evaluation.encode_classes(cfg, clip, classes)
    result, hits = {}, {}
    for size in cfg.SIZES:      # crops are cut from the photograph, so their figures are those of the first size
        hits |= evaluate(cfg, clip, None if hits else teacher, dataset, classes, text, size, ranks)
        result[str(size)] = summarize(classes, dataset.is_thing, hits)
        if ranks.is_main:
            print(f"\n{evaluation.title(cfg, clip)}, {size} px\n{table(result[str(size)]['mAcc'])}")
            path = evaluation.write_result(cfg, clip, "region", {"sizes": result})
    if ranks.is_main and len(cfg.SIZES) > 1:
        print("\n" + table_of_sizes(result))
        plot_sizes(result, evaluation.title(cfg, clip), path.with_suffix(".png"))
    return result


def check_sizes(cfg: SimpleNamespace, clip: DeCLIP) -> None:
    """Raises UserError on a size that the patch size does not divide."""
    wrong = next((size for size in cfg.SIZES if size < 1 or size % clip.patch_size), None)
    if wrong is not None:
        nearest = max(1, round(wrong / clip.patch_size)) * clip.patch_size
        raise UserError(f"SIZES has {wrong}, no multiple of {clip.model_name}'s patch size, {clip.patch_size}; the nearest "
                        f"size that works is {nearest}.")


def evaluate(cfg: SimpleNamespace, clip: DeCLIP, teacher: DeCLIP | None, dataset: PanopticRegions, classes: Classes,
             text: Tensor, size: int, ranks: distributed.Ranks) -> dict[str, Tensor]:
    """All images at one size -> for each way the counts (K, 3) of count_hits, summed over ranks; no crops without teacher."""
    ways = ("box", "mask", "crop") if teacher else ("box", "mask")
    # hits[way, class] = regions, right at top 1, right among 5
    hits = {way: torch.zeros(len(classes), 3, dtype=torch.long, device=ranks.device) for way in ways}
    loader = evaluation.load_share(cfg, dataset, ranks)
    for samples in tqdm(loader, desc=f"regions, {size} px", unit="batch", disable=not ranks.is_main):
        labels = torch.cat([sample.labels for sample in samples]).to(ranks.device, non_blocking=True)
        for way, features in encode_regions(cfg, clip, teacher, samples, size, ranks.device).items():
            hits[way] += count_hits(classes.best((F.normalize(features, dim=-1) @ text.T).T).T, labels)
    return {way: distributed.sum_over_ranks(counts).cpu() for way, counts in hits.items()}


def class_names(cfg: SimpleNamespace, dataset: PanopticRegions) -> Classes:
    """The class list, one entry for each category of the json; UserError if the numbers differ."""
    if cfg.CLASSES is None:
        return make_classes([re.sub("-(merged|other|stuff)", "", name).replace("-", " ") for name in dataset.names])
    classes = read_classes(cfg.CLASSES)
    if len(classes) != len(dataset.names):
        raise UserError(f"{cfg.CLASSES} has {len(classes)} classes, but {cfg.ANNOTATIONS} {len(dataset.names)} "
                        "categories; give a file of as many lines, or --classes none for the names in the json.")
    return classes


@torch.inference_mode()
def encode_regions(cfg: SimpleNamespace, clip: DeCLIP, teacher: DeCLIP | None, samples: list[Regions], size: int,
                   device: torch.device) -> dict[str, Tensor]:
    """Features of all regions of a batch by box, by mask, and their crops' [CLS] by `teacher`, if any: each (sum k, C)."""
    images = [sample.image.to(device, non_blocking=True) for sample in samples]
    inputs = torch.stack([student_image(image, size, clip.mean, clip.std) for image in images])
    content = evaluation.encode_dense(cfg, clip, inputs)
    boxes = [box_in_frame(sample, size).to(device, non_blocking=True) for sample in samples]
    masks = [segment_masks(sample.segments.to(device, non_blocking=True), len(sample.labels), size, clip.patch_size)
             for sample in samples]
    features = {"box": region_features(content, boxes), "mask": mask_features(content, masks)}
    if teacher is None:
        return features
    crops = [crop for image, sample in zip(images, samples) for crop in box_crops(teacher, image, sample.boxes)]
    with autocast(cfg.PRECISION, device):
        encoded = [teacher.encode_image(torch.stack(crops[start:start + cfg.CROP_BATCH])).float()
                   for start in range(0, len(crops), cfg.CROP_BATCH)]
    return features | {"crop": torch.cat(encoded) if encoded else content.new_zeros(0, content.shape[1])}


def box_in_frame(sample: Regions, size: int) -> Tensor:
    """Boxes in pixels of the image -> (k, 4) in [0, 1] of the student's padded picture."""
    H, W = sample.image.shape[-2:]
    h, w = fitted_size(sample.image, size)
    return sample.boxes * torch.tensor([w / W, h / H, w / W, h / H]) / size


def box_crops(teacher: DeCLIP, image: Tensor, boxes: Tensor) -> list[Tensor]:
    """Each box cut from the image and resized to CLIP's own square, normalised: k of (3, size, size)."""
    H, W = image.shape[-2:]
    crops = []
    for x0, y0, x1, y1 in boxes.tolist():
        left, top = min(int(x0), W - 1), min(int(y0), H - 1)
        crop = image[:, top:max(top + 1, round(y1)), left:max(left + 1, round(x1))]
        crops.append(normalize(resize(crop, teacher.image_size, teacher.image_size), teacher.mean, teacher.std))
    return crops


def count_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Scores (n, K) and labels (n,) -> (K, 3): regions of each class, right at top 1, right among the best 5."""
    best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    right = torch.stack([torch.ones_like(labels), best[:, 0].long(), best.any(dim=1).long()], dim=1)
    return torch.zeros(scores.shape[1], 3, dtype=torch.long, device=scores.device).index_add_(0, labels, right)


def mean_accuracy(counts: Tensor) -> dict[str, float | int | None]:
    """(K, 3) as from count_hits -> mean over the classes that occur of their top-1 and top-5 accuracy in per cent.

    None where no class occurs.
    """
    occurring = counts[counts[:, 0] > 0].double()
    top1, top5 = (100 * (occurring[:, 1:] / occurring[:, :1]).mean(dim=0)).tolist() if len(occurring) else (None, None)
    return {"top1": top1, "top5": top5, "regions": int(occurring[:, 0].sum()), "classes": len(occurring)}


def summarize(classes: Classes, is_thing: Sequence[bool], hits: dict[str, Tensor]) -> dict:
    """Counts (K, 3) for each way -> mAcc of things and of stuff, and each occurring class's top-1 accuracy, in per cent."""
    of_kind = {"thing": torch.tensor(is_thing), "stuff": ~torch.tensor(is_thing)}
    means = {f"{way} {kind}": mean_accuracy(counts[chosen]) for way, counts in hits.items() for kind, chosen in of_kind.items()}
    top1 = {name: {way: round(100 * counts[index, 1].item() / counts[index, 0].item(), 2) for way, counts in hits.items()}
            for index, name in enumerate(classes.names) if hits["box"][index, 0]}
    return {"mAcc": means, "top1 of each class": top1}


def table(means: dict[str, dict]) -> str:
    """The rows of `mAcc` for a screen."""
    rows = [f"{'mAcc, %':16}{'top 1':>7}{'top 5':>8}{'regions':>9}{'classes':>9}"]
    for name, row in means.items():
        top1, top5 = ("-" if row[top] is None else f"{row[top]:.1f}" for top in ("top1", "top5"))
        rows.append(f"{name.replace('crop', 'crop [CLS]'):16}{top1:>7}{top5:>8}{row['regions']:9}{row['classes']:9}")
    return "\n".join(rows)


def table_of_sizes(result: dict[str, dict]) -> str:
    """Top-1 mAcc at every size, for a screen."""
    ways = next(iter(result.values()))["mAcc"]
    lines = [f"{'top 1 mAcc, %':16}" + "".join(f"{size:>7}" for size in result)]
    for way in ways:
        values = [each["mAcc"][way]["top1"] for each in result.values()]
        lines.append(f"{way:16}" + "".join(f"{'-' if value is None else f'{value:.1f}':>7}" for value in values))
    return "\n".join(lines)


def plot_sizes(result: dict[str, dict], title: str, path: Path) -> None:
    """Figure 6: top-1 mAcc over the picture's size, for things and for stuff."""
    from matplotlib import pyplot as plt  # here, because it takes a second and most runs plot nothing

    sizes = [int(size) for size in result]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for axis, kind in zip(axes, ("thing", "stuff")):
        for way, label in (("box", "boxes"), ("mask", "masks"), ("crop", "[CLS] of crops")):
            values = [each["mAcc"][f"{way} {kind}"]["top1"] for each in result.values()]
            if None not in values:
                axis.plot(sizes, values, marker="o", label=label)
        axis.set(title=f"{kind}s" if kind == "thing" else kind, xlabel="longest side of the picture, px", xticks=sizes)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 mAcc, %")
    axes[1].legend()
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"the plot is {path}")


if __name__ == "__main__":
    main()
