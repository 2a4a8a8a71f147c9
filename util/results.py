"""The results of evaluations as files, many in one.

    {"results": [{"of": {"benchmark": "voc20", "attention": "q", "pamr": 0, ...}, "mIoU": 85.0, ...,
                  "settings": {...}}, ...]}

`of` says what was evaluated and how: a newer result of an equal one replaces it, any other joins at
the end. Its keys are the script's options, with the values that were used; `checksum` is that of
the model's weights, `data_checksum` that of the class names and the number of images.
"""

import fcntl
import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

from torch import nn

from util import UserError
from util.files import write_json
from util.hub import home
from util.precision import find_precision
from util.run import MAY_CHANGE_ON_RESUME
from util.weights import state_checksum

# Settings that change no figure, and those that name what several results are of.
NOT_IDENTIFYING = (*MAY_CHANGE_ON_RESUME, "CACHE", "BATCH_SIZE", "CROP_BATCH", "WINDOW_BATCH",
                   "BENCHMARKS", "SIZES", "DETECTIONS")


def options_of(cfg: SimpleNamespace) -> dict:
    """The settings that can change a figure, by their options' names."""
    return {name.lower(): value for name, value in vars(cfg).items()
            if name not in NOT_IDENTIFYING}


def identity(cfg: SimpleNamespace, model: nn.Module, data: object, /, **found: object) -> dict:
    """What a result is of. UserError if it could not be written.

    data: class names and number of images, in any form of json. found: what else is evaluated, and
    the values of settings that leave them open.
    """
    folder = next(path for path in result_path(cfg, "x").parents if path.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"Nothing can be written into {folder}; set OUT to another folder.")
    device = next(model.parameters()).device
    return options_of(cfg) | {"precision": find_precision(cfg.PRECISION, device)} | found | {
        "checksum": state_checksum(model.state_dict(), ""),
        "data_checksum": f"{zlib.crc32(json.dumps(data).encode()):08x}"}


def result_path(cfg: SimpleNamespace, name: str) -> Path:
    """NAME.json in OUT, else beside the checkpoint, else, as for one of the hub, in out/."""
    return Path(cfg.OUT or home(cfg.CKPT)) / f"{name}.json"


def told_apart(names: Sequence[str]) -> list[str]:
    """A key for each class: its name, with its number if an earlier class has that name."""
    # No name of a class file has a comma in it.
    return [f"{name}, class {k}" if name in names[:k] else name for k, name in enumerate(names)]


def write_result(cfg: SimpleNamespace, name: str, of: dict, figures: dict) -> None:
    """Adds a result to NAME.json, or puts it in the place of one of an equal `of`.

    Evaluations that end together wait for each other. A file of that name that holds no results is
    kept under another.
    """
    path = result_path(cfg, name)
    result = json.loads(json.dumps({"of": of} | figures | {"settings": vars(cfg)}))     # no tuples
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / ".results.lock", "a") as lock:
        with suppress(OSError):     # a disk without locks
            fcntl.lockf(lock, fcntl.LOCK_EX)
        try:
            others = read_results(path) if path.exists() else []
        except UserError:
            kept, others = path.with_suffix(f".old-{time.time_ns()}.json"), []
            path.rename(kept)
            print(f"{path} held no results in the present layout; it is kept as {kept}")
        write_json(path, {"results": [*(other for other in others if other["of"] != result["of"]),
                                      result]})
    print(f"written to {path}")


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
