"""downstream/ov_dquo/model.py: the sampling operator, the matching, the losses and the denoising
queries against slow direct computations; what gets a gradient and what must not."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from conftest import draw_scene
from torchvision.ops import box_convert, box_iou, generalized_box_iou, roi_align

from downstream.ov_dquo import model
from downstream.ov_dquo.model import OVDQUO, Design, Found, ScoreRules, Target, open_ov_dquo
from model import DeCLIP
from util import UserError
from util.weights import read_record

SMALL = Design(image_size=64, width=16, heads=2, points=2, layers=2, ffn=16, queries=20,
               denoising=6, templates="{}")
NAMES, SEEN = ["disc", "box", "cat"], [True, True, False]
UNKNOWN = len(NAMES)


@pytest.fixture(scope="module")
def clip() -> DeCLIP:
    torch.manual_seed(0)
    return DeCLIP("tiny-eva")


@pytest.fixture
def detector(clip) -> OVDQUO:
    return lively(OVDQUO(clip, NAMES, SEEN, SMALL))


def lively(detector: OVDQUO) -> OVDQUO:
    """With boxes that move: first weights of box heads are 0."""
    for head in (*detector.box_heads, detector.proposal_box):
        torch.nn.init.normal_(head[-1].weight, std=0.5)
    return detector


def batch(count: int = 3) -> tuple[list, list]:
    """Drawn scenes with a disc and a box each; the box of the second one is unknown."""
    images, targets = [], []
    for seed, size in enumerate([(64, 48), (40, 64), (64, 64)][:count]):
        image, label = (torch.from_numpy(part) for part in draw_scene(seed, *size))
        places = [(label == number).nonzero() for number in (1, 2)]
        boxes = torch.stack([torch.cat([at.amin(0).flip(0), at.amax(0).flip(0) + 1])
                             for at in places]).float()
        images.append(image.permute(2, 0, 1).float() / 255)
        labels, weights = torch.tensor([0, 1]), torch.ones(2)
        if seed == 1:
            labels[1], weights[1] = UNKNOWN, 0.49
        targets.append(Target(boxes, labels, weights, f"0-0-{seed}"))
    return images, targets


def gradients(detector: OVDQUO, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    detector.zero_grad()
    loss.backward()
    return {name: weight.grad for name, weight in detector.named_parameters()
            if weight.grad is not None}


# ------------------------------------------------------------------------- deformable attention

def sampled_slowly(values, shapes, points, weights):
    """The operator as a loop over images, queries, heads, levels and points."""
    B, n, heads, L, P, _ = points.shape
    out = []
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(L)]
    for b in range(B):
        for q in range(n):
            for head in range(heads):
                total = 0
                for level, (h, w) in enumerate(shapes):
                    for p in range(P):
                        x, y = points[b, q, head, level, p] * torch.tensor([w, h]) - 0.5
                        for row in (int(y.floor()), int(y.floor()) + 1):
                            for column in (int(x.floor()), int(x.floor()) + 1):
                                if 0 <= row < h and 0 <= column < w:
                                    share = (1 - (x - column).abs()) * (1 - (y - row).abs())
                                    cell = values[b, starts[level] + row * w + column, head]
                                    total = total + weights[b, q, head, level, p] * share * cell
                out.append(total if torch.is_tensor(total) else values.new_zeros(
                    values.shape[-1]))
    return torch.stack(out).view(B, n, -1)


def test_sampling_is_that_of_a_loop():
    shapes = [(4, 6), (3, 2), (1, 1)]
    values = torch.randn(2, 31, 2, 3, requires_grad=True)
    points = (torch.rand(2, 4, 2, 3, 2, 2) * 1.4 - 0.2).requires_grad_()      # outside, too
    weights = torch.rand(2, 4, 2, 3, 2, requires_grad=True)
    found = []
    for sample in (model.sample_points, sampled_slowly):
        out = sample(values, shapes, points, weights)
        slopes = torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(),
                                     (values, points, weights))
        found.append((out, *slopes))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_heads_begin_in_directions_of_a_circle():
    attention = model.DeformableAttention(Design(width=64, heads=8, points=2))
    attention.reset()
    offsets = attention.offsets.bias.view(8, 3, 2, 2)
    assert offsets[:, 1, 0].round(decimals=4).tolist() == [
        [1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]
    torch.testing.assert_close(offsets[:, :, 1], 2 * offsets[:, :, 0])


def test_a_box_spreads_its_points(detector):
    """Of a box, offsets are in halves of its sides, divided by the number of points; of a token,
    in cells of each level."""
    attention = detector.decoder[0].deformable
    taken = {}

    def keep(values, shapes, points, weights):
        taken["points"] = points
        return torch.zeros(*points.shape[:2], SMALL.width)

    images, _ = batch(2)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        memory, levels, _ = detector.remember(images)
        patch.setattr(model, "sample_points", keep)
        queries = torch.zeros(2, 1, SMALL.width)
        offsets = attention.offsets.bias.view(2, 3, 2, 2)
        attention(queries, torch.tensor([[[0.5, 0.5, 0.2, 0.4]]] * 2), memory, levels)
        shares = levels.shares[:, None, None, :, None]
        expected = (torch.tensor([0.5, 0.5]) + offsets / 2 * torch.tensor([0.2, 0.4]) / 2
                    * 1.0)
        middle = torch.tensor([0.5, 0.5]) * shares
        torch.testing.assert_close(taken["points"],
                                   middle + (expected - 0.5) * shares)
        attention(queries, torch.tensor([[[0.5, 0.5]]] * 2), memory, levels)
        sides = torch.tensor([[w, h] for h, w in levels.shapes])[:, None]
        torch.testing.assert_close(taken["points"], (middle + offsets / sides))


# ------------------------------------------------------------------------------------ geometry

def test_tokens_know_where_they_are(detector):
    """Centres in the image without its padding; cells that the image does not touch are no use."""
    images, _ = batch(2)        # 64 x 48 and 40 x 64 in a square of 64, patches of 8
    _, levels, _ = detector.remember(images)
    assert levels.shapes == [(16, 16), (8, 8), (4, 4)]
    middle = slice(256, 256 + 64)
    valid = levels.is_valid[:, middle].view(2, 8, 8)
    assert valid[0].sum() == 8 * 6 and valid[0, :, :6].all()
    assert valid[1].sum() == 5 * 8 and valid[1, :5].all()
    centres = levels.centres[:, middle].view(2, 8, 8, 2)
    torch.testing.assert_close(centres[0, 0, 0], torch.tensor([0.5 / 6, 0.5 / 8]))
    torch.testing.assert_close(centres[1, 4, 7], torch.tensor([7.5 / 8, 4.5 / 5]))
    torch.testing.assert_close(levels.shares[:, 1], torch.tensor([[6 / 8, 1], [1, 5 / 8]]))


def test_padding_changes_nothing(clip):
    """A wider square gives the same boxes, if CLIP gives the same features of the image."""
    def look(self, images, attention=None):
        side = self.design.image_size
        padded = torch.stack([F.pad(image, (0, side - image.shape[2], 0, side - image.shape[1]),
                                    value=9.0) for image in images])
        cells = F.avg_pool2d(padded, 8)
        return [cells[:, :1].expand(-1, 48, -1, -1) * (number + 1) for number in range(3)]

    images, found = [torch.rand(3, 48, 32)], []
    for side in (64, 128):
        torch.manual_seed(0)
        detector = lively(OVDQUO(clip, NAMES, SEEN, SMALL._replace(image_size=side)))
        for lateral in detector.neck.laterals:      # whose statistics see the padding
            lateral[1] = torch.nn.Identity()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OVDQUO, "look", look)
            found.append(detector.score(images, ScoreRules()))
    torch.testing.assert_close(found[0][0].boxes, found[1][0].boxes, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


def test_proposals_are_the_best_tokens(detector):
    images, _ = batch(2)
    memory, levels, _ = detector.remember(images)
    found = detector.propose(memory, levels)
    assert found.logits.shape == (2, 20) and found.boxes.shape == (2, 20, 4)
    assert (found.logits.diff() <= 1e-6).all()
    sides = torch.tensor([0.05] * 256 + [0.1] * 64 + [0.2] * 16)[:, None].expand(-1, 2)
    for number in range(2):
        anchors = torch.cat([levels.centres[number], sides], dim=1)
        inside = levels.is_valid[number] & ((anchors > 0.01) & (anchors < 0.99)).all(1)
        hidden = detector.proposal(memory[number] * inside[:, None])
        logits = detector.proposal_objectness(hidden)[:, 0]
        order = logits.masked_fill(~inside, -1e9).argsort(descending=True)[:20]
        torch.testing.assert_close(found.logits[number], logits[order])
        boxes = (detector.proposal_box(hidden[order])
                 + (anchors[order] / (1 - anchors[order])).log()).sigmoid()
        torch.testing.assert_close(found.boxes[number], boxes)


def test_images_smaller_than_a_cell(detector):
    """Two pixels: fewer tokens than queries; figures stay finite, in training, too."""
    tiny = torch.rand(3, 2, 3)
    found, = detector.detect([(tiny * 255).byte()], ScoreRules(least=0))
    assert found.boxes.isfinite().all() and len(found.boxes)
    target = Target(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([0]), torch.ones(1), "a")
    losses = detector.train()([tiny], [target])
    assert all(value.isfinite() for value in losses.values())
    assert all(slope.isfinite().all()
               for slope in gradients(detector, sum(losses.values())).values())


# ------------------------------------------------------------------------------ names of queries

def test_queries_are_named_by_clip(detector):
    images, _ = batch(2)
    with torch.no_grad():
        memory, levels, vlm_map = detector.remember(images)
        boxes = detector.propose(memory, levels).boxes
    sizes = [torch.tensor([6, 8.0]), torch.tensor([8, 5.0])]        # patches of each image
    regions = roi_align(vlm_map, [box_convert(some, "cxcywh", "xyxy") * size.repeat(2)
                                  for some, size in zip(boxes, sizes)], 1, aligned=True)[..., 0, 0]
    cosine = (F.normalize(regions, dim=-1) @ detector.text[:-1].T).unflatten(0, (2, -1))
    everything = torch.ones(2, 4, dtype=torch.bool)
    name = detector.name_queries
    assert torch.equal(name(boxes, vlm_map, levels, everything), cosine.argmax(-1))
    likely = (100 * cosine).softmax(-1) * torch.tensor([1, 1, 8.0])
    assert torch.equal(name(boxes, vlm_map, levels, everything, 8.0), likely.argmax(-1))
    only = everything.clone()
    only[1, :2] = False
    assert (name(boxes, vlm_map, levels, only)[1] == 2).all()


def test_queries_come_in_the_order_of_classes(detector):
    found = Found(torch.zeros(1, 4), torch.arange(16.0).view(1, 4, 4))
    projected = torch.randn(4, SMALL.width)
    content, boxes, classes = detector.ask(found, torch.tensor([[2, 0, 2, 1]]), projected)
    assert classes.tolist() == [[0, 1, 2, 2]] and boxes[0, :, 0].tolist() == [4, 12, 0, 8]
    torch.testing.assert_close(content[0], detector.queries.weight[:4] + projected[[0, 1, 2, 2]])


def test_proposals_on_unknown_objects_get_the_wildcard(detector, monkeypatch):
    images, targets = batch(2)
    taken = {}

    def keep(self, layers, classes, proposals, targets, *_):
        taken.update(classes=classes, boxes=layers[0].boxes)
        return {"loss": layers[0].boxes.sum()}

    everywhere = Found(torch.zeros(2, 20), torch.tensor([0.5, 0.5, 1, 1]).expand(2, 20, 4))
    monkeypatch.setattr(OVDQUO, "losses", keep)
    monkeypatch.setattr(OVDQUO, "propose", lambda *_: everywhere)
    whole = [target._replace(boxes=torch.tensor([[0, 0, *image.shape[:0:-1]]]).float().repeat(2, 1))
             for image, target in zip(images, targets)]
    detector.train()(images, whole)
    assert (taken["classes"][1] == UNKNOWN).all()           # also where it lies on a true object
    assert (taken["classes"][0] < 2).all()                  # no unknown object, no unseen class


def test_text_queries_are_those_of_the_objects_and_others(clip):
    names = [f"class {number}" for number in range(30)]
    seen = [number % 3 > 0 for number in range(30)]
    detector = OVDQUO(clip, names, seen, SMALL._replace(text_queries=6))
    drawn = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        target = Target(torch.zeros(4, 4), torch.tensor([1, 3, 29, 30]), torch.ones(4), "")
        chosen = detector.draw_classes(target, generator)
        assert chosen.sum() == 7 and chosen[[1, 29, 30]].all() and not chosen[::3][:10].any()
        drawn |= set(chosen.nonzero().flatten().tolist())
    assert drawn == {number for number in range(30) if seen[number]} | {30}
    many = Target(torch.zeros(20, 4), torch.tensor([n for n in range(30) if seen[n]]),
                  torch.ones(20), "")
    chosen = detector.draw_classes(many, torch.Generator().manual_seed(0))
    assert chosen.sum() == 7 and chosen[30]


# ------------------------------------------------------------------------------------ the matching

def matched_slowly(logits, boxes, target, fits):
    """The best assignment of all, by trying every one."""
    p = logits.sigmoid()
    cost = torch.empty(len(boxes), len(target.boxes))
    giou = generalized_box_iou(*(box_convert(some, "cxcywh", "xyxy")
                                 for some in (boxes, target.boxes)))
    for q in range(len(boxes)):
        focal = (0.25 * (1 - p[q])**2 * -p[q].log() - 0.75 * p[q]**2 * -(1 - p[q]).log())
        for k in range(len(target.boxes)):
            cost[q, k] = (2 * focal + 5 * (boxes[q] - target.boxes[k]).abs().sum()
                          - 2 * giou[q, k])
    usable = fits & (giou > 0)
    cost[~fits] = 99
    cost[:, ~usable.any(0)] = 99
    best = min(permutations(range(len(boxes)), len(target.boxes)),
               key=lambda queries: sum(cost[q, k].item() for k, q in enumerate(queries)))
    return {(q, k) for k, q in enumerate(best) if cost[q, k] < 99}


def test_matching_is_the_cheapest_without_forbidden_pairs():
    forbidden = 0
    for seed in range(20):
        torch.manual_seed(seed)
        boxes = torch.rand(1, 6, 4) * 0.4 + 0.3
        target = Target(torch.rand(3, 4) * 0.4 + 0.3, torch.tensor([0, 1, 0]), torch.ones(3), "")
        found, classes = Found(torch.randn(1, 6), boxes), torch.randint(2, (6,))
        fits = classes[:, None] == target.labels
        queries, objects = model.match(found, 0, target, fits)
        pairs = set(zip(queries.tolist(), objects.tolist()))
        assert pairs == matched_slowly(found.logits[0], boxes[0], target, fits)
        assert all(fits[pair] for pair in pairs)
        forbidden += 3 - len(pairs)
        free = model.match(found, 0, target)
        everything = torch.ones_like(fits)
        assert len(free[0]) == 3
        pairs = set(zip(*(part.tolist() for part in free)))
        if (generalized_box_iou(*(box_convert(some, "cxcywh", "xyxy") for some in (
                boxes[0], target.boxes))) > 0).any(0).all():
            assert pairs == matched_slowly(found.logits[0], boxes[0], target, everything)
    assert forbidden        # there were objects without an allowed query


def test_an_object_that_no_allowed_query_touches_is_left_out():
    """Though an allowed query is there, far away."""
    found = Found(torch.zeros(1, 2), torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]]]))
    target = Target(torch.tensor([[0.9, 0.9, 0.1, 0.1]]), torch.tensor([0]), torch.ones(1), "")
    queries, _ = model.match(found, 0, target, torch.tensor([[True], [False]]))
    assert not len(queries)


def test_no_number_is_no_crash():
    found = Found(torch.full((1, 3), float("nan")), torch.full((1, 3, 4), float("nan")))
    target = Target(torch.rand(2, 4), torch.tensor([0, 1]), torch.ones(2), "")
    assert not len(model.match(found, 0, target)[0])


# -------------------------------------------------------------------------------------- the losses

def test_losses_of_a_layer_by_hand():
    """Varifocal: a matched query learns its IoU, weighted by it; of an unknown object times the
    root of its weight. Boxes learn from true objects alone."""
    torch.manual_seed(0)
    logits, boxes = torch.randn(1, 4), torch.rand(1, 4, 4) * 0.3 + 0.3
    target = Target(torch.rand(2, 4) * 0.3 + 0.3, torch.tensor([0, UNKNOWN]),
                    torch.tensor([1, 0.25]), "")
    pairs = [(torch.tensor([2, 0]), torch.tensor([0, 1]))]
    objectness, l1, giou = model.layer_losses(Found(logits, boxes), pairs, [target], UNKNOWN)
    corners = [box_convert(some, "cxcywh", "xyxy") for some in (boxes[0], target.boxes)]
    iou, p = box_iou(*corners), logits[0].sigmoid()

    def entropy(q, wanted):
        return -(wanted * p[q].log() + (1 - wanted) * (1 - p[q]).log())

    expected = (iou[2, 0] * entropy(2, iou[2, 0]) + 0.5 * iou[0, 1] * entropy(0, iou[0, 1])
                + sum(0.75 * p[q]**2 * entropy(q, 0) for q in (1, 3)))
    torch.testing.assert_close(objectness, expected)
    torch.testing.assert_close(l1, (boxes[0, 2] - target.boxes[0]).abs().sum())
    torch.testing.assert_close(giou, 1 - generalized_box_iou(*corners)[2, 0])


def test_losses_are_divided_by_the_last_layers_matches(detector, monkeypatch):
    """The sum of all layers over true and unknown matches, boxes over true ones, denoising over
    true ones times groups; each at least 1."""
    targets = [Target(torch.rand(2, 4), torch.tensor([0, UNKNOWN]), torch.ones(2), "")] * 3
    layers = [Found(torch.zeros(3, 4), torch.zeros(3, 4, 4)) for _ in range(3)]
    pairs = {0: [0], 1: [0], 2: [0, 1], 3: [1]}     # objects matched, by layer; 3: the proposals

    def match(found, number, target, fits=None):
        places = torch.tensor(pairs[[*map(id, [*layers, proposals])].index(id(found))])
        return places, places

    proposals = Found(torch.zeros(3, 4), torch.zeros(3, 4, 4))
    monkeypatch.setattr(model, "match", match)
    monkeypatch.setattr(model, "layer_losses", lambda *_: (torch.tensor(12.0),) * 3)
    losses = detector.losses(layers, torch.zeros(3, 4, dtype=torch.long), proposals, targets,
                             torch.tensor(18.0), torch.tensor([2, 3, 1]))
    assert losses == {"objectness": 2 * 36 / 6, "box": 5 * 36 / 3, "giou": 2 * 36 / 3,
                      "proposal objectness": 2 * 12 / 6, "proposal box": 5 * 12 / 3,
                      "proposal giou": 2 * 12 / 3, "denoising": 2 * 18 / 6}


def test_unknown_objects_teach_no_boxes(detector):
    """Only what is an object, also with the proposals."""
    images, targets = batch(1)
    unknown = targets[0]._replace(labels=torch.tensor([UNKNOWN, UNKNOWN]))
    losses = detector.train()(images, [unknown])
    assert all(losses[name] == 0 for name in ("box", "giou", "proposal box", "proposal giou"))
    found = gradients(detector, losses["objectness"] + losses["proposal objectness"])
    assert not any(found[f"box_heads.{layer}.4.weight"].any() for layer in (0, 1)
                   if f"box_heads.{layer}.4.weight" in found)
    assert found["objectness.weight"].any() and found["proposal_objectness.weight"].any()


def test_everything_but_clip_is_trained(detector):
    images, targets = batch()
    found = gradients(detector, sum(detector.train()(images, targets).values()))
    assert not any(name.startswith("backbone.") for name in found)
    assert set(found) == {name for name, weight in detector.named_parameters()
                          if weight.requires_grad}
    without = [target._replace(boxes=target.boxes[:0], labels=target.labels[:0],
                               weights=target.weights[:0]) for target in targets]
    losses = detector(images, without)
    assert losses["box"] == losses["denoising"] == 0 < losses["objectness"]
    # DDP waits for a gradient of every weight.
    assert set(gradients(detector, sum(losses.values()))) == set(found)


def test_a_layer_learns_the_box_that_the_next_one_begins_at(detector):
    """Look forward twice: the second layer's box teaches the first one's head, too, but the third
    one's does not."""
    detector = OVDQUO(detector.backbone, NAMES, SEEN, SMALL._replace(layers=3))
    images, _ = batch(1)
    with torch.no_grad():
        memory, levels, _ = detector.remember(images)
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.3]]])
    for layer in (0, 1, 2):
        found = detector.decode(torch.zeros(1, 1, SMALL.width), boxes, memory, levels)
        taught = gradients(detector, found[layer].boxes.sum())
        heads = {int(name.split(".")[1]) for name in taught if name.startswith("box_heads")}
        assert heads == {layer, max(0, layer - 1)}


