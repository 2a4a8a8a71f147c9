"""eval_region.py: mAcc against a slow direct computation, its bounds, and which model it opens."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import warm
from conftest import options, succeeds
from PIL import Image

import data
import eval_region
from eval_region import open_model, title
from model import DeCLIP, VisionTower, region_features
from util import settings
from util.results import read_results

TINY = {"model": "tiny-eva", "pretrained": "none", "templates": "a {}.", "classes": "none",
        "sizes": 64, "num_workers": 0, "min_area": 1}


def test_mean_accuracy_is_over_classes_that_occur():
    # classes 7 and 8 never occur
    scores, labels = torch.randn(200, 9), torch.randint(0, 7, (200,))
    labels[labels == 3] = 4                                                 # nor does 3
    result = eval_region.mean_accuracy(eval_region.count_hits(scores, labels))
    for top in (1, 5):
        accuracies = []
        for label in sorted(set(labels.tolist())):
            right = [label in np.argsort(-row)[:top] for row in scores[labels == label].numpy()]
            accuracies.append(sum(right) / len(right))
        assert result[f"top{top}"] == pytest.approx(100 * sum(accuracies) / len(accuracies))
    assert (result["regions"], result["classes"]) == (200, 6)


def test_no_region_of_a_kind_is_no_number():
    means = {"box thing": eval_region.mean_accuracy(torch.zeros(4, 3, dtype=torch.long))}
    assert means["box thing"]["top1"] is None
    assert eval_region.table(means).split()[-4:] == ["-", "-", "0", "0"]


def direct_features(clip: DeCLIP, image: torch.Tensor, label: np.ndarray,
                    value: int) -> dict[str, torch.Tensor]:
    """The features of the pixels labelled `value`, from the class map that the scene was drawn
    with, one patch at a time."""
    h, w = data.fitted_size(image, 64)
    big = torch.zeros(64, 64)
    big[:h, :w] = F.interpolate(torch.from_numpy(label == value)[None, None].float(), (h, w),
                                mode="bilinear",
                                antialias=True)[0, 0]
    ys, xs = np.nonzero(label == value)
    box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    crop = data.resize(image[:, box[1]:box[3], box[0]:box[2]], 32, 32)
    with torch.inference_mode():
        content = clip.encode_dense(data.student_image(image, 64, clip.mean, clip.std)[None])[0]
        cls = clip.encode_image(data.normalize(crop, clip.mean, clip.std)[None])[0]
    total = sum(content[0, :, i, j] * big[8 * i:8 * i + 8, 8 * j:8 * j + 8].sum() for i in range(8)
                for j in range(8))
    scale = torch.tensor([w / label.shape[1], h / label.shape[0]] * 2) / 64
    return {"mask": total / big.sum(), "crop": cls,
            "box": region_features(content, [torch.tensor([box]) * scale])[0]}


def test_table_agrees_with_a_direct_computation(panoptic, scenes, tmp_path):
    """From a checkpoint with no argument about the model, one region at a time; every vote counts,
    so all must agree."""
    clip = DeCLIP("tiny-eva", context="k", scale=2.0)
    # stronger than the usual start, so that regions differ
    for parameter in clip.visual.trunk.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.5)
    clip.save(tmp_path / "declip.safetensors")
    given = {key: value for key, value in TINY.items() if key not in ("model", "pretrained")}
    given |= {"ckpt": tmp_path / "declip.safetensors", "batch_size": 2, "crop_batch": 4}
    result = eval_region.main(options(**given | panoptic))["64"]
    text = clip.encode_text(["disc", "box", "sea", "ground other"], ["a {}."])
    hits, dataset = {}, eval_region.PanopticRegions(**panoptic)
    for index, (_, label) in enumerate(scenes):
        sample = dataset[index]
        encoded = eval_region.encode_regions(config(), clip, clip, [sample], 64,
                                             torch.device("cpu"))
        for value, klass in ((0, 3), (1, 0), (2, 1)):       # ground, disc, box
            place = sample.labels.tolist().index(klass)
            for way, feature in direct_features(clip, sample.image, label, value).items():
                torch.testing.assert_close(encoded[way][place], feature, rtol=1e-4, atol=1e-4)
                kind = "stuff" if klass == 3 else "thing"
                is_right = (text @ feature).argmax().item() == klass
                hits.setdefault(f"{way} {kind}", {}).setdefault(klass, []).append(is_right)
    for row, classes in hits.items():
        expected = 100 * np.mean([np.mean(right) for right in classes.values()])
        assert result["mAcc"][row]["top1"] == pytest.approx(expected)
    assert result["mAcc"]["box thing"]["regions"] == 10
    assert result["mAcc"]["mask stuff"]["regions"] == 5
    written, = read_results(tmp_path / "region.json", size=64, attention="k", scale=2.0)
    assert {key: written[key] for key in result} == result


def test_coco_has_other_names():
    """For each class one that no class has in the list itself."""
    own = data.read_classes("classes/coco_panoptic.txt")
    others = data.read_classes("classes/coco_panoptic_synonyms.txt")
    assert len(own) == len(others) == len(others.prompts)
    assert not {name.casefold() for name in own.prompts} & {
        name.casefold() for name in others.prompts}


@pytest.mark.cpu
def test_features_that_are_the_text_are_all_right(panoptic, monkeypatch, tmp_path):
    """Features set to the class embeddings are all right, features set to their opposite all
    wrong."""
    text = F.normalize(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), dim=-1)

    def painted(cfg, clip, teacher, samples, size, device):
        features = torch.cat([text[sample.labels] for sample in samples])
        return {"box": features, "mask": features, "crop": -features}
    monkeypatch.setattr(eval_region, "encode_regions", painted)
    monkeypatch.setattr(DeCLIP, "encode_text", lambda *_: text)
    means = eval_region.main(options(**TINY | panoptic | {"out": tmp_path}))["64"]["mAcc"]
    assert means["box thing"]["top1"] == means["mask stuff"]["top1"] == 100
    assert means["crop thing"]["top1"] == 0


@pytest.mark.cpu
def test_classes_crowds_baselines_and_teacher(panoptic, tmp_path, monkeypatch):
    """Settings that change what is computed reach it: seen in what the model and the counting are
    asked."""
    content = json.loads(open(panoptic["annotations"]).read())
    content["annotations"][0]["segments_info"][1]["iscrowd"] = 1
    (tmp_path / "p.json").write_text(json.dumps(content))
    (tmp_path / "classes.txt").write_text("disc, ball, circle\nbox\nsea, ocean\nground\n")
    given = options(**TINY | panoptic
                    | {"annotations": tmp_path / "p.json", "classes": tmp_path / "classes.txt",
                                         "out": tmp_path, "attention": "maskclip"})
    seen = []
    monkeypatch.setattr(VisionTower, "encode_dense", lambda self, images, attention=None,
                        own=VisionTower.encode_dense:
                        (seen.append(attention), own(self, images, attention))[1])
    assert eval_region.main(given)["64"]["mAcc"]["box thing"]["regions"] == 9
    assert set(seen) == {"maskclip"}
    assert eval_region.main([*given, "--crowd"])["64"]["mAcc"]["box thing"]["regions"] == 10
    both = read_results(tmp_path / "region.json", attention="maskclip")
    assert [result["of"]["crowd"] for result in both] == [False, True]
    # Loaded from a file with the vision tower alone, the teacher can be told from the model that is
    # evaluated.
    torch.save(DeCLIP("tiny-eva").visual.trunk.state_dict(prefix="visual."),
               tmp_path / "teacher.pt")
    monkeypatch.setattr(DeCLIP, "encode_image", lambda self, images: pytest.fail("asked")
                        if self.text is not None else
                        torch.ones(len(images), 32))
    eval_region.main([*given, "--teacher", str(tmp_path / "teacher.pt")])


@pytest.mark.cpu
def test_ranks_share_the_images(panoptic, tmp_path):
    """Five images over two ranks: every region counts once."""
    given = TINY | panoptic | {"out": tmp_path / "one"}
    alone = eval_region.main(options(**given))["64"]["mAcc"]
    succeeds(warm.ranks("tests/tiny.py", "eval_region",
                        *options(**given | {"out": tmp_path / "two"})))
    result, = read_results(tmp_path / "two" / "region.json")
    together = result["mAcc"]
    assert {name: row["regions"] for name,
            row in together.items()} == {name: row["regions"] for name, row in alone.items()}
    # one region on the edge
    assert together["mask stuff"]["top1"] == pytest.approx(alone["mask stuff"]["top1"], abs=21)


def test_boxes_lie_where_the_student_sees_them(panoptic):
    # 80 x 40, so the right half of the picture is padding
    sample = eval_region.PanopticRegions(**panoptic)[2]
    boxes = eval_region.box_in_frame(sample, 64)
    assert boxes[:, 2].max() <= 0.5 and torch.allclose(boxes[:, 3].max(), torch.tensor(1.0))
    torch.testing.assert_close(boxes[:, 0] * 80, sample.boxes[:, 0])        # 64 pixels for 80


def test_classes_must_fit_the_json(panoptic, tmp_path):
    with pytest.raises(SystemExit, match="has 133 classes, but .* 4 categories"):
        eval_region.main(options(**TINY | panoptic
                                 | {"classes": "classes/coco_panoptic.txt", "out": tmp_path}))


def test_an_image_without_regions_is_no_error(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "x.jpg")
    Image.new("RGB", (20, 10)).save(tmp_path / "x.png")
    content = {"images": [{"id": 1, "file_name": "x.jpg"}],
               "categories": [{"id": 1, "name": "cat", "isthing": 1}],
               "annotations": [{"image_id": 1, "file_name": "x.png", "segments_info": []}]}
    (tmp_path / "p.json").write_text(json.dumps(content))
    arguments = {"annotations": tmp_path / "p.json", "pngs": tmp_path, "images": tmp_path,
                 "out": tmp_path}
    assert eval_region.main(options(**TINY | arguments))["64"]["mAcc"]["box thing"]["regions"] == 0


def test_several_sizes_are_as_many_runs(panoptic, tmp_path, capsys):
    """Each size has a table and the figures of a run of its own; crops are the first size's."""
    given = TINY | panoptic | {"out": tmp_path}
    both = eval_region.main(options(**given | {"sizes": (32, 64)}))
    assert re.findall(r", (\d+) px\nmAcc, %", capsys.readouterr().out) == ["32", "64"]
    for size in (32, 64):
        alone = eval_region.main(options(**given | {"sizes": size, "out": tmp_path / "alone"}))
        assert alone[str(size)] == both[str(size)]
    written = read_results(tmp_path / "region.json", model="tiny-eva")
    assert {str(result["of"]["size"]): result["mAcc"] for result in written} == {
        size: result["mAcc"] for size, result in both.items()}


