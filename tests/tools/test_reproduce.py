"""tools/reproduce.py: what runs is what the tables say, once, and goes on; what is reported is what
was found; the documents' tables are those of the jsons."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from conftest import options
from tiny import ROOT

from tools import report, reproduce
from toy import world as toy_world
from util import settings
from util.results import write_result
from util.weights import write_checkpoint

WORLDS = ["docs", "toy"]


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """Paths are those of the repository, whatever data it has; signals are pytest's again."""
    monkeypatch.chdir(ROOT)
    reproduce.lack_of.cache_clear()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def plan_of(world: str, *words: str, out: object = "out") -> reproduce.Plan:
    cfg = settings.parse(["--world", world, "--out", str(out), *words], reproduce)
    return reproduce.Plan(report.read_world(world), cfg)


def of(words: list[str], name: str) -> str:
    """What a command line says of an option."""
    return words[words.index(name) + 1]


def table_of(world: str, id: str) -> SimpleNamespace:
    return next(table for table in report.read_world(world).tables if table.id == id)


# ------------------------------------------------------------------------------------- the jsons

@pytest.mark.parametrize("name", WORLDS)
def test_documents_have_the_tables_of_the_json(name):
    """Made anew they are what they are, and so is the json; every table but the search is shown."""
    world, path = report.read_world(name), report.world_path(name)
    doc = (ROOT / world.doc).read_text()
    assert report.fill(doc, world) == doc
    assert path.read_text() == report.laid_out(json.loads(path.read_text())) + "\n"
    shown = re.findall("<!-- table: (.*?) -->\n\\| ", doc)
    assert shown == [table.id for table in world.tables if table.id != "search"]


@pytest.mark.parametrize("name", WORLDS)
def test_rows_are_commands_with_options_that_exist(name):
    """Each is parsed by its script; those of evaluations are of what the row trains."""
    plan = plan_of(name, "--seeds", "0")
    assert len(plan.rows) == sum(len(table.rows) for table in plan.world.tables)
    for job in plan.jobs.values():
        parsed = settings.parse(reproduce.command_of(job, 1, job.benchmarks)[3:],
                                sys.modules[job.script])
        assert parsed.OUT in (str(job.folder), str(job.folder / "unknown.json"))
        assert not any("{" in word for word in job.words)
    for table, number, evaluations in plan.rows:
        row = table.rows[number]
        for job in evaluations[0].values():
            assert bool(job.needs) == bool(row.model or row.train is not None), row
            assert not job.needs or job.cfg.CKPT == str(job.needs[-1].product)


def test_the_papers_tables_are_all_there():
    plan = plan_of("docs")
    numbers = {number for table, place, _ in plan.rows
               for number in (table.rows[place].tables or table.tables).split()}
    assert numbers == set(map(str, range(1, 15)))
    figures = [value for table in plan.world.tables for row in table.rows for value in row.paper]
    assert len(figures) - figures.count(None) == 222 and not any(
        row.ours for table in plan.world.tables for row in table.rows)


TABLE = {"id": "x", "tables": "1", "title": "X", "evaluate": {"seg": "eval_seg.py"},
         "columns": [{"name": "mIoU", "of": "seg", "path": ["mIoU"]}], "rows": [{"paper": [1]}]}


@pytest.mark.parametrize("of_table, words", [
    ({"id": None}, r"\(tables: its 'id' is None\)"),
    ({"colums": []}, r"\(tables: its 'colums' is \[\]\)"),
    ({"columns": [{"of": "seg"}]}, r"\(columns of x: it has no 'name'\)"),
    ({"rows": [{"paper": ["75.0"]}]}, r"\(rows of x: its 'paper' is \['75.0'\]\)"),
    ({"rows": [{"paper": [1, 2]}]}, "row 1 has figures for other than its 1 columns"),
    ({"rows": [{}, {"ours": [1, 2]}]}, "row 2 has figures for other than its 1 columns"),
    ({"rows": [{"evaluate": {"region": ""}}]}, "row 1 has no evaluation 'region'"),
    ({"rows": [{"commands": {"region": "x"}}]}, "row 1 has no evaluation 'seg'"),
    ({"rows": [{"model": "CKPT"}]}, "row 1 must have a model of 'models', 'CKPT' is none"),
    ({"seeds": [0, 2], "splits": ["cat", "dog"]}, "it has 2 splits, too few for its seeds"),
    ({"evaluate": {"seg": "eval_sec.py"}}, "'eval_sec.py ' is no command of train,"),
    ({"evaluate": {"seg": "eval_seg.py --ckpt {CKPT}"}}, "has {CKPT}, which is no model or value")])
