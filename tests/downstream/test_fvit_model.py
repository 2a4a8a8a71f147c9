"""downstream/fvit/model.py: each rule against a slow direct computation, the backbone's freedom
from gradients, the file that describes itself."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import draw_scene
from torch import nn
from torchvision.ops import box_iou, roi_align

from data import fitted_size, resize
from downstream import detector
from downstream.fvit import model
from downstream.fvit.model import BACKGROUND, IGNORE, Design, FViT, ScoreRules, Target, open_fvit
from model import DeCLIP
from util import UserError
from util.towers import Recorded
from util.weights import read_record

SMALL = Design(image_size=64, channels=16, anchors=32, regions=16, candidates=100, proposals=50,
               templates="{}")
NAMES, SEEN = ["disc", "box", "cat"], [True, True, False]


def random_boxes(count: int, side: float = 600) -> torch.Tensor:
    corners = torch.rand(count, 2, 2) * side
    return torch.cat([corners.amin(dim=1), corners.amax(dim=1) + 20], dim=-1)


@pytest.fixture(scope="module")
def clip() -> DeCLIP:
    torch.manual_seed(0)
    return DeCLIP("tiny-eva")


@pytest.fixture
def fvit(clip) -> FViT:
    return FViT(clip, NAMES, SEEN, SMALL)


def batch(count: int = 2) -> tuple[list, list]:
    """Drawn scenes, with a disc and a box each."""
    images, targets = [], []
    for seed, size in enumerate([(64, 48), (40, 64), (64, 64), (56, 64)][:count]):
        image, label = (torch.from_numpy(part) for part in draw_scene(seed, *size))
        masks = torch.stack([label == 1, label == 2])
        places = [mask.nonzero() for mask in masks]
        boxes = torch.stack([torch.cat([at.amin(0).flip(0), at.amax(0).flip(0) + 1])
                             for at in places]).float()
        images.append(image.permute(2, 0, 1).float() / 255)
        targets.append(Target(boxes, torch.tensor([0, 1]), masks, f"0-0-{seed}"))
    return images, targets


def without_objects(target: Target) -> Target:
    return target._replace(boxes=target.boxes[:0], labels=target.labels[:0], masks=target.masks[:0])


# ---------------------------------------------------------------------------------------- boxes

@pytest.mark.parametrize("stride", [16, 3.5])
def test_anchors_one_by_one(stride):
    anchors = model.make_anchors(stride, (3, 5), torch.device("cpu"))
    expected = []
    for y in range(3):
        for x in range(5):
            for ratio in (0.5, 1, 2):       # height : width, of one area
                w, h = 8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)
                cx, cy = x * stride, y * stride
                expected.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    torch.testing.assert_close(anchors, torch.tensor(expected))


def test_scores_and_deltas_are_in_the_order_of_the_anchors():
    """The head's channels a, 4a ... 4a + 3 at place (y, x) are those of anchor (y, x, a)."""
    head = model.ProposalHead(8, None)
    level = torch.randn(2, 8, 3, 5)
    (scores,), (deltas,) = head([level])
    plain_scores, plain_deltas = head.score(head.trunk(level)), head.deltas(head.trunk(level))
    for y, x, a in [(0, 0, 0), (2, 3, 1), (1, 4, 2)]:
        place = (y * 5 + x) * 3 + a
        assert torch.equal(scores[:, place], plain_scores[:, a, y, x])
        assert torch.equal(deltas[:, place], plain_deltas[:, 4 * a:4 * a + 4, y, x])


def test_deltas_of_a_box():
    anchor, box = torch.tensor([[10., 20, 30, 60]]), torch.tensor([[14., 20, 54, 40]])
    shift, growth = [(34 - 20) / 20, (30 - 40) / 40], [math.log(40 / 20), math.log(20 / 40)]
    torch.testing.assert_close(model.encode_boxes(box, anchor), torch.tensor([shift + growth]))
    scaled = [value / std for value, std in zip(shift + growth, (0.1, 0.1, 0.2, 0.2))]
    torch.testing.assert_close(model.encode_boxes(box, anchor, model.REGION_STDS),
                               torch.tensor([scaled]))


def test_decoding_is_the_reverse_of_encoding_within_the_image():
    boxes, anchors = random_boxes(50), random_boxes(50)
    for stds in ((1, 1, 1, 1), model.REGION_STDS):
        deltas = model.encode_boxes(boxes, anchors, stds)
        torch.testing.assert_close(model.decode_boxes(deltas, anchors, (700, 700), stds), boxes,
                                   rtol=0, atol=1e-2)
    wild = model.decode_boxes(torch.full((1, 4), 50.0), anchors[:1], (300, 400))
    assert (wild[0, 0::2] <= 400).all() and (wild[0, 1::2] <= 300).all()
    anchor = torch.tensor([[0., 0, 1000, 2000]])
    tiny = model.decode_boxes(torch.tensor([[0., 0, -50, -50]]), anchor, (3000, 3000))
    torch.testing.assert_close(tiny[:, 2:] - tiny[:, :2], torch.tensor([[16., 32]]))


