"""Machinery that the scripts share and that knows nothing of CLIP."""

import unicodedata


def printable(text: str) -> str:
    """A text whose control characters, which could command a terminal, and bytes that are no text
    are spelled out."""
    return "".join(letter if unicodedata.category(letter) not in ("Cc", "Cs") or letter == "\n"
                   else letter.encode("unicode_escape").decode() for letter in text)


class UserError(ValueError):
    """What a user can mend, in one sentence: what was found, what was expected, what to do.

    Scripts end with that sentence alone.
    """
