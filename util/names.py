"""A sorted list of names in a file, for folders of so many files that no process should hold them.

Blocks of names are compressed one by one, so any name is found by reading one block; the file is
mapped into memory.
"""

import heapq
import itertools
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from util.files import atomic_write

IN_BLOCK = 256          # names that are compressed together
IN_CHUNK = 500_000      # names that are sorted in memory


class Names(Sequence[str]):
    """The names that `write_names` wrote to a file, each behind the prefix `folder`/.

    Raises ValueError or OSError if the file is not whole.
    """

    def __init__(self, path: str | Path, folder: str = ""):
        self.path, self.folder = str(path), folder
        self.file = np.memmap(path, np.uint8, "r")
        length = int(self.file[-8:].view("<u8")[0])
        about = json.loads(self.file[-8 - length:-8].tobytes())
        self.count, self.about, self.fingerprint = about["count"], about["about"], about["check"]
        blocks = -(-self.count // IN_BLOCK)
        end = len(self.file) - 8 - length
        self.ends = self.file[end - 8 * blocks:end].view("<u8")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self.count:
            raise IndexError(f"name {index} of {self.count}")
        name = os.fsdecode(block_of(self, index // IN_BLOCK)[index % IN_BLOCK])
        return os.path.join(self.folder, name) if self.folder else name


@lru_cache(2)
def block_of(names: Names, number: int) -> list[bytes]:
    """The names of a block."""
    begin = int(names.ends[number - 1]) if number else 0
    return zlib.decompress(names.file[begin:int(names.ends[number])]).split(b"\0")


def write_names(path: str | Path, names: Iterable[str], about: object = None) -> None:
    """Writes names in the order given, and what is to be known `about` them, as json takes it."""
    ends, count, check, remaining = [0], 0, 0, iter(names)
    with open(path, "wb") as file:
        while block := list(itertools.islice(remaining, IN_BLOCK)):
            text = b"\0".join(map(os.fsencode, block))
            ends.append(ends[-1] + file.write(zlib.compress(text)))
            count, check = count + len(block), zlib.crc32(text + b"\0", check)
        end = json.dumps({"count": count, "about": about,
                          "check": f"{count} images, {check:08x}"}).encode()
        file.write(np.array(ends[1:], "<u8").tobytes() + end)
        file.write(np.array([len(end)], "<u8").tobytes())


def write_sorted(path: str | Path, names: Iterable[str], about: object = None) -> None:
    """Sorts any number of names, a part in memory at a time, and writes them, whole or not at all.

    about: as for write_names; it is looked at when `names` have ended.
    """
    remaining = iter(names)
    with tempfile.TemporaryDirectory() as folder:
        chunks = []
        while chunk := sorted(itertools.islice(remaining, IN_CHUNK)):
            chunks.append(f"{folder}/{len(chunks)}")
            write_names(chunks[-1], chunk)
        del chunk
        atomic_write(path, lambda temporary: write_names(
            temporary, heapq.merge(*map(read_through, chunks)), about))


def read_through(path: str) -> Iterator[str]:
    """All names of a file, one after the other."""
    names = Names(path)
    for number in range(len(names.ends)):
        yield from map(os.fsdecode, block_of.__wrapped__(names, number))
