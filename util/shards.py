"""Files in tar shards: an index of each, made once, and members read by their place.

The index of `00000.tar` is `00000.tar.index` beside it or, where that folder can't be written, a
file of a cache. It has a line of json on the shard (its size, its stamp, what was left out) and 16
bytes for each file: where its headers begin, how many there are, its size, and their checksum. A
name is read from the shard itself when somebody asks for it.

A path with `://` is an object store's, for fsspec and the library of that store.
"""

import glob
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from util import UserError
from util.distributed import Ranks
from util.files import atomic_write
from util.images import own_ending
from util.order import RUN

CACHE = "out/cache/index"       # folder of the indices that can't lie beside their shards
VERSION = 2                     # of an index; one of another version is made again
BLOCK = 512                     # bytes; a tar's headers and files begin at multiples
ENTRY = np.dtype([("block", "<u4"), ("headers", "<u4"), ("size", "<u4"), ("check", "<u4")])
OPEN_SHARDS = 64                # kept open by a process


class ShardChanged(UserError):
    """A shard is not the one that was indexed; other images would be read than were asked for."""


# ------------------------------------------------------------------------------ paths and files

def is_remote(path: str | Path) -> bool:
    """Whether a path is an object store's."""
    return "://" in str(path)


def expand(pattern: str) -> list[str]:
    """The files of a pattern with {00..99}, {a,b}, *, ? and [..], in the order of their names.

    A pattern without braces may match any number of files; each pattern that braces make, one or
    more. Raises UserError otherwise.
    """
    found = []
    for shard in expand_braces(pattern):
        if is_remote(shard):
            fs, path = file_system(shard)
            matches = [fs.unstrip_protocol(match) for match in sorted(fs.glob(path))]
        else:
            matches = sorted(glob.glob(shard)) if glob.has_magic(shard) else [shard]
            matches = [match for match in matches if os.path.isfile(match)]
        if not matches:
            raise UserError(f"There is no file {shard}; correct the pattern {pattern}, or put the "
                            "shard there.")
        found += matches
    return list(dict.fromkeys(found))


def expand_braces(pattern: str) -> Iterator[str]:
    """a{08..10}.tar -> a08.tar, a09.tar, a10.tar; {x,y} -> x, y."""
    parts = re.split(r"(\{[^{}]*\})", pattern)
    choices = [brace_choices(part) if part.startswith("{") else [part] for part in parts]
    return map("".join, itertools.product(*choices))


def brace_choices(brace: str) -> Sequence[str]:
    """What a brace stands for. UserError if it is neither a range nor a list."""
    ends = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", brace)
    if ends and int(ends[1]) <= int(ends[2]):
        return [f"{number:0{len(ends[1])}}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    if "," in brace and ".." not in brace:
        return brace[1:-1].split(",")
    raise UserError(f"{brace} is no range of numbers that grow, such as {{000..123}}, and no list, "
                    "such as {a,b}; correct the pattern.")


def file_system(path: str) -> tuple[object, str]:
    """The fsspec file system of a remote path, and the path in it. UserError if it has none."""
    try:
        import fsspec
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path} can't be opened ({error}); install fsspec and its library for "
                        "this kind of store, such as s3fs.") from None


