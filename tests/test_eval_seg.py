"""eval_seg.py: mIoU against a slow direct computation, windows, synonyms, background, ranks."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import warm
from conftest import options, succeeds

import data
import eval_seg
from data import make_classes
from eval_seg import KNOWN_BENCHMARKS, Protocol
from model import DeCLIP, VisionTower
from util import distributed, settings
from util.images import read_image
from util.labels import VOID, SegmentationBenchmark, SegmentationImages
from util.pamr import refine
from util.results import read_results
from util.windows import window_starts

WINDOWS = {"short_side": 48, "window": 32, "stride": 16, "window_batch": 3}
# A checkpoint says itself which model it is.
OF_CHECKPOINT = {"templates": "a {}.", "num_workers": 0} | WINDOWS
TINY = {"model": "tiny-eva", "pretrained": "none"} | OF_CHECKPOINT
CPU = distributed.Ranks(0, 1, torch.device("cpu"))


def protocol(**changes) -> Protocol:
    return Protocol(**WINDOWS | changes)


def slow_iou(label: np.ndarray, prediction: np.ndarray, classes: int) -> list[float | None]:
    """IoU of each class in per cent, from its masks; None for a class that neither occurs nor is
    predicted."""
    out, counts = [], label != VOID
    for k in range(classes):
        both = (counts & (label == k) & (prediction == k)).sum()
        either = (counts & ((label == k) | (prediction == k))).sum()
        out.append(100 * both / either if either else None)
    return out


def test_miou_agrees_with_a_direct_computation():
    """With void pixels, a class that never occurs (5), and one that is predicted but does not occur
    (4)."""
    draw = np.random.default_rng(0)
    label, prediction = draw.integers(0, 4, (30, 40)), draw.integers(0, 5, (30, 40))
    label[draw.random(label.shape) < 0.2] = VOID
    confusion = eval_seg.confusion_matrix(torch.from_numpy(label).short(),
                                          torch.from_numpy(prediction), 6)
    result = eval_seg.summarize(confusion, make_classes(list("abcdef")))
    expected = slow_iou(label, prediction, 6)
    assert expected[5] is None and result["IoU"]["f"] is None
    assert result["IoU"]["e"] == expected[4] == 0
    assert list(result["IoU"].values())[:5] == pytest.approx(expected[:5], abs=0.005)
    assert result["mIoU"] == pytest.approx(np.mean(expected[:5]))
    # Classes of one name, as A-847 has ten, keep an IoU each.
    twins = eval_seg.summarize(confusion, make_classes([*"abcaea"]))
    assert [*twins["IoU"]] == ["a", "b", "c", "a, class 3", "e", "a, class 5"]
    assert [*twins["IoU"].values()] == [*result["IoU"].values()]
    assert result["pixel accuracy"] == pytest.approx(100 * (label
                                                            == prediction)[label != VOID].mean())


@pytest.mark.parametrize("size", [(4000, 2), (3, 5000)])
def test_a_long_strip_is_not_blown_up(size):
    """Its longer side, not the shorter one, decides: 4000 x 2 would become 96,000 x 48 pixels."""
    rules, clip, classes = protocol(long_side=128), DeCLIP("tiny-eva"), make_classes(["cat", "dog"])
    image = torch.randint(0, 256, (3, *size)).byte()
    scores, = eval_seg.score_images(rules, clip, [image], torch.randn(2, 32))
    assert scores.patches[0].numel() <= 128 // 16 * 4 * 4     # a row of windows of 4 x 4 patches
    prediction, = eval_seg.predict(rules, clip, classes, torch.randn(2, 32), [image])
    assert prediction.shape == size


def test_perfect_prediction_is_100_and_a_shift_by_one_is_not():
    label = torch.randint(0, 4, (20, 20))
    classes = make_classes(list("abcd"))
    assert eval_seg.summarize(eval_seg.confusion_matrix(label.short(), label, 4),
                              classes)["mIoU"] == 100
    assert eval_seg.summarize(eval_seg.confusion_matrix(label.short(), (label + 1) % 4, 4),
                              classes)["mIoU"] == 0


@pytest.mark.parametrize("length, expected",
                         [(448, [0, 112]), (336, [0]), (337, [0, 1]), (600, [0, 112, 224, 264])])
def test_windows_cover_a_side(length, expected):
    assert window_starts(length, 336, 112) == expected


def slow_logits(rules: Protocol, clip: DeCLIP, image: torch.Tensor, text: torch.Tensor
                ) -> torch.Tensor:
    """One window at a time, its scores laid over a picture of NaNs and averaged where there are
    any."""
    (H, W), window, stride = image.shape[-2:], rules.window, rules.stride
    h, w = (round(side * rules.short_side / min(H, W)) for side in (H, W))
    picture = torch.zeros(3, max(h, window), max(w, window))
    picture[:, :h, :w] = data.resize(image, h, w)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip.mean, clip.std))
    picture = (picture - mean) / std
    layers = []
    for y in {min(y, picture.shape[1] - window) for y in range(0, picture.shape[1], stride)}:
        for x in {min(x, picture.shape[2] - window) for x in range(0, picture.shape[2], stride)}:
            part = picture[None, :, y:y + window, x:x + window]
            features = F.normalize(clip.encode_dense(part)[0], dim=1)
            cosines = torch.stack([(features[0] * name.view(-1, 1, 1)).sum(0) for name in text])
            layer = torch.full((len(text), *picture.shape[1:]), float("nan"))
            layer[:, y:y + window, x:x + window] = F.interpolate(cosines[None], window,
                                                                 mode="bilinear")
            layers.append(layer)
    return F.interpolate(torch.stack(layers).nanmean(dim=0)[None, :, :h, :w], (H, W),
                         mode="bilinear")[0]


def pixels(rules: Protocol, clip: DeCLIP, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """What the script computes: scores of all texts and pixels, (P, H, W)."""
    return torch.cat(list(eval_seg.score_images(rules, clip, [image], text)[0].of_pixels()), dim=1)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (90, 40)])
@pytest.mark.parametrize("short_side", [48, 40, 24],
                         ids=["windows overlap", "moved back", "smaller than a window"])
def test_windows_in_batches_are_windows_one_by_one(size, short_side):
    clip, rules = DeCLIP("tiny-eva"), protocol(short_side=short_side)
    image = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0)).byte()
    text = clip.encode_text(["cat", "dog", "sea"])
    with torch.inference_mode():
        scores, _ = eval_seg.score_images(rules, clip, [image, image.flip(1)], text)
        rows = list(scores.of_pixels(most=3 * size[1] * 7))
        torch.testing.assert_close(torch.cat(rows, dim=1), slow_logits(rules, clip, image, text),
                                   rtol=0, atol=2e-6)
    assert len(rows) == -(-size[0] // 7)        # in strips that need not divide the height


def test_synonyms_and_background():
    """A class has its best synonym's probability; an unsure pixel is background, but only where
    there is one."""
    classes = make_classes(["background, sky", "cat, kitten", "dog"])
    logits = torch.tensor([[0.0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 0], [9, 0, 0, 0],
                           [0, 0, 9, 0.1]])[:, None]
    assert eval_seg.decide([logits], classes, 1.0, None).tolist() == [[1, 0, 2, 2]]
    assert eval_seg.decide([logits], classes, 1.0, 0.5).tolist() == [[1, 0, 2, 0]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "declip.safetensors"
    DeCLIP("tiny-eva", context="qk", scale=0.5).save(path)
    return str(path)


def test_script_agrees_with_a_direct_computation(voc, scenes, checkpoint, tmp_path):
    """From a checkpoint with no argument about the model, both benchmarks, on labels that the
    scenes were drawn from."""
    result = eval_seg.main(options(**OF_CHECKPOINT, ckpt=checkpoint, data=voc, out=tmp_path))
    clip = DeCLIP("tiny-eva", checkpoint)
    assert (clip.context, clip.scale) == ("qk", 0.5)
    # ground, disc (bird), box (bus)
    for name, table in (("voc20", [VOID, 2, 5]), ("voc21", [0, 3, 6])):
        classes = data.read_classes(f"classes/{name}.txt")
        text = clip.encode_text(classes.prompts, ["a {}."])
        labels, predictions = [], []
        for index, (_, scene) in enumerate(scenes):
            label = np.array(table)[scene]
            label[0] = VOID
            image = read_image(voc / f"VOCdevkit/VOC2012/JPEGImages/s_{index}.jpg")
            with torch.inference_mode():
                logits = slow_logits(protocol(), clip, image, text)
            prediction = eval_seg.decide([logits], classes, 80, 0.4 if name == "voc21" else None)
            labels.append(label.flatten())
            predictions.append(prediction.flatten().numpy())
        expected = slow_iou(np.concatenate(labels), np.concatenate(predictions), len(classes))
        present = [iou for iou in expected if iou is not None]
        assert result[name]["mIoU"] == pytest.approx(np.mean(present), abs=0.05)
    for name, figures in result.items():
        written, = read_results(tmp_path / "seg.json", benchmark=name, attention="qk", scale=0.5)
        assert {key: written[key] for key in figures} == figures


@pytest.mark.cpu
def test_ranks_share_the_images(voc, checkpoint, tmp_path):
    given = OF_CHECKPOINT | {"benchmarks": "voc21"}
    alone = eval_seg.main(options(**given, ckpt=checkpoint, data=voc, out=tmp_path))
    succeeds(warm.ranks("tests/tiny.py", "eval_seg",
                        *options(**given, ckpt=checkpoint, data=voc, out=tmp_path / "two")))
    together, = read_results(tmp_path / "two" / "seg.json", benchmark="voc21")
    assert together["mIoU"] == pytest.approx(alone["voc21"]["mIoU"], abs=0.1)
    # five images over two ranks, each once
    assert together["pixels"] == alone["voc21"]["pixels"]
    assert together["pixel accuracy"] == pytest.approx(alone["voc21"]["pixel accuracy"], abs=0.1)


@pytest.mark.parametrize("attention", ["clip", "maskclip", "sclip", "clearclip"])
def test_baselines_need_no_checkpoint(attention):
    """The attention asked for is the one computed."""
    clip = DeCLIP("tiny-eva")
    image, text = torch.randint(0, 256, (3, 32, 32)).byte(), clip.encode_text(["cat", "dog"])
    with torch.inference_mode():
        logits = pixels(protocol(attention=attention, short_side=32), clip, image, text)
        windows = data.normalize(image[None] / 255, clip.mean, clip.std)
        features = F.normalize(clip.encode_dense(windows, attention)[0], dim=1)
        expected = F.interpolate(torch.einsum("nchw,pc->nphw", features, text), 32,
                                 mode="bilinear")[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        change = (logits - pixels(protocol(short_side=32), clip, image, text)).abs().max()
    # which is DeCLIP's block before training
    assert (change > 1e-4) == (attention != "clearclip")


def test_a_broken_image_is_one_sentence_from_a_worker_too(voc, checkpoint, tmp_path):
    broken = shutil.copytree(voc, tmp_path / "data")
    (broken / "VOCdevkit/VOC2012/JPEGImages/s_1.jpg").write_text("no picture")
    given = OF_CHECKPOINT | {"num_workers": 1}
    with pytest.raises(SystemExit) as error:
        eval_seg.main(options(**given, ckpt=checkpoint, data=broken, out=tmp_path))
    sentence = str(error.value)
    assert sentence.startswith("eval_seg.py: ") and "\n" not in sentence
    assert "s_1.jpg can't be read as an image" in sentence


@pytest.mark.parametrize("given, sentence", [
    ({"benchmarks": "voc22"}, "There is no benchmark 'voc22'; choose among voc21, context60"),
    ({"data": "no"}, "set DATA to the folder that holds VOCdevkit/VOC2012"),
    ({"window": 30}, "WINDOW 30 is no multiple of tiny-eva's patch size; set it to 24"),
    ({"stride": 33}, "STRIDE is 33; it must be from 1 to WINDOW, 32"),
    ({"classes": "classes/voc20.txt", "benchmarks": "voc21"}, "has 20 classes, but voc21 has 21"),
    ({"ckpt": "no.safetensors"}, "There is no checkpoint no.safetensors"),
    ({"attention": "csa"}, "ATTENTION is 'csa'; it must be one of clip"),
    ({"threshold": 0.3, "benchmarks": "voc20"}, "THRESHOLD is for background, which gets what no"),
    ({"logit_scale": 9, "benchmarks": ["voc20", "context59"]}, "but voc20, context59 has none"),
    ({"window_batch": 0}, "WINDOW_BATCH is 0; it must be at least 1"),
    ({"pamr": -1}, "PAMR is -1; it must be at least 0"),
    ({"threshold": 5}, "THRESHOLD is 5.0; it is a probability"),
    ({"templates": "{} and {}"}, "TEMPLATES is"),
    ({"templates": "photo"},
     "TEMPLATES is 'photo'; it must be imagenet, simple or a template with {}"),
])
def test_refusals_say_what_to_do(voc, tmp_path, given, sentence):
    with pytest.raises(SystemExit) as error:
        eval_seg.main(options(**TINY | {"data": voc, "out": tmp_path} | given))
    found = str(error.value)
    assert found.startswith("eval_seg.py: ") and sentence in found and "\n" not in found


@pytest.mark.parametrize("precision, dtype", [
    ("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32),
    ("auto", torch.float32)])
def test_precision_is_that_of_the_tower_alone(precision, dtype, monkeypatch):
    """Cosines are float32 again."""
    seen, clip, project = [], DeCLIP("tiny-eva"), VisionTower.project
    monkeypatch.setattr(VisionTower, "project", lambda self, tokens:
                        seen.append(project(self, tokens)) or seen[-1])
    rules = protocol(precision=precision, attention="sclip")
    with torch.inference_mode():
        scores = eval_seg.window_scores(rules, clip, torch.randn(1, 3, 32, 32), torch.ones(2, 32))
    assert seen[0].dtype == dtype
    assert scores.dtype == torch.float32 and scores.shape == (1, 2, 4, 4)


def test_any_segmenter_is_scored(voc):
    """evaluate() takes a function from images to classes: here, of two constants."""
    dataset = SegmentationImages(KNOWN_BENCHMARKS["voc21"], voc)
    loader = data.load_share(dataset, CPU, 2, 0)
    for chosen in (0, 3):
        confusion = eval_seg.evaluate(
            lambda images, k=chosen: [torch.full(image.shape[1:], k) for image in images],
            loader, 21, CPU, "constant")
        assert confusion[:, chosen].sum() == confusion.sum() > 0
        labels = torch.cat([label[label != VOID] for _, label in dataset])
        assert torch.equal(confusion[:, chosen], labels.long().bincount(minlength=21))


def test_pamr_is_a_step_of_the_protocol(voc):
    """Its scores are those of pixels, refined by the image's colours."""
    image, _ = SegmentationImages(KNOWN_BENCHMARKS["voc21"], voc)[1]
    clip, classes = DeCLIP("tiny-eva"), make_classes(["cat, kitten", "dog", "sea"])
    text = F.normalize(torch.randn(4, 32), dim=-1)
    with torch.inference_mode():
        scores = pixels(protocol(), clip, image, text)
        expected = eval_seg.decide([refine(scores, image, 2)], classes, 40.0, None)
    found, = eval_seg.predict(protocol(pamr=2), clip, classes, text, [image])
    plain, = eval_seg.predict(protocol(), clip, classes, text, [image])
    assert torch.equal(found, expected) and not torch.equal(found, plain)


