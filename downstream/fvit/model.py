"""F-ViT: an open-vocabulary detector on a frozen CLIP (paper, sections 4.3 and 9.2).

    fvit = open_fvit("out/fvit/fvit.safetensors")       # trained by downstream/fvit/train.py
    fvit.set_classes(["person", "red kite"])            # any names, without training
    detections, = fvit.detect([read_image("photo.jpg")])

Four blocks' outputs of the CLIP's vision tower become a feature pyramid. Regions are proposed and
found there as in Mask R-CNN; their names come from a comparison with text embeddings. In training
this is the detector's alone; in use the CLIP's own dense features, which know all classes, have a
say as well (`fuse_scores`): where those are DeCLIP's, novel classes are found.

Letters: B images, D width of the vision tower, C width of the text-image space, K classes, whose
background is the last row, n regions, k labelled objects, A anchors. Boxes are x0 y0 x1 y1.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import ops

from data import constant
from downstream.detection import Detections
from downstream.detector import (
    Detector,
    check_design,
    choose,
    cosines,
    make_generator,
    mean_over_ranks,
    open_detector,
    to_pixels,
)
from model import DeCLIP, region_features


class Design(NamedTuple):
    """What a detector is and how it is trained. Each is a setting of train.py, in capitals."""
    image_size: int = 640           # side of the square that images are fitted into
    attention: str | None = None    # the last block's, a row of model.ATTENTIONS; None: its context
    normalization: str = "imagenet"     # imagenet (published) or clip: mean and std of the input
    templates: str = "vild"         # sentences around a class name
    channels: int = 256             # of the pyramid and the heads
    norm: str = "batch"             # batch, or group: statistics of each image alone
    rpn_norm: bool = False          # norms in the proposals' head (OV-LVIS)
    masks: bool = False             # a mask head (OV-LVIS)
    anchors: int = 256              # anchors of an image that are trained with
    regions: int = 512              # regions of an image that are trained with
    keep_best: bool = False         # the best region of each object is positive (OV-LVIS)
    background: float = 0.6         # weight of background regions; OV-LVIS: 0.9
    candidates: int = 2000          # best anchors of a level, before NMS
    proposals: int = 1000           # and what NMS keeps of all levels
    resize: str = "cv2"             # one of data.RESIZES; of files that do not say, bicubic


class Target(NamedTuple):
    """The labelled objects of a training image, in its pixels."""
    boxes: Tensor       # float (k, 4)
    labels: Tensor      # long (k,), places in the detector's classes
    masks: Tensor       # bool (k, h, w); anything if the detector has no mask head
    key: str            # what is sampled of the image depends on this text alone


class ScoreRules(NamedTuple):
    """How regions are scored and chosen. The defaults are OV-COCO's: published, but T, which is the
    paper's for DeCLIP (section 9.2)."""
    a: float = 0.1                  # share of the VLM in the scores of seen classes
    b: float = 0.8                  # and of novel ones
    temperature: float = 45.0       # T, factor of the VLM's cosines
    least: float = 0.01             # score below which a detection is left out
    nms: float = 0.4                # IoU from which the lower of two boxes of a class is left out
    most: int = 100                 # detections of an image
    at_boxes: bool = False          # the VLM sees the final boxes; False: the proposals (published)
    tau: float | None = None        # factor of the detector's cosines; None: the learned one
    masks: bool = True              # with masks, if the detector has them


# By data set; of every other one: OV-COCO's.
RULES = {
    "ovcoco": ScoreRules(),
    "ovlvis": ScoreRules(b=0.6, temperature=90.0, least=1e-4, nms=0.5, most=300),
    "coco": ScoreRules(0.2, 0.2, 120.0, 1e-4, 0.5, 300, tau=50.0, masks=False),
    "objects365": ScoreRules(0.3, 0.3, 120.0, 1e-4, 0.5, 300, tau=50.0, masks=False),
}


# ---------------------------------------------------------------------------------------- boxes

