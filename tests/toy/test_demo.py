"""toy/demo.py: its table says what was measured, and its figure is drawn."""

import shlex
from types import SimpleNamespace

import pytest
from conftest import options
from PIL import Image
from tiny import ROOT

import eval_region
from model import DeCLIP
from toy import demo, world
from util import settings
from util.results import options_of, write_result
from util.weights import state_checksum

ROWS = ("box thing", "box stuff", "mask thing", "mask stuff", "crop thing", "crop stuff")


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy models are named as seen from the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def trained() -> DeCLIP:
    """Plain CLIP in the place of the trained model."""
    return DeCLIP(f"local-dir:{ROOT}/toy/clip", "own")


def write(out, attention: str, start: float, **of) -> None:
    """What the evaluations add, each figure another number from `start` on."""
    cfg, wanted = SimpleNamespace(OUT=str(out), CKPT=None), demo.evaluations()
    means = {row: {"top1": start + place} for place, row in enumerate(ROWS)}
    of |= {"attention": attention}
    write_result(cfg, "region", wanted["region"] | of, {"mAcc": means})
    write_result(cfg, "seg", wanted["seg"] | of, {"mIoU": start + 9})


@pytest.fixture
def results(tmp_path, trained):
    """Those of the demo, and later ones of others, each of which was mistaken for them once."""
    own = {"checksum": state_checksum(trained.state_dict(), ""), "ckpt": "a.safetensors"}
    write(tmp_path, "clip", 0.5, ckpt=None)
    write(tmp_path, "q", 10.5, ckpt=None)
    write(tmp_path / "declip", "q", 20.5, **own)
    for out, of in ((tmp_path, {"ckpt": None}), (tmp_path / "declip", own)):
        for other in ({"pamr": 10, "crowd": True}, {"benchmark": "voc20", "size": 560},
                      {"classes": "own.txt"}, {"ckpt": "b.safetensors", "checksum": "0"}):
            write(out, "q", 90.5, **of | other)
    write(tmp_path / "declip", "clip", 90.5, **own)
    return tmp_path


def test_the_table_has_each_figure_in_its_place(results, trained):
    cfg = settings.parse(options(results=results), demo)
    table = demo.table(demo.find_results(cfg, trained)).splitlines()
    of_method = {line[:36].strip(): line[36:].split() for line in table}
    assert of_method["CLIP"] == ["0.5", "1.5", "2.5", "3.5", "9.5"]
    assert of_method["decoupled block, untrained"] == ["10.5", "11.5", "12.5", "13.5", "19.5"]
    assert of_method["DeCLIP"] == ["20.5", "21.5", "22.5", "23.5", "29.5"]
    assert of_method["CLIP on crops cut out of the scenes"] == ["4.5", "5.5"]


def test_the_tutorial_writes_what_the_table_reads():
    """The commands of toy/demo.sh have the settings that results are chosen by."""
    typed = [shlex.split(line)[2:] for line in (ROOT / "toy/demo.sh").read_text().splitlines()
             if line.startswith("run eval_region.py")]
    assert len(typed) == 3
    for words in typed:
        of = options_of(settings.parse(words, eval_region))
        assert of | demo.evaluations()["region"] == of | {"size": 128}


def test_the_figure_is_drawn(results, trained, toy_home, capsys):
    world.main(options(train=0, dev=0, val=3, size=64))
    trained.save("declip.safetensors")
    demo.main(options(results=results, ckpt="declip.safetensors", scenes=(0, 2),
                      figure="demo.png"))
    with Image.open("demo.png") as figure:
        assert figure.width > figure.height > 300
    what_next = capsys.readouterr().out.splitlines()[-1]
    assert "torchrun --nproc_per_node 8 train.py" in what_next


def test_without_results_it_says_what_to_run(results, trained):
    cfg = settings.parse(options(results=results), demo)
    for path, sentence in ((results / "declip/seg.json", "seg.json has no result of DeCLIP with"),
                           (results / "region.json", "region.json has no result of CLIP with")):
        path.unlink()
        with pytest.raises(ValueError, match=f"{sentence} .* run toy/demo.sh"):
            demo.find_results(cfg, trained)
    write(results, "clip", 0.5, ckpt=None)
    (results / "seg.json").write_text("[]")
    with pytest.raises(ValueError, match="seg.json holds no results as evaluations write them"):
        demo.find_results(cfg, trained)