def test_losses_do_not_depend_on_the_batch(detector):
    """One process with all images, or ranks with a part each: but for what they are divided by,
    the terms of an image are its own."""
    images, targets = batch()
    detector.train()
    parts = []

    def terms(images, targets):
        taken = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "mean_over_ranks", lambda *_: torch.tensor(1.0))
            losses = detector(images, targets)
        taken.append({name: value.item() for name, value in losses.items()})
        return taken[0]

    together = terms(images, targets)
    parts = [terms([image], [target]) for image, target in zip(images, targets)]
    for name, value in together.items():
        assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-3), name


def test_novel_classes_are_never_learned(detector):
    images, targets = batch(2)
    detector.train()
    cat = [target._replace(boxes=torch.cat([target.boxes, torch.tensor([[3.0, 3, 20, 20]])]),
                           labels=torch.cat([target.labels, torch.tensor([2])]),
                           weights=torch.ones(3)) for target in targets]
    plain = [target._replace(weights=torch.ones(2)) for target in targets]
    assert detector(images, plain) == detector(images, cat)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast(detector, precision):
    images, targets = batch()
    with torch.autocast("cpu", precision):
        losses = detector.train()(images, targets)
        found, = detector.eval().detect([(images[0] * 255).byte()], ScoreRules(least=0))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert found.scores.dtype == found.boxes.dtype == torch.float32
    values = torch.randn(1, 4, 1, 2)
    points, weights = torch.rand(1, 1, 1, 1, 1, 2), torch.rand(1, 1, 1, 1, 1)
    with torch.autocast("cpu", precision):
        rounded = model.sample_points(values, [(2, 2)], points, weights)
    assert torch.equal(rounded, model.sample_points(values, [(2, 2)], points, weights))


