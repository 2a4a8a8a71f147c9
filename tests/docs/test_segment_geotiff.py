"""docs/segment_geotiff.py: labels of a GeoTIFF are those of the library's one call on all of it,
where they are on earth is kept, and files that are none are one sentence."""

import importlib
import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny  # noqa: F401
import torch
from conftest import draw_scene, options
from PIL import Image

from docs import segment_geotiff
from model import DeCLIP
from tools.figures import PALETTE
from tools.library import declip
from util.images import list_images
from util.windows import tile_sections

rasterio = pytest.importorskip("rasterio")
from_origin = rasterio.transform.from_origin
NAMES = "a, b, c, d, e, f, g, h"
PLACE = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_400_000, 0.3, 0.3)}
# tiny-eva's windows are 48 px wide, every 16. So these tiles' windows are some of the whole
# image's, and no other window touches what is kept of them.
TILES = {"tile": 96, "margin": 32}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A checkpoint with weights, stronger than at the start, that name many classes in a scene."""
    torch.manual_seed(1)
    clip = DeCLIP("tiny-eva", context="qk")
    for weight in clip.visual.trunk.parameters():
        torch.nn.init.normal_(weight, std=0.3 if weight.ndim > 1 else 0.5)
    for weight in clip.text.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    path = tmp_path_factory.mktemp("checkpoint") / "declip.safetensors"
    clip.save(path)
    return path


def scene(height: int = 160, width: int = 208) -> np.ndarray:
    """A drawn scene, (3, height, width)."""
    return draw_scene(7, height, width)[0].transpose(2, 0, 1)


def write(path: Path, pixels: np.ndarray, **given) -> Path:
    """Pixels (bands, H, W) as a GeoTIFF on earth."""
    bands, height, width = pixels.shape
    with rasterio.open(path, "w", driver="GTiff", count=bands, height=height, width=width,
                       dtype=pixels.dtype, **PLACE | given) as file:
        file.write(pixels)
    return path


def labels_of(ckpt: Path, *images: Path, **given) -> np.ndarray:
    """Segments images; returns the labels of the first, (H, W)."""
    given = {"classes": NAMES, "templates": "{}", "ckpt": ckpt} | TILES | given
    segment_geotiff.main([*map(str, images), *options(**given)])
    with rasterio.open(images[0].with_suffix(".labels.tif")) as file:
        return file.read(1)


opened = cache(declip)


def labels_at_once(ckpt: Path, pixels: np.ndarray, zoom: float = 1) -> np.ndarray:
    """The library's one call on all pixels (3, H, W)."""
    found = opened(ckpt).segment(torch.from_numpy(pixels.copy()), NAMES, "{}", False,
                                 short_side=round(zoom * min(pixels.shape[1:])))
    return found.classes.numpy()


# ----------------------------------------------------------------------------------- the tiles

def test_tiles_leave_no_trace(ckpt, tmp_path, monkeypatch):
    """Sixteen tiles with a margin give what one call gives on all of the image; without a margin
    they don't. No more than a tile is ever read."""
    sizes, read = set(), segment_geotiff.read

    def reading(image, bands, window, ends):
        pixels, is_valid = read(image, bands, window, ends)
        sizes.add(pixels.shape[1:])
        return pixels, is_valid

    monkeypatch.setattr(segment_geotiff, "read", reading)
    path = write(tmp_path / "scene.tif", scene())
    expected = labels_at_once(ckpt, scene())
    assert len(np.unique(expected)) >= 3
    assert np.array_equal(labels_of(ckpt, path), expected)
    assert sizes == {(96, 96)}
    assert (labels_of(ckpt, path, margin=0) != expected).mean() > 0.003


@pytest.mark.parametrize("zoom", [1, 0.5, 2])
@pytest.mark.parametrize("size", [(96, 96), (40, 70), (1, 9)], ids=["a tile", "smaller", "a row"])
def test_an_image_of_one_tile_is_one_call(ckpt, tmp_path, size, zoom):
    path = write(tmp_path / "scene.tif", scene(*size))
    zoom = 1 if size[0] == 1 else zoom      # no row is half a pixel high
    expected = labels_at_once(ckpt, scene(*size), zoom)
    assert np.array_equal(labels_of(ckpt, path, zoom=zoom), expected)


@pytest.mark.parametrize("size", [(97, 96), (130, 30), (99, 141)],
                         ids=["a pixel more", "a strip", "odd"])
def test_images_of_any_size_are_covered(ckpt, tmp_path, size):
    """Every pixel gets a class; all tiles have one scale, the last ones too."""
    found = labels_of(ckpt, write(tmp_path / "scene.tif", scene(*size)))
    assert found.shape == size and found.max() < 8
    # Other windows of the same scale
    assert (found == labels_at_once(ckpt, scene(*size))).mean() > 0.8


@pytest.mark.parametrize("length, expected", [
    (50, [(0, 0, 50)]), (96, [(0, 0, 96)]), (128, [(0, 0, 64), (32, 64, 128)]),
    (97, [(0, 0, 48), (1, 48, 97)]), (130, [(0, 0, 64), (32, 64, 81), (34, 81, 130)])])