def test_levels_by_area():
    sides = [1, 55, 56, 111, 112, 223, 224, 447, 448, 5000]
    boxes = torch.tensor([[7., 9, 7 + side, 9 + side] for side in sides])
    expected = [min(max(math.floor(math.log2(side / 56)), 0), 3) for side in sides]
    assert model.region_levels(boxes).tolist() == expected == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert model.region_levels(torch.tensor([[5., 5, 5, 5]])).tolist() == [0]


def test_regions_are_pooled_one_by_one_in_their_level():
    strides = [3.5, 7, 14, 28]
    levels = [torch.randn(2, 6, int(448 / stride), int(448 / stride)) for stride in strides]
    boxes = [random_boxes(12, 440), random_boxes(7, 440)]
    pooled, place = model.pool_regions(levels, strides, boxes, 7), 0
    for image, of_image in enumerate(boxes):
        for box in of_image:
            level = int(model.region_levels(box[None]))
            expected = roi_align(levels[level][image:image + 1], [box[None]], 7,
                                 1 / strides[level], aligned=True)
            torch.testing.assert_close(pooled[place], expected[0])
            place += 1


# --------------------------------------------------------------------------- what training samples

def assign_slowly(overlaps, positive, negative, best):
    """The rule, candidate by candidate and object by object."""
    matched = []
    for row in overlaps.tolist():
        highest = max(row)
        matched.append(row.index(highest) if highest >= positive
                       else BACKGROUND if highest < negative else IGNORE)
    for number, column in enumerate(overlaps.T.tolist()):
        if best is not None and max(column) >= best:
            matched = [number if value == max(column) else own
                       for value, own in zip(column, matched)]
    return matched


@pytest.mark.parametrize("positive, negative, best", [(0.7, 0.3, 0.3), (0.5, 0.5, None),
                                                      (0.5, 0.5, 0.5)])
def test_assignment(positive, negative, best):
    objects = random_boxes(6)
    candidates = torch.cat([random_boxes(200), objects + 40 * torch.rand(6, 4), objects[:2]])
    overlaps = box_iou(candidates, objects)
    matched = model.assign(overlaps, positive, negative, best).tolist()
    assert matched == assign_slowly(overlaps, positive, negative, best)
    assert {BACKGROUND, 0} <= set(matched) and (IGNORE in matched) == (positive > negative)


def test_the_best_anchors_of_an_object_are_its_own():
    """Two candidates tie; another object overlaps one of them more."""
    overlaps = torch.tensor([[0.6, 0.2], [0.6, 0.9], [0.1, 0.95], [0.2, 0.1]])
    assert model.assign(overlaps, 0.7, 0.3).tolist() == [IGNORE, 1, 1, BACKGROUND]
    assert model.assign(overlaps, 0.7, 0.3, 0.3).tolist() == [0, 0, 1, BACKGROUND]
    assert model.assign(overlaps, 0.7, 0.3, 0.61).tolist() == [IGNORE, 1, 1, BACKGROUND]


def test_without_objects_all_is_background():
    assert model.assign(torch.zeros(3, 0), 0.7, 0.3, 0.3).tolist() == [BACKGROUND] * 3


def test_sampling():
    """At most the share of positives, background fills up; the same for the same key alone."""
    matched = torch.tensor([2] * 40 + [BACKGROUND] * 100 + [IGNORE] * 30)[torch.randperm(170)]

    def draw(key, number, of=matched):
        return model.sample(of, number, 0.25, model.make_generator(key, torch.device("cpu")))

    positive, negative = draw("a", 80)
    assert (len(positive), len(negative)) == (20, 60)
    assert (matched[positive] == 2).all() and (matched[negative] == BACKGROUND).all()
    assert len(set(positive.tolist())) == 20 and len(set(negative.tolist())) == 60
    few = draw("a", 80, torch.where(torch.arange(170) < 3, 0, BACKGROUND))
    assert (len(few[0]), len(few[1])) == (3, 77)
    assert [len(part) for part in draw("a", 1000)] == [40, 100]     # no more there are
    assert all(map(torch.equal, draw("a", 80), draw("a", 80)))
    assert not torch.equal(draw("a", 80)[1], draw("b", 80)[1])


