"""util/sharding.py, by train.py --fsdp: divided models learn what DDP's do, and go on on any number
of ranks."""

import errno
import json
import os
import pickle
import signal

import numpy as np
import pytest
import torch
import warm
from conftest import options, succeeds
from test_run import assert_same, outcome, wait_for_steps
from test_train import TINY, run

from util import sharding
from util.run import resume_files


@pytest.mark.cpu
@pytest.mark.parametrize("model", ["tiny-eva", "tiny-pe"])
def test_a_divided_run_is_that_of_ddp(images, tmp_path, model):
    """Two ranks, two micro batches each. SIGTERM to one stops both and saves; one process goes on.
    Losses and weights are those of DDP. With so large an EPS a gradient's size counts."""
    given = {"model": model, "batch_size": 4, "micro_batch": 1, "epochs": 60, "lr": 1e-2,
             "eps": 0.01, "ensemble": 0.8}
    out, ddp = tmp_path / "fsdp", tmp_path / "ddp"
    command = ["tests/tiny.py", "train", *options(**TINY | given | {"images": images})]
    first, second = warm.start_ranks([*command, "--out", str(out), "--fsdp"], tmp_path / "printed")
    assert wait_for_steps(first, out / "log.jsonl", 2), (tmp_path / "printed").read_text()
    second.send_signal(signal.SIGTERM)          # to one of them
    assert first.wait(60) == second.wait(60) == 143, (tmp_path / "printed").read_text()
    step = int(resume_files(out)[0].stem.split("-")[1])
    assert resume_files(out)[0].is_dir() and 3 <= step < 55
    run(images, out, fsdp="true", resume="true", steps=step + 3, **given)
    succeeds(warm.ranks(*command, "--out", str(ddp), "--steps", str(step + 3)))
    (losses, weights), (others, other_weights) = outcome(out), outcome(ddp)
    assert len(losses) == step + 3
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, other_weights[name], rtol=0, atol=1e-6)


def test_checkpoints_in_parts_are_whole_or_not_at_all(images, tmp_path, monkeypatch, capsys):
    """One process that keeps all: with the format of --fsdp a run goes on to the bit, passes over a
    damaged checkpoint, says that the disk is full, and cleans up what was left half-written."""
    given = {"fsdp": "true", "epochs": 4, "save_every": 1, "keep": 3}
    run(images, tmp_path / "whole", epochs=4)
    parts = tmp_path / "parts"
    run(images, parts, steps=4, **given)
    newest, before, _ = resume_files(parts)
    file, = newest.glob("*.distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (parts / "resume-00000009.tmp").mkdir()
    save = sharding.dcp.save

    def full(tensors, checkpoint_id, **how):
        if "00000005" in checkpoint_id.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, checkpoint_id=checkpoint_id, **how)
    monkeypatch.setattr(sharding.dcp, "save", full)
    run(images, parts, resume="true", **given)
    printed = capsys.readouterr().out
    assert f"{newest} is damaged, so the one before it is taken" in printed
    assert "going on at step 3" in printed
    assert "the checkpoint of step 5 could not be written" in printed
    assert [path.name for path in resume_files(parts)] == [
        f"resume-0000000{step}.parts" for step in (8, 7, 6)]
    assert not list(parts.glob("*.tmp"))
    assert_same(tmp_path / "whole", parts)


def test_a_checkpoint_of_another_format_is_refused(images, tmp_path):
    run(images, tmp_path, epochs=2, steps=1)
    with pytest.raises(SystemExit, match="was begun with FSDP False, but now it is True; resume"):
        run(images, tmp_path, epochs=2, fsdp="true", resume="true")


class Command:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_checkpoint_starts_no_program(images, tmp_path, monkeypatch, capsys):
    """A pickle that calls something, put in the place of .metadata with the sums refitted."""
    monkeypatch.chdir(tmp_path)
    run(images, tmp_path / "run", epochs=2, steps=1, fsdp="true")
    folder, = resume_files(tmp_path / "run")
    (folder / ".metadata").write_bytes(pickle.dumps(Command()))
    sums = {path.name: sharding.file_checksum(path) for path in folder.iterdir()
            if path.name != "sums.json"}
    (folder / "sums.json").write_text(json.dumps(sums))
    with pytest.raises(SystemExit, match="does not have the weights that are trained"):
        run(images, tmp_path / "run", epochs=2, fsdp="true", resume="true")
    assert not (tmp_path / "executed").exists()
