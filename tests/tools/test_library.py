"""tools/library.py and hubconf.py: one call on a photograph, in programs with a data.py of their
own."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import succeeds
from PIL import Image
from tiny import ROOT

from data import make_classes, read_image
from downstream.catseg import eval as catseg_eval
from downstream.catseg.model import CATSeg, Design
from downstream.fvit.model import Design as FViTDesign
from downstream.fvit.model import FViT
from eval_seg import Protocol, predict
from model import DeCLIP
from tools import library
from toy.world import NAMES, draw_scene
from util import UserError

TOY = {"name": f"local-dir:{ROOT / 'toy/clip'}", "pretrained": "own"}
ONE = "a photo of a {}."


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy CLIP's tokenizer is named as seen from the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def clip():
    return library.declip(**TOY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A photograph that is stored on its side, and a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("library")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(draw_scene(1, 128).image[:, :96]).save(folder / "photo.png", exif=exif)
    clip = DeCLIP(TOY["name"], "own", context="qk")
    clip.save(folder / "declip.safetensors")
    design = FViTDesign(image_size=64, channels=16, candidates=100, proposals=20, templates="{}")
    FViT(clip, ["star", "dots"], [True, True], design).save(
        folder / "fvit.safetensors", {"BACKBONE": str(folder / "declip.safetensors"),
                                      "DATASET": "ovlvis"})
    CATSeg(DeCLIP(TOY["name"], "own"), Design(32, width=16)).save(folder / "catseg.safetensors")
    return folder


def test_segment_is_what_the_evaluation_computes(clip, folder):
    """The paper's windows and templates; a class has the score of its best synonym."""
    photo, names = folder / "photo.png", ["star", "dots, spots", "noise"]
    image = read_image(photo, upright=True)
    classes = make_classes(names)
    text = clip.encode_text(classes.prompts, [ONE])
    expected, = predict(Protocol().fit(clip), clip, classes, text, [image])
    found, scores = clip.segment(photo, names, ONE)
    assert found.shape == image.shape[1:] == (96, 128) and scores.shape == (3, 96, 128)
    assert torch.equal(found, expected) and torch.equal(scores.argmax(dim=0), found)
    assert -1 <= scores.min() < scores.max() <= 1
    assert torch.equal(clip.segment(photo, "star, dots | spots, noise", ONE).classes, found)
    alone = clip.segment(photo, names, ONE, with_scores=False)
    assert torch.equal(alone.classes, found) and alone.scores is None


def test_its_options_are_those_of_the_protocol(clip, folder):
    photo, names = folder / "photo.png", ["background", *NAMES]
    plain = clip.segment(photo, names, ONE, attention="clip", short_side=64, pamr=2)
    own = clip.segment(photo, names, ONE, short_side=64)
    assert (plain.classes != own.classes).any()
    unsure = clip.segment(photo, names, ONE, short_side=64, threshold=0.99, logit_scale=1).classes
    assert (unsure == 0).all()
    with pytest.raises(UserError, match="STRIDE is 900; it must be from 1 to WINDOW"):
        clip.segment(photo, names, ONE, window=64, stride=900)


@pytest.mark.parametrize("form", ["path", "text", "PIL", "tensor"])
def test_a_photograph_in_any_form(clip, folder, form):
    """Upright in all of them, as its EXIF entry says; the caller's own image is left as it is."""
    path, size = folder / "photo.png", None
    with Image.open(path) as image:
        image.load()
        size = image.size
        photo = {"path": path, "text": str(path), "PIL": image,
                 "tensor": read_image(path, upright=True)}[form]
        found = clip.segment(photo, ["star", "noise"], ONE).classes
        assert image.size == size
    assert torch.equal(found, clip.segment(path, ["star", "noise"], ONE).classes)