@pytest.mark.parametrize("with_objects", [2, 1, 0])
def test_proposal_losses_by_hand(fvit, with_objects):
    """Sampled anchors one by one: BCE of all, L1 of those of an object, over the number of all. An
    image without objects counts one more than its anchors (published)."""
    images, targets = batch()
    targets[with_objects:] = map(without_objects, targets[with_objects:])
    levels = fvit.pyramid(fvit.look(images))
    anchors = torch.cat(fvit.anchors(levels))
    scores, deltas = fvit.proposal_head(levels)
    generators = [model.make_generator(target.key, anchors.device) for target in targets]
    losses = fvit.proposal_losses(scores, deltas, anchors, list(zip(targets, generators)))
    bce, l1, count = 0.0, 0.0, 0
    for number, target in enumerate(targets):
        matched = model.assign(box_iou(anchors, target.boxes), 0.7, 0.3, 0.3)
        chosen = model.sample(matched, 32, 0.5, model.make_generator(target.key, anchors.device))
        for label, places in zip((1.0, 0.0), chosen):
            count += max(1, len(places))
            for place in places:
                score = torch.cat(scores, 1)[number, place]
                bce += F.binary_cross_entropy_with_logits(score, torch.tensor(label)).item()
                if label:
                    wanted = model.encode_boxes(target.boxes[matched[place]][None],
                                                anchors[place][None])
                    l1 += (torch.cat(deltas, 1)[number, place] - wanted).abs().sum().item()
    assert count == 32 * with_objects + 33 * (2 - with_objects) and (l1 > 0) == (with_objects > 0)
    assert losses["proposal class"].item() == pytest.approx(bce / count, rel=1e-4)
    assert losses["proposal box"].item() == pytest.approx(l1 / count, rel=1e-4)


@pytest.mark.parametrize("keep_best", [False, True])
def test_regions_are_proposals_and_true_boxes(fvit, keep_best):
    """Object 0's best proposal overlaps object 1 more: it is object 0's with `keep_best` alone."""
    objects = torch.tensor([[0., 0, 20, 10], [3., 0, 20, 10]])
    proposals = torch.tensor([[2., 0, 20, 10], [3.5, 0, 20, 10], [40., 40, 60, 60],
                              [0., 5, 9, 20]])
    target = Target(objects, torch.tensor([1, 0]), torch.zeros(2, 0, 0), "key")
    fvit.design = SMALL._replace(keep_best=keep_best)
    regions = fvit.sample_regions(proposals, target,
                                  model.make_generator("key", torch.device("cpu")))
    matched = dict(zip(map(tuple, regions.boxes.tolist()), regions.matched.tolist()))
    assert matched == {(0, 0, 20, 10): 0, (3, 0, 20, 10): 1, (2, 0, 20, 10): 1 - keep_best,
                       (3.5, 0, 20, 10): 1}
    assert regions.boxes.shape == (6, 4)
    assert regions.labels.tolist() == [*target.labels[regions.matched].tolist(), 3, 3]
    many = model.FViT.sample_regions(fvit, random_boxes(200), target,
                                     model.make_generator("key", torch.device("cpu")))
    assert len(many.boxes) == 16 and len(many.matched) <= 4


def test_text_is_of_vilds_sentences(clip):
    fvit = FViT(clip, ["Disc_one"], [True], SMALL._replace(templates="vild"))
    expected = clip.encode_text(["Disc_one", "background"], detector.vild_sentences())
    torch.testing.assert_close(fvit.text, expected)


def nms_slowly(boxes: torch.Tensor, scores: torch.Tensor, least: float) -> list[int]:
    """The best box, then the best that overlaps no chosen one more, and so on."""
    chosen = []
    for place in scores.argsort(descending=True).tolist():
        if all(box_iou(boxes[place][None], boxes[other][None]) <= least for other in chosen):
            chosen.append(place)
    return chosen


def test_proposals_level_by_level(fvit):
    """The best of each level, NMS within it, the best of all levels, inside the image."""
    grids = [(8, 8), (4, 4)]
    anchors = [model.make_anchors(stride, grid, torch.device("cpu"))
               for stride, grid in zip((8, 16), grids)]
    scores = [torch.randn(1, len(each)) for each in anchors]
    deltas = [0.3 * torch.randn(1, len(each), 4) for each in anchors]
    fvit.design = SMALL._replace(candidates=40, proposals=30)
    (proposals, logits), = fvit.propose(scores, deltas, anchors, [(60, 50)])
    found = []
    for of_level, score, delta in zip(anchors, scores, deltas):
        best = score[0].argsort(descending=True)[:40]
        boxes = model.decode_boxes(delta[0, best], of_level[best], (60, 50))
        areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1)
        best, boxes = best[areas > 0], boxes[areas > 0]
        kept = nms_slowly(boxes, score[0, best], 0.7)
        found += [(score[0, best[place]].item(), boxes[place].tolist()) for place in kept]
    expected = [box for _, box in sorted(found, reverse=True)]
    assert len(expected) > 30 and len(scores[1][0]) > 40
    torch.testing.assert_close(proposals, torch.tensor(expected[:30]))
    best = sorted(found, reverse=True)[:30]
    assert logits.tolist() == pytest.approx([score for score, _ in best])


