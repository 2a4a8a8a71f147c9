"""gpu.py: checks go on after one that fails, the report says so, and all of their options exist."""

import importlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import ROOT

from tools import bench, gpu
from tools.gpu import Check
from util import settings


def test_checks_go_on_after_a_failure(tmp_path, monkeypatch):
    """One that fails, one that takes too long, with processes of its own, and one that is well."""
    (tmp_path / "late.py").write_text(
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; "
        "time.sleep(60)'])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "checks", lambda: {
        "wrong": Check("no_such_module"), "late": Check("late", limit=2),
        "right": Check("json.tool --help")})
    with pytest.raises(SystemExit, match="2 of 3 checks failed, wrong, late; read .*log.txt"):
        gpu.main(["--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [result["state"] for result in results.values()] == [
        "failed (1)", "not done in 2 s", "ok"]
    report = (tmp_path / "out/report.md").read_text()
    assert re.search(r"\| wrong \| failed \(1\): .*No module named no_such_module \|", report)
    assert "| right | ok |" in report
    assert "No module named no_such_module" in (tmp_path / "out/log.txt").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "log.txt", "results.json", "report.md"}


@pytest.mark.parametrize("count, batch", [(1, 8), (2, 8), (3, 6), (8, 8), (16, 16)])
def test_any_number_of_gpus_shares_a_batch(monkeypatch, count, batch):
    monkeypatch.setattr(gpu.torch.cuda, "device_count", lambda: count)
    for name, check in gpu.checks().items():
        words = gpu.command_of(name, check, "out")
        if "--nproc_per_node" in words and name != "one rank":
            assert words[words.index("--nproc_per_node") + 1] == str(count)
            assert words[words.index("--batch_size") + 1] == str(batch)


def test_time_ends(tmp_path, monkeypatch):
    """For each check, and for all."""
    (tmp_path / "late.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "checks", lambda: {"a": Check("late"), "b": Check("late")})
    with pytest.raises(SystemExit, match="2 of 2 checks failed"):
        gpu.main(["--out", str(tmp_path / "out"), "--minutes", "0.03"])
    report = (tmp_path / "out/report.md").read_text()
    assert "| a | not done in 2 s |" in report and "| b | no time left |" in report


@pytest.mark.cpu
def test_figures_of_a_check_are_in_the_report(tmp_path, monkeypatch):
    """Those that a process prints last, as a line of json."""
    (tmp_path / "found.py").write_text("print('...')\nprint('{\"images/s\": \"7\"}')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "checks", lambda: {
        "bench": Check("found"), "other": Check("no_such_module")})
    gpu.main(["--out", str(tmp_path / "out"), "--checks", "bench"])
    report = (tmp_path / "out/report.md").read_text()
    assert "## bench\n\n| | |\n|---|---|\n| images/s | 7 |" in report
    assert "no GPU: toy models and small sizes" in report and "torch 2" in report


def test_unknown_checks_are_a_sentence():
    with pytest.raises(SystemExit, match="CHECKS is .* it must be some of suite 'losses 560'"):
        gpu.main(["--checks", "speed"])


def test_every_option_exists():
    """Of the scripts that are run, and of the bench, with those for a machine without a GPU."""
    parsed = 0
    for check in gpu.checks().values():
        if check.bench:
            settings.parse(f"{check.bench} {check.small}".split(), bench)
            parsed += 1
        script = re.search(r"(?:-m )?((?:downstream|toy)\.\S+|train\.py) (.*)", check.words)
        if script:
            module = importlib.import_module(script[1].removesuffix(".py"))
            settings.parse(script[2].replace("{batch}", "8").split(), module)
            parsed += 1
    assert parsed == 19


def test_some_checks_leave_the_others_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "checks", lambda: {"a": Check("json.tool --help"),
                                                "b": Check("zipfile --help")})
    gpu.main(["--out", str(tmp_path)])
    gpu.main(["--out", str(tmp_path), "--checks", "b"])
    log = (tmp_path / "log.txt").read_text()
    assert log.count("##### python -m zipfile") == 2 and log.count("##### python -m json.tool") == 1
    assert list(json.loads((tmp_path / "results.json").read_text())) == ["a", "b"]
    gpu.main(["--out", str(tmp_path)])
    assert (tmp_path / "log.txt").read_text().count("##### python") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_check(tmp_path, number):
    command = [sys.executable, "-m", "tools.gpu", "--checks", "memory", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log, end = tmp_path / "log.txt", time.monotonic() + 60
    while not log.exists() or "tools.gpu --only memory" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (started := children.read_text().split()):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == 130
    assert not any(Path(f"/proc/{child}").exists() for child in started)


def test_figures_of_a_bench_have_its_parts(monkeypatch):
    """Two parts have rows of one name."""
    speed = {form: bench.Row("images/s", {"this code": rate}) for form, rate in (("train", 2),
                                                                               ("segment", 30))}
    monkeypatch.setattr(bench, "main", lambda words: {part: [row] for part, row in speed.items()})
    assert gpu.figures_of(Check(bench="--parts train segment")) == {
        "train: images/s": "2", "segment: images/s": "30"}


@pytest.mark.cpu
def test_losses_and_classes_are_held_to_the_plain_forms(monkeypatch):
    """In this process, with the toy models: fp32 equals itself, bf16 is near; a model that changes
    between the devices is noticed."""
    monkeypatch.chdir(ROOT)
    found = gpu.check_losses(560)
    assert found["fp32: largest relative error of a loss, of the gradient"] == "0e+00, 0e+00"
    build = gpu.build

    def changed(*given) -> tuple:
        cfg, clip, models = build(*given)
        to = models[1].to
        monkeypatch.setattr(models[1], "to", lambda device: to(device).float().apply(
            lambda part: part.weight.data.mul_(1.1) if hasattr(part, "weight") else None))
        return cfg, clip, models

    monkeypatch.setattr(gpu, "build", changed)
    with pytest.raises(AssertionError, match="fp32"):
        gpu.check_losses(560)


@pytest.mark.slow
def test_all_checks_without_a_gpu(tmp_path):
    """What `make gpu` does on such a machine, in minutes."""
    gpu.main(["--out", str(tmp_path)])
