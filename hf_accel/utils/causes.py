"""The causes of an error that a library has wrapped in another one, and the message that names the innermost."""

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the errors that mean "no room": on the disk, in the quota."""

UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
"""Numbers of the errors of a folder in which nothing may be written."""


def causes(error: BaseException) -> list[BaseException]:
    """The error and those it was raised from or during, the innermost last."""
    chain = [error]
    while True:
        last = chain[-1]
        cause = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if cause is None or cause in chain:
            return chain
        chain.append(cause)


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the error's own message and, where it wraps others, the innermost one's."""
    chain = causes(error)
    own, inner = _line(error), _line(chain[-1])
    if inner in own or own in inner:
        own, inner = max(own, inner, key=len), ""
    return own + f"; because of {inner}" * bool(inner)


def _line(error: BaseException) -> str:
    """The message without line breaks, after the kind of error where the message alone may say nothing."""
    text = " ".join(str(error).split()).rstrip(".;")
    plain = isinstance(error, OSError | ValueError | RuntimeError) and text
    return text if plain else f"{type(error).__name__}: {text}".rstrip(": ")


def lacks_room(error: BaseException) -> bool:
    """Whether a full disk or quota is behind the error."""
    return any(
        # Libraries that raise errors without a number quote the system's own words.
        getattr(cause, "errno", None) in FULL or any(os.strerror(number) in str(cause) for number in FULL)
        for cause in causes(error)
    )