def test_sections_of_a_side(length, expected):
    """Of tiles of 96 with a margin of 32: each pixel is in one section, and 32 from its tile's
    edges unless they are the image's."""
    assert tile_sections(length, 96, 32) == expected


# ---------------------------------------------------------------------------- what is written

def test_labels_lie_where_the_image_does(ckpt, tmp_path):
    """Size, CRS, transform; the names and the colours that viewers show. Labels are no image to
    train with."""
    path = write(tmp_path / "scene.tif", scene())
    labels_of(ckpt, path, classes="ground | soil, disc, sea")
    with rasterio.open(path) as image, rasterio.open(tmp_path / "scene.labels.tif") as labels:
        assert (labels.crs, labels.transform) == (image.crs, image.transform)
        assert labels.shape == image.shape and labels.dtypes == ("uint8",)
        assert (labels.nodata, labels.compression.value) == (255, "DEFLATE")
        assert labels.block_shapes == [(256, 256)]
        tags = {name: text for name, text in labels.tags().items() if name.startswith("CLASS")}
        assert tags == {"CLASS_0": "ground", "CLASS_1": "disc", "CLASS_2": "sea"}
        for number in range(3):
            assert bytes(labels.colormap(1)[number][:3]).hex() == PALETTE[number][1:]
    assert {file.name for file in tmp_path.iterdir()} == {"scene.tif", "scene.labels.tif"}
    assert list_images(tmp_path)[0] == [str(path)]


def test_several_images_go_into_a_folder(ckpt, tmp_path):
    paths = [write(tmp_path / f"{name}.tif", scene(50, 60)) for name in "ab"]
    labels_of(ckpt, *paths)
    beside = [path.with_suffix(".labels.tif").read_bytes() for path in paths]
    given = options(classes=NAMES, templates="{}", ckpt=ckpt, out=tmp_path / "out")
    segment_geotiff.main([*map(str, paths), *given])
    assert [(tmp_path / f"out/{name}.labels.tif").read_bytes() for name in "ab"] == beside


@pytest.mark.parametrize("how", ["nodata", "alpha"])
def test_where_there_is_no_data_there_is_no_class(ckpt, tmp_path, monkeypatch, how):
    """By a value or by an alpha band; tiles without any data are not computed."""
    pixels, empty = np.maximum(scene(), 1), np.zeros((160, 208), bool)
    empty[:, :100] = empty[5, 150] = True
    pixels[:, empty] = 0
    path = tmp_path / "scene.tif"
    if how == "nodata":
        write(path, pixels, nodata=0)
    else:
        alpha = np.where(empty, 0, 255).astype(np.uint8)[None]
        write(path, np.concatenate([pixels, alpha]), photometric="RGB", ALPHA="YES")
    calls, segment = [], segment_geotiff.SegmentingCLIP.segment
    monkeypatch.setattr(segment_geotiff.SegmentingCLIP, "segment", lambda *given, **rules: (
        calls.append(1), segment(*given, **rules))[1])
    found = labels_of(ckpt, path)
    assert np.array_equal(found == 255, empty)
    rows, columns = (len(tile_sections(side, 96, 32)) for side in (160, 208))
    assert len(calls) == rows * (columns - 1)       # the first column's tiles are empty
    assert np.array_equal(found[~empty], labels_at_once(ckpt, pixels)[~empty])


# --------------------------------------------------------------------------- bands and values