def test_class_loss_by_hand(fvit):
    """Softmax of tau * cosine over seen classes and background; background weighs 0.6."""
    embeddings = F.normalize(torch.randn(5, 32), dim=-1)
    labels = torch.tensor([0, 1, 3, 3, 1])
    loss = fvit.class_loss(embeddings, labels, torch.tensor(5.0))
    total = 0.0
    for vector, label in zip(embeddings, labels.tolist()):
        logits = {k: 50 * float(vector @ fvit.text[k]) for k in (0, 1, 3)}
        log_sum = math.log(sum(math.exp(value) for value in logits.values()))
        total += (0.6 if label == 3 else 1) * (log_sum - logits[label])
    assert loss.item() == pytest.approx(total / 5, rel=1e-4)


def test_mask_targets_are_the_masks_in_the_regions():
    masks = torch.zeros(2, 60, 60, dtype=torch.bool)
    masks[1, 10:38, 10:24] = True
    boxes = torch.tensor([[10., 10, 38, 38], [0., 0, 56, 56]])
    cut = model.cut_masks(masks, torch.tensor([1, 0]), boxes)
    assert torch.equal(cut[0], (torch.arange(28) < 14).float().expand(28, 28))
    assert not cut[1].any()


def test_masks_are_pasted_where_their_boxes_are():
    mask = torch.zeros(28, 28)
    mask[:, :14] = 1
    pasted = model.paste_mask(mask, [10.0, 20.0, 38.0, 48.0], (60, 50))
    assert pasted.shape == (60, 50) and pasted[20:48, 10:24].all()
    assert pasted.sum() == 28 * 14
    assert model.paste_mask(torch.ones(28, 28), [0.0, 0.0, 50.0, 60.0], (60, 50)).all()


@pytest.mark.parametrize("height, width", [(427, 640), (640, 427), (334, 500)])
def test_boxes_at_the_edge_stay_in_their_image(height, width):
    """427 / 683 * 683 is more than 427 in float32, and a mask must not have a row more."""
    size = fitted_size(torch.empty(height, width, device="meta"), 1024)
    edge = torch.tensor([[0.0, 0.0, size[1], size[0]]])
    found = model.to_pixels((edge, torch.ones(1), torch.zeros(1, dtype=torch.long)), size,
                            (height, width))
    assert found.boxes.tolist() == [[0, 0, width, height]]
    mask = model.paste_mask(torch.ones(28, 28), found.boxes[0].tolist(), (height, width))
    assert mask.shape == (height, width) and mask.float().mean() > 0.99


# ---------------------------------------------------------------------------------------- detection

def test_scores_one_by_one(fvit):
    """p_det^(1-e) p_vlm^e with softmaxes over all classes and background, e by class."""
    embeddings, vlm = (F.normalize(torch.randn(4, 32), dim=-1) for _ in range(2))
    scores = fvit.fuse_scores(embeddings, vlm, ScoreRules(a=0.2, b=0.7, temperature=30))
    for n in range(4):
        det = [math.exp(50 * float(embeddings[n] @ text)) for text in fvit.text]
        seen_by_clip = [math.exp(30 * float(vlm[n] @ text)) for text in fvit.text]
        for k, share in enumerate((0.2, 0.2, 0.7)):
            p_det, p_vlm = det[k] / sum(det), seen_by_clip[k] / sum(seen_by_clip)
            assert scores[n, k].item() == pytest.approx(p_det ** (1 - share) * p_vlm ** share,
                                                        rel=1e-3)
    assert scores.shape == (4, 3)
    of_tau = fvit.fuse_scores(embeddings, vlm, ScoreRules(a=0, b=0, tau=10.0))
    torch.testing.assert_close(of_tau, (10 * embeddings @ fvit.text.T).softmax(-1)[:, :-1])


