"""toy/demo.py: its table says what was measured, and its figure is drawn."""

import json

import pytest
from conftest import options
from PIL import Image
from tiny import ROOT

from model import DeCLIP
from toy import demo, world
from util import settings

ROWS = ("box thing", "box stuff", "mask thing", "mask stuff", "crop thing", "crop stuff")


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy models are named as seen from the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def results(tmp_path):
    """What the evaluations write, each figure another number."""
    (tmp_path / "declip").mkdir()
    files = [("region.clip", "seg.clip"), ("region.q", "seg.q"), ("declip/region", "declip/seg")]
    for number, (region, seg) in enumerate(files):
        means = {row: {"top1": 10 * number + place + 0.5} for place, row in enumerate(ROWS)}
        (tmp_path / f"{region}.json").write_text(json.dumps({"sizes": {"128": {"mAcc": means}}}))
        benchmarks = {"toy": {"mIoU": 10 * number + 9.5}}
        (tmp_path / f"{seg}.json").write_text(json.dumps({"benchmarks": benchmarks}))
    return tmp_path


def test_the_table_has_each_figure_in_its_place(results):
    cfg = settings.parse(options(results=results), demo)
    table = demo.table(demo.read_results(cfg)).splitlines()
    of_method = {line[:36].strip(): line[36:].split() for line in table}
    assert of_method["CLIP"] == ["0.5", "1.5", "2.5", "3.5", "9.5"]
    assert of_method["DeCLIP"] == ["20.5", "21.5", "22.5", "23.5", "29.5"]
    assert of_method["CLIP on crops cut out of the scenes"] == ["4.5", "5.5"]


def test_the_figure_is_drawn(results, toy_home, capsys):
    world.main(options(train=0, dev=0, val=3, size=64))
    DeCLIP("local-dir:toy/clip", "own").save("declip.safetensors")
    demo.main(options(results=results, ckpt="declip.safetensors", scenes=(0, 2),
                      figure="demo.png"))
    with Image.open("demo.png") as figure:
        assert figure.width > figure.height > 300
    what_next = capsys.readouterr().out.splitlines()[-1]
    assert "torchrun --nproc_per_node 8 train.py" in what_next


def test_without_results_it_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match="region.clip.json; run toy/demo.sh"):
        demo.main(options(results=tmp_path))
