"""docs/linear_probe.py: the example of a task of one's own learns, resumes and is scored."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import warm
from conftest import options, succeeds
from PIL import Image
from safetensors.torch import load_file
from test_eval_seg import slow_iou

from docs import linear_probe
from eval_seg import find_set
from model import DeCLIP
from toy import world
from util import settings
from util.labels import VOID
from util.results import read_results

TINY = {"image_size": 64, "batch_size": 2, "micro_batch": 2, "num_workers": 0, "log_every": 1,
        "lr": 0.1}


@pytest.fixture(scope="module")
def described(tmp_path_factory, scenes) -> Path:
    """Scenes of a user's own, described by a json; their first row is void."""
    folder = tmp_path_factory.mktemp("own")
    for index, (image, label) in enumerate(scenes):
        values = label.copy()
        values[0] = 255
        Image.fromarray(image).save(folder / f"{index}.jpg", quality=95)
        Image.fromarray(values).save(folder / f"{index}.png")
    (folder / "classes.txt").write_text("ground\ndisc\nbox\n")
    (folder / "my.json").write_text(json.dumps({
        "image": "{}.jpg", "label": "{}.png", "classes": "classes.txt", "void": [255]}))
    return folder / "my.json"


@pytest.fixture(scope="module")
def chosen(tmp_path_factory, described) -> dict:
    """Options: a checkpoint that says itself what it is, and the sets."""
    torch.manual_seed(0)
    clip = DeCLIP("tiny-eva", context="qk")
    for weight in clip.visual.trunk.parameters():   # stronger than at the start: patches differ
        torch.nn.init.normal_(weight, std=0.3 if weight.ndim > 1 else 0.5)
    path = tmp_path_factory.mktemp("checkpoint") / "declip.safetensors"
    clip.save(path)
    return TINY | {"ckpt": path, "train": described, "val": described}


def run(chosen: dict, out: Path, **given) -> dict:
    """Trains and evaluates; returns the figures."""
    return linear_probe.main(options(**chosen | {"out": out} | given))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "linear_probe.safetensors")


def test_a_linear_layer_learns_to_see_the_toy_world(toy_home):
    """With the sets of its settings: a few steps name what one step does not."""
    world.main(options(train=0, dev=24, val=8, size=128))
    given = {"model": "local-dir:toy/clip", "pretrained": "own", "num_workers": 0, "log_every": 1,
             "lr": 0.1}
    first, last = (linear_probe.main(options(**given, steps=steps, out=str(steps)))
                   for steps in (1, 12))
    assert last["mIoU"] > first["mIoU"] + 6, (first, last)
    lines = [json.loads(line) for line in Path("12/log.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[0]["lr"] == 0.1 > lines[-1]["lr"] > 0
    assert set(weights(Path("12"))) == {"weight", "bias"}      # nothing else is trained


def test_its_score_is_that_of_its_predictions(chosen, tmp_path, scenes):
    """mIoU in linear_probe.json, computed pixel by pixel from the layer that the run left."""
    result = run(chosen, tmp_path, epochs=5)
    written, = read_results(tmp_path / "linear_probe.json", val=str(chosen["val"]))
    assert {key: written[key] for key in result} == result
    probe = linear_probe.LinearProbe(DeCLIP(pretrained=str(chosen["ckpt"])), None, 3)
    probe.head.load_state_dict(weights(tmp_path))
    images, _ = find_set(str(chosen["val"]), "data")
    predictions = linear_probe.predict(probe, 64, [image for image, _ in images])
    labels = [label.copy().astype(int) for _, label in scenes]
    for label in labels:
        label[0] = VOID
    expected = slow_iou(np.concatenate([label.flatten() for label in labels]),
                        np.concatenate([found.flatten() for found in predictions]), 3)
    assert list(result["IoU"].values()) == pytest.approx(expected, abs=0.006)
    assert result["mIoU"] == pytest.approx(np.mean(expected))


class Killed(BaseException):
    """An end at which a run can do nothing any more."""


@pytest.mark.cpu
def test_a_killed_run_goes_on_as_if_nothing_was(chosen, tmp_path, monkeypatch):
    """Killed in the middle of an epoch, two steps after its last checkpoint; and stopped by STEPS.
    """
    whole = run(chosen, tmp_path / "whole", epochs=5)
    step, count = torch.optim.AdamW.step, []

    def killing(optimizer, *rest):
        count.append(1)
        if len(count) == 6:
            raise Killed
        return step(optimizer, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(torch.optim.AdamW, "step", killing)
        run(chosen, tmp_path / "killed", epochs=5, save_every=3)
    run(chosen, tmp_path / "stopped", epochs=5, steps=7)
    for name in ("killed", "stopped"):
        assert run(chosen, tmp_path / name, epochs=5, resume="true") == whole
        for key, value in weights(tmp_path / "whole").items():
            assert torch.equal(weights(tmp_path / name)[key], value)


@pytest.mark.cpu
def test_two_ranks_train_as_one(chosen, tmp_path):
    """Each sees half of every batch, and half of the images that are scored."""
    alone = run(chosen, tmp_path / "one", epochs=3)
    given = chosen | {"micro_batch": 1, "epochs": 3, "out": tmp_path / "two"}
    succeeds(warm.ranks("tests/tiny.py", "docs.linear_probe", *options(**given)))
    together, = read_results(tmp_path / "two/linear_probe.json")
    assert together["pixels"] == alone["pixels"]
    assert together["mIoU"] == pytest.approx(alone["mIoU"], abs=2)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    # Void pixels are not divided evenly, so the mean of two ranks' means is nearly that of all.
    assert (one["weight"] - two["weight"]).abs().mean() < 0.2 * one["weight"].abs().mean()


def test_the_padding_is_void(described):
    """Labels lie as the image does: here, 80 x 40 in a square of 64."""
    images, _ = find_set(str(described), "data")
    clip = DeCLIP("tiny-eva")
    inputs, labels = linear_probe.views([linear_probe.Labelled(*images[2])], 64, clip)
    assert inputs.shape == (1, 3, 64, 64) and labels.shape == (1, 64, 64)
    assert (labels[0, :, 32:] == VOID).all() and (labels[0, 0] == VOID).all()
    assert set(labels[0, 1:, :32].unique().tolist()) == {0, 1, 2}


def test_classes_of_both_sets_are_as_many(chosen, tmp_path):
    other = chosen["val"].with_name("other.json")
    other.write_text(json.dumps(json.loads(chosen["val"].read_text()) | {"classes": "four.txt"}))
    other.with_name("four.txt").write_text("ground\ndisc\nbox\nsea\n")
    with pytest.raises(SystemExit, match="VAL is .*; it must be a benchmark of as many classes"):
        run(chosen, tmp_path, epochs=1, val=other)


def test_its_settings_are_those_of_their_homes():
    """It writes nothing of what it shares."""
    cfg = settings.parse([], linear_probe)
    assert (cfg.KEEP, cfg.CKPT, cfg.TRAIN, cfg.VAL) == (2, None, "toy/dev.json", "toy")
