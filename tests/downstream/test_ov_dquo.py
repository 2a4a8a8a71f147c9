"""downstream/ov_dquo/: train.py learns drawn scenes, ranks agree, a run goes on where it stopped;
unknown.py finds objects that no label names; eval.py scores what is found."""

import json

import numpy as np
import pytest
import torch
import warm
from conftest import options, succeeds
from PIL import Image
from test_fvit_eval import perfect
from test_fvit_train import saved_once, scenes_json  # noqa: F401 - four drawn scenes
from torchvision.ops import box_iou

from downstream import detection, evaluation
from downstream.fvit import eval as fvit_eval
from downstream.fvit.model import Design as FViTDesign
from downstream.fvit.model import FViT
from downstream.ov_dquo import eval as ov_dquo_eval
from downstream.ov_dquo import train, unknown
from downstream.ov_dquo.model import OVDQUO, ScoreRules, open_ov_dquo
from model import DeCLIP
from tools import detect
from util import settings
from util.results import read_results

TINY = {"backbone": "none", "model": "tiny-eva", "pretrained": "none", "cache": "none",
        "templates": "{}", "unknown": "none", "image_size": 64, "short_sides": (40, 48),
        "crop_sides": (32, 40), "width": 32, "heads": 2, "points": 2, "layers": 2, "ffn": 32,
        "queries": 20, "denoising": 8, "batch_size": 2, "micro_batch": 2, "num_workers": 0,
        "log_every": 1, "lr": 1e-3, "clip_norm": 1}
LOSSES = ("loss", "objectness", "box", "giou", "proposal objectness", "proposal box",
          "proposal giou", "denoising")


def run(scenes, out, **given) -> list[dict]:
    """Trains a tiny detector; returns the lines of log.jsonl."""
    train.main(options(**TINY | {"dataset": scenes, "novel": "ground", "out": out} | given))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(lines: list[dict]) -> list[list]:
    return [[line[key] for key in ("step", "epoch", "lr", *LOSSES)] for line in lines]


def weights(out) -> dict[str, torch.Tensor]:
    state = open_ov_dquo(out / "ov_dquo.safetensors").state_dict()
    return {name: value for name, value in state.items() if not name.startswith("backbone.")}


@pytest.fixture(scope="module")
def unknown_json(scenes_json):  # noqa: F811
    """Two objects that no label names, in the published format."""
    path = scenes_json.with_name("unknown.json")
    path.write_text(json.dumps([
        {"image_id": 0, "bbox": [2, 3, 20, 18], "weight": 0.6, "category_id": -1, "pseudo": 1,
         "id": 1},
        {"image_id": 2, "bbox": [30, 10, 25, 30], "weight": 1, "category_id": -1, "pseudo": 1,
         "id": 2}]))
    return path


@pytest.fixture(scope="module")
def fvit(tmp_path_factory, scenes_json):  # noqa: F811
    """An F-ViT of the scenes, of which the ground is novel."""
    folder = tmp_path_factory.mktemp("fvit")
    torch.manual_seed(0)
    clip = DeCLIP("tiny-eva")
    clip.save(folder / "declip.safetensors")
    design = FViTDesign(image_size=64, channels=16, candidates=200, proposals=100, templates="{}")
    FViT(clip, ["ground", "disc", "box"], [False, True, True], design).save(
        folder / "fvit.safetensors", {"BACKBONE": str(folder / "declip.safetensors"),
                                      "DATASET": str(scenes_json), "NOVEL": "ground"})
    return folder / "fvit.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, fvit):
    """An untrained OV-DQUO of the same."""
    folder = tmp_path_factory.mktemp("ov_dquo")
    cfg = settings.parse(options(**TINY), train)
    torch.manual_seed(0)
    OVDQUO(DeCLIP(pretrained=str(fvit.with_name("declip.safetensors"))), ["ground", "disc", "box"],
           [False, True, True], train.design_of(cfg)).save(folder / "ov_dquo.safetensors", {
               "BACKBONE": str(fvit.with_name("declip.safetensors")), "DATASET": "ovcoco"})
    return folder / "ov_dquo.safetensors"