def test_bands_are_chosen(ckpt, tmp_path):
    """Blue, green, red and infrared; a grey image is as one of three equal bands."""
    expected = labels_at_once(ckpt, scene())
    four = np.concatenate([scene()[::-1], scene()[:1] // 2])
    path = write(tmp_path / "4.tif", four, photometric="MINISBLACK")      # else it has an alpha
    assert np.array_equal(labels_of(ckpt, path, bands=(3, 2, 1)), expected)
    assert not np.array_equal(labels_of(ckpt, path), expected)
    grey = labels_at_once(ckpt, scene()[[1, 1, 1]])
    assert np.array_equal(labels_of(ckpt, write(tmp_path / "1.tif", scene()[1:2])), grey)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_values_are_stretched_alike_in_the_whole_image(ckpt, tmp_path, dtype):
    """From the 2nd to the 98th percentile of each band; values of no data and NaN don't count."""
    values = scene().astype(float) * [[[40]], [[20]], [[9]]] + 100
    low, high = np.percentile(values, (2, 98), axis=(1, 2))[..., None, None]
    as_bytes = (255 * ((values - low) / (high - low)).clip(0, 1)).round().astype(np.uint8)
    values = values.round().astype(dtype)
    values[:, 20:30, 20:30] = 0
    if dtype == "float32":
        values[1, 50:60, 50:60] = np.nan
    path = write(tmp_path / "scene.tif", values, nodata=0)
    with rasterio.open(path) as image:
        ends = segment_geotiff.black_and_white(image, [1, 2, 3])
    np.testing.assert_allclose(ends, [low, high], rtol=0.02)
    found = labels_of(ckpt, path)
    assert (found[20:30, 20:30] == 255).all()
    assert (found[50:60, 50:60] == 255).all() == (dtype == "float32")
    assert (found == labels_at_once(ckpt, as_bytes))[100:].mean() > 0.97


def test_values_of_one_number_are_black(ckpt, tmp_path):
    """A band of one value, and an image without any data, are no division by zero."""
    flat = np.full((3, 50, 60), 700, np.uint16)
    black = labels_at_once(ckpt, np.zeros((3, 50, 60), np.uint8))
    with np.errstate(divide="raise", invalid="raise"):
        assert np.array_equal(labels_of(ckpt, write(tmp_path / "flat.tif", flat)), black)
        assert (labels_of(ckpt, write(tmp_path / "no.tif", flat, nodata=700)) == 255).all()


# ---------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("given, words", [
    ({"classes": ""}, "CLASSES names no class"),
    ({"classes": ", ".join(f"class {number}" for number in range(256))}, "at most 255 classes"),
    ({"bands": (1, 2, 4)}, r"BANDS is \(1, 2, 4\); it must be three from 1 to 3"),
    ({"bands": (0, 1, 2)}, "three from 1 to 3"), ({"bands": (1,)}, "three from 1 to 3"),
    ({"tile": 64, "margin": 32}, "TILE is 64; it must be at least 65"),
    ({"margin": -1}, "MARGIN is -1; it must be at least 0"),
    ({"zoom": 0}, "ZOOM is 0.0; it must be at least 0.01"),
    ({"short_side": 448}, "SHORT_SIDE follows from ZOOM, so it has no effect"),
    ({"stride": 0}, "STRIDE is 0; it must be at least 1"),
])
def test_wrong_settings_are_a_sentence(ckpt, tmp_path, given, words):
    """Before a model is loaded."""
    path = write(tmp_path / "scene.tif", scene(50, 60))
    with pytest.raises(SystemExit, match=words):
        labels_of("absent.safetensors", path, **given)
    assert [*tmp_path.iterdir()] == [path]


def test_no_labels_replace_others(ckpt, tmp_path):
    """Not those of an image of the same name, nor a file of the user's own; its own are made anew.
    """
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.tif", scene(32, 40))
    both = [str(tmp_path / name / "a.tif") for name in ("one", "two")]
    more = options(ckpt=ckpt, classes=NAMES, templates="{}", **TILES)
    with pytest.raises(SystemExit, match="is not the only image whose labels would be"):
        segment_geotiff.main([*both, *more, "--out", str(tmp_path / "out")])
    write(tmp_path / "one/a.labels.tif", scene(32, 40))
    with pytest.raises(SystemExit, match="a.labels.tif is there and not of this tool"):
        segment_geotiff.main([both[0], *more])
    for _ in range(2):
        segment_geotiff.main([both[1], *more])


def test_other_files_are_a_sentence(tmp_path):
    """GDAL would open a list of files, too, and an address."""
    Image.fromarray(scene().transpose(1, 2, 0)).save(tmp_path / "png.tif", "PNG")
    rasterio.open(write(tmp_path / "whole.tif", scene())).close()
    (tmp_path / "list.tif").write_text(
        f'<VRTDataset rasterXSize="208" rasterYSize="160"><VRTRasterBand dataType="Byte" band="1">'
        f"<SimpleSource><SourceFilename>{tmp_path / 'whole.tif'}</SourceFilename></SimpleSource>"
        "</VRTRasterBand></VRTDataset>")
    for name in ("png.tif", "list.tif"):
        with pytest.raises(SystemExit, match=f"{name} can't be read as a GeoTIFF .*not recognized"):
            labels_of("absent.safetensors", tmp_path / name)
    for name in ("absent.tif", "/vsicurl/https://example.org/scene.tif"):
        with pytest.raises(SystemExit, match="there is no such file"):
            labels_of("absent.safetensors", tmp_path / name)


def test_a_damaged_image_leaves_no_labels(ckpt, tmp_path):
    path = write(tmp_path / "scene.tif", scene())
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(SystemExit, match="scene.tif can't be read as a whole GeoTIFF"):
        labels_of(ckpt, path)
    assert [*tmp_path.iterdir()] == [path]


def test_a_full_disk_is_noticed(ckpt, tmp_path, monkeypatch):
    """GDAL leaves a file without its end and raises nothing."""
    path, opened = write(tmp_path / "scene.tif", scene()), rasterio.open

    def truncating(file, *rest, **given):
        if str(file).endswith(".tmp") and not rest:
            os.truncate(file, os.path.getsize(file) - 800)
        return opened(file, *rest, **given)

    monkeypatch.setattr(rasterio, "open", truncating)
    with pytest.raises(SystemExit, match="labels of .*scene.tif are not whole, the disk may be"):
        labels_of(ckpt, path)
    assert [*tmp_path.iterdir()] == [path]


def test_without_rasterio_it_says_what_to_install(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "rasterio", None)
        importlib.reload(segment_geotiff)
        with pytest.raises(SystemExit, match="need the package rasterio; pip install rasterio"):
            segment_geotiff.main(["scene.tif", "--classes", "sea"])
    importlib.reload(segment_geotiff)
