"""The results of evaluations as files: many in one, told apart by what was evaluated and how.

    {"results": [{"of": {"benchmark": "voc20", "attention": "q", "pamr": 0, ...}, "mIoU": 85.0, ...,
                  "settings": {...}}, ...]}

`of` identifies a result: a newer one of equal identity replaces it, any other joins it, at the end.
Its keys are the script's options, with the values that were used; besides, `checksum` is that of
the weights, `class_list` of the names, and `image_count` the number of images.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import SimpleNamespace

from torch import nn

from util import UserError
from util.files import write_json
from util.precision import find_precision
from util.run import MAY_CHANGE_ON_RESUME
from util.weights import state_checksum

# Settings that change no figure, and those with the names of several results.
NOT_IDENTIFYING = (*MAY_CHANGE_ON_RESUME, "CACHE", "BATCH_SIZE", "CROP_BATCH", "WINDOW_BATCH",
                   "BENCHMARKS", "SIZES")


def options_of(cfg: SimpleNamespace) -> dict:
    """The settings that can change a figure, by their options' names."""
    return {name.lower(): value for name, value in vars(cfg).items()
            if name not in NOT_IDENTIFYING}


def identity(cfg: SimpleNamespace, model: nn.Module, classes: object, /, **found: object) -> dict:
    """What a result is of, the `of` above: settings, the model's weights, the classes' names.

    classes: anything that json can hold. found: what else was evaluated, and what stands for
    settings that are None.
    """
    device = next(model.parameters()).device
    return options_of(cfg) | {"precision": find_precision(cfg.PRECISION, device)} | found | {
        "checksum": state_checksum(model.state_dict(), ""),
        "class_list": f"{zlib.crc32(json.dumps(classes).encode()):08x}"}


def told_apart(names: Sequence[str]) -> list[str]:
    """A key for each class: its name or, if an earlier class has that one, such as "crane (2)"."""
    keys: dict[str, None] = {}
    for name in names:
        others = (f"{name} ({number})" for number in count(2))
        keys[name if name not in keys else next(
            key for key in others if key not in keys and key not in names)] = None
    return [*keys]


def result_path(cfg: SimpleNamespace, name: str) -> Path:
    """NAME.json in OUT or beside the checkpoint. UserError, before the work, if it can't go there.
    """
    path = Path(cfg.OUT or (Path(cfg.CKPT).parent if cfg.CKPT else "out")) / f"{name}.json"
    there = next(folder for folder in path.parents if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"The result is to go into {path}, but {there} is no folder that one may "
                        "write into; set OUT to one.")
    for setting, value in vars(cfg).items():
        for file in value if isinstance(value, tuple) else [value]:
            if isinstance(file, str) and os.path.realpath(file) == os.path.realpath(path):
                raise UserError(f"The result is to go into {path}, but that is what {setting} "
                                "names; set OUT to another folder.")
    return path


def write_result(cfg: SimpleNamespace, name: str, of: dict, figures: dict) -> Path:
    """Adds a result to `result_path` -> the path.

    It replaces one of an equal identity `of`. Evaluations that end together wait for each other. A
    file of that name that holds no results is kept under another name.
    """
    path = result_path(cfg, name)
    # As json has it: no tuples.
    result = json.loads(json.dumps({"of": of} | figures | {"settings": vars(cfg)}))
    with locked(path.parent):
        others = [other for other in results_there(path) if other["of"] != result["of"]]
        write_json(path, {"results": [*others, result]})
    print(f"written to {path}")
    return path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it, no other process writes results into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".results.lock", "a") as file:
        with suppress(OSError):     # a disk that has no locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def results_there(path: Path) -> list[dict]:
    """The results in a file; none if it holds none, and then it gets another name."""
    if not path.exists():
        return []
    try:
        return read_results(path)
    except UserError:
        aside = next(name for number in count(1)
                     if not (name := path.with_name(f"{path.stem}.old{number}.json")).exists())
        path.rename(aside)
        print(f"{path} held no results in the present layout; it is kept as {aside}")
        return []


def read_results(path: str | Path, /, **wanted: object) -> list[dict]:
    """The results in a file whose `of` has what is wanted, the newest last.

    Raises UserError if there is no such file, or if it is not as write_result makes it.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no file of results {path}; evaluate first, or name another.")
    with as_written(path):
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if content.keys() != {"results"} or not isinstance(content["results"], list):
            raise ValueError("its fields are others, perhaps an earlier version's")
        return [result for result in content["results"] if result["of"] | wanted == result["of"]]


@contextmanager
def as_written(path: str | Path) -> Iterator[None]:
    """Raises UserError for what is found missing or wrong in a file of results within it."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} holds no results as evaluations write them ({error}); name "
                        "another file, or evaluate again.") from None
