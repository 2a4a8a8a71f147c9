"""OV-DQUO: an open-vocabulary DETR on a frozen CLIP (paper, Tables 2 and 13; arXiv 2405.17913).

    detector = open_ov_dquo("out/ov_dquo/ov_dquo.safetensors")      # of ov_dquo/train.py
    detector.set_classes(["person", "red kite"])        # any names, without training
    detections, = detector.detect([read_image("photo.jpg")])

Three blocks' outputs of the CLIP's vision tower become the memory of a transformer. The best of its
tokens propose boxes; CLIP names each by its dense features, and the text of that name becomes part
of a query. The decoder refines the box, and learns nothing of a query but whether it is an object;
CLIP names the final box once more. Unknown objects, found beforehand (unknown.py), are objects of
the class "object", so that what no label names does not become background.

Letters: B images, D width of the vision tower, C width of the text-image space, d width of the
transformer, K classes, n queries, k objects of an image, L levels, T tokens of all levels. Boxes
are cx cy w h in [0, 1] of the image without its padding, but where x0 y0 x1 y1 is said.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
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
from util import UserError


class Design(NamedTuple):
    """What a detector is and how it is trained. Each is a setting of train.py, in capitals."""
    image_size: int = 1024          # side of the square that images are fitted into
    resize: str = "pil"             # one of data.RESIZES (published: PIL's)
    attention: str | None = None    # the last block's, a row of model.ATTENTIONS; None: its context
    map_only: bool = False          # that block makes the dense map alone, none of the taps
    normalization: str = "imagenet"     # imagenet (published) or clip: mean and std of the input
    templates: str = "imagenet"     # sentences around a class name
    width: int = 256                # of the transformer
    heads: int = 8                  # of its attention
    points: int = 4                 # that a head looks at on each level
    layers: int = 6                 # of the encoder, and of the decoder
    ffn: int = 2048                 # width of the feed-forward networks
    queries: int = 1000             # boxes that the decoder refines
    text_queries: int | None = None     # classes that an image is trained with; OV-LVIS: 100
    denoising: int = 100            # noised boxes of an image, in groups of all its unknown ones


class Target(NamedTuple):
    """The objects of a training image, in its pixels."""
    boxes: Tensor       # float (k, 4), x0 y0 x1 y1
    labels: Tensor      # long (k,), places in the detector's classes; K: unknown
    weights: Tensor     # float (k,) in [0, 1]: how sure it is that this is an object
    key: str            # what is random about the image depends on this text alone


class ScoreRules(NamedTuple):
    """How queries are named and chosen: published, but the temperature, which is the paper's for
    DeCLIP (section 9.2)."""
    temperature: float = 50.0       # τ, factor of CLIP's cosines; published: 100
    factor: float = 3.0             # of novel classes' probabilities when queries are named
    exponent: float = 1.0           # of the objectness in the score
    least: float = 0.001            # score below which a detection is left out
    nms: float = 0.5                # IoU from which the lower of two boxes of a class is left out
    most: int = 100                 # detections of an image


# By data set; of every other one: OV-COCO's.
RULES = {"ovcoco": ScoreRules(), "ovlvis": ScoreRules(factor=8.0, most=300)}


class Levels(NamedTuple):
    """The tokens of all levels, one level after the other, row by row."""
    tokens: Tensor      # (B, T, d)
    positions: Tensor   # (B, T, d)
    centres: Tensor     # (B, T, 2), x y of each token's cell in [0, 1] of the image
    is_valid: Tensor    # (B, T), not padding
    shares: Tensor      # (B, L, 2), of each level's width and height that is not padding
    shapes: list[tuple[int, int]]       # height and width of each level


class Found(NamedTuple):
    """What a layer says of each query."""
    logits: Tensor      # (B, n), of objectness
    boxes: Tensor       # (B, n, 4)


# ------------------------------------------------------------------------ the parts of the detector

def inverse_sigmoid(x: Tensor) -> Tensor:
    """The logit of values in [0, 1], at most 1e-3 away from either end."""
    return x.clamp(1e-3, 1 - 1e-3).logit()


def sine(values: Tensor, channels: int, temperature: float) -> Tensor:
    """Numbers in [0, 1] (..., m) -> sines and cosines of each, (..., m * channels)."""
    exponents = torch.arange(channels, device=values.device) // 2 * 2 / channels
    phases = values[..., None].float() * 2 * math.pi / temperature**exponents
    return torch.stack([phases[..., 0::2].sin(), phases[..., 1::2].cos()], -1).flatten(-3)


class Neck(nn.Module):
    """Three blocks' outputs of one grid -> levels twice as fine, as fine, and half as fine."""

    def __init__(self, tower: int, width: int):
        super().__init__()
        self.finer = nn.ConvTranspose2d(tower, tower, 2, stride=2)
        self.laterals = nn.ModuleList(nn.Sequential(
            nn.Conv2d(tower, width, 1), nn.GroupNorm(math.gcd(32, width), width))
            for _ in range(3))
        for lateral in self.laterals:
            nn.init.xavier_uniform_(lateral[0].weight)
            nn.init.zeros_(lateral[0].bias)

    def forward(self, taps: list[Tensor]) -> list[Tensor]:
        """Three (B, D, h, w) -> three (B, d, ...) of 2h, h, h/2."""
        scaled = self.finer(taps[0]), taps[1], F.max_pool2d(taps[2], 2)
        return [lateral(level).float() for lateral, level in zip(self.laterals, scaled)]


