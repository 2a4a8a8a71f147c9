"""data.py: image files, batches, the views made on the device, class lists."""

import json
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_scene, succeeds
from PIL import Image
from tiny import ROOT
from util.names import Names

import data
from data import Grid, epoch_order, grid_boxes, grid_crops, rank_batches, sample_grid, student_image
from util import files
from util.distributed import Ranks

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def image_of(seed: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(draw_scene(seed, height, width)[0]).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------- images

def test_images_are_found_in_all_folders(images):
    names = [path[len(str(images)) + 1:] for path in data.list_images(images)]
    assert names == ["1.png", "2.png", "3.png", "4.png", "more/0.png"]


def test_images_of_a_json(tmp_path, images):
    (tmp_path / "coco.json").write_text(json.dumps({"images": [{"file_name": "2.png"},
                                                               {"file_name": "more/0.png"}]}))
    dataset = data.TrainingImages(tmp_path / "coco.json", images)
    image, index, skipped = dataset[1]
    assert (len(dataset), index, image.dtype, image.shape, skipped) == (2, 1, torch.uint8,
                                                                        (3, 64, 64), [])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "I;16"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    grey = Image.new("L", (5, 3), 200)
    if mode == "I;16":
        stored = Image.fromarray(np.full((3, 5), 200 * 257, np.uint16))
    else:
        stored = grey.convert(mode) if mode in ("P", "L") else grey.convert("RGB").convert(mode)
    stored.save(tmp_path / f"x.{suffix}")
    image = data.read_image(tmp_path / f"x.{suffix}")
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
    small = data.read_image(tmp_path / f"x.{suffix}", most=130 * 301 // 9 + 1)
    whole = data.read_image(tmp_path / f"x.{suffix}")
    expected = F.avg_pool2d(whole.float(), 4 if suffix == "jpg" else 3, ceil_mode=True)
    assert whole.shape == (3, 301, 130) and small.shape == expected.shape
    assert (small - expected).abs().max() <= (4 if suffix == "jpg" else 1)
    assert data.read_image(tmp_path / f"x.{suffix}", most=130 * 301).equal(whole)


def test_a_large_image_takes_little_memory(tmp_path):
    """10^8 pixels in a file of 0.1 MB: decoding took 2.6 GB before."""
    Image.new("P", (10_000, 10_000)).save(tmp_path / "x.png")
    program = ("import resource, sys, data\n"
               "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
               "before = peak()\n"
               "data.read_image(sys.argv[1], True, 16_000_000)\n"
               "print(peak() - before)")
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "x.png"], cwd=ROOT,
                          capture_output=True, text=True)
    assert int(succeeds(done)) < 400        # 100 of palette indices, 48 of the result, and copies


def test_images_of_other_formats_are_counted(tmp_path):
    for name in ("a.jpg", "b.gif", "c.GIF", "d.avif", "notes.txt", ".e.gif"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    assert data.TrainingImages(tmp_path).others == {".gif": 2, ".avif": 1}
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ValueError, match="holds no image but 2 .gif, 1 .avif, which are not read"):
        data.TrainingImages(tmp_path)


def test_of_an_animation_the_first_image_is_read(tmp_path):
    first, second = Image.new("RGB", (4, 4), (10, 20, 30)), Image.new("RGB", (4, 4), (200, 0, 0))
    first.save(tmp_path / "x.png", save_all=True, append_images=[second])
    assert data.read_image(tmp_path / "x.png")[:, 0, 0].tolist() == [10, 20, 30]


def test_training_images_are_turned_upright(tmp_path):
    """Annotations are made for the image as it is stored, so evaluation leaves it."""
    exif = Image.Exif()
    exif[0x0112] = 6        # the camera was held upright
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert data.TrainingImages(tmp_path)[0][0].shape == (3, 8, 4)
    assert data.read_image(tmp_path / "x.jpg").shape == (3, 4, 8)


