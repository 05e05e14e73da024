"""Numbers and errors as people read them."""

import re

_OBJECT = re.compile(r" ?<[\w. ]*\b(object\b|name=)[^>]*>")  # as in Pillow's errors
_NUMBER = re.compile(r"^\[Errno -?\d+\] ")


def percent(share: float) -> str:
    """A share in percent. Commands, log and page have as many digits, so that they show one number alike."""
    return f"{100 * share:.1f} %"


def in_words(error: BaseException | str) -> str:
    """An error's message without Python objects and numbers of system errors."""
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return _NUMBER.sub("", _OBJECT.sub("", text)) or type(error).__name__
