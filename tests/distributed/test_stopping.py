"""A requested stop ends a loop between two items, on all processes at once."""

import pytest

from hf_accel.distributed.stopping import Stopped, request_stop, stop_requested, until_stopped
from tests.two_processes import run_two


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
from hf_accel.distributed import all_gather_objects, all_reduce
from hf_accel.distributed.stopping import Stopped, clear_stop, request_stop, until_stopped
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
results = (seen, stopped, all_gather_objects({rank: "x" * rank}))
"""


@pytest.mark.slow
def test_two_processes_stop_together_and_gather_objects(tmp_path):
    objects = [{0: ""}, {1: "x"}]
    one, other = run_two(SCRIPT, tmp_path)
    assert one == ([3, 2, 3], [False, True, True], objects)
    assert other == ([4, 4, 2], [False, True, True], objects)