class DeformableAttention(nn.Module):
    """Each head of a query looks at a few points of each level around the query's place."""

    def __init__(self, design: Design):
        super().__init__()
        width, self.heads, self.points = design.width, design.heads, design.points
        count = self.heads * LEVELS * self.points
        self.offsets, self.weights = nn.Linear(width, 2 * count), nn.Linear(width, count)
        self.values, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def reset(self) -> None:
        """First weights: head i looks in direction i of a circle, point p p + 1 cells away."""
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        for layer in (self.weights, self.values, self.out):
            nn.init.zeros_(layer.bias)
        angles = torch.arange(self.heads) * 2 * math.pi / self.heads
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.points + 1.0)[:, None]
        bias = (directions[:, None, None] * steps).expand(-1, LEVELS, -1, -1)
        with torch.no_grad():
            self.offsets.bias.copy_(bias.flatten())

    def forward(self, queries: Tensor, places: Tensor, memory: Tensor, levels: Levels) -> Tensor:
        """(B, n, d) at places (B, n, 2), points, or (B, n, 4), boxes; memory (B, T, d) ->
        (B, n, d)."""
        shape = self.heads, LEVELS, self.points
        offsets = self.offsets(queries).float().unflatten(-1, (*shape, 2))
        weights = self.weights(queries).float().unflatten(-1, (self.heads, -1)).softmax(-1)
        values = self.values(memory).masked_fill(~levels.is_valid[..., None], 0)
        # From shares of the image to shares of each level, padding included
        shares = levels.shares.repeat(1, 1, places.shape[-1] // 2)
        places = places[:, :, None].float() * shares[:, None]
        if places.shape[-1] == 2:
            sides = constant(tuple((w, h) for h, w in levels.shapes), torch.float, offsets.device)
            offsets = offsets / sides[:, None]
        else:
            offsets = offsets / self.points * places[:, :, None, :, None, 2:] / 2
        points = places[:, :, None, :, None, :2] + offsets
        return self.out(sample_points(values.unflatten(-1, (self.heads, -1)), levels.shapes, points,
                                      weights.unflatten(-1, shape[1:])))


def sample_points(values: Tensor, shapes: list[tuple[int, int]], points: Tensor, weights: Tensor
                  ) -> Tensor:
    """Weighted sums of bilinear samples, in float32: the operator of deformable attention.

    values: (B, T, heads, c), T being the cells of all levels. points: (B, n, heads, L, P, 2), x y
    in [0, 1] of the level; outside of it everything is 0. weights: (B, n, heads, L, P).
    Returns (B, n, heads * c).
    """
    with torch.autocast(values.device.type, enabled=False):
        total = 0.0
        for number, (level, shape) in enumerate(zip(
                values.float().split([h * w for h, w in shapes], dim=1), shapes)):
            maps = level.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shape)
            grid = 2 * points[:, :, :, number].float().transpose(1, 2).flatten(0, 1) - 1
            sampled = F.grid_sample(maps, grid, align_corners=False)        # (B heads, c, n, P)
            share = weights[:, :, :, number].float().transpose(1, 2).flatten(0, 1)[:, None]
            total = total + (sampled * share).sum(-1)
        return total.unflatten(0, (len(values), -1)).permute(0, 3, 1, 2).flatten(2)