def test_links_are_followed_once_and_hidden_files_left_out(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/x.png", "a/._x.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert [path[len(str(tmp_path)) + 1:] for path in data.list_images(tmp_path)] in (["a/x.png"],
                                                                                      ["b/x.png"])


def test_a_large_folder_is_listed_once(tmp_path, images, monkeypatch, capsys):
    """Into a file, in the same order; again when a folder has changed. Training is by windows."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "x.gif").touch()
    expected, small = data.list_images(folder), data.TrainingImages(folder)
    monkeypatch.setattr(data, "MAX_LISTED", 3)
    dataset = data.TrainingImages(folder)
    assert isinstance(dataset.paths, Names) and list(dataset.paths) == expected
    assert dataset[4].data.equal(small[4].data) and dataset.others == {".gif": 1}
    order = dataset.order(2, 0, 0)
    assert len(order) == 2 and len(set(np.concatenate([order[0], order[1]]).tolist())) == 4
    with monkeypatch.context() as patch:
        patch.setattr(data, "walk_images", lambda *_: pytest.fail("it was listed again"))
        again = data.TrainingImages(folder)
    assert again.fingerprint == dataset.fingerprint and again.others == {".gif": 1}
    shutil.copy(images / "1.png", folder / "more" / "9.png")
    changed = data.TrainingImages(folder)
    assert len(changed) == 6 and changed.fingerprint != dataset.fingerprint
    assert capsys.readouterr().out.count("listing them into") == 2


def test_fingerprint_is_of_names_not_of_places(tmp_path, images):
    copy = shutil.copytree(images, tmp_path / "copy")
    assert data.TrainingImages(copy).fingerprint == data.TrainingImages(images).fingerprint
    (copy / "1.png").rename(copy / "9.png")
    assert data.TrainingImages(copy).fingerprint != data.TrainingImages(images).fingerprint


# -------------------------------------------------------------------------------- order and sharing

def test_an_epoch_has_every_image_once():
    order = epoch_order(32, 4, epoch=0, seed=1)
    assert order.shape == (8, 4) and sorted(order.flatten().tolist()) == list(range(32))
    assert not torch.equal(order, epoch_order(32, 4, epoch=1, seed=1))
    assert torch.equal(order, epoch_order(32, 4, epoch=0, seed=1))
    assert epoch_order(35, 4, 0, 1).shape == (8, 4)         # the rest waits for another epoch
    with pytest.raises(ValueError, match="There are 3 images, fewer than BATCH_SIZE, 8; add "
                                         "images, or set BATCH_SIZE to 3"):
        epoch_order(3, 8, 0, 1)


@pytest.mark.parametrize("world, micro_batch", [(1, 8), (2, 4), (2, 1), (4, 2)])
def test_ranks_share_each_step(world, micro_batch):
    """Whatever the ranks and micro batches, step s has the images of order[s]; and a run can begin
    at any step."""
    order = epoch_order(40, 8, 0, 0)
    ranks = [Ranks(rank, world, torch.device("cpu")) for rank in range(world)]
    shares = [list(rank_batches(order, each, micro_batch, first_step=2)) for each in ranks]
    per_step = 8 // world // micro_batch
    for step in range(2, 5):
        seen = [i for share in shares
                for batch in share[(step - 2) * per_step:(step - 1) * per_step] for i in batch]
        assert sorted(seen) == sorted(order[step].tolist())


def test_grids_are_drawn_evenly_and_by_key():
    grids = [sample_grid(str(key), (1, 6)) for key in range(3600)]
    counts = {(m, n): sum((grid.rows, grid.columns) == (m, n) for grid in grids)
              for m in range(1, 7) for n in range(1, 7)}
    assert 60 < min(counts.values()) and max(counts.values()) < 140     # 100 expected
    assert sample_grid("7") == sample_grid("7") and all(len(grid.cells) == grid.rows * grid.columns
                                                        for grid in grids)
    published = [sample_grid(str(key), (1, 6), aspect=2, most=20) for key in range(500)]
    assert all(max(grid.rows, grid.columns) <= 2 * min(grid.rows, grid.columns)
               for grid in published)
    assert max(len(set(grid.cells)) for grid in published) == 20


# ----------------------------------------------------------------------------- images on the device

def test_student_image_is_padded_right_and_below():
    image = torch.full((3, 20, 40), 255, dtype=torch.uint8)
    resized = student_image(image, 16, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    assert resized.shape == (3, 16, 16)
    # white, then black, normalised
    expected = torch.tensor([2.0] * 8 + [-2.0] * 8)[:, None].expand(3, 16, 16)
    torch.testing.assert_close(resized, expected)


def test_crops_and_boxes_name_the_same_cells():
    """Each cell has its own colour; crop i shows it, and box i holds it in the student's
    image."""
    grid = Grid(3, 4, [0, 1, 5, 6, 11])
    colours = torch.arange(12).view(3, 4) * 20
    image = colours.repeat_interleave(20, 0).repeat_interleave(20, 1).expand(3, -1, -1).byte()
    crops = grid_crops(image, grid, 8, **PLAIN)
    resized = student_image(image, 64, **PLAIN)
    for crop, box, cell in zip(crops, grid_boxes(image, grid, 64), grid.cells):
        x0, y0, x1, y1 = (box * 64).round().int().tolist()
        assert crop[:, 2:-2, 2:-2].sub(cell * 20 / 255).abs().max() < 0.05
        assert resized[:, y0 + 4:y1 - 4, x0 + 4:x1 - 4].sub(cell * 20 / 255).abs().max() < 0.05
    assert torch.allclose(grid_boxes(image, Grid(1, 1, [0]), 64), torch.tensor([[0, 0, 1, 0.75]]))


@pytest.mark.parametrize("size", [(33 * 8, 40), (100 * 8, 90 * 8), (6000, 10)])
def test_images_that_are_reduced_much_are_reduced_in_two_steps(size, monkeypatch):
    """No step is larger than a GPU takes, and the result is that of one step, nearly."""
    smooth = torch.rand(1, 3, 12, 9, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(smooth, size, mode="bicubic")[0].clamp(0, 1)
    direct = F.interpolate(image[None], (8, 8), mode="bicubic", antialias=True)[0].clamp(0, 1)
    steps, interpolate = [], F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, size, **how:
                        steps.append(max(x.shape[2] / size[0], x.shape[3] / size[1]))
                        or interpolate(x, size, **how))
    assert (data.resize(image, 8, 8) - direct).abs().max() < 0.01
    assert len(steps) == 1 and max(steps) <= 32


@pytest.mark.parametrize("rows, columns", [(2, 3), (5, 1), (4, 6)])
def test_crops_are_those_that_pil_would_cut(rows, columns):
    image = image_of(0, 240, 360)
    crops = grid_crops(image, Grid(rows, columns, list(range(rows * columns))), 56, **PLAIN)
    whole = Image.fromarray(image.permute(1, 2, 0).numpy())
    for index, crop in enumerate(crops):
        y, x = divmod(index, columns)
        box = (x * 360 / columns, y * 240 / rows, (x + 1) * 360 / columns, (y + 1) * 240 / rows)
        cut = whole.crop(tuple(map(round, box))).resize((56, 56), Image.Resampling.BICUBIC)
        by_pil = torch.from_numpy(np.array(cut))
        assert (crop.permute(1, 2, 0) - by_pil / 255).abs().mean() < 0.01


def test_crops_can_keep_their_aspect():
    image = torch.full((3, 30, 60), 255, dtype=torch.uint8)
    crops = grid_crops(image, Grid(1, 1, [0]), 16, **PLAIN, keep_aspect=True)
    torch.testing.assert_close(crops[0],
                               torch.tensor([0.0] * 4 + [1.0] * 8 + [0.0] * 4)[:, None].expand(
                                   3, 16, 16))


@pytest.mark.parametrize("height, width", [(30, 60), (49, 33), (7, 300)])
def test_patches_that_show_some_of_the_image(height, width):
    """Those of a white image that are not black all over."""
    image = torch.full((3, height, width), 255, dtype=torch.uint8)
    padded = data.student_image(image, 48, (0, 0, 0), (1, 1, 1))
    expected = F.max_pool2d(padded, 8)[0].flatten() > 0
    assert data.image_tokens(image, 48, 8).equal(expected) and 0 < expected.sum() < 36


# ---------------------------------------------------------------------------- data decide nothing

def test_only_decoders_of_the_list_are_used(tmp_path, monkeypatch):
    """A PostScript file named .jpg would make PIL start another program."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program started"))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    (tmp_path / "a.jpg").write_bytes(postscript)
    with pytest.raises(ValueError, match="a.jpg can't be read as an image"):
        data.read_image(tmp_path / "a.jpg")
    Image.new("RGB", (4, 3)).save(tmp_path / "b.jpg", format="GIF")
    with pytest.raises(ValueError, match="b.jpg can't be read as an image"):
        data.read_image(tmp_path / "b.jpg")


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    """A FIFO would be read for ever."""
    os.mkfifo(tmp_path / "a.jpg")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "b.jpg"))
        for name in ("a.jpg", "b.jpg"):
            with pytest.raises(ValueError, match=f"{name} can't be read as an image .it is no reg"):
                data.read_image(tmp_path / name)