RATIOS = (0.5, 1.0, 2.0)            # height : width of the anchors of a place
ANCHOR_SCALE = 8                    # side of an anchor in strides
REGION_STDS = (0.1, 0.1, 0.2, 0.2)  # of the regions' deltas; the anchors' have 1
MAX_GROWTH = math.log(1000 / 16)    # of a side by a delta


def make_anchors(stride: float, grid: tuple[int, int], device: torch.device) -> Tensor:
    """The anchors of a level, (3hw, 4) in pixels: three at each place, places row by row.

    Place (y, x) is at pixel (y, x) * stride, which need not be whole: L/14 has 3.5.
    """
    root = constant(RATIOS, torch.float, device).sqrt()
    sides = ANCHOR_SCALE * stride * torch.stack([1 / root, root], dim=-1)      # width, height
    y, x = (torch.arange(count, device=device) * stride for count in grid)
    y, x = torch.meshgrid(y, x, indexing="ij")
    centres = torch.stack([x, y], dim=-1).view(-1, 1, 2)
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=-1).flatten(0, 1)


def encode_boxes(boxes: Tensor, anchors: Tensor, stds: tuple[float, ...] = (1,) * 4) -> Tensor:
    """The deltas (n, 4) that turn anchors into boxes: shift in anchor sides, log of growth."""
    box, anchor = (ops.box_convert(some, "xyxy", "cxcywh") for some in (boxes, anchors))
    sides = anchor[:, 2:]
    deltas = torch.cat([(box[:, :2] - anchor[:, :2]) / sides, (box[:, 2:] / sides).log()], dim=-1)
    return deltas / constant(stds, torch.float, boxes.device)


def decode_boxes(deltas: Tensor, anchors: Tensor, size: tuple[int, int],
                 stds: tuple[float, ...] = (1,) * 4) -> Tensor:
    """The reverse of encode_boxes; boxes are clipped to an image of `size`, height and width."""
    deltas = deltas.float() * constant(stds, torch.float, deltas.device)
    centre, sides = ops.box_convert(anchors, "xyxy", "cxcywh").split(2, dim=-1)
    centre = centre + deltas[:, :2] * sides
    sides = sides * deltas[:, 2:].clamp(-MAX_GROWTH, MAX_GROWTH).exp()
    boxes = ops.box_convert(torch.cat([centre, sides], dim=-1), "cxcywh", "xyxy")
    return ops.clip_boxes_to_image(boxes, size)


def region_levels(boxes: Tensor) -> Tensor:
    """The level of the pyramid, 0 to 3, that each region (n, 4) is pooled from, by its area."""
    level = (ops.box_area(boxes).sqrt() / 56).clamp(min=1e-6).log2().floor()
    return level.clamp(0, 3).long()


def pool_regions(levels: Sequence[Tensor], strides: Sequence[float], boxes: list[Tensor], size: int
                 ) -> Tensor:
    """RoIAlign of each image's boxes (n, 4), each in its own level -> (sum n, C, size, size)."""
    rois = torch.cat([F.pad(of_image, (1, 0), value=number)
                      for number, of_image in enumerate(boxes)])
    level = region_levels(rois[:, 1:])
    places, pooled = [], []
    for number, (features, stride) in enumerate(zip(levels[:4], strides)):
        places.append((level == number).nonzero().flatten())
        pooled.append(ops.roi_align(features, rois[places[-1]], size, 1 / stride, aligned=True))
    # The levels' regions one after the other, back in the order of the boxes
    return torch.cat(pooled)[torch.cat(places).argsort()]


# --------------------------------------------------------------------------- what training samples

BACKGROUND, IGNORE = -1, -2        # owners of candidates that are no object's