def test_the_vlm_sees_the_proposals_of_its_own_map(fvit, monkeypatch):
    """Published: RoIAlign of CLIP's dense features at the proposals; a reading: at the boxes."""
    given, (images, _) = [], batch()
    monkeypatch.setattr(FViT, "fuse_scores", lambda self, embeddings, vlm, rules:
                        given.append(vlm) or torch.zeros(len(vlm), 3))
    proposals = [random_boxes(3, 60).clamp(max=40), random_boxes(2, 60).clamp(max=40)]
    monkeypatch.setattr(FViT, "propose", lambda *_: [(boxes, None) for boxes in proposals])
    with torch.no_grad():
        fvit.box_head.deltas[-1].bias.fill_(3)
    pictures = [(image * 255).byte() for image in images]
    fvit.detect(pictures, ScoreRules())
    fvit.detect(pictures, ScoreRules(at_boxes=True))
    views = [resize(image, *fitted_size(image, 64), "cv2") for image in pictures]    # published
    with torch.no_grad():
        tokens = fvit.look(views)[-1]
        content = fvit.backbone.visual.project(tokens.flatten(2).mT).mT.unflatten(2, (8, 8))
    content = F.normalize(content, dim=1)
    expected = roi_align(content, proposals, 1, 1 / 8, aligned=True).flatten(1)
    torch.testing.assert_close(given[0], F.normalize(expected, dim=-1))
    assert not torch.allclose(given[0], given[1])


def test_nms_and_thresholds():
    """Within a class the lower of two boxes goes, between classes both stay."""
    boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [30, 30, 40, 40]])
    scores = torch.tensor([[0.9, 0.05], [0.8, 0.7], [0.005, 0.3]])
    found = model.choose(boxes, scores, ScoreRules(least=0.01, nms=0.4, most=10))
    assert found[2].tolist() == [0, 1, 1] and found[1].tolist() == pytest.approx([0.9, 0.7, 0.3])
    assert torch.equal(found[0], boxes[[0, 1, 2]])
    assert len(model.choose(boxes, scores, ScoreRules(most=2))[1]) == 2
    assert len(model.choose(boxes, scores, ScoreRules(nms=0.95, most=10))[1]) == 5


def test_detections_are_in_the_pixels_of_their_images(fvit, monkeypatch):
    """An image of 30 x 60 is seen as 32 x 64."""
    monkeypatch.setattr(FViT, "propose", lambda *_: [(torch.tensor([[8., 16, 24, 32]]), None)] * 2)
    with torch.no_grad():
        fvit.box_head.deltas[-1].weight.zero_()
    blank = torch.zeros(3, 30, 60, dtype=torch.uint8)
    for found in fvit.detect([blank, blank], ScoreRules(least=0)):
        torch.testing.assert_close(found.boxes, torch.tensor([[7.5, 15, 22.5, 30]]).expand(3, 4))
        assert found.masks is None


def test_without_detections(fvit):
    blank = torch.zeros(3, 30, 60, dtype=torch.uint8)
    found, = fvit.detect([blank], ScoreRules(least=1.0))
    assert found.boxes.shape == (0, 4) and found.scores.shape == found.labels.shape == (0,)


# ---------------------------------------------------------------------------------------- backbones

@pytest.mark.parametrize("depth, layers", [(12, [3, 5, 7, 11]), (24, [6, 10, 14, 23]),
                                           (5, [1, 2, 3, 4]), (3, [0, 1, 2, 2])])
def test_layers_of_the_backbone(depth, layers):
    assert model.tapped_layers(depth) == layers


def test_one_pass_of_the_backbone(fvit, monkeypatch):
    """The pyramid's inputs and the VLM's map come from one pass, which keeps no gradient."""
    passes, embed = [], type(fvit.backbone.visual).embed
    monkeypatch.setattr(type(fvit.backbone.visual), "embed",
                        lambda self, images: passes.append(images) or embed(self, images))
    images, _ = batch()
    fvit.detect([(image * 255).byte() for image in images])
    assert len(passes) == 1 and passes[0].shape == (2, 3, 64, 64)
    taps = fvit.look(images)
    content, _ = fvit.backbone.encode_dense(passes[-1])
    expected = F.normalize(content, dim=1)
    torch.testing.assert_close(fvit.vlm_map(taps[-1]), expected)
    assert not any(tap.requires_grad for tap in taps)


@pytest.mark.parametrize("name, mean, std", [
    ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ("clip", DeCLIP("tiny-eva").mean, DeCLIP("tiny-eva").std)])
def test_padding_is_zero_after_the_normalization(clip, monkeypatch, name, mean, std):
    seen, (images, _) = [], batch(1)
    monkeypatch.setattr(type(clip.visual), "encode_layers",
                        lambda self, batch, *_: seen.append(batch))
    FViT(clip, NAMES, SEEN, SMALL._replace(normalization=name)).look(images)
    assert seen[0].shape == (1, 3, 64, 64) and not seen[0][0, :, :, 48:].any()
    for channel in range(3):
        torch.testing.assert_close(seen[0][0, channel, :, :48],
                                   (images[0][channel] - mean[channel]) / std[channel])


