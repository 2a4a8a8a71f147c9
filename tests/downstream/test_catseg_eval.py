"""downstream.catseg.eval: windows and the whole image against a direct computation, names of a
class, every set of Table 4, refusals."""

import shutil

import numpy as np
import pytest
import reference_catseg as reference
import torch
import torch.nn.functional as F
import warm
from conftest import options, succeeds
from PIL import Image
from test_catseg_data import write
from test_catseg_model import NAMES, make

from data import Classes, make_classes
from downstream.catseg import data as catseg_data
from downstream.catseg import eval as catseg_eval
from downstream.catseg.data import find_evaluation
from downstream.catseg.eval import Protocol
from downstream.catseg.model import open_catseg
from util.labels import VOID
from util.results import read_results

OPTIONS = {"num_workers": 0, "window_batch": 3}


@pytest.fixture(scope="module")
def segmenter():
    """Its logits are spread, so that the mean of probabilities is not that of logits."""
    segmenter = make(image_size=32, width=16)
    with torch.no_grad():
        segmenter.aggregator.decoder.head.weight.mul_(20)
    return segmenter


@pytest.fixture(scope="module")
def checkpoint(segmenter, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "catseg.safetensors"
    segmenter.save(path)
    return str(path)


def images() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=rng).byte()
            for size in ((40, 60), (70, 31))]


@pytest.mark.parametrize("sides, size, starts", [
    ({}, 53, [0, 21]), ({"size": 45, "stride": 16}, 45, [0, 13]), ({"size": 32}, 32, [])],
    ids=["published", "last window moved back", "no windows"])
def test_windows_and_the_whole_image(segmenter, sides, size, starts):
    """Of two images of several shapes in one batch, against one view at a time."""
    protocol, classes = Protocol.of(segmenter, **sides, window_batch=3), make_classes(NAMES)
    assert protocol.size == size    # published: 640 for windows of 384, every 256
    text = catseg_eval.encode(segmenter, classes)
    found = catseg_eval.predict(protocol, segmenter, classes, text, images())
    for image, prediction in zip(images(), found):
        views = catseg_eval.make_views(protocol, segmenter, image)
        with torch.inference_mode():
            scores = catseg_eval.probabilities(protocol, segmenter.logits(views, text),
                                               image.shape[1:])
        expected = reference.probabilities(size, segmenter, text, image, starts)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
        assert prediction.shape == image.shape[1:]
        assert (prediction == expected.argmax(dim=0)).float().mean() > 0.99
    assert len(found[0].unique()) > 1


@pytest.mark.parametrize("how, first, mode", [
    ("pil", Image.Resampling.BILINEAR, {"mode": "bilinear"}),
    ("cv2", None, {"mode": "bilinear"}), ("bicubic", None, {"mode": "bicubic", "antialias": True})])
def test_images_are_resized_as_in_training(segmenter, monkeypatch, how, first, mode):
    """Published: PIL makes the shorter side 640, here 53, and what it gives is then stretched."""
    monkeypatch.setattr(segmenter, "design", segmenter.design._replace(resize=how))
    monkeypatch.setattr(catseg_eval, "normalize", lambda images, mean, std: images)
    image = images()[0].repeat(1, 3, 2)[:, :, :90]      # 120 x 90
    seen = Image.fromarray(image.permute(1, 2, 0).numpy())
    seen = seen.resize((53, 71), first) if first else seen
    seen = torch.from_numpy(np.array(seen)).permute(2, 0, 1)[None] / 255
    *windows, whole = catseg_eval.make_views(Protocol.of(segmenter), segmenter, image)
    exact = [F.interpolate(seen, (side, side), **mode)[0].clamp(0, 1) for side in (53, 32)]
    corners = exact[0][:, :32, :32], exact[0][:, 21:, 21:]
    for found, expected in zip((windows[0], windows[3], whole), (*corners, exact[1])):
        assert (found - expected).abs().max() < (1.01 if how != "bicubic" else 0.01) / 255


@pytest.mark.parametrize("most", [1, 2 * 53**2 * 5, 2**25])
def test_names_in_parts_are_names_at_once(segmenter, most):
    protocol, logits = Protocol.of(segmenter), torch.randn(5, 7, 16, 16)
    whole = catseg_eval.probabilities(protocol, logits, (40, 60)).argmax(dim=0)
    assert torch.equal(catseg_eval.best_prompt(protocol, logits, (40, 60), most), whole)


