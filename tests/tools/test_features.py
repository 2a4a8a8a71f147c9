"""features.py: values that are a plain computation's, where the json says; folders, shards, ranks,
killed runs, other settings; the code of docs/features.md runs."""

import errno
import json
import re
import runpy
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import warm
from conftest import options, succeeds
from PIL import Image
from safetensors.numpy import load_file
from tiny import ROOT

from data import normalize, pad_to, resize
from eval_seg import Protocol
from model import DeCLIP
from tools import features
from toy.world import draw_scene
from util import UserError, arrays
from util.images import read_image
from util.windows import resized_size, window_starts

TOY = {"model": f"local-dir:{ROOT / 'toy/clip'}", "pretrained": "own"}


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """The toy CLIP's tokenizer is named as seen from the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def clip() -> DeCLIP:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return DeCLIP(TOY["model"], "own")


@pytest.fixture
def photos(tmp_path) -> Path:
    """Six photographs of several shapes and names, a broken one among them."""
    folder = tmp_path / "photos"
    for number, (name, width) in enumerate({"a.png": 128, "b ä.jpg": 100, "d.png": 90, "e.png": 1,
                                            "sub/a.png": 128}.items()):
        write(folder / name, number, width)
    (folder / "c.png").write_bytes(b"no image")
    return folder


def write(path: Path, number: int = 0, width: int = 128, **how: object) -> None:
    """Draws a scene of height 96 as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_scene(number, 128).image[:96, :width]).save(path, **how)


def run(*asked: object, out: Path, **given: object) -> None:
    features.main([*map(str, asked), *options(**TOY | {"out": out} | given)])


def run_past_broken(photos: Path, out: Path, **given: object) -> None:
    with pytest.raises(SystemExit, match="c.png can't be read as an image"):
        run(photos, out=out, **given)


def about(array: Path) -> tuple[dict, dict]:
    """What the json of an array says, and of its only photograph."""
    record = json.loads(array.with_suffix(".json").read_text())
    return record, record["images"][0]


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder with their content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------- the features

def outputs(clip: DeCLIP, images: torch.Tensor) -> torch.Tensor:
    """Content, context and two layers, one above the other."""
    content, context = clip.encode_dense(images)
    h, w = content.shape[-2:]
    return torch.cat([content, context.mT.reshape(len(images), -1, h, w),
                      *clip.encode_layers(images, [1, 4])], dim=1)


def slow_windows(clip: DeCLIP, photo: torch.Tensor) -> torch.Tensor:
    """One window after another, enlarged to its pixels, the mean of those that cover a pixel, read
    at the cells' centres: (h, w, P)."""
    size = resized_size(photo, 128, 256)
    image = normalize(pad_to(resize(photo, *size), *(max(96, side) for side in size)), clip.mean,
                      clip.std)
    total, count = torch.zeros(512, *image.shape[-2:]), torch.zeros(image.shape[-2:])
    for y in window_starts(image.shape[-2], 96, 32):
        for x in window_starts(image.shape[-1], 96, 32):
            values = outputs(clip, image[None, :, y:y + 96, x:x + 96])
            total[:, y:y + 96, x:x + 96] += F.interpolate(values, 96, mode="bilinear")[0]
            count[y:y + 96, x:x + 96] += 1
    mean = (total / count)[:, :size[0], :size[1]]
    h, w = (max(1, round(side / 8)) for side in size)
    ys, xs = ((torch.arange(cells) + 0.5) / cells * 2 - 1 for cells in (h, w))
    grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)[None]
    return F.grid_sample(mean[None], grid, padding_mode="border",
                         align_corners=False)[0].permute(1, 2, 0)


@pytest.mark.parametrize("height, width", [(96, 101), (40, 128), (128, 1)])
@torch.inference_mode()
def test_windows_are_those_of_a_plain_computation(clip, tmp_path, height, width):
    """All outputs, of sides that no patch divides, and of an image thinner than a window."""
    path = tmp_path / "x.png"
    Image.fromarray(draw_scene(3, 128).image[:height, :width]).save(path)
    run(path, out=tmp_path, x_context="true", layers=(1, 4), long_side=256)
    record, photo = about(tmp_path / "x.npy")
    assert record["channels"] == {"content": [0, 128], "context": [128, 256],
                                  "layer 1": [256, 384], "layer 4": [384, 512]}
    expected = slow_windows(clip, read_image(path)).numpy()
    found = np.load(tmp_path / "x.npy", allow_pickle=False)
    assert found.dtype == np.float16 and found.shape == expected.shape == (*photo["grid"], 512)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


