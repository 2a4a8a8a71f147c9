"""toy/tables.py: rows, splits and classes are what they are called, and runs are made once;
toy/detection.sh types the same."""

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import options
from tiny import ROOT

from downstream.detection import find_annotations
from downstream.fvit import eval as fvit_eval
from model import DeCLIP
from toy import tables, world
from toy.world import NAMES, SEEN, THINGS, UNSEEN
from util import settings
from util.weights import write_checkpoint


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy models are named as seen from the repository."""
    monkeypatch.chdir(ROOT)


def of(argv: list[str], name: str) -> str:
    """What a command line says of an option."""
    return argv[argv.index(name) + 1]


def table(name: str, **settings_of_it) -> str:
    """The table that `python -m toy.tables NAME` prints."""
    return tables.run(settings.parse([name, *options(**settings_of_it)], tables, "TABLE"))


@pytest.fixture
def made(monkeypatch) -> list[list[str]]:
    """The command lines of the scripts, which do nothing; figures are 10 times the seed."""
    made = []

    def seed_of(argv: list[str]) -> float:
        made.append(argv)
        return 10.0 * int(Path(of(argv, "--ckpt")).parent.name[-1])

    def regions(argv: list[str]) -> dict:
        names = ("box thing", "box stuff", "mask thing", "mask stuff")
        return {"128": {"mAcc": dict.fromkeys(names, {"top1": seed_of(argv)})}}

    def pixels(argv: list[str]) -> dict:
        value = seed_of(argv) if "--ckpt" in argv and "--out" not in argv else 1.0
        return {of(argv, "--benchmarks"): {"mIoU": value, "IoU": dict.fromkeys(NAMES, value)}}

    def boxes(argv: list[str]) -> dict:
        ap = seed_of(argv)
        groups = {"novel": {"AP50": ap}, "base": {"AP50": ap}}
        return {"boxes": {"AP50": ap, "groups": groups}}

    monkeypatch.setattr(tables, "training_seconds", lambda folder: None)
    for script in (tables.train, tables.fvit_train, tables.ov_dquo_train, tables.catseg_train,
                   tables.ov_dquo_unknown):
        monkeypatch.setattr(script, "main", made.append)
    for script, evaluate in ((tables.eval_region, regions), (tables.eval_seg, pixels),
                             (tables.catseg_eval, pixels), (tables.fvit_eval, boxes),
                             (tables.ov_dquo_eval, boxes)):
        monkeypatch.setattr(script, "main", evaluate)
    return made


def trainings(made: list[list[str]]) -> list[list[str]]:
    return [argv for argv in made if "--seed" in argv]


@pytest.mark.parametrize("name, rows, columns", [
    ("table1", 4, "box thing, box stuff, mask thing, mask stuff, mIoU, windows, PAMR, seconds"),
    ("siglip", 4, "box thing, box stuff, mask thing, mask stuff, mIoU, windows, PAMR, seconds"),
    ("detection", 2, "novel, base, all"), ("ov_dquo", 4, "novel, base, all"),
    ("catseg", 2, "unseen, seen, all")])
def test_a_table_is_mean_and_deviation_of_runs_that_are_made_once(tmp_path, made, name, rows,
                                                                 columns):
    first, *lines = table(name, out=tmp_path).splitlines()
    assert re.split("  +", first.removesuffix(columns).strip())[0].startswith("val scenes, ")
    assert re.split("  +", first)[1:] == columns.split(", ")
    figures = len(columns.split(", ")) - columns.count("seconds")
    assert [line.count("  10.0 ± 10.0") for line in lines[-rows:]] == [figures] * rows
    seeds = [of(argv, "--seed") for argv in trainings(made)]
    assert seeds == ["0", "1", "2"] * rows
    assert all(argv[-1] == "--resume" for argv in trainings(made))
    folders = {of(argv, "--out") for argv in trainings(made)}
    assert len(folders) == 3 * rows
    # Nothing that was trained is trained or evaluated again, but for other scenes.
    made.clear()
    assert table(name, out=tmp_path).splitlines()[0] == first
    assert not [argv for argv in made if "--out" not in argv]
    table(name, out=tmp_path, scenes="dev")
    evaluated = [argv for argv in made if "--out" not in argv]
    assert not trainings(made) and len(evaluated) == 3 * rows * (2 if "thing" in columns else 1)
    assert all("dev" in " ".join(argv) for argv in evaluated)


# ------------------------------------------------------------------------------------- Table 1

def test_seconds_are_those_of_all_steps(tmp_path):
    """By a log whose run went on twice; a blank if its end is not there."""
    lines = [{"step": step, "lr": 0.1, "loss": 1.0, "images_per_second": rate}
             for step, rate in ((1, 2.0), (4, 8.0), (6, 4.0))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_checkpoint(tmp_path / "declip.safetensors", {}, {
        "model": "x", "context": "q", "scale": None, "settings": {"BATCH_SIZE": 4, "step": 6}})
    assert tables.training_seconds(tmp_path) == 1 * 4 / 2 + 3 * 4 / 8 + 2 * 4 / 4
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines[:2])))
    assert tables.training_seconds(tmp_path) is None
    lines = tables.layout("%", {"a": [{"seconds": None, "mIoU": 1.0}],
                                "b": [{"seconds": 2.0, "mIoU": 1.0}]}).splitlines()
    assert [line.split() for line in lines[1:]] == [["a", "1.0"], ["b", "2.0", "1.0"]]
    assert lines[1].index("1.0") == lines[2].index("1.0")       # in its column


def test_rows_of_table_1_are_what_they_are_called():
    def of_rows(name: str) -> list[tuple]:
        table = tables.TABLES[name]
        found = [settings.parse([*table.options, *row], tables.train)
                 for row in table.rows.values()]
        return [(cfg.MODEL.split("/")[-1], cfg.CONTEXT, cfg.LAMBDA > 0) for cfg in found]

    rows = [("clip", False), ("clip", True), ("q", True), ("values", True)]
    assert of_rows("table1") == [("clip", *row) for row in rows]
    assert of_rows("siglip") == [("siglip", *row) for row in [*rows[:3], ("maskclip", True)]]


def test_another_setting_is_another_run(tmp_path, made):
    """As if a preset had been edited."""
    cfg = settings.parse(["table1", *options(out=tmp_path)], tables, "TABLE")
    for rate in ("0.1", "0.2", "0.1"):
        tables.figures(cfg, tables.TABLES["table1"], "self + VFM", 4, ["--lr", rate])
    assert [Path(of(argv, "--out")).name for argv in trainings(made)] == [
        "clip-lambda-0.01-lr-0.1-seed-4", "clip-lambda-0.01-lr-0.2-seed-4"]


def test_search_marks_the_best_of_each_row(monkeypatch):
    """Self-distillation has no λ, so it is tried once for each learning rate."""
    def figures(cfg, table, row, seed, more):
        assert cfg.SCENES == "dev" and seed == 0
        return {"mIoU": 50.0 + (more[1] == "0.001") + (more[-1] == "0.25"), "box": 50.0}
    monkeypatch.setattr(tables, "figures", figures)
    lines = table("table1", lrs=(0.0003, 0.001), lambdas=(0.05, 0.25), search=True).splitlines()
    assert len(lines) == 1 + 2 + 4 + 4 + 4
    best = [line.split() for line in lines if line.endswith("best")]
    assert [line[-6:-4] for line in best] == [["0.001", "-"], *[["0.001", "0.25"]] * 3]
    assert [line[-2] for line in best] == ["50.5", "51.0", "51.0", "51.0"]


# ----------------------------------------------------------------------------------- detection

def test_splits_are_things_in_their_order(tmp_path, made):
    assert sum(tables.NOVEL, ()) == THINGS[:9] and {len(names) for names in tables.NOVEL} == {3}
    table("detection", out=tmp_path)
    assert [of(argv, "--novel") for argv in trainings(made)] == [
        ", ".join(names) for names in tables.NOVEL] * 2


def test_scenes_are_split_by_things(toy_home):
    """No novel thing is in what a detector is trained with; all ten are evaluated."""
    world.main(options(train=6, dev=1, val=4, size=64))
    given = options(novel="circle, square, triangle")
    found = []
    for preset, script, split in (("toy_fvit_train.txt", tables.fvit_train, "train"),
                                  ("toy_fvit_eval.txt", fvit_eval, "val")):
        cfg = settings.parse([f"@presets/{preset}", *given], script)
        found.append(find_annotations(cfg.DATASET, split, images=cfg.IMAGES, novel=cfg.NOVEL))
    seen, everything = found
    assert seen.classes == everything.classes == list(THINGS)
    assert seen.seen == [False] * 3 + [True] * 7
    assert {thing["category_id"] for thing in seen.objects} <= set(range(4, 11))
    assert len(everything.files) == 4


def test_the_tutorial_types_what_the_table_has(tmp_path, made):
    """toy/detection.sh's commands are those of seed 0, and backbones are all that differs."""
    table("detection", out=tmp_path, seeds=0)
    text = (ROOT / "toy/detection.sh").read_text().replace("\\\n", "")
    novel = re.search('novel="(.*)"', text)[1]
    typed, evaluations = ([shlex.split(line.replace("$novel", novel))[3:]
                           for line in text.splitlines()
                           if line.startswith(f"run -m downstream.fvit.{script}")]
                          for script in ("train", "eval"))
    clip, declip = ((vars(settings.parse(words, tables.fvit_train)),
                     vars(settings.parse(argv, tables.fvit_train)))
                    for words, argv in zip(typed, trainings(made)))
    for of_typed, of_ours in (clip, declip):
        assert {name for name in of_typed if of_typed[name] != of_ours[name]} == {"OUT", "RESUME"}
    assert {name for name in clip[0] if clip[0][name] != declip[0][name]} == {
        "BACKBONE", "ATTENTION", "OUT"}
    assert (clip[0]["BACKBONE"], clip[0]["ATTENTION"]) == (None, "clip")
    ours = [argv for argv in made if "--ckpt" in argv]
    assert len(ours) == len(evaluations) == 2
    for words, argv in zip(evaluations, ours):
        assert of(words, "--ckpt").startswith("out/toy/detection/")
        of_typed, of_ours = (vars(settings.parse(line, fvit_eval)) for line in (words, argv))
        assert {name for name in of_typed if of_typed[name] != of_ours[name]} == {"CKPT"}


