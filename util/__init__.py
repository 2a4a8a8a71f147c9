"""Machinery that the scripts share and that knows nothing of CLIP."""


class UserError(ValueError):
    """What a user can mend, in one sentence: what was found, what was expected, what to do.

    Scripts end with that sentence alone.
    """