# --------------------------------------------------------------------------------------- training

def test_it_learns_four_scenes(scenes_json, tmp_path, saved_once):  # noqa: F811
    """On a random backbone, which names nothing: of one class, AP50 of at least 95."""
    content = json.loads(scenes_json.read_text())
    content["annotations"] = [entry | {"category_id": 1} for entry in content["annotations"]
                              if entry["category_id"] != 0]
    content["categories"] = content["categories"][1:2]
    one_name = scenes_json.with_name("one_name.json")
    one_name.write_text(json.dumps(content))
    run(one_name, tmp_path, novel="none", epochs=100, lr=3e-3, flip=0, crop=0, batch_size=4,
        micro_batch=4, log_every=50, average=0.9)
    figures = ov_dquo_eval.main(arguments(tmp_path / "ov_dquo.safetensors", one_name, tmp_path,
                                          temperature=0))
    assert figures["boxes"]["AP50"] >= 95


def test_log_and_file_tell_of_the_run(scenes_json, unknown_json, tmp_path, capsys):  # noqa: F811
    line, *_ = run(scenes_json, tmp_path, epochs=1, unknown=unknown_json)
    assert set(line) == {"step", "epoch", "lr", *LOSSES, "images_per_second", "memory_mb",
                         "bad_steps", "bad_files"}
    assert line["loss"] == pytest.approx(sum(line[name] for name in LOSSES[1:]), rel=1e-6)
    detector = open_ov_dquo(tmp_path / "ov_dquo.safetensors")
    assert (detector.classes, detector.seen) == (["ground", "disc", "box"], [False, True, True])
    assert detector.design == train.design_of(settings.parse(options(**TINY), train))
    printed = capsys.readouterr().out
    assert "unknown.json: 4 images, 2 annotations" in printed
    assert "; try it with python -m tools.detect" in printed


@pytest.mark.cpu
@pytest.mark.parametrize("given", [{}, {"repeat": 0.6, "text_queries": 1}])
def test_two_ranks_train_the_detector_of_one(scenes_json, unknown_json, tmp_path,  # noqa: F811
                                             given):
    """Numbers of matches differ between ranks, one of which has no unknown object. A large EPS,
    because AdamW would make noise of gradients that rounding changes."""
    given = {"batch_size": 4, "micro_batch": 4, "epochs": 3, "lr": 1e-2, "eps": 0.1,
             "unknown": unknown_json, "average": 0.9} | given
    one = run(scenes_json, tmp_path / "one", **given)
    everything = TINY | {"dataset": scenes_json, "novel": "ground", "out": tmp_path / "two"} | given
    succeeds(warm.ranks("tests/tiny.py", "downstream.ov_dquo.train", *options(**everything)))
    two = [json.loads(line) for line in open(tmp_path / "two" / "log.jsonl")]
    for ours, theirs in zip(losses(one), losses(two), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    of_one, of_two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, weight in of_one.items():
        torch.testing.assert_close(of_two[name], weight, rtol=0, atol=2e-5)


@pytest.mark.cpu
def test_a_resumed_run_is_the_uninterrupted_run(scenes_json, unknown_json, tmp_path):  # noqa: F811
    """To the bit, the average included; stopped in an epoch, at its end, in the next."""
    given = {"epochs": 2, "unknown": unknown_json, "average": 0.9}
    whole = run(scenes_json, tmp_path / "whole", **given)
    for stop in (1, 2, 3, 4):
        parts = run(scenes_json, tmp_path / "parts", **given, steps=stop, resume="true")
    assert losses(parts) == losses(whole)
    of_parts, of_whole = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(of_parts[name], value) for name, value in of_whole.items())


