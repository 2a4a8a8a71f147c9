"""Class names as a person types them, on a command line, in a page or in a program."""

import re
from collections.abc import Iterable

from data import Classes, first_twice, make_classes, read_classes
from util import UserError


def names_any(entry: str) -> bool:
    """Whether a text has a name among its commas and |."""
    return re.search(r"[^\s,|]", entry) is not None


def classes_of(entries: Iterable[str]) -> Classes:
    """A class for each text that has a name, its synonyms with commas or | between."""
    return make_classes([entry.replace("|", ",") for entry in entries if names_any(entry)])


def typed_classes(text: str) -> Classes:
    """Names with commas between, their synonyms with |, or those of a .txt file.

    Raises UserError for a name twice, in capitals or not.
    """
    if text.endswith(".txt"):
        return read_classes(text)
    classes = classes_of(text.split(","))
    return check_classes(classes) if classes.names else classes


def check_classes(classes: Classes) -> Classes:
    """The same; UserError if it names none, or one twice, in capitals or not."""
    if not classes.names:
        raise UserError('CLASSES names no class; say what to look for, such as --classes "cat, '
                        'wooden chair, grass", or give a class file.')
    twice = first_twice(classes.prompts)
    if twice:
        raise UserError(f"CLASSES names {twice!r} twice; remove one.")
    return classes