def test_a_read_that_stalls_counts_as_a_bad_file(images, tmp_path, monkeypatch):
    """A FIFO that pretends to be a file stands for a mount that hangs."""
    os.mkfifo(tmp_path / "a.png")
    shutil.copy(images / "1.png", tmp_path / "b.png")
    dataset = data.TrainingImages(tmp_path, read_timeout=0.2)
    monkeypatch.setattr(data.Path, "is_file", lambda path: True)
    image, index, ((path, reason),) = dataset[0]
    assert index == 0 and image.shape[0] == 3 and path.endswith("a.png")
    assert "it was not read within 0.2 s" in reason


@pytest.mark.parametrize("name", ["../x.png", "more/../../x.png", "/etc/x.png"])
def test_a_json_names_images_below_its_root_only(tmp_path, name):
    (tmp_path / "root").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "x.png")
    (tmp_path / "root" / "x.json").write_text(json.dumps({"images": [{"file_name": name}]}))
    with pytest.raises(ValueError, match="which is not below .*/root; set IMAGE_ROOT"):
        data.list_images(tmp_path / "root" / "x.json")
    if name == "../x.png":
        assert len(data.TrainingImages(tmp_path / "root" / "x.json", outside=True)) == 1


# -------------------------------------------------------------------------------------- class lists

