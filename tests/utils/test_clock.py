"""Processor seconds count what child processes computed."""

import subprocess
import sys
import time

from hf_accel.utils.clock import cpu_seconds

BUSY = "import time\nwhile time.process_time() < 0.3: pass"


def test_children_count_once_they_have_ended_and_waiting_does_not():
    before, own = cpu_seconds(), time.process_time()
    subprocess.run([sys.executable, "-c", BUSY], check=True)
    time.sleep(0.2)
    taken, own = cpu_seconds() - before, time.process_time() - own
    assert own < 0.1 and taken >= 0.25