# ------------------------------------------------------------------------------------ protocol

def of_options(benchmark: SegmentationBenchmark | None = None, **given) -> Protocol:
    """The protocol that a command line gives a benchmark."""
    return Protocol.of(settings.parse(options(**given), eval_seg), benchmark)


def described(threshold: float | None = None, **protocol: int) -> SegmentationBenchmark:
    """A benchmark with a protocol."""
    return SegmentationBenchmark("x", "*", "{}.jpg", "{}.png", "toy.txt", range(2),
                                 threshold=threshold, protocol=protocol)


def test_a_threshold_is_for_background_only():
    """What is given wins over the benchmark's, but without background there is no threshold."""
    with_background = described(threshold=0.2)
    rules = of_options(with_background, short_side=48, threshold=0.5)
    assert (rules.short_side, rules.logit_scale, rules.threshold) == (48, 40.0, 0.5)
    assert of_options(described(), threshold=0.5).threshold is None
    assert of_options(with_background).threshold == 0.2
    assert of_options(with_background, logit_scale=7).logit_scale == 7
    assert of_options(threshold=0.5).threshold == 0.5       # of no benchmark, as tools have it


def test_a_benchmark_has_a_protocol_of_its_own():
    """Options win over it; what neither says is found for the model."""
    own = described(short_side=96, window=64, long_side=512)
    rules = of_options(own, stride=32, window=48, attention="sclip", precision="bf16", pamr=3)
    assert rules == Protocol(96, 512, 48, 32, 40.0, None, 3, "sclip", "bf16", 16)
    assert of_options(long_side=100).long_side == 100 and of_options().long_side == 2048


