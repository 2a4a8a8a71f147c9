"""Region classification on COCO panoptic: does a region's feature name it? (Figure 6, Table 1)

    python eval_region.py --ckpt out/declip/declip.safetensors
    python eval_region.py --attention clip                  # plain CLIP, no checkpoint
    python eval_region.py --sizes 224 336 448 560 672 784 896 1024 --ckpt ...       # Figure 6
    torchrun --nproc_per_node 8 eval_region.py --ckpt ...   # images divided among GPUs

Prints top-1 and top-5 mAcc for boxes, masks and the crops' [CLS], which bounds what regions can
learn from the teacher: name its weights, `--teacher merged2b_s8b_b131k`, or leave --ckpt out; else
it is the trained model's own [CLS]. Adds them to region.json beside the checkpoint, to be plotted
by python -m tools.visualize sizes.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data import (
    Classes,
    fitted_size,
    in_order,
    load_share,
    make_classes,
    normalize,
    pad_to,
    read_classes,
    resize,
    student_image,
)
from model import ATTENTIONS, DECOUPLED, DeCLIP, mask_features, region_features
from util import UserError, distributed, settings
from util.coco import is_inside
from util.labels import Panoptic
from util.precision import autocast, check_precision, find_precision
from util.results import identity, told_apart, write_result
from util.text import find_templates
from util.weights import read_published, used_record

# The model
CKPT: str | None = None             # checkpoint of train.py, or a published .pt; None: MODEL's CLIP
MODEL: str | None = None            # open_clip model; None: the checkpoint's, else EVA02-B-16
PRETRAINED: str | None = "merged2b_s8b_b131k"   # MODEL's weights, unless CKPT names its own model
CONTEXT: str | None = None          # of train.py, such as q or qk; None: the checkpoint's, else q
SCALE: float | None = None          # factor of the last block's logits; None: the checkpoint's
ATTENTION: str | None = None        # clip, maskclip, sclip, clearclip: a baseline; None: CONTEXT's

# Names and numbers
TEMPLATES = "imagenet"              # imagenet: 80 templates (paper); simple: 7; or one with {}
PRECISION = "fp32"                  # bf16, fp16: faster on a GPU, but rounded; auto: as train.py
CACHE: str | None = "out/cache"     # folder that keeps embeddings of class names; None: none

# The data
ANNOTATIONS = "data/coco/annotations/panoptic_val2017.json"     # COCO-panoptic json
PNGS = "data/coco/annotations/panoptic_val2017"         # folder of its PNGs
IMAGES = "data/coco/val2017"        # folder of its images
CLASSES: str | None = "classes/coco_panoptic.txt"       # in the order of ids; None: the json's
CROWD = False                       # also regions marked iscrowd, like CLIPSelf's evaluation
MIN_AREA = 64                       # smallest box in pixels; 64 is CLIPSelf's
BINARY_MASKS = False                # a patch that a mask touches counts wholly, as published

# The views
TEACHER: str | None = None          # weights of MODEL for the crops' [CLS]; None: the model's own
SIZES = (560,)                      # longest side, one or several; the paper has 560 and 1024
CROP_BATCH = 64                     # crops of one forward pass

# The evaluation
BATCH_SIZE = 8                      # images of one forward pass
NUM_WORKERS = 4                     # processes that decode images, for each GPU
OUT: str | None = None              # folder of the result; None: the checkpoint's, else out/


def main(argv: list[str] | None = None) -> dict:
    """Evaluates as the command line (or `argv`) says; returns the figures of each size."""
    cfg = settings.parse(argv, sys.modules[__name__])
    with distributed.session(__file__) as ranks:
        return run(cfg, ranks)


def run(cfg: SimpleNamespace, ranks: distributed.Ranks) -> dict:
    """Classifies the regions of all images at every size; prints and writes the figures."""
    settings.check_min(cfg, BATCH_SIZE=1, CROP_BATCH=1, NUM_WORKERS=0)
    check_precision(cfg.PRECISION)
    dataset = PanopticRegions(cfg.ANNOTATIONS, cfg.PNGS, cfg.IMAGES, cfg.CROWD, cfg.MIN_AREA)
    classes, templates = class_names(cfg, dataset), find_templates(cfg.TEMPLATES)
    dataset[0]      # a wrong folder is found before a model is loaded
    clip = open_model(cfg).to(ranks.device)
    teacher = DeCLIP(clip.source, cfg.TEACHER).to(ranks.device) if cfg.TEACHER else clip
    check_sizes(cfg, clip)
    text = clip.encode_text(classes.prompts, templates, cfg.CACHE)
    of = identity(cfg, clip, [vars(classes), len(dataset)], **clip.describe(),
                  attention=cfg.ATTENTION or clip.context)
    result, hits = {}, {}
    for size in cfg.SIZES:
        # Crops are cut from the original image, so their figures are those of the first size.
        models = Models(clip, None if hits else teacher, classes, text)
        hits |= evaluate(cfg, models, dataset, size, ranks)
        result[str(size)] = summarize(classes, dataset.is_thing, hits)
        if ranks.is_main:
            print(f"\n{title(cfg, clip)}, {size} px\n{table(result[str(size)]['mAcc'])}")
            figures = {"title": title(cfg, clip)} | result[str(size)]
            write_result(cfg, "region", of | {"size": size}, figures)
    return result


def check_sizes(cfg: SimpleNamespace, clip: DeCLIP) -> None:
    """Raises UserError on a size that the patch size does not divide."""
    wrong = next((size for size in cfg.SIZES if size < 1 or size % clip.patch_size), None)
    if wrong is not None:
        nearest = max(1, round(wrong / clip.patch_size)) * clip.patch_size
        raise UserError(f"SIZES has {wrong}, no multiple of {clip.model_name}'s patch size, "
                        f"{clip.patch_size}; the nearest size that works is {nearest}.")


def class_names(cfg: SimpleNamespace, dataset: "PanopticRegions") -> Classes:
    """The class list in the order of the json's categories; UserError if they differ."""
    names = [re.sub("-(merged|other|stuff)", "", name).replace("-", " ") for name in dataset.names]
    if cfg.CLASSES is None:
        return make_classes(names)
    return in_order(read_classes(cfg.CLASSES), names, cfg.CLASSES, cfg.ANNOTATIONS)