def test_a_class_has_the_best_of_its_names(segmenter):
    protocol = Protocol.of(segmenter)
    five, two = make_classes(NAMES), Classes(["a", "b"], NAMES, [0, 0, 1, 0, 1])
    text = catseg_eval.encode(segmenter, five)
    of_five, = catseg_eval.predict(protocol, segmenter, five, text, images()[:1])
    of_two, = catseg_eval.predict(protocol, segmenter, two, text, images()[:1])
    assert torch.equal(of_two, torch.tensor(two.class_of_prompt)[of_five])


def test_every_set_is_scored_by_the_shared_loop(checkpoint, tmp_path, capsys, monkeypatch):
    """mIoU of the predictions on labels written by hand; sets that are missing are named."""
    monkeypatch.setattr(catseg_data, "ADE_CLASSES", 4)
    names = ["ade847", "context59", "voc20", "voc20b"]
    for name in names:
        write(tmp_path, name)
    result = catseg_eval.main(options(**OPTIONS, ckpt=checkpoint, data=tmp_path, out=tmp_path))
    printed = capsys.readouterr().out
    assert list(result) == names
    written = read_results(tmp_path / "catseg.json", size=53, stride=21)
    assert {each["of"]["benchmark"]: each["mIoU"] for each in written} == {
        name: figures["mIoU"] for name, figures in result.items()}
    assert "context459           -   There is no label table" in printed
    segmenter = open_catseg(checkpoint)
    protocol = Protocol.of(segmenter)
    for name in names:
        dataset, classes = find_evaluation(name, tmp_path)
        (image, label), = dataset
        prediction, = catseg_eval.predict(protocol, segmenter, classes,
                                          catseg_eval.encode(segmenter, classes), [image])
        kept = label != VOID
        expected = []
        for k in {*label[kept].tolist(), *prediction[kept].tolist()}:
            true, guess = (label == k) & kept, (prediction == k) & kept
            expected.append(100 * (true & guess).sum().item() / (true | guess).sum().item())
        assert result[name]["mIoU"] == pytest.approx(np.mean(expected))


@pytest.mark.cpu
def test_ranks_score_what_one_process_does(checkpoint, voc, tmp_path):
    given = options(**OPTIONS, ckpt=checkpoint, data=voc, benchmarks="voc20", batch_size=2)
    result = catseg_eval.main([*given, "--out", str(tmp_path / "one")])
    succeeds(warm.ranks("tests/tiny.py", "downstream.catseg.eval", *given, "--out",
                        str(tmp_path / "two")))
    two, = read_results(tmp_path / "two/catseg.json", benchmark="voc20")
    assert {key: two[key] for key in result["voc20"]} == result["voc20"]


@pytest.mark.parametrize("given, sentence", [
    ({"ckpt": "no/such.safetensors"}, "There is no weights file no/such.safetensors"),
    ({"size": 31}, "SIZE is 31 and STRIDE 21, but the segmenter's window is 32"),
    ({"stride": 33}, "SIZE is 53 and STRIDE 33"), ({"batch_size": 0}, "BATCH_SIZE is 0"),
    ({"benchmarks": "ade"}, "There is no benchmark 'ade'"),
    ({"benchmarks": "ade150"}, "ADEChallengeData2016"),
    ({"data": "no/such"}, "None of the benchmarks is in"),
    ({"precision": "int8"}, "PRECISION is 'int8'")])
def test_refusals_say_what_to_do(checkpoint, voc, given, sentence):
    given = {"ckpt": checkpoint, "data": voc, "benchmarks": "voc20"} | (
        given if "data" not in given else given | {"benchmarks": "all"})
    with pytest.raises(SystemExit) as error:
        catseg_eval.main(options(**OPTIONS | given))
    found = str(error.value)
    assert found.startswith("eval.py: ") and sentence in found
    assert "\n" not in found or "data" in given and given["benchmarks"] == "all"     # a line each


def test_a_damaged_file_is_refused(checkpoint, tmp_path):
    path = shutil.copy(checkpoint, tmp_path / "catseg.safetensors")
    with open(path, "r+b") as file:
        file.seek(-100, 2)
        file.write(b"x" * 50)
    with pytest.raises(ValueError, match="is damaged"):
        open_catseg(path)