@torch.inference_mode()
def test_one_pass_is_one_forward_pass_of_whole_patches(clip, tmp_path):
    write(tmp_path / "x.png", 3, 101)
    run(tmp_path / "x.png", out=tmp_path, one_pass="true", attention="clip")
    record, photo = about(tmp_path / "x.npy")
    assert photo["resized"] == [128, 136] and photo["grid"] == [16, 17]     # 128 x 134.7
    image = normalize(resize(read_image(tmp_path / "x.png"), 128, 136), clip.mean, clip.std)
    expected = clip.encode_dense(image[None], "clip")[0][0].permute(1, 2, 0)
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, rtol=2e-3, atol=2e-3)
    assert record["attention"] == "clip" and "window" not in record


@pytest.mark.parametrize("one_pass", [False, True])
def test_values_lie_where_the_json_says(one_pass):
    """A model that sees nothing but colours: over a ramp each cell has the colour of its place, and
    enlarged to pixels they are the ramp."""
    seer = SimpleNamespace(patch_size=8, mean=(0, 0, 0), std=(1, 1, 1), encode_dense=lambda images,
                           attention: (F.avg_pool2d(images, 8), None))
    cfg = SimpleNamespace(ONE_PASS=one_pass, X_CONTEXT=False, LAYERS=())
    view = features.View(cfg, seer, Protocol(short_side=128, window=96, stride=32))
    seer.visual = SimpleNamespace(trunk=SimpleNamespace(pos_embed=torch.zeros(1)))
    H, W = 200, 250
    photo = torch.stack([torch.arange(W).expand(H, W), torch.arange(H)[:, None].expand(H, W),
                         torch.zeros(H, W)]).byte()
    values, said = features.see(view, photo)
    h, w = said["grid"]
    rows = (np.arange(H) + 0.5) * said["scale"][0] - 0.5
    inside = np.flatnonzero((rows > 0.5) & (rows < h - 1.5))        # away from borders
    found = np.interp(rows[inside], np.arange(h), 255 * values[:, w // 2, 1])
    np.testing.assert_allclose(found, inside, atol=1)
    pixels = F.interpolate(torch.from_numpy(values).permute(2, 0, 1)[None].float(), said["size"],
                           mode="bilinear")[0] * 255
    np.testing.assert_allclose(pixels[:2, 20:-20, 20:-20], photo[:2, 20:-20, 20:-20], atol=1)


def test_numbers_beyond_float16(capsys):
    """None becomes infinite in silence; what is infinite already is no feature."""
    found, beyond = arrays.to_half(torch.tensor([1e6, -1e6, 3, 65504]))
    assert found.tolist() == [65504, -65504, 3, 65504] and beyond == 2
    assert "2 values are beyond float16" in capsys.readouterr().out
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="not finite"):
            arrays.to_half(torch.tensor([1, bad]))


# ---------------------------------------------------------------------------------- the arrays

def test_a_folder(photos, tmp_path):
    """Names with spaces and accents, subfolders, one pixel of width; a broken file costs no other
    photograph, but the status."""
    out = tmp_path / "out"
    run_past_broken(photos, out)
    found = {path.relative_to(out).as_posix() for path in out.rglob("*.npy")}
    assert found == {"a.npy", "b ä.npy", "d.npy", "e.npy", "sub/a.npy"}
    for name in found:
        record, photo = about(out / name)
        values = np.load(out / name)
        assert values.shape == (*photo["grid"], 128) and np.isfinite(values).all()
        with Image.open(photos / photo["file"]) as image:
            assert photo["size"] == [image.height, image.width]
    assert not np.array_equal(np.load(out / "a.npy"), np.load(out / "sub/a.npy"))
    assert record["checksum"] and record["normalized"] is False and record["context"] == "q"


def test_a_photograph_is_upright(tmp_path):
    """One that its EXIF entry turns has the features of the turned one."""
    write(tmp_path / "stored.png", width=100)
    exif = Image.Exif()
    exif[0x0112] = 6        # to be turned clockwise
    with Image.open(tmp_path / "stored.png") as image:
        image.save(tmp_path / "turned.png", exif=exif)
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    run(tmp_path / "turned.png", tmp_path / "upright.png", out=tmp_path)
    assert about(tmp_path / "turned.npy")[1]["size"] == [100, 96]
    np.testing.assert_array_equal(*(np.load(tmp_path / f"{name}.npy")
                                    for name in ("turned", "upright")))


def test_photographs_of_one_name(photos, tmp_path):
    """From several folders, and of several formats."""
    write(photos / "a.bmp", 7)
    run(photos / "a.png", photos / "a.bmp", photos / "sub", out=tmp_path / "out")
    found = {path.name: about(path)[1]["file"] for path in (tmp_path / "out").glob("*.npy")}
    assert found == {"a.npy": "a.png", "photos-a.bmp.npy": "a.bmp", "sub-a.png.npy": "a.png"}


def test_shards_hold_what_single_files_do(photos, tmp_path, monkeypatch, capsys):
    """The last one is what remains. A broken photograph is tried again when its file is another;
    while it is added no array is beside the json of another."""
    run_past_broken(photos, tmp_path / "single")
    run_past_broken(photos, tmp_path / "shards", shard=4)
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert [path.name for path in shards] == ["features-00000.safetensors",
                                              "features-00001.safetensors"]
    assert [list(load_file(path)) for path in shards] == [["a", "b ä", "d"], ["e", "sub/a"]]
    for path in shards:
        names = [photo["name"] for photo in json.loads(path.with_suffix(".json").read_text())[
            "images"]]
        assert names == [*load_file(path)]
        for name, values in load_file(path).items():
            np.testing.assert_array_equal(values, np.load(tmp_path / f"single/{name}.npy"))
    first, second = (path.stat() for path in shards)
    run(photos, out=tmp_path / "shards", shard=4)
    assert "lacks what failed before, such as c.png (1 in all)" in capsys.readouterr().out
    assert shards[0].stat() == first
    write(photos / "c.png", 5)
    with full_disk(monkeypatch, after=0):
        run(photos, out=tmp_path / "shards", shard=4)
    assert not shards[0].exists() and shards[0].with_suffix(".json").exists()
    run(photos, out=tmp_path / "shards", shard=4)
    assert [*load_file(shards[0])] == ["a", "b ä", "c", "d"] and shards[1].stat() == second


@pytest.mark.cpu
def test_two_ranks_share_the_work(photos, tmp_path):
    """Their arrays are one process's, to the bit; the broken photograph is said once."""
    run_past_broken(photos, tmp_path / "one")
    done = warm.ranks("tests/tiny.py", "tools.features", str(photos),
                      *options(**TOY, out=tmp_path / "two"))
    assert done.returncode == 1 and done.stdout.count("c.png can't be read") == 1, done.stdout
    assert files(tmp_path / "two") == files(tmp_path / "one")
    (photos / "c.png").unlink()
    printed = succeeds(warm.ranks("tests/tiny.py", "tools.features", str(photos),
                                  *options(**TOY, out=tmp_path / "two")))
    assert "left as they are: 5 of 5 arrays" in printed


@pytest.mark.cpu
def test_a_killed_run_goes_on(photos, tmp_path):
    """Whatever array is there is whole and has its json; the rest is added, to the same files."""
    (photos / "c.png").unlink()
    for number in range(15):
        write(photos / f"more/{number}.png", number, 90)
    out, given = tmp_path / "out", {"short_side": 90, "long_side": 96}
    process = warm.Process(["tests/tiny.py", "tools.features", str(photos),
                            *options(**TOY, out=out, **given)], tmp_path / "printed")
    while len([*out.rglob("*.npy")]) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    assert 3 <= len(before) < 20
    for path in before:
        assert [*np.load(path).shape[:2]] == about(path)[1]["grid"]
    run(photos, out=out, **given)
    run(photos, out=tmp_path / "whole", **given)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert files(tmp_path / "whole").items() <= files(out).items()


@pytest.mark.parametrize("given, words", [
    ({"attention": "clip"}, "made with attention q, and now attention is clip"),
    ({"short_side": 64}, "made with short_side 128, and now"),
    ({"one_pass": "true"}, "made with one_pass False"),
    ({"x_context": "true"}, "made with channels"),
    ({"ckpt": "other"}, "made with checksum"),
    ({"more": True}, "made with checksum"),
    ({"photo": True}, "is of another image, a.png of"),
    ({"own": ".json"}, "is there and not of this tool"), ({"own": ".npy"}, "not of this tool")],
    ids=str)
def test_nothing_of_other_settings_is_overwritten(clip, tmp_path, given, words):
    """Nor joined by what would differ from it: one sentence, and the folder as it was."""
    out, given = tmp_path / "out", dict(given)
    write(tmp_path / "a.png")
    run(tmp_path / "a.png", out=out)
    asked = [tmp_path / "a.png"]
    if given.pop("photo", None):
        write(tmp_path / "a.png", 1)
    if ending := given.pop("own", None):
        (out / "b").with_suffix(ending).write_text("mine")
        write(tmp_path / "b.png")
        asked.append(tmp_path / "b.png")
    if given.pop("more", None):     # of another photograph alone
        write(tmp_path / "z.png", 1)
        asked, given["ckpt"] = [tmp_path / "z.png"], "other"
    if given.get("ckpt"):
        given["ckpt"] = tmp_path / "declip.safetensors"
        scale = clip.text.logit_scale
        before, scale.data = scale.data, scale.data + 1
        clip.save(given["ckpt"])
        scale.data = before
    before = files(out)
    chosen = {} if "ckpt" in given else TOY
    with pytest.raises(SystemExit, match=words):
        features.main([*map(str, asked), *options(**chosen | {"out": out} | given)])
    assert files(out) == before


def test_a_full_disk_ends_the_run(photos, tmp_path, monkeypatch):
    """With one sentence, and no array that is not whole or has no json; later the run goes on."""
    with full_disk(monkeypatch, after=2):
        run(photos, out=tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == ["a.json", "a.npy", "b ä.json", "b ä.npy", "d.json"]
    run_past_broken(photos, tmp_path / "out")
    assert len([*(tmp_path / "out").rglob("*.npy")]) == 5


@contextmanager
def full_disk(monkeypatch, after: int) -> Iterator[None]:
    """Within it, the disk is full after so many arrays and a half; the run must end by that."""
    whole, count = Path.write_bytes, iter(range(99))

    def fill(path: Path, content: bytes) -> None:
        is_full = next(count) == after
        whole(path, content[:len(content) // 2] if is_full else content)
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="No space left on device; "
                                                       "make room"):
        patch.setattr(Path, "write_bytes", fill)
        yield


def test_a_failure_of_one_photograph_is_its_own(photos, tmp_path, monkeypatch):
    def fail(values: torch.Tensor) -> tuple:
        if values.shape[1] == 17:       # b ä.jpg, 100 wide
            raise RuntimeError("of this one")
        return to_half(values)

    (photos / "c.png").unlink()
    to_half = arrays.to_half
    monkeypatch.setattr(arrays, "to_half", fail)
    with pytest.raises(SystemExit, match=r"b ä.jpg failed \(of this one\)"):
        run(photos, out=tmp_path / "out")
    assert len([*(tmp_path / "out").rglob("*.npy")]) == 4


@pytest.mark.parametrize("given, words", [
    ({"pamr": 10}, "PAMR is for classes' scores"), ({"threshold": 0.4}, "THRESHOLD is for classes"),
    ({"one_pass": "true", "stride": 8}, "STRIDE is of windows, and ONE_PASS has none"),
    ({"layers": (3, 9)}, "There is no layer 9 in"), ({"shard": 0}, "SHARD is 0; it must be at"),
    ({"context": "clip", "x_context": "true"}, "X_CONTEXT is of decoupled blocks"),
    ({"precision": "fp8"}, "PRECISION is 'fp8'"), ({"window": 20}, "WINDOW 20 is no multiple")],
    ids=str)
def test_options_in_vain_are_refused(tmp_path, given, words):
    write(tmp_path / "a.png")
    with pytest.raises(SystemExit, match=words):
        run(tmp_path / "a.png", out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_code_of_the_docs_runs(clip, toy_home, monkeypatch):
    """The command of docs/features.md, then its code, as they stand there."""
    text = (ROOT / "docs/features.md").read_text()
    command, = re.findall("^python -m tools.features (.+)$", text, re.M)
    clip.save("out/declip/declip.safetensors")
    Path("photos").mkdir()
    Image.fromarray(draw_scene(1, 128).image).resize((640, 480)).save("photos/cat.jpg")
    features.main(shlex.split(command))
    code, = re.findall("```python\n(.+?)```", text, re.S)
    Path("code.py").write_text(code)
    found = runpy.run_path("code.py")
    assert found["pixels"].shape == (2, 480, 640) and found["pixels"].abs().max() <= 1
    assert found["cosines"].shape[:2] == tuple(found["photo"]["grid"]) == (16, 21)
    assert torch.equal(found["of_point"], found["content"][6, 10])
