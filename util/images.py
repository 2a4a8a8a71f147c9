"""Image files: which there are below a folder or in a json, and their pixels as uint8."""

import io
import math
import mmap
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Transpose
from torch import Tensor

from util import UserError
from util.coco import files_below, read_coco
from util.distributed import gather
from util.files import find

MAX_DECODED = 100_000_000   # pixels; larger images are not decoded: a small file could fill memory
Image.MAX_IMAGE_PIXELS = None       # PIL would warn at its own bound; ours holds before decoding
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Image files that are not read, and are named when they are left out.
OTHER_SUFFIXES = (".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".ppm", ".pgm", ".tga", ".dng",
                  ".nef", ".cr2", ".arw", ".svg", ".eps", ".psd")
# How names end that our tools give: what they draw may lie beside photographs, and no lister takes
# it for one. A file that is named one by one, by a user, a json or a list, is read all the same.
OWN_ENDINGS = (".segmentation.png", ".labels.png", ".detection.png", "/attention.png", "/cls.png",
               "/correlation.png", "/segmentation.png", "/sizes.png", "/curves.png", ".labels.tif")
# PIL chooses a decoder by a file's content, and some decoders start other programs (PostScript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
# How an image that was turned as its EXIF entry says becomes the stored one.
TURN_BACK = dict(enumerate((
    Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM,
    Transpose.TRANSPOSE, Transpose.ROTATE_90, Transpose.TRANSVERSE, Transpose.ROTATE_270), 2))


# -------------------------------------------------------------------------------------- pixels

def read_image(path: str | Path, upright: bool = False, most: int | None = None) -> Tensor:
    """An image file as RGB, uint8 (3, H, W). UserError names a file that can't be read.

    upright: turn it as its EXIF entry says. Annotations are made for images as they are stored.
    most: an image of more pixels is reduced by a whole factor while it is decoded, None for never.
    """
    with unreadable(path, "an image"):
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("it is no regular file")
        return open_image(path, upright, most)


def open_image(file: str | Path | BinaryIO, upright: bool, most: int | None) -> Tensor:
    """As read_image, of an opened file, too. Raises what decoders raise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # of metadata that is not used here
        with Image.open(file, formats=FORMATS) as opened:
            pixels, is_turned = decode(opened, upright, most)
    if is_turned:
        key = file.getvalue() if isinstance(file, io.BytesIO) else os.fsencode(file)
        TURNED[zlib.crc32(key) % len(TURNED)] = 1 + upright
    return torch.from_numpy(pixels).permute(2, 0, 1)


def as_image(photo: str | Path | Image.Image | Tensor) -> Tensor:
    """A photograph in any form -> RGB, uint8 (3, H, W), upright if its EXIF entry says how.

    Raises UserError for a file or a PIL image that can't be read, and for a tensor of another kind.
    """
    if isinstance(photo, str | Path):
        return read_image(photo, upright=True)
    if isinstance(photo, Image.Image):
        with unreadable(repr(photo), "an image"):
            return torch.from_numpy(decode(photo.copy(), upright=True)[0]).permute(2, 0, 1)
    shape = tuple(getattr(photo, "shape", ()))
    if not isinstance(photo, Tensor) or photo.dtype != torch.uint8 or shape[:1] != (3,) or (
            len(shape) != 3 or 0 in shape):
        raise UserError(f"The photograph is a {type(photo).__name__} of {shape or photo!r:.60} "
                        f"{getattr(photo, 'dtype', '')}; give a path, a PIL image, or a uint8 "
                        "tensor of RGB, (3, H, W).")
    return photo


def orientation(file: Image.Image) -> int:
    """The EXIF entry of how an image is stored: 1 upright, up to 8; from 5 on, on its side."""
    with suppress(Exception):       # a damaged entry is none
        number = file.getexif().get(0x0112)
        return number if number in range(1, 9) else 1
    return 1


def lies(path: str | Path) -> bool:
    """Whether an image's EXIF entry says that it is stored on its side."""
    with Image.open(path, formats=FORMATS) as opened:
        return orientation(opened) > 4


# Of images that this process or a worker forked from it has read, by a checksum: those that are
# stored turned, 1 if they were read so, 2 if they were turned upright.
TURNED = np.frombuffer(mmap.mmap(-1, 2**24), np.uint8)


def say_turned(is_main: bool) -> None:
    """At the end of a run: how many images, over all ranks, are stored turned, if any."""
    own = {int(key): int(TURNED[key]) for key in np.flatnonzero(TURNED)}
    TURNED[list(own)] = 0
    ways = Counter({key: way for of_rank in gather(own) for key, way in of_rank.items()}.values())
    for way, what in ((1, "read as they are stored, so labels must be of the stored images, not of "
                          "the upright ones"), (2, "turned upright")):
        if is_main and ways[way]:
            print(f"images with an EXIF entry that turns them: {ways[way]:,}; they were {what}")


