"""demo.py and table1.py: tables say what was measured, the picture is drawn, presets are the rows they claim to be."""

import json

import pytest
from conftest import options
from PIL import Image

import demo
import settings
import table1
import toy
import train
from model import DeCLIP

ROWS = ("box thing", "box stuff", "mask thing", "mask stuff", "crop thing", "crop stuff")


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy CLIP's tokenizer is named as seen from the repository."""
    monkeypatch.chdir(toy.FOLDER.parent)


@pytest.fixture
def results(tmp_path):
    """What the evaluations write, each figure another number."""
    (tmp_path / "declip").mkdir()
    files = [("region.clip", "seg.clip"), ("region.q", "seg.q"), ("declip/region", "declip/seg")]
    for number, (region, seg) in enumerate(files):
        means = {row: {"top1": 10 * number + place + 0.5} for place, row in enumerate(ROWS)}
        (tmp_path / f"{region}.json").write_text(json.dumps({"sizes": {"128": {"mAcc": means}}}))
        (tmp_path / f"{seg}.json").write_text(json.dumps({"benchmarks": {"toy": {"mIoU": 10 * number + 9.5}}}))
    return tmp_path


def test_the_table_has_each_figure_in_its_place(results):
    table = demo.table(demo.read_results(settings.parse(options(results=results), demo))).splitlines()
    of_method = {line[:36].strip(): line[36:].split() for line in table}
    assert of_method["CLIP"] == ["0.5", "1.5", "2.5", "3.5", "9.5"]
    assert of_method["DeCLIP"] == ["20.5", "21.5", "22.5", "23.5", "29.5"]
    assert of_method["CLIP on crops cut out of the scenes"] == ["4.5", "5.5"]


def test_the_picture_is_drawn(results, tmp_path, capsys):
    toy.main(options(out=tmp_path / "toy", train=0, dev=0, val=3, size=64))
    DeCLIP("local-dir:toy/clip", "own").save(tmp_path / "declip.safetensors")
    demo.main(options(results=results, data=tmp_path, ckpt=tmp_path / "declip.safetensors", scenes=(0, 2),
                      picture=tmp_path / "demo.png"))
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > picture.height > 300
    assert "torchrun --nproc_per_node 8 train.py" in capsys.readouterr().out.splitlines()[-1]      # what to do next


def test_without_results_it_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match="region.clip.json; run ./demo.sh"):
        demo.main(options(results=tmp_path))


def test_rows_of_table_1_are_what_they_are_called():
    def of(row: str) -> tuple:
        cfg = settings.parse(["@presets/toy.txt", *table1.ROWS[row]], train)
        return cfg.CONTEXT, cfg.LAMBDA > 0
    assert [of(row) for row in table1.ROWS] == [("clip", False), ("clip", True), ("q", True)]


def test_search_marks_the_best_of_each_row(monkeypatch):
    """Self-distillation has no λ, so it is tried once for each learning rate."""
    made = []

    def figures(cfg, name, given, seed, scenes):
        made.append((name, *given))
        assert scenes == "dev" and seed == 0
        return dict.fromkeys(table1.FIGURES, 50.0 + (given[1] == "0.001") + (given[-1] == "0.25"))
    monkeypatch.setattr(table1, "figures", figures)
    cfg = settings.parse(["--lrs", "0.0003", "0.001", "--lambdas", "0.05", "0.25"], table1)
    best = [line.split() for line in table1.search(cfg).splitlines() if line.endswith("best")]
    assert len(made) == len(set(made)) == 2 + 4 + 4
    assert [line[-9:-7] for line in best] == [["0.001", "-"], ["0.001", "0.25"], ["0.001", "0.25"]]


def test_report_is_mean_and_spread(monkeypatch):
    monkeypatch.setattr(table1, "figures", lambda cfg, name, given, seed, scenes: dict.fromkeys(table1.FIGURES, 10.0 * seed))
    lines = table1.report(settings.parse(["--seeds", "1", "2", "3"], table1)).splitlines()
    assert len(lines) == 4 and all(line.count("20.0 ± 10.0") == 5 for line in lines[1:])


def test_a_run_is_made_once(tmp_path, monkeypatch):
    """Training and evaluation of a run that is there are not repeated, and val is not dev."""
    made = []
    monkeypatch.setattr(table1.train, "main", lambda argv: made.append("train"))
    monkeypatch.setattr(table1.eval_region, "main", lambda argv: made.append("region") or {
        "128": {"mAcc": {figure: {"top1": 1.0} for figure in table1.FIGURES[:-1]}}})
    monkeypatch.setattr(table1.eval_seg, "main", lambda argv: made.append(argv[-1]) or {argv[-1]: {"mIoU": 2.0}})
    cfg = settings.parse(options(out=tmp_path), table1)
    for scenes in ("dev", "dev", "val"):
        found = table1.figures(cfg, "self + VFM", ["--lr", "0.1"], 4, scenes)
    assert made == ["train", "region", "toy_dev", "region", "toy"] and found["mIoU"] == 2.0
    table1.figures(cfg, "self + VFM", ["--lr", "0.2"], 4, "val")        # as if the preset had been edited
    assert made.count("train") == 2
