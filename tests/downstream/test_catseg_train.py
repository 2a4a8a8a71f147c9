"""downstream.catseg.train: it learns two images by heart, ranks agree, a run goes on where it
stopped, settings out of range are refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import warm
from conftest import options, succeeds
from PIL import Image

from data import resize
from downstream.catseg import eval as catseg_eval
from downstream.catseg import train
from downstream.catseg.data import Labelled
from downstream.catseg.model import open_catseg
from util import settings
from util.weights import read_weights

TINY = {"model": "tiny-eva", "pretrained": "none", "image_size": 32, "width": 16, "heads": 2,
        "layers": 1, "max_classes": 4, "batch_size": 2, "micro_batch": 2, "iterations": 4,
        "num_workers": 0, "log_every": 1, "lr": 1e-3}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, scenes) -> Path:
    """Drawn scenes with labels: a benchmark of one's own."""
    folder = tmp_path_factory.mktemp("labelled")
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for index, (image, label) in enumerate(scenes):
        Image.fromarray(image).save(folder / f"images/{index}.png")
        label = label.copy()
        label[:3] = 9
        Image.fromarray(label).save(folder / f"labels/{index}.png")
    (folder / "names.txt").write_text("rough ground\ndisc\nbox\n")
    (folder / "own.json").write_text(json.dumps({
        "image": "images/{}.png", "label": "labels/{}.png", "classes": "names.txt", "void": [9]}))
    return folder


def run(labelled, out, **changed) -> list[dict]:
    """Trains a tiny segmenter; returns the lines of log.jsonl."""
    train.main(options(**TINY | {"images": labelled / "own.json", "out": out} | changed))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(folder) -> dict[str, torch.Tensor]:
    return read_weights(folder / "catseg.safetensors")[0]


@pytest.mark.parametrize("steps, share, least", [
    (35, 0.7, 0), pytest.param(150, 0.15, 90, marks=pytest.mark.slow)])
def test_it_learns_two_images_by_heart(labelled, tmp_path, monkeypatch, steps, share, least):
    """Trained without augmentation, and evaluated from its file alone: the loss falls to a share of
    the first one, and mIoU is at least so much."""
    two = shutil.copytree(labelled, tmp_path / "two")
    for path in two.glob("*/*.png"):
        if path.stem in "124":
            path.unlink()
    monkeypatch.setattr(train, "augment", lambda sample, size, key, how: Labelled(
        resize(sample.image, size, size, how),
        F.interpolate(sample.label[None, None].float(), (size, size))[0, 0].long()))
    lines = run(two, tmp_path / "run", model=f"local-dir:{tiny.ROOT / 'toy/clip'}",
                pretrained="own", image_size=64, iterations=200, steps=steps, lr=5e-3)
    assert lines[-1]["loss"] < share * lines[0]["loss"]
    result, = catseg_eval.main(options(
        ckpt=tmp_path / "run/catseg.safetensors", benchmarks=two / "own.json", num_workers=0,
        size=64)).values()
    assert result["mIoU"] > least


@pytest.mark.cpu
def test_a_resumed_run_is_the_uninterrupted_run(labelled, tmp_path):
    """Stopped in the middle of its second epoch of two steps."""
    whole = run(labelled, tmp_path / "whole")
    run(labelled, tmp_path / "parts", steps=3)
    parts = run(labelled, tmp_path / "parts", resume="true")
    keep = ("step", "epoch", "loss", "lr")
    assert [[line[key] for key in keep] for line in parts] == [[line[key] for key in keep]
                                                               for line in whole]
    assert len(whole) == 4
    found = weights(tmp_path / "parts")
    assert all(torch.equal(found[name], weight)
               for name, weight in weights(tmp_path / "whole").items())


@pytest.mark.cpu
def test_two_ranks_train_the_segmenter_of_one(labelled, tmp_path):
    """Accumulation included; text, image tower and aggregator alike."""
    shared = TINY | {"images": labelled / "own.json", "batch_size": 4, "micro_batch": 1,
                     "iterations": 3}
    train.main(options(**shared, out=tmp_path / "one"))
    succeeds(warm.ranks("tests/tiny.py", "downstream.catseg.train",
                        *options(**shared, out=tmp_path / "two")))
    found = weights(tmp_path / "two")
    for name, weight in weights(tmp_path / "one").items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-5)


def test_rates_and_decay_are_of_each_kind_of_weight(labelled):
    """Norms have no decay; weights inside CLIP a hundredth of the rate; cosine to 0."""
    cfg = settings.parse(options(**TINY | {"iterations": 100}), train)
    model = train.build(cfg, ["cat", "dog"])
    own, norms, clip = train.build_optimizer(cfg, model).param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert all("norm" in names[id(weight)] for weight in norms["params"])
    assert all(names[id(weight)].startswith("clip.") for weight in clip["params"])
    assert not any("norm" in names[id(weight)] or names[id(weight)].startswith("clip.")
                   for weight in own["params"])
    assert [group["weight_decay"] for group in (own, norms, clip)] == [1e-4, 0, 1e-4]
    assert sum(len(group["params"]) for group in (own, norms, clip)) == sum(
        weight.requires_grad for weight in model.parameters())
    rates = [train.learning_rate(cfg, step) for step in (0, 50, 100)]
    assert rates == pytest.approx([1e-3, 5e-4, 0])