@pytest.mark.parametrize("change, sentence", [
    ({"short_side": 0}, "SHORT_SIDE is 0; it must be at least 1"),
    ({"long_side": 0}, "LONG_SIDE is 0; it must be at least 1"),
    ({"window": 0}, "WINDOW is 0; it must be at least 1"),
    ({"stride": 0}, "STRIDE is 0; it must be at least 1"),
    ({"stride": 33}, "STRIDE is 33; it must be from 1 to WINDOW, 32"),
    ({"logit_scale": 0.5}, "LOGIT_SCALE is 0.5; it must be at least 1"),
    ({"threshold": -0.1}, "THRESHOLD is -0.1; it is a probability"),
    ({"pamr": -1}, "PAMR is -1; it must be at least 0"),
    ({"window_batch": 0}, "WINDOW_BATCH is 0; it must be at least 1"),
    ({"precision": "fp8"}, "PRECISION is 'fp8'"),
])
def test_a_protocol_out_of_its_range_is_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        protocol(**change)


def test_the_defaults_are_the_papers():
    """Section 9.2: a shorter side of 448 for every benchmark, windows of 336 every 112."""
    cfg = settings.parse([], eval_seg)
    assert sides(Protocol.of(cfg), 224, 16) == (448, 336, 112) and cfg.TEMPLATES == "imagenet"
    assert sides(Protocol(), 224, 16) == (448, 336, 112)
    authors = settings.parse(["@presets/published_cityscapes_seg.txt"], eval_seg)
    assert (authors.SHORT_SIDE, authors.BENCHMARKS) == (560, ("cityscapes",))


