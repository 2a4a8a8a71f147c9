"""A user's own benchmark, described by a json file (docs/data.md)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import options
from PIL import Image
from test_eval_seg import OF_CHECKPOINT

import eval_seg
from eval_seg import VOID, SegmentationImages, find_benchmark
from model import DeCLIP
from util.labels import overview

OWN = {"image": "my photos/{}.jpg", "label": "masks/{}.png", "classes": "my classes.txt",
       "values": [3, 300, 1], "void": [0]}


@pytest.fixture
def own(tmp_path, scenes) -> Path:
    """Scenes in a folder of odd names, described by a file beside them."""
    for folder in ("my photos", "masks"):
        (tmp_path / folder).mkdir()
    for index, (image, label) in enumerate(scenes):
        Image.fromarray(image).save(tmp_path / f"my photos/été {index} {{}}.jpg")
        values = np.array([3, 300, 1], np.uint16)[label]
        values[0] = 0
        Image.fromarray(values).save(tmp_path / f"masks/été {index} {{}}.png")
    (tmp_path / "my classes.txt").write_text("ground\nred disc, ball\nbox\n")
    (tmp_path / "mine.json").write_text(json.dumps(OWN))
    return tmp_path / "mine.json"


def test_an_own_benchmark_needs_no_code(own, tmp_path, monkeypatch, capsys):
    """From any folder, alone or beside a known set; it does not enter the mean of the paper's."""
    (tmp_path / "declip").mkdir()
    DeCLIP("tiny-eva").save(tmp_path / "declip/declip.safetensors")
    monkeypatch.chdir(tmp_path / "masks")
    result = eval_seg.main(options(**OF_CHECKPOINT, ckpt="../declip/declip.safetensors",
                                   benchmarks="../mine.json"))
    assert list(result) == ["../mine.json"]
    assert list(result["../mine.json"]["IoU"]) == ["ground", "red disc", "box"]
    both = result | {"voc20": result["../mine.json"]}
    assert "mean" not in overview(both, {}, eval_seg.PAPER_BENCHMARKS)


def test_its_labels_are_as_described(own, scenes):
    dataset = SegmentationImages(find_benchmark(str(own)), "data")
    assert len(dataset) == len(scenes)
    for (_, found), (_, label) in zip(dataset, scenes):
        assert (found[0] == VOID).all() and torch.equal(found[1:], torch.from_numpy(label)[1:])


def test_its_protocol_is_used(own):
    own.write_text(json.dumps(OWN | {"threshold": 0.3, "logit_scale": 50,
                                     "protocol": {"window": 64, "short_side": 96}}))
    cfg = eval_seg.settings.parse(options(stride=32), eval_seg)
    rules = find_benchmark(str(own)).rules(cfg)
    assert (rules.THRESHOLD, rules.LOGIT_SCALE, rules.WINDOW, rules.SHORT_SIDE, rules.STRIDE) == (
        0.3, 50, 64, 96, 32)


def test_what_is_not_said_has_a_default(own):
    """All images of the folder, and label values from 0 in the order of the class file."""
    own.write_text(json.dumps({key: OWN[key] for key in ("image", "label", "classes")}))
    benchmark = find_benchmark(str(own))
    assert (benchmark.names, list(benchmark.values), benchmark.threshold) == ("*", [0, 1, 2], None)
    listed = json.dumps(OWN | {"names": "names.txt", "classes": "toy.txt", "values": [*range(18)]})
    own.write_text(listed)      # a list of names, and a class file of the repository
    own.with_name("names.txt").write_text("été 1 {}\n\n  été 0 {}\n")
    dataset = SegmentationImages(find_benchmark(str(own)), "data")
    assert dataset.names == ["été 1 {}", "été 0 {}"]


@pytest.mark.parametrize("change, sentence", [
    ({"image": "photos/*.jpg"}, "has 'image'"), ({"image": "{}/{}.jpg"}, "has 'image'"),
    ({"label": "{a}.png"}, "has 'label'"), ({"values": [1, "x"]}, "has 'values'"),
    ({"void": [-1]}, "has 'void'"), ({"threshold": "0.4"}, "has 'threshold'"),
    ({"protocol": {"windows": 3}}, "has 'protocol'"), ({"mean": 3}, "has 'mean'"),
    ({"protocol": {"stride": 0}}, "STRIDE is 0"), ({"threshold": 4}, "THRESHOLD is 4"),
    ({"classes": "no.txt"}, "There is no class file FOLDER/no.txt"),
    ({"values": [1, 2]}, "has 3 classes"),
    ({"label": "no/{}.png"}, "There is no"), ({"values": [3, 4, 1]}, "no class and not void"),
])
def test_a_wrong_file_is_one_sentence_before_a_model_is_loaded(own, change, sentence):
    own.write_text(json.dumps(OWN | change))
    with pytest.raises(SystemExit, match=re.escape(sentence.replace("FOLDER", str(own.parent)))):
        eval_seg.main(options(model="no-model", benchmarks=own))
