"""The images of the tests of tasks."""

from pathlib import Path

import pytest

from tests.tiny_runs import image_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))
