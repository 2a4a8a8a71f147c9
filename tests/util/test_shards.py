"""util/shards.py and the training images read from shards: whole tars of any kind, nothing else."""

import io
import os
import random
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from tools import index
from util import UserError, shards
from util.distributed import Ranks
from util.files import atomic_write
from util.images import list_images
from util.order import WindowOrder
from util.samples import ImageShards
from util.shards import ShardChanged, Shards, expand, make_index

SUFFIXES = (".jpg", ".png")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> str:
    """Indices that can't lie beside their shards do not outlive a test."""
    monkeypatch.chdir(tmp_path)
    return shards.CACHE


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, **how) -> Path:
    """A tar of files by name."""
    with tarfile.open(path, "w", format=form, **how) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def contents(path: Path) -> dict[str, bytes]:
    """What Shards makes of a tar."""
    found = Shards([str(path)], SUFFIXES)
    return {found[place][len(str(path)) + 1:]: found.read(place) for place in range(len(found))}


# ---------------------------------------------------------------------------------- kinds of tars

LONG = "folder/" * 30 + "x" * 120 + ".jpg"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_is_read(tmp_path, form):
    files = {"0.jpg": b"zero", "a/b.JPG": b"x" * 5000, "empty.png": b"", "\u00e4\u4e2d.png": b"utf"}
    if form != tarfile.USTAR_FORMAT:
        files |= {LONG: b"long", "last.jpg": b"1"}
    path = write_tar(tmp_path / "x.tar", files, form)
    assert contents(path) == files


def test_names_that_are_no_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    path = write_tar(tmp_path / "x.tar", {name: b"1"}, tarfile.GNU_FORMAT, errors="surrogateescape")
    assert contents(path) == {name: b"1"}


def test_what_is_no_image_is_left_out_and_counted(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"0", "0.json": b"{}", "0.txt": b"a cat",
                                          "1.gif": b"", "._0.jpg": b"", "README": b""})
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"{kind}.jpg")
            member.type = kind
            tar.addfile(member)
    found = Shards([str(path)], SUFFIXES)
    assert len(found) == 1 and found.ignored == Counter({
        ".json": 1, ".txt": 1, ".gif": 1, "hidden": 1, "no suffix": 1,
        "folders, links and such": 3})
    assert ImageShards(str(path)).others == {".gif": 1}


def test_of_two_members_of_a_name_the_last_counts(tmp_path):
    """As when it is unpacked."""
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"old", "1.jpg": b"1"})
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("./0.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"new"))
    assert contents(path) == {"1.jpg": b"1", "./0.jpg": b"new"}


def test_empty_shards_are_passed_over(tmp_path):
    paths = [str(write_tar(tmp_path / f"{number}.tar", {name: b"" for name in names}))
             for number, names in enumerate(([], ["a.jpg"], [], ["b.jpg", "c.jpg"], ["x.txt"]))]
    found = Shards(paths, SUFFIXES)
    assert [os.path.basename(found[place]) for place in range(len(found))] == ["a.jpg", "b.jpg",
                                                                               "c.jpg"]
    with pytest.raises(UserError, match="None of 1 shards, such as .*0.tar, holds"):
        Shards(paths[:1], SUFFIXES)


def test_damaged_tars_are_refused(tmp_path):
    """Cut off anywhere, or with a header that is none: tarfile alone would lose what follows."""
    good = write_tar(tmp_path / "x.tar", {f"{n}.jpg": bytes(700) for n in range(4)}).read_bytes()
    path, rng = tmp_path / "y.tar", random.Random(0)
    for end in (0, 100, 512, 600, 1536, 1600, 5000, *rng.sample(range(4 * 1536), 20)):
        path.write_bytes(good[:end])
        with pytest.raises(UserError, match="y.tar (can't be read as a tar|is damaged or cut off)"):
            make_index(str(path), SUFFIXES, "cache")
    for member in range(4):
        damaged = bytearray(good)
        damaged[member * 1536 + 150] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="y.tar (can't be read as a tar|is damaged or cut off)"):
            make_index(str(path), SUFFIXES, "cache")
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.jpg"))
    with pytest.raises(UserError, match="y.tar can't be read as a tar without compression"):
        make_index(str(path), SUFFIXES, "cache")


@pytest.mark.parametrize("rest", ["tar", "bytes", "zeros"])
def test_what_follows_a_tar_is_not_lost_in_silence(tmp_path, rest):
    """`cat a.tar b.tar` makes no tar of both; padding of any length is one."""
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"zero"})
    whole = path.read_bytes()
    path.write_bytes(whole + {"tar": whole, "bytes": b"more", "zeros": bytes(30_000)}[rest])
    if rest == "zeros":
        assert contents(path) == {"0.jpg": b"zero"}
    else:
        with pytest.raises(UserError, match=r"x.tar goes on behind the end of its tar, at byte \d"):
            contents(path)