def test_weights_inside_clip_have_a_hundredth_of_the_rate(labelled, tmp_path, monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rates.append(
        [group["lr"] for group in self.param_groups]) or step(self))
    lines = run(labelled, tmp_path)
    assert [line["lr"] for line in lines] == pytest.approx([
        1e-3 / 2 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])
    assert rates == [pytest.approx([line["lr"], line["lr"], line["lr"] / 100]) for line in lines]


def test_gradients_are_cut_and_views_sampled_anew(labelled, tmp_path, monkeypatch):
    """The optimiser sees a norm of at most CLIP_NORM; each epoch has keys of its own."""
    norms, keys = [], []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: norms.append(
        torch.nn.utils.get_total_norm([weight.grad for group in self.param_groups
                                       for weight in group["params"]]).item()))
    augment = train.augment
    monkeypatch.setattr(train, "augment", lambda sample, size, key, how: keys.append(key)
                        or augment(sample, size, key, how))
    run(labelled, tmp_path, seed=3)
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)
    assert len(keys) == len(set(keys)) == 8 and {key[:4] for key in keys} == {"3-0-", "3-1-"}


def test_a_bad_label_is_left_out_and_listed(labelled, tmp_path):
    """Whether it is damaged or of another data set; too many stop the run."""
    bad = shutil.copytree(labelled, tmp_path / "bad")
    Image.fromarray(np.full((80, 40), 77, np.uint8)).save(bad / "labels/2.png")
    (bad / "labels/4.png").write_bytes(b"no image")
    run(bad, tmp_path / "out", max_bad_files=0.5)
    listed = (tmp_path / "out/skipped.txt").read_text()
    assert "values that are no class and not void (77)" in listed and "4.png can't be" in listed
    with pytest.raises(SystemExit, match="more than MAX_BAD_FILES"):
        run(bad, tmp_path / "other")


def test_the_file_tells_of_the_run(labelled, tmp_path):
    lines = run(labelled, tmp_path, iterations=1, attention="catseg", normalize="false",
                resize="cv2")
    assert math.isfinite(lines[0]["loss"])
    segmenter = open_catseg(tmp_path / "catseg.safetensors")
    assert (segmenter.design.attention, segmenter.design.normalize) == ("catseg", False)
    assert segmenter.design.template == "A photo of a {} in the scene"
    assert segmenter.design.resize == "cv2"


def test_half_precision(labelled, tmp_path):
    """The loss is finite and, since similarities stay in float32, about the same."""
    exact, half = (run(labelled, tmp_path / name, precision=name, iterations=1)[0]["loss"]
                   for name in ("fp32", "bf16"))
    assert math.isclose(exact, half, rel_tol=0.05)


def test_published_settings():
    """Those of the facts: 384 px, 80,000 steps of 4 images, 2e-4 ..."""
    cfg = settings.parse([], train)
    assert (cfg.BATCH_SIZE, cfg.ITERATIONS, cfg.LR, cfg.CLIP_LR, cfg.WEIGHT_DECAY, cfg.CLIP_NORM,
            cfg.WIDTH, cfg.HEADS, cfg.LAYERS, cfg.MAX_CLASSES, cfg.PRECISION, cfg.TF32) == (
        4, 80_000, 2e-4, 0.01, 1e-4, 0.01, 128, 4, 2, 256, "fp32", True)
    openai = settings.parse(["@presets/catseg_openai.txt"], train)
    assert (openai.ATTENTION, openai.NORMALIZE) == ("catseg", False)


@pytest.mark.parametrize("changed, sentence", [
    ({"images": "coco"}, "There are no training images 'coco'"),
    ({"images": "coco_stuff", "data": "no/such"}, "unpack the data set there in its original"),
    ({"images": "no/such.json"}, "There is no file no/such.json"),
    ({"clip_norm": 0}, "CLIP_NORM is 0.0; it must be above 0"),
    ({"batch_size": 6}, "There are 5 images, fewer than BATCH_SIZE, 6"),
    ({"image_size": 40}, "an even number of tiny-eva's patches of 8 px; set it to 32"),
    ({"width": 24}, "The width is 24"), ({"seed": -1}, "SEED is -1"),
    ({"precision": "int8"}, "PRECISION is 'int8'"), ({"attention": "sum"}, "ATTENTION is 'sum'"),
    ({"template": "a photo"}, "The template is 'a photo'"),
    ({"ckpt": "no/such.safetensors"}, "There is no checkpoint no/such.safetensors")])
def test_refusals_say_what_to_do(labelled, tmp_path, changed, sentence):
    with pytest.raises(SystemExit) as error:
        run(labelled, tmp_path, **changed)
    found = str(error.value)
    assert found.startswith("train.py: ") and sentence in found and "\n" not in found
