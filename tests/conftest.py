"""Settings for all tests: one torch thread each (xdist runs several), no network, no GPU tests without a GPU."""

import os

# Before huggingface_hub, datasets and transformers are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
