"""The message of an error that a library has wrapped names its innermost cause."""

import errno

from hf_accel.utils.causes import causes, reason


def wrapped(inner: Exception, *outer: Exception) -> Exception:
    """The last of `outer`, each raised from the one before."""
    for error in outer:
        try:
            raise error from inner
        except Exception as raised:
            inner = raised
    return inner


def test_reason_names_the_innermost_cause():
    full = OSError(errno.ENOSPC, "No space left on device")
    error = wrapped(full, KeyError("shard"), RuntimeError("An error occurred\nwhile generating the dataset."))
    assert causes(error)[-1] is full
    assert reason(error) == (
        "An error occurred while generating the dataset; because of [Errno 28] No space left on device"
    )


def test_reason_of_an_error_without_cause_is_its_message():
    assert reason(ValueError("no image\ncolumn.")) == "no image column"
    assert reason(KeyError("image")) == "KeyError: 'image'"
    assert reason(EOFError()) == "EOFError"


def test_reason_says_nothing_twice():
    assert reason(wrapped(ValueError("header too large"), OSError("a.safetensors: header too large"))) == (
        "a.safetensors: header too large"
    )


def test_a_suppressed_context_is_no_cause():
    try:
        try:
            raise KeyError("cache")
        except KeyError:
            raise ValueError("no such file") from None
    except ValueError as error:
        assert reason(error) == "no such file"


def test_a_circle_of_causes_ends():
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert reason(one) == "one; because of two"
