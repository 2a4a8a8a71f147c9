"""util/labels.py: label images, and a user's own benchmark, described by a json (docs/data.md)."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import options
from PIL import Image
from test_eval_seg import OF_CHECKPOINT

import eval_seg
from eval_seg import Protocol, find_benchmark
from model import DeCLIP
from util import settings
from util.labels import (
    VOID,
    MissingData,
    SegmentationImages,
    find_data,
    overview,
    read_benchmark,
)

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
    cfg = settings.parse(options(stride=32, benchmarks=own), eval_seg)
    expected = Protocol(96, 2048, 64, 32, 50, 0.3)
    assert eval_seg.find_protocols(cfg) == {str(own): expected}


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
    ({"classes": "/etc/hostname"}, "names /etc/hostname, which is not below FOLDER"),
    ({"classes": "../../c.txt"}, "/c.txt, which is not below FOLDER"),
    ({"folder": "/etc"}, "names /etc, which is not below"),
    ({"image": "../{}.jpg"}, "has 'image'"), ({"label": "/etc/{}.png"}, "has 'label'"),
    ({"names": "a/../../n.txt"}, "has 'names'"), ({"classes": "\ud800"}, "has 'classes'"),
    ({"origin": [[[[[[[1]]]]]]]}, "has 'origin'"), ({"values": [0, 0, 1]}, "has 'values'"),
    ({"values": [1, 2]}, "has 3 classes"),
    ({"label": "no/{}.png"}, "There is no"), ({"values": [3, 4, 1]}, "no class and not void"),
])
def test_a_wrong_file_is_one_sentence_before_a_model_is_loaded(own, change, sentence):
    own.write_text(json.dumps(OWN | change))
    with pytest.raises(SystemExit, match=re.escape(sentence.replace("FOLDER", str(own.parent)))):
        eval_seg.main(options(model="no-model", benchmarks=own))


def test_a_folder_may_hold_it(own, monkeypatch):
    """As benchmark.json: then the folder's name is enough, from where it is or the repository."""
    (own.parent / "sub").mkdir()
    described = OWN | {"folder": "..", "classes": "../my classes.txt"}
    (own.parent / "sub/benchmark.json").write_text(json.dumps(described))
    monkeypatch.chdir(own.parent)
    beside, inside = (SegmentationImages(find_benchmark(name), "data")
                      for name in ("mine.json", "sub"))
    assert beside.names == inside.names
    assert all(torch.equal(one, other) for a, b in zip(beside, inside) for one, other in zip(a, b))
    with pytest.raises(ValueError, match="There is no benchmark 'masks'; choose among voc21"):
        find_benchmark("masks")


def test_it_says_how_to_get_its_files(own):
    """`origin`, for one that is drawn or downloaded by a script."""
    own.write_text(json.dumps(OWN | {"folder": "none", "origin": "draw it by python -m my.scenes"}))
    with pytest.raises(MissingData, match="names no image; draw it by python -m my.scenes, or set"):
        SegmentationImages(read_benchmark(own), "data")


# --------------------------------------------------------------------------------- label images

def test_all_leaves_out_what_is_missing(own):
    """A set that was named must be there; of `all` those at hand are taken, if there are any."""
    def find_set(name: str, folder: str) -> tuple:
        if name == "gone":
            raise MissingData(f"no {name} in {folder}")
        return SegmentationImages(find_benchmark(name), folder), name

    sets, missing = find_data(("all",), ("gone", str(own)), "data", find_set)
    assert list(sets) == [str(own)] and missing == {"gone": "no gone in data"}
    with pytest.raises(MissingData, match="no gone in data"):
        find_data((str(own), "gone"), (), "data", find_set)
    with pytest.raises(ValueError, match=r"None of the benchmarks is .*\.\ngone +no gone in data$"):
        find_data(("all",), ("gone",), "data", find_set)


@pytest.fixture
def mask(own) -> Path:
    """The label file of the first image."""
    return next((own.parent / "masks").glob("été 0*.png"))


def images_of(own: Path, **changes) -> SegmentationImages:
    """The benchmark with some fields changed."""
    own.write_text(json.dumps(OWN | changes))
    return SegmentationImages(find_benchmark(str(own)), "data")


def first_of(own: Path, **changes) -> np.ndarray:
    """The first image's label."""
    return images_of(own, **changes)[0][1].numpy()


@pytest.mark.parametrize("mode", ["RGB", "1", "LA"])
def test_label_images_are_one_number_a_pixel(own, mask, mode):
    Image.open(mask).convert("L").convert(mode).save(mask)
    with pytest.raises(ValueError, match=f"is an image of mode {mode}, but a label image has one"):
        first_of(own)


def test_labels_have_16_bits(own, mask, scenes):
    """More classes than 8 bits have, as PASCAL-Context's 459; the last ones don't wrap around."""
    _, label = scenes[0]
    for values, void in (([0, 256, 65535], [44]), ([5, 261, 300], [])):
        Image.fromarray(np.array(values, np.uint16)[label]).save(mask)
        assert np.array_equal(first_of(own, values=values, void=void), label)
    with pytest.raises(ValueError, match=r"that are no class and not void \(5, 261, 300\)"):
        first_of(own, values=[0, 256, 65535])


def test_palette_images_have_their_numbers(own, mask, scenes):
    """As VOC's are: colours are for people."""
    image = Image.fromarray(scenes[0][1], "L").convert("P")
    image.putpalette([7, 8, 9] * 256)
    image.putdata(scenes[0][1].flatten().tolist())
    image.save(mask)
    assert np.array_equal(first_of(own, values=[0, 1, 2], void=[]), scenes[0][1])


def test_image_and_label_must_be_of_one_size(own, mask):
    Image.fromarray(np.full((3, 4), 3, np.uint16)).save(mask)
    with pytest.raises(ValueError, match=r"is \(3, 4\), but its image .* \(64, 64\); they"):
        first_of(own)


def test_a_label_that_cannot_be_read_is_one_sentence(own, mask):
    mask.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="can't be read as a label image") as error:
        first_of(own)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"a\0b\n", b"x" * 300])
def test_a_list_of_names_is_text(own, content):
    (own.parent / "val.txt").write_bytes(content)
    with pytest.raises(ValueError, match="val.txt is not text in UTF-8 that files can be called"):
        images_of(own, names="val.txt")


def test_names_stay_in_the_folder(own):
    (own.parent / "val.txt").write_text("../../secret\n")
    with pytest.raises(ValueError, match="which is not below"):
        images_of(own, names="val.txt")


@pytest.mark.parametrize("image", ["./my photos/{}.jpg", "my photos//{}.jpg"])
def test_paths_are_taken_as_they_are_meant(own, image):
    assert images_of(own).names == images_of(own, image=image).names


def test_a_label_that_is_no_file_does_not_hang(own):
    images = images_of(own)
    path = images.root / images.benchmark.label.format(images.names[0])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="it is no regular file"):
        images[0]


def test_a_label_that_would_fill_the_memory_is_refused(own, monkeypatch):
    monkeypatch.setattr("util.labels.MAX_DECODED", 100)
    with pytest.raises(ValueError, match="at most 100 pixels are decoded"):
        images_of(own)[0]
