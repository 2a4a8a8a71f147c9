"""util/samples.py: training images in files, what is left out of them, and time limits."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from util.distributed import Ranks
from util.images import read_image
from util.samples import ImageFiles, find_images


def test_images_of_a_json(tmp_path, images):
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"file_name": "2.png"},
                                                               {"file_name": "more/0.png"}]}))
    dataset = ImageFiles(tmp_path / "coco.json", images)
    image, index, skipped = dataset[1]
    assert (len(dataset), index, image.dtype, image.shape, skipped) == (2, 1, torch.uint8,
                                                                        (3, 64, 64), [])


@pytest.mark.parametrize("rank", [0, 1])
def test_images_of_other_formats_are_counted(tmp_path, capsys, rank):
    """The first rank says how many are left out."""
    for name in ("a.jpg", "b.gif", "c.GIF"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    ranks = Ranks(rank, 2, torch.device("cpu"))
    found = find_images(str(tmp_path), None, False, 60.0, None, ranks)
    assert len(found) == 1 and found.others == {".gif": 2}
    printed = capsys.readouterr().out
    assert printed == "" if rank else printed.startswith("left out: 2 .gif; only .jpg .jpeg ")


def test_training_images_are_turned_upright(tmp_path):
    """Annotations are made for the image as it is stored, so evaluation leaves it."""
    exif = Image.Exif()
    exif[0x0112] = 6        # the camera was held upright
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert ImageFiles(tmp_path)[0][0].shape == (3, 8, 4)
    assert read_image(tmp_path / "x.jpg").shape == (3, 4, 8)


def test_fingerprint_is_of_names_not_of_places(tmp_path, images):
    copy = shutil.copytree(images, tmp_path / "copy")
    assert ImageFiles(copy).fingerprint == ImageFiles(images).fingerprint
    (copy / "1.png").rename(copy / "9.png")
    assert ImageFiles(copy).fingerprint != ImageFiles(images).fingerprint


def test_a_read_that_stalls_counts_as_a_bad_file(images, tmp_path, monkeypatch):
    """A FIFO that pretends to be a file stands for a mount that hangs."""
    os.mkfifo(tmp_path / "a.png")
    shutil.copy(images / "1.png", tmp_path / "b.png")
    dataset = ImageFiles(tmp_path, read_timeout=0.2)
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    image, index, ((path, reason),) = dataset[0]
    assert index == 0 and image.shape[0] == 3 and path.endswith("a.png")
    assert "it was not read within 0.2 s" in reason
