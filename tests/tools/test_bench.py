"""tools/bench.py: it measures what it says, beside the plain forms, and refuses in a sentence."""

import tempfile
from pathlib import Path

import pytest
import torch
from conftest import options, preset
from PIL import Image

import train
from data import Grid
from tools import bench, reference
from util import settings
from util.distributed import Ranks

CPU = torch.device("cpu")
TINY = {"model": "tiny-vit", "vfm_model": "tiny_vfm", "image_size": 64, "crop_size": 32,
        "micro_batch": 2, "repeats": 1, "short_side": 48, "window": 32, "stride": 16,
        "worker_counts": 1, "prompts": 5, "fvit_size": 64, "fvit_batch": 2, "catseg_size": 32,
        "catseg_classes": 3, "channels": 8, "regions": 16}


def measured(*more: str, **changed) -> dict[str, dict[str, bench.Row]]:
    """The rows of a tiny bench, by part and name."""
    with tempfile.TemporaryDirectory() as folder:
        words = [preset(Path(folder), **TINY), *options(**changed), *more]
        found = bench.main(words)
    return {part: {row.name: row for row in rows} for part, rows in found.items()}


def test_bench_prints_every_part_beside_the_plain_version(capsys, tmp_path):
    parts = [*bench.PARTS, "fvit", "catseg"]
    Image.new("RGB", (80, 60)).save(tmp_path / "photo.jpg")
    rows = measured("--baseline", parts=parts, images=tmp_path)
    printed = capsys.readouterr().out
    assert list(rows) == ["input", "operations", "train", "segment", "fvit", "catseg"] == parts
    assert all(row.name in printed for part in rows.values() for row in part.values())
    ours, plains = rows["input"]["to the device, MB"].values.values()
    assert ours == pytest.approx(3 * 60 * 80 / 1e6)
    crops = 12 * 3 * 32**2
    assert plains == pytest.approx(4 * (3 * 64**2 + 3 * 56**2 + crops + 12 * 4) / 1e6)
    assert rows["input"]["to the device, MB"].ratio == pytest.approx(plains / ours)
    assert rows["input"]["CPU time, ms"].values["plain"] > 0
    times = {name: row.values["this code"] for name, row in rows["train"].items()
             if name.endswith("ms")}
    assert list(times) == ["crops, by the teacher, ms", "VFM, ms", "student forward, ms",
                           "forward and losses, ms", "backward, ms", "optimiser, ms"]
    *parts, together, _, _ = times.values()
    assert 0 < sum(parts) < together
    for part in ("train", "fvit", "catseg"):
        assert rows[part]["images/s"].values["this code"] > 0
    fvit = rows["fvit"]
    assert (0 < fvit["frozen backbone, ms"].values["this code"]
            < fvit["forward and losses, ms"].values["this code"])
    assert [*rows["catseg"]["test, a view: images/s"].values] == ["this code"]


@pytest.fixture
def whole(monkeypatch) -> list:
    """How often the attention of reference.py is computed."""
    calls, own = [], reference.attend
    monkeypatch.setattr(reference, "attend",
                        lambda *inputs: calls.append(1) or own(*inputs))
    # Operations are counted with whole matrices in any case.
    monkeypatch.setattr(bench, "measure_operations", lambda _: [bench.Row("all", {"this code": 1})])
    return calls


def test_the_plain_version_is_plain(whole):
    measured("--baseline", "--checkpointing", parts="train")
    assert whole


def test_without_a_baseline_only_this_code_is_measured(capsys, whole):
    rows = measured("--checkpointing", parts=["train", "segment"])
    assert not whole
    assert list(rows) == ["train", "segment"] and "plain" not in capsys.readouterr().out
    assert all(list(row.values) == ["this code"] and row.ratio is None for part in rows.values()
               for row in part.values())


