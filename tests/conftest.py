"""Settings for all tests: one torch thread each (xdist runs several), no network, no GPU tests without a GPU."""

import os

# Before huggingface_hub, datasets and transformers are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from hf_accel.distributed.stopping import clear_stop

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_request_to_stop():
    """A stop that a test has requested, in this process, is none to the next test."""
    clear_stop()
    yield
    clear_stop()


@pytest.fixture(scope="module")
def own_cache_and_threads(tmp_path_factory):
    """For whole runs inside a test: data sets are cached in a folder of the module's, and one thread computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setenv("OMP_NUM_THREADS", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # An earlier run in this process may have set another number.
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def blank_figures():
    """For whole runs inside a test: the two figures that each run draws are left empty, as they take longer than it."""

    def plot_curves(log_history, path, **_):
        path.touch()

    def plot_schedule(schedule, cost, image_size, path, **_):
        for suffix in (".png", ".svg"):
            path.with_suffix(suffix).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_accel.training.finish.plot_curves", plot_curves)
        patch.setattr("hf_accel.hub.publish.plot_schedule", plot_schedule)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords hold the names of folders, too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
