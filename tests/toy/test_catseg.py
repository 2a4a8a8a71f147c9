"""toy/catseg.py: unseen classes are never trained, figures are of the right classes, what is there
is not made again."""

import json

import pytest
from conftest import options
from tiny import ROOT

import eval_seg
from downstream.catseg.data import UNSEEN
from model import DeCLIP
from toy import catseg, world
from toy.world import NAMES
from util import settings


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy models are named as seen from the repository."""
    monkeypatch.chdir(ROOT)


def test_figures_are_means_over_their_classes():
    iou = {name: 100.0 if number in UNSEEN else 40.0 for number, name in enumerate(NAMES)}
    assert catseg.means(iou) == {"unseen": 100, "seen": 40, "all": 60}
    assert catseg.means(iou | {NAMES[UNSEEN[0]]: None})["unseen"] == 100


def test_report_is_mean_and_spread(monkeypatch):
    asked = []
    monkeypatch.setattr(catseg, "alone", lambda *_: dict.fromkeys(catseg.FIGURES, 1.0))
    monkeypatch.setattr(catseg, "figures", lambda cfg, arm, seed, benchmark: asked.append(
        (arm, seed, benchmark)) or dict.fromkeys(catseg.FIGURES, 10.0 * seed))
    lines = catseg.report(settings.parse(["--seeds", "1", "2", "3", "--scenes", "dev"], catseg)
                          ).splitlines()
    assert [line.count("20.0 ± 10.0") for line in lines] == [0, 0, 0, 3, 3]
    assert [line[:12] for line in lines[1:]] == ["CLIP alone  ", "DeCLIP alone", "CAT-Seg over",
                                                 "CAT-Seg over"]
    assert asked == [(arm, seed, "toy_dev") for arm in ("clip", "declip") for seed in (1, 2, 3)]


def test_what_is_there_is_not_evaluated_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(catseg.train, "main", lambda argv: made.append(argv))

    def evaluate(argv: list[str]) -> dict:
        made.append("evaluated")
        result = {argv[2]: {"IoU": dict.fromkeys(NAMES, 5.0)}}
        (tmp_path / "clip-4/catseg.json").write_text(json.dumps({"benchmarks": result}))
        return result
    monkeypatch.setattr(catseg.catseg_eval, "main", evaluate)
    cfg = settings.parse(options(out=tmp_path), catseg)
    for benchmark in ("toy_dev", "toy_dev", "toy"):
        assert catseg.figures(cfg, "clip", 4, benchmark)["all"] == 5
    assert made.count("evaluated") == 2 and made[0][-1] == "--resume"


def test_a_run_learns_from_seen_classes_alone(tmp_path, monkeypatch):
    """Both arms, two steps each, beside CLIP and DeCLIP alone, through the scripts themselves."""
    world.main(options(out=tmp_path / "toy", train=0, dev=2, val=0, labelled=4, size=64))
    declip = tmp_path / "declip.safetensors"
    DeCLIP("local-dir:toy/clip", "own").save(declip)
    seen = []
    augment = catseg.train.augment
    monkeypatch.setattr(catseg.train, "augment", lambda sample, *given: seen.extend(
        sample.label.unique().tolist()) or augment(sample, *given))
    monkeypatch.setattr(catseg.train, "DATA", str(tmp_path))
    monkeypatch.setattr(catseg.catseg_eval, "DATA", str(tmp_path))
    monkeypatch.setattr(eval_seg, "DATA", str(tmp_path))
    preset = (ROOT / "presets/catseg_toy.txt").read_text().replace("--iterations 96",
                                                                   "--iterations 2")
    (tmp_path / "catseg_toy.txt").write_text(preset.replace("--image-size 128", "--image-size 32"))
    own = catseg.train.main
    monkeypatch.setattr(catseg.train, "main", lambda argv: own(
        [f"@{tmp_path / 'catseg_toy.txt'}", *argv[1:], "--num_workers", "0"]))
    table = catseg.report(settings.parse(options(
        out=tmp_path / "out", declip=declip, seeds=0, scenes="dev"), catseg))
    assert len(table.splitlines()) == 5 and "nan" not in table
    assert -1 in seen and max(seen) < 12      # the twelve, and void


@pytest.mark.parametrize("given, sentence", [
    ({"scenes": "train"}, "SCENES is 'train'; it must be val or dev")])
def test_refusals(tmp_path, given, sentence):
    with pytest.raises(SystemExit, match=sentence):
        catseg.main(options(out=tmp_path, **given))