def test_shards_are_measured_beside_files(images):
    rows = measured(parts="shards", images=images)["shards"]
    for name in ("CPU time, ms", "images/s, workers: 1"):
        assert all(value > 0 for value in rows[name].values.values())
        assert list(rows[name].values) == ["this code", "files"]


def test_ratios_say_how_much_better_this_code_is():
    assert bench.Row("forward, ms", {"this code": 2.0, "plain": 10.0}).ratio == 5
    assert bench.Row("images/s", {"this code": 10.0, "plain": 2.0}).ratio == 5


def test_operations_are_those_of_the_formula(tmp_path):
    """Of a ViT of L blocks with N tokens of width D: 2N(4D² + 2D·hidden) + 4N²D for each block.

    Patches and projection are added to these.
    """
    made = bench.Bench(settings.parse([preset(tmp_path, **TINY)], bench), Ranks(0, 1, CPU), None)
    student = made.clip.visual
    trunk = student.trunk
    depth, D, C = len(trunk.blocks), trunk.embed_dim, trunk.num_classes
    N = 1 + (32 // student.patch_size) ** 2
    hidden = trunk.blocks[0].mlp.fc1.out_features
    of_blocks = depth * (2 * N * (4 * D * D + 2 * D * hidden) + 4 * N * N * D)
    of_ends = 2 * (N - 1) * 3 * student.patch_size**2 * D + 2 * D * C
    crops, *_ = bench.measure_operations(made)
    assert crops.values == {"this code": 12 * (of_blocks + of_ends) / 1e9}


@pytest.mark.parametrize("crops, rows, columns", [(12, 3, 4), (36, 6, 6), (7, 1, 7)])
def test_grids_have_the_wanted_number_of_crops(crops, rows, columns, tmp_path):
    made = bench.Bench(settings.parse([preset(tmp_path, **TINY | {"crops": crops})], bench),
                       Ranks(0, 1, CPU), None)
    assert made.grid == (rows, columns, list(range(crops)))


def test_memory_counts_what_is_alive_at_once():
    def work():
        a = torch.zeros(1000)
        b = a + 1           # both exist
        del a
        return b[:500] + b.view(2, 500)[1]      # views take nothing

    assert bench.peak_bytes(work, CPU) == 8000
    before = torch.zeros(1000)
    assert bench.peak_bytes(lambda: before.add_(1), CPU) == 0


@pytest.mark.parametrize("model, checkpointing", [("tiny-eva", False), ("tiny-eva", True),
                                                  ("tiny-pool", False)])
def test_memory_without_numbers_is_that_of_a_real_step(model, checkpointing, monkeypatch):
    backward, ran = torch.Tensor.backward, []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: ran.append(1) or backward(loss))
    cfg = settings.parse(options(model=model, pretrained="none", vfm_model="tiny_vfm",
                                 vfm_pretrained="false", image_size=128, crop_size=32,
                                 precision="fp32"), train)
    cfg.CHECKPOINTING, grids = checkpointing, [Grid(2, 3, list(range(6)))] * 4
    found = bench.step_bytes(cfg, grids)
    assert ran      # though in models so tiny the peak comes before
    clip, *teachers = train.build(cfg, Ranks(0, 1, CPU))
    photos = torch.zeros(4, 3, 480, 640, dtype=torch.uint8)

    def step():
        losses = train.distill(cfg, clip.visual, *teachers, list(photos), grids)
        sum(losses.values()).backward()

    real = bench.peak_bytes(step, CPU) + bench.held_bytes([clip.visual, *teachers])
    print(f"{model}: {found / 1e6:.2f} MB, real {real / 1e6:.2f}")
    assert found == pytest.approx(real, rel=0.15)