def test_images_of_rare_classes_come_more_often(scenes_json):  # noqa: F811
    """By the square root of 1 / the share of images that have their rarest class."""
    content = json.loads(scenes_json.read_text())
    content["annotations"] = [entry for entry in content["annotations"]
                              if entry["image_id"] == 0 or entry["category_id"] != 2]
    path = scenes_json.with_name("rare.json")
    path.write_text(json.dumps(content))
    annotations = detection.find_annotations(str(path), "train", novel="ground")
    data = detection.DetectionData(annotations, False, repeat=1.0)
    assert data.factors.tolist() == [2, 1, 1, 1]        # discs are everywhere
    drawn = np.concatenate([np.ravel(data.order(2, epoch, 0)) for epoch in range(500)])
    assert np.bincount(drawn) / len(drawn) == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.04)


def test_rates_and_decay(scenes_json):  # noqa: F811
    """The transposed convolution has its share of the rate; weight decay spares nothing."""
    cfg = settings.parse(options(**TINY | {"lr": 0.1, "neck_share": 0.2, "average": 0.7,
                                           "weight_decay": 0.5}), train)
    model = OVDQUO(DeCLIP("tiny-eva"), ["disc"], [True], train.design_of(cfg))
    model.start_average()
    optimizer = train.build_optimizer(cfg, model)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in trained.items()}
    for group in optimizer.param_groups:        # as Run.end_step does
        group["lr"] = cfg.LR * group.get("share", 1)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in trained.items():
        rate = 0.02 if name.startswith("neck.finer.") else 0.1
        torch.testing.assert_close(weight.detach(), before[name] * (1 - rate * 0.5))
        averaged = model.state().get(name)      # the table of labels is only trained with
        if averaged is not None:
            torch.testing.assert_close(averaged, 0.7 * before[name] + 0.3 * weight.detach())
    assert not any(name.startswith("backbone.") for name in trained)


def test_a_batch_without_objects(scenes_json, tmp_path):  # noqa: F811
    """Crops that show none, or unknown ones alone; no loss is NaN."""
    content = json.loads(scenes_json.read_text())
    content["annotations"] = [entry | {"bbox": [1, 1, 3, 3]} for entry in content["annotations"]]
    small = scenes_json.with_name("small.json")
    small.write_text(json.dumps(content))
    path = scenes_json.with_name("small_unknown.json")
    path.write_text(json.dumps([{"image_id": 2, "bbox": [40, 40, 20, 20], "weight": 0}]))
    lines = run(small, tmp_path, epochs=3, batch_size=1, micro_batch=1, crop=1, unknown=path)
    assert len(lines) == 12 and np.isfinite(losses(lines)).all()
    assert 0 in [line["denoising"] for line in lines]       # an image without any


@pytest.mark.parametrize("given, sentence", [
    ({"unknown": "no.json"}, "There is no no.json; python -m downstream.ov_dquo.unknown finds"),
    ({"crop": 2}, "CROP is 2.0; it must be a share"),
    ({"average": 1}, "AVERAGE is 1.0; it must be at least 0 and less than 1"),
    ({"crop_sides": (5, 4)}, "CROP_SIDES is (5, 4); it must be two numbers"),
    ({"short_sides": 8}, "SHORT_SIDES is (8,); it must be at least the least of CROP_SIDES, 32"),
    ({"heads": 3}, "WIDTH is 32; it must be a multiple of four times HEADS, 12"),
    ({"image_size": 72}, "IMAGE_SIZE 72 is no multiple of twice the backbone's patch size, 16"),
    ({"queries": 0}, "QUERIES is 0; it must be at least 1")])
def test_refusals_of_settings(scenes_json, tmp_path, given, sentence):  # noqa: F811
    with pytest.raises(SystemExit) as error:
        run(scenes_json, tmp_path, **given)
    found = str(error.value)
    assert found.startswith("train.py: ") and sentence in found and "\n" not in found


GOOD = {"image_id": 0, "bbox": [2, 3, 20, 18], "weight": 0.5}