def assign(overlaps: Tensor, positive: float, negative: float, best: float | None = None) -> Tensor:
    """IoU (n, k) of candidates and objects -> (n,): the object that owns each candidate.

    It is the one of the highest IoU from `positive` on; below `negative` BACKGROUND; between them
    IGNORE. best: the object's best candidates are its own from this IoU on, even if another one
    overlaps more.
    """
    n, k = overlaps.shape
    if k == 0:
        return overlaps.new_full((n,), BACKGROUND, dtype=torch.long)
    highest, matched = overlaps.max(dim=1)
    matched[highest < positive] = IGNORE
    matched[highest < negative] = BACKGROUND
    if best is not None:
        of_object = overlaps.amax(dim=0)
        is_best = (overlaps == of_object) & (of_object >= best)
        # Of several objects the last one takes it.
        number = (is_best * torch.arange(1, k + 1, device=matched.device)).amax(dim=1)
        matched = torch.where(number > 0, number - 1, matched)
    return matched


def sample(matched: Tensor, number: int, share: float, generator: torch.Generator
           ) -> tuple[Tensor, Tensor]:
    """Random places of `matched`: at most `share` of `number` that an object owns, and as much
    background as fills up `number`."""
    chosen, most = [], int(number * share)
    for is_kind in (matched >= 0, matched == BACKGROUND):
        places = is_kind.nonzero().flatten()
        order = torch.randperm(len(places), generator=generator, device=places.device)
        chosen.append(places[order[:most]])
        most = number - len(chosen[0])
    return chosen[0], chosen[1]


class SampledRegions(NamedTuple):
    """The sampled regions of a training image; those that an object owns come first."""
    boxes: Tensor       # (n, 4)
    matched: Tensor     # (p,) the object of each of the first p regions
    labels: Tensor      # (n,) class; K for background
    owned = property(lambda self: self.boxes[:len(self.matched)])       # (p, 4)


# ------------------------------------------------------------------------ the parts of the detector