def test_what_fits_a_gpu_is_told_without_one():
    rows = measured(parts="fits", gpu_gb=0.03, image_size=256, crops=1)["fits"]
    found = {name: row.values["this code"] for name, row in rows.items()}
    limit = found.pop("of a GPU of 0.03 GB, a tenth left, MB")
    assert limit == pytest.approx(27) and list(found) == [*rows][1:]
    for form in ("", "--checkpointing: "):
        megabytes = {int(name.split("micro_batch ")[1].split(",")[0]): value
                     for name, value in found.items()
                     if name.startswith(f"{form}micro_batch") and name.endswith("MB")}
        assert [*megabytes] == [2**power for power in range(len(megabytes))]
        *fitting, last = megabytes.values()
        assert sorted(fitting) == fitting and fitting[-1] <= limit < last
        largest = found[f"{form}largest micro_batch"]
        assert 2 ** (len(fitting) - 1) <= largest < 2 ** len(fitting)
        assert f"{form}micro_batch {2 ** len(fitting)}, does not fit, MB" in found
    assert found["--checkpointing: largest micro_batch"] > found["largest micro_batch"] > 1


def test_a_gpu_may_be_too_small_for_one_image():
    rows = measured(parts="fits", gpu_gb=0.001)["fits"]
    assert len(rows) == 5 and rows["largest micro_batch"].values == {"this code": 0}


def test_autocast_is_that_of_a_gpu(monkeypatch):
    """Norms in fp32, which a CPU's autocast leaves in bf16; products in bf16."""
    seen, own = set(), torch.nn.functional.layer_norm
    monkeypatch.setattr(torch.nn.functional, "layer_norm",
                        lambda x, *more: seen.add(x.dtype) or own(x, *more))
    cfg = settings.parse(options(model="tiny-vit", pretrained="none", vfm_model="tiny_vfm",
                                 vfm_pretrained="false", image_size=64, crop_size=32,
                                 precision="bf16"), train)
    bench.step_bytes(cfg, [Grid(1, 2, [0, 1])])
    assert seen == {torch.float32}


@pytest.mark.parametrize("wrong, sentence", [
    ({"parts": "speed"}, "PARTS is ('speed',); it must be some of input, operations, train, seg"),
    ({"crops": 0}, "CROPS is 0; it must be at least 1"),
    ({"precision": "int8"}, "PRECISION is 'int8'; it must be one of auto"),
    ({"repeats": 0}, "REPEATS is 0; it must be at least 1"),
    ({"window": 30}, "WINDOW 30 is no multiple"),
    ({"images": "nowhere"}, "nowhere does not exist"),
    ({"parts": "train", "window": 32}, "WINDOW is for segment, so it has no effect"),
    ({"parts": "segment", "scales": (1, 2)}, "SCALES is for fvit, so it has no effect"),
    ({"parts": "fits", "micro_batch": 2}, "MICRO_BATCH is for train, so it has no effect"),
    ({"parts": "train", "gpu_gb": 24}, "GPU_GB is for fits, so it has no effect"),
    ({"parts": "fits", "gpu_gb": 0}, "GPU_GB is 0.0; it must be more than 0"),
    ({"worker_counts": 0}, "WORKER_COUNTS is (0,); it must be from 1"),
])
def test_refusals_say_what_to_do(wrong, sentence):
    with pytest.raises(SystemExit) as error:
        measured(**wrong)
    found = str(error.value)
    assert found.startswith("bench.py: ") and sentence in found and "\n" not in found


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "no.jpg").write_text("no image")
    with pytest.raises(SystemExit, match=r"no.jpg can't be read as an image"):
        measured("--baseline", parts="input", images=tmp_path)


@pytest.mark.parametrize("error, status", [
    (KeyboardInterrupt(), "130"),
    (torch.OutOfMemoryError("Tried to allocate 9 GiB. Of"),
     "bench.py: the GPU's memory ran out (Tried to allocate 9 GiB); lower")])
def test_interruption_and_full_memory_end_without_a_traceback(error, status, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setitem(bench.MEASURES, "input", fail)
    with pytest.raises(SystemExit) as ended:
        measured(parts="input")
    assert str(ended.value).startswith(status)
