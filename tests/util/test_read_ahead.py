"""util/shards.py and util/order.py together: what a disk is asked for, and how often one waits."""

import os
import re
import tarfile
import time
from pathlib import Path

import numpy as np

from util.samples import ImageShards

IMAGES, SIZE = 128, 170_000         # of a shard; bytes of each, as COCO's have


def from_disk() -> int:
    """The bytes that this process has had read from a disk."""
    return int(re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text())[1])


def test_a_run_is_fetched_before_its_images_are_asked_for(tmp_path):
    """Each byte comes from the disk about once, and of 8 neighbours the first one is waited for.

    A file system in memory, such as some machines' /tmp, gives 0 of both.
    """
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for index in range(IMAGES):
                file = tmp_path / "x"
                file.write_bytes(np.random.default_rng(index).bytes(SIZE))
                tar.add(file, f"{number}{index:06}.jpg")
                file.write_text("a caption")
                tar.add(file, f"{number}{index:06}.txt")
    dataset = ImageShards(f"{tmp_path}/*.tar")
    shards = dataset.paths
    order = [index for step in dataset.order(batch_size=16, epoch=0, seed=0) for index in step]
    os.sync()
    for path in shards.paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begin, waits = from_disk(), 0
    for index in order:
        number, place = shards.place(index)
        shard = shards.open(number)
        block, headers, size, _ = shard.entries[place].item()
        try:
            os.preadv(shard.file.handle, [bytearray(size)], (block + headers) * 512, os.RWF_NOWAIT)
        except BlockingIOError:
            waits += 1
        assert len(shards.read(index)) == SIZE
        time.sleep(1e-3)        # as when it is decoded
    read, waited = (from_disk() - begin) / (SIZE * len(order)), waits / len(order)
    print(f"{read:.3g} bytes from the disk for each byte used, {waited:.3g} waits for each image")
    assert read < 1.5 and waited <= 0.5