# --------------------------------------------------------------------------------------- an index

def test_a_size_below_0_is_damage(tmp_path):
    """tarfile would read its headers again and again."""
    path = write_tar(tmp_path / "a.tar", {"0.jpg": b"zero", "1.jpg": b"one"})
    content = bytearray(path.read_bytes())
    content[1024 + 124:1024 + 136] = b"\xff" * 10 + b"\xf6\0"        # -2560
    content[1024 + 148:1024 + 156] = b" " * 8
    content[1024 + 148:1024 + 156] = b"%06o\0 " % sum(content[1024:1536])
    path.write_bytes(content)
    with pytest.raises(UserError, match="a size below 0|is damaged"):
        contents(path)


def test_an_indexer_that_is_killed_is_one_sentence(tmp_path, monkeypatch):
    own = os.getpid()
    paths = [str(write_tar(tmp_path / f"{name}.tar", {"0.jpg": b"zero"})) for name in "ab"]
    monkeypatch.setattr(shards, "make_index", lambda *_: os.getpid() != own and os._exit(9))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(UserError, match="A process that indexed 2 shards, such as .*a.tar, has"):
        Shards(paths, SUFFIXES)


def test_an_index_is_made_once(tmp_path, monkeypatch):
    """Beside its shard, or in the cache; a damaged one is made again."""
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"0"})
    before = contents(path)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "make_index", lambda *_: pytest.fail("it was made again"))
        assert contents(path) == before
    atomic_write(tmp_path / "x.tar.index", lambda file: Path(file).write_bytes(b"{}"))
    assert contents(path) == before and (tmp_path / "x.tar.index").stat().st_size > 100
    (tmp_path / "x.tar.index").unlink()
    with monkeypatch.context() as patch:
        cached = tmp_path / "cache/x.index"
        patch.setattr(shards, "index_paths", lambda *_: [Path("/proc/x.index"), cached])
        assert contents(path) == before and cached.exists()


def test_an_image_takes_16_bytes(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"{n}.jpg": b"" for n in range(1000)})
    Shards([str(path)], SUFFIXES)
    assert (tmp_path / "x.tar.index").stat().st_size < 1000 * 20