# ----------------------------------------------------------------------------------- the model

def open_model(cfg: SimpleNamespace, kind: type[DeCLIP] = DeCLIP) -> DeCLIP:
    """The model of CKPT, MODEL, PRETRAINED, CONTEXT and SCALE, to be used with ATTENTION.

    A `declip.safetensors` says what it is; any other CKPT is loaded over MODEL with PRETRAINED, and
    its attention must be named. UserError if settings contradict it, are missing or in vain.
    """
    settings.check(cfg, ATTENTION=(cfg.ATTENTION in (None, *ATTENTIONS),
                                   f"one of {', '.join(ATTENTIONS)}"))
    if used_record(cfg, cfg.CKPT, cfg.ATTENTION, DECOUPLED):
        return kind(cfg.MODEL, cfg.CKPT, cfg.CONTEXT, cfg.SCALE)
    is_described = cfg.ATTENTION or None not in (cfg.MODEL, cfg.CONTEXT, cfg.SCALE)
    weights = read_published(cfg.CKPT, is_described) if cfg.CKPT else {}    # before any download
    torch.manual_seed(0)        # random weights, if asked for, are the same at every run
    clip = kind(cfg.MODEL, cfg.PRETRAINED, cfg.CONTEXT, cfg.SCALE)
    if cfg.CKPT:
        clip.load_weights(cfg.CKPT, weights, {})
    return clip


def title(cfg: SimpleNamespace, clip: DeCLIP) -> str:
    """One line that says what was evaluated: model, attention, weights, precision."""
    attention = cfg.ATTENTION or clip.context
    if attention in DECOUPLED:
        attention += f", scale {'1/√d' if clip.scale is None else clip.scale}"
    has_own = cfg.PRETRAINED and ":" in clip.model_name
    weights = cfg.CKPT or ("its own weights" if has_own else cfg.PRETRAINED) or "random weights"
    precision = find_precision(cfg.PRECISION, clip.visual.trunk.pos_embed.device)
    return ", ".join([clip.model_name, f"attention {attention}", weights,
                      *([] if precision == "fp32" else [precision])])


# ---------------------------------------------------------------------------- panoptic regions

class LabelledRegions(NamedTuple):
    """An image and its labelled regions."""
    image: Tensor       # uint8 (3, H, W)
    region_ids: Tensor  # int16 (H, W): the region that a pixel belongs to, -1 for none
    boxes: Tensor       # (k, 4) x0 y0 x1 y1 in pixels
    labels: Tensor      # (k,) class
    left_out: int = 0   # regions that the PNG has no pixel of, or whose box is not in the image