@pytest.mark.parametrize("content, sentence", [
    ([GOOD | {"weight": 1.5}], "has 1.5 as 'weight'; it must be a number from 0 to 1"),
    ([GOOD | {"weight": float("nan")}], "has NaN as 'weight'; it must be a number"),
    ([{"image_id": 0, "bbox": [2, 3, 20, 18]}], "weight"),
    ([GOOD | {"bbox": [2, 3, float("nan"), 18]}], "bbox"),
    ([GOOD | {"image_id": 77}], "of other images"), ([], "give the file of these images"),
    ([GOOD | {"image_id": [1]}], "has [1] as 'image_id'; it must be an image's id"),
    ({"annotations": [GOOD]}, "is no list of unknown objects")])
def test_refusals_of_unknown_objects(scenes_json, tmp_path, content, sentence):  # noqa: F811
    path = tmp_path / "unknown.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as error:
        run(scenes_json, tmp_path, unknown=path)
    found = str(error.value)
    assert sentence in found and "unknown.json" in found and "\n" not in found


def test_objects_without_area_or_image_are_counted(scenes_json, tmp_path, capsys):  # noqa: F811
    path = tmp_path / "unknown.json"
    path.write_text(json.dumps([GOOD, GOOD | {"bbox": [9, 9, -4, 5]}, GOOD | {"image_id": "x"}]))
    run(scenes_json, tmp_path, epochs=1, unknown=path)
    printed = capsys.readouterr().out
    assert "unknown.json: 4 images, 1 annotations of 3; left out: 1 of other images" in printed


# -------------------------------------------------------------------------------- unknown objects

def test_what_is_left_out():
    """Boxes on labelled ones, of surer ones, long, small or as large as the image; five remain."""
    cfg = settings.parse(["--min_area", "100", "--most", "2"], unknown)
    boxes = torch.tensor([[0., 0, 20, 20], [1, 0, 20, 20], [50, 50, 70, 70], [0, 40, 90, 50],
                          [40, 0, 49, 9], [0, 0, 100, 100], [70, 0, 90, 20], [30, 70, 45, 85]])
    scores = torch.tensor([0.9, 0.8, 0.95, 0.99, 0.99, 0.99, 0.5, 0.4])
    known = torch.tensor([[52., 52, 70, 70]])
    chosen = unknown.choose_unknown(cfg, boxes, scores, known, (100, 100))
    assert chosen.tolist() == [0, 6]
    assert unknown.choose_unknown(cfg, boxes, scores, known[:0], (100, 100)).tolist() == [2, 0]


@pytest.mark.cpu
@pytest.mark.parametrize("kind", ["fvit", "checkpoint"])
def test_unknown_objects_train_ov_dquo(kind, fvit, checkpoint, scenes_json,  # noqa: F811
                                       tmp_path, request):
    """Of F-ViT in a first round and of OV-DQUO in a second; two ranks write what one does."""
    argv = options(ckpt=request.getfixturevalue(kind), dataset=scenes_json, novel="ground",
                   min_area=9, num_workers=0, batch_size=3)
    unknown.main([*argv, "--out", str(tmp_path / "one.json")])
    succeeds(warm.ranks("tests/tiny.py", "downstream.ov_dquo.unknown", *argv, "--out",
                        str(tmp_path / "two.json")))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))

    def by_place(found):
        return sorted((entry["image_id"], *entry["bbox"], entry["weight"]) for entry in found)
    np.testing.assert_allclose(by_place(one), by_place(two), atol=0.011)
    assert {min(entry["weight"] for entry in one), max(entry["weight"] for entry in one)} == {0, 1}
    assert {entry["category_id"] for entry in one} == {-1}
    assert sorted(entry["id"] for entry in one) == list(range(1, len(one) + 1))
    annotations = detection.find_annotations(str(scenes_json), "train", novel="ground")
    data = detection.DetectionData(annotations, False, unknown=str(tmp_path / "one.json"))
    for objects in map(data.read, range(len(data))):
        is_unknown = objects.labels == 3
        overlaps = box_iou(objects.boxes[is_unknown], objects.boxes[~is_unknown])
        assert is_unknown.sum() <= 5 and not (overlaps > 0.301).any()
    run(scenes_json, tmp_path / "run", epochs=1, unknown=tmp_path / "one.json")