@pytest.mark.parametrize("photo, names, words", [
    ("none.png", ["star"], "none.png can't be read as an image"),
    (torch.zeros(3, 8, 8), ["star"], "Tensor of .3, 8, 8. torch.float32; give a path, a PIL"),
    (torch.zeros(8, 8, 3, dtype=torch.uint8), ["star"], "give a path, a PIL image, or a uint8"),
    (torch.zeros(3, 0, 8, dtype=torch.uint8), ["star"], "give a path, a PIL image, or a uint8"),
    (np.zeros((8, 8, 3), np.uint8), ["star"], "is a ndarray"),
    (None, ["star"], "is a NoneType of None"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), [], "names no class"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), "", "names no class"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), ["star", " "], "names have ' ' among them"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), ["star", 3], "names have 3 among them"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), ["star", "dots, Star"], "'star' twice")])
def test_bad_input_is_one_sentence(clip, photo, names, words):
    with pytest.raises(UserError, match=words) as error:
        clip.segment(photo, names, ONE)
    assert "\n" not in str(error.value)


def test_names_are_encoded_once_for_many_photographs(clip, folder, monkeypatch):
    calls, encode = [], DeCLIP.encode_text
    monkeypatch.setattr(DeCLIP, "encode_text",
                        lambda *given: calls.append(given[1]) or encode(*given))
    for names in (["waves"], ["waves"], ["star"]):
        clip.segment(folder / "photo.png", names, ONE)
    assert calls == [["waves"], ["star"]]


def test_results_can_be_computed_with(clip, folder):
    """They are no inference tensors, which autograd refuses; opening leaves random numbers alone.
    """
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    own = library.declip(**TOY | {"pretrained": None})
    assert torch.rand(1) == expected and own.context == "q"
    weight = torch.ones((), requires_grad=True)
    scores = clip.segment(folder / "photo.png", ["star", "noise"], ONE).scores
    (weight * scores).sum().backward()
    assert weight.grad == scores.sum()


def test_a_checkpoint_says_what_it_is(folder):
    clip = library.declip(str(folder / "declip.safetensors"))
    assert clip.context == "qk" and isinstance(clip, DeCLIP)
    torch.save(clip.state(), folder / "published.pt")
    with pytest.raises(UserError, match="does not say which model and attention"):
        library.declip(folder / "published.pt", **TOY)
    assert library.declip(folder / "published.pt", **TOY, context="k", scale=1).context == "k"


def test_a_detector_in_one_call(folder):
    """Boxes in pixels of the upright photograph; names are set once, and are those of the file at
    first; scores by the rules of its data set."""
    detector = library.detector(folder / "fvit.safetensors")
    assert detector.rules == FViT.RULES["ovlvis"]
    photo = folder / "photo.png"
    found = detector.detect(photo, least=0.0)
    assert len(found.boxes) == len(found.scores) == len(found.names) > 0
    assert {*found.names} <= {"star", "dots"} and (found.boxes[:, 2:].amax(0) <= torch.tensor(
        [128, 96])).all()
    found = detector.detect(photo, ["waves"], least=0.0, most=3)
    assert found.names == ["waves"] * 3 and not detector.model.seen[0]
    text = detector.model.text
    detector.detect(photo, ["waves"])
    assert detector.model.text is text
    assert not len(detector.detect(photo, least=1.0).boxes)


def test_a_detector_finds_what_is_asked_now(folder):
    """Also if the caller's own list has grown, or if its model was given other names meanwhile."""
    detector, names = library.detector(folder / "fvit.safetensors"), ["waves"]
    photo = folder / "photo.png"
    detector.detect(photo, names)
    names.append("ring")
    detector.detect(photo, names)
    assert detector.model.classes == ["waves", "ring"]
    detector.model.set_classes(["noise"])
    detector.detect(photo, names)
    assert detector.model.classes == ["waves", "ring"]


