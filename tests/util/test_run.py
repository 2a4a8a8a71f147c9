"""util/run.py, by train.py: no run is lost, no bad file stops one: kills, signals, damaged images,
full disks, gradients that are not finite."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torch.distributed.run
import warm
from conftest import options, succeeds
from PIL import Image
from safetensors.torch import load_file
from test_images import FORMATS, mutants
from test_train import TINY, run

import eval_seg
import train
from model import DeCLIP
from util import UserError
from util.distributed import Ranks
from util.images import list_images
from util.order import epoch_order
from util.run import LOG_FIELDS, Run, checksums, read_state, resume_files
from util.samples import Batch, ImageFiles
from util.weights import read_record

# 60 steps of `many` images, a checkpoint every 4 and every 10
LONG = TINY | {"epochs": 6, "save_every": 4, "num_workers": 1}


def start(out: Path, images: Path, ranks: int, launch=(), **changes) -> warm.Process:
    """A training in a process of its own, of several ranks by torchrun; it prints into
    `out`.printed."""
    command, printed = long_training(out, images, **changes)
    if ranks > 1:       # torchrun forks them, so they have imported everything
        command = [torch.distributed.run.__file__, "--standalone", "--start_method", "fork",
                   "--run_path", *launch, "--nproc_per_node", str(ranks), *command]
    return warm.Process(command, printed)


def start_both(out: Path, images: Path, **changes) -> list[warm.Process]:
    """The same of two ranks, without torchrun."""
    return warm.start_ranks(*long_training(out, images, **changes))


def long_training(out: Path, images: Path, **changes) -> tuple[list[str], Path]:
    """The command, and the file for what it prints, which is empty now."""
    printed = Path(f"{out}.printed")
    printed.write_text("")
    return ["tests/tiny.py", "train",
            *options(**LONG | changes | {"images": images, "out": out})], printed


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, the oldest first."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    return sorted(child for child, parent in parents.items() if parent == pid)


def family_of(pid: int) -> list[int]:
    """A process and all that it has started."""
    family = [pid]
    for member in family:
        family += children_of(member)
    return family


def kill_tree(process: warm.Process) -> None:
    """SIGKILL to a process and all that it has started, as when a machine is lost."""
    family = family_of(process.pid)
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(map(is_running, family)):     # they hold the folder until their end
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether a process has not ended, be it that nobody has asked for its status."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def wait_for_steps(process: warm.Process, log: Path, steps: int) -> bool:
    """Waits until the log has `steps` more lines; False if the training ended or hangs."""
    first, deadline = None, time.time() + 120
    while process.poll() is None and time.time() < deadline:
        lines = log.read_text().count("\n") if log.exists() else 0
        first = lines if first is None and lines else first
        if first is not None and lines >= first + steps:
            return True
        time.sleep(0.01)
    return False


def outcome(out: Path) -> tuple[list, dict]:
    """What must not depend on interruptions: the losses of each step, and the weights."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    keep = ("step", "epoch", "loss", "content", "context", "lr")
    return [[line[key] for key in keep]
            for line in lines], DeCLIP(pretrained=str(out / "declip.safetensors")).state_dict()


def assert_same(one: Path, other: Path) -> None:
    (losses, weights), (other_losses, other_weights) = outcome(one), outcome(other)
    assert losses == other_losses
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


# ----------------------------------------------------------------------------------- kills, signals