def test_classes_of_one_name_have_an_accuracy_each():
    counts = torch.tensor([[4, 1, 1], [4, 2, 2], [4, 4, 4]])
    result = eval_region.summarize(data.make_classes(["cat", "sea", "cat"]), [True, False, True],
                                   {"box": counts})
    assert result["top1 of each class"] == {"cat": {"box": 25}, "sea": {"box": 50},
                                            "cat, class 2": {"box": 100}}


def test_a_size_that_patches_do_not_fill_is_refused(panoptic):
    with pytest.raises(SystemExit, match="SIZES has 60, .* the nearest size that works is 64"):
        eval_region.main(options(**TINY | panoptic | {"sizes": (32, 60)}))


# ----------------------------------------------------------------------------------- the model

def config(**given):
    return settings.parse(options(**TINY | given), eval_region)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "declip.safetensors"
    DeCLIP("tiny-eva", context="qk", scale=0.5).save(path)
    return str(path)


def test_published_checkpoint_must_name_its_attention(panoptic, tmp_path):
    """A file that does not describe itself is not evaluated with a guess."""
    torch.manual_seed(1)        # not the weights that a random model begins with
    clip, weights = DeCLIP("tiny-eva", context="qk", scale=1.0), tmp_path / "published.pt"
    torch.save({"state_dict": clip.visual.trunk.state_dict(prefix="visual.")}, weights)
    given = options(**TINY | panoptic | {"out": tmp_path, "ckpt": weights})
    for missing in ([], ["--context", "qk"], ["--scale", "1"]):
        with pytest.raises(SystemExit, match="does not say which model and attention"):
            eval_region.main([*given, *missing])
    cfg = config(ckpt=weights, context="qk", scale=1)
    loaded = open_model(cfg)
    assert (loaded.context, loaded.scale) == ("qk", 1.0) and loaded.text is not None
    assert torch.equal(loaded.visual.trunk.blocks[0].attn.q_proj.weight,
                       clip.visual.trunk.blocks[0].attn.q_proj.weight)
    assert title(cfg, loaded) == f"tiny-eva, attention qk, scale 1.0, {weights}"