@pytest.mark.parametrize("given, words", [
    ({"names": ["star, dots"]}, "one name a class; leave the synonyms out"),
    ({"least": 30}, "LEAST is 30; it must be from 0 to 1"), ({"nms": -7}, "NMS is -7"),
    ({"nsm": 0.5}, "There is no rule 'nsm'; choose among a, b, temperature")])
def test_a_detector_refuses_what_it_can_not_do(folder, given, words):
    with pytest.raises(UserError, match=words):
        library.detector(folder / "fvit.safetensors").detect(folder / "photo.png", **given)


def test_other_weights_are_other_names(folder):
    """Kept embeddings are of the weights that the model has now."""
    clip, photo = library.declip(**TOY), folder / "photo.png"
    before = clip.segment(photo, ["star", "noise"], ONE).scores
    clip.text.load_state_dict({name: value + 0.1 * value.std() if value.ndim else value
                               for name, value in clip.text.state_dict().items()})
    assert (clip.segment(photo, ["star", "noise"], ONE).scores != before).any()


def test_too_large_a_photograph_is_not_decoded(clip, monkeypatch):
    monkeypatch.setattr("util.images.MAX_DECODED", 100)
    photo = Image.new("RGB", (20, 20))
    monkeypatch.setattr(Image.Image, "copy", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match="it is 20 x 20, and at most 100 pixels are decoded"):
        clip.segment(photo, ["star"], ONE)


def test_a_segmenter_in_one_call(folder):
    segmenter = library.segmenter(folder / "catseg.safetensors")
    photo, names = folder / "photo.png", ["star", "dots, spots", "noise"]
    classes = make_classes(names)
    expected, = catseg_eval.predict(
        catseg_eval.Protocol.of(segmenter.model), segmenter.model, classes,
        catseg_eval.encode(segmenter.model, classes), [read_image(photo, upright=True)])
    found, scores = segmenter.segment(photo, names)
    assert torch.equal(found, expected) and scores.shape == (3, 96, 128)
    assert 0 <= scores.min() and scores.max() <= 1
    assert torch.equal(segmenter.segment(photo, names, with_scores=False).classes, found)
    whole = segmenter.segment(photo, names, size=32).scores
    assert (whole != scores).any()


# A program of somebody else's, whose modules have the names of ours.
PROGRAM = """
import sys
import torch
import data, model
from util import helpers

def load(entry, **given):
    return torch.hub.load({root!r}, entry, source="local", **given)

clip = load("declip", ckpt="declip.safetensors")
assert clip.context == "qk"
classes, scores = clip.segment("photo.png", ["star", "dots"], {one!r})
print(*classes.shape, *scores.shape)
found = load("detector", ckpt="fvit.safetensors", backbone=clip).detect("photo.png", least=0)
print({{*found.names}} <= {{"star", "dots"}})
print(*load("segmenter", ckpt="catseg.safetensors").segment("photo.png", ["star"]).classes.shape)
assert (sys.modules["data"], sys.modules["model"]) == (data, model)
# Ours are not in the way of theirs, not even of those that they import later.
import train
from util import more
assert (data.whose, model.whose, helpers.whose, train.whose, more.whose) == ("theirs",) * 5
assert load("declip", ckpt="declip.safetensors").__class__ is clip.__class__
"""


def test_programs_with_a_data_py_of_their_own(folder, tmp_path, monkeypatch):
    """torch.hub.load in a real process, beside modules called data, model, util and train."""
    for name in ("photo.png", "declip.safetensors", "fvit.safetensors", "catseg.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "util").mkdir()
    for name in ("data", "model", "train", "util/__init__", "util/helpers", "util/more"):
        (tmp_path / f"{name}.py").write_text("whose = 'theirs'\n")
    (tmp_path / "main.py").write_text(PROGRAM.format(root=str(ROOT), one=ONE))
    done = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True)
    assert succeeds(done).splitlines()[-3:] == ["96 128 2 96 128", "True", "96 128"]


def test_hubconf_is_short():
    assert len((ROOT / "hubconf.py").read_text().splitlines()) <= 40