def test_a_shard_that_changed_is_refused(tmp_path, capsys):
    """By its time before training; by the headers, while it is read, if its time lies."""
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"0", "1.jpg": b"1"})
    found, stat = Shards([str(path)], SUFFIXES), path.stat()
    assert found.read(1) == b"1"
    write_tar(path, {"2.jpg": b"2", "3.jpg": b"3"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for _ in range(2):      # through the handle that is open, and through another
        with pytest.raises(ShardChanged, match="x.tar has changed at byte 1,024 since it was ind"):
            found.read(1)
        shards.open_shard.cache_clear()
    os.utime(path)
    with pytest.raises(UserError, match="x.tar has changed since it was indexed .it had 10,240 byt"
                                        ".* and its time or tag is another.*python -m tools.index"):
        Shards([str(path)], SUFFIXES)
    index.main([str(path)])
    assert "2 images in 1 shards; left out: nothing" in capsys.readouterr().out
    assert ImageShards(str(path)).paths[1].endswith("3.jpg")


def test_a_changed_shard_is_no_bad_file(tmp_path):
    """It ends the training; an image that can't be decoded is passed over."""
    path = write_tar(tmp_path / "x.tar", {"0.jpg": b"no image", "1.png": png(7)})
    dataset = ImageShards(str(path))
    image, _, ((name, reason),) = dataset[0]
    assert image.unique().tolist() == [7] and name.endswith("x.tar/0.jpg") and name in reason
    with open(path, "r+b") as file:
        file.seek(3)
        file.write(b"9")
    with pytest.raises(ShardChanged):
        dataset[0]


def test_all_shards_that_fail_are_counted(tmp_path, capsys):
    write_tar(tmp_path / "0.tar", {"0.jpg": b""})
    for number in range(1, 4):
        (tmp_path / f"{number}.tar").write_bytes(b"x" * 2000)
    with pytest.raises(SystemExit, match="1.tar can't be read as a tar .*2 more of 4 shards"):
        index.main([str(tmp_path / "{0..3}.tar")])


def test_ranks_that_index_together_find_the_same(tmp_path):
    paths = [str(write_tar(tmp_path / f"{n}.tar", {f"{n}.jpg": b"", "x.jpg": b"1"}))
             for n in range(5)]
    one = Shards(paths, SUFFIXES, ranks=Ranks(1, 2, torch.device("cpu")))
    other = Shards(paths, SUFFIXES, ranks=Ranks(0, 2, torch.device("cpu")))
    assert list(one) == list(other) and one.fingerprint == other.fingerprint
    moved = [shutil.copy2(path, tmp_path / f"moved{n}.tar") for n, path in enumerate(paths)]
    assert Shards(moved, SUFFIXES).fingerprint == one.fingerprint
    assert Shards(moved[::-1], SUFFIXES).fingerprint != one.fingerprint


# ------------------------------------------------------------------------------------- patterns

def test_patterns(tmp_path):
    for name in ("s08", "s09", "s10", "t-a", "t-b"):
        write_tar(tmp_path / f"{name}.tar", {})

    def names(pattern: str) -> list[str]:
        return [Path(path).stem for path in expand(str(tmp_path / pattern))]

    assert names("s{08..10}.tar") == ["s08", "s09", "s10"]
    assert names("t-{b,a}.tar") == ["t-b", "t-a"]
    assert names("*.tar") == ["s08", "s09", "s10", "t-a", "t-b"]
    assert names("{s,t}*.tar") == ["s08", "s09", "s10", "t-a", "t-b"]
    assert names("{s,s}08.tar") == ["s08"]      # once
    for pattern, sentence in {"s{08..11}.tar": "There is no file .*s11.tar; correct the pattern",
                              "s{10..08}.tar": "{10..08} is no range of numbers that grow",
                              "u*.tar": "There is no file .*u\\*.tar"}.items():
        with pytest.raises(UserError, match=sentence):
            names(pattern)


def test_a_folder_of_shards_says_how_to_name_them(tmp_path):
    write_tar(tmp_path / "0.tar", {"0.jpg": b""})
    with pytest.raises(UserError, match=r"for its shards, set IMAGES to .*/\*.tar"):
        list_images(tmp_path)


def test_an_object_store(tmp_path):
    """Through fsspec, here a store in memory; its index lies in the cache."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for number in range(2):
        files = {f"{number}.png": png(number), "x.txt": b""}
        store.pipe(f"/bucket/{number}.tar",
                   write_tar(tmp_path / "x.tar", files).read_bytes())
    for pattern in ("memory://bucket/{0..1}.tar", "memory://bucket/*.tar"):
        dataset = ImageShards(pattern)
        assert len(dataset) == 2 and int(dataset[1].data[0, 0, 0]) == 1
        assert dataset.paths[1].endswith("bucket/1.tar/1.png")
    store.pipe("/bucket/1.tar", b"x")
    with pytest.raises(UserError, match="1.tar has changed since it was indexed"):
        ImageShards("memory://bucket/{0..1}.tar")
    with pytest.raises(UserError, match="can't be opened .*install fsspec and its library"):
        ImageShards("nosuchstore://bucket/0.tar")


# --------------------------------------------------------------------------------------- memory

def png(value: int) -> bytes:
    """An image of one value."""
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (value,) * 3).save(file, "PNG")
    return file.getvalue()


def write_index(path: Path, images: int) -> None:
    """A shard of so many images that is not there, as far as its index goes."""
    path.touch()
    stat = path.stat()
    about = {"version": shards.VERSION, "suffixes": [".jpg"], "count": images, "ignored": {},
             "check": 0, "stamp": [stat.st_size, str(stat.st_mtime_ns)]}
    line = shards.json.dumps(about).encode() + b"\n"
    Path(f"{path}.index").write_bytes(line)
    os.truncate(f"{path}.index", len(line) + images * 16)       # of zeros, without a disk


def resident() -> float:
    """MB of this process that are in memory, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_ten_million_images_take_little_memory(tmp_path):
    """At most 50 MB, wherever in them one reads; most of it is what is mapped of indices."""
    for number in range(1000):
        write_index(tmp_path / f"{number:05}.tar", 10_000)
    before = resident()
    found = Shards(expand(str(tmp_path / "{00000..00999}.tar")), [".jpg"])
    order = WindowOrder(found.counts, 512, 0, 0)
    for step in range(0, len(order), 200):
        for place in map(found.place, order[step]):
            found.open(place[0]).entries[place[1]].item()
    assert len(found) == 10**7 and resident() - before < 50


def test_a_read_that_returns_less_goes_on(tmp_path, monkeypatch):
    """As of members beyond 2 GB, which one call does not read whole."""
    path = write_tar(tmp_path / "0.tar", {"a.png": bytes(range(256)) * 40})
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, offset: read(handle, min(size, 999),
                                                                       offset))
    assert contents(path)["a.png"] == bytes(range(256)) * 40
