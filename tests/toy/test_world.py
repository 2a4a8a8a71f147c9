"""toy.py: scenes and their labels agree, pretraining is seeded, and the models that are shipped do what README.md says."""

import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import options
from open_clip import SimpleTokenizer
from PIL import Image
from tiny import ROOT

import eval_region
import toy
from data import BENCHMARKS, PanopticRegions, SegmentationImages, normalize, read_classes
from model import DeCLIP, load_vfm

# ------------------------------------------------------------------------------------------------------------ scenes

def test_a_scene_is_its_number():
    first, again, other = toy.draw_scene(3, 64), toy.draw_scene(3, 64), toy.draw_scene(4, 64)
    assert np.array_equal(first.image, again.image) and first.classes == again.classes
    assert not np.array_equal(first.image, other.image)


def test_every_segment_is_seen():
    for number in range(40):
        scene = toy.draw_scene(number, 96)
        assert scene.image.shape == (96, 96, 3) and scene.segments.shape == (96, 96)
        seen = np.bincount(scene.segments.ravel())
        assert len(seen) == len(scene.classes) and seen.min() > 0.006 * 96**2
        stuff = [kind for kind in scene.classes if kind >= len(toy.THINGS)]
        assert 1 <= len(stuff) <= 3 and len(set(stuff)) == len(stuff)
        assert scene.classes[:len(stuff)] == stuff and 1 <= len(scene.classes) - len(stuff) <= 5