class LocalFile:
    """A file of a disk or a mount, of which ranges are read."""

    def __init__(self, path: str):
        self.name, self.handle = path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.handle)

    def stamp(self) -> tuple[int, str]:
        """Its size, and what changes when it is written to."""
        stat = os.fstat(self.handle)
        return stat.st_size, str(stat.st_mtime_ns)

    def read(self, offset: int, size: int) -> bytes:
        # One call reads at most 2**31 bytes less a page.
        parts = []
        while size and (part := os.pread(self.handle, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return b"".join(parts)

    def expect(self, offset: int, size: int) -> None:
        """Says that a range will be read soon, so that it is fetched at once."""
        os.posix_fadvise(self.handle, offset, size, os.POSIX_FADV_WILLNEED)

    def stream(self) -> BinaryIO:
        return open(self.name, "rb")


class RemoteFile:
    """An object of a store, as a LocalFile; a range is one request."""

    def __init__(self, path: str):
        self.name, (self.fs, self.path) = path, file_system(path)

    def stamp(self) -> tuple[int, str]:
        about = self.fs.info(self.path)
        kinds = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
        return about["size"], str(next((about[kind] for kind in kinds if about.get(kind)), ""))

    def read(self, offset: int, size: int) -> bytes:
        return self.fs.cat_file(self.path, start=offset, end=offset + size)

    def expect(self, offset: int, size: int) -> None:
        pass

    def stream(self) -> BinaryIO:
        return self.fs.open(self.path, "rb")


def open_file(path: str) -> LocalFile | RemoteFile:
    """Opens a shard for reading ranges."""
    return RemoteFile(path) if is_remote(path) else LocalFile(path)


# ------------------------------------------------------------------------------------- an index

class Index(NamedTuple):
    """What an index says of its shard."""
    count: int                  # files
    ignored: dict[str, int]     # members that are left out, by suffix or kind
    check: int                  # checksum of all headers
    path: str                   # where its entries are,
    offset: int                 # from this byte on
    stamp: tuple[int, str]      # the shard's when it was indexed

    def entries(self) -> np.ndarray:
        """ENTRY of each file, mapped into memory."""
        return np.memmap(self.path, ENTRY, "r", self.offset, (self.count,)) if self.count else (
            np.empty(0, ENTRY))


def members(file: BinaryIO, path: str) -> Iterator[tarfile.TarInfo]:
    """The members of an opened tar. UserError if it is damaged, cut off, or no tar."""
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            while member := tar.next():
                tar.members.clear()         # or it would keep all of them
                if member.size < 0:         # the next header would be one of before
                    raise tarfile.TarError("a size below 0")
                yield member
            offset = tar.offset
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{path} can't be read as a tar without compression ({error}); make or "
                        "download it again.") from None
    # tarfile takes a damaged header for the end, and so would lose what follows.
    file.seek(offset)
    if file.read(BLOCK) != bytes(BLOCK):
        raise UserError(f"{path} is damaged or cut off at byte {offset:,}; make or download it "
                        "again.")
    while rest := file.read(2**20):
        if rest.strip(b"\0"):
            raise UserError(f"{path} goes on behind the end of its tar, at byte {offset:,}, as a "
                            "second tar would; divide it, or make it again.")


def kind_of(member: tarfile.TarInfo, suffixes: Sequence[str]) -> str | None:
    """Why a member is left out: its suffix or kind; None for a file of one of `suffixes`."""
    name = os.path.basename(member.name)
    suffix = os.path.splitext(name)[1].lower()
    if not member.isreg() or member.sparse is not None:
        return "folders, links and such"
    if name.startswith("."):
        return "hidden"
    if suffix not in suffixes or own_ending(name):
        return own_ending(name) or suffix or "no suffix"
    return None if member.size < 2**32 else "too large"


def scan(file: BinaryIO, path: str, suffixes: Sequence[str]) -> tuple[np.ndarray, Counter[str]]:
    """ENTRY of each file of an opened tar that has one of the suffixes; what is left out.

    As when a tar is unpacked, of several members with one name the last counts.
    """
    entries, names, ignored = bytearray(), bytearray(), Counter()
    for member in members(file, path):
        kind = kind_of(member, suffixes)
        if kind:
            ignored[kind] += 1
            continue
        file.seek(member.offset)
        headers = file.read(member.offset_data - member.offset)
        place = (member.offset // BLOCK, len(headers) // BLOCK, member.size, zlib.crc32(headers))
        entries += np.array([place], "<u4").tobytes()
        names += hashlib.blake2b(os.fsencode(os.path.normpath(member.name)), digest_size=8).digest()
    entries = np.frombuffer(entries, ENTRY)
    _, last = np.unique(np.frombuffer(names, "<u8")[::-1], return_index=True)
    if len(last) < len(entries):
        ignored["replaced by a later member of the same name"] = len(entries) - len(last)
    return entries[np.sort(len(entries) - 1 - last)], ignored


def index_paths(shard: str, cache: str) -> list[Path]:
    """Where the index of a shard may be: beside it, and in the cache."""
    name = os.path.basename(shard)
    place = shard if is_remote(shard) else os.path.abspath(shard)
    cached = Path(cache) / f"{name}.{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.index"
    return [cached] if is_remote(shard) else [Path(f"{shard}.index"), cached]


def make_index(shard: str, suffixes: Sequence[str], cache: str) -> Index:
    """Reads the headers of a shard and writes its index, whole or not at all.

    Raises UserError if the shard is no whole tar, OSError if the index can be written nowhere.
    """
    file = open_file(shard)
    size, stamp = file.stamp()
    if size >= 2**32 * BLOCK:
        raise UserError(f"{shard} has {size:,} bytes, and at most 2 TB can be indexed; divide it.")
    with file.stream() as stream:
        entries, ignored = scan(stream, shard, suffixes)
    about = {"version": VERSION, "suffixes": list(suffixes), "count": len(entries),
             "ignored": ignored, "check": zlib.crc32(entries["check"].tobytes()),
             "stamp": [size, stamp]}
    content = json.dumps(about).encode() + b"\n" + entries.tobytes()
    paths = index_paths(shard, cache)
    for path in paths:
        try:
            atomic_write(path, lambda temporary: Path(temporary).write_bytes(content))
            return read_index(path, suffixes)
        except OSError:         # a folder that can't be written
            if path == paths[-1]:
                raise


def read_index(path: Path, suffixes: Sequence[str]) -> Index | None:
    """What an index says; None if there is none, or one that is damaged or of other suffixes."""
    try:
        with open(path, "rb") as file:
            line = file.readline(2**16)
            size = os.fstat(file.fileno()).st_size
        about = json.loads(line)
        if about["version"] != VERSION or about["suffixes"] != list(suffixes) or (
                size != len(line) + about["count"] * ENTRY.itemsize):
            return None
        return Index(about["count"], about["ignored"], about["check"], str(path), len(line),
                     tuple(about["stamp"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_index(shard: LocalFile | RemoteFile, suffixes: Sequence[str], cache: str
               ) -> Index | None:
    """The index of an opened shard, None if it has none. ShardChanged if the shard is another
    now."""
    found = [read_index(path, suffixes) for path in index_paths(shard.name, cache)]
    found, stamp = [index for index in found if index], shard.stamp()
    index = next((index for index in found if index.stamp == stamp), None)
    if found and not index:
        size, tag = found[0].stamp
        raise ShardChanged(f"{shard.name} has changed since it was indexed (it had {size:,} bytes, "
                           f"now {stamp[0]:,}, and its time or tag is "
                           f"{'the same' if stamp[1] == tag else 'another'}); if it should have, "
                           "index it again by python -m tools.index.")
    return index


# ----------------------------------------------------------------------------- many of them

def index_all(shards: Sequence[str], suffixes: Sequence[str], cache: str = CACHE,
              ranks: Ranks | None = None, renew: bool = False) -> list[Index]:
    """The index of each shard; those that are missing are made, by all cores and ranks together.

    renew: shards that have changed are indexed again instead of refused.
    Raises UserError that names the first shard that can't be indexed, and how many there are.
    """
    find = partial(index_or_error, suffixes=suffixes, cache=cache, renew=renew)
    with ThreadPoolExecutor(32) as pool:        # a mount answers slowly
        found = dict(zip(shards, pool.map(find, shards)))
    missing = [shard for shard, index in found.items() if index is None]
    if ranks:       # each begins at a place of its own, and takes what others have made meanwhile
        begin = len(missing) * ranks.rank // ranks.world_size
        missing = missing[begin:] + missing[:begin]
    make = partial(index_or_error, suffixes=suffixes, cache=cache, renew=True, make=True)
    count = min(len(missing), (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ProcessPoolExecutor(count) if count > 1 else nullcontext() as pool:
        made = tqdm((pool.map if pool else map)(make, missing), "index", len(missing),
                    unit="shard", disable=not missing or bool(ranks and not ranks.is_main))
        try:
            found |= dict(zip(missing, made))
        except BrokenProcessPool:
            raise UserError(f"A process that indexed {len(missing)} shards, such as {missing[0]}, "
                            "has died, mostly because memory ran out; free some and start again: "
                            "what is indexed is kept.") from None
    failed = [index for index in found.values() if isinstance(index, UserError)]
    if failed:
        more = f" ({len(failed) - 1} more of {len(shards)} shards can't be indexed)"
        raise type(failed[0])(f"{failed[0]}{more if len(failed) > 1 else ''}")
    return list(found.values())


def index_or_error(shard: str, suffixes: Sequence[str], cache: str, renew: bool,
                   make: bool = False) -> Index | UserError | None:
    """find_index, with an error as its result. renew: none for a shard that has changed. make: a
    new one instead of none; another process may have made it meanwhile."""
    try:
        found = find_index(open_file(shard), suffixes, cache)
    except OSError as error:
        return UserError(f"{shard} can't be read ({error}); make it readable, or leave it out.")
    except UserError as error:
        if not (renew and isinstance(error, ShardChanged)):
            return error
        found = None
    try:
        return found or (make_index(shard, suffixes, cache) if make else None)
    except OSError as error:
        return UserError(f"The index of {shard} can't be made ({error}); make room, or make "
                         f"{cache} a folder that can be written.")
    except UserError as error:
        return error


class Shards(Sequence[str]):
    """The files of all shards: their names, `shards/00012.tar/000120042.jpg`, and their contents.

    paths: of the shards. suffixes: of the files that count. What it keeps grows with the number of
    shards, not with that of the files.
    Raises UserError for shards that can't be indexed or have changed since, or that hold no file.
    """

    def __init__(self, paths: Sequence[str], suffixes: Sequence[str], cache: str = CACHE,
                 ranks: Ranks | None = None):
        self.paths, self.suffixes, self.cache = paths, tuple(suffixes), cache
        indices = index_all(paths, suffixes, cache, ranks)
        self.counts = np.array([index.count for index in indices])
        self.starts = np.concatenate([[0], self.counts.cumsum()])
        self.ignored = sum((Counter(index.ignored) for index in indices), Counter())
        checks = np.array([[index.count, index.check] for index in indices])
        self.fingerprint = f"{len(self)} images, {zlib.crc32(checks.tobytes()):08x}"
        self.last: tuple[int, bytes] = (-1, b"")        # the file that was read last, its headers
        if not len(self):
            raise UserError(f"None of {len(paths)} shards, such as {paths[0]}, holds a file of "
                            f"{', '.join(suffixes)}; choose others.")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> str:
        """The name of a file. If it was the last to be read, nothing is read for it."""
        if not 0 <= index < len(self):
            raise IndexError(f"file {index} of {len(self)}")
        number, place = self.place(index)
        last, headers = self.last
        if last != index:
            headers, _ = self.open(number).read(place)
        return f"{self.paths[number]}/{name_in(headers) if headers else f'file {place}'}"

    def read(self, index: int) -> bytes:
        """What a file holds. ShardChanged if its headers are not those that were indexed."""
        self.last = index, b""      # after a read that fails, its name must not need another
        number, place = self.place(index)
        shard = self.open(number)
        shard.expect(place)
        headers, content = shard.read(place)
        self.last = index, headers
        return content

    def place(self, index: int) -> tuple[int, int]:
        """The shard of a file, and which of its files it is."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, index - int(self.starts[number])

    def open(self, number: int) -> "OpenShard":
        return open_shard(self.paths[number], self.suffixes, self.cache, os.getpid())


class OpenShard:
    """A shard and its index. ShardChanged if they do not belong together."""

    def __init__(self, path: str, suffixes: Sequence[str], cache: str):
        self.file = open_file(path)
        index = find_index(self.file, suffixes, cache)
        if index is None:
            raise UserError(f"The index of {path} is gone; start again, and it will be made.")
        self.entries = index.entries()

    def read(self, place: int) -> tuple[bytes, bytes]:
        """The headers and the content of a file, by one read."""
        block, headers, size, check = self.entries[place].item()
        headers *= BLOCK
        found = self.file.read(block * BLOCK, headers + size)
        is_whole = headers > 0 and len(found) == headers + size
        if not is_whole or zlib.crc32(found[:headers]) != check:
            raise ShardChanged(f"{self.file.name} has changed at byte {block * BLOCK:,} since it "
                               "was indexed; if it should have, index it again by python -m "
                               "tools.index.")
        return found[:headers], found[headers:]

    def expect(self, place: int) -> None:
        """Says that a file and its neighbours in util.order's run will be read soon."""
        run = self.entries[place // RUN * RUN:][:RUN]
        (begin, *_), (end, headers, size, _) = run[0].item(), run[-1].item()
        self.file.expect(begin * BLOCK, (end - begin + headers) * BLOCK + size)


@lru_cache(OPEN_SHARDS)
def open_shard(path: str, suffixes: Sequence[str], cache: str, pid: int) -> OpenShard:
    """An OpenShard of the process `pid`: connections to a store do not survive a fork."""
    return OpenShard(path, suffixes, cache)


def name_in(headers: bytes) -> str:
    """The name that the headers of a member give it."""
    with tarfile.open(fileobj=io.BytesIO(headers), mode="r:", errors="surrogateescape") as tar:
        return tar.next().name