def test_unknown_objects_are_found_without_any(tmp_path, made):
    """By the run over DeCLIP, for both backbones; toy/ov_dquo.sh types the same trainings."""
    table("ov_dquo", out=tmp_path, seeds=0)
    (finding,) = {tuple(argv) for argv in made if "@presets/toy_unknown.txt" in argv}
    assert of(finding, "--ckpt") == str(tmp_path / "declip-0/ov_dquo.safetensors")
    names = [Path(of(argv, "--out")).name for argv in trainings(made)]
    assert names == ["declip-0", "clip-0", "declip+unknown-0", "clip+unknown-0"]
    for argv in trainings(made):
        unknown = of(argv, "--unknown") if "--unknown" in argv else None
        assert unknown == (
            of(finding, "--out") if "+unknown" in of(argv, "--out") else None)
    text = (ROOT / "toy/ov_dquo.sh").read_text().replace("\\\n", "")
    variables = {"novel": re.search('novel="(.*?)"', text)[1], "out": "out/toy/ov_dquo"}
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    typed = [shlex.split(line)[3:] for line in text.splitlines() if "ov_dquo.train @" in line]
    of_typed, of_ours = ({Path(of(argv, "--out")).name: vars(settings.parse(
        argv, tables.ov_dquo_train)) for argv in lines} for lines in (typed, trainings(made)))
    assert of_typed.keys() == of_ours.keys()
    for name, given in of_typed.items():
        assert {key for key in given if given[key] != of_ours[name][key]} <= {
            "OUT", "RESUME", "UNKNOWN"}


