"""Images to train with: read one by one in workers, and left out where they can't be read."""

import io
import os
import signal
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from util import UserError
from util.distributed import Ranks
from util.images import (
    IMAGE_SUFFIXES,
    OTHER_SUFFIXES,
    counted,
    list_images,
    open_image,
    own_ending,
    read_image,
    unreadable,
)
from util.order import WindowOrder, epoch_order
from util.shards import ShardChanged, Shards, expand, is_remote


class Sample(NamedTuple):
    """What one training image gives."""
    data: Tensor | tuple    # uint8 (3, H, W), or a named tuple of it and its labels
    index: int              # of the image asked for
    skipped: list[tuple[str, str]]      # files that could not be read in its place, and why


class Batch(NamedTuple):
    """A micro batch of a rank: the samples' fields, a list of each. Images keep their sizes."""
    data: list
    indices: list[int]
    skipped: list[list[tuple[str, str]]]


def collate(samples: list[Sample]) -> Batch:
    """Samples -> a batch."""
    return Batch(*map(list, zip(*samples)))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Within it, a TimeoutError is raised after so many seconds, also out of a read that blocks."""
    def expire(*_: object) -> None:
        raise TimeoutError(f"it was not read within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class TrainingData(Dataset):
    """Images to train with. Item i is that of image i or, if it can't be read, of the next one.

    paths: the image files. read_timeout: seconds after which one counts as unreadable. A subclass
    says what `read` returns: a tensor or a named tuple of tensors, for the device; and `sources`,
    the files that say what is on the images.
    """

    sources: Sequence[str | Path] = ()
    TRIES = 100         # files in a row that may be unreadable

    def __init__(self, paths: Sequence[str], read_timeout: float = 60.0):
        self.paths, self.read_timeout = paths, read_timeout

    def read(self, index: int) -> Tensor | tuple:
        """What image `index` gives. Raises UserError if it can't be read."""
        raise NotImplementedError

    def order(self, batch_size: int, epoch: int, seed: int) -> Sequence:
        """The image indices of every step of an epoch, (steps, batch_size); see epoch_order."""
        return epoch_order(len(self), batch_size, epoch, seed)

    @cached_property
    def fingerprint(self) -> str:
        """The same for two lists of the same images in the same order, wherever they lie."""
        paths = [os.path.abspath(path) for path in self.paths]      # a json may mix both kinds
        root = os.path.commonpath(paths)
        names = "\n".join(os.path.relpath(path, root) for path in paths)
        return f"{len(self)} images, {zlib.crc32(os.fsencode(names)):08x}"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        skipped = []
        for place in range(index, index + min(self.TRIES, len(self))):
            try:
                with time_limit(self.read_timeout):
                    return Sample(self.read(place % len(self)), index, skipped)
            except ShardChanged:
                raise
            except UserError as error:
                skipped.append((self.paths[place % len(self)], str(error)))
        raise UserError(f"{len(skipped)} files in a row can't be read; the last "
                        f"reason: {skipped[-1][1]}")


class ImageFiles(TrainingData):
    """Unlabelled images, uint8 (3, H, W), of a folder or a json (util.images.list_images).

    most_pixels: of an image; a larger one is reduced.
    """

    def __init__(self, images: str | Path, root: str | Path | None = None, outside: bool = False,
                 read_timeout: float = 60.0, most_pixels: int | None = None):
        paths, self.others = list_images(images, root, outside)
        super().__init__(paths, read_timeout)
        self.most_pixels = most_pixels

    def read(self, index: int) -> Tensor:
        return read_image(self.paths[index], True, self.most_pixels)


class ImageShards(TrainingData):
    """As ImageFiles, of the images in tar shards. Members of other kinds are left out.

    pattern: the shards, as util.shards.expand takes it. ranks: those that share the work if the
    shards have no index yet.
    """

    def __init__(self, pattern: str, read_timeout: float = 60.0, most_pixels: int | None = None,
                 ranks: Ranks | None = None):
        shards = Shards(expand(pattern), IMAGE_SUFFIXES, ranks=ranks)
        super().__init__(shards, read_timeout)
        self.most_pixels, self.fingerprint = most_pixels, shards.fingerprint
        self.others = Counter({suffix: count for suffix, count in shards.ignored.items()
                               if suffix in OTHER_SUFFIXES or own_ending(suffix)})

    def order(self, batch_size: int, epoch: int, seed: int) -> WindowOrder:
        return WindowOrder(self.paths.counts, batch_size, epoch, seed)

    def read(self, index: int) -> Tensor:
        try:
            return open_image(io.BytesIO(self.paths.read(index)), True, self.most_pixels)
        except Exception:       # its name takes a look into the shard, so it is not found before
            with unreadable(self.paths[index], "an image"):
                raise


def find_images(images: str, root: str | None, outside: bool, read_timeout: float,
                most_pixels: int | None, ranks: Ranks) -> ImageFiles | ImageShards:
    """The unlabelled images that `images` names: of shards, or of a folder or a json.

    Says how many image files are left out because of their format or name.
    """
    if images.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UserError(f"{images} is compressed, so no image in it can be found by its place; "
                        "unpack it to a .tar.")
    if images.endswith(".tar") or is_remote(images):
        found = ImageShards(images, read_timeout, most_pixels, ranks)
    else:
        found = ImageFiles(images, root, outside, read_timeout, most_pixels)
    if found.others and ranks.is_main:
        print(f"left out: {counted(found.others)}; only {' '.join(IMAGE_SUFFIXES)} are read, and "
              "nothing that our tools drew")
    return found