def test_a_thing_has_the_hue_of_its_class():
    """Pixels inside a thing of class k are near hue 36° k, so a wrong label would be seen."""
    distances = []
    for number in range(30):
        scene = toy.draw_scene(number, 96)
        for segment, kind in enumerate(scene.classes):
            if kind < len(toy.THINGS):
                pixels = scene.image[scene.segments == segment]
                hue = np.asarray(Image.fromarray(pixels[None]).convert("HSV"))[0, :, 0] / 256
                away = (np.median(hue) - kind / len(toy.THINGS) + 0.5) % 1 - 0.5
                distances.append(abs(away) * 360)
    assert np.mean(distances) < 30


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A small data set of scenes as `python toy.py` draws it."""
    folder = tmp_path_factory.mktemp("data")
    toy.main(options(out=folder / "toy", train=3, dev=2, val=6, size=64))
    return folder


def test_both_layouts_say_the_same(drawn):
    """The panoptic segments that eval_region.py reads and the labels that eval_seg.py reads, against the scene itself."""
    root = drawn / "toy" / "val"
    regions = PanopticRegions(root / "panoptic.json", root / "panoptic", root / "images")
    pixels = SegmentationImages(BENCHMARKS["toy"], drawn)
    assert len(regions) == len(pixels) == 6 and regions.names == read_classes("classes/toy.txt").names == list(toy.NAMES)
    assert regions.is_thing == [True] * len(toy.THINGS) + [False] * len(toy.STUFF)
    for index, (region, (image, label)) in enumerate(zip(regions, pixels)):
        scene = toy.draw_scene(toy.FIRST_SCENE["val"] + index, 64)
        assert torch.equal(image, torch.from_numpy(scene.image).permute(2, 0, 1)) and torch.equal(image, region.image)
        assert torch.equal(label, torch.tensor(scene.classes)[torch.from_numpy(scene.segments).long()].byte())
        assert torch.equal(label, region.labels[region.segments.long()].byte())
        for segment, (x0, y0, x1, y1) in enumerate(region.boxes.int().tolist()):
            inside = region.segments[y0:y1, x0:x1] == segment
            assert inside.sum() == (region.segments == segment).sum()
            assert all(line.any() for line in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_sets_have_scenes_of_their_own(drawn):
    assert len(SegmentationImages(BENCHMARKS["toy_dev"], drawn)) == 2
    files = [*(drawn / "toy" / "train").glob("*.png"), *(drawn / "toy").glob("*/images/*.png")]
    assert len(files) == 3 + 2 + 6 and len({file.read_bytes() for file in files}) == len(files)
    starts = sorted(toy.FIRST_SCENE.values())
    assert all(later - start >= toy.MOST_SCENES for start, later in zip(starts, starts[1:]))


def test_drawing_again_leaves_no_old_scenes(drawn, tmp_path):
    toy.main(options(out=tmp_path, train=3, dev=2, val=1, size=64))
    toy.main(options(out=tmp_path, train=2, dev=0, val=1, size=32))
    sizes = [Image.open(path).size for path in sorted((tmp_path / "train").glob("*.png"))]
    assert sizes == [(32, 32)] * 2 and len(list((tmp_path / "dev" / "images").iterdir())) == 2      # 0 leaves what is there


@pytest.mark.parametrize("given, words", [({"pretrain": "dog"}, "clip, vfm"), ({"val": toy.MOST_SCENES + 1}, "ask for fewer"),
                                          ({"size": 3}, "SIZE is 3")])
def test_bad_settings_are_one_sentence(tmp_path, given, words):
    with pytest.raises(SystemExit, match=words):
        toy.main(options(**{"out": tmp_path} | given))


# ------------------------------------------------------------------------------------------------------- pretraining

def test_captions_name_what_stands_out():
    star, ring, dots, grid = (toy.NAMES.index(name) for name in ("star", "ring", "dots", "grid"))
    assert toy.caption([dots, star], [0.6, 0.4], only_first=True) == "star"        # a thing counts twice
    assert toy.caption([dots, star], [0.7, 0.3], only_first=True) == "dots"
    assert toy.caption([dots, grid, star, ring], [0.2, 0.5, 0.1, 0.2], False) == "ring and star on grid and dots"
    assert toy.caption([dots, grid, star, -1], [0.9, 0.07, 0.03, 0.0], False) == "dots"     # the rest is hardly visible


def test_shares_are_those_of_the_crop():
    world = toy.draw_world(0, 4, 64)
    scenes, boxes = toy.draw_boxes(world, 50, torch.Generator().manual_seed(0))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 64).all() and (boxes[:, 2:] - boxes[:, :2] >= 7.9).all()
    shares, crops = toy.segment_shares(world, scenes, boxes, 64), toy.cut(world, scenes, boxes, 32)
    for scene, box, share, crop in zip(scenes, boxes.round().int().tolist(), shares, crops):
        x0, y0, x1, y1 = box
        inside = world.segments[scene, y0:y1, x0:x1]
        direct = torch.bincount(inside.flatten().long(), minlength=len(share)) / inside.numel()
        assert (share - direct).abs().max() < 0.12       # a box's border is not on a pixel's
        assert abs(crop.mean() - world.images[scene, :, y0:y1, x0:x1].float().mean() / 255) < 0.05


def test_contrast_is_clips_loss_where_no_caption_is_shared():
    image, text = torch.randn(5, 8), torch.randn(5, 8)
    logits = 7 * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(toy.contrast(image, text, torch.arange(5), torch.tensor(7.0)), expected)


def test_images_with_one_caption_are_no_negatives_of_it():
    """Two images of a caption: text to image, each is as right as the other, and the caption counts once."""
    image = F.normalize(torch.randn(3, 8), dim=1)
    text, owner = torch.stack([image[0], image[2]]), torch.tensor([0, 0, 1])
    logits = 7 * image @ text.T
    to_image = -logits.T.log_softmax(dim=1)
    expected = (F.cross_entropy(logits, owner) + ((to_image[0, 0] + to_image[0, 1]) / 2 + to_image[1, 2]) / 2) / 2
    torch.testing.assert_close(toy.contrast(image, text, owner, torch.tensor(7.0)), expected)


def test_every_word_is_one_token(tmp_path):
    toy.write_clip_config(tmp_path)
    tokenizer = SimpleTokenizer(tmp_path / "merges.txt.gz", context_length=32)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    assert tokenizer.vocab_size == config["model_cfg"]["text_cfg"]["vocab_size"]
    for template in open_clip.OPENAI_IMAGENET_TEMPLATES:
        for word in re.findall("[a-z]+", template("star and a heart on stripes").lower()):
            assert len(tokenizer.encode(word)) == 1, word


@pytest.mark.parametrize("kind, file", [("clip", "open_clip_model.safetensors"), ("vfm", "model.safetensors")])
def test_pretraining_is_seeded(tmp_path, kind, file):
    small = {"pretrain": kind, "scenes": 20, "steps": 3, "batch_size": 4, "seed": 5}
    for name in ("first", "second"):
        toy.main(options(models=tmp_path / name, **small))
    first, second = ((tmp_path / name / kind / file).read_bytes() for name in ("first", "second"))
    assert first == second
    toy.main(options(models=tmp_path / "third", **small | {"seed": 6}))
    assert (tmp_path / "third" / kind / file).read_bytes() != first
    line = json.loads((tmp_path / "first" / kind / "log.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 3 and line["loss"] > 0


# ------------------------------------------------------------------------------------------------ what is shipped

def test_shipped_models_are_small():
    files = [file for file in (ROOT / "toy").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 6_000_000


def test_open_clip_names_a_drawn_star(monkeypatch):
    """The lines of README.md."""
    monkeypatch.chdir(ROOT)
    clip, _, preprocess = open_clip.create_model_and_transforms("local-dir:toy/clip")
    tokenizer = open_clip.get_tokenizer("local-dir:toy/clip")
    star = next(scene for scene in map(toy.draw_scene, range(100)) if toy.NAMES[scene.classes[-1]] == "star")
    x, y, width, height = toy.describe(star, len(star.classes) - 1)["bbox"]
    crop = Image.fromarray(star.image).crop((x, y, x + width, y + height))
    with torch.no_grad():
        image = clip.encode_image(preprocess(crop)[None])
        text = clip.encode_text(tokenizer([f"a photo of a {name}." for name in toy.NAMES]))
    similarity = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    assert toy.NAMES[similarity.argmax()] == "star"


def test_our_model_is_open_clips(monkeypatch):
    monkeypatch.chdir(ROOT)
    theirs, ours = open_clip.create_model("local-dir:toy/clip").eval(), DeCLIP("local-dir:toy/clip", "own")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images), rtol=1e-4, atol=1e-5)
    assert (ours.mean, ours.image_size, ours.patch_size) == (toy.STATISTICS["mean"], 64, 8)


def test_without_a_tag_the_folders_weights_stay_out(monkeypatch):
    monkeypatch.chdir(ROOT)
    own, random = DeCLIP("local-dir:toy/clip", "own"), DeCLIP("local-dir:toy/clip", None)
    assert not torch.equal(own.visual.blocks[0].attn.q_proj.weight, random.visual.blocks[0].attn.q_proj.weight)


def test_vfm_knows_which_patches_belong_together():
    vfm, scene = load_vfm("nano_vfm"), toy.draw_scene(7, 128)
    image = normalize(torch.from_numpy(scene.image).permute(2, 0, 1)[None].float() / 255, **toy.STATISTICS)
    tokens = F.normalize(vfm(image), dim=-1)[0]
    shares = F.one_hot(torch.from_numpy(scene.segments).long()).permute(2, 0, 1).float()
    shares = F.normalize(F.avg_pool2d(shares, 8).flatten(1).T, dim=-1)
    assert ((tokens @ tokens.T > 0.5) == (shares @ shares.T > 0.5)).float().mean() > 0.9
    assert timm.is_model("nano_vfm") and vfm.patch_size == 8


def test_the_teacher_knows_its_world(drawn, monkeypatch, tmp_path):
    """[CLS] of crops of fresh scenes: README.md's figures are of 200, these of 6."""
    monkeypatch.chdir(ROOT)
    root = drawn / "toy" / "val"
    paths = {"annotations": root / "panoptic.json", "pngs": root / "panoptic", "images": root / "images"}
    result = eval_region.main(["@presets/toy_region.txt", *options(**paths, out=tmp_path, workers=0, attention="clip")])
    means = result["128"]["mAcc"]
    assert means["crop thing"]["top1"] > 60 and means["crop stuff"]["top1"] > 60