# ---------------------------------------------------------------------------------- denoising

def test_denoising_queries(detector):
    """Groups of all unknown boxes: once moved by less than half their sides, once by more."""
    boxes = [[0.5, 0.5, 0.2, 0.1], [0.4, 0.6, 0.2, 0.2], [0.5, 0.5, 0.1, 0.1]]
    target = Target(torch.tensor(boxes), torch.tensor([UNKNOWN, 0, UNKNOWN]),
                    torch.tensor([0.36, 1, 1]), "")
    allowed, near = detector.is_seen, 0
    for seed in range(30):
        noise = detector.make_noise(target, torch.Generator().manual_seed(seed), allowed)
        assert noise.groups == 3 and len(noise.labels) == 3 * 2 * 2
        assert noise.is_object.tolist() == [1, 1, 0, 0] * 3
        assert noise.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert noise.weights.tolist() == pytest.approx([0.6, 1, 1, 1] * 3)
        assert set(noise.labels.tolist()) <= {0, 1, UNKNOWN}
        assert (noise.texts.view(3, 2, 2)[:, 0] == UNKNOWN).all()
        assert torch.equal(noise.texts.view(3, 2, 2)[:, 1], noise.labels.view(3, 2, 2)[:, 1])
        edges = box_convert(noise.boxes, "cxcywh", "xyxy").view(3, 2, 2, 4)
        boxes = target.boxes[[0, 2]]
        moved = ((edges - box_convert(boxes, "cxcywh", "xyxy")).abs()
                 / boxes[:, 2:].repeat(1, 2) * 2)
        assert (moved[:, 0] <= 1 + 1e-4).all() and (moved[:, 1] >= 1 - 1e-4).all()
        near += (noise.labels == UNKNOWN).float().mean()
    assert near / 30 == pytest.approx(0.75 + 0.25 / 3, abs=0.05)


