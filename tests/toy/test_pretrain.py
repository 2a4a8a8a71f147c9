"""toy/pretrain.py: pretraining is seeded, and the shipped models do what docs/toy.md says."""

import json
import re
import subprocess
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import options, succeeds
from open_clip import SimpleTokenizer
from PIL import Image
from safetensors.torch import load_file
from tiny import ROOT

import eval_region
from data import normalize
from model import DeCLIP, load_vfm
from tools import export
from toy import pretrain, world
from toy.world import NAMES, describe, draw_scene

VFM = f"local-dir:{ROOT / 'toy/vfm'}"


def test_captions_name_what_stands_out():
    star, ring, dots, grid = (NAMES.index(name) for name in ("star", "ring", "dots", "grid"))
    # A thing counts twice.
    assert pretrain.caption([dots, star], [0.6, 0.4], only_first=True) == "star"
    assert pretrain.caption([dots, star], [0.7, 0.3], only_first=True) == "dots"
    both = pretrain.caption([dots, grid, star, ring], [0.2, 0.5, 0.1, 0.2], only_first=False)
    assert both == "ring and star on grid and dots"
    # What is hardly visible is left out.
    assert pretrain.caption([dots, grid, star, -1], [0.9, 0.07, 0.03, 0.0], False) == "dots"


def test_shares_are_those_of_the_crop():
    source = pretrain.draw_scenes(0, 4, 64)
    scenes, boxes = pretrain.sample_boxes(source, 50, torch.Generator().manual_seed(0))
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 64).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 7.9).all()
    shares = pretrain.region_shares(source, scenes, boxes, 64)
    crops = pretrain.cut(source, scenes, boxes, 32)
    for scene, box, share, crop in zip(scenes, boxes.round().int().tolist(), shares, crops):
        x0, y0, x1, y1 = box
        inside = source.regions[scene, y0:y1, x0:x1]
        direct = torch.bincount(inside.flatten().long(), minlength=len(share)) / inside.numel()
        assert (share - direct).abs().max() < 0.12       # a box's border is not on a pixel's
        assert abs(crop.mean() - source.images[scene, :, y0:y1, x0:x1].float().mean() / 255) < 0.05