class Layer(nn.Module):
    """A layer of the encoder, or with self-attention one of the decoder; post-norm."""

    def __init__(self, design: Design, is_decoder: bool):
        super().__init__()
        width = design.width
        self.attention = nn.MultiheadAttention(width, design.heads, batch_first=True) if (
            is_decoder) else None
        self.deformable = DeformableAttention(design)
        self.ffn = nn.Sequential(nn.Linear(width, design.ffn), nn.ReLU(),
                                 nn.Linear(design.ffn, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 + is_decoder))

    def forward(self, x: Tensor, positions: Tensor, places: Tensor, memory: Tensor, levels: Levels,
                hidden: Tensor | None = None) -> Tensor:
        """x, positions (B, n, d) at places; memory (B, T, d). hidden: (B, n, n), True where a query
        may not see another one."""
        *first, middle, last = self.norms
        if self.attention:
            asked = x + positions
            if hidden is not None:
                hidden = hidden.repeat_interleave(self.attention.num_heads, 0)
            x = first[0](x + self.attention(asked, asked, x, attn_mask=hidden,
                                            need_weights=False)[0])
        x = middle(x + self.deformable(x + positions, places, memory, levels))
        return last(x + self.ffn(x))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLUs between them."""
    layers = [layer for pair in zip(widths, widths[1:]) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


LEVELS = 3
SIDES = (0.05, 0.1, 0.2)        # of the boxes that the tokens of a level propose, in images


# ---------------------------------------------------------------------------------- the detector

class OVDQUO(Detector):
    """The detector. backbone: any CLIP, which stays as it is, in eval mode.

    classes: their names. seen: which of them training may see. text: embeddings of the classes and
    of "object" (K + 1, C), None to compute them.
    Raises UserError for a setting out of its range.
    """

    NAME, DESIGN, OTHER, RULES = "ov_dquo", Design, "object", RULES

    def __init__(self, backbone: DeCLIP, classes: Sequence[str], seen: Sequence[bool],
                 design: Design, text: Tensor | None = None):
        check_design(design, backbone.patch_size, {}, RANGES)
        if design.width % (4 * design.heads):
            raise UserError(f"WIDTH is {design.width}; it must be a multiple of four times HEADS, "
                            f"{4 * design.heads}.")
        super().__init__(backbone, classes, seen, design, text,
                         tapped_layers(backbone.visual.num_layers))
        width, embed_dim = design.width, backbone.visual.width
        self.encoder = nn.ModuleList(Layer(design, False) for _ in range(design.layers))
        self.decoder = nn.ModuleList(Layer(design, True) for _ in range(design.layers))
        self.proposal = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.level_embedding = nn.Parameter(torch.empty(LEVELS, width))
        self.queries = nn.Embedding(design.queries, width)
        self.position = mlp(2 * width, width, width)
        self.norm = nn.LayerNorm(width)
        self.initialize()
        # These keep PyTorch's first weights.
        self.neck = Neck(embed_dim, width)
        self.text_projection = mlp(self.text.shape[1], 128, width)
        box_head, self.objectness = mlp(width, width, width, 4), nn.Linear(width, 1)
        nn.init.zeros_(box_head[-1].weight)
        nn.init.zeros_(box_head[-1].bias)
        nn.init.constant_(self.objectness.bias, -math.log(99))
        self.box_heads = nn.ModuleList(copy.deepcopy(box_head) for _ in range(design.layers))
        self.proposal_box = box_head
        self.proposal_objectness = copy.deepcopy(self.objectness)
        self.labels = nn.Embedding(len(classes) + 1, width)     # of denoising queries
        self.average = nn.Module()      # see start_average
        self.eval()

    def initialize(self) -> None:
        """The transformer's first weights: all matrices Xavier, the embedding of queries too."""
        for name, weight in self.named_parameters():
            if weight.ndim > 1 and not name.startswith("backbone."):
                nn.init.xavier_uniform_(weight)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset()
        nn.init.normal_(self.level_embedding)

    # ------------------------------------------------------------------------------ features

    def remember(self, images: list[Tensor]) -> tuple[Tensor, Levels, Tensor]:
        """Float [0, 1] (3, h, w) each -> the encoder's memory (B, T, d), the levels' geometry, and
        CLIP's dense map (B, C, h', w')."""
        if self.design.map_only:
            taps, last = self.look(images, attention="maskclip"), self.look(images)[-1]
        else:
            taps = self.look(images)
            last = taps[-1]
        levels = self.make_levels(self.neck(taps), [image.shape[-2:] for image in images])
        memory = levels.tokens
        for layer in self.encoder:
            memory = layer(memory, levels.positions, levels.centres, memory, levels)
        return memory, levels, self.vlm_map(last)

    def make_levels(self, maps: list[Tensor], sizes: list[tuple[int, int]]) -> Levels:
        """Maps (B, d, h, w) of images with these heights and widths without padding."""
        parts, side, width = [], self.design.image_size, self.design.width
        wide = torch.tensor([size[::-1] for size in sizes])             # (B, 2), x y
        wide = wide.to(maps[0].device, non_blocking=True)
        for features, embedding in zip(maps, self.level_embedding):
            h, w = features.shape[-2:]
            counts = (wide * w / side).ceil()       # cells that the image touches
            x, y = (torch.arange(count, device=wide.device) for count in (w, h))
            y, x = torch.meshgrid(y, x, indexing="ij")
            cells = torch.stack([x, y], dim=-1).flatten(0, 1)                           # (hw, 2)
            is_valid = (cells < counts[:, None]).all(-1)
            reached = torch.minimum(cells + 1, counts[:, None]) / (counts[:, None] + 1e-6)
            positions = sine(reached.flip(-1), width // 2, 20) + embedding
            whole = constant((w, h), torch.float, counts.device)
            parts.append((features.flatten(2).mT, positions, (cells + 0.5) / counts[:, None],
                          is_valid, (counts / whole)[:, None]))
        return Levels(*(torch.cat(part, dim=1) for part in zip(*parts)),
                      [tuple(features.shape[-2:]) for features in maps])

    def propose(self, memory: Tensor, levels: Levels) -> Found:
        """The boxes of the best tokens, one each; gradients reach them."""
        counts = [h * w for h, w in levels.shapes]
        sides = torch.cat([memory.new_full((count,), side)
                           for count, side in zip(counts, SIDES, strict=True)])
        anchors = torch.cat([levels.centres, sides[None, :, None].expand(len(memory), -1, 2)], -1)
        # Tokens at the border propose nothing; only an image with too few others takes them.
        is_inside = levels.is_valid & ((anchors > 0.01) & (anchors < 0.99)).all(-1)
        memory = self.proposal(memory.masked_fill(~is_inside[..., None], 0))
        logits = self.proposal_objectness(memory).float()[..., 0]
        best = logits.masked_fill(~is_inside, float("-inf")).topk(
            min(self.design.queries, logits.shape[1])).indices
        chosen = take(memory, best)
        boxes = self.proposal_box(chosen).float() + take(anchors, best).logit(eps=1e-4)
        return Found(logits.gather(1, best), boxes.sigmoid())

    def decode(self, content: Tensor, boxes: Tensor, memory: Tensor, levels: Levels,
               hidden: Tensor | None = None) -> list[Found]:
        """Queries (B, n, d) at boxes (B, n, 4) -> what each layer says of them.

        A layer begins at the box before, without its gradients; its loss sees them ("look forward
        twice").
        """
        found, start = [], boxes
        for layer, head in zip(self.decoder, self.box_heads):
            place = start.detach()
            y_first = torch.cat([place[..., :2].flip(-1), place[..., 2:]], dim=-1)
            positions = self.position(sine(y_first, self.design.width // 2, 10_000))
            content = layer(content, positions, place, memory, levels, hidden)
            shown = self.norm(content)
            found.append(Found(self.objectness(shown).float()[..., 0],
                               (head(shown).float() + inverse_sigmoid(start)).sigmoid()))
            start = (head(content).float() + inverse_sigmoid(place)).sigmoid()
        return found

    @torch.no_grad()
    def name_queries(self, boxes: Tensor, vlm_map: Tensor, levels: Levels, allowed: Tensor,
                     factor: float = 1.0) -> Tensor:
        """Boxes (B, n, 4) -> the class of each, (B, n), the nearest of those `allowed` (B, K + 1).

        factor: of the probabilities of classes that training has not seen.
        """
        cosine = self.look_at(vlm_map, boxes, levels)
        likely = torch.where(self.is_seen[:-1], 0.0, math.log(factor)) + NAMING * cosine
        return likely.masked_fill(~allowed[:, None, :-1], float("-inf")).argmax(dim=-1)

    def look_at(self, vlm_map: Tensor, boxes: Tensor, levels: Levels) -> Tensor:
        """Cosines (B, n, K) of CLIP's features of boxes (B, n, 4) and the names."""
        # The middle level has the map's grid.
        boxes = ops.box_convert(boxes * levels.shares[:, 1:2].repeat(1, 1, 2), "cxcywh", "xyxy")
        regions = F.normalize(region_features(vlm_map, list(boxes)), dim=-1)
        return cosines(regions, self.text[:-1]).unflatten(0, boxes.shape[:2])

    def ask(self, found: Found, classes: Tensor, projected: Tensor
            ) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals and their classes (B, n) -> queries (B, n, d), boxes and classes, in the order
        of classes: query i has the i-th learned embedding beside the text of its class."""
        classes, order = classes.sort(dim=-1, stable=True)
        content = self.queries.weight[:classes.shape[1]] + projected[classes]
        return content, take(found.boxes.detach(), order), classes

    # ------------------------------------------------------------------------------ detection

    @torch.inference_mode()
    def detect(self, images: list[Tensor], rules: ScoreRules | None = None) -> list[Detections]:
        """uint8 (3, H, W) of any size -> what is on each image, in its pixels, the best first.

        rules: None for the defaults. The model must be in eval mode, as open_ov_dquo returns it.
        """
        rules = rules or ScoreRules()
        views = self.views(images)
        found, scores = self.score(views, rules)
        detections = []
        for view, image, boxes, score in zip(views, images, found.boxes, scores):
            chosen = choose(in_pixels(boxes, view.shape[-2:]), score, rules)
            detections.append(to_pixels(chosen, view.shape[-2:], image.shape[-2:]))
        return detections

    @torch.inference_mode()
    def objects(self, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """uint8 (3, H, W) each -> boxes x0 y0 x1 y1 (n, 4) in its pixels, and objectness (n,)."""
        found, _, _ = self.find(self.views(images), ScoreRules().factor)
        return [(in_pixels(boxes, image.shape[-2:]), logits.sigmoid())
                for boxes, logits, image in zip(found.boxes, found.logits, images)]

    def find(self, views: list[Tensor], factor: float) -> tuple[Found, Tensor, Levels]:
        """Float [0, 1] (3, h, w) each -> what the last layer found, CLIP's map and the levels."""
        memory, levels, vlm_map = self.remember(views)
        proposals = self.propose(memory, levels)
        allowed = torch.ones(len(views), len(self.text), dtype=torch.bool, device=memory.device)
        classes = self.name_queries(proposals.boxes, vlm_map, levels, allowed, factor)
        content, boxes, _ = self.ask(proposals, classes, self.text_projection(self.text))
        return self.decode(content, boxes, memory, levels)[-1], vlm_map, levels

    def score(self, views: list[Tensor], rules: ScoreRules) -> tuple[Found, Tensor]:
        """What `find` finds, and scores (B, n, K): CLIP's softmax over the names and a cosine of 0,
        times objectness."""
        found, vlm_map, levels = self.find(views, rules.factor)
        cosine = self.look_at(vlm_map, found.boxes, levels)
        named = (rules.temperature * F.pad(cosine, (0, 1))).softmax(dim=-1)[..., :-1]
        return found, named * found.logits.sigmoid()[..., None] ** rules.exponent

    def unused(self, rules: ScoreRules) -> dict[str, str | bool]:
        """See Detector.unused."""
        return {"FACTOR": (all(self.seen) or not any(self.seen)) and (
            "is of novel classes beside seen ones, and there are none")}

    # ------------------------------------------------------------------------------ training

    def forward(self, images: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        """The losses of a training step, scalars by name; their sum is the loss.

        images: float [0, 1] (3, h, w) each, at most `image_size` high and wide. Objects of classes
        that training may not see are left out.
        """
        memory, levels, vlm_map = self.remember(images)
        generators = [make_generator(target.key, memory.device) for target in targets]
        allowed = torch.stack(list(map(self.draw_classes, targets, generators)))
        targets = [in_shares(target, image.shape[-2:], of_image[target.labels])
                   for target, image, of_image in zip(targets, images, allowed)]
        proposals, other = self.propose(memory, levels), len(self.classes)
        classes = self.name_queries(proposals.boxes, vlm_map, levels, allowed)
        for row, boxes, target in zip(classes, proposals.boxes.detach(), targets):
            row[overlaps(boxes, target.boxes[target.labels == other]).amax(1) > 0.5] = other
        projected = self.text_projection(self.text)
        content, boxes, classes = self.ask(proposals, classes, projected)
        noise = Noise.stack([self.make_noise(target, generator, of_image) for
                             target, generator, of_image in zip(targets, generators, allowed)])
        noised = self.labels(noise.labels) + projected[noise.texts]
        found = self.decode(torch.cat([noised, content], 1), torch.cat([noise.boxes, boxes], 1),
                            memory, levels, noise.hidden(content.shape[1]))
        m = noise.labels.shape[1]
        return self.losses([Found(layer.logits[:, m:], layer.boxes[:, m:]) for layer in found],
                           classes, proposals, targets,
                           sum(noise.loss(layer.logits[:, :m]) for layer in found), noise.groups)

    def draw_classes(self, target: Target, generator: torch.Generator) -> Tensor:
        """The classes (K + 1,) that an image is trained with: those of its objects, and random
        others up to `text_queries`; of more, random ones. "object" is always among them."""
        most = self.design.text_queries
        if most is None or most >= sum(self.seen):
            return self.is_seen
        rank = torch.rand(len(self.text), generator=generator, device=self.text.device)
        rank[target.labels] += 1
        rank[-1:] = 3       # rank[-1] = 3 would be a copy that a GPU waits for
        rank[~self.is_seen] = -1
        chosen = torch.zeros_like(self.is_seen)
        chosen[rank.topk(most + 1).indices] = True
        return chosen

    def losses(self, layers: list[Found], classes: Tensor, proposals: Found, targets: list[Target],
               denoising: Tensor, groups: Tensor) -> dict[str, Tensor]:
        """The losses of all decoder layers, of the proposals, and of denoising, by name.

        Each layer has its own matching; that of the last counts what they are divided by.
        """
        other = len(self.classes)
        fits = [row[:, None] == target.labels for row, target in zip(classes, targets)]
        matches = [[match(layer, number, target, fit)
                    for number, (target, fit) in enumerate(zip(targets, fits))]
                   for layer in layers]
        matches.append([match(proposals, number, target) for number, target in enumerate(targets)])
        true = [(target.labels[objects] != other).sum()
                for target, (_, objects) in zip(targets, matches[-2])]
        all_true, device = sum(true), classes.device
        unknown = sum(len(objects) for _, objects in matches[-2]) - all_true
        true_count, unknown_count, noise_count = (
            mean_over_ranks(count, device)
            for count in (all_true, unknown, (torch.stack(true) * groups).sum()))
        losses = {"denoising": 2 * denoising / noise_count}
        for prefix, part, of_part in (("", layers, matches[:-1]),
                                      ("proposal ", [proposals], matches[-1:])):
            terms = [layer_losses(layer, of_layer, targets, other)
                     for layer, of_layer in zip(part, of_part)]
            objectness, l1, giou = map(sum, zip(*terms))
            losses |= {f"{prefix}objectness": 2 * objectness / (true_count + unknown_count),
                       f"{prefix}box": 5 * l1 / true_count, f"{prefix}giou": 2 * giou / true_count}
        return losses

    def make_noise(self, target: Target, generator: torch.Generator, allowed: Tensor) -> "Noise":
        """The denoising queries of an image: groups of its unknown boxes, each moved a little and
        moved far; of an image without unknown boxes, of its first true one.

        target: in shares of the image. A quarter of the labels, "object", is replaced at random.
        """
        other, device = len(self.classes), allowed.device
        chosen = (target.labels == other).nonzero().flatten()
        chosen = chosen if len(chosen) else torch.arange(min(1, len(target.labels)), device=device)
        count = len(chosen)
        groups = max(1, self.design.denoising // max(1, count))
        shape = groups, 2, count        # near and far
        edges = ops.box_convert(target.boxes[chosen], "cxcywh", "xyxy")
        half = target.boxes[chosen][:, 2:].repeat(1, 2) / 2
        amount, sign, replaced = (torch.rand(*shape, *more, generator=generator, device=device)
                                  for more in ((4,), (4,), ()))
        amount[:, 1] += 1
        edges = (edges + amount * half * (sign < 0.5).float().mul(2).sub(1)).clamp(0, 1)
        names = allowed.nonzero().flatten()
        random = names[torch.randint(len(names), shape, generator=generator, device=device)]
        labels = torch.where(replaced < 0.25, random, other)
        texts = labels.clone()
        texts[:, 0] = other
        is_near = torch.zeros(shape, device=device)
        is_near[:, 0] = 1
        group = torch.arange(groups, device=device)[:, None, None].expand(shape)
        weights = torch.where(is_near > 0, target.weights[chosen].sqrt(), 1.0)
        boxes = ops.box_convert(edges.flatten(0, 2), "xyxy", "cxcywh")
        return Noise(labels.flatten(), texts.flatten(), boxes, is_near.flatten(), weights.flatten(),
                     group.flatten(), torch.full((), groups if count else 0, device=device))

    # ------------------------------------------------------------------------------ the average

    def start_average(self) -> None:
        """From now on the file has a moving average of the weights; see update_average."""
        for name, weight in self.named_parameters():
            if weight.requires_grad:
                self.average.register_buffer(name.replace(".", "/"), weight.detach().clone())

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Moves the average by 1 - decay of the way to the weights."""
        weights = dict(self.named_parameters())
        for name, value in self.average.named_buffers():
            value.lerp_(weights[name.replace("/", ".")], 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """See Detector.state: averages, where there are; without what only training needs."""
        average = {name.replace("/", "."): value for name, value in self.average.named_buffers()}
        return {name: average.get(name, value) for name, value in super().state().items()
                if not name.startswith(("labels.", "average."))}


NAMING = 100.0      # factor of the cosines that name queries; only FACTOR's effect depends on it


RANGES = {"width": (1, 2**13), "heads": (1, 2**8), "points": (1, 2**8), "layers": (1, 2**6),
          "ffn": (1, 2**16), "queries": (1, 2**16), "denoising": (1, 2**16)}      # of Design


def tapped_layers(depth: int) -> list[int]:
    """The blocks, from 0, whose outputs are looked at; evenly where none are published."""
    published = {12: [5, 7, 11], 24: [10, 14, 23]}
    return published.get(depth, [math.ceil(depth * part / 3) - 1 for part in (1, 2, 3)])


def take(values: Tensor, places: Tensor) -> Tensor:
    """(B, T, c) at places (B, n) -> (B, n, c)."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


# ------------------------------------------------------------------------- matching and the losses

def in_shares(target: Target, size: tuple[int, int], is_kept: Tensor) -> Target:
    """The objects that are kept, their boxes as cx cy w h in shares of an image of `size`."""
    boxes = ops.box_convert(target.boxes[is_kept].float(), "xyxy", "cxcywh")
    boxes = scale_boxes(boxes, 1 / size[1], 1 / size[0])
    return target._replace(boxes=boxes, labels=target.labels[is_kept],
                           weights=target.weights[is_kept].float())


def in_pixels(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) -> x0 y0 x1 y1 in the pixels of an image of `size`, and inside it."""
    boxes = scale_boxes(boxes, size[1], size[0])
    return ops.clip_boxes_to_image(ops.box_convert(boxes, "cxcywh", "xyxy"), size)


def scale_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """Boxes (n, 4), x y x y or x y w h, times two numbers; a GPU would wait for a tensor of them.
    """
    return torch.stack([boxes[:, 0::2] * width, boxes[:, 1::2] * height], dim=-1).flatten(1)


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU (n, k) of boxes (n, 4) and (k, 4); with a column of 0 for none."""
    found = ops.box_iou(*(ops.box_convert(some, "cxcywh", "xyxy") for some in (boxes, others)))
    return F.pad(found, (0, 1))


@torch.no_grad()
def match(found: Found, number: int, target: Target, fits: Tensor | None = None
          ) -> tuple[Tensor, Tensor]:
    """Queries and objects of image `number` that belong together: two lists of places.

    The pairs cost least in all. fits: (n, k), which pairs are allowed; an object that no allowed
    query overlaps (GIoU > 0) gets none.
    """
    logits, boxes = found.logits[number].float(), found.boxes[number].float()
    p = logits.sigmoid()[:, None]
    focal = 0.25 * (1 - p)**2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    corners = (ops.box_convert(some, "cxcywh", "xyxy") for some in (boxes, target.boxes))
    giou = ops.generalized_box_iou(*corners)
    cost = 2 * focal + 5 * torch.cdist(boxes, target.boxes, p=1) - 2 * giou
    if fits is not None:
        fits = fits & (fits & (giou > 0)).any(0)
        cost = cost.masked_fill(~fits, FORBIDDEN)
    # Not a number is a bad step, which the loss tells.
    cost = cost.nan_to_num(FORBIDDEN, FORBIDDEN, FORBIDDEN).cpu()
    queries, objects = map(torch.as_tensor, linear_sum_assignment(cost))
    is_allowed = cost[queries, objects] < FORBIDDEN
    return queries[is_allowed].to(boxes.device), objects[is_allowed].to(boxes.device)


FORBIDDEN = 99.0    # cost of a pair, above all others


def layer_losses(found: Found, matches: list[tuple[Tensor, Tensor]], targets: list[Target],
                 other: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over a layer's queries: the objectness of all (varifocal: matched ones learn their IoU),
    L1 and 1 - GIoU of the boxes of those that a true object is matched with."""
    iou, weights = torch.zeros_like(found.logits), torch.ones_like(found.logits)
    is_matched = torch.zeros_like(found.logits, dtype=torch.bool)
    ours, theirs = [], []
    for number, ((queries, objects), target) in enumerate(zip(matches, targets)):
        boxes, wanted = found.boxes[number][queries], target.boxes[objects]
        iou[number, queries] = overlaps(boxes.detach(), wanted).diagonal()
        weights[number, queries] = target.weights[objects].sqrt()
        is_matched[number, queries] = True
        is_true = target.labels[objects] != other
        ours.append(boxes[is_true])
        theirs.append(wanted[is_true])
    share = torch.where(is_matched, iou, 0.75 * found.logits.detach().sigmoid()**2)
    loss = F.binary_cross_entropy_with_logits(found.logits, iou, share * weights, reduction="sum")
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    corners = [ops.box_convert(some, "cxcywh", "xyxy") for some in (ours, theirs)]
    return (loss, F.l1_loss(ours, theirs, reduction="sum"),
            ops.generalized_box_iou_loss(*corners, reduction="sum"))


class Noise(NamedTuple):
    """Denoising queries of an image (m,), or with padding of several (B, m)."""
    labels: Tensor      # that the query is told
    texts: Tensor       # the class whose text it gets
    boxes: Tensor       # (..., 4)
    is_object: Tensor   # float: 1 of those that were moved a little
    weights: Tensor     # of its loss; 0 of padding
    group: Tensor       # its group, which sees itself alone; -1 of padding
    groups: Tensor      # () or (B,), their number

    @staticmethod
    def stack(images: list["Noise"]) -> "Noise":
        """Images' queries, filled up to the same number."""
        most = max(len(image.labels) for image in images)
        filled = []
        for image in images:
            more = most - len(image.labels)
            filled.append([F.pad(value, (0, 0, 0, more)) if value.ndim == 2 else
                           F.pad(value, (0, more), value=-1 if value is image.group else 0)
                           for value in image[:-1]] + [image.groups])
        return Noise(*map(torch.stack, zip(*filled)))

    def hidden(self, queries: int) -> Tensor:
        """(B, m + n, m + n): a group sees itself and the n other queries; they see no group."""
        m = self.group.shape[1]
        hidden = F.pad(self.group[:, :, None] != self.group[:, None], (0, queries, 0, queries))
        hidden[:, m:, :m] = True
        return hidden

    def loss(self, logits: Tensor) -> Tensor:
        """Focal loss of objectness (B, m), summed; what was moved far is no object."""
        loss = ops.sigmoid_focal_loss(logits, self.is_object, alpha=0.25, gamma=2)
        return (loss * self.weights).sum()


# ---------------------------------------------------------------------------- opening the file

def open_ov_dquo(path: str | Path, backbone: DeCLIP | str | None = None) -> OVDQUO:
    """The detector of an `ov_dquo.safetensors`, in eval mode; see detector.open_detector."""
    return open_detector(path, backbone, [OVDQUO])