@contextmanager
def unreadable(path: str | Path, what: str) -> Iterator[None]:
    """Within it, any error becomes a UserError: the file can't be read as `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:      # decoders raise anything on damaged files
        reason = " ".join((str(error) or type(error).__name__).split())
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else reason
        raise UserError(f"{path} can't be read as {what} ({reason}); replace or remove it."
                        ) from None


def decode(file: Image.Image, upright: bool, most: int | None = None) -> tuple[np.ndarray, bool]:
    """An opened image as RGB, uint8 (H, W, 3), and whether it is stored turned.

    Raises ValueError if it is too large or has values of an unknown range.
    """
    if file.mode == "F":
        raise ValueError("it has floating-point values of an unknown range")
    factor = reduction(file, most)
    if factor > 1:      # a JPEG can be decoded at a half, a quarter or an eighth
        file.draft(None, (max(1, file.width // factor), max(1, file.height // factor)))
        factor = reduction(file, most)
    if file.width * file.height > MAX_DECODED:
        raise ValueError(f"it is {file.width} x {file.height}, and at most {MAX_DECODED:,} pixels "
                         "are decoded: cut it into tiles, as docs/recipes.md does")
    if file.format == "PNG":
        file.load()     # its entry may be behind the pixels
    turn = orientation(file)
    if upright:
        ImageOps.exif_transpose(file, in_place=True)
    elif turn > 1 and file.format == "TIFF":        # which PIL turns by itself
        file = file.transpose(TURN_BACK[turn])
    shift = bits_to_drop(file)
    if factor == 1:
        return to_rgb(file, shift), turn > 1
    # In strips: a copy of the whole image in RGB takes more memory than many files.
    step = 32 * factor
    strips = [file.crop((0, top, file.width, min(top + step, file.height)))
              for top in range(0, file.height, step)]
    return np.concatenate([np.array(Image.fromarray(to_rgb(strip, shift)).reduce(factor))
                           for strip in strips]), turn > 1


def reduction(file: Image.Image, most: int | None) -> int:
    """The least factor by which both sides are divided to have at most `most` pixels."""
    return math.ceil((file.width * file.height / most) ** 0.5) if most else 1


def bits_to_drop(file: Image.Image) -> int:
    """By how many bits values are scaled to have 8; ValueError for those beyond 16."""
    if not file.mode.startswith("I"):
        return 0
    values = np.array(file)     # PIL's own extrema know no big-endian files
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"it has values from {values.min()} to {values.max()}, beyond 16 bits")
    return 8 if values.max() > 255 else 0


def to_rgb(file: Image.Image, shift: int) -> np.ndarray:
    """RGB, uint8 (H, W, 3). shift: bits by which values of 16 bits are scaled."""
    if file.mode.startswith("I"):       # PIL would clip them
        file = Image.fromarray((np.array(file) >> shift).astype(np.uint8))
    # A needless copy would cost a tenth of the time.
    return np.array(file if file.mode == "RGB" else file.convert("RGB"))


# --------------------------------------------------------------------------------------- lists

def list_images(images: str | Path, root: str | Path | None = None, outside: bool = False
                ) -> tuple[list[str], Counter[str]]:
    """The sorted image files below a folder, or those that a COCO-style json names; and how many
    image files are left out, by suffix or by ending of our own.

    root: folder of the json's images, by default the json's own. outside: a json may name images
    that are not below it.
    Raises UserError that says where it looked if there are none.
    """
    images = find(images)
    if images.suffix == ".json":
        paths, others = images_of_json(images, find(root or images.parent), outside), Counter()
    else:
        paths, others = walk_images(images)
    if not paths:
        state = "holds no image" if images.exists() else "does not exist"
        state += f" but {counted(others)}, which are not read" if others else ""
        if images.is_dir() and any(images.glob("*.tar")):
            raise UserError(f"{images.absolute()} {state}; for its shards, set IMAGES to "
                            f"{images}/*.tar.")
        if images.parts[:2] == ("data", "toy"):
            raise UserError(f"{images.absolute()} {state}; draw the toy scenes by python -m "
                            "toy.world first.")
        raise UserError(f"{images.absolute()} {state}; put images there (any folder of "
                        f"{', '.join(IMAGE_SUFFIXES)} files, or a COCO-style json) or set IMAGES "
                        "to where they are.")
    return paths, others


def images_of_json(path: Path, root: Path, outside: bool) -> list[str]:
    """The files that a COCO-style json names, below `root` unless they may be `outside`."""
    names = [image["file_name"] for image in read_coco(path, ()).images]
    paths = [str(root / name) for name in names] if outside else files_below(
        path, root, names, "IMAGE_ROOT", ", or OUTSIDE_ROOT if you trust the json")
    if paths and not Path(paths[0]).is_file():
        raise UserError(f"{path} names {paths[0]}, which is not there; set IMAGE_ROOT to the "
                        "folder of its images.")
    return paths


def own_ending(name: str) -> str:
    """Of a file's name without folders, the ending by which it is our tools'; "" for others."""
    return next((ending for ending in OWN_ENDINGS if f"/{name}".endswith(ending)), "")


def counted(others: Counter[str]) -> str:
    """Numbers of files by suffix, for a sentence."""
    return ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common())


def walk_images(folder: Path) -> tuple[list[str], Counter[str]]:
    """The sorted image files below a folder except hidden ones, and the numbers of image files left
    out by suffix, or by ending of our own. Follows links, enters each folder once."""
    paths, others, entered = [], Counter(), set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(place))
        for name in names:
            suffix, own = os.path.splitext(name)[1].lower(), own_ending(name)
            if name.startswith("."):
                continue
            if own or suffix in OTHER_SUFFIXES:
                others[own or suffix] += 1
            elif suffix in IMAGE_SUFFIXES:
                paths.append(os.path.join(place, name))
    return sorted(paths), others
