"""tools/bench.py: it measures what it says, beside the plain forms, and refuses in a sentence."""

import pytest
import torch
from conftest import options

from tools import bench, reference
from util import settings

CPU = torch.device("cpu")


def measured(*more: str, **given) -> dict[str, dict[str, bench.Row]]:
    """The rows of a tiny bench, by part and name."""
    small = {"model": "tiny-vit", "vfm_model": "tiny_vfm", "image_size": 64, "crop_size": 32,
             "micro_batch": 2, "repeats": 1, "short_side": 48, "window": 32, "stride": 16,
             "worker_counts": 1, "prompts": 5, "fvit_size": 64, "fvit_batch": 2,
             "catseg_size": 32, "catseg_classes": 3,
             "channels": 8, "regions": 16}
    rows = bench.main([*options(**small | given), *more])
    return {part: {row.name: row for row in each} for part, each in rows.items()}


def test_bench_prints_every_part_beside_the_plain_version(capsys):
    parts = [*bench.PARTS, "fvit", "catseg"]
    rows = measured("--baseline", parts=parts)
    printed = capsys.readouterr().out
    assert list(rows) == ["input", "operations", "train", "context", "segment", "fvit",
                          "catseg"] == parts
    assert all(row.name in printed for part in rows.values() for row in part.values())
    ours, plains = rows["input"]["to the device, MB"].values.values()
    assert ours == pytest.approx(3 * 480 * 640 / 1e6)
    crops = 12 * 3 * 32**2
    assert plains == pytest.approx(4 * (3 * 64**2 + 3 * 56**2 + crops + 12 * 4) / 1e6)
    assert rows["input"]["to the device, MB"].ratio == pytest.approx(plains / ours)
    assert rows["input"]["CPU time, ms"].values["plain"] > 0
    assert rows["train"]["images/s"].values["this code"] > 0
    assert rows["fvit"]["images/s"].values["this code"] > 0
    assert 0 < rows["fvit"]["the frozen backbone's share, %"].values["this code"] < 100


def test_the_plain_version_is_plain(monkeypatch):
    """Its attention is that of reference.py, and ours is not."""
    whole, own = [], reference.self_attention
    monkeypatch.setattr(reference, "self_attention", lambda *given: whole.append(1) or own(*given))
    # count_flops uses whole matrices in any case.
    monkeypatch.setattr(bench, "count_flops", lambda world: {"all": 1.0})
    measured("--checkpointing", parts="train")
    assert not whole
    measured("--baseline", "--checkpointing", parts="train")
    assert whole


def test_without_a_baseline_only_this_code_is_measured(capsys):
    rows = measured(parts=["train", "segment"])
    assert list(rows) == ["train", "segment"] and "plain" not in capsys.readouterr().out
    assert all(list(row.values) == ["this code"] and row.ratio is None for part in rows.values()
               for row in part.values())


def test_shards_are_measured_beside_a_folder(monkeypatch):
    """Of the same images; each byte comes from the disk about once."""
    monkeypatch.setattr(bench, "SHARDS", 2)
    monkeypatch.setattr(bench, "IN_SHARD", 8)
    rows = measured(parts="shards")["shards"]
    values = {name: row.values["this code"] for name, row in rows.items()}
    assert values["CPU time from shards, ms"] > 0 and values["CPU time from a folder, ms"] > 0
    assert values["images/s from shards with 1 worker"] > 0
    assert 0 <= values["bytes from the disk for each byte used"] < 1.5
    assert 0 <= values["waits for the disk for each image"] <= 0.5


def test_ratios_say_how_much_better_this_code_is():
    assert bench.Row("ms", {"this code": 2.0, "plain": 10.0}).ratio == 5
    assert bench.Row("images/s", {"this code": 10.0, "plain": 2.0}, more_is_better=True).ratio == 5


def test_operations_are_those_of_the_formula():
    """Of a ViT of L blocks with N tokens of width D: 2N(4D² + 2D·hidden) + 4N²D for each block.

    Patches and projection are added to these.
    """
    cfg = settings.parse(options(model="tiny-vit", vfm_model="tiny_vfm", image_size=64,
                                 crop_size=32, micro_batch=1, repeats=1, segment_batch=1), bench)
    made = bench.Bench(cfg, CPU, None)
    trunk = made.student.trunk
    depth, D, C = len(trunk.blocks), trunk.embed_dim, trunk.num_classes
    N = 1 + (32 // made.student.patch_size) ** 2
    hidden = trunk.blocks[0].mlp.fc1.out_features
    of_blocks = depth * (2 * N * (4 * D * D + 2 * D * hidden) + 4 * N * N * D)
    of_ends = 2 * (N - 1) * 3 * made.student.patch_size**2 * D + 2 * D * C
    assert bench.count_flops(made)["crops"] == 12 * (of_blocks + of_ends)


def test_memory_counts_what_is_alive_at_once():
    def work():
        a = torch.zeros(1000)
        b = a + 1           # both exist
        del a
        return b[:500] + b.view(2, 500)[1]      # views take nothing

    assert bench.peak_bytes(work, CPU) == 8000
    before = torch.zeros(1000)
    assert bench.peak_bytes(lambda: before.add_(1), CPU) == 0


@pytest.mark.parametrize("given, sentence", [
    ({"parts": "speed"}, "There is no part 'speed' to measure; choose among input, operations, "
                         "train, context, segment"),
    ({"crops": 7}, "CROPS is 7, but no grid of 1 to 6 rows and columns has as many cells"),
    ({"precision": "int8"}, "PRECISION is 'int8'; it must be one of auto"),
    ({"repeats": 0}, "REPEATS is 0; it must be at least 1"),
    ({"window": 30}, "WINDOW 30 is no multiple"),
    ({"images": "nowhere"}, "nowhere does not exist"),
    ({"worker_counts": 0}, "WORKER_COUNTS has 0; it must be numbers of processes"),
])
def test_refusals_say_what_to_do(given, sentence):
    with pytest.raises(SystemExit) as error:
        measured(**given)
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
    def fail(made):
        raise error

    monkeypatch.setitem(bench.MEASURES, "input", ("", fail))
    with pytest.raises(SystemExit) as ended:
        measured(parts="input")
    assert str(ended.value).startswith(status)


def test_more_images_than_grids_of_that_size_take_turns():
    cfg = settings.parse(options(model="tiny-vit", vfm_model="tiny_vfm", image_size=64,
                                 crop_size=32, micro_batch=20_000, repeats=1,
                                 segment_batch=1, crops=36), bench)
    made = bench.Bench(cfg, CPU, None)
    assert len(made.grids) == 20_000 and {len(grid.cells) for grid in made.grids} == {36}