def test_strides_of_l14_are_exact():
    """Patch 14 at 896 px: levels of 256, 128, 64, 32 and 16 places, 3.5, 7, 14, 28, 56 apart."""
    backbone = nn.Module()
    backbone.visual = nn.Module()       # of a narrow EVA02-L-14-336
    backbone.visual.patch_size, backbone.visual.num_layers = 14, 24
    backbone.visual.width, backbone.visual.embed_dim = 8, 8
    fvit = FViT(backbone, ["cat"], [True], Design(image_size=896, channels=8), torch.zeros(2, 8))
    levels = fvit.pyramid([torch.zeros(1, 8, 896 // 14, 896 // 14)] * 4)
    assert fvit.strides == [3.5, 7, 14, 28, 56] and fvit.layers == [6, 10, 14, 23]
    assert [level.shape[-1] for level in levels] == [256, 128, 64, 32, 16]
    for stride, level in zip(fvit.strides, levels):
        assert stride * level.shape[-1] == 896
        last = model.make_anchors(stride, level.shape[-2:], torch.device("cpu"))[-2]
        assert last.tolist() == [896 - 5 * stride, 896 - 5 * stride,
                                 896 + 3 * stride, 896 + 3 * stride]


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-pool", "tiny-pe", "local-dir:toy/clip"])
def test_other_backbones(name):
    clip = DeCLIP(name, "own" if ":" in name else None)
    fvit = FViT(clip, NAMES, SEEN, SMALL._replace(attention="clip", masks=True))
    images, targets = batch()
    losses = fvit.train()(images, targets)
    assert set(losses) == {"proposal class", "proposal box", "class", "box", "mask"}
    assert all(loss.isfinite() for loss in losses.values())
    pictures = [(image * 255).byte() for image in images]
    found = fvit.eval().detect(pictures, ScoreRules(least=0, most=3))
    assert [detections.masks[0].shape for detections in found] == [(64, 48), (40, 64)]


# ---------------------------------------------------------------------------------------- learning

def gradients(fvit: FViT, images: list, targets: list) -> dict[str, torch.Tensor]:
    fvit.zero_grad()
    sum(fvit(images, targets).values()).backward()
    return {name: parameter.grad.clone() for name, parameter in fvit.named_parameters()
            if parameter.grad is not None}


def test_gradients_never_reach_the_backbone(clip):
    # So many anchors that some of every level are sampled
    fvit = FViT(clip, NAMES, SEEN, SMALL._replace(masks=True, anchors=9000)).train()
    assert not any(module.training for module in fvit.backbone.modules())
    before = {name: value.clone() for name, value in clip.state().items()}
    trained = gradients(fvit, *batch())
    expected = {name for name, _ in fvit.named_parameters() if not name.startswith("backbone.")}
    assert set(trained) == expected
    assert all(gradient.abs().max() > 0 for gradient in trained.values())
    with torch.no_grad():
        for parameter in fvit.parameters():
            if parameter.requires_grad:
                parameter -= parameter.grad
    assert all(torch.equal(before[name], value) for name, value in clip.state().items())


def test_a_class_unseen_in_training_has_no_influence(clip):
    """Neither its name nor its objects change a loss or a gradient."""
    images, targets = batch()
    boxes = torch.tensor([[3., 3, 20, 20]])
    with_cat = [target._replace(boxes=torch.cat([target.boxes, boxes]),
                                labels=torch.tensor([0, 1, 2])) for target in targets]
    found = []
    for names, given in ((NAMES, targets), (["disc", "box", "zebra"], with_cat),
                         (["disc", "box", "cat"], with_cat)):
        torch.manual_seed(0)
        found.append(gradients(FViT(clip, names, SEEN, SMALL).train(), images, given))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])
    torch.manual_seed(0)
    seen = gradients(FViT(clip, NAMES, [True] * 3, SMALL).train(), images, targets)
    assert not torch.equal(seen["box_head.embedding.0.weight"],
                           found[0]["box_head.embedding.0.weight"])


def test_images_without_objects(clip):
    """All regions are background. The heads of boxes and masks get gradients, as DDP wants, of
    zero, and the statistics of their norms stay finite."""
    fvit = FViT(clip, NAMES, SEEN, SMALL._replace(masks=True)).train()
    images, targets = batch()
    none = [without_objects(target) for target in targets]
    losses = fvit(images, none)
    assert losses["box"] == losses["mask"] == losses["proposal box"] == 0 < losses["class"]
    found = gradients(fvit, images, none)
    assert {"mask_head.layers.0.0.weight", "box_head.deltas.0.weight",
            "proposal_head.deltas.weight"} <= set(found)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert all(value.isfinite().all() for value in fvit.state().values())


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_losses_and_scores_are_float32_under_autocast(fvit, precision):
    images, targets = batch()
    plain = fvit(images, targets)
    with torch.autocast("cpu", precision):
        losses = fvit(images, targets)
        found = fvit.detect([(image * 255).byte() for image in images])
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(plain[name].item(), rel=0.1)
    assert found[0].scores.dtype == found[0].boxes.dtype == torch.float32


# ---------------------------------------------------------------------------------------- names

def test_sentences_are_vilds():
    sentences = [sentence("fire_hydrant") for sentence in detector.vild_sentences()]
    assert len(sentences) == len(set(sentences)) == 63
    assert {"There is a fire hydrant in the scene.", "itap of my fire hydrant.",
            "This is a photo of one fire hydrant in the scene.", "This is the toy fire hydrant.",
            "This is a black and white photo of the fire hydrant.",
            "This is an embroidered fire hydrant.", "This is a painting of a fire hydrant.",
            "This is a photo of the hard to see fire hydrant."} <= set(sentences)
    assert detector.vild_sentences()[0]("Apple/Pear_Mix.") == (
        "There is an apple or pear mix in the scene.")


def test_text_has_the_classes_and_the_background(clip):
    fvit = FViT(clip, ["Red_Disc", "box"], [True, False], SMALL._replace(templates="a {}"))
    expected = clip.encode_text(["red disc", "box", "background"], ["a {}"])
    torch.testing.assert_close(fvit.text, expected)
    assert fvit.is_seen.tolist() == [True, False, True]


def test_names_are_swapped_without_training(fvit):
    fvit.set_classes(["kite", "Disc", "cat", "zebra"])
    assert (fvit.classes, fvit.seen) == (["kite", "Disc", "cat", "zebra"],
                                         [False, True, False, False])
    expected = fvit.backbone.encode_text(["kite", "disc", "cat", "zebra", "background"])
    torch.testing.assert_close(fvit.text, expected)
    found, = fvit.detect([torch.zeros(3, 30, 60, dtype=torch.uint8)], ScoreRules(least=0))
    assert set(found.labels.tolist()) <= {0, 1, 2, 3}
    fvit.set_classes(["kite", "disc"], [True, False])
    assert fvit.seen == [True, False]


# ---------------------------------------------------------------------------------------- the file

@pytest.fixture
def saved(clip, tmp_path):
    """A detector on a DeCLIP file, and where both are."""
    clip.save(tmp_path / "declip.safetensors")
    fvit = FViT(clip, NAMES, SEEN, SMALL)
    fvit.save(tmp_path / "fvit.safetensors", {"BACKBONE": str(tmp_path / "declip.safetensors")})
    return fvit, tmp_path / "fvit.safetensors", tmp_path / "declip.safetensors"


def test_a_file_describes_itself(saved):
    fvit, path, declip = saved
    images = [(image * 255).byte() for image in batch()[0]]
    opened = open_fvit(path)
    assert (opened.classes, opened.seen, opened.design) == (NAMES, SEEN, SMALL)
    assert not opened.training
    for one, other in zip(fvit.detect(images), opened.detect(images)):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.scores, other.scores)
    opened.set_classes(["disc", "cat"])
    assert opened.seen == [True, False]
    about = read_record(path)
    assert about["fvit"]["tau"] == 50 and about["fvit"]["classes"] == NAMES
    assert path.stat().st_size < declip.stat().st_size       # without the backbone


