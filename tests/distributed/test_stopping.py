"""A requested stop ends a loop between two items, on all processes at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_accel.distributed.stopping import Stopped, clear_stop, request_stop, stop_requested, until_stopped
from tests.two_processes import results_of


@pytest.fixture(autouse=True)
def no_request():
    clear_stop()
    yield
    clear_stop()


def test_without_a_request_all_items_come():
    assert list(until_stopped([1, 2, 3])) == [1, 2, 3] and list(until_stopped([])) == []


def test_a_request_ends_the_loop_before_the_next_item():
    seen = []
    with pytest.raises(Stopped):
        for item in until_stopped(range(5)):
            seen.append(item)
            if item == 2:
                request_stop()
    assert seen == [0, 1, 2] and stop_requested()


def test_a_request_during_the_last_item_counts():
    with pytest.raises(Stopped):
        for _ in until_stopped([1]):
            request_stop()


SCRIPT = """
import sys, torch, torch.distributed as dist
from hf_accel.distributed import all_reduce
from hf_accel.distributed.stopping import Stopped, clear_stop, request_stop, until_stopped
folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
seen, stopped = [], []
for asked in (None, 0, 1):  # nobody, then one process each time; the numbers of items differ
    clear_stop()
    items = 0
    try:
        for item in until_stopped(range(3 + rank)):
            items += 1
            if asked == rank and item == 1:
                request_stop()
        all_reduce(torch.ones(1))  # what a loop's result goes through: a process must not be alone in it
        stopped.append(False)
    except Stopped:
        stopped.append(True)
    seen.append(items)
torch.save((seen, stopped, dist.get_world_size()), f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_request_to_one_process_stops_both(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank)], env=environment, cwd=root, stderr=subprocess.PIPE) for rank in (0, 1)
    ]
    one, other = results_of(processes, tmp_path)
    assert one == ([3, 2, 3], [False, True, True], 2)
    assert other == ([4, 4, 2], [False, True, True], 2)
