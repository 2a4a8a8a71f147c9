"""toy/demo.py: its table says what was measured, and its figure is drawn."""

from types import SimpleNamespace

import pytest
from conftest import options
from PIL import Image
from tiny import ROOT

import eval_region
import eval_seg
from model import DeCLIP
from toy import demo, world
from util import settings
from util.results import options_of, write_result

ROWS = ("box thing", "box stuff", "mask thing", "mask stuff", "crop thing", "crop stuff")


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy models are named as seen from the repository."""
    monkeypatch.chdir(ROOT)


def write(out, start: float, **of) -> None:
    """What the evaluations add, each figure another number from `start` on."""
    cfg, means = SimpleNamespace(OUT=str(out), CKPT=None), {
        row: {"top1": start + place} for place, row in enumerate(ROWS)}
    region, seg = (options_of(settings.parse([f"@presets/toy_{name}.txt"], script))
                   for name, script in (("region", eval_region), ("seg", eval_seg)))
    write_result(cfg, "region", region | {"context": "q", "size": 128} | of, {"mAcc": means})
    protocol = {"long_side": 2048, "logit_scale": 40}
    write_result(cfg, "seg", seg | protocol | {"context": "q", "benchmark": "toy"} | of,
                 {"mIoU": start + 9})


@pytest.fixture
def results(tmp_path):
    """Those of the demo, and later ones of others, each of which was mistaken for them once."""
    write(tmp_path, 0.5, attention="clip")
    write(tmp_path, 10.5, attention="q")
    trained = str(tmp_path / "declip.safetensors")
    DeCLIP("local-dir:toy/clip", "own").save(trained)
    write(tmp_path / "declip", 20.5, attention="q", ckpt=trained)
    for out, ckpt in ((tmp_path, None), (tmp_path / "declip", trained)):
        for other in ({"pamr": 10, "crowd": True}, {"benchmark": "voc20", "size": 560},
                      {"classes": "own.txt"}, {"ckpt": "b.safetensors"}, {"context": "qk"}):
            write(out, 90.5, **{"attention": "q", "ckpt": ckpt} | other)
    write(tmp_path / "declip", 90.5, attention="clip", ckpt=trained)
    return tmp_path


def chosen(results) -> dict:
    """What the demo finds there."""
    return demo.find_results(settings.parse(
        options(results=results, ckpt=results / "declip.safetensors"), demo))


def test_the_table_has_each_figure_in_its_place(results):
    table = demo.table(chosen(results)).splitlines()
    of_method = {line[:36].strip(): line[36:].split() for line in table}
    assert of_method["CLIP"] == ["0.5", "1.5", "2.5", "3.5", "9.5"]
    assert of_method["decoupled block, untrained"] == ["10.5", "11.5", "12.5", "13.5", "19.5"]
    assert of_method["DeCLIP"] == ["20.5", "21.5", "22.5", "23.5", "29.5"]
    assert of_method["CLIP on crops cut out of the scenes"] == ["4.5", "5.5"]


def test_the_figure_is_drawn(results, toy_home, capsys):
    world.main(options(train=0, dev=0, val=3, size=64))
    demo.main(options(results=results, ckpt=results / "declip.safetensors", scenes=(0, 2),
                      figure="demo.png"))
    with Image.open("demo.png") as figure:
        assert figure.width > figure.height > 300
    what_next = capsys.readouterr().out.splitlines()[-1]
    assert "torchrun --nproc_per_node 8 train.py" in what_next


def test_without_results_it_says_what_to_run(results, tmp_path):
    with pytest.raises(SystemExit, match="region.json has no result of CLIP .* run toy/demo.sh"):
        demo.main(options(results=tmp_path / "nothing", ckpt="no/such.safetensors"))
    for path, sentence in ((results / "declip/seg.json", "seg.json has no result of DeCLIP with"),
                           (results / "region.json", "region.json has no result of CLIP with")):
        path.unlink()
        with pytest.raises(ValueError, match=f"{sentence} .* run toy/demo.sh"):
            chosen(results)
    write(results, 0.5, attention="clip")
    (results / "seg.json").write_text("[]")
    with pytest.raises(ValueError, match="seg.json holds no results as evaluations write them"):
        chosen(results)