def test_a_class_has_the_best_of_its_synonyms(tmp_path):
    (tmp_path / "x.txt").write_text("\ufeff# a comment\n  # indented\ncat, kitten\n\ndog\n"
                                    "sofa, couch,\n")
    classes = data.read_classes(tmp_path / "x.txt")
    assert classes.names == ["cat", "dog", "sofa"] and classes.prompts == ["cat", "kitten", "dog",
                                                                           "sofa", "couch"]
    scores = torch.tensor([[1.0, -5], [2, -6], [3, -7], [5, -8], [4, -1]])
    assert classes.best(scores).tolist() == [[2, -5], [3, -7], [5, -1]]


# ----------------------------------------------------------------------------------------- refusals

def named_json(tmp_path):
    """A json that names an image."""
    (tmp_path / "x.json").write_text(json.dumps({"images": [{"file_name": "0.jpg"}]}))
    return tmp_path / "x.json"


def text_file(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    return tmp_path / "x.txt"


@pytest.mark.parametrize("make, sentence", [
    (lambda t: data.list_images(t / "no"), "no does not exist; put images there"),
    (lambda t: data.list_images(t), "holds no image; put images there"),
    (lambda t: data.list_images(t / "no.json"), "There is no file"),
    (lambda t: data.list_images(named_json(t), t / "no"), "which is not there; set IMAGE_ROOT"),
    (lambda t: data.read_image(__file__), "can't be read as an image"),
    (lambda t: data.read_classes("my/no.txt"), "There is no class file my/no.txt"),
    (lambda t: data.read_classes(text_file(t, "Star\nsun, star")), "has the name 'Star' twice"),
    (lambda t: files.read_json(__file__), "is not json"),
    (lambda t: files.read_json(text_file(t, "[" * 10**5)), "is not json"),
])
def test_refusals_say_what_to_do(tmp_path, make, sentence):
    with pytest.raises(ValueError) as error:
        make(tmp_path)
    assert sentence in str(error.value) and "\n" not in str(error.value)