def test_wrong_jsons_are_one_sentence(tmp_path, of_table, words):
    content = {"out": "o", "doc": "d", "title": "t", "against": ["paper", "paper"],
               "tables": [TABLE | of_table]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=words) as error:
        reproduce.main(["--world", str(tmp_path / "x.json"), "--list"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("of_world, words", [
    ({"against": ["theirs", "x"]}, r"\(the whole: its 'against' is \['theirs', 'x'\]\)"),
    ({"models": {"CKPT": 1}}, "its 'models' is"), ({"table": []}, "its 'table' is"),
    ({"costs": [{"script": "train", "where": "", "rate": 0, "images": 1, "gb": 1}]},
     r"\(costs: its 'rate' is 0\)")])
def test_wrong_worlds_are_one_sentence(tmp_path, of_world, words):
    content = {"out": "o", "doc": "d", "title": "t", "against": ["paper", "paper"],
               "tables": [TABLE]}
    (tmp_path / "x.json").write_text(json.dumps(content | of_world))
    with pytest.raises(SystemExit, match=words):
        reproduce.main(["--world", str(tmp_path / "x.json"), "--list"])


@pytest.mark.parametrize("words, sentence", [
    ("--tables 15 --list", r"TABLES is \('15',\); it must be some of 5, 10, 4, 9"),
    ("", r"TABLES is \(\); it must be some of"), ("--world toy --tables 1 --seeds 3", "0, 1, 2"),
    ("--world nowhere --list", "There is no file nowhere/reproduce.json"),
    ("--tables 1 --gpus -1", "GPUS is -1; it must be at least 0")])
def test_refusals(words, sentence):
    with pytest.raises(SystemExit, match=sentence):
        reproduce.main(words.split())


# ------------------------------------------------------------------------- the toy world's rows

def toy_trainings(*words: str) -> list[reproduce.Job]:
    return [job for job in plan_of("toy", *words).jobs.values() if job.is_training]


def test_toy_rows_are_what_they_are_called():
    for name, model, contexts in (("1", "clip", ["clip", "clip", "q", "values"]),
                                  ("siglip", "siglip", ["clip", "clip", "q", "maskclip"])):
        found = [job.cfg for job in toy_trainings("--tables", name, "--seeds", "1")]
        assert [cfg.CONTEXT for cfg in found] == contexts
        assert [cfg.LAMBDA > 0 for cfg in found] == [False, True, True, True]
        assert {(cfg.MODEL, cfg.SEED) for cfg in found} == {(f"local-dir:toy/{model}", 1)}
    grid = toy_trainings("--tables", "search")
    assert len({(cfg.CONTEXT, cfg.LR, cfg.LAMBDA) for cfg in (job.cfg for job in grid)}) == 30


def test_classes_and_splits_are_the_worlds():
    """Novel things are three each in their order, one split a seed; segmenters see two of three."""
    for id in ("detection", "ov_dquo"):
        splits = table_of("toy", id).splits
        assert ", ".join(splits) == ", ".join(toy_world.THINGS[:9]) and len(splits) == 3
    found = [(job.cfg.SEED, job.cfg.NOVEL) for job in toy_trainings("--tables", "detection")
             if "fvit" in job.script]
    assert found == [*enumerate(splits)] * 2
    unseen, seen, _ = table_of("toy", "catseg").columns
    labelled = json.loads((ROOT / "toy/labelled.json").read_text())
    for column, field in ((seen, "values"), (unseen, "void")):
        assert column.path == ["IoU", [toy_world.NAMES[place] for place in labelled[field]]]


@pytest.mark.parametrize("name", ["detection", "ov_dquo", "catseg"])
def test_tutorials_type_what_the_tables_have(name):
    """Trainings of toy/NAME.sh are those of seed 0, and backbones are all that differs."""
    text = (ROOT / f"toy/{name}.sh").read_text().replace("\\\n", "")
    variables = dict(re.findall(r'(\w+)="(.*?)"', text)) | {"out": "out/toy/ov_dquo"}
    for variable, value in variables.items():
        text = text.replace(f"${variable}", value)
    typed = [shlex.split(line)[2:] for line in text.splitlines()
             if re.match(r"(run|beside) -m downstream\.\w+\.train ", line) and "/clip+" not in line]
    jobs = [job for job in toy_trainings("--tables", name, "--seeds", "0") if job.script != "train"]
    assert {words[0] for words in typed} == {job.script for job in jobs}
    ours = [vars(job.cfg) for job in jobs]
    theirs = [vars(settings.parse(words[1:], sys.modules[words[0]])) for words in typed]
    free = {"OUT", "CKPT", "BACKBONE", "UNKNOWN"}

    def of_one(cfg: dict) -> dict:      # paths count by whether there is one
        return {name: bool(value) if name in free else value for name, value in cfg.items()}
    assert sorted(map(str, map(of_one, theirs))) == sorted(map(str, map(of_one, ours)))


# ------------------------------------------------------------------------------------- the plan

def test_rows_with_equal_options_share_their_training():
    """The defaults are a row of Tables 6, 7 and 8, and under detectors; folders are the same
    wherever OUT is, and others for other options."""
    plan = plan_of("docs", "--tables", "6", "7", "8", "2")
    named = {job.typed: job for job in plan.jobs.values() if job.is_training}
    rows = {table.rows[number].train: evaluations[0] for table, number, evaluations
            in plan.rows if table.id == "ablations"}
    assert rows["--context q"]["seg"] is rows[""]["seg"]
    assert rows["--context q"]["seg"] is rows["--vfm_model vit_base_patch14_dinov2.lvd142m"]["seg"]
    assert rows["--context q"]["region"] is not rows[""]["region"]      # 1024 and 560 px
    same = rows[""]["seg"].needs[0]
    assert named["downstream.fvit.train --backbone CKPT"].needs == [same]
    assert len([job for job in named.values() if job.script == "train"]) == 5 + 2 + 3 + 2
    elsewhere = plan_of("docs", "--tables", "2", out="/some/where")
    assert {path.name for path in elsewhere.jobs} < {path.name for path in plan.jobs}
    # A benchmark that another row of the same evaluation has is evaluated there.
    both = plan_of("docs", "--tables", "7", "10")
    qk = next(of_one[0]["seg"] for table, _, of_one in both.rows if table.id == "segmentation"
              and of_one[0]["seg"].needs)
    assert qk.benchmarks[0] == "voc21" and len(qk.benchmarks) == 8
    order = [*plan.jobs.values()]
    assert all(order.index(need) < order.index(job) for job in order for need in job.needs)


def test_figures_of_other_weights_do_not_count(tmp_path):
    """Of a file that is older than the model, or of weights before the newest result's."""
    plan = plan_of("docs", "--tables", "7", out=tmp_path)
    training = next(job for job in plan.jobs.values() if job.is_training)
    fake(training, 12)
    seg = next(job for job in plan.jobs.values() if job.needs == [training] and job.benchmarks)
    cfg = SimpleNamespace(CKPT=None, OUT=str(seg.folder))
    for benchmark, checksum in (("context59", "old"), ("ade150", "old"), ("ade150", "new")):
        write_result(cfg, "seg", {"benchmark": benchmark, "checksum": checksum}, {"mIoU": 40.0})
    assert [len(seg.results(name)) for name in (None, "context59", "ade150")] == [1, 0, 1]
    os.utime(seg.folder / "seg.json", (1, 1))
    assert seg.results() == []


def test_what_the_paper_does_not_have_is_not_run():
    """Table 8 has no figures of Cityscapes and COCO-Stuff, Table 6 has one of the latter."""
    seg, = (job for job in plan_of("docs", "--tables", "11").jobs.values()
            if job.script == "eval_seg" and "--lambda" not in job.needs[0].typed)
    assert seg.benchmarks == ["context59", "ade150"]
    table_6 = [job.benchmarks for job in plan_of("docs", "--tables", "6").jobs.values()
               if job.script == "eval_seg"]
    assert table_6[1] == ["context59", "ade150", "coco_stuff"]


def test_a_report_keeps_what_was_asked_for_before(tmp_path):
    """Tables that a command does not name, but that have figures."""
    plan = plan_of("docs", "--tables", "11", out=tmp_path)
    training = next(job for job in plan.jobs.values() if job.is_training)
    fake(training, 12)
    seg = next(job for job in plan.jobs.values() if job.needs == [training] and job.benchmarks)
    write_result(SimpleNamespace(CKPT=None, OUT=str(seg.folder)), "seg",
                 {"benchmark": "context59"}, {"mIoU": 43.21})
    other = plan_of("docs", "--tables", "4", out=tmp_path)
    text = reproduce.write_report(other, {}).read_text()
    assert "43.2" in text and "## Trained segmentation" in text


def test_processes_divide_the_batch():
    job = next(job for job in plan_of("docs", "--tables", "4").jobs.values() if job.is_training)
    evaluation = next(job for job in plan_of("docs", "--tables", "4").jobs.values()
                      if not job.is_training)
    launched = reproduce.command_of(job, 8)
    # 4 images a batch; a port that no other torchrun of the machine has
    assert launched[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "4"]
    assert of(reproduce.command_of(evaluation, 8, ["voc20"]), "--nproc_per_node") == "8"
    assert reproduce.command_of(job, 0)[1:3] == ["-m", "downstream.catseg.train"]


def test_two_commands_share_a_training(tmp_path, monkeypatch):
    """The second one waits as long as the first one's process holds the folder."""
    job = next(job for job in plan_of("docs", "--tables", "7", out=tmp_path).jobs.values()
               if job.is_training)
    job.folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys; file = open(sys.argv[1], "
                               "'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(flush=True); input()",
                               job.folder / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    naps = []
    monkeypatch.setattr(reproduce.time, "sleep",
                        lambda _: naps.append(1) or len(naps) == 2 and holder.communicate(b"\n"))
    reproduce.wait_for_others(job)
    assert len(naps) == 2 and holder.returncode == 0


# ---------------------------------------------------------------------------------- what is there

def fake(job: reproduce.Job, step: int) -> None:
    """What a training leaves that has come to a step of 12."""
    job.folder.mkdir(parents=True)
    (job.folder / "output.txt").write_text("24 images: 2 steps an epoch\n")
    write_checkpoint(job.product, {}, {"model": "x", "context": "q", "scale": None,
                                       "settings": {"step": step}})


def test_the_list_says_what_is_there(tmp_path, capsys):
    plan = plan_of("docs", "--tables", "7", out=tmp_path)
    trainings = [job for job in plan.jobs.values() if job.is_training]
    assert len(trainings) == 3
    fake(trainings[0], 12)
    fake(trainings[1], 9)
    (trainings[2].folder / "resume-00000007.pt").parent.mkdir()
    (trainings[2].folder / "resume-00000007.pt").touch()        # killed before the model
    region, seg = (job for job in plan.jobs.values() if job.needs == [trainings[0]])
    cfg = SimpleNamespace(CKPT=None, OUT=str(region.folder))
    write_result(cfg, "region", {"size": 1024}, {"mAcc": {}})
    cfg.OUT = str(seg.folder)
    write_result(cfg, "seg", {"benchmark": "context59"}, {"mIoU": 40.0})
    capsys.readouterr()
    reproduce.main(["--tables", "7", "--out", str(tmp_path), "--list"])
    lines = capsys.readouterr().out.splitlines()
    states = [re.split("  +", line.strip())[1] for line in lines[:9]]
    assert states == ["done", "done", "none", "at step 9 of 12", "none", "none", "at step 7",
                      "none", "none"]
    about = [re.search(r"about (.*?),", line) for line in lines[:9]]
    assert [found and found[1] for found in about] == [
        None, None, None, "42 min", None, None, "2.83 h", None, None]
    assert "7 of 9 commands are left. Their trainings take about 3.54 h and 5.4 GB" in lines[10]
    assert "context59" not in seg.left()[0] and len(sum(seg.left(), [])) == 1


def test_what_is_missing_is_listed_at_once(tmp_path, monkeypatch, capsys):
    """Each with the commands that need it and where it is from; what can't run is not started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "find", Path)        # this repository may have toy data
    started = []
    monkeypatch.setattr(reproduce, "execute", lambda *given: started.append(given) or (0, ""))
    with pytest.raises(SystemExit) as error:
        reproduce.main(["--tables", "1", "2", "9", "--out", "out"])
    shown = capsys.readouterr().out.split("\n1 of ")[0]
    for words in ("data/coco/train2017.", "panoptic_val2017.json", "instances_val2017.json",
                  "There is no clipself.pt.", "lvis_v1_train.json", "ade847.txt",
                  "get: wget -P data/coco http://images.cocodataset.org/zips/train2017.zip",
                  "get: the EVA02-B/16 that CLIPSelf's authors published",
                  "EVA02-B-16 merged2b_s8b_b131k", "samvit_base_patch16.sa1b"):
        assert words in shown, words
    assert not started
    sentences = str(error.value).splitlines()
    assert sentences[0].endswith("commands did not end well:")
    assert any(re.search(r"train-\w+: There is no data/coco/train2017; get it: wget", line)
               for line in sentences)
    assert any(re.match(r"out/fvit-train.*: needs out/train-", line) for line in sentences)


# ------------------------------------------------------------------------------------ it runs

@pytest.fixture
def tiny_world(toy_home, monkeypatch) -> Path:
    """Two rows that share a training of four steps by seed, one that fails, and CLIP alone, on
    drawn scenes."""
    toy_world.main(options(train=8, dev=0, val=2, size=64))
    data = toy_home / "data/toy"
    small = (f"@presets/toy.txt --images {data}/train --image_size 32 --crop_size 32 "
             "--batch_size 4 --epochs 2 --num_workers 0 --log_every 1 --save_every 1")
    quick = "--num_workers 0 --cache none"
    region = (f"eval_region.py @presets/toy_region.txt --sizes 32 --images {data}/val/images "
              f"--pngs {data}/val/panoptic --annotations {data}/val/panoptic.json {quick}")
    seg = f"eval_seg.py @presets/toy_seg.txt --short_side 32 --window 32 --stride 16 {quick}"
    benchmark = str(toy_home / "toy/benchmark.json")
    columns = [{"name": "thing", "of": "region", "path": ["mAcc", "box thing", "top1"]},
               {"name": "stuff", "of": "region", "path": ["mAcc", "box stuff", "top1"]},
               {"name": "both", "of": "region",
                "path": ["mAcc", "box stuff", "top1"]}, {"name": "mean"}]
    first = {"id": "regions", "tables": "1", "title": "Regions", "seeds": [0, 1],
             "train": f"train.py {small} --seed {{SEED}}", "evaluate": {"region": region},
             "columns": columns, "rows": [
                 {"name": "CLIP", "evaluate": {"region": "--attention clip"}},
                 {"name": "bad", "train": "--context clip --lambda 0 --crop_size 7"},
                 {"name": "self", "train": "--context clip --lambda 0", "paper": [50, 40, 40, 30]}]}
    second = {"id": "pixels", "tables": "1", "title": "Pixels", "seeds": [0, 1],
              "train": first["train"], "evaluate": {"seg": seg},
              "columns": [{"name": "mIoU", "of": "seg", "path": ["mIoU"], "benchmark": benchmark}],
              "rows": [{"name": "self again", "train": "--lambda 0.0 --context clip"}]}
    content = {"out": str(toy_home / "out"), "doc": "doc.md", "title": "Tiny", "tables": [
        first, second], "against": ["paper", "paper"]}
    (toy_home / "tiny.json").write_text(json.dumps(content))
    return toy_home / "tiny.json"


class Forked(warm.Process):
    """subprocess.Popen of a command of the tool, in a process that has imported everything."""

    interrupted = None      # a function: whether Ctrl-C comes

    def __init__(self, command: list[str], stdout: object, **_):
        assert command[:2] == [sys.executable, "-m"]
        super().__init__([f"{command[2].replace('.', '/')}.py", *command[3:]], Path(stdout.name))

    def wait(self, timeout: float = 300) -> int:
        while self.poll() is None and self.interrupted:
            if type(self).interrupted():
                type(self).interrupted = None
                raise KeyboardInterrupt
            time.sleep(0.01)
        return super().wait(timeout)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def run(world: Path) -> int | str | None:
    """How the tool leaves."""
    try:
        reproduce.main(["--world", str(world), "--tables", "1", "--gpus", "0"])
    except SystemExit as error:
        return error.code
    return None


def test_it_runs_goes_on_and_reports(tiny_world, monkeypatch, capsys):
    """Interrupted within a training, then to the end; a command that fails stops its evaluation
    alone, and at the second time nothing is repeated but that."""
    out = tiny_world.parent / "out"
    monkeypatch.setattr(reproduce, "commit", lambda: "0abc")
    monkeypatch.setattr(reproduce.subprocess, "Popen", Forked)
    monkeypatch.setattr(Forked, "interrupted", staticmethod(lambda: [
        path for path in out.glob("train-*/resume-*2.pt")]), raising=False)
    assert run(tiny_world) == 130
    plan = plan_of(str(tiny_world), out=out)
    bad, _, first, second = (job for job in plan.jobs.values() if job.is_training)
    assert 2 <= first.steps()[0] < 4 == first.steps()[1] and not second.folder.exists()
    capsys.readouterr()
    code = run(tiny_world)
    assert code.startswith("4 commands did not end well:\n") and f"needs {bad.folder}" in code
    assert "status 1, train.py: CROP_SIZE 7 is no multiple of" in code
    assert "going on at step" in (first.folder / "output.txt").read_text()
    failed = [job for job in plan.jobs.values() if not job.is_done()]
    assert len(failed) == 4 and all("crop_size-7" in job.folder.name or "crop_size-7" in
                                    job.needs[0].folder.name for job in failed)
    text = (out / "report.md").read_text()
    lines = {tuple(cells[:2]): cells[2:] for line in text.splitlines() if line.startswith("|")
             for cells in [[cell.strip() for cell in line.strip("|").split("|")]]}
    assert lines["CLIP", "ours"] and "±" not in "".join(lines["CLIP", "ours"])
    assert lines["bad", "ours"] == [""] * 4
    assert lines["self", "paper"] == ["50.0", "40.0", "40.0", "30.0"]
    values = [job.results()[0]["mAcc"]["box stuff"]["top1"] for job in plan.jobs.values()
              if job.script == "eval_region" and job.needs in ([first], [second])]
    mean, deviation = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    assert lines["", "ours"][1] == f"{mean:.1f} ± {deviation:.1f}"
    assert lines["", "difference"][1] == f"{mean - 40:+.1f}"
    assert "±" in lines["self again", "ours"][0] and "timm" in text and "CROP_SIZE 7" in text
    assert "--seed 0 --context clip --lambda 0` (4 steps); `eval_region.py" in text
    made_with = text.split("## Made with\n\n")[1].splitlines()
    assert made_with[0].startswith("- commit 0abc; 20") and "a CPU" in made_with[0]
    assert (out / "report.png").stat().st_size > 10_000
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")
              if "crop_size-7" not in str(path)}
    assert run(tiny_world) == code
    printed = capsys.readouterr().out
    assert printed.count("\nstatus 1 after") == printed.count("\nstatus ") == 2
    assert before == {path: path.stat().st_mtime_ns for path in before}
    # Whole rows are recorded, and stand in the document.
    (tiny_world.parent / "doc.md").write_text("A\n<!-- table: regions --><!-- end -->\nB\n")
    monkeypatch.chdir(tiny_world.parent)
    reproduce.main(["--world", str(tiny_world), "--render"])
    rows = json.loads(tiny_world.read_text())["tables"][0]["rows"]
    assert len(rows[0]["ours"][0]) == 1 and "ours" not in rows[1]
    assert rows[2]["ours"][1] == [round(mean, 1), round(deviation, 1)]
    doc = (tiny_world.parent / "doc.md").read_text()
    assert doc.startswith("A\n<!-- table: regions -->\n| | thing | stuff | both | mean | paper: th")
    assert f"| {mean:.1f} ± {deviation:.1f} |" in doc and doc.endswith("|\n<!-- end -->\nB\n")


@pytest.mark.slow
def test_a_tool_that_is_ended_goes_on(tiny_world):
    """By SIGTERM, in processes of its own."""
    out = tiny_world.parent / "out"
    command = [sys.executable, "-m", "tools.reproduce", "--world", str(tiny_world), "--tables", "1",
               "--seeds", "0"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tiny_world.parent, env=variables)
    end = time.monotonic() + 200
    while not [*out.glob("train-*/resume-*1.pt")] and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    plan = plan_of(str(tiny_world), "--seeds", "0", out=out)
    steps = [job.steps() for job in plan.jobs.values() if job.is_training]
    assert any(step for step, _ in steps), steps        # its last one, if it was faster than we
    done = subprocess.run(command, cwd=tiny_world.parent, env=variables, capture_output=True)
    assert done.returncode == 1 and b"2 commands did not end well" in done.stderr
    assert sum(job.is_done() for job in plan.jobs.values()) == len(plan.jobs) - 2


# ---------------------------------------------------------------------------------- the report

def test_figures_are_means_of_what_is_there(tmp_path):
    column = SimpleNamespace(of="seg", path=["IoU", ["cat", "dog", "elk"]], benchmark=None)
    job = SimpleNamespace(folder=tmp_path, results=lambda _: [
        {"IoU": {"cat": 0.0}}, {"IoU": {"cat": 10.0, "dog": None, "elk": 30.0}}])
    assert reproduce.value_of(column, job) == 20        # the newest; None does not count
    column.path = ["IoU", "cow"]
    with pytest.raises(ValueError, match="holds no results as evaluations write them"):
        reproduce.value_of(column, job)


def found(world: SimpleNamespace, number: int, *figures: object) -> report.Found:
    table = world.tables[2]
    return report.Found(table, table.rows[number], [*figures, *[None] * (6 - len(figures))],
                        ["`train.py` (12 steps)"])


def test_a_page_has_paper_ours_and_difference():
    world = report.read_world("docs")
    text = report.page(world, [found(world, 0, (70.0, 0.5), None, (29.0, None)), found(world, 1)],
                       ["commit abc"])
    name = "self-distillation alone"
    assert f"| {name} | paper | 69.5 | 44.6 | 29.4 | | 25.6 | |" in text
    assert "| | ours | 70.0 ± 0.5 | | 29.0 | | | |\n| | difference | +0.5 | | -0.4 | | | |" in text
    assert report.show((-0.04, None), "+") == "+0.0"
    assert "| | ours | | | | | | |" in text and text.count("difference") == 1
    assert f"- {name}: `train.py` (12 steps)\n" in text and text.count("12 steps") == 1
    assert "2 of 12 figures" in text and "What the paper leaves open" in text
    assert text.endswith("- commit abc\n")


def test_the_plot_shows_rows_that_were_run():
    world = report.read_world("docs")
    assert report.plot(world, [found(world, 1)]) is None
    figure = report.plot(world, [found(world, 0, (70.0, 0.5)), found(world, 1)])
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["self-distillation alone"]
    assert figure.get_suptitle() == world.title
    assert [text.get_text() for text in axis.get_legend().get_texts()][:2] == ["thing", "stuff"]
