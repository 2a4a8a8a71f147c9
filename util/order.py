"""The order of an epoch of images, and each rank's share of it.

That of shards is computed where it is looked at, never stored. Images lie in shards, one after the
other, and neighbours are cheap to read together. So an order is made of three shuffles, each of
what the one before leaves together:

    parts       at most 4096 images of a shard: all parts of all shards are shuffled,
    runs        of 8 neighbouring images: those of a window, 16 parts, are shuffled,
    images      those of a pool, 256 runs, are shuffled.

At any time the reader is in one pool, 2048 images from 16 places of the data set, and reads each
of its runs at once. What is in memory is a row for each part, each run of a window and each image
of a pool.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from util.distributed import Ranks

RUN = 8                 # neighbouring images that are read together
PART = 512 * RUN        # images of a shard that are shuffled among each other
WINDOW = 16             # parts
POOL = 256              # runs


def shuffle(spans: np.ndarray, key: str) -> np.ndarray:
    """The rows of `spans` in an order that depends on `key` and their number alone."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    return spans[torch.randperm(len(spans), generator=torch.Generator().manual_seed(seed)).numpy()]


def cut(spans: np.ndarray, length: int) -> np.ndarray:
    """Spans (n, 2) of images, from first to end, cut into such of at most `length` images."""
    pieces = -(-(spans[:, 1] - spans[:, 0]) // length)
    number = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)
    first = np.repeat(spans[:, 0], pieces) + number * length
    return np.stack([first, np.minimum(first + length, np.repeat(spans[:, 1], pieces))], axis=1)


def group_starts(spans: np.ndarray, size: int) -> np.ndarray:
    """Images before each group of `size` spans, and at last of all: (groups + 1,)."""
    before = np.concatenate([[0], (spans[:, 1] - spans[:, 0]).cumsum()])
    return np.append(before[:-1:size], before[-1])


class WindowOrder:
    """The image indices of every step of an epoch, order[step] (batch_size,), shuffled by windows.

    counts: the images of each shard; image indices count through all shards. The incomplete last
    batch is left out. The order depends on the arguments only. A step's indices are sorted, so
    that ranks that divide them read different runs.
    """

    def __init__(self, counts: np.ndarray, batch_size: int, epoch: int, seed: int):
        ends = np.cumsum(counts, dtype=np.int64)
        self.images, self.batch_size = int(ends[-1]), batch_size
        self.key = f"{seed}-{epoch}"
        self.parts = shuffle(cut(np.stack([ends - counts, ends], axis=1), PART), self.key)
        self.starts = group_starts(self.parts, WINDOW)      # of windows
        # Steps come one after the other, so the present window and pool are kept.
        self.runs, self.pool = lru_cache(2)(self.shuffled_runs), lru_cache(2)(self.shuffled_pool)

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __getitem__(self, step: int) -> np.ndarray:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        place, end, found = step * self.batch_size, (step + 1) * self.batch_size, []
        while place < end:
            first, images = self.pool_at(place)
            found.append(images[place - first:end - first])
            place = first + len(images)
        return np.sort(np.concatenate(found))

    def pool_at(self, place: int) -> tuple[int, np.ndarray]:
        """The pool that has the image at a place of the epoch: its first place, its images."""
        window = int(np.searchsorted(self.starts, place, side="right")) - 1
        _, starts = self.runs(window)
        number = int(np.searchsorted(starts, place - self.starts[window], side="right")) - 1
        return int(self.starts[window] + starts[number]), self.pool(window, number)

    def shuffled_runs(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The runs of a window (n, 2) in their order, and the places in it where pools begin."""
        parts = self.parts[window * WINDOW:(window + 1) * WINDOW]
        runs = shuffle(cut(parts, RUN), f"{self.key}-{window}")
        return runs, group_starts(runs, POOL)

    def shuffled_pool(self, window: int, number: int) -> np.ndarray:
        """The images of a pool in their order."""
        runs = self.runs(window)[0][number * POOL:(number + 1) * POOL]
        return shuffle(cut(runs, 1)[:, 0], f"{self.key}-{window}-{number}")


def epoch_order(images: int, batch_size: int, epoch: int, seed: int) -> Tensor:
    """The image indices of every step of an epoch, (steps, batch_size), shuffled.

    The incomplete last batch is left out. The order depends on the arguments only, so a run can
    resume in the middle of an epoch, on another number of GPUs too.
    """
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(images, generator=rng)
    return order[:images // batch_size * batch_size].view(-1, batch_size)


def rank_batches(order: Sequence, ranks: Ranks, micro_batch: int, first_step: int = 0
                 ) -> Iterator[list[int]]:
    """One rank's share of `order` (steps, batch_size) from a step on, in micro batches."""
    for step in range(first_step, len(order)):
        share = order[step].reshape(ranks.world_size, -1)[ranks.rank]
        yield from share.reshape(-1, micro_batch).tolist()