def test_contrast_is_clips_loss_where_no_caption_is_shared():
    image, text = torch.randn(5, 8), torch.randn(5, 8)
    logits = 7 * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    expected = (F.cross_entropy(logits, torch.arange(5))
                + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(pretrain.contrast(image, text, torch.arange(5), torch.tensor(7.0)),
                               expected)


def test_images_with_one_caption_are_no_negatives_of_it():
    """Two images of a caption: text to image, each is as right as the other, and the caption counts
    once."""
    image = F.normalize(torch.randn(3, 8), dim=1)
    text, matched = torch.stack([image[0], image[2]]), torch.tensor([0, 0, 1])
    logits = 7 * image @ text.T
    to_image = -logits.T.log_softmax(dim=1)
    expected = (F.cross_entropy(logits, matched)
                + ((to_image[0, 0] + to_image[0, 1]) / 2 + to_image[1, 2]) / 2) / 2
    torch.testing.assert_close(pretrain.contrast(image, text, matched, torch.tensor(7.0)), expected)


def test_sigmoid_loss_is_the_papers_loop_over_pairs():
    """Zhai et al. 2023, equation 1 summed pair by pair: two images are right for the first
    caption."""
    image, text = torch.randn(3, 8), torch.randn(2, 8)
    matched, scale, bias = [0, 0, 1], torch.tensor(7.0), torch.tensor(-2.0)
    total = 0
    for x, own in zip(F.normalize(image, dim=1), matched):
        for caption, y in enumerate(F.normalize(text, dim=1)):
            z = 1 if caption == own else -1
            total += torch.log(1 / (1 + torch.exp(z * (-7 * x @ y + 2))))
    found = pretrain.judge_pairs(image, text, torch.tensor(matched), scale, bias)
    torch.testing.assert_close(found, -total / 3)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_every_word_is_one_token(kind):
    """Of the templates and captions, and every name of the world."""
    tokenizer = SimpleTokenizer(ROOT / "toy" / kind / "merges.txt.gz", context_length=32)
    config = json.loads((ROOT / "toy" / kind / "open_clip_config.json").read_text())
    assert tokenizer.vocab_size == config["model_cfg"]["text_cfg"]["vocab_size"]
    for template in open_clip.OPENAI_IMAGENET_TEMPLATES:
        for word in re.findall("[a-z]+", template(f"{' and '.join(NAMES)} on").lower()):
            assert len(tokenizer.encode(word)) == 1, word


@pytest.mark.parametrize("kind, file",
                         [pytest.param("clip", "open_clip_model.safetensors",
                                       marks=pytest.mark.slow),
                          ("vfm", "model.safetensors")])
def test_pretraining_is_seeded(tmp_path, kind, file):
    small = {"scenes": 20, "steps": 2, "batch_size": 4, "seed": 5}
    for name in ("first", "second"):
        pretrain.main([kind, *options(models=tmp_path / name, **small)])
    first, second = ((tmp_path / name / kind / file).read_bytes() for name in ("first", "second"))
    assert first == second
    pretrain.main([kind, *options(models=tmp_path / "third", **small | {"seed": 6})])
    assert (tmp_path / "third" / kind / file).read_bytes() != first
    line = json.loads((tmp_path / "first" / kind / "log.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2 and line["loss"] > 0


def test_a_siglip_is_pretrained_anywhere(monkeypatch, tmp_path):
    """By its own loss, all of it, and open_clip finds it there."""
    caption, asked = pretrain.caption, []
    monkeypatch.setattr(pretrain, "caption",
                        lambda *given: asked.append(given[2]) or caption(*given))
    pretrain.main(["siglip", *options(models=tmp_path, scenes=20, steps=1, batch_size=16, seed=3)])
    assert set(asked[:16]) == {True, False}     # short captions and long ones in a batch
    # At first every logit is near the bias, so that an image's one right pair costs about 4.
    assert 3 < json.loads((tmp_path / "siglip" / "log.jsonl").read_text())["loss"] < 6
    name = f"local-dir:{tmp_path / 'siglip'}"
    model = open_clip.create_model(name).eval()
    written = load_file(tmp_path / "siglip" / "open_clip_model.safetensors")
    assert all(torch.equal(value, written[name].float())
               for name, value in model.state_dict().items())
    assert abs(model.logit_bias + 4) < 0.01 and abs(model.logit_scale.exp() - 10) < 0.1
    torch.manual_seed(3)
    first = open_clip.create_model(name, load_weights=False).half().state_dict()
    same = [name for name, value in written.items() if torch.equal(value, first[name])]
    assert [name for name in same if first[name].ndim > 1] == []
    with torch.no_grad():
        image = model.encode_image(torch.ones(2, 3, 96, 80))
        text = model.encode_text(open_clip.get_tokenizer(name)(["a star", "a ring"]))
    assert image.shape == text.shape == (2, 128) and not torch.equal(*text)


def test_shipped_models_are_small():
    files = [file for file in (ROOT / "toy").rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 6_000_000


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_open_clip_names_a_drawn_star(monkeypatch, kind):
    """The lines of docs/toy.md."""
    monkeypatch.chdir(ROOT)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:toy/{kind}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:toy/{kind}")
    star = next(scene for scene in map(draw_scene, range(100))
                if NAMES[scene.classes[-1]] == "star")
    x, y, width, height = describe(star, len(star.classes) - 1)["bbox"]
    crop = Image.fromarray(star.image).crop((x, y, x + width, y + height))
    with torch.no_grad():
        image = clip.encode_image(preprocess(crop)[None])
        text = clip.encode_text(tokenizer([f"a photo of a {name}." for name in NAMES]))
    similarity = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    assert NAMES[similarity.argmax()] == "star"


def test_our_model_is_open_clips(monkeypatch):
    monkeypatch.chdir(ROOT)
    theirs = open_clip.create_model("local-dir:toy/clip").eval()
    ours = DeCLIP("local-dir:toy/clip", "own")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(images), theirs.encode_image(images),
                                   rtol=1e-4, atol=1e-5)
    assert (ours.mean, ours.image_size, ours.patch_size) == ((0.5, 0.5, 0.5), 64, 8)


def test_without_a_tag_the_folders_weights_stay_out(monkeypatch):
    monkeypatch.chdir(ROOT)
    own, random = DeCLIP("local-dir:toy/clip", "own"), DeCLIP("local-dir:toy/clip", None)
    assert not torch.equal(own.visual.trunk.blocks[0].attn.q_proj.weight,
                           random.visual.trunk.blocks[0].attn.q_proj.weight)


def test_vfm_knows_which_patches_belong_together():
    vfm, scene = load_vfm(VFM), draw_scene(7, 128)
    image = normalize(torch.from_numpy(scene.image).permute(2, 0, 1)[None].float() / 255,
                      **pretrain.STATISTICS)
    tokens = F.normalize(vfm(image), dim=-1)[0]
    shares = F.one_hot(torch.from_numpy(scene.regions).long()).permute(2, 0, 1).float()
    shares = F.normalize(F.avg_pool2d(shares, 8).flatten(1).T, dim=-1)
    assert ((tokens @ tokens.T > 0.5) == (shares @ shares.T > 0.5)).float().mean() > 0.9
    assert vfm.patch_size == 8


def test_the_teacher_knows_its_world(monkeypatch, tmp_path):
    """[CLS] of crops of fresh scenes: docs/toy.md's figures are of 200, these of 6."""
    monkeypatch.chdir(ROOT)
    world.main(options(out=tmp_path / "toy", train=0, dev=0, val=6, size=64))
    root = tmp_path / "toy" / "val"
    paths = {"annotations": root / "panoptic.json", "pngs": root / "panoptic",
             "images": root / "images"}
    result = eval_region.main(["@presets/toy_region.txt",
                               *options(**paths, out=tmp_path, num_workers=0, attention="clip")])
    means = result["128"]["mAcc"]
    assert means["crop thing"]["top1"] > 60 and means["crop stuff"]["top1"] > 60


PROGRAM = """
import os, sys
import open_clip, timm, torch
from safetensors.torch import load_file
clip, siglip = (open_clip.create_model(f"local-dir:toy/{kind}").eval()
                for kind in ("clip", "siglip"))
vfm = timm.create_model("local-dir:toy/vfm", pretrained=True).eval()
shipped = [load_file("toy/clip/open_clip_model.safetensors"),
           load_file("toy/siglip/open_clip_model.safetensors"),
           load_file("toy/vfm/model.safetensors")]
for model, weights in zip((clip, siglip, vfm), shipped):
    own = model.state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], value.float()) for name, value in weights.items())
with torch.no_grad():
    print(*(model.encode_image(torch.ones(1, 3, height, width)).shape
            for model in (clip, siglip) for height, width in ((64, 64), (96, 80))),
          vfm.forward_features(torch.ones(1, 3, 128, 96)).shape)
os.chdir(sys.argv[1])
open_clip.create_model("local-dir:folder")
print(open_clip.get_tokenizer("local-dir:folder")("a star")[0, :2].tolist())
assert not {"toy", "model", "data", "util"} & {name.partition(".")[0] for name in sys.modules}
"""


def test_models_load_without_this_repository_being_imported(tmp_path):
    """All shipped ones: their config.json tells timm all it needs, and they take images of other
    sizes. And an exported one, from any folder: its own has the tower's configuration and the
    tokenizer."""
    DeCLIP(f"local-dir:{ROOT / 'toy/clip'}").save(tmp_path / "declip.safetensors")
    export.main(options(ckpt=tmp_path / "declip.safetensors", layout="open_clip",
                        out=tmp_path / "folder"))
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    shapes = [[1, 128]] * 4 + [[1, 192, 96]]
    assert succeeds(done).splitlines() == [" ".join(f"torch.Size({shape})" for shape in shapes),
                                           "[743, 320]"]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_model_elsewhere_finds_its_own_files(tmp_path, kind):
    """Paths in open_clip's configuration are those of the new folder; in toy/ all stays."""
    pretrain.copy_configs(kind, tmp_path / "new")
    texts = [(folder / "open_clip_config.json").read_text()
             for folder in (tmp_path / "new", ROOT / "toy" / kind)]
    assert texts[0] == texts[1].replace(f"toy/{kind}", str(tmp_path / "new")) != texts[1]
    assert "toy/" not in texts[0]
    for name in ("config.json", "merges.txt.gz"):
        copied, shipped = ((folder / name).read_bytes()
                           for folder in (tmp_path / "new", ROOT / "toy" / kind))
        assert copied == shipped, name


@pytest.mark.parametrize("kind", ["clip", "siglip", "vfm"])
def test_models_are_told_the_statistics_that_they_learned_with(kind):
    config = json.loads((ROOT / "toy" / kind / "config.json").read_text())
    assert pretrain.STATISTICS.items() <= config["pretrained_cfg"].items()


@pytest.mark.parametrize("words, said", [(["dog"], "be one of clip, siglip, vfm"),
                                         (["clip", "vfm"], "be one of clip, siglip, vfm"),
                                         ([], "required: kind")])
def test_a_model_must_be_named(capsys, words, said):
    with pytest.raises(SystemExit) as error:
        pretrain.main(words)
    assert said in f"{error.value}{capsys.readouterr().err}"
