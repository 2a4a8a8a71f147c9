"""util/names.py: any number of names, sorted, in a file."""

import os
import random

import pytest

from util import names
from util.names import Names, write_names, write_sorted


def test_names_are_sorted_through_chunks(tmp_path, monkeypatch):
    """As `sorted` does it, whatever the names are and however many fit into memory."""
    rng = random.Random(0)
    given = [f"{rng.randrange(50)}/{rng.random():.9f}\u4e2d.jpg" for _ in range(3000)]
    given += ["with\nlines.jpg", os.fsdecode(b"caf\xe9.jpg"), "a\tb.jpg", "\U0001f600.jpg"]
    for chunk in (10**6, 700):
        monkeypatch.setattr(names, "IN_CHUNK", chunk)
        write_sorted(tmp_path / "x.names", iter(given), {"of": 1})
        found = Names(tmp_path / "x.names", "folder")
        assert list(found) == [f"folder/{name}" for name in sorted(given)]
        assert found[2999] == f"folder/{sorted(given)[2999]}" and found.about == {"of": 1}
    size = (tmp_path / "x.names").stat().st_size
    assert size < 0.7 * len("".join(given))
    with pytest.raises(IndexError):
        found[len(given)]


def test_a_name_more_is_another_fingerprint(tmp_path):
    prints = set()
    for given in (["a", "b"], ["a", "c"], ["ab"], []):
        write_names(tmp_path / "x", given)
        prints.add(Names(tmp_path / "x").fingerprint)
    assert len(prints) == 4


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    write_names(tmp_path / "x", map(str, range(1000)))
    good = (tmp_path / "x").read_bytes()
    for end in (0, 5, 100, len(good) - 1):
        (tmp_path / "y").write_bytes(good[:end])
        with pytest.raises((ValueError, OSError)):
            Names(tmp_path / "y")