class PanopticRegions(Dataset):
    """The regions of a COCO-panoptic json, its folder of PNGs and its folder of images.

    crowd: with regions marked iscrowd (groups of things in one box). min_area: of boxes, in pixels.
    """

    def __init__(self, annotations: str | Path, pngs: str | Path, images: str | Path,
                 crowd: bool = False, min_area: int = 0):
        self.files = Panoptic(annotations, pngs, images)
        self.names, self.is_thing = self.files.names, self.files.is_thing   # of each category
        self.crowd, self.min_area = crowd, min_area

    def __len__(self) -> int:
        return len(self.files.segments)

    def __getitem__(self, index: int) -> LabelledRegions:
        image, ids = self.files.read(index)
        wanted = [region for region in self.files.segments[index] if self._counts(region)]
        present = set(np.unique(ids).tolist())
        kept = sorted((region for region in wanted if region["id"] in present
                       and is_inside(region["bbox"], *image.shape[-2:])),
                      key=lambda region: region["id"])
        known = np.array([region["id"] for region in kept] or [0])
        place = np.searchsorted(known, ids).clip(max=len(known) - 1)
        region_ids = np.where((known[place] == ids) & bool(kept), place, -1).astype(np.int16)
        boxes = torch.tensor([region["bbox"] for region in kept], dtype=torch.float).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self.files.class_of[region["category_id"]] for region in kept],
                              dtype=torch.long)
        return LabelledRegions(image, torch.from_numpy(region_ids), boxes, labels,
                               len(wanted) - len(kept))

    def _counts(self, region: dict) -> bool:
        """Whether the evaluation wants a region: no crowd, and no small one unless it is empty."""
        width, height = region["bbox"][2:]
        is_small = 0 < width * height < self.min_area
        return not is_small and (self.crowd or not region.get("iscrowd", 0))


def region_masks(region_ids: Tensor, count: int, size: int, patch_size: int) -> Tensor:
    """LabelledRegions' shares of each patch of the student's padded image.

    int (H, W), the region of each pixel -> float (count, size / patch_size, size / patch_size).
    """
    if not count:
        side = size // patch_size
        return torch.zeros(0, side, side, device=region_ids.device)
    numbers = torch.arange(count, device=region_ids.device)[:, None, None]
    masks = (region_ids == numbers).float()[None]
    masks = F.interpolate(masks, fitted_size(region_ids, size), mode="bilinear", antialias=True)[0]
    return F.avg_pool2d(pad_to(masks, size, size), patch_size)


# ------------------------------------------------------------------------------ classification

class Models(NamedTuple):
    """What regions are classified with."""
    clip: DeCLIP
    teacher: DeCLIP | None      # of the crops' [CLS]; None: crops are left out
    classes: Classes
    text: Tensor                # (prompts, C)


def evaluate(cfg: SimpleNamespace, models: Models, dataset: PanopticRegions, size: int,
             ranks: distributed.Ranks) -> dict[str, Tensor]:
    """All images at one size -> for box, mask and crop the counts (K, 3) of count_hits, over all
    ranks."""
    clip, teacher, classes, text = models
    left_out = torch.zeros(1, dtype=torch.long, device=ranks.device)
    ways = ("box", "mask", "crop") if teacher else ("box", "mask")
    hits = {way: left_out.new_zeros(len(classes), 3) for way in ways}
    loader = load_share(dataset, ranks, cfg.BATCH_SIZE, cfg.NUM_WORKERS)
    for samples in tqdm(loader, desc=f"regions, {size} px", unit="batch",
                        disable=not ranks.is_main):
        left_out += sum(sample.left_out for sample in samples)
        labels = torch.cat([sample.labels for sample in samples]).to(ranks.device)
        encoded = encode_regions(cfg, clip, teacher, samples, size, ranks.device)
        for way, features in encoded.items():
            scores = F.normalize(features, dim=-1) @ text.T
            hits[way] += count_hits(classes.best(scores.T).T, labels)
    hits = {way: distributed.sum_over_ranks(counts).cpu() for way, counts in hits.items()}
    left_out = distributed.sum_over_ranks(left_out).item()
    if left_out and not hits["box"].any():
        raise UserError(f"{cfg.ANNOTATIONS} and {cfg.PNGS} have no region in common that counts; "
                        "take the json and the PNGs of one release.")
    if left_out and ranks.is_main:
        print(f"{left_out} regions were left out: the PNG has no pixel of them, or their box is "
              "empty or not in the image")
    return hits