# Batch norm's statistics are those of all images; train.py makes them those of all GPUs'.
NORMS = {"batch": nn.BatchNorm2d,
         "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels)}


def convs(count: int, channels: int, norm: Callable | None) -> list[nn.Module]:
    """3 x 3 convolutions that keep the grid, each with a norm and a ReLU."""
    return [ops.Conv2dNormActivation(channels, channels, norm_layer=norm) for _ in range(count)]


class Pyramid(nn.Module):
    """Four blocks' outputs, all of one grid -> five levels, each half as fine as the one before."""

    def __init__(self, width: int, channels: int, norm: Callable):
        super().__init__()
        finer = partial(nn.ConvTranspose2d, width, width, kernel_size=2, stride=2)
        self.scales = nn.ModuleList([nn.Sequential(finer(), norm(width), nn.GELU(), finer()),
                                     finer(), nn.Identity(), nn.MaxPool2d(2)])
        conv = partial(ops.Conv2dNormActivation, norm_layer=norm, activation_layer=None)
        self.laterals = nn.ModuleList(conv(width, channels, 1) for _ in range(4))
        self.outputs = nn.ModuleList(conv(channels, channels) for _ in range(4))
        for module in (self.laterals, self.outputs):
            initialize(module, nn.init.xavier_uniform_)

    def forward(self, taps: list[Tensor]) -> list[Tensor]:
        """Four (B, D, h, w) -> five (B, channels, ...) of 4h, 2h, h, h/2, h/4."""
        merged = [lateral(scale(tap))
                  for lateral, scale, tap in zip(self.laterals, self.scales, taps)]
        for fine in (2, 1, 0):
            merged[fine] = merged[fine] + F.interpolate(merged[fine + 1], scale_factor=2.0)
        levels = [output(level) for output, level in zip(self.outputs, merged)]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


class ProposalHead(nn.Module):
    """For each anchor a score, how likely it is an object, and the deltas to its box."""

    def __init__(self, channels: int, norm: Callable | None):
        super().__init__()
        self.trunk = nn.Sequential(*convs(2, channels, norm))
        self.score = nn.Conv2d(channels, len(RATIOS), 1)
        self.deltas = nn.Conv2d(channels, 4 * len(RATIOS), 1)
        initialize(self, partial(nn.init.normal_, std=0.01))

    def forward(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """For each level, logits (B, A) and deltas (B, A, 4), in the order of its anchors."""
        trunks = [self.trunk(level) for level in levels]
        return ([self.score(x).float().movedim(1, -1).flatten(1) for x in trunks],
                [self.deltas(x).float().movedim(1, -1).flatten(1).unflatten(1, (-1, 4))
                 for x in trunks])


class BoxHead(nn.Module):
    """Pooled regions -> embeddings, to be compared with text, and class-agnostic deltas."""

    def __init__(self, channels: int, dim: int, norm: Callable):
        super().__init__()
        self.shared = nn.Sequential(
            *convs(4, channels, norm), nn.Flatten(),
            nn.Linear(channels * REGION_SIDE**2, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        # The last ReLU is the published one's, though cosines would not need it.
        self.embedding = nn.Sequential(nn.Linear(dim, dim), nn.ReLU())
        self.deltas = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))
        initialize(self, nn.init.xavier_uniform_)
        initialize(self.shared[:4], kaiming_normal)
        nn.init.normal_(self.deltas[-1].weight, std=0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(n, channels, 7, 7) -> embeddings (n, C), L2-normalised, and deltas (n, 4)."""
        x = self.shared(pooled)
        return F.normalize(self.embedding(x).float(), dim=-1), self.deltas(x).float()


class MaskHead(nn.Module):
    """Pooled regions -> the logits of one class-agnostic mask each."""

    def __init__(self, channels: int, norm: Callable):
        super().__init__()
        self.layers = nn.Sequential(
            *convs(4, channels, norm), nn.ConvTranspose2d(channels, channels, 2, stride=2),
            nn.ReLU(), nn.Conv2d(channels, 1, 1))
        initialize(self, kaiming_normal)

    def forward(self, pooled: Tensor) -> Tensor:
        """(n, channels, 14, 14) -> (n, 28, 28)."""
        return self.layers(pooled).float()[:, 0]


REGION_SIDE, MASK_SIDE = 7, 14      # of pooled regions, for boxes and for masks

kaiming_normal = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")


def initialize(module: nn.Module, fill: Callable[[Tensor], object]) -> None:
    """Fills the weights of all convolutions and linear layers; their biases are 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            fill(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# ------------------------------------------------------------------------------------ the detector

class FViT(Detector):
    """The detector. backbone: any CLIP, which stays as it is, in eval mode.

    classes: their names. seen: which of them training may see. text: embeddings of the classes and
    of background (K + 1, C), None to compute them.
    Raises UserError for a setting out of its range, and for a side that the pyramid does not
    divide.
    """

    NAME, DESIGN, OTHER, RULES = "fvit", Design, "background", RULES

    def __init__(self, backbone: DeCLIP, classes: Sequence[str], seen: Sequence[bool],
                 design: Design, text: Tensor | None = None):
        check_design(design, backbone.visual.patch_size, {"norm": NORMS}, RANGES)
        visual = backbone.visual
        super().__init__(backbone, classes, seen, design, text, tapped_layers(visual.num_layers))
        self.strides = [visual.patch_size * factor for factor in (0.25, 0.5, 1, 2, 4)]
        norm, channels = NORMS[design.norm], design.channels
        self.pyramid = Pyramid(visual.width, channels, norm)
        self.proposal_head = ProposalHead(channels, norm if design.rpn_norm else None)
        self.box_head = BoxHead(channels, visual.embed_dim, norm)
        self.mask_head = MaskHead(channels, norm) if design.masks else None
        self.tau = nn.Parameter(torch.tensor(50.0))
        self.eval()

    def anchors(self, levels: list[Tensor]) -> list[Tensor]:
        """The anchors of each level, (A, 4) each."""
        return [make_anchors(stride, level.shape[-2:], level.device)
                for stride, level in zip(self.strides, levels)]

    # ------------------------------------------------------------------------------ training

    def forward(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """The losses of a training step, scalars by name; their sum is the loss.

        images: float [0, 1] (3, h, w) each, at most `image_size` high and wide. Objects of classes
        that training may not see are left out.
        """
        levels = self.pyramid(self.look(images))
        scores, deltas = self.proposal_head(levels)
        anchors = self.anchors(levels)
        targets = [self.only_seen(target) for target in targets]
        generators = [make_generator(target.key, target.boxes.device) for target in targets]
        losses = self.proposal_losses(scores, deltas, torch.cat(anchors),
                                      list(zip(targets, generators)))
        found = self.propose(scores, deltas, anchors, [image.shape[-2:] for image in images])
        proposals = [boxes for boxes, _ in found]
        regions = list(map(self.sample_regions, proposals, targets, generators))
        return losses | self.region_losses(levels, regions, targets)

    def only_seen(self, target: Target) -> Target:
        """Without the objects of unseen classes."""
        kept = self.is_seen[target.labels]
        masks = target.masks[kept] if self.design.masks else target.masks
        return target._replace(boxes=target.boxes[kept], labels=target.labels[kept], masks=masks)

    def proposal_losses(self, scores: list[Tensor], deltas: list[Tensor], anchors: Tensor,
                        targets: list[tuple[Target, torch.Generator]]) -> dict[str, Tensor]:
        """BCE and L1 of the sampled anchors, both divided by the number of all of them, where an
        image counts one of each kind that it lacks (published)."""
        class_loss, box_loss, count = 0.0, 0.0, 0
        for score, delta, (target, generator) in zip(torch.cat(scores, 1), torch.cat(deltas, 1),
                                                     targets):
            matched = assign(ops.box_iou(anchors, target.boxes), 0.7, 0.3, best=0.3)
            positive, negative = sample(matched, self.design.anchors, 0.5, generator)
            wanted = encode_boxes(target.boxes[matched[positive]], anchors[positive])
            class_loss += F.softplus(-score[positive]).sum() + F.softplus(score[negative]).sum()
            box_loss += F.l1_loss(delta[positive], wanted, reduction="sum")
            count += max(len(positive), 1) + max(len(negative), 1)
        count = mean_over_ranks(count, anchors.device)
        return {"proposal class": class_loss / count, "proposal box": box_loss / count}

    @torch.no_grad()
    def propose(self, scores: list[Tensor], deltas: list[Tensor], anchors: list[Tensor],
                sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """The proposals of each image, (n, 4), the best first, inside its height and width; and
        their logits (n,)."""
        design, proposals = self.design, []
        for number, size in enumerate(sizes):
            candidates = []
            for place, (score, delta, of_level) in enumerate(zip(scores, deltas, anchors)):
                values, best = score[number].topk(min(design.candidates, len(of_level)))
                boxes = decode_boxes(delta[number][best], of_level[best], size)
                candidates.append((boxes, values, torch.full_like(best, place)))
            boxes, values, levels = map(torch.cat, zip(*candidates))
            has_area = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            boxes, values, levels = boxes[has_area], values[has_area], levels[has_area]
            kept = ops.batched_nms(boxes, values, levels, 0.7)[:design.proposals]
            proposals.append((boxes[kept], values[kept]))
        return proposals

    @torch.no_grad()
    def sample_regions(self, proposals: Tensor, target: Target, generator: torch.Generator
                       ) -> SampledRegions:
        """Proposals and true boxes -> the regions that are trained with, a quarter of objects."""
        best = 0.5 if self.design.keep_best else None
        matched = assign(ops.box_iou(proposals, target.boxes), 0.5, 0.5, best)
        boxes = torch.cat([target.boxes, proposals])
        matched = torch.cat([torch.arange(len(target.boxes), device=matched.device), matched])
        positive, negative = sample(matched, self.design.regions, 0.25, generator)
        background = torch.full_like(negative, len(self.classes))
        return SampledRegions(boxes[torch.cat([positive, negative])], matched[positive],
                              torch.cat([target.labels[matched[positive]], background]))

    def region_losses(self, levels: list[Tensor], regions: list[SampledRegions],
                      targets: list[Target]) -> dict[str, Tensor]:
        """Classification and box regression, divided by the number of all regions; masks."""
        boxes = [sampled.boxes for sampled in regions]
        pooled = pool_regions(levels, self.strides, boxes, REGION_SIDE)
        embeddings, deltas = self.box_head(pooled)
        count = mean_over_ranks(len(pooled), pooled.device)
        labels = torch.cat([sampled.labels for sampled in regions])
        wanted = torch.cat([encode_boxes(target.boxes[sampled.matched], sampled.owned, REGION_STDS)
                            for target, sampled in zip(targets, regions)])
        of_owned = torch.cat([delta[:len(sampled.matched)] for delta, sampled
                              in zip(deltas.split(list(map(len, boxes))), regions)])
        losses = {"class": self.class_loss(embeddings, labels, count),
                  "box": F.l1_loss(of_owned, wanted, reduction="sum") / count}
        return losses | ({"mask": self.mask_loss(levels, regions, targets)}
                         if self.mask_head else {})

    def class_loss(self, embeddings: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """Cross-entropy over seen classes and background of tau * cosine."""
        logits = self.tau * cosines(embeddings, self.text)
        logits = logits.masked_fill(~self.is_seen, float("-inf"))
        losses = F.cross_entropy(logits, labels, reduction="none")
        is_background = labels == len(self.classes)
        return torch.where(is_background, self.design.background * losses, losses).sum() / count

    def mask_loss(self, levels: list[Tensor], regions: list[SampledRegions],
                  targets: list[Target]) -> Tensor:
        """BCE of the masks of the regions that an object owns, on 28 x 28; the mean."""
        boxes = [sampled.owned for sampled in regions]
        logits = self.mask_head(pool_regions(levels, self.strides, boxes, MASK_SIDE))
        wanted = torch.cat([cut_masks(target.masks, sampled.matched, sampled.owned)
                            for target, sampled in zip(targets, regions)])
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
        return loss / mean_over_ranks(wanted.numel(), loss.device)

    # ------------------------------------------------------------------------------ detection

    @torch.inference_mode()
    def detect(self, images: list[Tensor], rules: ScoreRules | None = None) -> list[Detections]:
        """uint8 (3, H, W) of any size -> what is on each image, in its pixels, the best first.

        rules: None for the defaults. The model must be in eval mode, as open_fvit returns it.
        """
        rules = rules or ScoreRules()
        views = self.views(images)
        sizes = [view.shape[-2:] for view in views]
        taps = self.look(views)
        levels = self.pyramid(taps)
        found = self.propose(*self.proposal_head(levels), self.anchors(levels), sizes)
        proposals = [boxes for boxes, _ in found]
        embeddings, deltas = self.box_head(pool_regions(levels, self.strides, proposals,
                                                        REGION_SIDE))
        counts = list(map(len, proposals))
        boxes = [decode_boxes(delta, regions, size, REGION_STDS)
                 for delta, regions, size in zip(deltas.split(counts), proposals, sizes)]
        seen_at = [regions / self.design.image_size
                   for regions in (boxes if rules.at_boxes else proposals)]
        vlm = F.normalize(region_features(self.vlm_map(taps[-1]), seen_at), dim=-1)
        scores = self.fuse_scores(embeddings, vlm, rules).split(counts)
        chosen = [choose(regions, score, rules) for regions, score in zip(boxes, scores)]
        found = [to_pixels(some, size, image.shape[-2:])
                 for some, size, image in zip(chosen, sizes, images)]
        return self.add_masks(levels, chosen, found, images) if (
            self.gives_masks(rules)) else found

    def add_masks(self, levels: list[Tensor], chosen: list[tuple[Tensor, Tensor, Tensor]],
                  found: list[Detections], images: list[Tensor]) -> list[Detections]:
        """The detections with masks, whose boxes in the views are those of `chosen`."""
        logits = self.mask_head(pool_regions(levels, self.strides, [box for box, *_ in chosen],
                                             MASK_SIDE))
        masks = logits.sigmoid().split([len(box) for box, *_ in chosen])
        return [some._replace(masks=[paste_mask(mask, box, image.shape[-2:])
                                     for mask, box in zip(of_image, some.boxes.tolist())])
                for some, of_image, image in zip(found, masks, images)]

    @torch.inference_mode()
    def objects(self, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """uint8 (3, H, W) each -> its proposals x0 y0 x1 y1 (n, 4) in its pixels, the best first,
        and their objectness (n,)."""
        views = self.views(images)
        sizes = [view.shape[-2:] for view in views]
        levels = self.pyramid(self.look(views))
        found = self.propose(*self.proposal_head(levels), self.anchors(levels), sizes)
        return [to_pixels((boxes, logits.sigmoid(), None), size, image.shape[-2:])[:2]
                for (boxes, logits), size, image in zip(found, sizes, images)]

    def fuse_scores(self, embeddings: Tensor, vlm: Tensor, rules: ScoreRules) -> Tensor:
        """The detector's and the VLM's unit vectors of regions, (n, C) each -> scores (n, K).

        p_det^(1-e) * p_vlm^e with e = a for seen classes and b for novel ones, not normalised.
        """
        tau = self.tau if rules.tau is None else rules.tau
        p_det = (tau * cosines(embeddings, self.text)).softmax(dim=-1)
        p_vlm = (rules.temperature * cosines(vlm, self.text)).softmax(dim=-1)
        share = torch.where(self.is_seen, rules.a, rules.b)
        return (p_det ** (1 - share) * p_vlm ** share)[:, :-1]

    def gives_masks(self, rules: ScoreRules) -> bool:
        """See Detector.gives_masks."""
        return rules.masks and self.mask_head is not None

    def unused(self, rules: ScoreRules) -> dict[str, str | bool]:
        """See Detector.unused."""
        no_vlm = not any(rules.a if seen else rules.b for seen in self.seen) and (
            "is of the VLM's scores, whose share is 0")
        return {"TEMPERATURE": no_vlm, "AT_BOXES": no_vlm,
                "A": not any(self.seen) and "is of seen classes, and none is",
                "B": all(self.seen) and "is of novel classes, and none is"}

    def about(self) -> dict:
        """See Detector.about."""
        return super().about() | {"tau": self.tau.item()}


RANGES = {"channels": (1, 2**13), "candidates": (1, 2**20),
          "proposals": (1, 2**16), "anchors": (2, 2**16), "regions": (4, 2**16),
          "background": (0, 1e6)}      # of Design


def tapped_layers(depth: int) -> list[int]:
    """The blocks, from 0, whose outputs make the pyramid; evenly where none are published."""
    published = {12: [3, 5, 7, 11], 24: [6, 10, 14, 23]}
    return published.get(depth, [math.ceil(depth * part / 4) - 1 for part in (1, 2, 3, 4)])


def cut_masks(masks: Tensor, matched: Tensor, boxes: Tensor) -> Tensor:
    """Masks (k, h, w) of objects -> those of regions (p, 4), cut out as 0 or 1 (p, 28, 28)."""
    rois = torch.cat([matched[:, None].to(boxes.dtype), boxes], dim=1)
    return (ops.roi_align(masks[:, None].float(), rois, 2 * MASK_SIDE, aligned=True)[:, 0] >= 0.5
            ).float()


def paste_mask(mask: Tensor, box: list[float], size: tuple[int, int]) -> Tensor:
    """A mask (28, 28) of a box -> bool (H, W): where it is at least 0.5, interpolated."""
    x0, y0, x1, y1 = box
    left, top, right, bottom = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
    pasted = torch.zeros(size, dtype=torch.bool, device=mask.device)
    x, y = (((torch.arange(first, last, device=mask.device) + 0.5 - start) / (end - start)) * 2 - 1
            for first, last, start, end in ((left, right, x0, x1), (top, bottom, y0, y1)))
    y, x = torch.meshgrid(y, x, indexing="ij")
    values = F.grid_sample(mask[None, None], torch.stack([x, y], dim=-1)[None],
                           align_corners=False)[0, 0]
    pasted[top:bottom, left:right] = values >= 0.5
    return pasted


def open_fvit(path: str | Path, backbone: DeCLIP | str | None = None) -> FViT:
    """The detector of a `fvit.safetensors`, in eval mode; see downstream.detector.open_detector."""
    return open_detector(path, backbone, [FViT])
