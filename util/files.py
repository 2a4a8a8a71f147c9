"""Files that are written whole or not at all, and json files that say what is wrong with them."""

import errno
import json
import os
import re
import reprlib
import uuid
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

from safetensors import SafetensorError

from util import UserError

ROOT = Path(__file__).parent.parent     # the repository
MAX_NAME = 255      # bytes that a file's name may have


def atomic_write(path: str | Path, write: Callable[[str], None]) -> None:
    """Calls `write` with a temporary name, flushes that file to the disk and renames it to `path`.

    So `path` is always whole: the new file, or the old one. Raises OSError if the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process's number would not do: containers that share a disk count their own from 1.
    short = os.fsdecode(os.fsencode(path.name)[:MAX_NAME - 37])
    temporary = path.with_name(f"{short}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode     # safetensors would make it readable by its owner only
        write(str(temporary))
        temporary.chmod(mode)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (SafetensorError, RuntimeError) as error:
        # A full disk raises these in safetensors and torch.save.
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        raise OSError(f"{path} could not be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def is_half_written(path: Path, names: str) -> bool:
    """Whether a file is what a killed atomic_write left of one whose name matches `names`."""
    return re.fullmatch(rf"({names})\.[0-9a-f]{{32}}\.tmp", path.name) is not None


def sync_folder(folder: Path) -> None:
    """Flushes a folder's list of names, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def find(path: str | Path) -> Path:
    """A path as seen from the present folder or, if nothing is there, from the repository."""
    in_repository = ROOT / path
    is_there = os.path.exists(in_repository) and not os.path.exists(path)
    return in_repository if is_there else Path(path)


def last_part(text: str) -> str:
    """The name of a file or folder, `local-dir:` too, without where it is; `hf-hub:` names stay."""
    is_remote = ":" in text and not text.startswith("local-dir:")
    return text if is_remote else text.removeprefix("local-dir:").rstrip("/").rsplit("/", 1)[-1]


def write_json(path: str | Path, content: dict) -> None:
    """Writes `content` as indented json."""
    text = json.dumps(content, indent=2)
    atomic_write(path, lambda file: Path(file).write_text(text + "\n"))


def read_json(path: str | Path, *fields: str) -> dict:
    """A json file that must have `fields`; UserError otherwise."""
    if not os.path.isfile(path):
        raise UserError(f"There is no file {path}; set the option that names it, or put the "
                        "annotations there.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not json ({error}); correct it, or put a whole copy there."
                        ) from None
    missing = [field for field in fields if not isinstance(content, dict) or field not in content]
    if missing:
        raise UserError(f"{path} has no field {missing[0]!r}; a COCO-style file with "
                        f"{', '.join(fields)} is expected.")
    return content


# ------------------------------------------------------------------ what a file says of itself

Schema = dict[str, Callable[[object], bool]]        # whether a field may have a value
MAX_TEXT = 4096


def is_text(value: object) -> bool:
    """Whether a value is a text that a file or a class may be called by."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in value)     # not in any encoding


def is_name(value: object) -> bool:
    """Whether a value is a text that a file system takes as a path."""
    return is_text(value) and len(value) < MAX_TEXT and max(
        map(len, os.fsencode(value).split(b"/"))) < 256


def is_number(value: object, least: float = -1e9, most: float = 1e9) -> bool:
    """Whether a value is a number in a range; nan is in none."""
    return type(value) in (int, float) and least <= value <= most


def is_list(value: object, fits: Callable[[object], bool], length: int | None = None) -> bool:
    """Whether a value is a list, of some length, of what fits."""
    return isinstance(value, list) and length in (None, len(value)) and all(map(fits, value))


# Values by annotation: of the fields of a NamedTuple, and of settings.
KINDS = {bool: lambda value: isinstance(value, bool), str: lambda value: is_text(value)
         and len(value) <= MAX_TEXT, float: is_number, NoneType: lambda value: value is None,
         int: lambda value: type(value) is int and 0 <= value < 2**16}


def is_of(hint: object, value: object) -> bool:
    """Whether a value has the type of an annotation such as `str | None`, in usual ranges."""
    return any(KINDS[kind](value) for kind in get_args(hint) or (hint,))


def schema_of(design: type) -> Schema:
    """The schema that the annotations of a NamedTuple are."""
    return {name: partial(is_of, hint) for name, hint in get_type_hints(design).items()}


def wrong_field(content: object, schema: Schema, needed: Collection[str]) -> str:
    """What of a record does not fit its schema, for a sentence; "" if all does."""
    if not isinstance(content, dict):
        return f"it is {reprlib.repr(content)}"
    missing = next((name for name in needed if name not in content), None)
    if missing:
        return f"it has no {missing!r}"
    return next((f"its {name!r:.60} is {reprlib.repr(value)}" for name, value in content.items()
                 if name not in schema or not schema[name](value)), "")