def test_no_unknown_object_is_no_file(fvit, scenes_json, tmp_path):  # noqa: F811
    out = tmp_path / "unknown.json"
    with pytest.raises(SystemExit, match="No unknown object was found in 4 images; lower MIN_AREA, "
                                         "1e[+]06 pixels"):
        unknown.main(options(ckpt=fvit, min_area=1e6, num_workers=0, out=out))
    assert not out.exists()


# ------------------------------------------------------------------------------------- evaluation

def arguments(checkpoint, dataset, out, **given) -> list[str]:
    return options(**{"ckpt": checkpoint, "dataset": dataset, "out": out, "cache": "none",
                      "num_workers": 0, "batch_size": 2} | given)


def test_a_perfect_detector_has_100(checkpoint, scenes_json, tmp_path, monkeypatch):  # noqa: F811
    """Of boxes; masks it has none, whatever the data have."""
    monkeypatch.setattr(OVDQUO, "detect", perfect(scenes_json))
    figures = ov_dquo_eval.main(arguments(checkpoint, scenes_json, tmp_path, factor=2))
    assert set(figures) == {"boxes"} and figures["boxes"]["AP"] == pytest.approx(100)
    assert figures["boxes"]["groups"]["novel"]["AP50"] == pytest.approx(100)
    result, = read_results(tmp_path / "instances.json", factor=2, temperature=50)
    assert result["boxes"] == figures["boxes"]


@pytest.mark.cpu
def test_two_ranks_find_what_one_process_finds(checkpoint, scenes_json, tmp_path):  # noqa: F811
    one = ov_dquo_eval.main(arguments(checkpoint, scenes_json, tmp_path / "one", least=0))
    succeeds(warm.ranks("tests/tiny.py", "downstream.ov_dquo.eval",
                        *arguments(checkpoint, scenes_json, tmp_path / "two", least=0)))
    two, = read_results(tmp_path / "two" / "instances.json")
    assert two["boxes"] == one["boxes"]


def test_scores_are_those_of_a_data_set():
    cfg = settings.parse([], ov_dquo_eval)
    assert evaluation.score_rules(cfg, OVDQUO, "my.json") == ScoreRules(50, 3, 1, 0.001, 0.5, 100)
    assert evaluation.score_rules(cfg, OVDQUO, "ovlvis") == ScoreRules(factor=8, most=300)
    cfg = settings.parse(["--temperature", "15", "--most", "7"], ov_dquo_eval)
    assert evaluation.score_rules(cfg, OVDQUO, "ovlvis") == ScoreRules(15, factor=8, most=7)


def test_a_photograph_and_ones_own_names(checkpoint, fvit, tmp_path, capsys):
    """tools.detect takes either kind's file; an option of the other kind is refused."""
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    given = {"cache": "none", "classes": "cat, disc", "ckpt": checkpoint, "largest": 200}
    detect.main([str(tmp_path / "red.png"), *options(**given, least=0.001, factor=2)])
    assert (tmp_path / "red.detection.png").exists()
    for ckpt, option in ((checkpoint, "tau"), (checkpoint, "a"), (fvit, "factor")):
        with pytest.raises(SystemExit, match=f"{option.upper()} is of other detectors than"):
            detect.main([str(tmp_path / "red.png"), *options(**given | {"ckpt": ckpt, option: 1})])


def test_no_file_of_another_kind(checkpoint, fvit, scenes_json, tmp_path):  # noqa: F811
    for script, ckpt in ((ov_dquo_eval, fvit), (fvit_eval, checkpoint)):
        with pytest.raises(SystemExit, match="is no detector; give a"):
            script.main(arguments(ckpt, scenes_json, tmp_path))
