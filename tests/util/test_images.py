"""util/images.py: which image files there are, and their pixels."""

import ctypes
import json
import multiprocessing
import os
import random
import resource
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from util import UserError, distributed
from util.images import list_images, read_image


def names_below(folder: Path) -> list[str]:
    """The image files that are found, as seen from the folder."""
    paths, _ = list_images(folder)
    return [os.path.relpath(path, folder) for path in paths]


# -------------------------------------------------------------------------------------------- files

def test_images_are_found_in_all_folders(images):
    assert names_below(images) == ["1.png", "2.png", "3.png", "4.png", "more/0.png"]


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "I;16"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    grey = Image.new("L", (5, 3), 200)
    if mode == "I;16":
        stored = Image.fromarray(np.full((3, 5), 200 * 257, np.uint16))
    else:
        stored = grey.convert(mode) if mode in ("P", "L") else grey.convert("RGB").convert(mode)
    stored.save(tmp_path / f"x.{suffix}")
    image = read_image(tmp_path / f"x.{suffix}")
    assert image.shape == (3, 3, 5) and image.dtype == torch.uint8
    assert (image.float() - 200).abs().max() <= 3


@pytest.mark.parametrize("suffix, mode", [("jpg", "RGB"), ("png", "RGB"), ("png", "P"),
                                          ("png", "I;16"), ("tif", "CMYK")])