def test_a_checkpoint_is_not_evaluated_as_another(checkpoint):
    """What it is goes without saying, and what is said must be what it is."""
    loaded = open_model(config(ckpt=checkpoint, context="qk", scale=0.5))
    assert (loaded.context, loaded.scale) == ("qk", 0.5)
    for given in ({"context": "q"}, {"scale": 0.25}, {"scale": 2}, {"model": "tiny-vit"}):
        with pytest.raises(ValueError, match="was trained with|does not fit"):
            open_model(config(ckpt=checkpoint, **given))


@pytest.mark.parametrize("name, content, sentence", [
    ("x.pt", b"<html>not found</html>", "is not a plain file of tensors"),
    ("x.safetensors", b"<html>not found</html>", "is not a whole safetensors file"),
    ("x.pt", b"", "is not a plain file of tensors"),
    ("x.pt", {"step": 1, "optimizer": {}, "scaler": {}, "model": {}},
     "is a checkpoint to resume training from, not a model"),
    ("x.pt", {"encoder.weight": torch.zeros(2)}, "holds no vision tower of a CLIP"),
])
def test_a_file_that_is_no_checkpoint_is_told_what_it_is(tmp_path, name, content, sentence):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        open_model(config(ckpt=path))
    assert sentence in str(error.value) and "--model" not in str(error.value)