def test_a_file_says_how_images_are_resized(saved, monkeypatch):
    """One that does not say so is of the time when they were resized as train.py does."""
    fvit, path, _ = saved
    state, record = detector.read_weights(path)
    del record["fvit"]["design"]["resize"]
    detector.write_checkpoint(path.with_name("old.safetensors"), state, record)
    old, seen, look = open_fvit(path.with_name("old.safetensors")), [], FViT.look
    assert old.design == SMALL._replace(resize="bicubic")
    monkeypatch.setattr(FViT, "look",
                        lambda self, views: seen.append(views[0]) or look(self, views))
    image = torch.randint(0, 256, (3, 100, 150)).byte()
    for opened, how in ((fvit.eval(), "cv2"), (old, "bicubic")):
        opened.detect([image])
        torch.testing.assert_close(seen.pop(), resize(image, 43, 64, how))


def test_a_wrong_backbone_is_refused(saved):
    _, path, declip = saved
    torch.manual_seed(1)
    with pytest.raises(UserError, match="was trained on another backbone than this tiny-eva"):
        open_fvit(path, DeCLIP("tiny-eva"))
    other = DeCLIP(pretrained=str(declip))
    other.visual.context = "k"
    with pytest.raises(UserError, match="with context k: their checksums differ"):
        open_fvit(path, other)
    declip.unlink()
    with pytest.raises(UserError, match="which is not there; say where that backbone is"):
        open_fvit(path)