def test_a_large_image_is_reduced_while_it_is_decoded(tmp_path, suffix, mode):
    """By 3, to the mean of its pixels; a JPEG's decoder can halve them, so it is by 4."""
    y, x = np.mgrid[:301, :130]
    values = ((x + y) // 2 % 256).astype(np.uint8)
    stored = Image.fromarray(values.astype(np.uint16) * 257 if mode == "I;16" else values)
    stored = stored.convert(mode) if mode != "I;16" else stored
    stored.save(tmp_path / f"x.{suffix}")
    small = read_image(tmp_path / f"x.{suffix}", most=130 * 301 // 9 + 1)
    whole = read_image(tmp_path / f"x.{suffix}")
    expected = F.avg_pool2d(whole.float(), 4 if suffix == "jpg" else 3, ceil_mode=True)
    assert whole.shape == (3, 301, 130) and small.shape == expected.shape
    assert (small - expected).abs().max() <= (4 if suffix == "jpg" else 1)
    assert read_image(tmp_path / f"x.{suffix}", most=130 * 301).equal(whole)


def peak() -> int:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def send_memory_of_reading(path: Path, pipe: Connection) -> None:
    """What reading an image adds to the peak of the process that does it, in MB."""
    ctypes.CDLL(None).malloc_trim(0)        # what was freed before the fork is no memory to reuse
    Path("/proc/self/clear_refs").write_text("5")       # the peak begins anew
    before = peak()
    read_image(path, True, 16_000_000)
    pipe.send(peak() - before)


def test_a_large_image_takes_little_memory(tmp_path):
    """10^8 pixels in a file of 0.1 MB: decoding took 2.6 GB before."""
    Image.new("P", (10_000, 10_000)).save(tmp_path / "x.png")
    receives, sends = multiprocessing.Pipe(duplex=False)
    reader = multiprocessing.get_context("fork").Process(target=send_memory_of_reading,
                                                         args=(tmp_path / "x.png", sends))
    reader.start()
    # 100 of palette indices, 48 of the result, and copies
    assert 100 < receives.recv() < 400
    reader.join()


def test_images_of_other_formats_are_counted(tmp_path):
    for name in ("a.jpg", "b.gif", "c.GIF", "d.avif", "notes.txt", ".e.gif"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    paths, others = list_images(tmp_path)
    assert len(paths) == 1 and others == {".gif": 2, ".avif": 1}
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ValueError, match="holds no image but 2 .gif, 1 .avif, which are not read"):
        list_images(tmp_path)


def test_of_an_animation_the_first_image_is_read(tmp_path):
    first, second = Image.new("RGB", (4, 4), (10, 20, 30)), Image.new("RGB", (4, 4), (200, 0, 0))
    first.save(tmp_path / "x.png", save_all=True, append_images=[second])
    assert read_image(tmp_path / "x.png")[:, 0, 0].tolist() == [10, 20, 30]


def test_links_are_followed_once_and_hidden_files_left_out(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/x.png", "a/._x.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert names_below(tmp_path) in (["a/x.png"], ["b/x.png"])


def mutate(good: bytes, other: bytes, rng: random.Random) -> bytes:
    """A file with bits flipped, cut off, or spliced with another."""
    out = bytearray(good)
    kind = rng.choice(("flip", "cut", "splice"))
    if kind == "flip":
        for _ in range(rng.choice((1, 10, 100))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        out = out[:rng.randrange(len(out))]
    else:
        place = rng.randrange(len(out))
        out[place:] = other[rng.randrange(len(other)):]
    return bytes(out)


def mutants(image: np.ndarray, folder: Path, count: int, suffixes: Sequence[str]
            ) -> Iterator[Path]:
    """Files of an image in several formats, damaged in many ways."""
    rng, goods = random.Random(0), []
    for suffix in suffixes:
        Image.fromarray(image).save(folder / f"good.{suffix}")
        goods.append((suffix, (folder / f"good.{suffix}").read_bytes()))
        (folder / f"good.{suffix}").unlink()
    for index in range(count):
        suffix, good = rng.choice(goods)
        path = folder / f"x{index}.{suffix}"
        path.write_bytes(mutate(good, rng.choice(goods)[1], rng))
        yield path


FORMATS = ("jpg", "png", "webp", "bmp", "tiff")


def test_500_mutated_images_neither_crash_nor_hang(scenes, tmp_path):
    """Each is read as an image or refused with one sentence that names it."""
    counts = {"read": 0, "refused": 0}
    for path in mutants(scenes[0][0], tmp_path, 500, FORMATS):
        try:
            image = read_image(path, upright=True)
            assert image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3
            counts["read"] += 1
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            counts["refused"] += 1
    assert counts["read"] > 50 and counts["refused"] > 50


# ---------------------------------------------------------------------------- data decide nothing

def test_only_decoders_of_the_list_are_used(tmp_path, monkeypatch):
    """A PostScript file named .jpg would make PIL start another program."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program started"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    (tmp_path / "a.jpg").write_bytes(postscript)
    with pytest.raises(ValueError, match="a.jpg can't be read as an image"):
        read_image(tmp_path / "a.jpg")
    Image.new("RGB", (4, 3)).save(tmp_path / "b.jpg", format="GIF")
    with pytest.raises(ValueError, match="b.jpg can't be read as an image"):
        read_image(tmp_path / "b.jpg")


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    """A FIFO would be read for ever."""
    os.mkfifo(tmp_path / "a.jpg")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "b.jpg"))
        for name in ("a.jpg", "b.jpg"):
            with pytest.raises(ValueError, match=f"{name} can't be read as an image .it is no reg"):
                read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["../x.png", "more/../../x.png", "/etc/x.png"])
def test_a_json_names_images_below_its_root_only(tmp_path, name):
    (tmp_path / "root").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "x.png")
    (tmp_path / "root" / "x.json").write_text(json.dumps({"images": [{"file_name": name}]}))
    with pytest.raises(ValueError, match="which is not below .*/root; set IMAGE_ROOT"):
        list_images(tmp_path / "root" / "x.json")
    if name == "../x.png":
        assert len(list_images(tmp_path / "root" / "x.json", outside=True)[0]) == 1


# ----------------------------------------------------------------------------------------- refusals

def named_json(tmp_path):
    """A json that names an image."""
    (tmp_path / "x.json").write_text(json.dumps({"images": [{"file_name": "0.jpg"}]}))
    return tmp_path / "x.json"


@pytest.mark.parametrize("make, sentence", [
    (lambda t: list_images(t / "no"), "no does not exist; put images there"),
    (lambda t: list_images("data/toy/no"), "draw the toy scenes by python -m toy.world first"),
    (lambda t: list_images(t), "holds no image; put images there"),
    (lambda t: list_images(t / "no.json"), "There is no file"),
    (lambda t: list_images(named_json(t), t / "no"), "which is not there; set IMAGE_ROOT"),
    (lambda t: read_image(__file__), "can't be read as an image"),
])
def test_refusals_say_what_to_do(tmp_path, make, sentence):
    with pytest.raises(ValueError) as error:
        make(tmp_path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("order", "<>")
def test_16_bits_in_either_order_of_bytes(tmp_path, order):
    """A TIFF of two rows; PIL calls them I;16 and I;16B."""
    values = np.array([[0, 256, 65535], [512, 1024, 40000]], dtype=f"{order}u2")
    entries = [(256, 3), (257, 2), (258, 16), (259, 1), (262, 1), (273, 122), (277, 1), (278, 2),
               (279, 12)]
    tiff = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    tiff += b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries)
    (tmp_path / "x.tif").write_bytes(tiff + bytes(4) + values.tobytes())
    assert read_image(tmp_path / "x.tif")[0].tolist() == [[0, 1, 255], [2, 4, 156]]


def test_values_beyond_16_bits_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="values from 0 to 70000, beyond 16 bits"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_images_stored_turned_are_counted_once(suffix, tmp_path, capsys):
    """Over the workers of a loader, too; said at the end of a run, which begins the next count."""
    exif = Image.Exif()
    for number, entry in enumerate((3, 6, 1, None, 99)):
        exif[0x0112] = entry
        Image.new("RGB", (8, 4)).save(tmp_path / f"{number}.{suffix}",
                                      **{} if entry is None else {"exif": exif})
    files = sorted(tmp_path.glob("*"))
    with distributed.session("eval_seg.py"):
        assert {read_image(path).shape for path in files} == {(3, 4, 8)}
        [*DataLoader(files, num_workers=1, collate_fn=lambda paths: read_image(paths[0]))]
    found = "images with an EXIF entry that turns them: 2; they were"
    assert capsys.readouterr().out.startswith(f"{found} read as they are stored, so labels must")
    with distributed.session("train.py"):
        images = {read_image(path, upright=True).shape for path in files}
    assert images == {(3, 4, 8), (3, 8, 4)}
    assert capsys.readouterr().out == f"{found} turned upright\n"
    with distributed.session("train.py"):
        read_image(files[2])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("entry", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_pixels_are_read_as_they_are_stored(suffix, entry, tmp_path):
    """PIL turns TIFFs by itself."""
    pixels, exif = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8), Image.Exif()
    exif[0x0112] = entry
    Image.fromarray(pixels).save(tmp_path / f"x.{suffix}", exif=exif)
    assert np.array_equal(read_image(tmp_path / f"x.{suffix}").permute(1, 2, 0), pixels)
