"""Two processes of a test's own script, and what they write."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]

BEGIN = """
import sys, torch, torch.distributed as dist
folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
assert dist.get_world_size() == 2
"""
END = """
torch.save(results, f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def run_two(script: str, folder: Path) -> list[Any]:
    """The `results` of `script` on each of two connected processes, which know their `rank`."""
    command = [sys.executable, "-c", BEGIN + script + END, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"env": environment, "cwd": ROOT, "stderr": subprocess.PIPE}
    return results_of([subprocess.Popen([*command, str(rank)], **options) for rank in (0, 1)], folder)


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