def test_without_unknown_objects_a_true_one_is_denoised(detector):
    target = Target(torch.rand(2, 4), torch.tensor([0, 1]), torch.ones(2), "")
    noise = detector.make_noise(target, torch.Generator(), detector.is_seen)
    assert noise.groups == 6 and len(noise.labels) == 12
    many = Target(torch.rand(9, 4), torch.full((9,), UNKNOWN), torch.ones(9), "")
    assert detector.make_noise(many, torch.Generator(), detector.is_seen).groups == 1


def test_what_denoising_queries_see(detector):
    """By hand: two groups of one box, near and far, beside two queries; an image without any."""
    one = Target(torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([UNKNOWN]), torch.ones(1), "")
    detector.design = detector.design._replace(denoising=2)
    none = one._replace(boxes=one.boxes[:0], labels=one.labels[:0], weights=one.weights[:0])
    noise = model.Noise.stack([detector.make_noise(target, torch.Generator(), detector.is_seen)
                               for target in (one, none)])
    sees = ["110011", "110011", "001111", "001111", "000011", "000011"]
    assert noise.hidden(2)[0].int().tolist() == [[1 - int(flag) for flag in row] for row in sees]
    assert noise.weights[1].sum() == noise.groups[1] == 0
    assert not noise.hidden(2)[1].all(-1).any()         # a row that sees nothing gives no number
    assert not noise.loss(torch.randn(2, 4))[()].isnan()