def test_baselines_need_no_checkpoint():
    """Random weights are the same at every run; the baseline is the setting's, not the model's."""
    first, second = (open_model(config(attention=attention)) for attention in ("clip", "sclip"))
    assert first.context == second.context == "q"
    for one, other in zip(first.state_dict().values(), second.state_dict().values()):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="ATTENTION is 'csa'; it must be one of clip, maskclip"):
        open_model(config(attention="csa"))


@pytest.mark.parametrize("given, expected", [
    ({}, "attention q, scale 1/√d, random weights"),
    ({"attention": "clip", "precision": "auto"}, "attention clip, random weights"),
    ({"attention": "sclip", "precision": "bf16"}, "attention sclip, random weights, bf16"),
    ({"context": "k", "scale": 2, "precision": "fp16"},
     "attention k, scale 2.0, random weights, fp16"),
])
def test_a_title_says_what_was_evaluated(given, expected):
    """The heading of a table names a precision that rounds; `auto` is fp32 on a CPU."""
    cfg = config(**given)
    assert title(cfg, open_model(cfg)) == f"tiny-eva, {expected}"


# ---------------------------------------------------------------------------- panoptic regions

def test_crowds_and_specks_are_left_out(panoptic, tmp_path):
    content = json.loads(open(panoptic["annotations"]).read())
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0]["segments_info"][1]["iscrowd"] = 1
    (tmp_path / "x.json").write_text(json.dumps(content))
    arguments = panoptic | {"annotations": tmp_path / "x.json"}
    assert eval_region.PanopticRegions(**arguments)[0].labels.tolist() == [1, 3]
    assert eval_region.PanopticRegions(**arguments)[0].region_ids.min() == -1
    assert eval_region.PanopticRegions(**arguments, crowd=True)[0].labels.tolist() == [1, 0, 3]
    assert eval_region.PanopticRegions(**arguments, min_area=2000)[0].labels.tolist() == [3]


def test_masks_are_shares_of_patches():
    region_ids = torch.full((32, 64), -1)
    region_ids[:16, :16] = 0
    region_ids[:8, 24:40] = 1
    masks = eval_region.region_masks(region_ids, 2, 64, 16)
    expected = torch.zeros(2, 4, 4)
    expected[0, 0, 0], expected[1, 0, 1], expected[1, 0, 2] = 1, 0.25, 0.25
    torch.testing.assert_close(masks, expected)
    assert eval_region.region_masks(region_ids, 0, 64, 16).shape == (0, 4, 4)


@pytest.mark.parametrize("change", [{"id": 77}, {"bbox": [0, 0, 0, 9]}, {"bbox": [500, 0, 9, 9]},
                                    {"bbox": [0, -9, 9, 9]}])
def test_regions_that_are_not_there_are_left_out_and_counted(panoptic, tmp_path, capsys, change):
    content = json.loads(open(panoptic["annotations"]).read())
    content["annotations"][0]["segments_info"][0].update(change)
    (tmp_path / "x.json").write_text(json.dumps(content))
    changed = panoptic | {"annotations": str(tmp_path / "x.json")}
    whole = eval_region.PanopticRegions(**panoptic)[0]
    sample = eval_region.PanopticRegions(**changed)[0]
    assert (len(sample.labels), sample.left_out) == (len(whole.labels) - 1, 1)
    result = eval_region.main(options(**TINY | changed | {"out": tmp_path}))
    assert "1 regions were left out: the PNG has no pixel of them" in capsys.readouterr().out
    assert sum(row["regions"] for way, row in result["64"]["mAcc"].items() if "box" in way) == 14


def test_masks_may_be_binary(panoptic):
    """Every patch that a mask touches has the same weight, as in the published evaluation."""
    clip = DeCLIP("tiny-eva")
    cfg = config(binary_masks="true")
    sample = eval_region.PanopticRegions(**panoptic)[0]
    found = eval_region.encode_regions(cfg, clip, None, [sample], 64, torch.device("cpu"))["mask"]
    with torch.inference_mode():
        image = data.student_image(sample.image, 64, clip.mean, clip.std)
        content, _ = clip.encode_dense(image[None])
    weights = eval_region.region_masks(sample.region_ids, len(sample.labels), 64, clip.patch_size)
    expected = torch.stack([content[0, :, weight > 0].mean(dim=1) for weight in weights])
    torch.testing.assert_close(found, expected)
    assert ((0 < weights) & (weights < 0.99)).any()
