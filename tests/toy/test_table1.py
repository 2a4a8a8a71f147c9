"""toy/table1.py: presets are the rows they claim to be, and runs are made once."""

import pytest
from conftest import options
from tiny import ROOT

import train
from toy import table1
from util import settings


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy models are named as seen from the repository."""
    monkeypatch.chdir(ROOT)


def test_rows_of_table_1_are_what_they_are_called():
    def of(row: str) -> tuple:
        cfg = settings.parse(["@presets/toy.txt", *table1.ROWS[row]], train)
        return cfg.CONTEXT, cfg.LAMBDA > 0
    assert [of(row) for row in table1.ROWS] == [
        ("clip", False), ("clip", True), ("q", True), ("values", True)]


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
    assert len(made) == len(set(made)) == 2 + 4 + 4 + 4
    assert [line[-9:-7] for line in best] == [["0.001", "-"], *[["0.001", "0.25"]] * 3]


def test_report_is_mean_and_spread(monkeypatch):
    monkeypatch.setattr(table1, "figures", lambda cfg, name, given, seed, scenes:
                        dict.fromkeys([*table1.FIGURES, *table1.MORE_FIGURES, "seconds"],
                                      10.0 * seed))
    lines = table1.report(settings.parse(["--seeds", "1", "2", "3"], table1)).splitlines()
    assert len(lines) == 5 and all(line.count("20.0 ± 10.0") == 8 for line in lines[1:])


def test_a_run_is_made_once(tmp_path, monkeypatch):
    """Training and evaluation of a run that is there are not repeated, and val is not dev."""
    made = []
    monkeypatch.setattr(table1.train, "main", lambda argv: made.append("train"))
    monkeypatch.setattr(table1.eval_region, "main", lambda argv: made.append("region") or {
        "128": {"mAcc": {figure: {"top1": 1.0} for figure in table1.FIGURES[:-1]}}})
    monkeypatch.setattr(table1.eval_seg, "main", lambda argv: made.append(argv[-1])
                        or {argv[-1]: {"mIoU": 2.0}})
    cfg = settings.parse(options(out=tmp_path), table1)
    for scenes in ("dev", "dev", "val"):
        found = table1.figures(cfg, "self + VFM", ["--lr", "0.1"], 4, scenes)
    assert made == ["train", "region", "toy_dev", "region", "toy", "toy", "toy"]
    assert found["mIoU"] == found["PAMR"] == 2.0 and found["seconds"] > 0
    # as if the preset had been edited
    table1.figures(cfg, "self + VFM", ["--lr", "0.2"], 4, "val")
    assert made.count("train") == 2