def test_denoising_does_not_reach_the_queries(detector):
    images, targets = batch(2)
    seen = []

    def keep(self, layers, *_):
        seen.append(layers[-1].boxes)
        return {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OVDQUO, "losses", keep)
        detector.train()(images, targets)
        patch.setattr(OVDQUO, "make_noise", lambda self, target, generator, allowed: model.Noise(
            *(torch.zeros(0, dtype=torch.long),) * 2, torch.zeros(0, 4),
            *(torch.zeros(0),) * 2, torch.zeros(0, dtype=torch.long), torch.tensor(0)))
        detector(images, targets)
    torch.testing.assert_close(*seen)


# -------------------------------------------------------------------------------------- detection

def test_scores_by_hand(detector):
    """softmax over τ cos and a 0, times objectness; every query scores every class."""
    images, _ = batch(2)
    rules = ScoreRules(temperature=20, exponent=2)
    with torch.no_grad():
        found, scores = detector.score(images, rules)
        memory, levels, vlm_map = detector.remember(images)
    cosine = detector.look_at(vlm_map, found.boxes, levels)
    logits = torch.cat([20 * cosine, torch.zeros(2, 20, 1)], dim=-1)
    expected = logits.softmax(-1)[..., :3] * found.logits.sigmoid()[..., None]**2
    torch.testing.assert_close(scores, expected)


