"""Errors of the caches of Hugging Face, which every download writes, with what to do about them."""

import os
from pathlib import Path

from huggingface_hub import constants

from .causes import UNWRITABLE, causes, lacks_room


def explain_download(error: BaseException, why: str) -> str:
    """Say why a file of a model on the Hub cannot be stored in the cache, or else `why`, which is about the file."""
    cache = "HF_HUB_CACHE", constants.HF_HUB_CACHE
    return describe_refusal(error, *cache) or why + (offer_room(*cache) if lacks_room(error) else "")


def describe_refusal(error: BaseException, variable: str, cache: str | Path) -> str | None:
    """Say what to do if nothing may be written in a cache, or in a folder that it would lie in. None: it is not that.

    Args:
        variable: the environment variable that names the cache, whose folder is `cache` now.
    """
    folders = [Path(folder).absolute() for folder in (cache, constants.HF_HOME)]
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in UNWRITABLE and cause.filename:
            path = Path(os.fsdecode(cause.filename)).absolute()
            if any(folder.is_relative_to(path) or path.is_relative_to(folder) for folder in folders):
                return (
                    f"the cache of Hugging Face cannot be written: {cause}; set HF_HOME, or {variable} (now {cache}), "
                    "to a folder that can be written"
                )
    return None


def offer_room(variable: str, cache: str | Path) -> str:
    """Say what to do if there is no room in a cache, for the end of an error."""
    return f"; make room in {cache}, or set {variable} to a folder on another disk"
