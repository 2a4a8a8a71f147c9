"""util/files.py: files that are whole or not there, jsons that are none."""

from pathlib import Path

import pytest

from util.files import atomic_write, read_json


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    def fail(file: str) -> None:
        Path(file).write_text("half")
        raise OSError("disk full")

    path = tmp_path / "deep" / "file"
    atomic_write(path, lambda file: Path(file).write_text("old"))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ['"""No json."""', "[" * 10**5])
def test_what_is_no_json_is_one_sentence(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json is not json") as error:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(error.value)
