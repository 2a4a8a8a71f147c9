"""Files that are written whole or not at all, and json files that say what is wrong with them."""

import json
import os
import re
import uuid
from collections.abc import Callable
from pathlib import Path

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
    return in_repository if in_repository.exists() and not Path(path).exists() else Path(path)


def write_json(path: str | Path, content: dict) -> None:
    """Writes `content` as indented json."""
    text = json.dumps(content, indent=2)
    atomic_write(path, lambda file: Path(file).write_text(text + "\n"))


def read_json(path: str | Path, *fields: str) -> dict:
    """A json file that must have `fields`; UserError otherwise."""
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}; set the option that names it, or put the "
                        "annotations there.")
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not json ({error}); download it again.") from None
    missing = [field for field in fields if not isinstance(content, dict) or field not in content]
    if missing:
        raise UserError(f"{path} has no field {missing[0]!r}; a COCO-style file with "
                        f"{', '.join(fields)} is expected.")
    return content
