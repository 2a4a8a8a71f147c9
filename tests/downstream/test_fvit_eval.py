"""downstream/fvit/eval.py: a perfect detector has 100, ranks agree, classes and rules are those of
the data set, bad input."""

import json

import pytest
import torch
import warm
from conftest import options, succeeds
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_fvit_train import scenes_json  # noqa: F401 - four drawn scenes as COCO instances
from tiny import ROOT

from downstream import evaluation as shared
from downstream.detection import DetectionData, Detections, find_annotations, groups_of
from downstream.fvit import eval as evaluation
from downstream.fvit.model import Design, FViT, ScoreRules, open_fvit
from model import DeCLIP
from util import settings
from util.results import read_results

NAMES, SEEN = ["ground", "disc", "box"], [False, True, True]
SMALL = Design(image_size=64, channels=16, candidates=100, proposals=20, templates="{}", masks=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained detector of the scenes' classes on a DeCLIP file."""
    folder = tmp_path_factory.mktemp("fvit")
    torch.manual_seed(0)
    clip = DeCLIP("tiny-eva")
    clip.save(folder / "declip.safetensors")
    FViT(clip, NAMES, SEEN, SMALL).save(folder / "fvit.safetensors", {
        "BACKBONE": str(folder / "declip.safetensors"), "DATASET": "ovcoco"})
    return folder / "fvit.safetensors"


def arguments(checkpoint, dataset, out, **given) -> list[str]:
    return options(**{"ckpt": checkpoint, "dataset": dataset, "out": out, "cache": "none",
                      "num_workers": 0, "batch_size": 2, "least": 0} | given)


def perfect(dataset, labels=lambda labels: labels):
    """A detector that knows the scenes; labels: changes what it calls the objects."""
    data = DetectionData(find_annotations(str(dataset), "val"), masks=True)
    known = {objects.image.sum().item(): objects for objects in map(data.read, range(len(data)))}

    def detect(self, images, rules):
        found = [known[image.sum().item()] for image in images]
        return [Detections(objects.boxes, torch.linspace(0.9, 0.5, len(objects.boxes)),
                           labels(objects.labels), list(objects.masks)) for objects in found]
    return detect


def test_a_perfect_detector_has_100(checkpoint, scenes_json, tmp_path, monkeypatch):  # noqa: F811
    """By boxes and by masks, novel and base; one that calls novel objects discs has 0 of those."""
    monkeypatch.setattr(FViT, "detect", perfect(scenes_json))
    figures = evaluation.main(arguments(checkpoint, scenes_json, tmp_path))
    for way in ("boxes", "masks"):
        assert figures[way]["AP"] == pytest.approx(100), way
        assert figures[way]["groups"]["novel"]["AP50"] == pytest.approx(100)
    result, = read_results(tmp_path / "instances.json", dataset=str(scenes_json), least=0, b=0.8)
    assert result["boxes"] == figures["boxes"]
    monkeypatch.setattr(FViT, "detect", perfect(scenes_json, lambda labels: labels.clamp(min=1)))
    groups = evaluation.main(arguments(checkpoint, scenes_json, tmp_path))["boxes"]["groups"]
    assert groups["novel"] == {"AP": 0, "AP50": 0}
    assert 50 < groups["base"]["AP50"] < 100        # boxes are found, discs too many


@pytest.mark.cpu
def test_two_ranks_find_what_one_process_finds(checkpoint, scenes_json, tmp_path):  # noqa: F811
    one = evaluation.main(arguments(checkpoint, scenes_json, tmp_path / "one"))
    succeeds(warm.ranks("tests/tiny.py", "downstream.fvit.eval",
                        *arguments(checkpoint, scenes_json, tmp_path / "two")))
    two, = read_results(tmp_path / "two" / "instances.json")
    assert {way: two[way] for way in one} == one and set(one) == {"boxes", "masks"}


@pytest.mark.cpu
def test_transfer_swaps_the_names(checkpoint, scenes_json, tmp_path, monkeypatch):  # noqa: F811
    """Other classes in another order: the detector gets their embeddings, and knows which of them
    it has seen."""
    content = json.loads(scenes_json.read_text())
    for entry, name in zip(content["categories"], ("kite", "ground", "Disc")):
        entry["name"] = name
    other = scenes_json.with_name("other.json")
    other.write_text(json.dumps(content))
    seen = {}

    def detect(self, images, rules):
        seen.update(classes=self.classes, seen=self.seen, text=self.text)
        return perfect(other)(self, images, rules)
    monkeypatch.setattr(FViT, "detect", detect)
    figures = evaluation.main(arguments(checkpoint, other, tmp_path))
    assert seen["classes"] == ["kite", "ground", "Disc"] and seen["seen"] == [False, False, True]
    own = open_fvit(checkpoint).text
    torch.testing.assert_close(seen["text"][1:3], own[:2])
    assert figures["boxes"]["AP"] == pytest.approx(100)
    # What is novel may be said, too: the rest of what training has not seen is in no group.
    for novel, expected in ((None, ["kite", "ground"]), ("kite", ["kite"])):
        asked = find_annotations(str(other), "val", novel=novel)
        groups = groups_of(asked, seen["seen"])
        assert [name for name, flag in zip(asked.classes, groups["novel"]) if flag] == expected
        assert groups["base"] == seen["seen"]


def test_novel_is_what_training_has_not_seen(checkpoint, scenes_json, tmp_path,  # noqa: F811
                                             monkeypatch, capsys):
    """Whatever the command line or the data set says."""
    with pytest.raises(SystemExit, match="NOVEL names disc, but .* has seen that in training; name "
                                         "only what it has not seen, or leave NOVEL out"):
        evaluation.main(arguments(checkpoint, scenes_json, tmp_path, novel="ground, disc"))
    monkeypatch.setattr(FViT, "detect", perfect(scenes_json))
    monkeypatch.setattr(shared, "find_annotations", lambda *given: find_annotations(
        *given)._replace(seen=[True, False, True]))     # as a known data set's split
    figures = evaluation.main(arguments(checkpoint, scenes_json, tmp_path))
    assert figures["boxes"]["groups"] == {}     # its novel disc was seen, its ground is not novel
    assert "has seen disc in training: novel in" in capsys.readouterr().out


def test_masks_that_are_none_are_counted(checkpoint, scenes_json, tmp_path,  # noqa: F811
                                         monkeypatch, capsys):
    """Others of the image are scored all the same."""
    monkeypatch.setattr(FViT, "detect", perfect(scenes_json))
    content = json.loads(scenes_json.read_text())
    content["annotations"][0]["segmentation"] = [[5, 5, 60, 60]]
    content["annotations"][1]["segmentation"] = None
    other = scenes_json.with_name("other.json")
    other.write_text(json.dumps(content))
    figures = evaluation.main(arguments(checkpoint, other, tmp_path))
    assert figures["boxes"]["AP"] == pytest.approx(100) and figures["masks"]["AP"] > 50
    assert "2 masks of less than three points (such as" in capsys.readouterr().out


def test_what_is_found_is_scored_by_pycocotools(checkpoint, scenes_json, tmp_path,  # noqa: F811
                                                monkeypatch, capsys):
    monkeypatch.setattr(FViT, "detect", perfect(scenes_json, lambda labels: labels.clamp(min=1)))
    found = tmp_path / "found.json"
    figures = evaluation.main(arguments(checkpoint, scenes_json, tmp_path, detections=found))
    truth = COCO(str(scenes_json))
    reference = COCOeval(truth, truth.loadRes(str(found)), "bbox")
    reference.evaluate(), reference.accumulate(), reference.summarize()
    assert figures["boxes"]["AP"] == pytest.approx(100 * reference.stats[0])


@pytest.mark.parametrize("dataset, preset, expected", [
    ("ovcoco", [], (0.1, 0.8, 45, 0.01, 0.4, 100, False, None, True)),
    ("my.json", [], (0.1, 0.8, 45, 0.01, 0.4, 100, False, None, True)),
    ("ovlvis", [], (0.1, 0.6, 90, 1e-4, 0.5, 300, False, None, True)),
    ("ovlvis", ["@presets/fvit_ovlvis_l14.txt"], (0.1, 0.4, 90, 1e-4, 0.5, 300, False, None, True)),
    ("coco", [], (0.2, 0.2, 120, 1e-4, 0.5, 300, False, 50, False)),
    ("objects365", [], (0.3, 0.3, 120, 1e-4, 0.5, 300, False, 50, False))])
def test_scores_are_those_published_for_a_data_set(dataset, preset, expected):
    cfg = settings.parse(preset, evaluation)
    assert shared.score_rules(cfg, FViT, dataset) == ScoreRules(*expected)


def test_given_scores_replace_those_of_the_data_set():
    cfg = settings.parse(["--a", "0", "--temperature", "120", "--at_boxes"], evaluation)
    expected = ScoreRules(a=0, b=0.6, temperature=120, least=1e-4, nms=0.5, most=300, at_boxes=True)
    assert shared.score_rules(cfg, FViT, "ovlvis") == expected


def test_the_data_set_is_that_of_the_training(checkpoint):
    assert shared.trained_with(str(checkpoint)) == "ovcoco"
    with pytest.raises(SystemExit, match="instances_val2017.json; unpack"):
        evaluation.main(options(ckpt=checkpoint, data="nowhere"))


def test_a_backbone_may_lie_elsewhere(checkpoint, tmp_path):
    moved = checkpoint.with_name("declip.safetensors").rename(tmp_path / "moved.safetensors")
    try:
        fvit = open_fvit(checkpoint, str(moved))
    finally:
        moved.rename(checkpoint.with_name("declip.safetensors"))
    assert fvit.classes == NAMES


@pytest.mark.parametrize("given, words", [
    ({"a": 2}, "A is 2.0; it must be from 0 to 1"), ({"nms": -1}, "NMS is -1.0; it must be"),
    ({"most": 0}, "MOST is 0"), ({"batch_size": 0}, "BATCH_SIZE is 0"),
    ({"precision": "fp8"}, "PRECISION"), ({"dataset": "lvis"}, "There is no data set 'lvis'"),
    ({"novel": "dics"}, "has no category 'dics'; did you mean 'disc'?"),
    ({"images": "nowhere"}, "which is not there"),
    ({"detections": ROOT / "README.md"}, "README.md'; it must be a file that is not there yet"),
    ({"ckpt": "no.safetensors"}, "There is no weights file no"),
    ({"backbone": "no.safetensors"}, "There is no backbone no.safetensors"),
    ({"ckpt": ROOT / "toy/clip/open_clip_model.safetensors"}, "is no detector")])
def test_bad_input_is_one_sentence(checkpoint, scenes_json, tmp_path, given, words):  # noqa: F811
    with pytest.raises(SystemExit) as error:
        evaluation.main(arguments(**{"checkpoint": given.pop("ckpt", checkpoint),
                                     "dataset": given.pop("dataset", scenes_json),
                                     "out": tmp_path} | given))
    found = str(error.value)
    assert found.startswith("eval.py: ") and words in found and "\n" not in found


def test_a_json_of_training_is_not_evaluated_by_default(checkpoint, tmp_path):
    fvit = open_fvit(checkpoint)
    fvit.save(tmp_path / "fvit.safetensors", {"DATASET": "my/train.json"})
    with pytest.raises(SystemExit, match="was trained with my/train.json; say what to evaluate on"):
        evaluation.main(options(ckpt=tmp_path / "fvit.safetensors"))


def test_a_result_takes_no_place_of_the_data_set(checkpoint, scenes_json):  # noqa: F811
    before = scenes_json.read_bytes()
    evaluation.main(arguments(checkpoint, scenes_json, scenes_json.parent))
    assert scenes_json.read_bytes() == before
    assert len(read_results(scenes_json.with_name(f"{scenes_json.stem}.results.json"))) == 1