# ---------------------------------------------------------------------------- trained segmentation

def test_figures_are_means_over_their_classes():
    iou = {name: 100.0 if number in UNSEEN else 40.0 for number, name in enumerate(NAMES)}
    assert tables.mean_iou(iou) == {"unseen": 100, "seen": 40, "all": 60}
    assert tables.mean_iou(iou | {NAMES[UNSEEN[0]]: None})["unseen"] == 100


def test_scenes_are_labelled_with_classes_that_are_seen():
    assert sorted(SEEN + UNSEEN) == [*range(18)] and len(UNSEEN) == 6
    content = json.loads((ROOT / "toy/labelled.json").read_text())
    assert (content["values"], content["void"]) == (SEEN, UNSEEN)


def test_a_run_learns_from_seen_classes_alone(toy_home, monkeypatch):
    """Both rows, two steps each, beside CLIP and DeCLIP alone, through the scripts themselves."""
    world.main(options(train=0, dev=2, val=0, labelled=4, size=64))
    DeCLIP("local-dir:toy/clip", "own").save(toy_home / "declip.safetensors")
    labels = []
    augment = tables.catseg_train.augment
    monkeypatch.setattr(tables.catseg_train, "augment", lambda sample, *rest: labels.extend(
        sample.label.unique().tolist()) or augment(sample, *rest))
    small = ["--iterations", "2", "--image_size", "32", "--num_workers", "0"]
    monkeypatch.setitem(tables.TABLES, "catseg", tables.TABLES["catseg"]._replace(
        options=["@presets/catseg_toy.txt", *small]))
    found = table("catseg", out="out", ckpt="declip.safetensors", seeds=0, scenes="dev")
    lines = found.splitlines()
    assert [line[:12] for line in lines] == ["dev scenes, ", "CLIP alone  ", "DeCLIP alone",
                                             "CAT-Seg over", "CAT-Seg over"]
    assert "nan" not in found and "±" not in found
    assert -1 in labels and max(labels) < 12      # the twelve, and void


@pytest.mark.parametrize("words, sentence", [
    ("catseg --scenes train", "SCENES is 'train'; it must be val or dev"),
    ("detection --seeds 1 3", r"SEEDS is \(1, 3\); it must be from 0 to 2"),
    ("detection --search", "SEARCH is for --search, table1, siglip, so it has no effect"),
    ("table2", "it must be one of table1, siglip, detection, ov_dquo, catseg")])
def test_refusals(words, sentence):
    with pytest.raises(SystemExit, match=sentence):
        tables.main(words.split())