@pytest.fixture(scope="module")
def many(images, tmp_path_factory) -> Path:
    """Twenty images: epochs, which end with a checkpoint, are longer."""
    folder = tmp_path_factory.mktemp("many")
    for index in range(4):
        shutil.copytree(images, folder / str(index))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(many, tmp_path_factory) -> Path:
    """A run of 60 steps."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(many, folder, epochs=6)
    return folder


def kill_again_and_again(images: Path, out: Path, ranks: int, kills: int, **given) -> None:
    """Starts a training, kills it at a random moment, resumes it; at last lets it end."""
    rng, killed = random.Random(0), 0
    while killed < kills:
        process = start(out, images, ranks, resume="true", **given)
        if not wait_for_steps(process, out / "log.jsonl", rng.randint(0, 16)):
            break
        time.sleep(rng.random() * 0.05)
        kill_tree(process)
        killed += 1
    assert killed == kills, "the training ended before it was killed that often"
    last = start(out, images, ranks, resume="true", **given)
    assert last.wait(300) == 0, Path(f"{out}.printed").read_text()
    assert not list(out.glob("*.tmp"))


@pytest.mark.cpu
def test_killed_at_random_moments(many, tmp_path, uninterrupted, request):
    """SIGKILL, again and again; in the end losses and weights are those of a run that was never
    interrupted, bit for bit."""
    kills, ranks = (request.config.getoption(name) for name in ("--kills", "--ranks"))
    # Ten steps an epoch, five for two ranks; a run advances by 8 steps from kill to kill.
    given = {"epochs": max(6, 2 * kills) * ranks, "batch_size": 2 * ranks}
    whole = uninterrupted
    if kills > 4 or ranks > 1:
        whole = tmp_path / "whole"
        assert start(whole, many, ranks, **given).wait(500) == 0
    kill_again_and_again(many, tmp_path / "parts", ranks, kills, **given)
    assert_same(whole, tmp_path / "parts")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_leave(many, tmp_path, uninterrupted, number, code):
    """The whole group of processes gets it, as from a scheduler or a terminal; the code says what
    it was."""
    process = start(tmp_path / "parts", many, 1)
    assert wait_for_steps(process, tmp_path / "parts" / "log.jsonl", 5)
    os.killpg(process.pid, number)
    if number == signal.SIGTERM:
        os.killpg(process.pid, number)      # launchers repeat it
    process.wait(60)
    printed = (tmp_path / "parts.printed").read_text()
    assert process.returncode == code, printed
    step = json.loads((tmp_path / "parts" / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert (f"stopped by {number.name} after step {step}, which is saved; go on with --resume"
            in printed)
    assert "Traceback" not in printed
    run(many, tmp_path / "parts", epochs=6, resume="true")
    assert_same(uninterrupted, tmp_path / "parts")


@pytest.mark.cpu
def test_a_signal_to_one_rank_stops_both(many, tmp_path):
    out = tmp_path / "run"
    first, second = start_both(out, many, epochs=200)
    assert wait_for_steps(first, out / "log.jsonl", 5)
    second.send_signal(signal.SIGTERM)
    codes, printed = (first.wait(60), second.wait(60)), (tmp_path / "run.printed").read_text()
    assert codes == (143, 143) and "stopped by SIGTERM after step" in printed, printed
    step = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    assert resume_files(out)[0].name == f"resume-{step:08}.pt"


@pytest.mark.cpu
def test_two_ranks_killed_and_restarted(many, tmp_path):
    """First one rank, then the other: torchrun starts the command again, without --resume. Then the
    whole machine: the command with --resume ends as if nothing had happened, to the bit."""
    given = {"epochs": 8, "batch_size": 4}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeeds(warm.ranks(*long_training(whole, many, **given)[0]))
    process = start(parts, many, 2, launch=["--max_restarts", "3"], **given)
    for victim in (0, 1):
        assert wait_for_steps(process, parts / "log.jsonl", 5), Path(f"{parts}.printed").read_text()
        killed = children_of(process.pid)
        os.kill(killed[victim], signal.SIGKILL)
        deadline = time.time() + 60
        while time.time() < deadline and set(children_of(process.pid)) & set(killed):
            time.sleep(0.02)
    assert wait_for_steps(process, parts / "log.jsonl", 5), Path(f"{parts}.printed").read_text()
    kill_tree(process)
    succeeds(warm.ranks(*long_training(parts, many, resume="true", **given)[0]))
    assert_same(whole, parts)


@pytest.mark.cpu
def test_a_hung_rank_ends_the_run(many, tmp_path):
    """The other rank says so after TIMEOUT, and the run goes on from its last step."""
    out, given = tmp_path / "run", {"epochs": 12, "batch_size": 4}
    first, hung = start_both(out, many, timeout=3, **given)
    assert wait_for_steps(first, out / "log.jsonl", 8)
    hung.send_signal(signal.SIGSTOP)
    assert first.wait(60) == 1
    hung.kill()
    step, printed = int(resume_files(out)[0].stem.split("-")[1]), Path(f"{out}.printed").read_text()
    assert f"rank 0: step {step + 1} did not end within TIMEOUT, 3 s" in printed
    assert "hangs; go on with --resume" in printed
    assert run(many, out, steps=step + 1, resume="true", **given)[-1]["step"] == step + 1


def test_sigterm_saves_while_an_image_does_not_come(many, tmp_path, uninterrupted):
    """A worker that is stopped stands for a mount that hangs."""
    out, given = tmp_path / "run", {"epochs": 6, "save_every": 10**6}
    process = start(out, many, 1, **given)
    assert wait_for_steps(process, out / "log.jsonl", 8)
    worker, = (pid for pid in family_of(process.pid) if pid != process.pid)
    os.kill(worker, signal.SIGSTOP)
    time.sleep(1)
    began = time.time()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143 and time.time() - began < 10
    os.kill(worker, signal.SIGKILL)
    printed = Path(f"{out}.printed").read_text()
    step = int(resume_files(out)[0].stem.split("-")[1])
    assert f"stopped by SIGTERM while step {step + 1} waited for an image" in printed
    run(many, out, resume="true", **given)
    assert_same(uninterrupted, out)


def test_two_runs_do_not_write_into_one_folder(many, tmp_path):
    """As when a scheduler starts a run again that it has not ended yet."""
    process = start(tmp_path / "run", many, 1, epochs=200)
    assert wait_for_steps(process, tmp_path / "run" / "log.jsonl", 3)
    with pytest.raises(SystemExit, match="Another process is training into"):
        run(many, tmp_path / "run", epochs=200, save_every=4, num_workers=1, resume="true")
    kill_tree(process)
    # the lock went with the process
    run(many, tmp_path / "run", epochs=200, steps=1, resume="true")


@pytest.mark.cpu
def test_a_run_goes_on_with_other_ranks(images, tmp_path):
    """Begun by one process, stopped in the middle of an epoch, ended by two: the order of images is
    kept."""
    run(images, tmp_path / "one", epochs=4, batch_size=4)
    run(images, tmp_path / "both", epochs=4, batch_size=4, steps=2)
    given = {"images": images, "out": tmp_path / "both", "epochs": 4, "batch_size": 4}
    succeeds(warm.ranks("tests/tiny.py", "train",
                        *options(**TINY | given | {"resume": "true"})))
    (losses, weights), (other_losses,
                        other_weights) = outcome(tmp_path / "one"), outcome(tmp_path / "both")
    np.testing.assert_allclose(np.array(losses), np.array(other_losses), rtol=1e-4)
    for name in weights:
        torch.testing.assert_close(weights[name], other_weights[name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def of_shards(shards, tmp_path_factory) -> Path:
    """A run of 16 epochs on shards, 48 steps."""
    out = tmp_path_factory.mktemp("shards")
    run(shards, out, **OF_SHARDS)
    return out


OF_SHARDS = {"batch_size": 2, "epochs": 16, "max_bad_files": 0.5}


@pytest.mark.cpu
def test_a_run_on_shards_is_killed_and_goes_on(shards, of_shards, tmp_path):
    """In the middle of an epoch; it ends as if nothing had happened, to the bit. The file that is
    no image is listed once."""
    parts = tmp_path / "parts"
    process = start(parts, shards, 1, **OF_SHARDS)
    assert wait_for_steps(process, parts / "log.jsonl", 6), Path(f"{parts}.printed").read_text()
    kill_tree(process)
    assert 0 < int(resume_files(parts)[0].stem.split("-")[1]) < 48
    run(shards, parts, resume="true", **OF_SHARDS)
    assert_same(of_shards, parts)
    for out in (of_shards, parts):
        assert (out / "skipped.txt").read_text().count("00001.tar/bad.png\t") == 1


@pytest.mark.cpu
def test_a_run_on_shards_goes_on_with_other_ranks(shards, of_shards, tmp_path):
    """Two ranks stop in the middle of the third epoch, and one goes on."""
    out = tmp_path / "run"
    given = options(**TINY | OF_SHARDS | {"images": shards, "out": out, "steps": 7})
    succeeds(warm.ranks("tests/tiny.py", "train", *given))
    run(shards, out, resume="true", **OF_SHARDS)
    (losses, weights), (others, other_weights) = outcome(out), outcome(of_shards)
    np.testing.assert_allclose(losses, others, rtol=1e-3)
    for name in weights:
        torch.testing.assert_close(weights[name], other_weights[name], rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------- checkpoints

def test_the_last_checkpoints_are_kept_and_a_damaged_one_is_passed_over(images, tmp_path, capsys):
    whole = run(images, tmp_path / "whole", epochs=3)
    run(images, tmp_path / "parts", epochs=3, steps=4, save_every=1)
    newest, before = resume_files(tmp_path / "parts")
    assert (newest.name, before.name) == ("resume-00000004.pt", "resume-00000003.pt")
    newest.write_bytes(newest.read_bytes()[:5000])
    parts = run(images, tmp_path / "parts", epochs=3, save_every=1, resume="true")
    printed = capsys.readouterr().out
    assert "resume-00000004.pt is damaged, so the one before it is taken" in printed
    assert "going on at step 3" in printed
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]
    for path in resume_files(tmp_path / "parts"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="All checkpoints in .* are damaged"):
        run(images, tmp_path / "parts", epochs=3, save_every=1, resume="true")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("file write failed")])
def test_a_full_disk(images, tmp_path, capsys, monkeypatch, error):
    """It is said, the last good checkpoint stays, the run goes on; and if the end can't be written,
    the script fails."""
    save = torch.save

    def full(state, file):
        if state["step"] >= 3:
            Path(file).write_bytes(b"half")
            raise error
        save(state, file)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit, match="The last checkpoint could not be written .*; make room, "
                                         "and repeat the end with"):
        run(images, tmp_path / "full", epochs=3, save_every=1)
    assert "the checkpoint of step 3 could not be written" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "full").glob("[!.]*"))
    assert names == ["declip.safetensors", "log.jsonl", "resume-00000001.pt", "resume-00000002.pt"]
    monkeypatch.undo()
    parts = run(images, tmp_path / "full", epochs=3, resume="true")
    assert [line["loss"] for line in parts] == [line["loss"]
                                                for line in run(images, tmp_path / "whole",
                                                                epochs=3)]


def test_too_small_a_disk_is_said_before_training(images, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(SystemExit,
                       match="has 0.0 GB free, but the run's checkpoints take 0.0 GB; make room"):
        run(images, tmp_path, epochs=1)


def test_flipped_bits_are_noticed(images, tmp_path):
    """A resume file with any one bit flipped is either refused or read as what was written."""
    run(images, tmp_path, epochs=1)
    path, = resume_files(tmp_path)
    good, state, rng = path.read_bytes(), read_state(path), random.Random(0)
    refused = 0
    for _ in range(60):
        bytes_ = bytearray(good)
        bytes_[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes_)
        found = read_state(path)
        refused += found is None
        assert found is None or all(torch.equal(found["model"][name], weight)
                                    for name, weight in state["model"].items())
    assert refused > 50


def test_a_resume_file_that_lacks_weights_is_refused(images, tmp_path):
    run(images, tmp_path, epochs=2, steps=1)
    path, = resume_files(tmp_path)
    state = torch.load(path, weights_only=True)
    state["model"] = dict(list(state["model"].items())[1:])
    torch.save(state, path)
    with pytest.raises(SystemExit, match="does not have the weights that are trained"):
        run(images, tmp_path, epochs=2, resume="true")
    del state["optimizer"]
    torch.save(state, path)
    with pytest.raises(SystemExit, match="All checkpoints in .* are damaged"):
        run(images, tmp_path, epochs=2, resume="true")


@pytest.mark.parametrize("path, wrong", [
    (("optimizer", "state", 0, "exp_avg"), torch.zeros(2)),
    (("optimizer", "state", 0, "exp_avg_sq"), torch.zeros(4, dtype=torch.float16)),
    (("optimizer", "state", 0, "step"), 3), (("optimizer", "state", 0), {}),
    (("optimizer", "state"), [1]), (("optimizer", "param_groups"), [torch.zeros(3)]),
    (("optimizer", "param_groups", 0, "params"), [1]),
    (("model", "weight"), torch.zeros(5)), (("model", "weight"), "x"), (("scaler", "scale"), 0),
    (("step",), 2), (("step",), "3"), (("settings",), None), (("bad_steps",), -1),
    (("images",), 5), (("files",), [1])])
def test_a_checkpoint_with_a_wrong_field_is_refused(tmp_path, path, wrong):
    """PyTorch would take a moment of any shape, and write beyond its end."""
    train_line(tmp_path, 3, EPOCHS=3, STEPS=3)
    file, = resume_files(tmp_path)
    state = torch.load(file, weights_only=True)
    part = state
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = wrong
    torch.save(state, file)
    with pytest.raises(UserError, match="does not have the weights that are trained|are damaged"):
        train_line(tmp_path, 3, EPOCHS=3, STEPS=5, RESUME=True)


def test_a_run_goes_on_with_the_files_of_its_begin(tmp_path, capsys):
    """Not with others of the same names. A checkpoint of before says nothing of them, so the run
    goes on with a word."""
    (tmp_path / "a.json").write_text("1")
    given = {"EPOCHS": 3, "STEPS": 2, "DATASET": str(tmp_path / "a.json")}
    train_line(tmp_path / "run", 3, **given)
    train_line(tmp_path / "run", 3, **given, RESUME=True)
    (tmp_path / "a.json").write_text("2")
    with pytest.raises(UserError, match="begun with other content of the file that DATASET names"):
        train_line(tmp_path / "run", 3, **given, RESUME=True)
    file, = resume_files(tmp_path / "run")
    state = torch.load(file, weights_only=True)
    del state["files"]
    torch.save(state, file)
    train_line(tmp_path / "run", 3, **given, RESUME=True)
    assert "is of before files had checksums" in capsys.readouterr().out


def test_what_a_run_is_begun_with_has_a_checksum(tmp_path):
    """A file, and all of a model's folder."""
    shutil.copytree(tiny.ROOT / "toy/clip", tmp_path / "clip")
    (tmp_path / "x.json").write_text("{}")
    cfg = SimpleNamespace(MODEL=f"local-dir:{tmp_path / 'clip'}", IMAGES=str(tmp_path / "x.json"),
                          OUT=str(tmp_path), TAG="none.pt", VFM_MODEL="vit_base", LR=1.0)
    before = checksums(cfg, [tmp_path / "x.json"])
    assert before.keys() == {"MODEL", "IMAGES", "data"}
    (tmp_path / "clip/config.json").write_text("{}")
    after = checksums(cfg, [tmp_path / "x.json"])
    assert {name for name in before if before[name] != after[name]} == {"MODEL"}