@torch.inference_mode()
def encode_regions(cfg: SimpleNamespace, clip: DeCLIP, teacher: DeCLIP | None,
                   samples: list[LabelledRegions], size: int, device: torch.device
                   ) -> dict[str, Tensor]:
    """Features of all regions by box, by mask, and their crops' [CLS] by `teacher`: (sum k, C)."""
    # 1. Dense features of the padded images
    images = [sample.image.to(device, non_blocking=True) for sample in samples]
    inputs = torch.stack([student_image(image, size, clip.mean, clip.std) for image in images])
    with autocast(cfg.PRECISION, device):
        content = clip.encode_dense(inputs, cfg.ATTENTION)[0].float()
    # 2. Their means over boxes and masks
    boxes = [box_in_frame(sample, size).to(device, non_blocking=True) for sample in samples]
    masks = [region_masks(sample.region_ids.to(device, non_blocking=True), len(sample.labels),
                          size, clip.patch_size) for sample in samples]
    masks = [mask > 0 for mask in masks] if cfg.BINARY_MASKS else masks
    features = {"box": region_features(content, boxes), "mask": mask_features(content, masks)}
    # 3. The [CLS] of what is cut out
    if teacher:
        crops = [crop for image, sample in zip(images, samples)
                 for crop in box_crops(teacher, image, sample.boxes)]
        with autocast(cfg.PRECISION, device):
            encoded = [teacher.encode_image(torch.stack(crops[start:start + cfg.CROP_BATCH]))
                       for start in range(0, len(crops), cfg.CROP_BATCH)]
        none = content.new_zeros(0, content.shape[1])
        features["crop"] = torch.cat([none, *(cls.float() for cls in encoded)])
    return features


def box_in_frame(sample: LabelledRegions, size: int) -> Tensor:
    """Boxes in pixels of the image -> (k, 4) in [0, 1] of the student's padded image."""
    H, W = sample.image.shape[-2:]
    h, w = fitted_size(sample.image, size)
    return sample.boxes * torch.tensor([w / W, h / H, w / W, h / H]) / size


def box_crops(teacher: DeCLIP, image: Tensor, boxes: Tensor) -> list[Tensor]:
    """Each box cut out and resized to CLIP's own square, normalised: k of (3, size, size)."""
    crops, (H, W) = [], image.shape[-2:]
    for x0, y0, x1, y1 in boxes.tolist():
        left, top = min(max(int(x0), 0), W - 1), min(max(int(y0), 0), H - 1)
        crop = image[:, top:max(top + 1, round(y1)), left:max(left + 1, round(x1))]
        crop = resize(crop, teacher.image_size, teacher.image_size)
        crops.append(normalize(crop, teacher.mean, teacher.std))
    return crops


def count_hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Scores (n, K) and labels (n,) -> (K, 3): regions, right at top 1, right among the best 5."""
    best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    right = torch.stack([torch.ones_like(labels), best[:, 0].long(), best.any(dim=1).long()], dim=1)
    counts = torch.zeros(scores.shape[1], 3, dtype=torch.long, device=scores.device)
    return counts.index_add_(0, labels, right)


# ------------------------------------------------------------------------------------- figures

def mean_accuracy(counts: Tensor) -> dict[str, float | int | None]:
    """(K, 3) of count_hits -> top-1 and top-5 accuracy in %, the mean over classes that occur.

    None where no class occurs.
    """
    occurring = counts[counts[:, 0] > 0].double()
    top1, top5 = None, None
    if len(occurring):
        top1, top5 = (100 * (occurring[:, 1:] / occurring[:, :1]).mean(dim=0)).tolist()
    return {"top1": top1, "top5": top5, "regions": int(occurring[:, 0].sum()),
            "classes": len(occurring)}


def summarize(classes: Classes, is_thing: Sequence[bool], hits: dict[str, Tensor]) -> dict:
    """Counts (K, 3) for each way -> mAcc of things and stuff, each class's top-1, in per cent."""
    of_kind = {"thing": torch.tensor(is_thing), "stuff": ~torch.tensor(is_thing)}
    means = {f"{way} {kind}": mean_accuracy(counts[chosen])
             for way, counts in hits.items() for kind, chosen in of_kind.items()}
    top1 = {name: {way: round(100 * counts[index, 1].item() / counts[index, 0].item(), 2)
                   for way, counts in hits.items()}
            for index, name in enumerate(told_apart(classes.names)) if hits["box"][index, 0]}
    return {"mAcc": means, "top1 of each class": top1}


def table(means: dict[str, dict]) -> str:
    """The rows of `mAcc` for a screen."""
    rows = [f"{'mAcc, %':16}{'top 1':>7}{'top 5':>8}{'regions':>9}{'classes':>9}"]
    for name, row in means.items():
        top1, top5 = ("-" if row[top] is None else f"{row[top]:.1f}" for top in ("top1", "top5"))
        rows.append(f"{name.replace('crop', 'crop [CLS]'):16}{top1:>7}{top5:>8}"
                    f"{row['regions']:9}{row['classes']:9}")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