def sides(rules: Protocol, image_size: int, patch_size: int) -> tuple[int, int, int]:
    """Shorter side, window and stride for a CLIP that learned from images of a size."""
    clip = SimpleNamespace(image_size=image_size, patch_size=patch_size, model_name="some")
    rules = rules.fit(clip)
    return rules.short_side, rules.window, rules.stride


def test_a_small_model_has_the_papers_sides_in_proportion():
    """What was given stays; a window holds whole patches, and none is larger than the paper's."""
    assert sides(Protocol(), 64, 8) == (128, 96, 32)
    assert sides(Protocol(), 336, 14) == (448, 336, 112)
    assert sides(Protocol(), 224, 32) == (448, 320, 107)
    assert sides(Protocol(), 8, 8) == (16, 8, 3)
    assert sides(Protocol(window=64, short_side=100), 224, 16) == (100, 64, 21)
    with pytest.raises(ValueError, match="STRIDE is 97; it must be from 1 to WINDOW, 96"):
        sides(Protocol(stride=97), 64, 8)
    with pytest.raises(ValueError, match="WINDOW 60 is no multiple of some's patch .* to 56"):
        sides(Protocol(window=60), 64, 8)


def test_the_result_says_which_protocol_was_used(voc, tmp_path):
    given = TINY | {"data": voc, "out": tmp_path, "benchmarks": ["voc20", "voc21"]}
    eval_seg.main(options(**{key: value for key, value in given.items()
                             if key not in ("short_side", "window", "stride")}))
    common = {"short_side": 64, "long_side": 2048, "window": 48, "stride": 16, "pamr": 0}
    for name, own in (("voc20", {"logit_scale": 40, "threshold": None}),
                      ("voc21", {"logit_scale": 80, "threshold": 0.4})):
        result, = read_results(tmp_path / "seg.json", benchmark=name)
        assert result["of"] | common | own == result["of"]


