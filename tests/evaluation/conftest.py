import pytest

from hf_accel.distributed.stopping import clear_stop


@pytest.fixture(autouse=True)
def no_request_to_stop():
    """A stop that a test has requested is none to the next test."""
    yield
    clear_stop()