def test_files_that_are_no_detector(saved, tmp_path, clip):
    fvit, path, declip = saved
    for name, sentence in ((declip, "is no detector; give a fvit.safetensors"),
                           (tmp_path / "none", "There is no weights file")):
        with pytest.raises(UserError, match=sentence):
            open_fvit(name)
    state, record = detector.read_weights(path)
    of_detector = {name: value for name, value in state.items() if "mask" not in name}
    for broken, sentence in (({"classes": NAMES}, "has metadata that .* does not write"),
                             ({**record["fvit"], "design": {"depth": 3}}, "does not write"),
                             ({**record["fvit"], "design": SMALL._replace(
                                 masks=True)._asdict()}, r"does not fit .*: \d+ weights are")):
        detector.write_checkpoint(path, of_detector, record | {"fvit": broken})
        with pytest.raises(UserError, match=sentence):
            open_fvit(path, clip)


def test_files_do_not_decide_about_downloads(clip, tmp_path):
    path = tmp_path / "fvit.safetensors"
    for given in ({"MODEL": "hf-hub:some/body"}, {"PRETRAINED": "someones"}):
        FViT(clip, NAMES, SEEN, SMALL).save(path, given)
        with pytest.raises(UserError, match="asks a hub or runs code|does not list"):
            open_fvit(path)
    assert json.dumps(read_record(path))


def test_a_backbone_that_only_the_file_names_is_recorded(monkeypatch):
    """So that its tokenizer is not downloaded."""
    monkeypatch.setattr(detector, "open_backbone", lambda settings: settings["MODEL"])
    named = detector.recorded_backbone("fvit.safetensors", {"MODEL": "ViT-B-16-SigLIP"})
    assert isinstance(named, Recorded) and named == "ViT-B-16-SigLIP"


@pytest.mark.parametrize("given, sentence", [
    ({"norm": "layer"}, "NORM is 'layer'; it must be one of batch, group"),
    ({"resize": "area"}, "RESIZE is 'area'; it must be one of bicubic, pil, cv2"),
    ({"normalization": "none"}, "NORMALIZATION is 'none'"),
    ({"image_size": 56}, "IMAGE_SIZE 56 is no multiple of twice the backbone's patch size, 16"),
    ({"templates": "a photo"}, "TEMPLATES is 'a photo'"),
])
def test_refusals_say_what_to_do(clip, given, sentence):
    with pytest.raises(UserError, match=sentence):
        FViT(clip, NAMES, SEEN, SMALL._replace(**given))


FANS = {"xavier": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
        "kaiming": lambda fan_in, fan_out: math.sqrt(2 / fan_out),
        "default": lambda fan_in, fan_out: math.sqrt(1 / (3 * fan_in))}     # PyTorch's own
# What each weight with more than one axis is drawn from: the first name that it begins with.
PUBLISHED = {"pyramid.scales": ("default", "uniform"), "pyramid": ("xavier", "uniform"),
             "proposal_head": (0.01, "normal"), "mask_head": ("kaiming", "normal"),
             **{f"box_head.shared.{place}.": ("kaiming", "normal") for place in range(4)},
             "box_head.deltas.2": (0.001, "normal"), "box_head": ("xavier", "uniform")}


def test_parts_are_initialised_as_published(clip):
    """Every weight: its standard deviation, normal or uniform; biases 0, norms 1 and 0, tau 50."""
    torch.manual_seed(0)
    fvit = FViT(clip, NAMES, SEEN, SMALL._replace(channels=48, masks=True, rpn_norm=True))
    for name, weight in fvit.named_parameters():
        if name.startswith("backbone."):
            continue
        if weight.ndim < 2:
            is_norm = isinstance(fvit.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d)
            value = 50 if name == "tau" else float(is_norm and name.endswith("weight"))
            assert (weight == value).all() or name.startswith("pyramid.scales"), name
            continue
        kind, shape = next(rule for prefix, rule in PUBLISHED.items() if name.startswith(prefix))
        fans = [weight[:, 0].numel(), weight[0].numel()]        # of inputs: the second axis
        std = FANS[kind](fans[1], fans[0]) if kind in FANS else kind
        measured = weight.square().mean().sqrt().item()
        assert measured == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel())), name
        assert (weight.abs().max() <= 1.7321 * std) == (shape == "uniform"), name
    assert fvit.tau.requires_grad
    assert isinstance(fvit.proposal_head.trunk[0][1], nn.BatchNorm2d)
    of_ovcoco = FViT(clip, NAMES, SEEN, SMALL, fvit.text)
    assert isinstance(of_ovcoco.proposal_head.trunk[0][1], nn.ReLU)