def test_detections_in_pixels(detector):
    image = (batch(1)[0][0] * 255).byte()
    image = image.repeat_interleave(2, 1).repeat_interleave(2, 2)       # 128 x 96
    rules = ScoreRules(least=1e-4, most=5)
    found, = detector.detect([image], rules)
    assert len(found.boxes) == len(found.labels) == 5 and found.masks is None
    assert (found.scores.diff() <= 0).all() and (found.scores > 1e-4).all()
    assert (found.boxes >= 0).all() and (found.boxes[:, 2:] <= torch.tensor([96, 128])).all()
    view, = detector.views([image])
    of_view, scores = detector.score([view], rules)
    best = scores[0].amax()
    query = (scores[0] == best).nonzero()[0, 0]
    box = box_convert(of_view.boxes[0, query], "cxcywh", "xyxy") * torch.tensor([96, 128, 96, 128])
    torch.testing.assert_close(found.boxes[0], box.clamp(min=0).minimum(
        torch.tensor([96, 128, 96, 128])), atol=1e-3, rtol=1e-4)
    assert found.scores[0] == pytest.approx(best.item(), rel=1e-5)


def test_an_image_alone_has_the_detections_of_its_batch(detector):
    images = [(image * 255).byte() for image in batch()[0]]
    rules = ScoreRules(least=0)
    for image, found in zip(images, detector.detect(images, rules)):
        alone, = detector.detect([image], rules)
        torch.testing.assert_close(alone.scores, found.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(alone.boxes, found.boxes, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", ["tiny-eva", "tiny-pool", "tiny-pe"])
@pytest.mark.parametrize("map_only", [False, True])
def test_which_block_makes_the_taps_and_the_map(name, map_only):
    """DeCLIP's last block, a pooling head too, for both, or for the map alone; the third tap is
    then a block without attention."""
    detector = OVDQUO(DeCLIP(name), NAMES, SEEN, SMALL._replace(map_only=map_only))
    assert all(loss.isfinite() for loss in detector.train()(*batch(2)).values())
    images, taken = batch(1)[0], {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(detector.neck, "forward", lambda taps: taken.update(taps=taps) or [
            torch.zeros(1, 16, side, side) for side in (16, 8, 4)])
        _, _, vlm_map = detector.remember(images)
    last, = detector.look(images, "maskclip" if map_only else "q")[-1:]
    torch.testing.assert_close(taken["taps"][-1], last)
    torch.testing.assert_close(vlm_map, detector.vlm_map(detector.look(images, "q")[-1]))


# ---------------------------------------------------------------------------------------- the file

def test_a_file_has_the_average(clip, tmp_path):
    """What is saved, and opened, is the moving average; without the backbone, and without what only
    training needs."""
    clip.save(tmp_path / "declip.safetensors")
    detector = OVDQUO(clip, NAMES, SEEN, SMALL)
    first = detector.objectness.weight.detach().clone()
    detector.start_average()
    with torch.no_grad():
        detector.objectness.weight += 1
    detector.update_average(0.75)
    path = tmp_path / "ov_dquo.safetensors"
    detector.save(path, {"BACKBONE": str(tmp_path / "declip.safetensors")})
    opened = open_ov_dquo(path)
    torch.testing.assert_close(opened.objectness.weight, first + 0.25)
    assert torch.equal(opened.position[0].weight, detector.position[0].weight)
    assert (opened.classes, opened.seen, opened.design) == (NAMES, SEEN, SMALL)
    assert read_record(path)["use"] == "python -m downstream.ov_dquo.eval or tools.detect"
    opened.set_classes(["kite", "disc"])
    assert opened.seen == [False, True] and opened.text.shape[0] == 3
    opened.save(path, {"BACKBONE": str(tmp_path / "declip.safetensors")})
    assert open_ov_dquo(path).classes == ["kite", "disc"]


@pytest.mark.parametrize("wrong, sentence", [
    ({"width": 20}, "WIDTH is 20; it must be a multiple of four times HEADS, 8"),
    ({"queries": 0}, "QUERIES is 0; it must be at least 1"),
    ({"image_size": 72}, "IMAGE_SIZE 72 is no multiple of twice"),
    ({"normalization": "none"}, "NORMALIZATION is 'none'")])
def test_settings_out_of_their_range(clip, wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        OVDQUO(clip, NAMES, SEEN, SMALL._replace(**wrong))
