"""toy/world.py: scenes and their labels agree, in both layouts."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import options
from PIL import Image
from tiny import ROOT

from data import read_classes
from downstream.catseg import train as catseg_train
from downstream.detection import find_annotations
from downstream.fvit import eval as fvit_eval
from downstream.fvit import train as fvit_train
from eval_region import PanopticRegions
from eval_seg import find_benchmark
from toy import world
from toy.world import FIRST_SCENE, MAX_SCENES, NAMES, STUFF, THINGS, draw_scene
from util import settings
from util.labels import SegmentationImages


def test_a_scene_is_its_number():
    first, again, other = draw_scene(3, 64), draw_scene(3, 64), draw_scene(4, 64)
    assert np.array_equal(first.image, again.image) and first.classes == again.classes
    assert not np.array_equal(first.image, other.image)


def test_every_region_is_seen():
    for number in range(40):
        scene = draw_scene(number, 96)
        assert scene.image.shape == (96, 96, 3) and scene.regions.shape == (96, 96)
        seen = np.bincount(scene.regions.ravel())
        assert len(seen) == len(scene.classes) and seen.min() > 0.006 * 96**2
        stuff = [kind for kind in scene.classes if kind >= len(THINGS)]
        assert 1 <= len(stuff) <= 3 and len(set(stuff)) == len(stuff)
        assert scene.classes[:len(stuff)] == stuff and 1 <= len(scene.classes) - len(stuff) <= 5


def test_a_thing_has_the_hue_of_its_class():
    """Pixels inside a thing of class k are near hue 36° k, so a wrong label would be seen."""
    distances = []
    for number in range(30):
        scene = draw_scene(number, 96)
        for region, kind in enumerate(scene.classes):
            if kind < len(THINGS):
                pixels = scene.image[scene.regions == region]
                hue = np.asarray(Image.fromarray(pixels[None]).convert("HSV"))[0, :, 0] / 256
                away = (np.median(hue) - kind / len(THINGS) + 0.5) % 1 - 0.5
                distances.append(abs(away) * 360)
    assert np.mean(distances) < 30


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A small data set of scenes as `python -m toy.world` draws it."""
    folder = tmp_path_factory.mktemp("data")
    world.main(options(out=folder / "toy", train=3, dev=2, val=6, size=64))
    return folder


def label_images(drawn: Path, file: str, kind: str) -> SegmentationImages:
    """Scenes as a json of toy/ describes them, in another folder."""
    benchmark = find_benchmark(str(ROOT / "toy" / file))
    assert Path(os.path.normpath(benchmark.folder)) == ROOT / "data/toy" / kind
    return SegmentationImages(replace(benchmark, folder=f"toy/{kind}"), drawn)


def test_both_layouts_say_the_same(drawn):
    """The panoptic regions that eval_region.py reads and the labels that eval_seg.py reads,
    against the scene itself."""
    root = drawn / "toy" / "val"
    regions = PanopticRegions(root / "panoptic.json", root / "panoptic", root / "images")
    pixels = label_images(drawn, "benchmark.json", "val")
    assert len(regions) == len(pixels) == 6
    assert regions.names == read_classes("classes/toy.txt").names == list(NAMES)
    assert regions.is_thing == [True] * len(THINGS) + [False] * len(STUFF)
    for index, (region, (image, label)) in enumerate(zip(regions, pixels)):
        scene = draw_scene(FIRST_SCENE["val"] + index, 64)
        drawn_image = torch.from_numpy(scene.image).permute(2, 0, 1)
        assert torch.equal(image, drawn_image) and torch.equal(image, region.image)
        drawn_label = torch.tensor(scene.classes)[torch.from_numpy(scene.regions).long()]
        assert torch.equal(label, drawn_label.byte())
        assert torch.equal(label, region.labels[region.region_ids.long()].byte())
        for place, (x0, y0, x1, y1) in enumerate(region.boxes.int().tolist()):
            inside = region.region_ids[y0:y1, x0:x1] == place
            assert inside.sum() == (region.region_ids == place).sum()
            assert all(line.any() for line in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_sets_have_scenes_of_their_own(drawn):
    assert len(label_images(drawn, "dev.json", "dev")) == 2
    files = [*(drawn / "toy" / "train").glob("*.png"), *(drawn / "toy").glob("*/images/*.png")]
    assert len(files) == 3 + 2 + 6 and len({file.read_bytes() for file in files}) == len(files)
    # The two CLIPs learn from the same scenes, so that they can be compared.
    assert FIRST_SCENE["siglip"] == FIRST_SCENE["clip"]
    starts = sorted(set(FIRST_SCENE.values()))
    assert len(starts) == len(FIRST_SCENE) - 1
    assert all(later - start >= MAX_SCENES for start, later in zip(starts, starts[1:]))


def test_drawing_again_leaves_no_old_scenes(drawn, tmp_path):
    world.main(options(out=tmp_path, train=3, dev=2, val=1, size=64))
    world.main(options(out=tmp_path, train=2, dev=0, val=1, size=32))
    sizes = [Image.open(path).size for path in sorted((tmp_path / "train").glob("*.png"))]
    # dev=0 keeps the dev scenes.
    assert sizes == [(32, 32)] * 2 and len(list((tmp_path / "dev" / "images").iterdir())) == 2


@pytest.mark.parametrize("given, words", [({"val": MAX_SCENES + 1}, "VAL is 10000001"),
                                          ({"size": 3}, "SIZE is 3")])
def test_bad_settings_are_one_sentence(tmp_path, given, words):
    with pytest.raises(SystemExit, match=words):
        world.main(options(**{"out": tmp_path} | given))


# ----------------------------------------------------------------- what trainings see of the scenes

def test_scenes_are_split_by_things(toy_home):
    """No novel thing is in what a detector is trained with; all ten are evaluated."""
    world.main(options(train=6, dev=1, val=4, size=64))
    given = options(novel="circle, square, triangle")
    found = []
    for preset, script, split in (("toy_fvit_train.txt", fvit_train, "train"),
                                  ("toy_fvit_eval.txt", fvit_eval, "val")):
        cfg = settings.parse([f"@presets/{preset}", *given], script)
        found.append(find_annotations(cfg.DATASET, split, images=cfg.IMAGES, novel=cfg.NOVEL))
    seen, everything = found
    assert seen.classes == everything.classes == list(THINGS)
    assert seen.seen == [False] * 3 + [True] * 7
    assert {thing["category_id"] for thing in seen.objects} <= set(range(4, 11))
    assert len(everything.files) == 4


def test_scenes_are_labelled_with_classes_that_are_seen():
    """Two of each three, the others are void."""
    content = json.loads((ROOT / "toy/labelled.json").read_text())
    assert content["void"] == [number for number in range(18) if number % 3 == 2]
    assert sorted(content["values"] + content["void"]) == [*range(len(NAMES))]


def test_a_segmenter_learns_from_seen_classes_alone(toy_home, monkeypatch):
    """Two steps of the training itself."""
    world.main(options(train=0, dev=0, val=0, labelled=4, size=64))
    labels, augment = [], catseg_train.augment
    monkeypatch.setattr(catseg_train, "augment", lambda sample, *rest: labels.extend(
        sample.label.unique().tolist()) or augment(sample, *rest))
    catseg_train.main(["@presets/catseg_toy.txt", *options(
        model="local-dir:toy/clip", pretrained="own", attention="catseg", iterations=2,
        image_size=32, num_workers=0)])
    assert -1 in labels and 0 <= max(labels) < 12       # the twelve, and void