def test_an_error_saves_the_last_good_step(images, tmp_path, monkeypatch, capsys):
    """Whatever raises, in the middle of an epoch: resumed, the run is the uninterrupted one."""
    given = {"epochs": 3, "batch_size": 1}
    whole = run(images, tmp_path / "whole", **given)
    calls, distill = iter(range(1, 100)), train.distill

    def fail(*arguments):
        if next(calls) == 8:
            raise RuntimeError("a kernel failed")
        return distill(*arguments)

    monkeypatch.setattr(train, "distill", fail)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        run(images, tmp_path / "parts", **given)
    assert "step 7 was saved; go on with --resume" in capsys.readouterr().out
    monkeypatch.undo()
    parts = run(images, tmp_path / "parts", **given, resume="true")
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]


FAILS = """
import sys, time
import tiny, train
def fail(*_):
    print("raised", time.time(), flush=True)
    raise RuntimeError("a kernel failed")
train.distill = fail
try:
    train.main(sys.argv[1:])
finally:
    print("left", time.time(), flush=True)
"""


def test_an_error_ends_the_process_at_once(images, tmp_path):
    """The workers do not keep it, and the real error is its last words: in less than two seconds on
    an idle machine."""
    given = options(**LONG | {"images": images, "out": tmp_path / "run", "num_workers": 2})
    script, printed = tmp_path / "fails.py", tmp_path / "printed"
    script.write_text(FAILS)
    status = warm.Process([str(script), *given], printed).wait(120)
    ended, lines = time.time(), printed.read_text().splitlines()
    raised = float(re.search("raised (.*)", "\n".join(lines))[1])
    assert status == 1 and "RuntimeError: a kernel failed" in lines[-1]
    assert ended - raised < 8


