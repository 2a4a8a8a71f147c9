"""util/results.py: one file keeps every result, through evaluations that end together, kills and
damaged files."""

import json
import multiprocessing
import os
import re
import time
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from util import results
from util.results import identity, read_results, result_path, told_apart, write_result


def config(out, **given) -> SimpleNamespace:
    return SimpleNamespace(**{"OUT": str(out), "CKPT": None, "SIDES": (3, 4)} | given)


def write(out, figure: float, **of) -> Path:
    write_result(config(out), "seg", of, {"mIoU": figure})
    return out / "seg.json"


def figures(path, **wanted) -> list[float]:
    return [result["mIoU"] for result in read_results(path, **wanted)]


# ------------------------------------------------------------------------------------ one file

def test_an_equal_identity_replaces_and_any_other_joins(tmp_path):
    """The newest is the last."""
    path = write(tmp_path, 1, benchmark="voc20", pamr=0, sides=(3, 4))
    write(tmp_path, 2, benchmark="voc20", pamr=10)
    write(tmp_path, 3, benchmark="voc21", pamr=0)
    write(tmp_path, 4, benchmark="voc20", pamr=0, sides=(3, 4))
    assert figures(path) == [2, 3, 4]
    assert figures(path, benchmark="voc20") == [2, 4] and figures(path, pamr=1) == []
    assert figures(path, other=None) == []      # not even where the wanted value is None
    assert read_results(path)[-1] == {"of": {"benchmark": "voc20", "pamr": 0, "sides": [3, 4]},
                                      "mIoU": 4, "settings": vars(config(tmp_path)) | {
                                          "SIDES": [3, 4]}}


def test_the_place_is_out_or_beside_the_checkpoint():
    assert result_path(config("a"), "seg") == Path("a/seg.json")
    assert result_path(config("", CKPT="b/x.pt"), "seg") == Path("b/seg.json")
    assert result_path(config(""), "seg") == Path("out/seg.json")


def test_all_that_changes_a_figure_is_identity():
    cfg = config("out", PRECISION="auto", WINDOW=None, NUM_WORKERS=1, THRESHOLD=0.5)
    model = nn.Linear(2, 2)
    of = identity(cfg, model, ["cat"], window=96)
    used = {"precision": "fp32", "window": 96, "threshold": 0.5, "sides": (3, 4)}
    assert of | used == of
    assert not {"out", "num_workers"} & set(of)
    assert identity(SimpleNamespace(**vars(cfg) | {"OUT": "x", "NUM_WORKERS": 2}), model, ["cat"],
                    window=96) == of
    assert identity(cfg, model, ["dog"])["data_checksum"] != of["data_checksum"]
    nn.init.zeros_(model.bias)
    assert identity(cfg, model, ["cat"])["checksum"] != of["checksum"]


def test_every_class_has_a_key():
    assert told_apart(list("abaca")) == ["a", "b", "a, class 2", "c", "a, class 4"]


# ---------------------------------------------------------------------- together, killed, damaged

def add(out, name: str, numbers) -> None:
    for number in numbers:
        write(out, 0, by=name, number=number)


def test_evaluations_that_end_together_lose_nothing(tmp_path):
    """Two processes add forty results each; others, which write one again and again, are killed."""
    fork = multiprocessing.get_context("fork")
    two = [fork.Process(target=add, args=(tmp_path, name, range(40))) for name in "ab"]
    for process in two:
        process.start()
    while any(process.is_alive() for process in two):
        killed = fork.Process(target=add, args=(tmp_path, "c", repeat(0)))
        killed.start()
        time.sleep(0.03)
        killed.kill()
        killed.join()
    assert [process.exitcode for process in two] == [0, 0]
    for name in "ab":
        assert [result["of"]["number"] for result in read_results(tmp_path / "seg.json", by=name)
                ] == [*range(40)]


def test_a_disk_without_locks_has_results_all_the_same(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("Function not implemented")
    monkeypatch.setattr(results.fcntl, "lockf", no_locks)
    assert figures(write(tmp_path, 1, benchmark="voc20")) == [1]


OLD = {"benchmarks": {"voc20": {"mIoU": 5.0}}, "model": "x", "settings": {}}
NO_RESULTS = ["", '{"results": [{"of": {}', "[1]", "3", json.dumps(OLD), '{"results": {}}',
              '{"results": [3]}', '{"results": [{"of": []}]}', '{"results": [{"mIoU": 3}]}',
              '{"results": [], "images": []}', "[" * 10**5, "\udcff"]


@pytest.mark.parametrize("text", NO_RESULTS)
def test_a_file_without_results_is_refused_and_kept(tmp_path, capsys, text):
    """Reading it is one sentence; an evaluation neither overwrites it nor loses its figures."""
    path, content = tmp_path / "seg.json", os.fsencode(text)
    for number in (1, 2):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="seg.json holds no results as evaluations write"
                           ) as error:
            read_results(path)
        assert "\n" not in str(error.value)
        assert figures(write(tmp_path, number, benchmark="voc20")) == [number]
        kept = Path(re.search("it is kept as (.*)", capsys.readouterr().out)[1])
        assert kept.read_bytes() == content and len(list(tmp_path.glob("seg*.json"))) == 1 + number


# -------------------------------------------------------------------------------- before the work

def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    model, cfg = nn.Linear(2, 2), config(tmp_path / "new/deep", PRECISION="fp32")
    identity(cfg, model, [])
    with pytest.raises(ValueError, match="Nothing can be written into .*file; set OUT to another"):
        identity(config(tmp_path / "file/deep", PRECISION="fp32"), model, [])
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=f"Nothing can be written into {tmp_path}; set OUT"):
        identity(cfg, model, [])


def test_there_must_be_a_file():
    with pytest.raises(ValueError, match="There is no file of results no/such.json; evaluate"):
        read_results("no/such.json")
