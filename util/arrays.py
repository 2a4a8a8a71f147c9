"""Arrays of many images as files, with a json beside each that says what is in it.

    {"checksum": "0123abcd", ..., "images": [{"name": "a", "file": "a.png", "bytes": 1234, ...}],
     "left_out": []}

An array is written once: what is there whole is left, what has other settings or images is refused.
"""

import io
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from util import UserError, printable
from util.distributed import Ranks, gather
from util.files import atomic_write, is_list, read_json, write_json
from util.images import read_image

SUFFIXES = (".npy", ".safetensors")
# Of an image: no two have one name; the length of its file, and the checksum of its ends.
IDENTITY = ("name", "file", "bytes", "crc")
Plan = dict[Path, list[dict]]               # arrays, and the identities of the images in each


class ImageFiles(Dataset):
    """Images uint8 (3, H, W), upright, with their paths; for those that can't be read, the
    UserError."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Path, Tensor | UserError]:
        try:
            return self.paths[index], read_image(self.paths[index], upright=True)
        except UserError as error:
            return self.paths[index], error


def crc_of(path: Path, most: int = 2**16) -> int:
    """CRC-32 of a file's first and last `most` bytes, which tells it from others; 0 of none."""
    try:
        with open(path, "rb") as file:
            first = file.read(most)
            file.seek(max(len(first), os.fstat(file.fileno()).st_size - most))
            return zlib.crc32(file.read(), zlib.crc32(first))
    except OSError:
        return 0


def find_missing(plan: Plan, about: dict, folder: Path, ranks: Ranks) -> list[Path]:
    """The arrays that are not there whole, the same on all ranks, which look at a share each.

    about: what a json must say beside its images. Raises UserError, on all ranks and before
    anything is written, if an array in the folder is of other settings or images.
    """
    missing, wrong = [], None
    others = sorted({path for path in folder.rglob("*") if path.suffix in SUFFIXES} - plan.keys())
    try:
        for array in [*plan, *others][ranks.rank::ranks.world_size]:
            if not is_whole(array, plan.get(array), about):
                missing.append(array)
    except UserError as error:
        wrong = str(error)
    found = gather((missing, wrong))
    for _, sentence in found:
        if sentence:
            raise UserError(sentence)
    anywhere = {array for of_rank, _ in found for array in of_rank}
    return [array for array in plan if array in anywhere]


def is_whole(array: Path, wanted: Sequence[dict] | None, about: dict) -> bool:
    """Whether an array is there with all images that are wanted, None for any, but those that
    failed and are the same files still.

    Raises UserError if it is of other settings or images, or, where it is wanted, of other origin.
    """
    is_there, beside = array.exists(), array.with_suffix(".json")
    record = read_record(beside, about)
    if not record:
        if wanted is not None and (is_there or beside.exists()):
            raise UserError(f"{array}, or the json beside it, is there and not of this tool; "
                            "choose another OUT.")
        return False
    other = next((name for name in about if record.get(name) != about[name]), None)
    if other:
        raise UserError(f"{array} was made with {other} {record.get(other)}, and now {other} is "
                        f"{about[other]}; choose another OUT, or the settings that its json has.")
    has = [{key: image[key] for key in IDENTITY} for image in record["images"]]
    stranger = next((image for image in has if wanted is not None and image not in wanted), None)
    if stranger:
        raise UserError(f"{array} is of another image, {stranger['file']} of {stranger['bytes']} "
                        "bytes, than it would be now; choose another OUT, or remove it.")
    lacks = [image for image in wanted or () if image not in has]
    if is_there and lacks and all(image in record["left_out"] for image in lacks):
        tqdm.write(f"{array} lacks what failed before, such as {printable(lacks[0]['file'])} "
                   f"({len(lacks)} in all); replace that file, or remove the array to try again")
        return True
    return is_there and not lacks


def read_record(path: Path, about: dict) -> dict:
    """What a json says that `write` has written; {} for others."""
    try:
        record = read_json(path, "images", "left_out", "checksum")
    except UserError:
        return {}
    fits = is_list(record["images"], lambda image: isinstance(image, dict)
                   and {*IDENTITY} <= image.keys())
    return record if fits and isinstance(record["left_out"], list) else {}


MAX_HALF = torch.finfo(torch.float16).max


def to_half(values: Tensor) -> tuple[np.ndarray, int]:
    """Values as float16, and how many were beyond its range and are at its end now.

    Raises UserError for infinity and nan, which fp16's models and damaged weights give.
    """
    if not values.isfinite().all():
        raise UserError("values are not finite; try another PRECISION, or other weights")
    beyond = int((values.abs() > MAX_HALF).sum())
    if beyond:
        tqdm.write(f"{beyond} values are beyond float16 and set to its ±{MAX_HALF:.0f}; the json "
                   "counts them as clamped")
    half = values.clamp(-MAX_HALF, MAX_HALF).half()
    return half.contiguous().cpu().numpy(), beyond      # safetensors writes no other order


def write(array: Path, values: dict[str, np.ndarray], record: dict) -> None:
    """Writes the json, then the array, one of a .npy or, by name, those of a .safetensors.

    So an array that is there has its json. Raises OSError if the disk is full.
    """
    if array.suffix == ".npy":
        memory, (only,) = io.BytesIO(), values.values()
        np.save(memory, only, allow_pickle=False)
        content = memory.getbuffer()
    else:
        content = safetensors.numpy.save(values)
    array.unlink(missing_ok=True)       # a shard that lacked images
    write_json(array.with_suffix(".json"), record)
    # Of a full disk numpy's and safetensors' own files raise errors that don't say so.
    atomic_write(array, lambda file: Path(file).write_bytes(content))
