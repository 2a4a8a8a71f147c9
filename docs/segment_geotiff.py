"""Names what is where in GeoTIFFs of any size, tile by tile: an example of the library.

    python -m docs.segment_geotiff scene.tif --classes "building, road, water" --ckpt ...
    python -m docs.segment_geotiff a.tif b.tif --classes names.txt --zoom 0.5 --bands 4 3 2 ...

Writes scene.labels.tif beside each image, whole or not at all, of its size, CRS and transform: the
number of each pixel's class, or 255 where the image has no data; the names are in its tags. Memory
is that of one tile. Needs `pip install rasterio`. An interrupted image is started anew.
"""

import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from torch import from_numpy
from tqdm import tqdm

from eval_region import open_model
from eval_seg import Protocol
from tools.figures import PALETTE
from tools.library import SegmentingCLIP, find_names
from util import UserError, distributed, settings
from util.files import atomic_write
from util.images import unreadable
from util.windows import tile_sections

try:
    import rasterio
except ImportError:     # nothing else here needs it
    rasterio = None

SHARED = {"eval_region": ["The model", "Names and numbers"], "eval_seg": ["The windows"]}

# The images
CLASSES = ""                        # names with commas between, synonyms with | ; or a .txt file
BANDS = (1, 2, 3)                   # red, green, blue; of one band or two the first is taken
ZOOM = 1.0                          # of all tiles, so that things have a size that CLIP knows
TILE = 2016                         # side in pixels of the image; at most that is in memory
MARGIN = 224                        # left to neighbours; from 224 / ZOOM on, tiles leave no trace
OUT: str | None = None              # folder of the labels; None: that of each image

LABELS = dict(driver="GTiff", count=1, dtype="uint8", nodata=255, tiled=True, blockxsize=256,
              blockysize=256, compress="deflate", BIGTIFF="IF_SAFER")


def main(argv: list[str] | None = None) -> None:
    """Segments the images that the command line (or `argv`) names."""
    cfg = settings.parse(argv, sys.modules[__name__], positional="IMAGES")
    with distributed.session(__file__) as ranks:
        check(cfg)
        clip = open_model(cfg, SegmentingCLIP).to(ranks.device)
        for path in map(Path, cfg.IMAGES):
            out = Path(cfg.OUT or path.parent) / f"{path.stem}.labels.tif"
            atomic_write(out, partial(segment, cfg, clip, path))
            print(out)


def check(cfg: SimpleNamespace) -> None:
    """Raises UserError for what can be seen to be wrong before a model is loaded."""
    if rasterio is None:
        raise UserError("GeoTIFFs need the package rasterio; pip install rasterio.")
    settings.check_min(cfg, MARGIN=0, TILE=2 * cfg.MARGIN + 1, ZOOM=0.01)
    settings.check(cfg, CLASSES=(len(find_names(cfg.CLASSES)) < 256, "at most 255 classes"))
    settings.refuse_unused(cfg, SHORT_SIDE="follows from ZOOM", LONG_SIDE="follows from ZOOM",
                           CACHE="keeps names for the next run, and the library has none")
    Protocol.of(cfg)
    for path in cfg.IMAGES:
        with open_image(path) as image:
            fits = len(cfg.BANDS) == 3 and 0 < min(cfg.BANDS) <= max(cfg.BANDS) <= image.count
            settings.check(cfg, BANDS=(fits or image.count < 3, f"three from 1 to {image.count}"))


def open_image(path: str | Path) -> object:
    """A GeoTIFF as rasterio opens it. UserError for other files, which GDAL may take for lists of
    further ones, or addresses."""
    with unreadable(path, "a GeoTIFF (gdal_translate makes one of other formats)"):
        return rasterio.open(Path(path).resolve(strict=True), driver="GTiff")


def segment(cfg: SimpleNamespace, clip: SegmentingCLIP, path: Path, file: str) -> None:
    """Segments the image at `path` into a new GeoTIFF `file`; OSError if that can't be written."""
    image, names = open_image(path), find_names(cfg.CLASSES).names
    shape, bands = image.shape, [*cfg.BANDS] if image.count > 2 else [1, 1, 1]
    h, w = (min(cfg.TILE, side) for side in shape)      # the same for all tiles, or scales differ
    rules = asdict(replace(Protocol.of(cfg), short_side=max(1, round(min(h, w) * cfg.ZOOM)),
                           long_side=10**9))
    tiles = product(*(tile_sections(side, cfg.TILE, cfg.MARGIN) for side in shape))
    with image, rasterio.Env(GDAL_CACHEMAX=256), rasterio.open(     # MB of files' blocks
            file, "w", height=shape[0], width=shape[1], crs=image.crs, transform=image.transform,
            **LABELS) as labels:
        labels.write_colormap(1, {k: (*bytes.fromhex(PALETTE[k % len(PALETTE)][1:]),)
                                  for k in range(len(names))})
        labels.update_tags(**{f"CLASS_{k}": name for k, name in enumerate(names)})
        ends = black_and_white(image, bands)
        for (y, top, bottom), (x, left, right) in tqdm([*tiles], path.name, unit="tile"):
            with unreadable(path, "a whole GeoTIFF"):
                pixels, is_valid = read(image, bands, ((y, y + h), (x, x + w)), ends)
            found = np.full((h, w), LABELS["nodata"], np.uint8)
            if is_valid.any():
                classes, _ = clip.segment(pixels, cfg.CLASSES, cfg.TEMPLATES, False, **rules)
                found[is_valid] = classes.byte().cpu().numpy()[is_valid]
            labels.write(found[top - y:bottom - y, left - x:right - x], 1,
                         window=((top, bottom), (left, right)))
    try:
        with rasterio.open(file) as labels:
            labels.checksum(1)      # GDAL says nothing of a full disk
    except rasterio.RasterioIOError:
        raise OSError(f"The labels of {path} are not whole, the disk may be full") from None


def black_and_white(image: object, bands: list[int]) -> np.ndarray | None:
    """(2, 3, 1, 1): percentiles 2 and 98 of each band of the whole image; None for uint8."""
    if {image.dtypes[band - 1] for band in bands} == {"uint8"}:
        return None
    few = (3, *(min(1000, side) for side in image.shape))
    seen = np.ma.masked_invalid(image.read(bands, out_shape=few, masked=True))
    return np.stack([np.percentile(band.compressed() if band.count() else 0, (2, 98))
                     for band in seen], axis=1)[..., None, None]


def read(image: object, bands: list[int], window: tuple, ends: np.ndarray | None) -> tuple:
    """A window of an image -> uint8 tensor (3, h, w), and bool (h, w): where it has data."""
    pixels, is_valid = image.read(bands, window=window), image.dataset_mask(window=window) > 0
    if ends is not None:        # between black and white
        is_valid &= np.isfinite(pixels).all(axis=0)
        pixels = (np.nan_to_num(pixels) - ends[0]) / np.maximum(ends[1] - ends[0], 1e-9)
        pixels = (255 * pixels.clip(0, 1)).round().astype(np.uint8)
    return from_numpy(pixels), is_valid


if __name__ == "__main__":
    main()
