"""downstream/fvit/train.py: it learns drawn scenes, ranks agree, a run goes on where it stopped."""

import json
import math
import re
import shutil

import pytest
import torch
import warm
from conftest import draw_scene, options, succeeds
from PIL import Image
from pycocotools import mask as coco_masks

import train as distillation
from downstream import detection
from downstream.fvit import train
from downstream.fvit.model import FViT, ScoreRules, open_fvit
from model import DeCLIP
from util import distributed, settings
from util.images import read_image

TINY = {"backbone": "none", "model": "tiny-eva", "pretrained": "none", "cache": "none",
        "templates": "{}", "image_size": 64, "channels": 16, "anchors": 64, "regions": 16,
        "candidates": 50, "proposals": 20, "batch_size": 2, "micro_batch": 2, "warmup": 5,
        "num_workers": 0, "log_every": 1}
ALONE = distributed.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def scenes_json(tmp_path_factory):
    """Four drawn scenes as COCO instances: discs and boxes, and a novel class, the ground."""
    folder = tmp_path_factory.mktemp("scenes")
    images, objects = [], []
    for number, size in enumerate([(64, 48), (40, 64), (64, 64), (56, 64)]):
        image, label = draw_scene(number, *size)
        Image.fromarray(image).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": size[0],
                       "width": size[1]})
        for category in (0, 1, 2):
            code = coco_masks.encode((label == category).astype("uint8", order="F"))
            objects.append({"id": len(objects) + 1, "image_id": number, "category_id": category,
                            "bbox": coco_masks.toBbox(code).tolist(), "iscrowd": 0,
                            "area": int(coco_masks.area(code)),
                            "segmentation": code | {"counts": code["counts"].decode()}})
    categories = [{"id": number, "name": name} for number, name in
                  enumerate(("ground", "disc", "box"))]
    content = {"images": images, "annotations": objects, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def run(scenes, out, **given) -> list[dict]:
    """Trains a tiny detector; returns the lines of log.jsonl."""
    train.main(options(**TINY | {"dataset": scenes, "novel": "ground", "out": out} | given))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def parsed(dataset, **given):
    return settings.parse(options(**TINY | {"dataset": dataset, "novel": "ground"} | given), train)


def weights(out) -> dict[str, torch.Tensor]:
    """All that the file has: weights, text, statistics of norms."""
    state = open_fvit(out / "fvit.safetensors").state_dict()
    return {name: value for name, value in state.items() if not name.startswith("backbone.")}


def losses(lines: list[dict]) -> list[list]:
    """What must not depend on interruptions."""
    keep = ("step", "epoch", "lr", "loss", "proposal class", "proposal box", "class", "box")
    return [[line[key] for key in keep] for line in lines]


# ---------------------------------------------------------------------------------------- it learns

@pytest.fixture
def saved_once(monkeypatch):
    """Checkpoints at the end alone: an epoch of few images would write one at almost every step."""
    save = train.Run.save
    monkeypatch.setattr(train.Run, "save", lambda self: self.step < self.last or save(self))


def test_it_learns_four_scenes(scenes_json, tmp_path, saved_once):
    """On a random backbone, with the schedule of a drop. Seeds give an AP50 of 71 to 100, as do
    other versions of PyTorch."""
    run(scenes_json, tmp_path, epochs=65, lr=4e-3, lr_drops=50, scales=(1, 1), flip=0, batch_size=4,
        micro_batch=4, log_every=20)
    fvit = open_fvit(tmp_path / "fvit.safetensors")
    annotations = detection.find_annotations(str(scenes_json), "val", novel="ground")
    images = [read_image(file) for file in annotations.files]
    results = [result for number, found in enumerate(fvit.detect(images, ScoreRules(a=0, b=0)))
               for result in detection.encode_detections(number, found)]
    precision = detection.precisions(annotations, results)
    groups = detection.groups_of(annotations, fvit.seen)
    found = detection.summarize(precision, annotations.classes, groups)["groups"]
    assert found["base"]["AP50"] >= 60, found


def test_masks_are_learned(scenes_json, tmp_path, saved_once):
    lines = run(scenes_json, tmp_path, epochs=8, lr=4e-3, masks="true", scales=(1, 1), flip=0)
    assert lines[-1]["mask"] < 0.8 * lines[0]["mask"], lines


def test_log_and_file_tell_of_the_run(scenes_json, tmp_path, capsys):
    lines = run(scenes_json, tmp_path, epochs=1, rpn_norm="true", keep_best="true",
                resize="pil")
    assert set(lines[0]) == {"step", "epoch", "lr", "loss", "proposal class", "proposal box",
                             "class", "box", "images_per_second", "memory_mb", "bad_steps",
                             "bad_files"}
    parts = [lines[0][name] for name in ("proposal class", "proposal box", "class", "box")]
    assert math.isclose(lines[0]["loss"], sum(parts), rel_tol=1e-6)
    fvit = open_fvit(tmp_path / "fvit.safetensors")
    assert (fvit.classes, fvit.seen) == (["ground", "disc", "box"], [False, True, True])
    assert fvit.design.rpn_norm and fvit.design.keep_best and fvit.design.channels == 16
    assert fvit.design.resize == "pil"
    printed = capsys.readouterr().out       # a json of one's own has no other to evaluate with
    assert re.search(r"; try it with python -m tools.detect \S+ --classes", printed)
    assert re.search(r"\d images: \d+ steps an epoch", printed)


def test_only_the_detector_is_trained_and_kept(scenes_json, tmp_path):
    """The checkpoint has neither weights nor moments of the backbone."""
    run(scenes_json, tmp_path, epochs=1)
    state = torch.load(tmp_path / "resume-00000002.pt", weights_only=True)
    assert not any(name.startswith("backbone.") for name in state["model"])
    assert {"tau", "text", "pyramid.laterals.0.1.running_mean"} <= set(state["model"])
    backbone = open_fvit(tmp_path / "fvit.safetensors").backbone
    torch.manual_seed(0)        # as model.open_model makes random weights
    unchanged = DeCLIP("tiny-eva")
    assert all(map(torch.equal, backbone.parameters(), unchanged.parameters()))


def test_crops_change_with_the_epoch(scenes_json):
    cfg, data = parsed(scenes_json, seed=3), [None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "augment", lambda objects, *how: detection.Objects(how, *[None] * 4))
        for epoch in range(2):
            (seen,), (target,) = train.views(cfg, data, epoch, [4])
            assert seen == (f"3-{epoch}-4", 64, (0.1, 2.0), 0.5, "cv2") and target.key == seen[0]


def test_gradients_are_clipped(scenes_json, tmp_path, monkeypatch):
    """Before the optimiser's step the gradient is at most CLIP_NORM long."""
    lengths, step = [], torch.optim.AdamW.step

    def look(self, *given, **named):
        lengths.append(torch.nn.utils.get_total_norm(
            [p.grad for group in self.param_groups for p in group["params"]]).item())
        return step(self, *given, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    run(scenes_json, tmp_path, epochs=1, clip_norm=0.5)
    assert lengths == pytest.approx([0.5, 0.5], rel=1e-3)


def test_schedule(scenes_json):
    cfg = parsed(scenes_json, lr=1, warmup=250, lr_drops=(32, 44))
    rates = [train.learning_rate(cfg, step, 100) for step in range(4800)]
    assert rates[0] == pytest.approx(0.001) and rates[125] == pytest.approx(0.5005)
    assert rates[250] == rates[3199] == 1
    assert rates[3200] == pytest.approx(0.1) and rates[4799] == pytest.approx(0.01)
    assert train.learning_rate(parsed(scenes_json, lr=1, warmup=0), 0, 100) == 1


def test_weight_decay_spares_nothing(scenes_json):
    """One group, as published: where gradients are 0, biases, norms and tau shrink, too."""
    clip = DeCLIP("tiny-eva")
    cfg = parsed(scenes_json, lr=0.1, masks="true", rpn_norm="true")
    fvit = FViT(clip, ["disc"], [True], train.design_of(cfg))
    optimizer = train.build_optimizer(cfg, fvit)
    trained = {name: weight for name, weight in fvit.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    for weight in fvit.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in trained.items():
        torch.testing.assert_close(weight.detach(), before[name] * (1 - 0.1 * 0.1))
    assert fvit.tau.item() == pytest.approx(49.5)
    assert len(optimizer.param_groups) == 1 and {"tau", "box_head.shared.0.1.bias"} <= set(trained)
    assert not any(name.startswith("backbone.") for name in trained)


# ----------------------------------------------------------------------------- one process and many

@pytest.mark.cpu
def test_two_ranks_train_the_detector_of_one(scenes_json, tmp_path):
    """Numbers of sampled anchors and regions differ between ranks. Norms of each image alone:
    PyTorch shares the statistics of batch norms on GPUs only (the next test). A large EPS, because
    AdamW would make noise of gradients that rounding changes: of 0, and where a ReLU bends."""
    given = {"norm": "group", "batch_size": 4, "micro_batch": 4, "epochs": 2, "anchors": 9000,
             "regions": 40, "masks": "true", "lr": 1e-2, "warmup": 0, "eps": 0.1}
    one = run(scenes_json, tmp_path / "one", **given)
    everything = TINY | {"dataset": scenes_json, "novel": "ground", "out": tmp_path / "two"} | given
    succeeds(warm.ranks("tests/tiny.py", "downstream.fvit.train", *options(**everything)))
    two = [json.loads(line) for line in open(tmp_path / "two" / "log.jsonl")]
    of_one, of_two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, weight in of_one.items():
        torch.testing.assert_close(of_two[name], weight, rtol=0, atol=2e-5)
    assert [line["mask"] for line in one] == pytest.approx([line["mask"] for line in two], rel=1e-4)
    for ours, theirs in zip(losses(one), losses(two)):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_gpus_share_the_statistics_of_norms(scenes_json, monkeypatch):
    for kind in (FViT, DeCLIP):
        monkeypatch.setattr(kind, "to", lambda self, device: self)
    monkeypatch.setattr(train, "encode_names", lambda *_: torch.zeros(4, 32))
    annotations = detection.find_annotations(str(scenes_json), "train", novel="ground")
    dataset = detection.DetectionData(annotations, masks=False)
    for world_size, kind in ((1, torch.nn.BatchNorm2d), (2, torch.nn.SyncBatchNorm)):
        ranks = distributed.Ranks(0, world_size, torch.device("cuda"))
        fvit = train.build(parsed(scenes_json), dataset, ranks)
        assert type(fvit.pyramid.laterals[0][1]) is type(fvit.box_head.shared[0][1]) is kind
        assert fvit.training and not fvit.backbone.training


# ----------------------------------------------------------------------------------------- going on

@pytest.mark.cpu
def test_a_resumed_run_is_the_uninterrupted_run(scenes_json, tmp_path):
    """To the bit, statistics of norms included; stopped in an epoch, at its end, in the next."""
    whole = run(scenes_json, tmp_path / "whole", epochs=2)
    for stop in (1, 2, 3, 4):
        parts = run(scenes_json, tmp_path / "parts", epochs=2, steps=stop, resume="true")
    assert losses(parts) == losses(whole)
    of_parts, of_whole = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert of_whole["pyramid.laterals.0.1.running_mean"].abs().max() > 0
    assert all(torch.equal(of_parts[name], value) for name, value in of_whole.items())


def test_a_run_is_not_continued_as_another(scenes_json, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:    # of before weight decay was as published: two groups
        patch.setattr(train, "build_optimizer", distillation.build_optimizer)
        run(scenes_json, tmp_path / "old", epochs=2, steps=1)
    with pytest.raises(SystemExit, match="does not have the weights that are trained"):
        run(scenes_json, tmp_path / "old", epochs=2, resume="true")
    run(scenes_json, tmp_path / "run", epochs=2, steps=1)
    with pytest.raises(SystemExit, match="was begun with LR 0.0001, but now it is 0.1"):
        run(scenes_json, tmp_path / "run", epochs=2, resume="true", lr=0.1)
    content = json.loads(scenes_json.read_text())
    del content["annotations"][1]       # a disc
    folder = shutil.copytree(scenes_json.parent, tmp_path / "other")
    (folder / "instances.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="was begun with 4 images, .* but now there are 4 images"):
        run(scenes_json, tmp_path / "run", epochs=2, resume="true",
            annotations=folder / "instances.json")


# ----------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("given, sentence", [
    ({"dataset": "imagenet"}, "There is no data set 'imagenet'"),
    ({"backbone": "no/declip.safetensors"}, "There is no backbone no/declip.safetensors; train.py"),
    ({"norm": "layer"}, "NORM is 'layer'; it must be one of batch, group"),
    ({"scales": (2, 1)}, "SCALES is (2.0, 1.0); it must be two numbers"),
    ({"flip": 2}, "FLIP is 2.0; it must be a share"),
    ({"lr_drops": 0}, "LR_DROPS is (0,); it must be epochs"),
    ({"betas": 0.9}, "BETAS is (0.9,); it must be two numbers"),
    ({"image_size": 72}, "IMAGE_SIZE 72 is no multiple of twice the backbone's patch size, 16"),
    ({"regions": 0}, "REGIONS is 0; it must be at least 4"),
    ({"attention": "own"}, "ATTENTION is 'own'; it must be one of clip"),
    ({"batch_size": 8}, "There are 4 images, fewer than BATCH_SIZE, 8"),
])
def test_refusals_say_what_to_do(scenes_json, tmp_path, given, sentence):
    with pytest.raises(SystemExit) as error:
        run(scenes_json, tmp_path, **given)
    found = str(error.value)
    assert found.startswith("train.py: ") and sentence in found and "\n" not in found
