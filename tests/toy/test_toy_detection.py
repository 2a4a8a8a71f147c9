"""toy/detection.py: splits are fixed, its presets are the detector they claim to be, runs are made
once; toy/detection.sh types the same."""

import json
import re
import shlex

import pytest
from conftest import options
from tiny import ROOT

from downstream.detection import find_annotations
from downstream.fvit import eval as evaluation
from downstream.fvit import train
from toy import detection, world
from toy.world import THINGS
from util import settings


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy models are named as seen from the repository."""
    monkeypatch.chdir(ROOT)


def test_splits_are_things_in_their_order():
    assert sum(detection.NOVEL, ()) == THINGS[:9] and {len(each) for each in detection.NOVEL} == {3}


def test_scenes_are_split_by_things(tmp_path):
    """No novel thing is in what a detector is trained with; all ten are evaluated."""
    world.main(options(out=tmp_path / "toy", train=6, dev=1, val=4, size=64))
    cfg = settings.parse(["@presets/toy_fvit_train.txt", *options(
        data=tmp_path, novel="circle, square, triangle")], train)
    seen, everything = (find_annotations(cfg, split) for split in ("train", "val"))
    assert seen.classes == everything.classes == list(THINGS)
    assert seen.seen == [False] * 3 + [True] * 7
    assert {each["category_id"] for each in seen.objects} <= set(range(4, 11))
    assert len(everything.files) == 4


def of(argv: list[str], name: str) -> str:
    """What a command line says of an option."""
    return argv[argv.index(name) + 1]


@pytest.fixture
def made(monkeypatch) -> list:
    """The command lines of trainings and evaluations, which are made up: AP50 is 10 times the
    seed."""
    made = []

    def evaluate(argv: list[str]) -> None:
        made.append(argv)
        folder = detection.Path(of(argv, "--ckpt")).parent
        ap = 10.0 * int(folder.name[-1])
        (folder / f"{of(argv, '--dataset')}.json").write_text(json.dumps({"boxes": {
            "AP50": ap + 2, "groups": {"novel": {"AP50": ap}, "base": {"AP50": ap + 1}}}}))

    monkeypatch.setattr(detection.train, "main", made.append)
    monkeypatch.setattr(detection.evaluation, "main", evaluate)
    return made


def test_report_is_mean_and_spread_of_runs_that_are_made_once(tmp_path, made):
    cfg = settings.parse(options(out=tmp_path), detection)
    table = [detection.report(cfg) for _ in range(2)][1].splitlines()
    assert [line.split()[0] for line in table[1:]] == ["CLIP", "DeCLIP"]
    assert all("10.0 ± 10.0" in line and "11.0 ± 10.0" in line and "12.0 ± 10.0" in line
               for line in table[1:])
    trained = [argv for argv in made if "--seed" in argv]
    assert [of(argv, "--seed") for argv in trained] == ["0", "1", "2"] * 2 and len(made) == 12
    assert [of(argv, "--novel") for argv in trained] == [", ".join(each)
                                                         for each in detection.NOVEL] * 2
    # The dev scenes are other ones, but the detectors are the same.
    cfg.DATASET = "toy_dev"
    detection.report(cfg)
    assert of(made[-1], "--dataset") == "toy_dev" and len(made) == 12 + 6


def test_the_tutorial_types_what_the_table_has(tmp_path, made):
    """toy/detection.sh's commands are those of seed 0, and backbones are all that differs."""
    detection.report(settings.parse(options(out=tmp_path, seeds=0), detection))
    text = (ROOT / "toy/detection.sh").read_text().replace("\\\n", "")
    novel = re.search('novel="(.*)"', text)[1]
    typed = [shlex.split(line.replace("$novel", novel))[3:] for line in text.splitlines()
             if line.startswith("run -m downstream.fvit.train")]
    ours = [argv for argv in made if "--seed" in argv]
    clip, declip = ((vars(settings.parse(words, train)), vars(settings.parse(argv, train)))
                    for words, argv in zip(typed, ours))
    for of_typed, of_ours in (clip, declip):
        assert {name for name in of_typed if of_typed[name] != of_ours[name]} == {"OUT", "RESUME"}
    assert {name for name in clip[0] if clip[0][name] != declip[0][name]} == {
        "BACKBONE", "ATTENTION", "OUT"}
    assert (clip[0]["BACKBONE"], clip[0]["ATTENTION"]) == (None, "clip")
    evaluations = re.findall(r"run -m downstream.fvit.eval (.*)", text)
    assert all(line.startswith("--ckpt out/toy/detection/") for line in evaluations)
    # The data set, and with it the rules of the scores, is that of the training.
    assert settings.parse(made[1], evaluation).DATASET == clip[0]["DATASET"] == "toy"


def test_a_seed_without_a_split_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match="SEEDS has 3; there are splits for 0 to 2."):
        detection.main(options(out=tmp_path, seeds=3))
