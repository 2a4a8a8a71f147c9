"""Checkpoints by name on the Hugging Face hub: hf-hub:owner/name, with /file or @revision."""

import re
from functools import cache
from pathlib import Path

from huggingface_hub import errors, hf_hub_download
from huggingface_hub.utils import disable_progress_bars

from util import UserError
from util.distributed import is_main

PREFIX = "hf-hub:"
# What this project writes, in the order in which it is looked for.
FILES = ("declip.safetensors", "catseg.safetensors", "fvit.safetensors", "ov_dquo.safetensors")
NAME = re.compile(PREFIX + r"([\w.-]+/[\w.-]+)(?:/([\w./-]+))?(?:@([\w./-]+))?", re.ASCII)


class Recorded(str):
    """A name that only a file gives, so that nothing may be downloaded for it: the cache serves."""


class NotThere(UserError):
    """A model of the hub has no such file."""


class NotInCache(UserError):
    """The hub can't be reached, and the cache has no such file."""


def is_remote(name: object) -> bool:
    """Whether a checkpoint is named on the hub."""
    return isinstance(name, str) and name.startswith(PREFIX)


def home(name: str | Path | None) -> Path:
    """The folder of a checkpoint, where what is made of it goes; out/ without one on this machine.
    """
    return Path("out") if not name or is_remote(name) else Path(name).parent


def local(name: str | Path, files: tuple[str, ...] = FILES) -> str | Path:
    """A checkpoint's path: that of a file as it is; one on the hub is downloaded, or in the cache.

    files: those that are looked for if the name has none.
    Raises UserError if it can't be had, and for a name that only a file gives.
    """
    if not is_remote(name):
        return name
    try:
        return fetch(str(name), files, may_download=not isinstance(name, Recorded))
    except NotInCache:
        if not isinstance(name, Recorded):
            raise
        raise UserError(f"A file says that it needs {name}, which is not in the cache, and a file "
                        "downloads nothing; if you trust it, name that yourself, once, as --ckpt "
                        "of tools.segment.") from None


@cache      # a branch may move while a program runs
def fetch(name: str, files: tuple[str, ...], may_download: bool) -> str:
    """A name on the hub -> the path in the cache; with a progress bar, of the first rank."""
    parts = NAME.fullmatch(name)
    if not parts:
        raise UserError(f"{name} is no name of a checkpoint; give hf-hub:owner/name, with /file or "
                        "@revision behind it if need be.")
    repo, file, revision = parts.groups()
    if not is_main():
        disable_progress_bars()
    files, is_offline = (file,) if file else files, not may_download
    for file in files:
        try:
            return hf_hub_download(repo, file, revision=revision, local_files_only=is_offline)
        except errors.LocalEntryNotFoundError:
            is_offline = True       # another file may be in the cache
        except errors.EntryNotFoundError:
            continue
        except Exception as error:      # of the repository, the revision, the network, the disk
            raise UserError(f"{name} can't be had ({reason_of(error)}); check the name and the "
                            "network.") from None
    if is_offline:
        raise NotInCache(f"{name} is not in the cache, and the Hugging Face hub can't be reached; "
                         "check the network, or give a file.")
    raise NotThere(f"{name} has no {' or '.join(files)}; name the file that you mean, "
                   f"{PREFIX}{repo}/FILE.")


def reason_of(error: Exception) -> str:
    """Why a download failed, in a few words."""
    for kind, words in ((errors.GatedRepoError, "its owner grants access, log in first"),
                        (errors.RepositoryNotFoundError, "there is no such model, or it is private "
                                                         "and you must log in"),
                        (errors.RevisionNotFoundError, "it has no such revision")):
        if isinstance(error, kind):
            return words
    return " ".join(str(error).split())[:200] or type(error).__name__


def chosen(model: str | None, pretrained: str | None) -> tuple[str | None, str | None]:
    """What DeCLIP is asked for -> the same with a file in place of what is on the hub.

    A model there that has a declip.safetensors is that, whatever tag goes with it: what else it
    has, for other code, does not say with which attention it was trained.
    """
    if is_remote(pretrained):
        return model, str(local(pretrained))
    if is_remote(model) and not (pretrained and Path(pretrained).is_file()):
        try:
            return None, str(local(model, FILES[:1]))
        except NotThere:        # it is open_clip's
            pass
        except NotInCache:
            if not pretrained:
                raise
    return model, pretrained
