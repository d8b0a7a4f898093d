"""Two processes of a test's own script, and what they write."""

import subprocess
from pathlib import Path
from typing import Any

import torch


def results_of(processes: list[subprocess.Popen], folder: Path) -> list[Any]:
    """What each rank saved as `folder / RANK.pt`; all are ended, whatever happens.

    Judged by what they wrote: a gloo process may abort at exit after all its work is done.
    """
    try:
        errors = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    written = [folder / f"{rank}.pt" for rank in range(len(processes))]
    assert all(path.exists() for path in written), errors
    return [torch.load(path) for path in written]