def test_an_evaluation_replaces_no_other(voc, checkpoint, tmp_path, monkeypatch):
    """By another protocol, attention, class list or model, or of another benchmark; the same one
    again replaces it, however it is spelled."""
    pixels = iter(range(1, 10))
    monkeypatch.setattr(eval_seg, "evaluate", lambda _, __, classes, *___: torch.eye(
        classes, dtype=torch.long) * next(pixels))
    # VOC's twenty classes, the first of them under another name.
    (tmp_path / "own.txt").write_text("\n".join(["plane", *data.read_classes(
        "classes/voc20.txt").names[1:]]))
    shared = OF_CHECKPOINT | {"data": voc, "out": tmp_path, "benchmarks": "voc20"}
    given = shared | {"ckpt": checkpoint}
    others = [given, given | {"pamr": 1}, given | {"attention": "clip"}, given | {
        "classes": tmp_path / "own.txt"}, given | {"benchmarks": "voc21"}, shared | {
        "model": "tiny-eva", "pretrained": "none"}]
    for other in others:
        eval_seg.main(options(**other))
    eval_seg.main(options(**given, attention="qk", batch_size=1, long_side=2048))
    results = read_results(tmp_path / "seg.json")
    assert [result["pixels"] for result in results] == [40, 60, 80, 105, 120, 140]


def test_nothing_is_computed_for_a_folder_that_cannot_be_written(voc, checkpoint, tmp_path,
                                                                monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(eval_seg, "evaluate", lambda *_: pytest.fail("it is evaluated"))
    with pytest.raises(SystemExit, match="Nothing can be written into .*file; set OUT"):
        eval_seg.main(options(**OF_CHECKPOINT, data=voc, ckpt=checkpoint, out=tmp_path / "file"))
