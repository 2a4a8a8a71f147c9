"""data.py: the views made on the device, class lists."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_scene
from PIL import Image

import data
from data import Grid, grid_boxes, grid_crops, read_classes, sample_grid, student_image

PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def image_of(seed: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(draw_scene(seed, height, width)[0]).permute(2, 0, 1)


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


@pytest.mark.parametrize("height, width", [(40, 23), (67, 90), (140, 181), (240, 37)])
def test_pils_bilinear_is_pils(height, width):
    """To the level but for a pixel in 100; float images are not rounded."""
    image = image_of(0, 134, 180)
    by_pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height),
                                                                    Image.Resampling.BILINEAR)
    found = data.resize(image, height, width, "pil") * 255
    apart = (found - torch.from_numpy(np.array(by_pil)).permute(2, 0, 1)).abs()
    assert apart.max() < 1.01 and (apart > 0.01).float().mean() < 0.01
    exact = data.resize(image / 255, height, width, "pil") * 255
    assert 0.1 < (exact - found).abs().max() < 1.2
    assert (data.resize(image, height, width) * 255 - found).abs().max() > 4


# cv2.resize(…, interpolation=cv2.INTER_LINEAR) of OpenCV 4.11 for (arange(77) ** 2) % 256 as 7 x 11
OPENCV = {(4, 5): [[51, 76, 16, 61, 115], [102, 97, 210, 84, 121], [186, 131, 105, 64, 185],
                   [98, 102, 117, 128, 149]],
          (9, 13): [[0, 1, 3, 6, 11, 17, 25, 34, 45, 57, 70, 85, 100],
                    [81, 93, 107, 123, 140, 133, 8, 30, 53, 78, 103, 131, 157],
                    [168, 106, 109, 139, 171, 182, 96, 36, 56, 95, 136, 151, 103]]}


@pytest.mark.parametrize("size", OPENCV)
def test_opencvs_bilinear_is_opencvs(size):
    """To a level: OpenCV's products have 11 bits. Float images are not rounded."""
    image = (torch.arange(77) ** 2 % 256).byte().view(1, 7, 11).expand(3, -1, -1)
    expected = torch.tensor(OPENCV[size])
    found = data.resize(image, *size, "cv2")[:, :len(expected)] * 255
    assert (found - expected).abs().max() < 1.01 and (found - found.round()).abs().max() < 1e-3
    exact = data.resize(image / 255, *size, "cv2")
    assert torch.equal(exact, F.interpolate(image[None] / 255, size, mode="bilinear")[0])
    with pytest.raises(KeyError, match="pill"):
        data.resize(image, *size, "pill")


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
    padded = student_image(image, 48, (0, 0, 0), (1, 1, 1))
    expected = F.max_pool2d(padded, 8)[0].flatten() > 0
    assert data.image_tokens(image, 48, 8).equal(expected) and 0 < expected.sum() < 36


# -------------------------------------------------------------------------------------- class lists

def test_a_class_has_the_best_of_its_synonyms(tmp_path):
    (tmp_path / "x.txt").write_text("\ufeff# a comment\n  # indented\ncat, kitten\n\ndog\n"
                                    "sofa, couch,\n")
    classes = data.read_classes(tmp_path / "x.txt")
    assert classes.names == ["cat", "dog", "sofa"] and classes.prompts == ["cat", "kitten", "dog",
                                                                           "sofa", "couch"]
    scores = torch.tensor([[1.0, -5], [2, -6], [3, -7], [5, -8], [4, -1]])
    assert classes.best(scores).tolist() == [[2, -5], [3, -7], [5, -1]]


def text_file(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    return tmp_path / "x.txt"


@pytest.mark.parametrize("make, sentence", [
    (lambda t: read_classes("my/no.txt"), "There is no class file my/no.txt"),
    (lambda t: read_classes(text_file(t, "Star\nsun, star")), "has the name 'Star' twice"),
])
def test_refusals_say_what_to_do(tmp_path, make, sentence):
    with pytest.raises(ValueError) as error:
        make(tmp_path)
    assert sentence in str(error.value) and "\n" not in str(error.value)