def test_a_worker_that_is_killed_is_one_sentence(images, tmp_path, monkeypatch):
    """Mostly by the system, for want of memory. The last step is saved."""
    own, read = os.getpid(), ImageFiles.read
    monkeypatch.setattr(ImageFiles, "read", lambda data, index: (
        os._exit(9) if index == 3 and os.getpid() != own else read(data, index)))
    with pytest.raises(SystemExit, match="a process that reads images has died, mostly because "
                                         "memory ran out: lower NUM_WORKERS"):
        run(images, tmp_path, epochs=3, num_workers=1)


# ------------------------------------------------------------------------------------------- images

def spoiled(images: Path, folder: Path) -> Path:
    """The five scenes and six files that look like images."""
    shutil.copytree(images, folder)
    good = (folder / "1.png").read_bytes()
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("not an image")
    (folder / "truncated.png").write_bytes(good[:len(good) // 2])
    (folder / "wrong extension.jpg").write_bytes(good)
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("RGB", (1, 1)).save(folder / "speck.png")
    Image.new("RGB", (20_000, 20)).save(folder / "strip.png")
    return folder


def test_bad_images_are_skipped_counted_and_listed(images, tmp_path):
    folder = spoiled(images, tmp_path / "images")
    lines = run(folder, tmp_path / "out", epochs=3, max_bad_files=0.5, num_workers=1)
    assert lines[-1]["bad_files"] == 4 and len(lines) == 18
    listed = dict(line.split("\t")
                  for line in (tmp_path / "out" / "skipped.txt").read_text().splitlines())
    assert {Path(path).name for path in listed} == {"empty.jpg", "text.png", "truncated.png",
                                                    "bomb.png"}
    assert "20000 x 20000" in listed[str(folder / "bomb.png")]
    assert "truncated" in listed[str(folder / "truncated.png")]


def test_names_of_any_bytes(images, tmp_path):
    """Names that are no UTF-8, with tabs and line breaks: trained, listed once, resumed."""
    folder = os.fsencode(shutil.copytree(images, tmp_path / "images"))
    for name in (b"\xff.png", b"a\tb\nc.png"):
        shutil.copy(folder + b"/1.png", folder + b"/" + name)
    for name in (b"bad\xfe.png", b"bad\n\t.png"):
        open(folder + b"/" + name, "wb").close()
    given = {"epochs": 3, "max_bad_files": 0.5, "batch_size": 3}
    whole = run(tmp_path / "images", tmp_path / "whole", **given)
    run(tmp_path / "images", tmp_path / "parts", **given, steps=4)
    parts = run(tmp_path / "images", tmp_path / "parts", **given, resume="true")
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]
    lines = (tmp_path / "parts" / "skipped.txt").read_bytes().splitlines()
    names = sorted(os.path.basename(line.split(b"\t")[0]) for line in lines)
    assert names == [b"bad\\n\\t.png", b"bad\xfe.png"]


def test_a_json_of_absolute_and_relative_names(images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    names = ["1.png", str(images / "2.png"), "3.png"]
    (images / "x.json").write_text(json.dumps({"images": [{"file_name": name} for name in names]}))
    lines = run("x.json", tmp_path / "out", epochs=1, batch_size=3)
    (images / "x.json").unlink()
    assert lines[-1]["step"] == 1


def test_images_that_come_back_count_as_good(images, tmp_path):
    """A mount that was away: after a resume its files are read, and do not count as bad."""
    folder = shutil.copytree(images, tmp_path / "images")
    good = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(b"")
    lines = run(folder, tmp_path / "out", epochs=4, steps=4, max_bad_files=0.5)
    assert lines[-1]["bad_files"] == 1
    (folder / "1.png").write_bytes(good)
    lines = run(folder, tmp_path / "out", epochs=4, max_bad_files=0.1, resume="true")
    assert lines[-1]["bad_files"] == 0


def test_lines_that_cannot_be_read_do_not_stop_a_resume(images, tmp_path):
    whole = run(images, tmp_path / "whole", epochs=3)
    run(images, tmp_path / "parts", epochs=3, steps=2)
    for name in ("log.jsonl", "skipped.txt", "bad_steps.jsonl"):
        with open(tmp_path / "parts" / name, "ab") as file:
            file.write(b'\xff\x00\n[1]\n{"step": "x"}\n{"ste')
    parts = run(images, tmp_path / "parts", epochs=3, resume="true")
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]


def test_too_many_bad_images_stop_the_run(images, tmp_path):
    folder = spoiled(images, tmp_path / "images")
    with pytest.raises(SystemExit, match=r"of 12 images or their labels can't be used, more than "
                                         r"MAX_BAD_FILES, 1.00%; they are listed"):
        run(folder, tmp_path / "out", epochs=3)
    assert (tmp_path / "out" / "skipped.txt").exists()
    (tmp_path / "none").mkdir()
    for index in range(3):
        (tmp_path / "none" / f"{index}.jpg").write_bytes(b"")
    with pytest.raises(SystemExit,
                       match="3 files in a row can't be read; the last reason: "):
        run(tmp_path / "none", tmp_path / "out2", epochs=1)


@pytest.mark.cpu
def test_ranks_stay_in_step_with_a_bad_image_on_one(images, tmp_path):
    """One bad file among twelve: both ranks end the epoch with equal weights, those of one process,
    and one list."""
    folder = shutil.copytree(images, tmp_path / "images")
    for index in range(6):
        shutil.copy(folder / "1.png", folder / f"copy{index}.png")
    (folder / "bad.png").write_bytes(b"")
    given = options(**TINY | {"images": folder, "epochs": 1, "batch_size": 4, "max_bad_files": 0.5})
    succeeds(warm.ranks("tests/keep_weights.py", str(tmp_path / "weights"), *given, "--out",
                        str(tmp_path / "two")))
    train.main([*given, "--out", str(tmp_path / "one")])
    first, second = (torch.load(tmp_path / f"weights.{rank}", weights_only=True)
                     for rank in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = DeCLIP(pretrained=str(tmp_path / "one" / "declip.safetensors")).visual.state_dict()
    for name in first:
        torch.testing.assert_close(first[name], alone[name], rtol=0, atol=1e-5)
    assert (tmp_path / "two" / "skipped.txt").read_text().count("bad.png\t") == 1


@pytest.mark.slow
def test_2500_mutants_are_trained_on(scenes, tmp_path):
    """Those that can't be read are counted and listed; the others are trained on, to the end."""
    (tmp_path / "images").mkdir()
    listed = {path.name for path in mutants(scenes[0][0], tmp_path / "images", 2500, FORMATS)}
    lines = run(tmp_path / "images", tmp_path / "out", epochs=1, batch_size=10, num_workers=2,
                image_size=32, max_bad_files=1, log_every=50)
    skipped = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    names = [Path(line.split("\t")[0]).name for line in skipped]
    assert lines[-1]["step"] == 250 and lines[-1]["bad_steps"] == 0
    assert 250 < len(names) == lines[-1]["bad_files"] < 2250 and set(names) <= listed
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", ["image", "label"])
def test_1250_mutants_are_evaluated_or_refused(scenes, tmp_path, monkeypatch, damaged):
    """A benchmark of one image, it or its label damaged: a result, or one sentence."""
    clip = DeCLIP("tiny-eva")
    monkeypatch.setattr(eval_seg, "open_model", lambda cfg: clip)
    (tmp_path / "classes.txt").write_text("ground\ndisc\nbox\n")
    good = {"image": scenes[0][0], "label": scenes[0][1]}
    for name, pixels in good.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.x.png")
    (tmp_path / "my.json").write_text(json.dumps({"image": "image.{}.png", "label": "label.{}.png",
                                                  "classes": "classes.txt"}))
    given = options(benchmarks=tmp_path / "my.json", window=32, stride=32, short_side=32,
                    num_workers=0, out=tmp_path / "out", templates="{}")
    ends = Counter()
    (tmp_path / "mutants").mkdir()
    formats = FORMATS if damaged == "image" else ["png"]
    for path in mutants(good[damaged], tmp_path / "mutants", 1250, formats):
        path.replace(tmp_path / f"{damaged}.x.png")
        try:
            eval_seg.main(given)
            ends["evaluated"] += 1
        except SystemExit as error:
            assert str(error).startswith("eval_seg.py: ") and "\n" not in str(error)
            ends["refused"] += 1
    print(ends)
    assert ends["evaluated"] and ends["refused"] > 20


# ------------------------------------------------------------------------------------------ numbers

def poisoned(monkeypatch, steps: set[int]) -> None:
    """Makes the content loss of some steps no number; steps are counted from 1."""
    calls, content_loss = iter(range(1, 10_000)), train.content_loss
    monkeypatch.setattr(train, "content_loss", lambda *given:
                        content_loss(*given) * (float("nan") if next(calls) in steps else 1))


def test_a_step_that_is_no_number_is_left_out(images, tmp_path, monkeypatch):
    """Weights, moments and the count of steps stay as they were; the step is logged with its
    images."""
    cfg = {"epochs": 3, "save_every": 1, "keep": 9, "lr": 1e-2}
    poisoned(monkeypatch, {6})
    lines = run(images, tmp_path, **cfg)
    before, after = (torch.load(tmp_path / f"resume-0000000{step}.pt", weights_only=True)
                     for step in (5, 6))
    assert all(torch.equal(before["model"][name], after["model"][name])
               for name in before["model"])
    for one, other in zip(before["optimizer"]["state"].values(),
                          after["optimizer"]["state"].values()):
        assert all(torch.equal(one[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert [line["bad_steps"] for line in lines] == [0, 0, 0, 0, 0, 1]
    assert lines[5]["loss"] is None
    assert all(line["loss"] < 10 for line in lines if line["step"] != 6)
    event, = map(json.loads, (tmp_path / "bad_steps.jsonl").read_text().splitlines())
    order, (paths, _) = epoch_order(5, 2, 2, 0)[1].tolist(), list_images(images)
    assert event == {"step": 6, "files": [paths[index] for index in order]}


def test_too_many_such_steps_stop_the_run(images, tmp_path, monkeypatch):
    poisoned(monkeypatch, {2, 4, 5, 6})
    with pytest.raises(SystemExit, match="The gradient was not finite in 3 steps in a row, up to "
                                         "step 6; lower LR"):
        run(images, tmp_path, epochs=10, max_bad_steps=3)
    state = torch.load(resume_files(tmp_path)[0], weights_only=True)
    assert all(weight.isfinite().all() for weight in state["model"].values())
    assert all(weight.isfinite().all()
               for weight in DeCLIP(pretrained=str(tmp_path / "declip.safetensors")).parameters())


def test_nothing_is_saved_while_steps_are_bad(images, tmp_path, monkeypatch, capsys):
    """The checkpoint of step 2 stays through the bad steps 4 to 7; step 8, the next good one, is
    saved; a run that ends in bad steps says what it keeps."""
    given = {"epochs": 20, "save_every": 2, "keep": 9}
    poisoned(monkeypatch, {4, 5, 6, 7, *range(13, 40)})
    with pytest.raises(SystemExit, match="run ends here, but the last 4 steps had no finite "
                                         "gradient, .* keeps the checkpoint of step 12"):
        run(images, tmp_path, **given, steps=16)
    names = [int(path.stem.split("-")[1]) for path in resume_files(tmp_path)]
    assert names == [12, 10, 8, 2]
    assert read_record(tmp_path / "declip.safetensors")["settings"]["step"] == 12
    assert capsys.readouterr().out.count("is not saved, since the last") == 2
    steps = [json.loads(line)["step"]
             for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert steps == [4, 5, 6, 7, 13, 14, 15, 16]
    monkeypatch.undo()      # resumed, they are made again, and each bad step is listed once
    poisoned(monkeypatch, {2})
    run(images, tmp_path, **given, steps=16, resume="true")
    steps = [json.loads(line)["step"]
             for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert steps == [4, 5, 6, 7, 14]


def test_a_learning_rate_that_destroys_the_weights(images, tmp_path):
    with pytest.raises(SystemExit, match="in 5 steps in a row, up to step .*; lower LR .* has no "
                                         "checkpoint yet"):
        run(images, tmp_path, epochs=60, lr=1e30, max_bad_steps=5)


# ------------------------------------------------------------------------------- any other model

class Line(torch.nn.Module):
    """The smallest model that can be trained and can write itself."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.norm = torch.nn.BatchNorm1d(4, affine=False)       # its statistics are kept, too

    def save(self, path: Path, about: dict) -> None:
        torch.save({"weight": self.weight.detach(), "step": about["step"]}, path)


# A task of its own has these settings and no more: none says where its images are.
OF_LINE = {"RESUME": False, "EPOCHS": 1, "STEPS": None, "BATCH_SIZE": 1, "MICRO_BATCH": 1,
           "PRECISION": "fp32", "LOG_EVERY": 100, "SAVE_EVERY": 100, "KEEP": 1,
           "MAX_BAD_FILES": 0.0, "MAX_BAD_STEPS": 20, "TIMEOUT": 600}
ALONE = Ranks(0, 1, torch.device("cpu"))


def line_run(out: Path, steps: int, **changes) -> Run:
    """A run on `steps` images that are no files; changes: settings other than those of OF_LINE."""
    images = SimpleNamespace(paths=["x"] * steps, fingerprint=f"{steps} images")
    return Run(SimpleNamespace(OUT=str(out), **OF_LINE | changes), ALONE, images, "line.pt")


def train_line(out: Path, steps: int, bad=(), left_out=(), fails_at=None, **changes
               ) -> tuple[torch.Tensor, int]:
    """Fits a line by util/run.py -> its weights and the number of bad steps.

    bad: steps whose loss is made NaN. left_out: steps that the optimiser does not make. fails_at: a
    step that ends after its forward.
    """
    model = Line()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step_of_optimizer = optimizer.step
    with line_run(out, steps, **changes) as run:
        run.begin(model, optimizer, model.save)
        for step in run.steps():
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            for batch in run.micro_batches(iter([Batch([x], [step], [[]])])):
                with run.forward():
                    guess = batch.data[0] @ model.weight
                    error = (guess.float() - x.sum(dim=1)).square().mean()
                    model.norm(x)
                if step == fails_at:
                    raise RuntimeError("a kernel failed")
                run.backward(error * (float("nan") if step in bad else 1), {"error": error}, batch)
            optimizer.step = (lambda: None) if step in left_out else step_of_optimizer
            run.end_step(0.01)
    return model.weight.detach(), run.guard.bad_steps


def test_an_error_saves_the_statistics_of_the_last_step(tmp_path):
    """Not those that the step which failed had changed already."""
    with pytest.raises(RuntimeError, match="a kernel failed"):
        train_line(tmp_path / "failed", 10, fails_at=7)
    train_line(tmp_path / "whole", 7)
    failed, whole = (read_state(tmp_path / name / "resume-00000007.pt")["model"]
                     for name in ("failed", "whole"))
    assert failed["norm.num_batches_tracked"] == 7
    assert all(torch.equal(failed[name], whole[name]) for name in whole)


def test_200_bad_steps_are_as_if_they_had_been_left_out(tmp_path):
    """The weights are, to the bit, those of a run without these steps."""
    bad = set(range(1, 401, 2))
    weights, count = train_line(tmp_path / "bad", 402, bad=bad)
    expected, none = train_line(tmp_path / "left out", 402, left_out=bad)
    assert (count, none) == (200, 0) and torch.equal(weights, expected)
    assert (weights - 1).abs().max() < 0.5      # it learned meanwhile
    lines = [json.loads(line) for line in (tmp_path / "bad/log.jsonl").read_text().splitlines()]
    assert set(lines[0]) - set(LOG_FIELDS) == {"loss", "error"}
    assert torch.equal(torch.load(tmp_path / "bad/line.pt", weights_only=True)["weight"], weights)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip_norm, expected", [(None, (-1.5, -0.2)), (10.0, (-1.5, -0.2)),
                                                 (1.0, (-0.3, -0.04))])
def test_groups_learn_at_their_share_and_long_gradients_are_cut(tmp_path, precision, clip_norm,
                                                                expected):
    """Gradients of 3 and 4, 5 long, at a rate of 0.5 of which one group has a tenth; then a step
    without a finite gradient, which changes nothing."""
    weights = torch.nn.ParameterDict({name: torch.zeros(1) for name in ("one", "other")})
    optimizer = torch.optim.SGD([{"params": [weights["one"]]},
                                 {"params": [weights["other"]], "share": 0.1}])
    with line_run(tmp_path, 2, PRECISION=precision, LOG_EVERY=1) as run:
        run.begin(weights, optimizer, save=lambda path, about: None)
        for step in run.steps():
            for batch in run.micro_batches(iter([Batch([], [step], [[]])])):
                loss = (3 * weights["one"] + 4 * weights["other"]).sum()
                run.backward(loss * (float("nan") if step == 1 else 1), {}, batch)
            run.end_step(0.5, clip_norm)
    assert (weights["one"].item(), weights["other"].item()) == pytest.approx(expected, rel=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["lr"], line["bad_steps"]) for line in lines] == [(0.5, 0), (0.5, 1)]


def test_other_images_are_refused_by_what_they_are(tmp_path):
    """No setting of the run names them."""
    train_line(tmp_path, 9, STEPS=4)
    with pytest.raises(UserError, match="was begun with 9 images .number, checksum of names., but "
                                        "now there are 10 images; resume with the same images"):
        train_line(tmp_path, 10, RESUME=True)
    weights, _ = train_line(tmp_path, 9, RESUME=True)
    assert torch.equal(weights, train_line(tmp_path / "whole", 9)[0])


def test_fp16_lowers_its_scale_without_bad_steps(tmp_path):
    """Scaled gradients overflow at first; the losses are finite, so no step counts as bad."""
    weights, count = train_line(tmp_path, 60, PRECISION="fp16")
    assert count == 0 and weights.abs().max() > 0.1
    _, count = train_line(tmp_path / "nan", 60, PRECISION="fp16", bad={3, 30})
    assert count == 2


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """Should they become so where no gradient shows it, the files of the last save stay."""
    step = torch.optim.AdamW.step

    def spoil(self, *given):
        step(self, *given)
        if self.state[self.param_groups[0]["params"][0]]["step"] == 150:
            self.param_groups[0]["params"][0].data[0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    bad = set(range(150, 200))
    monkeypatch.setattr("util.run.is_bad_step", lambda *_: torch.zeros((), dtype=torch.bool))
    with pytest.raises(UserError, match="The weights are not finite after step 200, .* keeps the "
                                        "checkpoint of step 100"):
        train_line(tmp_path, 300, left_out=bad)
    saved = torch.load(tmp_path / "line.pt", weights_only=True)
    assert saved["step"] == 100 and saved["weight"].isfinite().all()


# ------------------------------------------------------------------------------------ a full disk

FULL = """
import ctypes, os, shutil, sys, threading, time
from pathlib import Path
import tiny, train

out, *argv = sys.argv[1:]
libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
if libc.unshare(0x10000000 | 0x20000):      # CLONE_NEWUSER, CLONE_NEWNS
    sys.exit(77)
for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
    Path("/proc/self", name).write_text(line)
if libc.mount(b"tmpfs", os.fsencode(out), b"tmpfs", 0, b"size=40m"):
    sys.exit(77)
log, ended = Path(out, "log.jsonl"), threading.Event()

def fill():
    while not ended.is_set() and (not log.exists() or log.read_text().count("\\n") < 3):
        time.sleep(0.02)
    with open(Path(out, "fill"), "wb", buffering=0) as file:
        while not ended.is_set():       # a checkpoint that fails makes room again
            try:
                file.write(bytes(2**20))
            except OSError:
                time.sleep(0.01)

filler = threading.Thread(target=fill)
filler.start()
try:
    train.main([*argv, "--out", out])
except SystemExit as error:
    print("ended by:", error)
finally:
    ended.set()
    filler.join()
Path(out, "fill").unlink()
train.main([*argv, "--out", out, "--resume"])
shutil.copy(log, out + ".log")
"""


def test_a_disk_that_fills_up(images, tmp_path):
    """A real one: the run goes on to its end without a byte to write, and says so; with room, it
    is resumed to the end."""
    out, script, file = (tmp_path / name for name in ("run", "full.py", "printed"))
    out.mkdir()
    script.write_text(FULL)
    given = options(**TINY | {"images": images, "epochs": 12})
    status = warm.Process([script, out, *given], file).wait()
    if status == 77:
        pytest.skip("no file system can be mounted here")
    printed = file.read_text()
    assert status == 0, printed
    assert "log.jsonl could not be written" in printed and "the run goes on" in printed
    assert "ended by: train.py: The last checkpoint could not be written" in printed
    steps = [json.loads(line)["step"] for line in Path(f"{out}.log").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 24


def test_the_model_is_that_of_the_last_step(images, tmp_path):
    """A kill between the resume file and the model leaves an older model, or none; --resume writes
    the right one, also where no step is left."""
    run(images, tmp_path / "run", epochs=2)
    path = tmp_path / "run/declip.safetensors"
    last, steps = load_file(path), read_record(path)["settings"]["step"]
    run(images, tmp_path / "older", epochs=2, steps=1)
    for left in (None, tmp_path / "older/declip.safetensors"):
        path.unlink()
        if left:
            shutil.copy(left, path)
        run(images, tmp_path / "run", epochs=2, resume="true")
        assert read_record(path)["settings"]["step"] == steps > 1
        assert all(torch.equal(value, last[name]) for name, value in load_file(path).items())


def test_only_its_own_half_written_files_are_removed(images, tmp_path):
    run(images, tmp_path, epochs=2, steps=1)
    own = [tmp_path / f"{name}.{32 * 'a'}.tmp" for name in (
        "declip.safetensors", "resume-00000007.pt", "log.jsonl")]
    mine = [tmp_path / "notes.tmp", tmp_path / "declip.safetensors.tmp"]
    for path in (*own, *mine):
        path.touch()
    run(images, tmp_path, epochs=2, resume="true")
    assert not any(path.exists() for path in own) and all(path.exists() for path in mine)


def test_a_process_that_stood_still_goes_on(many, tmp_path):
    """SIGSTOP for longer than TIMEOUT, then SIGCONT."""
    process = start(tmp_path / "run", many, 1, timeout=4)
    assert wait_for_steps(process, tmp_path / "run/log.jsonl", 3)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(6)
    os.kill(process.pid, signal.SIGCONT)
    before = len((tmp_path / "run/log.jsonl").read_text().splitlines())
    assert wait_for_steps(process, tmp_path / "run/log.jsonl", before + 3)
    kill_tree(process)
